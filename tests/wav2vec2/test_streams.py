"""Streams in use: text as it comes, long audio by steps, and pushes that cannot be used."""

import resource
import sys

import numpy as np
import pytest
import soundfile
import torch
from helpers import TASK_HEADS, head_id, random_model, random_waveforms, save_small_model, small_config, task_contents

import wav2vec2
from evaluation.cost import cost, counted_on, streaming_cost
from evaluation.tables import cost_table
from wav2vec2 import prediction
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import task_model_of

STREAMING = {"encoder_chunk_frames": 4, "encoder_left_frames": 8}
CLIPS = next(head for head in TASK_HEADS if head.kind == "clips")
HEADS = [head for head in TASK_HEADS if head.kind != "clips"]
KINDS = [(family, size) for family in ("hubert", "wavlm") for size in ("base", "large")]


def contents_of(head, family="hubert", size="large"):
    """The contents of a small streaming fine-tuned model."""
    contents = task_contents(head, family, size)
    contents["config"] |= STREAMING
    streaming = random_model(small_config(family, size, **STREAMING)).state_dict()
    contents["state_dict"] = streaming | contents["state_dict"]
    return contents


def streaming_model(family="hubert", size="base"):
    return random_model(small_config(family, size, **STREAMING)).eval().requires_grad_(False)


@pytest.mark.parametrize(("family", "size"), KINDS)
@pytest.mark.parametrize("layers", [None, "output"])
def test_long_audio_has_the_frames_of_the_whole(family, size, layers):
    model = streaming_model(family, size).double()
    waveforms = [random_waveforms(n, seed=n)[0][0] for n in (4500, 700, 4541)]
    whole = wav2vec2.extract(model, waveforms, layers=layers, max_seconds=None)
    cut = wav2vec2.extract(model, waveforms, layers=layers, max_seconds=0.2, context_seconds=0.05)
    assert [x.shape for x in cut] == [x.shape for x in whole]
    for ours, theirs, waveform in zip(cut, whole, waveforms, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        if layers is None:
            direct = torch.cat(model.extract_features(waveform[None].double())[0])
            torch.testing.assert_close(theirs, direct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "size"), KINDS)
@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_stream_says_what_the_whole_says(family, size, head):
    model = task_model_of(contents_of(head, family, size), "model.pth").eval().requires_grad_(False)
    waveform = random_waveforms(5000)[0][0]
    whole = wav2vec2.predict(model, waveform, max_seconds=None)
    for sizes in (201, 10_000):
        found = list(wav2vec2.predict_stream(model, waveform.split(sizes)))
        assert ("".join(found) if head.kind == "text" else found) == whole
    assert wav2vec2.predict(model, waveform, max_seconds=0.2, context_seconds=0.05) == whole
    frames = torch.cat([(stream := wav2vec2.stream(model)).push(waveform), stream.finish()])
    torch.testing.assert_close(frames, model(waveform[None])[0][0], rtol=1e-4, atol=1e-4)


def test_stream_speaks_before_its_end():
    model = task_model_of(contents_of(HEADS[0]), "model.pth").eval().requires_grad_(False)
    waveform, heard = random_waveforms(9000)[0][0], []

    def blocks():
        for block in waveform.split(500):
            heard.append(block)
            yield block

    next(wav2vec2.predict_stream(model, blocks()))
    assert len(heard) < 18  # blocks


def run(monkeypatch, *arguments):
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["prediction", *map(str, arguments), "--device", "cpu"])
    return prediction.main()


@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_command_prints_the_same_with_stream(tmp_path, monkeypatch, capsys, head):
    checkpoint.save(tmp_path / "model.pth", contents_of(head))
    paths = [tmp_path / name for name in ("a.wav", "b.flac")]
    for seed, path in enumerate(paths):
        soundfile.write(path, random_waveforms(3000 + 500 * seed, seed=seed)[0][0].numpy(), SAMPLE_RATE)
    bad = [tmp_path / name for name in ("bad.wav", "short.wav", "nan.wav")]
    bad[0].write_text("no audio")
    soundfile.write(bad[1], [0.1] * 20, SAMPLE_RATE)
    soundfile.write(bad[2], [0.1, float("nan")] * 900, SAMPLE_RATE, subtype="FLOAT")
    arguments = tmp_path / "model.pth", paths[0], *bad, paths[1]
    assert run(monkeypatch, *arguments) == 1
    whole = capsys.readouterr()
    assert run(monkeypatch, *arguments, "--stream") == 1
    streamed = capsys.readouterr()
    assert streamed == whole and whole.out and whole.err.count("\n") == 3
    assert run(monkeypatch, *arguments[:2], "--stream") == 0


def test_command_names_a_model_that_cannot_stream(tmp_path, monkeypatch, capsys):
    checkpoint.save(tmp_path / "offline.pth", task_contents(HEADS[0]))
    checkpoint.save(tmp_path / "clips.pth", contents_of(CLIPS))
    save_small_model(tmp_path / "plain.pth", "hubert", "base", **STREAMING)
    for name, message in (
        ("offline", "not a streaming model"),
        ("clips", "has no head for text or segments"),
        ("plain", "has no head for text or segments"),
    ):
        assert run(monkeypatch, path := tmp_path / f"{name}.pth", "a.wav", "b.wav", "--stream") == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert message in printed.err and str(path) in printed.err


BAD_PUSHES = [
    ({"sample_rate": 8000}, torch.zeros(500)),
    ({"sample_rate": "16k"}, torch.zeros(500)),
    ({}, "talk.wav"),
    ({}, None),
    ({}, 3.0),
    ({}, torch.zeros(500, dtype=torch.int64)),
    ({}, torch.zeros(500, dtype=torch.complex64)),
    ({}, torch.zeros(1, 500)),
    ({}, torch.zeros(())),
    ({}, np.array(["a"] * 500)),
    ({}, [0.0, "a"]),
    ({}, torch.full((500,), float("nan"))),
    ({}, np.array([0.0, np.inf])),
]


@pytest.mark.parametrize(("options", "samples"), BAD_PUSHES)
def test_bad_push_leaves_the_stream_as_it_was(options, samples):
    model, waveform = streaming_model(), random_waveforms(2000)[0][0]
    disturbed, calm = wav2vec2.stream(model), wav2vec2.stream(model)
    for block in waveform.split(700):
        with pytest.raises(UserError, match=r"^push: ") as error:
            disturbed.push(samples, **options)
        assert "\n" not in str(error.value)
        assert torch.equal(disturbed.push(block), calm.push(block))
    assert torch.equal(disturbed.finish(), calm.finish())


def test_bad_batch_and_finished_stream():
    stream = wav2vec2.stream(streaming_model(), batch=2)
    for samples in (torch.zeros(500), torch.zeros(3, 500), [[0.0], [0.0, 1.0]]):
        with pytest.raises(UserError, match=r"^push: "):
            stream.push(samples)
    assert stream.push(torch.zeros(2, 500)).shape[0] == 2
    stream.finish()
    with pytest.raises(UserError, match="finished"):
        stream.push(torch.zeros(2, 500))
    with pytest.raises(UserError, match="not a streaming model"):
        wav2vec2.stream(random_model(small_config("hubert")))


def test_long_stream_needs_no_more_memory():
    stream, generator = wav2vec2.stream(streaming_model("wavlm", "large")), torch.Generator().manual_seed(0)
    peaks = []
    for _ in range(3):
        for _ in range(20):
            frames = stream.push(torch.randn(16_000, generator=generator))
            assert frames.isfinite().all() and len(frames) > 0
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
    assert peaks[2] - peaks[1] < 2000


def test_cost_of_streaming():
    model = streaming_model()
    found = streaming_cost(model)
    assert found["delay_ms"] == model.feature_extractor.num_samples(4) / 16 and found["real_time_factor"] > 0
    plain = random_model(small_config("hubert"))
    assert streaming_cost(plain) is None
    rows = [
        {"name": name, "cost": cost(each, None) | {"streaming": measured}}
        for name, each, measured in (
            ("streaming", model, {"delay_ms": 325.0, "real_time_factor": 0.25}),
            ("offline", plain, None),
        )
    ]
    table = cost_table(rows, counted_on())
    assert table.header[-2:] == ["delay ms", "RTF by steps"]
    assert [row[-2:] for row in table.rows] == [["325", "0.2500"], ["-", "-"]]
    assert "delay ms" not in cost_table(rows[1:], counted_on()).header
