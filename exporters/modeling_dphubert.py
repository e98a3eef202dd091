"""The models of this package in transformers, and their configuration; a folder of export.py holds this file.

They are called as transformers' own speech models are, and hold the network of this package.
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from wav2vec2.components import WavLMSelfAttention
from wav2vec2.config import HubertConfig, ModelConfig, WavLMConfig, check_config
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head, TaskHead, TaskModel

if TYPE_CHECKING:  # never: save_pretrained copies what a file imports, and the configuration names this one
    from .pipeline_dphubert import SpeechFeaturesPipeline  # noqa: F401

# Weights of heads: a head of another kind or size starts afresh.
_HEADS = ("network.aux.", "network.head.")
_NETWORK_KEYS = {field.name for family in (HubertConfig, WavLMConfig) for field in fields(family)}


class DPHuBERTConfig(PretrainedConfig):
    """The arguments of ``wav2vec2_model``, each an attribute, and the settings of heads.

    Arguments that transformers' speech models have under another name go by that name too: ``hidden_size``,
    ``layerdrop``, ... ``vocab_size`` is ``aux_num_out``, the outputs of CTC.

    Args:
        use_weighted_layer_sum: classifiers read a learnt weighted sum of all hidden states, else the last.
        classifier_pooling: pooling of whole clips over frames: "mean" or "attentive".
        head: the fields of :class:`~wav2vec2.task_model.Head`; the model's class keeps it true.
        pad_token_id, ctc_loss_reduction, ctc_zero_infinity: of CTC; the first is its blank.
    """

    model_type = "dphubert"
    has_no_defaults_at_init = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "encoder_embed_dim",
        "num_hidden_layers": "encoder_num_layers",
        "vocab_size": "aux_num_out",
        "num_conv_pos_embeddings": "encoder_pos_conv_kernel",
        "num_conv_pos_embedding_groups": "encoder_pos_conv_groups",
        "do_stable_layer_norm": "encoder_layer_norm_first",
        "feat_proj_dropout": "encoder_projection_dropout",
        "attention_dropout": "encoder_attention_dropout",
        "activation_dropout": "encoder_ff_interm_dropout",
        "hidden_dropout": "encoder_dropout",
        "layerdrop": "encoder_layer_drop",
        "conv_bias": "extractor_conv_bias",
    }

    def __init__(
        self,
        use_weighted_layer_sum: bool = False,
        classifier_pooling: str = "mean",
        head: dict[str, Any] | None = None,
        pad_token_id: int = 0,
        ctc_loss_reduction: str = "mean",
        ctc_zero_infinity: bool = False,
        **kwargs: Any,
    ) -> None:
        self.use_weighted_layer_sum, self.classifier_pooling, self.head = (
            use_weighted_layer_sum,
            classifier_pooling,
            head,
        )
        self.ctc_loss_reduction, self.ctc_zero_infinity = ctc_loss_reduction, ctc_zero_infinity
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id

    def network(self, num_outputs: int | None) -> ModelConfig:
        """The checked arguments of ``wav2vec2_model``, with so many outputs of CTC from here on."""
        self.vocab_size = num_outputs
        return check_config({key: value for key, value in self.__dict__.items() if key in _NETWORK_KEYS})

    @property
    def conv_dim(self) -> list[int]:
        """Output channels of each conv layer."""
        return [channels for channels, _, _ in self.extractor_conv_layer_config]

    @property
    def conv_kernel(self) -> list[int]:
        """Kernel size of each conv layer."""
        return [kernel for _, kernel, _ in self.extractor_conv_layer_config]

    @property
    def conv_stride(self) -> list[int]:
        """Stride of each conv layer."""
        return [stride for _, _, stride in self.extractor_conv_layer_config]

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Number of samples from one frame to the next."""
        return math.prod(self.conv_stride)


class DPHuBERTPreTrainedModel(PreTrainedModel):
    """The base of all models: it holds the network of this package, loads it, and passes waveforms through it."""

    config_class = DPHuBERTConfig
    base_model_prefix = "network"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # transformers declares these two as attributes of the instance.
    _no_split_modules = ["ConvLayerBlock", "EncoderLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [rf"^{name}" for name in _HEADS]  # noqa: RUF012
    network: Wav2Vec2Model

    def __init__(self, config: DPHuBERTConfig) -> None:
        super().__init__(config)
        self.network = self._make_network(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _make_network(self, config: DPHuBERTConfig) -> Wav2Vec2Model:
        config.head = None
        return Wav2Vec2Model(config.network(None))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers' own does, but strictly: only a head may be missing, or left over.

        Raises:
            ValueError: another weight is.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, report = loaded
        for problem in ("missing_keys", "unexpected_keys"):
            names = sorted(name for name in report[problem] if not name.startswith(_HEADS))
            if names:
                raise ValueError(
                    f"{args[0] if args else cls.__name__}: weights do not fit the model: {len(names)} "
                    f"{problem.replace('_', ' ')} ({', '.join(names[:8])})"
                )
        # transformers leaves a buffer that is in no file without a value, and trains every parameter of a file.
        for module in model.modules():
            if isinstance(module, WavLMSelfAttention):
                device = module.head_index.device
                module.head_index = torch.tensor(module.remaining_heads, dtype=torch.long, device=device)
        model.network.feature_extractor.dummy_weight.requires_grad_(False)
        return (model, report) if output_loading_info else model

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """Keep all names; transformers 4 would rename those of weight norm."""
        return key, False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, TaskHead) and module.layer_scores is not None:
            nn.init.zeros_(module.layer_scores)

    def freeze_feature_encoder(self) -> None:
        """Do not train the convolutional extractor."""
        self.network.feature_extractor.requires_grad_(False)

    def freeze_base_model(self) -> None:
        """Train the head alone."""
        for part in (self.network.feature_extractor, self.network.encoder):
            part.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, input_lengths: Any) -> Any:
        """Number of frames of so many samples (an int or an integer tensor)."""
        return self.network.feature_extractor.num_frames(input_lengths)

    def _encode(
        self, input_values: Tensor, attention_mask: Tensor | None, output_attentions: bool | None, all_states: bool
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Return all hidden states if they are wanted (else none), the encoder's output, and (B,) valid frames."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: expected False, as attention weights are not kept, found True")
        network = self.network
        network.recompute_activations(self.gradient_checkpointing and self.training)
        lengths = None if attention_mask is None else attention_mask.long().sum(-1)
        features, frames, padded_frames = network.extract_frames(input_values.to(self.dtype), lengths)
        if not all_states:
            return [], network.encoder(features, padded_frames), frames
        states = network.encoder.extract_features(features, padded_frames)
        return states, network.encoder.transformer.finished(states[-1]), frames


class DPHuBERTModel(DPHuBERTPreTrainedModel):
    """The encoder alone."""

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Compute hidden states of waveforms.

        Args:
            input_values: (B, T) samples at 16 kHz, normalised or not: the network normalises them if it needs to.
            attention_mask: (B, T), 1 for samples and 0 for padding behind them; None if nothing is padded.
            output_hidden_states: return all of them. Layer drop does not act then.
            output_attentions: not supported.

        Returns:
            ``last_hidden_state`` (B, frames, D), and ``hidden_states``: the projected extractor output, then the
            output of every layer.
        """
        all_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, output, _ = self._encode(input_values, attention_mask, output_attentions, bool(all_states))
        return BaseModelOutput(last_hidden_state=output, hidden_states=tuple(states) if all_states else None)


class _ModelWithHead(DPHuBERTPreTrainedModel):
    """A model whose forward gives logits, and the loss of labels."""

    kind = CLIPS
    output_class: type = SequenceClassifierOutput
    network: TaskModel

    def _make_network(self, config: DPHuBERTConfig) -> TaskModel:
        head = self._make_head(config)
        config.head = head.to_dict()  # as wav2vec2.load reads it from a folder that save_pretrained wrote
        return TaskModel(config.network(head.num_outputs if head.kind == TEXT else None), head)

    def _make_head(self, config: DPHuBERTConfig) -> Head:
        """Make the head of a classifier."""
        labels = tuple(label for _, label in sorted((config.id2label or {}).items()))
        layers = "weighted" if config.use_weighted_layer_sum else "last"
        return Head(self.kind, labels, layers=layers, pooling=config.classifier_pooling if self.kind == CLIPS else None)

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Compute logits of waveforms; arguments as of :class:`DPHuBERTModel`, and the labels of :meth:`_loss`."""
        all_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        needs_states = all_states or self.network.head_settings.layers == "weighted"
        states, output, frames = self._encode(input_values, attention_mask, output_attentions, needs_states)
        logits = self.network.logits(states, output, frames)
        loss = None
        if labels is not None:
            if frames is None:
                frames = torch.full((len(logits),), output.size(1), device=logits.device)
            loss = self._loss(logits, labels, frames)
        return self.output_class(loss=loss, logits=logits, hidden_states=tuple(states) if all_states else None)

    def _loss(self, logits: Tensor, labels: Tensor, frames: Tensor) -> Tensor:
        """Cross entropy of classes, (B,) or one for each frame (B, frames); -100 is left out."""
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


class DPHuBERTForAudioClassification(_ModelWithHead):
    """One label for each waveform: logits (B, classes)."""


class DPHuBERTForAudioFrameClassification(_ModelWithHead):
    """A label for each frame: logits (B, frames, classes)."""

    kind = SEGMENTS
    output_class = TokenClassifierOutput


class DPHuBERTForCTC(_ModelWithHead):
    """Units of text by CTC, whose output 0 is the blank: logits (B, frames, outputs)."""

    output_class = CausalLMOutput

    def _make_head(self, config: DPHuBERTConfig) -> Head:
        """Take the head of the config; with another ``vocab_size`` only the tokenizer knows the units."""
        num_outputs = config.vocab_size
        if num_outputs is None:
            raise ValueError(
                "vocab_size: expected the number of outputs of CTC, found none; give it: from_pretrained(..., "
                "vocab_size=32)"
            )
        if config.head and config.head["kind"] == TEXT and len(config.head["labels"]) == num_outputs - 1:
            return Head(**config.head)
        return Head(TEXT, tuple(str(number) for number in range(1, num_outputs)), units="words")

    def _loss(self, logits: Tensor, labels: Tensor, frames: Tensor) -> Tensor:
        """CTC's loss of units (B, longest text), from 1; negative ones are padding."""
        if labels.max() >= self.config.vocab_size:
            raise ValueError(f"labels: expected less than vocab_size {self.config.vocab_size}, found {labels.max()}")
        is_unit = labels >= 0
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(
                logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1),
                labels[is_unit],
                frames,
                is_unit.sum(-1),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )
