"""The scripts as a user calls them, from raw audio to the loaded checkpoint, and what they say to bad input."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PRUNING,
    REPOSITORY,
    as_words,
    error_line,
    largest_difference,
    last_checkpoint,
    load_as_others_do,
    load_masked_model,
    logged,
    made_up_profile,
    run_command,
    run_script,
    run_to_exit,
    save_small_model,
    small_run,
)

from evaluation.cost import made_by
from training.data import SpeechDataModule
from training.settings import DataSettings
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.profiles import Profile
from wav2vec2.sparsity import size_of

pytestmark = pytest.mark.slow

MINI_HUBERT = REPOSITORY / "demo" / "mini-hubert"
TARGET = 0.75


# --- the whole job ---------------------------------------------------------------------------------


def test_from_raw_audio_to_the_loaded_model(manifests, tmp_path, monkeypatch, capsys):
    """The commands of run.sh on a teacher converted from Hugging Face: every stage, every output, the target met."""
    teacher = tmp_path / "teacher.pth"
    run_script(monkeypatch, "convert_hubert_from_hf", "--model", MINI_HUBERT, "--out", teacher)
    config = tmp_path / "job.conf"
    config.write_text(
        f"# a short run\nteacher_ckpt={teacher}\ntsv_dir={manifests}\nexp_dir={tmp_path / 'exp'}\n"
        "shared=(--train_subset train100 --seconds_per_batch 2 --max_crop_seconds 0.5 --distill_layers 0.2,4,6\n"
        "    --accelerator cpu --log_interval 5)\n"
        "distill=(--pruning_units conv,head,interm --learning_rate 1e-3 --warmup_updates 3 --max_updates 12\n"
        "    --sparsity_warmup_updates 6 --reg_learning_rate 0.2)\n"
        "final=(--learning_rate 5e-4 --warmup_updates 1 --max_updates 3)\n"
    )
    commands = run_command("bash", "run.sh", "--print", config, "--num_workers", 1).stdout.splitlines()
    warnings = {}
    for _, _python, script, *words in map(shlex.split, commands[:-1]):
        capsys.readouterr()
        run_script(monkeypatch, script.removesuffix(".py"), *words)
        warnings[script] = "warning" in capsys.readouterr().err
    assert list(warnings) == ["distill.py", "prune.py", "final_distill.py", "save_final_ckpt.py"]
    assert not warnings["prune.py"]

    for exp_dir, num_updates in ((tmp_path / "exp", 12), (tmp_path / "exp" / "final", 3)):
        trained = last_checkpoint(exp_dir)
        assert trained["global_step"] == num_updates
        assert not any(key.startswith("teacher_model.") for key in trained["state_dict"])
        assert [path.name for path in (exp_dir / "ckpts").glob("*.ckpt")] == ["last.ckpt"]
        assert list((exp_dir / "tensorboard").rglob("events*"))
    columns = {name for row in logged(tmp_path / "exp") for name in row}
    parts = {"", "_distill", "_mse", "_l1", "_cos", "_reg"}
    assert {f"{mode}_loss{part}" for mode in ("train", "valid") for part in parts} <= columns
    assert {"sparsity_expected", "sparsity_target", "lambda1", "lambda2"} <= columns
    final = tmp_path / "exp" / "final" / "ckpts" / "pruned_hubert_base.pth"
    model = load_as_others_do(final)
    original = load_as_others_do(teacher).get_num_params()
    assert abs(1 - model.get_num_params() / original - TARGET) < 0.005
    hidden, _ = model.extract_features(torch.randn(2, 16000))
    assert len(hidden) == 7 and all(torch.isfinite(h).all() for h in hidden)

    capsys.readouterr()
    run_script(monkeypatch, "report.__main__", tmp_path / "exp")
    assert (tmp_path / "exp" / "report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"{original:,}" in printed and f"{model.get_num_params():,}" in printed
    assert "met within 0.5%" in printed


def test_stages_for_another_family(manifests, tmp_path, monkeypatch, capsys):
    teacher = save_small_model(tmp_path / "teacher.pth", "wavlm", "large")
    exp_dir = tmp_path / "exp"
    flags = small_run(manifests, teacher, max_updates=2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", exp_dir, "--target_sparsity", 0.4)
    capsys.readouterr()
    run_script(monkeypatch, "prune", "--distilled_ckpt", exp_dir / "ckpts/last.ckpt", "--original_ckpt", teacher)
    config = json.loads(capsys.readouterr().out)
    pruned = exp_dir / "ckpts" / "pruned_hubert_base.pth"
    assert checkpoint.read_model_file(pruned)["config"] == config
    final = small_run(manifests, teacher, student_ckpt=pruned, max_updates=2)
    run_script(monkeypatch, "final_distill", *final, "--exp_dir", exp_dir / "final")
    last = exp_dir / "final" / "ckpts" / "last.ckpt"
    run_script(monkeypatch, "save_final_ckpt", "--config_path", pruned, "--ckpt_after_final_distill", last)
    final = load_as_others_do(last.parent / "pruned_hubert_base.pth")
    assert final.config == config
    weights = [dict(load_as_others_do(path).state_dict()) for path in (pruned, last.parent / "pruned_hubert_base.pth")]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_joint_training_drives_the_expected_size_to_the_target(manifests, tmp_path, monkeypatch, capsys):
    """The Lagrangian does the work: little is left for prune.py to correct, at a size on the way, too."""
    shapes = {"encoder_ff_interm_features": [200] * 3}  # fine units
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base", **shapes)
    exp_dir = tmp_path / "exp"
    size_of_run = {"max_updates": 350, "warmup_updates": 35, "max_crop_seconds": 0.05, "seconds_per_batch": 0.1}
    flags = small_run(manifests, teacher, **size_of_run, log_interval=50, valid_interval=1000)
    pruning = {"target_sparsity": 0.6, "reg_learning_rate": 0.15, "sparsity_warmup_updates": 200}
    pruning |= {"pruning_units": "conv,head,interm", "save_at_sparsity": 0.3}
    run_script(monkeypatch, "distill", *flags, *as_words(pruning), "--exp_dir", exp_dir)
    expected = [float(row["sparsity_expected"]) for row in logged(exp_dir) if "sparsity_expected" in row]
    assert abs(expected[-1] - 0.6) < 0.06
    num_before, size = load_as_others_do(teacher).get_num_params(), exp_dir / "sparsity_0.3"
    assert last_checkpoint(size)["global_step"] == 100
    for folder, target in ((exp_dir, 0.6), (size, 0.3)):
        capsys.readouterr()
        last = folder / "ckpts" / "last.ckpt"
        run_script(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", teacher)
        printed = capsys.readouterr().err
        assert "warning" not in printed
        num_after = load_as_others_do(folder / "ckpts" / "pruned_hubert_base.pth").get_num_params()
        assert abs(1 - num_after / num_before - target) < 0.005


def test_every_unit_to_both_budgets(manifests, tmp_path, monkeypatch, capsys):
    """Frames of fewer dimensions and fewer taps come out of every stage; neither budget is exceeded, one is used up."""
    shapes = {"encoder_ff_interm_features": [300] * 3, "encoder_embed_dim": 64, "encoder_pos_conv_kernel": 16}
    teacher = save_small_model(tmp_path / "teacher.pth", "wavlm", "base", **shapes)
    exp_dir, final = tmp_path / "exp", tmp_path / "exp" / "final"
    flags = small_run(manifests, teacher, sparsity_warmup_updates=3, reg_learning_rate=0.3)
    targets = {"sparsity": 0.6, "macs": 0.62}
    chosen = ("--target_sparsity", targets["sparsity"], "--target_macs", targets["macs"], "--student_dropout", 0)
    control = ("--pruning_units", "conv,head,interm,posconv,embed")
    run_script(monkeypatch, "distill", *flags, *chosen, *control, "--exp_dir", exp_dir)
    rows = [row for row in logged(exp_dir) if "macs_expected" in row]
    margins = [min(float(row[f"{name}_expected"]) - float(row[f"{name}_target"]) for name in targets) for row in rows]
    assert margins == pytest.approx([0] * 6, abs=1e-4)
    capsys.readouterr()
    run_script(monkeypatch, "prune", "--distilled_ckpt", exp_dir / "ckpts/last.ckpt", "--original_ckpt", teacher)
    printed = capsys.readouterr().err
    assert "sparsity: target 0.6000" in printed and "multiply-adds gone: target 0.6200" in printed
    pruned = exp_dir / "ckpts" / "pruned_hubert_base.pth"
    run = small_run(manifests, teacher, student_ckpt=pruned, max_updates=2)
    run_script(monkeypatch, "final_distill", *run, "--exp_dir", final)
    last = final / "ckpts" / "last.ckpt"
    run_script(monkeypatch, "save_final_ckpt", "--config_path", pruned, "--ckpt_after_final_distill", last)
    saved = last.parent / "pruned_hubert_base.pth"
    student, original = load_as_others_do(saved), load_as_others_do(teacher)
    config = student.config
    assert config["encoder_embed_dim"] < 64 and config["encoder_pos_conv_kernel"] < 16
    gone = [1 - after / before for after, before in zip(size_of(student)[:2], size_of(original)[:2], strict=True)]
    beyond = [share - target for share, target in zip(gone, targets.values(), strict=True)]
    assert min(beyond) > -0.02 and min(map(abs, beyond)) < 0.02  # a head is that much of such models
    evaluated = tmp_path / "evaluation.json"
    measured = ("--teacher", teacher, "--models", saved, "--tsv", manifests / "valid.tsv", "--out", evaluated)
    run_script(monkeypatch, "evaluate", *measured, "--device", "cpu", "--distill_layers", "0.1,3", "--speed_seconds")
    assert json.loads(evaluated.read_text())
    run_script(monkeypatch, "report.__main__", exp_dir)
    report = (exp_dir / "report.html").read_text()
    assert "multiply-adds gone" in report and f"{config['encoder_embed_dim']}/64" in report


def test_a_target_in_time(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """The exact control meets it; prune.py rounds as the machine likes, says what came of it, and the report too."""
    original = load_as_others_do(small_teacher)
    about = {"made_by": {"device": "another machine"}, "multiple": 2}
    contents = made_up_profile(original, 0.4, lambda op, x, y: 100 + 3 * x * y if op.kind == "conv" else 20 * x) | about
    here = contents | {"made_by": made_by(torch.device("cpu")), "multiple": 1}
    path, exp_dir = tmp_path / "profile.json", tmp_path / "exp"
    path.write_text(json.dumps(contents))
    flags = (*small_run(manifests, small_teacher, sparsity_warmup_updates=3), "--exp_dir", exp_dir)
    target = ("--target_latency", 0.4, "--latency_profile")
    run_script(monkeypatch, "distill", *flags, *target, path, "--pruning_units", "conv,interm")
    rows = [row for row in logged(exp_dir) if "latency_expected" in row]
    assert float(rows[-1]["latency_expected"]) == pytest.approx(0.4, abs=1e-4) and "sparsity_target" not in rows[-1]

    moved = path.rename(tmp_path / "moved.json")  # the contents count
    again = (*flags, "--pruning_units", "conv,interm", "--resume_checkpoint", "auto")
    capsys.readouterr()
    run_script(monkeypatch, "distill", *again, *target, moved)
    assert "complete already" in capsys.readouterr().out
    path.write_text(json.dumps(here))
    assert run_to_exit(monkeypatch, "distill", *again, *target, path) == 1
    assert "latency_profile" in error_line(capsys)

    last = exp_dir / "ckpts/last.ckpt"
    run_script(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher)
    printed = capsys.readouterr().err
    profile, pruned = Profile(contents), load_as_others_do(exp_dir / "ckpts/pruned_hubert_base.pth")
    times = [float(profile.total(model.operations(profile.num_samples))) for model in (pruned, original)]
    assert f"time: {times[0] / times[1]:.4f} of the teacher's" in printed and "of another machine" in printed
    assert times[0] / times[1] == pytest.approx(0.6, abs=0.02)
    assert all(channels % 2 == 0 for channels, _, _ in pruned.config["extractor_conv_layer_config"])
    run_script(monkeypatch, "report.__main__", exp_dir)
    report = (exp_dir / "report.html").read_text()
    assert f"time: {times[0] / times[1]:.4f} of the teacher" in report and "time gone (%)" in report

    checkpoint_here = torch.load(last, weights_only=True)
    checkpoint_here["distillation"]["settings"]["latency_profile"] = json.dumps(here)
    torch.save(checkpoint_here, last)
    run_script(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher)
    printed = capsys.readouterr().err
    assert re.search(
        r"time: 0\.\d+ of the teacher's \(.*ms/s\) expected, \d\.\d+ of the teacher's \(.*\) measured", printed
    )
    checkpoint_here["distillation"]["settings"]["latency_profile"] = "{}"
    torch.save(checkpoint_here, last)
    assert run_to_exit(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher) == 1
    assert "last.ckpt: latency_profile: not a profile" in error_line(capsys)


def test_prune_without_correction_is_the_published_rounding(finished_run, small_teacher, tmp_path, monkeypatch):
    last = shutil.copy(finished_run / "ckpts" / "last.ckpt", tmp_path)
    prune = ("--distilled_ckpt", last, "--original_ckpt", small_teacher)
    run_script(monkeypatch, "prune", *prune, "--sparsity_tolerance", 1)
    masked = load_masked_model(small_teacher, ["conv", "head", "interm"])
    prefix, state = "student_model.", last_checkpoint(finished_run)["state_dict"]
    masked.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    config = masked.prune()
    pruned = checkpoint.read_model_file(tmp_path / "pruned_hubert_base.pth")
    assert pruned["config"] == config
    assert all(torch.equal(value, pruned["state_dict"][key]) for key, value in masked.state_dict().items())


def test_same_seed_same_weights(finished_run, manifests, small_teacher, tmp_path, monkeypatch):
    states = [last_checkpoint(finished_run)["state_dict"]]
    for name, changes in (("same", {"num_workers": 1}), ("other", {"seed": 2})):
        flags = small_run(manifests, small_teacher, **changes)
        run_script(monkeypatch, "distill", *flags, *PRUNING, "--exp_dir", tmp_path / name)
        states.append(last_checkpoint(tmp_path / name)["state_dict"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_students_dropout_is_of_the_training_alone(manifests, tmp_path, monkeypatch):
    """The run is that of a student without dropout; the file keeps its own, for those who fine-tune."""
    states, contents = [], checkpoint.read_model_file(save_small_model(tmp_path / "teacher.pth", "hubert", "base"))
    for name, dropout, flags in (("own", 0.1, {"student_dropout": 0}), ("none", 0.0, {}), ("same", 0.1, {})):
        dropouts = {key: dropout for key in contents["config"] if key.endswith("_dropout")}
        teacher = tmp_path / f"{name}.pth"
        checkpoint.save(teacher, {**contents, "config": contents["config"] | dropouts})
        run = small_run(manifests, teacher, max_updates=3, **flags)
        run_script(monkeypatch, "distill", *run, *PRUNING, "--exp_dir", tmp_path / name)
        trained = last_checkpoint(tmp_path / name)
        assert trained["distillation"]["student_config"]["encoder_dropout"] == dropout
        states.append(trained["state_dict"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_later_stages_take_the_average_of_an_older_run(finished_run, small_teacher, tmp_path, monkeypatch):
    """An average takes the place of the weights."""
    contents = last_checkpoint(finished_run)
    averaged = {key: 0.9 * value for key, value in contents["state_dict"].items() if not key.startswith("lambda")}
    pruned = []
    for changes in ({"state_dict": averaged}, {"averaged_state_dict": averaged}):
        checkpoint.save(tmp_path / "last.ckpt", {**contents, **changes})
        prune = ("--distilled_ckpt", tmp_path / "last.ckpt", "--original_ckpt", small_teacher)
        run_script(monkeypatch, "prune", *prune)
        pruned.append(checkpoint.read_model_file(tmp_path / "pruned_hubert_base.pth"))
    assert largest_difference(*pruned) == 0


@pytest.mark.parametrize("average", [[1.0], {"student_model.weight": torch.tensor([1.0, float("nan")])}, {3: "x"}])
def test_a_damaged_average(small_teacher, tmp_path, monkeypatch, capsys, average):
    last = tmp_path / "last.ckpt"
    state = {"student_model.weight": torch.ones(2)}
    checkpoint.save(last, {"state_dict": state, "global_step": 1, "averaged_state_dict": average})
    assert run_to_exit(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher) == 1
    assert f"{last}: averaged_state_dict: " in error_line(capsys)


def test_validation_counts_each_batch_once(manifests):
    """One process needs no topping up, which would weigh one batch twice in the validation loss."""
    data = SpeechDataModule(DataSettings(tsv_dir=manifests, seconds_per_batch=4, num_workers=0))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=strategy)
    indices = [index for crop in data.val_dataloader().sampler for index in crop.indices]
    assert sorted(indices) == list(range(4))


def test_bf16(manifests, small_teacher, tmp_path, monkeypatch):
    flags = small_run(manifests, small_teacher, precision="bf16", max_updates=2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp")
    state = last_checkpoint(tmp_path / "exp")["state_dict"]
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in state.values())


# --- bad input -------------------------------------------------------------------------------------


def damaged(flags: dict[str, object], tmp_path: Path, case: str) -> dict[str, object]:
    """Flags that are wrong in one way; files that it takes are written to ``tmp_path``."""
    teacher = flags["teacher"]
    if case == "empty manifest":
        (tmp_path / "train100.tsv").write_text("/nowhere\n")
        return {"tsv_dir": tmp_path}
    if case == "missing manifest":
        return {"train_subset": "train460"}
    if case == "other frames":
        other = {"extractor_conv_layer_config": [[10, 10, 5], [12, 3, 2], [8, 3, 2]]}
        return {"student_ckpt": save_small_model(tmp_path / "other.pth", "hubert", "base", **other)}
    if case == "weights of another shape":
        contents = checkpoint.read_model_file(teacher)
        contents["config"]["encoder_ff_interm_features"] = [7, 20, 20]
        checkpoint.save(tmp_path / "odd.pth", contents)
        return {"student_ckpt": tmp_path / "odd.pth"}
    if case == "training checkpoint as teacher":
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "last.ckpt")
        return {"teacher_ckpt": tmp_path / "last.ckpt"}
    if case == "text as teacher":
        (tmp_path / "notes.pth").write_text("not a model")
        return {"teacher_ckpt": tmp_path / "notes.pth"}
    raise AssertionError(case)


BAD_FLAGS = [
    ({"min_seconds": 10}, "lasts 10.000 s to 15.625 s, the limits"),
    ({"seconds_per_batch": 0.1}, "see --seconds_per_batch"),
    ({"seconds_per_batch": 0}, "--seconds_per_batch: expected a number above 0"),
    ({"distill_layers": "0.4"}, "--distill_layers 0.4: layer 4 is to be distilled, but the teacher has 3 layers"),
    ({"distill_layers": "first"}, "--distill_layers: expected layers"),
    ({"pruning_units": "conv,neuron"}, "--pruning_units: 'neuron' unknown; choose from conv, head"),
    ({"pruning_units": ""}, "--pruning_units: '' unknown"),
    ({"target_sparsity": 1.5}, "--target_sparsity: expected a number between 0 and 1"),
    ({"target_sparsity": 0.9, "pruning_units": "head"}, "pruning head removes at most"),
    (
        {"target_macs": 0.9, "pruning_units": "conv"},
        "--target_macs 0.9: pruning conv removes at most 0.",
    ),
    (
        {"target_macs": 0.5, "sparsity_control": "lagrangian"},
        "--target_macs 0.5: the lagrangian knows parameters only; leave out --sparsity_control, or give exact",
    ),
    ({"target_macs": 1.5}, "--target_macs: expected a number between 0 and 1, found 1.5"),
    ({"target_latency": 0.5}, "--target_latency and --latency_profile: give both, or neither"),
    (
        {"target_latency": "40ms", "latency_profile": "profile.json"},
        "--target_latency: expected a share between 0 and 1, or milliseconds such as 40ms/s, found '40ms'",
    ),
    ({"target_latency": "0.5", "latency_profile": "profile.json"}, "profile.json: no such file; expected a profile"),
    (
        {"save_at_sparsity": "0.5,0.9"},
        "--save_at_sparsity: expected different numbers between 0 and --target_sparsity (0.",
    ),
    ({"save_at_sparsity": "0.3"}, "--save_at_sparsity 0.3: the target rises from 0.0000 to 0.0009 in this run"),
    (
        {"save_at_sparsity": "0.01", "sparsity_control": "exact"},
        "--save_at_sparsity 0.01: the target rises from 0.0",
    ),
    ({"save_at_sparsity": "0.3", "sparsity_warmup_updates": 0}, "the target rises from 0.7500 to 0.7500 in this run"),
    ({"student_dropout": 1}, "--student_dropout: expected a number from 0 to below 1, found 1.0"),
    ({"pruning_units": "conv,width"}, "--pruning_units: 'width' unknown; choose from conv, head, interm"),
    ({"warmup_updates": 100}, "--warmup_updates 100 is above --max_updates 6"),
    ({"max_updates": 0}, "--max_updates: expected a number above 0"),
    ({"accelerator": "auto", "gpus": 64}, "--gpus: 64 GPUs asked for"),
    ({"precision": 16}, "--precision 16 needs a GPU"),
    ({"l1_weight": 0, "cos_weight": 0}, "nothing would be distilled"),
    ({"teacher_ckpt": "no/such.pth"}, "no/such.pth: no such file"),
    ({"resume_checkpoint": "no/such.ckpt"}, "--resume_checkpoint: no/such.ckpt does not exist"),
    ("empty manifest", "train100.tsv: no utterance is listed"),
    ("missing manifest", "train460.tsv"),
    ("other frames", "the student's frames do not fit"),
    ("weights of another shape", "odd.pth: weights do not fit the model"),
    ("training checkpoint as teacher", "a training checkpoint (.ckpt) where a model file (.pth) is wanted"),
    ("text as teacher", "notes.pth: damaged, or not a checkpoint"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_FLAGS, ids=lambda value: str(value)[:40])
def test_bad_input_ends_before_training(manifests, small_teacher, tmp_path, monkeypatch, capsys, wrong, message):
    if isinstance(wrong, str):
        wrong = damaged({"teacher": small_teacher}, tmp_path, wrong)
    flags = (*small_run(manifests, small_teacher, **wrong), "--exp_dir", tmp_path / "exp")
    assert run_to_exit(monkeypatch, "distill", *flags) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("convert_hubert_from_hf", "--model", "nowhere"),
        ("convert_wavlm_from_fairseq", "--ckpt", "nowhere"),
        ("export", "--model", "nowhere"),
        ("prepare_data", "--data", "."),
    ],
    ids=lambda command: command[0],
)
def test_a_place_is_tried_before_the_work(tmp_path, monkeypatch, capsys, command):
    """Here that would fail at its first step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    out = Path("file") / "below"
    assert run_to_exit(monkeypatch, *command, "--out", out) == 1
    assert error_line(capsys).startswith(f"{out}")


@pytest.mark.parametrize("script", ["prune", "save_final_ckpt", "final_distill"])
def test_checkpoints_of_the_wrong_kind(manifests, small_teacher, tmp_path, monkeypatch, capsys, script):
    """Each later stage, given the teacher where it wants its predecessor's output."""
    arguments = {
        "prune": ("--distilled_ckpt", small_teacher, "--original_ckpt", small_teacher),
        "save_final_ckpt": ("--config_path", small_teacher, "--ckpt_after_final_distill", small_teacher),
        "final_distill": (*small_run(manifests, small_teacher), "--exp_dir", tmp_path / "exp"),
    }[script]
    assert run_to_exit(monkeypatch, script, *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {small_teacher}: ") and "\n" not in error


def test_projections_of_other_layers(finished_run, manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """A final distillation must distil the layers that the pruned file has projections for."""
    last = shutil.copy(finished_run / "ckpts" / "last.ckpt", tmp_path)
    run_script(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher)
    pruned = tmp_path / "pruned_hubert_base.pth"
    flags = small_run(manifests, small_teacher, student_ckpt=pruned, distill_layers="0.1,2,3")
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "final_distill", *flags, "--exp_dir", tmp_path / "final") == 1
    assert "--distill_layers and --distill_mode must be those of distill.py" in error_line(capsys)


def test_exit_status_and_debug(tmp_path, monkeypatch):
    """Status 1 and one line, once through a real process; with --debug the traceback."""
    flags = ("--distilled_ckpt", tmp_path / "a", "--original_ckpt", tmp_path / "b")
    plain = run_command(sys.executable, "prune.py", *flags)
    assert plain.returncode == 1 and len(plain.stderr.splitlines()) == 1
    with pytest.raises(UserError):
        run_script(monkeypatch, "prune", *flags, "--debug")
