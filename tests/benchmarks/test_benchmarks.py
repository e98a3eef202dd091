"""The benchmarks run, with tiny models and files; how fast they find the program is docs/performance.md's business."""

import csv
from pathlib import Path

import pytest
import torch
from helpers import error_line, one_layer_config, run_script, run_to_exit, small_config, start_script

from benchmarks import bench_data, bench_gpu, updates
from benchmarks.results import Result, write_results
from dataset.batches import BatchSampler
from dataset.manifest import read_manifest
from dataset.speech import SpeechDataset
from training import speed
from wav2vec2.model import wav2vec2_model

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(updates, "DISTILLED", [[0], [1, 3]])
    monkeypatch.setattr(updates, "TEACHERS", {"HuBERT Base": lambda: wav2vec2_model(**small_config("hubert"))})
    monkeypatch.setattr(updates, "compressed_config", lambda name: small_config("hubert"))


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("stage", ["joint", "final"])
def test_an_update_is_the_one_that_training_makes(tiny, stage, path):
    """Every mask and multiplier moves, and the projections, and the teacher does not."""
    update = updates.Update("HuBERT Base", stage, path, "32", (2, 1600), "cpu")
    update()  # the first has learning rate 1/10
    before = {name: value.clone() for name, value in update.module.state_dict().items()}
    assert update() > 0
    after = update.module.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "distill_linear_projs.0.weight" in moved and not any(name.startswith("teacher") for name in moved)
    masks_move = any(name.endswith("log_alpha") for name in moved)
    assert masks_move == ({"lambda1", "lambda2"} <= moved) == (stage == "joint")


@pytest.mark.parametrize(("name", "sparsity"), [("HuBERT Base", 0.75), ("WavLM Base", 0.80)])
def test_compressed_shapes(name, sparsity):
    with torch.device("meta"):
        num_params = wav2vec2_model(**updates.compressed_config(name)).get_num_params()
        teacher = updates.TEACHERS[name]()
    assert abs(1 - num_params / teacher.get_num_params() - sparsity) < 0.01


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_results(tmp_path, capsys):
    write_results(tmp_path / "new" / "r.csv", [Result("update", "plain", 1.23456, "s", 1.0, 5)])
    (row,) = read_rows(tmp_path / "new" / "r.csv")
    assert (row["variant"], row["value"], row["ratio_to_baseline"]) == ("plain", "1.235", "1.000")
    assert row["command"].startswith("python ") and "torch=" in row["versions"] and row["threads"] == "1"
    assert "plain      1.235 s" in capsys.readouterr().out


def test_inference(tiny, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    monkeypatch.setattr(transformers, "HubertConfig", lambda **_: config)
    monkeypatch.setattr(transformers, "WavLMModel", lambda *_: torch.nn.Identity())
    flags = ("--sections", "inference", "--seconds", 1, "--repetitions", 1, "--threads", 1, "--out", tmp_path / "r.csv")
    run_script(monkeypatch, "benchmarks.bench_model", *flags)
    rows = read_rows(tmp_path / "r.csv")
    assert rows[0]["variant"] == "HuBERT Base, transformers 32, 1 s" and rows[0]["ratio_to_baseline"] == "1.000"
    assert len(rows) == 1 + 4 * len(updates.precisions()) and all(float(row["value"]) > 0 for row in rows)


def test_data(tmp_path, monkeypatch):
    flags = ("--num_files", 20, "--workers", 0, 1, "--repetitions", 1, "--num_processes", 1)
    run_script(monkeypatch, "benchmarks.bench_data", *flags, "--out", tmp_path / "r.csv")
    rows = read_rows(tmp_path / "r.csv")
    assert [row["variant"] for row in rows if row["ratio_to_baseline"] == "1.000"] == [
        *("soundfile.info", "soundfile.read, 0 workers", "soundfile.read, 1 workers")
    ]
    assert len(rows) == 8 and all(float(row["value"]) > 0 for row in rows)


def test_both_ways_to_load_read_the_same_crops(tmp_path):
    bench_data.make_corpus(tmp_path, 3, 0.5, 1)
    bench_data.prepare(tmp_path, 1)
    manifest = read_manifest(tmp_path / "tsv" / "train.tsv")
    crop = next(iter(BatchSampler(manifest.lengths, [[0, 2]], 1, 0, True, seed=0)))
    ours = SpeechDataset(manifest)[crop].waveforms
    torch.testing.assert_close(torch.from_numpy(bench_data.BareReads(manifest)[crop]), ours, rtol=0, atol=0)


def test_gpu_code_on_a_cpu(monkeypatch, tmp_path, capsys):
    """It must not fail where a GPU costs money; CPUs have no loss scaler. One layer: compiling takes its time."""
    monkeypatch.setattr(updates, "DISTILLED", [[0], [1]])
    monkeypatch.setattr(updates, "TEACHERS", {"HuBERT Base": lambda: wav2vec2_model(**one_layer_config("hubert"))})
    torch._dynamo.reset()
    monkeypatch.setattr(speed, "COMPILER", "eager")
    monkeypatch.setattr(bench_gpu, "SHAPE", (2, 1600))
    monkeypatch.setitem(bench_gpu.VARIANTS, "published", ("plain", "32"))
    run_script(monkeypatch, "benchmarks.bench_gpu", "--device", "cpu", "--repetitions", 2, "--out", tmp_path / "r.csv")
    variants = [row["variant"] for row in read_rows(tmp_path / "r.csv")]
    assert variants == [f"HuBERT Base, {name}" for name in ("published", "ours", "ours compiled")]
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_to_exit(monkeypatch, "benchmarks.bench_gpu", "--out", tmp_path / "r.csv") == 1
    assert "--device cuda: torch finds no GPU" in error_line(capsys)


def test_memory_is_kept(tmp_path):
    """In another process, as it cannot be undone: a large block that is freed is taken again without page faults.

    After twenty rounds: where the heap starts is random, and how soon it has grown to what fits.
    """
    script = tmp_path / "faults.py"
    script.write_text(
        "import resource, torch\n"
        "from training.speed import keep_freed_memory\n"
        "def work():\n    x = torch.ones(9 << 20)\n    y = x * 2\n    del x, y\n"
        "def faults(rounds_before):\n"
        "    for _ in range(rounds_before):\n        work()\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5):\n        work()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "returned = faults(1)\n"
        "print(returned, faults(20) if keep_freed_memory() else '')\n"
    )
    process = start_script(script.with_suffix(""), output=tmp_path / "faults")
    process.join()
    returned, *kept = map(int, (tmp_path / "faults").read_text().split())
    assert process.exitcode == 0 and returned > 10_000
    assert all(faults < returned / 5 for faults in kept)  # none without glibc
