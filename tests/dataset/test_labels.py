"""Lists that users write by hand: encodings, and file names that are no text."""

import os

import pytest

from dataset.labels import read_table
from wav2vec2.errors import UserError


def test_fields_by_column(tmp_path):
    path = tmp_path / "labels.tsv"
    path.write_bytes('\ufeffpath\ttext\r\na.wav\tnaïve "café\r\n\r\nb.wav\n'.encode() + b"caf\xe9.wav\toui\n")
    columns, rows = read_table(path)
    assert columns == ["path", "text"]
    assert rows == [
        (2, {"path": "a.wav", "text": 'naïve "café'}),
        (4, {"path": "b.wav", "text": None}),
        (5, {"path": os.fsdecode(b"caf\xe9.wav"), "text": "oui"}),
    ]


TABLE = "path\ttext\na.wav\toui\nb.wav\tnaïve\n"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (TABLE.encode("latin-1"), r"line 3 is not UTF-8 text: 'na\\udcefve'; save the list as UTF-8"),
        (TABLE.encode("cp1252").replace(b"text", b"na\xefve"), "line 1 is not UTF-8 text"),
        (TABLE.encode("utf-16"), "line 1 is not UTF-8 text"),
        (TABLE.encode("utf-16-be"), "line 1 is not UTF-8 text"),
        (TABLE.encode("utf-32"), "line 1 is not UTF-8 text"),
        (TABLE.encode().replace(b"a.wav", b"a\0.wav"), "line 2 is not UTF-8 text"),
        (TABLE.encode().replace(b"oui", b"oui" * 70_000), r"line 2 cannot be read \(field larger than"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, contents, message):
    path = tmp_path / "labels.tsv"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=rf"labels\.tsv: {message}"):
        read_table(path)
