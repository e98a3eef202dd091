"""Profiles are read and checked; every damage is one line that names the place."""

import json

import pytest
from helpers import made_up_profile, random_model, small_config

from wav2vec2.files.errors import UserError
from wav2vec2.files.profiles import FORMAT, parse_profile, read_profile


@pytest.fixture
def contents():
    return made_up_profile(random_model(small_config("hubert")), 0.05, lambda _, x, y: x * y + 1)


def test_whole_files_are_read(tmp_path, contents):
    for one in (contents, {**contents, "multiple": 8, "more": [1]}):
        (tmp_path / "pi.json").write_text(json.dumps(one))
        assert read_profile(tmp_path / "pi.json") == one == parse_profile(json.dumps(one), "last.ckpt")


def grids(sizes, rows):
    return {"prices": {"conv kernel=3": {"sizes": sizes, "microseconds": rows}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "not a profile of a machine"),
        ({"format": True}, "not a profile of a machine"),
        ({"format": FORMAT + 1}, f"of format {FORMAT + 1}, expected {FORMAT}; update this program"),
        ({"backend": "tensorrt"}, "backend: expected torch or onnx, found 'tensorrt'"),
        ({"device": ["cpu"]}, "device: expected cpu or cuda"),
        ({"precision": 32}, "precision: expected 32, 16 or bf16, found 32"),
        ({"threads": 0}, "threads: expected a whole number above 0, found 0"),
        ({"batch": True}, "batch: "),
        ({"multiple": 0}, "multiple: "),
        ({"seconds": float("inf")}, "seconds: expected a number above 0, found inf"),
        ({"seconds": 0}, "seconds: "),
        ({"made_by": {"device": 1}}, "made_by: expected an object that names the device"),
        ({"prices": {}}, "prices: expected an object"),
        ({"prices": [1]}, "prices: expected an object"),
        ({"prices": {"conv kernel=3": None}}, "prices of 'conv kernel=3': expected two lists of rising sizes"),
        (grids([[1]], [[1.0]]), "prices of 'conv kernel=3'"),
        (grids([[2, 1], [1]], [[1.0], [1.0]]), "prices of 'conv kernel=3'"),
        (grids([[0, 1], [1]], [[1.0], [1.0]]), "prices of 'conv kernel=3'"),
        (grids([[1, 2], [1]], [[1.0]]), "prices of 'conv kernel=3'"),
        (grids([[1], [1, 2]], [[1.0]]), "prices of 'conv kernel=3'"),
        (grids([[1], [1]], [[-1.0]]), "prices of 'conv kernel=3'"),
        (grids([[1], [1]], [[float("nan")]]), "prices of 'conv kernel=3'"),
        (grids([[1], [1]], [["1"]]), "prices of 'conv kernel=3'"),
        (grids([[1], ["1"]], [[1.0]]), "prices of 'conv kernel=3'"),
        (grids([[], []], []), "prices of 'conv kernel=3'"),
        (grids(5, [[1.0]]), "prices of 'conv kernel=3'"),
    ],
)
def test_what_is_damaged_is_one_line(tmp_path, contents, changes, message):
    path = tmp_path / "pi.json"
    path.write_text(json.dumps({**contents, **changes}))
    for read in (lambda: read_profile(path), lambda: parse_profile(path.read_text(), str(path))):
        with pytest.raises(UserError) as caught:
            read()
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and message in text and "benchmarks.profile" in text and "\n" not in text


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '"x"', "[" * 100_000, '{"config": {}, "state_dict": {}}'])
def test_other_files(tmp_path, text):
    (tmp_path / "pi.json").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*pi\.json: [^\n]*benchmarks\.profile[^\n]*$"):
        read_profile(tmp_path / "pi.json")
    with pytest.raises(UserError, match=r"^last\.ckpt: [^\n]*$"):
        parse_profile(text, "last.ckpt")
    with pytest.raises(UserError, match=r"no such file; expected a profile"):
        read_profile(tmp_path / "none.json")
