"""A manifest: which utterances there are, where, and how long.

It is what ``prepare_data.py`` writes: the root folder on the first line, then one
``relative path<TAB>samples`` per utterance, counted at 16 kHz.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wav2vec2.files.errors import UserError, short_repr


@dataclass(frozen=True)
class Manifest:
    """The utterances of one split.

    Attributes:
        path: the manifest's own.
        root: the folder that ``paths`` start from.
        paths: (N,) str, of the audio files. Loader processes share an array; of a list, each would come to hold a
            copy (33 MB for 300,000 files), because every str counts its users inside itself.
        lengths: (N,) int64 in samples at 16 kHz.
    """

    path: Path
    root: Path
    paths: np.ndarray
    lengths: np.ndarray

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
        raise UserError(f"{path}: {found}, expected a manifest (.tsv files beside it: {others})")
    line_numbers: dict[str, int] = {}
    lengths: list[int] = []
    # surrogateescape: a file name on Linux is bytes, and need not be valid UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        root = file.readline().removesuffix("\n")
        if not root.strip() or "\t" in root:
            raise UserError(
                f"{path}: line 1 is {short_repr(root)}, expected the folder that the paths below it start from"
            )
        for number, line in enumerate(file, start=2):
            if not line.strip():
                continue
            name, _, count = line.removesuffix("\n").rpartition("\t")
            # 18 digits fit into 64 bits.
            if not (name and count.isdecimal() and len(count) <= 18 and int(count) > 0):
                raise UserError(
                    f"{path}: line {number} is {short_repr(line)}, expected a relative path, a tab and a positive "
                    "number of samples"
                )
            if name in line_numbers:
                raise UserError(
                    f"{path}: line {number} lists {short_repr(name)}, which line {line_numbers[name]} does already, "
                    "expected each path once"
                )
            line_numbers[name] = number
            lengths.append(int(count))
    if not lengths:
        raise UserError(f"{path}: no utterance is listed, expected one a line below the root folder")
    return Manifest(path, Path(root), np.array(list(line_numbers)), np.array(lengths, dtype=np.int64))
