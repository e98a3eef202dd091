"""The paper's training: projections, loss (equation 1), sparsity budget and Lagrangian, schedule, module.

The exact control of the size is not in the paper. The file has its published name, which shadows the ``lightning``
package: this project imports ``pytorch_lightning``, and never installs this file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from wav2vec2.fast import fast_paths
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.profiles import Profile
from wav2vec2.sparsity import Size, compete, expected_size, initial_size, meet_expected_size, size_of

DistillMode = Literal["layer2layer", "predlayer"]
CosType = Literal["raw", "log_sig"]
SparsityControl = Literal["lagrangian", "exact"]

# The names of budgets in the log, in the order of :class:`Size`.
BUDGETS = ("sparsity", "macs", "latency")


def student_layer(layer: int, num_teacher_layers: int, num_student_layers: int) -> int:
    """The student's layer at the same relative depth as this layer of the teacher.

    Raises:
        UserError: there is none.
    """
    depth = layer * num_student_layers
    if depth % num_teacher_layers:
        raise UserError(
            f"layer {layer} of the teacher's {num_teacher_layers} lies between two of the student's "
            f"{num_student_layers} layers; choose multiples of "
            f"{num_teacher_layers // math.gcd(num_teacher_layers, num_student_layers)}"
        )
    return depth // num_teacher_layers


def make_projections(
    mode: DistillMode, groups: Sequence[Sequence[int]], student_dim: int, teacher_dim: int
) -> nn.ModuleList:
    """Make one projection (student_dim -> teacher_dim) for each layer in the groups of distilled layers.

    layer2layer: a Linear per group, shared in the group (the entry repeats) and initialised to identity.
    predlayer: a Linear and a GELU of its own for each layer.
    """
    projections = nn.ModuleList()
    for group in groups:
        if mode == "predlayer":
            projections.extend(nn.Sequential(nn.Linear(student_dim, teacher_dim), nn.GELU()) for _ in group)
            continue
        linear = nn.Linear(student_dim, teacher_dim)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        projections.extend([linear] * len(group))
    return projections


class DistillLoss(nn.Module):
    """Distance between student and teacher hidden states (paper, equation 1): mean squared and absolute error, cosine.

    The cosine is over the feature dimension, ``cos_type`` "raw" (-mean cos) or "log_sig" (-mean log sigmoid(cos), as
    DistilHuBERT). ``weight`` is that of the whole distance beside a :class:`Term`.
    """

    def __init__(
        self, l2_weight: float, l1_weight: float, cos_weight: float, cos_type: CosType, weight: float = 1.0
    ) -> None:
        super().__init__()
        self.l2_weight, self.l1_weight, self.cos_weight = l2_weight, l1_weight, cos_weight
        self.cos_type, self.weight = cos_type, weight

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the weighted sum for two tensors (..., D), and its parts (mse, l1, cos), 0 where the weight is."""
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


class States(NamedTuple):
    """The states of both models that a :class:`Term` may read, for one batch."""

    model: Wav2Vec2Model  # the student
    frames: Tensor  # its extractor's output (B, frames, C)
    lengths: Tensor | None  # valid frames (B,), or None if all are
    student: Sequence[Tensor]  # its hidden states (B, frames, D), as extract_features lists them
    teacher: Mapping[int, Tensor]  # the teacher's hidden states (B, frames, D), by layer
    targets: Tensor | None  # the labels of the batch, None if it has none


class Term(nn.Module):
    """A loss beside equation 1, or instead of it: a subclass returns a scalar from ``forward(states: States)``.

    Its parameters, if any, are trained with the student's.
    """

    name: str  # its value is logged as train_loss_NAME
    weight: float  # in the sum of losses
    teacher_layers: Sequence[int] = ()  # of which it reads the hidden states
    student_depth: int  # number of the student's layers that it trains
    reads_student: bool = True  # if False, the student's hidden states may be missing


@dataclass(frozen=True)
class SparsityBudget:
    """The target sparsity at step k (paper, section 2.3), which rises linearly from zero."""

    original_size: float  # the teacher's parameters, multiply-adds, or microseconds
    target_sparsity: float  # the final target, 0 to 1
    warmup_updates: int  # optimiser steps over which the target rises
    start: float = 0.0  # the target is never below this, unless the final one is

    def target(self, step: int) -> float:
        """Target sparsity at optimiser step ``step``."""
        share = min(step / self.warmup_updates, 1.0) if self.warmup_updates else 1.0
        return max(min(self.start, self.target_sparsity), self.target_sparsity * share)

    def size(self, step: int) -> float:
        """Size that the target leaves at optimiser step ``step``."""
        return (1 - self.target(step)) * self.original_size


def linear_warmup_decay(warmup_updates: int, max_updates: int) -> Callable[[int], float]:
    """The learning rate's factor at optimiser step k: (k + 1) / warmup up to 1, then linear to 0 at ``max_updates``."""

    def factor(step: int) -> float:
        update = step + 1
        if update <= warmup_updates:
            return update / warmup_updates
        return max(0.0, (max_updates - update) / max(1, max_updates - warmup_updates))

    return factor


class ScheduledModule(pl.LightningModule):
    """A module trained with AdamW on :func:`linear_warmup_decay`, stepped once per update."""

    warmup_updates: int
    max_updates: int
    compiled_steps: tuple[str, ...]  # the methods that --compile compiles
    scalars: dict[str, Tensor]  # values of the last training batch, train_loss at least

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups, each with its ``name``, ``lr`` and ``weight_decay``."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # Fused: one pass over the weights instead of a dozen.
        optimizer = torch.optim.AdamW(self.parameter_groups(), fused=fast_paths())
        # A fused step could also divide by the loss scale, but the gradient is clipped before that; no public switch.
        optimizer._step_supports_amp_scaling = False
        factor = linear_warmup_decay(self.warmup_updates, self.max_updates)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DistillModule(ScheduledModule):
    """Distils a teacher into a student, and trains the student's masks towards a size if ``use_reg``.

    Args:
        teacher_model: frozen, kept in eval mode, not stored in checkpoints.
        student_model: trained; has masks if ``use_reg``.
        distill_mode: "layer2layer" (student layer k learns teacher layer k) or "predlayer" (all teacher layers are
            predicted from the student's last output, as DistilHuBERT).
        distill_layers: the teacher's layers, indices into the list of ``extract_features``; none leave out equation 1.
        distill_linear_projs: one per entry of ``distill_layers``, see :func:`make_projections`.
        reg_learning_rate: for log_alpha (descent) and for λ1, λ2 (ascent); ``learning_rate`` is for all other weights.
        target_sparsity, target_macs, target_latency: shares of parameters, multiply-adds and a profile's time to
            remove, see :class:`SparsityBudget`.
        profile: the times of operations on a machine, for ``target_latency``.
        sparsity_control: "lagrangian" (paper, section 2.3) adds λ1·(s − t) + λ2·(s − t)² and trains the multipliers.
            "exact", which all targets but the first need, keeps s = t: after every update the masks are moved to the
            next step's target, and their gradients count that in (:mod:`wav2vec2.sparsity`).
        term: a loss beside equation 1.
    """

    compiled_steps = ("targets", "distillation")

    def __init__(
        self,
        *,
        teacher_model: Wav2Vec2Model,
        student_model: Wav2Vec2Model,
        distill_mode: DistillMode,
        distill_layers: Sequence[int],
        distill_linear_projs: nn.ModuleList,
        distill_loss: DistillLoss,
        learning_rate: float,
        weight_decay: float,
        warmup_updates: int,
        max_updates: int,
        use_reg: bool = False,
        reg_learning_rate: float = 0.02,
        target_sparsity: float | None = 0.75,
        sparsity_warmup_updates: int = 5000,
        sparsity_control: SparsityControl = "lagrangian",
        target_macs: float | None = None,
        target_latency: float | None = None,
        profile: Profile | None = None,
        term: Term | None = None,
    ) -> None:
        super().__init__()
        self.teacher_model = teacher_model.requires_grad_(False)
        self.student_model = student_model
        self.distill_layers, self.distill_linear_projs = distill_layers, distill_linear_projs
        self.distill_loss, self.term = distill_loss, term
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.reg_learning_rate = reg_learning_rate
        self.warmup_updates, self.max_updates = warmup_updates, max_updates
        self.scalars = {}
        self.use_reg = use_reg
        self.controls_exactly = use_reg and sparsity_control == "exact"
        self.profile, self.original_size = profile, expected_size(teacher_model, profile)
        self.budgets: dict[str, SparsityBudget] = {}  # by BUDGETS
        if use_reg:
            # The exact control starts from the sparsity that masks begin with.
            start = initial_size(student_model, profile) if self.controls_exactly else self.original_size
            targets = target_sparsity, target_macs, target_latency
            for name, target, original, size in zip(BUDGETS, targets, self.original_size, start, strict=True):
                if target is not None:
                    begin = 1 - size / original
                    self.budgets[name] = SparsityBudget(original, target, sparsity_warmup_updates, begin)
        if use_reg and not self.controls_exactly:
            self.lambda1, self.lambda2 = (nn.Parameter(torch.tensor(0.0)) for _ in range(2))
        self._choose_layers(distill_mode)
        self.train()

    def _choose_layers(self, mode: DistillMode) -> None:
        """Say which layers of both models the losses read, and how far the models must run for them."""
        models, layers = (self.teacher_model, self.student_model), self.distill_layers
        depth, student_depth = (len(model.encoder.transformer.layers) for model in models)
        sources = [student_layer(k, depth, student_depth) if mode == "layer2layer" else student_depth for k in layers]
        self.source_layers = sources  # the student's, for each distilled layer
        self.reads_student = bool(layers)
        self.teacher_layers, self.student_depth = sorted(layers), max(sources, default=0)
        if self.term is not None:
            self.teacher_layers = sorted({*self.teacher_layers, *self.term.teacher_layers})
            self.student_depth = max(self.student_depth, self.term.student_depth)
            self.reads_student = self.reads_student or self.term.reads_student
        self.teacher_depth = max([1, *self.teacher_layers])  # extract_features runs at least one layer

    def train(self, mode: bool = True) -> "DistillModule":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher_model.eval()
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, whose first two entries are waveforms (B, T) and lengths (B,) or None."""
        loss, self.scalars = self.loss(batch, "train")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As :meth:`training_step`, with masks as pruning will make them; logs the mean over utterances."""
        loss, scalars = self.loss(batch, "valid")
        losses = {name: value for name, value in scalars.items() if name.startswith("valid_")}
        # The weight is 0 for a batch that only makes the processes even. Lightning's hint says int, but then it rounds
        # the mean over processes down.
        weight = float(getattr(batch, "weight", len(batch[0])))
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)  # type: ignore[arg-type]
        return loss

    def loss(self, batch: Any, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of all losses, and the scalars to log, named for ``mode``: "train" or "valid"."""
        waveforms, lengths = batch[:2]
        with torch.no_grad():  # not inference_mode: the loss keeps these tensors for its backward pass
            teacher = self.targets(waveforms, lengths)
        labels = getattr(batch, "targets", None)
        loss, (mse, l1, cos), term_loss, num_params = self.distillation(waveforms, lengths, teacher, labels)
        losses = {"loss_distill": loss, "loss_mse": mse, "loss_l1": l1, "loss_cos": cos}
        loss = self.distill_loss.weight * loss
        if self.term is not None:
            losses[f"loss_{self.term.name}"] = term_loss
            loss = loss + self.term.weight * term_loss
        control: dict[str, Tensor] = {}
        if self.use_reg:
            penalty, control = self.penalty(num_params)
            loss = loss + penalty
            if not self.controls_exactly:
                losses["loss_reg"] = penalty
        scalars = {f"{mode}_{name}": value for name, value in {"loss": loss, **losses}.items()} | control
        return loss, {name: value.detach() for name, value in scalars.items()}

    def targets(self, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """The teacher's hidden states of ``teacher_layers``: (B, frames, D) each."""
        if not (layers := self.teacher_layers):
            return []
        hidden_states, _ = self.teacher_model.extract_features(waveforms, lengths, self.teacher_depth, kept=layers)
        return [hidden_states[layer] for layer in layers]

    def distillation(
        self, waveforms: Tensor, lengths: Tensor | None, targets: list[Tensor], labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor | float]:
        """Return equation 1, its parts (mse, l1, cos), the term, and the student's expected number of parameters.

        Layers have one size, so the mean of their losses is the loss of the stacked layers.
        """
        teacher = dict(zip(self.teacher_layers, targets, strict=True))
        frames, _, padded_lengths = self.student_model.extract_frames(waveforms, lengths)
        student: list[Tensor] = []
        if self.reads_student:
            # extract_features runs at least one layer.
            student = self.student_model.encoder.extract_features(frames, padded_lengths, max(1, self.student_depth))
        zero = frames.new_zeros(())
        loss, means, term_loss = zero, [zero] * 3, zero
        if self.distill_layers:
            sources = zip(self.distill_linear_projs, self.source_layers, strict=True)
            predictions = [projection(student[layer]) for projection, layer in sources]
            expected = [teacher[layer] for layer in self.distill_layers]
            if padded_lengths is not None:  # padding is not matched
                is_valid = torch.arange(frames.size(1), device=frames.device) < padded_lengths[:, None]
                predictions, expected = ([x[is_valid] for x in each] for each in (predictions, expected))
            losses, parts = zip(*map(self.distill_loss, predictions, expected), strict=True)
            loss, means = torch.stack(losses).mean(), [torch.stack(part).mean() for part in zip(*parts, strict=True)]
        if self.term is not None:
            term_loss = self.term(States(self.student_model, frames, padded_lengths, student, teacher, labels))
        return loss, means, term_loss, self.student_model.get_num_params()

    def penalty(self, num_params: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sparsity penalty (zero with the exact control), and the scalars of the control."""
        sparsity = torch.as_tensor(1.0 - num_params / self.original_size.params)
        scalars = {"sparsity_expected": sparsity}
        if others := self.budgets.keys() - {"sparsity"}:
            sizes = zip(BUDGETS, size_of(self.student_model, self.profile), self.original_size, strict=True)
            scalars |= {f"{name}_expected": 1.0 - size / before for name, size, before in sizes if name in others}
        for name, budget in self.budgets.items():
            # full_like: a tensor made from a number would be copied to the device.
            scalars[f"{name}_target"] = torch.full_like(sparsity, budget.target(self.global_step))
        if self.controls_exactly:
            return 0 * sparsity, scalars  # DDP waits for the gradient of masks above the distilled layers, too
        excess = sparsity - scalars["sparsity_target"]
        penalty = self.lambda1 * excess + self.lambda2 * excess**2
        return penalty, scalars | {"lambda1": self.lambda1.clone(), "lambda2": self.lambda2.clone()}

    def meet_target(self, step: int) -> None:
        """Move the masks to the expected size that is the target of an optimiser step."""
        wanted = [self.budgets[name].size(step) if name in self.budgets else None for name in BUDGETS]
        self.binding_size = meet_expected_size(self.student_model, Size(*wanted), self.profile)

    def on_train_start(self) -> None:
        """Set the masks of the first step; they are there already where a run is continued."""
        if self.controls_exactly:
            self.meet_target(self.global_step)

    def on_after_backward(self) -> None:
        """Project the gradients of the masks onto constant size."""
        if self.controls_exactly:
            compete(self.student_model, self.binding_size, self.profile)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the update, and set the masks of the next step."""
        super().optimizer_step(*args, **kwargs)
        if self.controls_exactly:
            self.meet_target(self.global_step + 1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The published parameter groups: student weights and projections, masks, multipliers."""
        weights: list[nn.Parameter] = []
        log_alphas: list[nn.Parameter] = []
        for name, parameter in self.student_model.named_parameters():
            if parameter.requires_grad:
                (log_alphas if name.endswith("log_alpha") else weights).append(parameter)
        for module in (self.distill_linear_projs, self.term):
            if module is not None:
                weights += [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": weights, "name": "main_params", "lr": self.learning_rate, "weight_decay": self.weight_decay}
        ]
        regularised = {"lr": self.reg_learning_rate, "weight_decay": 0.0}
        if self.use_reg:
            groups.append({"params": log_alphas, "name": "log_alpha", **regularised})
        if self.use_reg and not self.controls_exactly:
            # The multipliers climb: they raise the price of being away from the target.
            groups.append({"params": [self.lambda1, self.lambda2], "name": "lambda", "maximize": True, **regularised})
        return groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out: it never changes."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: state[key] for key in state if not key.startswith("teacher_model.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the teacher back, so that the load is strict."""
        teacher = {f"teacher_model.{key}": value for key, value in self.teacher_model.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}
