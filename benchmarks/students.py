"""Students of other methods' shapes, each as large as a pruned model: JSON files for ``make_student.py``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wav2vec2.config import check_config
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path

# The config's keys in which a student differs, each one number for all layers.
Changes = dict[str, int]

DISTILHUBERT, HALF_WIDTH, FITHUBERT = METHODS = ("distilhubert", "half_width", "fithubert")
DISTILHUBERT_SHARE = 6  # DistilHuBERT keeps two layers of twelve


def num_params(teacher: Mapping[str, Any], changes: Changes) -> int:
    """Count the parameters of the teacher's config with these changes."""
    import torch

    from wav2vec2.files.checkpoint import build_model

    num_layers = changes.get("encoder_num_layers", teacher["encoder_num_layers"])
    per_layer = check_config(teacher).of_layer(0)
    with torch.device("meta"):
        return int(build_model({**teacher, **per_layer, "encoder_num_layers": num_layers, **changes}).get_num_params())


def shape(method: str, teacher: Mapping[str, Any], budget: float) -> Changes | None:
    """Find a method's largest student within a budget of parameters; None where it has none.

    DistilHuBERT has the teacher's first layers; 12-Layer Half of Deep versus Wide narrower layers of the teacher's
    proportions; FitHuBERT layers whose feed-forward is as wide as a frame. The feed-forward takes what is left.
    """
    dim, heads = teacher["encoder_embed_dim"], max(teacher["encoder_num_heads"])
    most = max(teacher["encoder_ff_interm_features"])
    if method == DISTILHUBERT:
        shapes = [{"encoder_num_layers": -(-teacher["encoder_num_layers"] // DISTILHUBERT_SHARE)}]
        widths = [1]
    else:
        groups = teacher["encoder_pos_conv_groups"]
        dims = range(dim - groups, 0, -groups)
        shapes = [{"encoder_embed_dim": d, "encoder_num_heads": max(1, round(heads * d / dim))} for d in dims]
        widths = [round(d * (most / dim if method == HALF_WIDTH else 1)) for d in dims]
    for changes, width in zip(shapes, widths, strict=True):
        if num_params(teacher, {**changes, "encoder_ff_interm_features": width}) <= budget:
            one, two = (num_params(teacher, {**changes, "encoder_ff_interm_features": count}) for count in (1, 2))
            return {**changes, "encoder_ff_interm_features": min(most, int(1 + (budget - one) // (two - one)))}
    return None


def write_student(method: str, teacher: Mapping[str, Any], size: float, path: Path) -> None:
    """Write the JSON of a method's student, as large as a model with this share of the parameters gone.

    Raises:
        UserError: there is no such student.
    """
    if "encoder_num_heads" not in teacher:
        raise UserError(f"{method}: expected a HuBERT or wav2vec 2.0 as the teacher, found a WavLM")
    budget = num_params(teacher, {}) * (1 - size)
    if (changes := shape(method, teacher, budget)) is None:
        raise UserError(f"{method}: no such student has {budget:,.0f} parameters or fewer; leave out --sizes {size}")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(changes) + "\n", encoding="utf-8")
