"""Teacher and student: whether the two fit, what of the student is trained, how far its masks can go."""

from collections.abc import Sequence

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from lightning import BUDGETS, DistillMode, make_projections, student_layer
from training.settings import PER_SECOND, DistillationSettings, PruningSettings
from wav2vec2.files.checkpoint import build_model
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, with_masks
from wav2vec2.sparsity import Size, size_of, smallest_size

# Words for the fields of Size.
BUDGETED = ("parameters", "multiply-adds", "time")


def check_pair(teacher: Wav2Vec2Model, student: Wav2Vec2Model, layers: Sequence[int], mode: DistillMode) -> None:
    """Check that the student can learn these layers of the teacher; warn of a difference that matters little.

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
        for layer in layers:
            student_layer(layer, num_layers, num_student_layers)
    # These two make the number of frames of every length: floor((length - receptive field) / hop) + 1.
    frames = [(model.feature_extractor.stride, model.feature_extractor.receptive_field) for model in (teacher, student)]
    if frames[0] != frames[1]:
        found, expected = (f"one of {field} samples every {hop}" for hop, field in reversed(frames))
        raise UserError(
            f"the student's frames do not fit the teacher's: {found}, the teacher's {expected}; give a student whose "
            "extractor makes the teacher's frames"
        )
    theirs, ours = teacher.normalize_waveform, student.normalize_waveform
    if ours != theirs:
        difference = f"the student's normalize_waveform is {ours}, the teacher's {theirs}"
        if {model.config["extractor_mode"] for model in (teacher, student)} != {"group_norm"}:
            raise UserError(f"{difference}; give models that take the same input")
        rank_zero_warn(
            f"{difference}: each normalises its own input as it says. Behind a group_norm extractor this moves the "
            "features little (their cosine is 0.9996 on average); to have both the same, convert the teacher with "
            f"--normalize_waveform {str(ours).lower()}"
        )


def new_projections(settings: DistillationSettings, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> nn.ModuleList:
    """Make fresh projections from a student to its teacher.

    Raises:
        UserError: the two do not fit, see :func:`check_pair`.
    """
    models = settings.models
    try:
        check_pair(teacher, student, settings.layers, models.distill_mode)
    except UserError as error:
        options = f"--student_ckpt {models.student_ckpt}, --distill_layers {models.distill_layers}"
        raise UserError(f"{options}: {error}") from None
    dims = [model.config["encoder_embed_dim"] for model in (student, teacher)]
    return make_projections(models.distill_mode, settings.layer_groups, *dims)


def targets(pruning: PruningSettings, original: Size) -> Size:
    """Return the shares of the teacher's sizes to remove; None where there is no target.

    Raises:
        UserError: the teacher takes no longer than what may be left.
    """
    latency, profile = pruning.target_latency, pruning.profile
    if latency is None or profile is None:
        return Size(pruning.target_sparsity, pruning.target_macs)
    number, is_left = latency.removesuffix(PER_SECOND), latency.endswith(PER_SECOND)
    share = float(number)
    if is_left:
        found = float(original.latency) / 1e3 / profile.audio_seconds
        share = 1 - share / found
        if share <= 0:
            raise UserError(
                f"--target_latency {latency}: the teacher takes {found:.4g}{PER_SECOND} on the machine of "
                f"{pruning.latency_profile}; give a shorter time"
            )
    return Size(pruning.target_sparsity, pruning.target_macs, share)


def check_budgets(pruning: PruningSettings, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> None:
    """Check that the chosen units can be pruned down to the targets, and that the student is not smaller already.

    Raises:
        UserError: names the target, and the most that can go, or what is gone.
    """
    profile = pruning.profile
    original, smallest = size_of(teacher, profile), smallest_size(student, profile)
    with torch.device("meta"):
        largest = size_of(build_model(with_masks(student.config, ())), profile)
    given = pruning.target_sparsity, pruning.target_macs, pruning.target_latency
    rows = zip(BUDGETS, given, targets(pruning, original), BUDGETED, original, smallest, largest, strict=True)
    for name, asked, target, thing, before, after, start in rows:
        if target is None:
            continue
        option, lowest, highest = f"--target_{name}", 1 - start / before, 1 - after / before
        if target < lowest:
            raise UserError(
                f"{option} {asked}: the student starts without {lowest:.4f} of the teacher's {thing}; raise the target"
            )
        if target > highest:
            raise UserError(
                f"{option} {asked}: pruning {pruning.pruning_units} removes at most {highest:.4f} of the teacher's "
                f"{thing}; lower the target or add --pruning_units"
            )


def freeze_unreached(student: Wav2Vec2Model, depth: int) -> None:
    """Freeze what the loss cannot reach: DDP waits for the gradient of every parameter that requires one.

    These never had a gradient, so training is the same. ``depth`` is the highest layer that is distilled; masks above
    it still get their gradient from the sparsity penalty.
    """
    transformer = student.encoder.transformer
    unreached: list[nn.Module] = list(transformer.layers[depth:])
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
