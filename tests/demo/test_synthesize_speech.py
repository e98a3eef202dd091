"""The demo's corpus: layout, labels, levels, voices, and the same files each time."""

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import run_command

from demo import synthesize_speech
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError

pytestmark = pytest.mark.slow

SPLITS = ("train-clean-100", "dev-clean")

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="eSpeak NG is not installed (pip install -r requirements-demo.txt)",
)


def synthesize(out: Path, *options: str) -> None:
    """In a process of its own: eSpeak NG can be initialised once."""
    result = run_command(sys.executable, "-m", "demo.synthesize_speech", "--out", out, *options)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest corpus: one utterance of every voice."""
    out = tmp_path_factory.mktemp("speech")
    synthesize(out, "--minutes", "0.1")
    return out


def transcripts(folder: Path) -> dict[str, str]:
    """Utterance to text of every transcript below a folder."""
    lines = [line for path in folder.rglob("*.trans.txt") for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(line.split(" ", 1) for line in lines)


@needs_espeak
def test_layout_and_audio(corpus):
    voices = set()
    for path in corpus.rglob("*.flac"):
        split, speaker, chapter, name = path.relative_to(corpus).parts
        assert split in SPLITS
        assert name.startswith(f"{speaker}-{chapter}-")
        voices.add((split, speaker))
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE, 1, "PCM_16")
        assert 3 <= info.duration <= 9
        audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        assert 0.03 < audio.square().mean().sqrt() < 0.09
        assert audio.abs().max() < 0.95
    assert len(voices) >= 20
    assert {split for split, _ in voices} == set(SPLITS)


@needs_espeak
def test_every_utterance_has_its_text_and_no_text_is_shared(corpus):
    texts = {}
    for split in SPLITS:
        labelled = transcripts(corpus / split)
        assert set(labelled) == {path.stem for path in (corpus / split).rglob("*.flac")}
        texts[split] = set(labelled.values())
        assert len(texts[split]) == len(labelled)
    assert not texts["train-clean-100"] & texts["dev-clean"]


@needs_espeak
def test_voices_differ_and_speech_is_the_same_each_time(tmp_path, corpus):
    synthesize(tmp_path / "again", "--minutes", "0.1")
    files = {path.relative_to(corpus): path.read_bytes() for path in corpus.rglob("*.*")}
    assert files == {
        path.relative_to(tmp_path / "again"): path.read_bytes() for path in (tmp_path / "again").rglob("*.*")
    }

    # One sentence by every voice, compared by its average spectrum.
    (tmp_path / "data").mkdir()
    espeak = synthesize_speech.Espeak(tmp_path / "data")
    spectra = []
    variants = synthesize_speech.TRAIN_VARIANTS + synthesize_speech.VALID_VARIANTS
    for speaker in synthesize_speech.make_speakers(variants, 1, seed=0):
        espeak.set_speaker(speaker)
        speech = espeak.say("the old lantern is near the harbour")
        spectrum = torch.stft(speech, 512, window=torch.hann_window(512), return_complex=True).abs().mean(1)
        spectra.append(spectrum / spectrum.norm())
    assert max(float(a @ b) for a, b in itertools.combinations(spectra, 2)) < 0.995


@needs_espeak
def test_unknown_voice_is_an_error(tmp_path):
    speaker = synthesize_speech.Speaker(1, "en-us+nobody", 150, 50, 50)
    with pytest.raises(UserError, match=r"en-us\+nobody.*requirements-demo\.txt"):
        synthesize_speech.Espeak(tmp_path).set_speaker(speaker)


def test_sentences_vary_and_follow_the_seed():
    def first(seed: int) -> list[str]:
        return list(itertools.islice(synthesize_speech.sentences(seed), 5000))

    assert (
        first(0)[0]
        == "so the soup was getting cold, a tired driver carried this shining garden gate on a foggy morning"
    )
    assert len(set(first(0))) == 5000
    assert first(0) == first(0) != first(1)
    assert not any(set(sentence) & set("{}|\n") for sentence in first(0))


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_must_be_positive(tmp_path, minutes):
    with pytest.raises(UserError, match="--minutes"):
        synthesize_speech.main(argparse.Namespace(out=str(tmp_path), minutes=float(minutes), seed=0))


def test_without_espeak_the_error_names_the_requirements(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-demo\.txt"):
        synthesize_speech.Espeak(tmp_path)
