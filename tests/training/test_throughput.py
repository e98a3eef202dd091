"""Speed as it is logged: the arithmetic behind it, and that it lands in a run's log."""

import csv

import pytest
import torch
from helpers import hubert_base_flops, make_module, random_model, run_script, small_config, small_run

from training.throughput import COLUMNS, FetchTimer, peak_flops
from wav2vec2.flops import forward_flops
from wav2vec2.model import hubert_base, with_masks


@pytest.mark.parametrize("seconds", [1, 5, 15])
def test_operations_of_hubert_base(seconds):
    with torch.device("meta"):
        model = hubert_base()
    counted = forward_flops(model, 12)(seconds * 16000)
    assert counted == pytest.approx(hubert_base_flops(seconds * 16000), rel=2e-3)


def test_masks_cost_nothing_and_layers_count():
    model = random_model(small_config("wavlm"))
    masked = random_model(with_masks(small_config("wavlm"), ["head", "interm"]))
    assert forward_flops(masked, 3)(16000) == forward_flops(model, 3)(16000) > forward_flops(model, 1)(16000)


def test_an_update_costs_the_teacher_once_and_the_student_three_times():
    module = make_module()
    teacher, student = (forward_flops(model, 3)(16000) for model in (module.teacher_model, module.student_model))
    assert module.update_flops()(16000) == pytest.approx(teacher + 3 * student)


def test_peaks():
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "32") == 19.5e12
    assert peak_flops("Tesla T4", "16") == 65e12
    assert peak_flops("NVIDIA L40S", "16") == 362e12
    assert peak_flops("a device of the future", "16") is None


def test_only_fetching_counts_as_waiting(monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = FetchTimer()
    timer.start("[_TrainingEpochLoop].train_dataloader_next")
    timer.start("run_training_batch")
    timer.stop("run_training_batch")
    timer.stop("[_TrainingEpochLoop].train_dataloader_next")
    assert timer.seconds == 2.0


def test_a_run_logs_its_speed(manifests, small_teacher, tmp_path, monkeypatch):
    flags = small_run(manifests, small_teacher, max_updates=6, log_interval=3, seconds_per_batch=0.6, accum_grad=2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["updates_per_second"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    for row in rows:
        values = {name: float(row[name]) for name in COLUMNS if row.get(name)}
        # There is no data sheet of this machine's CPU.
        assert values.keys() == set(COLUMNS) - {"share_of_peak", "compiled_graphs"}
        assert 0 <= values["data_wait"] < 1 and values["tflops_per_second"] > 0 and values["peak_memory_gb"] > 0.1
        # Each update has two batches of up to three crops of 0.2 s.
        ratio = values["audio_seconds_per_second"] / values["updates_per_second"]
        assert 0.4 <= ratio <= 1.2 + 1e-6
