"""Writes the README.md of an exported model: contents, loading, measurements, origin.

The text is in card.md, a template in the form of huggingface_hub's own model cards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.config import is_wavlm
from wav2vec2.files.errors import UserError, listed
from wav2vec2.model import wav2vec2_model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head

from .options import FORMATS

CODE_LICENCE = "mit"  # of this program, see LICENSE
# The hub's names of tasks.
_TASKS = {TEXT: "automatic-speech-recognition", CLIPS: "audio-classification"}
_RECOGNISES = {
    TEXT: "text, by CTC with output 0 as the blank",
    CLIPS: "one label for each utterance",
    SEGMENTS: "a label for each frame",
}


@dataclass(frozen=True)
class Card:
    """The facts about a model that the cards of all formats state.

    Attributes:
        config: the config of the model.
        name: the title, unless the metadata has a ``model_name``.
        metadata: the hub's keys, as :func:`~.options.read_card` reads them.
        macs_per_second: multiply-accumulate operations for a second of audio, in waveforms of ``macs_seconds``.
        macs_seconds: the length that they were counted for; attention makes them depend on it.
        evaluation: results of evaluate.py, as keywords of huggingface_hub's EvalResult.
        made_by: the entry of the model file that names the script that made it, and its inputs.
        source: the name of the model file.
        head: the settings of the model's task head.
    """

    config: Mapping[str, Any]
    name: str = "Speech model"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    macs_per_second: float | None = None
    macs_seconds: float = 10.0
    evaluation: Sequence[Mapping[str, Any]] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    head: Head | None = None

    def text(self, format_name: str, measured: Sequence[str] = (), **words: Any) -> str:
        """Write README.md.

        Args:
            format_name: a key of :data:`~.options.FORMATS`.
            measured: lines that compare the exported model with PyTorch's.
            words: further variables of the format's section of the template.

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
        config, head = model.config, self.head  # the config has one entry for each layer
        tags = ["speech", "audio", "self-supervised", "dphubert", "wavlm" if is_wavlm(config) else "hubert"]
        metadata = {
            "library_name": FORMATS[format_name],
            "pipeline_tag": (_TASKS.get(head.kind) if head else None) or "feature-extraction",
            "model_name": self.name,
            **self.metadata,
            "tags": [*tags, *_as_list(self.metadata.get("tags"))],
        }
        data = ModelCardData(
            **metadata,
            eval_results=[EvalResult(**entry) for entry in self.evaluation] or None,
            code_license=CODE_LICENCE,
        )
        labels = [label.strip() or "space" for label in head.labels] if head else []
        card = ModelCard.from_template(
            data,
            str(Path(__file__).with_name("card.md")),
            card=self,
            title=metadata["model_name"],
            base_models=_as_list(self.metadata.get("base_model")),
            datasets=_as_list(self.metadata.get("datasets")),
            config=config,
            head=head,
            recognises=f"{_RECOGNISES[head.kind]}; {listed('labels', labels, most=40)}" if head else None,
            num_params=int(model.get_num_params()),
            frames_per_second=SAMPLE_RATE / model.feature_extractor.stride,
            layers=_layers(config),
            format_name=format_name,
            code_licence=CODE_LICENCE,
            measured=measured,
            **words,
        )
        return str(card)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _layers(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the number of heads and the feed-forward width of each layer, 0 where it has no such block."""
    heads = map(len, config["encoder_remaining_heads"]) if is_wavlm(config) else config["encoder_num_heads"]
    has_attention, has_feed_forward = config["encoder_use_attention"], config["encoder_use_feed_forward"]
    blocks = zip(heads, has_attention, config["encoder_ff_interm_features"], has_feed_forward, strict=True)
    return [(heads if attends else 0, width if feeds else 0) for heads, attends, width, feeds in blocks]
