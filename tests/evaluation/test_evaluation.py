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
    error_line,
    hubert_base_flops,
    random_model,
    run_script,
    run_to_exit,
    save_small_model,
    small_config,
)

from dataset.speech import load_audio
from evaluation import cost, probes
from evaluation.features import hidden_states
from evaluation.fidelity import HeldOutSpeech, LinearCKA, make_student, measure_fidelity
from evaluation.tables import architecture_tables, unit_counts
from lightning import DistillLoss, make_projections
from wav2vec2 import checkpoint, flops
from wav2vec2.errors import UserError
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


def test_macs_of_hubert_base():
    with torch.device("meta"):
        config = hubert_base().config
    macs = cost.macs_per_second(config)
    num_samples = round(cost.UTTERANCE_SECONDS * 16_000)
    assert macs["total"] == pytest.approx(hubert_base_flops(num_samples) / 2 / cost.UTTERANCE_SECONDS, rel=2e-3)
    # By hand: 3200, 1600, 800, 400, 200, 100 and 50 outputs a second.
    conv = 512 * (3200 * 10 + 512 * (3 * (1600 + 800 + 400 + 200) + 2 * (100 + 50)))
    assert macs["conv"] == pytest.approx(conv, rel=5e-3)
    assert macs["conv"] + macs["transformer"] == macs["total"]
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
    assert flops.count_flops(small_config(family, **no_heads), 16_000).transformer < plain.transformer


def test_cost_of_a_file_and_speed(tmp_path):
    path = save_small_model(tmp_path / "model.pth", "hubert", "base")
    model = checkpoint.load_model(path).eval()
    found = cost.cost(model, path)
    assert found["num_params"] == model.get_num_params() and found["num_bytes"] == path.stat().st_size
    (entries,) = cost.measure_speed([model], [0.1, 0.2], [1, 2], 1, torch.device("cpu"))
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
    (entries,) = cost.measure_speed([model], [0.5], [4], 1, torch.device("cpu"))
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


def synthetic_probe(num_train: int = 60, num_test: int = 60) -> tuple[probes.Probe, torch.Tensor, torch.Tensor]:
    """Three classes that only layer 2 of four can tell apart, and its features are the smallest."""
    generator = torch.Generator().manual_seed(0)
    clips, features = {}, {}
    for split, count in (("train", num_train), ("test", num_test)):
        labels = torch.arange(count) % 3
        values = 100 * torch.randn(count, 4, 8, generator=generator)
        values[:, 2] = 0.01 * (
            torch.nn.functional.one_hot(labels, 8) + 0.2 * torch.randn(count, 8, generator=generator)
        )
        clips[split] = tuple(probes.Clip(Path(f"{split}{n}"), label) for n, label in enumerate(labels.tolist()))
        features[split] = values
    probe = probes.Probe("three", Path("three.tsv"), ("a", "b", "c"), clips["train"], clips["test"])
    return probe, features["train"], features["test"]


def test_a_probe_finds_the_layer_that_knows():
    probe, train, test = synthetic_probe()
    found = probes.run_probe(train, test, probe, seed=0)
    assert found["accuracy"] > 95
    assert sum(found["layer_weights"]) == pytest.approx(1) and np.argmax(found["layer_weights"]) == 2
    assert found["layer_weights"][2] > 0.5
    assert found == probes.run_probe(train, test, probe, seed=0)


def test_a_probe_of_noise_is_near_chance():
    probe, train, test = synthetic_probe(num_test=600)
    found = probes.run_probe(torch.randn_like(train), torch.randn_like(test), probe, seed=0)
    assert abs(found["accuracy"] - 100 / 3) < 8
    assert probe.summary() == {"num_classes": 3, "num_train": 60, "num_test": 600, "chance": pytest.approx(100 / 3)}


def test_the_test_clips_choose_nothing():
    probe, train, test = synthetic_probe()
    found, other = (probes.run_probe(train, features, probe, seed=1) for features in (test, torch.randn_like(test)))
    assert found["accuracy"] != other["accuracy"]
    assert (found["penalty"], found["layer_weights"]) == (other["penalty"], other["layer_weights"])


def test_features_that_never_vary_say_nothing():
    probe, train, test = synthetic_probe()
    train, test = (torch.cat([part, torch.full_like(part, 7.0)], dim=2) for part in (train, test))
    test[..., 8:] = -1e6
    assert probes.run_probe(train, test, probe, seed=0)["accuracy"] > 95


def test_held_out_clips():
    labels = torch.tensor([0] * 20 + [1] * 2 + [2] * 10)
    out = probes.held_out(labels, torch.Generator().manual_seed(0))
    assert [int(out[labels == label].sum()) for label in range(3)] == [4, 1, 2]
    assert not torch.equal(out, probes.held_out(labels, torch.Generator().manual_seed(1)))


def test_summary_of_runs():
    runs = [{"accuracy": a, "layer_weights": [w, 1 - w], "penalty": 1.0} for a, w in ((90.0, 0.2), (80.0, 0.4))]
    found = probes.summarize(runs)
    assert (found["mean"], found["accuracies"]) == (85, [90, 80])
    assert found["std"] == pytest.approx(50**0.5) and found["layer_weights"] == pytest.approx([0.3, 0.7])
    assert probes.summarize(runs[:1])["std"] == 0


def test_features_are_means_over_frames(corpus):
    probe = probes.read_probe(corpus / "pitch.tsv")
    assert (probe.name, probe.labels, len(probe.train), len(probe.test)) == ("pitch", ("high", "low"), 20, 8)
    model = random_model(small_config("wavlm"))
    pooled = probes.pooled_states(model, "model", probe, probe.test)
    with torch.inference_mode():
        expected, _ = model.extract_features(load_audio(probe.test[5].path)[None])
    torch.testing.assert_close(pooled[5], torch.stack([state[0].mean(0) for state in expected]))
    assert pooled.shape == (8, 4, 16)
    assert probes.log_mel_statistics(probe, probe.test).shape == (8, 1, 160)


def test_random_weights_differ_by_seed_and_leave_the_generator_alone(corpus):
    probe = probes.read_probe(corpus / "pitch.tsv")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    config, device = small_config("hubert"), torch.device("cpu")
    found = probes.probe_random_models(config, [probe], [3, 4], device)
    assert torch.equal(torch.rand(1), expected)
    single = probes.probe_random_models(config, [probe], [4], device)["pitch"]
    assert found["pitch"]["accuracies"][1] == single["accuracies"][0]
    assert found["pitch"]["layer_weights"] != single["layer_weights"]


def probe_lines(*lines: str) -> str:
    return "\n".join(line.replace(" ", "\t") for line in lines)


GOOD = ["train 0.wav a", "train 1.wav a", "train 2.wav b", "train 3.wav b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (probe_lines("split path", *GOOD), r"line 1 is .*expected the columns .*\(label missing\)"),
        ("", r"line 1 is \[\], expected the columns"),
        (probe_lines("split path label", *GOOD), "no line has the split test"),
        (probe_lines("split path label", "test 0.wav a"), "no line has the split train"),
        (probe_lines("split path label", *GOOD[:2], "test 2.wav a"), "have one label, 'a', expected two or more"),
        (probe_lines("split path label", *GOOD[:3], "test 3.wav a"), "one training clip has the label 'b'"),
        (probe_lines("split path label", *GOOD, "test test-low-0.wav c"), "label 'c', which no training clip has"),
        (probe_lines("split path label", *GOOD, "dev 3.wav a"), "line 6 has split 'dev'"),
        (probe_lines("split path label", *GOOD, "test 3.wav"), "line 6 has .* label None"),
        (probe_lines("split path label", *GOOD, "test 3.wav a"), "line 6 lists .*3.wav, which line 5 does already"),
        (probe_lines("split path label", *GOOD, "test 9.wav a"), r"line 6: .*9\.wav does not exist"),
        (probe_lines("split path label", "train " + "x" * 200_000 + " a"), "line 2 cannot be read"),
    ],
)
def test_probes_that_cannot_be(text, message, corpus):
    path = corpus / "bad.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.tsv.*{message}"):
        probes.read_probe(path)


def test_a_probe_that_is_not_utf8(corpus):
    path = corpus / "bad.tsv"
    path.write_text(probe_lines("split path label", *GOOD).replace("a\n", "é\n"), encoding="latin-1")
    with pytest.raises(UserError, match=r"bad\.tsv: line 2 is not UTF-8 text"):
        probes.read_probe(path)


def test_clips_that_cannot_be_read(corpus):
    (corpus / "text.wav").write_text("not audio")
    soundfile.write(corpus / "nan.wav", np.full(4000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(corpus / "short.wav", np.zeros(50), 16_000)
    model = random_model(small_config("hubert"))
    for name, message in (("text", "cannot be decoded"), ("nan", "NaN or infinite"), ("short", "has 50 samples")):
        path = corpus / "bad.tsv"
        path.write_text(probe_lines("split path label", *GOOD, f"test {name}.wav a"))
        probe = probes.read_probe(path)
        for features in (lambda *what: probes.pooled_states(model, "m", *what), probes.log_mel_statistics):
            with pytest.raises(UserError, match=rf"bad\.tsv: .*{name}\.wav.*{message}") as error:
                features(probe, probe.test)
            assert "prepare_data" not in str(error.value)


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
    assert second["cost"]["superb_macs"]["transformer"] < teacher["cost"]["superb_macs"]["transformer"]
    assert second["cost"].keys() == {"num_params", "num_bytes", "macs_per_second", "superb_macs"}
    wav2vec2_model(**first["config"])
    assert results["probes"] == {"pitch": {"num_classes": 2, "num_train": 20, "num_test": 8, "chance": 50}}
    assert results["controls"].keys() == {"log-mel", "random weights"}
    assert results["controls"]["log-mel"]["pitch"]["mean"] == 100  # low and high tones
    for probed in (teacher["probes"], second["probes"], results["controls"]["random weights"]):
        assert len(probed["pitch"]["accuracies"]) == 2 and len(probed["pitch"]["layer_weights"]) == 4

    printed = capsys.readouterr().out
    assert f"{teacher['cost']['num_params']:,}" in printed and "SUPERB-style MACs" in printed
    assert f"{first['fidelity']['layers'][1]['cka']:.3f}" in printed
    assert "100.0 ± 0.0" in printed and str(files["out"]) in printed


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


def test_names_of_files_that_are_called_alike(files, corpus, monkeypatch):
    changes = {"names": None, "tsv": None, "teacher": None, "speed_seconds": [], "seeds": 0}
    run_script(monkeypatch, "evaluate", *command(files, corpus, **changes), "--no_controls")
    results = json.loads(files["out"].read_text())
    assert results["controls"] == {} and len(results["models"][1]["probes"]["pitch"]["accuracies"]) == 1
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
