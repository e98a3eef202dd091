"""finetune.py: it learns each kind of list, what it does is what was asked for, and bad input gets one line."""

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import (
    assert_same_run,
    error_line,
    finetuning_run,
    last_checkpoint,
    logged,
    one_layer_config,
    random_model,
    run_script,
    run_to_exit,
    save_small_model,
    send,
    small_config,
)

import wav2vec2
from training import speed
from training.finetuning import BestModel, FinetuneModule, SpanMasking
from wav2vec2.fast import plain_paths
from wav2vec2.files import checkpoint
from wav2vec2.files.heads import contents_of
from wav2vec2.model import wav2vec2_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained one with 320 samples a frame: a letter makes five frames, the pause behind it two or three."""
    torch.manual_seed(0)
    config = small_config(
        "hubert",
        extractor_conv_layer_config=[[64, 10, 5], [64, 8, 4], [64, 4, 4], [64, 4, 4]],
        encoder_embed_dim=64,
        encoder_head_dim=16,
        encoder_ff_interm_features=[64] * 3,
        encoder_layer_norm_first=True,
        encoder_layer_drop=0.5,
    )
    model = wav2vec2_model(**config)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": model.config})
    return path


# --- what is learnt --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "bound"),
    [
        ("text", {"units": "characters"}, 15),
        ("clips", {"pooling": "attentive", "layers": "last"}, 90),
        ("segments", {"precision": "bf16"}, 90),
        ("verification", {}, 25),
    ],
)
def test_each_kind_is_learnt(labelled, encoder, tmp_path, monkeypatch, capsys, name, changes, bound):
    rates = {"max_updates": 60, "learning_rate": 0.01, "encoder_learning_rate": 0.003, "seconds_per_batch": 4}
    flags = finetuning_run(labelled / f"{name}.tsv", encoder, **rates, **changes, log_interval=10)
    run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path)
    printed = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "finetuned.json").read_text())
    score = result["test"]["value"]
    assert (score <= bound) if "error" in result["test"]["metric"] else (score >= bound), result
    assert f"test: {result['test']['metric']} {score:.2f}" in printed[-1]

    model = wav2vec2.load(tmp_path / "finetuned.pth")
    labels = {"text": " abc", "clips": "abc", "segments": "abc"}
    assert model.labels == tuple(labels.get(name, ("b c", "ba", "bac", "cab")))
    before = checkpoint.read_model_file(encoder)
    after = checkpoint.read_model_file(tmp_path / "finetuned.pth")
    changed = {key for key, value in before["state_dict"].items() if not torch.equal(value, after["state_dict"][key])}
    assert changed and not any(key.startswith("feature_extractor.") for key in changed)
    assert {**after["config"], "aux_num_out": None} == before["config"]  # layer drop and dropout, too
    assert (tmp_path / "best.pth").read_bytes() == (tmp_path / "finetuned.pth").read_bytes()
    rows = [float(row["valid_score"]) for row in logged(tmp_path) if "valid_score" in row]
    assert result["valid"]["value"] in rows and len(rows) > 1


def test_the_best_of_the_validations_is_kept(labelled, encoder, tmp_path, monkeypatch):
    """Not the last: here all of them are made up."""
    scores = iter([40.0, math.nan, 70.0, 60.0, 70.0])

    def validated(module: FinetuneModule) -> None:
        module.scores._results = []
        if not module.trainer.sanity_checking:
            module.valid_score = next(scores)
            found.append({name: value.clone() for name, value in module.model.state_dict().items()})

    found: list[dict[str, Any]] = []
    monkeypatch.setattr(FinetuneModule, "on_validation_epoch_end", validated)
    flags = finetuning_run(labelled / "clips.tsv", encoder, valid_interval=3, max_updates=13)
    run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path)
    assert next(scores, None) is None  # the last update was validated, too
    result = json.loads((tmp_path / "finetuned.json").read_text())
    assert (result["update"], result["valid"]["value"]) == (9, 70.0)
    kept = wav2vec2.load(tmp_path / "finetuned.pth").state_dict()
    assert torch.equal(kept["head.linear.weight"], found[2]["head.linear.weight"])


@pytest.mark.parametrize("more_is_better", [True, False])
def test_the_best_score(more_is_better):
    best = BestModel(SimpleNamespace(scores=SimpleNamespace(more_is_better=more_is_better)), Path("best.pth"), {})
    assert best.is_better(15)
    best.score = 15
    found = [best.is_better(score) for score in (10, 15, 20, math.nan)]
    assert found == [not more_is_better, False, more_is_better, False]


# --- what is frozen, and hidden --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_the_encoder_is_frozen_as_long_as_it_is_asked_for(labelled, tmp_path, monkeypatch, family):
    model = save_small_model(tmp_path / "model.pth", family, "large")
    before = {f"model.{key}": value for key, value in checkpoint.read_model_file(model)["state_dict"].items()}

    def changed(name: str, **changes: object) -> set[str]:
        flags = finetuning_run(labelled / "segments.tsv", model, max_updates=4, **changes)
        run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path / name)
        after = last_checkpoint(tmp_path / name)["state_dict"]
        return {key for key, value in after.items() if key not in before or not torch.equal(value, before[key])}

    head = {"model.head.layer_scores", "model.head.linear.weight", "model.head.linear.bias"}
    assert changed("always", freeze_updates="all") == head
    assert changed("long", freeze_updates=4) - {"masking.hidden_frame"} == head
    encoder = changed("short", freeze_updates=2) - head
    assert {key.split(".")[1] for key in encoder} == {"encoder", "hidden_frame"}
    assert len(encoder) > 20


def test_while_it_is_frozen_the_encoder_computes_as_in_use(labelled, tmp_path, monkeypatch):
    """Without dropout, and nothing hidden: with no noise at all the losses are the same."""
    losses = {}
    for name, dropout, mask_prob in (("noisy", 0.5, 0.5), ("plain", 0.0, 0.0)):
        torch.manual_seed(0)
        model = save_small_model(tmp_path / f"{name}.pth", "hubert", "base", encoder_projection_dropout=dropout)
        flags = finetuning_run(labelled / "clips.tsv", model, mask_prob=mask_prob, freeze_updates=3, max_updates=5)
        run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path / name)
        losses[name] = [row["train_loss"] for row in logged(tmp_path / name) if "train_loss" in row]
    assert losses["noisy"][:3] == losses["plain"][:3] and losses["noisy"][3:] != losses["plain"][3:]


def test_hidden_spans():
    masking = SpanMasking(0.2, 5, 4)
    torch.manual_seed(0)
    hidden = masking.draw([40, 7, 400] * 200)
    assert hidden.shape == (600, 400) and not hidden[1::3, 7:].any() and not hidden[0::3, 40:].any()
    assert 0.1 < hidden[2::3].double().mean() < 0.2  # spans overlap
    assert 0.1 < hidden[1::3, :7].double().mean() < 0.3  # short rows have their share
    torch.manual_seed(0)
    assert torch.equal(hidden, masking.draw([40, 7, 400] * 200))
    for num_frames in ([1], [1, 1], [3, 2], [6]):
        assert masking.draw(num_frames).shape == (len(num_frames), max(num_frames))


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("text", "large", {"freeze_updates": 5, "valid_interval": 3}),
        ("clips", "base", {"accum_grad": 2, "pooling": "attentive", "save_interval": 2}),
        ("segments", "large", {"freeze_updates": "all", "layers": "weighted"}),
    ],
)
def test_stopped_at_any_update(labelled, tmp_path, monkeypatch, disturb, name, size, changes):
    """While the encoder is frozen and behind that, beside a validation or not: resumed, the run is the same."""
    model = save_small_model(tmp_path / "model.pth", "hubert", size)
    flags = finetuning_run(labelled / f"{name}.tsv", model, max_updates=14, **changes)
    run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path / "whole")
    flags += ["--exp_dir", tmp_path / "stopped", "--resume_checkpoint", "auto"]
    for update in (3, 10):  # at a validation, and elsewhere
        disturb.at[update] = send(signal.SIGTERM)
        assert run_to_exit(monkeypatch, "finetune", *flags) == 143
        assert last_checkpoint(tmp_path / "stopped")["global_step"] == update
    run_script(monkeypatch, "finetune", *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    for file in ("best.pth", "finetuned.pth", "finetuned.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


@pytest.mark.slow
def test_killed_during_a_validation(labelled, small_teacher, tmp_path, monkeypatch):
    """The best score is that of a run that was not."""
    flags = finetuning_run(labelled / "text.tsv", small_teacher, valid_interval=3, save_interval=1, max_updates=9)
    run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path / "whole")
    original = FinetuneModule.on_validation_epoch_end

    def kill(module: FinetuneModule) -> None:
        original(module)
        if module.global_step == 6:
            raise KeyboardInterrupt  # where a kill would strike

    flags += ["--exp_dir", tmp_path / "killed", "--resume_checkpoint", "auto"]
    with monkeypatch.context() as context:
        context.setattr(FinetuneModule, "on_validation_epoch_end", kill)
        assert run_to_exit(context, "finetune", *flags) != 0
    assert last_checkpoint(tmp_path / "killed")["global_step"] == 5
    run_script(monkeypatch, "finetune", *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole" / "best.pth").read_bytes() == (tmp_path / "killed" / "best.pth").read_bytes()


def test_a_finished_run_is_not_run_again_but_finished_if_it_is_not(
    labelled, small_teacher, tmp_path, monkeypatch, capsys
):
    flags = finetuning_run(labelled / "clips.tsv", small_teacher, max_updates=2)
    flags += ["--exp_dir", tmp_path, "--resume_checkpoint", "auto"]
    run_script(monkeypatch, "finetune", *flags)
    files = {name: (tmp_path / name).read_bytes() for name in ("finetuned.pth", "finetuned.json")}
    run_script(monkeypatch, "finetune", *flags)
    assert "complete already" in capsys.readouterr().out.splitlines()[-1]
    for name, contents in files.items():
        (tmp_path / name).unlink()
        run_script(monkeypatch, "finetune", *flags)
        assert (tmp_path / name).read_bytes() == contents
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "finetune", *flags, "--seed", 3) == 1
    assert "made with other settings: seed: 2022 there, 3 now" in error_line(capsys)
    (tmp_path / "best.pth").unlink()
    (tmp_path / "finetuned.pth").unlink()
    assert run_to_exit(monkeypatch, "finetune", *flags) == 1
    assert error_line(capsys).startswith(f"{tmp_path / 'best.pth'}: is gone")


@pytest.mark.slow
def test_what_does_not_belong_to_the_run(labelled, small_teacher, tmp_path, monkeypatch, capsys, disturb):
    flags = finetuning_run(labelled / "clips.tsv", small_teacher, max_updates=4, valid_interval=1, mask_prob=0)
    disturb.at[2] = send(signal.SIGTERM)
    assert run_to_exit(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path) == 143
    path, odd = tmp_path / "ckpts" / "last.ckpt", tmp_path / "odd.ckpt"
    flags += ["--exp_dir", tmp_path / "other", "--resume_checkpoint"]
    # Frozen, the encoder has no parameters in the optimiser.
    assert run_to_exit(monkeypatch, "finetune", *flags, path, "--freeze_updates", "all") == 1
    assert f"{path}: optimizer_states: param_groups: expected 1 entries, found 2" in capsys.readouterr().err
    for part, name, value, message in (
        ("callbacks", "BestModel", {"score": "x"}, "BestModel: score: expected a number, found 'x'"),
        ("state_dict", "masking.x", torch.ones(1), "weights do not fit the model: 0 missing, 1 left over (x)"),
        ("state_dict", "y", torch.ones(1), "weights do not fit the model: 0 missing, 1 left over (y)"),
    ):
        contents = last_checkpoint(tmp_path)
        contents[part][name] = value
        torch.save(contents, odd)
        assert run_to_exit(monkeypatch, "finetune", *flags, odd) == 1
        error = error_line(capsys)
        assert error.startswith(str(odd)) and message in error
    best = checkpoint.read_model_file(tmp_path / "best.pth")
    checkpoint.save(tmp_path / "best.pth", {**best, "made_by": {"update": 1, "metric": 2}})
    flags = [*flags[:-2], tmp_path, "--resume_checkpoint", "auto"]
    monkeypatch.setattr(FinetuneModule, "on_validation_epoch_end", lambda module: None)  # no score is better
    assert run_to_exit(monkeypatch, "finetune", *flags) == 1
    assert "best.pth: made_by: expected all that this run saves, found 1 missing (valid)" in error_line(capsys)


def test_a_best_model_that_cannot_be_saved(labelled, small_teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "best.pth").mkdir()
    flags = finetuning_run(labelled / "clips.tsv", small_teacher, max_updates=2)
    assert run_to_exit(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path) == 1
    message = error_line(capsys)
    assert message.startswith(f"{tmp_path / 'best.pth'}: could not be written ([Errno 21] Is a directory")
    assert message.endswith("mend that, or give another place; then continue with --resume_checkpoint auto")


def test_a_checkpoint_of_another_stage(labelled, small_teacher, tmp_path, monkeypatch, capsys):
    flags = finetuning_run(labelled / "clips.tsv", small_teacher, max_updates=2)
    run_script(monkeypatch, "finetune", *flags, "--exp_dir", tmp_path)
    last = tmp_path / "ckpts" / "last.ckpt"
    prune = ("--distilled_ckpt", last, "--original_ckpt", small_teacher)
    assert run_to_exit(monkeypatch, "prune", *prune) == 1
    assert error_line(capsys) == (
        f"{last}: a training checkpoint of finetune.py where a training checkpoint (.ckpt) of distill.py or "
        "final_distill.py is wanted"
    )


def test_a_head_for_the_same_labels_is_trained_further(labelled, small_teacher, tmp_path, monkeypatch, capsys):
    first = finetuning_run(labelled / "clips.tsv", small_teacher, max_updates=2)
    run_script(monkeypatch, "finetune", *first, "--exp_dir", tmp_path / "first")
    model = tmp_path / "first" / "finetuned.pth"
    for name, flags, head in (
        ("same", {}, "its own"),
        ("other", {"pooling": "attentive"}, "a fresh"),
        ("text", {}, "a fresh"),
    ):
        capsys.readouterr()
        tsv = labelled / f"{'text' if name == 'text' else 'clips'}.tsv"
        run = finetuning_run(tsv, model, max_updates=2, learning_rate=1e-9, encoder_learning_rate=1e-9, **flags)
        run_script(monkeypatch, "finetune", *run, "--exp_dir", tmp_path / name)
        assert f"; {head} head" in capsys.readouterr().out
    one, other = (wav2vec2.load(tmp_path / name / "finetuned.pth").head.linear.weight for name in ("first", "same"))
    torch.testing.assert_close(one, other)
    assert wav2vec2.load(tmp_path / "text" / "finetuned.pth").head is None


@pytest.mark.parametrize("flag", ["--compile", "--checkpoint_activations", ""])
def test_other_ways_to_the_same(labelled, tmp_path, monkeypatch, flag):
    """Compiled, with recomputed activations, or on the plain paths."""
    monkeypatch.setattr(speed, "COMPILER", "eager")
    model = random_model(one_layer_config("hubert") | {"encoder_dropout": 0.1})
    checkpoint.save(tmp_path / "model.pth", contents_of(model))
    name = "clips" if flag == "--compile" else "segments"
    run = finetuning_run(labelled / f"{name}.tsv", tmp_path / "model.pth", max_updates=3, freeze_updates=1)
    run_script(monkeypatch, "finetune", *run, "--exp_dir", tmp_path / "one")
    with plain_paths(not flag):
        run_script(monkeypatch, "finetune", *run, *filter(None, [flag]), "--exp_dir", tmp_path / "other")
    one, other = (last_checkpoint(tmp_path / folder)["state_dict"] for folder in ("one", "other"))
    torch.testing.assert_close(dict(one), dict(other), atol=2e-4, rtol=0)


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("clips", {"units": "characters"}, "--units characters: is for lists with the column text; "),
        ("segments", {"pooling": "mean"}, "--pooling mean: is for lists with the column label and without start"),
        ("text", {"pooling": "attentive"}, "--pooling attentive: is for lists"),
        ("text", {"layers": "weighted"}, "--layers weighted: is for lists with the column label (of text the last"),
        ("clips", {"freeze_updates": "-1"}, "--freeze_updates: expected a number of updates, or all, found '-1'"),
        ("clips", {"mask_prob": 1}, "--mask_prob: expected a number from 0 to below 1"),
        ("clips", {"mask_length": 0}, "--mask_length: expected a number above 0"),
        ("clips", {"seconds_per_batch": 0.2}, " lasts 0."),
        ("clips", {"accum_grad": 1, "warmup_updates": 7}, "--warmup_updates 7 is above --max_updates 6"),
    ],
)
def test_options_that_do_not_fit(labelled, small_teacher, tmp_path, monkeypatch, capsys, name, flags, message):
    run = finetuning_run(labelled / f"{name}.tsv", small_teacher, **flags)
    assert run_to_exit(monkeypatch, "finetune", *run, "--exp_dir", tmp_path / "exp") == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "exp").exists()


def test_rows_that_cannot_be_used(labelled, small_teacher, tmp_path, monkeypatch, capsys):
    """The line is named."""
    lines = (labelled / "text.tsv").read_text().splitlines()
    soundfile.write(labelled / "new.wav", np.zeros(4000), 16_000)  # frames are of 40 samples
    tsv = labelled / "changed.tsv"
    tsv.write_text("\n".join([*lines, "train\tnew.wav\t" + "ab " * 60]) + "\n")
    run = finetuning_run(tsv, small_teacher)
    assert run_to_exit(monkeypatch, "finetune", *run, "--exp_dir", tmp_path / "exp") == 1
    line = error_line(capsys)
    assert line.startswith(f"{tsv}: line {len(lines) + 1}") and "needs 119 frames (60 units, 59 blanks" in line
    assert not (tmp_path / "exp").exists()


def test_segments_between_frames(labelled, small_teacher, tmp_path, monkeypatch, capsys):
    lines = (labelled / "segments.tsv").read_text().splitlines()
    rows = [line for line in lines if not line.startswith("valid")]
    tsv = labelled / "between.tsv"
    tsv.write_text("\n".join([*rows, "valid\tab-4.wav\t0.1\t0.1001\ta"]) + "\n")
    assert run_to_exit(monkeypatch, "finetune", *finetuning_run(tsv, small_teacher), "--exp_dir", tmp_path) == 1
    assert "no segment of the valid clips holds the middle of a frame" in error_line(capsys)
