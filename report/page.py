"""The report of a run: its tables, and one page with its pictures and settings as well."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from evaluation.cost import cost, counted_on
from evaluation.tables import Table, architecture_tables, cost_table, evaluation_tables, results_of
from report.experiment import Experiment, Stage, read_experiment
from report.pictures import Picture, curves, kept_units, quality
from wav2vec2.config import unit_counts
from wav2vec2.files.errors import single_line
from wav2vec2.files.storage import atomic_path

PAGE = "report.html"
# The largest distance from the wanted sparsity that counts as met.
TOLERANCE = 0.005


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
    times = [model.time for model in experiment.models if model.time]
    if target is None:
        return table._replace(notes=[*times, *table.notes])
    note = f"sparsity {target:.4f} wanted"
    if original and experiment.models:
        reached = 1 - measured[-1]["cost"]["num_params"] / original
        verdict = "met within" if abs(reached - target) <= TOLERANCE else "missed by more than"
        note = f"sparsity {reached:.4f} reached, {target:.4f} wanted: {verdict} {TOLERANCE:.1%}"
    return table._replace(notes=[note, *times, *table.notes])


def progress(stage: Stage) -> str:
    """Say how far a training is."""
    logged = max((update for column in stage.log.values() for update in column), default=0)
    done = logged if stage.num_updates is None else stage.num_updates
    wanted = stage.settings.get("max_updates")
    return f"{done:,} of {wanted:,} updates" if isinstance(wanted, int) else f"{done:,} updates"


def setting_tables(experiment: Experiment, results: Mapping[str, Any]) -> list[Table]:
    """Tabulate the settings of the trainings side by side, and the origin of the models and the evaluation."""

    def words(value: Any) -> str:
        value = value.get("fingerprint", value) if isinstance(value, dict) else value
        return "-" if value is None else single_line(str(value))  # the contents of a profile are long

    stages = experiment.stages
    names = sorted({str(name) for stage in stages for name in stage.settings})
    settings = [[name, *(words(stage.settings.get(name)) for stage in stages)] for name in names]
    origins = {model.name: model.made_by for model in experiment.models} | {"evaluation": results.get("made_by")}
    rows = [
        [name, str(key), words(value)]
        for name, made_by in origins.items()
        for key, value in (made_by.items() if isinstance(made_by, dict) else ())
    ]
    tables = [Table("Settings", ["", *(stage.title for stage in stages)], settings), Table("Made by", [""] * 3, rows)]
    return [table for table in tables if table.rows]


def write_report(exp_dir: Path, evaluated: Path | None = None) -> tuple[Path, list[Table]]:
    """Write ``EXP_DIR/report.html`` on what there is of a run; returns its path and its tables of measurements.

    The same files make the same page. ``evaluated`` is a file of evaluate.py.

    Raises:
        UserError: there is no run in ``exp_dir``, or ``evaluated`` does not hold results of evaluate.py.
        OSError: the page cannot be written.
    """
    results: dict[str, Any] = {}
    evaluation: list[Table] = []
    evaluation_pictures: list[Picture] = []
    if evaluated is not None:
        with results_of(evaluated) as results:
            evaluation, evaluation_pictures = evaluation_tables(results), quality(results)
    experiment = read_experiment(exp_dir)
    sizes = size_table(experiment)
    architecture: list[Table] = []
    kept: list[Picture] = []
    if experiment.original is not None and experiment.models:
        before, after = experiment.original.config, experiment.models[-1].shape.config
        architecture = architecture_tables(before, after)
        old, new = unit_counts(before), unit_counts(after)
        kept = [kept_units(unit, old[unit], new[unit], first_layer=unit != "conv channels") for unit in new]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        # Text from files may hold characters that cannot be seen, or no UTF-8.
        finalize=lambda value: single_line(value, 2000) if type(value) is str else value,
    )
    page = environment.get_template(PAGE).render(
        experiment=experiment,
        sizes=sizes,
        kept=kept,
        architecture=architecture,
        progress=progress,
        curves=curves,
        evaluation=evaluation,
        evaluation_pictures=evaluation_pictures,
        settings=setting_tables(experiment, results),
    )
    out = exp_dir / PAGE
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out, [*([sizes] if sizes else []), *architecture, *evaluation]
