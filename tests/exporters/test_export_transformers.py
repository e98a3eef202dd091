"""export.py --formats huggingface of models that transformers does not know: with code of their own."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    TASK_HEADS,
    error_line,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    run_without,
    small_config,
    task_contents,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import wav2vec2
from exporters.huggingface import OWN_TYPE, export_huggingface
from exporters.modeling_dphubert import (
    DPHuBERTConfig,
    DPHuBERTForAudioClassification,
    DPHuBERTForAudioFrameClassification,
    DPHuBERTForCTC,
    DPHuBERTModel,
)
from exporters.pipeline_dphubert import WordsPipeline
from wav2vec2.files import checkpoint
from wav2vec2.files.heads import contents_of, task_model_of
from wav2vec2.model import Wav2Vec2Model, normalize_waveforms

# By all units, in each family.
PRUNED = {
    "hubert": {
        "extractor_conv_layer_config": [[7, 10, 5], [5, 3, 2], [8, 3, 2], [9, 2, 2]],
        "encoder_embed_dim": 12,
        "encoder_pos_conv_kernel": 5,
        "encoder_num_heads": [0, 3, 4],
        "encoder_use_attention": [False, True, True],
        "encoder_use_feed_forward": [True, False, True],
        "encoder_ff_interm_features": [5, 0, 9],
        "encoder_feature_projection_layer_norm": False,
    },
    "wavlm": {
        "encoder_embed_dim": 12,
        "encoder_head_dim": 4,
        "encoder_remaining_heads": [[1, 3], [0, 1, 2, 3], []],
        "encoder_use_attention": [True, True, False],
        "encoder_use_feed_forward": [False, True, True],
        "encoder_ff_interm_features": [0, 11, 3],
    },
}
# By the norm of the extractor. Their shape is one that transformers knows.
STREAMING = {"streaming_group": "base", "streaming_layer": "large"}
HEADS = {"characters": TASK_HEADS[0], "words": TASK_HEADS[1], "clips": TASK_HEADS[5], "segments": TASK_HEADS[-1]}
# Other lengths than anything was traced with; alone and padded.
BATCHES = {"one": (1700,), "padded": (2100, 900, 333), "short": (777, 30)}
CLASSES = {
    "hubert": DPHuBERTModel,
    "wavlm": DPHuBERTModel,
    **dict.fromkeys(STREAMING, DPHuBERTModel),
    "characters": DPHuBERTForCTC,
    "clips": DPHuBERTForAudioClassification,
    "segments": DPHuBERTForAudioFrameClassification,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Wav2Vec2Model]]:
    """A folder of folders, and the models that they were made of; "words" is one that transformers knows."""
    folder, models = tmp_path_factory.mktemp("exported"), {}
    for family, size in (("hubert", "base"), ("wavlm", "large")):
        models[family] = random_model(small_config(family, size, **PRUNED[family]))
        assert export_huggingface(contents_of(models[family]), folder / family) == OWN_TYPE
    for name, size in STREAMING.items():
        config = small_config("hubert", size, encoder_chunk_frames=4, encoder_left_frames=6)
        models[name] = random_model(config)
        models[name].feature_extractor.dummy_weight.fill_(1)
        models[name].feature_extractor.heard.prior_products.mul_(0.3)
        assert export_huggingface(contents_of(models[name]), folder / name) == OWN_TYPE
    for name, head in HEADS.items():
        contents = task_contents(head, "hubert" if name == "words" else "wavlm", "large")
        if name == "words":
            contents["state_dict"]["feature_extractor.dummy_weight"].fill_(1)
        if head.kind == "text":  # else one unit is the best of all frames
            logits, _ = task_model_of(contents, name).eval()(random_waveforms(*BATCHES["one"])[0])
            contents["state_dict"]["aux.bias"] -= logits.detach().mean((0, 1))
        assert export_huggingface(contents, folder / name) == ("hubert" if name == "words" else OWN_TYPE)
        models[name] = task_model_of(contents, name).eval()
    return folder, models


def mask_of(waveforms: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(waveforms.size(1)) < lengths[:, None]).long()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4 * max(1.0, float(wanted.abs().max())), rtol=0)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@torch.inference_mode()
def test_the_model_of_the_folder(exported, name: str, batch: tuple[int, ...]) -> None:
    """Outputs and hidden states, of padding what ``lengths`` make of it."""
    folder, models = exported
    loaded = CLASSES[name].from_pretrained(folder / name)
    waveforms, lengths = random_waveforms(*batch)
    for weight, own in zip(loaded.network.parameters(), models[name].parameters(), strict=True):
        assert weight.requires_grad == own.requires_grad
    result = loaded(waveforms, mask_of(waveforms, lengths), output_hidden_states=True)
    wanted, frames = models[name](waveforms, lengths)
    assert_close(result[0], wanted)
    states, _ = models[name].extract_features(waveforms, lengths)
    assert len(result.hidden_states) == len(states) == loaded.config.num_hidden_layers + 1
    for found, state in zip(result.hidden_states, states, strict=True):
        assert_close(found, state)
    assert torch.equal(loaded._get_feat_extract_output_lengths(lengths), frames)
    assert_close(loaded(waveforms, return_dict=False)[0], models[name](waveforms)[0])


def test_settings_that_tools_ask_for(exported) -> None:
    config = DPHuBERTConfig.from_pretrained(exported[0] / "wavlm", layerdrop=0.25, hidden_dropout=0.5)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (12, 3, None)
    assert (config.conv_dim, config.conv_kernel) == ([10, 12, 8, 9], [10, 3, 3, 2])
    assert (config.conv_stride, config.inputs_to_logits_ratio) == ([5, 2, 2, 2], 40)
    model = DPHuBERTModel(config)
    assert model.network.config == exported[1]["wavlm"].config | {
        "encoder_layer_drop": 0.25,
        "encoder_dropout": 0.5,
    }
    clips = json.loads((exported[0] / "clips" / "config.json").read_text())
    assert clips["id2label"] == {"0": "yes", "1": "no", "2": "up"} and clips["use_weighted_layer_sum"]


@pytest.mark.parametrize("name", STREAMING)
def test_precision_of_streaming(exported, name: str) -> None:
    """The sums of a stream are in float64, which does not make the model so; its waveform is normalised by chunks."""
    model = transformers.AutoModel.from_pretrained(exported[0] / name, trust_remote_code=True)
    assert model.dtype == torch.float32
    assert not transformers.AutoFeatureExtractor.from_pretrained(exported[0] / name).do_normalize
    models = wav2vec2.load(exported[0] / name), exported[1][name]
    torch.testing.assert_close(*(each.feature_extractor.heard.prior_products.float() for each in models))


@pytest.mark.parametrize("name", ["hubert", "wavlm"])
def test_feature_extractor(exported, name: str) -> None:
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exported[0] / name)
    assert extractor.do_normalize == (name == "wavlm") and extractor.return_attention_mask
    waveforms, lengths = random_waveforms(3000, 2000)
    rows = [waveform[:n].numpy() for waveform, n in zip(waveforms, lengths, strict=True)]
    prepared = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = DPHuBERTModel.from_pretrained(exported[0] / name)(**prepared).last_hidden_state
        # transformers normalises with a smaller epsilon.
        torch.testing.assert_close(found, exported[1][name](waveforms, lengths)[0], atol=2e-3, rtol=0)


def test_loading_is_strict(exported, tmp_path: Path) -> None:
    """Weights of the network that are missing, left over or of another shape are refused; a head may be fresh."""
    source = exported[0] / "wavlm"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    name = "network.encoder.transformer.layers.1.attention.gru_rel_pos_const"
    for changed, message in (
        ({key: x for key, x in weights.items() if key != name}, f"1 missing keys .{name}"),
        ({**weights, "network.extra": torch.ones(1)}, "1 unexpected keys .network.extra"),
        ({**weights, name: torch.ones(1, 3, 1, 1)}, "."),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=message):
            DPHuBERTModel.from_pretrained(tmp_path)
    model = DPHuBERTForAudioClassification.from_pretrained(source, num_labels=5, use_weighted_layer_sum=True)
    head = model.network.head
    assert head.linear.weight.shape == (5, 12) and 0 < head.linear.weight.std() < 0.03
    assert not head.linear.bias.any() and not head.layer_scores.any()
    assert torch.equal(
        model.network.encoder.transformer.layer_norm.weight, weights["network.encoder.transformer.layer_norm.weight"]
    )
    with pytest.raises(ValueError, match="vocab_size: expected the number of outputs of CTC, found none"):
        DPHuBERTForCTC.from_pretrained(source)
    assert DPHuBERTForCTC.from_pretrained(source, vocab_size=7).network.aux.weight.shape == (7, 12)
    assert DPHuBERTModel.from_pretrained(exported[0] / "clips").network.aux is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision(exported, dtype: torch.dtype) -> None:
    """Loaded in it, and with sums over samples that it has no room for."""
    model = DPHuBERTModel.from_pretrained(exported[0] / "wavlm", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    waveforms, lengths = random_waveforms(70_000, 50_000)
    normalized = normalize_waveforms(waveforms.to(dtype), lengths)
    torch.testing.assert_close(normalized.float(), normalize_waveforms(waveforms, lengths), atol=0.05, rtol=0.05)
    found = model(waveforms[:, :9000], mask_of(waveforms[:, :9000], lengths)).last_hidden_state
    wanted = exported[1]["wavlm"](waveforms[:, :9000], torch.tensor([9000, 9000]))[0]
    assert found.dtype == dtype and float((found.float() - wanted).norm() / wanted.norm()) < 0.05


def test_gradient_checkpointing(exported) -> None:
    """The same gradients; the recomputation is what our training has."""
    waveforms, lengths = random_waveforms(900, 700)
    gradients = []
    for enabled in (False, True):
        model = DPHuBERTForCTC.from_pretrained(exported[0] / "characters").train()
        if enabled:
            model.activation_checkpointing_enable()
        labels = torch.tensor([[1, 2, 3], [2, -100, -100]])
        model(waveforms, mask_of(waveforms, lengths), labels=labels).loss.backward()
        assert model.network.feature_extractor.recompute is model.network.encoder.transformer.recompute is enabled
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert all(torch.equal(x, gradients[1][name]) for name, x in gradients[0].items() if x is not None)


def test_losses_are_transformers(tmp_path: Path) -> None:
    """CTC's loss and gradient are those of transformers' own class, padding included."""
    contents = task_contents(HEADS["characters"])
    contents["state_dict"]["feature_extractor.dummy_weight"].fill_(1)
    export_huggingface(contents, tmp_path)
    theirs = transformers.HubertForCTC.from_pretrained(tmp_path, ctc_loss_reduction="mean").eval()
    ours = DPHuBERTForCTC(DPHuBERTConfig(**contents["config"])).eval()
    ours.load_state_dict({f"network.{name}": tensor for name, tensor in contents["state_dict"].items()})
    waveforms, lengths = random_waveforms(2100, 1500)
    labels = torch.tensor([[1, 2, 2, 3], [3, 1, -100, -100]])
    results = [model(waveforms, mask_of(waveforms, lengths), labels=labels) for model in (ours, theirs)]
    torch.testing.assert_close(results[0].loss, results[1].loss, atol=1e-5, rtol=1e-5)
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(ours.network.aux.weight.grad, theirs.lm_head.weight.grad, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="labels: expected less than vocab_size 4, found 4"):
        ours(waveforms, labels=labels + 1)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        ours(waveforms, output_attentions=True)


def test_losses_of_classes(exported) -> None:
    waveforms, lengths = random_waveforms(900, 700)
    for name, labels in (("clips", torch.tensor([2, 0])), ("segments", torch.zeros(2, 22, dtype=torch.long))):
        model = CLASSES[name].from_pretrained(exported[0] / name)
        model.freeze_base_model()
        assert {n.split(".")[1] for n, x in model.named_parameters() if x.requires_grad} == {"head"}
        if name == "segments":
            labels[0, 3:] = -100
        result = model(waveforms, mask_of(waveforms, lengths), labels=labels)
        chosen = labels.flatten() >= 0
        wanted = result.logits.flatten(0, -2).log_softmax(-1)[chosen, labels.flatten()[chosen]]
        torch.testing.assert_close(result.loss, -wanted.mean())


@pytest.mark.parametrize("name", ["characters", "words"])
def test_timestamps(exported, name: str) -> None:
    """The times of units are those of the frames in which they are the best; long audio is cut and joined again."""
    folder, models = exported
    asr = transformers.AutomaticSpeechRecognitionPipeline if name == "characters" else WordsPipeline
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder / name)
    feature_extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder / name)
    network = (DPHuBERTForCTC if name == "characters" else transformers.HubertForCTC).from_pretrained(folder / name)
    pipe = asr(network, tokenizer=tokenizer, feature_extractor=feature_extractor)
    waveform = random_waveforms(8000)[0][0]
    with torch.no_grad():
        best = models[name](waveform[None])[0][0].argmax(-1).tolist()
    hop = models[name].feature_extractor.stride / 16_000
    wanted, end = [], 0
    for unit, frames in itertools.groupby(best):
        start, end = end, end + len(list(frames))
        if unit:
            wanted.append((models[name].labels[unit - 1], start * hop, end * hop))
    for options in ({}, {"chunk_length_s": 0.4, "stride_length_s": 0.1}):
        units = pipe(waveform.numpy(), return_timestamps="char", **options)
        words = pipe(waveform.numpy(), return_timestamps="word", **options)
        assert words["text"] == units["text"] and [word["text"] for word in words["chunks"]] == words["text"].split()
        if not options:
            assert [(unit["text"], *unit["timestamp"]) for unit in units["chunks"]] == [
                (label, pytest.approx(start), pytest.approx(end)) for label, start, end in wanted
            ]
        if name == "words":
            assert words == units
        assert all(x["timestamp"][1] <= y["timestamp"][0] for x, y in itertools.pairwise(words["chunks"]))
        assert len(words["chunks"]) > 1 and words["chunks"][-1]["timestamp"][1] <= 0.5


OUTSIDE = """
import os, sys
sys.path = [entry for entry in sys.path if entry not in ("", {repository!r})]
os.chdir({folder!r})
os.environ |= {{"HF_HOME": "cache", "HF_HUB_OFFLINE": "1"}}
import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoModelForCTC, pipeline

code = {{"trust_remote_code": True}}
results = {{}}
batches = torch.load("batches.pt")
classes = {{"characters": AutoModelForCTC, "clips": AutoModelForAudioClassification}}
classes["segments"] = transformers.AutoModelForAudioFrameClassification
for name in ("hubert", "wavlm", "streaming_group", "streaming_layer", *classes):
    model = classes.get(name, AutoModel).from_pretrained(name, **code)
    with torch.inference_mode():
        results[name] = {{key: model(*batch)[0] for key, batch in batches.items()}}
model.save_pretrained("saved")
again = transformers.AutoModelForAudioFrameClassification.from_pretrained("saved", **code)
results["saved"] = {{key: again(*batch)[0].detach() for key, batch in batches.items()}}

waveform = batches["one"][0][0].numpy()
for name, task in (
    ("hubert", "feature-extraction"),
    ("words", "feature-extraction"),
    ("saved", "feature-extraction"),
    ("clips", "audio-classification"),
    ("characters", "automatic-speech-recognition"),
    ("words", "automatic-speech-recognition"),
):
    given = {{"feature_extractor": AutoFeatureExtractor.from_pretrained("wavlm")}} if name == "saved" else {{}}
    recognise = pipeline(task, model=name, device="cpu", **given, **code)
    results[name, task] = recognise(waveform.copy())
    recognise.model.save_pretrained("saved")
results["processor"] = type(transformers.AutoProcessor.from_pretrained("characters", **code)).__name__


class Tones(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        samples = np.arange(1200 + 40 * index)
        noise = np.random.default_rng(index).standard_normal(len(samples))
        return {{"input_values": np.sin(samples * (0.1 + 0.3 * (index % 3))) + 0.1 * noise, "labels": index % 3}}


extractor = AutoFeatureExtractor.from_pretrained("wavlm")


def collate(items):
    rows = [item["input_values"].astype(np.float32) for item in items]
    batch = extractor(rows, sampling_rate=16000, padding=True, return_tensors="pt")
    return {{**batch, "labels": torch.tensor([item["labels"] for item in items])}}


torch.manual_seed(0)  # the new head
model = AutoModelForAudioClassification.from_pretrained("wavlm", num_labels=3, **code)
settings = transformers.TrainingArguments(
    "run", max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True,
    save_strategy="no", logging_steps=1, gradient_checkpointing=True, disable_tqdm=True,
)
trainer = transformers.Trainer(model, settings, train_dataset=Tones(), data_collator=collate)
trainer.train()
results["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
trainer.save_model("tuned")
tuned = AutoModelForAudioClassification.from_pretrained("tuned", **code)
batch = collate([Tones()[index] for index in range(8)])
results["tuned"] = [m.eval()(**batch).logits.detach() for m in (model, tuned)]
assert not [name for name in sys.modules if name.startswith(("wav2vec2", "hardconcrete")) and sys.modules[name]]
torch.save(results, "results.pt")
"""


@pytest.mark.slow
def test_without_this_project(exported) -> None:
    """transformers' Auto classes, pipelines and Trainer, offline, where nothing of this project can be imported."""
    folder, models = exported
    batches = {name: random_waveforms(*batch) for name, batch in BATCHES.items()}
    torch.save({name: (x, mask_of(x, lengths)) for name, (x, lengths) in batches.items()}, folder / "batches.pt")
    repository = str(Path(wav2vec2.__file__).parents[1])
    code = OUTSIDE.format(repository=repository, folder=str(folder))
    blocked = ("pytorch_lightning", "torchaudio", "soundfile", "tensorboard", "wav2vec2", "hardconcrete")
    run_without(blocked, code)
    results: dict[Any, Any] = torch.load(folder / "results.pt", weights_only=False)
    with torch.inference_mode():
        for name in (*CLASSES, "saved"):
            model = models["segments" if name == "saved" else name]
            for key, (waveforms, lengths) in batches.items():
                assert_close(results[name][key], model(waveforms, lengths)[0])
        waveform = batches["one"][0]
        features = torch.tensor(results["hubert", "feature-extraction"])
        assert_close(features, models["hubert"](waveform)[0])
    assert torch.tensor(results["words", "feature-extraction"]).shape == (1, 42, 16)
    assert torch.tensor(results["saved", "feature-extraction"]).shape == (1, 42, 16)
    label, probability = wav2vec2.predict(models["clips"], waveform[0])
    best = results["clips", "audio-classification"][0]
    assert best["label"] == label and best["score"] == pytest.approx(probability, abs=1e-2)
    for name in ("characters", "words"):
        text = results[name, "automatic-speech-recognition"]["text"]
        assert text == wav2vec2.predict(models[name], waveform[0]).strip() and text
    assert " " in results["words", "automatic-speech-recognition"]["text"]
    assert results["processor"] == "Wav2Vec2Processor"
    losses = results["losses"]
    assert len(losses) == 40 and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert torch.equal(*results["tuned"])
    # What transformers' save_pretrained wrote: of our code after training, of its own as it was.
    tuned, saved = wav2vec2.load(folder / "tuned"), wav2vec2.load(folder / "saved")
    assert tuned.kind == "clips" and tuned.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert saved.labels == models["words"].labels
    torch.testing.assert_close(saved(waveform)[0], models["words"](waveform)[0])


def test_script(tmp_path: Path, monkeypatch, capsys) -> None:
    """By export.py: the card says how to open it; what is there already stays as it is."""
    model = random_model(small_config("wavlm", "large", **PRUNED["wavlm"])).half()
    checkpoint.save(tmp_path / "model.pth", {"state_dict": model.state_dict(), "config": model.config})
    flags = ("--model", tmp_path / "model.pth", "--out", tmp_path, "--formats", "huggingface")
    run_script(monkeypatch, "export", *flags)
    folder = tmp_path / "huggingface"
    card = (folder / "README.md").read_text()
    assert 'AutoModel.from_pretrained(".", trust_remote_code=True)' in card and "lies in this folder" in card
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_to_exit(monkeypatch, "export", *flags) == 1
    assert "huggingface: exists, expected a new folder" in error_line(capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    found, weights = wav2vec2.load(folder, dtype=torch.float16), model.state_dict()
    assert found.config == model.config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())
