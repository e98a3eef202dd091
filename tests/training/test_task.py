"""Labels beside distillation: what is learnt of a batch, what stays of the head, and what there is without a task."""

import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    TASK_HEADS,
    assert_same_run,
    error_line,
    head_id,
    last_checkpoint,
    logged,
    make_module,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    save_small_model,
    send,
    small_config,
    small_run,
    task_contents,
)

import wav2vec2
from labels.batches import LabelledBatch
from lightning import DistillLoss, States, make_projections
from training.task import Task, task_loss, train_head
from wav2vec2.files import checkpoint
from wav2vec2.files.heads import TaskModel, masked_model_with_its_head

WAVEFORMS, LENGTHS = random_waveforms(900, 500)


def labelled_batch(model: TaskModel) -> LabelledBatch:
    """Two waveforms with the labels of a head."""
    num_frames = model.feature_extractor.num_frames(WAVEFORMS.size(1))
    kinds = {"text": [[1, 1], [0, -1]], "clips": [[1], [0]], "segments": [[1, -1, 0] * num_frames] * 2}
    targets = torch.tensor([row[:num_frames] for row in kinds[model.kind]])
    return LabelledBatch(WAVEFORMS, LENGTHS, targets, LENGTHS.tolist(), [0, 1], ["a", "b"], 1, 2, {})


# --- of a batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "units"), [("base", ["embed"]), ("large", ["embed"]), ("large", [])])
@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
def test_the_loss_is_that_of_the_heads_logits(head, size, units):
    """By the task alone the teacher is not run, and all that the head reads is trained."""
    student = masked_model_with_its_head(task_contents(head, size=size), ["head", *units], "model.pth")
    if units:
        student.encoder.hard_concrete.log_alpha.data[1] = -9  # dropped
    teacher = random_model(small_config("hubert", size))
    teacher.extract_features = None
    module = make_module(
        teacher_model=teacher,
        student_model=student,
        distill_layers=[],
        distill_linear_projs=make_projections("layer2layer", [], 16, 16),
        distill_loss=DistillLoss(0, 1, 1, "raw", weight=0),
        term=Task(2.0, student),
    )
    train_head(student)
    student.eval()  # masks without noise
    batch = labelled_batch(student)
    loss, scalars = module.loss(batch, "valid")
    with torch.no_grad():
        expected = task_loss(head.kind, *student(WAVEFORMS, LENGTHS), batch.targets)
    torch.testing.assert_close(scalars["valid_loss_task"], expected)
    torch.testing.assert_close(loss.detach(), 2 * expected + scalars["valid_loss_reg"])
    loss.backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # several processes would wait for them
    read = [p for name, p in student.named_parameters() if name.startswith("aux" if head.kind == "text" else "head")]
    assert any(parameter.grad.abs().sum() > 0 for parameter in read)


def test_padding_is_not_matched():
    """The loss of a padded batch is the mean over the valid frames of its rows."""
    module = make_module(
        student_model=random_model(small_config("hubert", "large"), seed=2),
        use_reg=False,
        teacher_model=random_model(small_config("hubert", "large"), seed=1),
    )
    module.student_model.eval()
    with torch.no_grad():
        found = module.loss((WAVEFORMS, LENGTHS), "valid")[1]
        rows = [module.loss((row[None, :n], None), "valid")[1] for row, n in zip(WAVEFORMS, (900, 500), strict=True)]
    frames = [module.student_model.feature_extractor.num_frames(n) for n in LENGTHS.tolist()]
    for name in ("valid_loss_l1", "valid_loss_cos"):
        mean = sum(row[name] * n for row, n in zip(rows, frames, strict=True)) / sum(frames)
        torch.testing.assert_close(found[name], mean)


def test_labels_that_are_no_outputs_do_not_count():
    """The clips that validate a verification have labels that training does not know."""
    student = masked_model_with_its_head(task_contents(TASK_HEADS[2]), [], "model.pth")
    batch = labelled_batch(student)._replace(targets=torch.tensor([[1], [7]]))
    task = Task(1.0, student)
    frames, lengths, _ = student.eval().extract_frames(WAVEFORMS, LENGTHS)
    states = student.encoder.extract_features(frames, lengths)
    loss = task(States(student, frames, lengths, states, {}, batch.targets))
    only = task_loss("clips", student(WAVEFORMS[:1], LENGTHS[:1])[0], LENGTHS[:1], torch.tensor([[1]]))
    torch.testing.assert_close(loss, only)


# --- runs ------------------------------------------------------------------------------------------


def task_run(labelled: Path, name: str, teacher: Path, **changes: object) -> list[object]:
    """Flags of a short run with a task."""
    flags = {"tsv_dir": None, "max_crop_seconds": None, "task_tsv": labelled / f"{name}.tsv", "seconds_per_batch": 2}
    return small_run(Path(), teacher, **{**flags, **changes})


PRUNING = ("--pruning_units", "head,interm,embed", "--target_sparsity", 0.6, "--sparsity_warmup_updates", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "size", "flags"),
    [
        ("text", "hubert", "large", ["--task_units", "characters"]),
        ("segments", "wavlm", "base", ["--distill_weight", 0, "--sparsity_control=exact", "--accum_grad", 2]),
    ],
)
def test_a_task_through_all_stages(labelled, tmp_path, monkeypatch, disturb, capsys, name, family, size, flags):
    """Stopped and resumed it is the same; the head is kept, and what is pruned answers as the masked model does."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size)
    run = [*task_run(labelled, name, teacher, valid_interval=3), *PRUNING, *flags]
    run_script(monkeypatch, "distill", *run, "--exp_dir", tmp_path / "whole")
    run += ["--exp_dir", tmp_path / "exp", "--resume_checkpoint", "auto"]
    for update in (2, 4):
        disturb.at[update] = send(signal.SIGTERM)
        assert run_to_exit(monkeypatch, "distill", *run) == 143
    run_script(monkeypatch, "distill", *run)
    assert_same_run(tmp_path / "whole", tmp_path / "exp")
    rows = [row for row in logged(tmp_path / "exp") if row.get("valid_score")]
    assert len(rows) >= 2 and all(row["valid_loss_task"] for row in rows)
    assert (float(rows[-1]["valid_loss_distill"]) == 0) == ("--distill_weight" in flags)

    run_script(monkeypatch, "prune", "--distilled_ckpt", tmp_path / "exp/ckpts/last.ckpt", "--original_ckpt", teacher)
    pruned = tmp_path / "exp/ckpts/pruned_hubert_base.pth"
    model = wav2vec2.load(pruned)
    assert model.config["encoder_embed_dim"] < 16 and model.labels == tuple(" abc" if name == "text" else "abc")

    capsys.readouterr()
    rate = {"max_updates": 2, "learning_rate": 1e-9, "warmup_updates": 0, "student_ckpt": pruned}
    kept = [flag for flag in flags[:2] if "--distill" in str(flags[0])]
    final = task_run(labelled, name, teacher, **rate)
    run_script(monkeypatch, "final_distill", *final, *kept, "--exp_dir", tmp_path / "final")
    assert "its own head" in capsys.readouterr().out
    save = ("--config_path", pruned, "--ckpt_after_final_distill", tmp_path / "final/ckpts/last.ckpt")
    run_script(monkeypatch, "save_final_ckpt", *save)
    result = wav2vec2.load(tmp_path / "final/ckpts/pruned_hubert_base.pth")
    assert result.head_settings == model.head_settings and result.config == model.config
    torch.testing.assert_close(result(WAVEFORMS, LENGTHS)[0], model(WAVEFORMS, LENGTHS)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_without_a_task_a_head_is_kept_and_changes_nothing(manifests, tmp_path, monkeypatch):
    """--task_weight 0, or no list: the run of the encoder alone, to the last bit."""
    contents = task_contents(TASK_HEADS[4])
    plain, headed = tmp_path / "plain.pth", tmp_path / "headed.pth"
    checkpoint.save(plain, {key: contents[key] for key in ("config", "state_dict")})
    checkpoint.save(headed, contents)
    mode = {"distill_mode": "predlayer", "max_updates": 2}
    for student, flags in ((plain, ()), (headed, ("--task_tsv", "gone.tsv", "--task_weight", 0))):
        run = [*small_run(manifests, plain, student_ckpt=student, **mode), *PRUNING, *flags]
        run_script(monkeypatch, "distill", *run, "--exp_dir", tmp_path / student.stem)
    one, other = (last_checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "headed"))
    assert {name for name in other if name not in one} == {
        f"student_model.head.{name}" for name in contents["head"]["state_dict"]
    }
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name, value in contents["head"]["state_dict"].items():
        assert torch.equal(other[f"student_model.head.{name}"], value)
    run_script(monkeypatch, "prune", "--distilled_ckpt", tmp_path / "headed/ckpts/last.ckpt", "--original_ckpt", headed)
    assert wav2vec2.load(tmp_path / "headed/ckpts/pruned_hubert_base.pth").head.linear.in_features < 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_tsv": None}, "--tsv_dir: is not given"),
        (
            {"task_tsv": None, "tsv_dir": "x", "task_weight": 2},
            "--task_weight 2.0: needs --task_tsv",
        ),
        ({"task_tsv": None, "tsv_dir": "x", "distill_weight": 0}, "--distill_weight 0: nothing would be learnt"),
        ({"task_weight": -1}, "--task_weight: expected 0 or more, found -1"),
        ({"task_units": "words"}, "--task_units words: is for lists with the column text"),
        ({"task_tsv": "gone.tsv"}, "gone.tsv: no such file"),
        ({"seconds_per_batch": 0.1}, "lasts 0."),
    ],
)
def test_what_cannot_be(labelled, small_teacher, tmp_path, monkeypatch, capsys, changes, message):
    run = task_run(labelled, "clips", small_teacher, **changes)
    assert run_to_exit(monkeypatch, "distill", *run, "--exp_dir", tmp_path / "exp") == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "exp").exists()


def test_a_damaged_head_in_a_checkpoint(labelled, small_teacher, tmp_path, monkeypatch, capsys):
    run = task_run(labelled, "clips", small_teacher, max_updates=1, warmup_updates=0)
    run_script(monkeypatch, "distill", *run, *PRUNING, "--exp_dir", tmp_path)
    path = tmp_path / "ckpts/last.ckpt"
    contents = last_checkpoint(tmp_path)
    for entry, message in (
        (5, "distillation: head: expected kind, labels, units"),
        ({"kind": "clips"}, "distillation: head: expected kind"),
        (None, "weights do not fit the model"),
    ):
        contents["distillation"]["head"] = entry
        checkpoint.save(path, contents)
        assert run_to_exit(monkeypatch, "prune", "--distilled_ckpt", path, "--original_ckpt", small_teacher) == 1
        assert message in error_line(capsys)
