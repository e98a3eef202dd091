"""What the files of a run say: settings, logs, sizes. Nothing here draws or trains."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.checkpoints import (
    BEST_MODEL,
    CHECKPOINTS,
    DISTILLATION,
    FINETUNED_MODEL,
    FINETUNING,
    INTERMEDIATE,
    LAST_CHECKPOINT,
    PRUNED_MODEL,
    read_training_checkpoint,
)
from wav2vec2.files.checkpoint import build_model, read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, with_masks


class _Place(NamedTuple):
    """A training of a run: its title, its kind, its folder below the run's, its model file, and what that is called.

    Of the teacher there is no model: it has the size of the original.
    """

    title: str
    kind: str
    folder: str
    model: str | None
    model_name: str | None


_PRUNED = f"{CHECKPOINTS}/{PRUNED_MODEL}"
_JOINT = _Place("Distillation and pruning", DISTILLATION, "", _PRUNED, "after pruning")
# Where run.sh puts them.
_PLACES = (
    _Place("Fine-tuning of the teacher", FINETUNING, "teacher", None, None),
    _JOINT,
    _Place("Final distillation", DISTILLATION, "final", _PRUNED, "after final distillation"),
    _Place("Fine-tuning", FINETUNING, "finetuned", FINETUNED_MODEL, "after fine-tuning"),
)
# What finetune.py alone leaves.
_FINETUNING_ALONE = _PLACES[-1]._replace(folder="")
# A version for each start of a training.
LOGS = "csv/version_*/metrics.csv"

# A column of a log: its value after each update that has one, by number of updates, ascending.
Column = dict[int, float]


@dataclass(frozen=True)
class Stage:
    """A training of a run.

    Attributes:
        title: for people.
        log: columns of its CSV log, empty without one.
        num_updates: done when its checkpoint was written; None without one.
        about: what the checkpoint says of it.
    """

    title: str
    log: dict[str, Column]
    num_updates: int | None
    about: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The flags that it was trained with."""
        settings = self.about.get("settings")
        return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class Model:
    """A model file of a run.

    Attributes:
        name: what it is called, such as "after pruning".
        path: of the file.
        shape: the model without memory for its weights, on torch's meta device.
        made_by: what the file says of its making.
    """

    name: str
    path: Path
    shape: Wav2Vec2Model
    made_by: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What there is of a run so far.

    Attributes:
        name: of its folder.
        stages: trainings that have left a log or a checkpoint.
        models: that they made, as far as they are there.
        original: the student before pruning, on the meta device; None if no checkpoint says it.
        original_num_params: of the teacher, which sparsity is measured by; None if no checkpoint says it.
        target_sparsity: wanted, 0 to 1; None if no file says it.
        notes: why something that is there could not be read.
    """

    name: str
    stages: list[Stage]
    models: list[Model]
    original: Wav2Vec2Model | None
    original_num_params: int | None
    target_sparsity: float | None
    notes: list[str]


def read_log(path: Path) -> dict[str, Column]:
    """The columns of a CSV log; cells that hold no finite number are passed over.

    Of rows with the same update the last counts: a run that was continued has made that update again.

    Raises:
        UserError: no CSV file.
    """
    columns: dict[str, Column] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                step = _number(row.pop("step", None))
                for name, cell in row.items():
                    value = _number(cell)
                    if name and step is not None and value is not None:
                        # Lightning counts the update that a row belongs to from 0.
                        columns.setdefault(name, {})[int(step) + 1] = value
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file that can be read ({error}); move it away") from error
    return {name: dict(sorted(column.items())) for name, column in columns.items()}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def shape_of(config: dict[str, Any], source: str | Path) -> Wav2Vec2Model:
    """The model of a config without masks, on the meta device.

    Raises:
        UserError: no model can be built from the config.
    """
    with torch.device("meta"):
        return build_model(with_masks(config, ()), source)


def read_experiment(exp_dir: Path) -> Experiment:
    """Read what there is in ``exp_dir`` so far; what cannot be read is left out and named in ``notes``.

    Raises:
        UserError: there is neither a log, nor a checkpoint, nor a model.
    """
    notes: list[str] = []

    def read(path: Path, reader: Callable[[Path], Any]) -> Any:
        """What ``reader`` makes of a file; None if there is none, or if it cannot be read."""
        try:
            return reader(path) if path.is_file() else None
        except (UserError, OSError) as error:
            notes.append(str(error))
            return None

    stages, models = [], []
    is_finetuning = (exp_dir / BEST_MODEL).is_file() or (exp_dir / FINETUNED_MODEL).is_file()
    for place in (_FINETUNING_ALONE,) if is_finetuning else _PLACES:
        logs, last_update = exp_dir / place.folder, math.inf
        path = logs / CHECKPOINTS / LAST_CHECKPOINT
        saved = read(path, lambda path, kind=place.kind: read_training_checkpoint(path, kind)) or {}
        about = saved.get(place.kind, {})
        if about.get(INTERMEDIATE):  # the run's, up to here
            logs, last_update = exp_dir.resolve().parent, saved["global_step"]
        log: dict[str, Column] = {}
        for path in sorted(logs.glob(LOGS), key=lambda path: (len(path.parent.name), path.parent.name)):
            # A run that was continued has made the updates behind its checkpoint again: the later version counts.
            for name, column in (read(path, read_log) or {}).items():
                column = {update: value for update, value in column.items() if update <= last_update}
                log[name] = dict(sorted({**log.get(name, {}), **column}.items()))
        if log or saved:
            stages.append(Stage(place.title, log, saved.get("global_step"), about))
        if place.model is not None:
            path = exp_dir / place.folder / place.model
            model = read(path, lambda path, name=place.model_name: _read_model(name, path))
            models += [] if model is None else [model]
    if not stages and not models:
        found = f"; {notes[0]}" if notes else ""
        raise UserError(
            f"{exp_dir}: holds no run: neither {LOGS}, {CHECKPOINTS}/{LAST_CHECKPOINT} nor "
            f"{CHECKPOINTS}/{PRUNED_MODEL}{found}; give the exp_dir of distill.py, finetune.py or run.sh"
        )
    about = next((stage.about for stage in stages if stage.title == _JOINT.title), {})
    config = about.get("student_config")
    original = None
    if isinstance(config, dict):
        original = read(exp_dir / CHECKPOINTS / LAST_CHECKPOINT, lambda path: shape_of(config, path))
    pruned_for = next((m.made_by.get("target_sparsity") for m in models if m.name == _JOINT.model_name), None)
    return Experiment(
        name=exp_dir.resolve().name,
        stages=stages,
        models=models,
        original=original,
        original_num_params=about.get("original_num_params"),
        target_sparsity=pruned_for if isinstance(pruned_for, float) else about.get("target_sparsity"),
        notes=notes,
    )


def _read_model(name: str, path: Path) -> Model:
    contents = read_model_file(path)
    made_by = contents.get("made_by")
    return Model(name, path, shape_of(contents["config"], path), made_by if isinstance(made_by, dict) else {})
