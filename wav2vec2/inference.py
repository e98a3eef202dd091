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
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import checkpoint
from .audio import SAMPLE_RATE, read_audio, resample_to_16k
from .components import FeatureExtractor
from .errors import UserError, short_repr
from .fast import norm_over_time
from .model import Wav2Vec2Model, normalize_waveforms

BATCH_SECONDS = 60.0
MAX_SECONDS = 60.0
CONTEXT_SECONDS = 5.0
LOOKAHEAD_SECONDS = 240.0

# Telephone speech has 8 kHz. What is far below is no rate in Hz, but one in kHz, say.
_LOWEST_SAMPLE_RATE = 1_000

# What a full-scale sample is in arrays of whole numbers, and which number is silence.
_FULL_SCALE = {torch.int16: (2**15, 0), torch.int32: (2**31, 0), torch.uint8: (2**7, 2**7)}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def load(
    source: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Wav2Vec2Model:
    """Load a model for use: in eval mode, without gradients, its positional convolution's weight computed once.

    Args:
        source: a model file ``.pth`` (of a converter, ``prune.py``, ``save_final_ckpt.py``, or one that the original
            program published), a folder with ``config.json`` and ``model.safetensors``, an ``ORG/NAME`` on the
            Hugging Face hub, or torchaudio's own pretrained weights.
        device: as in ``torch.device``.
        dtype: float32, float16, bfloat16 or float64.
        revision: branch, tag or commit, for a model on the hub.

    Raises:
        UserError: there is no such model, it is damaged or of another kind, or the device or dtype cannot be used.
    """
    device = _usable_device(device)
    if dtype not in checkpoint.FLOAT_DTYPES:
        raise UserError(
            f"dtype: found {short_repr(dtype)}, expected one of {', '.join(map(str, checkpoint.FLOAT_DTYPES))}"
        )
    model = checkpoint.model_of(_read(source, revision), source).eval().requires_grad_(False)
    model.fold_weight_norm()  # before the conversion, which would round both of its factors
    return model.to(device, dtype)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"device: {short_repr(str(device))} cannot be used ({reason}); use cpu or one that is there"
        ) from error
    return device


def _read(source: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    """The checked ``{"state_dict", "config"}`` of any source that :func:`load` takes."""
    path = Path(source)
    is_on_hub = isinstance(source, str) and not path.exists() and _looks_like_hub_id(source)
    if revision is not None and not is_on_hub:
        raise UserError(
            f"revision: found {short_repr(revision)} for {source}, which is no model on the hub; leave it out"
        )
    if is_on_hub:
        from .hub import download

        path = download(source, revision)
    if path.is_dir():
        from .hub import read_folder

        return read_folder(path)
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder, nor the ORG/NAME of a model on the hub; check the path")
    return _read_file(path)


def _looks_like_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not source.endswith(_FILE_SUFFIXES)


def _read_file(path: Path) -> dict[str, Any]:
    from .utils.import_torchaudio import import_torchaudio, is_torchaudio_state

    contents = checkpoint.read(path)
    if is_torchaudio_state(contents):
        config, state_dict = import_torchaudio(contents, source=str(path))
        return {"config": config, "state_dict": state_dict}
    checkpoint.check_model_contents(contents, path)
    return contents


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
            (samples,), of floats with full scale 1, or of int16, int32 or uint8, which are brought to that scale.
        layers: which hidden states. None means all: 0 is the projected extractor output, k the output of layer k.
            One number, which may be negative (-1 is the last), or several. ``"output"`` is what the model's
            ``forward`` returns: the last hidden state behind a pre-norm model's final norm, or, with
            ``aux_num_out``, the scores of each class.
        sample_rate: of waveforms, in Hz; files know theirs. All is resampled to 16 kHz.
        batch_seconds: audio that is computed at once, padding included.
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
    is_single = _is_input(inputs)
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
        raise UserError(
            "model: is in training mode, where dropout acts; call model.eval() or load it with wav2vec2.load"
        )
    if _is_input(inputs) or not isinstance(inputs, Iterable):
        raise UserError(f"inputs: expected several waveforms or paths, found {short_repr(inputs)}; put it into a list")
    for name, value in (("batch_seconds", batch_seconds), ("lookahead_seconds", lookahead_seconds)):
        if not value > 0:
            raise UserError(f"{name}: found {short_repr(value)}, expected a positive number of seconds")
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < _LOWEST_SAMPLE_RATE:
        raise UserError(
            f"sample_rate: found {short_repr(sample_rate)}, expected a whole number of Hz of at least "
            f"{_LOWEST_SAMPLE_RATE}"
        )
    run = _Run(
        model=model,
        layers=_chosen_layers(model, layers),
        is_stacked=layers is None or not isinstance(layers, (int, str)),
        batch_samples=batch_seconds * SAMPLE_RATE,
        chunking=_Chunking.of(model.feature_extractor, max_seconds, context_seconds),
    )
    prepared = _prepared(run, inputs, sample_rate, on_error)
    return _results(run, prepared, lookahead_seconds * SAMPLE_RATE)


class _Piece(NamedTuple):
    """Frames ``start`` to ``end`` of an utterance, computed for the sake of ``kept_start`` to ``kept_end``."""

    utterance: "_Utterance"
    waveform: Tensor  # (T,), just what the frames are made of
    start: int
    kept_start: int
    kept_end: int


class _Utterance:
    """One input and its result.

    Attributes:
        waveform: (T,) float32 at 16 kHz, normalised if the model wants that.
        num_frames: of the whole.
        result: (layers, frames, D), filled piece by piece; None until then.
    """

    def __init__(self, waveform: Tensor, num_frames: int, extractor: FeatureExtractor) -> None:
        self.waveform = waveform
        self.num_frames = num_frames
        self.extractor = extractor
        self.result: Tensor | None = None


@dataclass(frozen=True)
class _Chunking:
    """How long audio is cut.

    Attributes:
        stride: samples from frame to frame.
        receptive_field: samples that a frame is made of.
        max_samples: of what is computed whole.
        num_frames: of a chunk.
        num_context: of these on each side.
    """

    stride: int
    receptive_field: int
    max_samples: float
    num_frames: int
    num_context: int

    @classmethod
    def of(cls, extractor: FeatureExtractor, max_seconds: float | None, context_seconds: float) -> "_Chunking":
        stride, receptive_field = extractor.stride, extractor.receptive_field
        if max_seconds is None:
            return cls(stride, receptive_field, math.inf, 0, 0)
        if not context_seconds >= 0:
            raise UserError(f"context_seconds: found {short_repr(context_seconds)}, expected 0 or a positive number")
        num_frames = extractor.num_frames(int(max_seconds * SAMPLE_RATE))
        num_context = round(context_seconds * SAMPLE_RATE / stride)
        if num_frames <= 2 * num_context:
            raise UserError(
                f"max_seconds: found {short_repr(max_seconds)}, expected more than a frame and twice the "
                "context_seconds of "
                f"{context_seconds:g}, or None to compute everything whole"
            )
        return cls(stride, receptive_field, max_seconds * SAMPLE_RATE, num_frames, num_context)

    def pieces(self, utterance: _Utterance) -> list[_Piece]:
        """The whole utterance, or chunks of equal length; those at its ends have more context on the other side."""
        waveform, num_frames = utterance.waveform, utterance.num_frames
        if len(waveform) <= self.max_samples:
            return [_Piece(utterance, waveform, 0, 0, num_frames)]
        num_kept = math.ceil(num_frames / math.ceil(num_frames / (self.num_frames - 2 * self.num_context)))
        size = min(num_kept + 2 * self.num_context, num_frames)
        pieces = []
        for kept_start in range(0, num_frames, num_kept):
            start = min(max(kept_start - self.num_context, 0), num_frames - size)
            first_sample = start * self.stride
            samples = waveform[first_sample : first_sample + (size - 1) * self.stride + self.receptive_field]
            pieces.append(_Piece(utterance, samples, start, kept_start, min(kept_start + num_kept, num_frames)))
        return pieces


@dataclass(frozen=True)
class _Run:
    """A model and what is wanted of it.

    Attributes:
        layers: indices of hidden states, or "output".
        is_stacked: results keep the dimension of layers.
        batch_samples: budget of a batch.
    """

    model: Wav2Vec2Model
    layers: list[int] | str
    is_stacked: bool
    batch_samples: float
    chunking: _Chunking


def _chosen_layers(model: Wav2Vec2Model, layers: int | Sequence[int] | str | None) -> list[int] | str:
    """The hidden states that ``layers`` of :func:`extract` means, counted from 0."""
    num_states = len(model.encoder.transformer.layers) + 1
    if layers is None:
        return list(range(num_states))
    if layers == "output":
        return layers
    chosen = [layers] if isinstance(layers, int) else list(layers) if isinstance(layers, (Sequence, range)) else []
    are_indices = all(type(layer) is int and -num_states <= layer < num_states for layer in chosen)
    if not chosen or not are_indices:
        raise UserError(
            f"layers: found {short_repr(layers)}, expected numbers from 0 (the projected extractor output) to "
            f"{num_states - 1}, negative ones from the end, None for all, or 'output'"
        )
    return [layer % num_states for layer in chosen]


def _is_input(value: Any) -> bool:
    """Whether it is one input, a path or waveform, and not several."""
    return isinstance(value, (str, os.PathLike, Tensor)) or hasattr(value, "__array__")


def _prepared(
    run: _Run, inputs: Iterable[Any], sample_rate: int, on_error: Callable[[int, UserError], None] | None
) -> Iterator[_Utterance | None]:
    """Each input, read and checked; None for one that cannot be used."""
    for number, value in enumerate(inputs):
        try:
            yield _prepare(run, value, f"input {number}", sample_rate)
        except UserError as error:
            if on_error is None:
                raise
            on_error(number, error)
            yield None


@torch.no_grad()
def _prepare(run: _Run, value: Any, name: str, sample_rate: int) -> _Utterance:
    if isinstance(value, (str, os.PathLike)):
        name, waveform = os.fspath(value), read_audio(value)
    else:
        waveform = _resampled(_as_waveform(value, name), sample_rate, name)
    num_frames = run.model.feature_extractor.num_frames(len(waveform))
    if num_frames == 0:
        raise UserError(
            f"{name}: has {len(waveform)} samples at 16 kHz, expected at least {run.chunking.receptive_field}, "
            "which make one frame; leave it out"
        )
    num_bad = len(waveform) - int(waveform.isfinite().sum())
    if num_bad:
        raise UserError(
            f"{name}: {num_bad} of its {len(waveform)} samples are NaN or infinite, expected numbers; mend it"
        )
    if run.model.normalize_waveform:
        waveform = normalize_waveforms(waveform[None])[0]
    extractor = run.model.feature_extractor
    if len(waveform) > run.chunking.max_samples:
        extractor = _with_statistics_of(extractor, waveform)
    return _Utterance(waveform, num_frames, extractor)


def _as_waveform(value: Any, name: str) -> Tensor:
    """A tensor or array as (T,) float32 on the CPU, at full scale 1.

    Raises:
        UserError: it is none, has another number of dimensions, or holds no real numbers.
    """
    if not _is_input(value):
        raise UserError(f"{name}: found {short_repr(value)}, expected a path, or a tensor or array (samples,)")
    try:
        # A copy: torch does not take every array as it is (read-only, reversed).
        waveform = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value.__array__().copy())
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: an array of {short_repr(str(value.dtype))}, expected floats or int16") from error
    if waveform.ndim != 1:
        raise UserError(
            f"{name}: has shape {list(waveform.shape)}, expected (samples,); average channels, and give several "
            "waveforms as a list"
        )
    if waveform.dtype in _FULL_SCALE:
        full_scale, silence = _FULL_SCALE[waveform.dtype]
        return (waveform.cpu().float() - silence) / full_scale
    if not waveform.is_floating_point():
        raise UserError(f"{name}: holds {waveform.dtype}, expected floats (full scale 1), int16, int32 or uint8")
    return waveform.cpu().float()


def _resampled(waveform: Tensor, sample_rate: int, name: str) -> Tensor:
    try:
        return resample_to_16k(waveform, sample_rate)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: has {sample_rate} Hz; resampling to 16 kHz needs torchaudio, which is missing; install it"
        ) from error


class _FixedNorm(nn.Module):
    """What a norm over time does, with statistics that are given: ``x * scale + shift`` for each channel."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ..., T) -> (B, C, ..., T)"""
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def _with_statistics_of(extractor: FeatureExtractor, waveform: Tensor) -> FeatureExtractor:
    """An extractor that makes of any stretch of ``waveform`` (T,) the frames that ``extractor`` makes of the whole.

    The Base models' first norm takes mean and variance over time. The Large ones have no such norm: nothing to do.
    """
    first, *others = extractor.conv_layers
    if not isinstance(first.layer_norm, nn.GroupNorm):
        return extractor
    statistics = norm_over_time(waveform[None].to(first.conv.weight.device), first.conv, first.layer_norm)
    scale, shift = (row[0].to(first.conv.weight) for row in statistics)
    fixed = _replaced(first, layer_norm=_FixedNorm(scale, shift))
    return _replaced(extractor, conv_layers=nn.ModuleList([fixed, *others]))


def _replaced(module: nn.Module, **submodules: nn.Module) -> nn.Module:
    """The module with other submodules; all else is shared with it."""
    other = copy.copy(module)
    other._modules = {**module._modules, **submodules}
    return other


def _results(run: _Run, utterances: Iterator[_Utterance | None], lookahead_samples: float) -> Iterator[Tensor | None]:
    """The result of each utterance, window by window."""
    window: list[_Utterance | None] = []
    num_samples = 0
    for utterance in utterances:
        window.append(utterance)
        num_samples += 0 if utterance is None else len(utterance.waveform)
        if num_samples >= lookahead_samples:
            yield from _results_of_window(run, window)
            window, num_samples = [], 0
    yield from _results_of_window(run, window)


def _results_of_window(run: _Run, window: list[_Utterance | None]) -> Iterator[Tensor | None]:
    pieces = [piece for utterance in window if utterance is not None for piece in run.chunking.pieces(utterance)]
    for batch in _batches(pieces, run.batch_samples):
        _compute(run, batch)
    del pieces
    window.reverse()
    while window:  # a result leaves the window before it is handed out, and with it its waveform
        utterance = window.pop()
        result = None if utterance is None else utterance.result
        del utterance
        yield result if result is None or run.is_stacked else result[0]


def _batches(pieces: list[_Piece], batch_samples: float) -> Iterator[list[_Piece]]:
    """Pieces of about the same length, as many as fit with their padding; one at least."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.waveform)):
        if batch and (len(batch) + 1) * len(piece.waveform) > batch_samples:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


@torch.no_grad()
def _compute(run: _Run, batch: list[_Piece]) -> None:
    """Compute a batch and put what is kept of it into the results."""
    features, lengths = _frames(run.model, batch)
    for number, states in enumerate(_hidden_states(run, features, lengths)):
        states = states.cpu()
        for row, (utterance, _, start, kept_start, kept_end) in zip(states, batch, strict=True):
            if utterance.result is None:
                num_layers = 1 if run.layers == "output" else len(run.layers)
                utterance.result = torch.empty(num_layers, utterance.num_frames, row.size(-1), dtype=row.dtype)
            utterance.result[number, kept_start:kept_end] = row[kept_start - start : kept_end - start]


def _frames(model: Wav2Vec2Model, batch: list[_Piece]) -> tuple[Tensor, Tensor | None]:
    """The extractor's (B, frames, C), and (B,) valid frames or None where none is padded."""
    waveforms = [piece.waveform.to(model.feature_extractor.dummy_weight) for piece in batch]
    if isinstance(model.feature_extractor.conv_layers[0].layer_norm, nn.GroupNorm):
        # Padding would take part in the statistics over time: each alone.
        rows = [
            piece.utterance.extractor(waveform[None], None)[0][0]
            for piece, waveform in zip(batch, waveforms, strict=True)
        ]
        features, lengths = pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
    else:
        num_samples = torch.tensor([len(waveform) for waveform in waveforms])
        features, lengths = model.feature_extractor(pad_sequence(waveforms, batch_first=True), num_samples)
    is_padded = bool((lengths < features.size(1)).any())
    return features, lengths.to(features.device) if is_padded else None


def _hidden_states(run: _Run, features: Tensor, lengths: Tensor | None) -> Iterator[Tensor]:
    """The wanted (B, frames, D), layer after layer."""
    if run.layers == "output":
        x = run.model.encoder(features, lengths)
        yield x if run.model.aux is None else run.model.aux(x)
        return
    states = run.model.encoder.extract_features(features, lengths, max(1, *run.layers))
    for layer in run.layers:
        yield states[layer]
