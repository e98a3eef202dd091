"""Every command, code block, path and link of the README and the other pages works."""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
import soundfile
import torch
from helpers import REPOSITORY, random_model, random_waveforms, small_config, task_contents
from test_imports import ROOMS, files, imports
from torch import Tensor
from torch.nn import functional as F

import lightning
import wav2vec2
from wav2vec2.files import checkpoint
from wav2vec2.task_model import Head

PAGES = {
    path: path.read_text()
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
TEXT = "".join(PAGES.values())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The lines of the bash blocks as words, continuation lines joined, comments dropped."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def split_settings(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """The NAME=VALUE words before a command, and the command."""
    start = next(i for i, word in enumerate(command) if "=" not in word)
    return dict(word.split("=", 1) for word in command[:start]), command[start:]


def starting_with(*first: str) -> list[list[str]]:
    found = [command for command in commands() if split_settings(command)[1][0] in first]
    assert found, first
    return found


def run_checked(words: list[str], **settings: str) -> str:
    """Run a command in the repository and return its output; it must succeed."""
    environment = os.environ | settings
    result = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", starting_with("python"), ids=lambda command: " ".join(command)[:60])
def test_script_flags(command, monkeypatch):
    is_module = command[1] == "-m"
    name = command[1 + is_module].removesuffix(".py")
    if is_module and (REPOSITORY / name).is_dir():
        name += ".__main__"
    monkeypatch.setattr(sys, "argv", command[1 + is_module :])
    args = importlib.import_module(name).parse_args()
    if name == "benchmarks.rows":
        cases = " ".join(re.findall(r"^    ([a-z_| ]+)\)", (REPOSITORY / args.conf).read_text(), flags=re.MULTILINE))
        assert set(args.rows) <= set(re.findall(r"\w+", cases))


@pytest.mark.parametrize("command", starting_with("bash", "sbatch"), ids=" ".join)
def test_shell_scripts(command):
    settings, words = split_settings(command)
    words = words[words.index("run.sh") + 1 :]  # sbatch has options before it
    words = [word for word in words if word not in ("--print", "--check")]
    output = run_checked(["bash", "run.sh", "--print", *words], **settings)
    assert all(f"'{word}'" in output for word in (*settings.values(), *words[1:]))


@pytest.mark.parametrize("command", starting_with("make"), ids=" ".join)
def test_make_targets(command):
    run_checked(["make", "-n", *command[1:]])


def test_every_command_is_covered():
    """A new kind of command needs a test here."""
    known = {"python", "python3", "source", "pip", "make", "bash", "sbatch"}
    assert {split_settings(command)[1][0] for command in commands()} <= known


def test_paths_exist():
    folders = "|".join([*ROOMS, "conf", "demo", "tests", "examples", "s3prl_upstream", "docs"])
    # published_names.md names the released program's files too, and has a test of its own.
    text = "".join(text for page, text in PAGES.items() if page.name != "published_names.md")
    for path in re.findall(rf"`((?:{folders})/[\w./-]*|[\w-]+\.(?:py|sh))`", text):
        is_placeholder = "NAME" in path
        assert is_placeholder or (REPOSITORY / path).exists() or list(REPOSITORY.glob(f"*/{path}")), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_picture_of_the_house():
    """CONTRIBUTING.md: every import between rooms goes along its arrows, which go down."""
    (picture,) = blocks("mermaid")
    arrows = re.findall(r"^ *(\w+).* --> (\w+)", picture, flags=re.MULTILINE)
    below = {}
    for room in reversed(ROOMS):
        below[room] = {room}.union(*(below[target] for source, target in arrows if source == room))
    for path in files():
        room = path.parts[0].removesuffix(".py")
        if room in ROOMS:
            assert {name.partition(".")[0] for name in imports(REPOSITORY / path)} & set(ROOMS) <= below[room], path


def test_term():
    """CONTRIBUTING.md: its term compares the states of both models."""
    (code,) = [block for block in blocks("python") if "lightning.Term" in block]
    exec(code, names := {"lightning": lightning, "Tensor": Tensor, "F": F})
    term, states, others = names["FrameRelations"](1.0), torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 4)
    same, other = (term(lightning.States(None, None, None, states, x, None)) for x in (states, others))
    assert same == 0 < other


def test_microphone(tmp_path, monkeypatch, capsys):
    """using.md: its program prints what a model hears, from a stand-in for the microphone until it is stopped."""
    (code,) = [block for block in blocks("python") if "sounddevice" in block]
    head = Head("text", ("a", "b"), units="characters")
    contents = task_contents(head)
    contents["config"] |= {"encoder_chunk_frames": 4, "encoder_left_frames": 8}
    contents["state_dict"] |= random_model(small_config("hubert", encoder_chunk_frames=4)).feature_extractor.state_dict(
        prefix="feature_extractor."
    )
    (tmp_path / "exp/digits").mkdir(parents=True)
    checkpoint.save(tmp_path / "exp/digits/finetuned.pth", contents)
    sound = random_waveforms(4800)[0][0]
    heard = iter(sound.numpy().reshape(3, 1600, 1))

    class Microphone(contextlib.nullcontext):
        def __init__(self, **settings):
            assert settings["samplerate"] == 16_000 and settings["channels"] == 1
            super().__init__(self)

        def read(self, count):
            if (samples := next(heard, None)) is None:
                raise KeyboardInterrupt
            assert len(samples) == count
            return samples, False

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(InputStream=Microphone))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        exec(code, {})
    printed = capsys.readouterr().out
    assert printed and wav2vec2.predict(wav2vec2.load("exp/digits/finetuned.pth"), sound).startswith(printed)


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
    """The blocks that load a model, in a process that has only torch, wav2vec2/ and hardconcrete.py."""
    code = blocks("python")[number]
    path = re.search(r'load\("(.*?)"', code).group(1)
    model = random_model(small_config("hubert"))
    checkpoint.save(tmp_path / path, {"state_dict": model.state_dict(), "config": model.config})
    shutil.copytree(REPOSITORY / "wav2vec2", tmp_path / "wav2vec2")
    shutil.copy(REPOSITORY / "hardconcrete.py", tmp_path)
    for name, num_samples in (("talk.flac", 8000), ("a.flac", 8000), ("b.wav", 5000)):
        soundfile.write(tmp_path / name, random_waveforms(num_samples)[0][0].clamp(-1, 1).numpy(), 16000)
    names = ["torchaudio", "transformers", "pytorch_lightning", "tqdm", "safetensors", "huggingface_hub", *blocked]
    program = f"import sys\nfor name in {names}:\n    sys.modules[name] = None\n{code}\nassert {check}\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
