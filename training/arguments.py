"""The flags of a run, checked."""

import re
from fractions import Fraction

from wav2vec2.errors import UserError


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
