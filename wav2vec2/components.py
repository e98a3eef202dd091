"""The blocks of the model. Their names and their parameters' are torchaudio's, so that published checkpoints load.

Beside its forward, a block that can be pruned has ``get_num_params()`` and ``operation()``, its expected parameters and
what it does, given the expected size of its input (differentiable while there are masks); ``prune()``, which makes it
smaller and returns whether anything is left, and ``prune_embed()``, which keeps dimensions (n,) of frames; and
``shape``, its size in the config's terms. Throughout, B is the batch, T samples or frames, C conv channels, D the
embedding dimension, H heads, K the head dimension, F the intermediate dimension of the feed-forward.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hardconcrete import HardConcrete

from .config import PRUNING_UNITS, ModelConfig, WavLMConfig
from .fast import (
    Linear,
    Moments,
    autocast_dtype,
    conv_channels_last,
    conv_frames,
    fast_paths,
    normalized_conv,
    on_cpu,
    prefers_fused_attention,
)
from .operations import Count, Operation, part
from .pruning_utils import keep, prune_inputs, prune_norm, prune_outputs

Length = TypeVar("Length", int, Tensor)

# Parts of a weight under weight norm: names in torch's newer parametrization -> published names.
WEIGHT_NORM_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
# Name of the weight where weight norm has been removed: ours, transformers' and torchaudio's; and fairseq's.
_PLAIN_POSITIONAL_WEIGHTS = (".pos_conv_embed.conv.weight", ".pos_conv.0.weight")

# The extractor's first layers take most of a forward pass. Two seconds of them fit a CPU's cache.
_SAMPLES_AT_ONCE = 32_000

# Samples that a streaming model hears before it does without the statistics of other speech: one second.
_PRIOR_SAMPLES = 16_000

# fairseq's epsilon (the Hugging Face feature extractor has 1e-7).
NORMALIZATION_EPS = 1e-5

# Added to the attention scores of padded frames; a finite number survives half precision.
_PADDING_SCORE = -10000.0


def published_name(key: str) -> str:
    """Return the published name of a state dict key that torch's newer weight norm may have renamed."""
    for name, published in WEIGHT_NORM_NAMES.items():
        if key.endswith(f".{name}"):
            return key.removesuffix(name) + published
    return key


def published_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict under the published names.

    Where weight norm has been removed from the positional convolution, its weight is split into direction and scale
    again. The result is a plain dict: torch would follow attributes that a file gave to its own.
    """
    state_dict = {published_name(key): value for key, value in state_dict.items()}
    for key in [key for key in state_dict if f".{key}".endswith(_PLAIN_POSITIONAL_WEIGHTS)]:
        weight = state_dict[key]
        is_plain = isinstance(weight, Tensor) and weight.layout == torch.strided and weight.is_floating_point()
        if is_plain and weight.ndim == 3 and weight.numel() and f"{key}_v" not in state_dict:
            del state_dict[key]
            weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            scale = torch.norm_except_dim(weight, 2, 2)
            # A direction of zero length would be divided by 0.
            state_dict |= {f"{key}_g": scale, f"{key}_v": torch.where(scale == 0, 1, weight)}
    return state_dict


# --- Masks


def _make_mask(config: ModelConfig, unit: str, num_units: int = 1, **options: Any) -> HardConcrete | None:
    """Make the mask over a block's units of one kind (a key of ``PRUNING_UNITS``) if the config asks for it."""
    switch, drop_rate = PRUNING_UNITS[unit].switch, PRUNING_UNITS[unit].drop_rate
    return HardConcrete(num_units, drop_rate, **options) if getattr(config, switch) else None


def _values(mask: HardConcrete | None) -> Tensor | None:
    """Return the values (n,) of a mask if there is one."""
    return None if mask is None else mask()


# Numbers of kept units that replace the masks' own expectations inside of assumed_sizes.
_assumed_sizes: dict[HardConcrete, float] = {}


@contextmanager
def assumed_sizes(sizes: Mapping[HardConcrete, float]) -> Iterator[None]:
    """Count with these numbers of kept units, instead of the expected ones, inside the block."""
    _assumed_sizes.update(sizes)
    try:
        yield
    finally:
        _assumed_sizes.clear()


def _expected_size(mask: HardConcrete | None, size: int) -> Count:
    """Return the number of units that a mask is expected to keep, or ``size`` if there is no mask."""
    if mask is None:
        return size
    return _assumed_sizes[mask] if _assumed_sizes else mask.l0_norm()


def _mask_for(x: Tensor, mask: Tensor) -> Tensor:
    """Convert a mask to the precision of ``x``: a float32 mask would turn all that follows into float32."""
    return mask.to(x.dtype) if fast_paths() else mask


def _run(function: Callable[..., Tensor], recompute: bool, *inputs: Any) -> Tensor:
    """Return ``function(*inputs)``; with ``recompute`` only inputs are kept, and the backward pass runs it again."""
    if recompute and torch.is_grad_enabled():  # the second run sees the noise (dropout, masks) of the first
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=True)
    return function(*inputs)


def _prune_whole_block(block: "SelfAttention | FeedForward", last: nn.Linear) -> bool:
    """Move the mask of a whole block into its last layer; returns whether the mask keeps the block."""
    if block.hard_concrete_for_layer is None:
        return True
    mask, block.hard_concrete_for_layer = block.hard_concrete_for_layer(), None
    last.weight.mul_(mask)
    last.bias.mul_(mask)
    return bool(mask.any())


# --- Extractor


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvLayerBlock(nn.Module):
    """One layer of the extractor: Conv1d, an optional norm, GELU, and the mask over its output channels."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        layers = config.extractor_conv_layer_config
        channels, kernel, stride = layers[number]
        self.layer_norm: LayerNorm | nn.GroupNorm | None = None
        if config.extractor_mode == "layer_norm":
            self.layer_norm = LayerNorm(channels)
        elif number == 0:
            self.layer_norm = nn.GroupNorm(channels, channels)  # one group per channel
        in_channels = layers[number - 1][0] if number else 1
        self.conv = nn.Conv1d(in_channels, channels, kernel, stride=stride, bias=config.extractor_conv_bias)
        # At least one channel stays: the layers behind have nothing to work on otherwise.
        self.hard_concrete = _make_mask(config, "conv", channels, min_kept=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, T) -> (B, C_out, num_frames(T))"""
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = F.gelu(x)
        if self.hard_concrete is not None:
            x = x * self.hard_concrete()[:, None]
        return x

    def forward_frames(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """(B, T, C_in) without the mask ``scale`` (C_in,) of the layer below -> (B, frames, C_out) without this one's.

        Multiplied into the weight, as pruning will do, a mask costs nothing for each frame.
        """
        weight = self.conv.weight if scale is None else self.conv.weight * scale[:, None]
        x = conv_frames(x, weight, self.conv.bias, self.conv.stride[0])
        norm = self.layer_norm
        if isinstance(norm, nn.LayerNorm):
            x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        elif norm is not None:
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x)

    def num_frames(self, length: Length) -> Length:
        """Return the frames made of ``length`` inputs: floor((n - kernel) / stride) + 1, at least 0."""
        frames = (length - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        return frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)

    def get_num_params(self, in_channels: Count) -> tuple[Count, Count]:
        """Return the expected parameters and output channels, given the expected input channels."""
        out_channels = _expected_size(self.hard_concrete, self.conv.out_channels)
        num_params = in_channels * out_channels * self.conv.kernel_size[0]
        if self.conv.bias is not None:
            num_params = num_params + out_channels
        if self.layer_norm is not None:
            num_params = num_params + 2 * out_channels
        return num_params, out_channels

    def operation(self, in_channels: Count, num_frames: int) -> Operation:
        """Return what is done for ``num_frames`` outputs, given the expected input channels."""
        sizes = in_channels, _expected_size(self.hard_concrete, self.conv.out_channels)
        norm = "none" if self.layer_norm is None else type(self.layer_norm).__name__
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return Operation(self, "conv", sizes, {"kernel": kernel, "stride": stride, "norm": norm, "frames": num_frames})

    def prune_outputs(self) -> tuple[Tensor, Tensor] | None:
        """Drop masked output channels; returns the kept index and soft mask for whoever consumes them, or None."""
        if self.hard_concrete is None:
            return None
        mask = self.hard_concrete()
        index = mask.nonzero().squeeze(-1)
        prune_outputs(self.conv, index)
        if self.layer_norm is not None:
            prune_norm(self.layer_norm, index)
        self.hard_concrete = None
        return index, mask[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, kernel, stride), an entry of ``extractor_conv_layer_config``."""
        return self.conv.out_channels, self.conv.kernel_size[0], self.conv.stride[0]


class Heard(NamedTuple):
    """Sums over all windows of samples that a stream has heard, in float64."""

    number: Tensor  # (B,)
    sum: Tensor  # (B, kernel)
    products: Tensor  # (B, kernel, kernel)

    def __add__(self, other: tuple[Any, ...]) -> "Heard":
        return Heard(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


class RunningMoments(nn.Module):
    """Mean and covariance of the windows of samples that were heard until the end of each chunk.

    Where less than :data:`_PRIOR_SAMPLES` was heard, windows with the moments of other speech stand for the rest: n
    windows of sum s and products P give the mean (s + f m) / (n + f) and the second moment (P + f M) / (n + f), with f
    the windows that are missing, m and M the prior's. From then on they are those of all that was heard, and at the end
    of an utterance those of the whole.
    """

    prior_mean: Tensor  # (kernel,)
    prior_products: Tensor  # (kernel, kernel)

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.register_buffer("prior_mean", torch.zeros(kernel, dtype=torch.float64))
        self.register_buffer("prior_products", torch.eye(kernel, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningMoments":
        # The dtype stays: a covariance is a small difference of products.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def nothing(self, batch: int) -> Heard:
        """Return what was heard before the first chunk."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.prior_mean.device)
        return Heard(zeros(batch), zeros(batch, self.kernel), zeros(batch, self.kernel, self.kernel))

    def sums(self, chunks: Tensor, lengths: Tensor) -> Heard:
        """Sum over the windows that begin in the first (B,) samples of (B, T), without those that end behind them."""
        windows = chunks.double().unfold(-1, self.kernel, self.stride)  # (B, P, kernel)
        starts = torch.arange(windows.size(1), device=windows.device) * self.stride
        valid = (starts + self.kernel <= lengths[:, None]).double()
        windows = windows * valid[..., None]
        return Heard(valid.sum(1), windows.sum(1), windows.transpose(1, 2) @ windows)

    def forward(self, heard: Heard) -> Moments:
        """Return mean (B, kernel) and covariance (B, kernel, kernel)."""
        missing = (_PRIOR_SAMPLES // self.stride - heard.number).clamp(min=0)[:, None]
        total = heard.number[:, None] + missing
        mean = (heard.sum + missing * self.prior_mean) / total
        products = (heard.products + missing[..., None] * self.prior_products) / total[..., None]
        return mean, products - mean[:, :, None] * mean[:, None]


class FeatureExtractor(nn.Module):
    """The convolutional front end: waveform to frames.

    A streaming model's sees a chunk at a time: the samples of ``chunk_frames`` frames, normalised, and behind the first
    convolution, by what was heard until its end.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = [ConvLayerBlock(config, number) for number in range(len(config.extractor_conv_layer_config))]
        self.conv_layers = cast(Sequence[ConvLayerBlock], nn.ModuleList(layers))
        self.recompute = False  # keep each layer's input only and run the layer again in the backward pass
        self.chunk_frames = config.encoder_chunk_frames
        self.normalizes = config.normalize_waveform  # by chunks; whole waveforms are normalised by the model
        self.heard: RunningMoments | None = None
        if self.chunk_frames and config.normalize_waveform:
            self.heard = RunningMoments(1, 1)
        elif self.chunk_frames and config.extractor_mode == "group_norm":
            self.heard = RunningMoments(*config.extractor_conv_layer_config[0][1:])
        # A non-trained scale that keeps the last conv's soft mask after pruning: the projection's
        # LayerNorm behind it could not absorb the mask into its weights.
        self.dummy_weight = nn.Parameter(torch.ones(self.conv_layers[-1].conv.out_channels), requires_grad=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T) and (B,) samples -> (B, frames, C) and (B,) frames."""
        if waveforms.ndim != 2:
            raise ValueError(f"waveforms must have shape (batch, samples), found {tuple(waveforms.shape)}")
        samples = lengths
        if lengths is not None:
            lengths = self.num_frames(lengths)
        shape = waveforms.size(0), self.num_frames(waveforms.size(1)), len(self.dummy_weight)
        if 0 in shape[:2]:  # no waveform, or each shorter than the receptive field
            return waveforms.new_zeros(shape), lengths
        if self.chunk_frames is not None:
            return self._by_chunks(waveforms, samples)[:, : shape[1]], lengths
        if fast_paths() and on_cpu(waveforms):
            return self._by_frames(waveforms), lengths
        x = waveforms[:, None]  # (B, 1, T)
        for layer in self.conv_layers:
            x = _run(layer, self.recompute, x)
        return x.transpose(1, 2) * self.dummy_weight, lengths

    def _by_chunks(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, T) and (B,) samples -> (B, frames of whole chunks, C)"""
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.size(1), device=waveforms.device)
        hop, window = self.hop, self.num_samples(self.chunk_frames or 1)
        num_chunks = max(1, -(-(waveforms.size(1) - (window - hop)) // hop))
        padded = F.pad(waveforms, (0, (num_chunks - 1) * hop + window - waveforms.size(1)))
        chunks = padded.unfold(1, window, hop)  # (B, n, window)
        moments = None
        if self.heard is not None:
            starts = torch.arange(num_chunks, device=waveforms.device) * hop
            lengths = (lengths[:, None] - starts).clamp(0, window).flatten()  # (B * n,)
            flat = chunks.flatten(0, 1)
            own, fresh = self.heard.sums(flat, lengths), self.heard.sums(flat, lengths.clamp(max=self.fresh))
            before = Heard(*(x.unflatten(0, (-1, num_chunks)).cumsum(1).flatten(0, 1) - x for x in fresh))
            moments = self.heard(before + own)
        frames = self.chunk_frame_features(chunks.flatten(0, 1), lengths, moments)
        return frames.unflatten(0, (-1, num_chunks)).flatten(1, 2)

    @property
    def hop(self) -> int:
        """Samples from one chunk of a streaming model to the next."""
        return self.stride * (self.chunk_frames or 1)

    @property
    def fresh(self) -> int:
        """Samples until the end of the last window that the next chunk does not have."""
        return self.hop if self.heard is None else self.hop + self.heard.kernel - self.heard.stride

    def chunk_frame_features(self, chunks: Tensor, lengths: Tensor, moments: Moments | None) -> Tensor:
        """(B, T) samples of a chunk each, of which (B,) are valid, and their moments -> (B, frames of a chunk, C)"""
        if self.normalizes and moments is not None:
            mean, covariance = moments
            valid = torch.arange(chunks.size(1), device=chunks.device) < lengths[:, None]
            scale = torch.rsqrt(covariance[:, 0] + NORMALIZATION_EPS)
            chunks, moments = torch.where(valid, (chunks - mean) * scale, 0).to(chunks.dtype), None
        if fast_paths() and on_cpu(chunks):
            return self._by_frames(chunks, moments)
        x, layers = chunks[:, None], list(self.conv_layers)
        if moments is not None:  # the norm of the first layer is not of this chunk alone
            x, mask = self._first_layer(chunks, moments)(chunks).transpose(1, 2), layers.pop(0).hard_concrete
            x = x if mask is None else x * mask()[:, None]
        for layer in layers:
            x = _run(layer, self.recompute, x)
        return x.transpose(1, 2) * self.dummy_weight

    def _by_frames(self, waveforms: Tensor, moments: Moments | None = None) -> Tensor:
        """(B, T) -> (B, frames, C) with a frame's channels side by side in memory; in blocks where nothing is kept."""
        masks = [_values(layer.hard_concrete) for layer in self.conv_layers]
        if torch.is_grad_enabled():
            x = self._convolve(waveforms, self._first_layer(waveforms, moments), masks)
        elif self.chunk_frames is not None:
            at_once = max(1, _SAMPLES_AT_ONCE // self.hop)
            parts = [waveforms, *(moments or ())]
            x = torch.cat(
                [
                    self._convolve(part, self._first_layer(part, cast(Moments, tuple(others)) or None), masks)
                    for part, *others in zip(*(tensor.split(at_once) for tensor in parts), strict=True)
                ]
            )
        else:
            x = torch.cat([self._convolve_in_blocks(waveform[None], masks) for waveform in waveforms])
        return x * _mask_for(x, self.dummy_weight if masks[-1] is None else self.dummy_weight * masks[-1])

    def _first_layer(self, waveforms: Tensor, moments: Moments | None = None) -> Callable[[Tensor], Tensor]:
        """Return the first layer, (B, T) -> (B, T', C), for any part of ``waveforms``; its norm needs the whole."""
        first = self.conv_layers[0]
        if not isinstance(first.layer_norm, nn.GroupNorm):
            return lambda stretch: first.forward_frames(stretch[..., None], None)
        convolve = normalized_conv(waveforms, first.conv, first.layer_norm, moments)
        return lambda stretch: F.gelu(convolve(stretch))

    def _convolve(
        self, waveforms: Tensor, first_layer: Callable[[Tensor], Tensor], masks: list[Tensor | None]
    ) -> Tensor:
        """(B, T) -> (B, frames, C) without the last layer's mask"""
        x = _run(first_layer, self.recompute, waveforms)
        for layer, mask in zip(self.conv_layers[1:], masks[:-1], strict=True):
            x = _run(layer.forward_frames, self.recompute, x, mask)
        return x

    def _convolve_in_blocks(self, waveforms: Tensor, masks: list[Tensor | None]) -> Tensor:
        """:meth:`_convolve`, a stretch of frames at a time."""
        first_layer = self._first_layer(waveforms)
        num_frames, at_once = self.num_frames(waveforms.size(1)), max(1, _SAMPLES_AT_ONCE // self.stride)
        blocks = []
        for start in range(0, num_frames, at_once):
            samples = self.num_samples(min(at_once, num_frames - start))
            stretch = waveforms[:, start * self.stride :][:, :samples]
            blocks.append(self._convolve(stretch, first_layer, masks))
        return torch.cat(blocks, dim=1)

    def num_frames(self, length: Length) -> Length:
        """Return the frames made of ``length`` samples."""
        for layer in self.conv_layers:
            length = layer.num_frames(length)
        return length

    def num_samples(self, num_frames: int) -> int:
        """Return the fewest samples that make ``num_frames`` frames."""
        for layer in reversed(self.conv_layers):
            num_frames = (num_frames - 1) * layer.conv.stride[0] + layer.conv.kernel_size[0]
        return num_frames

    @property
    def receptive_field(self) -> int:
        """Samples that one frame is made of."""
        return self.num_samples(1)

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod([layer.conv.stride[0] for layer in self.conv_layers])  # a list, for torch.compile

    def get_num_params(self) -> tuple[Count, Count]:
        """Return the expected parameters and output channels."""
        num_params: Count = 0
        channels: Count = 1
        for layer in self.conv_layers:
            layer_params, channels = layer.get_num_params(channels)
            num_params = num_params + layer_params
        return num_params + channels, channels  # dummy_weight has one entry per channel

    def operations(self, num_samples: int) -> list[Operation]:
        """Return what the layers do with ``num_samples`` samples; the last one's sizes have the expected channels."""
        operations: list[Operation] = []
        channels: Count = 1
        times = 1
        if self.chunk_frames is not None:  # each chunk makes its own of what the next one's first frames read, too
            times, num_samples = (
                -(-self.num_frames(num_samples) // self.chunk_frames),
                self.num_samples(self.chunk_frames),
            )
        for layer in self.conv_layers:
            num_samples = layer.num_frames(num_samples)
            operations.append(layer.operation(channels, times * num_samples))
            channels = operations[-1].sizes[1]
        return operations

    def prune(self) -> Tensor | None:
        """Prune all layers; returns the kept output channels (n,), or None if the last layer has no mask."""
        kept = None
        for layer, consumer in zip(self.conv_layers, [*self.conv_layers[1:], None], strict=True):
            kept = layer.prune_outputs()
            if kept is None:
                continue
            index, soft_mask = kept
            if consumer is not None:
                prune_inputs(consumer.conv, index)
                consumer.conv.weight.mul_(soft_mask[:, None])
            else:
                self.dummy_weight = nn.Parameter(self.dummy_weight[index] * soft_mask, requires_grad=False)
        return None if kept is None else kept[0]


# --- Between extractor and transformer


class FeatureProjection(nn.Module):
    """LayerNorm (which DistilHuBERT leaves out), Linear and dropout between extractor and transformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        in_features = config.extractor_conv_layer_config[-1][0]
        self.layer_norm = nn.LayerNorm(in_features) if config.encoder_feature_projection_layer_norm else None
        self.projection = Linear(in_features, config.encoder_embed_dim)
        self.dropout = nn.Dropout(config.encoder_projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, frames, C) -> (B, frames, D)"""
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return self.dropout(self.projection(x))

    def get_num_params(self, in_features: Count, embed_dim: Count) -> Count:
        norm_params = 0 if self.layer_norm is None else in_features * 2
        return norm_params + (in_features + 1) * embed_dim

    def operation(self, in_features: Count, embed_dim: Count, num_frames: int) -> Operation:
        return Operation(self, "projection", (in_features, embed_dim), {"frames": num_frames})

    def prune(self, index: Tensor) -> None:
        """Keep the input channels of ``index`` (n,)."""
        if self.layer_norm is not None:
            prune_norm(self.layer_norm, index)
        prune_inputs(self.projection, index)


class WeightNormConv1d(nn.Module):
    """Grouped Conv1d with the weight ``weight_g`` (1, 1, kernel) * ``weight_v`` (D, D / groups, kernel) / its norms.

    These are the published names; those of ``torch.nn.utils.parametrizations.weight_norm`` load as well.
    """

    folded_weight: Tensor | None

    def __init__(self, channels: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.groups, self.kernel_size = groups, kernel_size
        weight, self.bias = nn.Conv1d(channels, channels, kernel_size, groups=groups).parameters()
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight.detach(), dim=(0, 1), keepdim=True))
        self.weight_v = weight
        self.register_buffer("folded_weight", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """(D, D / groups, kernel)"""
        # The operator behind torch.nn.utils.parametrizations.weight_norm: the same to the last bit, gradients too.
        return torch._weight_norm(self.weight_v, self.weight_g, 2)

    @torch.no_grad()
    def fold(self) -> None:
        """Freeze the weight and compute it once; the state dict stays as it is."""
        self.weight_g.requires_grad_(False)
        self.weight_v.requires_grad_(False)
        self.folded_weight = self.weight

    def forward(self, x: Tensor, padding: int, tap_mask: Tensor | None = None) -> Tensor:
        """(B, D, T) -> (B, D, T + 2 * padding - kernel + 1), with a mask (kernel,) over the taps"""
        if tap_mask is not None:
            weight = torch._weight_norm(self.weight_v, self.weight_g * tap_mask, 2)
        # Requiring gradients again invalidates the folded weight.
        elif self.folded_weight is not None and not self.weight_v.requires_grad and fast_paths():
            weight = self.folded_weight
        else:
            weight = self.weight
        convolve = conv_channels_last if fast_paths() and on_cpu(x) else F.conv1d
        return convolve(x, weight, self.bias, padding=padding, groups=self.groups)

    def prune(self, index: Tensor, soft_mask: Tensor) -> None:
        """Keep the taps of ``index`` (n,), each times its entry of the mask (n,)."""
        self.weight_v = nn.Parameter(self.weight_v.detach()[..., index].clone())
        self.weight_g = nn.Parameter(self.weight_g.detach()[..., index] * soft_mask)
        self.kernel_size, self.folded_weight = len(index), None

    def prune_embed(self, index: Tensor) -> None:
        """Keep the channels of ``index`` (n,), which are the same in each group."""
        weight_v = self.weight_v.detach()[index][:, index[: len(index) // self.groups]]
        kept, before = (torch.linalg.vector_norm(v, dim=(0, 1), keepdim=True) for v in (weight_v, self.weight_v))
        self.weight_g = nn.Parameter(self.weight_g.detach() * kept / before)
        self.weight_v, self.bias = nn.Parameter(weight_v), keep(self.bias, index, dim=0)
        self.folded_weight = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.folded_weight = None
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[published_name(key)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ConvolutionalPositionalEmbedding(nn.Module):
    """Relative position from a wide grouped convolution over time, with a mask over its taps.

    A unit is a ring: the two taps at one distance from the middle, or the middle tap of an odd kernel. Rings go from
    the outside in, so that the remaining taps form a convolution again. A streaming model's looks back only: its last
    tap is at the frame itself, a unit is a tap, and those of the far past go first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kernel, groups = config.encoder_pos_conv_kernel, config.encoder_pos_conv_groups
        self.conv = WeightNormConv1d(config.encoder_embed_dim, kernel, groups)
        self.looks_back = config.encoder_chunk_frames is not None
        num_units = kernel if self.looks_back else (kernel + 1) // 2
        self.hard_concrete = _make_mask(config, "posconv", num_units, min_kept=1, nested=True)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """(B, T, D), and the frames (B, kernel - 1, D) before it if the model is streaming, else zeros -> (B, T, D)"""
        num_frames, taps = x.size(1), self.conv.kernel_size
        if num_frames == 0:  # torch has no convolution over nothing
            return x
        if self.looks_back:
            x = F.pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat([past, x], dim=1)
        x = self.conv(x.transpose(1, 2), 0 if self.looks_back else taps // 2, self._tap_mask())
        return F.gelu(x[..., :num_frames]).transpose(1, 2)  # an even kernel makes one frame too many

    def _tap_mask(self) -> Tensor | None:
        """(kernel,), or None without a mask"""
        rings = _values(self.hard_concrete)  # from the middle outwards, or from the frame back
        if rings is None or self.looks_back:
            return None if rings is None else rings.flip(0)
        return torch.cat([rings.flip(0), rings[self.conv.kernel_size % 2 :]])

    def _expected_taps(self) -> Count:
        taps = self.conv.kernel_size
        if self.looks_back:
            return _expected_size(self.hard_concrete, taps)
        return 2 * _expected_size(self.hard_concrete, (taps + 1) // 2) - taps % 2

    def get_num_params(self, embed_dim: Count) -> Count:
        return embed_dim + self._expected_taps() * (embed_dim * part(embed_dim, self.conv.groups) + 1)

    def operation(self, embed_dim: Count, num_frames: int) -> Operation:
        num_frames += self.conv.kernel_size % 2 == 0 and not self.looks_back  # the one too many
        fixed = {"groups": self.conv.groups, "frames": num_frames}
        return Operation(self, "positional", (self._expected_taps(), embed_dim), fixed)

    def prune(self) -> None:
        """Drop masked taps."""
        mask = self._tap_mask()
        if mask is not None:
            index = mask.nonzero().squeeze(-1)
            self.conv.prune(index, mask[index])
            self.hard_concrete = None


# --- Transformer


class FrameNorm(nn.LayerNorm):
    """LayerNorm over frames (B, T, D); a mask (D,) turns it into one over the dimensions that the mask keeps."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). With a mask, mean and variance are weighted by it, and the output is multiplied."""
        if mask is None:
            return super().forward(x)
        weights = mask / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)
        centred = x - (x * weights).sum(-1, keepdim=True)
        variance = (centred.square() * weights).sum(-1, keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias) * mask


class SelfAttention(nn.Module):
    """Multi-head self-attention of HuBERT and wav2vec 2.0, with masks over heads and over the whole block."""

    def __init__(self, config: ModelConfig, num_heads: int, head_dim: int) -> None:
        super().__init__()
        embed_dim, width = config.encoder_embed_dim, num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        chunk = config.encoder_chunk_frames
        self.keys = {} if chunk is None else {"keys": config.encoder_left_frames + chunk}  # that a frame sees; else all
        self.dropout = config.encoder_attention_dropout
        self.k_proj = Linear(embed_dim, width)
        self.v_proj = Linear(embed_dim, width)
        self.q_proj = Linear(embed_dim, width)
        self.out_proj = Linear(width, embed_dim)
        self.hard_concrete_for_heads = _make_mask(config, "head", num_heads)
        self.hard_concrete_for_layer = _make_mask(config, "attlayer")

    @property
    def _in_projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        x: Tensor,
        scores: Tensor | None,
        position_bias: Tensor | None = None,
        past: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)

        Args:
            x: frames.
            scores: added to those of attention, broadcast to (B, H, T, keys): they hide padding, and other chunks.
            position_bias: WavLM's, shared by the layers (H_total, T, keys).
            past: keys and values (B, H, L, K) of the L frames before, replaced by those of the last L; streaming only.
        """
        batch, frames, _ = x.shape
        shape = batch, frames, self.num_heads, self.head_dim
        query, key, value = (proj(x).view(shape).transpose(1, 2) for proj in self._in_projections)  # (B, H, T, K)
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
            past[:] = [each[:, :, frames:] for each in (key, value)]
        bias = scores
        if position_bias is not None:
            bias = self._gate(x, position_bias)
            if scores is not None:
                bias = bias + scores
        probability = self.dropout if self.training else 0.0
        if fast_paths() and prefers_fused_attention(query, probability):
            heads = F.scaled_dot_product_attention(query, key, value, bias, probability)  # scales by K ** -0.5
        else:
            products = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)  # (B, H, T, keys)
            if bias is not None:
                products = products + bias
            heads = F.dropout(products.softmax(dim=-1), probability) @ value  # (B, H, T, K)

        mask = _values(self.hard_concrete_for_heads)
        if mask is not None:
            heads = heads * _mask_for(heads, mask[:, None, None])
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if mask is not None and not self.training:
            output = output * (mask != 0).any()  # no head left: the block is dropped, its output bias with it
        if self.hard_concrete_for_layer is not None:
            output = output * self.hard_concrete_for_layer()
        return output

    def _gate(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """Return the position bias as it is; WavLM weights it."""
        return position_bias

    def get_num_params(self, embed_dim: Count) -> Count:
        width = _expected_size(self.hard_concrete_for_heads, self.num_heads) * self.head_dim
        num_params = 3 * (embed_dim + 1) * width + (width + 1) * embed_dim + self._num_gate_params(embed_dim)
        return num_params * _expected_size(self.hard_concrete_for_layer, 1)

    def _num_gate_params(self, embed_dim: Count) -> Count:
        return 0

    def operation(self, embed_dim: Count, num_frames: int) -> Operation:
        sizes = _expected_size(self.hard_concrete_for_heads, self.num_heads), embed_dim
        fixed = {"head_dim": self.head_dim, "gates": self._num_gates(), "frames": num_frames, **self.keys}
        return Operation(self, "attention", sizes, fixed, _expected_size(self.hard_concrete_for_layer, 1))

    def _num_gates(self) -> int:
        """Return the number of heads that dimensions are dealt to, for gates; 0 without gates."""
        return 0

    def prune(self) -> bool:
        """Drop masked heads; returns whether anything of the block is left."""
        is_kept = _prune_whole_block(self, self.out_proj)
        if self.hard_concrete_for_heads is not None:
            mask = self.hard_concrete_for_heads()
            self.out_proj.weight.mul_(mask.repeat_interleave(self.head_dim))
            head_index = mask.nonzero().squeeze(-1)
            columns = (head_index[:, None] * self.head_dim + torch.arange(self.head_dim, device=mask.device)).flatten()
            for projection in self._in_projections:
                prune_outputs(projection, columns)
            prune_inputs(self.out_proj, columns)
            self._keep_heads(head_index)
            self.hard_concrete_for_heads = None
        return is_kept and self.num_heads > 0

    def _keep_heads(self, head_index: Tensor) -> None:
        self.num_heads = len(head_index)

    def prune_embed(self, index: Tensor) -> None:
        for projection in self._in_projections:
            prune_inputs(projection, index)
        prune_outputs(self.out_proj, index)

    @property
    def shape(self) -> dict[str, Any]:
        """This layer's entries of the config's keys for attention."""
        return {"encoder_num_heads": self.num_heads}


class BucketTable(nn.Embedding):
    """WavLM's relative positions, as T5's: a learnt score of each head for each bucket of distances.

    Half of the buckets belong to each sign. Half of those hold one distance each, the others grow logarithmically
    up to ``max_distance``.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int) -> None:
        super().__init__(num_buckets, num_heads)
        self.max_distance = max_distance

    def position_bias(self, num_frames: int) -> Tensor:
        """Return the ungated bias (H_total, T, T)."""
        position = torch.arange(num_frames, device=self.weight.device)
        distance = position[None, :] - position[:, None]  # key minus query
        num_buckets = self.num_embeddings // 2
        num_exact = num_buckets // 2
        magnitude = distance.abs()
        # Small magnitudes take the other branch; the clamp only keeps their logarithm finite.
        log_ratio = torch.log(magnitude.clamp(min=1).float() / num_exact) / math.log(self.max_distance / num_exact)
        far = num_exact + (log_ratio * (num_buckets - num_exact)).long()
        bucket = torch.where(magnitude < num_exact, magnitude, far.clamp(max=num_buckets - 1))
        bias = self(bucket + (distance > 0) * num_buckets).permute(2, 0, 1)
        if not fast_paths():
            return bias
        # Every layer multiplies it: laid out for that, and in the precision of the scores that the product is added to.
        return bias.to(autocast_dtype(bias.device.type) or bias.dtype).contiguous()


class WavLMSelfAttention(SelfAttention):
    """Self-attention with WavLM's gated relative position bias (arXiv 2110.13900, section 3.2).

    Gates and bucket table cover all heads of the unpruned layer. The table is that of all layers, and belongs to the
    first attention of the model.
    """

    head_index: Tensor  # remaining_heads on the model's device, so that selecting them waits for nothing

    def __init__(self, config: WavLMConfig, layer: int) -> None:
        self.total_num_heads = config.encoder_total_num_heads[layer]
        self.remaining_heads = list(config.encoder_remaining_heads[layer])
        super().__init__(config, len(self.remaining_heads), config.encoder_head_dim)
        self.register_buffer("head_index", torch.tensor(self.remaining_heads, dtype=torch.long), persistent=False)
        is_first = not any(config.encoder_use_attention[:layer])
        table = config.encoder_num_buckets, self.total_num_heads, config.encoder_max_distance
        self.rel_attn_embed = BucketTable(*table) if is_first else None
        self.gru_rel_pos_linear = nn.Linear(config.encoder_embed_dim // self.total_num_heads, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.total_num_heads, 1, 1))

    def _gate(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """(B, T, D) input of the attention, (H_total, T, T) -> (B, H, T, T)"""
        batch, frames, embed_dim = x.shape
        per_head = x.view(batch, frames, self.total_num_heads, embed_dim // self.total_num_heads).transpose(1, 2)
        const: Tensor = self.gru_rel_pos_const
        if self.num_heads < self.total_num_heads:
            per_head = per_head.index_select(1, self.head_index)
            const = const.index_select(1, self.head_index)
            position_bias = position_bias.index_select(0, self.head_index)
        logits = self.gru_rel_pos_linear(per_head)  # (B, H, T, 8)
        gates = torch.sigmoid(logits.view(batch, self.num_heads, frames, 2, 4).sum(-1))
        gate_a, gate_b = gates.chunk(2, dim=-1)  # (B, H, T, 1) each
        gate = gate_a * (gate_b * const - 1.0) + 2.0
        return (gate.to(position_bias.dtype) if fast_paths() else gate) * position_bias

    def _num_gate_params(self, embed_dim: Count) -> Count:
        # The table is counted by the transformer: it lives as long as any attention does.
        return 8 * (part(embed_dim, self.total_num_heads) + 1) + self.total_num_heads

    def _num_gates(self) -> int:
        return self.total_num_heads

    def prune_embed(self, index: Tensor) -> None:
        super().prune_embed(index)
        prune_inputs(self.gru_rel_pos_linear, index[: len(index) // self.total_num_heads])

    def _keep_heads(self, head_index: Tensor) -> None:
        super()._keep_heads(head_index)
        self.head_index = self.head_index[head_index]
        self.remaining_heads = self.head_index.tolist()

    @property
    def shape(self) -> dict[str, Any]:
        heads = {"encoder_total_num_heads": self.total_num_heads}
        return heads | {"encoder_remaining_heads": list(self.remaining_heads)}


class FeedForward(nn.Module):
    """The feed-forward block, with masks over intermediate dimensions and over the whole block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.encoder_ff_interm_features[layer]
        self.intermediate_dense = Linear(config.encoder_embed_dim, width)
        self.intermediate_dropout = nn.Dropout(config.encoder_ff_interm_dropout)
        self.output_dense = Linear(width, config.encoder_embed_dim)
        self.output_dropout = nn.Dropout(config.encoder_dropout)
        self.hard_concrete_for_intermediate = _make_mask(config, "interm", width)
        self.hard_concrete_for_layer = _make_mask(config, "ffnlayer")

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = self.intermediate_dropout(F.gelu(self.intermediate_dense(x)))  # (B, T, F)
        mask = _values(self.hard_concrete_for_intermediate)
        if mask is not None:
            x = x * _mask_for(x, mask)
        x = self.output_dropout(self.output_dense(x))
        if mask is not None and not self.training:
            x = x * (mask != 0).any()  # nothing left: the block is dropped, its output bias with it
        if self.hard_concrete_for_layer is not None:
            x = x * self.hard_concrete_for_layer()
        return x

    def _expected_width(self) -> Count:
        return _expected_size(self.hard_concrete_for_intermediate, self.intermediate_dense.out_features)

    def get_num_params(self, embed_dim: Count) -> Count:
        width = self._expected_width()
        num_params = (embed_dim + 1) * width + (width + 1) * embed_dim
        return num_params * _expected_size(self.hard_concrete_for_layer, 1)

    def operation(self, embed_dim: Count, num_frames: int) -> Operation:
        share = _expected_size(self.hard_concrete_for_layer, 1)
        return Operation(self, "feed_forward", (self._expected_width(), embed_dim), {"frames": num_frames}, share)

    def prune(self) -> bool:
        """Drop masked intermediate dimensions; returns whether anything of the block is left."""
        is_kept = _prune_whole_block(self, self.output_dense)
        if self.hard_concrete_for_intermediate is not None:
            mask = self.hard_concrete_for_intermediate()
            index = mask.nonzero().squeeze(-1)
            self.output_dense.weight.mul_(mask)
            prune_outputs(self.intermediate_dense, index)
            prune_inputs(self.output_dense, index)
            self.hard_concrete_for_intermediate = None
        return is_kept and self.intermediate_dense.out_features > 0

    def prune_embed(self, index: Tensor) -> None:
        prune_inputs(self.intermediate_dense, index)
        prune_outputs(self.output_dense, index)

    @property
    def shape(self) -> dict[str, Any]:
        """This layer's entry of the config's key for the feed-forward."""
        return {"encoder_ff_interm_features": self.intermediate_dense.out_features}


def _make_attention(config: ModelConfig, layer: int) -> SelfAttention:
    if isinstance(config, WavLMConfig):
        return WavLMSelfAttention(config, layer)
    return SelfAttention(config, config.encoder_num_heads[layer], config.encoder_head_dim)


class EncoderLayer(nn.Module):
    """Attention and feed-forward with residuals, pre-norm or post-norm; either block may be absent."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = _make_attention(config, layer) if config.encoder_use_attention[layer] else None
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.layer_norm = FrameNorm(config.encoder_embed_dim)
        self.layer_norm_first = config.encoder_layer_norm_first
        self.feed_forward = FeedForward(config, layer) if config.encoder_use_feed_forward[layer] else None
        self.final_layer_norm = FrameNorm(config.encoder_embed_dim)
        self._absent_shape = config.of_layer(layer)  # keeps the shape of a block that is not there

    def forward(
        self,
        x: Tensor,
        scores: Tensor | None,
        position_bias: Tensor | None,
        embed_mask: Tensor | None = None,
        past: list[Tensor] | None = None,
    ) -> Tensor:
        """As :meth:`SelfAttention.forward`; the mask (D,) is on what is read: pre-norm layers leave the others."""
        if self.attention is not None:
            residual = x
            if self.layer_norm_first:
                x = self.layer_norm(x, embed_mask)
            x = residual + self.dropout(self.attention(x, scores, position_bias, past))
        if self.layer_norm_first:
            if self.feed_forward is not None:
                x = x + self.feed_forward(self.final_layer_norm(x, embed_mask))
            return x
        # Post-norm: both norms act on the residual stream itself and stay when a block is gone.
        x = self.layer_norm(x, embed_mask)
        if self.feed_forward is not None:
            x = x + self.feed_forward(x)
        return self.final_layer_norm(x, embed_mask)

    @property
    def _blocks(self) -> list[SelfAttention | FeedForward]:
        return [block for block in (self.attention, self.feed_forward) if block is not None]

    def get_num_params(self, embed_dim: Count) -> Count:
        return sum((block.get_num_params(embed_dim) for block in self._blocks), 4 * embed_dim)  # both norms first

    def operations(self, embed_dim: Count, num_frames: int) -> list[Operation]:
        """Return what norms, residuals and both blocks do."""
        norms = Operation(self, "norms", (1, embed_dim), {"frames": num_frames})
        return [norms, *(block.operation(embed_dim, num_frames) for block in self._blocks)]

    def prune(self) -> None:
        """Prune both blocks and drop what is empty."""
        if self.attention is not None and not self.attention.prune():
            self._absent_shape |= self.attention.shape
            self.attention = None
        if self.feed_forward is not None and not self.feed_forward.prune():
            self._absent_shape |= self.feed_forward.shape
            self.feed_forward = None

    def prune_embed(self, index: Tensor) -> None:
        prune_norm(self.layer_norm, index)
        prune_norm(self.final_layer_norm, index)
        for block in self._blocks:
            block.prune_embed(index)

    @property
    def shape(self) -> dict[str, Any]:
        """This layer's entries of the config's keys that have one for each layer."""
        shape = {
            **self._absent_shape,
            "encoder_use_attention": self.attention is not None,
            "encoder_use_feed_forward": self.feed_forward is not None,
        }
        for block in self._blocks:
            shape |= block.shape
        return shape


class Transformer(nn.Module):
    """Positional convolution and the stack of layers.

    The ``layer_norm`` acts before the layers in post-norm models. In pre-norm models it acts behind
    the last layer, in :meth:`forward` only (as in fairseq and torchaudio).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.encoder_num_layers))
        self.pos_conv_embed = ConvolutionalPositionalEmbedding(config)
        self.layer_norm = FrameNorm(config.encoder_embed_dim)
        self.layer_norm_first = config.encoder_layer_norm_first
        self.layer_drop = config.encoder_layer_drop
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.layers = cast(Sequence[EncoderLayer], layers)  # drawn before the convolution, registered behind it
        self.recompute = False  # keep each layer's input only and run the layer again in the backward pass

    def _preprocess(self, x: Tensor, embed_mask: Tensor | None = None, past: Tensor | None = None) -> Tensor:
        x = x + self.pos_conv_embed(x, past)
        if not self.layer_norm_first:
            x = self.layer_norm(x, embed_mask)
        return self.dropout(x)

    @property
    def _wavlm_attentions(self) -> list[WavLMSelfAttention]:
        return [layer.attention for layer in self.layers if isinstance(layer.attention, WavLMSelfAttention)]

    @property
    def bucket_table(self) -> BucketTable | None:
        """WavLM's table, held by one attention for all; None for other families and where every attention is gone."""
        tables = [attention.rel_attn_embed for attention in self._wavlm_attentions]
        return next((table for table in tables if table is not None), None)

    def _position_bias(self, num_frames: int) -> Tensor | None:
        """Return the bias (H_total, T, T) of :attr:`bucket_table` if there is one."""
        table = self.bucket_table
        return None if table is None else table.position_bias(num_frames)

    def forward(self, x: Tensor, scores: Tensor | None = None, embed_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), with layer drop in training"""
        x = self._preprocess(x, embed_mask)
        # Made here and not by the first layer, so that layer drop cannot take it away.
        position_bias = self._position_bias(x.size(1))
        for layer in self.layers:
            if not (self.training and self.layer_drop and torch.rand(1).item() <= self.layer_drop):
                x = _run(layer, self.recompute, x, scores, position_bias, embed_mask)
        return self.finished(x, embed_mask)

    def step(self, x: Tensor, scores: Tensor, taps: Tensor, pasts: Sequence[list[Tensor]]) -> list[Tensor]:
        """(B, C, D) frames of the next chunk -> the output (B, C, D) of each layer.

        Args:
            x: projected frames.
            scores: for attention, broadcast to (B, H, C, L + C).
            taps: the frames (B, kernel - 1, D) before the chunk.
            pasts: for each layer with attention as in :meth:`SelfAttention.forward`.
        """
        num_frames, remaining = x.size(1), list(pasts)
        x = self._preprocess(x, past=taps)
        position_bias = self._position_bias(scores.size(-1))
        if position_bias is not None:
            position_bias = position_bias[:, -num_frames:]
        outputs = []
        for layer in self.layers:
            past = None if layer.attention is None else remaining.pop(0)
            x = layer(x, scores, position_bias, past=past)
            outputs.append(x)
        return outputs

    def finished(self, x: Tensor, embed_mask: Tensor | None = None) -> Tensor:
        """Turn the last layer's output (B, T, D) into that of :meth:`forward`."""
        return self.layer_norm(x, embed_mask) if self.layer_norm_first else x

    def get_intermediate_outputs(
        self,
        x: Tensor,
        scores: Tensor | None = None,
        num_layers: int | None = None,
        kept: Collection[int] | None = None,
        embed_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """(B, T, D) -> the outputs (B, T, D) of the first ``num_layers`` layers (default: all), without layer drop.

        ``kept`` counts layers from 1; an empty tensor replaces the output of a layer that is not in it.

        Raises:
            ValueError: ``num_layers`` is not between 1 and the number of layers.
        """
        if num_layers is not None and not 0 < num_layers <= len(self.layers):
            raise ValueError(f"num_layers must be between 1 and {len(self.layers)}, found {num_layers}")
        x = self._preprocess(x, embed_mask)
        position_bias = self._position_bias(x.size(1))
        outputs = []
        for number, layer in enumerate(self.layers[:num_layers], start=1):
            x = _run(layer, self.recompute, x, scores, position_bias, embed_mask)
            output = x if embed_mask is None or not self.layer_norm_first else x * _mask_for(x, embed_mask)
            outputs.append(output if kept is None or number in kept else x.new_empty(0))
        return outputs

    def get_num_params(self, embed_dim: Count) -> Count:
        num_params = self.pos_conv_embed.get_num_params(embed_dim) + 2 * embed_dim
        num_params = sum((layer.get_num_params(embed_dim) for layer in self.layers), num_params)
        table = self.bucket_table
        if table is None:
            return num_params
        all_gone: Count = 1
        for attention in self._wavlm_attentions:
            all_gone = all_gone * (1 - _expected_size(attention.hard_concrete_for_layer, 1))
        return num_params + table.weight.numel() * (1 - all_gone)

    def prune(self) -> None:
        """Prune convolution and layers; WavLM's bucket table moves to the first attention that is left."""
        self.pos_conv_embed.prune()
        table = self.bucket_table
        for layer in self.layers:
            layer.prune()
        for number, attention in enumerate(self._wavlm_attentions):
            attention.rel_attn_embed = None if number else table

    def prune_embed(self, index: Tensor) -> None:
        self.pos_conv_embed.conv.prune_embed(index)
        prune_norm(self.layer_norm, index)
        for layer in self.layers:
            layer.prune_embed(index)


class Encoder(nn.Module):
    """Projection of the extractor's frames, padding, and the transformer, with a mask over the dimensions of frames.

    A unit of this mask is a dimension at one place in every group of the positional convolution (and in every head, as
    WavLM's gates see them): groups and heads stay alike. Its deterministic values are 0 and 1, because the output of
    the convolution passes an activation, behind which no weight could absorb another value.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        transformer = Transformer(config)  # drawn before the projection, registered behind it
        self.feature_projection = FeatureProjection(config)
        self.transformer = transformer
        self.embed_dim, self.num_embed_units = config.encoder_embed_dim, config.num_embed_units
        self.chunk_frames, self.left_frames = config.encoder_chunk_frames, config.encoder_left_frames
        self.hard_concrete = _make_mask(config, "embed", self.num_embed_units, min_kept=1, binary=True)

    def _preprocess(
        self, features: Tensor, lengths: Tensor | None, hidden: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the projected frames, scores that hide padding and other chunks, and the mask (D,) on dimensions."""
        x, mask = self.feature_projection(features), self._embed_mask()
        if hidden is not None:
            is_hidden, stand_in = hidden
            x = torch.where(is_hidden[..., None], stand_in.to(x.dtype), x)
        if mask is not None:
            x = x * _mask_for(x, mask)
        scores = None if self.chunk_frames is None else self._chunk_scores(x, self.chunk_frames)
        if lengths is not None:
            padded = torch.arange(x.size(1), device=x.device) >= lengths[:, None]  # (B, T)
            x = x.masked_fill(padded[..., None], 0.0)
            padding = padded[:, None, None].to(x.dtype) * _PADDING_SCORE
            scores = padding if scores is None else scores + padding
        return x, scores, mask

    def _chunk_scores(self, x: Tensor, chunk_frames: int) -> Tensor:
        """Return scores (1, 1, T, T) that hide from each frame of (B, T, D) what its chunk cannot see."""
        frames = torch.arange(x.size(1), device=x.device)
        starts = frames[:, None] // chunk_frames * chunk_frames
        hidden = (frames < starts - self.left_frames) | (frames >= starts + chunk_frames)
        return hidden[None, None].to(x.dtype) * _PADDING_SCORE

    def step(
        self, features: Tensor, valid: Tensor, num_before: Tensor, taps: Tensor, pasts: Sequence[list[Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the hidden states (B, C, D) of the next chunk as :meth:`extract_features`, and next step's ``taps``.

        Args:
            features: the extractor's (B, C, C_in), of which ``valid`` (B,) are no padding.
            num_before: frames (B,) before the chunk.
            taps, pasts: as in :meth:`Transformer.step`.
        """
        x = self.feature_projection(features)
        frames = torch.arange(x.size(1), device=x.device)
        x = x.masked_fill((frames >= valid[:, None])[..., None], 0.0)
        hidden = torch.cat(
            [
                torch.arange(self.left_frames, 0, -1, device=x.device) > num_before[:, None],  # before the stream
                frames >= valid[:, None],
            ],
            dim=1,
        )
        scores = hidden[:, None, None].to(x.dtype) * _PADDING_SCORE
        following = torch.cat([taps, x], dim=1)[:, x.size(1) :]
        return [x, *self.transformer.step(x, scores, taps, pasts)], following

    def _embed_mask(self) -> Tensor | None:
        """(D,), or None without a mask"""
        units = _values(self.hard_concrete)
        return None if units is None else units.repeat(self.embed_dim // self.num_embed_units)

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, hidden: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """(B, frames, C) and (B,) valid frames -> (B, frames, D); ``hidden`` as in :meth:`extract_features`."""
        x, scores, embed_mask = self._preprocess(features, lengths, hidden)
        return self.transformer(x, scores, embed_mask)

    def extract_features(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        num_layers: int | None = None,
        kept: Collection[int] | None = None,
        hidden: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the projected features and the output of each layer: num_layers + 1 tensors (B, frames, D).

        ``num_layers`` and ``kept`` are as in :meth:`~wav2vec2.model.Wav2Vec2Model.extract_features`; ``hidden`` says
        which frames (B, frames) are hidden from the transformer, and gives the vector (D,) in their place.
        """
        x, scores, embed_mask = self._preprocess(features, lengths, hidden)
        return [x, *self.transformer.get_intermediate_outputs(x, scores, num_layers, kept, embed_mask)]

    def expected_embed_dim(self) -> Count:
        """Return the expected D."""
        num_units = self.num_embed_units
        return _expected_size(self.hard_concrete, num_units) * (self.embed_dim // num_units)

    def kept_dims(self) -> Tensor | None:
        """Return the dimensions (n,) that :meth:`prune` keeps, in eval mode; None without a mask."""
        mask = self._embed_mask()
        return None if mask is None else mask.nonzero().squeeze(-1)

    def prune(self, channels: Tensor | None) -> None:
        """Prune all blocks, then dimensions of frames; ``channels`` (n,) are the extractor's if not all are left."""
        if channels is not None:
            self.feature_projection.prune(channels)
        self.transformer.prune()
        index = self.kept_dims()
        if index is not None:
            prune_outputs(self.feature_projection.projection, index)
            self.transformer.prune_embed(index)
            self.embed_dim, self.num_embed_units = len(index), len(index) * self.num_embed_units // self.embed_dim
            self.hard_concrete = None
