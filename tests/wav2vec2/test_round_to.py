"""--round_to: widths in multiples of N. Masked equals pruned, nothing kept is lost, and the target is still met."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PROPERTY,
    PRUNING,
    blocks_of,
    check_pruning,
    decide,
    error_line,
    load_as_others_do,
    log_alphas,
    masked_models,
    masks_of,
    num_elements,
    random_model,
    run_script,
    run_to_exit,
    save_small_model,
    scattered,
    small_config,
    small_run,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hardconcrete import HardConcrete
from wav2vec2 import checkpoint
from wav2vec2.model import Wav2Vec2Model, with_masks
from wav2vec2.sparsity import (
    expected_num_params,
    fit_masks,
    num_params_without_rounding,
    pruned_num_params,
    round_widths,
    smallest_num_params,
)

MULTIPLES = st.sampled_from([1, 2, 3, 4, 8, 16, 64])
WIDTH_MASKS = ("hard_concrete", "hard_concrete_for_intermediate")  # the last part of their names


def width_masks(model: Wav2Vec2Model) -> dict[str, HardConcrete]:
    return {name: mask for name, mask in masks_of(model).items() if name.rpartition(".")[2] in WIDTH_MASKS}


def kept(model: Wav2Vec2Model) -> dict[str, Tensor]:
    return {name: mask() for name, mask in masks_of(model).items()}


def rounded_copy(model: Wav2Vec2Model, multiple: int) -> Wav2Vec2Model:
    model = copy.deepcopy(model)
    round_widths(model, multiple)
    return model


def widths(config: dict[str, Any]) -> list[int]:
    """Conv channels and the intermediate dimensions of the feed-forwards that are left."""
    channels = [channels for channels, _, _ in config["extractor_conv_layer_config"]]
    features = zip(config["encoder_ff_interm_features"], config["encoder_use_feed_forward"], strict=True)
    return [*channels, *(features for features, used in features if used)]


# --- masks and models


@PROPERTY
@given(masked_models(), MULTIPLES)
def test_pruned_equals_masked(masked: Wav2Vec2Model, multiple: int) -> None:
    """Outputs, exact counts, and the config that rebuilds the pruned model, as with the published rounding."""
    check_pruning(rounded_copy(masked, multiple))


@PROPERTY
@given(masked_models(), MULTIPLES)
def test_what_is_kept(masked: Wav2Vec2Model, multiple: int) -> None:
    """Whole multiples, everything or nothing; all of the units that stay without it, with the same values, and the
    strongest of the others; as few as that takes. Other masks do not change."""
    plain, rounded = kept(masked), kept(rounded_copy(masked, multiple))
    masks = masks_of(masked)
    for name, found in rounded.items():
        expected, log_alpha = plain[name], masks[name].log_alpha
        if name not in width_masks(masked):
            assert torch.equal(found, expected), name
            continue
        assert torch.equal(found[expected != 0], expected[expected != 0]), name
        num_units, num_plain, num_kept = len(found), int((expected != 0).sum()), int((found != 0).sum())
        assert num_kept == min(-(-num_plain // multiple) * multiple, num_units), name
        if 0 < num_kept < num_units:
            assert log_alpha[found != 0].min() >= log_alpha[found == 0].max(), name
        soft_mask = torch.sigmoid(0.8 * log_alpha / (2 / 3)).clamp(min=torch.finfo(torch.float32).tiny)
        torch.testing.assert_close(found[found != 0], soft_mask[found != 0])


@PROPERTY
@given(masked_models(), MULTIPLES)
def test_sizes(masked: Wav2Vec2Model, multiple: int) -> None:
    """Rounding up adds parameters, the same blocks go, training's expected size is not concerned, and what the model
    would be without it is known to the parameter."""
    rounded, before = rounded_copy(masked, multiple), log_alphas(masked)
    assert expected_num_params(rounded) == expected_num_params(masked)
    assert pruned_num_params(rounded) >= pruned_num_params(masked)
    num_plain = num_params_without_rounding(rounded)
    assert all(map(torch.equal, log_alphas(rounded), before))
    decided = pruned_num_params(rounded)
    for model in (masked, rounded):
        model.prune()
    assert num_plain == num_elements(masked) <= num_elements(rounded)
    assert blocks_of(masked) == blocks_of(rounded)
    assert decided >= num_elements(rounded) * (1 - 1e-6)


@PROPERTY
@given(masked_models())
def test_multiples_of_one(masked: Wav2Vec2Model) -> None:
    """The published rounding, bit for bit: the formula written out, and the pruned weights."""
    for name, mask in masks_of(rounded_copy(masked, 1)).items():
        log_alpha = mask.log_alpha.detach()
        num_zeros = (mask.n_in - mask.l0_norm().double()).round().clamp(max=mask.n_in - mask.min_kept)
        soft_mask = torch.sigmoid(log_alpha / (2 / 3) * 0.8).clamp(min=torch.finfo(torch.float32).tiny)
        assert torch.equal(mask(), soft_mask * (log_alpha.argsort(stable=True).argsort() >= num_zeros)), name
    back = rounded_copy(rounded_copy(masked, 8), 1)
    masked.prune()
    back.prune()
    assert masked.config == back.config
    assert all(map(torch.equal, masked.state_dict().values(), back.state_dict().values()))


def wide_model(family: str, size: str, units: list[str]) -> Wav2Vec2Model:
    """Layers wide enough for multiples of 16, of widths that are and that are not multiples of 8; undecided masks."""
    shapes = {
        "extractor_conv_layer_config": [[40, 10, 5], [36, 3, 2], [48, 3, 2], [41, 2, 2]],
        "encoder_ff_interm_features": [96, 100, 64],
    }
    model = random_model(with_masks(small_config(family, size, **shapes), units))
    generator = torch.Generator().manual_seed(0)
    for mask in masks_of(model).values():
        mask.log_alpha.data.copy_(scattered(mask.n_in, generator))
    return model


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("multiple", [1, 4, 8, 16, 64])
def test_families(family: str, size: str, multiple: int) -> None:
    """The first norm's groups, the last conv's scale and every consumer follow the rounded widths."""
    model = rounded_copy(wide_model(family, size, ["conv", "head", "interm"]), multiple)
    full = [40, 36, 48, 41, 96, 100, 64]
    pruned = check_pruning(model)
    found = widths(pruned.config)
    assert all(width % multiple == 0 or width == most for width, most in zip(found, full, strict=True))
    assert (found == full) == (multiple == 64)
    convs = pruned.feature_extractor.conv_layers
    assert [layer.conv.in_channels for layer in convs] == [1, *found[:3]]
    assert len(pruned.feature_extractor.dummy_weight) == found[3]
    assert pruned.encoder.feature_projection.projection.in_features == found[3]
    if size == "base":
        norm = convs[0].layer_norm
        assert isinstance(norm, nn.GroupNorm)
        assert norm.num_groups == norm.num_channels == len(norm.weight) == found[0]
    last_mask = model.feature_extractor.conv_layers[3].hard_concrete()
    scale = (model.feature_extractor.dummy_weight * last_mask)[last_mask != 0]
    torch.testing.assert_close(pruned.feature_extractor.dummy_weight.float(), scale)


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_what_goes_stays_gone(family: str) -> None:
    """No unit comes back to a block that loses them all; a conv layer, which cannot go, keeps its best N."""
    model = wide_model(family, "base", ["conv", "interm"])
    decide(model, "layers.1.feed_forward.hard_concrete_for_intermediate")
    decide(model, "conv_layers.2.hard_concrete")
    best = model.feature_extractor.conv_layers[2].hard_concrete.log_alpha.data
    best[5:13] = -14.0
    model = rounded_copy(model, 8)
    assert model.feature_extractor.conv_layers[2].hard_concrete().nonzero().flatten().tolist() == list(range(5, 13))
    pruned = check_pruning(model)
    assert pruned.config["encoder_use_feed_forward"] == [True, False, True]
    assert pruned.config["extractor_conv_layer_config"][2][0] == 8


# --- the target


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("multiple", [4, 8, 16])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_fit_masks_counts_the_rounding(family: str, multiple: int, share: float) -> None:
    """Within the tolerance, or else the largest that is not above the target; by one constant for all masks."""
    model = rounded_copy(wide_model(family, "base", ["conv", "head", "interm"]), multiple)
    originals, smallest = log_alphas(model), smallest_num_params(model)
    target = smallest + share * (num_elements(model) - smallest)

    def size(shift: float) -> float:
        for mask, value in zip(masks_of(model).values(), originals, strict=True):
            mask.log_alpha.data.copy_(value + shift)
        return pruned_num_params(model)

    reached = sorted({size(shift / 50) for shift in range(-400, 400)})
    nearest = min(reached, key=lambda found: abs(found - target))
    below = max(found for found in reached if found <= target)
    for tolerance in (0.0, abs(nearest - target) * 0.99, abs(nearest - target) * 1.01):
        size(0.0)
        shift = fit_masks(model, target, tolerance)
        for value, original in zip(log_alphas(model), originals, strict=True):
            assert torch.equal(value, original + shift)
        expected = nearest if abs(nearest - target) <= tolerance else below
        assert abs(pruned_num_params(model) - target) <= abs(expected - target) + 1
        assert pruned_num_params(model) <= target + tolerance


@pytest.mark.parametrize(("target", "bound"), [(0, "smallest"), (10**9, "dense")])
def test_fit_masks_out_of_reach(target: int, bound: str) -> None:
    """The nearest size there is: every conv layer keeps its N, or all of everything."""
    model = rounded_copy(wide_model("hubert", "base", ["conv"]), 8)
    fit_masks(model, target, tolerance=0)
    model.prune()
    assert widths(model.config)[:4] == {"smallest": [8] * 4, "dense": [40, 36, 48, 41]}[bound]


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_rounding_is_paid_for(share: float) -> None:
    """What rounding up adds is taken away again by a higher threshold."""
    model = wide_model("wavlm", "large", ["conv", "interm"])
    target = share * num_elements(model)
    fit_masks(model, target, tolerance=0)
    rounded, tolerance = rounded_copy(model, 16), 0.01 * num_elements(model)
    assert pruned_num_params(rounded) > target + tolerance
    assert fit_masks(rounded, target, tolerance) < 0
    assert pruned_num_params(rounded) <= target + tolerance


# --- prune.py


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


def name_in_checkpoint(path: Path, round_to: object) -> None:
    """What distill.py --round_to leaves in its checkpoint."""
    contents = torch.load(path, weights_only=True)
    contents["distillation"]["round_to"] = round_to
    torch.save(contents, path)


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
    (line,) = (line for line in printed.splitlines() if line.startswith("round_to"))
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


def test_default_is_the_published_rounding(prune) -> None:
    """Nothing about it is printed, and --round_to 1 gives the same file."""
    printed, plain = prune()
    assert "round_to" not in printed
    assert plain["made_by"]["round_to"] == 1
    assert "made already" in prune("--round_to", 1)[0]


def test_the_checkpoint_names_it(prune) -> None:
    """What distill.py recorded is the default; the command line wins, even over a damaged entry."""
    _, asked = prune("--round_to", 8)
    name_in_checkpoint(prune.checkpoint, 8)
    printed, named = prune()
    assert "made already" not in printed  # another checkpoint
    assert named["config"] == asked["config"]
    assert named["made_by"]["round_to"] == 8
    assert all(torch.equal(value, asked["state_dict"][key]) for key, value in named["state_dict"].items())
    assert "made already" in prune()[0]
    assert prune("--round_to", 1)[1]["made_by"]["round_to"] == 1
    name_in_checkpoint(prune.checkpoint, "eight")
    assert prune("--round_to", 4)[1]["made_by"]["round_to"] == 4
    name_in_checkpoint(prune.checkpoint, None)
    assert prune()[1]["made_by"]["round_to"] == 1


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
        r"round_to 1000: no threshold gives a sparsity within 0.005 of 0.4000; the nearest that is not larger has (.*)",
        line,
    )
    assert 0.405 < float(said[1]) < 1
    assert "the smallest model there is has 0." in prune("--round_to", 1000, "--target_sparsity", 0.99)[0]


@pytest.mark.parametrize("value", [0, -8, 10**700])
def test_impossible_number(prune, monkeypatch, capsys, value: int) -> None:
    flags = ("--distilled_ckpt", prune.checkpoint, "--original_ckpt", prune.teacher, "--round_to", value)
    assert run_to_exit(monkeypatch, "prune", *flags) == 1
    assert error_line(capsys).startswith("--round_to: expected a whole number from 1 to 1000000, found ")


@pytest.mark.parametrize("value", [0, True, 8.0, "8", [8], 10**600])
def test_impossible_number_in_the_checkpoint(prune, monkeypatch, capsys, value: object) -> None:
    name_in_checkpoint(prune.checkpoint, value)
    flags = ("--distilled_ckpt", prune.checkpoint, "--original_ckpt", prune.teacher)
    assert run_to_exit(monkeypatch, "prune", *flags) == 1
    message = f"{prune.checkpoint}: distillation: round_to: expected a whole number from 1 to 1000000, found "
    assert error_line(capsys).startswith(message)
