"""A profile has every price, sums of parts are what a formula says, and a stopped run goes on."""

import json
import shutil

import pytest
import torch
from helpers import error_line, random_model, run_script, run_to_exit, small_config

from benchmarks import profile
from evaluation import latency
from wav2vec2.files import checkpoint
from wav2vec2.files.profiles import read_profile
from wav2vec2.model import hubert_base, wav2vec2_model, wavlm_base, wavlm_large, with_masks
from wav2vec2.profiles import Profile
from wav2vec2.sparsity import size_of

SECONDS = 0.05


def config_of(name):
    if name in ("hubert", "wavlm"):
        return small_config(name, "large", aux_num_out=5)
    with torch.device("meta"):
        return {"HuBERT Base": hubert_base, "WavLM Base": wavlm_base, "WavLM Large": wavlm_large}[name]().config


def model_of(config):
    with torch.device("meta"):
        return wav2vec2_model(**config)


@pytest.mark.parametrize("name", ["hubert", "wavlm", "HuBERT Base", "WavLM Base", "WavLM Large"])
def test_the_grid_has_all_pairs(name):
    """Every operation of the model has a full table up to its own sizes; what is bilinear is found again."""
    config = config_of(name)
    grid = profile.grid(config)
    assert len(grid) == 25

    def passes(one):
        return [[(len(op.key) + 1) * op.sizes[0] * op.sizes[1] for op in model_of(one).operations(80_000)]]

    tables = profile.prices(grid, [passes(one) for one in grid], 80_000)
    for operation in model_of(config).operations(80_000):
        sizes = tables[operation.key]["sizes"]
        assert (sizes[0][-1], sizes[1][-1]) == operation.sizes
    found = Profile({"batch": 1, "seconds": 5, "prices": tables})
    for shape in profile.checked_shapes(config).values():
        # At the smallest sizes, which the grid has not, rows of a formula without a constant are exact too.
        assert float(size_of(model_of(shape), found).latency) == pytest.approx(sum(passes(shape)[0]))
    whole, *others = map(model_of, profile.checked_shapes(config).values())
    assert whole.config | {"aux_num_out": None} == model_of(with_masks(config, ())).config | {"aux_num_out": None}
    assert len({int(model.get_num_params()) for model in others}) == 3
    if name == "HuBERT Base":
        assert tables["feed_forward frames=249"]["sizes"] == [[192, 384, 768, 1536, 3072], [192, 384, 768]]


def test_the_fastest_pass_counts():
    grid = profile.grid(config_of("hubert"))
    count = [len(model_of(one).operations(800)) for one in grid]
    times = [[[30.0] * n, [10.0] * n, [20.0] * n] for n in count]
    tables = profile.prices(grid, times, 800)
    assert {time for table in tables.values() for row in table["microseconds"] for time in row} == {10.0}
    assert {table["spread"] for table in tables.values()} == {1.0}


def test_liked_multiples():
    """Widths: 64, and less by 8, 4 and 2, which are half of 16, 8 and 4."""
    assert profile.liked_multiple([[[60.0, 40.0]], [[55.0, 40.0]], [[65.0, 45.0], [66.0, 40.0]], [[65.0, 40.0]]]) == 8
    assert profile.liked_multiple([[[60.0, 40.0]], [[60.0, 39.0]], [[63.0, 39.0]], [[62.0, 40.0]]]) == 1
    config = small_config("hubert", extractor_conv_layer_config=[[150, 10, 5], [140, 4, 4]])
    widths = [
        one["extractor_conv_layer_config"][1][0] for one in profile.steps(config | {"encoder_ff_interm_features": 200})
    ]
    assert widths == [64, 56, 60, 62]


@pytest.fixture
def teacher(tmp_path):
    path, model = tmp_path / "teacher.pth", random_model(small_config("wavlm"))
    checkpoint.save(path, {"config": model.config, "state_dict": model.state_dict()})
    return path


FLAGS = ("--backend", "torch", "--seconds", SECONDS, "--rounds", 2)


def test_a_profile_is_made_and_shown(tmp_path, monkeypatch, capsys, teacher):
    student, model = (
        tmp_path / "student.pth",
        random_model(
            small_config("wavlm", extractor_conv_layer_config=[[10, 10, 5], [12, 3, 2], [20, 3, 2], [9, 2, 2]])
        ),
    )
    checkpoint.save(student, {"config": model.config, "state_dict": model.state_dict()})
    out = tmp_path / "profiles" / "pi.json"
    run_script(monkeypatch, "benchmarks.profile", "--model", teacher, student, "--out", out, *FLAGS)
    printed = capsys.readouterr().out
    contents = read_profile(out)
    assert printed.count("ms expected") == len(contents["checked"]) == 8 and f"written to {out}" in printed
    assert list(out.parent.iterdir()) == [out] and contents["multiple"] in (1, 4, 8, 16)
    assert latency.is_this_machine(Profile(contents))
    reaches = {key: [sizes[-1] for sizes in table["sizes"]] for key, table in contents["prices"].items()}
    assert reaches["conv kernel=2 stride=2 norm=none frames=19"] == [20, 9]  # the student's, as it is the wider one
    for path in (teacher, student):
        size = size_of(checkpoint.load_model(path), Profile(contents))
        assert 0 < float(size.latency) < 1e6
    assert any(line.strip() == '"sizes": [' for line in out.read_text().splitlines())

    run_script(monkeypatch, "benchmarks.profile", "--model", teacher, "--show", out, "--pruning_units", "conv,attlayer")
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = {
        line[0]: [float(word.rstrip("%")) for word in line[1:4]] for line in words if len(line) > 3 and "%" in line[1]
    }
    kinds = ["conv", "projection", "positional", "attention", "feed_forward", "norms", "rest"]
    assert list(shares) == ["conv", *kinds[1:], "attlayer", "together"]  # the unit of this name replaced the part
    parts = [[float(word.rstrip("%")) for word in line[1:4]] for line in words[1:8]]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx([100] * 3, abs=0.4)
    without = small_config("wavlm", encoder_use_attention=[False] * 3)
    macs, kept = (model_of(config).get_num_macs(round(7.42 * 16_000)) for config in (small_config("wavlm"), without))
    assert parts[3][1] == shares["attlayer"][1] == pytest.approx(100 * (1 - kept / macs), abs=0.06)
    assert shares["together"][0] == pytest.approx(shares["conv"][0] + shares["attlayer"][0], abs=0.2)
    assert words[-1][:4] == ["out", "of", "reach", "below:"]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys, teacher):
    out, turns = tmp_path / "pi.json", []

    class Passes(latency.TorchPasses):
        def parts(self):
            turns.append(1)
            if len(turns) == 40:
                raise KeyboardInterrupt
            return super().parts()

    monkeypatch.setattr(latency, "TorchPasses", Passes)
    command = ("benchmarks.profile", "--model", teacher, "--out", out, *FLAGS)
    assert run_to_exit(monkeypatch, *command) == 130
    partial = tmp_path / "pi.json.partial"
    measured = json.loads((partial / "0" / "measured.json").read_text())
    assert not out.exists() and len(measured["rounds"]) == 1
    copied = shutil.copytree(partial, tmp_path / "copied")

    assert run_to_exit(monkeypatch, *command, "--batch", 2) == 1
    assert "pi.json.partial: begun with other settings or models; remove it" in error_line(capsys)
    (partial / "0" / "measured.json").write_text("{")
    assert run_to_exit(monkeypatch, *command) == 1
    assert "measured.json: not readable as JSON" in error_line(capsys)

    shutil.rmtree(partial)
    copied.rename(partial)
    turns.clear()
    turns.extend([1] * 50)
    run_script(monkeypatch, *command)
    assert len(turns) == 50 + 29 and read_profile(out)["batch"] == 1 and not partial.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backend", "onnx", "--device", "cuda"), "--backend onnx"),
        (("--backend", "onnx", "--precision", "16"), "--backend onnx"),
        (("--rounds", 0), "at least 1"),
        (("--seconds", 0), "--seconds"),
        (("--show", "x.json"), "not allowed with"),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, capsys, flags, message):
    command = ("benchmarks.profile", "--model", "none.pth", "--out", tmp_path / "x.json", *flags)
    assert run_to_exit(monkeypatch, *command) == 2 and message in capsys.readouterr().err


def test_what_cannot_be_shown(tmp_path, monkeypatch, capsys, teacher):
    (tmp_path / "x.json").write_text("{}")
    assert run_to_exit(monkeypatch, "benchmarks.profile", "--model", teacher, "--show", tmp_path / "x.json") == 1
    assert "x.json: not a profile of a machine" in error_line(capsys)
    assert (
        run_to_exit(monkeypatch, "benchmarks.profile", "--model", tmp_path / "none.pth", "--out", tmp_path / "y") == 1
    )
    assert "none.pth" in error_line(capsys)
