"""List a speech corpus in manifests: NAME.tsv for each split, for ``--tsv_dir`` and ``--train_subset``.

LibriSpeech is recognised by its folders and gives those of train100, train960 and valid that are there:

    python prepare_data.py --data /corpora/LibriSpeech --out data/librispeech

Any other corpus of files that libsndfile reads is split by folder name, or by holding out a fraction:

    python prepare_data.py --data /corpora/mine --out data/mine --splits train=tr,extra-* valid=cv
    python prepare_data.py --data /corpora/mine --out data/mine --valid_fraction 0.05

Files in .tar and in .zip that is not compressed are listed where they lie, as ARCHIVE:OFFSET:BYTES; the archive counts
as a folder. Of several folders, one manifest lists them all, below the folder that they share.
Only folders below --data decide about splits. Links to folders are followed, each folder once; what is hidden is passed
over. Files and folders that cannot be read are left out and listed with the reason in rejected.tsv. Audio and video
that libsndfile does not read, such as .m4a, are passed over and counted.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import cli
from dataset import corpus
from dataset.archives import SUFFIXES as ARCHIVES
from wav2vec2.audio import AUDIO_SUFFIXES, CONVERT, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE
from wav2vec2.files.errors import UserError, listed
from wav2vec2.files.storage import atomic_path, check_writable

LIBRISPEECH_SPLITS = {
    "train100": ["train-clean-100"],
    "train960": ["train-clean-100", "train-clean-360", "train-other-500"],
    "valid": ["dev-clean", "dev-other"],
}
DEFAULT_VALID_FRACTION = 0.05
REJECTED = "rejected"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="folder of the corpus, or several")
    parser.add_argument("--out", default="data/librispeech", help="folder to write the manifests to")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME=FOLDER[,FOLDER...]",
        help="splits by folder: a name or path below --data, * and ? allowed; not needed for LibriSpeech",
    )
    parser.add_argument(
        "--valid_fraction",
        type=float,
        help="fraction of the files for valid.tsv, the rest for train.tsv; "
        f"{DEFAULT_VALID_FRACTION} if --splits is not given and the corpus is not LibriSpeech",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the files that --valid_fraction holds out")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that read files")
    return parser.parse_args(arguments)


def parse_splits(options: list[str]) -> corpus.FolderPatterns:
    """Turn ``["train=a,b", "valid=c"]`` into ``{"train": ["a", "b"], "valid": ["c"]}``."""
    splits: corpus.FolderPatterns = {}
    for option in options:
        name, _, folders = option.partition("=")
        patterns = [folder.strip("/") for folder in folders.split(",") if folder.strip("/")]
        if not re.fullmatch(r"\w[\w.-]*", name) or name == REJECTED or name in splits or not patterns:
            raise UserError(
                f"--splits: found {option!r}, expected NAME=FOLDER[,FOLDER...] with each NAME once, of letters, "
                f"digits and _.-, and not {REJECTED!r}; for example train=tr,extra-* valid=cv"
            )
        splits[name] = patterns
    return splits


def choose_rule(paths: list[str], args: argparse.Namespace) -> Callable[[list[str]], corpus.Splits]:
    """Choose from the options and the corpus how to split, and say so."""
    if args.splits and args.valid_fraction is not None:
        raise UserError("--splits and --valid_fraction are two ways to split; give one of them")
    rule = "by folder"
    splits = parse_splits(args.splits or [])
    if not args.splits and args.valid_fraction is None:
        members = corpus.split_by_folder(paths, LIBRISPEECH_SPLITS)
        absent = ", ".join(name for name in members if not members[name])
        rule = "LibriSpeech's" + (f" (not there: {absent})" if absent else "")
        splits = {name: patterns for name, patterns in LIBRISPEECH_SPLITS.items() if members[name]}
    if splits:
        in_words = "; ".join(f"{name} = {', '.join(patterns)}" for name, patterns in splits.items())
        print(f"splits: {rule}, {in_words}")
        return partial(corpus.split_by_folder, splits=splits)
    fraction = DEFAULT_VALID_FRACTION if args.valid_fraction is None else args.valid_fraction
    if not 0 < fraction < 1:
        raise UserError(f"--valid_fraction {fraction:g}: expected a number between 0 and 1, such as 0.05")
    print(f"splits: {fraction:g} of the files, chosen by --seed {args.seed}, held out as valid")
    return partial(corpus.hold_out, fraction=fraction, seed=args.seed)


def report_found(place: str, found: corpus.Found) -> None:
    """Say what is passed over; a UserError if nothing is left."""
    passed_over = ", ".join(f"{count} {suffix}" for suffix, count in found.others.most_common())
    unreadable = listed(
        "folders, links or archives", [f"{path}: {reason}" for path, reason in found.unreadable.items()]
    )
    if found.others:
        print(f"passed over: {passed_over}, which libsndfile does not read; convert them: {CONVERT}")
    if found.repeated:
        print(f"passed over: {listed('other names of folders', found.repeated)}")
    if found.unreadable:
        print(f"cannot be read: {unreadable}")
    if not found.audio:
        instead = "expected some; give the corpus folder"
        if found.unreadable:
            instead = f"but {unreadable} that cannot be read"
        for store, count in found.stores.most_common(1):
            instead = f"but {count} files of {store}"
        if found.others:
            instead = f"but {passed_over}; convert them: {CONVERT}"
        raise UserError(f"--data {place}: no {', '.join(AUDIO_SUFFIXES[:6])} or the like in it or below, {instead}")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, whole or not at all; names that are not UTF-8 keep their bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def describe(name: str, lengths: list[int]) -> str:
    """Describe a split in one line: utterances, hours, and how much of it training with the default limits uses."""
    kept = [length for length in lengths if MIN_SECONDS * SAMPLE_RATE <= length <= MAX_SECONDS * SAMPLE_RATE]
    hours, kept_hours = (sum(samples) / SAMPLE_RATE / 3600 for samples in (lengths, kept))
    return (
        f"{name}: {len(lengths)} utterances, {hours:.2f} h; "
        f"{len(kept)} ({kept_hours:.2f} h) last {MIN_SECONDS:g} s to {MAX_SECONDS:g} s, the limits of training"
    )


def checked_places(data: list[str]) -> None:
    """Refuse what is neither a folder nor an archive, what lies in another one, and names that break a manifest."""
    paths = [os.path.abspath(place) for place in data]
    for number, (place, path) in enumerate(zip(data, paths, strict=True)):
        if not os.path.isdir(path) and not (os.path.isfile(path) and path.lower().endswith(ARCHIVES)):
            kind = corpus.store_of(path) or "expected a folder or an archive"
            problem = f"is a file, {kind}" if os.path.exists(path) else "no such folder"
            raise UserError(f"--data {place}: {problem}; give the folder of the corpus")
        if "\t" in path or corpus.LINE_BREAK.search(path):
            raise UserError(f"--data {place!r}: a tab or line break in the path breaks the manifest; rename the folder")
        if any(f"{path}/".startswith(f"{other}/") for other in paths[:number] + paths[number + 1 :]):
            raise UserError(f"--data {place}: is given twice, or lies in another one; give each folder once")


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    checked_places(args.data)
    if args.num_workers < 1:
        raise UserError(f"--num_workers {args.num_workers}: expected 1 or more")
    check_writable(out / f"{REJECTED}.tsv")
    root, all_found = corpus.find_audio_of(args.data)
    places: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for name, folder in all_found.items():
        report_found(name, folder)
        places |= folder.places
        unreadable |= folder.unreadable
    found = sorted(path for folder in all_found.values() for path in folder.audio)
    split = choose_rule(found, args)
    candidates = split(found)
    chosen = sorted(set().union(*candidates.values()))
    if len(chosen) < len(found):
        print(f"{len(found) - len(chosen)} of {len(found)} files are in no split")

    read_at = {path: places.get(path, path) for path in chosen}
    progress = corpus.count_all(root, list(read_at.values()), args.num_workers)
    counted = dict(cli.progress(progress, "reading headers", total=len(chosen), unit=" files"))
    counts = {path: counted[place] for path, place in read_at.items()}
    rejected = unreadable | {path: reason for path, (_, reason) in counts.items() if reason}
    (out / f"{REJECTED}.tsv").unlink(missing_ok=True)  # an earlier run's
    if rejected:
        rows = (f"{corpus.LINE_BREAK.sub('?', name)}\t{reason}" for name, reason in rejected.items())
        write_lines(out / f"{REJECTED}.tsv", rows)
        print(f"{len(rejected)} files left out, listed with the reason in {out / REJECTED}.tsv")
    splits = split([path for path in counts if path not in rejected])
    for name, paths in splits.items():
        if not paths:
            folders = ", ".join(sorted({path.partition("/")[0] for path in found if "/" in path})[:10]) or "none"
            raise UserError(
                f"{name}.tsv would be empty: none of its {len(candidates[name])} files can be used; folders in {root}: "
                f"{folders}; change --splits or --valid_fraction"
            )
    for name, paths in splits.items():
        lengths = [counts[path][0] for path in paths]
        write_lines(out / f"{name}.tsv", [root, *map("{}\t{}".format, map(read_at.__getitem__, paths), lengths)])
        print(describe(name, lengths))
    used = set().union(*splits.values())
    hours = {
        name: sum(counts[path][0] for path in used.intersection(folder.audio)) for name, folder in all_found.items()
    }
    for name, samples in hours.items() if len(hours) > 1 else ():
        print(f"{name}: {samples / SAMPLE_RATE / 3600:.2f} h, {samples / sum(hours.values()):.0%} of all")
    print(f"written to {out}: {', '.join(f'{name}.tsv' for name in splits)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
