"""A teacher and a student: which layers are matched, through which projections, and whether the two fit."""

from torch import nn

from wav2vec2.errors import UserError
from wav2vec2.model import Wav2Vec2Model

DISTILL_MODES = ("layer2layer", "predlayer")


def parse_distill_layers(text: str) -> list[list[int]]:
    """``"0.4,8,12"`` -> ``[[0], [4, 8, 12]]``: a period separates groups, a comma layers of one group.

    Raises:
        UserError: not of this form.
    """
    try:
        groups = [[int(layer) for layer in group.split(",")] for group in text.split(".")]
    except ValueError:
        raise UserError(f"--distill_layers: expected layers and groups such as 0.4,8,12, found {text!r}") from None
    layers = [layer for group in groups for layer in group]
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise UserError(f"--distill_layers: expected every layer once and none below 0, found {text!r}")
    return groups


def make_projections(mode: str, groups: list[list[int]], student_dim: int, teacher_dim: int) -> nn.ModuleList:
    """One projection (student_dim -> teacher_dim) per distilled layer.

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


def check_pair(
    teacher: Wav2Vec2Model, student: Wav2Vec2Model, layers: list[int], mode: str, source: str = "--student_ckpt"
) -> None:
    """Check that the student can learn these layers of the teacher; ``source`` names the student in errors.

    Raises:
        UserError: a layer that a model does not have, or models with different frames.
    """
    for name, model, needed in (("teacher", teacher, True), ("student", student, mode == "layer2layer")):
        num_layers = len(model.encoder.transformer.layers)
        if needed and max(layers) > num_layers:
            raise UserError(
                f"--distill_layers: layer {max(layers)} is wanted, but the {name} has {num_layers} layers; "
                f"give layers between 0 and {num_layers}"
            )
    shapes = [[layer.shape[1:] for layer in model.feature_extractor.conv_layers] for model in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{source}: its frames do not fit the teacher's: conv (kernel, stride) are {shapes[1]}, "
            f"the teacher's {shapes[0]}; give a student with the teacher's frame rate"
        )
    if teacher.normalize_waveform != student.normalize_waveform:
        raise UserError(
            f"{source}: normalize_waveform is {student.normalize_waveform}, the teacher's "
            f"{teacher.normalize_waveform}; give models that take the same input"
        )
