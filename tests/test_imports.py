"""Imports go one way, and light ones stay light."""

import ast
import functools
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
LIGHTNING_USERS = {"lightning", "training", "finetune", "make_student"}
MAX_LINES = 60  # of a function: what fits on a screen


def imports(path: Path) -> set[str]:
    """The absolute names that a file imports, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


@functools.cache
def imported_files(path: Path) -> set[Path]:
    """The files of this project that a file imports, at its top or later, but for type hints only."""
    tree = ast.parse((REPOSITORY / path).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.parts[: -node.level] if node.level else ()
            package = ".".join([*parts, *([node.module] if node.module else [])])
            # A name may be a file of the package.
            found |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
    places = [Path(*name.split(".")).with_suffix(".py") for name in found if name]
    return {place for place in places if (REPOSITORY / place).is_file()}


def circle(path: Path) -> list[Path]:
    """A way from a file back to itself along imports inside its room; empty if there is none."""
    ways = [[path]]
    seen = {path}
    while ways:
        way = ways.pop()
        for following in imported_files(way[-1]):
            if following == path:
                return [*way, path]
            if following not in seen and following.parts[0] == path.parts[0]:
                seen.add(following)
                ways.append([*way, following])
    return []


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


LIGHT = {  # in the order of import, in one process
    "training.settings": {"torch", "numpy", "transformers", "pytorch_lightning"},
    "wav2vec2.model": {"torchaudio", "transformers", "soundfile", "pytorch_lightning", "safetensors", "numpy.ma"},
    "training.checkpoints": {"pytorch_lightning", "transformers", "torchaudio", "matplotlib"},
}


def test_light_imports():
    code = "\n".join(f"import {module}; print({module!r}, *sys.modules)" for module in LIGHT)
    lines = [line.split() for line in run_python(f"import sys\n{code}").splitlines()]
    assert [line[0] for line in lines] == list(LIGHT)
    assert not [(module, heavy) for module, *found in lines if (heavy := LIGHT[module] & set(found))]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize("path", files(), ids=str)
def test_no_circles_inside_a_room(path):
    assert not circle(path)


@pytest.mark.parametrize("path", files(), ids=str)
def test_functions_fit_on_a_screen(path):
    tree = ast.parse((REPOSITORY / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [each.name for each in functions if each.end_lineno - each.lineno + 1 > MAX_LINES]


# --- the first second ------------------------------------------------------------------------------

HEAVY = {"torch", "pytorch_lightning", "torchaudio", "torchmetrics", "scipy", "transformers"}


def scripts() -> list[str]:
    """The modules that people start: their last lines are a main, and they have flags."""
    texts = {path: (REPOSITORY / path).read_text() for path in files()}
    return sorted(
        ".".join(path.with_suffix("").parts)
        for path, text in texts.items()
        if 'if __name__ == "__main__":' in text and ("make_parser(" in text or "ArgumentParser(" in text)
    )


WRONG = [
    ("distill", ["--tsv_dir", "x", "--student_ckpt", "a", "--teacher_ckpt", "b", "--target_sparsity", "2"]),
    ("final_distill", ["--student_ckpt", "a", "--teacher_ckpt", "b"]),
    ("prune", ["--distilled_ckpt", "a", "--original_ckpt", "b", "--round_to", "0"]),
]
# Runs scripts one after the other in one process, as ``python -m`` does; says how each ended and what is loaded then.
RUN = """
import contextlib, io, runpy, sys
for name, flags, expected in {calls!r}:
    sys.argv = [name, *flags]
    status = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    print(name, flags, status == expected, {heavy!r} & {{module.partition(".")[0] for module in sys.modules}})
"""


def test_flags_do_not_wait_for_torch():
    """Neither help, nor a flag that does not exist, nor a value that cannot be."""
    calls = [(name, [flag], status) for name in scripts() for flag, status in (("--help", 0), ("--no_such_flag", 2))]
    calls += [(*call, 1) for call in WRONG]
    lines = run_python(RUN.format(calls=calls, heavy=HEAVY)).splitlines()
    assert lines == [f"{name} {flags} True set()" for name, flags, _ in calls]
