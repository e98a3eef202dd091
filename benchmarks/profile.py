"""Measure how long a machine takes for a model's operations at the sizes that pruning can reach.

    python -m benchmarks.profile --model pretrained/hubert-base-ls960.hf.pth --backend onnx --out profiles/pi.json
    python -m benchmarks.profile --model TEACHER.pth STUDENT.pth --backend torch --device cuda --precision 16 \\
        --batch 8 --seconds 10 --out profiles/gpu.json
    python -m benchmarks.profile --show profiles/pi.json --model pretrained/hubert-base-ls960.hf.pth

Small models of random weights cover a grid of sizes; they take turns, and the fastest pass counts. Whole models of some
shapes show how well sums of parts fit. A command that was stopped goes on if given again. --show says where the time
goes, and what each kind of pruning unit can free at most. distill.py takes the file as --latency_profile.
"""

import argparse
import itertools
import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.config import PRUNING_UNITS, WavLMConfig, check_config, unit_counts, with_masks
from wav2vec2.files.errors import UserError
from wav2vec2.files.profiles import FORMAT, read_profile
from wav2vec2.files.storage import atomic_path, check_writable, read_json

if TYPE_CHECKING:
    from evaluation.latency import Conditions
    from wav2vec2.model import Wav2Vec2Model
    from wav2vec2.profiles import Profile
    from wav2vec2.sparsity import Size

# Torch is imported once the flags are known to be right: it takes seconds.

# Shares of the model's own sizes, and of its dimensions of frames, that are measured.
SHARES, EMBED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), (1 / 4, 1 / 2, 1)
# Multiples that a machine may like widths to be, and how much dearer those between them must be for that.
MULTIPLES, DEARER = (16, 8, 4), 1.03
# Passes of a whole model in a round, and how far sums of parts may be off.
WHOLE_PASSES, ACCEPTED = 4, 0.1


def shaped(
    config: Mapping[str, Any], channels: Sequence[int], units: int, rings: int, heads: Sequence[int], ff: Sequence[int]
) -> dict[str, Any]:
    """Return a config with these conv channels, units of D and rings of taps, and a layer for each of ``heads``."""
    full = check_config(config)
    counts: dict[str, Any] = {"encoder_num_heads": list(heads)}
    if isinstance(full, WavLMConfig):
        remaining = [list(range(count)) for count in heads]
        counts = {"encoder_total_num_heads": full.encoder_total_num_heads[0], "encoder_remaining_heads": remaining}
    layers = zip(channels, full.extractor_conv_layer_config, strict=True)
    return {
        **with_masks(config, ()),
        **counts,
        "extractor_conv_layer_config": [[count, *others] for count, (_, *others) in layers],
        "encoder_embed_dim": units * (full.encoder_embed_dim // full.num_embed_units),
        "encoder_head_dim": full.encoder_head_dim,
        "encoder_pos_conv_kernel": 2 * rings - full.encoder_pos_conv_kernel % 2,
        "encoder_num_layers": len(heads),
        "encoder_use_attention": [count > 0 for count in heads],
        "encoder_use_feed_forward": [count > 0 for count in ff],
        "encoder_ff_interm_features": list(ff),
        "aux_num_out": None,
    }


def _sizes(config: Mapping[str, Any]) -> tuple[list[int], int, int, list[int], list[int]]:
    """Return a config's own sizes, as :func:`shaped` takes them."""
    full = check_config(config)
    channels, heads, ff = unit_counts(full.to_dict()).values()
    return channels, full.num_embed_units, (full.encoder_pos_conv_kernel + 1) // 2, heads, ff


def grid(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return few small models, a Latin square, in which all pairs of an operation's sizes occur."""

    def some(size: int, shares: Sequence[float] = SHARES) -> list[int]:
        step = 8 if size >= 128 else 1
        return sorted({min(size, max(step, round(size * share / step) * step)) for share in shares} | {size})

    own_channels, *others, own_heads, own_ff = _sizes(config)
    channels, heads, ff = [some(size) for size in own_channels], some(max(own_heads)), some(max(own_ff))
    units, rings, n, found = some(others[0], EMBED_SHARES), some(others[1]), len(SHARES), []
    for a, b in itertools.product(range(n), repeat=2):
        # The pairs of neighbours, a + i * b and a + (i + 1) * b, are all different.
        convs = [sizes[(a + i * b) % n % len(sizes)] for i, sizes in enumerate(channels)]
        turn, of_dim = divmod(b, len(EMBED_SHARES))
        slots = [2 * (a + n * turn) + layer for layer in range(2)]
        layers = [heads[slot % len(heads)] for slot in slots], [ff[slot % len(ff)] for slot in slots]
        found.append(shaped(config, convs, units[of_dim % len(units)], rings[a % len(rings)], *layers))
    return found


def steps(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return models of one width, and of widths that are less by half of each of :data:`MULTIPLES`."""
    channels, units, _, _, ff = _sizes(config)
    width = max(32, min(*channels, max(ff)) // 2 // 16 * 16)
    widths = [width, *(width - multiple // 2 for multiple in MULTIPLES)]
    return [shaped(config, [size] * len(channels), units, 1, [1], [size]) for size in widths]


def checked_shapes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the whole shape, and three as pruning might leave them."""
    sizes, draw = _sizes(config), random.Random(0)

    def some(size: int) -> int:
        step = 8 if size >= 128 else 1
        return min(size, max(1, round(size * draw.uniform(0.05, 1) / step)) * step)

    shapes = {"whole model": shaped(config, *sizes)}
    channels, units, rings, heads, ff = sizes
    for number in range(1, 4):
        layers = list(map(some, heads)), list(map(some, ff))
        shape = shaped(config, list(map(some, channels)), max(some(units), units // 4), some(rings), *layers)
        shapes[f"random shape {number}"] = shape
    return shapes


def _meta(config: Mapping[str, Any]) -> "Wav2Vec2Model":
    """Make a model without memory for its weights."""
    import torch

    from wav2vec2.model import wav2vec2_model

    with torch.device("meta"):
        return wav2vec2_model(**config)


def measure(
    by_parts: Sequence[Any], whole: Sequence[Any], conditions: "Conditions", rounds: int, folder: Path
) -> list[Any]:
    """Let models of these configs take turns; ``folder`` keeps what was measured.

    Returns:
        For each of ``by_parts`` the microseconds (passes, operations) as lists, then of ``whole`` those of passes.

    Raises:
        UserError: the folder was begun with other settings.
    """
    from evaluation.latency import passes
    from wav2vec2.model import wav2vec2_model

    configs = [*by_parts, *whole]
    path, begun = folder / "measured.json", json.loads(json.dumps([conditions._asdict(), configs]))
    measured: dict[str, Any] = {"of": begun, "rounds": []}
    if path.exists():
        measured = read_json(path, "times measured before", f"remove {folder.parent}")
        if measured.get("of") != begun:
            raise UserError(f"{folder.parent}: begun with other settings or models; remove it, or give another --out")
    models = [
        passes(wav2vec2_model(**config).eval(), conditions, folder / str(number))
        for number, config in enumerate(cli.progress(configs, "models", unit="model"))
    ]
    for turn in cli.progress(range(len(measured["rounds"]), rounds), "rounds", unit="round"):
        found: list[list[Any]] = [[] for _ in models]
        for number in range(len(models))[:: -1 if turn % 2 else 1]:
            one, is_whole = models[number], number >= len(by_parts)
            found[number] = [one.whole() for _ in range(WHOLE_PASSES)] if is_whole else one.parts().round(1).tolist()
        measured["rounds"].append(found)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(measured))
    return [list(itertools.chain(*turns)) for turns in zip(*measured["rounds"], strict=True)]


def prices(configs: Sequence[Any], times: Sequence[Any], num_samples: int) -> dict[str, Any]:
    """Turn microseconds (passes, operations) of models into tables by operation; the least of each size count."""
    import numpy as np

    found: dict[str, dict[Any, list[float]]] = {}
    for config, passes in zip(configs, times, strict=True):
        for operation, durations in zip(_meta(config).operations(num_samples), zip(*passes, strict=True), strict=True):
            found.setdefault(operation.key, {}).setdefault(operation.sizes, []).extend(durations)
    tables = {}
    for key, cells in found.items():
        rows, columns = (sorted(set(sizes)) for sizes in zip(*cells, strict=True))
        spread = np.median([np.median(durations) / max(min(durations), 0.1) - 1 for durations in cells.values()])
        least = [[min(cells[row, column]) for column in columns] for row in rows]
        tables[key] = {"sizes": [rows, columns], "microseconds": least, "spread": round(float(spread), 3)}
    return tables


def _reach(table: Mapping[str, Any]) -> int:
    """Return the product of a table's largest sizes."""
    return math.prod(sizes[-1] for sizes in table["sizes"])


def liked_multiple(times: Sequence[Any]) -> int:
    """Return the largest of :data:`MULTIPLES` for which a width half way to the next one takes longer than that."""
    whole, *others = (sum(map(min, zip(*passes, strict=True))) for passes in times)
    return next((m for m, other in zip(MULTIPLES, others, strict=True) if other > DEARER * whole), 1)


def make(args: argparse.Namespace) -> None:
    """Measure, and write the file."""
    import torch

    from evaluation.cost import made_by
    from evaluation.latency import Conditions
    from exporters.options import DEFAULT_OPSET, check_onnx
    from wav2vec2.files.checkpoint import read_model_file
    from wav2vec2.profiles import Profile
    from wav2vec2.sparsity import size_of

    if args.backend == "onnx":
        check_onnx(DEFAULT_OPSET)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; give --device cpu")
    check_writable(args.out)
    torch.set_num_threads(args.threads)
    conditions = Conditions(*(getattr(args, name) for name in Conditions._fields))
    contents = {"format": FORMAT, "made_by": made_by(torch.device(args.device)), **conditions._asdict()}
    contents |= {"models": [read_model_file(path)["config"] for path in args.model], "prices": {}, "checked": []}
    if args.backend == "onnx":
        contents["made_by"]["versions"]["onnxruntime"] = version("onnxruntime")
    partial = args.out.with_name(f"{args.out.name}.partial")
    for number, config in enumerate(contents["models"]):
        parts, likes, shapes = grid(config), steps(config), checked_shapes(config)
        folder = partial / str(number)
        times = measure([*parts, *likes], list(shapes.values()), conditions, args.rounds, folder)
        for key, table in prices(parts, times[: len(parts)], conditions.num_samples).items():
            if key not in contents["prices"] or _reach(table) > _reach(contents["prices"][key]):
                contents["prices"][key] = table
        contents.setdefault("multiple", liked_multiple(times[len(parts) : -len(shapes)]))
        for (name, shape), passes in zip(shapes.items(), times[-len(shapes) :], strict=True):
            expected, measured = float(size_of(_meta(shape), Profile(contents)).latency) / 1e3, min(passes) / 1e3
            contents["checked"].append({"shape": name, "expected": expected, "measured": measured})
            off = expected / measured - 1
            warning = "  sums of parts do not fit here" if abs(off) > ACCEPTED else ""
            print(f"{name:16} {expected:9.2f} ms expected {measured:9.2f} ms measured {off:+7.1%}{warning}")
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(contents, indent=1))
    with atomic_path(args.out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(partial)
    print(f"written to {args.out}")


def show(args: argparse.Namespace) -> None:
    """Print where the time goes, and what each kind of unit can free at most."""
    from hardconcrete import HardConcrete
    from wav2vec2.files.checkpoint import read_model_file
    from wav2vec2.profiles import Profile
    from wav2vec2.sparsity import Size, expected_size, smallest_size

    contents, config = read_profile(args.show), read_model_file(args.model[0])["config"]
    profile, model, units = Profile(contents), _meta(with_masks(config, ())), args.pruning_units.split(",")
    if unknown := [unit for unit in units if unit not in PRUNING_UNITS]:
        raise UserError(f"--pruning_units: {', '.join(unknown)} unknown; choose from {', '.join(PRUNING_UNITS)}")
    whole = expected_size(model, profile)
    _table("where they go", _shares(model, profile))
    freed = {}
    for name, chosen in {**{unit: [unit] for unit in units}, "together": units}.items():
        masked = _meta(with_masks(config, chosen))
        for mask in masked.modules():
            if isinstance(mask, HardConcrete):
                mask.to_empty(device="cpu")  # smallest_size gives them values
        least = smallest_size(masked, profile)
        freed[name] = Size(*(1 - small / size for small, size in zip(least, whole, strict=True)))
    _table("what can go at most", freed)
    for name, size in (("whole model", whole), ("out of reach below", least)):
        seconds = contents["batch"] * contents["seconds"]
        print(
            f"{name}: {size.latency / 1e3:.2f} ms for {seconds:g} s of audio, {size.macs / 1e9:.3f} G multiply-adds, "
            f"{size.params:,.0f} parameters"
        )


def _shares(model: "Wav2Vec2Model", profile: "Profile") -> "dict[str, Size]":
    """Return the shares of each kind of operation in a model's parameters, multiply-adds and time."""
    from wav2vec2.flops import UTTERANCE_SECONDS
    from wav2vec2.operations import MACS, macs_of
    from wav2vec2.sparsity import Size

    operations, modules = model.operations(profile.num_samples), dict(model.named_modules())
    kinds = {operation.module: operation.kind for operation in operations}
    params, macs, latency = (Counter[str]() for _ in Size._fields)
    for name, parameter in model.named_parameters():
        while modules[name := name.rpartition(".")[0]] not in kinds:
            pass
        params[kinds[modules[name]]] += parameter.numel()
    for operation, time in zip(operations, profile.costs(operations).tolist(), strict=True):
        latency[operation.kind] += time
    for operation in model.operations(round(UTTERANCE_SECONDS * SAMPLE_RATE)):
        macs[operation.kind] += int(macs_of([operation]))
    return {kind: Size(*(counts[kind] / counts.total() for counts in (params, macs, latency))) for kind in MACS}


def _table(title: str, rows: "Mapping[str, Size]") -> None:
    """Print shares of time, multiply-adds and parameters, with a bar for the time."""
    print(f"{title:20}    time    MACs  parameters")
    for name, (params, macs, latency) in rows.items():
        print(f"{name:20} {latency:7.1%} {macs:7.1%} {params:11.1%}  {'#' * round(40 * latency)}".rstrip())
    print()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", required=True, nargs="+", type=Path, help="model files; only their shapes count")
    result = parser.add_mutually_exclusive_group(required=True)
    result.add_argument("--out", type=Path, help="profile to write")
    result.add_argument("--show", type=Path, help="profile to show, for the first model")
    parser.add_argument("--backend", choices=("torch", "onnx"), default="onnx")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32", "16", "bf16"), default="32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="waveforms of a pass")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each model")
    parser.add_argument("--pruning_units", default=",".join(PRUNING_UNITS), help="of --show, separated by commas")
    args = parser.parse_args()
    if args.backend == "onnx" and (args.device, args.precision) != ("cpu", "32"):
        parser.error("--backend onnx: is timed with --device cpu and --precision 32")
    if min(args.threads, args.batch, args.rounds) < 1 or not 0.05 <= args.seconds <= 60:
        parser.error("--threads, --batch and --rounds: expected at least 1; --seconds: from 0.05 to 60")
    return args


def main(args: argparse.Namespace) -> None:
    if args.show is None:
        make(args)
    else:
        show(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
