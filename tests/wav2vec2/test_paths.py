"""The fast paths give what the plain paths give: features, losses, gradients, whole updates."""

import copy
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    PRUNING,
    make_module,
    num_elements,
    random_model,
    random_waveforms,
    run_script,
    save_small_model,
    small_config,
    small_run,
)
from torch import Tensor
from torch.nn import functional as F

from lightning import DistillLoss, DistillModule, clip_gradients
from wav2vec2 import components, dropout
from wav2vec2.fast import fast_paths, plain_paths
from wav2vec2.model import PRUNING_UNITS, with_masks

LENGTHS = {"no lengths": None, "padded": (1200, 1000, 700), "lengths without padding": (1200, 1200, 1200)}


def masked_model(family: str, size: str) -> torch.nn.Module:
    model = random_model(with_masks(small_config(family, size), list(PRUNING_UNITS)), seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            parameter.data = 2 + torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def noise_of_torch(monkeypatch):
    """The dropout of the fast paths with the noise of torch's, which the plain paths have."""

    def noise(x: Tensor, threshold: int) -> Tensor:
        return F.dropout(torch.ones_like(x), round(threshold / 2**16, 3))

    monkeypatch.setattr(dropout, "_noise", noise)


def features_and_gradients(model: torch.nn.Module, waveforms: Tensor, lengths: Tensor | None, plain: bool) -> Any:
    torch.manual_seed(0)  # the masks' samples
    model.zero_grad()
    with plain_paths(plain):
        hidden, frames = model.extract_features(waveforms, lengths)
        if frames is not None:  # what padded frames hold is nobody's business
            valid = torch.arange(hidden[0].size(1)) < frames[:, None]
            hidden = [x * valid[..., None] for x in hidden]
        sum(x.square().mean() for x in hidden).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in hidden], frames, gradients


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_features_and_gradients(family, size, training, lengths):
    model = masked_model(family, size).train(training)
    waveforms = random_waveforms(*(lengths or (1200, 1200)))[0]
    given = None if lengths is None else torch.tensor(lengths)
    fast, plain = (features_and_gradients(model, waveforms, given, plain) for plain in (False, True))
    for ours, theirs in zip(fast[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert fast[1] is plain[1] is None or torch.equal(fast[1], plain[1])
    assert fast[2].keys() == plain[2].keys() and len(fast[2]) > 50
    for name, gradient in fast[2].items():
        torch.testing.assert_close(
            gradient, plain[2][name], rtol=1e-4, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_attention_of_nothing(family, plain):
    """No head, no frame, no waveform: torch's fused kernel would end the process."""
    none_left = {"encoder_num_heads": [0] * 3} if family == "hubert" else {"encoder_remaining_heads": [[]] * 3}
    waveforms = random_waveforms(1200, 1200)[0]
    with plain_paths(plain), torch.no_grad():
        hidden, _ = random_model(small_config(family, **none_left)).extract_features(waveforms)
        assert all(x.shape == (2, hidden[0].size(1), 16) and x.isfinite().all() for x in hidden)
        model = random_model(small_config(family))
        assert model.extract_features(waveforms[:, :5])[0][-1].shape == (2, 0, 16)
        assert model.extract_features(waveforms[:0])[0][-1].shape[0] == 0


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_bfloat16_is_as_near_to_float32(family, size):
    """Channels last and masks in bfloat16 lose no more than the plain path in bfloat16 does."""
    model = masked_model(family, size)
    waveforms = random_waveforms(4000, 4000)[0]
    with torch.no_grad(), plain_paths():
        exact = model.extract_features(waveforms)[0]
    errors = {}
    for plain in (False, True):
        with torch.no_grad(), plain_paths(plain), torch.autocast("cpu", torch.bfloat16):
            rounded = model.extract_features(waveforms)[0]
        errors[plain] = [float((x.float() - y).norm() / y.norm()) for x, y in zip(rounded, exact, strict=True)]
    for fast, plain in zip(errors[False], errors[True], strict=True):
        assert fast < 0.05 and fast < 1.5 * plain + 1e-3


def test_weights_in_bfloat16():
    """A model that was cast as a whole, as for inference."""
    model = random_model(small_config("hubert")).bfloat16()
    with torch.no_grad():
        hidden, _ = model.extract_features(random_waveforms(1200, 1200)[0].bfloat16())
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in hidden)


@pytest.mark.parametrize("weights", [(0, 1, 1, "raw"), (1, 0, 0, "raw"), (0.5, 1, 2, "log_sig")], ids=str)
def test_loss_without_stacking(weights):
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 7, 16, generator=generator) for _ in range(3)] for _ in range(2))
    module = make_module(distill_loss=DistillLoss(*weights))
    stacked, parts = module.distill_loss(torch.stack(student, 1), torch.stack(teacher, 1))
    total, layer_parts = module._layerwise_loss(student, teacher)
    torch.testing.assert_close(total, stacked, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer_parts, parts, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("noise_of_torch")
@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_whole_updates(manifests, tmp_path, monkeypatch, family, size):
    """Through the script, with --plain and without: fused optimiser, no padding mask, losses layer by layer."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size)
    flags = (*small_run(manifests, teacher, max_updates=8, seconds_per_batch=0.6), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "fast")
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "plain", "--plain")
    states = [torch.load(tmp_path / name / "ckpts" / "last.ckpt", weights_only=True) for name in ("fast", "plain")]
    assert [state["optimizer_states"][0]["param_groups"][0]["fused"] for state in states] == [True, False]
    for key, value in states[0]["state_dict"].items():
        torch.testing.assert_close(
            value, states[1]["state_dict"][key], rtol=1e-3, atol=2e-4, msg=lambda t, k=key: f"{k}: {t}"
        )
    assert fast_paths()


def test_a_run_can_change_paths(manifests, small_teacher, tmp_path, monkeypatch):
    """The optimiser follows the switch, not the checkpoint."""
    flags = (*small_run(manifests, small_teacher, max_updates=4, warmup_updates=1), "--exp_dir", tmp_path)
    run_script(monkeypatch, "distill", *flags)
    path = tmp_path / "ckpts" / "last.ckpt"
    more = (*small_run(manifests, small_teacher, max_updates=8, warmup_updates=1), "--exp_dir", tmp_path / "more")
    run_script(monkeypatch, "distill", *more, "--resume_checkpoint", path, "--plain")
    trained = torch.load(tmp_path / "more" / "ckpts" / "last.ckpt", weights_only=True)
    assert trained["optimizer_states"][0]["param_groups"][0]["fused"] is False and trained["global_step"] == 8


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_folded_weight_norm(family, size):
    """The same numbers and the same state dict, until the weights change."""
    model = random_model(small_config(family, size))
    waveforms, lengths = random_waveforms(1200, 900)
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.extract_features(waveforms, lengths)[0]
    model.fold_weight_norm()
    conv = model.encoder.transformer.pos_conv_embed.conv
    assert model.state_dict().keys() == state_dict.keys() and model.get_num_params() == num_elements(model)

    def assert_equal() -> None:
        for ours, theirs in zip(model.extract_features(waveforms, lengths)[0], expected, strict=True):
            assert torch.equal(ours, theirs)

    assert_equal()
    with torch.no_grad():
        conv.weight_v.mul_(-1)
    assert_equal()  # the folded weight is what acts
    conv.requires_grad_()
    assert not torch.equal(model.extract_features(waveforms, lengths)[0][-1], expected[-1])
    conv.requires_grad_(False)
    model.load_state_dict(state_dict)
    assert_equal()
    assert conv.folded_weight is None


def test_a_folded_model_can_be_copied_and_cast():
    model = random_model(small_config("hubert"))
    model.fold_weight_norm()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.encoder.transformer.pos_conv_embed.conv.folded_weight.dtype == torch.bfloat16
    waveforms = random_waveforms(1200)[0]
    expected = model(waveforms)[0]
    actual = half(waveforms.to(torch.bfloat16))[0].float()
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_training_folds_the_teacher(manifests, tmp_path, monkeypatch):
    """Also a run that is continued: loading its checkpoint puts the teacher's weights back."""
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    folded = []
    targets = DistillModule.targets

    def noting(module: DistillModule, batch: Any) -> list[Tensor]:
        conv = module.teacher_model.encoder.transformer.pos_conv_embed.conv
        if module.training:  # the check of validation that comes first has nothing to be quick for
            folded.append(conv.folded_weight is not None)
        return targets(module, batch)

    monkeypatch.setattr(DistillModule, "targets", noting)
    for max_updates in (1, 2):
        flags = small_run(manifests, teacher, exp_dir=tmp_path / "exp", max_updates=max_updates, warmup_updates=1)
        last = tmp_path / "exp" / "ckpts" / "last.ckpt"
        resume = ("--resume_checkpoint", last) if last.exists() else ()
        run_script(monkeypatch, "distill", *flags, *PRUNING, "--sparsity_warmup_updates", 1, *resume)
    assert folded == [True, True]


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_channels_last(family, size):
    """In float32, where the two memory formats must agree, gradients and the masks' too."""
    model = masked_model(family, size).train()
    waveforms = random_waveforms(1200, 1200)[0]
    plain = features_and_gradients(model, waveforms, None, plain=True)
    model.feature_extractor.channels_last = True
    last = features_and_gradients(model, waveforms, None, plain=False)
    for ours, theirs in zip(last[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert last[2].keys() == plain[2].keys()
    for name, gradient in last[2].items():
        torch.testing.assert_close(
            gradient, plain[2][name], rtol=1e-4, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


def test_where_fused_attention_pays(monkeypatch):
    """On CPUs not with dropout, not without heads, and in bfloat16 with AMX only."""
    query = torch.zeros(1, 2, 3, 4)
    for has_amx in (True, False):
        monkeypatch.setattr(components, "HAS_AMX", has_amx)
        assert components._prefers_fused_attention(query, 0.0)
        assert components._prefers_fused_attention(query.bfloat16(), 0.0) == has_amx
        assert not components._prefers_fused_attention(query, 0.1)
        assert not components._prefers_fused_attention(query[:, :0], 0.0)
    assert components._prefers_fused_attention(query.to("meta"), 0.1)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("scale", [0.01, 100.0, float("nan")])
def test_clipping_is_torchs(scale, plain):
    """Also where the fast path leaves gradients alone, and where nothing is to be clipped at all."""
    generator = torch.Generator().manual_seed(0)
    gradients = [scale * torch.randn(shape, generator=generator) for shape in ((5, 4), (7,))]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    optimizer = torch.optim.AdamW(parameters)

    def clipped(max_norm: float | None) -> tuple[Tensor, list[Tensor]]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        with plain_paths(plain):
            norm = clip_gradients(optimizer, max_norm)
        return norm, [parameter.grad for parameter in parameters]

    norm, found = clipped(10.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, 10.0)
    torch.testing.assert_close(norm, expected_norm, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, [p.grad for p in parameters], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(clipped(None)[1], gradients, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_wavlms_bias_in_the_precision_of_its_scores(dtype):
    """The largest tensor of a WavLM layer, laid out for what every layer does with it."""
    transformer = random_model(small_config("wavlm")).encoder.transformer
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        bias = transformer._position_bias(9)
        gated = transformer.layers[0].attention._gate(torch.randn(2, 9, 16), bias)
        with plain_paths():
            plain = transformer._position_bias(9)
    assert bias.dtype == gated.dtype == (dtype or torch.float32) and bias.is_contiguous()
    torch.testing.assert_close(bias.float(), plain, rtol=0 if dtype is None else 4e-3, atol=0)
