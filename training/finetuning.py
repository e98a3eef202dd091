"""Fine-tuning with labels: the module that trains a head and its encoder, and the run from a list to a model file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn

from cli import print_line
from labels.batches import FrameTimes, LabelledBatch
from labels.lists import VERIFICATION, Clip, Probe
from labels.scores import METRICS, Scored
from labels.tasks import read_task, score_head, task_loss
from lightning import ScheduledModule
from training.checkpoints import (
    BEST_MODEL,
    FINETUNED_MODEL,
    FINETUNING,
    choose_checkpoint,
    fingerprint,
    made_before,
    part_of,
    restorable,
)
from training.data import TEST_SUBSET, TRAIN_SUBSET, VALID_SUBSET, LabelledDataModule
from training.pairing import freeze_unreached
from training.processes import own_device
from training.saving import save_or_end
from training.settings import ALWAYS, FinetuneRunSettings
from training.speed import forward_flops
from training.task import ValidScores, train_head
from training.trainer import check_settings, fit
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel, contents_of, task_model_of
from wav2vec2.files.storage import atomic_path, check_writable

# The scores of the result.
RESULT = "finetuned.json"


class SpanMasking(nn.Module):
    """Hides spans of frames behind one learnt frame, as wav2vec 2.0's fine-tuning does (arXiv 2006.11477).

    Spans of ``length`` frames would cover the share ``probability`` of the frames if none overlapped.
    """

    def __init__(self, probability: float, length: int, embed_dim: int) -> None:
        super().__init__()
        self.probability = probability
        self.length = length
        self.hidden_frame = nn.Parameter(torch.zeros(embed_dim))

    def draw(self, num_frames: Sequence[int]) -> Tensor:
        """Draw the frames to hide, (B, frames) on the CPU, from torch's generator; padding is never hidden."""
        from torchaudio.models.wav2vec2.components import _compute_mask_indices

        # All valid frames as one row: short rows get their share, which no minimum of spans raises.
        (spans,) = _compute_mask_indices((1, sum(num_frames)), None, self.probability, self.length, min_masks=1)
        return nn.utils.rnn.pad_sequence(spans.split(list(num_frames)), batch_first=True)


class FinetuneModule(ScheduledModule):
    """Trains a model with a head on labels; its extractor stays as it is.

    While the encoder is frozen it computes what it will compute in use: without dropout, and with nothing hidden. Layer
    drop is off: every weight takes part in every update.
    """

    compiled_steps = ("hidden_states",)

    def __init__(self, model: TaskModel, probe: Probe, valid: Sequence[Clip], settings: FinetuneRunSettings) -> None:
        super().__init__()
        chosen, optimisation = settings.finetune, settings.optimisation
        self.model = model
        self.learning_rate, self.weight_decay = optimisation.learning_rate, optimisation.weight_decay
        self.warmup_updates, self.max_updates = optimisation.warmup_updates, optimisation.max_updates
        self.encoder_learning_rate = chosen.encoder_learning_rate
        self.num_frozen = math.inf if chosen.freeze_updates == ALWAYS else int(chosen.freeze_updates)
        model.encoder.transformer.layer_drop = 0.0
        self.masking: SpanMasking | None = None
        if chosen.mask_prob and chosen.freeze_updates != ALWAYS:
            self.masking = SpanMasking(chosen.mask_prob, chosen.mask_length, model.config["encoder_embed_dim"])
        freeze_unreached(model, len(model.encoder.transformer.layers))
        train_head(model)
        model.feature_extractor.requires_grad_(False)
        if chosen.freeze_updates == ALWAYS:
            model.encoder.requires_grad_(False)
        self.scores = ValidScores(probe, valid)
        self.scalars = {}  # what the last training batch logs
        self.valid_score = math.nan  # of the last validation, in per cent

    @property
    def is_frozen(self) -> bool:
        """True if this update leaves the encoder as it is."""
        return self.global_step < self.num_frozen

    def hidden_states(
        self, waveforms: Tensor, lengths: Tensor, is_hidden: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Compute what the head reads: all hidden states, or the encoder's output; and (B,) valid frames."""
        frames, num_frames, padded_lengths = self.model.extract_frames(waveforms, lengths)
        hidden = None
        if self.masking is not None and is_hidden is not None:
            hidden = (is_hidden, self.masking.hidden_frame)
        if self.model.head_settings.layers == "weighted":
            return self.model.encoder.extract_features(frames, padded_lengths, hidden=hidden), None, num_frames
        return [], self.model.encoder(frames, padded_lengths, hidden), num_frames

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        is_frozen = self.is_frozen
        self.model.feature_extractor.train(not is_frozen)
        self.model.encoder.train(not is_frozen)
        is_hidden = None
        if self.masking is not None and not is_frozen:
            num_frames = [self.model.feature_extractor.num_frames(length) for length in batch.num_samples]
            is_hidden = self.masking.draw(num_frames).to(batch.waveforms.device)
        with torch.set_grad_enabled(not is_frozen):
            states, output, lengths = self.hidden_states(batch.waveforms, batch.lengths, is_hidden)
        logits = self.model.logits(states, output, lengths)
        loss = task_loss(self.model.kind, logits, lengths, batch.targets)
        self.scalars = {"train_loss": loss.detach()}
        if is_frozen and distributed.is_initialized():  # DDP waits for every gradient
            loss = loss + 0 * sum(parameter.sum() for parameter in self._encoder_parameters())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the encoder's gradients while it is frozen: AdamW then leaves its weights and moments alone."""
        if self.is_frozen:
            for parameter in self._encoder_parameters():
                parameter.grad = None

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Log the mean loss over utterances, and note the result of each."""
        logits, lengths = self.model(batch.waveforms, batch.lengths)
        if self.scores.kind != VERIFICATION:  # its labels are no outputs
            loss = task_loss(self.model.kind, logits, lengths, batch.targets)
            # A float: Lightning would round the mean of whole numbers over processes down.
            weight: Any = float(batch.weight)
            self.log("valid_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)
        self.scores.note(batch, logits, lengths)

    def on_validation_epoch_end(self) -> None:
        """Log the score of all clips."""
        if (score := self.scores.score(self.trainer)) is not None:
            self.valid_score = score
            self.log("valid_score", score)

    def _encoder_parameters(self) -> list[nn.Parameter]:
        parts = [self.model.encoder, *([] if self.masking is None else [self.masking])]
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return a group for the head, and one for the encoder if it is trained."""
        head = [p for name, p in self.model.named_parameters() if name.startswith(("head.", "aux."))]
        groups = [{"params": head, "lr": self.learning_rate, "name": "head"}]
        if encoder := self._encoder_parameters():
            groups.append({"params": encoder, "lr": self.encoder_learning_rate, "name": "encoder"})
        return [{**group, "weight_decay": self.weight_decay} for group in groups]


class BestModel(pl.Callback):
    """Keeps the model of the best validation in a file, with ``made_by``, update and score; of equals the first."""

    def __init__(self, module: FinetuneModule, path: Path, made_by: dict[str, Any]) -> None:
        self.module = module
        self.path = path
        self.made_by = made_by
        self.score: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score = state_dict["score"]

    def is_better(self, score: float) -> bool:
        """Return True if a score beats the best so far."""
        if self.score is None:
            return True
        return score > self.score if self.module.scores.more_is_better else score < self.score

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.score is not None and not self.path.is_file():
            print_line(f"warning: {self.path} is gone; the best of the validations from now on takes its place")
            self.score = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = self.module.valid_score
        if trainer.sanity_checking or not self.is_better(score):
            return
        self.score = score
        if not trainer.is_global_zero:
            return
        contents = contents_of(self.module.model)
        for part in (contents, contents["head"]):
            part["state_dict"] = {name: tensor.detach().cpu() for name, tensor in part["state_dict"].items()}
        made_by = {**self.made_by, "update": trainer.global_step, "valid": score}
        save_or_end(self.path, {**contents, "made_by": made_by})


def finetune(settings: FinetuneRunSettings) -> LabelledDataModule | None:
    """Fine-tune ``--model`` on ``--tsv``, keeping the best model in ``EXP_DIR/best.pth``.

    Returns:
        The data; None in a process that has nothing more to do.

    Raises:
        UserError: list, model or checkpoint cannot be used, or the run cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    chosen, machine, exp_dir = settings.finetune, settings.machine, settings.machine.exp_dir
    contents = ckpt.read_model_file(chosen.model)
    options = {"units": settings.data.units, "layers": chosen.layers, "pooling": chosen.pooling}
    probe, contents, whose = read_task(
        settings.data.tsv, contents, chosen.model, settings.data.seed, prefix="", **options
    )
    model = task_model_of(contents, chosen.model)
    data = LabelledDataModule(settings.data, probe, FrameTimes.of(model))
    module = FinetuneModule(model, probe, data.clips[VALID_SUBSET], settings)
    recorded = {**settings.recorded(), "tsv": data.fingerprint(), "model": fingerprint(chosen.model)}
    metric = module.scores.metric
    made_by = {"script": "finetune.py", "model": recorded["model"], "tsv": recorded["tsv"], "metric": metric}
    resumed = choose_checkpoint(machine.resume_checkpoint, exp_dir, FINETUNING)
    if resumed is not None:
        path, saved = resumed
        check_settings(path, saved[FINETUNING], recorded, machine)
        ckpt.load_state(model, part_of(saved["state_dict"], "model."), f"{path} in the model of --model")
        masking = nn.Module() if module.masking is None else module.masking
        ckpt.load_state(masking, part_of(saved["state_dict"], "masking."), f"{path} (see --mask_prob)")
        if saved["global_step"] >= settings.optimisation.max_updates:
            return data
    model.recompute_activations(machine.checkpoint_activations)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    per_waveform = forward_flops(model, len(model.encoder.transformer.layers))
    trainer = fit(
        settings,
        data,
        module,
        resumed,
        flops=lambda num_samples: (1 if chosen.freeze_updates == ALWAYS else 3) * per_waveform(num_samples),
        record={FINETUNING: {"settings": recorded}},
        title=f"{num_params:,} parameters; {whose} head, {len(probe.labels)} labels, {metric}",
        callbacks=[BestModel(module, exp_dir / BEST_MODEL, made_by)],
    )
    return data if trainer.is_global_zero else None


def finish(settings: FinetuneRunSettings, data: LabelledDataModule) -> None:
    """Score the best model on the test clips and write it as the result, unless that is done."""
    best, out, result = (settings.machine.exp_dir / name for name in (BEST_MODEL, FINETUNED_MODEL, RESULT))
    if not best.is_file():
        raise UserError(f"{best}: is gone, expected the best model of this run; train again with another --exp_dir")
    contents = ckpt.read_model_file(best)
    made_by: Any = contents.get("made_by")
    restorable({"update": 0, "metric": "", "valid": 0.0}, made_by, f"{best}: made_by")
    if result.is_file() and made_before(out, made_by) is not None:
        print(f"{settings.stage}: complete already: {out}")
        return
    check_writable(out)
    model = task_model_of(contents, best).eval().to(own_device(settings.machine))
    metric, _ = METRICS[data.probe.kind]
    scored = Scored([score_head(model, data.probe, out.name)], len(data.probe.test)).summary()
    value, (low, high) = scored["mean"], scored["interval"]
    clips = {subset: len(found) for subset, found in data.clips.items()}
    summary = {
        "kind": data.probe.kind,
        "update": made_by["update"],
        "valid": {"metric": made_by["metric"], "value": made_by["valid"], "clips": clips[VALID_SUBSET]},
        "test": {"metric": metric, "value": value, "interval": [low, high], "clips": clips[TEST_SUBSET]},
        "train": {"clips": clips[TRAIN_SUBSET]},
    }
    ckpt.save(out, contents)
    with atomic_path(result) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{settings.stage}: best at update {made_by['update']}, {made_by['metric']} {made_by['valid']:.2f} in "
        f"validation; test: {metric} {value:.2f} ({low:.2f} to {high:.2f}): {out}"
    )
