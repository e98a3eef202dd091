"""Times are charged to the operation that took them, and the parts add up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import made_up_profile, one_layer_config, random_model, small_config

from evaluation import latency
from evaluation.latency import Conditions, compare, is_this_machine, passes
from wav2vec2 import components, fast
from wav2vec2.fast import plain_paths
from wav2vec2.files.errors import UserError
from wav2vec2.profiles import Profile

CONDITIONS = Conditions("torch", "cpu", "32", 1, 2, 0.05)
# Seconds that what an operation calls takes on the made-up clock.
TAKEN = {"conv": 1, "projection": 2, "positional": 4, "attention": 8, "feed_forward": 16, "norms": 64, "rest": 128}


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when these run."""
    now = [0]

    def slow(owner, name, kind):
        function = getattr(owner, name)

        def run(*args, **options):
            now[0] += TAKEN[kind]
            return function(*args, **options)

        monkeypatch.setattr(owner, name, run)

    slow(components.ConvLayerBlock, "forward", "conv")
    slow(components, "conv_frames", "conv")
    slow(fast, "_moments", "conv")
    slow(components.FeatureProjection, "forward", "projection")
    slow(components.ConvolutionalPositionalEmbedding, "forward", "positional")
    slow(components.SelfAttention, "forward", "attention")
    slow(components.FeedForward, "forward", "feed_forward")
    slow(components.EncoderLayer, "forward", "norms")
    slow(components.Encoder, "forward", "rest")
    monkeypatch.setattr(latency, "time", SimpleNamespace(thread_time=lambda: now[0], perf_counter=None))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_own_times_in_torch(clock, family, size, plain):
    model = random_model(small_config(family, size, encoder_use_attention=[True, False, True]))
    subject = passes(model, CONDITIONS, None)
    before = [module.__dict__.keys() for module in subject.model.modules()]
    with plain_paths(plain):
        found = subject.parts()
    expected = [1e6 * TAKEN[operation.kind] for operation in model.operations(800)]
    convs = len(model.feature_extractor.conv_layers)
    if not plain:  # the rows of a batch go through the extractor one by one
        expected[:convs] = [2 * time for time in expected[:convs]]
    assert found.tolist() == [expected] * 3
    assert [module.__dict__.keys() for module in subject.model.modules()] == before


def test_real_times_add_up():
    model = random_model(small_config("wavlm"))
    subject = passes(model, CONDITIONS, None)
    assert subject.whole() > 0
    found = subject.parts()
    assert found.shape == (3, len(model.operations(800))) and (found > 0).all()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("16", torch.float16)])
def test_precision_is_of_the_copy(precision, dtype):
    model = random_model(small_config("hubert"))
    subject = passes(model, CONDITIONS._replace(precision=precision), None)
    assert {parameter.dtype for parameter in subject.model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if precision == "bf16":
        assert (subject.parts() > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_own_times_in_onnx_runtime(tmp_path, family):
    import onnx

    model = random_model(one_layer_config(family))
    subject = passes(model, CONDITIONS._replace(backend="onnx", batch=1), tmp_path / "one")
    found, kinds = subject.parts(), [operation.kind for operation in model.operations(800)]
    assert found.shape == (3, len(kinds)) and (found > 0).all()
    assert subject.whole() > 0 and found.sum(1).min() < 20 * subject.whole()
    names = [node.name for node in onnx.load(tmp_path / "one" / "model.onnx").graph.node]
    assert len(set(names)) == len(names)
    assert any(name.startswith("encoder.transformer.layers.0.attention.q_proj/") for name in names)
    assert sum(name.startswith("feature_extractor.conv_layers.1.conv/") for name in names) > 0
    written = (tmp_path / "one" / "model.onnx").stat().st_mtime_ns
    passes(model, subject_conditions(), tmp_path / "one")
    assert (tmp_path / "one" / "model.onnx").stat().st_mtime_ns == written, "exported once"


def test_steps_are_not_timed(tmp_path):
    model = random_model(one_layer_config("hubert") | {"encoder_chunk_frames": 4})
    with pytest.raises(UserError, match="found a streaming model"):
        passes(model, subject_conditions(), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def subject_conditions():
    return CONDITIONS._replace(backend="onnx", batch=1)


@pytest.mark.parametrize("size", ["base", "large"])
def test_nodes_belong_to_modules(tmp_path, size):
    """A node without a module is of the one before it; a fused norm is of the layer's norms, or pre-norm the last."""
    (tmp_path / "made").mkdir()
    model = random_model(small_config("wavlm", size))
    subject = passes(model, subject_conditions(), tmp_path / "made")
    layer = "encoder.transformer.layers.1"
    nodes = [
        ("node_Shape_1", "rest 0"),
        ("feature_extractor/node_sub", "rest 0"),
        ("feature_extractor.conv_layers.1.conv/node_Conv_1", "conv 1"),
        ("encoder.transformer.pos_conv_embed/node_gelu", "positional 0"),
        ("SkipLayerNormalization", "rest 0"),
        ("encoder.transformer.layers.0.attention.rel_attn_embed/node_embedding", "rest 0"),
        (f"{layer}.attention.q_proj/node_MatMul", "attention 1"),
        ("node_Split", "attention 1"),
        (f"{layer}.attention.out_proj/node_MatMul", "attention 1"),
        ("SkipLayerNormalization_token_1", "norms 1" if size == "base" else "rest 0"),
        (f"{layer}.feed_forward.output_dense/node_MatMul", "feed_forward 1"),
        (f"{layer}.final_layer_norm/node_layer_norm", "norms 1"),
        (f"{layer}/node_add", "norms 1"),
        ("encoder.transformer.layer_norm/node_layer_norm", "rest 0"),
    ]
    events = [{"name": name + "_kernel_time", "ts": 10 + number, "dur": 1} for number, (name, _) in enumerate(nodes)]
    others = [{"name": "x_kernel_time", "ts": 5, "dur": 1}, {"name": "x_kernel_time", "ts": 60, "dur": 1}]
    found = subject._parts({"ts": 10, "dur": 50}, events + others)
    seen, expected = {}, []
    for operation in model.operations(800):
        seen[operation.kind] = seen.get(operation.kind, -1) + 1
        expected.append(1.5 * sum(owner == f"{operation.kind} {seen[operation.kind]}" for _, owner in nodes))
    assert found == expected and sum(found) == 1.5 * len(nodes)


def test_compare():
    models = {
        "teacher": random_model(small_config("hubert")),
        "pruned": random_model(small_config("hubert", encoder_use_attention=[True, False, True])),
    }
    contents = made_up_profile(models["teacher"], 0.05, lambda op, x, y: 2.0 * x * y)
    threads = torch.get_num_threads()
    found = compare(Profile(contents | {"threads": threads + 1}), models)
    assert torch.get_num_threads() == threads and list(found) == list(models)
    for name, model in models.items():
        operations = model.operations(800)
        expected = [2.0 * op.sizes[0] * op.sizes[1] for op in operations]
        assert [part.expected for part in found[name].parts] == pytest.approx(expected)
        assert found[name].expected == pytest.approx(sum(expected))
        assert found[name].measured > 0 and np.all([part.measured > 0 for part in found[name].parts])
    assert [part.name for part in found["pruned"].parts[-6:]] == [
        *("norms 1", "feed_forward 1", "norms 2", "attention 2", "feed_forward 2", "rest")
    ]
    with pytest.raises(UserError, match="no times for"):
        compare(Profile(contents), {"other": random_model(small_config("hubert", encoder_pos_conv_groups=2))})


def test_this_machine():
    contents = made_up_profile(random_model(small_config("hubert")), 0.05, lambda *_: 1.0)
    device = latency.made_by(torch.device("cpu"))["device"]
    assert not is_this_machine(Profile(contents))
    assert is_this_machine(Profile(contents | {"made_by": {"device": device}}))
    if not torch.cuda.is_available():
        assert not is_this_machine(Profile(contents | {"device": "cuda", "made_by": {"device": device}}))
