"""Lists of labelled audio that users write by hand; the header tells the kind of task.

    split path label               clips: one label for each file
    split path label               verification: the same, where training has none of the test clips' labels
    split path start end label     segments: a label for a stretch of a file, times in seconds
    split path text                text: what is said in a file, words separated by spaces

``split`` is train, test or valid (fine-tuning chooses its best weights by valid; probes pass it over). Paths start from
the list's folder. Columns are separated by tabs; others are ignored.
"""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wav2vec2.audio import SAMPLE_RATE, checked_audio, read_audio, stated_length
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.kinds import CLIPS, SEGMENTS, TEXT, UNITS

SPLITS = ("train", "test", "valid")
NEEDED_SPLITS = SPLITS[:2]
VERIFICATION = "verification"
# The columns of each kind of list; the first whose columns are all there counts.
_COLUMNS = (("split", "path", "start", "end", "label"), ("split", "path", "label"), ("split", "path", "text"))

# UTF-8 text holds neither bytes that could not be decoded nor the zeros between the letters of UTF-16.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")

# Seconds that a segment may end after its file: times in lists are rounded.
_ROUNDING = 0.011


class Segment(NamedTuple):
    """A label, a number from 0, from ``start`` to ``end`` in seconds."""

    start: float
    end: float
    label: int


class Clip(NamedTuple):
    """An audio file with what is to be found in it."""

    path: Path
    # The label, a number from 0 (clips, verification); a tuple of Segment, in order of time; or a tuple of units
    # (text). Numbers from len(labels) up stand for labels that training does not have.
    target: Any
    line: int  # the first line of the list that names the file
    units: tuple[str, ...] = ()  # of a text, as written


@dataclass(frozen=True)
class Probe:
    """A task: labelled audio to learn from and to test on; ``valid`` may be empty."""

    name: str  # of the file, without its ending
    path: Path
    kind: str  # CLIPS, VERIFICATION, SEGMENTS or TEXT
    labels: tuple[str, ...]  # names of the training clips' labels or units
    train: tuple[Clip, ...]
    test: tuple[Clip, ...]
    valid: tuple[Clip, ...] = ()

    def place(self, clip: Clip) -> str:
        """Name the list and the line of a clip, for errors."""
        return f"{self.path}: line {clip.line}"


class _Row(NamedTuple):
    place: str  # the list and the line, for errors
    line: int
    split: str
    path: Path
    values: dict[str, str]


class _File(NamedTuple):
    """An audio file in a list: its first row, its labels or units, and the times of segments."""

    row: _Row
    labels: list[str]
    times: list[tuple[float, float]]


def read_probe(path: Path, units: str = UNITS[0], labels: Sequence[str] | None = None) -> Probe:
    """Read a list (see the module).

    Args:
        path: the list.
        units: the units of a text, one of :data:`UNITS`; among characters, the space between words is one.
        labels: the labels in the order of their numbers, such as a head's; None takes those of the training clips.

    Raises:
        UserError: the file is missing or no such list; a line is incomplete, names a file that cannot be read, or
            has impossible times; a split is missing; there are fewer than two labels; some test clips have labels
            that training has, others do not. The message names the line if one line is at fault.
    """
    header, rows = _read_rows(path)
    for split in NEEDED_SPLITS:
        if not any(row.split == split for row in rows):
            raise UserError(f"{path}: no line has the split {split}, expected lines of both train and test")
    if "start" in header:
        kind, files = SEGMENTS, _segments(rows)
    elif "text" in header:
        kind, files = TEXT, [_File(row, text_units(row.values["text"], units), []) for row in _one_per_file(rows)]
    else:
        kind, files = CLIPS, [_File(row, [row.values["label"]], []) for row in _one_per_file(rows)]
    trained = sorted({label for file in files if file.row.split == "train" for label in file.labels})
    if len(trained) < 2:
        raise UserError(f"{path}: the training clips have one label, {short_repr(trained[0])}, expected two or more")
    if kind == SEGMENTS and (strangers := [row for row in rows if row.values["label"] not in trained]):
        raise UserError(
            f"{strangers[0].place} has the label {short_repr(strangers[0].values['label'])}, which no training segment "
            "has; take it out, or add such segments for training"
        )
    if kind == CLIPS:
        kind = _kind_of_clips(path, files)
    names = tuple(trained if labels is None else labels)
    return Probe(path.stem, path, kind, names, **_numbered(kind, files, names))


def _numbered(kind: str, files: Sequence[_File], labels: Sequence[str]) -> dict[str, tuple[Clip, ...]]:
    """The clips of each split, with numbers for labels."""
    numbers = {label: number for number, label in enumerate(labels)}
    splits: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    for row, names, times in files:
        if kind == TEXT:
            target: Any = tuple(numbers.get(name, len(labels)) for name in names)
        elif kind == SEGMENTS:
            target = tuple(Segment(*time, numbers[name]) for time, name in zip(times, names, strict=True))
        else:  # the test clips of a verification have other labels
            target = numbers.setdefault(names[0], len(numbers))
        splits[row.split].append(Clip(row.path, target, row.line, tuple(names) if kind == TEXT else ()))
    return {split: tuple(clips) for split, clips in splits.items()}


def text_units(text: str, units: str) -> list[str]:
    """Split a text into its units, one of :data:`UNITS`."""
    words = text.split()
    return words if units == UNITS[0] else list(" ".join(words))


def _kind_of_clips(path: Path, files: Sequence[_File]) -> str:
    """Tell classification, where training has all labels of the test clips, from verification, where it has none."""
    labels = {split: Counter(file.labels[0] for file in files if file.row.split == split) for split in SPLITS}
    trained = labels["train"]
    for file in files:
        if file.row.split == "train" and trained[file.labels[0]] < 2:
            raise UserError(
                f"{file.row.place}: one training clip has the label {short_repr(file.labels[0])}, expected two or more "
                "of each, because some are held out to choose settings"
            )
    unknown = []  # splits whose labels training does not have
    for split in ("test", "valid"):
        new = [file for file in files if file.row.split == split and file.labels[0] not in trained]
        if not new:
            continue
        unknown.append(split)
        if len(new) < labels[split].total():
            raise UserError(
                f"{new[0].row.place}: the {split} clip has the label {short_repr(new[0].labels[0])}, which no training "
                "clip has; take such clips out, or add some for training (or let the two splits share no label, which "
                "makes it a verification)"
            )
        if len(labels[split]) < 2 or max(labels[split].values()) < 2:
            raise UserError(
                f"{path}: a verification needs {split} clips of two labels or more, and two clips of one of them; "
                f"found {len(labels[split])} labels with at most {max(labels[split].values())} clips"
            )
    if unknown == ["valid"]:
        raise UserError(f"{path}: the valid clips share no label with the training clips, though the test clips do")
    return VERIFICATION if unknown else CLIPS


def _one_per_file(rows: Sequence[_Row]) -> Sequence[_Row]:
    lines: dict[Path, int] = {}
    for row in rows:
        if (line := lines.setdefault(row.path, row.line)) != row.line:
            raise UserError(f"{row.place} lists {row.path}, which line {line} does already; take one out")
    return rows


def _segments(rows: Sequence[_Row]) -> list[_File]:
    """Gather the segments of each file in order of time."""
    found: dict[Path, list[tuple[float, float, _Row]]] = {}
    for row in rows:
        segments = found.setdefault(row.path, [])
        segments.append((*_times(row), row))
        leader = segments[0][-1]
        if row.split != leader.split:
            raise UserError(
                f"{row.place} puts {row.path} into {row.split}, line {leader.line} into {leader.split}; expected all "
                "segments of a file in one split"
            )
    return [_in_order(segments) for segments in found.values()]


def _times(row: _Row) -> tuple[float, float]:
    try:
        start, end = (float(row.values[column]) for column in ("start", "end"))
    except ValueError:
        start = end = -1.0
    if not 0 <= start < end < float("inf"):
        found = " and ".join(f"{column} {short_repr(row.values[column])}" for column in ("start", "end"))
        raise UserError(f"{row.place} has {found}, expected seconds from 0 up, the end after the start")
    return start, end


def _in_order(segments: list[tuple[float, float, _Row]]) -> _File:
    leader = segments[0][-1]
    segments = sorted(segments, key=lambda segment: segment[:2])
    for (_, end, row), (start, _, next_row) in itertools.pairwise(segments):
        if start < end:
            raise UserError(
                f"{next_row.place} begins at {start:g} s, before line {row.line} of the same file ends ({end:g} s); "
                "expected segments that do not overlap"
            )
    _, end, row = segments[-1]
    if end > (seconds := num_samples(leader.path) / SAMPLE_RATE) + _ROUNDING:
        raise UserError(f"{row.place} ends at {end:g} s, but {leader.path} is {seconds:.3f} s long")
    return _File(leader, [row.values["label"] for *_, row in segments], [(start, end) for start, end, _ in segments])


def num_samples(path: Path) -> int:
    """Count the samples of an audio file at 16 kHz, by its header if that states them.

    Raises:
        AudioError: the file cannot be read.
    """
    with checked_audio(path) as file:
        stated = stated_length(file)
    return len(read_audio(path)) if stated is None else stated


def _read_rows(path: Path) -> tuple[tuple[str, ...], list[_Row]]:
    """Read the columns that count, and the lines."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a list of labelled audio files")
    found, table = read_table(path)
    header = next((columns for columns in _COLUMNS if set(columns) <= set(found)), None)
    if header is None:
        expected = ", or ".join(" ".join(columns) for columns in _COLUMNS)
        raise UserError(f"{path}: line 1 is {short_repr(found)}, expected the columns {expected}, separated by tabs")
    rows = []
    for line, fields in table:
        values = {column: fields[column] or "" for column in header}
        values |= {column: value.strip() for column, value in values.items() if column != "path"}
        place, split, audio = f"{path}: line {line}", values["split"], path.parent / values["path"]
        if empty := [column for column, value in values.items() if not value]:
            raise UserError(f"{place} has no {empty[0]}, expected {', '.join(header)}, separated by tabs")
        if split not in SPLITS:
            raise UserError(f"{place} has the split {short_repr(split)}, expected {', '.join(SPLITS)}")
        if not audio.is_file():
            raise UserError(f"{place}: {audio} does not exist, expected an audio file")
        rows.append(_Row(place, line, split, audio, values))
    return header, rows


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """Read the columns' names, and the number and fields of each line; a line may have too few fields: None.

    As in manifests, a file name under ``path`` may be no UTF-8; everything else must be.

    Raises:
        UserError: the file is not UTF-8, or not lines of fields.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            columns = list(reader.fieldnames or [])
            rows: list[tuple[int, dict[str, str | None]]] = [(reader.line_num, {**row}) for row in reader]
        except csv.Error as error:
            raise UserError(
                f"{path}: line {reader.line_num + 1} cannot be read ({error}), expected short fields separated by tabs"
            ) from error
    fields: list[tuple[int, str, str | None]] = [(1, "", name) for name in columns]
    fields += [(number, column, field) for number, row in rows for column, field in row.items()]
    for number, column, field in fields:
        if isinstance(field, str) and _NOT_TEXT.search(field) and (column != "path" or "\0" in field):
            raise UserError(f"{path}: line {number} is not UTF-8 text: {short_repr(field)}; save the list as UTF-8")
    return columns, rows
