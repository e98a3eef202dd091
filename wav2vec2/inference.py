"""Use a model in a few lines: load any file of ours, get the features of any audio.

    import wav2vec2

    model = wav2vec2.load("exp/hubert-base_sp0.75/final/ckpts/pruned_hubert_base.pth", device="cuda")
    features = wav2vec2.extract(model, "talk.flac")  # (layers + 1, frames, D), on the CPU
    last = wav2vec2.extract(model, ["a.flac", "b.wav"], layers=-1)  # a list of (frames, D)
    for features in wav2vec2.extract_iter(model, paths, layers=[4, 8]):  # in bounded memory
        ...

Tensors and arrays need torch alone; files need soundfile, and other rates than 16 kHz torchaudio.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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

BATCH_SECONDS = 60.0
MAX_SECONDS = 60.0
CONTEXT_SECONDS = 5.0
LOOKAHEAD_SECONDS = 240.0

# What a full-scale sample is in arrays of whole numbers, and which number is silence.
_FULL_SCALE = {torch.int16: (2**15, 0), torch.int32: (2**31, 0), torch.uint8: (2**7, 2**7)}

_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # of what is no name on the hub


def load(
    source: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    filename: str | None = None,
) -> Wav2Vec2Model:
    """Load a model for use: in eval mode, without gradients, its positional convolution's weight computed once.

    Of a file with a task head it is a :class:`~wav2vec2.files.heads.TaskModel`, whose ``forward`` gives logits.

    Args:
        source: a model file ``.pth`` (of a converter, ``prune.py``, ``save_final_ckpt.py``, or one that the original
            program published), a folder with ``config.json`` and ``model.safetensors``, an ``ORG/NAME`` on the
            Hugging Face hub, or torchaudio's own pretrained weights.
        device: as in ``torch.device``.
        dtype: float32, float16, bfloat16 or float64.
        revision: branch, tag or commit, for a model on the hub.
        filename: a model file in the hub's repository, or in the folder, where there is no ``config.json``.

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
    """The checked ``{"state_dict", "config"}`` of any source that :func:`load` takes."""
    path = Path(source)
    if isinstance(source, str) and not path.exists() and hub.is_hub_id(source) and path.suffix not in _FILE_SUFFIXES:
        if filename is None:
            return checkpoint.read_model_file(hub.download(source, revision))
        path = hub.download_file(source, filename, revision)
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
    """Features of one waveform or file, or of several.

    Audio of at most ``max_seconds`` gives what :meth:`Wav2Vec2Model.extract_features` gives for it alone, whatever
    the batch. Longer audio is cut for the transformer's sake: its chunks overlap by twice ``context_seconds``, of
    which each gives up half. The result has the frames of the whole; what is taken over the whole waveform stays so
    (normalisation, the statistics of the Base models' first norm), and layer 0 is that of the whole. In the other
    layers attention sees its chunk.

    Args:
        model: in eval mode, as :func:`load` returns it.
        inputs: a waveform, or the path of an audio file, or an iterable of both. A waveform is a tensor or array
            (samples,), of floats with full scale 1, or of int16, int32 or uint8, which are brought to that scale; or
            a decoded item of ``datasets``, a dict with ``array`` and ``sampling_rate``.
        layers: which hidden states. None means all: 0 is the projected extractor output, k the output of layer k.
            One number, which may be negative (-1 is the last), or several. ``"output"`` is what the model's
            ``forward`` returns: the last hidden state behind a pre-norm model's final norm, or, with
            ``aux_num_out``, the scores of each class. Other heads are left to :func:`~wav2vec2.prediction.predict`.
        sample_rate: of waveforms, in Hz; files and decoded items know theirs. All is resampled to 16 kHz.
        batch_seconds: audio that is computed at once, padding included; one input or chunk at least.
        max_seconds: longer audio is computed in chunks of this length; None never cuts.
        context_seconds: what a chunk computes beyond what it is kept for, on each side.

    Returns:
        For one input a tensor on the CPU, in the model's dtype: (layers, frames, D), or (frames, D) where ``layers``
        is a number or "output". For several a list of these, in their order.

    Raises:
        UserError: an option cannot be, a file cannot be read, or a waveform is not one-dimensional, too short for a
            frame, or holds NaN.

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
    """As :func:`extract`, one result at a time, for more inputs than fit into memory.

    Inputs are taken until they last ``lookahead_seconds``, computed in batches of about equal length, and handed out
    in their order before the next ones are taken. So much audio and its features are in memory at most, or one input
    if that is longer.

    Args:
        lookahead_seconds: audio to choose batches from.
        on_error: called with the position (from 0) of an input that cannot be used, and with what is wrong with it;
            None is yielded in its place. By default the error is raised.

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
        raise UserError(f"inputs: expected several waveforms or paths, found {short_repr(inputs)}; put it into a list")
    rate = _checked_rate(sample_rate, "sample_rate")
    extraction = _Extraction.of(model, layers, batch_seconds, max_seconds, context_seconds)
    return _results(extraction, inputs, rate, lookahead_seconds * SAMPLE_RATE, on_error)


def _results(
    extraction: "_Extraction",
    inputs: Iterable[Any],
    sample_rate: int,
    lookahead_samples: float,
    on_error: Callable[[int, UserError], None] | None,
) -> Iterator[Tensor | None]:
    """The result of each input, window by window."""
    window: list[_Utterance | None] = []
    num_samples = 0
    for number, value in enumerate(inputs):
        try:
            window.append(extraction.utterance(value, f"input {number}", sample_rate))
            num_samples += len(window[-1].waveform)
        except UserError as error:
            if on_error is None:
                raise
            on_error(number, error)
            window.append(None)
        if num_samples >= lookahead_samples:
            yield from extraction.results(window)
            window, num_samples = [], 0
    yield from extraction.results(window)


@dataclass
class _Utterance:
    """One input and its result.

    Attributes:
        waveform: (T,) float32 at 16 kHz, normalised if the model wants that.
        num_frames: of the whole.
        extractor: makes of any stretch of the waveform the frames of the whole.
        result: (layers, frames, D), filled piece by piece; None until then.
    """

    waveform: Tensor
    num_frames: int
    extractor: FeatureExtractor
    result: Tensor | None = None


class _Piece(NamedTuple):
    """Frames from ``start`` of an utterance, computed for the sake of ``kept_start`` to ``kept_end``."""

    utterance: _Utterance
    waveform: Tensor  # (T,), just what the frames are made of
    start: int
    kept_start: int
    kept_end: int


@dataclass(frozen=True)
class _Extraction:
    """A model, what is wanted of it, and how audio is cut and put together.

    Attributes:
        layers: indices of hidden states, or "output".
        is_stacked: results keep the dimension of layers.
        batch_samples: of a batch with its padding.
        max_samples: longer audio is cut.
        chunk_frames: of a chunk.
        context_frames: of these on each side.
    """

    model: Wav2Vec2Model
    layers: list[int] | str
    is_stacked: bool
    batch_samples: float
    max_samples: float = math.inf
    chunk_frames: int = 0
    context_frames: int = 0

    @classmethod
    def of(
        cls,
        model: Wav2Vec2Model,
        layers: int | Sequence[int] | str | None,
        batch_seconds: float,
        max_seconds: float | None,
        context_seconds: float,
    ) -> "_Extraction":
        """The options of :func:`extract`, checked."""
        is_stacked = not isinstance(layers, (int, str))
        if layers != "output":
            num_states = len(model.encoder.transformer.layers) + 1
            chosen = range(num_states) if layers is None else [layers] if isinstance(layers, int) else layers
            if not chosen or any(layer not in range(-num_states, num_states) for layer in chosen):
                raise UserError(
                    f"layers: found {short_repr(layers)}, expected numbers from 0 (the projected extractor output) to "
                    f"{num_states - 1}, negative ones from the end, None for all, or 'output'"
                )
            layers = [layer % num_states for layer in chosen]
        extraction = cls(model, layers, is_stacked, batch_seconds * SAMPLE_RATE)
        if max_seconds is None:
            return extraction
        chunk_frames = model.feature_extractor.num_frames(int(max_seconds * SAMPLE_RATE))
        context_frames = round(context_seconds * SAMPLE_RATE / extraction.stride)
        if not 0 <= 2 * context_frames < chunk_frames:
            raise UserError(
                f"max_seconds: found {max_seconds:g}, expected more than a frame and twice the context_seconds of "
                f"{context_seconds:g} (0 or more), or None to compute everything whole"
            )
        return replace(
            extraction,
            max_samples=max_seconds * SAMPLE_RATE,
            chunk_frames=chunk_frames,
            context_frames=context_frames,
        )

    @property
    def stride(self) -> int:
        """Samples from frame to frame."""
        return self.model.feature_extractor.stride

    @torch.no_grad()
    def utterance(self, value: Any, name: str, sample_rate: int) -> _Utterance:
        """Read and check one input; ``name`` is what errors call it, unless it is a file."""
        if isinstance(value, (str, os.PathLike)):
            name, waveform = os.fspath(value), read_audio(value)
        else:
            if _is_decoded(value):
                value, sample_rate = _array_and_rate(value, name)
            waveform = resample_to_16k(_as_waveform(value, name), sample_rate)
        extractor = self.model.feature_extractor
        num_frames = extractor.num_frames(len(waveform))
        if num_frames == 0:
            raise UserError(
                f"{name}: has {len(waveform)} samples at 16 kHz, expected at least {extractor.receptive_field}, "
                "which make one frame; leave it out"
            )
        num_bad = len(waveform) - int(waveform.isfinite().sum())
        if num_bad:
            raise UserError(
                f"{name}: {num_bad} of its {len(waveform)} samples are NaN or infinite, expected numbers; mend it"
            )
        if self.model.normalize_waveform:
            waveform = normalize_waveforms(waveform[None])[0]
        if len(waveform) > self.max_samples:
            extractor = _with_statistics_of(extractor, waveform)
        return _Utterance(waveform, num_frames, extractor)

    def results(self, window: list[_Utterance | None]) -> Iterator[Tensor | None]:
        """The results of some utterances; a result leaves the window before it is handed out."""
        pieces = [piece for utterance in window if utterance is not None for piece in self._pieces(utterance)]
        for batch in self._batches(pieces):
            self._compute(batch)
        del pieces
        window.reverse()
        while window:
            utterance = window.pop()
            result = None if utterance is None else utterance.result
            del utterance
            yield result if result is None or self.is_stacked else result[0]

    def _pieces(self, utterance: _Utterance) -> list[_Piece]:
        """The whole utterance, or chunks of equal length; those at its ends have more context on the other side."""
        waveform, num_frames = utterance.waveform, utterance.num_frames
        if len(waveform) <= self.max_samples:
            return [_Piece(utterance, waveform, 0, 0, num_frames)]
        num_kept = math.ceil(num_frames / math.ceil(num_frames / (self.chunk_frames - 2 * self.context_frames)))
        size = min(num_kept + 2 * self.context_frames, num_frames)
        num_samples = (size - 1) * self.stride + self.model.feature_extractor.receptive_field
        pieces = []
        for kept_start in range(0, num_frames, num_kept):
            start = min(max(kept_start - self.context_frames, 0), num_frames - size)
            samples = waveform[start * self.stride :][:num_samples]
            pieces.append(_Piece(utterance, samples, start, kept_start, min(kept_start + num_kept, num_frames)))
        return pieces

    def _batches(self, pieces: list[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces of about the same length, as many as fit with their padding; one at least."""
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
        """Compute a batch and put what is kept of it into the results."""
        num_layers = 1 if self.layers == "output" else len(self.layers)
        for number, states in enumerate(self._hidden_states(*self._frames(batch))):
            for row, (utterance, _, start, kept_start, kept_end) in zip(states.cpu(), batch, strict=True):
                if utterance.result is None:
                    utterance.result = torch.empty(num_layers, utterance.num_frames, row.size(-1), dtype=row.dtype)
                utterance.result[number, kept_start:kept_end] = row[kept_start - start : kept_end - start]

    def _frames(self, batch: list[_Piece]) -> tuple[Tensor, Tensor | None]:
        """The extractor's (B, frames, C), and (B,) valid frames or None where none is padded."""
        extractor = self.model.feature_extractor
        waveforms = [piece.waveform.to(extractor.dummy_weight) for piece in batch]
        if _norms_over_time(extractor):  # padding would take part in the statistics: each alone
            rows = [
                piece.utterance.extractor(waveform[None], None)[0][0]
                for piece, waveform in zip(batch, waveforms, strict=True)
            ]
            features, lengths = pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
        else:
            num_samples = torch.tensor([len(waveform) for waveform in waveforms])
            features, lengths = extractor(pad_sequence(waveforms, batch_first=True), num_samples)
        is_padded = bool((lengths < features.size(1)).any())
        return features, lengths.to(features.device) if is_padded else None

    def _hidden_states(self, features: Tensor, lengths: Tensor | None) -> Iterator[Tensor]:
        """The wanted (B, frames, D), layer after layer."""
        if self.layers == "output":
            x = self.model.encoder(features, lengths)
            yield x if self.model.aux is None else self.model.aux(x)
            return
        states = self.model.encoder.extract_features(features, lengths, max(1, *self.layers))
        for layer in self.layers:
            yield states[layer]


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _is_decoded(value: Any) -> bool:
    """Whether it is what ``datasets`` makes of an audio file: a dict, or a decoder of torchcodec."""
    return isinstance(value, Mapping) or hasattr(value, "get_all_samples")


def is_input(value: Any) -> bool:
    """Whether it is one input, and not several."""
    return isinstance(value, (str, os.PathLike)) or _is_array(value) or _is_decoded(value)


def _array_and_rate(item: Any, name: str) -> tuple[Any, int]:
    """The waveform of a decoded item, and its rate.

    Raises:
        UserError: it has none, or cannot be decoded.
    """
    if not isinstance(item, Mapping):
        try:
            samples = item.get_all_samples()
        except Exception as error:  # the file decides
            raise AudioError(f"{name}: cannot be decoded ({one_line(error)}), expected audio") from error
        item = {"array": samples.data.mean(0), "sampling_rate": samples.sample_rate}
    missing = [key for key in ("array", "sampling_rate") if key not in item]
    if missing:
        raise UserError(
            f"{name}: has no {' and no '.join(map(repr, missing))}, expected a decoded item of datasets with "
            f"'array' and 'sampling_rate', found {short_repr(item)}"
        )
    return item["array"], _checked_rate(item["sampling_rate"], f"{name}: sampling_rate")


def _checked_rate(value: Any, name: str) -> int:
    """A sample rate, of whatever type of number.

    Raises:
        UserError: it is none that can be.
    """
    try:
        rate = int(value)
    except (TypeError, ValueError, OverflowError):
        rate = None
    if rate is None or rate != value or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UserError(
            f"{name}: found {short_repr(rate if rate == value else value)}, expected a number of Hz from {LOWEST_RATE} "
            f"to {HIGHEST_RATE}"
        )
    return rate


def _as_waveform(value: Any, name: str) -> Tensor:
    """A tensor or array as (T,) float32 on the CPU, at full scale 1.

    Raises:
        UserError: it is none, has another number of dimensions, or holds no real numbers.
    """
    if not _is_array(value):
        raise UserError(f"{name}: found {short_repr(value)}, expected a path, or a tensor or array (samples,)")
    try:
        # A copy: torch does not take every array as it is (read-only, reversed).
        waveform = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value.__array__().copy())
    except TypeError as error:
        raise UserError(f"{name}: an array of {value.dtype}, expected floats or int16") from error
    if waveform.ndim != 1:
        raise UserError(
            f"{name}: has shape {list(waveform.shape)}, expected (samples,); average channels, and give several "
            "waveforms as a list"
        )
    full_scale, silence = _FULL_SCALE.get(waveform.dtype, (1, 0))
    if not waveform.is_floating_point() and waveform.dtype not in _FULL_SCALE:
        raise UserError(f"{name}: holds {waveform.dtype}, expected floats (full scale 1), int16, int32 or uint8")
    return (waveform.cpu().float() - silence) / full_scale


class _FixedNorm(nn.Module):
    """What a norm over time does, with statistics that are given: ``x * scale + shift`` for each channel."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ..., T) -> (B, C, ..., T)"""
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def _norms_over_time(extractor: FeatureExtractor) -> bool:
    """Whether its first norm takes mean and variance over time, as the Base models' does, and not the Large ones'."""
    return isinstance(extractor.conv_layers[0].layer_norm, nn.GroupNorm)


def _with_statistics_of(extractor: FeatureExtractor, waveform: Tensor) -> FeatureExtractor:
    """An extractor that makes of any stretch of ``waveform`` (T,) the frames that ``extractor`` makes of the whole."""
    if not _norms_over_time(extractor):
        return extractor
    first, *others = extractor.conv_layers
    statistics = norm_over_time(waveform[None].to(first.conv.weight.device), first.conv, first.layer_norm)
    fixed = _with_modules(first, layer_norm=_FixedNorm(*(row[0].to(first.conv.weight) for row in statistics)))
    return _with_modules(extractor, conv_layers=nn.ModuleList([fixed, *others]))


def _with_modules(module: nn.Module, **submodules: nn.Module) -> nn.Module:
    """The module with other submodules; all else is shared with it."""
    other = copy.copy(module)
    other._modules = {**module._modules, **submodules}
    return other
