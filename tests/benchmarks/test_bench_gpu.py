"""The GPU benchmark's code, run on a CPU with tiny models: it must not fail where a GPU costs money."""

import csv
import sys

import pytest
import torch
from helpers import run_command
from torch._dynamo.utils import counters

from benchmarks import bench_gpu
from training import compiling


@pytest.fixture
def bench(monkeypatch) -> bench_gpu.Bench:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", compiling.BACKEND)  # a tiny benchmark sets another
    monkeypatch.setattr(bench_gpu, "UPDATES", 2)
    yield bench_gpu.Bench("cpu", tiny=True, seconds=1000)
    torch._dynamo.reset()


@pytest.mark.parametrize("section", ["hubert", "wavlm"])
def test_updates(bench, section):
    results = {result.variant: result for result in bench_gpu.SECTIONS[section](bench)}
    paths = {name.partition(": ")[0].partition(", ")[2] for name in results}
    assert paths == {"plain 32", "fast bf16", "fast bf16 compiled"}
    (graphs,) = [result.value for name, result in results.items() if "graphs compiled" in name]
    assert graphs == 0 and compiling.num_compiled_graphs() == 2
    speeds = [result for name, result in results.items() if name.endswith(": update")]
    assert speeds[0].ratio == 1 and all(result.value > 0 and result.repetitions == 2 for result in speeds)


@pytest.mark.parametrize(("section", "attribute"), [("recompute", "recompute"), ("channels", "channels_last")])
def test_settings_reach_the_models(bench, section, attribute, monkeypatch):
    seen = []
    measured = bench_gpu.Update.__call__

    def call(update: bench_gpu.Update) -> None:
        seen.append(getattr(update.module.student_model.feature_extractor, attribute))
        measured(update)

    monkeypatch.setattr(bench_gpu.Update, "__call__", call)
    assert len(list(bench_gpu.SECTIONS[section](bench))) == 4
    assert list(dict.fromkeys(seen)) == [False, True]


def test_inference(bench):
    results = list(bench_gpu.SECTIONS["inference"](bench))
    assert len(results) == 8 and all(result.ratio > 0 and result.unit == "RTF" for result in results)


def test_no_compiling_without_time():
    short = bench_gpu.Bench("cpu", tiny=True, seconds=bench_gpu.COMPILING_SECONDS - 1)
    assert not any("compiled" in result.variant for result in bench_gpu.SECTIONS["inference"](short))


def test_sections_stay_below_eight_minutes():
    assert sum(seconds + 5 for seconds in bench_gpu.SECTION_SECONDS.values()) < 480


def test_one_command(tmp_path):
    out = tmp_path / "new" / "results.csv"
    flags = ("--tiny", "--device", "cpu", "--sections", "channels")
    result = run_command("bash", "benchmarks/gpu.sh", out, *flags, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"].partition(":")[0] for row in rows] == ["channels first"] * 2 + ["channels last"] * 2
    assert result.stdout.splitlines()[-1] == f"written to {out}" and "channels last: update" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--out", str(tmp_path / "out.csv")])
    with pytest.raises(SystemExit):
        bench_gpu.cli.run(bench_gpu.main, bench_gpu.parse_args())
    assert "no GPU is found; --tiny --device cpu shows that this script runs" in capsys.readouterr().err
