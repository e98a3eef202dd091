"""Every command and code block of the README and of the guides in docs/ is one that works."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from helpers import REPOSITORY, random_model, random_waveforms, small_config

from wav2vec2.files import checkpoint

README = (REPOSITORY / "README.md").read_text()
GUIDES = ("running", "reliability", "using", "measuring")
PAGES = README + "".join((REPOSITORY / "docs" / f"{name}.md").read_text() for name in GUIDES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The lines of the bash blocks as words, continuation lines joined, comments dropped."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_settings(command: list[str]) -> list[str]:
    """A command without the NAME=VALUE words before it."""
    while command and "=" in command[0]:
        command = command[1:]
    return command


def starting_with(*first: str) -> list[list[str]]:
    found = [command for command in commands() if without_settings(command)[0] in first]
    assert found, first
    return found


@pytest.mark.parametrize("command", starting_with("python"), ids=lambda command: " ".join(command)[:60])
def test_script_flags(command, monkeypatch):
    is_module = command[1] == "-m"
    monkeypatch.setattr(sys, "argv", command[1 + is_module :])
    if command[1:3] != ["-m", "venv"]:
        name = command[1 + is_module].removesuffix(".py")
        is_package = is_module and (REPOSITORY / name).is_dir()
        importlib.import_module(f"{name}.__main__" if is_package else name).parse_args()


def running(script: str) -> list[list[str]]:
    return [command for command in starting_with("bash", "sbatch") if script in command]


BENCHMARKS = ("benchmarks/methods.sh", "benchmarks/tasks.sh")


def test_every_shell_script_is_covered():
    assert sum(len(running(script)) for script in ("run.sh", *BENCHMARKS)) == len(starting_with("bash", "sbatch"))


@pytest.mark.parametrize("command", [command for script in BENCHMARKS for command in running(script)], ids=" ".join)
def test_benchmark_commands(command, tmp_path):
    (script,) = set(command).intersection(BENCHMARKS)
    settings = dict(word.split("=", 1) for word in command if "=" in word) | {"OUT": str(tmp_path), "ROWS": "published"}
    lists = [str(tmp_path / name) for name in command[command.index(script) + 1 :]]
    for path in map(Path, lists):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    result = subprocess.run(
        ["bash", script, "--dry-run", *lists],
        cwd=REPOSITORY,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    flag = "--probes" if script == BENCHMARKS[0] else "--tsv"
    assert f"{flag} {' '.join(lists)}" in result.stdout


@pytest.mark.parametrize("command", running("run.sh"), ids=" ".join)
def test_run_sh_commands(command):
    settings = dict(word.split("=", 1) for word in command[: len(command) - len(without_settings(command))])
    words = [word for word in without_settings(command)[1:] if word != "--print"]
    words = words[words.index("run.sh") + 1 :]  # sbatch has options of its own before it
    result = subprocess.run(
        ["bash", "run.sh", "--print", *words],
        cwd=REPOSITORY,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for word in (*settings.values(), *words[1:]):
        assert f"'{word}'" in result.stdout


@pytest.mark.parametrize("command", starting_with("make"), ids=" ".join)
def test_make_targets(command):
    result = subprocess.run(["make", "-n", *command[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_command_is_covered():
    """A new kind of command in the README needs a test here."""
    known = {"python", "python3", "source", "pip", "make", "bash", "sbatch"}
    assert {without_settings(command)[0] for command in commands()} <= known


def test_paths_exist():
    folders = "conf|demo|tests|benchmarks|wav2vec2|evaluation|report|labels|exporters|examples|s3prl_upstream|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*|[\w-]+\.(?:py|sh))`", PAGES):
        assert (REPOSITORY / path).exists() or (REPOSITORY / "wav2vec2" / path).exists(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "blocked", "check"),
    [
        (0, [], "len(features) == 4 and [x.ndim for x in last] == [2, 2] and last[0].equal(features[-1])"),
        (1, ["soundfile"], "len(hidden_states) == 4 and frames.tolist()[0] == hidden_states[0].shape[1]"),
    ],
    ids=["wav2vec2.load", "plain PyTorch"],
)
def test_loading_code(number, blocked, check, tmp_path):
    """The blocks that load a model, in a process that has torch, wav2vec2/ and hardconcrete.py alone."""
    code = blocks("python")[number]
    path = re.search(r'load\("(.*?)"', code).group(1)
    model = random_model(small_config("hubert"))
    checkpoint.save(tmp_path / path, {"state_dict": model.state_dict(), "config": model.config})
    shutil.copytree(REPOSITORY / "wav2vec2", tmp_path / "wav2vec2")
    shutil.copy(REPOSITORY / "hardconcrete.py", tmp_path)
    for name, num_samples in (("talk.flac", 8000), ("a.flac", 8000), ("b.wav", 5000)):
        soundfile.write(tmp_path / name, random_waveforms(num_samples)[0][0].clamp(-1, 1).numpy(), 16000)
    names = ["torchaudio", "transformers", "pytorch_lightning", "tqdm", "safetensors", "huggingface_hub", *blocked]
    blocked = f"import sys\nfor name in {names}:\n"
    check = f"\nassert {check}\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{blocked}    sys.modules[name] = None\n{code}{check}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
