"""Batches of labelled audio hold whole clips with their own targets, whatever becomes of a file."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dataset.batches import BatchSampler, Crop, make_batches
from labels.batches import FrameTimes, LabelledBatch, LabelledDataset, checked_lengths
from labels.lists import read_probe
from wav2vec2.files.errors import UserError

FRAMES = FrameTimes(hop=320, window=400)
LENGTHS = (4000, 2000, 6000, 3000, 5000, 2500, 3500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files of a constant each, a hundredth of their number (one more, so that none is silent)."""
    for number, length in enumerate(LENGTHS):
        soundfile.write(tmp_path / f"{number}.wav", np.full(length, (number + 1) / 100), 16_000, subtype="FLOAT")
    return tmp_path


def dataset_of(folder: Path, header: str, *rows: str, units: str = "words") -> LabelledDataset:
    path = folder / "list.tsv"
    path.write_text("\n".join(line.replace(" ", "\t").replace("_", " ") for line in (header, *rows)))
    probe = read_probe(path, units)
    checked_lengths(probe, probe.test, FRAMES, 1e9)
    lengths = checked_lengths(probe, probe.train, FRAMES, 1e9)
    return LabelledDataset(probe.kind, probe.train, lengths, FRAMES)


TEXTS = ("b_a", "a", "a_b_a", "b", "a", "b", "a")
TEXT = [f"{'test' if number == 6 else 'train'} {number}.wav {text}" for number, text in enumerate(TEXTS)]


def whole(*indices: int) -> Crop:
    return Crop(indices, (0,) * len(indices), 0, 5, False)


def read_rows(batch: LabelledBatch) -> list[int]:
    """The number of the file in each row, which is one constant up to its length and zero behind it."""
    numbers = []
    for row, length in zip(batch.waveforms, batch.lengths, strict=True):
        (value,) = row[:length].unique().tolist()
        assert not row[length:].any()
        numbers.append(round(100 * value) - 1)
    return numbers


def test_whole_clips_with_their_units(folder):
    batch = dataset_of(folder, "split path text", *TEXT)[whole(2, 0, 1)]
    assert read_rows(batch) == [2, 0, 1] and batch.num_samples == batch.lengths.tolist() == [6000, 4000, 2000]
    assert batch.targets.tolist() == [[0, 1, 0], [1, 0, -1], [0, -1, -1]]
    assert (batch.indices, batch.seed, batch.weight, batch.bad_files) == ([2, 0, 1], 5, 3, {})


def test_labels_of_clips_and_of_frames(folder):
    rows = [f"train {number}.wav {'ab'[number % 2]}" for number in range(6)]
    assert dataset_of(folder, "split path label", *rows, "test 6.wav a")[whole(0, 3)].targets.tolist() == [[0], [1]]
    rows = ["train 0.wav 0.03 0.1 b", "train 0.wav 0 0.03 a", "train 1.wav 0.04 0.05 b", "test 6.wav 0 0.1 a"]
    targets = dataset_of(folder, "split path start end label", *rows)[whole(0, 1)].targets
    # Frames of 25 ms every 20 ms: their middles are at 12.5, 32.5, 52.5 ms, and so on.
    assert targets.tolist() == [[0, *[1] * 4, *[-1] * 7], [-1] * 12]


@pytest.mark.parametrize("damage", ["missing", "cut", "not a number"])
def test_a_file_that_goes_bad_is_replaced_with_its_label(folder, damage):
    """By the next longer clip, after the longest by the shortest."""
    dataset = dataset_of(folder, "split path text", *TEXT)
    for number in (2, 3):
        path, samples = folder / f"{number}.wav", np.full(LENGTHS[number], 0.1, np.float32)
        samples[-1] = np.nan
        path.unlink()
        if damage != "missing":
            samples = samples[:-1] if damage == "cut" else samples
            soundfile.write(path, samples, 16_000, subtype="FLOAT")
    batch = dataset[whole(2, 3, 5)]
    assert read_rows(batch) == [1, 0, 5]
    assert batch.targets.tolist() == [[0, -1], [1, 0], [1, -1]] and batch.indices == [2, 3, 5]
    assert batch.paths == [str(folder / f"{number}.wav") for number in (1, 0, 5)]
    assert list(batch.bad_files) == [str(folder / f"{number}.wav") for number in (2, 3)]


def test_silence_is_a_label_as_others(folder):
    soundfile.write(folder / "1.wav", np.zeros(LENGTHS[1]), 16_000)
    batch = dataset_of(folder, "split path text", *TEXT)[whole(1)]
    assert not batch.bad_files and not batch.waveforms.any()


def test_the_sampler_takes_clips_whole():
    batches = make_batches(LENGTHS, max_tokens=8000)
    one = BatchSampler(LENGTHS, batches, 1, 0, shuffle=True, seed=1, accum_grad=2, whole=True)
    two = [BatchSampler(LENGTHS, batches, 2, rank, shuffle=True, seed=1, whole=True) for rank in (0, 1)]
    crops = list(one)
    assert crops == [crop for pair in zip(*two, strict=True) for crop in pair]
    for crop in crops:
        assert crop.num_samples == max(LENGTHS[index] for index in crop.indices) and not any(crop.offsets)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (3, "train\t1.wav\ta a a", r"line 3: the text needs 5 frames \(3 units, 2 blanks .*1.wav makes 4"),
        (8, "test\t6.wav\ta c", "line 8: its unit 2, 'c', is in no training text"),
        (2, "train\t0.wav\t ", "line 2 has no text"),
        (4, "train\t2.txt\ta", r"line 4: .*2\.txt: cannot be decoded"),
        (5, "train\ttiny.wav\ta", r"line 5: .*tiny\.wav has 399 samples .*expected 400 or more"),
    ],
)
def test_rows_that_cannot_be_learnt(folder, line, text, message):
    soundfile.write(folder / "tiny.wav", np.zeros(399), 16_000)
    (folder / "2.txt").write_text("no audio")
    soundfile.write(folder / "1.wav", np.zeros(400 + 3 * 320), 16_000)
    rows = ["split path text", *TEXT]
    rows[line - 1] = text.replace(" ", "_").replace("\t", " ")
    with pytest.raises(UserError, match=rf"list\.tsv: {message}"):
        dataset_of(folder, *rows)


def test_characters_that_training_does_not_have(folder):
    rows = ["train 0.wav ab_c", "train 1.wav ba", "test 6.wav ab_d"]
    with pytest.raises(UserError, match=r"line 4: its unit 4, 'd', is in no training text"):
        dataset_of(folder, "split path text", *rows, units="characters")


def test_an_utterance_that_no_batch_holds(folder):
    dataset_of(folder, "split path text", *TEXT)
    probe = read_probe(folder / "list.tsv")
    with pytest.raises(UserError, match=r"line 4: .*2\.wav lasts 0\.38 s, a batch holds 0\.3 s; raise --seconds_per"):
        checked_lengths(probe, probe.train, FRAMES, 4800)


def test_times_of_frames():
    assert [FRAMES.count(n) for n in (0, 399, 400, 719, 720)] == [0, 0, 1, 1, 2]
    torch.testing.assert_close(FRAMES.middles(3), torch.tensor([0.0125, 0.0325, 0.0525]))
