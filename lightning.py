"""What the paper says of training: projections, loss (equation 1), sparsity budget and Lagrangian, schedule.

Beside the Lagrangian stands a control of the size that the paper does not have, "exact".

Named as in the published program. The file shadows the ``lightning`` package: this project imports
``pytorch_lightning``, and never installs this file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from wav2vec2.fast import fast_paths
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.sparsity import Size, compete, initial_size, meet_expected_size, size_of

DISTILL_MODES = ("layer2layer", "predlayer")
COS_TYPES = ("raw", "log_sig")
SPARSITY_CONTROLS = ("lagrangian", "exact")


# ---------------------------------------------------------------------------------------------------
# Which layers are matched, and through which projections
# ---------------------------------------------------------------------------------------------------


# A layer, or several whose mean stands for them (SKILL, arXiv 2402.16830).
Layers = tuple[int, ...]


def parse_distill_layers(text: str) -> list[list[Layers]]:
    """``"0.4,7+8"`` -> ``[[(0,)], [(4,), (7, 8)]]``: a period separates groups, a comma what is matched in one group.

    Raises:
        UserError: not of this form.
    """
    try:
        groups = [
            [tuple(int(layer) for layer in layers.split("+")) for layers in group.split(",")]
            for group in text.split(".")
        ]
    except ValueError:
        raise UserError(f"expected layers and groups such as 0.4,8,12, found {text!r}") from None
    every = [layer for group in groups for layers in group for layer in layers]
    if min(every) < 0 or len(set(every)) < len(every):
        raise UserError(f"expected every layer once and none below 0, found {text!r}")
    return groups


def mean_of(hidden_states: Mapping[int, Tensor] | Sequence[Tensor], layers: Layers) -> Tensor:
    """The mean of these layers (B, frames, D); the layer itself where there is one."""
    first = hidden_states[layers[0]]
    return first if len(layers) == 1 else torch.stack([hidden_states[layer] for layer in layers]).mean(0)


def student_layers(layers: Layers, num_teacher_layers: int, num_student_layers: int) -> Layers:
    """The student's layers at the same relative depth, which learn these of the teacher; each once.

    Raises:
        UserError: a layer of the teacher has no counterpart.
    """
    depths = [layer * num_student_layers for layer in layers]
    for layer, depth in zip(layers, depths, strict=True):
        if depth % num_teacher_layers:
            raise UserError(
                f"layer {layer} of the teacher's {num_teacher_layers} lies between two of the student's "
                f"{num_student_layers} layers; choose multiples of "
                f"{num_teacher_layers // math.gcd(num_teacher_layers, num_student_layers)}"
            )
    return tuple(dict.fromkeys(depth // num_teacher_layers for depth in depths))


def make_projections(mode: str, groups: Sequence[Sequence[Any]], student_dim: int, teacher_dim: int) -> nn.ModuleList:
    """One projection (student_dim -> teacher_dim) per entry of the groups of distilled layers.

    layer2layer: a Linear per group, shared in the group (the entry repeats) and initialised to identity.
    predlayer: an own Linear and GELU per layer.
    """
    if mode == "predlayer":
        return nn.ModuleList(
            nn.Sequential(nn.Linear(student_dim, teacher_dim), nn.GELU()) for group in groups for _ in group
        )
    projections = nn.ModuleList()
    for group in groups:
        linear = nn.Linear(student_dim, teacher_dim)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        projections.extend([linear] * len(group))
    return projections


def check_pair(teacher: Wav2Vec2Model, student: Wav2Vec2Model, layers: Sequence[int], mode: str) -> None:
    """Check that the student can learn these layers of the teacher; warn where they differ in what moves little.

    Raises:
        UserError: a model does not have one of the layers, or the two make different frames or take different input.
    """
    num_layers, num_student_layers = (len(model.encoder.transformer.layers) for model in (teacher, student))
    if max(layers, default=0) > num_layers:
        raise UserError(
            f"layer {max(layers)} is to be distilled, but the teacher has {num_layers} layers; "
            f"choose layers between 0 and {num_layers}"
        )
    if mode == "layer2layer":
        student_layers(tuple(layers), num_layers, num_student_layers)
    # These two make the number of frames of every length: floor((length - receptive field) / hop) + 1.
    frames = [(model.feature_extractor.stride, model.feature_extractor.receptive_field) for model in (teacher, student)]
    if frames[0] != frames[1]:
        found, expected = (f"one of {field} samples every {hop}" for hop, field in reversed(frames))
        raise UserError(
            f"the student's frames do not fit the teacher's: {found}, the teacher's {expected}; give a student whose "
            "extractor makes the teacher's frames"
        )
    if teacher.normalize_waveform != student.normalize_waveform:
        difference = (
            f"the student's normalize_waveform is {student.normalize_waveform}, the teacher's "
            f"{teacher.normalize_waveform}"
        )
        if {model.config["extractor_mode"] for model in (teacher, student)} != {"group_norm"}:
            raise UserError(f"{difference}; give models that take the same input")
        rank_zero_warn(
            f"{difference}: each normalises its own input as it says. Behind a group_norm extractor this moves the "
            "features little (their cosine is 0.9996 on average); to have both the same, convert the teacher with "
            f"--normalize_waveform {str(student.normalize_waveform).lower()}"
        )


# ---------------------------------------------------------------------------------------------------
# Loss, sparsity, schedule
# ---------------------------------------------------------------------------------------------------


class DistillLoss(nn.Module):
    """Distance between student and teacher hidden states (paper, equation 1).

    Args:
        l2_weight: of the mean squared error.
        l1_weight: of the mean absolute error.
        cos_weight: of the cosine term, over the feature dimension.
        cos_type: "raw" (-mean cos) or "log_sig" (-mean log sigmoid(cos), as DistilHuBERT).
        weight: of all of it, beside other objectives.
    """

    def __init__(
        self, l2_weight: float, l1_weight: float, cos_weight: float, cos_type: str, weight: float = 1.0
    ) -> None:
        super().__init__()
        if cos_type not in COS_TYPES:
            raise ValueError(f"cos_type: expected one of {COS_TYPES}, found {cos_type!r}")
        self.l2_weight = l2_weight
        self.l1_weight = l1_weight
        self.cos_weight = cos_weight
        self.cos_type = cos_type
        self.weight = weight

    @property
    def is_on(self) -> bool:
        """Whether any part has a weight."""
        return bool(self.weight and (self.l2_weight or self.l1_weight or self.cos_weight))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Sum by the weights of its parts, and the parts (mse, l1, cos), for two tensors (..., D).

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
    """How sparse the student is, and how sparse it should be at step k (paper, section 2.3).

    Args:
        original_size: of the teacher: parameters, or multiply-adds.
        target_sparsity: final target, 0 to 1; None where there is none.
        warmup_updates: optimiser steps over which the target rises linearly from zero.
        start: the target is never below this, unless the final one is.
    """

    def __init__(
        self, original_size: int, target_sparsity: float | None, warmup_updates: int, start: float = 0.0
    ) -> None:
        self.original_size = original_size
        self.target_sparsity = target_sparsity
        self.warmup_updates = warmup_updates
        self.start = start

    def sparsity(self, size: Tensor | float) -> Tensor | float:
        """Share of the teacher's size that is gone."""
        return 1.0 - size / self.original_size

    def target(self, step: int) -> float | None:
        """Target sparsity at optimiser step ``step``."""
        if self.target_sparsity is None:
            return None
        share = min(step / self.warmup_updates, 1.0) if self.warmup_updates else 1.0
        return max(min(self.start, self.target_sparsity), self.target_sparsity * share)

    def size(self, step: int) -> float | None:
        """What is left of the teacher's size at the target of optimiser step ``step``."""
        target = self.target(step)
        return None if target is None else (1 - target) * self.original_size


def linear_warmup_decay(warmup_updates: int, max_updates: int) -> Callable[[int], float]:
    """The learning rate's factor at optimiser step k: (k + 1) / warmup up to 1, then linear to 0 at ``max_updates``."""

    def factor(step: int) -> float:
        update = step + 1
        if update <= warmup_updates:
            return update / warmup_updates
        return max(0.0, (max_updates - update) / max(1, max_updates - warmup_updates))

    return factor


def scheduled_adamw(groups: list[dict[str, Any]], warmup_updates: int, max_updates: int) -> dict[str, Any]:
    """AdamW and :func:`linear_warmup_decay`, as Lightning takes them."""
    # Fused: one pass over the weights instead of a dozen.
    optimizer = torch.optim.AdamW(groups, fused=fast_paths())
    # A fused step could also take the loss scaler's factor back, but the gradient is clipped before that.
    optimizer._step_supports_amp_scaling = False
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup_decay(warmup_updates, max_updates))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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
        distill_layers: the teacher's, indices into the list of ``extract_features``; a tuple stands for the mean of
            several.
        distill_linear_projs: one projection per entry of ``distill_layers``, see :func:`make_projections`.
        distill_loss: of the hidden states of a layer.
        learning_rate, weight_decay: of student weights and projections.
        warmup_updates, max_updates: of the schedule that all parameter groups follow.
        use_reg: train masks, towards the target.
        reg_learning_rate: of log_alpha (descent) and of λ1, λ2 (ascent).
        target_sparsity, sparsity_warmup_updates: see :class:`SparsityBudget`.
        sparsity_control: "lagrangian" (paper, section 2.3) adds λ1·(s − t) + λ2·(s − t)² and trains the multipliers.
            "exact" keeps s = t: after every update the masks are moved to the next step's target, and their gradients
            count that in (:mod:`wav2vec2.sparsity`).
        target_macs: a target for the share of multiply-adds, beside or instead of that of parameters; for "exact".
        objectives: what else is learnt, by name (:mod:`training.objectives`).

    Attributes:
        compiled_steps: the methods that --compile compiles.
        budget, macs_budget: of the masks; None without ``use_reg``, or without ``target_macs``.
        scalars: what the last training batch gave, by the published names: ``train_loss`` and its parts, and
            the state of the Lagrangian.
    """

    compiled_steps = ("targets", "distillation")

    def __init__(
        self,
        *,
        teacher_model: Wav2Vec2Model,
        student_model: Wav2Vec2Model,
        distill_mode: str,
        distill_layers: Sequence[int | Layers],
        distill_linear_projs: nn.ModuleList,
        distill_loss: DistillLoss,
        learning_rate: float,
        weight_decay: float,
        warmup_updates: int,
        max_updates: int,
        use_reg: bool = False,
        reg_learning_rate: float | None = None,
        target_sparsity: float | None = None,
        sparsity_warmup_updates: int | None = None,
        sparsity_control: str = "lagrangian",
        target_macs: float | None = None,
        objectives: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if distill_mode not in DISTILL_MODES:
            raise ValueError(f"distill_mode: expected one of {DISTILL_MODES}, found {distill_mode!r}")
        self.teacher_model = teacher_model.requires_grad_(False)
        self.student_model = student_model
        self.distill_linear_projs = distill_linear_projs
        self.distill_loss = distill_loss
        self.distill_mode = distill_mode
        self.distill_layers = [(layer,) if isinstance(layer, int) else layer for layer in distill_layers]
        self.objectives = nn.ModuleDict(objectives)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_updates = warmup_updates
        self.max_updates = max_updates
        self.reg_learning_rate = reg_learning_rate
        self.scalars: dict[str, Tensor] = {}
        self.budget: SparsityBudget | None = None
        self.macs_budget: SparsityBudget | None = None
        if sparsity_control not in SPARSITY_CONTROLS:
            raise ValueError(f"sparsity_control: expected one of {SPARSITY_CONTROLS}, found {sparsity_control!r}")
        self.controls_exactly = use_reg and sparsity_control == "exact"
        if use_reg:
            budgets = [
                SparsityBudget(int(original), target, sparsity_warmup_updates)
                for original, target in zip(size_of(teacher_model), (target_sparsity, target_macs), strict=True)
            ]
            if self.controls_exactly:  # from the sparsity that masks begin with
                for budget, size in zip(budgets, initial_size(student_model), strict=True):
                    budget.start = budget.sparsity(size)
            else:
                self.lambda1 = nn.Parameter(torch.tensor(0.0))
                self.lambda2 = nn.Parameter(torch.tensor(0.0))
            self.budget, self.macs_budget = budgets[0], budgets[1] if target_macs is not None else None
        num_layers, num_student_layers = (
            len(model.encoder.transformer.layers) for model in (teacher_model, student_model)
        )
        if distill_mode == "layer2layer":
            self.source_layers = [student_layers(each, num_layers, num_student_layers) for each in self.distill_layers]
        else:
            self.source_layers = [(num_student_layers,)] * len(self.distill_layers)
        others = list(self.objectives.values())
        matched = list(zip(self.distill_layers, self.source_layers, strict=True)) if distill_loss.is_on else []
        needed = [layers for layers, _ in matched] + [each.teacher_layers for each in others]
        self.teacher_layers = sorted({layer for layers in needed for layer in layers})
        self.reads_student = bool(matched) or any(each.reads_student for each in others)
        depth = max([layer for _, layers in matched for layer in layers] + [each.student_depth for each in others])
        # extract_features runs at least one layer.
        self.teacher_depth, self.student_depth = max([1, *self.teacher_layers]), max(1, depth)
        freeze_unreached(student_model, depth)
        if not distill_loss.is_on:
            distill_linear_projs.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "DistillModule":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher_model.eval()
        return self

    # --- from a batch to its loss --------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, whose first two entries are waveforms (B, T) and lengths (B,) or None."""
        loss, self.scalars = self.loss(batch, "train")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As :meth:`training_step`, with masks as pruning will make them; logged as the mean over utterances."""
        loss, scalars = self.loss(batch, "valid")
        losses = {name: value for name, value in scalars.items() if name.startswith("valid_")}
        # 0 for a batch that only makes the processes even; a float, as Lightning would round their mean down.
        weight = float(getattr(batch, "weight", len(batch[0])))
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)
        return loss

    def loss(self, batch: Any, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Distillation loss plus sparsity penalty, and the scalars to log, named for ``mode``: "train" or "valid"."""
        waveforms, lengths = batch[:2]
        with torch.no_grad():  # not inference_mode: the loss keeps these tensors for its backward pass
            targets = self.targets(waveforms, lengths)
        num_frames = self.student_model.feature_extractor.num_frames(waveforms.size(1))
        noise = [objective.draw(batch, num_frames) for objective in self.objectives.values()]
        loss, (mse, l1, cos), others, num_params = self.distillation(waveforms, lengths, targets, noise)
        losses = {"loss_distill": loss, "loss_mse": mse, "loss_l1": l1, "loss_cos": cos}
        loss = self.distill_loss.weight * loss
        for (name, objective), other in zip(self.objectives.items(), others, strict=True):
            losses[f"loss_{name}"] = other
            loss = loss + objective.weight * other
        control = {}
        if self.budget is not None:
            sparsity = self.budget.sparsity(num_params)
            control = {"sparsity_expected": sparsity}
            if self.macs_budget is not None:
                control["macs_expected"] = self.macs_budget.sparsity(size_of(self.student_model).macs)
            for name, budget in (("sparsity", self.budget), ("macs", self.macs_budget)):
                if budget is not None and budget.target_sparsity is not None:
                    # full_like: a tensor made from a number would be copied to the device.
                    control[f"{name}_target"] = torch.full_like(sparsity, budget.target(self.global_step))
            if self.controls_exactly:
                loss = loss + 0 * sparsity  # DDP waits for the gradient of masks above the distilled layers, too
            else:
                target = control["sparsity_target"]
                losses["loss_reg"] = self.lambda1 * (sparsity - target) + self.lambda2 * (sparsity - target) ** 2
                control |= {"lambda1": self.lambda1.clone(), "lambda2": self.lambda2.clone()}
                loss = loss + losses["loss_reg"]
        scalars = {**{f"{mode}_{name}": value for name, value in {"loss": loss, **losses}.items()}, **control}
        return loss, {name: value.detach() for name, value in scalars.items()}

    def targets(self, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """The teacher's hidden states of ``teacher_layers``: (B, frames, D) each."""
        if not self.teacher_layers:  # nothing is learnt from it
            return []
        hidden_states, _ = self.teacher_model.extract_features(
            waveforms, lengths, self.teacher_depth, kept=self.teacher_layers
        )
        return [hidden_states[layer] for layer in self.teacher_layers]

    def distillation(
        self,
        waveforms: Tensor,
        lengths: Tensor | None,
        targets: list[Tensor],
        noise: Sequence[Tensor | None] = (),
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | int]:
        """Equation 1, its parts (mse, l1, cos), the other objectives, and the student's expected number of parameters.

        Layers have one size, so the mean of their losses is the loss of the stacked layers.
        """
        teacher = dict(zip(self.teacher_layers, targets, strict=True))
        frames, _, padded_lengths = self.student_model.extract_frames(waveforms, lengths)
        student: list[Tensor] = []
        if self.reads_student:
            student = self.student_model.encoder.extract_features(frames, padded_lengths, self.student_depth)
        loss = frames.new_zeros(())
        means = [loss] * 3
        if self.distill_loss.is_on:
            sources = [mean_of(student, layers) for layers in self.source_layers]
            predictions = [projection(x) for projection, x in zip(self.distill_linear_projs, sources, strict=True)]
            expected = [mean_of(teacher, layers) for layers in self.distill_layers]
            if padded_lengths is not None:  # what stands behind the shorter waveforms is not matched
                is_valid = torch.arange(frames.size(1), device=frames.device) < padded_lengths[:, None]
                predictions, expected = ([x[is_valid] for x in each] for each in (predictions, expected))
            losses, parts = zip(*map(self.distill_loss, predictions, expected), strict=True)
            loss, means = torch.stack(losses).mean(), [torch.stack(part).mean() for part in zip(*parts, strict=True)]
        others = [
            objective(self.student_model, frames, padded_lengths, student, teacher, drawn)
            for objective, drawn in zip(self.objectives.values(), noise, strict=True)
        ]
        return loss, means, others, self.student_model.get_num_params()

    # --- exact control -------------------------------------------------------------------------------

    def meet_target(self, step: int) -> None:
        """Make the expected size that of an optimiser step."""
        macs = None if self.macs_budget is None else self.macs_budget.size(step)
        self.binding_size = meet_expected_size(self.student_model, Size(self.budget.size(step), macs))

    def on_train_start(self) -> None:
        """The first step's masks; nothing changes where a run is continued."""
        if self.controls_exactly:
            self.meet_target(self.global_step)

    def on_after_backward(self) -> None:
        """Masks compete for what there is."""
        if self.controls_exactly:
            compete(self.student_model, self.binding_size)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, and the masks of the next step."""
        super().optimizer_step(*args, **kwargs)
        if self.controls_exactly:
            self.meet_target(self.global_step + 1)

    # --- optimisation --------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The published parameter groups: student weights and projections, masks, multipliers."""
        weights, log_alphas = [], []
        for name, parameter in self.student_model.named_parameters():
            if parameter.requires_grad:
                (log_alphas if name.endswith("log_alpha") else weights).append(parameter)
        for module in (self.distill_linear_projs, self.objectives):
            weights += [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": weights, "lr": self.learning_rate, "weight_decay": self.weight_decay, "name": "main_params"},
        ]
        if self.budget is not None:
            regularised = {"lr": self.reg_learning_rate, "weight_decay": 0.0}
            groups.append({"params": log_alphas, "name": "log_alpha", **regularised})
            if not self.controls_exactly:
                # The multipliers climb: they raise the price of being away from the target.
                multipliers = [self.lambda1, self.lambda2]
                groups.append({"params": multipliers, "name": "lambda", "maximize": True, **regularised})
        return groups

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with the published parameter groups, all on one schedule stepped once per update."""
        return scheduled_adamw(self.parameter_groups(), self.warmup_updates, self.max_updates)

    # --- checkpoints ---------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out: it never changes."""
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("teacher_model.")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the teacher back, so that the load is strict."""
        teacher = {f"teacher_model.{key}": value for key, value in self.teacher_model.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}


def freeze_unreached(student: Wav2Vec2Model, depth: int) -> None:
    """Freeze what the loss cannot reach: DDP waits for the gradient of every parameter that requires one.

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
