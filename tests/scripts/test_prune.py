"""prune.py on a trained checkpoint: widths in multiples, the target, unfinished runs, what is printed and recorded."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PRUNING,
    error_line,
    load_as_others_do,
    run_script,
    run_to_exit,
    save_small_model,
    small_run,
)

from wav2vec2.files import checkpoint

pytestmark = pytest.mark.slow


def widths(config: dict[str, Any]) -> list[int]:
    """Conv channels and the intermediate dimensions of the feed-forwards that are left."""
    channels = [channels for channels, _, _ in config["extractor_conv_layer_config"]]
    features = zip(config["encoder_ff_interm_features"], config["encoder_use_feed_forward"], strict=True)
    return [*channels, *(features for features, used in features if used)]


@pytest.fixture(scope="module")
def trained(manifests, tmp_path_factory) -> tuple[Path, Path]:
    """A teacher with fine units, and the checkpoint of a short joint distillation."""
    root = tmp_path_factory.mktemp("trained")
    shapes = {"encoder_ff_interm_features": [200, 204, 200]}
    teacher = save_small_model(root / "teacher.pth", "hubert", "base", **shapes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(monkeypatch, "distill", *small_run(manifests, teacher), *PRUNING, "--exp_dir", root / "exp")
    return teacher, root / "exp" / "ckpts" / "last.ckpt"


@pytest.fixture
def prune(trained, tmp_path, monkeypatch, capsys):
    """Run prune.py with these flags on a copy of the checkpoint; its stderr, and the file it wrote."""
    teacher, last = trained
    copied = tmp_path / "last.ckpt"
    shutil.copy(last, copied)

    def run(*flags: object) -> tuple[str, dict[str, Any]]:
        capsys.readouterr()
        run_script(monkeypatch, "prune", "--distilled_ckpt", copied, "--original_ckpt", teacher, *flags)
        return capsys.readouterr().err, checkpoint.read_model_file(tmp_path / "pruned_hubert_base.pth")

    run.checkpoint, run.teacher = copied, teacher
    return run


def record(path: Path, **entries: object) -> None:
    """Make other entries of what a checkpoint says of its run."""
    contents = torch.load(path, weights_only=True)
    contents["distillation"].update(entries)
    torch.save(contents, path)


def test_an_unfinished_run_is_named(prune) -> None:
    """One line with the update reached and the shift; a finished run, and one that records nothing, have none."""
    assert "warning" not in prune()[0]
    contents = torch.load(prune.checkpoint, weights_only=True)
    num_updates, settings = contents["global_step"], contents["distillation"]["settings"]
    record(prune.checkpoint, settings={**settings, "max_updates": num_updates + 60})
    printed, _ = prune("--target_sparsity", "0.6")
    (moved,) = re.findall(r"threshold moved by (-\d+\.\d{4}) to meet", printed)
    (line,) = (line for line in printed.splitlines() if line.startswith("warning"))
    assert f"is of update {num_updates} of {num_updates + 60}," in line
    assert f"(threshold moved by {moved})" in line
    record(prune.checkpoint, settings=None)
    assert "warning" not in prune("--target_sparsity", "0.6")[0]


def test_the_tolerance_counts_what_is_left(prune) -> None:
    """With the Lagrangian half a per cent of it, with the exact control nothing: the nearest unit there is."""
    printed, _ = prune("--sparsity_tolerance", 1)
    (rounded,) = re.findall(r"rounded (0\.\d+); within tolerance", printed)
    left = 1 - float(rounded)
    for share, is_met in ((0.004, True), (0.006, False)):
        target = ("--target_sparsity", float(rounded) + share * left)
        assert ("within tolerance, masks as trained" in prune(*target)[0]) == is_met
    settings = torch.load(prune.checkpoint, weights_only=True)["distillation"]["settings"]
    record(prune.checkpoint, settings={**settings, "sparsity_control": "exact"})
    target = float(rounded) + 0.004 * left
    printed, _ = prune("--target_sparsity", target)
    assert "to meet the target" in printed
    (reached,) = re.findall(r"parameters, sparsity (0\.\d+)", printed)
    assert abs(float(reached) - target) < 0.002 * left


def test_prune_round_to(prune, manifests, tmp_path, monkeypatch) -> None:
    """Widths, the target, the report, and a file that others load and the final distillation takes."""
    plain = prune()[1]
    printed, pruned = prune("--round_to", 8)
    model = load_as_others_do(tmp_path / "pruned_hubert_base.pth")
    full = widths(checkpoint.read_model_file(prune.teacher)["config"])
    assert all(width % 8 == 0 or width == most for width, most in zip(widths(pruned["config"]), full, strict=True))
    assert any(width % 8 for width in widths(plain["config"]))
    num_params = model.get_num_params()
    sparsity = 1 - num_params / load_as_others_do(prune.teacher).get_num_params()
    assert abs(sparsity - 0.4) <= 0.01
    (line,) = (line for line in printed.splitlines() if "more than without" in line)
    report = re.fullmatch(
        r"round_to 8: ([\d,]+) parameters \((.*)%\) more than without \(([\d,]+)\), sparsity (.*)", line
    )
    extra, without = (int(report[group].replace(",", "")) for group in (1, 3))
    assert extra > 0
    assert extra + without == num_params
    assert float(report[2]) == pytest.approx(100 * extra / without, abs=0.005)
    assert float(report[4]) == pytest.approx(sparsity, abs=5e-5)

    final = small_run(manifests, prune.teacher, student_ckpt=tmp_path / "pruned_hubert_base.pth")
    run_script(monkeypatch, "final_distill", *final, "--exp_dir", tmp_path / "final")
    last = tmp_path / "final" / "ckpts" / "last.ckpt"
    flags = ("--config_path", tmp_path / "pruned_hubert_base.pth", "--ckpt_after_final_distill", last)
    run_script(monkeypatch, "save_final_ckpt", *flags)
    assert load_as_others_do(last.parent / "pruned_hubert_base.pth").config == pruned["config"]


def test_student_that_distill_made(prune, monkeypatch, capsys) -> None:
    """distill.py once changed the student itself; its checkpoints say so, and damaged ones say nonsense."""
    config, flags = prune()[1]["config"], ("--distilled_ckpt", prune.checkpoint, "--original_ckpt", prune.teacher)
    own = checkpoint.read_model_file(prune.teacher)["config"]
    record(prune.checkpoint, settings={"student_extractor": "light"}, student_config=own)
    assert prune()[1]["config"] == config
    for layers, message in (
        ([[9, 60, 40]], "weights do not fit the model"),
        ([[2**20, 2**20, 1]] * 3, "weights do not fit the model"),
        ("[[9, 60, 40]]", "extractor_conv_layer_config: expected a list of 1 to 64 layers"),
        (None, "distillation: student_config: expected a dict, found [1]"),
    ):
        record(
            prune.checkpoint, student_config=[1] if layers is None else {**own, "extractor_conv_layer_config": layers}
        )
        assert run_to_exit(monkeypatch, "prune", *flags) == 1
        assert message in error_line(capsys)


def test_default_is_the_published_rounding(prune) -> None:
    """Nothing about it is printed, and --round_to 1 gives the same file."""
    printed, plain = prune()
    assert "round_to" not in printed
    assert plain["made_by"]["round_to"] == 1
    assert "made already" in prune("--round_to", 1)[0]


def test_without_correction(prune) -> None:
    """--sparsity_tolerance 1 leaves the threshold where training put it: all that stays without rounding stays."""
    plain = widths(prune("--sparsity_tolerance", 1)[1]["config"])
    rounded = widths(prune("--sparsity_tolerance", 1, "--round_to", 8)[1]["config"])
    full = widths(checkpoint.read_model_file(prune.teacher)["config"])
    assert rounded == [min(-(-width // 8) * 8, most) for width, most in zip(plain, full, strict=True)]


def test_multiples_too_coarse_for_the_target(prune) -> None:
    """Full layers or none: the nearest that is not larger is taken, and said; a size below all others is said too."""
    printed, pruned = prune("--round_to", 1000)
    full = widths(checkpoint.read_model_file(prune.teacher)["config"])
    assert set(widths(pruned["config"])) <= set(full)
    (line,) = (line for line in printed.splitlines() if "no threshold" in line)
    said = re.fullmatch(
        r"round_to 1000: no threshold gives a sparsity nearer to 0.4000; the nearest that is not larger has (.*)",
        line,
    )
    assert 0.405 < float(said[1]) < 1
    assert "the smallest model there is has 0." in prune("--round_to", 1000, "--target_sparsity", 0.99)[0]


@pytest.mark.parametrize("value", [0, -8, 10**700])
def test_impossible_number(prune, monkeypatch, capsys, value: int) -> None:
    flags = ("--distilled_ckpt", prune.checkpoint, "--original_ckpt", prune.teacher, "--round_to", value)
    assert run_to_exit(monkeypatch, "prune", *flags) == 1
    assert error_line(capsys).startswith("--round_to: expected a whole number from 1 to 1000000, found ")


def test_a_made_up_size_takes_no_memory(prune, monkeypatch, capsys) -> None:
    """The layers of 4 TB each that the config asks for are never made; nor is a file by something else compared."""
    contents = torch.load(prune.checkpoint, weights_only=True)
    own = contents["distillation"]["student_config"]
    size = {"encoder_embed_dim": 2**20, "encoder_ff_interm_features": [2**20] * 3}
    contents["distillation"]["student_config"] = {**own, **size, "encoder_num_heads": [2**18] * 3}
    out = prune.checkpoint.with_name("pruned_hubert_base.pth")
    plain = checkpoint.read_model_file(prune.teacher)
    keys = ("script", "config_path", "ckpt_after_final_distill")
    checkpoint.save(out, {**plain, "made_by": dict.fromkeys(keys, torch.ones(2))})
    torch.save(contents, prune.checkpoint)
    assert run_to_exit(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", prune.checkpoint) == 1
    message = error_line(capsys)
    assert message.startswith(f"{prune.checkpoint} in the model of ") and "weights do not fit the model" in message


def test_projections_of_another_shape(manifests, small_teacher, tmp_path, monkeypatch, capsys) -> None:
    flags = small_run(manifests, small_teacher, max_updates=2, pruning_units="embed", target_sparsity=0.2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path)
    last = tmp_path / "ckpts" / "last.ckpt"
    contents = torch.load(last, weights_only=True)
    contents["state_dict"]["distill_linear_projs.0.weight"] = torch.ones(3)
    torch.save(contents, last)
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher) == 1
    message = f"{last}: distill_linear_projs: 0.weight has shape [3], expected 16 columns; it is damaged"
    assert error_line(capsys) == message
