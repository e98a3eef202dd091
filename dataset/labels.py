"""Lists of labelled audio that users write by hand: lines of fields separated by tabs, the first names the columns."""

import csv
import re
from pathlib import Path

from wav2vec2.errors import UserError, short_repr

# What no UTF-8 text holds: bytes that could not be decoded, and the zeros between the letters of UTF-16.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


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
