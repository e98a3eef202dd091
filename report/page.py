"""The report of a run: its tables, and one page with its pictures and settings as well."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from evaluation.cost import cost, counted_on
from evaluation.tables import Table, architecture_tables, cost_table, evaluation_tables, unit_counts
from report.experiment import Experiment, Stage, read_experiment
from report.pictures import Picture, curves, kept_units, quality
from wav2vec2.files.errors import single_line
from wav2vec2.files.storage import atomic_path

PAGE = "report.html"
# The largest distance from the wanted sparsity that counts as met.
TOLERANCE = 0.005


@dataclass(frozen=True)
class Report:
    """A run and the tables on it; ``evaluation`` are those of ``results``, which is empty without evaluate.py."""

    experiment: Experiment
    sizes: Table | None
    architecture: list[Table]
    evaluation: list[Table]
    results: dict[str, Any]

    @property
    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [*([self.sizes] if self.sizes else []), *self.architecture, *self.evaluation]


def make_report(exp_dir: Path, results: dict[str, Any] | None = None) -> Report:
    """Read what there is of a run; ``results`` are those of evaluate.py.

    Raises:
        UserError: there is no run in ``exp_dir``, or ``results`` are not those of evaluate.py.
    """
    evaluated = [] if results is None else evaluation_tables(results)
    experiment = read_experiment(exp_dir)
    before, after = configs_of(experiment)
    architecture = architecture_tables(before, after) if before and after else []
    return Report(experiment, size_table(experiment), architecture, evaluated, results or {})


def configs_of(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configs of the original and of the last model; empty ones if either is missing."""
    if experiment.original is None or not experiment.models:
        return {}, {}
    return experiment.original.config, experiment.models[-1].shape.config


def size_table(experiment: Experiment) -> Table | None:
    """Tabulate what the original and the models of the run cost, and whether the sparsity is what was wanted."""
    measured: list[dict[str, Any]] = []
    if experiment.original is not None:
        measured.append({"name": "original", "cost": cost(experiment.original, None)})
    for model in experiment.models:
        measured.append({"name": model.name, "cost": cost(model.shape, model.path.stat().st_size)})
    if not measured:
        return None
    original, target = experiment.original_num_params, experiment.target_sparsity
    table = cost_table(measured, counted_on(), original)._replace(title="Size")
    if target is not None:
        note = f"sparsity {target:.4f} wanted"
        if original and experiment.models:
            reached = 1 - measured[-1]["cost"]["num_params"] / original
            verdict = "met within" if abs(reached - target) <= TOLERANCE else "missed by more than"
            note = f"sparsity {reached:.4f} reached, {target:.4f} wanted: {verdict} {TOLERANCE:.1%}"
        table.notes.insert(0, note)
    return table


def kept_pictures(experiment: Experiment) -> list[Picture]:
    """Draw the kept units of each kind; nothing without the original or a model."""
    before, after = configs_of(experiment)
    if not (before and after):
        return []
    old, new = unit_counts(before), unit_counts(after)
    return [kept_units(unit, old[unit], new[unit], first_layer=unit != "conv channels") for unit in new]


def progress(stage: Stage) -> str:
    """Say how far a training is."""
    logged = max((update for column in stage.log.values() for update in column), default=0)
    done = logged if stage.num_updates is None else stage.num_updates
    wanted = stage.settings.get("max_updates")
    return f"{done:,} of {wanted:,} updates" if isinstance(wanted, int) else f"{done:,} updates"


def setting_tables(report: Report) -> list[Table]:
    """Tabulate the settings of the trainings side by side, and the origin of the models and the evaluation."""

    def words(value: Any) -> str:
        return str(value.get("fingerprint", value)) if isinstance(value, dict) else "-" if value is None else str(value)

    stages, models = report.experiment.stages, report.experiment.models
    names = sorted({str(name) for stage in stages for name in stage.settings})
    settings = [[name, *(words(stage.settings.get(name)) for stage in stages)] for name in names]
    origins = {model.name: model.made_by for model in models} | {"evaluation": report.results.get("made_by")}
    rows = [
        [name, str(key), words(value)]
        for name, made_by in origins.items()
        for key, value in (made_by.items() if isinstance(made_by, dict) else ())
    ]
    tables = [
        Table("Settings", ["", *(stage.title for stage in stages)], settings, []),
        Table("Made by", ["", "", ""], rows, []),
    ]
    return [table for table in tables if table.rows]


def write_page(report: Report, exp_dir: Path) -> Path:
    """Write ``EXP_DIR/report.html``; returns its path. The same files make the same page.

    Raises:
        OSError: the page cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        # Text from files may hold characters that steer a terminal.
        finalize=lambda value: single_line(value, 2000) if type(value) is str else value,
    )
    page = environment.get_template(PAGE).render(
        name=report.experiment.name,
        notes=report.experiment.notes,
        sizes=report.sizes,
        kept=kept_pictures(report.experiment),
        architecture=report.architecture,
        stages=[
            {"title": stage.title, "progress": progress(stage), "curves": curves(stage.log)}
            for stage in report.experiment.stages
        ],
        evaluation=report.evaluation,
        evaluation_pictures=quality(report.results) if report.results else [],
        settings=setting_tables(report),
    )
    out = exp_dir / PAGE
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out
