"""Settings: their flags, their checks, and which of them decide what comes out of a run."""

import argparse
from pathlib import Path

import pytest
import torch

import distill
import final_distill
from training.checkpoints import changed_settings
from training.settings import (
    DataSettings,
    DistillSettings,
    FinalSettings,
    MachineSettings,
    PruningSettings,
    add_arguments,
    parse_distill_layers,
    read_arguments,
    recorded_defaults,
)
from training.trainer import check_settings
from wav2vec2.files.errors import UserError

REQUIRED = ["--tsv_dir", "data", "--teacher_ckpt", "teacher.pth", "--student_ckpt", "student.pth"]

# The released program's defaults (paper's settings of step 1).
PUBLISHED = {
    "train_subset": "train100",
    "seconds_per_batch": 87.5,
    "num_workers": 1,
    "resume_checkpoint": None,
    "exp_dir": Path("exp"),
    "log_interval": 50,
    "learning_rate": 2e-4,
    "weight_decay": 0.0,
    "warmup_updates": 15000,
    "max_updates": 50000,
    "clip_norm": 10.0,
    "num_nodes": 1,
    "accum_grad": 1,
    "precision": "32",
    "distill_layers": "0.4,8,12",
    "distill_mode": "layer2layer",
    "l2_weight": 0.0,
    "l1_weight": 1.0,
    "cos_weight": 1.0,
    "cos_type": "raw",
    "pruning_units": "conv,head,interm,attlayer,ffnlayer",
    "reg_learning_rate": 0.02,
    "target_sparsity": 0.75,
    "sparsity_warmup_updates": 5000,
}


def parse(script, monkeypatch, *flags: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["script", *REQUIRED, *flags])
    return script.parse_args()


def test_published_flags_and_defaults(monkeypatch):
    joint, final = (vars(parse(script, monkeypatch)) for script in (distill, final_distill))
    monkeypatch.setattr("sys.argv", ["distill.py", "--tsv_dir", "data"])
    defaults = vars(distill.parse_args())
    assert str(defaults["teacher_ckpt"]) == str(defaults["student_ckpt"]) == "pretrained_ckpts/hubert-base-ls960.pth"
    pruning = PruningSettings.from_args(argparse.Namespace(**joint))
    joint["target_sparsity"] = pruning.target_sparsity
    assert pruning.sparsity_control == "lagrangian"
    assert {name: joint[name] for name in PUBLISHED} == PUBLISHED
    own = {"learning_rate": 1e-4, "warmup_updates": 5000, "max_updates": 25000}
    own_of_joint = {"pruning_units", "reg_learning_rate", "target_sparsity", "sparsity_warmup_updates"}
    own_of_joint |= {"sparsity_control", "target_macs", "save_at_sparsity"}
    own_of_joint |= {"target_latency", "latency_profile"}
    assert final == {name: value for name, value in joint.items() if name not in own_of_joint} | own


def test_every_flag_arrives_in_a_typed_field(monkeypatch):
    args = parse(distill, monkeypatch, "--max_crop_seconds", "2", "--gpus", "2", "--accelerator", "cpu", "--compile")
    settings = read_arguments(args, DistillSettings)
    assert settings.data.max_crop_seconds == 2.0 and settings.machine.compile
    assert settings.machine.devices == ("cpu", 2) and settings.layers == [0, 4, 8, 12]
    fields = [name for group in DistillSettings.groups().values() for name in group.__dataclass_fields__]
    assert sorted(fields) == sorted(set(vars(args)) - {"debug"})
    assert settings.recorded()["gpus x accum_grad"] == 2
    assert read_arguments(parse(final_distill, monkeypatch), FinalSettings).task is None


def test_only_what_decides_the_result_is_recorded(monkeypatch):
    def recorded(*flags: str) -> dict:
        return read_arguments(parse(distill, monkeypatch, "--accelerator", "cpu", *flags), DistillSettings).recorded()

    assert recorded("--num_workers", "3", "--exp_dir", "x", "--compile") == recorded()
    for flags in (
        *(["--seed", "1"], ["--precision", "bf16"], ["--target_sparsity", "0.5"], ["--accum_grad", "2"]),
        *(["--student_dropout", "0"], ["--save_at_sparsity", "0.5"], ["--sparsity_control", "exact"]),
        ["--target_macs", "0.5"],
    ):
        assert recorded(*flags) != recorded()


def test_a_setting_that_is_not_recorded_has_its_default(monkeypatch):
    """Records of older versions, and those of runs without a task, do not have all settings."""
    settings = read_arguments(parse(distill, monkeypatch, "--accelerator", "cpu"), DistillSettings)
    defaults, new = recorded_defaults(), settings.recorded()
    old = {name: value for name, value in new.items() if value != defaults.get(name)}
    assert {"stage", "learning_rate", "target_sparsity"} <= old.keys() < new.keys()
    assert changed_settings(old, new) == changed_settings(new, old) == []
    assert changed_settings(old | {"cos_type": "log_sig"}, new) == ["cos_type: log_sig there, raw now"]
    assert changed_settings(old | {"task_tsv": "3f"}, new) == ["task_tsv: 3f there, None now"]


@pytest.mark.parametrize("name", ["star_weight", "student_extractor", "student_config"])
def test_runs_with_settings_that_are_gone(monkeypatch, name):
    settings = read_arguments(parse(distill, monkeypatch, "--accelerator", "cpu"), DistillSettings)
    about = {"settings": settings.recorded() | {name: "x"}}
    with pytest.raises(
        UserError, match=rf"last.ckpt: made with --{name} x, which this version does not have; .*make_s"
    ):
        check_settings(Path("last.ckpt"), about, settings.recorded(), settings.machine)


def test_a_target_of_multiply_adds_takes_the_exact_control(monkeypatch):
    def control(*flags: str) -> str:
        return read_arguments(parse(distill, monkeypatch, *flags), DistillSettings).pruning.sparsity_control

    macs = ("--target_macs", "0.5")
    assert control(*macs) == control(*macs, "--target_sparsity", "0.5") == "exact"
    with pytest.raises(UserError, match=r"--target_macs 0.5: the lagrangian knows parameters only; leave out"):
        control(*macs, "--sparsity_control", "lagrangian")


def test_distilled_layers():
    assert parse_distill_layers("0.4,8,12") == [[0], [4, 8, 12]]
    for bad in ("", "a", "1..2", "-1", "1,1", "0.1+2", "auto:3"):
        with pytest.raises(UserError, match="expected"):
            parse_distill_layers(bad)


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5), ("0", 0), ("1%", 10), ("0.7%", 7), ("100%", 1000), ("0.05%", 0)]
)
def test_max_bad_files(text, number):
    assert DataSettings(tsv_dir=Path(), max_bad_files=text).max_bad_files_of(1000) == number


@pytest.mark.parametrize("text", ["", "-1", "1.5", "101%", "one", "1 %", "%"])
def test_max_bad_files_that_cannot_be(text):
    with pytest.raises(UserError, match="--max_bad_files"):
        DataSettings(tsv_dir=Path(), max_bad_files=text).max_bad_files_of(1000)


def test_devices(monkeypatch):
    def devices(accelerator: str, gpus: int | None) -> tuple[str, int]:
        return MachineSettings(accelerator=accelerator, gpus=gpus).devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices("auto", 1) == ("gpu", 1)
    assert devices("cpu", None) == ("cpu", 1)
    assert devices("cpu", 2) == ("cpu", 2)
    for gpus in (None, 3):  # the published default is 4
        with pytest.raises(UserError, match=r"--gpus: \d GPUs .* 2 found .* --gpus 2"):
            devices("auto", gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices("auto", None) == ("cpu", 1)
    for accelerator in ("auto", "gpu"):
        with pytest.raises(UserError, match=r"--gpus: 1 GPUs asked for, 0 found .* --accelerator cpu"):
            devices(accelerator, 1)


@pytest.mark.parametrize(
    "text",
    ["", "0.75", "0.8", "0.5,", "0.5,0.50", "0.5;0.6", "0", "0.0", "1", "-0.5", ".5", "5e-1", "0.5/../..", "nan"],
)
def test_sizes_that_cannot_be_saved(text):
    with pytest.raises(UserError, match=r"--save_at_sparsity: expected .* between 0 and --target_sparsity \(0.75\)"):
        PruningSettings(save_at_sparsity=text)


def test_sizes_need_a_target():
    with pytest.raises(UserError, match=r"--save_at_sparsity: .* --target_sparsity \(not given\)"):
        PruningSettings(save_at_sparsity="0.5", target_macs=0.5, sparsity_control="exact")
    assert PruningSettings(save_at_sparsity="0.50,0.7").sizes == ["0.50", "0.7"]


@pytest.mark.parametrize("option", ["teacher_ckpt", "student_ckpt"])
def test_the_default_model_that_is_not_there(monkeypatch, tmp_path, option):
    monkeypatch.chdir(tmp_path)
    flags = {"teacher_ckpt": "a.pth", "student_ckpt": "b.pth"} | {option: "pretrained_ckpts/hubert-base-ls960.pth"}
    args = parse(distill, monkeypatch, *(word for name, value in flags.items() for word in (f"--{name}", value)))
    command = "python convert_hubert_from_hf.py --out pretrained_ckpts/hubert-base-ls960.pth"
    with pytest.raises(UserError, match=f"--{option}: .* does not exist; make it with {command}"):
        read_arguments(args, DistillSettings)
    (tmp_path / "pretrained_ckpts").mkdir()
    (tmp_path / "pretrained_ckpts" / "hubert-base-ls960.pth").touch()
    read_arguments(args, DistillSettings)


def test_required_flags():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, FinalSettings, learning_rate=1.0, warmup_updates=1, max_updates=1)
    required = {action.dest for action in parser._actions if action.required}
    assert required == {"student_ckpt"}


def test_a_folder_that_libraries_cannot_write_to():
    with pytest.raises(UserError, match="--exp_dir e\udcff: its name is not UTF-8"):
        MachineSettings(accelerator="cpu", exp_dir=Path("e\udcff"))


def test_padding_is_not_compiled(monkeypatch):
    args = parse(distill, monkeypatch, "--task_tsv", "labels.tsv", "--compile")
    with pytest.raises(UserError, match="--compile: batches of --task_tsv have padding"):
        read_arguments(args, DistillSettings)
