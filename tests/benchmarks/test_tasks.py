"""benchmarks/tasks.sh: its recipes, and the table that is made of what they reach."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import error_line, random_model, run_command, run_script, run_to_exit, small_config

import distill
import final_distill
import finetune
from wav2vec2.files import checkpoint

SCRIPTS = {"distill.py": distill, "final_distill.py": final_distill, "finetune.py": finetune}


@pytest.fixture
def setting(tmp_path) -> dict[str, object]:
    """The environment of the script, with one model compressed without labels."""
    model = tmp_path / "methods/units_shorter-0.9-0/final/ckpts/pruned_hubert_base.pth"
    model.parent.mkdir(parents=True)
    model.touch()
    return {"METHODS": tmp_path / "methods", "LAYERS": "0.2,4", "OUT": tmp_path / "out", "SEEDS": "0"}


def updates(command: list[str], monkeypatch) -> int:
    """What one training makes, after a look at its flags."""
    monkeypatch.setattr(sys, "argv", command)
    return SCRIPTS[command[0]].parse_args().max_updates


@pytest.mark.slow
def test_recipes_make_as_many_updates(setting, monkeypatch):
    result = run_command("bash", "benchmarks/tasks.sh", "--dry-run", "README.md", **setting)
    assert result.returncode == 0, result.stderr
    assert not setting["OUT"].exists()
    made = {}
    for line in result.stdout.splitlines():
        words = shlex.split(line.removeprefix("+"))
        if words[0] == "env":
            recipe = words[1].partition("=")[2]
            place = words.index("run.sh")
            shown = run_command(*words[: place + 1], "--print", *words[place + 1 :], teacher_ckpt="T").stdout
            commands = [shlex.split(line.removeprefix("+"))[1:] for line in shown.splitlines()]
        elif words[1] == "finetune.py":
            recipe = re.search(r"(\w+)-README", words[words.index("--exp_dir") + 1]).group(1)
            commands = [words[1:]]
        else:
            continue
        made[recipe] = [updates(command, monkeypatch) for command in commands if command[0] in SCRIPTS]
    assert made == {
        "compressed": [100],  # behind the 550 of the row units_shorter
        "compressed_longer": [650],
        "finetune_first": [100, 250, 300, 100],
        "by_task": [550, 100],
        "scratch": [650],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "give lists of labelled clips"),
        (["README.md"], {"RECIPES": "scratched"}, "RECIPES: scratched is none of: compressed"),
        (["README.md"], {"SEEDS": "0 1"}, "make it by ROWS=units_shorter SIZES=0.9 SEEDS=1"),
        (["c.tsv"], {}, "c.tsv: no such file in"),
    ],
)
def test_bad_settings(setting, arguments, changes, message):
    result = run_command("bash", "benchmarks/tasks.sh", *arguments, **setting | changes)
    assert result.returncode == 1 and message in result.stderr


def reached(folder: Path, score: float) -> None:
    """What finetune.py leaves in a folder."""
    folder.mkdir(parents=True)
    model = random_model(small_config("hubert"))
    checkpoint.save(folder / "finetuned.pth", {"config": model.config, "state_dict": model.state_dict()})
    test = {"metric": "accuracy", "value": score, "interval": [score - 2, score + 1]}
    (folder / "finetuned.json").write_text(json.dumps({"test": test}))


def test_table(tmp_path, monkeypatch, capsys):
    for seed, score in enumerate((90.0, 93.0)):
        reached(tmp_path / f"finetune_first-spoken-digits-{seed}/finetuned", score)
        reached(tmp_path / f"finetune_first-spoken-digits-{seed}/teacher", 97.0)
    reached(tmp_path / "scratch-spoken-digits-0/finetuned", 50.0)
    reached(tmp_path / "scratch-words-0/finetuned", 20.0)
    run_script(monkeypatch, "benchmarks.tasks", tmp_path)
    num_params = f"{random_model(small_config('hubert')).get_num_params():,}"
    lines = (tmp_path / "tasks.md").read_text().splitlines()
    assert lines[0] == "|  | parameters | spoken-digits: accuracy | words: accuracy | seeds |"
    assert lines[2:5] == [
        f"| teacher | {num_params} | 97.0 [97.0, 97.0] ±1.5 |  | 2 |",
        f"| finetune_first | {num_params} | 91.5 [90.0, 93.0] ±1.5 |  | 2 |",
        f"| scratch | {num_params} | 50.0 ±1.5 | 20.0 ±1.5 | 1 |",
    ]
    (tmp_path / "scratch-words-0/finetuned/finetuned.json").write_text("{}")
    run_to_exit(monkeypatch, "benchmarks.tasks", tmp_path)
    assert "scratch-words-0/finetuned/finetuned.json: not the result of finetune.py" in error_line(capsys)
