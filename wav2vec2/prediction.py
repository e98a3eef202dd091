"""Predictions of a model with a task head.

    import wav2vec2

    model = wav2vec2.load("exp/digits/finetuned.pth")
    wav2vec2.predict(model, "call.flac")  # text: 'three one seven'
    wav2vec2.predict(model, paths)  # a list, one result for each

``predict_stream`` and ``--stream`` give them as the sound comes, from a streaming model.

``python -m wav2vec2.prediction MODEL AUDIO...`` writes one line for each file, with fields separated by tabs: its path,
then the text, or the label and its probability. For stretches it writes a line for each: path, start and end in
seconds, label. A file that cannot be used is named on stderr, and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .audio import SAMPLE_RATE
from .files.errors import UserError, visible
from .threads import choose_waiting

# Functions import what needs torch, so that the command refuses a wrong flag first.
if TYPE_CHECKING:
    from torch import Tensor

    from .model import Wav2Vec2Model
    from .task_model import TaskModel


class Labelled(NamedTuple):
    """The most likely label of an utterance, and its probability."""

    label: str
    probability: float


class Stretch(NamedTuple):
    """A label from ``start`` to ``end`` in seconds."""

    start: float
    end: float
    label: str


Prediction = str | Labelled | list[Stretch]


def predict(model: "Wav2Vec2Model", inputs: Any, **options: Any) -> Prediction | list[Prediction]:
    """Return what the head recognises in one waveform or file, or in several.

    Inputs and options are those of :func:`~wav2vec2.inference.extract`, except ``layers``. Audio longer than
    ``max_seconds`` is computed in chunks, and still gets one label.

    Returns:
        For one input the text (str), the label (:class:`Labelled`) or the stretches (a list of :class:`Stretch`,
        one for all consecutive frames with one label), by the kind of head. For several a list of these, in their
        order.

    Raises:
        UserError: the model has no task head; others as :func:`~wav2vec2.inference.extract`.
    """
    from .inference import is_input

    is_single = is_input(inputs)
    results = predict_iter(model, [inputs] if is_single else inputs, **options)
    results = cast(Iterator[Prediction], results)  # None is only for errors, which are raised here
    return next(results) if is_single else list(results)


def predict_iter(
    model: "Wav2Vec2Model",
    inputs: Iterable[Any],
    *,
    on_error: Callable[[int, UserError], None] | None = None,
    **options: Any,
) -> Iterator[Prediction | None]:
    """Yield the results of :func:`predict` one at a time; ``on_error`` is that of ``extract_iter``."""
    from .inference import extract_iter
    from .task_model import TaskModel

    if not isinstance(model, TaskModel):
        raise UserError("model: has no task head, expected a fine-tuned one; add one with finetune.py")
    layers = None if model.head_settings.layers == "weighted" else "output"
    features = extract_iter(model, inputs, layers=layers, on_error=on_error, **options)
    return (None if states is None else _prediction(model, states) for states in features)


def _prediction(model: "TaskModel", states: "Tensor") -> Prediction:
    """Return one utterance's result from its logits (frames, outputs) of text, else from what the head reads."""
    import torch

    from .task_model import CLIPS

    settings = model.head_settings
    if model.head is None:
        return "".join(_text(model, states.argmax(-1).tolist()))
    states = states.to(model.head.linear.weight.device)  # (layers, frames, D), or (frames, D) of the last
    with torch.no_grad():
        logits = model.head(list(states[:, None]) if settings.layers == "weighted" else [states[None]], None)[0].float()
    if settings.kind == CLIPS:
        probability, best = logits.softmax(-1).max(-1)
        return Labelled(settings.labels[best], probability.item())
    return list(_stretches(model, logits.argmax(-1).tolist()))


def _text(model: "TaskModel", best: Iterable[int]) -> Iterator[str]:
    """Decode CTC greedily: yield pieces of text as soon as the best outputs of frames say them."""
    separator = ""
    for output, _ in groupby(best):
        if output:  # 0 is the blank
            yield separator + model.labels[output - 1]
            separator = " " if model.head_settings.units == "words" else ""


def _stretches(model: "TaskModel", best: Iterable[int]) -> Iterator[Stretch]:
    """Join the frames' labels into stretches, which change half-way between the middles of two frames.

    The first begins with the audio, the last ends with the last frame. Each comes when the next one begins.
    """
    extractor = model.feature_extractor
    hop, window = extractor.stride, extractor.receptive_field
    start, behind, label = 0.0, 0, None
    for following, frames in groupby(best):
        if label is not None:
            end = (behind * hop + (window - hop) / 2) / SAMPLE_RATE
            yield Stretch(start, end, model.labels[label])
            start = end
        label = following
        behind += sum(1 for _ in frames)
    if label is not None:
        yield Stretch(start, ((behind - 1) * hop + window) / SAMPLE_RATE, model.labels[label])


def streaming_task_model(model: "Wav2Vec2Model", source: str) -> "TaskModel":
    """Return the model if it streams and has a head for text or segments.

    Raises:
        UserError: it does not; ``source`` is what the error calls it.
    """
    from .streaming import check_streaming
    from .task_model import CLIPS, TaskModel

    check_streaming(model, source)
    if not isinstance(model, TaskModel) or model.kind == CLIPS:
        raise UserError(
            f"{source}: has no head for text or segments, expected one; others have no answer before the end"
        )
    return model


def predict_stream(model: "Wav2Vec2Model", blocks: Iterable[Any]) -> Iterator[str | Stretch]:
    """Yield what the head of a streaming model recognises as soon as the sound says it.

    Args:
        model: a streaming model with a head for text or segments.
        blocks: the samples as they come, each what :meth:`~wav2vec2.streaming.Stream.push` takes.

    Returns:
        Pieces of text, which joined are that of :func:`predict`, or its stretches.

    Raises:
        UserError: the model does not stream, has no such head, or a block cannot be used.
    """
    from .streaming import Stream

    model = streaming_task_model(model, "model")
    stream = Stream(model)

    def best() -> Iterator[int]:
        for block in blocks:
            yield from stream.push(block).argmax(-1).tolist()
        yield from stream.finish().argmax(-1).tolist()

    return (_text if model.head is None else _stretches)(model, best())


# --- the command -----------------------------------------------------------------------------------


def lines(path: str, found: Prediction) -> list[str]:
    """Return the lines to write for one file, as :func:`~.files.errors.visible` shows them."""
    if isinstance(found, str):
        rows = [[found]]
    elif isinstance(found, Labelled):
        rows = [[found.label, f"{found.probability:.4f}"]]
    else:
        rows = [[f"{start:.3f}", f"{end:.3f}", label] for start, end, label in found]
    return ["\t".join([visible(path), *(visible(" ".join(field.split())) for field in row)]) for row in rows]


def print_stream(model: "TaskModel", path: str) -> None:
    """Print the lines of one file as a stream says them."""
    from .audio import read_audio
    from .samples import check_finite, check_length

    waveform = read_audio(path)
    check_length(waveform, model.feature_extractor.receptive_field, path)
    check_finite(waveform, path)
    found = predict_stream(model, waveform.split(model.feature_extractor.hop))
    if model.head is not None:
        for stretch in found:
            print(*lines(path, [cast(Stretch, stretch)]), flush=True)
        return
    print(visible(path), end="\t")
    is_text = gap = False
    for piece in cast(Iterator[str], found):
        words = " ".join(piece.split())
        gap = gap or piece[0].isspace()
        if words:
            print(" " * (is_text and gap) + visible(words), end="", flush=True)
            is_text, gap = True, piece[-1].isspace()
    print()


def parse_args() -> argparse.Namespace:
    about = "Write what a fine-tuned model recognises in audio files."
    parser = argparse.ArgumentParser(prog="python -m wav2vec2.prediction", description=about, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a fine-tuned model: a file, a folder or ORG/NAME on the hub")
    parser.add_argument("audio", metavar="AUDIO", nargs="+", help="audio files")
    parser.add_argument(
        "--stream", action="store_true", help="take each file as it would be heard, print as it is said"
    )
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    choose_waiting()
    import torch  # after the flags, so that --help does not wait for it

    from .inference import load

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding need not have all of Unicode
    status = 0

    def report(_: int | None, error: Exception) -> None:
        nonlocal status
        status = 1
        print("error: " + visible(" ".join(str(error).split())), file=sys.stderr)

    try:
        model = load(args.model, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        for path in args.audio if args.stream else ():
            task_model = streaming_task_model(model, args.model)
            try:
                print_stream(task_model, path)
            except UserError as error:
                report(None, error)
        if args.stream:
            return status
        for path, found in zip(args.audio, predict_iter(model, args.audio, on_error=report), strict=True):
            if found is not None:
                print(*lines(path, found), sep="\n", flush=True)
    except (UserError, OSError) as error:
        report(None, error)
    return status


if __name__ == "__main__":
    sys.exit(main())
