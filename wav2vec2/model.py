"""The model, and the factories that build it from a config.

``wav2vec2_model(**config)`` builds HuBERT, wav2vec 2.0 and WavLM in any size, pruned or not;
:attr:`Wav2Vec2Model.config` returns the config. Architecture, module and parameter names are
torchaudio's (``torchaudio.models.wav2vec2``), extended with per-layer shapes and masks.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .components import NORMALIZATION_EPS, Encoder, FeatureExtractor, SelfAttention
from .config import CONV_LAYERS, PRUNING_UNITS, ModelConfig, check_config, wavlm_attention, with_masks
from .fast import fast_paths, on_cpu
from .operations import Count, Operation, macs_of
from .pruning_utils import prune_inputs

__all__ = ["CONV_LAYERS", "PRUNING_UNITS", "Wav2Vec2Model", "masked_units", "wav2vec2_model", "with_masks"]


def masked_units(keys: Iterable[str]) -> list[str]:
    """Return the units (keys of ``PRUNING_UNITS``) that have masks in a state dict with these keys."""
    generic = {re.sub(r"\.\d+\.", ".{}.", key) for key in keys}
    return [name for name, unit in PRUNING_UNITS.items() if any(f"{unit.mask_name}." in key for key in generic)]


def normalize_waveforms(waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Normalise rows (B, T) to zero mean and unit variance over their (B,) valid samples; padding becomes zero."""
    if lengths is None:
        return nn.functional.layer_norm(waveforms, waveforms.shape[-1:], eps=NORMALIZATION_EPS)
    valid = torch.arange(waveforms.size(1), device=waveforms.device) < lengths[:, None]  # (B, T)
    num_valid = lengths[:, None].clamp(min=1)  # an empty row has nothing to normalise, and must not become NaN
    x = waveforms.to(torch.promote_types(waveforms.dtype, torch.float32))  # half precision has no room for the sums
    centred = (x - (x * valid).sum(1, keepdim=True) / num_valid) * valid
    variance = centred.square().sum(1, keepdim=True) / num_valid
    return (centred * torch.rsqrt(variance + NORMALIZATION_EPS)).to(waveforms.dtype)


class Wav2Vec2Model(nn.Module):
    """HuBERT, wav2vec 2.0 or WavLM: an extractor from waveforms to frames, an encoder from frames to hidden states.

    ``aux`` is an optional linear layer on the last hidden state.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.normalize_waveform = config.normalize_waveform
        self.feature_extractor = FeatureExtractor(config)
        self.encoder = Encoder(config)
        self.aux = None if config.aux_num_out is None else nn.Linear(config.encoder_embed_dim, config.aux_num_out)
        self._config = config

    def extract_features(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        num_layers: int | None = None,
        *,
        kept: Collection[int] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return hidden states for distillation and downstream tasks; layer drop does not act here.

        Args:
            waveforms: (B, T) samples at 16 kHz.
            lengths: (B,) valid samples of each, or None if none is padded.
            num_layers: stop after this many layers (default: all).
            kept: layers, from 1, to return (default: all); an empty tensor replaces each of the others, to save memory.

        Returns:
            A list of num_layers + 1 tensors (B, frames, D): the projected extractor output (before the
            positional convolution), then the output of every layer; and (B,) valid frames or None.

        Raises:
            ValueError: waveforms are not two-dimensional, or there are not ``num_layers`` layers.
        """
        features, lengths, padded_lengths = self.extract_frames(waveforms, lengths)
        return self.encoder.extract_features(features, padded_lengths, num_layers, kept), lengths

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the last hidden state (B, frames, D), or (B, frames, aux_num_out) with ``aux``; and (B,) valid frames.

        Arguments and errors as in :meth:`extract_features`. Layer drop acts in training, and pre-norm
        models apply their final LayerNorm.
        """
        features, lengths, padded_lengths = self.extract_frames(waveforms, lengths)
        return self.apply_aux(self.encoder(features, padded_lengths)), lengths

    def apply_aux(self, x: Tensor) -> Tensor:
        """(B, frames, D) -> (B, frames, aux_num_out) with ``aux``; without it, ``x`` as it is"""
        return x if self.aux is None else self.aux(x)

    def extract_frames(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the extractor's frames, (B,) valid frames, and the latter again if padding must be masked, else None.

        Lengths on an accelerator are not read, because that would wait for it. If a batch has no padding, pass None.
        """
        can_look = lengths is not None and fast_paths() and on_cpu(lengths)
        is_padded = lengths is not None and not (can_look and bool((lengths == waveforms.size(-1)).all()))
        if self.normalize_waveform and self.feature_extractor.chunk_frames is None:
            waveforms = normalize_waveforms(waveforms, lengths)
        features, frames = self.feature_extractor(waveforms, lengths)
        return features, frames, frames if is_padded else None

    def get_num_params(self) -> Count:
        """Return the expected parameters (paper, section 2.3): a differentiable scalar with masks, else exact.

        ``aux`` is not counted: it belongs to a downstream task and is never pruned.
        """
        embed_dim = self.encoder.expected_embed_dim()
        num_params, channels = self.feature_extractor.get_num_params()
        num_params = num_params + self.encoder.feature_projection.get_num_params(channels, embed_dim)
        return num_params + self.encoder.transformer.get_num_params(embed_dim)

    def operations(self, num_samples: int, num_layers: int | None = None) -> list[Operation]:
        """Return what ``extract_features`` does with one waveform of ``num_samples`` at 16 kHz, with expected sizes.

        ``num_layers`` counts the first layers of the transformer only.
        """
        embed_dim, num_frames = self.encoder.expected_embed_dim(), self.feature_extractor.num_frames(num_samples)
        operations = self.feature_extractor.operations(num_samples)
        channels, transformer = operations[-1].sizes[1], self.encoder.transformer
        operations.append(self.encoder.feature_projection.operation(channels, embed_dim, num_frames))
        operations.append(transformer.pos_conv_embed.operation(embed_dim, num_frames))
        for layer in transformer.layers[:num_layers]:
            operations += layer.operations(embed_dim, num_frames)
        return [*operations, Operation(self, "rest", (1, embed_dim), {"frames": num_frames})]

    def get_num_macs(self, num_samples: int) -> Count:
        """Return the expected multiply-adds of ``extract_features``: a differentiable scalar with masks, else exact.

        Convolutions and matrix products are counted, including those of attention, which grow with the square of
        ``num_samples`` (at 16 kHz); :mod:`wav2vec2.flops` has them by part.
        """
        return macs_of(self.operations(num_samples))

    def recompute_activations(self, enabled: bool = True) -> None:
        """In training, keep only the input of each conv and encoder layer, and run it again in the backward pass.

        This takes much less memory and about a third more work; losses and gradients stay the same to the last bit.
        """
        self.feature_extractor.recompute = enabled
        self.encoder.transformer.recompute = enabled

    def set_dropout(self, probability: float) -> None:
        """Set every dropout but the layer drop; :attr:`config` stays as it is."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            elif isinstance(module, SelfAttention):
                module.dropout = probability

    def fold_weight_norm(self) -> None:
        """Freeze the positional convolution's weight and compute it once instead of in every forward pass.

        Outputs and ``state_dict()`` stay the same to the last bit. Loading other weights undoes it, and so does
        ``requires_grad_()``, to train the model again.
        """
        self.encoder.transformer.pos_conv_embed.conv.fold()

    @torch.no_grad()
    def prune(self) -> dict[str, Any]:
        """Make the model physically smaller, in place, and put it in eval mode.

        Units with a zero mask are removed, the soft masks of the others move into the weights that
        consume them, and all masks go.

        Returns:
            The config of the pruned model: ``wav2vec2_model(**config)`` loads its ``state_dict()`` strictly.
        """
        self.eval()  # the deterministic masks
        kept_dims = self.encoder.kept_dims()
        self.encoder.prune(self.feature_extractor.prune())
        if kept_dims is not None:
            for layer in self._output_layers():
                prune_inputs(layer, kept_dims)
        sizes: dict[str, Any] = {unit.switch: False for unit in PRUNING_UNITS.values()}
        self._config = replace(self._config, encoder_embed_dim=self.encoder.embed_dim, **sizes)
        return self.config

    def _output_layers(self) -> list[nn.Linear]:
        """Return the layers that read hidden states."""
        return [] if self.aux is None else [self.aux]

    @property
    def config(self) -> dict[str, Any]:
        """The config that builds this model: that of its construction, with its present shapes."""
        layers = [layer.shape for layer in self.encoder.transformer.layers]
        return {
            **self._config.to_dict(),
            "extractor_conv_layer_config": [list(layer.shape) for layer in self.feature_extractor.conv_layers],
            "encoder_pos_conv_kernel": self.encoder.transformer.pos_conv_embed.conv.kernel_size,
            **{key: [shape[key] for shape in layers] for key in layers[0]},
        }


def wav2vec2_model(**config: Any) -> Wav2Vec2Model:
    """Build the model of a config: WavLM if it has ``encoder_remaining_heads``, else HuBERT / wav2vec 2.0.

    The keys are the fields of :class:`~wav2vec2.config.WavLMConfig` or :class:`~wav2vec2.config.HubertConfig`.
    Published checkpoints load with ``wav2vec2_model(**ckpt["config"]).load_state_dict(ckpt["state_dict"])``.

    Raises:
        TypeError: a key is missing or unknown.
        ValueError: a value is impossible (the message names the key).
    """
    return Wav2Vec2Model(check_config(config))


# --- The published architectures


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
_BIAS = {"extractor_conv_bias": True}


def _wavlm_size(size: dict[str, Any]) -> dict[str, Any]:
    size = dict(size)
    return wavlm_attention(size["encoder_num_layers"], size.pop("encoder_num_heads"), 320, 800) | size


def _named_model(name: str, about: str, size: dict[str, Any], *dropouts: float) -> Callable[..., Wav2Vec2Model]:
    """Make a factory with torchaudio's signature for one published architecture; ``dropouts`` are its defaults."""
    projection_dropout, attention_dropout, ff_interm_dropout, dropout, layer_drop = dropouts

    def factory(
        encoder_projection_dropout: float = projection_dropout,
        encoder_attention_dropout: float = attention_dropout,
        encoder_ff_interm_dropout: float = ff_interm_dropout,
        encoder_dropout: float = dropout,
        encoder_layer_drop: float = layer_drop,
        aux_num_out: int | None = None,
        **options: bool,
    ) -> Wav2Vec2Model:
        return wav2vec2_model(
            encoder_projection_dropout=encoder_projection_dropout,
            encoder_attention_dropout=encoder_attention_dropout,
            encoder_ff_interm_dropout=encoder_ff_interm_dropout,
            encoder_dropout=encoder_dropout,
            encoder_layer_drop=encoder_layer_drop,
            aux_num_out=aux_num_out,
            **size | options,
        )

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"{about}\n\n``options``: other keys of the config, such as the switches of masks."
    return factory


wav2vec2_base = _named_model(
    "wav2vec2_base", "wav2vec 2.0 Base (arXiv 2006.11477).", _BASE | _POST_NORM, 0.1, 0.1, 0.1, 0.1, 0.1
)
wav2vec2_large = _named_model(
    "wav2vec2_large", "wav2vec 2.0 Large of LibriSpeech.", _LARGE | _POST_NORM, 0.1, 0.1, 0.1, 0.1, 0.1
)
wav2vec2_large_lv60k = _named_model(
    "wav2vec2_large_lv60k", "wav2vec 2.0 Large of Libri-Light.", _LARGE | _PRE_NORM | _BIAS, 0.1, 0.0, 0.1, 0.0, 0.1
)
hubert_base = _named_model(
    "hubert_base", "HuBERT Base (arXiv 2106.07447).", _BASE | _POST_NORM, 0.1, 0.1, 0.0, 0.1, 0.05
)
hubert_large = _named_model("hubert_large", "HuBERT Large.", _LARGE | _PRE_NORM, 0.0, 0.0, 0.0, 0.0, 0.0)
hubert_xlarge = _named_model("hubert_xlarge", "HuBERT XLarge.", _XLARGE | _PRE_NORM, 0.0, 0.0, 0.0, 0.0, 0.0)
wavlm_base = _named_model(
    "wavlm_base", "WavLM Base, Base+ (arXiv 2110.13900).", _wavlm_size(_BASE) | _POST_NORM, 0.1, 0.1, 0.1, 0.1, 0.1
)
wavlm_large = _named_model("wavlm_large", "WavLM Large.", _wavlm_size(_LARGE) | _PRE_NORM, 0.1, 0.1, 0.0, 0.1, 0.1)
