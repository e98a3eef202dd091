"""Data and models meet here: no crop is shorter than a frame of the models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import error_line, run_to_exit, small_run

from training.data import SpeechDataModule
from training.settings import DataSettings
from wav2vec2.files.errors import UserError

SHORT, LONG = 399, 16_000


@pytest.fixture
def tsv_dir(tmp_path) -> Path:
    """Four training utterances, one of them short, and two for validation."""
    lengths = {"train": [LONG, SHORT, LONG, LONG], "valid": [LONG, LONG]}
    generator = np.random.default_rng(0)
    for subset, numbers in lengths.items():
        rows = [str(tmp_path)]
        for number, length in enumerate(numbers):
            soundfile.write(tmp_path / f"{subset}{number}.wav", 0.1 * generator.standard_normal(length), 16_000)
            rows.append(f"{subset}{number}.wav\t{length}")
        (tmp_path / f"{subset}.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def check(tsv_dir: Path, **settings: Any) -> None:
    SpeechDataModule(DataSettings(tsv_dir=tsv_dir, train_subset="train", **settings)).check_crops(400)


def test_crops_of_less_than_a_frame(tsv_dir):
    check(tsv_dir, min_seconds=0.025)
    check(tsv_dir, min_seconds=0.5, max_crop_seconds=0.025)
    with pytest.raises(UserError, match=r"--min_seconds 0 lets in .*train1\.wav, which has 399 .* give 0\.025 or more"):
        check(tsv_dir, min_seconds=0)
    with pytest.raises(UserError, match=r"--max_crop_seconds 0\.0249: 398 samples at 16 kHz, .* give 0\.025 or more"):
        check(tsv_dir, min_seconds=0.5, max_crop_seconds=0.0249)


def test_manifests_that_make_no_batches(tsv_dir):
    with pytest.raises(UserError, match=r"train\.tsv: none of 4 utterances lasts 2.* see --seconds_per_batch"):
        check(tsv_dir)
    (tsv_dir / "valid.tsv").rename(tsv_dir / "cv.tsv")
    with pytest.raises(UserError, match=r"valid\.tsv: no such file.* beside it: cv, train\); write it with"):
        check(tsv_dir, min_seconds=0.5)


def test_bad_files_are_counted_over_both_manifests(tsv_dir):
    for name in ("train0.wav", "valid0.wav"):
        (tsv_dir / name).unlink()
    check(tsv_dir, min_seconds=0.5, max_bad_files="2")
    with pytest.raises(UserError, match=r"--max_bad_files: at most 1 .* found 2: .*train0\.wav.*valid0\.wav: no such"):
        check(tsv_dir, min_seconds=0.5, max_bad_files="1")


@pytest.mark.slow
@pytest.mark.parametrize(("option", "changes"), [("min", {}), ("max_crop", {"max_crop_seconds": 0.002})])
def test_a_run_with_such_crops_does_not_begin(tsv_dir, small_teacher, monkeypatch, capsys, option, changes):
    (tsv_dir / "train.tsv").write_text((tsv_dir / "train.tsv").read_text().replace(str(SHORT), "30"))
    soundfile.write(tsv_dir / "train1.wav", np.full(30, 0.1), 16_000)  # the small model makes a frame of 85
    flags = [*small_run(tsv_dir, small_teacher, train_subset="train", min_seconds=0, **changes)]
    assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tsv_dir / "exp") == 1
    assert error_line(capsys).startswith(f"--{option}_seconds 0")
    assert not (tsv_dir / "exp").exists()
