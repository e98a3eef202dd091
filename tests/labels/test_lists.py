"""Lists that users write by hand: encodings, file names that are no text, kinds of tasks, lines that cannot be."""

import os

import numpy as np
import pytest
import soundfile

from labels.lists import Segment, read_probe, read_table
from wav2vec2.files.errors import UserError


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


@pytest.fixture
def folder(tmp_path):
    """Half a second of noise, ten times."""
    for number in range(10):
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 16_000)
    return tmp_path


def write(folder, *lines):
    path = folder / "list.tsv"
    path.write_text("\n".join(line.replace(" ", "\t") for line in lines))
    return path


def test_kinds_of_tasks(folder):
    """Told by the header, and by the labels that the splits share."""
    train = ["train 0.wav a", "train 1.wav a", "train 2.wav b", "train 3.wav b"]
    clips = read_probe(write(folder, "split path label", *train, "test 4.wav b"))
    assert (clips.kind, clips.labels, clips.test[0].target, clips.test[0].line) == ("clips", ("a", "b"), 1, 6)
    assert clips.valid == ()
    chosen = read_probe(write(folder, "split path label", *train, "valid 5.wav a", "test 4.wav b"))
    assert [clip.target for clip in chosen.valid] == [0] and chosen.kind == "clips"
    unknown = ["test 4.wav c", "test 5.wav d", "test 6.wav d"]
    verification = read_probe(write(folder, "split path label", *train, *unknown))
    assert (verification.kind, [clip.target for clip in verification.test]) == ("verification", [2, 3, 3])

    rows = ["train 0.wav 0.2 0.3 b", "train 0.wav 0 0.2 a", "test 1.wav 0.1 0.5 a"]
    segments = read_probe(write(folder, "split path start end label", *rows))
    assert segments.kind == "segments" and segments.train[0].target == (Segment(0, 0.2, 0), Segment(0.2, 0.3, 1))
    path = folder / "text.tsv"
    path.write_text("split\tpath\ttext\ntrain\t0.wav\tb a\ntest\t1.wav\ta c\n")
    assert read_probe(path).test[0].target == (0, 2)  # c is not known
    ordered = read_probe(path, labels=("b", "z", "a"))
    assert ordered.labels == ("b", "z", "a") and ordered.train[0].target == (0, 2) and ordered.test[0].target == (2, 3)
    characters = read_probe(path, "characters")
    assert characters.labels == (" ", "a", "b") and characters.train[0].target == (2, 0, 1)


GOOD = ["train 0.wav a", "train 1.wav a", "train 2.wav b", "train 3.wav b"]
TIMED = ["train 0.wav 0 0.2 a", "train 1.wav 0 0.2 b", "test 2.wav 0 0.2 a"]


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("split path", GOOD, r"line 1 is .*expected the columns"),
        ("split path label", GOOD, "no line has the split test"),
        ("split path label", ["test 0.wav a"], "no line has the split train"),
        ("split path label", [*GOOD[:2], "test 2.wav a"], "one label, 'a', expected two or more"),
        ("split path label", [*GOOD[:3], "test 3.wav a"], "line 4: one training clip has the label 'b'"),
        (
            "split path label",
            [*GOOD, "test 4.wav a", "test 5.wav c"],
            "line 7: .*label 'c', which no training",
        ),
        ("split path label", [*GOOD, "test 4.wav c"], "a verification needs test clips of two labels"),
        ("split path label", [*GOOD, "dev 3.wav a"], "line 6 has the split 'dev'"),
        ("split path label", [*GOOD, "test 3.wav"], "line 6 has no label"),
        ("split path label", [*GOOD, "test 3.wav a"], "line 6 lists .*3.wav, which line 5 does already"),
        ("split path label", [*GOOD, "test 19.wav a"], r"line 6: .*19\.wav does not exist"),
        ("split path label", ["train " + "x" * 200_000 + " a"], "line 2 cannot be read"),
        ("split path text", ["train 0.wav ", "test 1.wav a"], "line 2 has no text"),
        ("split path text", ["train 0.wav a", "test 1.wav a"], "one label, 'a'"),
        ("split path label", [*GOOD, "test 4.wav a", "valid 5.wav a", "valid 6.wav c"], "line 8: the valid clip has"),
        ("split path label", [*GOOD, "test 4.wav a", "valid 5.wav c", "valid 6.wav c"], "needs valid clips of two"),
        ("split path start end label", [*TIMED, "test 3.wav 0 0.1 c"], "line 5 has the label 'c', which no training"),
        ("split path start end label", [*TIMED, "test 3.wav 0.2 0.1 a"], "line 5 has start '0.2' and end '0.1'"),
        ("split path start end label", [*TIMED, "test 3.wav 0.1 0.1 a"], "line 5 has start"),
        ("split path start end label", [*TIMED, "test 3.wav -1 0.1 a"], "line 5 has start '-1'"),
        ("split path start end label", [*TIMED, "test 3.wav nan 0.1 a"], "line 5 has start 'nan'"),
        ("split path start end label", [*TIMED, "test 3.wav one 2 a"], "line 5 has start 'one'"),
        ("split path start end label", [*TIMED, "test 3.wav 0.4 0.6 a"], r"line 5 ends at 0.6 s, but .*0\.500 s long"),
        ("split path start end label", [*TIMED, "train 0.wav 0.1 0.3 b"], "line 5 begins at 0.1 s, before line 2"),
        ("split path start end label", [*TIMED, "test 0.wav 0.2 0.3 b"], "line 5 puts .*0.wav into test, line 2 into"),
    ],
)
def test_lists_that_cannot_be(folder, header, lines, message):
    with pytest.raises(UserError, match=rf"list\.tsv.*{message}"):
        read_probe(write(folder, header, *lines))


def test_segments_of_a_file_that_is_no_audio(folder):
    (folder / "0.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"0\.wav: cannot be decoded"):
        read_probe(write(folder, "split path start end label", *TIMED))
