"""export.py: ONNX and .pt2 files against PyTorch on other batches and lengths, without this project, and the cards."""

import json
import re
import sys
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    REPOSITORY,
    TRAINING_PACKAGES,
    error_line,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    run_without,
    small_config,
)
from huggingface_hub import ModelCard
from torch import Tensor

from wav2vec2 import checkpoint
from wav2vec2.errors import UserError
from wav2vec2.flops import count_flops
from wav2vec2.hub import read_folder
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils import export_traced
from wav2vec2.utils.model_card import Card

pytestmark = pytest.mark.slow

# 10 samples a frame, and one layer less than the others: what takes time is to trace it.
CONV_LAYERS = [[7, 10, 5], [9, 3, 2]]
MIN_SAMPLES, MIN_SAMPLES_PT2 = 20, 30  # of one frame, and of two
SIZE = {"encoder_num_layers": 2, "extractor_conv_layer_config": CONV_LAYERS}
PRUNED = {
    "hubert": {
        **SIZE,
        "encoder_embed_dim": 12,
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


def save_model(model: Wav2Vec2Model, path: Path, **entries: Any) -> Path:
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": model.config, **entries})
    return path


class Exported:
    """A model and what export.py made of it."""

    def __init__(self, folder: Path, family: str, size: str, *flags: object) -> None:
        self.model = random_model(small_config(family, size, **PRUNED[family]))
        self.folder = folder
        self.outputs = "all" if "all" in flags else "last"
        made_by = {"script": "save_final_ckpt.py", "config_path": "0123456789abcdef", "target_sparsity": None}
        source = save_model(self.model, folder / "model.pth", made_by=made_by)
        with pytest.MonkeyPatch.context() as monkeypatch:
            run_script(monkeypatch, "export", "--model", source, "--out", folder, *flags)

    @cached_property
    def program(self) -> export_traced.Program:
        return torch.export.load(self.folder / "torch_export" / "model.pt2")

    @torch.inference_mode()
    def wanted(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the exported function must give."""
        if self.outputs == "last":
            return self.model(waveforms, lengths)
        states, frames = self.model.extract_features(waveforms, lengths)
        return torch.stack(states), frames

    def run_onnx(self, file: str, waveforms: Tensor, lengths: Tensor) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(self.folder / "onnx" / file)
        return session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """WavLM with pruned heads and blocks: all hidden states, with int8, and everything that a card can say."""
    folder = tmp_path_factory.mktemp("wavlm")
    teacher = save_model(random_model(small_config("wavlm", "base")), folder / "teacher.pth")
    flags = ("--formats", "onnx,torch_export", "--outputs", "all", "--int8", "--licence", "cc-by-4.0")
    names = ("--teacher", "microsoft/wavlm-base-plus", "--name", "Small | WavLM", "--data", "LibriSpeech: 960 h")
    return Exported(folder, "wavlm", "base", *flags, *names, "--teacher_ckpt", teacher)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """HuBERT or wav2vec 2.0 that normalises, with a layer_norm extractor, pre-norm: the last hidden state."""
    flags = ("--formats", "hub,onnx,torch_export", "--opset", 18)
    return Exported(tmp_path_factory.mktemp("hubert"), "hubert", "large", *flags)


def assert_same(found: Any, wanted: tuple[Tensor, Tensor]) -> None:
    """Equal up to the valid frames."""
    (states, frames), (wanted_states, wanted_frames) = map(torch.as_tensor, found), wanted
    assert torch.equal(frames, wanted_frames)
    assert states.shape == wanted_states.shape
    for row, valid in enumerate(frames):
        torch.testing.assert_close(
            states[..., row, :valid, :], wanted_states[..., row, :valid, :], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["wavlm", "hubert"])
def test_traced(name: str, request: pytest.FixtureRequest) -> None:
    """Batches and lengths that it was not traced with; WavLM's buckets are those of the length."""
    exported: Exported = request.getfixturevalue(name)
    program = exported.program.module()
    for num_samples in BATCHES:
        waveforms, lengths = random_waveforms(*num_samples)
        wanted = exported.wanted(waveforms, lengths)
        assert_same(exported.run_onnx("model.onnx", waveforms, lengths), wanted)
        if max(num_samples) >= MIN_SAMPLES_PT2:
            with torch.inference_mode():
                assert_same(program(waveforms, lengths), wanted)


def test_onnx_files(wavlm: Exported, hubert: Exported) -> None:
    """Names, free axes, opset and what a program needs to know."""
    for exported, output, opset in ((wavlm, "hidden_states", 20), (hubert, "last_hidden_state", 18)):
        model = onnx.load(exported.folder / "onnx" / "model.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
        axes = {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)
        }
        states = ["batch", "frames", 12]
        assert axes == {
            "waveforms": ["batch", "samples"],
            "lengths": ["batch"],
            output: [3, *states] if output == "hidden_states" else states,
            "frames": ["batch"],
        }
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert properties["sample_rate"] == "16000" and properties["min_samples"] == str(MIN_SAMPLES)
        assert json.loads(properties["config"]) == exported.model.config
        weights = {tuple(weight.dims) for weight in model.graph.initializer}
        assert (1, 1, 8) not in weights, "the weight norm of the positional convolution is still in the graph"


def test_files_do_not_tell_where_they_were_made(wavlm: Exported) -> None:
    """The tracers note source lines; a published file has no business with the paths of a machine."""
    with zipfile.ZipFile(wavlm.folder / "torch_export" / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents += [(wavlm.folder / "onnx" / name).read_bytes() for name in ("model.onnx", "model.int8.onnx")]
    for part in contents:
        assert str(REPOSITORY).encode() not in part
        assert b"site-packages" not in part


def test_int8(wavlm: Exported) -> None:
    """Smaller matrices, near the same numbers, and the card says how near."""
    model = onnx.load(wavlm.folder / "onnx" / "model.int8.onnx")
    kinds = [node.op_type for node in model.graph.node]
    # Of each layer four attention projections and the gate, two of the feed-forward, and the feature projection.
    assert kinds.count("MatMulInteger") == 2 * 5 + 2 + 1
    waveforms, lengths = random_waveforms(1500, 1100)
    plain, frames = wavlm.run_onnx("model.onnx", waveforms, lengths)
    quantized, quantized_frames = wavlm.run_onnx("model.int8.onnx", waveforms, lengths)
    assert (frames == quantized_frames).all()
    valid = np.arange(plain.shape[2]) < frames[:, None]
    difference = np.abs(plain - quantized)[:, valid]
    assert 0 < difference.max() < 0.2
    assert "model.int8.onnx" in (wavlm.folder / "onnx" / "README.md").read_text()


def test_cards(wavlm: Exported, hubert: Exported) -> None:
    """Metadata that huggingface_hub reads, numbers that are the model's, differences that were measured."""
    card = ModelCard.load(wavlm.folder / "onnx" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.base_model == "microsoft/wavlm-base-plus"
    assert card.data.library_name == "onnx"
    assert card.data.tags == ["speech", "audio", "self-supervised", "dphubert", "wavlm"]
    num_params = sum(parameter.numel() for parameter in wavlm.model.parameters())
    num_teacher = sum(p.numel() for p in checkpoint.load_model(wavlm.folder / "teacher.pth").parameters())
    for text in (
        "# Small | WavLM",
        f"| parameters | {num_params:,} |",
        f"| sparsity | {1 - num_params / num_teacher:.2%} (the teacher has {num_teacher:,} parameters) |",
        "- training data: LibriSpeech: 960 h",
        "- made by, script: `save_final_ckpt.py`",
        "| frames | 1600 a second, of 12 dimensions |",
        "| 1 | 2 | 0 |",
        "Conv channels: 7, 9.",
        f"any number of samples from {MIN_SAMPLES}:",
        "hidden states differ from PyTorch's by at most",
        "(at most 1e-04 is accepted)",
        f"- model.onnx: {(wavlm.folder / 'onnx' / 'model.onnx').stat().st_size:,} bytes",
    ):
        assert text in card.text, text
    assert "target_sparsity" not in card.text  # it was None
    card = ModelCard.load(hubert.folder / "hub" / "README.md")
    assert card.data.license is None and "whoever publishes this model adds `license:`" in card.text
    assert hubert.folder.name in card.text and "normalised inside of the model" in card.text
    operations = sum(count_flops(hubert.model.config, 118_720)) / 2 / 7.42  # as evaluate.py counts
    line = f"| multiply-accumulates | {operations / 1e9:.3g} G for each second of audio, in waveforms of 7.42 s |"
    assert line in card.text


@pytest.mark.parametrize(
    ("name", "folder", "blocked"),
    [("wavlm", "onnx", ("torch",)), ("hubert", "onnx", ("torch",)), ("hubert", "torch_export", ())],
)
def test_load_without_this_project(
    name: str, folder: str, blocked: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """.pt2 needs torch, ONNX needs ONNX Runtime: the lines of the cards run without this project and what trains."""
    exported: Exported = request.getfixturevalue(name)
    waveforms, lengths = random_waveforms(1300, 700)
    np.savez(exported.folder / "input.npz", waveforms=waveforms.numpy(), lengths=lengths.numpy())
    convert = (
        "" if folder == "onnx" else "import torch\nwaveforms, lengths = map(torch.from_numpy, (waveforms, lengths))"
    )
    lines = (exported.folder / folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    output = "hidden_states" if exported.outputs == "all" else "last_hidden_state"
    code = f"""
import os
import numpy as np
inputs = np.load({str(exported.folder / "input.npz")!r})
waveforms, lengths = inputs["waveforms"], inputs["lengths"]
os.chdir({str(exported.folder / folder)!r})
{"" if folder == "onnx" else convert}
{lines}
print(float(abs({output}).sum()))
"""
    printed = run_without((*TRAINING_PACKAGES, "wav2vec2", "hardconcrete", *blocked), code)
    wanted = exported.wanted(waveforms, lengths)[0].double().abs().sum()
    assert float(printed) == pytest.approx(float(wanted), rel=1e-4)


def test_a_changed_program_is_refused(hubert: Exported, tmp_path: Path) -> None:
    """What differs from the model by too much is not kept."""
    model = hubert.model
    function = export_traced.Outputs(model, "last")

    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states, frames = function(waveforms, lengths)
        return states + 2e-3 * torch.eye(12)[3], frames

    difference = export_traced.compare(model, "last", run)
    assert 2e-4 < difference.largest <= 2.01e-3 and difference.lowest_cosine < 1
    with pytest.raises(UserError, match=r"differ from PyTorch's by .*, expected at most 1e-04; it was not written"):
        export_traced.check_difference(difference, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="differ from PyTorch's by nan"):
        export_traced.check_difference(export_traced.Difference(float("nan"), 1.0, 1.0), tmp_path / "model.onnx")

    with pytest.raises(UserError, match="it was not written"):
        export_traced.write_pt2(hubert.program, random_model(model.config, seed=1), "last", tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_frames_are_refused() -> None:
    model = random_model(small_config("hubert"))
    function = export_traced.Outputs(model, "last")
    with pytest.raises(UserError, match="valid frames, expected"):
        export_traced.compare(model, "last", lambda waveforms, lengths: (function(waveforms, lengths)[0], lengths))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--formats", "hub,ggml"), "--formats: expected some of hub, onnx, torch_export, huggingface, .*found 'ggml'"),
        (("--formats", "onnx", "--opset", "11"), "opset 11: expected at least 18"),
        (("--formats", "onnx", "--opset", "99"), "opset 99: expected at least 18, .* and at most"),
        (("--formats", "hub", "--int8"), "--int8: it is a second file of the onnx format"),
        (("--licence", "My Licence"), "--licence My Licence: expected one of the hub's identifiers"),
        (("--data", "x", "--data_licence", "©"), "--data_licence ©: expected one of the hub's identifiers"),
        (("--teacher_licence", "mit"), "--teacher_licence mit: the card does not say of what; add --teacher"),
        (("--evaluation", "none.json"), "No such file or directory: 'none.json'"),
        (("--teacher_ckpt", "nowhere.pth"), "nowhere.pth"),
    ],
)
def test_bad_options(flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    source = save_model(random_model(small_config("hubert")), tmp_path / "model.pth")
    assert run_to_exit(monkeypatch, "export", "--model", source, "--out", tmp_path / "out", *flags) == 1
    line = error_line(capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_missing_packages(tmp_path: Path, monkeypatch, capsys) -> None:
    source = save_model(random_model(small_config("hubert")), tmp_path / "model.pth")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            flags = ("--formats", "onnx", "--out", tmp_path / "out")
            assert run_to_exit(patch, "export", "--model", source, *flags) == 1
        assert f"needs {package} " in (line := error_line(capsys)) and "requirements-export.txt" in line


def test_masks_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    model = random_model(small_config("hubert", encoder_prune_attention_heads=True))
    source = save_model(model, tmp_path / "model.pth")
    assert run_to_exit(monkeypatch, "export", "--model", source, "--out", tmp_path / "out") == 1
    assert "has masks on head; prune.py makes" in error_line(capsys)


def test_half_precision_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hub and huggingface keep the precision of the file."""
    model = random_model(small_config("hubert")).half()
    model.feature_extractor.dummy_weight.data.fill_(1)
    source = save_model(model, tmp_path / "model.pth")
    run_script(monkeypatch, "export", "--model", source, "--out", tmp_path, "--formats", "hub,huggingface")
    contents = read_folder(tmp_path / "hub")
    weights = contents["state_dict"]
    assert contents["config"] == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_metadata_hold_no_free_text() -> None:
    """A teacher's name that is no id on the hub is text of the card, and cannot end its metadata."""
    card = ModelCard(Card(small_config("hubert"), teacher='a"b\nlicense: mit').text("hub"))
    assert card.data.license is None and card.data.base_model is None


def test_onnx_leaves_nothing_behind(hubert: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr(export_traced, "_convert_to_onnx", fail)
    with pytest.raises(UserError):
        export_traced.write_onnx(hubert.program, hubert.model, "last", tmp_path / "onnx", 20, False)
    assert not list((tmp_path / "onnx").iterdir())
