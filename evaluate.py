"""Measure what models cost and what they know, side by side: tables, and the same as JSON.

  cost       parameters, multiplications, bytes, and time on this machine
  fidelity   L1, cosine and CKA of the distilled layers with the teacher's (with --teacher and --tsv)
  probes     linear classifiers on frozen features, a SUPERB in miniature (with --probes)
  own heads  of fine-tuned models, on the same lists as far as kind and labels are theirs

  python evaluate.py --teacher pretrained/hubert-base-ls960.hf.pth \\
      --models exp/hubert-base/ckpts/pruned_hubert_base.pth exp/hubert-base/final/ckpts/pruned_hubert_base.pth \\
      --names pruned final --tsv data/librispeech/valid.tsv --distill_layers 0.4,8,12 \\
      --probes probes/keywords.tsv --out results/evaluation.json
  python -m report.__main__ exp/hubert-base --evaluation results/evaluation.json     to show it with the run

A probe is a list of labelled audio files, separated by tabs, with the header "split path label" (clips, or a
verification), "split path start end label" (segments) or "split path text" (CTC): see docs/measuring.md. Everything but
the times is the same in every run on the same machine.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

import cli
from evaluation.backends import Subject, exported, parse_backends, read_speech, torch_subject
from evaluation.cost import cost, counted_on, made_by, measure_speed
from evaluation.features import LogMel
from evaluation.fidelity import HeldOutSpeech, make_student, measure_fidelity, shared_min_samples
from evaluation.heads import head_summary, head_tasks
from evaluation.probes import Probed, probe_random_models, run_probe, summary
from evaluation.scores import LOG_MEL, figure_of_merit
from evaluation.tables import evaluation_tables
from labels.lists import UNITS, Probe, read_probe
from labels.scores import METRICS
from report.pictures import layers_alone, quality
from training.settings import parse_distill_layers
from wav2vec2.audio import MAX_SECONDS
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel, model_with_its_head
from wav2vec2.files.storage import atomic_path


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--teacher", type=Path, help="the model that the others are compared with")
    parser.add_argument("--models", type=Path, nargs="+", default=[], metavar="PTH", help="model files")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call --models (default: their file names)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the tables on the terminal only)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    group = parser.add_argument_group("speed")
    group.add_argument("--speed_seconds", type=float, nargs="*", default=[1, 5, 15], help="lengths; none: no timing")
    group.add_argument("--batch", type=int, nargs="+", default=[1], help="utterances per batch")
    group.add_argument(
        "--backends", default="torch", metavar="LIST", help="torch,onnx,onnx-int8: each is timed, and probed, as well"
    )
    group.add_argument("--repetitions", type=int, default=5, help="runs of which the median counts")
    group = parser.add_argument_group("fidelity")
    group.add_argument("--tsv", type=Path, help="manifest of held-out speech, from prepare_data.py")
    group.add_argument("--distill_layers", default="0.4,8,12", help="as in training")
    group.add_argument(
        "--distill_mode", choices=("layer2layer", "predlayer"), help="as in training (default: read from each file)"
    )
    group.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="leave out longer utterances")
    group = parser.add_argument_group("probes")
    group.add_argument("--probes", type=Path, nargs="+", default=[], metavar="TSV", help="lists of labelled clips")
    group.add_argument("--probe_units", choices=UNITS, default=UNITS[0], help="of lists of texts")
    group.add_argument("--layers_alone", action="store_true", help="each layer by itself, too")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each probe per seed")
    group.add_argument("--no_controls", action="store_true", help="no probes of log-mel features and random weights")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be and combinations that measure nothing.

    Raises:
        UserError: there is one.
    """
    if not args.models and not args.teacher:
        raise UserError("--models: nothing to measure; give one or more model files, or --teacher")
    if args.names and len(args.names) != len(args.models):
        raise UserError(f"--names: {len(args.names)} names for {len(args.models)} models; give one each")
    if args.tsv and not (args.teacher and args.models):
        raise UserError("--tsv: fidelity compares --models with a --teacher; give both, or leave --tsv out")
    for option, values, least in (
        ("--speed_seconds", args.speed_seconds, 0.1),  # every published extractor makes frames of that
        ("--batch", args.batch, 1),
        ("--repetitions", [args.repetitions], 1),
        ("--threads", [] if args.threads is None else [args.threads], 1),
        ("--seeds", args.seeds, 0),
    ):
        if bad := [value for value in values if not least <= value < 2**31]:
            raise UserError(f"{option} {bad[0]:g}: expected at least {least:g}")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds: expected every seed once, found {args.seeds}")


def chosen_device(name: str | None) -> torch.device:
    """--device, or the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_subjects(args: argparse.Namespace, device: torch.device) -> list[Subject]:
    """The teacher, if there is one, and the models, in eval mode on the device.

    Raises:
        UserError: a file is no model, or two have one name.
    """
    paths = [*([args.teacher] if args.teacher else []), *args.models]
    # Compressed models all have one file name: their folders tell them apart.
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    if args.names:
        names[len(paths) - len(args.models) :] = args.names
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--names: two models are called {name}; give each its own name")
    models = [model_with_its_head(read_model_file(path), path).eval().to(device) for path in paths]
    return [
        torch_subject(name, path, model, is_teacher=bool(args.teacher) and number == 0)
        for number, (name, path, model) in enumerate(zip(names, paths, models, strict=True))
    ]


def read_probes(paths: list[Path], units: str) -> list[Probe]:
    """The probes, each with a name of its own.

    Raises:
        UserError: see :func:`labels.lists.read_probe`; or two have one name.
    """
    probes = [read_probe(path, units) for path in paths]
    names = [probe.name for probe in probes]
    for probe in probes:
        if names.count(probe.name) > 1:
            raise UserError(f"--probes: two lists are called {probe.name}; rename one of the files")
    return probes


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    device = chosen_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        layers = [layer for group in parse_distill_layers(args.distill_layers) for layer in group]
    except UserError as error:
        raise UserError(f"--distill_layers: {error}") from None

    # All input is read before anything is measured, so that what is wrong with it shows at once.
    probes = read_probes(args.probes, args.probe_units)
    backends = parse_backends(args.backends)
    if len(backends) > 1 and device.type != "cpu":
        raise UserError(f"--backends {args.backends}: ONNX Runtime is timed on the CPU; add --device cpu")
    calibration = read_speech(args.tsv) if args.tsv and "onnx-int8" in backends else []
    subjects = load_subjects(args, device)
    models = [subject.model for subject in subjects]
    tasks = {each.name: head_tasks(each.model, probes) for each in subjects if isinstance(each.model, TaskModel)}
    speech = HeldOutSpeech(args.tsv, args.max_seconds, shared_min_samples(models)) if args.tsv else None
    students = [
        make_student(each.name, each.path, each.model, models[0], layers, args.distill_mode)
        for each in (subjects[1:] if speech else ())
    ]

    compared = measure_fidelity(models[0], students, layers, speech) if speech else []
    fidelity = {student.name: found for student, found in zip(students, compared, strict=True)}
    own = {each.name: head_summary(each.model, tasks[each.name], each.name) for each in subjects if each.name in tasks}
    with tempfile.TemporaryDirectory() as folder:
        for number, subject in enumerate(list(subjects)):
            subjects += exported(subject, backends, Path(folder) / str(number), calibration)
        runs = [subject.run for subject in subjects]
        speeds = measure_speed(runs, args.speed_seconds, args.batch, args.repetitions, device)
        probed = {
            subject.name: {
                probe.name: run_probe(subject.features, probe, args.seeds, args.layers_alone) for probe in probes
            }
            for subject in subjects
        }
    controls: dict[str, dict[str, Probed]] = {}
    if probes and not args.no_controls:
        log_mel, shape = LogMel(), models[0].config
        controls[LOG_MEL] = {probe.name: run_probe(log_mel, probe, args.seeds) for probe in probes}
        controls["random weights"] = {
            probe.name: probe_random_models(shape, probe, args.seeds, device) for probe in probes
        }
    merit, left_out = {}, {}
    if args.teacher and controls:
        scored = {
            name: {probe: each.scored for probe, each in found.items()}
            for name, found in {**probed, LOG_MEL: controls[LOG_MEL]}.items()
        }
        more_is_better = {probe.name: METRICS[probe.kind][1] for probe in probes}
        merit, left_out = figure_of_merit(scored, more_is_better, subjects[0].name, LOG_MEL)
    results = {
        "made_by": {**made_by(device), "seeds": args.seeds},
        "teacher": subjects[0].name if args.teacher else None,
        "models": [
            {
                "name": subject.name,
                "path": os.fspath(subject.path),
                "backend": subject.backend,
                "is_teacher": subject.is_teacher,
                "config": subject.model.config,
                "cost": {**cost(subject.model, subject.num_bytes), "speed": speed},
                "fidelity": {**fidelity[subject.name], "tsv": str(args.tsv)} if subject.name in fidelity else None,
                "probes": {name: found.summary() for name, found in probed[subject.name].items()},
                "head": own.get(subject.name),
                "quality": merit.get(subject.name),
            }
            for subject, speed in zip(subjects, speeds, strict=True)
        ],
        "controls": {
            name: {probe: found.summary() for probe, found in control.items()} for name, control in controls.items()
        },
        "probes": {probe.name: summary(probe) for probe in probes},
        "left_out": left_out,
        "macs_counted_on": counted_on(),
    }
    if args.out:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for number, picture in enumerate([*quality(results), *layers_alone(results)], start=1):
            picture.write(args.out.with_name(f"{args.out.stem}-{number}.svg"))
    for table in evaluation_tables(results):
        print(f"\n{table}")
    if args.out:
        print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
