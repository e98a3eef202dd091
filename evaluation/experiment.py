"""What the files of an experiment say: settings, logs, sizes. Nothing here draws or trains."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.checkpoints import CHECKPOINTS, LAST_CHECKPOINT, PRUNED_MODEL, read_training_checkpoint
from wav2vec2.checkpoint import build_model, read_model_file
from wav2vec2.errors import UserError, single_line
from wav2vec2.model import with_masks

# run.sh puts the final distillation into this folder of the experiment.
FINAL = "final"
LOG = Path("csv") / "version_0" / "metrics.csv"
# More digits than any count of updates has.
_MOST_DIGITS = 15

# A column of a log: value after each update that has one, by number of updates, ascending.
Column = dict[int, float]


@dataclass(frozen=True)
class Stage:
    """A training of an experiment.

    Attributes:
        key: "distill" or "final".
        title: for people.
        log: columns of its CSV log.
        distillation: what its checkpoint says of it; empty without one.
        num_updates: done when the checkpoint was written; None without one.
        versions: of the programs that wrote the checkpoint.
    """

    key: str
    title: str
    log: dict[str, Column]
    distillation: dict[str, Any] = field(default_factory=dict)
    num_updates: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The flags that it was trained with."""
        settings = self.distillation.get("settings")
        return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class Model:
    """A model of an experiment.

    Attributes:
        title: "after pruning" or "after final distillation".
        path: its file.
        config: complete, one entry per layer.
        num_params: exact.
        num_bytes: of the file.
        made_by: what the file says of its making.
    """

    title: str
    path: Path
    config: dict[str, Any]
    num_params: int
    num_bytes: int
    made_by: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What there is of an experiment so far.

    Attributes:
        name: of its folder.
        stages: trainings that have left a log or a checkpoint.
        models: pruned and final, as far as they are there.
        original: the config before pruning; None if no checkpoint says it.
        original_num_params: of the teacher, which sparsity is measured by.
        target_sparsity: wanted, 0 to 1.
        notes: why something that is there could not be read.
    """

    name: str
    stages: list[Stage]
    models: list[Model]
    original: dict[str, Any] | None
    original_num_params: int | None
    target_sparsity: float | None
    notes: list[str]

    @property
    def sparsity(self) -> float | None:
        """Share of the teacher's parameters that is gone after pruning; None before that."""
        if not self.models or not self.original_num_params:
            return None
        return 1 - self.models[0].num_params / self.original_num_params


def as_number(value: Any) -> float | None:
    """A finite number as a float (text that spells one too), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


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
                step = row.get("step") or ""
                if not (step.isdecimal() and len(step) <= _MOST_DIGITS):
                    continue
                for name, cell in row.items():
                    value = as_number(cell)
                    if name and name != "step" and value is not None:
                        # Lightning counts the update that a row belongs to from 0.
                        columns.setdefault(name, {})[int(step) + 1] = value
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file that can be read ({error}); move it away") from error
    return {name: dict(sorted(column.items())) for name, column in columns.items()}


def shape_of(config: dict[str, Any], source: str | Path) -> tuple[dict[str, Any], int]:
    """The complete config of a model without masks, and its exact number of parameters; takes no memory for it.

    Raises:
        UserError: no model can be built from the config.
    """
    with torch.device("meta"):
        model = build_model(with_masks(config, ()), source)
    return model.config, int(model.get_num_params())


def read_experiment(exp_dir: Path, in_memory: Mapping[Path, dict[str, Any]] | None = None) -> Experiment:
    """Read what there is in ``exp_dir`` so far; what cannot be read is left out and named in ``notes``.

    Args:
        exp_dir: of distill.py.
        in_memory: contents of training checkpoints by path, which then are not read from the disk.

    Raises:
        UserError: there is neither a log, nor a checkpoint, nor a model.
    """
    notes: list[str] = []
    trained = {}
    for key, title, folder in (
        ("distill", "distillation and pruning", exp_dir),
        ("final", "final distillation", exp_dir / FINAL),
    ):
        if (stage := _read_stage(key, title, folder, in_memory or {}, notes)) is not None:
            trained[key] = stage
    models = []
    for title, folder in (("after pruning", exp_dir), ("after final distillation", exp_dir / FINAL)):
        path = folder / CHECKPOINTS / PRUNED_MODEL
        if path.is_file():
            try:
                models.append(_read_model(title, path))
            except (UserError, OSError) as error:
                notes.append(str(error))
    if not trained and not models:
        found = f"; {notes[0]}" if notes else ""
        raise UserError(
            f"{exp_dir}: no experiment there: neither {LOG}, {CHECKPOINTS}/{LAST_CHECKPOINT} nor "
            f"{CHECKPOINTS}/{PRUNED_MODEL}{found}; give the --exp_dir of distill.py"
        )
    about = trained["distill"].distillation if "distill" in trained else {}
    original = None
    if isinstance(about.get("student_config"), dict):
        try:
            original, _ = shape_of(about["student_config"], exp_dir / CHECKPOINTS / LAST_CHECKPOINT)
        except UserError as error:
            notes.append(str(error))
    pruned_for = as_number(models[0].made_by.get("target_sparsity")) if models else None
    return Experiment(
        name=exp_dir.resolve().name,
        stages=list(trained.values()),
        models=models,
        original=original,
        original_num_params=about.get("original_num_params"),
        target_sparsity=pruned_for if pruned_for is not None else about.get("target_sparsity"),
        notes=notes,
    )


def _read_stage(
    key: str, title: str, folder: Path, in_memory: Mapping[Path, dict[str, Any]], notes: list[str]
) -> Stage | None:
    log, contents = {}, None
    log_path, path = folder / LOG, folder / CHECKPOINTS / LAST_CHECKPOINT
    try:
        log = read_log(log_path) if log_path.is_file() else {}
    except (UserError, OSError) as error:
        notes.append(str(error))
    try:
        contents = in_memory.get(path)
        if contents is None and path.is_file():
            contents = read_training_checkpoint(path)
    except (UserError, OSError) as error:
        notes.append(str(error))
    if contents is None:
        return Stage(key, title, log) if log else None
    lightning = contents.get("pytorch-lightning_version")
    return Stage(
        key,
        title,
        log,
        distillation=contents.get("distillation", {}),
        num_updates=contents.get("global_step"),
        versions={"pytorch-lightning": single_line(lightning)} if isinstance(lightning, str) else {},
    )


def _read_model(title: str, path: Path) -> Model:
    contents = read_model_file(path)
    config, num_params = shape_of(contents["config"], path)
    made_by = contents.get("made_by")
    return Model(title, path, config, num_params, path.stat().st_size, made_by if isinstance(made_by, dict) else {})
