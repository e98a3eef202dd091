"""The page and the pictures of an experiment: complete, self-contained, safe with hostile text, the same every time."""

import copy
import csv
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from helpers import error_line, run_script, run_to_exit, save_small_model, small_config, small_run
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox

import evaluation
from evaluation import pictures, report
from evaluation.experiment import Stage, read_experiment, read_log, shape_of
from wav2vec2 import checkpoint
from wav2vec2.errors import UserError

HOSTILE = "</svg><script>alert('1')</script>\" $\\frac{1}{$ _&amp; <img src=https://x.example/y.png> 聲\x1b[2J"


# --- the stages of a run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(manifests, tmp_path_factory) -> dict[str, Any]:
    """A whole run whose stages write reports: its folder, and the page after each stage."""
    tmp_path = tmp_path_factory.mktemp("run")
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    exp_dir = tmp_path / "exp"
    last, pruned = exp_dir / "ckpts/last.ckpt", exp_dir / "ckpts/pruned_hubert_base.pth"
    joint = (*small_run(manifests, teacher, valid_interval=3), "--exp_dir", exp_dir, "--target_sparsity", 0.4)
    final_dir = exp_dir / "final"
    stages = {
        "distill": joint,
        "prune": ("--distilled_ckpt", last, "--original_ckpt", teacher),
        "final_distill": (*small_run(manifests, teacher, student_ckpt=pruned), "--exp_dir", final_dir),
        "save_final_ckpt": ("--config_path", pruned, "--ckpt_after_final_distill", final_dir / "ckpts/last.ckpt"),
    }
    pages = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv(report.SWITCH)
        for script, arguments in stages.items():
            run_script(monkeypatch, script, *arguments)
            pages[script] = (exp_dir / report.PAGE).read_text(encoding="utf-8")
    return {"exp_dir": exp_dir, "pages": pages, "teacher": teacher, "pruned": pruned}


TRAINING_PICTURES = {"loss", "loss_terms", "learning_rates", "gradient_norm", "speed"}
ARCHITECTURE_PICTURES = {"architecture_conv", "architecture_heads", "architecture_ffn"}


def test_every_stage_adds_to_the_report(run):
    pages = run["pages"]
    assert "Architecture" not in pages["distill"] and "Distillation and pruning" in pages["distill"]
    assert "Architecture" in pages["prune"] and "Final distillation" not in pages["prune"]
    assert "Final distillation" in pages["final_distill"]
    assert "after final distillation" in pages["save_final_ckpt"]
    assert "after final distillation" not in pages["final_distill"]
    assert not (run["exp_dir"] / "final" / report.PAGE).exists()

    sizes = [
        checkpoint.load_model(path).get_num_params()
        for path in (run["teacher"], run["exp_dir"] / "final/ckpts/pruned_hubert_base.pth")
    ]
    page = pages["save_final_ckpt"]
    assert f"{sizes[0]:,} → {sizes[1]:,}" in page
    assert f"{1 - sizes[1] / sizes[0]:.2%}" in page and "40.00%" in page
    config = checkpoint.read_model_file(run["pruned"])["config"]
    for kept in config["encoder_ff_interm_features"]:
        assert f"<td class=n>{kept}/20</td>" in page
    # Settings of both trainings, as recorded in their checkpoints.
    assert "<tr><th scope=row>max_updates</th><td>6</td><td>6</td></tr>" in page
    assert "<tr><th scope=row>target_sparsity</th><td>0.4</td><td>–</td></tr>" in page
    assert "pytorch-lightning 2" in page and "save_final_ckpt.py" in page

    names = {path.stem for path in (run["exp_dir"] / "pictures").iterdir()}
    assert names == (
        {f"{stage}_{name}" for stage in ("distill", "final") for name in TRAINING_PICTURES}
        | {"distill_sparsity", "distill_multipliers"}
        | ARCHITECTURE_PICTURES
    )


def test_pictures_are_images(run):
    seen = set()
    for path in (run["exp_dir"] / "pictures").iterdir():
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[1] == round(pictures.WIDTH * pictures.DPI)
        ink = (pixels.min(axis=2) < 0.9).mean()
        assert 0.005 < ink < 0.6, path
        colour = np.array(to_rgb(pictures.COLOURS[0]))
        assert (np.abs(pixels - colour).max(axis=2) < 0.01).sum() > 50, path  # something of the model is drawn
        seen.add(pixels.tobytes())
    assert len(seen) == len(list((run["exp_dir"] / "pictures").iterdir()))


class Page(HTMLParser):
    """What a page refers to, what it names, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.references: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.names[value] += 1
            assert not name.startswith("on"), name
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_stands_alone(text: str) -> Page:
    page = Page(text)
    assert "://" not in re.sub(re.escape(HOSTILE), "", page.text)
    assert all(reference.startswith("#") for reference in page.references), page.references
    assert {reference[1:] for reference in page.references} <= set(page.names)
    assert max(page.names.values()) == 1  # pictures do not share names
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(page.tags)
    return page


def test_page_stands_alone(run):
    page = assert_stands_alone(run["pages"]["save_final_ckpt"])
    assert "http" not in run["pages"]["save_final_ckpt"].replace("http-equiv", "")
    assert page.tags["svg"] == page.tags["figcaption"] == len(list((run["exp_dir"] / "pictures").iterdir()))
    assert pictures.INK not in re.sub(r"<style>.*?</style>", "", run["pages"]["save_final_ckpt"], count=1, flags=re.S)


def test_same_input_same_bytes(run, tmp_path):
    """Written again, by another command: nothing but the command differs."""
    first = run["exp_dir"]
    second = report.write_report(first, None, tmp_path).parent
    names = sorted(path.name for path in (first / "pictures").iterdir())
    assert names == sorted(path.name for path in (second / "pictures").iterdir())
    for name in names:
        assert (first / "pictures" / name).read_bytes() == (second / "pictures" / name).read_bytes(), name
    pages = [(folder / report.PAGE).read_text(encoding="utf-8").splitlines() for folder in (first, second)]
    differing = [line for lines in zip(*pages, strict=True) if len(set(lines)) > 1 for line in lines]
    assert all("page written by" in line for line in differing)


def test_switched_off(run, monkeypatch, tmp_path, capsys):
    def forbidden(*_: Any) -> None:
        raise AssertionError("drawn all the same")

    monkeypatch.setattr(report, "write_report", forbidden)
    report.report_stage(run["exp_dir"] / "ckpts/last.ckpt")  # conftest.py sets the switch
    monkeypatch.delenv(report.SWITCH)
    report.report_stage(tmp_path / "last.ckpt")  # in no experiment's folder
    assert capsys.readouterr().err == ""


# --- trouble ---------------------------------------------------------------------------------------


def test_training_does_not_fail_for_want_of_pictures(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    exp_dir = tmp_path / "exp"
    exp_dir.mkdir()
    (exp_dir / "pictures").write_text("in the way")
    monkeypatch.delenv(report.SWITCH)
    flags = small_run(manifests, small_teacher, max_updates=2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", exp_dir, "--target_sparsity", 0.4)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: no report of {exp_dir}: ") and str(exp_dir / "pictures") in warnings[0]


def test_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.delenv(report.SWITCH)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "evaluation.pictures")
    monkeypatch.delattr(evaluation, "pictures")
    report.report_stage(run["exp_dir"] / "ckpts/last.ckpt")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no report of ") and line.endswith("pip install matplotlib")
    with pytest.raises(UserError, match="matplotlib"):
        report.write_report(run["exp_dir"], None, run["exp_dir"])


def test_damaged_files_are_named_and_the_rest_is_shown(run, tmp_path):
    exp_dir = tmp_path / "exp"
    (exp_dir / "csv/version_0").mkdir(parents=True)
    (exp_dir / "csv/version_0/metrics.csv").write_text("step,train_loss\n1,0.5\n2,0.25\n")
    (exp_dir / "ckpts").mkdir()
    (exp_dir / "ckpts/last.ckpt").write_bytes(b"PK\x03\x04 cut short")
    page = report.write_report(exp_dir, None, tmp_path).read_text(encoding="utf-8")
    assert "Not in this report: " in page and "last.ckpt: not a checkpoint" in page
    assert "0.2500 on training" in page and "Architecture" not in page


def test_command_line(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run["exp_dir"] / "ckpts", tmp_path / "exp/ckpts")
    monkeypatch.setattr(sys, "argv", ["report.py", "--exp_dir", str(tmp_path / "exp"), "--out_dir", str(tmp_path)])
    report.main(report.parse_args())
    assert Path(capsys.readouterr().out.strip()) == tmp_path / report.PAGE
    for arguments, message in (
        ((), "give one of them"),
        (("--exp_dir", tmp_path / "nowhere"), "no experiment there"),
        (("--out_dir", tmp_path), "nothing to report"),
        (("--out_dir", tmp_path, "--evaluation", run["teacher"]), "not the JSON that evaluate.py writes"),
    ):
        monkeypatch.setitem(sys.modules, "report_script", report)
        assert run_to_exit(monkeypatch, "report_script", *arguments) == 1
        assert message in error_line(capsys)


# --- logs ------------------------------------------------------------------------------------------


def write_log(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_log_that_was_continued(tmp_path):
    """Empty cells, values that are none, a row cut short, and updates that were made again."""
    rows = [
        {"step": 49, "train_loss": 3.0},
        {"step": 49, "lr-AdamW/main": 0.1},
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
        "lr-AdamW/main": {50: 0.1},
        "valid_loss": {150: 1.5},
    }


@pytest.mark.parametrize("text", ["", "step,train_loss\n", "\0\0\0\n\xff", "train_loss\n1.0\n"])
def test_log_of_nothing(tmp_path, text):
    path = tmp_path / "exp/csv/version_0/metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="no experiment there"):
        report.write_report(tmp_path / "exp", None, tmp_path)
    assert pictures.training(Stage("distill", "distillation", read_log(path))) == []


def long_log(num_rows: int) -> dict[str, dict[int, float]]:
    updates = range(50, 50 * num_rows + 1, 50)
    generator = np.random.default_rng(0)
    return {
        "train_loss": {update: 1 / update + 0.01 * generator.random() for update in updates},
        "valid_loss": {update: 1 / update for update in list(updates)[9::10]},
        "sparsity_expected": {update: min(0.75, update / 5000) for update in updates},
        "sparsity_target": {update: min(0.75, update / 6000) for update in updates},
        "lambda1": {update: -update * 1e-3 for update in updates},
        "lambda2": {update: update * 1e-2 for update in updates},
        "lr-AdamW/main": {update: 1e-4 for update in updates},
        "lr-AdamW/log_alpha": {update: 0.02 for update in updates},
        "lr-AdamW/lambda": {update: 0.02 for update in updates},
        "grad_norm": {update: 10.0 ** (update % 3) for update in updates},
    }


@pytest.mark.parametrize("num_rows", [1, 20, 3000])
def test_logs_of_all_lengths(num_rows):
    drawn = pictures.training(Stage("distill", "distillation", long_log(num_rows)), 0.75)
    assert [picture.name.removeprefix("distill_") for picture in drawn] == [
        *("sparsity", "multipliers", "loss", "learning_rates", "gradient_norm")
    ]
    for picture in drawn:
        assert_tidy(picture)
        assert len(pictures.as_svg(picture)) < 80_000  # long logs are averaged
    points = drawn[0].figure.axes[0].lines[0].get_xdata()
    assert len(points) == min(num_rows, pictures.MOST_POINTS) and points[-1] >= 50 * (num_rows - 10)
    assert "0.02 for masks, multipliers" in drawn[3].caption


# --- pictures --------------------------------------------------------------------------------------


def assert_tidy(picture: pictures.Picture) -> None:
    """Everything is inside the figure, no tick labels overlap, and the legend is not over data."""
    figure = picture.figure
    pictures.settle(figure)
    whole = figure.bbox.padded(1)
    boxes = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [
                tick.label1.get_window_extent()
                for tick in axis.get_major_ticks()
                if tick.label1.get_visible() and tick.label1.get_text() and low <= tick.get_loc() <= high
            ]
            for one, other in itertools.combinations(labels, 2):
                assert not Bbox.intersection(one, other), f"{picture.name}: tick labels overlap"
            boxes += labels
        boxes.append(axes.get_window_extent())
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(Bbox.intersection(box, axes.get_window_extent()) for axes in figure.axes), picture.name
        boxes.append(box)
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1, f"{picture.name}: {box} is cut off"
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1, f"{picture.name}: {box} is cut off"


def deep_config(num_layers: int) -> dict[str, Any]:
    return small_config(
        "hubert",
        "large",
        encoder_num_layers=num_layers,
        encoder_use_attention=[True] * num_layers,
        encoder_use_feed_forward=[True] * num_layers,
        encoder_num_heads=[16] * num_layers,
        encoder_ff_interm_features=[4096] * num_layers,
    )


def pruned_at_random(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Blocks of all sizes, one in five of them removed."""
    generator = np.random.default_rng(seed)
    config = copy.deepcopy(config)
    num_layers = config["encoder_num_layers"]
    for key in ("encoder_num_heads", "encoder_ff_interm_features"):
        config[key] = [max(1, int(count * generator.random())) for count in config[key]]
    for key in ("encoder_use_attention", "encoder_use_feed_forward"):
        config[key] = [bool(generator.random() < 0.8) for _ in range(num_layers)]
    return config


@pytest.mark.parametrize(("num_layers", "num_models"), [(1, 1), (1, 3), (12, 3), (24, 9), (48, 3), (256, 1)])
def test_architectures_of_all_sizes(num_layers, num_models):
    original = shape_of(deep_config(num_layers), "config")[0]
    names = ["one", "a model with an exceedingly long name which goes on and on", "_x", *"345678"][:num_models]
    configs = {name: pruned_at_random(original, seed) for seed, name in enumerate(names)}
    drawn = pictures.architecture(configs, original, pictures.styles(names))
    assert {picture.name for picture in drawn} == ARCHITECTURE_PICTURES
    for picture in drawn:
        assert_tidy(picture)
        assert len(picture.figure.axes) == num_models


def test_removed_blocks_are_marked():
    original = shape_of(deep_config(4), "config")[0]
    config = original | {"encoder_use_attention": [True, False, True, False], "encoder_num_heads": [8, 16, 0, 16]}
    drawn = {p.name: p for p in pictures.architecture({"m": config}, original, pictures.styles(["m"]))}
    heads = drawn["architecture_heads"]
    assert "8 of 64 kept" in heads.caption
    (marks,) = heads.figure.axes[0].lines
    assert marks.get_xdata().tolist() == [2, 3, 4]
    assert "none left" in pictures.as_svg(heads)
    assert "none left" not in pictures.as_svg(drawn["architecture_ffn"])


def test_colours_belong_to_models():
    looks = pictures.styles([str(number) for number in range(20)] + ["t"], ["t"])
    assert len(set(looks.values())) == 21 and looks["t"].colour == pictures.INK
    assert looks["3"] == pictures.styles(["0", "1", "2", "3"])["3"]


# --- evaluations -----------------------------------------------------------------------------------


def results(names: tuple[str, ...] = ("teacher", "small"), tasks: tuple[str, ...] = ("keywords",)) -> dict[str, Any]:
    """What evaluate.py writes, for models of three layers of which the first is the teacher."""
    config = shape_of(small_config("hubert"), "config")[0]
    models = []
    for place, name in enumerate(names):
        pruned = pruned_at_random(config, place) if place else config
        layers = [{"layer": n, "l1": 0.1 * n + 0.1 * place, "cosine": 0.9, "cka": 0.95} for n in (0, 1, 3)]
        speed = [{"seconds": s, "batch": 1, "threads": 1, "real_time_factor": 0.0123} for s in (2, 10)]
        probe = {"mean": 90.0 - place, "std": 1.25, "accuracies": [89.0, 91.0], "layer_weights": [0.1, 0.2, 0.3, 0.4]}
        models.append(
            {
                "name": name,
                "path": f"models/{place}.pth",
                "is_teacher": place == 0,
                "config": pruned,
                "cost": {
                    "num_params": 94_700_000 - 1_234_567 * place,
                    "num_bytes": 378_800_000,
                    "macs_per_second": {"conv": 2.5e9, "transformer": 4.8e9, "total": 7.3e9},
                    "superb_macs": {"conv": 5e11, "transformer": 1.169e12, "total": 1.669e12},
                    "speed": speed,
                },
                "fidelity": {
                    "mode": "layer2layer",
                    "tsv": "valid.tsv",
                    "num_utterances": 7,
                    "hours": 0.5,
                    "layers": layers,
                }
                if place
                else None,
                "probes": {task: copy.deepcopy(probe) for task in tasks},
            }
        )
    control = {"mean": 40.0, "std": 0.0, "accuracies": [40.0], "layer_weights": [1.0]}
    return {
        "made_by": {"command": "python evaluate.py", "versions": {"torch": "2.11.0"}, "device": "cpu", "threads": 1},
        "teacher": names[0],
        "models": models,
        "controls": {"log-mel": {task: control for task in tasks}},
        "probes": {task: {"num_classes": 10, "num_train": 50, "num_test": 20, "chance": 12.5} for task in tasks},
    }


def test_evaluation_alone(tmp_path):
    text = report.write_report(None, results(tasks=("keywords", "speakers")), tmp_path).read_text(encoding="utf-8")
    page = assert_stands_alone(text)
    for expected in (
        *("93,465,433", "7.300", "1,669.0", "0.0123", "1 × 10 s, 1 thread", "0.2000", "89.00 ± 1.25", "40.00 ± 0.00"),
        *("12.50", "teacher (teacher)", "10 classes, 50 clips to train, 20 to test", "python evaluate.py"),
    ):
        assert expected in page.text, expected
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert names == ARCHITECTURE_PICTURES | {"fidelity", "probe_accuracy", "accuracy_over_size", "layer_weights"}


def test_experiment_and_its_evaluation(run, tmp_path):
    """Models that are of the experiment are shown once, with the MACs that were measured."""
    evaluated = results()
    exp_dir = tmp_path / "exp"
    for folder in (Path("ckpts"), Path("final/ckpts")):  # without the logs, whose pictures take time
        shutil.copytree(run["exp_dir"] / folder, exp_dir / folder)
    final = exp_dir / "final/ckpts/pruned_hubert_base.pth"
    evaluated["models"][1] |= {"path": str(final), "config": checkpoint.read_model_file(final)["config"]}
    text = report.write_report(exp_dir, evaluated, tmp_path).read_text(encoding="utf-8")
    (row,) = re.findall(r"<tr><th scope=row>after final distillation</th>.*</tr>", text)
    assert "<td class=n>7.300</td>" in row
    assert "<th scope=col class=n>heads</th>" in text  # one model: not named in every column
    other = report.write_report(exp_dir, results(), tmp_path).read_text(encoding="utf-8")
    assert "exp: heads" in other and "small: heads" in other


@pytest.mark.parametrize(
    "strip",
    [
        lambda e: e.update(controls={}, probes={}) or [m.update(probes={}) for m in e["models"]],
        lambda e: [m.update(fidelity=None) or m["cost"].pop("speed") for m in e["models"]],
        lambda e: [m.update(cost={}, probes=None, fidelity={"layers": []}) for m in e["models"]],
        lambda e: e.update(models=e["models"][1:], teacher=None) or e.pop("controls"),
        lambda e: [m["fidelity"]["layers"][0].update(l1=None, cosine=None) for m in e["models"][1:]],
        lambda e: e.update(models=[]),
        lambda e: [m.pop("config") for m in e["models"]],
        lambda e: [m.update(name="same") for m in e["models"]],
    ],
)
def test_evaluation_of_less(tmp_path, monkeypatch, strip):
    monkeypatch.setattr(pictures, "DPI", 40)  # quicker
    evaluated = results()
    strip(evaluated)
    evaluated = json.loads(json.dumps(evaluated))
    text = report.write_report(None, evaluated, tmp_path).read_text(encoding="utf-8")
    Page(text)
    assert not re.search(r"\b(nan|None)\b", text)
    for model in evaluated["models"]:
        assert model["name"] in text


@pytest.mark.parametrize("wrong", [{}, {"models": None}, {"models": ["a"]}])
def test_evaluation_that_is_none(tmp_path, wrong):
    with pytest.raises(UserError, match="a list of models"):
        report.write_report(None, wrong, tmp_path)


def test_pictures_of_many_models():
    names = [f"model {number} of a series with long names" for number in range(10)]
    looks = pictures.styles(names, names[:1])
    scores = {task: {name: pictures.Score(50.0 + n, 2.0) for n, name in enumerate(names)} for task in ("one", "two")}
    layers = {name: [{"layer": n, "l1": 0.1 * n, "cka": 0.9} for n in range(49)] for name in names}
    drawn = [
        *pictures.fidelity(layers, looks),
        *pictures.probe_accuracies(scores, {"one": 10.0}, looks),
        *pictures.accuracy_over_size(scores, {name: 10 ** (5 + n // 2) for n, name in enumerate(names)}, looks),
        *pictures.layer_weights({"one": {name: [1 / 49] * 49 for name in names}}, looks),
    ]
    assert len(drawn) == 4
    for picture in drawn:
        assert_tidy(picture)


# --- hostile text ----------------------------------------------------------------------------------


def test_hostile_names_are_text(tmp_path):
    """Names of models, tasks and controls, paths, commands and versions come from files."""
    evaluated = results(names=("teacher", HOSTILE, "_hidden"), tasks=(HOSTILE, "$x^$"))
    evaluated["controls"][HOSTILE] = evaluated["controls"].pop("log-mel")
    evaluated["made_by"] = {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "device": HOSTILE, "threads": HOSTILE}
    evaluated["models"][1]["fidelity"] |= {"mode": HOSTILE, "tsv": HOSTILE}
    text = report.write_report(None, evaluated, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img"} & set(page.tags) and "\x1b" not in text
    assert all(reference.startswith("#") for reference in page.references)
    assert "<script>alert('1')</script>" in page.text and "$\\frac{1}{$" in page.text
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert "_hidden" in svg and "$x^$" in svg  # in the legend too


def test_hostile_settings_are_text(run, tmp_path):
    exp_dir = tmp_path / "exp <b>&"
    (exp_dir / "ckpts").mkdir(parents=True)
    contents = checkpoint.read(run["exp_dir"] / "ckpts/last.ckpt")
    contents["distillation"]["settings"] |= {HOSTILE: HOSTILE, "train_subset": {"fingerprint": HOSTILE}}
    contents["pytorch-lightning_version"] = HOSTILE
    checkpoint.save(exp_dir / "ckpts/last.ckpt", contents)
    write_log(exp_dir / "csv/version_0/metrics.csv", [{"step": 1, HOSTILE: 1.0, f"lr-{HOSTILE}": 0.1}])
    assert read_experiment(exp_dir).notes == []
    text = report.write_report(exp_dir, None, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "b"} & set(page.tags)
    assert page.text.count("<script>alert('1')</script>") >= 3 and "exp <b>&" in page.text
