"""evaluate.py: cost, fidelity and probes are what they claim to be, and bad input gets one line."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import (
    REPOSITORY,
    as_words,
    error_line,
    hubert_base_flops,
    one_layer_config,
    random_model,
    run_script,
    run_to_exit,
    save_small_model,
    small_config,
)
from huggingface_hub import ModelCard

from dataset.speech import load_audio
from evaluation import cost, features, probes, scores
from evaluation.features import hidden_states
from evaluation.fidelity import HeldOutSpeech, LinearCKA, make_student, measure_fidelity
from evaluation.tables import architecture_tables, unit_counts
from labels import lists as labels
from labels.scores import EqualErrorRate, Share
from lightning import DistillLoss, make_projections
from wav2vec2 import flops
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import hubert_base, wav2vec2_model

LAYERS = [0, 1, 3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest ``valid.tsv`` of noise, 0.2 to 0.6 s, and ``pitch.tsv``, a probe with low and high tones."""
    root = tmp_path_factory.mktemp("evaluation")
    generator = np.random.default_rng(0)
    lengths = [3200, 9600, 4801, 7000]
    for number, length in enumerate(lengths):
        soundfile.write(root / f"{number}.wav", 0.1 * generator.standard_normal(length), 16_000)
    rows = [f"{number}.wav\t{length}" for number, length in enumerate(lengths)]
    (root / "valid.tsv").write_text("\n".join([str(root), *rows]))
    lines = ["split\tpath\tlabel"]
    for split, count in (("train", 10), ("test", 4)):
        for label, pitch in (("low", 150), ("high", 1500)):
            for number in range(count):
                time = np.arange(2000 + 100 * number) / 16_000
                tone = np.sin(2 * np.pi * pitch * generator.uniform(0.9, 1.1) * time)
                name = f"{split}-{label}-{number}.wav"
                soundfile.write(root / name, 0.2 * tone + 0.02 * generator.standard_normal(len(time)), 16_000)
                lines.append(f"{split}\t{name}\t{label}")
    (root / "pitch.tsv").write_text("\n".join(lines))
    return root


def save_student(path: Path, mode: str | None, seed: int = 1, **changes: Any) -> Path:
    """A random student with random projections; None for no projections."""
    model = random_model(small_config("hubert", **changes), seed)
    contents = {"state_dict": model.state_dict(), "config": model.config}
    if mode:
        torch.manual_seed(seed)
        projections = make_projections(mode, [[0], [1, 3]], model.config["encoder_embed_dim"], 16)
        for parameter in projections.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        contents["distill_linear_projs"] = projections.state_dict()
    checkpoint.save(path, contents)
    return path


def compare(teacher: Any, path: Path, corpus: Path, layers: list[int] = LAYERS, mode: str | None = None) -> Any:
    student = make_student("student", path, checkpoint.load_model(path).eval(), teacher, layers, mode)
    (found,) = measure_fidelity(teacher, [student], layers, HeldOutSpeech(corpus / "valid.tsv", 1.0, 200))
    return found


# --- architecture and cost -------------------------------------------------------------------------


def test_architecture():
    wavlm = small_config("wavlm", encoder_use_attention=[True, False, True])
    assert unit_counts(wavlm)["heads"] == [4, 0, 4]
    config = small_config("hubert", encoder_num_heads=[1, 2, 3], encoder_use_feed_forward=[True, True, False])
    counts = {"conv channels": [10, 12, 8, 9], "heads": [1, 2, 3], "FFN dimensions": [20, 20, 0]}
    assert unit_counts(config) == counts
    layers, extractor = architecture_tables(wavlm, config)
    assert layers.rows[1:] == [["2", "2/0", "20/20"], ["3", "3/4", "0/20"]]
    assert str(extractor).splitlines()[1:3] == ["conv layer  channels", "0              10/10"]
    narrow = {**config, "encoder_embed_dim": 12, "encoder_pos_conv_kernel": 4}
    *_, shared = architecture_tables(config, narrow)
    assert shared.rows == [["dimensions of a frame", "12/16"], ["taps of the positional convolution", "4/8"]]


def test_macs_of_hubert_base():
    with torch.device("meta"):
        config = hubert_base().config
    macs = cost.macs_per_second(config)
    num_samples = round(cost.UTTERANCE_SECONDS * 16_000)
    assert macs["total"] == pytest.approx(hubert_base_flops(num_samples) / 2 / cost.UTTERANCE_SECONDS, rel=2e-3)
    # By hand: 3200, 1600, 800, 400, 200, 100 and 50 outputs a second.
    conv = 512 * (3200 * 10 + 512 * (3 * (1600 + 800 + 400 + 200) + 2 * (100 + 50)))
    assert macs["conv"] == pytest.approx(conv, rel=5e-3)
    # What no mask prunes: the projection, and a positional convolution of 128 frames in 16 groups (and its padding).
    assert macs["projection"] == pytest.approx(50 * (512 * 768 + 768 * 768 // 16 * 128), rel=1e-2)
    assert macs["attention"] == pytest.approx(
        50 * 12 * (4 * 768 * 768 + 2 * 768 * 50 * cost.UTTERANCE_SECONDS), rel=1e-2
    )
    assert macs["feed_forward"] == pytest.approx(50 * 12 * 2 * 768 * 3072, rel=1e-2)
    assert sum(value for part, value in macs.items() if part != "total") == macs["total"]
    superb = cost.superb_style_macs(macs)
    assert superb["total"] == pytest.approx(1.669e12)
    assert superb["conv"] / superb["total"] == pytest.approx(macs["conv"] / macs["total"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the projections of no heads
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_fused_attention_counts_as_the_plain_one(family, monkeypatch):
    config = small_config(family)
    plain = flops.count_flops(config, 16_000)
    monkeypatch.setattr(flops, "plain_paths", contextlib.nullcontext)
    assert flops.count_flops(config, 16_000) == plain
    no_heads = {"encoder_num_heads": [4, 0, 4]} if family == "hubert" else {"encoder_remaining_heads": [[0], [], [1]]}
    fewer = flops.count_flops(small_config(family, **no_heads), 16_000)
    assert fewer.attention < plain.attention and fewer._replace(attention=plain.attention) == plain


def test_cost_of_a_file_and_speed(tmp_path):
    path = save_small_model(tmp_path / "model.pth", "hubert", "base")
    model = checkpoint.load_model(path).eval()
    found = cost.cost(model, path.stat().st_size)
    assert found["num_params"] == model.get_num_params() and found["num_bytes"] == path.stat().st_size
    (entries,) = cost.measure_speed([model.extract_features], [0.1, 0.2], [1, 2], 1, torch.device("cpu"))
    assert [(entry["seconds"], entry["batch"]) for entry in entries] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    assert all(entry["real_time_factor"] > 0 and entry["threads"] == 1 for entry in entries)


def test_turns():
    """Medians, and ratios to the first that a slow turn does not move."""
    clock = {"first": iter([2.0, 20.0, 4.0]), "second": iter([1.0, 10.0, 2.0])}
    order = []

    def work(name):
        order.append(name)
        return next(clock[name])

    found = cost.take_turns({name: lambda name=name: work(name) for name in clock}, 3)
    assert found == {"first": (4.0, 1.0), "second": (2.0, 2.0)}
    assert order == ["first", "second", "second", "first", "first", "second"]


def test_real_time_factor_is_work_per_second_of_audio(monkeypatch):
    model = random_model(small_config("hubert"))
    monkeypatch.setattr(cost, "take_turns", lambda work, repetitions: {name: (3.0, 1.0) for name in work})
    (entries,) = cost.measure_speed([model.extract_features], [0.5], [4], 1, torch.device("cpu"))
    assert entries[0]["real_time_factor"] == 1.5


# --- fidelity --------------------------------------------------------------------------------------


def gram_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA by its definition: with centred Gram matrices of all frames."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    grams = x @ x.T, y @ y.T
    products = [(grams[i] * grams[j]).sum() for i, j in ((0, 1), (0, 0), (1, 1))]
    return float(products[0] / (products[1] * products[2]).sqrt())


def streamed_cka(x: torch.Tensor, y: torch.Tensor, *parts: int) -> float | None:
    cka = LinearCKA((x.size(1), y.size(1)), x.device)
    for x_part, y_part in zip(x.split(list(parts)), y.split(list(parts)), strict=True):
        cka.update(x_part, y_part)
    return cka.compute()


def test_cka():
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    y = torch.randn(60, 9) + x @ torch.randn(6, 9) + 1000  # a mean far from zero
    assert streamed_cka(x, y, 50, 1, 9) == pytest.approx(gram_cka(x, y), rel=1e-9)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert streamed_cka(x, 3 * x @ rotation + 5, 30, 30) == pytest.approx(1, abs=1e-6)
    assert streamed_cka(torch.randn(5000, 6), torch.randn(5000, 9), 5000) < 0.01
    assert streamed_cka(x, torch.full((60, 2), 0.1), 60) is None


@pytest.mark.parametrize("mode", ["layer2layer", "predlayer"])
def test_fidelity_is_the_training_loss_and_cka(mode, corpus, tmp_path):
    """Through the file's projections, with the sources of the mode; the loss is the one that training has."""
    teacher = random_model(small_config("hubert"))
    path = save_student(tmp_path / "student.pth", mode, encoder_embed_dim=12, encoder_head_dim=3)
    contents = checkpoint.read_model_file(path)
    student = checkpoint.load_model(path).eval()
    projections = make_projections(mode, [[0], [1, 3]], 12, 16)
    projections.load_state_dict(contents["distill_linear_projs"])
    sources = LAYERS if mode == "layer2layer" else [3, 3, 3]
    loss = DistillLoss(l2_weight=0, l1_weight=1, cos_weight=1, cos_type="raw")
    parts, states = [], []
    with torch.inference_mode():
        for number in range(4):
            waveform = load_audio(corpus / f"{number}.wav")[None]
            (expected, _), (actual, _) = teacher.extract_features(waveform), student.extract_features(waveform)
            pairs = [(actual[source], expected[layer]) for source, layer in zip(sources, LAYERS, strict=True)]
            states.append([(x[0], y[0]) for x, y in pairs])
            parts.append([loss(projection(x), y)[1] for projection, (x, y) in zip(projections, pairs, strict=True)])

    found = compare(teacher, path, corpus)
    assert found["mode"] == mode and found["projections"] and found["note"] is None
    assert found["num_utterances"] == 4 and found["hours"] == pytest.approx(24_601 / 16_000 / 3600)
    assert [entry["source"] for entry in found["layers"]] == sources
    for number, entry in enumerate(found["layers"]):
        _, l1, negative_cosine = (np.mean([float(row[number][part]) for row in parts]) for part in range(3))
        x, y = (torch.cat([row[number][side] for row in states]) for side in range(2))
        assert entry["layer"] == LAYERS[number]
        assert entry["l1"] == pytest.approx(l1, rel=1e-5)
        assert entry["cosine"] == pytest.approx(-negative_cosine, rel=1e-5)
        assert entry["cka"] == pytest.approx(gram_cka(x, y), rel=1e-5)


def test_fidelity_of_a_copy_without_projections(corpus, tmp_path):
    path = save_student(tmp_path / "copy.pth", None)
    found = compare(checkpoint.load_model(path).eval(), path, corpus)
    for entry in found["layers"]:
        assert entry["l1"] == 0 and entry["cosine"] == pytest.approx(1, abs=1e-5) and entry["cka"] == pytest.approx(1)
    assert not found["projections"] and "raw hidden states" in found["note"]


def test_fidelity_without_projections_and_with_other_dimensions(corpus, tmp_path):
    path = save_student(tmp_path / "narrow.pth", None, encoder_embed_dim=12, encoder_head_dim=3)
    found = compare(random_model(small_config("hubert")), path, corpus)
    for entry in found["layers"]:
        assert entry["l1"] is None and entry["cosine"] is None and 0 < entry["cka"] < 1
    assert "no L1 and cosine" in found["note"]


@pytest.mark.parametrize(
    ("num_layers", "mode", "sources"), [(2, "predlayer", [2, 2, 2]), (3, "layer2layer", [0, 1, 3])]
)
def test_a_model_of_another_program_has_its_last_layer_where_it_has_none_at_that_depth(
    corpus, tmp_path, num_layers, mode, sources
):
    path = save_student(
        tmp_path / "shallow.pth",
        None,
        encoder_num_layers=num_layers,
        encoder_use_attention=True,
        encoder_use_feed_forward=True,
        encoder_num_heads=[2] * num_layers,
        encoder_ff_interm_features=20,
    )
    found = compare(random_model(small_config("hubert")), path, corpus)
    assert found["mode"] == mode and [entry["source"] for entry in found["layers"]] == sources


def test_max_seconds_leaves_long_utterances_out(corpus):
    assert len(HeldOutSpeech(corpus / "valid.tsv", 0.45, 200)) == 3
    with pytest.raises(UserError, match=r"valid\.tsv: none of 4 utterances lasts"):
        HeldOutSpeech(corpus / "valid.tsv", 0.1, 200)


def test_projections_that_do_not_fit(corpus, tmp_path):
    teacher = random_model(small_config("hubert"))
    path = save_student(tmp_path / "student.pth", "layer2layer")
    with pytest.raises(
        UserError, match=r"student\.pth: has 3 projections, expected one for each of the 2 distilled layers"
    ):
        compare(teacher, path, corpus, layers=[0, 3])
    with pytest.raises(
        UserError, match=r"student\.pth: its projections are those of distill_mode layer2layer, expected"
    ):
        compare(teacher, path, corpus, mode="predlayer")
    with pytest.raises(UserError, match=r"layer 4 is to be distilled"):
        compare(teacher, path, corpus, layers=[0, 1, 4])
    contents = checkpoint.read_model_file(path)
    for bad in ([1], {0: torch.zeros(2)}):
        checkpoint.save(tmp_path / "bad.pth", {**contents, "distill_linear_projs": bad})
        with pytest.raises(UserError, match=r"bad\.pth: distill_linear_projs is .*, expected a dict"):
            compare(teacher, tmp_path / "bad.pth", corpus)
    bad = {**contents["distill_linear_projs"], "0.weight": torch.eye(16).to_sparse()}
    checkpoint.save(tmp_path / "bad.pth", {**contents, "distill_linear_projs": bad})
    with pytest.raises(UserError, match=r"bad\.pth"):
        compare(teacher, tmp_path / "bad.pth", corpus)


def test_another_frame_rate(corpus, tmp_path):
    path = save_student(tmp_path / "s.pth", None, extractor_conv_layer_config=[[10, 10, 5], [12, 3, 2], [8, 3, 2]])
    with pytest.raises(UserError, match=r"s\.pth: the student's frames do not fit"):
        compare(random_model(small_config("hubert")), path, corpus)


def test_hidden_states_that_are_not_finite():
    model = random_model(small_config("hubert"))
    waveform = torch.randn(4000)
    assert len(hidden_states(model, waveform, None, "model.pth", "a.wav")) == 4
    with torch.no_grad():
        model.encoder.transformer.layers[0].feed_forward.output_dense.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"model\.pth: hidden state 1 holds NaN or infinite values for a\.wav"):
        hidden_states(model, waveform, None, "model.pth", "a.wav")


def test_the_shortest_input_makes_one_frame():
    model = random_model(small_config("hubert"))
    shortest = model.feature_extractor.receptive_field
    assert len(hidden_states(model, torch.randn(shortest), None, "m", "a")[0]) == 1
    with pytest.raises(UserError, match=rf"a\.wav: has {shortest - 1} samples .* at least {shortest}"):
        hidden_states(model, torch.randn(shortest - 1), None, "m", "a.wav")
    with torch.device("meta"):
        assert hubert_base().feature_extractor.receptive_field == 400


# --- probes ----------------------------------------------------------------------------------------


def synthetic_probe(num_train: int = 60, num_test: int = 60) -> tuple[labels.Probe, torch.Tensor, torch.Tensor]:
    """Three classes that only layer 2 of four can tell apart, and its features are the smallest."""
    generator = torch.Generator().manual_seed(0)
    clips, features = {}, {}
    for split, count in (("train", num_train), ("test", num_test)):
        classes = torch.arange(count) % 3
        values = 100 * torch.randn(count, 4, 8, generator=generator)
        values[:, 2] = 0.01 * (
            torch.nn.functional.one_hot(classes, 8) + 0.2 * torch.randn(count, 8, generator=generator)
        )
        clips[split] = tuple(labels.Clip(Path(f"{split}{n}"), label, n) for n, label in enumerate(classes.tolist()))
        features[split] = values
    probe = labels.Probe("three", Path("three.tsv"), "clips", ("a", "b", "c"), clips["train"], clips["test"])
    return probe, features["train"], features["test"]


def test_a_probe_finds_the_layer_that_knows():
    probe, train, test = synthetic_probe()
    found = probes.run_clips(train, test, probe, seed=0)
    assert found.score.value() > 95
    assert sum(found.layer_weights) == pytest.approx(1) and np.argmax(found.layer_weights) == 2
    assert found.layer_weights[2] > 0.5
    again = probes.run_clips(train, test, probe, seed=0)
    assert (found.score.value(), found.layer_weights) == (again.score.value(), again.layer_weights)


def test_a_probe_of_noise_is_near_chance():
    probe, train, test = synthetic_probe(num_test=600)
    found = probes.run_clips(torch.randn_like(train), torch.randn_like(test), probe, seed=0)
    assert abs(found.score.value() - 100 / 3) < 8
    sizes = {"num_classes": 3, "num_train": 60, "num_test": 600}
    about = {"kind": "clips", "metric": "accuracy", "chance": pytest.approx(100 / 3)}
    assert probes.summary(probe) == {**sizes, **about}


def test_the_test_clips_choose_nothing():
    probe, train, test = synthetic_probe()
    found, other = (probes.run_clips(train, features, probe, seed=1) for features in (test, torch.randn_like(test)))
    assert found.score.value() != other.score.value()
    assert found.layer_weights == other.layer_weights


def test_features_that_never_vary_say_nothing():
    probe, train, test = synthetic_probe()
    train, test = (torch.cat([part, torch.full_like(part, 7.0)], dim=2) for part in (train, test))
    test[..., 8:] = -1e6
    assert probes.run_clips(train, test, probe, seed=0).score.value() > 95


def test_held_out_clips():
    classes = torch.tensor([0] * 20 + [1] * 2 + [2] * 10)
    out = probes.held_out(classes, torch.Generator().manual_seed(0))
    assert [int(out[classes == label].sum()) for label in range(3)] == [4, 1, 2]
    assert not torch.equal(out, probes.held_out(classes, torch.Generator().manual_seed(1)))


def test_features_of_clips(corpus):
    probe = labels.read_probe(corpus / "pitch.tsv")
    assert (probe.name, probe.kind, probe.labels) == ("pitch", "clips", ("high", "low"))
    assert (len(probe.train), len(probe.test)) == (20, 8)
    model = random_model(small_config("wavlm"))
    pooled = features.pooled_features(features.ModelFeatures(model, "model"), probe, probe.test)
    with torch.inference_mode():
        expected, _ = model.extract_features(load_audio(probe.test[5].path)[None])
    torch.testing.assert_close(pooled[5], torch.stack([state[0].mean(0) for state in expected]))
    assert pooled.shape == (8, 4, 16)
    assert features.pooled_features(features.LogMel(), probe, probe.test).shape == (8, 1, 160)


def test_random_weights_differ_by_seed_and_leave_the_generator_alone(corpus):
    probe = labels.read_probe(corpus / "pitch.tsv")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    config, device = small_config("hubert"), torch.device("cpu")
    found = probes.probe_random_models(config, probe, [3, 4], device).summary()
    assert torch.equal(torch.rand(1), expected)
    single = probes.probe_random_models(config, probe, [4], device).summary()
    assert found["values"][1] == single["values"][0]
    assert found["layer_weights"] != single["layer_weights"]


def test_clips_that_cannot_be_read(corpus):
    (corpus / "text.wav").write_text("not audio")
    soundfile.write(corpus / "nan.wav", np.full(4000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(corpus / "short.wav", np.zeros(50), 16_000)
    model = features.ModelFeatures(random_model(small_config("hubert")), "m")
    for name, message in (("text", "cannot be decoded"), ("nan", "NaN or infinite"), ("short", "has 50 samples")):
        path = corpus / "bad.tsv"
        lines = ["train 0.wav a", "train 1.wav a", "train 2.wav b", "train 3.wav b", f"test {name}.wav a"]
        path.write_text("\n".join(["split path label", *lines]).replace(" ", "\t"))
        probe = labels.read_probe(path)
        for source in (model, features.LogMel()):
            with pytest.raises(UserError, match=rf"bad\.tsv: line 6.*{message}") as error:
                features.pooled_features(source, probe, probe.test)
            assert "prepare_data" not in str(error.value)


# --- probes of frames, by tones whose pitch is the label ------------------------------------------


PITCHES = {"low": 200, "mid": 700, "high": 2500}
HUMS = (3200, 3900, 4600, 5300, 6000, 6900)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of tones that follow each other, with the lists ``segments``, ``permuted``, ``text`` and ``speakers``."""
    root = tmp_path_factory.mktemp("tones")
    draw = np.random.default_rng(0)
    voices = 10 ** draw.uniform(-3, -1.2, (11, len(HUMS)))  # how loud each speaker's hums are
    rows: dict[str, list[str]] = {
        "segments": ["split\tpath\tstart\tend\tlabel"],
        "text": ["split\tpath\ttext"],
        "speakers": ["split\tpath\tlabel"],
    }
    for number in range(36):
        split, speaker = ("train", number % 8) if number < 24 else ("test", 8 + number % 3)
        units, waveform, at = [], [], 0.0
        for _ in range(5):
            unit, seconds = str(draw.choice(list(PITCHES))), draw.uniform(0.1, 0.2)
            time = np.arange(round(seconds * 16_000)) / 16_000
            waveform += [0.3 * np.sin(2 * np.pi * PITCHES[unit] * time), np.zeros(320)]
            rows["segments"].append(f"{split}\t{number}.wav\t{at:.4f}\t{at + len(time) / 16_000:.4f}\t{unit}")
            at += (len(time) + 320) / 16_000
            units.append(unit)
        samples = np.concatenate(waveform)
        time = np.arange(len(samples)) / 16_000
        samples += sum(loud * np.sin(2 * np.pi * hum * time) for hum, loud in zip(HUMS, voices[speaker], strict=True))
        soundfile.write(root / f"{number}.wav", samples + 0.01 * draw.standard_normal(len(samples)), 16_000)
        rows["text"].append(f"{split}\t{number}.wav\t{' '.join(units)}")
        rows["speakers"].append(f"{split}\t{number}.wav\t{speaker}")
    for name, lines in rows.items():
        (root / f"{name}.tsv").write_text("\n".join(lines))
    fields = [line.split("\t") for line in rows["segments"][1:]]
    shuffled = draw.permutation([label for *_, label in fields])
    lines = ["\t".join([*field[:4], label]) for field, label in zip(fields, shuffled, strict=True)]
    (root / "permuted.tsv").write_text("\n".join([rows["segments"][0], *lines]))
    return root


def test_segments(tones):
    """Frames of known pitch are told apart, each layer alone too; of permuted labels nothing is learnt."""
    found = probes.run_probe(features.LogMel(), labels.read_probe(tones / "segments.tsv"), [0, 1], layers_alone=True)
    summary = found.summary()
    assert summary["mean"] > 85 and summary["by_layer"] == pytest.approx([summary["mean"]])
    low, high = summary["interval"]
    assert low <= summary["mean"] <= high <= 100
    probe = labels.read_probe(tones / "permuted.tsv")
    permuted = probes.run_probe(features.LogMel(), probe, [0]).summary()
    assert abs(permuted["mean"] - probes.summary(probe)["chance"]) < 12


def test_labels_of_frames():
    """By the middle of the frame; the end of a segment belongs to the next."""
    clip = labels.Clip(Path("a"), (labels.Segment(0.1, 0.2, 3), labels.Segment(0.2, 0.25, 1)), 2)
    times = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.2499, 0.25, 0.3])
    assert probes.frame_labels(clip, times).tolist() == [-1, 3, 3, 1, 1, -1, -1]


def test_frames_on_disk_are_those_in_memory(tones):
    """All hidden states in half precision, by the frames that are wanted; mean and deviation are theirs."""
    probe = labels.read_probe(tones / "text.tsv")
    model = features.ModelFeatures(random_model(small_config("hubert", "large")), "model")
    clips = probe.test[:3]

    def wanted(_: labels.Clip, times: torch.Tensor) -> torch.Tensor:
        return times > 0.2

    with features.frames_on_disk(model, probe, clips, wanted) as frames:
        kept = []
        for clip in clips:
            states = model.frames(load_audio(clip.path), "here")
            times = (torch.arange(states.shape[1]) * model.hop + model.window / 2) / 16_000
            kept.append(states[:, times > 0.2].transpose(0, 1))
        expected = torch.cat(kept)
        rows = frames.rows(torch.arange(len(frames.clips)))
        largest = expected.abs().amax((0, 2), keepdim=True)
        assert ((rows - expected).abs() <= 2e-3 * largest).all()
        assert torch.bincount(frames.clips).tolist() == [len(part) for part in kept]
        mean, deviation = frames.moments
        torch.testing.assert_close(mean, rows.mean(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(deviation, rows.std(0, correction=0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(frames.of_layer(2).rows(torch.tensor([5, 1])), rows[[5, 1], 2:3])


@pytest.mark.slow
def test_text(tones):
    """CTC finds the pitches in their order, from log-mel and from the states of any model."""
    probe = labels.read_probe(tones / "text.tsv")
    assert len(probe.labels) == 3
    found = probes.run_probe(features.LogMel(), probe, [0]).summary()
    assert found["mean"] < 20
    again = probes.run_probe(features.LogMel(), probe, [0]).summary()
    assert found == again


def test_verification(tones):
    """Two clips of one unknown speaker are told from two of others better than by chance."""
    probe = labels.read_probe(tones / "speakers.tsv")
    assert (probe.kind, probes.summary(probe)["chance"]) == ("verification", 50.0)
    assert {clip.target for clip in probe.test} == {8, 9, 10}
    found = probes.run_probe(features.LogMel(), probe, [0]).summary()
    assert found["mean"] < 40


# --- scores ----------------------------------------------------------------------------------------


def test_equal_error_rate():
    """0 where all pairs are told apart, 50 by chance; each drawn clip counts as often as it is drawn."""
    classes = np.repeat([0, 1, 2], 4)
    apart = EqualErrorRate(np.eye(3)[classes] + 0.01, classes)
    assert apart.value() == pytest.approx(0, abs=1e-9)
    draw = np.random.default_rng(0)
    many = np.arange(400) % 20
    assert EqualErrorRate(draw.standard_normal((400, 8)), many).value() == pytest.approx(50, abs=2)
    # By hand: same pairs score 1 and 0.6, others 0.8 and 0: at a threshold between 0.6 and 0.8 half of each is wrong.
    angles = np.arccos([1, 1, 0.8])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert EqualErrorRate(vectors, np.array([0, 0, 1])).value() == pytest.approx(0, abs=1e-9)
    noisy = np.eye(3)[classes] + 0.7 * draw.standard_normal((12, 3))
    weights = draw.integers(0, 3, 12)
    repeated = np.repeat(np.arange(12), weights)
    whole = EqualErrorRate(noisy[repeated], classes[repeated])
    # A clip is not compared with its own copies.
    own = EqualErrorRate(noisy, classes).value(weights)
    assert own >= whole.value() - 1e-9


def test_shares_and_their_intervals():
    share = Share(np.array([1.0, 0, 2]), np.array([1.0, 1, 2]))
    assert share.value() == 75
    assert share.value(np.array([0, 2, 1])) == 50
    draw = np.random.default_rng(0)
    right = (draw.uniform(size=400) < 0.7).astype(float)
    found = scores.Scored([Share(right, np.ones(400))] * 2, 400).summary()
    low, high = found["interval"]
    deviation = 100 * (0.7 * 0.3 / 400) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert found["std"] == 0 and found["values"] == [found["mean"]] * 2


def test_figure_of_merit():
    """0 is the control, 100 the teacher, whatever the direction; a probe where it is not better is left out."""
    draw = np.random.default_rng(0)

    def scored(share: float) -> scores.Scored:
        return scores.Scored([Share((draw.uniform(size=500) < share).astype(float), np.ones(500))], 500)

    same = scored(0.5)
    of = {
        "teacher": {"accuracy": scored(0.9), "errors": scored(0.1), "same": same, "worse": scored(0.2)},
        "half": {"accuracy": scored(0.6), "errors": scored(0.4), "same": same, "worse": scored(0.3)},
        "control": {"accuracy": scored(0.3), "errors": scored(0.7), "same": same, "worse": scored(0.8)},
    }
    more_is_better = {"accuracy": True, "errors": False, "same": True, "worse": True}
    found, left_out = scores.figure_of_merit(of, more_is_better, "teacher", "control")
    assert left_out.keys() == {"same", "worse"} and "not better than control" in left_out["same"]
    assert found["teacher"]["mean"] == 100 and found["control"]["mean"] == 0
    assert found["teacher"]["interval"] == [100, 100]
    assert found["half"]["mean"] == pytest.approx(50, abs=6)
    low, high = found["half"]["interval"]
    assert low < found["half"]["mean"] < high and high - low < 15
    assert found["half"]["probes"].keys() == {"accuracy", "errors"}


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def files(corpus, tmp_path) -> dict[str, Path]:
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    students = [tmp_path / name / "student.pth" for name in "ab"]
    save_student(students[0], "layer2layer", seed=1)
    save_student(students[1], "predlayer", seed=2, encoder_ff_interm_features=[10, 11, 12])
    return {"teacher": teacher, "a": students[0], "b": students[1], "out": tmp_path / "results.json"}


def command(files: dict[str, Path], corpus: Path, **changes: object) -> list[object]:
    """Flags of a whole evaluation in seconds; a value of None leaves a flag out, a list gives several values."""
    flags = {
        "teacher": files["teacher"],
        "models": [files["a"], files["b"]],
        "names": ["first", "second"],
        "tsv": corpus / "valid.tsv",
        "distill_layers": "0.1,3",
        "probes": corpus / "pitch.tsv",
        "seeds": [0, 1],
        "speed_seconds": 0.1,
        "repetitions": 1,
        "device": "cpu",
        "out": files["out"],
        **changes,
    }
    words: list[object] = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


@pytest.mark.slow
def test_evaluate(files, corpus, monkeypatch, capsys):
    """All of the schema, twice with the same numbers, and a table."""
    found = []
    for _ in range(2):
        run_script(monkeypatch, "evaluate", *command(files, corpus))
        results = json.loads(files["out"].read_text())
        assert results.pop("made_by").keys() == {"command", "versions", "device", "threads", "seeds"}
        for model in results["models"]:
            (speed,) = model["cost"].pop("speed")
            assert speed.keys() == {"seconds", "batch", "threads", "real_time_factor"}
        found.append(results)
    assert found[0] == found[1]
    results = found[0]
    assert results["teacher"] == "teacher"
    assert [(model["name"], model["is_teacher"]) for model in results["models"]] == [
        ("teacher", True),
        ("first", False),
        ("second", False),
    ]
    teacher, first, second = results["models"]
    assert teacher["fidelity"] is None
    assert (first["fidelity"]["mode"], second["fidelity"]["mode"]) == ("layer2layer", "predlayer")
    assert first["fidelity"]["tsv"] == str(corpus / "valid.tsv") and first["path"] == str(files["a"])
    assert {"layer", "l1", "cosine", "cka"} <= first["fidelity"]["layers"][0].keys()
    assert second["config"]["encoder_ff_interm_features"] == [10, 11, 12]
    assert second["cost"]["superb_macs"]["feed_forward"] < teacher["cost"]["superb_macs"]["feed_forward"]
    assert second["cost"].keys() == {"num_params", "params", "num_bytes", "macs_per_second", "superb_macs"}
    wav2vec2_model(**first["config"])
    assert results["probes"] == {
        "pitch": {"kind": "clips", "metric": "accuracy", "num_classes": 2, "num_train": 20, "num_test": 8, "chance": 50}
    }
    assert results["controls"].keys() == {"log-mel", "random weights"}
    assert results["controls"]["log-mel"]["pitch"]["mean"] == 100  # low and high tones
    for probed in (teacher["probes"], second["probes"], results["controls"]["random weights"]):
        assert len(probed["pitch"]["values"]) == 2 and len(probed["pitch"]["layer_weights"]) == 4

    printed = capsys.readouterr().out
    assert f"{teacher['cost']['num_params']:,}" in printed and "SUPERB-style MACs" in printed
    assert f"{first['fidelity']['layers'][1]['cka']:.3f}" in printed
    assert "100.0 ± 0.0" in printed and str(files["out"]) in printed

    # The numbers on a model's card.
    out, licences = files["out"].with_name("export"), {"licence": "mit", "teacher_licence": "apache-2.0"}
    flags = {"model": files["b"], "out": out, "evaluation": files["out"], "teacher": "org/large", "data": "tones"}
    run_script(monkeypatch, "export", *as_words({**flags, **licences, "data_licence": "cc0-1.0"}))
    card = ModelCard.load(out / "hub" / "README.md")
    cosine = np.mean([layer["cosine"] for layer in second["fidelity"]["layers"]])
    scores = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert scores == pytest.approx(
        {
            ("pitch", "accuracy"): second["probes"]["pitch"]["mean"],
            ("valid", "cosine_with_the_teacher"): cosine,
        },
        abs=1e-4,
    )
    assert (card.data.license, card.data.code_license) == ("mit", "mit")
    assert (card.data.teacher_license, card.data.data_license) == ("apache-2.0", "cc0-1.0")
    assert "- teacher: org/large, licence: apache-2.0\n- training data: tones, licence: cc0-1.0\n" in card.text
    assert f"- pitch: accuracy, linear probe (%) {scores['pitch', 'accuracy']}\n" in card.text
    assert (REPOSITORY / "LICENSE").read_text().startswith("MIT License\n")  # what the card says of the code
    other = save_small_model(files["out"].with_name("other.pth"), "hubert", "large")
    elsewhere = {"model": other, "out": out.with_name("elsewhere")}
    assert run_to_exit(monkeypatch, "export", *as_words({**flags, **elsewhere})) == 1
    assert error_line(capsys).startswith(f"--evaluation {files['out']}: 0 of its models (teacher, first, second) have")


def test_teacher_alone_without_probes(files, corpus, monkeypatch, capsys):
    changes = dict.fromkeys(("models", "names", "tsv", "probes"))
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes, speed_seconds=[]))
    results = json.loads(files["out"].read_text())
    (teacher,) = results["models"]
    assert teacher["probes"] == results["controls"] == results["probes"] == {} and teacher["cost"]["speed"] == []


def test_without_a_file_the_tables_are_printed(files, corpus, tmp_path, monkeypatch, capsys):
    changes = dict.fromkeys(("models", "names", "tsv", "probes", "out"))
    before = sorted(tmp_path.rglob("*"))
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes, speed_seconds=[]))
    printed = capsys.readouterr().out
    assert "SUPERB-style MACs" in printed and "written to" not in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_backends(files, tones, monkeypatch, capsys):
    """Each export is timed and probed; float32 knows what PyTorch knows, and int8 is smaller."""
    pytest.importorskip("onnxruntime")
    small = {"teacher": save_student(files["teacher"], None, 0, **one_layer_config("hubert"))}
    small["models"] = save_student(files["a"], None, **one_layer_config("hubert"))
    changes = {**small, "names": "first", "tsv": None, "distill_layers": "0.1"}
    changes |= {"seeds": 0, "backends": "torch,onnx,onnx-int8"}
    lists = [tones / "segments.tsv", tones / "speakers.tsv"]
    run_script(monkeypatch, "evaluate", *command(files, tones, **changes, probes=lists))
    results = json.loads(files["out"].read_text())
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == [
        "teacher",
        "first",
        *(f"{m} ({b})" for m in ("teacher", "first") for b in ("onnx", "onnx-int8")),
    ]
    for name in ("teacher", "first"):
        plain, onnx, int8 = (models[f"{name}{backend}"] for backend in ("", " (onnx)", " (onnx-int8)"))
        assert onnx["backend"] == "onnx" and not onnx["is_teacher"]
        assert all(each["cost"]["speed"][0]["real_time_factor"] > 0 for each in (plain, onnx, int8))
        for probe in ("segments", "speakers"):
            assert onnx["probes"][probe]["mean"] == pytest.approx(plain["probes"][probe]["mean"], abs=3)
            assert onnx["quality"] is None or onnx["quality"]["probes"].keys() <= {"segments", "speakers"}
    assert "first (onnx-int8)" in capsys.readouterr().out
    pictures = sorted(path.name for path in files["out"].parent.glob("*.svg"))
    assert pictures == (["results-1.svg", "results-2.svg"] if models["first"]["quality"] else [])


def test_names_of_files_that_are_called_alike(files, corpus, monkeypatch):
    changes = {"names": None, "tsv": None, "teacher": None, "speed_seconds": [], "seeds": 0}
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes), "--no_controls")
    results = json.loads(files["out"].read_text())
    assert results["controls"] == {} and len(results["models"][1]["probes"]["pitch"]["values"]) == 1
    assert [model["name"] for model in results["models"]] == [str(files["a"]), str(files["b"])]
    assert results["teacher"] is None and not any(model["is_teacher"] for model in results["models"])


def test_bad_input_ends_before_anything_is_measured(files, corpus, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "0.wav", np.zeros(4000), 16_000)
    (tmp_path / "text.tsv").write_text("no manifest\nat all\n")
    (tmp_path / "missing.tsv").write_text(f"{tmp_path}\n0.wav\t4000\n1.wav\t4000\n")
    (tmp_path / "pitch.tsv").write_text("")
    (tmp_path / "one.tsv").write_text((corpus / "pitch.tsv").read_text().replace("\thigh", "\tlow"))
    nested = tmp_path / "nested" / "pitch.tsv"
    nested.parent.mkdir()
    nested.write_text((corpus / "pitch.tsv").read_text())
    for clip in corpus.glob("*-*.wav"):
        for folder in (tmp_path, nested.parent):
            (folder / clip.name).symlink_to(clip)
    slow = save_student(tmp_path / "slow.pth", None, extractor_conv_layer_config=[[10, 10, 5], [12, 3, 2], [8, 3, 2]])

    def measure(*_: object) -> None:
        raise AssertionError("measured in spite of bad input")

    monkeypatch.setattr("evaluate.measure_speed", measure)
    for changes, message in (
        ({"teacher": None, "models": None, "names": None}, "--models: nothing to measure"),
        ({"names": "x"}, "--names: 1 names for 2 models"),
        ({"names": ["x", "x"]}, "--names: two models are called x"),
        ({"teacher": None}, "--tsv: fidelity compares"),
        ({"models": tmp_path / "none.pth", "names": None}, "none.pth"),
        ({"tsv": tmp_path / "none.tsv"}, "none.tsv: no such file"),
        ({"tsv": tmp_path / "text.tsv"}, "text.tsv: line 2 is"),
        ({"tsv": tmp_path / "missing.tsv"}, f"missing.tsv: {tmp_path / '1.wav'} does not exist"),
        ({"max_seconds": 0.01}, "valid.tsv: none of 4 utterances lasts"),
        ({"distill_layers": "0.5"}, "layer 5 is to be distilled"),
        ({"distill_layers": "x"}, "--distill_layers: expected layers"),
        ({"models": slow, "names": None}, "slow.pth: the student's frames do not fit"),
        ({"probes": tmp_path / "none.tsv"}, "none.tsv: no such file"),
        ({"probes": tmp_path / "pitch.tsv"}, "pitch.tsv: line 1 is []"),
        ({"probes": tmp_path / "one.tsv"}, "one.tsv: the training clips have one label"),
        ({"probes": [corpus / "pitch.tsv", nested]}, "--probes: two lists are called pitch"),
        ({"speed_seconds": 0.01}, "--speed_seconds 0.01: expected at least 0.1"),
        ({"batch": 0}, "--batch 0"),
        ({"seeds": -1}, "--seeds -1"),
        ({"seeds": [1, 1]}, "--seeds: expected every seed once"),
        ({"threads": 0}, "--threads 0"),
        ({"backends": "torch,onnx,tflite"}, "--backends torch,onnx,tflite: expected torch, and each once of"),
        ({"backends": "onnx"}, "--backends onnx: expected torch"),
    ):
        assert run_to_exit(monkeypatch, "evaluate", *command(files, corpus, **changes)) == 1
        line = error_line(capsys)
        assert message in line, (message, line)
        assert not files["out"].exists()


def test_bad_audio_in_a_manifest(files, corpus, tmp_path, monkeypatch, capsys):
    """It is not replaced by another, as in training, but named."""
    soundfile.write(tmp_path / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(4000), 16_000)
    soundfile.write(tmp_path / "bad.wav", np.full(4000, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "valid.tsv").write_text(f"{tmp_path}\ngood.wav\t4000\nbad.wav\t4000\n")
    changes = {"tsv": tmp_path / "valid.tsv", "probes": None}
    assert run_to_exit(monkeypatch, "evaluate", *command(files, corpus, **changes)) == 1
    assert "bad.wav: 4000 of samples 0 to 4000 (at 16 kHz) are NaN" in error_line(capsys)
    assert not files["out"].exists()


def test_no_gpu(files, corpus, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_to_exit(monkeypatch, "evaluate", *command(files, corpus, device="cuda")) == 1
    assert "--device cuda: torch finds no GPU" in error_line(capsys)
