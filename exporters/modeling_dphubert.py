"""The models of this package in transformers; travels with those that export.py writes, and needs these two alone.

Each is what transformers' own speech models are to their callers, with the network of this package, as it is, inside.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from wav2vec2.components import WavLMSelfAttention
from wav2vec2.config import check_config
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head, TaskHead, TaskModel

from .configuration_dphubert import DPHuBERTConfig

if TYPE_CHECKING:  # never: save_pretrained copies what a file imports, and the configuration names this one
    from .pipeline_dphubert import SpeechFeaturesPipeline  # noqa: F401

# What the network of another head has not, or has in another form: fresh where it is missing.
_HEADS = ("network.aux.", "network.head.")


class DPHuBERTPreTrainedModel(PreTrainedModel):
    """What all share: the network, how it is loaded, and how waveforms pass through it.

    Attributes:
        kind: of the head, see :class:`~wav2vec2.task_model.Head`, or None without one.
        network: the model as this package has it, with its head.
    """

    config_class = DPHuBERTConfig
    base_model_prefix = "network"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["ConvLayerBlock", "EncoderLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [rf"^{name}" for name in _HEADS]
    kind: str | None = None

    def __init__(self, config: DPHuBERTConfig) -> None:
        super().__init__(config)
        self.network = self._make_network(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _make_network(self, config: DPHuBERTConfig) -> Wav2Vec2Model:
        if self.kind == TEXT and config.vocab_size is None:
            raise ValueError(
                "vocab_size: expected the number of outputs of CTC, found none; give it: from_pretrained(..., "
                "vocab_size=32)"
            )
        network = check_config({**config.network(), "aux_num_out": config.vocab_size if self.kind == TEXT else None})
        if self.kind in (None, TEXT):
            return Wav2Vec2Model(network)
        labels = tuple(config.id2label[number] for number in range(config.num_labels))
        layers = "weighted" if config.use_weighted_layer_sum else "last"
        pooling = config.classifier_pooling if self.kind == CLIPS else None
        return TaskModel(network, Head(self.kind, labels, layers=layers, pooling=pooling))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Self | tuple[Self, dict]:
        """As transformers' own, but strict: only a head may be missing, or left over.

        Raises:
            ValueError: another weight is.
        """
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys"):
            names = sorted(name for name in report[problem] if not name.startswith(_HEADS))
            if names:
                raise ValueError(
                    f"{args[0] if args else cls.__name__}: weights do not fit the model: {len(names)} "
                    f"{problem.replace('_', ' ')} ({', '.join(names[:8])})"
                )
        # What transformers takes from no file, it leaves without a value, and what it does, it trains.
        for module in model.modules():
            if isinstance(module, WavLMSelfAttention):
                device = module.head_index.device
                module.head_index = torch.tensor(module.remaining_heads, dtype=torch.long, device=device)
        model.network.feature_extractor.dummy_weight.requires_grad_(False)
        return (model, report) if output_loading_info else model

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """Names stay; transformers 4 would rename those of weight norm."""
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
        """Frames of so many samples (an int or an integer tensor)."""
        return self.network.feature_extractor.num_frames(input_lengths)

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        """Which frames are valid, (B, frames), of a mask over samples (B, T)."""
        frames = self._get_feat_extract_output_lengths(attention_mask.long().sum(-1))
        return torch.arange(feature_vector_length, device=attention_mask.device) < frames[:, None]

    def _encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool | None,
        all_states: bool,
    ) -> tuple[list[Tensor] | None, Tensor, Tensor | None]:
        """All hidden states if they are wanted, what the encoder gives in the end, and (B,) valid frames or None."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: expected False, as attention weights are not kept, found True")
        network = self.network
        network.recompute_activations(self.gradient_checkpointing and self.training)
        lengths = None if attention_mask is None else attention_mask.long().sum(-1)
        features, frames, padded_frames = network.extract_frames(input_values.to(self.dtype), lengths)
        if not all_states:
            return None, network.encoder(features, padded_frames), frames
        states = network.encoder.extract_features(features, padded_frames)
        return states, network.encoder.transformer.finished(states[-1]), frames

    def _wants(self, name: str, value: bool | None) -> bool:
        """An option of forward, which the config has the default of."""
        return bool(getattr(self.config, name) if value is None else value)


class DPHuBERTModel(DPHuBERTPreTrainedModel):
    """The encoder alone."""

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Hidden states of waveforms.

        Args:
            input_values: (B, T) samples at 16 kHz, normalised or not: where the network wants them to be, it does so.
            attention_mask: (B, T), 1 for samples and 0 for what is padded behind them; None if nothing is.
            output_hidden_states: give all. Layer drop does not act then.
            output_attentions: not to be had.
            return_dict: False for a tuple.

        Returns:
            ``last_hidden_state`` (B, frames, D), and ``hidden_states``: the projected extractor output, then the
            output of every layer.
        """
        all_states = self._wants("output_hidden_states", output_hidden_states)
        states, output, _ = self._encode(input_values, attention_mask, output_attentions, all_states)
        result = BaseModelOutput(last_hidden_state=output, hidden_states=tuple(states) if all_states else None)
        return result if self._wants("return_dict", return_dict) else result.to_tuple()


class _ModelWithHead(DPHuBERTPreTrainedModel):
    """A model whose forward gives logits, and the loss of labels."""

    output_class: type = SequenceClassifierOutput

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Logits of waveforms; arguments as of :class:`DPHuBERTModel`, and the labels of :meth:`_loss`."""
        all_states = self._wants("output_hidden_states", output_hidden_states)
        is_weighted = self.kind != TEXT and self.config.use_weighted_layer_sum
        states, output, frames = self._encode(
            input_values, attention_mask, output_attentions, all_states or is_weighted
        )
        logits = self._logits(states, output, frames)
        loss = None
        if labels is not None:
            if frames is None:
                frames = torch.full((len(logits),), output.size(1), device=logits.device)
            loss = self._loss(logits, labels, frames)
        result = self.output_class(loss=loss, logits=logits, hidden_states=tuple(states) if all_states else None)
        return result if self._wants("return_dict", return_dict) else result.to_tuple()

    def _logits(self, states: list[Tensor] | None, output: Tensor, frames: Tensor | None) -> Tensor:
        return self.network.logits(states, output, frames)

    def _loss(self, logits: Tensor, labels: Tensor, frames: Tensor) -> Tensor:
        """Cross entropy of classes, (B,) or one for each frame (B, frames); -100 is left out."""
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


class DPHuBERTForAudioClassification(_ModelWithHead):
    """One label for each waveform: logits (B, classes)."""

    kind = CLIPS


class DPHuBERTForAudioFrameClassification(_ModelWithHead):
    """A label for each frame: logits (B, frames, classes)."""

    kind = SEGMENTS
    output_class = TokenClassifierOutput


class DPHuBERTForCTC(_ModelWithHead):
    """Units of text by CTC, whose output 0 is the blank: logits (B, frames, outputs)."""

    kind = TEXT
    output_class = CausalLMOutput

    def _logits(self, states: list[Tensor] | None, output: Tensor, frames: Tensor | None) -> Tensor:
        return self.network.aux(output)

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
