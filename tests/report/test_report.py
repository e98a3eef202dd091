"""The report of a run: complete, self-contained, safe with hostile text, the same every time."""

import contextlib
import csv
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TASK_HEADS,
    error_line,
    random_model,
    run_script,
    run_to_exit,
    save_small_model,
    small_config,
    task_contents,
)

from evaluation.tables import evaluation_tables, results_of
from report import pictures
from report.experiment import read_experiment, read_log
from report.page import write_report
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError

HOSTILE = "</svg><script>alert('1')</script>\" {{ 7 * 7 }} &amp; <img src=https://x.example/y.png> 聲\x1b[2J"
PRUNED = {"encoder_num_heads": [1, 2, 4], "encoder_ff_interm_features": [7, 11, 20]}
LOG = [
    {"step": 0, "train_loss": 0.5, "train_loss_mse": 0.0, "valid_loss": "", "sparsity_expected": 0.0, "lambda1": 0.1},
    {"step": 1, "train_loss": 0.25, "train_loss_mse": 0.0, "valid_loss": 0.3, "sparsity_expected": 0.4, "lambda1": 0.2},
]


TWO_LAYERS = {
    "encoder_use_attention": [True] * 2,
    "encoder_use_feed_forward": [True] * 2,
    "encoder_num_heads": [4] * 2,
    "encoder_ff_interm_features": [20] * 2,
}


def write_log(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_stage(folder: Path, about: dict[str, Any], made_by: dict[str, Any]) -> None:
    """The files that a distillation and the script after it leave."""
    write_log(folder / "csv/version_0/metrics.csv", LOG)
    (folder / "ckpts").mkdir()
    trained = {"state_dict": {"student_model.weight": torch.ones(1)}, "global_step": 4321, "distillation": about}
    checkpoint.save(folder / "ckpts/last.ckpt", trained)
    model = random_model(small_config("hubert", **PRUNED))
    contents = {"state_dict": model.state_dict(), "config": model.config, "made_by": made_by}
    checkpoint.save(folder / "ckpts/pruned_hubert_base.pth", contents)


@pytest.fixture
def exp_dir(tmp_path) -> Path:
    """A whole run."""
    original = random_model(small_config("hubert"))
    about = {
        "student_config": original.config,
        "target_sparsity": 0.4,
        "original_num_params": int(original.get_num_params()),
        "settings": {"max_updates": 5000, "teacher_ckpt": {"fingerprint": "0123abcd"}},
    }
    write_stage(tmp_path / "exp", about, {"script": "prune.py", "target_sparsity": None})
    write_stage(tmp_path / "exp/final", {"settings": {"max_updates": 2500}}, {"script": "save_final_ckpt.py"})
    return tmp_path / "exp"


PARTS = ("conv", "projection", "attention", "feed_forward")


def results(name: str = "small", task: str = "keywords") -> dict[str, Any]:
    """Results as evaluate.py writes them, for a teacher and a model."""
    models = []
    for number, model in enumerate(("teacher", name)):
        layers = [{"layer": n, "l1": 0.1 * n, "cosine": 0.9, "cka": None} for n in (0, 1, 3)]
        cost = {
            "num_params": 94_700_000 - 1_234_567 * number,
            "num_bytes": 378_800_000,
            "params": dict.fromkeys(PARTS, 23_675_000),
            "macs_per_second": dict.fromkeys(PARTS, 1.825e9) | {"total": 7.3e9},
            "superb_macs": {"total": 1.669e12},
            "speed": [{"seconds": 2, "batch": 1, "threads": 1, "real_time_factor": 0.0123}],
        }
        fidelity = {"layers": layers, "note": None} if number else None
        probe = {"mean": 90.0 - number, "std": 1.25, "interval": [88.0, 92.0], "by_layer": [50.0, 70.0, 60.0]}
        quality = {"mean": 100.0 - 10 * number, "interval": [80.0, 100.0]}
        models.append(
            {
                "name": model,
                "is_teacher": not number,
                "cost": cost,
                "fidelity": fidelity,
                "probes": {task: probe},
                "quality": quality,
            }
        )
    return {
        "made_by": {"command": "python evaluate.py", "threads": 1},
        "models": models,
        "controls": {"log-mel": {task: {"mean": 40.0, "std": 0.0, "interval": [40.0, 40.0]}}},
        "probes": {task: {"metric": "accuracy", "chance": 12.5}},
        "left_out": {"speakers": "the two differ by chance only"},
        "macs_counted_on": {"utterance_seconds": 7.42, "superb_seconds": 229.0},
    }


def page_of(exp_dir: Path, results: dict[str, Any] | None = None) -> Path:
    evaluated = None
    if results is not None:
        evaluated = exp_dir / "evaluation.json"
        evaluated.write_text(json.dumps(results))
    path, _ = write_report(exp_dir, evaluated)
    return path


class Page(HTMLParser):
    """The tags and the text of a page that is well formed and refers to nothing outside of it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        source = path.read_text(encoding="utf-8")
        assert "\x1b" not in source
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        assert not {"script", "img", "link", "iframe", "object", "base", "b"} & set(self.tags)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag != "meta":
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "data"), name
            references = re.findall(r"url\(([^)]*)\)", value or "") + ([value] if name.endswith("href") else [])
            assert all(reference.startswith("#") for reference in references), references

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_page_of_a_run(exp_dir):
    page = Page(page_of(exp_dir))
    before, after = (int(random_model(small_config("hubert", **c)).get_num_params()) for c in ({}, PRUNED))
    pruned = [f"{after:,}", f"{1 - after / before:.2%}"]
    sizes = [["original", f"{before:,}", "0.00%"], ["after pruning", *pruned], ["after final distillation", *pruned]]
    assert [row[:3] for row in page.rows[1:4]] == sizes
    assert f"sparsity {1 - after / before:.4f} reached, 0.4000 wanted: missed by more than 0.5%" in page.text
    for row in (["1", "1/4", "7/20"], ["2", "2/4", "11/20"], ["3", "4/4", "20/20"]):
        assert row in page.rows
    assert ["0", "10/10"] in page.rows and "38 of 60 FFN dimensions kept" in page.text
    assert "4,321 of 5,000 updates" in page.text and "4,321 of 2,500 updates" in page.text
    assert page.text.count("training 0.25, held-out speech 0.3 in the end") == 2
    assert "expected 40 in the end" in page.text and "λ" not in page.text
    assert "squared error" not in page.text  # a term of weight 0
    assert page.tags["svg"] == page.tags["figcaption"] == 3 + 2 * 2
    assert ["max_updates", "5000", "2500"] in page.rows and ["teacher_ckpt", "0123abcd", "-"] in page.rows
    assert ["after final distillation", "script", "save_final_ckpt.py"] in page.rows
    assert "Evaluation" not in page.text and "Not in this report" not in page.text


def test_the_same_files_make_the_same_page(exp_dir):
    """The final distillation alone is quicker to draw."""
    first = page_of(exp_dir / "final", results()).read_bytes()
    assert page_of(exp_dir / "final", results()).read_bytes() == first


def test_pages_of_parts_of_a_run(exp_dir):
    """A run that is going on has a log only; of a run that was tidied up there is the model alone."""
    models = list(exp_dir.glob("**/*.pth"))
    for path in [*exp_dir.glob("**/last.ckpt"), *models]:
        path.rename(path.with_suffix(".away"))
    page = Page(page_of(exp_dir))
    assert "2 updates" in page.text and not {"Size", "Architecture"} & set(page.text.split())
    for path in exp_dir.glob("**/metrics.csv"):
        path.unlink()
    for path in models:
        path.with_suffix(".away").rename(path)
    page = Page(page_of(exp_dir))
    assert page.rows[1][:3] == ["after pruning", "5,085", "-"] and "Architecture" not in page.text


def test_page_of_a_size_on_the_way_of_a_run(exp_dir):
    """Its curves are the run's, which lie one folder up, as far as it was."""
    settings = {"max_updates": 5000, "target_sparsity": 0.4}
    about = {"student_config": small_config("hubert"), "target_sparsity": 0.3, "settings": settings}
    about["intermediate"] = True
    write_stage(exp_dir / "sparsity_0.3", about, {"script": "prune.py"})
    (exp_dir / "sparsity_0.3/csv/version_0/metrics.csv").unlink()
    write_log(exp_dir / "csv/version_1/metrics.csv", [{"step": 4320, "train_loss": 0.1}, {"step": 4321, "lambda1": 9}])
    write_stage(exp_dir / "sparsity_0.3/final", {"settings": {"max_updates": 2500}}, {"script": "save_final_ckpt.py"})
    joint, final = read_experiment(exp_dir / "sparsity_0.3").stages
    assert joint.log["train_loss"] == {1: 0.5, 2: 0.25, 4321: 0.1} and joint.log["lambda1"] == {1: 0.1, 2: 0.2}
    assert final.log["train_loss"] == {1: 0.5, 2: 0.25}
    page = Page(page_of(exp_dir / "sparsity_0.3"))
    assert "0.3000 wanted" in page.text and "4,321 of 5,000 updates" in page.text
    assert "training 0.1, held-out speech 0.3 in the end" in page.text


def test_page_of_a_run_without_pruning(exp_dir):
    for path in ("ckpts", "csv"):
        shutil.rmtree(exp_dir / path)
    page = Page(page_of(exp_dir))
    assert page.rows[1][0] == "after final distillation" and len(read_experiment(exp_dir).models) == 1
    assert "4,321 of 2,500 updates" in page.text and "Not in this report" not in page.text
    assert not {"Architecture", "pruning"} & set(page.text.split())


def test_pages_of_a_task(exp_dir):
    """Loss and score while pruning, and fine-tuning: below the run, where run.sh puts it, and alone."""
    rows = [{"step": 9, "train_loss_task": 1.5, "valid_loss_task": 2.0, "valid_score": 87.5, "lr-AdamW/head": 0.1}]
    write_log(exp_dir / "csv/version_1/metrics.csv", rows)
    for folder in ("teacher", "finetuned"):
        write_log(exp_dir / folder / "csv/version_0/metrics.csv", LOG + rows)
        about = {"settings": {"max_updates": 700, "mask_prob": 0.0625}}
        trained = {"state_dict": {"model.weight": torch.ones(1)}, "global_step": 345, "finetuning": about}
        checkpoint.save(exp_dir / folder / "ckpts/last.ckpt", trained)
    contents = task_contents(TASK_HEADS[2]) | {"made_by": {"script": "finetune.py", "metric": "accuracy"}}
    checkpoint.save(exp_dir / "finetuned/finetuned.pth", contents)
    page = Page(page_of(exp_dir))
    titles = [stage.title for stage in read_experiment(exp_dir).stages]
    assert titles == ["Fine-tuning of the teacher", "Distillation and pruning", "Final distillation", "Fine-tuning"]
    assert "345 of 700 updates" in page.text and "training 1.5, held-out speech 2 in the end" in page.text
    assert page.text.count("87.5 in the end") == 3 and "Not in this report" not in page.text
    assert ["mask_prob", "0.0625", "-", "-", "0.0625"] in page.rows
    assert ["after fine-tuning", "metric", "accuracy"] in page.rows and page.rows[4][0] == "after fine-tuning"
    alone = Page(page_of(exp_dir / "finetuned"))
    assert "345 of 700 updates" in alone.text and "87.5 in the end" in alone.text
    assert "Not in this report" not in alone.text and [row[0] for row in alone.rows][1] == "after fine-tuning"


def test_damaged_files_are_named_and_the_rest_is_shown(exp_dir):
    (exp_dir / "ckpts/last.ckpt").write_bytes(b"PK\x03\x04 cut short")
    page = Page(page_of(exp_dir))
    assert "Not in this report: " in page.text and "last.ckpt: damaged, or not a checkpoint" in page.text
    assert "training 0.25" in page.text and "after pruning" in page.text and "Architecture" not in page.text


@pytest.mark.parametrize(
    ("about", "made_by"),
    [
        ({"original_num_params": "many", "target_sparsity": "half"}, {"target_sparsity": "half"}),
        (
            {"original_num_params": 0, "target_sparsity": [0.4], "settings": {1: 2, "a": 3}},
            {"target_sparsity": 10**300},
        ),
        ({"original_num_params": True, "student_config": {"encoder_num_layers": 3}, "settings": [1]}, {1: "a", "b": 2}),
        ({"student_config": small_config("hubert", encoder_num_layers=2, **TWO_LAYERS)}, {}),
    ],
)
def test_records_of_other_types(tmp_path, about, made_by):
    """A checkpoint may say anything of its run; the page has the rest."""
    write_stage(tmp_path / "exp", about, made_by)
    page = Page(page_of(tmp_path / "exp"))
    assert "after pruning" in page.text and "wanted" not in page.text
    assert "Not in this report: " in page.text


def test_results_of_other_types(tmp_path):
    """Any part of a results file may be of another kind: the page, or one line that names the file."""
    path = tmp_path / "results.json"
    for place in (("models",), *(("models", 1, key) for key in results()["models"][1]), ("controls",), ("probes",)):
        for value in (None, 5, 0, "text", [], {}, [[5]], {"keywords": 1}, 10**300, float("nan")):
            contents: Any = results()
            inner = contents
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(contents))
            with contextlib.suppress(UserError), results_of(path) as found:
                assert all(map(str, evaluation_tables(found)))
    contents = results()
    contents["models"][0]["cost"]["params"] = dict.fromkeys(PARTS, 0)
    path.write_text(json.dumps(contents))
    with pytest.raises(UserError, match="ZeroDivisionError"), results_of(path) as found:
        evaluation_tables(found)


def test_evaluation(exp_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    run_script(monkeypatch, "report.__main__", exp_dir, "--evaluation", tmp_path / "results.json")
    printed = capsys.readouterr().out
    assert printed.endswith(f"\nreport: {exp_dir / 'report.html'}\n")
    page = Page(exp_dir / "report.html")
    cost = ["small", "93,465,433", "1.30%", "378.8", "7.300", "1.825", "1.669e+12", "0.0123"]
    fidelity = ["small", "0.000", "0.100", "0.300", "0.900", "0.900", "0.900", "-", "-", "-", "-0.7667"]
    scores = [["small", "89.0 ± 1.2 [88.0, 92.0]"], ["log-mel", "40.0 ± 0.0 [40.0, 40.0]"], ["chance", "12.5"]]
    quality = ["small", "90.0 [80.0, 100.0]"]
    parts = ["small", *["25.0"] * 8]
    for row in (cost, parts, fidelity, *scores, quality):
        assert row in page.rows
        assert row in [re.split("  +", line.strip()) for line in printed.splitlines()]
    for words in ("speakers is left out: the two differ", "quality against parameters"):
        assert words in page.text
    assert ["evaluation", "command", "python evaluate.py"] in page.rows


def test_bad_input_is_one_line(exp_dir, tmp_path, monkeypatch, capsys):
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"models": [{"name": 1}]}')
    for arguments, message in (
        ((tmp_path,), "holds no run: neither csv/version_*/metrics.csv"),
        ((exp_dir, "--evaluation", teacher), "teacher.pth: not readable as JSON"),
        ((exp_dir, "--evaluation", tmp_path / "list.json"), "list.json: expected a JSON object, found list"),
        ((exp_dir, "--evaluation", tmp_path / "other.json"), "not the results of evaluate.py"),
    ):
        assert run_to_exit(monkeypatch, "report.__main__", *arguments) == 1
        assert message in error_line(capsys)


def test_hostile_text_is_text(tmp_path):
    """Names of settings, models, tasks and folders, commands and columns come from files."""
    exp_dir = tmp_path / "exp <b>&"
    settings = {HOSTILE: HOSTILE, "train_subset": {"fingerprint": HOSTILE}}
    write_stage(exp_dir, {"settings": settings}, {HOSTILE: HOSTILE})
    write_log(exp_dir / "csv/version_0/metrics.csv", [*LOG, {"step": 2, HOSTILE: 1.0}])
    page = Page(page_of(exp_dir, results(HOSTILE, HOSTILE)))
    assert page.text.count("<script>alert('1')</script>\" {{ 7 * 7 }} &amp; <img") >= 8 and "exp <b>&" in page.text
    assert read_experiment(exp_dir).notes == []


def test_names_that_cannot_be_seen(tmp_path):
    """A name that is not UTF-8, or would steer a terminal, is there as text; so is one that matplotlib leaves out."""
    exp_dir, name = tmp_path / "exp\udcff", "_a$x$\u202e\udcff\x9b"
    write_stage(exp_dir, {"settings": {"model": name}}, {name: name})
    write_log(exp_dir / "csv/version_0/metrics.csv", LOG)
    page = Page(page_of(exp_dir, results(name, name)))
    shown = r"_a$x$\u202e\udcff\x9b"
    assert rf" {shown}" in pictures.methods({name: [pictures.Point(1, 2, 1, 3)]}, "size").svg
    assert page.text.count(shown) >= 8 and r"exp\udcff" in page.text and name not in page.text


# --- logs and pictures -----------------------------------------------------------------------------


def test_log_that_was_continued(tmp_path):
    """Empty cells, values that are none, a row cut short, and updates that were made again."""
    rows = [
        {"step": 49, "train_loss": 3.0},
        {"step": 49, "lr-AdamW/main_params": 0.1},
        {"step": 99, "train_loss": "nan"},
        {"step": 149, "train_loss": 2.0, "valid_loss": 1.5},
        {"step": 99, "train_loss": 2.5},  # again, from an earlier checkpoint
        {"step": 149, "train_loss": 2.25},
        {"step": "", "train_loss": 7},
        {"step": "many", "train_loss": 7},
    ]
    path = write_log(tmp_path / "metrics.csv", rows)
    path.write_text(path.read_text() + "199")
    assert read_log(path) == {
        "train_loss": {50: 3.0, 100: 2.5, 150: 2.25},
        "lr-AdamW/main_params": {50: 0.1},
        "valid_loss": {150: 1.5},
    }


def test_log_of_a_continued_run(tmp_path):
    """A version for each start; what was made again counts as it was made last."""
    for version, rows in (
        (0, [{"step": 49, "train_loss": 3.0}, {"step": 99, "train_loss": 9.0}]),
        (1, [{"step": 99, "train_loss": 2.0}]),
        (10, [{"step": 149, "train_loss": 1.0}]),
    ):
        write_log(tmp_path / f"csv/version_{version}/metrics.csv", rows)
    (stage,) = read_experiment(tmp_path).stages
    assert stage.log == {"train_loss": {50: 3.0, 100: 2.0, 150: 1.0}}


@pytest.mark.parametrize("text", ["", "step,train_loss\n", "\0\0\0\n\xff", "train_loss\n1.0\n"])
def test_log_of_nothing(tmp_path, text):
    path = tmp_path / "exp/csv/version_0/metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path / "exp")


@pytest.mark.parametrize("num_rows", [1, 20, 3000])
def test_logs_of_all_lengths(num_rows):
    column = {50 * row: row / 7 for row in range(1, num_rows + 1)}
    (picture,) = pictures.curves({"train_loss": column, "unknown": column})
    assert len(picture.svg) < 60_000 and f"training {num_rows / 7:.4g} in the end" in picture.caption
    updates, values = pictures._thinned(column)
    assert len(updates) == min(num_rows, pictures.MOST_POINTS)
    assert values.tolist() == pytest.approx((updates / 350).tolist())


def test_blocks_that_are_gone_are_marked():
    for after, is_marked in (([2, 0, 4], True), ([2, 1, 4], False)):
        picture = pictures.kept_units("heads", [4, 4, 4], after, 1)
        assert picture.caption == f"{sum(after)} of 12 heads kept"
        assert (pictures.COLOURS[1].lower() in picture.svg) == is_marked and pictures.INK not in picture.svg
