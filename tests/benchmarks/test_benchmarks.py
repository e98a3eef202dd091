"""The model's benchmarks run; how fast they find the model is docs/performance.md's business."""

import csv
import sys

import pytest
import torch
from helpers import run_command, small_config

from benchmarks import bench_model
from wav2vec2.model import wav2vec2_model


@pytest.mark.parametrize("stage", bench_model.STAGES)
def test_update_in_parts(stage, tmp_path, monkeypatch):
    """The timed update is the one that training makes: every weight, mask and multiplier moves."""
    monkeypatch.setattr(bench_model, "DISTILLED", [[0], [1, 3]])
    monkeypatch.setattr(bench_model, "TEACHERS", {"HuBERT Base": lambda: wav2vec2_model(**small_config("hubert"))})
    monkeypatch.setattr(bench_model, "compressed_config", lambda name: small_config("hubert"))
    batches = bench_model.load_batches(bench_model.make_manifest(tmp_path, 0.1), 0.1)
    update = bench_model.TimedUpdate("HuBERT Base", stage, batches, plain=False, precision="32")
    update()  # the first has learning rate 1/10
    before = {name: value.clone() for name, value in update.module.state_dict().items()}
    parts = update()
    assert len(parts) == len(bench_model.TimedUpdate.PARTS) and min(parts) > 0
    after = update.module.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "distill_linear_projs.0.weight" in moved and not any(name.startswith("teacher") for name in moved)
    masks_move = any(name.endswith("log_alpha") for name in moved)
    assert masks_move == ({"lambda1", "lambda2"} <= moved) == (stage == "joint")


@pytest.mark.parametrize(("name", "sparsity"), [("HuBERT Base", 0.75), ("WavLM Base", 0.80)])
def test_compressed_shapes(name, sparsity):
    with torch.device("meta"):
        num_params = wav2vec2_model(**bench_model.compressed_config(name)).get_num_params()
        teacher = bench_model.TEACHERS[name]()
    assert abs(1 - num_params / teacher.get_num_params() - sparsity) < 0.01


def test_peak_memory_counts_what_is_freed_again():
    megabytes = bench_model.peak_memory(lambda: torch.ones(16 << 20).mul(2))  # twice 64 MB
    assert 120 < megabytes < 140


def test_inference_section(tmp_path):
    out = tmp_path / "results.csv"
    flags = ("--sections", "inference", "--seconds", 1, "--batch", 1, "--repetitions", 1, "--threads", 1)
    result = run_command(sys.executable, "benchmarks/bench_model.py", "--out", out, *flags)
    assert result.returncode == 0, result.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["unit"] for row in rows} == {"RTF", "MB"} and all(float(row["ratio_to_baseline"]) > 0 for row in rows)
    assert sum("transformers" in row["variant"] for row in rows) == 4 and "torch=" in rows[0]["versions"]


def test_memory_is_kept():
    """In another process, as it cannot be undone: a large block that is freed is taken again without page faults.

    After twenty rounds: where the heap starts is random, and how soon it has grown to what fits.
    """
    code = (
        "import resource, sys, torch\n"
        "from training.speed import keep_freed_memory\n"
        "if len(sys.argv) > 1 and not keep_freed_memory():\n    sys.exit(3)\n"
        "def work():\n    x = torch.ones(16 << 20)\n    y = x * 2\n    del x, y\n"
        "for _ in range(20):\n    work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5):\n    work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    kept, returned = (run_command(sys.executable, "-c", code, *extra) for extra in (("keep",), ()))
    assert kept.returncode in (0, 3)
    if kept.returncode == 0:  # glibc
        assert int(kept.stdout) < int(returned.stdout) / 5
