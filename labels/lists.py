"""Lists of labelled audio that users write by hand; the header tells what kind of task a list is.

    split path label               clips: one label for each file
    split path label               verification: the same, where no label of the test clips is one of training
    split path start end label     segments: a label for a stretch of a file, times in seconds
    split path text                text: what is said in a file, units separated by spaces

``split`` is train, test or valid (by which fine-tuning chooses its best weights, and which probes pass over); paths
start from the list's folder; columns are separated by tabs, others are ignored.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wav2vec2.audio import SAMPLE_RATE, checked_audio, read_audio, stated_length
from wav2vec2.files.errors import UserError, short_repr

SPLITS = ("train", "test", "valid")
NEEDED_SPLITS = SPLITS[:2]
CLIPS, VERIFICATION, SEGMENTS, TEXT = "clips", "verification", "segments", "text"
# The columns of each header; the first whose columns are all there counts.
_COLUMNS = (("split", "path", "start", "end", "label"), ("split", "path", "label"), ("split", "path", "text"))
UNITS = ("words", "characters")

# What no UTF-8 text holds: bytes that could not be decoded, and the zeros between the letters of UTF-16.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")

# Seconds that a segment may end behind its file: times in lists are rounded.
_ROUNDING = 0.011


class Segment(NamedTuple):
    """A label, a number from 0, from ``start`` to ``end`` in seconds."""

    start: float
    end: float
    label: int


class Clip(NamedTuple):
    """An audio file with what a probe is to find in it.

    Attributes:
        path: of the file.
        target: the label, a number from 0 (clips, verification); or tuples of :class:`Segment`, in order; or of
            units, numbers from 0, -1 for one that training does not have (text).
        line: of the list, the first that names the file.
    """

    path: Path
    target: Any
    line: int


@dataclass(frozen=True)
class Probe:
    """A task: labelled audio to learn from and to test on.

    Attributes:
        name: the file's, without its ending.
        path: the ``.tsv`` file.
        kind: one of :data:`CLIPS`, :data:`VERIFICATION`, :data:`SEGMENTS`, :data:`TEXT`.
        labels: the names of the labels or units; those of the training clips.
        train, test, valid: the clips; those for validation may be none.
    """

    name: str
    path: Path
    kind: str
    labels: tuple[str, ...]
    train: tuple[Clip, ...]
    test: tuple[Clip, ...]
    valid: tuple[Clip, ...] = ()

    def place(self, clip: Clip) -> str:
        """Where a clip is listed, for errors."""
        return f"{self.path}: line {clip.line}"


class _Row(NamedTuple):
    line: int
    split: str
    path: Path
    values: dict[str, str]


def read_probe(path: Path, units: str = UNITS[0]) -> Probe:
    """Read a list, see the module.

    Args:
        path: the list.
        units: what the units of a text are, one of :data:`UNITS`; a space between words is a character as others are.

    Raises:
        UserError: the file is missing or no such list; a line is incomplete, names a file that cannot be read, or
            has impossible times; a split is missing; there are fewer than two labels; the test clips have a label
            that training has not, though they share others. The line is named where it is one line's fault.
    """
    header, rows = _read_rows(path)
    for split in NEEDED_SPLITS:
        if not any(row.split == split for row in rows):
            raise UserError(f"{path}: no line has the split {split}, expected lines of both train and test")
    if "start" in header:
        kind, clips = SEGMENTS, _segments(path, rows)
    elif "text" in header:
        kind, clips = TEXT, [(row, text_units(row.values["text"], units)) for row in _one_per_file(path, rows)]
    else:
        kind, clips = CLIPS, [(row, row.values["label"]) for row in _one_per_file(path, rows)]
    labels = sorted({label for row, target in clips if row.split == "train" for label in _labels(kind, target)})
    if len(labels) < 2:
        raise UserError(f"{path}: the training clips have one label, {short_repr(labels[0])}, expected two or more")
    if kind == SEGMENTS and (strangers := [row for row in rows if row.values["label"] not in labels]):
        raise UserError(
            f"{path}: line {strangers[0].line} has the label {short_repr(strangers[0].values['label'])}, which no "
            "training segment has; take it out, or add such segments for training"
        )
    if kind == CLIPS:
        kind = _kind_of_clips(path, clips)
    index = {label: number for number, label in enumerate(labels)}
    splits: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    others: dict[str, int] = {}  # labels of the test clips of a verification, behind those of training
    for row, target in clips:
        if kind == SEGMENTS:
            numbers: Any = tuple(Segment(start, end, index[label]) for start, end, label in target)
        elif kind == TEXT:
            numbers = tuple(index.get(unit, -1) for unit in target)
        else:
            numbers = index[target] if target in index else len(index) + others.setdefault(target, len(others))
        splits[row.split].append(Clip(row.path, numbers, row.line))
    return Probe(path.stem, path, kind, tuple(labels), **{split: tuple(splits[split]) for split in SPLITS})


def _labels(kind: str, target: Any) -> Sequence[str]:
    if kind == SEGMENTS:
        return [label for _, _, label in target]
    return target if kind == TEXT else [target]


def text_units(text: str, units: str) -> list[str]:
    """The units, one of :data:`UNITS`, of a text."""
    words = text.split()
    return words if units == UNITS[0] else list(" ".join(words))


def _kind_of_clips(path: Path, clips: Sequence[tuple[_Row, str]]) -> str:
    """Classification where training knows the labels of all test clips, verification where it knows none."""
    trained = Counter(label for row, label in clips if row.split == "train")
    unknown: list[str] = []  # splits of other labels than those of training
    for split in ("test", "valid"):
        others = [(row, label) for row, label in clips if row.split == split]
        new = [(row, label) for row, label in others if label not in trained]
        if new and len(new) < len(others):
            row, label = new[0]
            raise UserError(
                f"{path}: line {row.line}: the {split} clip has the label {short_repr(label)}, which no training clip "
                "has; take such clips out, or add some for training (or let the two splits share no label, which makes "
                "it a verification)"
            )
        if new:
            unknown.append(split)
    for row, label in clips:
        if row.split == "train" and trained[label] < 2:
            raise UserError(
                f"{path}: line {row.line}: one training clip has the label {short_repr(label)}, expected two or more "
                "of each, because settings are chosen by held-out ones"
            )
    for split in unknown:
        tested = Counter(label for row, label in clips if row.split == split)
        if len(tested) < 2 or max(tested.values()) < 2:
            raise UserError(
                f"{path}: a verification needs {split} clips of two labels or more, and two clips of one of them; "
                f"found {len(tested)} labels with at most {max(tested.values())} clips"
            )
    if "valid" in unknown and "test" not in unknown:
        raise UserError(f"{path}: the valid clips share no label with the training clips, though the test clips do")
    return VERIFICATION if "test" in unknown else CLIPS


def _one_per_file(path: Path, rows: Sequence[_Row]) -> list[_Row]:
    lines: dict[Path, int] = {}
    for row in rows:
        if row.path in lines:
            raise UserError(
                f"{path}: line {row.line} lists {row.path}, which line {lines[row.path]} does already; take one out"
            )
        lines[row.path] = row.line
    return list(rows)


def _segments(path: Path, rows: Sequence[_Row]) -> list[tuple[_Row, list[tuple[float, float, str]]]]:
    """The first row that names each file, and the file's segments in order of time."""
    found: dict[Path, tuple[_Row, list[tuple[float, float, str, int]]]] = {}
    for row in rows:
        place = f"{path}: line {row.line}"
        try:
            start, end = (float(row.values[column]) for column in ("start", "end"))
        except ValueError:
            start = end = -1.0
        if not 0 <= start < end < float("inf"):
            raise UserError(
                f"{place} has start {short_repr(row.values['start'])} and end {short_repr(row.values['end'])}, "
                "expected seconds, 0 or more, the end behind the start"
            )
        leader, segments = found.setdefault(row.path, (row, []))
        if row.split != leader.split:
            raise UserError(
                f"{place} puts {row.path} into {row.split}, line {leader.line} into {leader.split}; "
                "expected all segments of a file in one split"
            )
        segments.append((start, end, row.values["label"], row.line))
    for leader, segments in found.values():
        segments.sort(key=lambda segment: segment[:2])
        seconds = _seconds(leader.path)
        for (_, end, _, line), (start, *_, next_line) in zip(segments, segments[1:], strict=False):
            if start < end:
                raise UserError(
                    f"{path}: line {next_line} begins at {start:g} s, before line {line} of the same file ends "
                    f"({end:g} s); expected segments that do not overlap"
                )
        _, end, _, line = segments[-1]
        if end > seconds + _ROUNDING:
            raise UserError(f"{path}: line {line} ends at {end:g} s, but {leader.path} is {seconds:.3f} s long")
    return [(leader, [segment[:3] for segment in segments]) for leader, segments in found.values()]


def _seconds(path: Path) -> float:
    with checked_audio(path) as file:
        num_samples = stated_length(file)
    return (len(read_audio(path)) if num_samples is None else num_samples) / SAMPLE_RATE


def _read_rows(path: Path) -> tuple[tuple[str, ...], list[_Row]]:
    """The columns that count, and the lines."""
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
        place = f"{path}: line {line}"
        if empty := [column for column, value in values.items() if not value]:
            raise UserError(f"{place} has no {empty[0]}, expected {', '.join(header)}, separated by tabs")
        if values["split"] not in SPLITS:
            raise UserError(f"{place} has the split {short_repr(values['split'])}, expected {', '.join(SPLITS)}")
        audio = path.parent / values["path"]
        if not audio.is_file():
            raise UserError(f"{place}: {audio} does not exist, expected an audio file")
        rows.append(_Row(line, values["split"], audio, values))
    return header, rows


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """The columns' names, and the number of each line and its fields by column; a line may have too few: None.

    As in manifests, what is below ``path`` may be a file name that is not UTF-8; everything else must be.

    Raises:
        UserError: the file is not UTF-8, or not lines of fields.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise UserError(
                f"{path}: line {reader.line_num + 1} cannot be read ({error}), expected short fields separated by tabs"
            ) from error
    fields = [(1, None, name) for name in columns]
    fields += [(number, column, field) for number, row in rows for column, field in row.items()]
    for number, column, field in fields:
        if isinstance(field, str) and _NOT_TEXT.search(field) and (column != "path" or "\0" in field):
            raise UserError(f"{path}: line {number} is not UTF-8 text: {short_repr(field)}; save the list as UTF-8")
    return columns, rows
