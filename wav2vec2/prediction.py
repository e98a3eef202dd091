"""What a model with a task head recognises in audio.

    import wav2vec2

    model = wav2vec2.load("exp/digits/finetuned.pth")
    wav2vec2.predict(model, "call.flac")  # of text: 'three one seven'
    wav2vec2.predict(model, paths)  # a list, one result for each

``python -m wav2vec2.prediction MODEL AUDIO...`` writes a line for each file, of fields separated by tabs: its path,
then the text; or the label and its probability; or, a line for each stretch, start and end in seconds and the label.
A file that cannot be used is named on stderr, and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .audio import SAMPLE_RATE
from .files.errors import UserError, single_line
from .files.heads import greedy_units
from .inference import extract_iter, is_input, load
from .model import Wav2Vec2Model
from .task_model import CLIPS, TEXT, TaskModel


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


def predict(model: Wav2Vec2Model, inputs: Any, **options: Any) -> Prediction | list[Prediction]:
    """What the head recognises in one waveform or file, or in several.

    Args:
        model: in eval mode, as :func:`~wav2vec2.inference.load` returns it.
        inputs: as of :func:`~wav2vec2.inference.extract`.
        options: others of :func:`~wav2vec2.inference.extract`, ``layers`` apart. Longer audio than ``max_seconds`` is
            computed in chunks; its label is still one of the whole.

    Returns:
        For one input what is said (str), its label (:class:`Labelled`) or its stretches (a list of :class:`Stretch`,
        one for all frames in a row with one label), by the kind of head. For several a list of these, in their order.

    Raises:
        UserError: the model has no task head; others as :func:`~wav2vec2.inference.extract`.
    """
    is_single = is_input(inputs)
    results = predict_iter(model, [inputs] if is_single else inputs, **options)
    return next(results) if is_single else list(results)


def predict_iter(
    model: Wav2Vec2Model,
    inputs: Iterable[Any],
    *,
    on_error: Callable[[int, UserError], None] | None = None,
    **options: Any,
) -> Iterator[Prediction | None]:
    """As :func:`predict`, one result at a time, for more inputs than fit into memory.

    Args:
        on_error: as of :func:`~wav2vec2.inference.extract_iter`: None is yielded for an input that cannot be used.
    """
    if not isinstance(model, TaskModel):
        raise UserError("model: has no task head, expected a fine-tuned one; make it with finetune.py")
    layers = None if model.head_settings.layers == "weighted" else "output"
    features = extract_iter(model, inputs, layers=layers, on_error=on_error, **options)
    return (None if states is None else _prediction(model, states) for states in features)


@torch.no_grad()
def _prediction(model: TaskModel, states: Tensor) -> Prediction:
    """Of one utterance: logits (frames, outputs) of text; else what the head reads, (states, frames, D) or one."""
    settings = model.head_settings
    if settings.kind == TEXT:
        separator = " " if settings.units == "words" else ""
        return separator.join(settings.labels[unit] for unit in greedy_units(states))
    states = states.to(model.head.linear.weight.device)
    output = states[None] if settings.layers == "last" else None
    logits = model.logits([] if output is not None else list(states[:, None]), output, None)[0].float()
    if settings.kind == CLIPS:
        probability, best = logits.softmax(-1).max(-1)
        return Labelled(settings.labels[best], probability.item())
    return _stretches(model, logits.argmax(-1).tolist())


def _stretches(model: TaskModel, best: list[int]) -> list[Stretch]:
    """Of the label of each frame: from half-way between the middles of two frames to the next such change.

    The first begins with the audio, the last ends with the last frame.
    """
    extractor = model.feature_extractor
    hop, window = extractor.stride, extractor.receptive_field
    found, first = [], 0
    for label, frames in groupby(best):
        behind = first + len(list(frames))
        start = (first * hop + (window - hop) / 2) / SAMPLE_RATE if first else 0.0
        end = (behind * hop + (window - hop) / 2 if behind < len(best) else (behind - 1) * hop + window) / SAMPLE_RATE
        found.append(Stretch(start, end, model.labels[label]))
        first = behind
    return found


# --- the command -----------------------------------------------------------------------------------


def lines(path: str, found: Prediction) -> list[str]:
    """What is written of one file; what a label holds cannot steer a terminal."""
    if isinstance(found, str):
        rows = [[found]]
    elif isinstance(found, Labelled):
        rows = [[found.label, f"{found.probability:.4f}"]]
    else:
        rows = [[f"{start:.3f}", f"{end:.3f}", label] for start, end, label in found]
    return ["\t".join([path, *(single_line(field, len(field)) for field in row)]) for row in rows]


def parse_args() -> argparse.Namespace:
    about = "Write what a fine-tuned model recognises in audio files."
    parser = argparse.ArgumentParser(prog="python -m wav2vec2.prediction", description=about, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a fine-tuned model: a file, a folder or ORG/NAME on the hub")
    parser.add_argument("audio", metavar="AUDIO", nargs="+", help="audio files")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default: {device}")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    status = 0

    def report(_: int | None, error: Exception) -> None:
        nonlocal status
        status = 1
        print("error: " + " ".join(str(error).split()), file=sys.stderr)

    try:
        model = load(args.model, device=args.device)
        for path, found in zip(args.audio, predict_iter(model, args.audio, on_error=report), strict=True):
            if found is not None:
                print(*lines(path, found), sep="\n", flush=True)
    except (UserError, OSError) as error:
        report(None, error)
    return status


if __name__ == "__main__":
    sys.exit(main())
