"""docs/published_names.md: every name and flag on it exists."""

import importlib
import pkgutil
import re
import sys

import pytest
from helpers import REPOSITORY

PAGE = (REPOSITORY / "docs" / "published_names.md").read_text()
REQUIRED = {
    "prepare_data": ("--data", "x"),
    "distill": ("--tsv_dir", "x"),
    "final_distill": ("--tsv_dir", "x", "--student_ckpt", "x"),
    "prune": ("--distilled_ckpt", "x", "--original_ckpt", "x"),
    "save_final_ckpt": ("--config_path", "x", "--ckpt_after_final_distill", "x"),
}


def our_names() -> list[str]:
    """Return the names in backticks in the last column of the tables."""
    rows = re.findall(r"^\|.*\| (.*) \|$", PAGE, flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]


@pytest.mark.parametrize("name", sorted(set(our_names())))
def test_names_exist(name):
    if name.endswith((".py", ".sh", ".conf")):
        assert (REPOSITORY / name).is_file()
    else:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("script", REQUIRED)
def test_flags_exist(script, monkeypatch):
    (flags,) = re.findall(rf"^- `{script}\.py`: ((?:.|\n )*)", PAGE, flags=re.MULTILINE)
    names = re.findall(r"`--(\w+)`", flags)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *REQUIRED[script]])
    found = vars(importlib.import_module(script).parse_args())
    assert len(names) > 1 and set(names) <= found.keys()


def test_load_pruned_model_is_as_it_was(small_teacher):
    import prune

    model = prune.load_pruned_model(small_teacher)
    assert model.training and model.get_num_params() > 0
