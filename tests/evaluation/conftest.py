"""Audio and students that evaluations are tested on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_model, small_config

from lightning import make_projections
from wav2vec2.files import checkpoint

PITCHES = {"low": 200, "mid": 700, "high": 2500}
HUMS = (3200, 3900, 4600, 5300, 6000, 6900)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
    for number in range(30):
        split, speaker = ("train", number % 8) if number < 20 else ("test", 8 + number % 3)
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


@pytest.fixture(scope="session")
def save_student() -> Callable[..., Path]:
    def save(path: Path, mode: str | None, seed: int = 1, **changes: Any) -> Path:
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

    return save
