"""Train rows of a conf file side by side, each by run.sh, and measure the models: the runs behind docs/results.md.

    python -m benchmarks.rows benchmarks/methods.conf --rows published exact units --sizes 0.75 0.9 --seeds 0 1 \\
        --teacher_ckpt pretrained/small.hf.pth --layers 0.2,4,6 --tsv_dir data/librispeech --out results/small \\
        --probes phones/phone_segments.tsv probes/digits.tsv
    python -m benchmarks.rows benchmarks/tasks.conf --rows compressed finetune_first --sizes 0.9 --seeds 0 1 \\
        --teacher_ckpt pretrained/small.hf.pth --layers 0.2,4,6 --tsv_dir data/librispeech --out results/small-tasks \\
        --labels phones/phone_segments.tsv probes/digits.tsv
    python -m benchmarks.table results/small

A run is OUT/ROW-SIZE-SEED, or OUT/ROW-LIST-SIZE-SEED for each list of --labels. OUT/ROW.json is what evaluate.py finds
with --probes. Call it again to continue where it was stopped (Ctrl-C lets trainings save): what is complete is left
alone. Paths start from the checkout; each process has one CPU thread.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cli
from benchmarks.students import DISTILHUBERT, FITHUBERT, METHODS, student
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path


class Job(NamedTuple):
    name: str
    command: list[str]
    variables: dict[str, str]
    result: Path  # the file that it makes


def layers_of(row: str, layers: str) -> str:
    """Return the layers that a row distils: DistilHuBERT leaves out layer 0, FitHuBERT has a hint at each layer."""
    if row == DISTILHUBERT:
        return layers.removeprefix("0.").removeprefix("0,")
    if row == FITHUBERT:
        return ".".join(map(str, range(1, int(layers.replace(".", ",").split(",")[-1]) + 1)))
    return layers


def training_job(args: argparse.Namespace, row: str, size: str, seed: int, labels: Path | None) -> Job:
    """Return the job that trains one run."""
    exp_dir = args.out / "-".join([row, *([labels.stem] if labels else []), size, str(seed)])
    variables = {"row": row, "size": size, "layers": layers_of(row, args.layers), "labels": labels or ""}
    variables |= {"students": args.out / "students", "exp_dir": exp_dir, "tsv_dir": args.tsv_dir}
    variables |= {"teacher_ckpt": args.teacher_ckpt, "python": sys.executable}
    command = ["bash", "run.sh", str(args.conf), "--seed", str(seed), *shlex.split(args.flags)]
    model = "finetuned/finetuned.pth" if labels else "final/ckpts/pruned_hubert_base.pth"
    return Job(exp_dir.name, command, {name: str(value) for name, value in variables.items()}, exp_dir / model)


def measuring_job(args: argparse.Namespace, row: str, models: Sequence[Job]) -> Job:
    """Return the job that measures the models of a row, beside the teacher."""
    out = args.out / f"{row}.json"
    paths, names = ([model.result for model in models], [model.name for model in models])
    command = [sys.executable, "evaluate.py", "--teacher", args.teacher_ckpt, "--models", *paths, "--names", *names]
    command += ["--tsv", args.tsv_dir / "valid.tsv", "--distill_layers", layers_of(row, args.layers), "--out", out]
    command += ["--probes", *args.probes, *shlex.split("--seeds 0 --max_seconds 40 --speed_seconds 10")]
    return Job(row, [*map(str, command), "--threads", "1", "--device", "cpu"], {}, out)


def run(logs: Path, job: Job) -> str | None:
    """Run a job, keep its output in a log file, and return its name if it failed."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{job.name}.log").open("ab") as log:
        variables = {**os.environ, **job.variables, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(job.command, env=variables, stdout=log, stderr=log).returncode
    print(f"{job.name}: {f'failed with status {status}, see {log.name}' if status else 'done'}", flush=True)
    return job.name if status else None


def main(args: argparse.Namespace) -> None:
    runs = [(size, seed, labels) for seed in args.seeds for size in args.sizes for labels in args.labels or [None]]
    trained = {row: [training_job(args, row, *each) for each in runs] for row in args.rows}
    training = [job for jobs in zip(*trained.values(), strict=True) for job in jobs]  # all rows of a seed first
    if args.dry_run:
        measuring = [measuring_job(args, row, jobs) for row, jobs in trained.items() if args.probes]
        for job in [*training, *measuring]:
            print(shlex.join([*(f"{name}={value}" for name, value in job.variables.items()), *job.command]))
        return
    from wav2vec2.files.checkpoint import read_model_file

    config = read_model_file(args.teacher_ckpt)["config"]
    for row in set(args.rows) & set(METHODS):
        for size in args.sizes:
            with atomic_path(args.out / "students" / f"{row}-{size}.json") as temporary:
                temporary.write_text(json.dumps(student(row, config, float(size))) + "\n", encoding="utf-8")
    waiting = [job for job in training if not job.result.is_file()]
    print(f"{len(training) - len(waiting)} of {len(training)} runs are complete", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = list(filter(None, pool.map(partial(run, args.out / "logs"), waiting)))
    for row in args.rows if args.probes else ():  # one at a time, as they measure time
        models = [job for job in trained[row] if job.result.is_file()]
        job = measuring_job(args, row, models)
        newest = max((model.result.stat().st_mtime for model in models), default=0)
        if models and not (job.result.is_file() and job.result.stat().st_mtime > newest):
            failed += filter(None, [run(args.out / "logs", job)])
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see {args.out / 'logs'}, and call it again")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("conf", type=Path, help="conf file of run.sh, which reads $row, $size, $layers, $labels")
    parser.add_argument("--rows", nargs="+", required=True, help="rows of the conf file")
    parser.add_argument("--sizes", nargs="+", required=True, help="shares of the teacher's parameters to remove")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of training")
    parser.add_argument("--teacher_ckpt", type=Path, required=True, help="model file of the teacher")
    parser.add_argument("--layers", required=True, help="layers to distil, such as 0.2,4, up to the teacher's last")
    parser.add_argument("--tsv_dir", type=Path, required=True, help="directory of the manifests from prepare_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and their results")
    parser.add_argument("--probes", nargs="+", type=Path, help="lists of labelled clips to measure the models with")
    parser.add_argument("--labels", nargs="+", type=Path, help="lists of labelled clips to train with")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--flags", default="", help="flags of all trainings, such as '--accelerator cpu'")
    parser.add_argument("--dry_run", action="store_true", help="show the commands, run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args())
