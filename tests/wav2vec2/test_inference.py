"""Loading any model for use, and features of any audio: batched, chunked, from files, with torch alone."""

import array
import doctest
import io
import itertools
import math
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import REPOSITORY, random_model, random_waveforms, save_small_model, small_config, write_hub_folder
from torch import Tensor

import wav2vec2
from wav2vec2 import audio, inference
from wav2vec2.audio import read_audio
from wav2vec2.fast import plain_paths
from wav2vec2.files import checkpoint, hub
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.import_fairseq import import_fairseq_model
from wav2vec2.utils.import_huggingface import fetch_huggingface_model

KINDS = list(itertools.product(("hubert", "wavlm"), ("base", "large")))
RECEPTIVE_FIELD = 60  # samples, of the small models


def waveforms_of(*num_samples: int) -> list[Tensor]:
    rows, _ = random_waveforms(*num_samples)
    return [row[:length] for row, length in zip(rows, num_samples, strict=True)]


@torch.no_grad()
def alone(model: Wav2Vec2Model, waveform: Tensor) -> Tensor:
    """(layers + 1, frames, D) of one waveform."""
    return torch.cat(model.extract_features(waveform[None])[0])


# Loading


@pytest.mark.parametrize(("family", "size"), KINDS)
def test_load_model_file(tmp_path, family, size):
    path = save_small_model(tmp_path / "model.pth", family, size)
    model = wav2vec2.load(path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.encoder.transformer.pos_conv_embed.conv.folded_weight is not None
    (waveform,) = waveforms_of(3000)
    expected = alone(checkpoint.load_model(path).eval(), waveform)
    torch.testing.assert_close(alone(model, waveform), expected, rtol=1e-6, atol=1e-6)


def test_load_folder_and_hub(tmp_path, monkeypatch):
    model = random_model(small_config("wavlm"))
    write_hub_folder(tmp_path / "folder", {"config": model.config, "state_dict": model.state_dict()})
    asked = []

    def download(repo_id: str, revision: str | None, filename: str | None) -> Path:
        assert filename is None
        asked.append((repo_id, revision))
        return tmp_path / "folder"

    monkeypatch.setattr(hub, "download", download)
    for loaded in (wav2vec2.load(tmp_path / "folder"), wav2vec2.load("some-org/a.model", revision="v1")):
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert asked == [("some-org/a.model", "v1")]


def test_load_torchaudio_weights(tmp_path):
    from torchaudio.models import wav2vec2_model

    torch.manual_seed(0)
    theirs = wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=None,
        extractor_conv_bias=False,
        encoder_embed_dim=768,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=128,
        encoder_pos_conv_groups=16,
        encoder_num_layers=1,
        encoder_num_heads=12,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=3072,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.1,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.05,
        aux_num_out=None,
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "hubert.pt")
    (waveform,) = waveforms_of(8000)
    with torch.no_grad():
        expected = theirs.extract_features(waveform[None])[0][0][0]
    found = wav2vec2.extract(wav2vec2.load(tmp_path / "hubert.pt"), waveform, layers=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_in_other_precisions(tmp_path, dtype):
    path = save_small_model(tmp_path / "model.pth", "hubert", "large")
    model = wav2vec2.load(str(path), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    waveforms = waveforms_of(3000, 20_000)
    options = {"max_seconds": 0.5, "context_seconds": 0.1}
    for found, expected in zip(
        wav2vec2.extract(model, waveforms, **options),
        wav2vec2.extract(wav2vec2.load(path), waveforms, **options),
        strict=True,
    ):
        assert found.dtype == dtype
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_load_refuses(tmp_path):
    path = save_small_model(tmp_path / "model.pth", "hubert", "base")
    checkpoint.save(tmp_path / "last.ckpt", {"pytorch-lightning_version": "2", "state_dict": {}})
    for source, options, message in (
        (tmp_path / "last.ckpt", {}, "a training checkpoint"),
        (tmp_path / "gone.pth", {}, "no such file or folder"),
        ("exp/gone.pth", {}, "no such file or folder"),
        (Path("some-org/model"), {}, "no such file or folder"),
        (path, {"revision": "v1"}, "revision: found 'v1'"),
        (path, {"device": "abacus"}, "device abacus, .* cannot be used"),
        (path, {"dtype": torch.int8}, "dtype torch.int8: cannot be used"),
    ):
        with pytest.raises(UserError, match=message):
            wav2vec2.load(source, **options)


# One input and several


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize(("family", "size"), KINDS)
@torch.no_grad()
def test_trace(tmp_path, family, size):
    """The TorchScript program of a loaded model gives its outputs, of batches of other sizes and lengths too."""
    model = wav2vec2.load(save_small_model(tmp_path / "model.pth", family, size))
    with plain_paths():
        program = torch.jit.trace(model, random_waveforms(3000, 2100))
    torch.jit.save(program, tmp_path / "program.pt")
    program = torch.jit.load(tmp_path / "program.pt")
    for batch in (random_waveforms(3000, 2100), random_waveforms(900), random_waveforms(8000, 61, 5003)):
        torch.testing.assert_close(program(*batch), model(*batch), rtol=1e-5, atol=1e-5)
        with plain_paths():
            output, lengths = model(*batch)
        assert torch.equal(program(*batch)[0], output) and torch.equal(program(*batch)[1], lengths)


class Halving(torch.nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["traced", "scripted", "exported"])
def test_a_program_is_no_checkpoint(tmp_path, kind):
    path, example = tmp_path / "program.pt2", (torch.zeros(1),)
    if kind == "exported":
        torch.export.save(torch.export.export(Halving(), example), path)
    else:
        torch.jit.save(torch.jit.trace(Halving(), example) if kind == "traced" else torch.jit.script(Halving()), path)
    for read in (wav2vec2.load, import_fairseq_model, lambda path: fetch_huggingface_model(str(path))):
        with pytest.raises(
            UserError, match=r"program\.pt2: a program \(TorchScript or torch\.export\), not a checkpoint"
        ):
            read(path)


@pytest.mark.parametrize(("family", "size"), KINDS)
def test_batched_is_single(family, size):
    """Whatever shares its batch, and in order; one batch holds rows of many lengths."""
    model = random_model(small_config(family, size))
    waveforms = waveforms_of(2000, 75, 9000, 2013, 400, 9000, 5000)
    results = wav2vec2.extract(model, waveforms, batch_seconds=10)
    for found, waveform in zip(results, waveforms, strict=True):
        torch.testing.assert_close(found, alone(model, waveform), rtol=1e-5, atol=1e-5)
    for found, expected in zip(wav2vec2.extract(model, waveforms, batch_seconds=1e-3), results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers():
    model = random_model(small_config("hubert"))
    (waveform,) = waveforms_of(2000)
    states = alone(model, waveform)  # (4, frames, 16)
    for layers, expected in (
        (None, states),
        (0, states[0]),
        (3, states[3]),
        (-1, states[-1]),
        ([2], states[[2]]),
        ((3, 0, -2), states[[3, 0, 2]]),
        (range(1, 3), states[1:3]),
    ):
        torch.testing.assert_close(wav2vec2.extract(model, waveform, layers=layers), expected)
    for layers in (4, -5, [], [0, 4], "last", ["1"]):
        with pytest.raises(UserError, match="layers: found"):
            wav2vec2.extract(model, waveform, layers=layers)


@pytest.mark.parametrize("aux_num_out", [None, 5])
def test_output_is_what_forward_returns(aux_num_out):
    model = random_model(small_config("hubert", "large", aux_num_out=aux_num_out))
    waveforms = waveforms_of(2000, 3000)
    with torch.no_grad():
        expected = [model(waveform[None])[0][0] for waveform in waveforms]
    for found, wanted in zip(wav2vec2.extract(model, waveforms, layers="output"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_kinds_of_waveforms():
    model = random_model(small_config("hubert"))
    whole_numbers = np.random.default_rng(0).integers(-8000, 8000, 3000).astype(np.int16)
    expected = alone(model, torch.from_numpy(whole_numbers / 32768).float())
    for waveform in (
        whole_numbers,
        torch.from_numpy(whole_numbers),
        whole_numbers.astype(np.int32) * 65536,
        whole_numbers / 32768,
        (whole_numbers / 32768)[::-1][::-1],
        torch.from_numpy(whole_numbers / 32768).requires_grad_(),
        torch.from_numpy(whole_numbers / 32768).to_sparse(),
        whole_numbers.astype(">i2"),
        (whole_numbers / 32768).astype(">f4"),
        (whole_numbers / 32768)[::-1].astype(">f8")[::-1],
        np.frombuffer((whole_numbers / 32768).astype("<f4").tobytes(), "<f4"),  # read-only
        np.ma.masked_invalid(whole_numbers / 32768),  # nothing is
        {"array": (whole_numbers / 32768).tolist(), "sampling_rate": 16_000},
    ):
        torch.testing.assert_close(wav2vec2.extract(model, waveform), expected, rtol=1e-5, atol=1e-5)
    # What could be several inputs is one waveform only among others.
    sequences = [(whole_numbers / 32768).tolist(), tuple(whole_numbers / 32768), array.array("h", whole_numbers)]
    for found in wav2vec2.extract(model, sequences):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = torch.from_numpy(whole_numbers / 32768).to(dtype)
        torch.testing.assert_close(
            wav2vec2.extract(model, rounded), alone(model, rounded.float()), rtol=1e-5, atol=1e-5
        )
    # 8 bits have silence at 128, and steps of 1/128.
    coarse = torch.from_numpy(whole_numbers // 256 + 128).to(torch.uint8)
    torch.testing.assert_close(
        wav2vec2.extract(model, coarse), alone(model, torch.from_numpy(whole_numbers // 256 / 128).float())
    )


class Decoder:
    """Stands for torchcodec's, which newer versions of datasets hand out."""

    def __init__(self, data: Tensor, sample_rate: int) -> None:
        self.data, self.sample_rate = data, sample_rate  # (channels, samples)

    def get_all_samples(self) -> "Decoder":
        if self.data is None:
            raise RuntimeError("no audio stream")
        return self


def test_decoded_items_of_datasets():
    model = random_model(small_config("hubert"))
    slow, fast = (waveform.numpy() for waveform in waveforms_of(3000, 9000))
    expected = wav2vec2.extract(model, slow), wav2vec2.extract(model, fast, sample_rate=48_000)
    items = [
        {"path": "a.wav", "array": slow, "sampling_rate": 16_000},
        {"path": None, "array": torch.from_numpy(fast), "sampling_rate": np.int64(48_000)},
    ]
    decoders = [Decoder(torch.from_numpy(slow).expand(2, -1), 16_000), Decoder(torch.from_numpy(fast)[None], 48_000)]
    for one, wanted in zip([*items, *decoders], [*expected, *expected], strict=True):
        torch.testing.assert_close(wav2vec2.extract(model, one), wanted)
        # The option is that of plain waveforms.
        torch.testing.assert_close(wav2vec2.extract(model, one, sample_rate=8000), wanted)
        torch.testing.assert_close(wav2vec2.extract(model, [one, slow])[0], wanted)


@pytest.mark.parametrize("kind", [int, np.int32, np.uint16, np.int64, float, np.float32, torch.tensor])
def test_sample_rate_is_any_number(kind):
    model = random_model(small_config("hubert"))
    (waveform,) = waveforms_of(9000)
    expected = wav2vec2.extract(model, waveform, sample_rate=44_100)
    assert torch.equal(wav2vec2.extract(model, waveform, sample_rate=kind(44_100)), expected)


def test_results_can_be_trained_on():
    """They are plain tensors, not those of torch's inference mode."""
    model = random_model(small_config("hubert"))
    probe = torch.nn.Linear(16, 2)
    probe(wav2vec2.extract(model, waveforms_of(2000)[0], layers=-1)).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(0), "input: has 0 samples at 16 kHz, expected at least 60"),
        (torch.zeros(RECEPTIVE_FIELD - 1), "has 59 samples at 16 kHz, expected at least 60"),
        (torch.zeros(2, 3000), r"has shape \[2, 3000\], expected \(samples,\)"),
        (torch.tensor(0.0), r"has shape \[\]"),
        (torch.tensor([0.0, float("nan"), float("inf")] * 100), "200 of its 300 samples are NaN or infinite"),
        (torch.zeros(300, dtype=torch.int64), "holds torch.int64, expected floats"),
        (torch.zeros(300, dtype=torch.complex64), "holds torch.complex64"),
        (np.array(["a"] * 300), r"input: cannot be used \(it holds str32\), expected floats or int16"),
        (np.zeros(300, dtype=[("left", ">f4"), ("right", ">f4")]), r"input: cannot be used \(it holds void64\)"),
        (np.array([None] * 300), r"cannot be used \(it holds object\)"),
        (np.zeros(300, dtype=">c8"), "holds torch.complex64"),
        (np.zeros(300, dtype=">u2"), "holds torch.uint16"),
        (np.zeros(300, dtype=bool), "holds torch.bool"),
        (
            np.ma.masked_array(np.zeros(300), [True] + [False] * 299),
            r"cannot be used \(some of its samples are masked\)",
        ),
        (torch.zeros(300, device="meta"), r"cannot be used \(Cannot copy out of meta tensor"),
        (torch.quantize_per_tensor(torch.zeros(300), 0.1, 0, torch.qint8), "holds torch.qint8"),
        (torch.nested.nested_tensor([torch.zeros(300)], layout=torch.jagged), r"cannot be used \(it is nested"),
        (torch.eye(300).to_sparse(), r"has shape \[300, 300\]"),
        (None, "input: found None, expected a path, bytes, or a tensor"),
        (Path("gone.flac"), "gone.flac: no such file"),
        (
            {"audio": torch.zeros(300)},
            r"input 0: expected an item of datasets .*, found a dict with the keys \['audio'\]",
        ),
        ({"path": None, "bytes": None}, "input 0: expected an item of datasets"),
        ({"path": "a.wav", "bytes": b"secret"}, r"input 0: cannot be decoded \(Format not recognised; 6 bytes\)"),
        ({"path": "gone.flac", "bytes": None}, "gone.flac: no such file"),
        (b"secret", r"input 0: cannot be decoded \(Format not recognised; 6 bytes\)"),
        (memoryview(b"\0\0\0\x20ftypM4A secret"), "input 0: cannot be decoded: it is MPEG-4"),
        (b"", "input 0: has no bytes left"),
        (io.StringIO("secret"), r"input 0: cannot be read \(.* not 'str'\), expected bytes: open\(path, 'rb'\)"),
        (io.BufferedWriter(io.BytesIO()), r"input 0: cannot be read \(read\)"),
        ({"array": torch.zeros(2, 300), "sampling_rate": 16_000}, r"input 0: has shape \[2, 300\]"),
        ({"array": [0] * 300, "sampling_rate": 16_000}, "input 0: holds torch.int64"),
        ({"array": [b"secret"], "sampling_rate": 16_000}, r"input 0: cannot be used \(it holds bytes48\)"),
        ({"array": [[0.0], []], "sampling_rate": 16_000}, r"input 0: cannot be used \(setting an array element"),
        ({"array": torch.zeros(300), "sampling_rate": torch.ones(2)}, "input 0: sampling_rate: found <Tensor>"),
        ({"array": torch.zeros(300), "sampling_rate": None}, "input 0: sampling_rate: found None, expected a number"),
        ({"array": torch.zeros(300), "sampling_rate": np.int64(5)}, "input 0: sampling_rate: found 5, expected"),
        (Decoder(None, 16_000), r"input 0: cannot be decoded \(no audio stream\)"),
    ],
)
def test_inputs_that_cannot_be_used(waveform, message):
    model = random_model(small_config("hubert"))
    with pytest.raises(UserError, match=message.replace("input:", "input 0:")) as caught:
        wav2vec2.extract(model, waveform)
    assert "secret" not in str(caught.value)
    good = torch.ones(RECEPTIVE_FIELD)
    errors: dict[int, UserError] = {}
    results = list(wav2vec2.extract_iter(model, [good, waveform, good], on_error=errors.__setitem__))
    assert [result is None for result in results] == [False, True, False]
    assert list(errors) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 16}, "sample_rate: found 16, expected a number of Hz from 1000 to 384000"),
        ({"sample_rate": np.int64(2**31)}, "sample_rate: found 2147483648, expected a number of Hz"),
        ({"sample_rate": 22_050.5}, r"sample_rate: found 22050\.5, expected a number of Hz"),
        ({"sample_rate": "16000"}, "sample_rate: found '16000', expected a number of Hz"),
        ({"sample_rate": math.nan}, "sample_rate: found nan, expected a number of Hz"),
        ({"max_seconds": 10, "context_seconds": 5}, "max_seconds"),
        ({"max_seconds": 0.0, "context_seconds": 0}, "max_seconds"),
        ({"context_seconds": -1}, "context_seconds"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        wav2vec2.extract(random_model(small_config("hubert")), torch.zeros(3000), **options)


def test_misuse():
    model = random_model(small_config("hubert"))
    with pytest.raises(UserError, match="training mode"):
        wav2vec2.extract(model.train(), torch.zeros(3000))
    model.eval()
    for one in (torch.zeros(3000), b"secret", io.BytesIO(b"secret"), {"bytes": b"secret"}, None):
        with pytest.raises(UserError, match=f"found one of type {type(one).__name__}; put it into a list"):
            wav2vec2.extract_iter(model, one)
    with pytest.raises(UserError, match=r"input 0: found 0\.5, expected a path"):
        wav2vec2.extract(model, [0.5, 0.25])


# Long audio


@pytest.mark.parametrize(("family", "size"), KINDS)
def test_chunks_without_attention_are_exact(family, size):
    """Attention apart, a frame depends on its surroundings only: with enough context chunks change nothing.

    That includes what is taken over the whole waveform, which gets louder from chunk to chunk here.
    """
    model = random_model(small_config(family, size, encoder_use_attention=[False] * 3))
    (waveform,) = waveforms_of(50_000)
    waveform = waveform * torch.linspace(0.1, 3, 50_000)
    expected = alone(model, waveform)
    for max_seconds, context_seconds in ((1, 0.01), (0.7, 0.1), (3.1, 0.02), (0.1, 0.04)):
        found = wav2vec2.extract(model, waveform, max_seconds=max_seconds, context_seconds=context_seconds)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    without = wav2vec2.extract(model, waveform, max_seconds=1, context_seconds=0)
    assert (without - expected).abs().max() > 0.01


@pytest.mark.parametrize(("family", "size"), KINDS)
def test_chunks_with_attention(family, size):
    model = random_model(small_config(family, size))
    for num_samples in (16_000, 16_001, 50_003):
        (waveform,) = waveforms_of(num_samples)
        expected = alone(model, waveform)
        found = wav2vec2.extract(model, waveform, max_seconds=1, context_seconds=0.1)
        assert found.shape == expected.shape
        torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=2e-4)
        if num_samples <= 16_000:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wav2vec2.extract(model, waveform, max_seconds=None), expected, rtol=1e-5, atol=1e-5)


def test_no_chunk_is_longer_than_asked(monkeypatch):
    model = random_model(small_config("hubert", "large"))
    seen = []
    original = type(model.feature_extractor).forward

    def forward(self: torch.nn.Module, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        seen.append(tuple(waveforms.shape))
        return original(self, waveforms, lengths)

    monkeypatch.setattr(type(model.feature_extractor), "forward", forward)
    wav2vec2.extract(model, waveforms_of(100_000)[0], max_seconds=1, context_seconds=0.1, batch_seconds=3)
    assert all(length <= 16_000 and rows * length <= 48_000 for rows, length in seen)
    assert len(seen) >= 3


def test_lookahead_is_bounded():
    """Inputs are taken as results are asked for; those that cannot be used take no part in the count."""
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield torch.full((8000 if number % 4 else 10,), 0.1)

    model = random_model(small_config("hubert"))
    results = wav2vec2.extract_iter(model, endless(), lookahead_seconds=2, on_error=lambda number, error: None)
    assert taken == 0
    for number, result in enumerate(itertools.islice(results, 20)):
        assert (result is None) == (number % 4 == 0)
        assert taken <= number + 7


# Files


def test_files(tmp_path):
    model = random_model(small_config("hubert"))
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (6000, 2))
    soundfile.write(tmp_path / "stereo.wav", samples, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "cd.flac", samples, 44_100)
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    for name in ("stereo.wav", "cd.flac"):
        expected = alone(model, read_audio(tmp_path / name))
        for path in (tmp_path / name, str(tmp_path / name)):
            torch.testing.assert_close(wav2vec2.extract(model, path), expected, rtol=1e-5, atol=1e-5)
    mixed = wav2vec2.extract(model, samples.mean(1), sample_rate=44_100)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)  # the file has 16 bits
    with pytest.raises(UserError, match=r"noise.wav: cannot be decoded \(.*\), expected audio"):
        wav2vec2.extract(model, [tmp_path / "stereo.wav", tmp_path / "noise.wav"])


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.mp3", "a.ogg"])
def test_files_in_memory(tmp_path, name):
    """Uploads, members of archives, and what datasets gives with Audio(decode=False)."""
    model = random_model(small_config("hubert"))
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 30_000), 44_100)
    expected, contents = wav2vec2.extract(model, path, layers=-1), path.read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, name)
    behind = io.BytesIO(b"header" + contents)
    behind.seek(6)
    with open(path, "rb") as file, zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open(name) as member:
        forms = [contents, bytearray(contents), memoryview(contents), np.bytes_(contents), behind, file, member]
        forms += [{"bytes": contents, "path": "gone.wav"}, {"bytes": None, "path": str(path)}, {"path": path}]
        for form in forms:
            assert torch.equal(wav2vec2.extract(model, form, layers=-1, sample_rate=8000), expected)
        assert not file.closed
        with pytest.raises(UserError, match=r"input 0: has no bytes left, .* seek\(0\)"):
            wav2vec2.extract(model, file)
        file.seek(0)
        assert torch.equal(wav2vec2.extract(model, [path, file], layers=-1)[1], expected)


def test_text_is_no_audio(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(3000), 16_000)
    for encoding in ("utf-8", "latin-1"):
        with path.open(encoding=encoding) as file, pytest.raises(UserError, match=r"input 0: cannot be read .*'rb'"):
            wav2vec2.extract(random_model(small_config("hubert")), file)


@pytest.mark.parametrize("sample_rate", [16_000, 8_000, 44_100])
@pytest.mark.parametrize("num_seconds", [0.3, 4, 6.37])
def test_files_are_read_in_blocks(tmp_path, monkeypatch, sample_rate, num_seconds):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, int(num_seconds * sample_rate))
    soundfile.write(tmp_path / "a.wav", samples, sample_rate, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 2)
    torch.testing.assert_close(read_audio(tmp_path / "a.wav"), whole)


def test_file_cut_short(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 50_000), 16_000)
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(UserError, match=r"a.flac: (is cut short|cannot be decoded)"):
        audio.read_audio(path)
    with pytest.raises(audio.AudioError, match="no such file"), audio.checked_audio(tmp_path / "gone.flac"):
        pass
    with pytest.raises(audio.AudioError, match="cannot be decoded"), audio.checked_audio(path) as file:
        file.seek(49_000)


# What it needs

TORCH_ALONE = """
import sys
for name in ("numpy", "soundfile", "torchaudio", "transformers", "pytorch_lightning", "safetensors", "tqdm"):
    sys.modules[name] = None  # importing it fails
import torch, wav2vec2
torch.manual_seed(0)
model = wav2vec2.load(sys.argv[1])
print(tuple(wav2vec2.extract(model, torch.randn(20000), max_seconds=1, context_seconds=0.1).shape))
try:
    wav2vec2.extract(model, sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_torch_alone(tmp_path):
    path = save_small_model(tmp_path / "model.pth", "hubert", "base")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TORCH_ALONE, path], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    shape, error = result.stdout.splitlines()
    assert shape == "(4, 499, 16)"
    assert error == f"{path}: reading audio needs soundfile, which is missing; pip install soundfile"


@pytest.mark.slow
def test_docstrings():
    result = doctest.testmod(inference)
    assert result.attempted > 5
    assert result.failed == 0
