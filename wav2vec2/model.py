"""The model and its factories: from a config to a model, and back.

``wav2vec2_model(**config)`` builds HuBERT, wav2vec 2.0 and WavLM in any size, pruned or not;
:attr:`Wav2Vec2Model.config` gives the config back. Architecture, module and parameter names are
torchaudio's (``torchaudio.models.wav2vec2``), extended with per-layer shapes and masks.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compat import is_compiling
from .components import (
    ConvLayerBlock,
    ConvolutionalPositionalEmbedding,
    Encoder,
    EncoderLayer,
    FeatureExtractor,
    FeatureProjection,
    FeedForward,
    LayerNorm,
    SelfAttention,
    Transformer,
    WavLMSelfAttention,
)
from .config import check_config, is_wavlm
from .paths import fast_paths

# (channels, kernel, stride) of every published model's extractor: 320 samples (20 ms) per frame.
CONV_LAYERS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


class PruningUnit(NamedTuple):
    """A kind of unit that can be pruned (paper, section 2.2)."""

    switch: str  # the config key that puts masks on it
    mask_name: str  # what the state dict keys of its masks contain


# By the names of --pruning_units.
PRUNING_UNITS = {
    "conv": PruningUnit("extractor_prune_conv_channels", "conv_layers.{}.hard_concrete."),
    "head": PruningUnit("encoder_prune_attention_heads", "attention.hard_concrete_for_heads."),
    "interm": PruningUnit("encoder_prune_feed_forward_intermediate", "feed_forward.hard_concrete_for_intermediate."),
    "attlayer": PruningUnit("encoder_prune_attention_layer", "attention.hard_concrete_for_layer."),
    "ffnlayer": PruningUnit("encoder_prune_feed_forward_layer", "feed_forward.hard_concrete_for_layer."),
}


def masked_units(keys: Iterable[str]) -> list[str]:
    """The names (as in ``--pruning_units``) of the units that a state dict with these keys has masks on."""
    generic = {re.sub(r"\.\d+\.", ".{}.", key) for key in keys}
    return [name for name, unit in PRUNING_UNITS.items() if any(unit.mask_name in key for key in generic)]


def with_masks(config: dict[str, Any], units: Iterable[str]) -> dict[str, Any]:
    """The config with masks on exactly these units (names as in ``--pruning_units``)."""
    units = set(units)
    return {**config, **{unit.switch: name in units for name, unit in PRUNING_UNITS.items()}}


# fairseq's epsilon (the Hugging Face feature extractor has 1e-7).
_NORMALIZATION_EPS = 1e-5


def normalize_waveforms(waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Zero mean and unit variance over the valid samples of each row; padding becomes zero.

    Args:
        waveforms: (B, T) samples.
        lengths: (B,) valid samples, or None if all are.
    """
    if lengths is None:
        return nn.functional.layer_norm(waveforms, waveforms.shape[-1:], eps=_NORMALIZATION_EPS)
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < lengths[:, None]  # (B, T)
    num_valid = lengths[:, None].clamp(min=1)  # an empty row has nothing to normalise, and must not become NaN
    centred = (waveforms - (waveforms * valid).sum(1, keepdim=True) / num_valid) * valid
    variance = centred.square().sum(1, keepdim=True) / num_valid
    return centred * torch.rsqrt(variance + _NORMALIZATION_EPS)


class Wav2Vec2Model(nn.Module):
    """HuBERT, wav2vec 2.0 or WavLM.

    Args:
        normalize_waveform: bring each waveform to zero mean and unit variance over its valid samples.
        feature_extractor: waveform to frames.
        encoder: frames to hidden states.
        aux: optional linear layer on the last hidden state (``aux_num_out`` outputs).
        config: what the model was built from; see :attr:`config`.
    """

    def __init__(
        self,
        normalize_waveform: bool,
        feature_extractor: FeatureExtractor,
        encoder: Encoder,
        aux: nn.Module | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.normalize_waveform = normalize_waveform
        self.feature_extractor = feature_extractor
        self.encoder = encoder
        self.aux = aux
        self._config = dict(config)

    def extract_features(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        num_layers: int | None = None,
        *,
        kept: Collection[int] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states for distillation and downstream tasks; layer drop does not act here.

        Args:
            waveforms: (B, T) samples at 16 kHz.
            lengths: (B,) valid samples of each, or None if none is padded.
            num_layers: stop after this many layers (default: all).
            kept: the layers, from 1, whose outputs are wanted (default: all); an empty tensor stands for each of the
                others, which saves their memory.

        Returns:
            A list of num_layers + 1 tensors (B, frames, D): the projected extractor output (before the
            positional convolution), then the output of every layer; and (B,) valid frames or None.

        Raises:
            ValueError: waveforms are not two-dimensional, or there are not ``num_layers`` layers.
        """
        features, lengths, padded_lengths = self._extract(waveforms, lengths)
        return self.encoder.extract_features(features, padded_lengths, num_layers, kept), lengths

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The last hidden state (B, frames, D), or (B, frames, aux_num_out) with ``aux``; and (B,) valid frames.

        Arguments and errors as in :meth:`extract_features`. Layer drop acts in training, and pre-norm
        models apply their final LayerNorm.
        """
        features, lengths, padded_lengths = self._extract(waveforms, lengths)
        x = self.encoder(features, padded_lengths)
        return (x if self.aux is None else self.aux(x)), lengths

    def _extract(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The extractor's frames, how many are valid, and the same again, or None where no frame is known to be padded.

        Lengths on an accelerator are not looked at: that would wait for it. Who knows that a batch has no padding
        gives no lengths.
        """
        can_look = fast_paths() and not is_compiling()
        is_padded = lengths is not None and not (
            can_look and lengths.device.type == "cpu" and bool((lengths == waveforms.size(-1)).all())
        )
        if self.normalize_waveform:
            waveforms = normalize_waveforms(waveforms, lengths)
        features, frames = self.feature_extractor(waveforms, lengths)
        return features, frames, frames if is_padded else None

    def get_num_params(self) -> Tensor | int:
        """Expected number of parameters (paper, section 2.3): a differentiable scalar while there are masks.

        Without masks it is the exact number. The auxiliary head is not counted: it belongs to a
        downstream task and is never pruned.
        """
        num_params, channels = self.feature_extractor.get_num_params()
        num_params = num_params + self.encoder.feature_projection.get_num_params(channels)
        return num_params + self.encoder.transformer.get_num_params()

    def recompute_activations(self, enabled: bool = True) -> None:
        """In training, keep only the input of each conv and encoder layer, and run it again for the backward pass.

        Much less memory for about a third more work; losses and gradients stay the same to the last bit.
        """
        self.feature_extractor.recompute = enabled
        self.encoder.transformer.recompute = enabled

    def fold_weight_norm(self) -> None:
        """Freeze the positional convolution's weight and compute it once instead of in every forward pass.

        The same numbers to the last bit, and the same ``state_dict()``. Loading other weights undoes it, and so does
        ``requires_grad_()``, for a model that is to be trained again.
        """
        self.encoder.transformer.pos_conv_embed.conv.fold()

    @torch.no_grad()
    def prune(self) -> dict[str, Any]:
        """Make the model physically smaller, in place, and put it in eval mode.

        Units with a zero mask are removed, the soft masks of the others move into the weights that
        consume them, and the masks are gone afterwards.

        Returns:
            The config of the pruned model: ``wav2vec2_model(**config)`` loads its ``state_dict()`` strictly.
        """
        self.eval()  # the deterministic masks
        kept_channels = self.feature_extractor.prune()
        if kept_channels is not None:
            self.encoder.feature_projection.prune(kept_channels)
        self.encoder.transformer.prune()
        self._config = with_masks(self._config, ())
        return self.config

    @property
    def config(self) -> dict[str, Any]:
        """The config that builds this model: what it was built from, with the shapes it has now."""
        layers = [layer.shape for layer in self.encoder.transformer.layers]
        return {
            **self._config,
            "extractor_conv_layer_config": [list(layer.shape) for layer in self.feature_extractor.conv_layers],
            **{key: [shape[key] for shape in layers] for key in layers[0]},
        }


def wav2vec2_model(**config: Any) -> Wav2Vec2Model:
    """Build the model of a config: WavLM if it has ``encoder_remaining_heads``, else HuBERT / wav2vec 2.0.

    The keys are the arguments of :func:`wavlm_model` or :func:`hubert_model`. This is how published
    checkpoints are loaded: ``wav2vec2_model(**ckpt["config"]).load_state_dict(ckpt["state_dict"])``.

    Raises:
        TypeError: a key is missing or unknown.
        ValueError: a value cannot be (the message names the key).
    """
    check_config(config)
    return wavlm_model(**config) if is_wavlm(config) else hubert_model(**config)


def hubert_model(
    *,
    encoder_num_layers: int,
    encoder_embed_dim: int,
    encoder_num_heads: int | Sequence[int],
    encoder_head_dim: int | None = None,
    **config: Any,
) -> Wav2Vec2Model:
    """Build HuBERT or wav2vec 2.0 from its config, which :func:`wav2vec2_model` has checked.

    Args:
        encoder_num_layers, encoder_embed_dim: as in :func:`_build`.
        encoder_num_heads: heads of each layer; one number means the same in every layer.
        encoder_head_dim: K; default D / heads, where the number of heads is one number.
        config: the other keys, see :func:`_build`.
    """
    if encoder_head_dim is None:
        encoder_head_dim = encoder_embed_dim // encoder_num_heads
    heads = _per_layer(encoder_num_heads, encoder_num_layers)

    def attention(layer: int, holds_table: bool, **options: Any) -> SelfAttention:
        return SelfAttention(encoder_embed_dim, heads[layer], encoder_head_dim, **options)

    return _build(
        attention,
        attention_config={"encoder_head_dim": encoder_head_dim},
        attention_shapes=[{"encoder_num_heads": n} for n in heads],
        encoder_num_layers=encoder_num_layers,
        encoder_embed_dim=encoder_embed_dim,
        **config,
    )


def wavlm_model(
    *,
    encoder_num_layers: int,
    encoder_embed_dim: int,
    encoder_total_num_heads: int | Sequence[int],
    encoder_remaining_heads: Sequence[Sequence[int]],
    encoder_num_buckets: int,
    encoder_max_distance: int,
    **config: Any,
) -> Wav2Vec2Model:
    """Build WavLM from its config, which :func:`wav2vec2_model` has checked.

    Args:
        encoder_num_layers, encoder_embed_dim: as in :func:`_build`.
        encoder_total_num_heads: heads of each layer before pruning; D / heads is the head dimension.
        encoder_remaining_heads: the indices of each layer's remaining heads.
        encoder_num_buckets, encoder_max_distance: of the relative position table.
        config: the other keys, see :func:`_build`.
    """
    total = _per_layer(encoder_total_num_heads, encoder_num_layers)
    remaining = [list(heads) for heads in encoder_remaining_heads]

    def attention(layer: int, **options: Any) -> WavLMSelfAttention:
        return WavLMSelfAttention(
            encoder_embed_dim,
            total[layer],
            remaining[layer],
            num_buckets=encoder_num_buckets,
            max_distance=encoder_max_distance,
            **options,
        )

    return _build(
        attention,
        attention_config={"encoder_num_buckets": encoder_num_buckets, "encoder_max_distance": encoder_max_distance},
        attention_shapes=[
            {"encoder_total_num_heads": n, "encoder_remaining_heads": heads}
            for n, heads in zip(total, remaining, strict=True)
        ],
        encoder_num_layers=encoder_num_layers,
        encoder_embed_dim=encoder_embed_dim,
        **config,
    )


def _per_layer(value: Any, num_layers: int) -> list[Any]:
    """One entry per layer; a single number or bool stands for all layers."""
    return [value] * num_layers if isinstance(value, int) else list(value)


def _build(
    make_attention: Callable[..., SelfAttention],
    attention_config: dict[str, Any],
    attention_shapes: list[dict[str, Any]],
    *,
    extractor_mode: str,
    extractor_conv_layer_config: Sequence[Sequence[int]] | None,
    extractor_conv_bias: bool,
    encoder_embed_dim: int,
    encoder_projection_dropout: float,
    encoder_pos_conv_kernel: int,
    encoder_pos_conv_groups: int,
    encoder_num_layers: int,
    encoder_attention_dropout: float,
    encoder_ff_interm_features: int | Sequence[int],
    encoder_ff_interm_dropout: float,
    encoder_dropout: float,
    encoder_layer_norm_first: bool,
    encoder_layer_drop: float,
    aux_num_out: int | None = None,
    encoder_use_attention: bool | Sequence[bool] = True,
    encoder_use_feed_forward: bool | Sequence[bool] = True,
    normalize_waveform: bool = False,
    extractor_prune_conv_channels: bool = False,
    encoder_prune_attention_heads: bool = False,
    encoder_prune_attention_layer: bool = False,
    encoder_prune_feed_forward_intermediate: bool = False,
    encoder_prune_feed_forward_layer: bool = False,
) -> Wav2Vec2Model:
    """Put the model together; the keyword arguments are the config keys that all families share.

    Args:
        make_attention: called with the layer's number, ``holds_table`` (WavLM: first attention of the
            model), ``dropout``, ``prune_heads`` and ``prune_layer``.
        attention_config: the family's own config keys.
        attention_shapes: the family's own per-layer config entries.
        extractor_mode: "group_norm" (a norm behind the first conv only) or "layer_norm" (behind every conv).
        extractor_conv_layer_config: (channels, kernel, stride) of each conv layer; None means the published ones.
        extractor_conv_bias: whether the conv layers have a bias.
        encoder_embed_dim: D.
        encoder_projection_dropout: behind the feature projection.
        encoder_pos_conv_kernel, encoder_pos_conv_groups: of the positional convolution.
        encoder_num_layers: layers; list-valued keys have one entry per layer.
        encoder_attention_dropout: on the attention weights.
        encoder_ff_interm_features: F of each layer.
        encoder_ff_interm_dropout: behind the feed-forward's GELU.
        encoder_dropout: behind the positional convolution, each attention and each feed-forward.
        encoder_layer_norm_first: pre-norm (Large) or post-norm (Base).
        encoder_layer_drop: probability that ``forward`` skips a layer in training.
        aux_num_out: size of an extra linear output layer.
        encoder_use_attention, encoder_use_feed_forward: which blocks each layer has.
        normalize_waveform: zero mean and unit variance of each input.
        extractor_prune_conv_channels ... encoder_prune_feed_forward_layer: put masks on these units.
    """
    if extractor_conv_layer_config is None:
        extractor_conv_layer_config = CONV_LAYERS
    use_attention = _per_layer(encoder_use_attention, encoder_num_layers)
    use_feed_forward = _per_layer(encoder_use_feed_forward, encoder_num_layers)
    ff_interm_features = _per_layer(encoder_ff_interm_features, encoder_num_layers)
    config = {
        **attention_config,
        "extractor_mode": extractor_mode,
        "extractor_conv_bias": extractor_conv_bias,
        "encoder_embed_dim": encoder_embed_dim,
        "encoder_projection_dropout": encoder_projection_dropout,
        "encoder_pos_conv_kernel": encoder_pos_conv_kernel,
        "encoder_pos_conv_groups": encoder_pos_conv_groups,
        "encoder_num_layers": encoder_num_layers,
        "encoder_attention_dropout": encoder_attention_dropout,
        "encoder_ff_interm_dropout": encoder_ff_interm_dropout,
        "encoder_dropout": encoder_dropout,
        "encoder_layer_norm_first": encoder_layer_norm_first,
        "encoder_layer_drop": encoder_layer_drop,
        "aux_num_out": aux_num_out,
        "normalize_waveform": normalize_waveform,
        "extractor_prune_conv_channels": extractor_prune_conv_channels,
        "encoder_prune_attention_heads": encoder_prune_attention_heads,
        "encoder_prune_attention_layer": encoder_prune_attention_layer,
        "encoder_prune_feed_forward_intermediate": encoder_prune_feed_forward_intermediate,
        "encoder_prune_feed_forward_layer": encoder_prune_feed_forward_layer,
    }

    conv_layers, in_channels = nn.ModuleList(), 1
    for number, (channels, kernel, stride) in enumerate(extractor_conv_layer_config):
        norm = None
        if extractor_mode == "layer_norm":
            norm = LayerNorm(channels)
        elif number == 0:
            norm = nn.GroupNorm(channels, channels)  # one group per channel
        conv_layers.append(
            ConvLayerBlock(
                in_channels, channels, kernel, stride, extractor_conv_bias, norm, extractor_prune_conv_channels
            )
        )
        in_channels = channels

    layers = nn.ModuleList()
    for number in range(encoder_num_layers):
        attention = feed_forward = None
        if use_attention[number]:
            attention = make_attention(
                number,
                holds_table=not any(use_attention[:number]),
                dropout=encoder_attention_dropout,
                prune_heads=encoder_prune_attention_heads,
                prune_layer=encoder_prune_attention_layer,
            )
        if use_feed_forward[number]:
            feed_forward = FeedForward(
                encoder_embed_dim,
                ff_interm_features[number],
                intermediate_dropout=encoder_ff_interm_dropout,
                output_dropout=encoder_dropout,
                prune_intermediate=encoder_prune_feed_forward_intermediate,
                prune_layer=encoder_prune_feed_forward_layer,
            )
        layers.append(
            EncoderLayer(
                attention,
                feed_forward,
                encoder_dropout,
                encoder_layer_norm_first,
                encoder_embed_dim,
                block_shapes={**attention_shapes[number], "encoder_ff_interm_features": ff_interm_features[number]},
            )
        )

    transformer = Transformer(
        ConvolutionalPositionalEmbedding(encoder_embed_dim, encoder_pos_conv_kernel, encoder_pos_conv_groups),
        encoder_dropout,
        layers,
        encoder_layer_norm_first,
        encoder_layer_drop,
        encoder_embed_dim,
    )
    return Wav2Vec2Model(
        normalize_waveform,
        FeatureExtractor(conv_layers),
        Encoder(FeatureProjection(in_channels, encoder_embed_dim, encoder_projection_dropout), transformer),
        None if aux_num_out is None else nn.Linear(encoder_embed_dim, aux_num_out),
        config,
    )


# The published architectures. (layers, D, heads, F)
def _size(num_layers: int, embed_dim: int, num_heads: int, ff_interm_features: int) -> dict[str, Any]:
    return {
        "extractor_conv_layer_config": CONV_LAYERS,
        "extractor_conv_bias": False,
        "encoder_embed_dim": embed_dim,
        "encoder_pos_conv_kernel": 128,
        "encoder_pos_conv_groups": 16,
        "encoder_num_layers": num_layers,
        "encoder_num_heads": num_heads,
        "encoder_ff_interm_features": ff_interm_features,
    }


_BASE = _size(12, 768, 12, 3072)
_LARGE = _size(24, 1024, 16, 4096)
_XLARGE = _size(48, 1280, 16, 5120)
_POST_NORM = {"extractor_mode": "group_norm", "encoder_layer_norm_first": False}
_PRE_NORM = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True, "normalize_waveform": True}


def _wavlm_size(size: dict[str, Any]) -> dict[str, Any]:
    size = dict(size)
    num_heads = size.pop("encoder_num_heads")
    return {
        **size,
        "encoder_total_num_heads": num_heads,
        "encoder_remaining_heads": [list(range(num_heads))] * size["encoder_num_layers"],
        "encoder_num_buckets": 320,
        "encoder_max_distance": 800,
    }


def _named_model(
    name: str,
    description: str,
    size: dict[str, Any],
    *,
    projection_dropout: float,
    attention_dropout: float,
    ff_interm_dropout: float,
    dropout: float,
    layer_drop: float,
) -> Callable[..., Wav2Vec2Model]:
    """A factory with torchaudio's signature and default dropouts for one published architecture."""

    def factory(
        encoder_projection_dropout: float = projection_dropout,
        encoder_attention_dropout: float = attention_dropout,
        encoder_ff_interm_dropout: float = ff_interm_dropout,
        encoder_dropout: float = dropout,
        encoder_layer_drop: float = layer_drop,
        aux_num_out: int | None = None,
        **options: bool,
    ) -> Wav2Vec2Model:
        config = size | {
            "encoder_projection_dropout": encoder_projection_dropout,
            "encoder_attention_dropout": encoder_attention_dropout,
            "encoder_ff_interm_dropout": encoder_ff_interm_dropout,
            "encoder_dropout": encoder_dropout,
            "encoder_layer_drop": encoder_layer_drop,
            "aux_num_out": aux_num_out,
        }
        return wav2vec2_model(**config | options)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = (
        f"{description}\n\n``options``: the pruning switches and ``normalize_waveform`` of :func:`_build`."
    )
    return factory


wav2vec2_base = _named_model(
    "wav2vec2_base",
    "wav2vec 2.0 Base (arXiv 2006.11477): 12 layers of 768.",
    _BASE | _POST_NORM,
    projection_dropout=0.1,
    attention_dropout=0.1,
    ff_interm_dropout=0.1,
    dropout=0.1,
    layer_drop=0.1,
)
wav2vec2_large = _named_model(
    "wav2vec2_large",
    "wav2vec 2.0 Large trained on LibriSpeech: 24 layers of 1024, post-norm.",
    _LARGE | _POST_NORM,
    projection_dropout=0.1,
    attention_dropout=0.1,
    ff_interm_dropout=0.1,
    dropout=0.1,
    layer_drop=0.1,
)
wav2vec2_large_lv60k = _named_model(
    "wav2vec2_large_lv60k",
    "wav2vec 2.0 Large trained on Libri-Light: 24 layers of 1024, pre-norm.",
    _LARGE | _PRE_NORM | {"extractor_conv_bias": True},
    projection_dropout=0.1,
    attention_dropout=0.0,
    ff_interm_dropout=0.1,
    dropout=0.0,
    layer_drop=0.1,
)
hubert_base = _named_model(
    "hubert_base",
    "HuBERT Base (arXiv 2106.07447): 12 layers of 768.",
    _BASE | _POST_NORM,
    projection_dropout=0.1,
    attention_dropout=0.1,
    ff_interm_dropout=0.0,
    dropout=0.1,
    layer_drop=0.05,
)
hubert_large = _named_model(
    "hubert_large",
    "HuBERT Large: 24 layers of 1024, pre-norm.",
    _LARGE | _PRE_NORM,
    projection_dropout=0.0,
    attention_dropout=0.0,
    ff_interm_dropout=0.0,
    dropout=0.0,
    layer_drop=0.0,
)
hubert_xlarge = _named_model(
    "hubert_xlarge",
    "HuBERT XLarge: 48 layers of 1280, pre-norm.",
    _XLARGE | _PRE_NORM,
    projection_dropout=0.0,
    attention_dropout=0.0,
    ff_interm_dropout=0.0,
    dropout=0.0,
    layer_drop=0.0,
)
wavlm_base = _named_model(
    "wavlm_base",
    "WavLM Base and Base+ (arXiv 2110.13900): 12 layers of 768.",
    _wavlm_size(_BASE) | _POST_NORM,
    projection_dropout=0.1,
    attention_dropout=0.1,
    ff_interm_dropout=0.1,
    dropout=0.1,
    layer_drop=0.1,
)
wavlm_large = _named_model(
    "wavlm_large",
    "WavLM Large: 24 layers of 1024, pre-norm.",
    _wavlm_size(_LARGE) | _PRE_NORM,
    projection_dropout=0.1,
    attention_dropout=0.1,
    ff_interm_dropout=0.0,
    dropout=0.1,
    layer_drop=0.1,
)
