"""Write the features of many audio files to disk, one .npy file for each.

  python -m examples.extract_features --model exp/hubert-base_sp0.75/final/ckpts/pruned_hubert_base.pth \\
      --audio data/librispeech/valid.tsv --out features/valid --layers 4,8,12 --device cuda
  python -m examples.extract_features --model pruned_hubert_base.pth --audio /corpora/mine --out features/mine

--audio is a manifest of prepare_data.py, a folder that is searched for audio files, or a list of files. An array is
(layers, frames, D), or (frames, D) for one layer, at the path of its audio below the corpus. Existing arrays are
skipped: call the command again after an interruption. Files and folders that cannot be used are named, and the exit
status is 1.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cli
import wav2vec2
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.storage import atomic_path, check_writable, read_json

DTYPES = {"32": "float32", "bf16": "bfloat16", "16": "float16"}
SETTINGS, FAILED = "settings.json", "failed.tsv"


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a .pth file, a folder, or ORG/NAME on the hub")
    parser.add_argument("--audio", required=True, nargs="+", type=Path, help="a manifest, a folder, or files")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--layers", default="all", help="all, output, or numbers such as 6 or 4,8,12 (--layers=-1: last)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="32", help="16 writes float16, others float32")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio to compute at once")
    parser.add_argument("--max_seconds", type=float, default=60.0, help="longer audio is computed in chunks")
    return parser.parse_args()


def parse_layers(text: str) -> int | list[int] | str | None:
    """Return ``--layers`` as :func:`wav2vec2.extract` takes it."""
    if text in ("all", "output"):
        return None if text == "all" else text
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--layers: found {short_repr(text)}, expected all, output, or numbers such as 6 or 4,8,12"
        ) from error
    return numbers if "," in text else numbers[0]


def find_jobs(audio: list[Path], out: Path) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
    """Return the file to write -> the audio file, and the folders that cannot be used, with the reason."""
    root, paths, unreadable = Path(), [path.name for path in audio], []
    places: dict[str, str] = {}
    if len(audio) == 1 and audio[0].is_dir():
        from dataset.corpus import find_audio  # needs numpy, which --help should not wait for

        root = audio[0]
        found = find_audio(str(root))
        paths, places = found.audio, found.places
        unreadable = [(root / path, reason) for path, reason in found.unreadable.items()]
        for folder, reason in unreadable:
            cli.print_line(f"{folder}: {reason}, expected a folder")
    elif len(audio) == 1 and audio[0].suffix == ".tsv":
        from dataset.manifest import read_manifest  # as above

        manifest = read_manifest(audio[0])
        root, paths = manifest.root, [str(path) for path in manifest.paths]
    sources = [root / places.get(path, path) for path in paths] if root.parts else audio
    jobs: dict[Path, Path] = {}
    for path, source in zip(paths, sources, strict=True):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"--audio: {short_repr(path)} lies outside of the corpus, expected a path below {root}")
        target = (out / path).with_suffix(".npy")
        if target in jobs:
            raise UserError(f"--audio: {jobs[target]} and {source} would both become {target}; rename one")
        jobs[target] = source
    if not jobs:
        raise UserError(f"--audio {audio[0]}: holds no file that libsndfile reads, such as .flac; give another folder")
    return jobs, unreadable


def check_settings(args: argparse.Namespace) -> None:
    """Record the settings of the features, so that one folder never holds features of two kinds."""
    path = args.out / SETTINGS
    settings = {name: getattr(args, name) for name in ("model", "layers", "precision", "max_seconds")}
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    elif (before := read_json(path, "settings", "remove the folder")) != settings:
        raise UserError(f"--out {args.out}: holds features made with {before}, not {settings}; give another folder")


def extract_all(args: argparse.Namespace, jobs: dict[Path, Path]) -> Iterator[tuple[Path, str]]:
    """Write the features of all jobs; yields each audio file that cannot be used, with the reason."""
    import numpy as np
    import torch

    check_writable(args.out / FAILED)
    model = wav2vec2.load(args.model, device=args.device, dtype=getattr(torch, DTYPES[args.precision]))
    reasons: dict[int, str] = {}
    results = wav2vec2.extract_iter(
        model,
        jobs.values(),
        layers=parse_layers(args.layers),
        batch_seconds=args.batch_seconds,
        max_seconds=args.max_seconds,
        on_error=lambda number, error: reasons.update({number: str(error)}),
    )
    shown = cli.progress(results, "extracting", total=len(jobs))
    for number, ((out, audio), features) in enumerate(zip(jobs.items(), shown, strict=True)):
        if features is None:
            cli.print_line(reasons[number])
            yield audio, reasons[number]
            continue
        if features.dtype == torch.bfloat16:  # numpy has none
            features = features.float()
        with atomic_path(out) as temporary, temporary.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)


def main(args: argparse.Namespace) -> None:
    parse_layers(args.layers)
    jobs, unreadable = find_jobs(args.audio, args.out)
    check_settings(args)
    missing = {out: audio for out, audio in jobs.items() if not out.exists()}
    failed = list(extract_all(args, missing)) if missing else []
    print(f"{len(missing) - len(failed)} files written, {len(jobs) - len(missing)} were there: {args.out}")
    report = args.out / FAILED
    report.unlink(missing_ok=True)
    failed += unreadable
    if failed:
        with atomic_path(report) as temporary:
            temporary.write_bytes(b"".join(f"{path}\t{why}\n".encode(errors="surrogateescape") for path, why in failed))
        raise UserError(
            f"{len(failed)} of {len(jobs) + len(unreadable)} files could not be used; they are listed in {report}"
        )


if __name__ == "__main__":
    cli.run(main, parse_args())
