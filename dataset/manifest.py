"""Reads a manifest, the list of utterances that ``prepare_data.py`` writes.

The root folder is on the first line; each other line is ``relative path<TAB>samples``, counted at 16 kHz.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wav2vec2.files.errors import UserError, short_repr


class Paths:
    """Paths in one buffer, by number.

    Loader processes share it. Each would end up with its own copy of a list (33 MB for 300,000 files), because every
    str counts its references inside itself. In an array of str, each path would take the memory of the longest.
    """

    def __init__(self, paths: Collection[str]) -> None:
        encoded = [path.encode(errors="surrogateescape") for path in paths]
        self._buffer = b"".join(encoded)
        sizes = np.array([len(path) for path in encoded])
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        return self._buffer[self._starts[index] : self._ends[index]].decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True)
class Manifest:
    """The utterances of one split."""

    path: Path  # the manifest itself
    root: Path  # the folder that paths start from
    paths: Paths  # the N audio files
    lengths: np.ndarray  # (N,) int64, samples at 16 kHz

    def full_path(self, index: int) -> str:
        return str(self.root / self.paths[index])


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read a ``.tsv`` manifest; blank lines, Windows line ends and a byte order mark are tolerated.

    Raises:
        UserError: the file is missing, lists no utterance or one twice, or a line is not
            ``relative path<TAB>samples``.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.tsv"))) or "none"
        wanted = f"a manifest (.tsv files beside it: {others})"
        raise UserError(f"{path}: {found}, expected {wanted}; write it with prepare_data.py")
    line_numbers: dict[str, int] = {}
    lengths: list[int] = []
    # surrogateescape: a file name on Linux is bytes, and need not be valid UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        root = file.readline().removesuffix("\n")
        if not root.strip() or "\t" in root:
            raise UserError(f"{path}: line 1 is {short_repr(root)}, expected the folder that the paths start from")
        for number, line in enumerate(file, start=2):
            if not line.strip():
                continue
            name, _, count = line.removesuffix("\n").rpartition("\t")
            # 18 digits fit into 64 bits.
            if not (name and count.isdecimal() and len(count) <= 18 and int(count) > 0):
                wanted = "a relative path, a tab and a positive number of samples"
                raise UserError(f"{path}: line {number} is {short_repr(line)}, expected {wanted}")
            if name in line_numbers:
                problem = f"line {number} lists {short_repr(name)}, which line {line_numbers[name]} does already"
                raise UserError(f"{path}: {problem}, expected each path once")
            line_numbers[name] = number
            lengths.append(int(count))
    if not lengths:
        raise UserError(f"{path}: no utterance is listed, expected one a line below the root folder")
    return Manifest(path, Path(root), Paths(line_numbers), np.array(lengths, dtype=np.int64))
