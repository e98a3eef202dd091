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


def imported_files(path: Path, *, for_types: bool = False) -> set[Path]:
    """The files of this project that a file imports, at its top or later.

    Args:
        path: of the file, from the root.
        for_types: with those that it imports for type hints only.
    """
    tree = ast.parse((REPOSITORY / path).read_text())
    if not for_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
    found = set()
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


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("training.settings", {"torch", "numpy", "transformers", "pytorch_lightning"}),
        ("wav2vec2.model", {"torchaudio", "transformers", "soundfile", "pytorch_lightning", "safetensors", "numpy.ma"}),
        ("prepare_data", {"torch", "torchaudio", "transformers", "pytorch_lightning"}),
        ("training.checkpoints", {"pytorch_lightning", "transformers", "torchaudio", "matplotlib"}),
    ],
)
def test_light_imports(module, absent):
    code = f"import sys, {module}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not absent & set(result.stdout.split())


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


@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag"]], ids=["help", "wrong flag"])
@pytest.mark.parametrize("name", scripts())
def test_flags_do_not_wait_for_torch(name, flags):
    assert not run_flags(name, flags) & HEAVY


WRONG = {
    "distill": ["--tsv_dir", "x", "--student_ckpt", "a", "--teacher_ckpt", "b", "--target_sparsity", "2"],
    "final_distill": ["--student_ckpt", "a", "--teacher_ckpt", "b"],
    "prune": ["--distilled_ckpt", "a", "--original_ckpt", "b", "--round_to", "0"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_do_not_wait_for_torch(name):
    assert not run_flags(name, WRONG[name]) & HEAVY


def run_flags(name: str, flags: list[str]) -> set[str]:
    """The packages that a script has imported where it ends for these flags."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{name!r}, *{flags!r}]\n"
        f"try:\n    runpy.run_module({name!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    print(stop.code, *sys.modules, sep='\\n', file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    status, modules = ("0" if flags == ["--help"] else "2" if "--no_such_flag" in flags else "1"), result.stderr
    assert f"\n{status}\nsys\n" in f"\n{modules}", modules[-2000:]
    return {name.partition(".")[0] for name in modules.split()}
