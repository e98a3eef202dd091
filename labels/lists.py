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
VERIFICATION = "verification"
# The columns of each kind of list; the first whose columns are all there counts. A verification is told by its labels.
_COLUMNS = {
    SEGMENTS: ("split", "path", "start", "end", "label"),
    CLIPS: ("split", "path", "label"),
    TEXT: ("split", "path", "text"),
}

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
    """A line of a list: a file with its label or units, or a segment of one."""

    place: str  # the list and the line, for errors
    line: int
    split: str
    path: Path
    labels: list[str]
    start: float
    end: float


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
    kind, rows = _read_rows(path, units)
    for split in ("train", "test"):
        if not any(row.split == split for row in rows):
            raise UserError(f"{path}: no line has the split {split}, expected lines of both train and test")
    files = _files(rows, kind)
    trained = sorted({label for row in rows if row.split == "train" for label in row.labels})
    if len(trained) < 2:
        raise UserError(f"{path}: the training clips have one label, {short_repr(trained[0])}, expected two or more")
    if kind == SEGMENTS and (strangers := [row for row in rows if row.labels[0] not in trained]):
        raise UserError(
            f"{strangers[0].place} has the label {short_repr(strangers[0].labels[0])}, which no training segment has; "
            "take it out, or add such segments for training"
        )
    if kind == CLIPS:
        kind = _kind_of_clips(path, rows)
    names = tuple(trained if labels is None else labels)
    numbers = {label: number for number, label in enumerate(names)}
    clips: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    for first, *others in files:
        spoken: tuple[str, ...] = ()
        if kind == TEXT:
            spoken = tuple(first.labels)
            target: Any = tuple(numbers.get(label, len(names)) for label in spoken)
        elif kind == SEGMENTS:
            segments = (Segment(row.start, row.end, numbers[row.labels[0]]) for row in (first, *others))
            target = tuple(sorted(segments))
        else:  # the test clips of a verification have other labels
            target = numbers.setdefault(first.labels[0], len(numbers))
        clips[first.split].append(Clip(first.path, target, first.line, spoken))
    return Probe(path.stem, path, kind, names, **{split: tuple(found) for split, found in clips.items()})


def _kind_of_clips(path: Path, rows: Sequence[_Row]) -> str:
    """Tell classification, where training has all labels of the test clips, from verification, where it has none."""
    labels = {split: Counter(row.labels[0] for row in rows if row.split == split) for split in SPLITS}
    trained = labels["train"]
    for row in rows:
        if row.split == "train" and trained[row.labels[0]] < 2:
            raise UserError(
                f"{row.place}: one training clip has the label {short_repr(row.labels[0])}, expected two or more of "
                "each, because some are held out to choose settings"
            )
    unknown = []  # splits whose labels training does not have
    for split in ("test", "valid"):
        new = [row for row in rows if row.split == split and row.labels[0] not in trained]
        if not new:
            continue
        unknown.append(split)
        if len(new) < labels[split].total():
            raise UserError(
                f"{new[0].place}: the {split} clip has the label {short_repr(new[0].labels[0])}, which no training "
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


def _files(rows: Sequence[_Row], kind: str) -> list[list[_Row]]:
    """Gather the rows of each file: one, or segments that do not overlap."""
    files: dict[Path, list[_Row]] = {}
    for row in rows:
        first = files.setdefault(row.path, [row])[0]
        if row is first:
            continue
        if kind != SEGMENTS:
            raise UserError(f"{row.place} lists {row.path}, which line {first.line} does already; take one out")
        if row.split != first.split:
            raise UserError(
                f"{row.place} puts {row.path} into {row.split}, line {first.line} into {first.split}; expected all "
                "segments of a file in one split"
            )
        files[row.path].append(row)
    for found in files.values() if kind == SEGMENTS else ():
        in_order = sorted(found, key=lambda row: (row.start, row.end))
        for row, after in itertools.pairwise(in_order):
            if after.start < row.end:
                raise UserError(
                    f"{after.place} begins at {after.start:g} s, before line {row.line} of the same file ends "
                    f"({row.end:g} s); expected segments that do not overlap"
                )
        last = in_order[-1]
        if last.end > (seconds := num_samples(last.path) / SAMPLE_RATE) + _ROUNDING:
            raise UserError(f"{last.place} ends at {last.end:g} s, but {last.path} is {seconds:.3f} s long")
    return list(files.values())


def num_samples(path: Path) -> int:
    """Count the samples of an audio file at 16 kHz, by its header if that states them.

    Raises:
        AudioError: the file cannot be read.
    """
    with checked_audio(path) as file:
        stated = stated_length(file)
    return len(read_audio(path)) if stated is None else stated


def _read_rows(path: Path, units: str) -> tuple[str, list[_Row]]:
    """Read the lines, and tell the kind by the columns."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a list of labelled audio files")
    found, table = read_table(path)
    kind, header = next(((kind, columns) for kind, columns in _COLUMNS.items() if set(columns) <= set(found)), ("", ()))
    if not kind:
        expected = ", or ".join(" ".join(columns) for columns in _COLUMNS.values())
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
        if kind == TEXT:
            words = values["text"].split()
            labels = words if units == UNITS[0] else list(" ".join(words))
        else:
            labels = [values["label"]]
        times = _times(place, values["start"], values["end"]) if kind == SEGMENTS else (0.0, 0.0)
        rows.append(_Row(place, line, split, audio, labels, *times))
    return kind, rows


def _times(place: str, start: str, end: str) -> tuple[float, float]:
    try:
        times = float(start), float(end)
    except ValueError:
        times = -1.0, -1.0
    if not 0 <= times[0] < times[1] < float("inf"):
        raise UserError(
            f"{place} has start {short_repr(start)} and end {short_repr(end)}, expected seconds from 0 up, the end "
            "after the start"
        )
    return times


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
