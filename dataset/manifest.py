"""A manifest: which utterances there are, where, and how long.

It is what ``prepare_data.py`` writes: the root folder on the first line, then one
``relative path<TAB>samples`` per utterance, counted at 16 kHz.
"""

import itertools
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from wav2vec2.errors import UserError, short_repr

if TYPE_CHECKING:
    from dataset.packed import Pack


class Names(Sequence[str]):
    """A list of file names that loader processes share.

    Each str of a list counts its users inside itself, so that a forked process copies every one that it looks at.
    Here all names are one text, which is only read. It is a tensor because torch passes tensors to processes
    that are not forked through shared memory, and numpy's arrays as copies.

    Args:
        names: file names; bytes that are not UTF-8 as ``surrogateescape`` decodes them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        text, bounds = bytearray(), array("q", [0])
        for name in names:
            text += name.encode(errors="surrogateescape")
            bounds.append(len(text))
        # A byte more, for there is no tensor from an empty buffer.
        self._text = torch.frombuffer(text + b"\0", dtype=torch.uint8)
        self._bounds = torch.frombuffer(bounds, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} is not one of {len(self)}")
        first = index % len(self)
        start, end = self._bounds.numpy()[first : first + 2]
        return self._text.numpy()[start:end].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text = memoryview(self._text.numpy())
        for start, end in itertools.pairwise(memoryview(self._bounds.numpy())):
            yield str(text[start:end], "utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


@dataclass(frozen=True)
class Manifest:
    """The utterances of one split.

    Attributes:
        path: the manifest's own.
        root: the folder that ``paths`` start from.
        paths: (N,) of the audio files.
        lengths: (N,) int64 in samples at 16 kHz.
        pack: where to read the samples instead, see :func:`packed.attach`.
    """

    path: Path
    root: Path
    paths: Sequence[str]
    lengths: np.ndarray
    pack: "Pack | None" = None

    def full_path(self, index: int) -> str:
        return str(self.root / self.paths[index])


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read a ``.tsv`` manifest; blank lines, Windows line ends and a byte order mark are tolerated.

    Raises:
        UserError: the file is missing, lists no utterance or one twice, or a line is not
            ``relative path<TAB>samples``.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a manifest; give the .tsv file that prepare_data.py wrote")
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.tsv"))) or "none"
        raise UserError(
            f"{path}: no such manifest (subsets in that folder: {others}); "
            "write it with prepare_data.py or change --tsv_dir and --train_subset"
        )
    lines = _lines(path)
    _, root = next(lines, (1, ""))
    if not root.strip() or "\t" in root or "\0" in root:
        raise UserError(
            f"{path}: line 1 is {short_repr(root)}, expected the folder that the paths below it start from; "
            "write the manifest with prepare_data.py"
        )
    lengths, hashes = array("q"), array("q")
    paths = Names(_rows(path, lines, lengths, hashes))
    if not paths:
        raise UserError(
            f"{path}: no utterance is listed, expected one a line below the root folder; run prepare_data.py again"
        )
    # Two names may share a hash, though hardly ever do: only then are the names themselves compared.
    if len(np.unique(np.asarray(hashes))) < len(paths):
        _refuse_repeats(path)
    return Manifest(path, Path(root), paths, np.array(lengths, dtype=np.int64))


def _rows(path: Path, lines: Iterator[tuple[int, str]], lengths: array, hashes: array) -> Iterator[str]:
    """The names in a manifest's lines below the first; the length and the hash of each are appended."""
    for line_number, line in lines:
        name, _, count = line.rpartition("\t")
        # 18 digits fit into 64 bits.
        if name and count.isdecimal() and len(count) <= 18 and (length := int(count)) > 0:
            lengths.append(length)
            hashes.append(hash(name))
            yield name
        elif line.strip():
            raise UserError(
                f"{path}: line {line_number} is {short_repr(line)}, expected a relative path, a tab and a "
                "positive number "
                "of samples; mend the line or write the manifest again with prepare_data.py"
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, one at a time: manifests can be long."""
    # surrogateescape: a file name on Linux is bytes, and need not be valid UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removesuffix("\n")


def _refuse_repeats(path: Path) -> None:
    """Look for an utterance that a manifest lists twice.

    It reads the file again, so that a good manifest costs no memory for line numbers.

    Raises:
        UserError: there is one.
    """
    first: dict[str, int] = {}
    for line_number, line in itertools.islice(_lines(path), 1, None):
        name = line.rpartition("\t")[0]
        if name in first:
            raise UserError(
                f"{path}: line {line_number} lists {short_repr(name)}, which line {first[name]} does already, expected "
                "each path once; take one of the lines out or write the manifest again with prepare_data.py"
            )
        if name:
            first[name] = line_number


def parse_max_bad_files(text: str, num_files: int) -> int:
    """``"5"`` to 5, ``"1%"`` to that share of ``num_files``, rounded down.

    Raises:
        UserError: neither a whole number nor a share of 0% to 100%.
    """
    match = re.fullmatch(r"([0-9]{1,18})|([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text)
    if match and match[1]:
        return int(match[1])
    # A fraction, not a float: 0.7% of 1000 files are 7.
    if match and (share := Fraction(match[2]) / 100) <= 1:
        return int(share * num_files)
    raise UserError(
        f"--max_bad_files {text}: expected a number of files such as 5, or a share of them from 0% to 100% such as 1%"
    )
