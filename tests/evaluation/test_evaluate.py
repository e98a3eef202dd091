"""evaluate.py as a command: its results and tables, and one line for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import REPOSITORY, error_line, one_layer_config, run_script, run_to_exit, save_small_model, task_contents

from evaluation.tables import Table, card_metrics, evaluation_tables, model_of_shape
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import wav2vec2_model
from wav2vec2.task_model import Head


@pytest.fixture
def files(save_student, tmp_path) -> dict[str, Path]:
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    students = [tmp_path / name / "student.pth" for name in "ab"]
    save_student(students[0], "layer2layer", seed=1)
    save_student(students[1], "predlayer", seed=2, encoder_ff_interm_features=[10, 11, 12])
    return {"teacher": teacher, "a": students[0], "b": students[1], "out": tmp_path / "results.json"}


def command(files: dict[str, Path], corpus: Path, **changes: object) -> list[object]:
    """Flags of a whole evaluation in seconds; a value of None leaves a flag out, a list gives several values."""
    flags = {
        "teacher": files["teacher"],
        "models": [files["a"], files["b"]],
        "names": ["first", "second"],
        "tsv": corpus / "valid.tsv",
        "distill_layers": "0.1,3",
        "probes": corpus / "pitch.tsv",
        "seeds": [0, 1],
        "speed_seconds": 0.1,
        "device": "cpu",
        "out": files["out"],
        **changes,
    }
    words: list[object] = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


@pytest.mark.slow
def test_evaluate(files, corpus, monkeypatch, capsys):
    """All of the schema, twice with the same numbers, and a table."""
    found = []
    for _ in range(2):
        run_script(monkeypatch, "evaluate", *command(files, corpus))
        results = json.loads(files["out"].read_text())
        assert results.pop("made_by").keys() == {"command", "versions", "device", "threads", "seeds"}
        for model in results["models"]:
            (speed,) = model["cost"].pop("speed")
            assert speed.keys() == {"seconds", "batch", "threads", "real_time_factor"}
        found.append(results)
    assert found[0] == found[1]
    results = found[0]
    assert results["teacher"] == "teacher"
    assert [(model["name"], model["is_teacher"]) for model in results["models"]] == [
        ("teacher", True),
        ("first", False),
        ("second", False),
    ]
    teacher, first, second = results["models"]
    assert teacher["fidelity"] is None
    assert (first["fidelity"]["mode"], second["fidelity"]["mode"]) == ("layer2layer", "predlayer")
    assert first["fidelity"]["tsv"] == str(corpus / "valid.tsv") and first["path"] == str(files["a"])
    assert {"layer", "l1", "cosine", "cka"} <= first["fidelity"]["layers"][0].keys()
    assert second["config"]["encoder_ff_interm_features"] == [10, 11, 12]
    assert second["cost"]["superb_macs"]["feed_forward"] < teacher["cost"]["superb_macs"]["feed_forward"]
    assert second["cost"].keys() == {"num_params", "params", "num_bytes", "macs_per_second", "superb_macs", "streaming"}
    wav2vec2_model(**first["config"])
    assert results["probes"] == {
        "pitch": {"kind": "clips", "metric": "accuracy", "num_classes": 2, "num_train": 20, "num_test": 8, "chance": 50}
    }
    assert results["controls"].keys() == {"log-mel", "random weights"}
    assert results["controls"]["log-mel"]["pitch"]["mean"] == 100  # low and high tones
    for probed in (teacher["probes"], second["probes"], results["controls"]["random weights"]):
        assert len(probed["pitch"]["values"]) == 2 and len(probed["pitch"]["layer_weights"]) == 4

    printed = capsys.readouterr().out
    assert f"{teacher['cost']['num_params']:,}" in printed and "SUPERB-style MACs" in printed
    assert f"{first['fidelity']['layers'][1]['cka']:.3f}" in printed
    assert "100.0 ± 0.0" in printed and str(files["out"]) in printed

    # The numbers on a model's card.
    model = model_of_shape(results, second["config"], files["b"])
    assert model == second
    values = {
        (each["dataset_name"], each["metric_type"]): each["metric_value"] for each in card_metrics(results, model)
    }
    cosine = np.mean([layer["cosine"] for layer in second["fidelity"]["layers"]])
    probed = second["probes"]["pitch"]["mean"]
    expected = {("pitch", "accuracy"): probed, ("valid", "cosine_with_the_teacher"): cosine}
    assert values == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match=r"0 of its models \(teacher, first, second\) have the shape of other\.pth"):
        model_of_shape(results, {**second["config"], "encoder_num_layers": 7}, Path("other.pth"))


def test_teacher_alone_without_probes(files, corpus, tmp_path, monkeypatch, capsys):
    """Without --out the tables are printed, and nothing is written."""
    changes = {**dict.fromkeys(("models", "names", "tsv", "probes")), "speed_seconds": []}
    before = sorted(tmp_path.rglob("*"))
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes, out=None))
    printed = capsys.readouterr().out
    assert "SUPERB-style MACs" in printed and "written to" not in printed
    assert sorted(tmp_path.rglob("*")) == before
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes))
    results = json.loads(files["out"].read_text())
    (teacher,) = results["models"]
    assert teacher["probes"] == results["controls"] == results["probes"] == {} and teacher["cost"]["speed"] == []


def test_a_place_that_cannot_be_written(files, corpus, tmp_path, monkeypatch, capsys):
    """It is said before anything is measured; what is measured is shown, as it may have taken hours."""
    changes = {**dict.fromkeys(("models", "names", "tsv", "probes")), "speed_seconds": []}
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "evaluate", *command(files, corpus, **changes, out=tmp_path)) == 1
    printed = capsys.readouterr()
    first, *_, last = printed.err.splitlines()
    assert first.startswith(f"warning: {tmp_path}: could not be written ([Errno 21] Is a directory); mend that, or")
    assert last.startswith(f"error: {tmp_path}: could not be written (") and "SUPERB-style MACs" in printed.out


@pytest.mark.slow
def test_backends(files, corpus, save_student, monkeypatch, capsys):
    """Each export is timed and probed; float32 knows what PyTorch knows."""
    pytest.importorskip("onnxruntime")
    model = save_student(files["a"], None, **one_layer_config("hubert"))
    changes = {"teacher": None, "models": model, "names": "first", "tsv": None, "seeds": 0}
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes, backends="torch,onnx,onnx-int8"))
    plain, onnx, int8 = json.loads(files["out"].read_text())["models"]
    assert [each["name"] for each in (plain, onnx, int8)] == ["first", "first (onnx)", "first (onnx-int8)"]
    assert onnx["backend"] == "onnx" and not onnx["is_teacher"]
    assert all(each["cost"]["speed"][0]["real_time_factor"] > 0 for each in (plain, onnx, int8))
    found, expected = (each["probes"]["pitch"] for each in (onnx, plain))
    assert found["mean"] == expected["mean"]
    assert found["layer_weights"] == pytest.approx(expected["layer_weights"], abs=1e-3)
    assert "first (onnx-int8)" in capsys.readouterr().out


@pytest.mark.slow
def test_own_heads_are_scored_beside_the_probes(files, corpus, monkeypatch, capsys):
    """On lists that they fit, which are read in their units."""
    heads = {
        "clips": Head("clips", ("high", "none", "low"), pooling="mean"),
        "text": Head("text", ("a", "b"), units="words"),
    }
    paths = [files["out"].with_name(f"{name}.pth") for name in heads]
    for path, head in zip(paths, heads.values(), strict=True):
        checkpoint.save(path, task_contents(head))
    changes = {"teacher": None, "tsv": None, "names": None, "models": [files["teacher"], *paths], "seeds": 0}
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes | {"speed_seconds": []}))
    results = json.loads(files["out"].read_text())
    plain, clips, text = results["models"]
    assert plain["head"] is None
    assert (clips["head"]["kind"], clips["head"]["labels"]) == ("clips", ["high", "none", "low"])
    score = clips["head"]["scores"]["pitch"]
    assert score["metric"] == "accuracy" and score["interval"][0] <= score["mean"] <= score["interval"][1]
    reason = "its head is one of text, the list one of clips"
    assert text["head"]["scores"] == {} and text["head"]["left_out"] == {"pitch": reason}
    printed = capsys.readouterr().out
    assert "Own heads:" in printed and f"{score['mean']:.1f} [" in printed
    assert f"text is not scored on pitch: {reason}" in printed
    for model in results["models"]:
        del model["head"]  # as older results are
    assert "Own heads" not in [table.title for table in evaluation_tables(results)]


def test_tables_show_names_as_text():
    """Names keep their columns, whatever they hold."""
    table = Table("T", ["", "a\nb"], [["\x1b[2J\n", "1"], ["聲\udcff", "22"]], ["\u202e"])
    width = len(r"\x1b[2J\n")
    assert str(table).splitlines() == [
        "T:",
        " " * width + r"  a\nb",
        r"\x1b[2J\n" + "     1",
        r"聲\udcff".ljust(width) + "    22",
        r"\u202e",
    ]


def test_names_of_files_that_are_called_alike(files, corpus, monkeypatch):
    changes = {"names": None, "tsv": None, "teacher": None, "speed_seconds": [], "probes": None}
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes))
    results = json.loads(files["out"].read_text())
    assert [model["name"] for model in results["models"]] == [str(files["a"]), str(files["b"])]
    assert results["teacher"] is None and not any(model["is_teacher"] for model in results["models"])


def test_bad_input_ends_before_anything_is_measured(files, corpus, save_student, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "0.wav", np.zeros(4000), 16_000)
    (tmp_path / "text.tsv").write_text("no manifest\nat all\n")
    (tmp_path / "missing.tsv").write_text(f"{tmp_path}\n0.wav\t4000\n1.wav\t4000\n")
    (tmp_path / "pitch.tsv").write_text("")
    (tmp_path / "one.tsv").write_text((corpus / "pitch.tsv").read_text().replace("\thigh", "\tlow"))
    nested = tmp_path / "nested" / "pitch.tsv"
    nested.parent.mkdir()
    nested.write_text((corpus / "pitch.tsv").read_text())
    for clip in corpus.glob("*-*.wav"):
        for folder in (tmp_path, nested.parent):
            (folder / clip.name).symlink_to(clip)
    slow = save_student(tmp_path / "slow.pth", None, extractor_conv_layer_config=[[10, 10, 5], [12, 3, 2], [8, 3, 2]])

    def measure(*_: object) -> None:
        raise AssertionError("measured in spite of bad input")

    monkeypatch.setattr("evaluation.measure.measure_speed", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changes, message in (
        ({"teacher": None, "models": None, "names": None}, "--models: nothing to measure"),
        ({"names": "x"}, "--names: 1 names for 2 models"),
        ({"names": ["x", "x"]}, "--names: two are called x"),
        ({"teacher": None}, "--tsv: fidelity compares"),
        ({"models": tmp_path / "none.pth", "names": None}, "none.pth"),
        ({"tsv": tmp_path / "none.tsv"}, "none.tsv: no such file"),
        ({"tsv": tmp_path / "text.tsv"}, "text.tsv: line 2 is"),
        ({"tsv": tmp_path / "missing.tsv"}, f"missing.tsv: {tmp_path / '1.wav'} does not exist"),
        ({"max_seconds": 0.01}, "valid.tsv: none of 4 utterances lasts"),
        ({"distill_layers": "0.5"}, "layer 5 is to be distilled"),
        ({"distill_layers": "x"}, "--distill_layers: expected layers"),
        ({"models": slow, "names": None}, "slow.pth: the student's frames do not fit"),
        ({"probes": tmp_path / "none.tsv"}, "none.tsv: no such file"),
        ({"probes": tmp_path / "pitch.tsv"}, "pitch.tsv: line 1 is []"),
        ({"probes": tmp_path / "one.tsv"}, "one.tsv: the training clips have one label"),
        ({"probes": [corpus / "pitch.tsv", nested]}, "--probes: two are called pitch"),
        ({"speed_seconds": 0.01}, "--speed_seconds 0.01: expected at least 0.1"),
        ({"seeds": -1}, "--seeds -1"),
        ({"seeds": [1, 1]}, "--seeds: expected every seed once"),
        ({"threads": 0}, "--threads 0"),
        ({"backends": "torch,onnx,tflite"}, "--backends torch,onnx,tflite: expected torch, and each once of"),
        ({"backends": "onnx"}, "--backends onnx: expected torch"),
        ({"device": "cuda"}, "--device cuda: torch finds no GPU"),
    ):
        assert run_to_exit(monkeypatch, "evaluate", *command(files, corpus, **changes)) == 1
        line = error_line(capsys)
        assert message in line, (message, line)
        assert not files["out"].exists()


def test_bad_audio_in_a_manifest(files, corpus, tmp_path, monkeypatch, capsys):
    """It is not replaced by another, as in training, but named."""
    soundfile.write(tmp_path / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(4000), 16_000)
    soundfile.write(tmp_path / "bad.wav", np.full(4000, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "valid.tsv").write_text(f"{tmp_path}\ngood.wav\t4000\nbad.wav\t4000\n")
    changes = {"tsv": tmp_path / "valid.tsv", "probes": None}
    assert run_to_exit(monkeypatch, "evaluate", *command(files, corpus, **changes)) == 1
    assert "bad.wav: 4000 of samples 0 to 4000 (at 16 kHz) are NaN" in error_line(capsys)
    assert not files["out"].exists()


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("evaluate.py", ["--help"]),
        ("evaluate.py", ["--models", "x.pth", "--seeds", "-1"]),
        ("report/__main__.py", ["--help"]),
    ],
)
def test_flags_are_read_without_torch(script, flags):
    """And refused without it: importing it takes seconds."""
    code = f"""if True:
        import runpy, sys
        sys.path.insert(0, "."); sys.argv = {[script, *flags]}
        try:
            runpy.run_path("{script}", run_name="__main__")
        except SystemExit:
            print(*sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    modules = set(result.stdout.split())
    assert "argparse" in modules
    assert not modules & {"torch", "pytorch_lightning", "torchaudio", "matplotlib", "transformers", "scipy", "jinja2"}
