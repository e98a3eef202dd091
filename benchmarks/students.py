"""Students of other methods' shapes, each as large as a pruned model."""

from collections.abc import Mapping
from typing import Any

from wav2vec2.config import check_config
from wav2vec2.files.errors import UserError

DISTILHUBERT, HALF_WIDTH, FITHUBERT = METHODS = ("distilhubert", "half_width", "fithubert")
DISTILHUBERT_SHARE = 6  # DistilHuBERT keeps two layers of twelve
WIDTH = "encoder_ff_interm_features"


def num_params(teacher: Mapping[str, Any], changes: Mapping[str, int]) -> int:
    """Count the parameters of the teacher's config with these changes, each one number for all layers."""
    import torch

    from wav2vec2.files.checkpoint import build_model

    with torch.device("meta"):
        return int(build_model({**teacher, **check_config(teacher).of_layer(0), **changes}).get_num_params())


def student(method: str, teacher: Mapping[str, Any], size: float) -> dict[str, int]:
    """Find a method's largest student that is no larger than the teacher without this share of its parameters.

    DistilHuBERT has the teacher's first layers; 12-Layer Half of Deep versus Wide narrower layers of the teacher's
    proportions; FitHuBERT layers whose feed-forward is as wide as a frame. The feed-forward takes what is left.

    Returns:
        The config's keys in which it differs, for ``make_student.py --student_config``.

    Raises:
        UserError: there is no such student.
    """
    if "encoder_num_heads" not in teacher:
        raise UserError(f"{method}: expected a HuBERT or wav2vec 2.0 as the teacher, found a WavLM")
    dim, heads, widest = teacher["encoder_embed_dim"], max(teacher["encoder_num_heads"]), max(teacher[WIDTH])
    if method == DISTILHUBERT:
        shapes = [{"encoder_num_layers": -(-teacher["encoder_num_layers"] // DISTILHUBERT_SHARE)}]
    else:
        groups = teacher["encoder_pos_conv_groups"]
        dims = range(dim - groups, 0, -groups)
        shapes = [{"encoder_embed_dim": d, "encoder_num_heads": max(1, round(heads * d / dim))} for d in dims]
    narrowest = {DISTILHUBERT: 0.0, HALF_WIDTH: widest / dim, FITHUBERT: 1.0}[method]  # in units of the frame
    budget = num_params(teacher, {}) * (1 - size)
    for changes in shapes:
        one, two = (num_params(teacher, {**changes, WIDTH: width}) for width in (1, 2))
        width = int(1 + (budget - one) // (two - one))
        if width >= max(1, round(changes.get("encoder_embed_dim", dim) * narrowest)):
            return {**changes, WIDTH: min(widest, width)}
    raise UserError(f"{method}: no such student has {budget:,.0f} parameters or fewer; leave out --sizes {size}")
