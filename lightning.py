"""Everything that trains: loss, Lagrangian, schedule, and what both distillations share.

Named as in the published program; it shadows the ``lightning`` package, so this project imports
``pytorch_lightning`` and never installs this file.
"""

import argparse
import contextlib
import hashlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dataset.speech import Batch
from training import callbacks, checkpoints, compiling
from training.batch_size import AUTO, FillMemory, seconds_or_auto
from training.data import SpeechDataModule
from training.pairs import DISTILL_MODES, check_pair, make_projections, parse_distill_layers
from training.throughput import FetchTimer, Throughput
from wav2vec2 import checkpoint as ckpt
from wav2vec2.audio import MAX_SECONDS, MIN_SECONDS
from wav2vec2.errors import UserError
from wav2vec2.flops import forward_flops
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.paths import fast_paths, keep_freed_memory, plain_paths

# The published number of GPUs of one node (run.sh).
DEFAULT_GPUS = 4
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
COS_TYPES = ("raw", "log_sig")
# What torch adds to a gradient's norm before it divides by it.
_CLIP_EPS = 1e-6


# ---------------------------------------------------------------------------------------------------
# Loss and sparsity
# ---------------------------------------------------------------------------------------------------


class DistillLoss(nn.Module):
    """Distance between student and teacher hidden states (paper, equation 1).

    Args:
        l2_weight: of the mean squared error.
        l1_weight: of the mean absolute error.
        cos_weight: of the cosine term, over the feature dimension.
        cos_type: "raw" (-mean cos) or "log_sig" (-mean log sigmoid(cos), as DistilHuBERT).
    """

    def __init__(self, l2_weight: float, l1_weight: float, cos_weight: float, cos_type: str) -> None:
        super().__init__()
        if cos_type not in COS_TYPES:
            raise UserError(f"--cos_type: expected one of {COS_TYPES}, found {cos_type!r}")
        self.l2_weight = l2_weight
        self.l1_weight = l1_weight
        self.cos_weight = cos_weight
        self.cos_type = cos_type

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Weighted sum and its parts (mse, l1, cos) for two tensors (..., D), as (B, layers, frames, D).

        A part with weight zero is not computed and is zero.
        """
        if student.dtype in (torch.float16, torch.bfloat16):  # as CUDA's autocast does
            student, teacher = student.float(), teacher.float()
        zero = student.new_zeros(())
        mse = F.mse_loss(student, teacher) if self.l2_weight else zero
        l1 = F.l1_loss(student, teacher) if self.l1_weight else zero
        cos = zero
        if self.cos_weight:
            similarity = F.cosine_similarity(student, teacher, dim=-1)
            cos = -(F.logsigmoid(similarity) if self.cos_type == "log_sig" else similarity).mean()
        return self.l2_weight * mse + self.l1_weight * l1 + self.cos_weight * cos, (mse, l1, cos)


class SparsityBudget:
    """What the Lagrangian needs to know: how sparse the student is and how sparse it should be at step k.

    Args:
        original_num_params: parameters of the teacher.
        target_sparsity: final target, 0 to 1.
        warmup_updates: optimiser steps over which the target rises linearly from zero.
    """

    def __init__(self, original_num_params: int, target_sparsity: float, warmup_updates: int) -> None:
        self.original_num_params = original_num_params
        self.target_sparsity = target_sparsity
        self.warmup_updates = warmup_updates

    def sparsity(self, num_params: Tensor | int) -> Tensor | float:
        """Share of the teacher's parameters that is gone."""
        return 1.0 - num_params / self.original_num_params

    def target(self, step: int) -> float:
        """Target sparsity at optimiser step ``step``."""
        return (
            self.target_sparsity * min(step / self.warmup_updates, 1.0) if self.warmup_updates else self.target_sparsity
        )


def linear_warmup_decay(warmup_updates: int, max_updates: int) -> Callable[[int], float]:
    """The learning rate's factor at optimiser step k: (k + 1) / warmup up to 1, then linear to 0 at ``max_updates``."""

    def factor(step: int) -> float:
        update = step + 1
        if update <= warmup_updates:
            return update / warmup_updates
        return max(0.0, (max_updates - update) / max(1, max_updates - warmup_updates))

    return factor


# ---------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------


class DistillModule(pl.LightningModule):
    """Distils a teacher into a student, with the sparsity penalty on the student's masks if ``use_reg``.

    Args:
        teacher_model: frozen, kept in eval mode, not stored in checkpoints.
        student_model: trained; with masks if ``use_reg``.
        distill_mode: "layer2layer" (student layer k learns teacher layer k) or "predlayer" (all teacher
            layers are predicted from the student's last output, as DistilHuBERT).
        distill_layers: indices into the list of ``extract_features``.
        distill_linear_projs: one projection per entry of ``distill_layers``, see :func:`make_projections`.
        distill_loss: of stacked hidden states.
        learning_rate, weight_decay: of student weights and projections.
        warmup_updates, max_updates: of the schedule that all parameter groups follow.
        use_reg: add λ1·(s − t) + λ2·(s − t)² and train masks and multipliers.
        reg_learning_rate: of log_alpha (descent) and of λ1, λ2 (ascent).
        target_sparsity, sparsity_warmup_updates: see :class:`SparsityBudget`.
    """

    def __init__(
        self,
        *,
        teacher_model: Wav2Vec2Model,
        student_model: Wav2Vec2Model,
        distill_mode: str,
        distill_layers: list[int],
        distill_linear_projs: nn.ModuleList,
        distill_loss: DistillLoss,
        learning_rate: float,
        weight_decay: float,
        warmup_updates: int,
        max_updates: int,
        use_reg: bool,
        reg_learning_rate: float | None,
        target_sparsity: float | None,
        sparsity_warmup_updates: int | None,
    ) -> None:
        super().__init__()
        if distill_mode not in DISTILL_MODES:
            raise UserError(f"--distill_mode: expected one of {DISTILL_MODES}, found {distill_mode!r}")
        self.teacher_model = teacher_model.requires_grad_(False)
        self.student_model = student_model
        self.distill_linear_projs = distill_linear_projs
        self.distill_loss = distill_loss
        self.distill_mode = distill_mode
        self.distill_layers = list(distill_layers)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_updates = warmup_updates
        self.max_updates = max_updates
        self.reg_learning_rate = reg_learning_rate
        # Set by train_student: what a checkpoint says of its run, who judges each update, and what prune.py should do.
        self.settings: dict[str, Any] | None = None
        self.watch: callbacks.Watch | None = None
        self.round_to: int | None = None
        # --compile: set by train_student; compiled from the first update on.
        self.compiles = False
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._batch_logs: list[dict[str, Tensor]] = []
        self.use_reg = use_reg
        if use_reg:
            self.lambda1 = nn.Parameter(torch.tensor(0.0))
            self.lambda2 = nn.Parameter(torch.tensor(0.0))
            self.budget = SparsityBudget(int(teacher_model.get_num_params()), target_sparsity, sparsity_warmup_updates)
        self._teacher_depth = max(self.distill_layers)
        num_student_layers = len(student_model.encoder.transformer.layers)
        self._student_depth = self._teacher_depth if distill_mode == "layer2layer" else num_student_layers
        freeze_unreached(student_model, self._student_depth)
        self.train()

    def setup(self, stage: str) -> None:
        """Give the frozen teacher the precision that autocast would give its weights at every step anyway."""
        dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.trainer.precision)
        if dtype is not None and fast_paths():
            cast_products(self.teacher_model, dtype)

    def on_train_start(self) -> None:
        self.teacher_model.fold_weight_norm()  # here, as loading a checkpoint undoes it
        if self.compiles:
            self.compile_steps(self.trainer.datamodule.num_shapes)

    def compile_steps(self, num_shapes: int) -> None:
        """Have what an update computes compiled, for each shape of batches when it first comes.

        The methods stay what they are, for validation, and so do the modules with their names.
        """
        steps = (self._targets, self._distillation)
        self._compiled = {step.__name__: compiling.compiled(step, num_shapes) for step in steps}

    def train(self, mode: bool = True) -> "DistillModule":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher_model.eval()
        return self

    # --- forward -----------------------------------------------------------------------------------

    def _inputs(self, batch: Batch | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        waveforms, lengths = batch[:2]
        if fast_paths() and isinstance(batch, Batch):
            lengths = None  # crops have no padding, and the model cannot see that without waiting for the device
        return waveforms, lengths

    def _hidden_states(
        self,
        model: Wav2Vec2Model,
        waveforms: Tensor,
        lengths: Tensor | None,
        depth: int,
        kept: Collection[int] | None = None,
    ) -> list[Tensor]:
        num_layers = max(depth, 1)  # it runs at least one layer
        return model.extract_features(waveforms, lengths, num_layers, kept=kept)[0]

    def _predictions(self, hidden_states: list[Tensor]) -> list[Tensor]:
        """The student's version of each distilled teacher layer: (B, frames, D) each."""
        if self.distill_mode == "layer2layer":
            sources = [hidden_states[layer] for layer in self.distill_layers]
        else:
            sources = [hidden_states[-1]] * len(self.distill_layers)
        return [projection(x) for projection, x in zip(self.distill_linear_projs, sources, strict=True)]

    def _layerwise_loss(
        self, student: list[Tensor], teacher: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss of stacked layers without stacking them: they have one size, so means of means are means."""
        losses, parts = zip(*map(self.distill_loss, student, teacher), strict=True)
        mse, l1, cos = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        return torch.stack(losses).mean(), (mse, l1, cos)

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled version of a method where there is one; validation has other shapes, and does without."""
        return self._compiled.get(function.__name__, function) if self.training else function

    def targets(self, batch: Batch | tuple[Tensor, Tensor | None]) -> list[Tensor]:
        """The distilled teacher layers of a batch: (B, frames, D) each, without gradient."""
        # Not inference_mode: its tensors could not be kept for the backward pass of the loss.
        with torch.no_grad():
            return self._step(self._targets)(*self._inputs(batch))

    def _targets(self, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """See :meth:`targets`."""
        kept = self.distill_layers if fast_paths() else None
        hidden_states = self._hidden_states(self.teacher_model, waveforms, lengths, self._teacher_depth, kept)
        return [hidden_states[layer] for layer in self.distill_layers]

    def _distillation(
        self, waveforms: Tensor, lengths: Tensor | None, targets: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | int | None]:
        """The distillation loss, its parts (mse, l1, cos), and the student's expected parameters if they matter."""
        student = self._predictions(self._hidden_states(self.student_model, waveforms, lengths, self._student_depth))
        if fast_paths():
            loss, parts = self._layerwise_loss(student, targets)
        else:
            loss, parts = self.distill_loss(torch.stack(student, dim=1), torch.stack(targets, dim=1))
        return loss, parts, self.student_model.get_num_params() if self.use_reg else None

    def _penalised_loss(
        self, batch: Batch | tuple[Tensor, Tensor | None], targets: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss of a batch, its parts by name, and the state of the Lagrangian by name."""
        loss, (mse, l1, cos), num_params = self._step(self._distillation)(*self._inputs(batch), targets)
        parts = {"loss_distill": loss, "loss_mse": mse, "loss_l1": l1, "loss_cos": cos}
        state = {}
        if self.use_reg:
            sparsity = self.budget.sparsity(num_params)
            target = self.budget.target(self.global_step)
            penalty = self.lambda1 * (sparsity - target) + self.lambda2 * (sparsity - target) ** 2
            loss = loss + penalty
            parts["loss_reg"] = penalty
            multipliers = {name: getattr(self, name).clone() for name in ("lambda1", "lambda2")}
            # full_like: a tensor made from a number would be copied to the device.
            state = {"sparsity_expected": sparsity, "sparsity_target": torch.full_like(sparsity, target), **multipliers}
        return loss, parts, state

    def loss(self, batch: Batch | tuple[Tensor, Tensor | None], targets: list[Tensor], mode: str) -> Tensor:
        """The loss of a batch, logged with its parts under names that start with ``mode``, "train" or "valid"."""
        loss, parts, state = self._penalised_loss(batch, targets)
        losses = {f"{mode}_{name}": value.detach() for name, value in {"loss": loss, **parts}.items()}
        if mode == "train":
            self._log_training({**losses, **{name: value.detach() for name, value in state.items()}})
        else:
            weight = batch.weight if isinstance(batch, Batch) else len(batch[0])
            self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)
        return loss

    def trial(self, num_utterances: int, num_samples: int) -> None:
        """Forward and backward pass of a batch of noise as in training, for the memory they need; changes nothing."""
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu):
            waveforms = torch.randn(num_utterances, num_samples, device=self.device)
            lengths = torch.full((num_utterances,), num_samples, device=self.device)
            batch = Batch(waveforms, lengths, [], 0, num_utterances, {})
            with self.trainer.precision_plugin.forward_context():
                loss, _, _ = self._penalised_loss(batch, self.targets(batch))
            loss.backward()
        for parameter in self.parameters():
            parameter.grad = None

    def _log_training(self, values: dict[str, Tensor]) -> None:
        """Log a batch's values; under a watch, the mean over an update's batches on all processes, once it is known."""
        if self.watch is None:
            self.log_dict(values)
        else:
            self._batch_logs.append(values)

    def training_step(self, batch: Batch | tuple[Tensor, Tensor | None], batch_idx: int) -> Tensor:
        """The loss of one batch; its noise (masks, dropout) is that of the batch, wherever and whenever it runs."""
        if isinstance(batch, Batch):
            torch.manual_seed(batch.seed)
        return self.loss(batch, self.targets(batch), "train")

    def validation_step(self, batch: Batch | tuple[Tensor, Tensor | None], batch_idx: int) -> Tensor:
        return self.loss(batch, self.targets(batch), "valid")

    def update_flops(self) -> Callable[[int], float]:
        """Operations that one waveform costs in an update, by its samples; a backward pass counts as two forward."""
        teacher = forward_flops(self.teacher_model, self._teacher_depth)
        student = forward_flops(self.student_model, self._student_depth)
        return lambda num_samples: teacher(num_samples) + 3 * student(num_samples)

    # --- optimisation ------------------------------------------------------------------------------

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The published parameter groups: student weights and projections, masks, multipliers."""
        weights, log_alphas = [], []
        for name, parameter in self.student_model.named_parameters():
            if parameter.requires_grad:
                (log_alphas if name.endswith("log_alpha") else weights).append(parameter)
        weights += list(self.distill_linear_projs.parameters())
        groups = [
            {"params": weights, "lr": self.learning_rate, "weight_decay": self.weight_decay, "name": "main"},
        ]
        if self.use_reg:
            regularised = {"lr": self.reg_learning_rate, "weight_decay": 0.0}
            groups += [
                {"params": log_alphas, "name": "log_alpha", **regularised},
                # The multipliers climb: they raise the price of being away from the target.
                {"params": [self.lambda1, self.lambda2], "name": "lambda", "maximize": True, **regularised},
            ]
        return groups

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with the published parameter groups, all on one schedule stepped once per update."""
        # One pass over the weights instead of a dozen.
        optimizer = torch.optim.AdamW(self._parameter_groups(), fused=fast_paths())
        # A fused step could also take the loss scaler's factor back, but the gradient is clipped before that.
        optimizer._step_supports_amp_scaling = False
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, linear_warmup_decay(self.warmup_updates, self.max_updates)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm; Lightning calls this before each update, with the gradient unscaled.

        Not Lightning's own clipping: the norm is wanted, to judge the update by.
        """
        norm = clip_gradients(optimizer, gradient_clip_val)
        self.log("grad_norm", norm)
        if self.watch is not None:
            logs, self._batch_logs = self._batch_logs, []
            self.log_dict(self.watch.before_update(self, optimizer, norm, logs))

    # --- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out, and say what the checkpoint is of (prune.py reads it)."""
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("teacher_model.")
        }
        checkpoint["distillation"] = {
            "student_config": self.student_model.config,
            "target_sparsity": self.budget.target_sparsity if self.use_reg else None,
            "original_num_params": self.budget.original_num_params if self.use_reg else None,
            "settings": self.settings,
            "round_to": self.round_to,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the teacher back, so that the load is strict: it never changes and comes from --teacher_ckpt."""
        teacher = {f"teacher_model.{key}": value for key, value in self.teacher_model.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}

    def adapt_checkpoint(self, checkpoint: dict[str, Any], accum_grad: int) -> None:
        """Count the batches of a checkpoint by this run's ``accum_grad``, and start from this run's learning rates.

        With the flags that the checkpoint was made with, this changes nothing.
        """
        step = checkpoint["global_step"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = step * accum_grad - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})
        schedule = linear_warmup_decay(self.warmup_updates, self.max_updates)
        groups = self._parameter_groups()
        checkpoint["lr_schedulers"][0]["base_lrs"] = [group["lr"] for group in groups]
        for saved, group in zip(checkpoint["optimizer_states"][0]["param_groups"], groups, strict=True):
            saved.update(lr=group["lr"] * schedule(step), initial_lr=group["lr"], weight_decay=group["weight_decay"])
            saved["fused"] = fast_paths()


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Scale the gradients of all that ``optimizer`` trains to a norm of at most ``max_norm``, if one is given.

    Returns:
        Their norm before, a scalar.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    # torch multiplies by 1 too, so that no device is waited for; there is none to wait for on a CPU.
    within = fast_paths() and norm.device.type == "cpu" and bool(max_norm) and bool(norm + _CLIP_EPS <= max_norm)
    if max_norm and not within:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of the layers that autocast runs in ``dtype``; norms stay as they are."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.to(dtype)


def freeze_unreached(student: Wav2Vec2Model, depth: int) -> None:
    """Freeze what the loss cannot reach: DDP waits for the gradient of every parameter that asks for one.

    These never had a gradient, so training is the same. Masks above ``depth`` still get theirs from
    the sparsity penalty.

    Args:
        student: the student.
        depth: the highest layer that is distilled.
    """
    transformer = student.encoder.transformer
    unreached = list(transformer.layers[depth:])
    if depth == 0:  # only the projection is distilled
        unreached += [transformer.pos_conv_embed, transformer.layer_norm]
    if transformer.layer_norm_first:  # pre-norm: the final norm acts in forward() only, others with their block
        unreached.append(transformer.layer_norm)
        for layer in transformer.layers:
            unreached += [layer.layer_norm] if layer.attention is None else []
            unreached += [layer.final_layer_norm] if layer.feed_forward is None else []
    if student.aux is not None:
        unreached.append(student.aux)
    for module in unreached:
        for name, parameter in module.named_parameters():
            if not name.endswith("log_alpha"):
                parameter.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------
# What distill.py and final_distill.py share
# ---------------------------------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser, *, learning_rate: float, warmup_updates: int, max_updates: int
) -> None:
    """The flags of both distillations; the three defaults that differ are given."""
    group = parser.add_argument_group("data")
    group.add_argument("--tsv_dir", required=True, type=Path, help="directory of the manifests from prepare_data.py")
    group.add_argument("--train_subset", default="train100", help="train on TSV_DIR/NAME.tsv")
    group.add_argument(
        "--seconds_per_batch",
        type=seconds_or_auto,
        default=87.5,
        help="seconds of audio per batch and process; 'auto': as much as the memory holds, found by trial and recorded "
        "in the run's checkpoints, which are continued with what was found",
    )
    group.add_argument("--num_workers", type=int, default=1, help="data loading processes per training process")
    group.add_argument("--min_seconds", type=float, default=MIN_SECONDS, help="leave out shorter utterances")
    group.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="leave out longer utterances")
    group.add_argument(
        "--max_crop_seconds",
        type=float,
        help="crop utterances to at most this length (default: only to the shortest of their batch)",
    )
    group.add_argument(
        "--crop_lengths",
        type=int,
        help="crop to at most this many different lengths, chosen to lose the least audio, with equally many "
        "utterances in all batches of a length (default: to the shortest utterance of each batch; with --compile: as "
        "few lengths as lose less than 2%% of the audio)",
    )
    group.add_argument("--no_pack", action="store_true", help="read the audio files even if TSV_DIR has a packed copy")
    group.add_argument(
        "--max_bad_files",
        default="1%",
        help="audio files that may be unreadable and replaced by others, a number or a share of the training manifest",
    )

    group = parser.add_argument_group("models")
    group.add_argument("--teacher_ckpt", required=True, type=Path, help="teacher .pth from a converter")
    group.add_argument("--student_ckpt", required=True, type=Path, help=".pth that the student starts from")
    group.add_argument("--distill_layers", default="0.4,8,12", help="groups by period, layers in a group by comma")
    group.add_argument("--distill_mode", choices=DISTILL_MODES, default="layer2layer", help="see the README")
    group.add_argument("--l2_weight", type=float, default=0.0)
    group.add_argument("--l1_weight", type=float, default=1.0)
    group.add_argument("--cos_weight", type=float, default=1.0)
    group.add_argument("--cos_type", choices=COS_TYPES, default="raw")

    group = parser.add_argument_group("training")
    group.add_argument("--exp_dir", type=Path, default=Path("./exp"), help="where checkpoints and logs go")
    group.add_argument(
        "--resume_checkpoint",
        help="a .ckpt to continue from, or 'auto': the newest whole one of --exp_dir, a fresh start if there is none",
    )
    group.add_argument("--save_interval", type=int, default=500, help="save every this many updates, and each epoch")
    group.add_argument("--log_interval", type=int, default=50, help="log every this many updates")
    group.add_argument(
        "--valid_interval", type=int, help="validate every this many batches (default: at the end of each epoch)"
    )
    group.add_argument("--learning_rate", type=float, default=learning_rate)
    group.add_argument("--weight_decay", type=float, default=0.0)
    group.add_argument("--warmup_updates", type=int, default=warmup_updates)
    group.add_argument("--max_updates", type=int, default=max_updates)
    group.add_argument("--clip_norm", type=float, default=10.0, help="clip the gradient's norm; 0 switches it off")
    group.add_argument("--accum_grad", type=int, default=1, help="batches per update")
    group.add_argument(
        "--skip_nonfinite", type=int, default=0, help="updates with a loss or gradient that is not finite to pass over"
    )
    group.add_argument("--seed", type=int, default=2022)

    group = parser.add_argument_group("machine")
    group.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    group.add_argument("--num_nodes", type=int, default=1)
    group.add_argument(
        "--gpus",
        type=int,
        help=f"GPUs per node (default: {DEFAULT_GPUS}); with --accelerator cpu, processes per node (default: 1)",
    )
    group.add_argument("--precision", choices=tuple(PRECISIONS), default="32")
    group.add_argument(
        "--plain",
        action="store_true",
        help="take the plain paths: slower, the same numbers (on a CPU but for dropout, which has other noise)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile teacher, student and loss with torch.compile: the same numbers up to rounding, after some "
        "minutes of compiling for each shape of batches (see --crop_lengths)",
    )
    group.add_argument(
        "--checkpoint_activations",
        action="store_true",
        help="keep only the input of each of the student's layers and run the layer again for the backward pass: far "
        "less memory, about a quarter more time, the same numbers",
    )


def _check_arguments(args: argparse.Namespace) -> None:
    """Check the shared flags as far as they can be checked alone.

    Raises:
        UserError: names the option, what was found and what is expected.
    """
    if args.seconds_per_batch != AUTO and not args.seconds_per_batch > 0:
        raise UserError(f"--seconds_per_batch: expected a number above 0 or auto, found {args.seconds_per_batch}")
    for name in (
        *("max_updates", "accum_grad", "log_interval", "num_nodes", "learning_rate"),
        "save_interval",
    ):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name}: expected a number above 0, found {getattr(args, name)}")
    for name in ("warmup_updates", "num_workers", "weight_decay", "clip_norm", "skip_nonfinite"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: expected 0 or more, found {getattr(args, name)}")
    for name in ("valid_interval", "max_crop_seconds", "crop_lengths"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name}: expected a number above 0, found {getattr(args, name)}")
    if args.warmup_updates > args.max_updates:
        raise UserError(f"--warmup_updates {args.warmup_updates} is above --max_updates {args.max_updates}")
    if not (args.l2_weight or args.l1_weight or args.cos_weight):
        raise UserError("--l2_weight, --l1_weight and --cos_weight are all 0: nothing would be distilled")
    if args.resume_checkpoint not in (None, checkpoints.AUTO) and not Path(args.resume_checkpoint).is_file():
        raise UserError(f"--resume_checkpoint: {args.resume_checkpoint} does not exist; give a .ckpt of a run, or auto")
    accelerator, _ = resolve_devices(args.accelerator, args.gpus)
    if args.precision == "16" and accelerator == "cpu":
        raise UserError("--precision 16 needs a GPU (its small gradients need a loss scaler); use 32 or bf16 on a CPU")
    if args.compile:
        if args.plain:
            raise UserError("--compile and --plain: the plain paths are there to be read and compared with; give one")
        compiling.check_compiler(accelerator)


def resolve_devices(accelerator: str, gpus: int | None) -> tuple[str, int]:
    """The accelerator ("gpu" or "cpu") and the number of processes per node.

    Raises:
        UserError: more GPUs are asked for than there are.
    """
    available = torch.cuda.device_count()
    if accelerator == "auto":
        accelerator = "gpu" if available or gpus else "cpu"
    if accelerator == "cpu":
        if gpus is not None and gpus < 1:
            raise UserError(f"--gpus: expected 1 or more, found {gpus}")
        return "cpu", gpus or 1
    wanted = DEFAULT_GPUS if gpus is None else gpus
    if wanted < 1:
        raise UserError(f"--gpus: expected 1 or more, found {wanted}; use --accelerator cpu to train without one")
    if wanted > available:
        advice = (
            f"give --gpus {available} (and --accum_grad to keep the total batch)"
            if available
            else "use --accelerator cpu to train without one"
        )
        given = "asked for" if gpus is not None else "are the default"
        raise UserError(f"--gpus: {wanted} GPUs {given}, {available} found on this machine; {advice}")
    return "gpu", wanted


class UpdateProgressBar(pl.Callback):
    """One bar over all updates: loss, expected sparsity and its target, time left."""

    _SHOWN = (("loss", "train_loss"), ("sparsity", "sparsity_expected"), ("target", "sparsity_target"))

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            # A log file gets a line now and then; a terminal gets a moving bar.
            self._bar = tqdm(
                desc=self._description,
                total=trainer.max_steps,
                initial=trainer.global_step,
                unit="update",
                mininterval=0.5 if sys.stderr.isatty() else 30.0,
                dynamic_ncols=sys.stderr.isatty(),
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._bar is not None and self._bar.n < trainer.global_step:
            metrics = trainer.callback_metrics
            shown = {label: f"{metrics[name]:.3f}" for label, name in self._SHOWN if name in metrics}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def make_trainer(
    args: argparse.Namespace,
    description: str,
    module: DistillModule,
    io: callbacks.CheckpointIO,
    start: int,
) -> pl.Trainer:
    """The trainer of the shared flags.

    Args:
        args: the shared flags.
        description: of the progress bar.
        module: what is trained.
        io: writes the checkpoints.
        start: updates done before.
    """
    accelerator, devices = resolve_devices(args.accelerator, args.gpus)
    plugins: list[Any] = [io]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # resilience.py requeues, from the end of an update.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    timer = FetchTimer()
    trainer = pl.Trainer(
        default_root_dir=args.exp_dir,
        accelerator=accelerator,
        devices=devices,
        num_nodes=args.num_nodes,
        # No process needs another's buffers: they are constants.
        strategy=DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
        if devices * args.num_nodes > 1
        else "auto",
        precision=PRECISIONS[args.precision],
        max_steps=args.max_updates,
        max_epochs=-1,
        accumulate_grad_batches=args.accum_grad,
        gradient_clip_val=args.clip_norm or None,
        # To Lightning the whole run is one epoch, which can be left and entered at any update. use_batches sets the
        # interval.
        val_check_interval=args.valid_interval or 1,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,  # the batch sampler deals to the ranks itself
        log_every_n_steps=args.log_interval,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,  # Watch does it
        plugins=plugins,
        logger=[
            TensorBoardLogger(args.exp_dir, name="tensorboard", version=0, purge_step=start),
            callbacks.ContinuedCSVLogger(args.exp_dir, start),
        ],
        profiler=timer,
        callbacks=[
            LearningRateMonitor(logging_interval="step"),
            Throughput(timer, module.update_flops(), args.precision),
            UpdateProgressBar(description),
        ],
    )
    # Its handlers would answer SIGTERM with a collective in the middle of an update, and it would exchange after every
    # batch what Watch exchanges once an update.
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


class Setup(NamedTuple):
    """What a distillation starts from, the student apart."""

    data: SpeechDataModule
    teacher: Wav2Vec2Model
    layer_groups: list[list[int]]

    @property
    def layers(self) -> list[int]:
        """The distilled layers, all groups together."""
        return [layer for group in self.layer_groups for layer in group]

    def make_projections(self, student: Wav2Vec2Model, mode: str) -> nn.ModuleList:
        """Freshly initialised projections from ``student`` to the teacher, which must fit (:func:`check_pair`)."""
        check_pair(self.teacher, student, self.layers, mode)
        dims = [model.config["encoder_embed_dim"] for model in (student, self.teacher)]
        return make_projections(mode, self.layer_groups, *dims)


def prepare(args: argparse.Namespace) -> Setup:
    """Check the shared flags, seed, and load data and teacher: whatever is wrong with them ends the run here.

    Raises:
        UserError: a flag, a manifest or the teacher is wrong, or the machine lacks what is asked for.
    """
    _check_arguments(args)
    layer_groups = parse_distill_layers(args.distill_layers)
    data = SpeechDataModule(
        args.tsv_dir,
        args.train_subset,
        None if args.seconds_per_batch == AUTO else args.seconds_per_batch,
        args.num_workers,
        args.min_seconds,
        args.max_seconds,
        args.max_crop_seconds,
        args.seed,
        args.max_bad_files,
        not args.no_pack,
        AUTO if args.compile and args.crop_lengths is None else args.crop_lengths,
    )
    if data.crop_lengths is not None and args.crop_lengths is None:
        args.crop_lengths = len(data.crop_lengths)  # for the run's settings
    pl.seed_everything(args.seed, verbose=False)
    return Setup(data, ckpt.load_model(args.teacher_ckpt), layer_groups)


# Flags that do not change what is trained, or only through what run_settings records in their place.
_NOT_SETTINGS = {
    *("tsv_dir", "train_subset", "teacher_ckpt", "student_ckpt", "gpus", "num_nodes", "accum_grad"),
    *("debug", "exp_dir", "resume_checkpoint", "save_interval", "log_interval", "valid_interval", "num_workers"),
    *("no_pack", "skip_nonfinite", "max_bad_files", "accelerator", "plain", "round_to"),
    *("compile", "checkpoint_activations"),
}


def run_settings(args: argparse.Namespace, description: str, setup: "Setup", num_processes: int) -> dict[str, Any]:
    """All that decides what comes out of a run: its checkpoints carry it, and are continued only with the same."""
    manifest = setup.data.manifests[args.train_subset]
    utterances = hashlib.sha256(manifest.lengths.tobytes())
    utterances.update("\0".join(manifest.paths).encode(errors="surrogateescape"))
    return {
        "stage": description,
        **{name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS},
        # Four processes, or one with --accum_grad 4: the same updates.
        "gpus x accum_grad": num_processes * args.accum_grad,
        "train_subset": {"fingerprint": utterances.hexdigest()[:16]},
        "teacher_ckpt": {"fingerprint": checkpoints.fingerprint(args.teacher_ckpt)},
        "student_ckpt": {"fingerprint": checkpoints.fingerprint(args.student_ckpt)},
    }


def train_student(
    args: argparse.Namespace,
    description: str,
    setup: "Setup",
    student: Wav2Vec2Model,
    projections: nn.ModuleList,
    **sparsity: Any,
) -> None:
    """Train ``student`` for ``--max_updates`` and say where the result is.

    Args:
        args: the shared flags.
        description: name of the stage, for its output.
        setup: from :func:`prepare`.
        student: the model to train.
        projections: one per distilled layer.
        sparsity: ``use_reg`` and what comes with it, see :class:`DistillModule`.

    Raises:
        UserError: the checkpoint to continue from is not of this run, or the run cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    module = DistillModule(
        teacher_model=setup.teacher,
        student_model=student,
        distill_mode=args.distill_mode,
        distill_layers=setup.layers,
        distill_linear_projs=projections,
        distill_loss=DistillLoss(args.l2_weight, args.l1_weight, args.cos_weight, args.cos_type),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_updates=args.warmup_updates,
        max_updates=args.max_updates,
        **sparsity,
    )
    accelerator, devices = resolve_devices(args.accelerator, args.gpus)
    num_processes = devices * args.num_nodes
    resumed = checkpoints.choose_checkpoint(args.resume_checkpoint, args.exp_dir)
    if args.seconds_per_batch == AUTO and resumed is not None:
        args.seconds_per_batch = recorded_seconds_per_batch(*resumed)
        setup.data.fill_batches(args.seconds_per_batch)
    module.settings = run_settings(args, description, setup, num_processes)
    module.round_to = getattr(args, "round_to", None)
    module.compiles = args.compile
    student.recompute_activations(args.checkpoint_activations)
    start = 0
    if resumed is not None:
        start = check_resumed(resumed, args, module)
        if start >= args.max_updates:
            print(f"{description}: complete already, {start} updates done: {resumed[0]}")
            return

    _quiet_lightning()
    if accelerator == "cpu" and not args.plain:
        keep_freed_memory()
    io = callbacks.CheckpointIO(resumed)
    with callbacks.StopRequest() as stop, plain_paths(args.plain), contextlib.ExitStack() as stack:
        trainer = make_trainer(args, description, module, io, start)
        if trainer.is_global_zero:
            stack.enter_context(checkpoints.exclusive(args.exp_dir))
            num_params = [sum(p.numel() for p in model.parameters()) for model in (setup.teacher, student)]
            print(
                f"{description}: teacher {num_params[0]:,} parameters, student {num_params[1]:,}; layers "
                f"{args.distill_layers}; {num_processes} x {trainer.strategy.root_device.type}, precision "
                f"{args.precision}{', compiled' if args.compile else ''}",
                flush=True,
            )
            if resumed is not None:
                print(f"{description}: continuing {resumed[0]} after update {start} of {args.max_updates}", flush=True)
        module.watch = callbacks.Watch(
            args.exp_dir,
            io,
            stop,
            save_interval=args.save_interval,
            updates_per_epoch=1,  # use_batches sets it
            skip_nonfinite=args.skip_nonfinite,
            max_bad_files=setup.data.max_bad_files,
        )
        trainer.callbacks.append(module.watch)
        if args.seconds_per_batch == AUTO:
            trainer.callbacks.append(
                FillMemory(
                    setup.data.longest_crop,
                    setup.data.train_seconds / (num_processes * args.accum_grad),
                    lambda seconds: use_batches(args, description, setup.data, trainer, module, seconds),
                )
            )
        else:
            use_batches(args, description, setup.data, trainer, module)
        resumed_from = resumed[0] if resumed is not None else None
        with callbacks.plain_failures(module.watch, resumed_from):
            if resumed is not None:
                module.adapt_checkpoint(resumed[1], args.accum_grad)
            resumed = None  # Lightning frees it once it is restored
            trainer.fit(module, datamodule=setup.data, ckpt_path=resumed_from, weights_only=True)
    if trainer.is_global_zero:
        print(f"{description}: {trainer.global_step} updates done: {module.watch.path}")


def use_batches(
    args: argparse.Namespace,
    description: str,
    data: SpeechDataModule,
    trainer: pl.Trainer,
    module: DistillModule,
    seconds_per_batch: float | None = None,
) -> None:
    """Tell those who must know how many batches there are, and the user what they are like.

    Args:
        args: the shared flags.
        description: name of the stage.
        data: of the run.
        trainer, module: that count by epochs.
        seconds_per_batch: what ``--seconds_per_batch auto`` has found; None where the batches are made already.
    """
    if seconds_per_batch is not None:
        data.fill_batches(seconds_per_batch)
        module.settings["seconds_per_batch"] = seconds_per_batch
    per_epoch = len(data.sampler(args.train_subset, trainer.world_size, 0, args.accum_grad))
    trainer.val_check_interval = args.valid_interval or per_epoch
    module.watch.updates_per_epoch = per_epoch // args.accum_grad
    if not trainer.is_global_zero:
        return
    batches = data.batches[args.train_subset]
    words = [f"{sum(map(len, batches))} utterances in {len(batches)} batches"]
    if seconds_per_batch is not None:
        per_update = seconds_per_batch * trainer.world_size * args.accum_grad
        words.append(f"--seconds_per_batch {seconds_per_batch:g} fills the memory, {per_update:g} s an update")
    if data.crop_lengths is not None:
        words.append(
            f"--crop_lengths {len(data.crop_lengths)}: {data.num_shapes} shapes, {data.lost_share:.1%} of audio lost"
        )
    if data.manifests[args.train_subset].pack is not None:
        words.append("packed")
    print(f"{description}: {'; '.join(words)}", flush=True)


def recorded_seconds_per_batch(path: Path, contents: dict[str, Any]) -> float:
    """What ``--seconds_per_batch auto`` of the run that a checkpoint is of has found.

    Raises:
        UserError: it is not recorded there.
    """
    recorded: Any = contents
    for name in ("distillation", "settings", "seconds_per_batch"):
        recorded = recorded.get(name) if isinstance(recorded, dict) else None
    if not (isinstance(recorded, float) and 0 < recorded < math.inf):
        raise UserError(
            f"{path}: seconds_per_batch is {recorded!r} in its settings, expected the number that this run was made "
            "with; give a number instead of --seconds_per_batch auto"
        )
    return recorded


def check_resumed(resumed: tuple[Path, dict[str, Any]], args: argparse.Namespace, module: DistillModule) -> int:
    """Check that a checkpoint can be continued with these flags; returns the updates done in it.

    ``auto`` continues the same run only; a path given by the user may be continued with other settings, which are
    printed.

    Raises:
        UserError: it is of another stage or model, or (with ``auto``) of a run with other settings.
    """
    path, contents = resumed
    changes = checkpoints.compare_settings(contents.get("distillation"), module.settings)
    if changes and args.resume_checkpoint == checkpoints.AUTO:
        raise UserError(
            f"{path}: made with other settings: {'; '.join(changes)}. Give the same settings; or another --exp_dir for "
            f"a new run; or --resume_checkpoint {path} to continue it with these"
        )
    student, projections = checkpoints.split_state_dict(contents["state_dict"])
    ckpt.load_state(module.student_model, student, f"{path} in the model of --student_ckpt")
    ckpt.load_state(module.distill_linear_projs, projections, f"{path} (projections; see --distill_layers)")
    if changes:
        checkpoints.print_line(f"warning: {path} is continued with other settings: {'; '.join(changes)}")
    return contents["global_step"]


def _quiet_lightning() -> None:
    """Keep Lightning's hints that do not concern users of this program off their terminal."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        "does not have many workers",
        "number of training batches .* is smaller than the logging interval",
        "module.s. in eval mode at the start of training",  # the teacher, on purpose
        "isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's own use of torch
        "resuming from a checkpoint that ended before the epoch ended",  # TrainingSampler starts where it should
    ):
        warnings.filterwarnings("ignore", f".*{message}.*")
    if "SLURM_JOB_ID" not in os.environ:
        warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # outside a job it is of no use
