"""The examples on generated audio: features on disk, and recognition of words whose letters are tones."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import error_line, load_as_others_do, run_script, run_to_exit, small_config

import wav2vec2
from examples import extract_features, finetune_ctc
from wav2vec2 import checkpoint
from wav2vec2.errors import UserError
from wav2vec2.model import wav2vec2_model

WORDS = ("ab", "ba", "cab", "abc", "b c")
FREQUENCIES = {"a": 300, "b": 1000, "c": 3000}


def spoken(word: str, generator: np.random.Generator) -> np.ndarray:
    """A tone of 0.1 s for each letter, silence for a space, with a pause behind each, in faint noise."""
    parts = []
    for letter in word:
        time = np.arange(1600) / 16_000
        parts += [0.3 * np.sin(2 * np.pi * FREQUENCIES.get(letter, 0) * time), np.zeros(800)]
    samples = np.concatenate([np.zeros(400), *parts])
    return samples + 0.003 * generator.standard_normal(len(samples))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A labelled TSV of the words, eight times for training and once for the test."""
    folder = tmp_path_factory.mktemp("words")
    generator = np.random.default_rng(0)
    rows = ["split\tpath\ttext"]
    for number in range(9):
        for word in WORDS:
            name = f"{word.replace(' ', '_')}-{number}.wav"
            soundfile.write(folder / name, spoken(word, generator), 16_000)
            rows.append(f"{'test' if number == 8 else 'train'}\t{name}\t{word}")
    (folder / "words.tsv").write_text("\n".join(rows) + "\n")
    return folder / "words.tsv"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """An untrained one with 320 samples a frame: a letter makes five frames, the pause behind it two or three."""
    torch.manual_seed(0)
    config = small_config(
        "hubert",
        extractor_conv_layer_config=[[64, 10, 5], [64, 8, 4], [64, 4, 4], [64, 4, 4]],
        encoder_embed_dim=64,
        encoder_head_dim=16,
        encoder_ff_interm_features=[64] * 3,
        encoder_layer_norm_first=True,
    )
    model = wav2vec2_model(**config)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": model.config})
    return path


@pytest.mark.slow
def test_finetune_and_transcribe(words, encoder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "words.pth"
    flags = ("--model", encoder, "--tsv", words, "--out", out, "--device", "cpu", "--num_workers", 0)
    more = ("--updates", 80, "--seconds_per_batch", 4, "--learning_rate", 0.003)
    run_script(monkeypatch, "examples.finetune_ctc", *flags, *more)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("update")]
    assert len(losses) == 10
    assert losses[-1] < 0.1 * losses[0]
    result = lines[-1]
    assert result.startswith("test: 5 utterances")
    cer, wer = (float(part.split("%")[0]) for part in result.split("error rate ")[1:])
    assert cer <= 10 and wer <= 20, result

    contents = torch.load(out, weights_only=True)
    assert contents["vocabulary"] == ["<blank>", " ", "a", "b", "c"]
    assert load_as_others_do(out).config["aux_num_out"] == 5
    before, after = torch.load(encoder, weights_only=True)["state_dict"], contents["state_dict"]
    for name, tensor in before.items():
        is_frozen = name.startswith("feature_extractor.")
        assert torch.equal(tensor, after[name]) or not is_frozen, name
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert wav2vec2.extract(wav2vec2.load(out), words.parent / "ab-8.wav", layers="output").shape[1] == 5

    paths = [words.parent / "cab-0.wav", words.parent / "b_c-1.wav"]
    run_script(monkeypatch, "examples.finetune_ctc", "--model", out, "--transcribe", *paths)
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert printed == [[str(paths[0]), "cab"], [str(paths[1]), "b c"]]


def test_finetune_in_bfloat16_from_a_tsv_without_splits(words, encoder, tmp_path, monkeypatch, capsys):
    rows = [line.split("\t")[1:] for line in words.read_text().splitlines()]
    labels = words.with_name("labels.tsv")
    labels.write_text("path\tlabel\n" + "".join(f"{path}\t{text}\n" for path, text in rows[1:21]))
    flags = ("--model", encoder, "--tsv", labels, "--out", tmp_path / "a.pth", "--device", "cpu")
    more = ("--num_workers", 0, "--updates", 3, "--precision", "bf16", "--seconds_per_batch", 4)
    run_script(monkeypatch, "examples.finetune_ctc", *flags, *more)
    assert "test: 2 utterances" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in wav2vec2.load(tmp_path / "a.pth").state_dict().values())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "found columns [], expected path, text"),
        ("file\ttext\na.wav\ta\n", "found columns ['file', 'text']"),
        ("path\ttext\tsplit\na.wav\ta\tdev\n", "line 2 is"),
        ("path\ttext\na.wav\n", "line 2 is"),
        ("path\ttext\na.wav\ta\n", "expected rows of both splits"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, contents, message):
    (tmp_path / "labels.tsv").write_text(contents)
    with pytest.raises(UserError) as error:
        finetune_ctc.read_labels(tmp_path / "labels.tsv")
    assert message in str(error.value)


def change_labels(words: Path, old: str, new: str) -> Path:
    labels = words.with_name("changed.tsv")
    labels.write_text(words.read_text().replace(old, new))
    return labels


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_clip_of_less_than_a_frame_is_found_before_the_training(words, encoder, tmp_path, monkeypatch, capsys, split):
    soundfile.write(words.with_name("short.wav"), np.zeros(10), 16_000)
    labels = change_labels(words, "split\tpath\ttext\n", f"split\tpath\ttext\n{split}\tshort.wav\tab\n")
    flags = ("--model", encoder, "--tsv", labels, "--out", tmp_path / "a.pth", "--device", "cpu", "--updates", 1)
    assert run_to_exit(monkeypatch, "examples.finetune_ctc", *flags, "--num_workers", 0) == 1
    printed = capsys.readouterr()
    assert "short.wav: has 10 samples at 16 kHz, expected at least 345" in printed.err
    assert "update" not in printed.out and not (tmp_path / "a.pth").exists()


def test_an_utterance_that_is_longer_than_a_batch(words, encoder, tmp_path, monkeypatch, capsys):
    flags = ("--model", encoder, "--tsv", words, "--out", tmp_path / "a.pth", "--device", "cpu")
    assert run_to_exit(monkeypatch, "examples.finetune_ctc", *flags, "--seconds_per_batch", 0.1) == 1
    assert "raise --seconds_per_batch" in error_line(capsys)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there(words, encoder, tmp_path, monkeypatch, capsys, device):
    for flags in (("--tsv", words, "--out", tmp_path / "a.pth"), ("--transcribe", words.parent / "ab-0.wav")):
        assert run_to_exit(monkeypatch, "examples.finetune_ctc", "--model", encoder, "--device", device, *flags) == 1
        assert error_line(capsys).startswith(f"--device {device}: ")


def test_transcribing_needs_a_fine_tuned_model(words, encoder, monkeypatch, capsys):
    arguments = ("--model", encoder, "--transcribe", words.parent / "ab-0.wav")
    assert run_to_exit(monkeypatch, "examples.finetune_ctc", *arguments) == 1
    assert "holds no vocabulary" in error_line(capsys)


def test_error_rate():
    assert finetune_ctc.error_rate(["one two", "three"], ["one too", "three four"]) == (1 + 5) / 12
    assert finetune_ctc.error_rate([["one", "two"], ["three"]], [["one", "too"], ["three", "four"]]) == 2 / 3


def test_tri_stage_rate():
    rates = [finetune_ctc.rate(update, 100) for update in range(100)]
    assert max(rates) == 1
    assert 0 < rates[0] < rates[8] < 1
    assert set(rates[10:49]) == {1}
    assert rates[60] > rates[98] > rates[99] == 0


# Features on disk


@pytest.fixture
def recordings(tmp_path) -> Path:
    folder = tmp_path / "audio"
    generator = np.random.default_rng(0)
    for name, length in (("a.wav", 8000), ("sub/b.flac", 5000), ("sub/c.d.wav", 20_000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, 0.1 * generator.standard_normal(length), 16_000)
    return folder


def arrays(out: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(out).as_posix(): np.load(path) for path in sorted(out.rglob("*.npy"))}


def test_extract_folder_and_manifest(recordings, encoder, tmp_path, monkeypatch, capsys):
    flags = ("--model", encoder, "--layers", "0,3", "--max_seconds", 20)
    run_script(monkeypatch, "examples.extract_features", *flags, "--audio", recordings, "--out", tmp_path / "out")
    assert "3 files written, 0 were there" in capsys.readouterr().out
    found = arrays(tmp_path / "out")
    assert list(found) == ["a.npy", "sub/b.npy", "sub/c.d.npy"]
    model = wav2vec2.load(encoder)
    for name, audio in zip(found, ("a.wav", "sub/b.flac", "sub/c.d.wav"), strict=True):
        expected = wav2vec2.extract(model, recordings / audio, layers=[0, 3])
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-4, atol=1e-4)

    manifest = tmp_path / "some.tsv"
    manifest.write_text(f"{recordings}\nsub/b.flac\t5000\n")
    run_script(monkeypatch, "examples.extract_features", *flags, "--audio", manifest, "--out", tmp_path / "other")
    assert list(arrays(tmp_path / "other")) == ["sub/b.npy"]


@pytest.mark.parametrize(("precision", "dtype"), [("16", np.float16), ("bf16", np.float32)])
def test_extract_in_half_precision(recordings, encoder, tmp_path, monkeypatch, precision, dtype):
    flags = ("--model", encoder, "--layers=-1", "--precision", precision, "--out", tmp_path / "out")
    run_script(monkeypatch, "examples.extract_features", *flags, "--audio", recordings / "a.wav")
    (array,) = arrays(tmp_path / "out").values()
    assert array.dtype == dtype and array.ndim == 2 and np.isfinite(array).all()


def test_extract_goes_on(recordings, encoder, tmp_path, monkeypatch, capsys):
    """Past files that cannot be used, and after an interruption, with what is there already."""
    (recordings / "sub" / "bad.wav").write_bytes(b"no audio")
    out = tmp_path / "out"
    flags = ("--model", encoder, "--audio", recordings, "--out", out)
    assert run_to_exit(monkeypatch, "examples.extract_features", *flags) == 1
    printed = capsys.readouterr()
    assert "3 files written" in printed.out
    assert "1 of 4 files could not be used" in printed.err
    path, reason = (out / "failed.tsv").read_text().rstrip("\n").split("\t")
    assert path == str(recordings / "sub" / "bad.wav") and "cannot be decoded" in reason

    (out / "sub" / "b.npy").unlink()
    before = (out / "a.npy").stat().st_mtime_ns
    soundfile.write(recordings / "sub" / "bad.wav", np.zeros(3000), 16_000)
    run_script(monkeypatch, "examples.extract_features", *flags)
    assert "2 files written, 2 were there" in capsys.readouterr().out
    assert len(arrays(out)) == 4 and not (out / "failed.tsv").exists()
    assert (out / "a.npy").stat().st_mtime_ns == before

    assert run_to_exit(monkeypatch, "examples.extract_features", *flags, "--layers", "1") == 1
    assert "holds features made with" in error_line(capsys)
    assert json.loads((out / "settings.json").read_text())["layers"] == "all"


def test_extract_refuses(recordings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file that libsndfile reads"):
        extract_features.find_jobs([tmp_path / "empty"], tmp_path / "out")
    soundfile.write(recordings / "a.flac", np.zeros(3000), 16_000)
    with pytest.raises(UserError, match="would both become"):
        extract_features.find_jobs([recordings], tmp_path / "out")
    (tmp_path / "outside.tsv").write_text(f"{recordings}\n../a.wav\t3000\n")
    with pytest.raises(UserError, match="lies outside of the corpus"):
        extract_features.find_jobs([tmp_path / "outside.tsv"], tmp_path / "out")
    with pytest.raises(UserError, match="--layers"):
        extract_features.parse_layers("first")
