"""benchmarks.rows and benchmarks.table: the rows of the conf files, their runs, and the table that is made of them."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, error_line, run_command, run_script, run_to_exit, small_config

from benchmarks import rows, students
from wav2vec2.files.errors import UserError
from wav2vec2.model import wav2vec2_model

SCRIPTS = ("make_student", "distill", "final_distill", "finetune")


def rows_of(conf: str) -> list[str]:
    """The cases of a conf file's last case statement."""
    text = (REPOSITORY / "benchmarks" / conf).read_text()
    labels = re.findall(r"^    ([a-z_| ]+)\)", text[text.rindex("case $") :], flags=re.MULTILINE)
    return [row.strip() for label in labels for row in label.split("|") if row.strip()]


def value(command: list[str], flag: str) -> str:
    """The value of a flag, of which the last one counts."""
    return command[len(command) - command[::-1].index(f"--{flag}")]


def trainings(conf: str, row: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of a row's trainings, after a look at their flags."""
    settings = {"row": row, "size": "0.9", "layers": "0.2,4", "students": "S", "labels": "L.tsv", "exp_dir": "E"}
    settings |= {"teacher_ckpt": "T", "tsv_dir": "D"}
    result = run_command("bash", "run.sh", "--print", f"benchmarks/{conf}", **settings)
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line)[2:] for line in result.stdout.splitlines()]
    commands = [command for command in commands if command[0].removesuffix(".py") in SCRIPTS]
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        importlib.import_module(command[0].removesuffix(".py")).parse_args()
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of("methods.conf"))
def test_every_row_makes_as_many_updates_of_as_much_audio(row, monkeypatch):
    updates = 0
    for command in trainings("methods.conf", row, monkeypatch):
        if "--max_updates" in command:  # not a slice
            assert value(command, "seconds_per_batch") == "16" and value(command, "max_crop_seconds") == "4"
            updates += int(value(command, "max_updates"))
    assert updates == (8800 if row.endswith("_longer") else 2200)


@pytest.mark.slow
def test_recipes_make_as_many_updates(monkeypatch):
    made = {
        row: [int(value(command, "max_updates")) for command in trainings("tasks.conf", row, monkeypatch)]
        for row in rows_of("tasks.conf")
    }
    assert made == {
        "compressed": [250, 300, 100],
        "compressed_longer": [250, 300, 650],
        "finetune_first": [100, 250, 300, 100],
        "by_task": [550, 100],
    }


@pytest.mark.parametrize(
    ("row", "layers", "expected"),
    [("units", "0.2,4", "0.2,4"), ("distilhubert", "0.2,4", "2,4"), ("fithubert", "0.2,4", "1.2.3.4")],
)
def test_layers(row, layers, expected):
    assert rows.layers_of(row, layers) == expected


# --- the driver ------------------------------------------------------------------------------------

# Stands for a run: its model is a text of what it was given. A row of the name "fails" fails.
CONF = """
eval "$environment" # run.sh does it behind the conf file
mkdir -p "$exp_dir/final/ckpts"
[[ $row != fails ]] || fail no
echo "$labels $size $layers $*" >"$exp_dir/final/ckpts/pruned_hubert_base.pth"
exit
"""


def test_runs(small_teacher, tmp_path, monkeypatch, capsys):
    """Each is made once; one that fails stops no other, and is made again."""
    (tmp_path / "rows.conf").write_text(CONF)
    flags = ("--sizes", 0.75, 0.9, "--seeds", 0, 1, "--layers", "0.2,3", "--tsv_dir", "D", "--out", tmp_path / "out")
    flags = (tmp_path / "rows.conf", *flags, "--teacher_ckpt", small_teacher, "--rows", "units")
    assert run_to_exit(monkeypatch, "benchmarks.rows", *flags, "fails") == 1
    assert error_line(capsys).startswith("failed: fails-0.75-0, fails-0.9-0, fails-0.75-1, fails-0.9-1; see ")
    assert "error: no" in (tmp_path / "out/logs/fails-0.9-1.log").read_text()
    made = {path.parents[2].name: path.read_text() for path in tmp_path.glob("out/*/final/ckpts/*.pth")}
    assert made.keys() == {"units-0.75-0", "units-0.75-1", "units-0.9-0", "units-0.9-1"}
    assert made["units-0.9-1"] == " 0.9 0.2,3 --seed 1\n"
    run_script(monkeypatch, "benchmarks.rows", *flags)
    assert capsys.readouterr().out == "4 of 4 runs are complete\n"


def test_measuring(small_teacher, tmp_path, monkeypatch):
    """The models of a row are measured together, again where one of them is new."""
    jobs: list[rows.Job] = []

    def run(logs: Path, job: rows.Job) -> None:
        jobs.append(job)
        job.result.parent.mkdir(parents=True, exist_ok=True)
        job.result.write_text("{}")

    monkeypatch.setattr(rows, "run", run)
    flags = ("x.conf", "--rows", "exact", "half_width", "--sizes", 0.6, "--seeds", 0, 1, "--probes", "a.tsv", "b.tsv")
    flags = (*flags, "--layers", "0.2,3", "--tsv_dir", "D", "--teacher_ckpt", small_teacher, "--out", tmp_path)
    for expected in (["exact-0.6-0", "half_width-0.6-0", "exact-0.6-1", "half_width-0.6-1", "exact", "half_width"], []):
        jobs.clear()
        run_script(monkeypatch, "benchmarks.rows", *flags)
        assert [job.name for job in jobs] == expected
    (tmp_path / "exact-0.6-1/final/ckpts/pruned_hubert_base.pth").unlink()
    run_script(monkeypatch, "benchmarks.rows", *flags)
    assert [job.name for job in jobs] == ["exact-0.6-1", "exact"]
    command = jobs[-1].command[1:]
    monkeypatch.setattr(sys, "argv", command)
    args = importlib.import_module("evaluate").parse_args()
    assert args.teacher == small_teacher and args.names == ["exact-0.6-0", "exact-0.6-1"]
    assert [path.name for path in args.probes] == ["a.tsv", "b.tsv"] and args.distill_layers == "0.2,3"
    (student,) = (tmp_path / "students").iterdir()
    assert student.name == "half_width-0.6.json"


def test_dry_run(tmp_path, monkeypatch, capsys):
    """Its commands can be run: run.sh knows the row, and the labels go to their variable."""
    flags = ("--rows", "by_task", "--sizes", 0.9, "--layers", "0.2,3", "--tsv_dir", "D", "--teacher_ckpt", "T.pth")
    flags = ("benchmarks/tasks.conf", *flags, "--labels", "x/digits.tsv", "--out", tmp_path / "out", "--dry_run")
    run_script(monkeypatch, "benchmarks.rows", *flags, "--flags", "--accelerator cpu")
    words = shlex.split(capsys.readouterr().out)
    place = words.index("run.sh") + 1
    shown = run_command("env", *words[:place], "--print", *words[place:]).stdout
    assert "'--task_tsv' 'x/digits.tsv'" in shown and f"{tmp_path}/out/by_task-digits-0.9-0/finetuned" in shown
    assert "'--seed' '0' '--accelerator' 'cpu'" in shown and not (tmp_path / "out").exists()


# --- students --------------------------------------------------------------------------------------

TEACHER = small_config(
    "hubert",
    encoder_embed_dim=48,
    encoder_num_layers=6,
    **{key: [True] * 6 for key in ("encoder_use_attention", "encoder_use_feed_forward")},
    encoder_num_heads=[6] * 6,
    encoder_ff_interm_features=[192] * 6,
)


@pytest.mark.parametrize("size", [0.75, 0.9])
def test_students_use_their_budget_up(size):
    budget = (1 - size) * wav2vec2_model(**TEACHER).get_num_params()
    found = {method: students.student(method, TEACHER, size) for method in students.METHODS}
    for method, changes in found.items():
        count = changes["encoder_ff_interm_features"]
        assert students.num_params(TEACHER, changes) <= budget
        more = students.num_params(TEACHER, {**changes, "encoder_ff_interm_features": count + 1})
        assert more > budget or (method == "distilhubert" and count == 192)
    assert found["distilhubert"]["encoder_num_layers"] == 1
    wide, thin = ((each["encoder_embed_dim"], each["encoder_ff_interm_features"]) for each in list(found.values())[1:])
    assert wide[1] / wide[0] >= 4 and thin[1] / thin[0] >= 1 and wide[0] < thin[0] < 48


def test_a_students_size_is_that_of_its_model():
    changes = {"encoder_num_layers": 2, "encoder_ff_interm_features": 7}
    lists = {"encoder_use_attention": [True] * 2, "encoder_use_feed_forward": [True] * 2, "encoder_num_heads": [6] * 2}
    config = {**TEACHER, **changes, **lists, "encoder_ff_interm_features": [7, 7]}
    assert students.num_params(TEACHER, changes) == wav2vec2_model(**config).get_num_params()
    with pytest.raises(UserError, match=r"distilhubert: no such student has .* parameters or fewer; leave out --sizes"):
        students.student("distilhubert", TEACHER, 0.99)
    with pytest.raises(UserError, match=r"expected a HuBERT or wav2vec 2\.0 as the teacher, found a WavLM"):
        students.student("distilhubert", small_config("wavlm"), 0.5)


# --- the table -------------------------------------------------------------------------------------


def entry(name: str, params: int, rtf: float, scores: dict[str, float], quality: float, **more: Any) -> dict[str, Any]:
    """The entry of a model in a results file."""
    cost = {"num_params": params, "macs_per_second": {"total": 50e6}, "speed": [{"real_time_factor": rtf}]}
    found = {"probes": {name: {"mean": value} for name, value in scores.items()}, "quality": {"mean": quality}}
    return {"name": name, "is_teacher": name == "teacher", "cost": cost, "fidelity": None, **found, **more}


def write(path: Path, **contents: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


@pytest.fixture
def out(tmp_path) -> Path:
    """Two seeds of one method, one of another."""
    teacher = entry("teacher", 8000, 0.04, {"phones": 60}, 100)
    controls = {"log-mel": {"phones": {"mean": 20}}}
    layers = [{"layer": 2, "cosine": 0.9, "cka": 0.8}, {"layer": 4, "cosine": 0.7, "cka": None}]
    exact = [
        entry("exact-0.9-0", 800, 0.01, {"phones": 40}, 50, fidelity={"layers": layers}),
        entry("exact-0.9-1", 802, 0.03, {"phones": 48}, 60, fidelity={"layers": layers}),
    ]
    write(tmp_path / "exact.json", models=[teacher, *exact], controls=controls)
    published = entry("published-0.9-0", 799, 0.02, {"phones": 30}, 37.5)
    write(tmp_path / "published.json", models=[teacher, published], controls=controls)
    return tmp_path


def lines_of(path: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines() if "|" in line]


def test_table_and_pictures(out, monkeypatch):
    run_script(monkeypatch, "benchmarks.table", out)
    header, _, *lines = lines_of(out / "table.md")
    assert [line[0] for line in lines] == ["teacher", "exact", "published", "log-mel"]
    teacher, exact, published, log_mel = (dict(zip(header, line, strict=True)) for line in lines)
    assert exact["quality"] == "55.0 [50.0, 60.0]" and exact["phones"] == "44.0 [40.0, 48.0]"
    assert (exact["parameters"], exact["M MACs a second"], exact["RTF"]) == ("801", "50", "0.0200")
    assert (exact["cosine"], exact["CKA"], exact["off"], exact["seeds"]) == ("0.700", "", "0.9", "2")
    assert (published["RTF"], published["cosine"], published["quality"], published["seeds"]) == (
        *("0.0200", "", "37.5", "1"),
    )
    assert (teacher["quality"], log_mel["phones"], log_mel["parameters"]) == ("100.0", "20.0", "")
    for name in ("parameters", "time"):
        picture = (out / f"methods-{name}.svg").read_text()
        assert ">exact<" in picture and ">published<" in picture and ">teacher<" not in picture


def test_table_of_labels(tmp_path, monkeypatch):
    for run, score in (
        ("by_task-spoken-digits-0.9-0", 90),
        ("by_task-spoken-digits-0.9-1", 93),
        ("by_task-a-0.9-0", 5),
    ):
        write(tmp_path / run / "finetuned/finetuned.json", test={"metric": "accuracy", "value": score})
    run_script(monkeypatch, "benchmarks.table", tmp_path)
    header, _, by_task = lines_of(tmp_path / "table.md")
    found = dict(zip(header, by_task, strict=True))
    assert found["spoken-digits: accuracy"] == "91.5 [90.0, 93.0]" and found["a: accuracy"] == "5.0"
    assert (found["off"], found["seeds"], found["quality"]) == ("0.9", "2", "")
    assert not list(tmp_path.glob("*.svg"))

    write(tmp_path / "by_task-<b>|_\n-0.9-0/finetuned/finetuned.json", test={"metric": "accuracy", "value": 5})
    run_script(monkeypatch, "benchmarks.table", tmp_path)
    assert r"| &lt;b>\|\_ : accuracy |" in (tmp_path / "table.md").read_text()


def test_bad_folders(out, tmp_path, monkeypatch, capsys):
    write(out / "exact.json", models=[entry("DPHuBERT", 1, 0.1, {}, 1)], controls={})
    assert run_to_exit(monkeypatch, "benchmarks.table", out) == 1
    assert "exact.json: not the results of evaluate.py that are expected here (ValueError: " in error_line(capsys)
    (out / "exact.json").write_text("{")
    assert run_to_exit(monkeypatch, "benchmarks.table", out) == 1
    assert "exact.json: not readable as JSON" in error_line(capsys)
    assert run_to_exit(monkeypatch, "benchmarks.table", tmp_path / "none") == 1
    assert "has neither ROW.json nor finetuned.json; run benchmarks.rows" in error_line(capsys)
