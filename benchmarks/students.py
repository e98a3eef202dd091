"""The students of other methods, each as large as a pruned one: JSON files for ``final_distill.py --student_config``.

    python -m benchmarks.students --teacher_ckpt pretrained/hubert-base-ls960.hf.pth --sizes 0.75 0.9 --out students

``METHOD-SIZE.json`` holds the config's keys that differ from the teacher's. The feed-forward takes what the rest of
the model leaves of the budget, so that sizes are equal to one dimension of it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import cli
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path
from wav2vec2.model import wav2vec2_model

# Keys of a config that stand for all layers: whole numbers.
Changes = dict[str, int]

# DistilHuBERT keeps two layers of twelve.
DISTILHUBERT_SHARE = 6


def first_layers(teacher: Mapping[str, Any]) -> Changes:
    """DistilHuBERT's: the teacher's first layers."""
    return {"encoder_num_layers": -(-teacher["encoder_num_layers"] // DISTILHUBERT_SHARE)}


def narrower(teacher: Mapping[str, Any]) -> Iterator[Changes]:
    """All layers of the teacher with smaller frames and fewer heads; the positional convolution's groups stay."""
    dim, heads = teacher["encoder_embed_dim"], max(teacher["encoder_num_heads"])
    groups = teacher["encoder_pos_conv_groups"]
    for width in range(groups, dim, groups):
        yield {"encoder_embed_dim": width, "encoder_num_heads": max(1, round(heads * width / dim))}


def num_params(teacher: Mapping[str, Any], changes: Changes) -> int:
    """Parameters of the teacher's config with these changes, a number for each layer where it has a list."""
    config = {**teacher, **changes}
    num_layers = config["encoder_num_layers"]
    for key, value in teacher.items():
        if key.startswith("encoder_") and isinstance(value, list):
            config[key] = [changes[key]] * num_layers if key in changes else value[:num_layers]
    with torch.device("meta"):
        return int(wav2vec2_model(**config).get_num_params())


def filled(teacher: Mapping[str, Any], changes: Changes, budget: float) -> Changes | None:
    """The changes with the largest feed-forward, at most the teacher's, that the budget has room for; None without."""
    one, two = (num_params(teacher, {**changes, "encoder_ff_interm_features": count}) for count in (1, 2))
    dims = min(int(1 + (budget - one) // (two - one)), max(teacher["encoder_ff_interm_features"]))
    return {**changes, "encoder_ff_interm_features": dims} if dims > 0 else None


def students(teacher: Mapping[str, Any], budget: float) -> dict[str, Changes | None]:
    """For each method the largest student within the budget, None where it has none.

    Of several widths the one counts whose feed-forward is nearest to the method's proportion: to the frames as in the
    teacher (Deep versus Wide's 12-Layer Half), or as wide as they (FitHuBERT).
    """
    dim, dims = teacher["encoder_embed_dim"], max(teacher["encoder_ff_interm_features"])
    thin = [found for changes in narrower(teacher) if (found := filled(teacher, changes, budget))]

    def nearest(proportion: float) -> Changes | None:
        def excess(changes: Changes) -> float:
            ratio = changes["encoder_ff_interm_features"] / changes["encoder_embed_dim"] / proportion
            return max(ratio, 1 / ratio)

        return min(thin, key=excess, default=None)

    return {
        "distilhubert": filled(teacher, first_layers(teacher), budget),
        "half_width": nearest(dims / dim),
        "fithubert": nearest(1),
    }


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--teacher_ckpt", type=Path, required=True, help="model file, a HuBERT or wav2vec 2.0")
    parser.add_argument("--sizes", nargs="+", required=True, metavar="SHARE", help="of the parameters that go")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    return parser.parse_args()


def share(text: str) -> float:
    """A size, which names a file, too.

    Raises:
        UserError: not a number between 0 and 1.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1 or "/" in text:
        raise UserError(f"--sizes: expected numbers between 0 and 1, found {text!r}")
    return value


def main(args: argparse.Namespace) -> None:
    sizes = {text: share(text) for text in args.sizes}
    config = read_model_file(args.teacher_ckpt)["config"]
    if "encoder_num_heads" not in config:
        raise UserError(f"{args.teacher_ckpt}: expected a HuBERT or wav2vec 2.0, found a WavLM")
    args.out.mkdir(parents=True, exist_ok=True)
    total = num_params(config, {})
    for text, size in sizes.items():
        for method, changes in students(config, total * (1 - size)).items():
            if changes is None:
                print(f"{method} {text}: left out, no such student has {total * (1 - size):,.0f} parameters or fewer")
                continue
            with atomic_path(args.out / f"{method}-{text}.json") as temporary:
                temporary.write_text(json.dumps(changes) + "\n", encoding="utf-8")
            print(f"{method} {text}: {num_params(config, changes):,} parameters, {json.dumps(changes)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
