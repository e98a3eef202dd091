"""Imports go one way, and light ones stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

# From the top down: a room imports rooms below it only.
ROOMS = (
    "benchmarks",
    "report",
    "evaluation",
    "training",
    "lightning",
    "labels",
    "exporters",
    "dataset",
    "wav2vec2",
    "hardconcrete",
)
SCRIPTS = {path.stem for path in REPOSITORY.glob("*.py")} - {"lightning", "hardconcrete", "cli"}
LIGHTNING_USERS = {"lightning", "training", "distill", "final_distill", "finetune", "make_student"}


def imports(path: Path) -> set[str]:
    """The absolute names that a file imports, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


def files() -> list[Path]:
    found = [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.py")]
    return [path for path in found if not path.parts[0].startswith(".") and path.parts[0] not in ("tests", "build")]


@pytest.mark.parametrize("path", files(), ids=str)
def test_arrows_go_one_way(path):
    room = path.parts[0].removesuffix(".py")
    found = {name.partition(".")[0] for name in imports(REPOSITORY / path)}
    if room in ROOMS:
        below = ROOMS[ROOMS.index(room) :]
        assert not found & (set(ROOMS) - set(below))
    assert not found & (SCRIPTS - {room}), "a script is imported"
    if room not in LIGHTNING_USERS and room not in ("benchmarks",):
        assert not found & {"pytorch_lightning", "lightning_fabric"}
    assert "sys.path.insert" not in (REPOSITORY / path).read_text() or room == "s3prl_upstream"


def test_dataset_and_lightning_know_no_runs():
    for room in ("dataset", "lightning.py"):
        root = REPOSITORY / room
        for path in [root] if root.is_file() else root.glob("*.py"):
            assert not [name for name in imports(path) if name.startswith(("argparse", "training", "cli"))], path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("wav2vec2.model", {"torchaudio", "transformers", "soundfile", "pytorch_lightning", "safetensors", "numpy.ma"}),
        ("prepare_data", {"torch", "torchaudio", "transformers", "pytorch_lightning"}),
        ("prune", {"pytorch_lightning", "transformers", "torchaudio", "matplotlib"}),
        ("save_final_ckpt", {"pytorch_lightning", "transformers", "torchaudio", "matplotlib"}),
    ],
)
def test_light_imports(module, absent):
    code = f"import sys, {module}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not absent & set(result.stdout.split())
