"""The README.md of an exported model: what it is, how to load it, what was measured, where it comes from.

Its text is in card.md, a template as huggingface_hub's own model cards have them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.config import is_wavlm
from wav2vec2.files.errors import UserError, listed
from wav2vec2.files.hub import is_hub_id
from wav2vec2.model import wav2vec2_model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head

# By format, the library that the hub names for it.
FORMATS = {"hub": "dphubert", "onnx": "onnx", "torch_export": None, "huggingface": "transformers"}
# Of this program, see LICENSE.
CODE_LICENCE = "mit"
# What the hub calls them.
_TASKS = {TEXT: "automatic-speech-recognition", CLIPS: "audio-classification"}
_MAKES = {
    TEXT: "text, by CTC with output 0 as the blank",
    CLIPS: "one label for each utterance",
    SEGMENTS: "a label for each frame",
}


@dataclass(frozen=True)
class Card:
    """What is known of a model, whatever the format.

    Attributes:
        config: the model's.
        name: the title.
        macs_per_second: multiply-accumulate operations for a second of audio, within ``macs_seconds``.
        macs_seconds: the length that they were counted for; attention makes them depend on it.
        teacher: the teacher's name; its id on the hub (ORG/NAME) becomes the card's ``base_model``.
        teacher_num_params: gives the sparsity.
        data: what it was trained on.
        licence: of the weights, an identifier that the hub knows; None leaves it to whoever publishes the model.
        teacher_licence, data_licence: of what it was made from.
        evaluation: what was measured, as keywords of huggingface_hub's EvalResult.
        made_by: the entry of the model file that says which script made it, and from what.
        source: name of the model file.
        head: of a model that has one.
    """

    config: Mapping[str, Any]
    name: str = "Speech model"
    macs_per_second: float | None = None
    macs_seconds: float = 10.0
    teacher: str | None = None
    teacher_num_params: int | None = None
    data: str | None = None
    licence: str | None = None
    teacher_licence: str | None = None
    data_licence: str | None = None
    evaluation: Sequence[Mapping[str, Any]] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    head: Head | None = None

    def text(self, format_name: str, measured: Sequence[str] = (), **words: Any) -> str:
        """README.md.

        Args:
            format_name: a key of :data:`FORMATS`.
            measured: lines on how the exported model compares with PyTorch's.
            words: what the format's section of the template leaves open.

        Raises:
            UserError: huggingface_hub is missing.
        """
        try:
            from huggingface_hub import EvalResult, ModelCard, ModelCardData
        except ImportError as error:
            raise UserError(
                "a model card needs huggingface_hub, which is missing: pip install huggingface_hub"
            ) from error
        with torch.device("meta"):
            model = wav2vec2_model(**self.config)
        config = model.config  # one entry for each layer
        heads = map(len, config["encoder_remaining_heads"]) if is_wavlm(config) else config["encoder_num_heads"]
        has_attention, has_feed_forward = config["encoder_use_attention"], config["encoder_use_feed_forward"]
        blocks = zip(heads, has_attention, config["encoder_ff_interm_features"], has_feed_forward, strict=True)
        data = ModelCardData(
            license=self.licence,
            library_name=FORMATS[format_name],
            pipeline_tag=_TASKS.get(self.head and self.head.kind, "feature-extraction"),
            tags=["speech", "audio", "self-supervised", "dphubert", "wavlm" if is_wavlm(config) else "hubert"],
            base_model=self.teacher if self.teacher and is_hub_id(self.teacher) else None,
            model_name=self.name,
            eval_results=[EvalResult(**entry) for entry in self.evaluation] or None,
            code_license=CODE_LICENCE,
            teacher_license=self.teacher_licence,
            data_license=self.data_licence,
        )
        card = ModelCard.from_template(
            data,
            str(Path(__file__).with_name("card.md")),
            card=self,
            config=config,
            head=self.head,
            head_makes=self.head and _MAKES[self.head.kind],
            head_labels=self.head
            and listed("labels", [label.strip() or "space" for label in self.head.labels], most=40),
            num_params=int(model.get_num_params()),
            frames_per_second=SAMPLE_RATE / model.feature_extractor.stride,
            layers=[(heads if attends else 0, width if feeds else 0) for heads, attends, width, feeds in blocks],
            format_name=format_name,
            code_licence=CODE_LICENCE,
            measured=measured,
            torch_version=torch.__version__.partition("+")[0],
            **words,
        )
        return str(card)
