"""The report of a run: sizes, kept units, training curves, settings, and what evaluate.py has measured, on one page.

  python -m report.__main__ exp/hubert-base
  python -m report.__main__ exp/hubert-base --evaluation results/evaluation.json

Writes EXP_DIR/report.html, which needs no other file and no network, from the files of the run, which may still be
going on. It is the last stage of run.sh.
"""

import argparse
from pathlib import Path
from typing import Any

import jinja2

import cli
from evaluation.cost import cost, counted_on
from evaluation.tables import Table, architecture_tables, cost_table, evaluation_tables, read_results, unit_counts
from report.experiment import Experiment, Stage, read_experiment
from report.pictures import Picture, curves, kept_units, layers_alone, quality
from wav2vec2.files.errors import single_line
from wav2vec2.files.storage import atomic_path

PAGE = "report.html"


def size_table(experiment: Experiment) -> Table | None:
    """What the original and the models of the run cost; None without any."""
    rows = [] if experiment.original is None else [("original", experiment.original, None)]
    rows += [(model.name, model.shape, model.path) for model in experiment.models]
    measured = [{"name": name, "cost": cost(shape, path and path.stat().st_size)} for name, shape, path in rows]
    if not measured:
        return None
    target = experiment.target_sparsity
    wanted = "Cost" if target is None else f"Cost, where a sparsity of {target:.2%} was wanted"
    return cost_table(measured, counted_on(), experiment.original_num_params)._replace(title=wanted)


def kept_pictures(before: dict[str, Any], after: dict[str, Any]) -> list[Picture]:
    """One picture per kind of unit."""
    old, new = unit_counts(before), unit_counts(after)
    return [kept_units(unit, old[unit], new[unit], first_layer=unit != "conv channels") for unit in new]


def progress(stage: Stage) -> str:
    """How far a training is."""
    logged = max((update for column in stage.log.values() for update in column), default=0)
    done = logged if stage.num_updates is None else stage.num_updates
    wanted = stage.settings.get("max_updates")
    return f"{done:,} of {wanted:,} updates" if isinstance(wanted, int) else f"{done:,} updates"


def setting_tables(experiment: Experiment, evaluation: dict[str, Any]) -> list[Table]:
    """The settings of the trainings side by side, and where the models and the evaluation come from."""

    def words(value: Any) -> str:
        return str(value.get("fingerprint", value)) if isinstance(value, dict) else "-" if value is None else str(value)

    names = sorted({str(name) for stage in experiment.stages for name in stage.settings})
    settings = [[name, *(words(stage.settings.get(name)) for stage in experiment.stages)] for name in names]
    origins = {model.name: model.made_by for model in experiment.models} | {"evaluation": evaluation.get("made_by")}
    rows = [
        [name, str(key), words(value)]
        for name, made_by in origins.items()
        for key, value in (made_by.items() if isinstance(made_by, dict) else ())
    ]
    tables = [
        Table("Settings", ["", *(stage.title for stage in experiment.stages)], settings, []),
        Table("Made by", ["", "", ""], rows, []),
    ]
    return [table for table in tables if table.rows]


def write_report(exp_dir: Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Write ``EXP_DIR/report.html``; returns its path. The same files make the same page.

    Args:
        exp_dir: of distill.py, finetune.py or run.sh.
        evaluation: the results of evaluate.py.

    Raises:
        UserError: there is no run in ``exp_dir``, or the evaluation is none.
        OSError: the page cannot be written.
    """
    evaluated = [] if evaluation is None else evaluation_tables(evaluation)
    experiment = read_experiment(exp_dir)
    before, after = experiment.original, experiment.models[-1].shape if experiment.models else None
    has_both = before is not None and after is not None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        # What files say may hold what steers a terminal.
        finalize=lambda value: single_line(value, 2000) if type(value) is str else value,
    )
    page = environment.get_template(PAGE).render(
        name=experiment.name,
        notes=experiment.notes,
        sizes=size_table(experiment),
        kept=kept_pictures(before.config, after.config) if has_both else [],
        architecture=architecture_tables(before.config, after.config) if has_both else [],
        stages=[
            {"title": stage.title, "progress": progress(stage), "curves": curves(stage.log)}
            for stage in experiment.stages
        ],
        evaluation=evaluated,
        evaluation_pictures=[] if evaluation is None else [*quality(evaluation), *layers_alone(evaluation)],
        settings=setting_tables(experiment, evaluation or {}),
    )
    out = exp_dir / PAGE
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("exp_dir", type=Path, metavar="EXP_DIR", help="of distill.py, finetune.py or run.sh")
    parser.add_argument("--evaluation", type=Path, metavar="JSON", help="results of evaluate.py, to be shown too")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    print(f"report: {write_report(args.exp_dir, read_results(args.evaluation) if args.evaluation else None)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
