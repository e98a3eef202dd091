"""Use a model in a few lines: load any model file, get the features of any audio.

    import wav2vec2

    model = wav2vec2.load("exp/hubert-base_sp0.75/final/ckpts/pruned_hubert_base.pth", device="cuda")
    features = wav2vec2.extract(model, "talk.flac")  # (layers + 1, frames, D), on the CPU
    last = wav2vec2.extract(model, ["a.flac", "b.wav"], layers=-1)  # a list of (frames, D)
    for features in wav2vec2.extract_iter(model, paths, layers=[4, 8]):  # in bounded memory
        ...

Tensors and arrays need torch alone, audio files need soundfile, and rates other than 16 kHz need torchaudio.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .audio import HIGHEST_RATE, LOWEST_RATE, SAMPLE_RATE, AudioError, read_audio, resample_to_16k
from .components import FeatureExtractor
from .fast import norm_over_time
from .files import checkpoint, hub
from .files.errors import UserError, one_line, short_repr
from .files.heads import model_with_its_head
from .model import Wav2Vec2Model, normalize_waveforms
from .samples import as_samples, check_finite, check_length
from .streaming import steps

BATCH_SECONDS = 60.0
MAX_SECONDS = 60.0
CONTEXT_SECONDS = 5.0
LOOKAHEAD_SECONDS = 240.0

_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # not of a name on the hub

Module = TypeVar("Module", bound=nn.Module)


def load(
    source: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    filename: str | None = None,
) -> Wav2Vec2Model:
    """Load a model for use: in eval mode, without gradients, with the positional convolution's weight computed once.

    A file with a task head gives a :class:`~wav2vec2.task_model.TaskModel`, whose ``forward`` returns logits.

    Args:
        source: a model file ``.pth`` (written by a converter, ``prune.py``, ``save_final_ckpt.py`` or the original
            program), a folder with ``config.json`` and ``model.safetensors``, an ``ORG/NAME`` on the Hugging Face
            hub, or torchaudio's own pretrained weights.
        revision: branch, tag or commit, for a model on the hub.
        filename: a model file in the hub's repository, or in the folder, if it has no ``config.json``.

    Raises:
        UserError: there is no such model, it is damaged or of another kind, or the device or dtype cannot be used.
    """
    model = model_with_its_head(_read(source, revision, filename), source).eval().requires_grad_(False)
    model.fold_weight_norm()  # before the conversion, which would round both of its factors
    try:
        return model.to(device, dtype)
    # TypeError: a dtype that is no float; AssertionError: torch without CUDA.
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {device}, dtype {dtype}: cannot be used ({reason}); take others") from error


def _read(source: str | os.PathLike, revision: str | None, filename: str | None) -> dict[str, Any]:
    """Read the checked ``{"state_dict", "config"}`` of any source that :func:`load` takes."""
    path = Path(source)
    if isinstance(source, str) and not path.exists() and hub.is_hub_id(source) and path.suffix not in _FILE_SUFFIXES:
        path = hub.download(source, revision, filename)
    elif revision is not None:
        raise UserError(f"revision: found {revision!r} for {source}, which is no model on the hub; leave it out")
    elif filename is not None:
        path /= filename
    if path.is_dir():
        return checkpoint.read_model_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder, nor the ORG/NAME of a model on the hub; check the path")
    from .utils.import_torchaudio import import_torchaudio, is_torchaudio_state

    contents = checkpoint.read(path)
    if is_torchaudio_state(contents):
        config, state_dict = import_torchaudio(contents, source=str(path))
        return {"config": config, "state_dict": state_dict}
    return checkpoint.checked_model(contents, path)


def extract(
    model: Wav2Vec2Model,
    inputs: Any,
    *,
    layers: int | Sequence[int] | str | None = None,
    sample_rate: int = SAMPLE_RATE,
    batch_seconds: float = BATCH_SECONDS,
    max_seconds: float | None = MAX_SECONDS,
    context_seconds: float = CONTEXT_SECONDS,
) -> Tensor | list[Tensor]:
    """Return the features of one waveform or file, or of several.

    Audio of at most ``max_seconds`` has the features that :meth:`Wav2Vec2Model.extract_features` returns for it alone,
    whatever the batch. Longer audio is cut for the transformer: its chunks overlap by twice ``context_seconds``, and
    each gives up half of an overlap. The result has the frames of the whole, its normalisation, the statistics of the
    Base models' first norm, and layer 0 of the whole. In the other layers attention sees its chunk. A streaming model
    computes longer audio as a stream, and all of it is that of the whole.

    Args:
        model: in eval mode, as :func:`load` returns it.
        inputs: a waveform, an audio file, or an iterable of both. A waveform is a tensor, array or list (samples,) of
            floats with full scale 1, or of int16, int32 or uint8, which are scaled. A file is its path, its bytes, or
            opened as binary. Items of ``datasets`` have ``array`` and ``sampling_rate``, or ``bytes`` or ``path``.
        layers: hidden states to return. None means all: 0 is the projected extractor output, k the output of layer k.
            One number, which may be negative (-1 is the last), or several. ``"output"`` is the result of the model's
            ``forward``: the last hidden state after a pre-norm model's final norm, or, with ``aux_num_out``, the
            scores of each class. For other heads see :func:`~wav2vec2.prediction.predict`.
        sample_rate: of waveforms, in Hz; files and decoded items state theirs. All are resampled to 16 kHz.
        batch_seconds: audio to compute at once, including padding; at least one input or chunk.
        max_seconds: longer audio is computed in chunks of this length; None never cuts.
        context_seconds: audio that a chunk computes beyond what is kept of it, on each side.

    Returns:
        For one input a tensor on the CPU, in the model's dtype: (layers, frames, D), or (frames, D) if ``layers``
        is a number or "output". For several a list of these, in their order.

    Raises:
        UserError: an option is impossible, a file cannot be read, or a waveform is not one-dimensional, too short for
            a frame, or holds NaN.

    >>> import torch, wav2vec2
    >>> from wav2vec2.model import hubert_base
    >>> model = hubert_base().eval()  # or wav2vec2.load("model.pth")
    >>> wav2vec2.extract(model, torch.randn(16000)).shape
    torch.Size([13, 49, 768])
    >>> [tuple(last.shape) for last in wav2vec2.extract(model, [torch.randn(8000), torch.randn(16000)], layers=-1)]
    [(24, 768), (49, 768)]
    """
    is_single = is_input(inputs)
    results = extract_iter(
        model,
        [inputs] if is_single else inputs,
        layers=layers,
        sample_rate=sample_rate,
        batch_seconds=batch_seconds,
        max_seconds=max_seconds,
        context_seconds=context_seconds,
    )
    results = cast(Iterator[Tensor], results)  # None is only for errors, which are raised here
    return next(results) if is_single else list(results)


def extract_iter(
    model: Wav2Vec2Model,
    inputs: Iterable[Any],
    *,
    layers: int | Sequence[int] | str | None = None,
    sample_rate: int = SAMPLE_RATE,
    batch_seconds: float = BATCH_SECONDS,
    max_seconds: float | None = MAX_SECONDS,
    context_seconds: float = CONTEXT_SECONDS,
    lookahead_seconds: float = LOOKAHEAD_SECONDS,
    on_error: Callable[[int, UserError], None] | None = None,
) -> Iterator[Tensor | None]:
    """Yield the results of :func:`extract` one at a time, for more inputs than fit into memory.

    Inputs are read until they last ``lookahead_seconds``, computed in batches of about equal length, and yielded in
    their order before the next ones are read. At most this much audio and its features are in memory, or one input if
    that is longer.

    Args:
        lookahead_seconds: audio to choose batches from.
        on_error: called with the position (from 0) of an input that cannot be used, and with the error; None is
            yielded in its place. By default the error is raised.

    >>> import torch, wav2vec2
    >>> from wav2vec2.model import hubert_base
    >>> model = hubert_base().eval()
    >>> waveforms = [torch.randn(16000), torch.tensor([float("nan")] * 16000)]
    >>> for result in wav2vec2.extract_iter(model, waveforms, layers=[6, 12], on_error=lambda i, error: print(error)):
    ...     print(None if result is None else result.shape)
    input 1: 16000 of its 16000 samples are NaN or infinite, expected numbers; mend it
    torch.Size([2, 49, 768])
    None
    """
    if model.training:
        raise UserError("model: is in training mode, where dropout acts; call model.eval(), or use wav2vec2.load")
    if is_input(inputs):
        raise UserError(f"inputs: expected several, found one of type {type(inputs).__name__}; put it into a list")
    rate = _checked_rate(sample_rate, "sample_rate")
    extraction = _Extraction(model, layers, batch_seconds, max_seconds, context_seconds)
    return extraction.results(inputs, rate, lookahead_seconds * SAMPLE_RATE, on_error)


@dataclass
class _Utterance:
    """One input and its result."""

    waveform: Tensor  # (T,) float32 at 16 kHz, normalised if the model wants that
    num_frames: int  # of the whole
    extractor: FeatureExtractor  # turns any stretch of the waveform into frames of the whole
    result: Tensor | None = None  # (layers, frames, D), filled piece by piece


class _Piece(NamedTuple):
    """Frames of an utterance from ``start`` on, of which ``kept_start`` to ``kept_end`` are kept."""

    utterance: _Utterance
    waveform: Tensor  # (T,), exactly the samples of the frames
    start: int
    kept_start: int
    kept_end: int


class _Extraction:
    """A model, the wanted layers, and the sizes in which audio is cut and computed; options as in :func:`extract`."""

    def __init__(
        self,
        model: Wav2Vec2Model,
        layers: int | Sequence[int] | str | None,
        batch_seconds: float,
        max_seconds: float | None,
        context_seconds: float,
    ) -> None:
        num_states = len(model.encoder.transformer.layers) + 1
        self.model = model
        self.layers = None if layers == "output" else _checked_layers(layers, num_states)  # None: the model's output
        self.streams = model.encoder.chunk_frames is not None
        self.is_stacked = not isinstance(layers, (int, str))
        self.batch_samples = batch_seconds * SAMPLE_RATE
        self.max_samples, self.chunk_frames, self.context_frames = math.inf, 0, 0
        if max_seconds is not None:
            self.max_samples = max_seconds * SAMPLE_RATE
            self.chunk_frames = model.feature_extractor.num_frames(int(self.max_samples))
            self.context_frames = round(context_seconds * SAMPLE_RATE / model.feature_extractor.stride)
            if not 0 <= 2 * self.context_frames < self.chunk_frames:
                raise UserError(
                    f"max_seconds: found {max_seconds:g}, expected more than a frame and twice the context_seconds of "
                    f"{context_seconds:g} (0 or more), or None to compute everything whole"
                )

    def results(
        self,
        inputs: Iterable[Any],
        sample_rate: int,
        lookahead_samples: float,
        on_error: Callable[[int, UserError], None] | None,
    ) -> Iterator[Tensor | None]:
        """Yield the result of each input, window by window."""
        window: list[_Utterance | None] = []
        num_samples = 0
        for number, value in enumerate(inputs):
            utterance = None
            try:
                utterance = self._utterance(value, f"input {number}", sample_rate)
                num_samples += len(utterance.waveform)
            except UserError as error:
                if on_error is None:
                    raise
                on_error(number, error)
            window.append(utterance)
            del utterance
            if num_samples >= lookahead_samples:
                yield from self._results_of(window)
                window, num_samples = [], 0
        yield from self._results_of(window)

    @torch.no_grad()
    def _utterance(self, value: Any, name: str, sample_rate: int) -> _Utterance:
        """Read and check one input; ``name`` stands for it in errors, unless it is a file."""
        if _is_item(value):
            value, sample_rate = _audio_of_item(value, name, sample_rate)
        if isinstance(value, (str, os.PathLike)):
            name, waveform = os.fspath(value), read_audio(value)
        elif _is_file(value):
            waveform = read_audio(name, contents=_contents(value, name))
        else:
            waveform = resample_to_16k(as_samples(value, name), sample_rate)
        extractor = self.model.feature_extractor
        num_frames = extractor.num_frames(len(waveform))
        check_length(waveform, extractor.receptive_field, name)
        check_finite(waveform, name)
        if self.model.normalize_waveform and not self.streams:  # a stream is normalised by its extractor
            waveform = normalize_waveforms(waveform[None])[0]
        if len(waveform) > self.max_samples and not self.streams:
            extractor = _with_statistics_of(extractor, waveform)
        return _Utterance(waveform, num_frames, extractor)

    def _results_of(self, window: list[_Utterance | None]) -> Iterator[Tensor | None]:
        """Yield the results of some utterances; each leaves the window first, so that its memory can be freed."""
        pieces = []
        for utterance in window:
            if utterance is not None and self.streams and len(utterance.waveform) > self.max_samples:
                self._compute_by_steps(utterance)
            elif utterance is not None:
                pieces += self._pieces(utterance)
        for batch in self._batches(pieces):
            self._compute(batch)
        del pieces, utterance
        window.reverse()
        while window:
            utterance = window.pop()
            result = None if utterance is None else utterance.result
            del utterance
            yield result if result is None or self.is_stacked else result[0]

    def _pieces(self, utterance: _Utterance) -> list[_Piece]:
        """Cut a long utterance into chunks of equal length; those at its ends have more context on the other side."""
        waveform, num_frames = utterance.waveform, utterance.num_frames
        if len(waveform) <= self.max_samples:
            return [_Piece(utterance, waveform, 0, 0, num_frames)]
        extractor = self.model.feature_extractor
        num_kept = math.ceil(num_frames / math.ceil(num_frames / (self.chunk_frames - 2 * self.context_frames)))
        size = min(num_kept + 2 * self.context_frames, num_frames)
        pieces = []
        for kept_start in range(0, num_frames, num_kept):
            start = min(max(kept_start - self.context_frames, 0), num_frames - size)
            samples = waveform[start * extractor.stride :][: extractor.num_samples(size)]
            pieces.append(_Piece(utterance, samples, start, kept_start, min(kept_start + num_kept, num_frames)))
        return pieces

    def _batches(self, pieces: list[_Piece]) -> Iterator[list[_Piece]]:
        """Yield batches of pieces of about equal length, as many as fit with their padding, at least one."""
        batch: list[_Piece] = []
        for piece in sorted(pieces, key=lambda piece: len(piece.waveform)):
            if batch and (len(batch) + 1) * len(piece.waveform) > self.batch_samples:
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    @torch.no_grad()
    def _compute(self, batch: list[_Piece]) -> None:
        """Compute a batch and copy what is kept of it into the results."""
        features, lengths = self._frames(batch)
        if self.layers is None:
            wanted = [self.model.apply_aux(self.model.encoder(features, lengths))]
        else:
            states = self.model.encoder.extract_features(features, lengths, max(1, *self.layers))
            wanted = [states[layer] for layer in self.layers]
        for number, layer_states in enumerate(wanted):
            for row, (utterance, _, start, kept_start, kept_end) in zip(layer_states.cpu(), batch, strict=True):
                if utterance.result is None:
                    utterance.result = torch.empty(len(wanted), utterance.num_frames, row.size(-1), dtype=row.dtype)
                utterance.result[number, kept_start:kept_end] = row[kept_start - start : kept_end - start]

    @torch.no_grad()
    def _compute_by_steps(self, utterance: _Utterance) -> None:
        """Compute a long utterance as a stream, which gives the frames of the whole."""
        start = 0
        for states in steps(self.model, utterance.waveform):
            output = self.model.apply_aux(self.model.encoder.transformer.finished(states[-1]))
            rows = torch.cat([output] if self.layers is None else [states[layer] for layer in self.layers]).cpu()
            if utterance.result is None:
                utterance.result = rows.new_empty(len(rows), utterance.num_frames, rows.size(-1))
            utterance.result[:, start : start + rows.size(1)] = rows
            start += rows.size(1)

    def _frames(self, batch: list[_Piece]) -> tuple[Tensor, Tensor | None]:
        """Return the extractor's (B, frames, C), and (B,) valid frames or None if none is padded."""
        extractor = self.model.feature_extractor
        waveforms = [piece.waveform.to(extractor.dummy_weight) for piece in batch]
        if isinstance(extractor.conv_layers[0].layer_norm, nn.GroupNorm):
            # It takes mean and variance over time, and padding would take part in them: each alone.
            alone = zip(batch, waveforms, strict=True)
            rows = [piece.utterance.extractor(waveform[None], None)[0][0] for piece, waveform in alone]
            features, lengths = pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
        else:
            num_samples = torch.tensor([len(waveform) for waveform in waveforms])
            features, lengths = extractor(pad_sequence(waveforms, batch_first=True), num_samples)
        is_padded = bool((lengths < features.size(1)).any())
        return features, lengths.to(features.device) if is_padded else None


def _checked_layers(layers: int | Sequence[int] | str | None, num_states: int) -> list[int]:
    """Return the chosen indices of hidden states, from 0."""
    chosen = range(num_states) if layers is None else [layers] if isinstance(layers, int) else layers
    indices = [int(layer) for layer in chosen if layer in range(-num_states, num_states)]
    if not chosen or len(indices) < len(chosen):
        raise UserError(
            f"layers: found {short_repr(layers)}, expected numbers from 0 (the projected extractor output) to "
            f"{num_states - 1}, negative ones from the end, None for all, or 'output'"
        )
    return [layer % num_states for layer in indices]


def _is_item(value: Any) -> bool:
    """Return whether a value is an audio item of ``datasets``: a dict, or a decoder of torchcodec."""
    return isinstance(value, Mapping) or hasattr(value, "get_all_samples")


def _is_file(value: Any) -> bool:
    """Return whether a value is an audio file in memory, or an open one."""
    return isinstance(value, (bytes, bytearray, memoryview)) or hasattr(value, "read")


def is_input(value: Any) -> bool:
    """Return whether a value is one input, and not several; what cannot be iterated over is one that errors name."""
    is_one = isinstance(value, (str, os.PathLike)) or hasattr(value, "__array__") or _is_item(value) or _is_file(value)
    return is_one or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


def _audio_of_item(item: Any, name: str, sample_rate: int) -> tuple[Any, int]:
    """Return the waveform or file of an audio item of ``datasets``, and the waveform's rate."""
    if not isinstance(item, Mapping):
        try:
            samples = item.get_all_samples()
            item = {"array": samples.data.mean(0), "sampling_rate": samples.sample_rate}
        except Exception as error:  # the file decides
            raise AudioError(f"{name}: cannot be decoded ({one_line(error)}), expected audio") from error
    if item.keys() >= {"array", "sampling_rate"}:
        return item["array"], _checked_rate(item["sampling_rate"], f"{name}: sampling_rate")
    for key in ("bytes", "path"):  # beside bytes, the path is only a name
        if item.get(key) is not None:
            return item[key], sample_rate
    wanted = "an item of datasets with 'array' and 'sampling_rate', 'bytes' or 'path'"
    raise UserError(f"{name}: expected {wanted}, found a dict with the keys {short_repr(list(item))}")


def _checked_rate(value: Any, name: str) -> int:
    """Return a sample rate given as any type of number."""
    try:
        rate = int(value)
        is_whole = bool(rate == value)
    except Exception:  # the value decides: arrays and tensors of several numbers raise what they like
        rate, is_whole = 0, False
    if not is_whole or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        expected = f"expected a number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}"
        raise UserError(f"{name}: found {short_repr(rate if is_whole else value)}, {expected}")
    return rate


def _contents(value: Any, name: str) -> bytes:
    """Return the bytes of a file in memory, or of an open one from where it stands."""
    try:
        if hasattr(value, "read"):
            memoryview(value.read(0))  # before a file opened as text decodes what it holds
            value = value.read()
        contents = memoryview(value).tobytes()
    except Exception as error:  # the object decides
        raise UserError(f"{name}: cannot be read ({one_line(error)}), expected bytes: open(path, 'rb')") from error
    if not contents:
        raise UserError(f"{name}: has no bytes left, expected audio; go back to its beginning with seek(0)")
    return contents


class _FixedNorm(nn.Module):
    """A norm over time with given statistics: ``x * scale + shift`` for each channel of (B, C, T)."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None] + self.shift[:, None]


def _with_statistics_of(extractor: FeatureExtractor, waveform: Tensor) -> FeatureExtractor:
    """Return an extractor that turns any stretch of ``waveform`` (T,) into the frames of the whole.

    Only the first norm of Base models needs it: its mean and variance are over time.
    """
    first, *others = extractor.conv_layers
    if not isinstance(first.layer_norm, nn.GroupNorm):
        return extractor
    scale, shift = norm_over_time(waveform[None].to(first.conv.weight.device), first.conv, first.layer_norm)
    fixed = _FixedNorm(scale[0].to(first.conv.weight), shift[0].to(first.conv.weight))
    return _with_modules(extractor, conv_layers=nn.ModuleList([_with_modules(first, layer_norm=fixed), *others]))


def _with_modules(module: Module, **submodules: nn.Module) -> Module:
    """Return the module with other submodules; all else is shared with it."""
    other = copy.copy(module)
    other._modules = {**module._modules, **submodules}
    return other
