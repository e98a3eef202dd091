"""Reads the files of a run: settings, logs, sizes. Nothing here draws or trains."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
from wav2vec2.config import unit_counts
from wav2vec2.files.checkpoint import build_model, read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, with_masks


class _Place(NamedTuple):
    """A training where run.sh puts it."""

    title: str
    kind: str
    folder: str
    model: str | None  # its file; that of the teacher's training is as large as the original, and not shown
    model_name: str


_PRUNED = f"{CHECKPOINTS}/{PRUNED_MODEL}"
_JOINT = _Place("Distillation and pruning", DISTILLATION, "", _PRUNED, "after pruning")
_FINETUNING = _Place("Fine-tuning", FINETUNING, "finetuned", FINETUNED_MODEL, "after fine-tuning")
_PLACES = (
    _Place("Fine-tuning of the teacher", FINETUNING, "teacher", None, ""),
    _JOINT,
    _Place("Final distillation", DISTILLATION, "final", _PRUNED, "after final distillation"),
    _FINETUNING,
)
# Each start of a training has a version.
LOGS = "csv/version_*/metrics.csv"

# A column of a log: its value after each update that has one, by number of updates, ascending.
Column = dict[int, float]
T = TypeVar("T")


class Stage(NamedTuple):
    """A training of a run, as far as it has left these."""

    title: str
    log: dict[str, Column]
    num_updates: int | None
    about: dict[str, Any]  # the record in its checkpoint

    @property
    def settings(self) -> dict[str, Any]:
        """The flags that it was trained with."""
        settings = self.about.get("settings")
        return settings if isinstance(settings, dict) else {}


class Model(NamedTuple):
    """A model file of a run, named such as "after pruning"."""

    name: str
    path: Path
    shape: Wav2Vec2Model  # on torch's meta device
    made_by: dict[str, Any]
    time: str | None  # what prune.py found of it, for a target in time


@dataclass
class Experiment:
    """The files of a run so far; None is what no file says."""

    name: str
    stages: list[Stage] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    original: Wav2Vec2Model | None = None  # the student before pruning, on the meta device
    original_num_params: int | None = None  # the teacher's, which sparsity is relative to
    target_sparsity: float | None = None
    notes: list[str] = field(default_factory=list)  # why something could not be read

    def read(self, path: Path, reader: Callable[[Path], T]) -> T | None:
        """Return what ``reader`` makes of a file; None if there is none, or, with a note, if it cannot be read."""
        try:
            return reader(path) if path.is_file() else None
        except (UserError, OSError) as error:
            self.notes.append(str(error))
            return None

    def read_stage(self, place: _Place, folder: Path) -> None:
        """Add a training, if it has left a log or a checkpoint."""
        path = folder / CHECKPOINTS / LAST_CHECKPOINT
        saved = self.read(path, partial(read_training_checkpoint, kind=place.kind)) or {}
        about, last_update = saved.get(place.kind, {}), math.inf
        if about.get(INTERMEDIATE):  # the log is that of the whole run, one folder up
            folder, last_update = folder.resolve().parent, saved["global_step"]
        log: dict[str, Column] = {}
        # A run that was continued has made the updates after its checkpoint again: the later version counts.
        for path in sorted(folder.glob(LOGS), key=lambda path: (len(path.parent.name), path.parent.name)):
            for name, column in (self.read(path, read_log) or {}).items():
                column = {update: value for update, value in column.items() if update <= last_update}
                log[name] = dict(sorted({**log.get(name, {}), **column}.items()))
        if log or saved:
            self.stages.append(Stage(place.title, log, saved.get("global_step"), about))


def read_log(path: Path) -> dict[str, Column]:
    """Read the columns of a CSV log, without cells that hold no finite number.

    The last of several rows with the same update counts: a run that was continued has made that update again.

    Raises:
        UserError: the file is no CSV.
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
    """Build the model of a config without masks, on the meta device.

    Raises:
        UserError: no model can be built from the config.
    """
    with torch.device("meta"):
        return build_model(with_masks(config, ()), source)


def _num_layers(model: Wav2Vec2Model) -> list[int]:
    return [len(counts) for counts in unit_counts(model.config).values()]


def _read_model(path: Path, name: str) -> Model:
    contents = read_model_file(path)
    made_by, time = contents.get("made_by"), contents.get("time")
    shape = shape_of(contents["config"], path)
    return Model(name, path, shape, made_by if isinstance(made_by, dict) else {}, time if type(time) is str else None)


def read_experiment(exp_dir: Path) -> Experiment:
    """Read what there is in ``exp_dir`` so far; ``notes`` name the files that cannot be read.

    Raises:
        UserError: there is neither a log, nor a checkpoint, nor a model.
    """
    found = Experiment(exp_dir.resolve().name)
    is_finetuning = (exp_dir / BEST_MODEL).is_file() or (exp_dir / FINETUNED_MODEL).is_file()
    for place in (_FINETUNING._replace(folder=""),) if is_finetuning else _PLACES:
        folder = exp_dir / place.folder
        found.read_stage(place, folder)
        if place.model and (model := found.read(folder / place.model, partial(_read_model, name=place.model_name))):
            found.models.append(model)
    if not found.stages and not found.models:
        reason = f"; {found.notes[0]}" if found.notes else ""
        raise UserError(
            f"{exp_dir}: holds no run: neither {LOGS}, {CHECKPOINTS}/{LAST_CHECKPOINT} nor "
            f"{CHECKPOINTS}/{PRUNED_MODEL}{reason}; give the exp_dir of distill.py, finetune.py or run.sh"
        )
    about = next((stage.about for stage in found.stages if stage.title == _JOINT.title), {})
    if isinstance(config := about.get("student_config"), dict):
        found.original = found.read(exp_dir / CHECKPOINTS / LAST_CHECKPOINT, partial(shape_of, config))
    for model in found.models:
        if found.original and _num_layers(model.shape) != _num_layers(found.original):
            found.notes.append(f"{model.path}: not of the run's student, which has other layers")
            found.original = None
    num_params = about.get("original_num_params")
    found.original_num_params = num_params if type(num_params) is int and num_params > 0 else None
    pruned_for = next((m.made_by.get("target_sparsity") for m in found.models if m.name == _JOINT.model_name), None)
    wanted = (pruned_for, about.get("target_sparsity"))
    found.target_sparsity = next((value for value in wanted if isinstance(value, float)), None)
    return found
