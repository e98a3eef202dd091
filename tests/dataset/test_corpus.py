"""Finding, splitting and counting the audio of a corpus."""

from pathlib import Path

import numpy as np
import soundfile

from dataset.corpus import count_samples, find_audio, hold_out, split_by_folder
from prepare_data import LIBRISPEECH_SPLITS
from wav2vec2.audio import SAMPLE_RATE


def write_audio(path: Path, num_samples: int = 1600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(num_samples), SAMPLE_RATE)
    return path


def test_outermost_folder_decides():
    paths = ["train-clean-100/dev-1/a.flac", "speakers/dev-clean/train-clean-100/a.flac", "train-clean-100.flac"]
    assert split_by_folder(paths, LIBRISPEECH_SPLITS) == {
        "train100": paths[:1],
        "train960": paths[:1],
        "valid": paths[1:2],
    }


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "corpus"
    write_audio(tmp_path / "elsewhere" / "a.wav")
    write_audio(root / "b.wav")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "itself").symlink_to("itself")
    assert find_audio(str(root)) == (["b.wav", "linked/a.wav"], {})


def test_flac_file_cut_anywhere_is_left_out(tmp_path):
    path = write_audio(tmp_path / "a.flac", 20_000)
    contents = path.read_bytes()
    assert count_samples(str(path)) == (20_000, "")
    for size in [*range(len(contents) - 30, len(contents)), *range(100, len(contents), 997)]:
        path.write_bytes(contents[:size])
        num_samples, reason = count_samples(str(path))
        assert num_samples == 0 and ("cut short" in reason or "cannot be decoded" in reason)


def test_held_out_files():
    paths = [f"{number:03}.wav" for number in range(200)]
    splits = hold_out(paths, 0.05, seed=0)
    assert splits == hold_out(paths, 0.05, seed=0)
    assert splits != hold_out(paths, 0.05, seed=1)
    assert len(splits["valid"]) == 10
    assert sorted(splits["train"] + splits["valid"]) == paths
    assert hold_out(paths[:3], 0.05, seed=0)["valid"] != []
    # As the corpus grows, most held-out files stay held out.
    grown = hold_out([*paths, *(f"new{number}.wav" for number in range(20))], 0.05, seed=0)
    assert len(set(grown["valid"]) & set(splits["valid"])) >= 8
