"""The configuration of the models of modeling_dphubert.py in transformers; a folder of export.py holds this file."""

import math
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PretrainedConfig

from wav2vec2.config import HubertConfig, WavLMConfig

_NETWORK_KEYS = {field.name for family in (HubertConfig, WavLMConfig) for field in fields(family)}


class DPHuBERTConfig(PretrainedConfig):
    """The arguments of ``wav2vec2_model``, each an attribute, and the settings of heads.

    Arguments that transformers' speech models have under another name go by that name too: ``hidden_size``,
    ``layerdrop``, ... ``vocab_size`` is ``aux_num_out``, the outputs of CTC.

    Args:
        use_weighted_layer_sum: classifiers read a learnt weighted sum of all hidden states, else the last.
        classifier_pooling: pooling of whole clips over frames: "mean" or "attentive".
        head: the fields of :class:`~wav2vec2.task_model.Head`; the model's class keeps it true.
        pad_token_id: CTC's blank.
        ctc_loss_reduction, ctc_zero_infinity: as in ``torch.nn.functional.ctc_loss``.
        kwargs: the arguments of ``wav2vec2_model``, and those of transformers' base class.
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
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.classifier_pooling = classifier_pooling
        self.head = head
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id

    def network(self) -> dict[str, Any]:
        """The arguments of ``wav2vec2_model``."""
        return {key: value for key, value in self.__dict__.items() if key in _NETWORK_KEYS}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels of a classifier."""
        return tuple(label for _, label in sorted((self.id2label or {}).items()))

    @property
    def head_layers(self) -> str:
        """The hidden states that a classifier reads, as in :class:`~wav2vec2.task_model.Head`."""
        return "weighted" if self.use_weighted_layer_sum else "last"

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
