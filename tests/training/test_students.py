"""Slices of a model: what they keep of it, what starts fresh, what cannot be."""

import json
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, SMALL_LIGHT_LAYERS, random_model, random_waveforms, small_config, take_steps
from torch import Tensor

from training.data import SpeechDataModule
from training.settings import DataSettings
from training.students import slice_model, streaming_model
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, hubert_base, wav2vec2_model

FAMILIES = [("hubert", "base"), ("hubert", "large"), ("wavlm", "base"), ("wavlm", "large")]
LAYERS = "encoder.transformer.layers."


def sliced(
    source: Wav2Vec2Model, changes: dict[str, Any], init_layers: list[int] | str | None = None
) -> tuple[Wav2Vec2Model, str]:
    """The student, and the line that says where its parts come from."""
    contents = {"config": source.config, "state_dict": source.state_dict()}
    contents, origins = slice_model(contents, changes, init_layers, "source.pth")
    student = wav2vec2_model(**contents["config"]).eval()
    student.load_state_dict(contents["state_dict"], strict=True)
    return student, origins


def assert_weights(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_without_a_change_it_is_a_copy(family, size):
    source = random_model(small_config(family, size))
    for changes in ({}, source.config):  # a whole config is a change of every key
        student, _ = sliced(source, changes)
        assert student.config == source.config
        assert_weights(student, source.state_dict())


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_layers_in_another_order(family, size):
    source = random_model(small_config(family, size))
    student, _ = sliced(source, {}, [3, 2, 2, 1])
    expected = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(LAYERS)}
    for number, start in enumerate((3, 2, 2, 1)):
        for name, tensor in source.encoder.transformer.layers[start - 1].state_dict().items():
            if "rel_attn_embed" not in name:
                expected[f"{LAYERS}{number}.{name}"] = tensor
    if family == "wavlm":  # the first layer has the table for all
        table = source.encoder.transformer.bucket_table.weight
        expected[f"{LAYERS}0.attention.rel_attn_embed.weight"] = table
    assert_weights(student, expected)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (5, [1, 2, 2, 3, 3]), (6, [1, 1, 2, 2, 3, 3])]
)
def test_layers_are_spread_evenly(num_layers, expected):
    """The last one starts from the last; and has its shape, where nothing else is said."""
    source = random_model(small_config("hubert", encoder_ff_interm_features=[5, 6, 7]))
    student, origins = sliced(source, {"encoder_num_layers": num_layers})
    assert student.config["encoder_ff_interm_features"] == [(5, 6, 7)[start - 1] for start in expected]
    assert f"layers {', '.join(map(str, expected))};" in origins


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_every_width_is_a_slice(family, size):
    """Held against plain indexing: the first units of each kind, and of frames the first of each of the four groups."""
    heads = {"encoder_num_heads": [2, 3, 4]} if family == "hubert" else {"encoder_remaining_heads": [[0, 2], [1], [3]]}
    changes = {
        "extractor_conv_layer_config": [[5, 10, 5], [6, 3, 2], [8, 3, 2], [7, 2, 2]],
        "encoder_embed_dim": 8,
        "encoder_pos_conv_kernel": 4,
        "encoder_ff_interm_features": 12,
        **heads,
    }
    source = random_model(small_config(family, size, aux_num_out=3))
    student, _ = sliced(source, changes)
    assert student.config["encoder_head_dim"] == 4  # of the heads before, as in a pruned model
    found, before = student.state_dict(), source.state_dict()
    frames = [0, 1, 4, 5, 8, 9, 12, 13]
    for number, (channels, inputs) in enumerate(((5, 1), (6, 5), (8, 6), (7, 8))):
        name = f"feature_extractor.conv_layers.{number}.conv.weight"
        assert torch.equal(found[name], before[name][:channels, :inputs])
    projection = "encoder.feature_projection."
    assert torch.equal(found[f"{projection}layer_norm.weight"], before[f"{projection}layer_norm.weight"][:7])
    assert torch.equal(found[f"{projection}projection.weight"], before[f"{projection}projection.weight"][frames, :7])
    ours, theirs = (model.encoder.transformer.pos_conv_embed.conv for model in (student, source))
    torch.testing.assert_close(ours.weight, theirs.weight[frames][:, :2, 2:6])
    assert torch.equal(ours.bias, theirs.bias[frames])
    assert torch.equal(found["aux.weight"], before["aux.weight"][:, frames])
    kept = [[0, 1], [0, 1, 2], [0, 1, 2, 3]] if family == "hubert" else [[0, 2], [1], [3]]
    for number, heads_of_layer in enumerate(kept):
        rows = [4 * head + row for head in heads_of_layer for row in range(4)]
        layer = f"{LAYERS}{number}."
        for name in ("k_proj", "v_proj", "q_proj"):
            name = f"{layer}attention.{name}.weight"
            assert torch.equal(found[name], before[name][rows][:, frames])
        name = f"{layer}attention.out_proj."
        assert torch.equal(found[f"{name}weight"], before[f"{name}weight"][frames][:, rows])
        assert torch.equal(found[f"{name}bias"], before[f"{name}bias"][frames])
        name = f"{layer}feed_forward."
        assert torch.equal(found[f"{name}intermediate_dense.bias"], before[f"{name}intermediate_dense.bias"][:12])
        assert torch.equal(found[f"{name}output_dense.weight"], before[f"{name}output_dense.weight"][frames, :12])
        assert torch.equal(found[f"{layer}final_layer_norm.weight"], before[f"{layer}final_layer_norm.weight"][frames])
        if family == "wavlm":
            gate = f"{layer}attention.gru_rel_pos_linear.weight"
            assert torch.equal(found[gate], before[gate][:, :2])


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_blocks_go(family):
    """A layer without attention computes what the source's does when its attention is switched off."""
    source = random_model(small_config(family))
    changes = {"encoder_use_attention": [False, True, True], "encoder_use_feed_forward": [True, False, True]}
    student, _ = sliced(source, changes)
    table = source.encoder.transformer.bucket_table
    source.encoder.transformer.layers[1].feed_forward = None
    if table is not None:
        source.encoder.transformer.layers[1].attention.rel_attn_embed = table
    source.encoder.transformer.layers[0].attention = None
    waveforms, lengths = random_waveforms(900, 600)
    with torch.no_grad():
        for ours, theirs in zip(*(m.extract_features(waveforms, lengths)[0] for m in (student, source)), strict=True):
            torch.testing.assert_close(ours, theirs)


WITHOUT_NORM = {"encoder_feature_projection_layer_norm": False}
WIDE = {"encoder_embed_dim": 32}
FEWER_LAYERS = {"extractor_conv_layer_config": SMALL_LIGHT_LAYERS}


@pytest.mark.parametrize(
    ("changes", "init_layers", "fresh"),
    [
        ({}, "random", ["layers (--init_layers random)"]),
        (FEWER_LAYERS, None, ["extractor (extractor_conv_layer_config)"]),
        (
            {"extractor_conv_layer_config": [[9, 20, 10], [7, 5, 4]]},
            None,
            ["extractor (extractor_conv_layer_config)", "projection (extractor_conv_layer_config)"],
        ),
        ({"encoder_pos_conv_kernel": 7}, None, ["positional convolution (encoder_pos_conv_kernel)"]),
        (WITHOUT_NORM, None, ["projection (encoder_feature_projection_layer_norm)"]),
        ({"aux_num_out": 5}, None, ["output layer (aux_num_out)"]),
        (
            WIDE,
            "random",
            [
                *("projection (encoder_embed_dim)", "positional convolution (encoder_embed_dim)"),
                *("encoder norm (encoder_embed_dim)", "layers (--init_layers random)"),
            ],
        ),
        (
            {"encoder_num_layers": 5, "encoder_ff_interm_features": 99, "encoder_num_heads": 9, "encoder_head_dim": 2},
            "random",
            ["layers (--init_layers random)"],
        ),
    ],
)
def test_what_does_not_fit_starts_fresh(changes, init_layers, fresh):
    """A line names it, with the key; all else is the source's, to the last bit."""
    source = random_model(small_config("hubert"))
    student, origins = sliced(source, changes, init_layers)
    assert origins.startswith("from the model ") and origins.endswith(f"; fresh {', '.join(fresh)}")
    parts = {
        **{"feature_extractor": "extractor", "encoder.feature_projection": "projection"},
        **{"encoder.transformer.pos_conv_embed": "positional convolution", "aux": "output layer"},
        **{"encoder.transformer.layer_norm": "encoder norm", "encoder.transformer.layers": "layers"},
    }
    before = source.state_dict()
    for name, tensor in student.state_dict().items():
        (part,) = [part for prefix, part in parts.items() if name.startswith(f"{prefix}.")]
        is_same = name in before and torch.equal(tensor, before[name])
        is_fresh = any(words.startswith(part) for words in fresh)
        assert is_same != is_fresh or "dummy_weight" in name, name


@pytest.mark.parametrize(
    ("family", "changes", "init_layers", "message"),
    [
        ("hubert", WIDE, None, "encoder_embed_dim: found 32, the nearest slice has 16; .* random"),
        ("hubert", {"encoder_embed_dim": 6, "encoder_pos_conv_groups": 2}, None, "_dim: found 6, the nearest .* has 4"),
        ("hubert", {"encoder_pos_conv_groups": 2}, None, "encoder_pos_conv_groups: found 2, the nearest slice has 4"),
        ("hubert", {"encoder_head_dim": 2}, None, "encoder_head_dim: found 2, the nearest slice has 4"),
        ("hubert", {"encoder_num_heads": [4, 5, 4]}, None, r"heads: found \[4, 5, 4\], the nearest .* \[4, 4, 4\]"),
        ("hubert", {"encoder_ff_interm_features": [20, 30]}, [3, 1], r"features: found \[20, 30\], .* has \[20, 20\]"),
        ("hubert", {"encoder_layer_norm_first": True}, None, "layer_norm_first: found True, the nearest .* has False"),
        ("hubert", small_config("wavlm"), None, "unknown key encoder_num_heads, expected the keys of a WavLM"),
        ("wavlm", {"encoder_num_buckets": 8}, None, "encoder_num_buckets: found 8, the nearest slice has 16"),
        ("wavlm", {"encoder_total_num_heads": 2, "encoder_remaining_heads": [[0]] * 3}, None, "_heads: found"),
        ("hubert", {"encoder_num_layers": 2}, [1], "--init_layers: expected 2 layers, .* from 1 to 3; found 1"),
        ("hubert", {"encoder_num_layers": 2}, [1, 4], "--init_layers: expected 2 layers, .* from 1 to 3; found 1, 4"),
        ("hubert", {"encoder_num_layers": 10**9}, None, "encoder_num_layers: expected 1 to 256"),
        ("hubert", {"encoder_num_layers": "2"}, [1], "encoder_num_layers: expected 1 to 256"),
        ("hubert", {"encoder_embed_dim": 10}, None, "encoder_pos_conv_groups: expected a divisor"),
        ("hubert", {"encoder_num_heads": [4]}, None, "encoder_num_heads: expected 3 entries"),
        ("hubert", {"num_hidden_layers": 2}, None, "unknown key num_hidden_layers"),
        ("hubert", {"encoder_prune_attention_heads": True}, None, "has masks, expected none; .* --pruning_units"),
    ],
)
def test_what_cannot_be(family, changes, init_layers, message):
    with pytest.raises(UserError, match=message) as error:
        sliced(random_model(small_config(family)), changes, init_layers)
    assert "\n" not in str(error.value)


def test_a_layer_that_lacks_a_block():
    source = random_model(small_config("hubert", encoder_use_attention=[True, False, True]))
    with pytest.raises(UserError, match=r"encoder_use_attention: found \[True\], the nearest slice has \[False\]"):
        sliced(source, {"encoder_use_attention": True}, [2])
    assert sliced(source, {}, [2])[0].config["encoder_use_attention"] == [False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "init_layers", "num_params"),
    [
        ("distilhubert", [1, 2], 23_492_736),  # DPHuBERT's table has 23.49 M
        ("three_layers", None, 30_580_608),  # 30.58 M
        ("half_width", None, 26_873_472),  # 26.87 M
        ("fithubert", "random", 20_739_328),
    ],
)
def test_shipped_students(name, init_layers, num_params):
    source = hubert_base()
    student, _ = sliced(source, json.loads((REPOSITORY / f"conf/students/{name}.json").read_text()), init_layers)
    assert student.get_num_params() == num_params
    extractors = [model.feature_extractor for model in (student, source)]
    assert extractors[0].stride == extractors[1].stride
    assert extractors[0].receptive_field == extractors[1].receptive_field


# --- students that stream


@pytest.fixture(scope="module")
def data(manifests) -> SpeechDataModule:
    return SpeechDataModule(DataSettings(tsv_dir=manifests, seconds_per_batch=4, min_seconds=0.5))


def streaming(source: Wav2Vec2Model, data: SpeechDataModule | None, chunk: int = 4, left: int = 6) -> Wav2Vec2Model:
    contents = streaming_model({"config": source.config, "state_dict": source.state_dict()}, chunk, left, data)
    student = wav2vec2_model(**contents["config"]).to(source.feature_extractor.dummy_weight.dtype).eval()
    student.load_state_dict(contents["state_dict"], strict=True)
    return student


@pytest.mark.parametrize(("family", "size"), FAMILIES)
@pytest.mark.parametrize("kernel", [7, 8])
def test_what_a_streaming_student_keeps(data, family, size, kernel):
    """All but the taps behind the frame, as if the source had zeros there; steps give what whole passes give."""
    source = random_model(small_config(family, size, encoder_pos_conv_kernel=kernel)).double()
    student = streaming(source, data)
    changes = {"encoder_chunk_frames": 4, "encoder_left_frames": 6, "encoder_pos_conv_kernel": kernel // 2 + 1}
    assert student.config == {**source.config, **changes}
    found, expected = student.state_dict(), source.state_dict()
    names = {f"feature_extractor.heard.{name}" for name in ("prior_mean", "prior_products")}
    assert found.keys() - expected.keys() == names and not expected.keys() - found.keys()
    cut = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert cut == [f"encoder.transformer.pos_conv_embed.conv.weight_{letter}" for letter in "gv"]
    frames = torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(0)).double()
    waveforms = random_waveforms(student.feature_extractor.num_samples(20))[0].double()
    with torch.no_grad():
        source.encoder.transformer.pos_conv_embed.conv.weight_g[..., kernel // 2 + 1 :] = 0
        ours, theirs = (model.encoder.transformer.pos_conv_embed(frames) for model in (student, source))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(take_steps(student, waveforms), student(waveforms)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "kernel", "stride"), [("base", 10, 5), ("large", 1, 1)])
def test_prior_is_of_training_data(data, size, kernel, stride, monkeypatch):
    """Mean and mean products of the windows of all batches here, in double precision, which no dtype changes."""
    source = random_model(small_config("hubert", size))
    heard = streaming(source, data).feature_extractor.heard
    crops = data.sampler(data.train_subset, 1, 0)
    batches = [data.datasets[data.train_subset][crop].waveforms.double() for crop in crops]
    windows = torch.cat([batch.unfold(1, kernel, stride).flatten(0, 1) for batch in batches])
    torch.testing.assert_close(heard.prior_mean, windows.mean(0))
    torch.testing.assert_close(heard.prior_products, windows.T @ windows / len(windows))
    for module in (streaming(source, data).bfloat16(), streaming(source, data).half()):
        assert torch.equal(module.feature_extractor.heard.prior_products, heard.prior_products)
    monkeypatch.setattr("training.students._PRIOR_SECONDS", 1)
    assert not torch.equal(streaming(source, data).feature_extractor.heard.prior_mean, heard.prior_mean)


def test_a_norm_of_the_waveform_goes_before_a_group_norm(data):
    """It has no data of its own to measure; other extractors need none."""
    assert not streaming(random_model(small_config("hubert", normalize_waveform=True)), data).normalize_waveform
    student = streaming(random_model(small_config("wavlm", "large", normalize_waveform=False)), None)
    assert student.feature_extractor.heard is None
    for size in ("base", "large"):
        with pytest.raises(UserError, match="--tsv_dir: is not given; the model's norm"):
            streaming(random_model(small_config("hubert", size)), None)
    with pytest.raises(UserError, match=r"--streaming: no model can be built .*encoder_chunk_frames: expected a whole"):
        streaming(student, None, chunk=2**30)


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_a_streaming_model_is_sliced_and_streams_otherwise(data, family, size):
    """Its units of the convolution are taps: those of the far past go. Other chunks are no other weights."""
    source = streaming(random_model(small_config(family, size)), data)
    student, origins = sliced(source, {"encoder_pos_conv_kernel": 3, "encoder_ff_interm_features": 7}, [1, 3])
    assert origins.endswith("fresh nothing") and student.config["encoder_chunk_frames"] == 4
    name = "encoder.transformer.pos_conv_embed.conv.weight_v"
    assert torch.equal(student.state_dict()[name], source.state_dict()[name][..., -3:])
    other = streaming(source, None, chunk=8, left=0)
    assert other.config == {**source.config, "encoder_chunk_frames": 8, "encoder_left_frames": 0}
    assert_weights(other, source.state_dict())
    channels = [[8, 10, 5], *source.config["extractor_conv_layer_config"][1:]]
    assert sliced(source, {"extractor_conv_layer_config": channels})[1].endswith("fresh nothing")
    changes = {"extractor_conv_layer_config": SMALL_LIGHT_LAYERS} if size == "base" else {"normalize_waveform": False}
    with pytest.raises(UserError, match=r"source.pth streams, .*expected no change but fewer channels; slice"):
        sliced(source, changes)


@pytest.mark.parametrize("size", ["base", "large"])
def test_a_streaming_student_compiles_as_a_whole(data, size):
    """As --compile does it, which allows no break in the graph; the same numbers, and gradients."""
    student = streaming(random_model(small_config("hubert", size)), data).train()
    waveforms, _ = random_waveforms(1000, 1000)
    compiled = torch.compile(lambda waveforms: student(waveforms)[0], backend="eager", fullgraph=True)(waveforms)
    torch.testing.assert_close(compiled, student(waveforms)[0], rtol=1e-4, atol=1e-4)
    compiled.square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)
