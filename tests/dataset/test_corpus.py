"""Finding, splitting and counting the audio of a corpus."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dataset import corpus
from dataset.corpus import count_all, count_samples, find_audio, hold_out, split_by_folder, store_of
from prepare_data import LIBRISPEECH_SPLITS
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError


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
    (root / "gone").symlink_to("nowhere")
    found = find_audio(str(root))
    assert found.audio == ["b.wav", "linked/a.wav"]
    assert found.repeated == ["linked/back/"]
    assert found.unreadable == dict.fromkeys(("itself", "gone"), "a link that leads nowhere")


def test_folders_that_lead_to_each_other_are_read_once(tmp_path):
    for number in range(12):  # 12! ways
        write_audio(tmp_path / str(number) / "a.wav")
        for other in range(12):
            (tmp_path / str(number) / f"to{other}").symlink_to(f"../{other}")
    assert sorted(find_audio(str(tmp_path)).audio) == sorted(f"{number}/a.wav" for number in range(12))


def test_the_name_without_links_counts_and_else_the_first(tmp_path):
    write_audio(tmp_path / "corpus/z/a.wav")
    write_audio(tmp_path / "elsewhere/b.wav")
    for name, target in (("a", "z"), ("n", "../elsewhere"), ("m", "../elsewhere")):
        (tmp_path / "corpus" / name).symlink_to(target)
    found = find_audio(str(tmp_path / "corpus"))
    assert (found.audio, sorted(found.repeated)) == (["m/b.wav", "z/a.wav"], ["a/", "n/"])


def test_a_file_counts_under_each_of_its_names(tmp_path):
    write_audio(tmp_path / "a.wav")
    os.link(tmp_path / "a.wav", tmp_path / "b.wav")
    (tmp_path / "c.wav").symlink_to("a.wav")
    (tmp_path / "itself.wav").symlink_to("itself.wav")
    found = find_audio(str(tmp_path))
    assert found.audio == ["a.wav", "b.wav", "c.wav", "itself.wav"]  # the last is rejected when it is counted
    assert not found.unreadable


def test_what_is_hidden_or_the_systems_own_is_passed_over(tmp_path):
    root = tmp_path / ".cache" / "corpus"  # what lies above does not count
    names = ".a.wav ._b.wav .ipynb_checkpoints/c.wav __MACOSX/._d.wav @eaDir/e.wav $RECYCLE.BIN/f.wav lost+found/g.wav"
    for name in [*names.split(), "h.wav", "not.hidden/i.wav"]:
        write_audio(root / name)
    (root / ".link").symlink_to("nowhere")
    assert find_audio(str(root)) == (["h.wav", "not.hidden/i.wav"], {}, {}, {}, [], {})


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    write_audio(tmp_path / "a.wav")
    write_audio(tmp_path / Path(*5 * ["n" * 120]) / "b.wav")
    monkeypatch.chdir(tmp_path)
    for _ in range(40):  # more than the 4,096 bytes that a path may have
        Path("n" * 120).mkdir(exist_ok=True)
        os.chdir("n" * 120)
    os.chdir(tmp_path)
    found = find_audio(str(tmp_path))
    assert found.audio == ["a.wav", 5 * f"{'n' * 120}/" + "b.wav"]
    ((path, reason),) = found.unreadable.items()
    assert path in 40 * f"{'n' * 120}/" and reason == os.strerror(errno.ENAMETOOLONG)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wav.scp", "Kaldi"),
        ("raw_wav.1.ark", "Kaldi"),
        ("cuts_train.jsonl.gz", "lhotse"),
        ("train-00000-of-00002.parquet", "datasets"),
        ("dev-clean.tar.gz", "compressed tar"),
        ("corpus.7z", "compressed"),
        ("a.wav.gz", "compressed"),
        ("clips.npz", "arrays"),
        ("wav", ""),
    ],
)
def test_other_stores_are_named(name, kind):
    assert store_of(name).startswith(kind) and bool(store_of(name)) == bool(kind)


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


@pytest.fixture
def counts(tmp_path, monkeypatch) -> Callable[..., dict[str, tuple[int, str]]]:
    """Count twenty files in processes in which ``read`` is called with the path of each."""
    forked = partial(corpus.ProcessPoolExecutor, mp_context=multiprocessing.get_context("fork"))
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", forked)

    def count(read: Callable[[str], None], num_workers: int = 2, num_files: int = 20) -> dict[str, tuple[int, str]]:
        monkeypatch.setattr(corpus, "count_samples", lambda path: read(path) or (1600, ""))
        names = [f"{number:02}.wav" for number in range(num_files)]
        found = list(count_all(str(tmp_path), names, num_workers))
        assert sorted(name for name, _ in found) == sorted(names)
        return dict(found)

    return count


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_file_that_ends_the_process_is_rejected_and_the_others_are_counted(counts, signum):
    def crash(path: str) -> None:
        if path.endswith(("/03.wav", "/17.wav")):
            os.kill(os.getpid(), signum)

    for num_workers in (1, 3):
        found = counts(crash, num_workers, 200)
        assert {name for name, (num_samples, _) in found.items() if not num_samples} == {"03.wav", "17.wav"}
        assert "reading it ends the process" in found["03.wav"][1]


def test_a_file_is_at_fault_only_if_it_ends_a_process_of_its_own(counts, tmp_path):
    """The kernel may have chosen the process for the memory of another."""

    def crash_once(path: str) -> None:
        if path.endswith("05.wav") and not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            os._exit(3)

    assert set(counts(crash_once).values()) == {(1600, "")}


def test_every_file_may_end_the_process(counts):
    assert {reason for _, reason in counts(lambda path: os._exit(3)).values()} == {
        "reading it ends the process: its decoder crashes, or memory runs out"
    }


def test_an_error_of_a_process_reaches_the_main_one(counts):
    def fail(path: str) -> None:
        raise UserError(f"{path}: reading audio needs soundfile")

    with pytest.raises(UserError, match="needs soundfile"):
        counts(fail)
    assert not multiprocessing.active_children() or all(
        child.join(10) is None for child in multiprocessing.active_children()
    )
