"""The flags of a run."""

import pytest

from training.arguments import parse_max_bad_files
from wav2vec2.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("5", 5), ("2000", 2000), ("0%", 0), ("1%", 9), ("0.7%", 6), ("33.34%", 333), ("100%", 999)],
)
def test_max_bad_files(text, expected):
    assert parse_max_bad_files(text, 999) == expected


def test_shares_are_exact():
    assert parse_max_bad_files("0.7%", 1000) == 7
    assert parse_max_bad_files("0.57%", 10_000) == 57


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many", "101%", "-1%", "%", "5 %", "nan%", "1e3", "1/2%", "٣"])
def test_max_bad_files_errors(text):
    with pytest.raises(UserError, match=r"^--max_bad_files .*expected a number of files such as 5"):
        parse_max_bad_files(text, 100)
