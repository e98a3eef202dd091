"""Settings and fixtures of all tests: one thread, which is fastest for tiny models, and seeded random numbers."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers import PRUNING, disturb_run, run_script, save_small_model, small_run

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]  # scripts behave differently inside a SLURM job, which a run of the tests may be


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed each test and its fixtures, so that their numbers do not depend on the tests before."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Make a tiny corpus in LibriSpeech's layout: tones and noise of 2 to 4 s."""
    root = tmp_path_factory.mktemp("corpus") / "LibriSpeech"
    generator = np.random.default_rng(0)
    for split, num_utterances in (("train-clean-100", 16), ("dev-clean", 4)):
        folder = root / split / "1" / "2"
        folder.mkdir(parents=True)
        for number in range(num_utterances):
            time = np.arange(int(generator.uniform(2.1, 4.0) * 16000)) / 16000
            tone = np.sin(2 * np.pi * generator.uniform(100, 300) * time) * np.sin(2 * np.pi * 3 * time)
            samples = 0.2 * tone + 0.02 * generator.standard_normal(len(time))
            soundfile.write(folder / f"1-2-{number:04d}.flac", samples, 16000)
    return root


@pytest.fixture(scope="session")
def manifests(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(monkeypatch, "prepare_data", "--data", corpus, "--out", out)
    return out


# Of the letters in spoken texts; a space is silence.
PITCHES = {"a": 300, "b": 1000, "c": 3000}


def spoken(text: str, generator: np.random.Generator) -> np.ndarray:
    """Return a tone of 0.1 s for each letter, silence for a space, a pause of 0.05 s after each, in faint noise."""
    parts = [np.zeros(400)]
    for letter in text:
        time = np.arange(1600) / 16_000
        parts += [0.3 * np.sin(2 * np.pi * PITCHES.get(letter, 0) * time), np.zeros(800)]
    samples = np.concatenate(parts)
    return samples + 0.003 * generator.standard_normal(len(samples))


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """Make a folder of tones, and a list of each kind: text.tsv, clips.tsv, segments.tsv and verification.tsv.

    A clip's label is its first letter; of the verification only the test has some of them.
    """
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(0)
    words = ("ab", "ba", "cab", "abc", "b c", "bac", "cb")
    lists = {
        "text": ["split\tpath\ttext"],
        "clips": ["split\tpath\tlabel"],
        "segments": ["split\tpath\tstart\tend\tlabel"],
        "verification": ["split\tpath\tlabel"],
    }
    for number in range(6):
        split = ("train", "train", "train", "train", "valid", "test")[number]
        for word in words:
            name = f"{word.replace(' ', '_')}-{number}.wav"
            soundfile.write(folder / name, spoken(word, generator), 16_000)
            lists["text"].append(f"{split}\t{name}\t{word}")
            lists["clips"].append(f"{split}\t{name}\t{word[0]}")
            for place, letter in enumerate(word):
                start = 0.025 + 0.15 * place
                if letter != " ":
                    lists["segments"].append(f"{split}\t{name}\t{start:.3f}\t{start + 0.1:.3f}\t{letter}")
            lists["verification"].append(f"{'test' if word[0] == 'a' or word == 'cb' else 'train'}\t{name}\t{word}")
    for name, rows in lists.items():
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("teacher") / "teacher.pth", "hubert", "base")


@pytest.fixture(scope="session")
def finished_run(manifests, small_teacher, tmp_path_factory) -> Path:
    """The experiment of a finished joint distillation, ``small_run`` with ``PRUNING``; write to a copy only."""
    exp_dir = tmp_path_factory.mktemp("finished") / "exp"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(monkeypatch, "distill", *small_run(manifests, small_teacher), *PRUNING, "--exp_dir", exp_dir)
    return exp_dir


@pytest.fixture
def disturb(monkeypatch) -> SimpleNamespace:
    return disturb_run(monkeypatch)


@pytest.fixture
def omegaconf_classes() -> Iterator[dict[str, type]]:
    """Provide classes that pickle under omegaconf's names; their modules go afterwards."""
    classes = {}
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "omegaconf"}
    for module, name in (
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.listconfig", "ListConfig"),
        ("omegaconf.nodes", "AnyNode"),
        ("omegaconf.base", "ContainerMetadata"),
        ("omegaconf.base", "Metadata"),
    ):
        classes[name] = type(name, (), {"__module__": module})
        for part in ("omegaconf", module):
            sys.modules.setdefault(part, ModuleType(part))
        setattr(sys.modules[module], name, classes[name])
    yield classes
    for part in [part for part in sys.modules if part.split(".")[0] == "omegaconf"]:
        del sys.modules[part]
    sys.modules.update(own)
