"""make_student.py: students of another shape, from their file through every stage, and a light extractor's training."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    SMALL_LIGHT_LAYERS,
    error_line,
    last_checkpoint,
    load_as_others_do,
    logged,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    save_small_model,
    send,
    small_config,
    small_run,
    start_ranks,
)

from s3prl_upstream.expert import UpstreamExpert
from wav2vec2 import extract, load, stream
from wav2vec2.config import PRUNING_UNITS
from wav2vec2.files import checkpoint

STUDENT = {"encoder_num_layers": 2, "encoder_embed_dim": 8, "encoder_ff_interm_features": 150}


def write(folder: Path, changes: Any) -> Path:
    path = folder / "student.json"
    path.write_text(json.dumps(changes))
    return path


def extractor_run(manifests: Path, model: Path, exp_dir: Path, **changes: object) -> list[object]:
    """Flags that train a light extractor in a second."""
    flags = {"teacher_ckpt": None, "student_ckpt": None, "distill_layers": None, "model": model, "exp_dir": exp_dir}
    return small_run(manifests, model, extractor=json.dumps(SMALL_LIGHT_LAYERS), **flags | changes)


# --- flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to make: give --student_config, --init_layers, --extractor or --streaming"),
        *(
            (["--init_layers", layers], "--init_layers: expected random, or layers from 1 such as 1,2, found")
            for layers in ("", "0", "1,,2", "first", "1;2", "-1", "1.2", "٣", "1, 2")
        ),
        *(
            (["--extractor", text], "--extractor: expected light, or a list of layers in JSON such as")
            for text in ("", "Light", "{}", "null", "7", "[[", "NaN", "[" * 100_000)
        ),
        (["--extractor", "light"], "--tsv_dir: is not given"),
        (["--extractor", "light", "--tsv_dir", "x", "--max_updates", 0], "--max_updates: expected a number above 0"),
        (
            ["--extractor", "light", "--tsv_dir", "x", "--max_updates", 9],
            "--warmup_updates 400 is above --max_updates 9",
        ),
        (["--student_config", "none.json"], "none.json: no such file; expected JSON of the config's keys"),
        (["--student_config", "bad.json"], "bad.json: not readable as JSON"),
        (["--student_config", "list.json"], "list.json: expected a JSON object"),
        (["--left_frames", 8], "--left_frames 8: is for a student that streams; give --streaming too"),
        *((["--streaming", chunk], "--streaming: expected a number above 0, found") for chunk in (0, -3)),
        (["--streaming", 4, "--left_frames", -1], "--left_frames: expected 0 or more, found -1"),
        (["--streaming", 4], "--tsv_dir: is not given; the model's norm, where it has heard little"),
        (["--streaming", 2**21, "--tsv_dir", "x"], "x/train100.tsv: "),
        (
            ["--streaming", 4, "--left_frames", 2**21],
            "--streaming: no model can be built from its config: encoder_left",
        ),
        (["--streaming", 4, "--extractor", "light"], "--tsv_dir: is not given"),
        (
            ["--student_config", "chunks.json"],
            "encoder_left_frames: not for a slice; give --streaming and --left_frames",
        ),
        (
            ["--init_layers", "1,9"],
            "--init_layers: expected 2 layers, one for each of the student's, from 1 to 3; found 1, 9",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_flags(small_teacher, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[2]")
    (tmp_path / "chunks.json").write_text('{"encoder_left_frames": 8}')
    flags = [tmp_path / flag if str(flag).endswith(".json") else flag for flag in flags]
    base = ("--model", small_teacher, "--exp_dir", tmp_path / "exp", "--accelerator", "cpu")
    assert run_to_exit(monkeypatch, "make_student", *base, *flags) == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "exp").exists()


def test_made_once(small_teacher, tmp_path, monkeypatch, capsys):
    """The same student, whatever its JSON is called and in whatever order its keys are; another one takes its place."""
    one, other, out = tmp_path / "one.json", tmp_path / "other.json", tmp_path / "exp/student.pth"
    one.write_text('{"encoder_num_layers": 2, "encoder_embed_dim": 8}')
    other.write_text('{\n"encoder_embed_dim": 8, "encoder_num_layers": 2}\n')
    flags = ("--model", small_teacher, "--exp_dir", tmp_path / "exp", "--init_layers", "random")
    run_script(monkeypatch, "make_student", *flags, "--student_config", one)
    printed, first = capsys.readouterr().out, out.read_bytes()
    assert "fresh layers (--init_layers random)" in printed and f"parameters: {out}" in printed
    run_script(monkeypatch, "make_student", *flags, "--student_config", other)
    assert capsys.readouterr().out == f"made already, from the same files with the same settings: {out}\n"
    for changes in ((), ("--seed", 5)):
        out.unlink()
        run_script(monkeypatch, "make_student", *flags, "--student_config", one, *changes)
        assert (out.read_bytes() == first) == (not changes)
    run_script(monkeypatch, "make_student", *flags, "--student_config", write(tmp_path, {"encoder_num_layers": 1}))
    assert load_as_others_do(out).config["encoder_num_layers"] == 1


# --- through the stages ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("hubert", "base"), ("wavlm", "large")])
def test_every_stage(manifests, tmp_path, monkeypatch, capsys, family, size):
    """With masks on it, and without pruning: each file loads strictly and has the shape that was asked for."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size, encoder_ff_interm_features=[200] * 3)
    run = {"distill_mode": "predlayer", "distill_layers": "1,3", "max_updates": 3}
    student = tmp_path / "student/student.pth"
    flags = ("--student_config", write(tmp_path, STUDENT), "--init_layers", "1,3")
    run_script(monkeypatch, "make_student", "--model", teacher, *flags, "--exp_dir", tmp_path / "student")
    masked, final, alone = (tmp_path / name / "ckpts/last.ckpt" for name in ("exp", "exp/final", "alone/final"))
    flags = small_run(manifests, teacher, student_ckpt=student, **run)
    pruning = ("--pruning_units", "conv,head,interm", "--target_sparsity")
    assert run_to_exit(monkeypatch, "distill", *flags, *pruning, 0.3, "--exp_dir", tmp_path / "exp") == 1
    message = r"--target_sparsity 0.3: the student starts without 0\.\d{4} of the teacher's .*; raise"
    assert re.search(message, error_line(capsys)) and not (tmp_path / "exp").exists()
    run_script(monkeypatch, "distill", *flags, *pruning, 0.8, "--exp_dir", tmp_path / "exp")
    run_script(monkeypatch, "prune", "--distilled_ckpt", masked, "--original_ckpt", student)
    pruned = load_as_others_do(masked.with_name("pruned_hubert_base.pth"))
    before, after = (model.get_num_params() for model in (load_as_others_do(teacher), pruned))
    assert abs(1 - after / before - 0.8) < 0.005  # of the teacher
    assert f"{before:,} -> {after:,} parameters, sparsity {1 - after / before:.4f}" in capsys.readouterr().err
    assert pruned.config["encoder_embed_dim"] == 8 and pruned.config["encoder_num_layers"] == 2
    for last, ckpt in ((final, masked.with_name("pruned_hubert_base.pth")), (alone, student)):
        exp_dir = last.parent.parent
        flags = small_run(manifests, teacher, student_ckpt=ckpt, **run)
        run_script(monkeypatch, "final_distill", *flags, "--exp_dir", exp_dir)
        run_script(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", last)
        saved = last.with_name("pruned_hubert_base.pth")
        model = load_as_others_do(saved)
        assert model.config == load_as_others_do(ckpt).config
        trained = last_checkpoint(exp_dir)["state_dict"]
        assert all(torch.equal(value, trained[f"student_model.{key}"]) for key, value in model.state_dict().items())
        assert checkpoint.read_model_file(saved)["distill_linear_projs"]["0.0.weight"].shape == (16, 8)
    # A checkpoint of the published program does not say its student's config.
    checkpoint.save(tmp_path / "published.ckpt", {"state_dict": trained, "global_step": 1})
    flags = ("--ckpt_after_final_distill", tmp_path / "published.ckpt")
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "save_final_ckpt", *flags) == 1
    assert "found None); give the model that prune.py wrote with --config_path" in error_line(capsys)
    # A model that is neither pruned nor made has no projections.
    flags = small_run(manifests, teacher, student_ckpt=teacher, **run)
    assert run_to_exit(monkeypatch, "final_distill", *flags, "--exp_dir", tmp_path / "other") == 1
    assert "no distill_linear_projs in it; give the file that prune.py wrote, or make a student" in error_line(capsys)


@pytest.mark.slow
def test_whatever_takes_models_takes_it(manifests, tmp_path, monkeypatch):
    """A student of other depth and width, without the projection's norm: report, evaluation, export, s3prl."""
    source = random_model(small_config("hubert"))
    source.feature_extractor.dummy_weight.data.fill_(1)  # transformers' models have none
    teacher, saved = tmp_path / "teacher.pth", tmp_path / "exp/final/ckpts/pruned_hubert_base.pth"
    checkpoint.save(teacher, {"state_dict": source.state_dict(), "config": source.config})
    changes = {"encoder_num_layers": 2, "encoder_embed_dim": 8, "encoder_num_heads": 2}
    changes |= {"encoder_feature_projection_layer_norm": False}
    flags = ("--model", teacher, "--student_config", write(tmp_path, changes), "--exp_dir", tmp_path / "exp/student")
    run_script(monkeypatch, "make_student", *flags)
    run = {"student_ckpt": tmp_path / "exp/student/student.pth", "distill_mode": "predlayer", "distill_layers": "1,3"}
    flags = (*small_run(manifests, teacher, **run, max_updates=2), "--exp_dir", tmp_path / "exp/final")
    run_script(monkeypatch, "final_distill", *flags)
    run_script(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", saved.with_name("last.ckpt"))
    run_script(monkeypatch, "report.__main__", tmp_path / "exp")
    assert (tmp_path / "exp/report.html").is_file()
    flags = ("--teacher", teacher, "--models", saved, "--tsv", manifests / "valid.tsv", "--distill_layers", "1,3")
    once = ("--speed_seconds", "--device", "cpu", "--out", tmp_path / "evaluation.json")
    run_script(monkeypatch, "evaluate", *flags, *once)
    found = json.loads((tmp_path / "evaluation.json").read_text())["models"][1]
    model = load_as_others_do(saved)
    assert found["cost"]["num_params"] == model.get_num_params()
    assert [layer["layer"] for layer in found["fidelity"]["layers"]] == [1, 3]
    run_script(monkeypatch, "export", "--model", saved, "--formats", "huggingface", "--out", tmp_path)
    back = ("--model", tmp_path / "huggingface", "--out", tmp_path / "back.pth")
    run_script(monkeypatch, "convert_hubert_from_hf", *back)
    waveforms, _ = random_waveforms(2000)
    with torch.no_grad():
        states = torch.stack(model.extract_features(waveforms)[0])
        upstream = torch.stack(UpstreamExpert(str(saved)).eval()([waveforms[0]])["hidden_states"])
    torch.testing.assert_close(upstream, states)
    for path in (saved, tmp_path / "back.pth"):
        torch.testing.assert_close(extract(load(path), [waveforms[0]])[0], states[:, 0], rtol=1e-4, atol=1e-4)


# --- a student that streams ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("hubert", "base"), ("wavlm", "large")])
def test_a_student_that_streams(manifests, tmp_path, monkeypatch, capsys, family, size):
    """Sliced in the same call, through every stage with all units and two exact targets; it streams as it computes."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size, encoder_ff_interm_features=[200] * 3)
    student, last = tmp_path / "student/student.pth", tmp_path / "exp/final/ckpts/last.ckpt"
    data = ("--tsv_dir", manifests, "--min_seconds", 0.5, "--streaming", 4, "--left_frames", 8)
    flags = ("--model", teacher, "--init_layers", "1,3", *data, "--exp_dir", tmp_path / "student")
    run_script(monkeypatch, "make_student", *flags)
    made = student.read_bytes()
    run_script(monkeypatch, "make_student", *flags)
    assert "made already" in capsys.readouterr().out
    student.unlink()
    run_script(monkeypatch, "make_student", *flags)
    assert student.read_bytes() == made
    # Frames of 40 samples, as these small models make, are so many that attention by chunks is all that is saved.
    units = ("--pruning_units", ",".join(PRUNING_UNITS), "--target_sparsity", 0.6, "--target_macs", 0.99)
    run = {"student_ckpt": student, "distill_mode": "predlayer", "distill_layers": "1,3", "max_updates": 4}
    flags = small_run(manifests, teacher, **run)
    pruning = (*units, "--sparsity_control", "exact", "--exp_dir", tmp_path / "exp")
    assert run_to_exit(monkeypatch, "distill", *flags, *pruning, "--check") == 0
    run_script(monkeypatch, "distill", *flags, *pruning)
    masked = tmp_path / "exp/ckpts/last.ckpt"
    run_script(monkeypatch, "prune", "--distilled_ckpt", masked, "--original_ckpt", student)
    pruned = load_as_others_do(masked.with_name("pruned_hubert_base.pth"))
    sizes = [load_as_others_do(teacher).get_num_params(), pruned.get_num_params()]
    assert 1 - sizes[1] / sizes[0] > 0.6 - 0.005
    run["student_ckpt"] = masked.with_name("pruned_hubert_base.pth")
    run_script(monkeypatch, "final_distill", *small_run(manifests, teacher, **run), "--exp_dir", tmp_path / "exp/final")
    run_script(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", last)
    saved = last.with_name("pruned_hubert_base.pth")
    flags = ("--teacher", teacher, "--models", saved, "--tsv", manifests / "valid.tsv", "--distill_layers", "1,3")
    once = ("--speed_seconds", "--device", "cpu", "--out", tmp_path / "evaluation.json")
    run_script(monkeypatch, "evaluate", *flags, *once)
    model, first = load(saved), checkpoint.read_model_file(student)
    assert model.config == pruned.config and model.config["encoder_chunk_frames"] == 4
    for name, tensor in model.feature_extractor.state_dict().items():
        if name.startswith("heard"):  # measured once, and the same to the last bit behind all stages
            assert torch.equal(tensor, first["state_dict"][f"feature_extractor.{name}"])
    waveform = random_waveforms(3000)[0][0]
    running = stream(model)
    steps = torch.cat([running.push(waveform[:1700]), running.push(waveform[1700:]), running.finish()])
    with torch.no_grad():
        torch.testing.assert_close(steps, model(waveform[None])[0][0], rtol=1e-3, atol=1e-3)


# --- a light extractor -----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_extractor_learns_and_is_pruned(manifests, tmp_path, monkeypatch, disturb, capsys):
    """Stopped and resumed it is the same; masks go on its channels, and sizes stay relative to the teacher's."""
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base", encoder_ff_interm_features=[200] * 3)
    run_script(monkeypatch, "make_student", *extractor_run(manifests, teacher, tmp_path / "whole", max_updates=40))
    losses = [float(row["train_loss"]) for row in logged(tmp_path / "whole") if "train_loss" in row]
    assert len(losses) == 40 and losses[-1] < 0.7 * losses[0]
    before, made = (checkpoint.read_model_file(path) for path in (teacher, tmp_path / "whole/student.pth"))
    assert made["config"] == {**before["config"], "extractor_conv_layer_config": SMALL_LIGHT_LAYERS}
    learnt = last_checkpoint(tmp_path / "whole")["state_dict"]
    for name, tensor in made["state_dict"].items():
        is_new = name.startswith("feature_extractor.")
        assert torch.equal(tensor, learnt[f"student_model.{name}"] if is_new else before["state_dict"][name])

    exp_dir = tmp_path / "stopped"
    flags = extractor_run(manifests, teacher, exp_dir, max_updates=40, resume_checkpoint="auto")
    for update in (3, 20):
        disturb.at[update] = send(signal.SIGTERM)
        assert run_to_exit(monkeypatch, "make_student", *flags) == 143
        assert not (exp_dir / "student.pth").exists()
    capsys.readouterr()
    for changes, message in (
        (["--extractor", "[[9, 60, 40]]"], "extractor: [[7, 20, 10], [9, 5, 4]] there, [[9, 60, 40]] now"),
        (["--init_layers", "1"], "init_layers: None there, 1 now"),
    ):
        assert run_to_exit(monkeypatch, "make_student", *flags, *changes) == 1
        assert message in error_line(capsys)
    run_script(monkeypatch, "make_student", *flags)
    (exp_dir / "student.pth").unlink()  # as if it was stopped behind the training
    run_script(monkeypatch, "make_student", *flags)
    assert "extractor: complete already, 40 updates done" in capsys.readouterr().out
    assert (exp_dir / "student.pth").read_bytes() == (tmp_path / "whole/student.pth").read_bytes()
    run_script(monkeypatch, "make_student", *flags)
    assert "made already, from the same files" in capsys.readouterr().out

    flags = small_run(manifests, teacher, student_ckpt=exp_dir / "student.pth", max_updates=12)
    pruning = ("--pruning_units", "conv,head,interm", "--target_sparsity", 0.4)
    run_script(monkeypatch, "distill", *flags, *pruning, "--exp_dir", tmp_path / "exp")
    last = tmp_path / "exp/ckpts/last.ckpt"
    run_script(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", exp_dir / "student.pth")
    pruned = load_as_others_do(last.with_name("pruned_hubert_base.pth"))
    layers = pruned.config["extractor_conv_layer_config"]
    assert [layer[1:] for layer in layers] == [[20, 10], [5, 4]]
    assert abs(1 - pruned.get_num_params() / load_as_others_do(teacher).get_num_params() - 0.4) < 0.005


@pytest.mark.slow
def test_two_processes_train_an_extractor_as_one(manifests, tmp_path, monkeypatch):
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "large")
    run = {"seconds_per_batch": 0.6, "max_updates": 4, "valid_interval": 1000}
    run_script(monkeypatch, "make_student", *extractor_run(manifests, teacher, tmp_path / "one", accum_grad=2, **run))
    flags = extractor_run(manifests, teacher, tmp_path / "two", gpus=2, **run)
    processes = start_ranks("make_student", *flags, output=tmp_path / "output")
    for process in processes:
        process.join(300)
    printed = (tmp_path / "output").read_text()
    assert [process.exitcode for process in processes] == [0, 0], printed[-3000:]
    assert printed.count("student.pth") == 1  # one of them writes
    one, two = (checkpoint.read_model_file(tmp_path / name / "student.pth")["state_dict"] for name in ("one", "two"))
    assert max(float((tensor - two[name]).abs().max()) for name, tensor in one.items()) < 2e-4
