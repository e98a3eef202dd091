"""Writes the README.md of an exported model: contents, loading, measurements, origin.

The text is in card.md, a template in the form of huggingface_hub's own model cards. What comes from files goes through
``text`` there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.config import is_wavlm, unit_counts
from wav2vec2.files.errors import UserError, listed, markdown, single_line
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, TaskModel

from .options import FORMATS

CODE_LICENCE = "mit"  # of this program, see LICENSE
# The hub's names of tasks.
_TASKS = {TEXT: "automatic-speech-recognition", CLIPS: "audio-classification"}
_RECOGNISES = {
    TEXT: "text, by CTC with output 0 as the blank",
    CLIPS: "one label for each utterance",
    SEGMENTS: "a label for each frame",
}


def card_text(
    model: Wav2Vec2Model,
    format_name: str,
    metadata: Mapping[str, Any],
    evaluation: Sequence[Mapping[str, Any]] = (),
    **facts: Any,
) -> str:
    """Return the card of a model in one format.

    Args:
        model: without masks.
        format_name: a key of :data:`~.options.FORMATS`.
        metadata: the hub's keys, as :func:`~.options.read_card` reads them.
        evaluation: results of evaluate.py, as keywords of huggingface_hub's EvalResult.
        facts: further variables of the template, which leaves out what it is not told.

    Raises:
        UserError: huggingface_hub is missing.
    """
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ImportError as error:
        raise UserError("a model card needs huggingface_hub, which is missing: pip install huggingface_hub") from error
    config, head = model.config, model.head_settings if isinstance(model, TaskModel) else None
    tags = ["speech", "audio", "self-supervised", "dphubert", "wavlm" if is_wavlm(config) else "hubert"]
    data = {
        "library_name": FORMATS[format_name],
        "pipeline_tag": (head and _TASKS.get(head.kind)) or "feature-extraction",
        "model_name": "Speech model",
        **metadata,
        "tags": tags + _as_list(metadata.get("tags")),
        "eval_results": [EvalResult(**entry) for entry in evaluation] or None,
        "code_license": CODE_LICENCE,
    }
    units = unit_counts(config)
    labels = [label.strip() or "space" for label in head.labels] if head else []
    card = ModelCard.from_template(
        ModelCardData(**data),
        str(Path(__file__).with_name("card.md")),
        text=markdown,
        single_line=single_line,
        title=data["model_name"],
        base_model=_as_list(metadata.get("base_model")),
        datasets=_as_list(metadata.get("datasets")),
        evaluation=evaluation,
        config=config,
        head=head,
        recognises=f"{_RECOGNISES[head.kind]}; {listed('labels', labels, most=40)}" if head else None,
        num_params=int(model.get_num_params()),
        frames_per_second=SAMPLE_RATE / model.feature_extractor.stride,
        layers=list(zip(units["heads"], units["FFN dimensions"], strict=True)),
        format_name=format_name,
        code_licence=CODE_LICENCE,
        **facts,
    )
    return str(card)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []
