"""Fine-tuning with labels: a task head on an encoder, their loss and score, and the run from a list to a model file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchaudio.functional import edit_distance

from dataset.labelled import FrameTimes, LabelledBatch
from dataset.labels import CLIPS, SEGMENTS, TEXT, UNITS, VERIFICATION, Clip, Probe, read_probe
from dataset.scores import METRICS, EqualErrorRate, Score, Share
from lightning import freeze_unreached, scheduled_adamw
from training.arguments import ALWAYS, FinetuneRunSettings
from training.callbacks import gather, save_or_end
from training.checkpoints import FINETUNING, choose_checkpoint, fingerprint, part_of, print_line
from training.data import VALID_SUBSET, LabelledDataModule
from training.speed import forward_flops
from training.trainer import check_settings, data_and_machine, fit
from wav2vec2 import checkpoint as ckpt
from wav2vec2.errors import UserError
from wav2vec2.heads import Head, TaskModel, contents_of, greedy_units, head_of, task_model_of, with_head

# What a run leaves in EXP_DIR: the weights of the best validation so far.
BEST_MODEL = "best.pth"

# ---------------------------------------------------------------------------------------------------
# Head, loss and score
# ---------------------------------------------------------------------------------------------------


def head_for(settings: FinetuneRunSettings, probe: Probe) -> Head:
    """The head of a list.

    Raises:
        UserError: an option is not for lists of its kind.
    """
    chosen, is_text, is_clips = settings.finetune, probe.kind == TEXT, probe.kind in (CLIPS, VERIFICATION)
    for option, value, is_fitting, needed in (
        ("units", settings.data.units, is_text, "text"),
        ("layers", chosen.layers, not is_text or chosen.layers == "last", "label (of text the last layer is read)"),
        ("pooling", chosen.pooling, is_clips, "label and without start and end"),
    ):
        if value is not None and not is_fitting:
            raise UserError(
                f"--{option} {value}: is for lists with the column {needed}; {probe.path} is one of {probe.kind}; "
                f"leave out --{option}"
            )
    if is_text:
        return Head(TEXT, probe.labels, units=settings.data.units or UNITS[0])
    layers = chosen.layers or "weighted"
    if is_clips:
        return Head(CLIPS, probe.labels, layers=layers, pooling=chosen.pooling or "mean")
    return Head(SEGMENTS, probe.labels, layers=layers)


def task_loss(kind: str, logits: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """CTC of a text, its mean over units, then over utterances; else cross-entropy, its mean over clips or frames.

    Args:
        kind: of the head.
        logits: (B, frames, outputs), or (B, outputs) of clips.
        lengths: (B,) valid frames.
        targets: (B, N), as of :class:`~dataset.labelled.LabelledBatch`.
    """
    logits = logits.float()
    if kind == TEXT:
        # zero_infinity: a text that does not fit into its frames must not spoil the others.
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), targets + 1, lengths, (targets >= 0).sum(1), zero_infinity=True
        )
    if kind == CLIPS:
        logits = logits[:, None]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum")
    return losses / (targets >= 0).sum().clamp(min=1)  # a batch may have no frame in a segment


def clip_results(kind: str, logits: Tensor, lengths: Tensor, targets: Tensor) -> list[list[float]]:
    """What is counted of each clip: errors and units (text), what is right and how much there is; or its logits.

    Args:
        kind: of what is scored, as of :class:`~dataset.labels.Probe`.
        logits, lengths, targets: as of :func:`task_loss`.
    """
    if kind == VERIFICATION:
        return logits.float().tolist()
    if kind == CLIPS:
        return [[float(right), 1.0] for right in logits.argmax(-1) == targets[:, 0]]
    if kind == SEGMENTS:
        labelled = targets >= 0
        right = (logits.argmax(-1) == targets) & labelled
        return torch.stack([right.sum(1), labelled.sum(1)], 1).double().tolist()
    results = []
    for row, length, target in zip(logits, lengths.tolist(), targets.tolist(), strict=True):
        wanted = [unit for unit in target if unit >= 0]
        results.append([float(edit_distance(greedy_units(row[:length]), wanted)), float(len(wanted))])
    return results


def score_of(kind: str, results: Sequence[Sequence[float]], clips: Sequence[Clip]) -> Score:
    """The score of all clips of a split, from :func:`clip_results`."""
    values = np.array(results, dtype=float)
    if kind == VERIFICATION:
        return EqualErrorRate(values - values.mean(0), np.array([clip.target for clip in clips]))
    return Share(*values.T)


def kind_of(probe: Probe, clips: Sequence[Clip]) -> str:
    """What is scored: of a verification, clips whose labels training knows are classified."""
    is_known = probe.kind == VERIFICATION and clips[0].target < len(probe.labels)
    return CLIPS if is_known else probe.kind


class SpanMasking(nn.Module):
    """Hides spans of frames behind one learnt frame, as wav2vec 2.0's fine-tuning (arXiv 2006.11477) does.

    Args:
        probability: share of the frames that spans would cover if none overlapped.
        length: frames of a span.
        embed_dim: D.
    """

    def __init__(self, probability: float, length: int, embed_dim: int) -> None:
        super().__init__()
        self.probability = probability
        self.length = length
        self.hidden_frame = nn.Parameter(torch.zeros(embed_dim))

    def draw(self, num_frames: Sequence[int]) -> Tensor:
        """Which frames are hidden (B, frames), on the CPU, from torch's generator; padding never is."""
        from torchaudio.models.wav2vec2.components import _compute_mask_indices

        # All valid frames as one row: short rows get their share, which no minimum of spans raises.
        (spans,) = _compute_mask_indices((1, sum(num_frames)), None, self.probability, self.length, min_masks=1)
        return nn.utils.rnn.pad_sequence(spans.split(list(num_frames)), batch_first=True)


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


class FinetuneModule(pl.LightningModule):
    """Trains a model with a head on labels; its extractor stays as it is.

    While the encoder is frozen it computes what it will compute in use: without dropout, and nothing hidden. Layer drop
    is off: every weight takes part in every update.

    Args:
        model: trained.
        probe: the list.
        valid: the clips that are validated on.
        settings: of the run.

    Attributes:
        scalars: what the last training batch gave.
        valid_score: of the last validation, in per cent.
    """

    compiled_steps = ("hidden_states",)

    def __init__(self, model: TaskModel, probe: Probe, valid: Sequence[Clip], settings: FinetuneRunSettings) -> None:
        super().__init__()
        chosen, optimisation = settings.finetune, settings.optimisation
        self.model = model
        transformer = model.encoder.transformer
        transformer.layer_drop = 0.0
        self.masking: SpanMasking | None = None
        if chosen.mask_prob and chosen.freeze_updates != ALWAYS:
            self.masking = SpanMasking(chosen.mask_prob, chosen.mask_length, model.config["encoder_embed_dim"])
        freeze_unreached(model, len(transformer.layers))
        reads_last = model.head_settings.layers == "last"
        if reads_last:  # behind all norms
            transformer.layer_norm.requires_grad_(True)
        if model.aux is not None:
            model.aux.requires_grad_(model.head is None)
        model.feature_extractor.requires_grad_(False)
        if chosen.freeze_updates == ALWAYS:
            model.encoder.requires_grad_(False)
        self.num_frozen = chosen.num_frozen
        self.probe, self.valid = probe, valid
        self.valid_kind = kind_of(probe, valid)
        self.learning_rate, self.encoder_learning_rate = optimisation.learning_rate, chosen.encoder_learning_rate
        self.weight_decay = optimisation.weight_decay
        self.warmup_updates, self.max_updates = optimisation.warmup_updates, optimisation.max_updates
        self.scalars: dict[str, Tensor] = {}
        self.valid_score = math.nan
        self._results: list[tuple[list[int], list[list[float]]]] = []

    @property
    def is_frozen(self) -> bool:
        """Whether this update leaves the encoder as it is."""
        return self.global_step < self.num_frozen

    def hidden_states(
        self, waveforms: Tensor, lengths: Tensor, is_hidden: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """What the head reads: hidden states, or the encoder's output; and (B,) valid frames."""
        frames, lengths, padded_lengths = self.model.extract_frames(waveforms, lengths)
        hidden = None if is_hidden is None else (is_hidden, self.masking.hidden_frame)
        if self.model.head_settings.layers == "weighted":
            return self.model.encoder.extract_features(frames, padded_lengths, hidden=hidden), None, lengths
        return [], self.model.encoder(frames, padded_lengths, hidden), lengths

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
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
        """AdamW changes nothing, its moments included, where there is no gradient."""
        if self.is_frozen:
            for parameter in self._encoder_parameters():
                parameter.grad = None

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Logs the mean loss over utterances, and notes what is counted of each."""
        logits, lengths = self.model(batch.waveforms, batch.lengths)
        if self.valid_kind != VERIFICATION:  # its labels are no outputs
            loss = task_loss(self.model.kind, logits, lengths, batch.targets)
            # A float: of whole numbers Lightning would round the mean over processes down.
            weight = float(batch.weight)
            self.log("valid_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)
        self._results.append((batch.indices, clip_results(self.valid_kind, logits, lengths, batch.targets)))

    def on_validation_epoch_end(self) -> None:
        """Score all clips, each once, whichever process had it."""
        batches = [batch for found in gather(self._results) for batch in found]
        self._results = []
        if self.trainer.sanity_checking:
            return
        found = {index: result for indices, results in batches for index, result in zip(indices, results, strict=True)}
        score = score_of(self.valid_kind, [found[index] for index in range(len(self.valid))], self.valid)
        self.valid_score = score.value()
        self.log("valid_score", self.valid_score)

    def _encoder_parameters(self) -> list[nn.Parameter]:
        parts = [self.model.encoder, *([] if self.masking is None else [self.masking])]
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head, and the encoder if it is trained."""
        head = self.model.aux if self.model.head is None else self.model.head
        groups = [{"params": list(head.parameters()), "lr": self.learning_rate, "name": "head"}]
        if encoder := self._encoder_parameters():
            groups.append({"params": encoder, "lr": self.encoder_learning_rate, "name": "encoder"})
        return [{**group, "weight_decay": self.weight_decay} for group in groups]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, both groups on one schedule."""
        return scheduled_adamw(self.parameter_groups(), self.warmup_updates, self.max_updates)


class BestModel(pl.Callback):
    """Keeps the model of the best validation in a file; of equals the first.

    Args:
        path: of the file.
        more_is_better: of the score.
        made_by: what the file says of its making, beside update and score.
    """

    def __init__(self, path: Path, more_is_better: bool, made_by: dict[str, Any]) -> None:
        self.path = path
        self.sign = 1 if more_is_better else -1
        self.made_by = made_by
        self.score: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score = state_dict["score"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: FinetuneModule) -> None:
        if self.score is not None and not self.path.is_file():
            print_line(f"warning: {self.path} is gone; the best of the validations from now on takes its place")
            self.score = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: FinetuneModule) -> None:
        score = pl_module.valid_score
        if trainer.sanity_checking or (self.score is not None and not self.sign * score > self.sign * self.score):
            return
        self.score = score
        if not trainer.is_global_zero:
            return
        contents = contents_of(pl_module.model)
        for part in (contents, contents["head"]):
            part["state_dict"] = {name: tensor.detach().cpu() for name, tensor in part["state_dict"].items()}
        made_by = {**self.made_by, "update": trainer.global_step, "valid": score}
        save_or_end(self.path, {**contents, "made_by": made_by})


# ---------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------


def finetune(settings: FinetuneRunSettings) -> LabelledDataModule | None:
    """Fine-tune ``--model`` on ``--tsv``; the best model is in ``EXP_DIR/best.pth``.

    Returns:
        The data; None in a process that has nothing more to do.

    Raises:
        UserError: list, model or checkpoint cannot be used, or the run cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    chosen, machine, exp_dir = settings.finetune, settings.machine, settings.machine.exp_dir
    probe = read_probe(settings.data.tsv, settings.data.units or UNITS[0])
    head = head_for(settings, probe)
    contents = ckpt.read_model_file(chosen.model)
    is_fresh = head_of(contents, chosen.model) != head
    if is_fresh:
        generator = torch.Generator().manual_seed(settings.data.seed)
        contents = with_head(contents, head, chosen.model, generator)
    model = task_model_of(contents, chosen.model)
    extractor = model.feature_extractor
    data = LabelledDataModule(settings.data, probe, FrameTimes(extractor.stride, extractor.receptive_field))
    module = FinetuneModule(model, probe, data.clips[VALID_SUBSET], settings)
    recorded = {**settings.recorded(), "tsv": data.fingerprint(), "model": fingerprint(chosen.model)}
    metric, more_is_better = METRICS[module.valid_kind]
    made_by = {"script": "finetune.py", "model": recorded["model"], "tsv": recorded["tsv"], "metric": metric}
    resumed = choose_checkpoint(machine.resume_checkpoint, exp_dir, FINETUNING)
    if resumed is not None:
        path, saved = resumed
        check_settings(path, saved[FINETUNING], recorded, machine)
        ckpt.load_state(model, part_of(saved["state_dict"], "model."), f"{path} in the model of --model")
        masking = nn.Module() if module.masking is None else module.masking
        ckpt.load_state(masking, part_of(saved["state_dict"], "masking."), f"{path} (see --mask_prob)")
    if resumed is None or resumed[1]["global_step"] < settings.optimisation.max_updates:
        model.recompute_activations(machine.checkpoint_activations)
        num_params = sum(parameter.numel() for parameter in model.parameters())
        per_waveform = forward_flops(model, len(model.encoder.transformer.layers))
        trainer = fit(
            settings,
            data,
            module,
            resumed,
            flops=lambda num_samples: (1 if chosen.freeze_updates == ALWAYS else 3) * per_waveform(num_samples),
            record=lambda: {FINETUNING: {"settings": recorded}},
            title=f"{settings.stage}: {num_params:,} parameters; {'a fresh' if is_fresh else 'its own'} head, "
            f"{len(probe.labels)} labels, {metric}; {data_and_machine(data, machine)}",
            callbacks=[BestModel(exp_dir / BEST_MODEL, more_is_better, made_by)],
            validates_last=True,
        )
        if not trainer.is_global_zero:
            return None
    return data
