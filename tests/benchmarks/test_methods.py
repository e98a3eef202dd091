"""benchmarks/methods.sh: its rows, its jobs, and the table that is made of what they leave."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, error_line, random_model, run_command, run_script, run_to_exit, small_config

from benchmarks import methods, students
from evaluation.scores import Scored, figure_of_merit
from labels.scores import Share
from wav2vec2.files import checkpoint
from wav2vec2.model import wav2vec2_model

# The fake python below does not read them.
LISTS = ("README.md", "LICENSE")

# What a python does that leaves the files of each stage, and nothing else. $FAIL names runs that fail in prune.py.
FAKE = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
out='' last=''
for word in "$@"; do
    [[ $last != --out ]] || out=$word
    [[ $last != --ckpt_after_final_distill ]] || model=${word%last.ckpt}pruned_hubert_base.pth
    last=$word
done
case $1\\ $2 in
    prepare_data.py*) mkdir -p "$out" && touch "$out/valid.tsv" ;;
    convert*) touch "$out" ;;
    -m\\ benchmarks.students) mkdir -p "$out" && touch "$out"/{half_width,fithubert}-0.75.json ;;
    distill.py*) [[ -z ${SLEEP-} ]] || { trap 'kill $!; echo stopped >>"$CALLS"; exit 143' TERM; sleep 100 & wait; } ;;
    prune.py*) [[ -z ${FAIL-} || "$*" != *$FAIL* ]] || exit 3 ;;
    save*) mkdir -p "${model%/*}" && touch "$model" ;;
    evaluate.py*) echo '{}' >"$out" ;;
esac
"""


@pytest.fixture
def setting(tmp_path) -> dict[str, object]:
    """The environment of the script, with the fake python."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    out = {"OUT": tmp_path / "out", "CALLS": tmp_path / "calls", "python": fake}
    return {
        "TEACHER": "HF",
        "LAYERS": "0.2,4",
        "DATA": tmp_path / "C",
        "ROWS": "published exact",
        "SIZES": "0.75 0.9",
        **out,
    }


def script(*arguments: object, **environment: object) -> subprocess.CompletedProcess:
    return run_command("bash", "benchmarks/methods.sh", *arguments, **environment)


def calls(setting: dict[str, Any], name: str) -> list[str]:
    """The commands of one kind since the last look."""
    lines = setting["CALLS"].read_text().splitlines()
    return [line for line in lines if line.startswith(name)]


@pytest.mark.slow
def test_each_run_is_trained_and_measured_once(setting):
    result = script(*LISTS, **setting)
    assert result.returncode == 0, result.stderr
    trained = calls(setting, "distill.py")
    assert len(trained) == 8
    for size in ("0.75", "0.9"):
        for seed in ("0", "1"):
            (exact,) = (line for line in trained if f"/exact-{size}-{seed} " in line)
            assert f"--distill_layers 0.2,4 --tsv_dir {setting['OUT']}/data" in exact
            assert exact.endswith(f"--seed {seed}") and f"--target_sparsity {size} --sparsity_control exact" in exact
    measured = calls(setting, "evaluate.py")
    assert (
        sum(f"--probes {LISTS[0]} {LISTS[1]}" in line for line in measured) == 9
    )  # the teacher, and each run without it
    assert sum("--no_controls" in line and "--teacher" not in line for line in measured) == 8
    assert sum("--tsv" in line and "--distill_layers 0.2,4" in line for line in measured) == 8
    (times,) = (line for line in measured if "--speed_seconds 10" in line)
    assert f"--models {setting['OUT']}/exact-0.75-0/final/ckpts/pruned_hubert_base.pth " in times
    assert "--names exact-0.75-0 exact-0.75-1 exact-0.9-0" in times
    assert calls(setting, "-m benchmarks.methods") == [f"-m benchmarks.methods {setting['OUT']}"]
    lines = result.stdout.splitlines()
    assert sum(line.endswith("seed 1: done in 0 min") for line in lines) == 4 and "10/10 speed: done in 0 min" in lines
    assert not calls(setting, "prepare_data.py")[1:]

    setting["CALLS"].unlink()
    again = script(*LISTS, **setting)
    assert "9/9 are complete" in again.stdout
    assert not calls(setting, "distill.py") and not calls(setting, "evaluate.py")
    (setting["OUT"] / "exact-0.9-0/evaluation.json").touch()  # the times are of before
    script(*LISTS, **setting)
    (times,) = calls(setting, "evaluate.py")
    assert "--speed_seconds 10" in times


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(setting):
    result = script(LISTS[0], **setting, FAIL="exact-0.75")
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == ["failed: exact 0.75 seed 0", "failed: exact 0.75 seed 1"]
    assert sum("failed after 0 min with status 3, see" in line for line in result.stdout.splitlines()) == 2
    assert len(list(setting["OUT"].glob("*/evaluation.json"))) == 6
    setting["CALLS"].unlink()
    assert script(LISTS[0], **setting).returncode == 0  # mended
    assert len(calls(setting, "distill.py")) == 2 and len(list(setting["OUT"].glob("*/evaluation.json"))) == 8


@pytest.mark.slow
def test_training_and_measuring_apart(setting):
    result = script("--train-only", **setting)
    assert result.returncode == 0, result.stderr
    assert len(calls(setting, "distill.py")) == 8 and not calls(setting, "evaluate.py")
    assert "8/8 are complete" in script("--train-only", **setting).stdout
    setting["CALLS"].unlink()
    (setting["OUT"] / "exact-0.9-1/final/ckpts/pruned_hubert_base.pth").unlink()
    result = script("--evaluate-only", LISTS[0], **setting)
    assert result.returncode == 0, result.stderr
    assert "exact 0.9 seed 1: left out, it is not trained yet" in result.stdout
    assert not calls(setting, "distill.py") and len(list(setting["OUT"].glob("*/evaluation.json"))) == 7


@pytest.mark.slow
def test_dry_run_shows_all_and_writes_nothing(setting):
    result = script("--dry-run", LISTS[0], **setting)
    assert result.returncode == 0, result.stderr
    assert not setting["OUT"].exists() and not setting["CALLS"].exists()
    shown = [line.split()[1:] for line in result.stdout.splitlines()]
    by_hand = [words for words in shown if words[0] == "env"]
    assert len(by_hand) == 8
    # What it shows can be run: the command makes the same ones again.
    command = next(words for words in by_hand if f"exp_dir={setting['OUT']}/exact-0.9-1" in words)
    place = command.index("run.sh")
    found = run_command(*command[: place + 1], "--print", *command[place + 1 :], python=setting["python"]).stdout
    assert found and all(f"    {line}" in result.stdout.splitlines() for line in found.splitlines())


@pytest.mark.slow
def test_stopped_runs_save_first(setting):
    environment = os.environ | {name: str(value) for name, value in {**setting, "SLEEP": 1}.items()}
    process = subprocess.Popen(["bash", "benchmarks/methods.sh", LISTS[0]], cwd=REPOSITORY, env=environment)
    while not setting["CALLS"].exists() or len(calls(setting, "distill.py")) < 2:  # two side by side
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert len(calls(setting, "stopped")) == len(calls(setting, "distill.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "give lists of labelled clips"),
        (["--evaluate_only", LISTS[0]], {}, "--evaluate_only: expected --dry-run, --train-only or --evaluate-only"),
        ([LISTS[0]], {"ROWS": "published exakt"}, "ROWS: exakt is none of: published exact"),
        (["--train-only", "--evaluate-only"], {}, "leave nothing to do"),
        ([LISTS[0]], {"OUT": ""}, "OUT"),
        ([LISTS[0]], {"LAYERS": "0-2-4"}, "LAYERS: expected layers such as 0.2,4, found 0-2-4"),
        ([LISTS[0]], {"JOBS": "0"}, "JOBS: expected a number from 1, found 0"),
        (["c.tsv"], {}, "c.tsv: no such file in"),
    ],
)
def test_bad_settings(setting, arguments, changes, message):
    result = script(*arguments, **setting | changes)
    assert result.returncode == 1 and message in result.stderr
    assert not setting["CALLS"].exists()


def value(command: list[str], flag: str) -> str:
    """Of a flag, the last one counts."""
    return command[len(command) - command[::-1].index(f"--{flag}")]


def rows() -> list[str]:
    lines = (REPOSITORY / "benchmarks/methods.sh").read_text().splitlines()
    values = [line.partition("=")[2] for line in lines if line.startswith(("all_rows=", "other_rows="))]
    return [row for value in values for row in shlex.split(value, comments=True)[0].split()]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_every_row_makes_as_many_updates_of_as_much_audio(row, monkeypatch):
    settings = {"size": "0.9", "layers": "0.2,4", "students": "S", "exp_dir": "E", "teacher_ckpt": "T"}
    result = run_command("bash", "run.sh", "--print", "benchmarks/methods.conf", row=row, **settings)
    assert result.returncode == 0, result.stderr
    updates = 0
    for command in (shlex.split(line)[2:] for line in result.stdout.splitlines()):
        if command[0] in ("distill.py", "final_distill.py"):
            monkeypatch.setattr(sys, "argv", command)
            importlib.import_module(command[0].removesuffix(".py")).parse_args()
            assert value(command, "seconds_per_batch") == "16" and value(command, "max_crop_seconds") == "4"
            updates += int(value(command, "max_updates"))
            updates += int(value(command, "extractor_updates")) if "--student_extractor" in command else 0
    assert updates == {"longer": 8800, "shorter": 550}.get(row.rpartition("_")[2], 2200)


# --- students --------------------------------------------------------------------------------------

TEACHER = small_config(
    "hubert",
    encoder_embed_dim=48,
    encoder_num_layers=6,
    **{key: [True] * 6 for key in ("encoder_use_attention", "encoder_use_feed_forward")},
    encoder_num_heads=[6] * 6,
    encoder_ff_interm_features=[192] * 6,
)


@pytest.mark.parametrize("size", [0.75, 0.9])
def test_students_use_their_budget_up(size):
    budget = (1 - size) * wav2vec2_model(**TEACHER).get_num_params()
    found = students.students(TEACHER, budget)
    for method, changes in found.items():
        count = changes["encoder_ff_interm_features"]
        assert students.num_params(TEACHER, changes) <= budget
        more = students.num_params(TEACHER, {**changes, "encoder_ff_interm_features": count + 1})
        assert more > budget or (method == "distilhubert" and count == 192)
    assert found["distilhubert"]["encoder_num_layers"] == 1
    wide, thin = ((each["encoder_embed_dim"], each["encoder_ff_interm_features"]) for each in list(found.values())[1:])
    assert 2.5 < wide[1] / wide[0] < 6 and 0.6 < thin[1] / thin[0] < 1.7 and wide[0] < thin[0] < 48


def test_a_students_size_is_that_of_its_model():
    changes = {"encoder_num_layers": 2, "encoder_ff_interm_features": 7}
    lists = {"encoder_use_attention": [True] * 2, "encoder_use_feed_forward": [True] * 2, "encoder_num_heads": [6] * 2}
    config = {**TEACHER, **changes, **lists, "encoder_ff_interm_features": [7, 7]}
    assert students.num_params(TEACHER, changes) == wav2vec2_model(**config).get_num_params()


def test_student_files(tmp_path, monkeypatch, capsys):
    model = random_model(TEACHER)
    checkpoint.save(tmp_path / "teacher.pth", {"state_dict": model.state_dict(), "config": model.config})
    flags = ("--teacher_ckpt", tmp_path / "teacher.pth", "--out", tmp_path / "students", "--sizes")
    run_script(monkeypatch, "benchmarks.students", *flags, 0.75, 0.99)
    assert {path.name for path in (tmp_path / "students").iterdir()} == {
        f"{method}-0.75.json" for method in ("distilhubert", "half_width", "fithubert")
    }
    assert json.loads((tmp_path / "students/distilhubert-0.75.json").read_text())["encoder_num_layers"] == 1
    assert "distilhubert 0.99: left out, no such student has" in capsys.readouterr().out
    assert run_to_exit(monkeypatch, "benchmarks.students", *flags, "75%") == 1
    assert "--sizes: expected numbers between 0 and 1, found '75%'" in error_line(capsys)


# --- the table -------------------------------------------------------------------------------------


def entry(params: int, scores: dict[str, float], **more: Any) -> dict[str, Any]:
    """Of a model in a results file."""
    cost = {"num_params": params, "macs_per_second": {"total": 50e6}}
    return {"name": "m", "cost": cost, "probes": {name: {"mean": value} for name, value in scores.items()}, **more}


def write(path: Path, **contents: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


@pytest.fixture
def out(tmp_path) -> Path:
    """Two seeds of one method, one of another that was not timed, and a run that is not measured yet."""
    quality = {"mean": 100, "probes": {"phones": 100, "errors": 100}}
    write(
        tmp_path / "teacher.json",
        models=[entry(8000, {"phones": 60, "errors": 20, "speakers": 90}, quality=quality)],
        controls={
            name: {probe: {"mean": value} for probe, value in scores.items()}
            for name, scores in {
                "log-mel": {"phones": 20, "errors": 100, "speakers": 95},
                "random weights": {"phones": 10, "errors": 110, "speakers": 50},
            }.items()
        },
        probes={name: {"metric": "accuracy"} for name in ("phones", "errors", "speakers")},
        left_out={"speakers": "teacher is not better than log-mel by more than chance"},
    )
    for name, params, phones in (("exact-0.9-0", 800, 40), ("exact-0.9-1", 802, 48), ("published-0.9-0", 799, 30)):
        write(
            tmp_path / name / "evaluation.json",
            models=[entry(params, {"phones": phones, "errors": 60, "speakers": 93})],
        )
    layers = [{"layer": 2, "cosine": 0.9, "cka": 0.8}, {"layer": 4, "cosine": 0.7, "cka": None}]
    write(tmp_path / "exact-0.9-0/fidelity.json", models=[entry(1, {}), entry(800, {}, fidelity={"layers": layers})])
    timed = {"teacher": 0.04, "exact-0.9-0": 0.01, "exact-0.9-1": 0.03}
    write(
        tmp_path / "speed.json",
        models=[{"name": name, "cost": {"speed": [{"real_time_factor": rtf}]}} for name, rtf in timed.items()],
    )
    (tmp_path / "star-0.9-0").mkdir()
    (tmp_path / "data").mkdir()
    return tmp_path


def test_table_and_pictures(out, monkeypatch, capsys):
    run_script(monkeypatch, "benchmarks.methods", out)
    text = (out / "methods.md").read_text()
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line)
    assert [line[0] for line in lines] == ["teacher", "exact", "published", "log-mel", "random weights"]
    teacher, exact, published, log_mel, _ = (dict(zip(header, line, strict=True)) for line in lines)
    # By hand: (40 - 20) / 40 and (48 - 20) / 40 of phones, (60 - 100) / -80 of errors, and no speakers.
    assert exact["quality"] == "55.0 [50.0, 60.0]" and exact["phones: accuracy"] == "44.0 [40.0, 48.0]"
    assert (exact["parameters"], exact["M MACs a second"], exact["RTF"]) == ("801", "50", "0.0200")
    assert (exact["cosine"], exact["CKA"], exact["off"], exact["seeds"]) == ("0.700", "", "0.9", "2")
    assert (published["RTF"], published["cosine"], published["quality"], published["seeds"]) == ("", "", "37.5", "1")
    assert (teacher["quality"], log_mel["quality"], log_mel["parameters"]) == ("100.0", "0.0", "")
    printed = capsys.readouterr().out
    assert "left out: 1 of 4 runs have no evaluation.json yet: star-0.9-0" in printed
    assert "speakers is left out of the quality: teacher is not better" in printed
    for number, words in ((1, ("exact", "published")), (2, ("exact",))):
        picture = (out / f"methods-{number}.svg").read_text()
        assert all(f">{word}<" in picture for word in words)
        assert ">teacher<" not in picture
    assert ">published<" not in picture


def test_quality_is_that_of_evaluate():
    """Of the same scores, as far as evaluate.py counts them."""
    generator = np.random.default_rng(0)

    def scored(share: float) -> Scored:
        return Scored([Share((generator.random(200) < share).astype(float), np.ones(200))], 200)

    shares = {"teacher": (0.9, 0.3, 0.5), "model": (0.7, 0.5, 0.6), "log-mel": (0.4, 0.8, 0.5)}
    scores = {name: dict(zip("abc", map(scored, each), strict=True)) for name, each in shares.items()}
    merit, left_out = figure_of_merit(scores, {"a": True, "b": False, "c": True}, "teacher", "log-mel")
    assert left_out.keys() == {"c"}
    summary = {name: {probe: each.summary() for probe, each in found.items()} for name, found in scores.items()}
    model = {"probes": summary["teacher"], "quality": merit["teacher"]}
    quality = methods.quality_of({"models": [model], "controls": {"log-mel": summary["log-mel"]}})
    for name in shares:
        assert quality(methods.scores_of(summary[name])) == pytest.approx(merit[name]["mean"], abs=1e-9)


def test_bad_folders(out, monkeypatch, capsys):
    write(out / "star-0.9-0/evaluation.json", models=[entry(1, {"phones": 40})])
    assert run_to_exit(monkeypatch, "benchmarks.methods", out) == 1
    message = error_line(capsys)
    assert message.startswith(f"{out}/star-0.9-0/evaluation.json: its probes are phones, the teacher's phones, errors")
    write(out / "star-0.9-0/evaluation.json", models=[{}])
    assert run_to_exit(monkeypatch, "benchmarks.methods", out) == 1
    assert f"{out}: its files are not the results of benchmarks/methods.sh (KeyError: 'probes')" in error_line(capsys)
    (out / "star-0.9-0/evaluation.json").write_text("{")
    assert run_to_exit(monkeypatch, "benchmarks.methods", out) == 1
    assert "star-0.9-0/evaluation.json: not the JSON that evaluate.py writes" in error_line(capsys)
    (out / "teacher.json").unlink()
    assert run_to_exit(monkeypatch, "benchmarks.methods", out) == 1
    assert "teacher.json: does not exist, expected the JSON that evaluate.py writes" in error_line(capsys)
