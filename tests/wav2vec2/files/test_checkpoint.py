"""Model files: written whole or not at all, read without running code, every fault one line that names the file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_masked_model, masks_of, random_model, small_config, write_hub_folder

from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import PRUNING_UNITS, with_masks

FAMILIES = ["hubert", "wavlm"]


class Unwritable:
    """Stops ``torch.save`` half-way."""

    def __reduce__(self) -> Any:
        raise RuntimeError("disk full")


def model_contents(family: str = "hubert", **changes: Any) -> dict[str, Any]:
    model = random_model(small_config(family, **changes))
    return {"state_dict": model.state_dict(), "config": model.config}


def check_refused(call: Callable[[], Any], path: Path, *parts: str) -> None:
    """One line that names the file and says all of ``parts``."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- writing


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    """Config and weights come back to the last bit, plain enough for ``weights_only=True``."""
    contents = model_contents(family)
    path = tmp_path / "new" / "folder" / "model.pth"
    checkpoint.save(path, contents)
    plain = torch.load(path, weights_only=True)
    assert plain["config"] == contents["config"]
    model = checkpoint.load_model(path)
    assert model.training
    assert model.config == contents["config"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, contents["state_dict"][key]), key
    assert [file.name for file in path.parent.iterdir()] == ["model.pth"]


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    checkpoint.save(path, {"answer": 1})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk full"):
        checkpoint.save(path, {"weights": torch.zeros(1000), "bad": Unwritable()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pth"]


# --- reading


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-100],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: data[:200] + bytes(len(data) - 400) + data[-200:],
        lambda data: b"<html><body>404 Not Found</body></html>\n",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
    ids=["half", "end cut off", "first bytes", "empty", "zeros", "zeros inside", "web page", "LFS pointer"],
)
def test_damaged_file(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    checkpoint.save(path, model_contents())
    path.write_bytes(damage(path.read_bytes()))
    check_refused(lambda: checkpoint.load_model(path), path)


def test_missing_file(tmp_path: Path) -> None:
    check_refused(lambda: checkpoint.read(tmp_path / "none.pth"), tmp_path / "none.pth", "no such file")
    check_refused(lambda: checkpoint.read(tmp_path), tmp_path, "a folder, where a file is wanted")
    checkpoint.save(tmp_path / "model.pth", {})
    check_refused(lambda: checkpoint.read(tmp_path), tmp_path, "1 in it (model.pth)")


NOT_SAID = ("damaged", "download it again", "no such file")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 378000000\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.mark.parametrize(("contents", "word"), [(LFS, "git lfs pull"), (PAGE, "a web page")])
def test_what_only_stands_for_a_file_is_named(contents: bytes, word: str, tmp_path: Path) -> None:
    """A placeholder may replace a model file, or any file of a folder."""
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    check_refused(lambda: checkpoint.load_model(path), path, word)
    whole = model_contents()
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / f"without-{name}"
        write_hub_folder(folder, whole)
        (folder / name).write_bytes(contents)
        check_refused(lambda folder=folder: checkpoint.load_model(folder), folder / name, word)
        with pytest.raises(UserError) as error:
            checkpoint.load_model(folder)
        assert not [word for word in NOT_SAID if word in str(error.value)]


@pytest.mark.parametrize("kind", ["folder", "safetensors", "safetensors alone", "bin", "ours", "fairseq"])
def test_other_kinds_are_named(kind: str, tmp_path: Path) -> None:
    """The message names their kind and the command that takes them."""
    folder, contents = tmp_path / "model", model_contents()
    write_hub_folder(folder, contents)
    bare = dict(contents["state_dict"])
    torch.save(bare, folder / "pytorch_model.bin")
    torch.save({"cfg": {}, "model": bare}, folder / "checkpoint.pt")
    parts = {
        "folder": (folder, "a folder in transformers' format", f"convert_hubert_from_hf.py --model {folder}"),
        "safetensors": (folder / "model.safetensors", "safetensors", f"convert_hubert_from_hf.py --model {folder}"),
        "safetensors alone": (folder / "model.safetensors", "safetensors", "convert_hubert_from_hf.py --model"),
        "bin": (folder / "pytorch_model.bin", "bare weights", f"convert_hubert_from_hf.py --model {folder}"),
        "ours": (folder / "model.safetensors", "safetensors", f"give the folder that it lies in, {folder}"),
        "fairseq": (folder / "checkpoint.pt", "fairseq's format", "convert_wavlm_from_fairseq.py --ckpt"),
    }
    if kind == "safetensors alone":
        (folder / "config.json").unlink()
    elif kind != "ours":
        (folder / "config.json").write_text('{"model_type": "hubert"}')
    path, *words = parts[kind]
    for call in (checkpoint.load_model, lambda path: load_masked_model(path, ["head"])):
        check_refused(lambda call=call: call(path), path, *words)
        with pytest.raises(UserError) as error:
            call(path)
        assert not [word for word in NOT_SAID if word in str(error.value)]


def test_folder_of_ours_is_read(tmp_path: Path) -> None:
    """Wherever a model file is."""
    contents = model_contents("wavlm")
    write_hub_folder(tmp_path, contents)
    for model in (checkpoint.load_model(tmp_path), load_masked_model(tmp_path, ["head"])):
        state = model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in contents["state_dict"].items())


@pytest.mark.parametrize("form", ["file", "folder"])
def test_weight_norm_removed(form: str, tmp_path: Path) -> None:
    contents = model_contents()
    conv = "encoder.transformer.pos_conv_embed.conv.weight"
    wanted = checkpoint.model_of(contents, "").encoder.transformer.pos_conv_embed.conv.weight.detach()
    for part in "gv":
        del contents["state_dict"][f"{conv}_{part}"]
    contents["state_dict"][conv] = wanted
    path = tmp_path / ("model.pth" if form == "file" else "model")
    if form == "file":
        checkpoint.save(path, contents)
    else:
        write_hub_folder(path, contents)
    for model in (checkpoint.load_model(path), load_masked_model(path, ["head"])):
        torch.testing.assert_close(model.encoder.transformer.pos_conv_embed.conv.weight, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [False, True, 0, None])
def test_key_of_another_program(value: Any, tmp_path: Path) -> None:
    """DiariZen's, which changes nothing where it is False."""
    contents = model_contents("wavlm")
    path = tmp_path / "model.pth"
    checkpoint.save(path, contents | {"config": contents["config"] | {"use_layerwise_prune": value}})
    if value is False:
        assert checkpoint.load_model(path).config == contents["config"]
    else:
        check_refused(lambda: checkpoint.load_model(path), path, "use_layerwise_prune: expected False, or no such key")


@pytest.mark.parametrize(
    ("contents", "parts"),
    [
        ([1, 2], ["expected a dict", "list"]),
        (torch.zeros(3), ["expected a dict", "Tensor"]),
        ({"model": {}, "cfg": {}}, ["state_dict", "config", "cfg", "convert_wavlm_from_fairseq.py"]),
        ({"state_dict": {}}, ["'config'"]),
        ({"state_dict": {}, "config": None}, ["'config'"]),
        ({"state_dict": [], "config": {}}, ["'state_dict'"]),
        ({"state_dict": {}, "pytorch-lightning_version": "2.5"}, ["training checkpoint", "prune.py"]),
        ({"state_dict": {}, "config": {}, "optimizer_states": []}, ["training checkpoint", "save_final_ckpt.py"]),
    ],
)
def test_file_of_another_kind(contents: Any, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(contents, path)
    check_refused(lambda: checkpoint.load_model(path), path, *parts)
    check_refused(lambda: load_masked_model(path, ["head"]), path, *parts)


# --- configs


@pytest.mark.parametrize("family", FAMILIES)
def test_config_without_a_key(family: str, tmp_path: Path) -> None:
    """Any key that has no default; WavLM's are recognised by ``encoder_remaining_heads``."""
    config, source = small_config(family), tmp_path / "model.pth"
    defaults = {key for key in config if "_prune_" in key or "_use_" in key} | {"normalize_waveform", "aux_num_out"}
    for key in config.keys() - defaults - {"encoder_remaining_heads"}:
        shorter = {name: value for name, value in config.items() if name != key}
        check_refused(lambda shorter=shorter: checkpoint.build_model(shorter, source), source, key)


# What a config has under a key -> part of the message. Keys of WavLM alone make it a WavLM.
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"encoder_speed": 2}, "unknown key encoder_speed"),
    ({"encoder_num_buckets": 320}, "unknown key encoder_num_buckets"),  # WavLM's, in a HuBERT
    ({"extractor_mode": "batch_norm"}, "extractor_mode: expected 'group_norm' or 'layer_norm', found 'batch_norm'"),
    ({"extractor_mode": ["group_norm"]}, "extractor_mode: expected"),
    ({"extractor_conv_bias": 1}, "extractor_conv_bias: expected True or False, found 1"),
    ({"encoder_num_layers": 4}, "expected 4 entries, one per layer (encoder_num_layers), found 3"),
    ({"encoder_num_layers": 0}, "encoder_num_layers: expected a whole number from 1 to"),
    ({"encoder_num_layers": "three"}, "found 'three'"),
    ({"encoder_num_layers": None}, "found None"),
    ({"encoder_num_layers": 10**12}, "found 1000000000000"),
    ({"encoder_num_layers": True}, "found True"),
    ({"encoder_num_heads": [4, 4]}, "encoder_num_heads: expected 3 entries"),
    ({"encoder_num_heads": None}, "encoder_num_heads: expected a whole number from 0 to"),
    ({"encoder_num_heads": [4, -1, 4]}, "encoder_num_heads of layer 1: expected a whole number from 0 to"),
    ({"encoder_head_dim": 0}, "encoder_head_dim: expected a whole number from 1 to"),
    ({"encoder_embed_dim": None}, "encoder_embed_dim: expected a whole number from 1 to"),
    ({"encoder_embed_dim": 16.0}, "encoder_embed_dim: expected a whole number from 1 to"),
    ({"encoder_embed_dim": -16}, "encoder_embed_dim: expected a whole number from 1 to"),
    ({"encoder_embed_dim": 10**12}, "encoder_embed_dim: expected a whole number from 1 to"),
    ({"encoder_ff_interm_features": [20, 20, -20]}, "encoder_ff_interm_features of layer 2: expected"),
    ({"encoder_ff_interm_features": [[20], [20], [20]]}, "encoder_ff_interm_features of layer 0: expected"),
    ({"encoder_use_attention": [True, 1, True]}, "encoder_use_attention of layer 1: expected True or False, found 1"),
    ({"encoder_pos_conv_kernel": 0}, "encoder_pos_conv_kernel: expected"),
    ({"encoder_pos_conv_groups": 5}, "encoder_pos_conv_groups: expected a divisor of encoder_embed_dim 16, found 5"),
    ({"encoder_pos_conv_groups": 0}, "encoder_pos_conv_groups: expected"),
    ({"encoder_dropout": 1.5}, "encoder_dropout: expected a number from 0 to 1, found 1.5"),
    ({"encoder_dropout": float("nan")}, "encoder_dropout: expected a number from 0 to 1, found nan"),
    ({"encoder_layer_drop": "0.1"}, "encoder_layer_drop: expected a number from 0 to 1, found '0.1'"),
    ({"extractor_conv_layer_config": [[10, 10]]}, "extractor_conv_layer_config: expected"),
    ({"extractor_conv_layer_config": [[10, 0, 5]]}, "extractor_conv_layer_config: expected"),
    ({"extractor_conv_layer_config": [[-10, 10, 5]]}, "extractor_conv_layer_config: expected"),
    ({"extractor_conv_layer_config": [[10, 10, 0]]}, "extractor_conv_layer_config: expected"),
    ({"extractor_conv_layer_config": []}, "extractor_conv_layer_config: expected"),
    ({"extractor_conv_layer_config": "[(512,10,5)]"}, "extractor_conv_layer_config: expected"),
    ({"aux_num_out": 0}, "aux_num_out: expected a whole number from 1 to"),
    ({"normalize_waveform": "yes"}, "normalize_waveform: expected True or False, found 'yes'"),
    ({"encoder_remaining_heads": [[0], [1], [4]]}, "encoder_remaining_heads of layer 2: expected ascending indices"),
    ({"encoder_remaining_heads": [[0], [1, 1], [2]]}, "encoder_remaining_heads of layer 1: expected ascending indices"),
    ({"encoder_total_num_heads": [4, 4, 2]}, "encoder_total_num_heads: expected the same number in all layers"),
    ({"encoder_total_num_heads": [5, 5, 5]}, "encoder_total_num_heads: expected a divisor of encoder_embed_dim 16"),
    ({"encoder_num_buckets": 2}, "unknown key encoder_num_buckets"),
    ({"encoder_max_distance": 3, "encoder_remaining_heads": [[0, 1]] * 3}, "encoder_max_distance: expected more than"),
    ({"encoder_num_buckets": 15, "encoder_remaining_heads": [[0, 1]] * 3}, "encoder_num_buckets: expected an even"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=str)
def test_impossible_config(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """No value that cannot be leads further than here, and the one line names its key."""
    family = "wavlm" if changes.keys() & {"encoder_remaining_heads", "encoder_total_num_heads"} else "hubert"
    path, contents = tmp_path / "model.pth", model_contents(family)
    contents["config"] |= changes
    checkpoint.save(path, contents)
    check_refused(lambda: checkpoint.load_model(path), path, message)


# --- weights


NORM = "encoder.transformer.layer_norm.weight"
WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one missing": (
        lambda state: state.pop("encoder.transformer.layers.1.attention.q_proj.bias"),
        "1 missing (encoder.transformer.layers.1.attention.q_proj.bias)",
    ),
    "one left over": (lambda state: state.update({"mask_emb": torch.zeros(3)}), "1 left over (mask_emb)"),
    "another shape": (lambda state: state.update({NORM: torch.zeros(7)}), f"{NORM} has shape [7], expected [16]"),
    "none": (lambda state: state.clear(), "missing (feature_extractor.dummy_weight"),
    "whole numbers": (
        lambda state: state.update({NORM: state[NORM].long()}),
        f"{NORM} is torch.int64, expected floats",
    ),
    "complex numbers": (
        lambda state: state.update({NORM: state[NORM].to(torch.complex64)}),
        "asks for torch.ComplexFloatStorage",
    ),
    "a sparse tensor": (
        lambda state: state.update({NORM: state[NORM].to_sparse()}),
        "asks for torch._utils._rebuild_sparse_tensor",
    ),
    "a tensor without data": (
        lambda state: state.update({NORM: state[NORM].to("meta")}),
        "asks for torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "a string": (lambda state: state.update({NORM: "ones"}), f"{NORM} is 'ones', expected a tensor of floats"),
    "a list": (lambda state: state.update({NORM: [1.0] * 16}), f"{NORM} is [1.0, 1.0"),
    "one number with strides of 0": (
        lambda state: state.update({NORM: torch.zeros(1).expand(16)}),
        f"{NORM} has shape [16], more than the numbers stored for it",
    ),
    "NaN": (lambda state: state[NORM].fill_(torch.nan), f"{NORM} holds NaN or infinite values"),
    "infinity": (lambda state: state[NORM][3].fill_(torch.inf), f"{NORM} holds NaN or infinite values"),
    "a number as a name": (lambda state: state.update({5: torch.zeros(1)}), "expected names as keys, found 5"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(case: str, tmp_path: Path) -> None:
    path, contents = tmp_path / "model.pth", model_contents()
    edit, message = WRONG_WEIGHTS[case]
    edit(contents["state_dict"])
    checkpoint.save(path, contents)
    check_refused(lambda: checkpoint.load_model(path), path, message)
    check_refused(lambda: load_masked_model(path, ["conv", "head"]), path, message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_load(dtype: torch.dtype, tmp_path: Path) -> None:
    path, contents = tmp_path / "model.pth", model_contents()
    contents["state_dict"] = {key: value.to(dtype) for key, value in contents["state_dict"].items()}
    checkpoint.save(path, contents)
    assert all(value.dtype == torch.float32 for value in checkpoint.load_model(path).state_dict().values())


def test_reading_draws_no_random_numbers(tmp_path: Path) -> None:
    """The shapes that a file is checked against are those of a model that is never made."""
    path = tmp_path / "model.pth"
    checkpoint.save(path, model_contents())
    before = torch.get_rng_state()
    checkpoint.read_model_file(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("units", [["conv"], ["head", "interm"], list(PRUNING_UNITS)])
def test_masked_model(family: str, units: list[str], tmp_path: Path) -> None:
    """Fresh masks on these units and no others, the file's weights everywhere else."""
    path, contents = tmp_path / "model.pth", model_contents(family)
    checkpoint.save(path, contents)
    model = load_masked_model(path, units)
    assert model.config == with_masks(contents["config"], units)
    state_dict = model.state_dict()
    assert state_dict.keys() - contents["state_dict"].keys() == {f"{name}.log_alpha" for name in masks_of(model)}
    for key, tensor in contents["state_dict"].items():
        assert torch.equal(state_dict[key], tensor), key
    for name, mask in masks_of(model).items():
        drop_rate = 1 - mask.log_alpha.sigmoid().mean().item()
        assert drop_rate == pytest.approx(0.5 if "intermediate" in name else 0.01, rel=0.1), name


def test_masks_in_the_file_are_kept(tmp_path: Path) -> None:
    """A masked model's own masks are loaded, not drawn anew."""
    path = tmp_path / "model.pth"
    model = random_model(with_masks(small_config("hubert"), ["head"]))
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": model.config})
    for loaded in (checkpoint.load_model(path), load_masked_model(path, ["head"])):
        for name, mask in masks_of(loaded).items():
            assert torch.equal(mask.log_alpha, masks_of(model)[name].log_alpha)
    check_refused(lambda: load_masked_model(path, ["interm"]), path, "hard_concrete_for_heads")
