"""export.py: ONNX files against PyTorch on other batches and lengths, without this project; cards, flags, refusals."""

import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from conftest import spoken
from helpers import (
    REPOSITORY,
    TASK_HEADS,
    TRAINING_PACKAGES,
    error_line,
    one_layer_config,
    random_model,
    random_waveforms,
    run_command,
    run_script,
    run_to_exit,
    run_without,
    small_config,
)
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch import Tensor

from evaluation import backends
from exporters import comparison, int8, steps
from exporters import onnx as export_onnx
from exporters.card import card_text
from exporters.huggingface import export_huggingface
from exporters.options import read_card
from wav2vec2 import streaming
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import Head, contents_of, model_with_its_head, with_head
from wav2vec2.flops import count_flops

slow = pytest.mark.slow

# 10 samples a frame, and one layer less than the others: what takes time is to trace it.
CONV_LAYERS = [[7, 10, 5], [9, 3, 2]]
MIN_SAMPLES = 20  # of one frame
SIZE = {"encoder_num_layers": 2, "extractor_conv_layer_config": CONV_LAYERS}
PRUNED = {
    "hubert": {
        **SIZE,
        "encoder_embed_dim": 12,
        "encoder_pos_conv_kernel": 5,
        "encoder_num_heads": [0, 3],
        "encoder_use_attention": [False, True],
        "encoder_use_feed_forward": [True, False],
        "encoder_ff_interm_features": [5, 0],
        "encoder_feature_projection_layer_norm": False,
    },
    "wavlm": {
        **SIZE,
        "encoder_embed_dim": 12,
        "encoder_head_dim": 4,
        "encoder_total_num_heads": [4, 4],
        "encoder_remaining_heads": [[1, 3], [0, 1, 2, 3]],
        "encoder_use_attention": [True, True],
        "encoder_use_feed_forward": [False, True],
        "encoder_ff_interm_features": [0, 11],
        "encoder_max_distance": 40,
    },
}
# Two waveforms as long as another are no padding, one frame is the least that ONNX takes.
BATCHES = [(1500,), (777, 777), (2100, 900, 63, 12), (MIN_SAMPLES,), (25, 20)]
CARD = """
license: cc-by-4.0
base_model: microsoft/wavlm-base-plus
datasets: [librispeech_asr, tones]
tags: [small]
model_name: Small | WavLM
license_link: "https://example.org/licence"
"""


def contents_with_head(head: Head, config: dict[str, Any]) -> dict[str, Any]:
    return with_head(contents_of(random_model(config)), head, "model.pth", torch.Generator().manual_seed(1))


class Exported:
    """A model file's contents, and the ONNX files that export.py made of it."""

    def __init__(self, folder: Path, contents: dict[str, Any], *flags: object) -> None:
        self.model = model_with_its_head(contents, "model.pth").eval()
        self.folder = folder / "onnx"
        checkpoint.save(folder / "model.pth", contents)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(backends, "_MIN_SECONDS", 0.1)  # this model makes 1600 frames of a second
            source = ("--model", folder / "model.pth", "--out", folder, "--formats", "onnx")
            run_script(monkeypatch, "export", *source, *flags)
        self.card = (self.folder / "README.md").read_text()

    def run_onnx(self, file: str, waveforms: Tensor, lengths: Tensor) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(self.folder / file)
        return session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of tones."""
    folder = tmp_path_factory.mktemp("speech")
    lines = [str(folder)]
    for number in range(3):
        samples = spoken("ab"[: 1 + number], np.random.default_rng(number))
        soundfile.write(folder / f"{number}.wav", samples, 16_000)
        lines.append(f"{number}.wav\t{len(samples)}")
    (folder / "speech.tsv").write_text("\n".join(lines) + "\n")
    return folder / "speech.tsv"


def assert_same(found: Any, wanted: tuple[Tensor, Tensor]) -> None:
    """Equal up to the valid frames, or, of whole clips, where there is one."""
    (states, frames), (wanted_states, wanted_frames) = map(torch.as_tensor, found), wanted
    assert torch.equal(frames, wanted_frames)
    assert states.shape == wanted_states.shape
    for row, valid in enumerate(frames):
        rows = [x[row, :valid] if x.ndim > 2 else x[row] * (valid > 0) for x in (states, wanted_states)]
        torch.testing.assert_close(*rows, atol=1e-5, rtol=1e-5)


@slow
def test_wavlm(tmp_path: Path, speech: Path) -> None:
    """Pruned heads and blocks; the last hidden state, and of 8 bits too."""
    model = random_model(small_config("wavlm", "base", **PRUNED["wavlm"]))
    exported = Exported(tmp_path, contents_of(model), "--int8", "--tsv", speech)
    check_outputs(exported)
    check_file(exported, "last_hidden_state", ["batch", "frames", 12], opset=20)
    check_int8(exported)
    check_without_this_project(exported, "last_hidden_state")


@slow
def test_hubert(tmp_path: Path) -> None:
    """HuBERT or wav2vec 2.0 that normalises, with a layer_norm extractor, pre-norm; logits of a head of clips."""
    head = TASK_HEADS[5]  # weighted layers, attentive pooling
    exported = Exported(
        tmp_path, contents_with_head(head, small_config("hubert", "large", **PRUNED["hubert"])), "--opset", 18
    )
    check_outputs(exported)
    properties = check_file(exported, "logits", ["batch", 3], opset=18)
    assert json.loads(properties["head"]) == head.to_dict()
    assert "3 labels (yes, no, up)" in exported.card
    check_without_this_project(exported, "logits")

    # With a LayerNorm in each layer, all convolutions but that of the waveform suit 8 bits.
    options = export_onnx.OnnxOptions(speech=list(random_waveforms(1500, 1100)[0]))
    feeds = export_onnx._feeds(exported.folder / "model.onnx", exported.model, options.speech)
    int8.quantize(exported.folder / "model.onnx", tmp_path / "model.onnx", True, feeds)
    model = onnx.load(tmp_path / "model.onnx")
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    kinds = [makers.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"]
    assert kinds == [None, "DequantizeLinear", "DequantizeLinear"]


def check_outputs(exported: Exported) -> None:
    """Batches and lengths that it was not traced with; WavLM's buckets are those of the length."""
    for num_samples in BATCHES:
        waveforms, lengths = random_waveforms(*num_samples)
        with torch.inference_mode():
            wanted = exported.model(waveforms, lengths)
        assert_same(exported.run_onnx("model.onnx", waveforms, lengths), wanted)


def check_file(exported: Exported, output: str, shape: list[Any], opset: int) -> dict[str, str]:
    """Names, free axes, opset and what a program needs to know."""
    model = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    inputs = {"waveforms": ["batch", "samples"], "lengths": ["batch"]}
    assert axes == {**inputs, output: shape, "frames": ["batch"]}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["sample_rate"] == "16000" and properties["min_samples"] == str(MIN_SAMPLES)
    assert json.loads(properties["config"]) == exported.model.config
    weights = {tuple(weight.dims) for weight in model.graph.initializer}
    kernel = exported.model.config["encoder_pos_conv_kernel"]
    assert (12, 3, kernel) in weights and (1, 1, kernel) not in weights, "weight norm is still in the graph"
    # The tracers note source lines; a published file has no business with the paths of a machine.
    for path in exported.folder.glob("*.onnx"):
        assert str(REPOSITORY).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()
    for text in (
        f"opset {opset}, and of ai.onnx alone\n",
        f"any number of samples from {MIN_SAMPLES}:",
        f"- model.onnx: {(exported.folder / 'model.onnx').stat().st_size:,} bytes; {output.replace('_', ' ')} differs",
        "(at most 1e-04 is accepted)",
    ):
        assert text in exported.card, text
    return properties


def check_int8(exported: Exported) -> None:
    """Matrices and the positional convolution, near the same numbers, and the card says how near."""
    model = onnx.load(exported.folder / "model.int8.onnx")
    kinds = [node.op_type for node in model.graph.node]
    # Of each layer four attention projections and the gate, two of the feed-forward, and the feature projection.
    assert kinds.count("MatMulInteger") == 2 * 5 + 2 + 1
    weights = {weight.name: weight for weight in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    convolutions = [makers.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"]
    assert [node and node.op_type for node in convolutions] == [None, None, "DequantizeLinear"]
    assert weights[convolutions[2].input[0]].data_type == onnx.TensorProto.INT8
    assert len(weights[convolutions[2].input[1]].dims) == 1, "not by channel"
    waveforms, lengths = random_waveforms(1500, 1100)
    plain, frames = exported.run_onnx("model.onnx", waveforms, lengths)
    quantized, quantized_frames = exported.run_onnx("model.int8.onnx", waveforms, lengths)
    assert (frames == quantized_frames).all()
    valid = np.arange(plain.shape[1]) < frames[:, None]
    plain, quantized = plain[valid], quantized[valid]
    cosines = (plain * quantized).sum(-1) / np.linalg.norm(plain, axis=-1) / np.linalg.norm(quantized, axis=-1)
    assert (plain != quantized).any() and cosines.mean() > 0.95
    assert re.search(r"- model.int8.onnx: .* differs .* 3 utterances", exported.card)
    assert "MatMulInteger" in exported.card


def check_without_this_project(exported: Exported, output: str) -> None:
    """ONNX needs ONNX Runtime alone: the lines of the card run without torch and this project."""
    waveforms, lengths = random_waveforms(1300, 700)
    np.savez(exported.folder / "input.npz", waveforms=waveforms.numpy(), lengths=lengths.numpy())
    lines = exported.card.split("```python\n")[1].split("```")[0]
    code = f"""
import os
import numpy as np
inputs = np.load({str(exported.folder / "input.npz")!r})
waveforms, lengths = inputs["waveforms"], inputs["lengths"]
os.chdir({str(exported.folder)!r})
{lines}
print(float(abs({output}).sum()))
"""
    printed = run_without((*TRAINING_PACKAGES, "wav2vec2", "hardconcrete", "torch"), code)
    wanted = exported.model(waveforms, lengths)[0].detach().double().abs().sum()
    assert float(printed) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_traced(family: str, size: str) -> None:
    """A pruned positional convolution has one weight in the program, in each kind of model."""
    large = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True, "normalize_waveform": True}
    config = one_layer_config(family) | (large if size == "large" else {}) | {"encoder_prune_pos_conv": True}
    model = random_model(config)
    with torch.no_grad():
        model.encoder.transformer.pos_conv_embed.hard_concrete.log_alpha.copy_(torch.tensor([5.0, 4.0, 0.3, -8.0]))
    model.prune()
    assert model.config["encoder_pos_conv_kernel"] == 6
    program = export_onnx.traced(model, export_onnx.OnnxOptions())
    assert "weight_norm" not in program.graph_module.code
    waveforms, lengths = random_waveforms(2100, 900)
    with torch.inference_mode():
        assert_same(program.module()(waveforms, lengths), model(waveforms, lengths))


def test_float16_holds_what_it_can(tmp_path: Path) -> None:
    """Only large matrices are stored as float16, and only if it can hold their values."""
    arrays = {
        "large": np.ones((40, 40)),
        "huge": np.full((40, 40), 7e4),
        "small": np.ones((4, 4)),
        "row": np.ones(2000),
    }
    weights = [onnx.numpy_helper.from_array(array.astype("float32"), name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([], "weights", [], [], weights)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    int8._to_float16(tmp_path / "model.onnx", tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = {weight.name: weight.data_type for weight in graph.initializer}
    assert kinds.pop("large.float16") == onnx.TensorProto.FLOAT16
    assert set(kinds.values()) == {onnx.TensorProto.FLOAT} and len(kinds) == 3
    assert [(node.op_type, *node.output) for node in graph.node] == [("Cast", "large")]


def test_card(tmp_path: Path) -> None:
    """Metadata that huggingface_hub reads, and numbers that are the model's."""
    path = tmp_path / "card.yaml"
    path.write_text(CARD)
    model = random_model(small_config("wavlm", "base", **PRUNED["wavlm"]))
    made_by = {"script": "save_final_ckpt.py", "target_sparsity": None}
    words = {"model_class": "AutoModel", "own_code": True}
    score = {"task_type": "audio-classification", "dataset_type": "digits", "dataset_name": "digits"}
    score |= {"metric_type": "accuracy", "metric_name": "accuracy (%)", "metric_value": 91.5}
    text = card_text(model, "huggingface", read_card(path), [score], made_by=made_by, measured=["same"], **words)
    card = ModelCard(text)
    assert [(entry.metric_name, entry.metric_value) for entry in card.data.eval_results] == [("accuracy (%)", 91.5)]
    assert card.data.license == "cc-by-4.0"
    assert card.data.base_model == "microsoft/wavlm-base-plus"
    assert card.data.datasets == ["librispeech_asr", "tones"]
    assert card.data.library_name == "transformers"
    assert card.data.license_link == "https://example.org/licence"
    assert card.data.tags == ["speech", "audio", "self-supervised", "dphubert", "wavlm", "small"]
    for text in (
        "# Small | WavLM",
        "- same\n- digits: accuracy (%) 91.5\n",
        f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |",
        "- licence of the weights: cc-by-4.0\n",
        "- made from: microsoft/wavlm-base-plus\n",
        "- training data: librispeech_asr, tones\n",
        "- made by, script: `save_final_ckpt.py`",
        "| frames | 1600 a second, of 12 dimensions |",
        "| 1 | 2 | 0 |",
        "Conv channels: 7, 9.",
    ):
        assert text in card.text, text
    assert "target_sparsity" not in card.text  # it was None


# What would be Markdown or HTML, steer a terminal, or is no UTF-8; and how it is shown.
FOREIGN = "`x` \n\n# PWNED\n\n---\n<b>&lt; ![x](y://z) **b** _i_ ~~s~~ {{ 7 * 7 }}\x1b[2J\u202e\udcff snake_case"
SHOWN = r"`x` # PWNED --- <b>&lt; ![x](y://z) **b** _i_ ~~s~~ {{ 7 * 7 }}\x1b[2J\u202e\udcff snake_case"


def rendered(card: str) -> tuple[str, set[str]]:
    """The text of a card as a reader sees it, and the kinds of what it is made of."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    inline = [part for token in tokens for part in token.children or []]
    kinds = {token.tag or token.type for token in (*tokens, *inline)}
    return "\n".join(part.content for part in inline if part.type in ("text", "text_special", "code_inline")), kinds


def test_text_from_files_is_no_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, labels and settings of a stranger's file are shown in the card as they are, and mean nothing there."""
    head = Head("clips", (FOREIGN, "#1"), layers="last", pooling="mean")
    made_by = {FOREIGN: FOREIGN, 7: [FOREIGN], "script": "a_b.py"}
    name, out = "# <b> _i_ \udcff\n# PWNED", tmp_path / "# <b> _o_"
    contents = contents_with_head(head, small_config("hubert", "base"))
    checkpoint.save(tmp_path / f"{name}.pth", {**contents, "made_by": made_by})
    run_script(monkeypatch, "export", "--model", tmp_path / f"{name}.pth", "--out", out)
    readme = (out / "huggingface" / "README.md").read_text(encoding="utf-8")
    assert "- made by, script: `a_b.py`" in readme

    facts = {"model_class": "AutoModel", "own_code": True, "measured": ["same"]}
    plain = card_text(random_model(small_config("hubert")), "huggingface", {}, **facts)
    score = {"task_type": "x", "dataset_type": FOREIGN, "dataset_name": FOREIGN}
    score |= {"metric_type": FOREIGN, "metric_name": FOREIGN, "metric_value": 91.5}
    metadata = {"model_name": FOREIGN, "base_model": FOREIGN, "datasets": [FOREIGN]}
    scored = card_text(random_model(small_config("hubert")), "huggingface", metadata, [score], **facts)
    for text, shown in ((readme, ["# <b> _o_", r"# <b> _i_ \udcff # PWNED", SHOWN[:80]]), (scored, [SHOWN] * 5)):
        seen, kinds = rendered(text)
        joined = seen.replace("\n", "")
        for words in shown:
            assert words in joined
            joined = joined.replace(words, "", 1)
        assert kinds <= rendered(plain)[1] | {"text_special"}
        assert not re.search("[\x1b\u202e]|^# PWNED|<b", text.split("\n---\n", 1)[1], re.MULTILINE)


def test_card_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card says in words what it does not know."""
    config = small_config("hubert", "large")
    checkpoint.save(tmp_path / "model.pth", contents_of(random_model(config)))
    run_script(monkeypatch, "export", "--model", tmp_path / "model.pth", "--out", tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "huggingface" / "README.md")
    assert card.data.license is None and card.data.base_model is None
    for key in ("license", "base_model", "datasets"):
        assert f"not stated: whoever publishes this model adds `{key}:` above" in card.text
    assert "# mine" in card.text and "normalised inside the model" in card.text
    operations = sum(count_flops(config, 118_720)) / 2 / 7.42  # as evaluate.py counts
    line = f"| multiply-accumulates | {operations / 1e9:.3g} G for each second of audio, in waveforms of 7.42 s |"
    assert line in card.text


def test_a_changed_program_is_refused() -> None:
    """An export that differs from the model by too much is not kept."""
    model = random_model(small_config("hubert"))

    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states, frames = model(waveforms, lengths)
        return states + 2e-3 * torch.eye(16)[3], frames

    difference = comparison.compare(model, run, comparison.noise(model, comparison.CHECKED_BATCHES))
    assert 2e-4 < difference.largest <= 2.01e-3 and difference.lowest_cosine < 1
    with pytest.raises(UserError, match=r"differ from PyTorch's by .*, expected at most 1e-04; it was not written"):
        difference.check("model.onnx")
    with pytest.raises(UserError, match="differ from PyTorch's by nan"):
        comparison.Difference(float("nan"), 1.0, 1.0).check("model.onnx")
    with pytest.raises(UserError, match="valid frames, expected"):
        comparison.compare(model, lambda *batch: (model(*batch)[0], batch[1]), comparison.noise(model, [(5,)]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--formats", "huggingface,hub"), "--formats: expected some of huggingface, onnx, .*found 'hub'"),
        (("--formats", "onnx", "--opset", "11"), "opset 11: expected at least 18"),
        (("--formats", "onnx", "--opset", "99"), "opset 99: expected at most"),
        (("--int8",), "--int8: applies to the onnx format"),
        (("--outputs", "all"), "--outputs: applies to the onnx format"),
        (("--formats", "onnx", "--tsv", "nowhere.tsv"), "--tsv: nothing is measured on it"),
        (("--card", "nowhere.yaml"), "nowhere.yaml"),
        (("--out", "o\udcff"), r"--out o\\udcff: its name is not UTF-8"),
    ],
)
def test_wrong_flags(flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Refused before the model is read."""
    assert run_to_exit(monkeypatch, "export", "--model", "none.pth", "--out", tmp_path / "out", *flags) == 1
    line = error_line(capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("license: My Licence", "license: expected one of the hub's identifiers, .* found 'My Licence'"),
        ("licence: mit", "'licence' is not a key of the hub's model cards; expected some of base_model, .* license"),
        ("eval_results: []", "'eval_results' is not a key of the hub's model cards"),
        ("language: no", "language: expected text, or a list of texts .in quotes, if need be., found False"),
        ("datasets: [a, {b: c}]", "datasets: expected text, or a list of texts"),
        ("license: [mit]", r"license: expected text .*, found \['mit'\]"),
        ("- mit", "expected lines 'key: value', found"),
        ("", "expected lines 'key: value', found None"),
        ("a: b: c", "not readable as YAML .*; mend it"),
        ("[" * 2000, "not readable as YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_wrong_cards(text: str, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "card.yaml").write_text(text)
    flags = ("--model", "none.pth", "--out", tmp_path / "out", "--card", tmp_path / "card.yaml")
    assert run_to_exit(monkeypatch, "export", *flags) == 1
    line = error_line(capsys)
    assert str(tmp_path / "card.yaml") in line and re.search(message, line), line


@pytest.mark.parametrize(
    "flags", [("--help",), ("--model", "m.pth", "--out", "o", "--formats", "onnx", "--opset", "3")]
)
def test_flags_do_not_wait_for_torch(flags: tuple[str, ...]) -> None:
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported", *{{"torch", "transformers", "onnx"}}.intersection(sys.modules)))
sys.argv = ["export.py", *{flags!r}]
runpy.run_path("export.py", run_name="__main__")
"""
    result = run_command(sys.executable, "-c", code)
    assert result.stdout.splitlines()[-1] == "imported", result.stderr


def test_missing_packages(tmp_path: Path, monkeypatch, capsys) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            flags = ("--formats", "onnx", "--out", tmp_path / "out")
            assert run_to_exit(patch, "export", "--model", "none.pth", *flags) == 1
        assert f"needs {package}, " in (line := error_line(capsys)) and "requirements-export.txt" in line


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (("--formats", "onnx", "--int8", "--tsv", "nowhere.tsv"), {}, "nowhere.tsv: no such file"),
        (("--evaluation", "none.json"), {}, "none.json: no such file; expected the JSON that evaluate.py writes"),
        ((), {"encoder_prune_attention_heads": True}, "has masks on head; prune.py makes"),
    ],
)
def test_refused_after_the_flags(flags, changes, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    checkpoint.save(tmp_path / "model.pth", contents_of(random_model(small_config("hubert", **changes))))
    source = ("--model", tmp_path / "model.pth", "--out", tmp_path / "out")
    assert run_to_exit(monkeypatch, "export", *source, *flags) == 1
    assert message in error_line(capsys) and not (tmp_path / "out").exists()


def test_metadata_hold_no_free_text() -> None:
    """A name is text of the card, and cannot end its metadata."""
    metadata = {"model_name": 'a"b\nlicense: mit'}
    card = ModelCard(card_text(random_model(small_config("hubert")), "onnx", metadata, operators=[]))
    assert card.data.license is None and card.data.model_name == metadata["model_name"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr(export_onnx, "_operators", fail)
    checkpoint.save(tmp_path / "model.pth", contents_of(random_model(one_layer_config("hubert"))))
    source = ("--model", tmp_path / "model.pth", "--out", tmp_path / "out", "--formats", "onnx")
    assert run_to_exit(monkeypatch, "export", *source) == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch, capsys) -> None:
    checkpoint.save(tmp_path / "model.pth", contents_of(random_model(small_config("hubert"))))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("huggingface", "onnx"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        flags = ("--model", tmp_path / "model.pth", "--out", tmp_path / "out", "--formats", name)
        assert run_to_exit(monkeypatch, "export", *flags) == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        line = error_line(capsys)
        assert line.startswith(f"{tmp_path / 'out' / name}: could not be written (") and line.endswith("; make room")
        assert not list((tmp_path / "out").iterdir())


def test_a_file_system_that_keeps_no_permissions(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    export_huggingface(contents_of(random_model(small_config("hubert"))), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_operators_that_are_not_standard(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], [])), tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"has 1 operators \(com.microsoft.Gelu\) beyond the standard ones"):
        export_onnx._operators(tmp_path / "model.onnx")


STREAMING = {"encoder_chunk_frames": 4, "encoder_left_frames": 6}


def check_step_file(session: Any, exported: Exported, output: str, width: int) -> None:
    """Names and shapes, in the file and in its metadata."""
    (step, sample_rate) = map(session.get_modelmeta().custom_metadata_map.get, ("step", "sample_rate"))
    described, extractor = json.loads(step), exported.model.feature_extractor
    assert sample_rate == "16000" and described["chunk_frames"] == 4
    assert described["chunk_samples"] == extractor.num_samples(4) and described["hop_samples"] == 4 * extractor.stride
    state = {name: tuple(shape) for name, shape in described["state"].items()}
    inputs = {value.name: tuple(value.shape) for value in session.get_inputs()}
    assert inputs == {"samples": (1, extractor.num_samples(4)), "length": (1,), **state}
    outputs = {value.name: tuple(value.shape) for value in session.get_outputs()}
    assert outputs == {output: (1, 4, width), "frames": (1,)} | {f"next_{name}": x for name, x in state.items()}


def run_steps(file: Path, waveform: np.ndarray, output: str) -> np.ndarray:
    """The frames of a stream of one waveform, by what the metadata say alone."""
    session = onnxruntime.InferenceSession(file)
    described = json.loads(session.get_modelmeta().custom_metadata_map["step"])
    size, hop = described["chunk_samples"], described["hop_samples"]
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
    kinds = {value.name: types[value.type] for value in session.get_inputs()}
    state = {name: np.zeros(shape, kinds[name]) for name, shape in described["state"].items()}
    found = []
    for start in range(0, len(waveform), hop):
        chunk = waveform[start : start + size]
        feeds = {"samples": np.pad(chunk, (0, size - len(chunk)))[None], "length": np.array([len(chunk)]), **state}
        outputs = session.run(None, feeds)
        named = dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))
        state = {name: named[f"next_{name}"] for name in state}
        found.append(named[output][0, : named["frames"][0]])
    return np.concatenate(found)


@slow
def test_streaming(tmp_path: Path, speech: Path) -> None:
    """One step, with a GroupNorm and a pruned layer: frames of the whole pass, beyond the second of the prior too."""
    model = random_model(small_config("wavlm", "base", **PRUNED["wavlm"], **STREAMING))
    model.feature_extractor.heard.prior_products.mul_(0.3)
    exported = Exported(tmp_path, contents_of(model), "--int8", "--tsv", speech)
    waveforms, lengths = random_waveforms(20_003)
    with torch.inference_mode():
        wanted = model(waveforms, lengths)[0][0].numpy()
    for name, least in (("model.onnx", 0.99999), ("model.int8.onnx", 0.95)):
        check_step_file(onnxruntime.InferenceSession(exported.folder / name), exported, "last_hidden_state", 12)
        found = run_steps(exported.folder / name, waveforms[0].numpy(), "last_hidden_state")
        assert found.shape == wanted.shape
        cosines = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert cosines.min() > least if name == "model.onnx" else cosines.mean() > least
        if name == "model.onnx":
            np.testing.assert_allclose(found, wanted, atol=1e-4)
    quantized = onnx.load(exported.folder / "model.int8.onnx").graph
    assert {"MatMulInteger", "DequantizeLinear"} <= {node.op_type for node in quantized.node}
    assert re.search(r"- model.onnx: .* noise, step by step\n", exported.card)
    assert re.search(r"- model.int8.onnx: .* 3 utterances, step by step\n", exported.card)
    assert "takes the 50 samples" in exported.card and "`waveforms`" not in exported.card


@slow
def test_streaming_logits(tmp_path: Path) -> None:
    """A model that normalises waveforms, keeps nothing of the past and gives logits; by the lines of the card alone."""
    config = small_config("hubert", "large", **PRUNED["hubert"], **STREAMING | {"encoder_left_frames": 0})
    exported = Exported(tmp_path, contents_with_head(TASK_HEADS[0], config), "--opset", 18)
    check_step_file(onnxruntime.InferenceSession(exported.folder / "model.onnx"), exported, "logits", 4)
    waveforms, _ = random_waveforms(777)
    np.save(exported.folder / "input.npy", waveforms[0].numpy())
    lines = exported.card.split("```python\n")[1].split("```")[0]
    code = f"""
import os
os.chdir({str(exported.folder)!r})
{lines}
waveform, found = np.load("input.npy"), []
for start in range(0, len(waveform), 40):
    frames, state = push(waveform[start : start + 50], state)
    found.append(frames)
found = np.concatenate(found)
print(len(found), float(abs(found).astype(float).sum()))
"""
    count, total = run_without((*TRAINING_PACKAGES, "wav2vec2", "hardconcrete", "torch"), code).split()
    wanted = exported.model(waveforms)[0].detach().double()
    assert int(count) == wanted.size(1) and float(total) == pytest.approx(float(wanted.abs().sum()), rel=1e-5)


def test_a_step_that_forgets_is_refused() -> None:
    """The state goes from step to step in what is compared."""
    model = random_model(one_layer_config("hubert") | STREAMING)
    function = steps.StepFunction(model)

    def difference(keeps: float) -> float:
        def run(samples: Tensor, length: Tensor, num_frames: Tensor, *tensors: Tensor) -> Any:
            *heard, taps, keys, values = tensors
            state = streaming.State(num_frames, streaming.Heard(*heard), taps * keeps, [[keys, values]])
            return function(samples, length, state)

        batches = comparison.noise(model, [(11, 0, 4, 3)])
        return comparison.compare(model, steps.by_steps(run, model), batches).largest

    assert difference(keeps=1.0) < 1e-5 and difference(keeps=0.0) > comparison.LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("head", "flags", "message"),
    [
        (None, ("--formats", "onnx", "--outputs", "all"), "found outputs 'all', expected 'last'"),
        (TASK_HEADS[2], ("--formats", "onnx"), "head labels whole clips, expected frames; give --drop_head"),
        (None, ("--model_type", "hubert"), "--model_type hubert: .*does not stream; leave out"),
    ],
)
def test_refused_of_streaming(head, flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    config = one_layer_config("hubert") | STREAMING
    contents = contents_with_head(head, config) if head else contents_of(random_model(config))
    checkpoint.save(tmp_path / "model.pth", contents)
    source = ("--model", tmp_path / "model.pth", "--out", tmp_path / "out", *flags)
    assert run_to_exit(monkeypatch, "export", *source) == 1
    assert re.search(message, error_line(capsys)) and not list((tmp_path / "out").iterdir())
