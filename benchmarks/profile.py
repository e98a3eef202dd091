"""Measure how long a machine takes for a model's operations at all sizes that pruning can reach.

    python -m benchmarks.profile --model pretrained/hubert-base-ls960.hf.pth --backend onnx --out profiles/pi.json
    python -m benchmarks.profile --model TEACHER.pth STUDENT.pth --backend torch --device cuda --precision 16 \\
        --batch 8 --seconds 10 --out profiles/gpu.json
    python -m benchmarks.profile --show profiles/pi.json --model pretrained/hubert-base-ls960.hf.pth

Small whole models of random weights cover a grid of sizes; they take turns, and the fastest pass counts. At the end
sums of parts are compared with the times of the whole model and of three models of other shapes. The same command goes
on where a stopped one was. --show says where the time goes, and what each kind of pruning unit can free at most.
distill.py and prune.py take the file as --latency_profile.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.config import PRUNING_UNITS, check_config, is_wavlm, unit_counts, with_masks
from wav2vec2.files.errors import UserError
from wav2vec2.files.profiles import FORMAT, read_profile
from wav2vec2.files.storage import atomic_path, check_writable, read_json

if TYPE_CHECKING:
    from evaluation.latency import Conditions, Passes
    from wav2vec2.model import Wav2Vec2Model
    from wav2vec2.profiles import Profile
    from wav2vec2.sparsity import Size

# Torch is imported once the flags are known to be right: it takes seconds.

# Shares of the model's own sizes, and of its D, that are measured.
SHARES, EMBED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1), (1 / 4, 1 / 2, 1)
# Multiples of widths that a machine may like, and how much dearer the widths between them are then.
MULTIPLES, STEP = (16, 8, 4), 1.03
# Relative difference of a sum of parts from the whole that is worth a word.
ACCEPTED = 0.1


def _grid(size: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Return these shares of a size in multiples of 8 where it is large, and the size."""
    step = 8 if size >= 128 else 1
    return sorted({min(size, max(step, step * round(size * share / step))) for share in shares} | {size})


class Shapes:
    """The shapes that a model can be pruned to."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.full, counts = config, check_config(config), unit_counts(config)
        self.channels, self.heads, self.widths = (counts[name] for name in ("conv channels", "heads", "FFN dimensions"))
        self.units, self.taps = self.full.num_embed_units, self.full.encoder_pos_conv_kernel

    def shaped(
        self, channels: Sequence[int], units: int, rings: int, heads: Sequence[int], widths: Sequence[int]
    ) -> dict[str, Any]:
        """Return the config of a shape, without masks or head, with an encoder layer for each of ``heads``."""
        full = self.full
        attention: dict[str, Any] = {"encoder_num_heads": list(heads)}
        if is_wavlm(self.config):
            attention = {
                "encoder_total_num_heads": self.config["encoder_total_num_heads"][0],
                "encoder_remaining_heads": [list(range(count)) for count in heads],
            }
        return {
            **with_masks(self.config, ()),
            **attention,
            "extractor_conv_layer_config": [
                [count, *rest] for count, (_, *rest) in zip(channels, full.extractor_conv_layer_config, strict=True)
            ],
            "encoder_embed_dim": units * (full.encoder_embed_dim // self.units),
            "encoder_head_dim": full.encoder_head_dim,
            "encoder_pos_conv_kernel": 2 * rings - self.taps % 2,
            "encoder_num_layers": len(heads),
            "encoder_use_attention": [count > 0 for count in heads],
            "encoder_use_feed_forward": [count > 0 for count in widths],
            "encoder_ff_interm_features": list(widths),
            "aux_num_out": None,
        }

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield few models of two layers, a Latin square, in which all pairs of an operation's sizes occur."""
        channels, rings = [_grid(count) for count in self.channels], _grid((self.taps + 1) // 2)
        heads, widths, units = _grid(max(self.heads)), _grid(max(self.widths)), _grid(self.units, EMBED_SHARES)
        size = len(SHARES)
        for a, b in itertools.product(range(size), repeat=2):
            # Two neighbours' a + i * b and a + (i + 1) * b are each pair once.
            of_convs = [one[min((a + i * b) % size, len(one) - 1)] for i, one in enumerate(channels)]
            slots = [2 * (a + size * (b // len(EMBED_SHARES))) + layer for layer in range(2)]
            yield self.shaped(
                of_convs,
                units[min(b % len(EMBED_SHARES), len(units) - 1)],
                rings[min(a, len(rings) - 1)],
                [heads[slot % len(heads)] for slot in slots],
                [widths[slot % len(widths)] for slot in slots],
            )

    def steps(self) -> list[dict[str, Any]]:
        """Yield models of one width in all conv layers and feed-forwards, and of less by half of :data:`MULTIPLES`."""
        width = min(*self.channels, max(self.widths)) // 2 // 16 * 16
        if not width:
            return []
        return [
            self.shaped([width - less] * len(self.channels), self.units, 1, [1], [width - less])
            for less in (0, *(multiple // 2 for multiple in MULTIPLES))
        ]

    def checked(self) -> dict[str, dict[str, Any]]:
        """Return shapes to compare sums of parts on, by name."""
        whole = self.shaped(self.channels, self.units, (self.taps + 1) // 2, self.heads, self.widths)
        return {"whole model": whole} | {f"random shape {seed}": self._at_random(seed) for seed in (1, 2, 3)}

    def _at_random(self, seed: int) -> dict[str, Any]:
        """Return a shape as pruning leaves them: each size a random share of the model's."""
        draw = random.Random(seed)

        def some(count: int) -> int:
            step = 8 if count >= 128 else 1  # as prune.py leaves them where the machine likes that
            return min(count, max(1, round(count * draw.uniform(0.05, 1) / step)) * step)

        return self.shaped(
            [some(count) for count in self.channels],
            max(some(self.units), self.units // 4),
            some((self.taps + 1) // 2),
            [some(count) for count in self.heads],
            [some(count) for count in self.widths],
        )


def _passes(configs: Sequence[Mapping[str, Any]], conditions: "Conditions", folder: Path) -> "list[Passes]":
    """Make models of these configs, ready to run; exported ones are kept in ``folder`` and made once."""
    import torch

    from evaluation.latency import passes
    from wav2vec2.model import wav2vec2_model

    made = []
    for number, config in enumerate(cli.progress(configs, "models", unit="model")):
        torch.manual_seed(number)
        made.append(passes(wav2vec2_model(**config).eval(), conditions, folder / str(number)))
    return made


def measure(
    by_parts: Sequence[Any], whole: Sequence[Any], conditions: "Conditions", rounds: int, folder: Path
) -> tuple[list[Any], list[float]]:
    """Let models of these configs take turns; ``folder`` keeps what was measured.

    Returns:
        For each of ``by_parts`` the microseconds (passes, operations) as lists; for each of ``whole`` the fewest of a
        pass.

    Raises:
        UserError: the folder was begun with other settings.
    """
    configs = [*by_parts, *whole]
    path, begun = folder / "measured.json", json.loads(json.dumps([conditions._asdict(), configs]))
    measured: dict[str, Any] = {"of": begun, "rounds": []}
    if path.exists():
        measured = read_json(path, "times measured before", f"remove {folder}")
        if measured.get("of") != begun:
            raise UserError(f"{folder}: was begun with other settings or models; remove it, or give another --out")
    models = _passes(configs, conditions, folder)
    for turn in cli.progress(range(len(measured["rounds"]), rounds), "rounds", unit="round"):
        found: list[Any] = [None] * len(models)
        for number in range(len(models))[:: -1 if turn % 2 else 1]:
            one = models[number]
            found[number] = (
                one.parts().round(1).tolist() if number < len(by_parts) else min(one.whole() for _ in range(4))
            )
        measured["rounds"].append(found)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(measured))
    found = list(zip(*measured["rounds"], strict=True))
    times = [list(itertools.chain(*turns)) for turns in found[: len(by_parts)]]
    return times, [min(turns) for turns in found[len(by_parts) :]]


def prices(models: Sequence["Wav2Vec2Model"], times: Sequence[Any], num_samples: int) -> dict[str, Any]:
    """Turn the microseconds (passes, operations) of models into the profile's tables."""
    found: dict[str, dict[tuple[int, int], list[float]]] = {}
    for model, passes in zip(models, times, strict=True):
        for operation, durations in zip(model.operations(num_samples), zip(*passes, strict=True), strict=True):
            sizes = int(operation.sizes[0]), int(operation.sizes[1])
            found.setdefault(operation.key, {}).setdefault(sizes, []).extend(durations)
    tables = {}
    for key, cells in found.items():
        firsts, seconds = (sorted(set(sizes)) for sizes in zip(*cells, strict=True))
        fastest = {sizes: min(durations) for sizes, durations in cells.items()}
        spreads = [statistics.median(cells[sizes]) / max(fastest[sizes], 1e-9) - 1 for sizes in cells]
        tables[key] = {
            "sizes": [firsts, seconds],
            "microseconds": [[fastest[first, second] for second in seconds] for first in firsts],
            "spread": round(statistics.median(spreads), 3),
        }
    return tables


def check(contents: dict[str, Any], configs: Mapping[str, Any], measured: Sequence[float]) -> list[dict[str, Any]]:
    """Compare sums of parts with the microseconds of whole models; returns a row for each."""
    from wav2vec2.profiles import Profile

    profile, rows = Profile(contents), []
    for (name, config), time in zip(configs.items(), measured, strict=True):
        expected = float(profile.costs(_meta(config).operations(profile.num_samples)).sum())
        rows.append({"shape": name, "expected": round(expected, 1), "measured": round(time, 1)})
        print(f"{name:15} {expected / 1e3:9.2f} ms expected {time / 1e3:9.2f} ms measured {expected / time - 1:+7.1%}")
    return rows


def liked_multiple(models: Sequence["Wav2Vec2Model"], times: Sequence[Any], num_samples: int) -> int:
    """Return the largest of :data:`MULTIPLES` where the width half way below one takes longer than it, or 1."""
    totals = []
    for model, passes in zip(models, times, strict=True):
        kinds = [operation.kind for operation in model.operations(num_samples)]
        fastest = [min(durations) for durations in zip(*passes, strict=True)]
        totals.append(sum(time for kind, time in zip(kinds, fastest, strict=True) if kind in ("conv", "feed_forward")))
    return next((m for m, total in zip(MULTIPLES, totals[1:], strict=False) if total > STEP * totals[0]), 1)


def _meta(config: Mapping[str, Any]) -> "Wav2Vec2Model":
    """Make a model without memory for its weights."""
    import torch

    from wav2vec2.model import wav2vec2_model

    with torch.device("meta"):
        return wav2vec2_model(**config)


def profile(args: argparse.Namespace) -> None:
    """Measure, and write the file."""
    import torch

    from evaluation.cost import made_by
    from evaluation.latency import Conditions
    from wav2vec2.files.checkpoint import read_model_file

    torch.set_num_threads(args.threads)
    check_writable(args.out)
    conditions = Conditions(*(getattr(args, name) for name in Conditions._fields))
    partial = args.out.with_name(f"{args.out.name}.partial")
    configs = [read_model_file(path)["config"] for path in args.model]
    tables: dict[str, Any] = {}
    checked = []
    for number, config in enumerate(configs):
        shapes = Shapes(config)
        grid, steps, others = list(shapes.grid()), shapes.steps(), shapes.checked()
        folder = partial / str(number)
        times, whole = measure([*grid, *steps], list(others.values()), conditions, args.rounds, folder)
        models = [_meta(one) for one in (*grid, *steps)]
        tables = {**prices(models[: len(grid)], times[: len(grid)], conditions.num_samples), **tables}
        if not number:
            multiple = liked_multiple(models[len(grid) :], times[len(grid) :], conditions.num_samples)
        checked.append((others, whole))
    contents = {
        "format": FORMAT,
        "made_by": made_by(torch.device(args.device)),
        **conditions._asdict(),
        "multiple": multiple,
        "models": configs,
        "prices": tables,
    }
    contents["checked"] = [row for one in checked for row in check(contents, *one)]
    with atomic_path(args.out) as temporary:
        temporary.write_text(_readable(contents) + "\n", encoding="utf-8")
    # shutil.rmtree(partial)
    off = max(abs(row["expected"] / row["measured"] - 1) for row in contents["checked"])
    print(f"written to {args.out}" + (f"; sums of parts are up to {off:.0%} off" if off > ACCEPTED else ""))


def show(args: argparse.Namespace) -> None:
    """Print where the time goes, and what each kind of unit can free at most."""
    from hardconcrete import HardConcrete
    from wav2vec2.files.checkpoint import read_model_file
    from wav2vec2.flops import UTTERANCE_SECONDS
    from wav2vec2.profiles import Profile
    from wav2vec2.sparsity import Size, expected_size, smallest_size

    profile, config = Profile(read_profile(args.show)), read_model_file(args.model[0])["config"]
    model = _meta(with_masks(config, ()))
    whole, about = expected_size(model, profile), profile.contents
    print(
        f"{args.model[0]}: {whole.latency / 1e3:.1f} ms for {about['batch']} x {about['seconds']:g} s of audio, "
        f"{whole.macs / 1e9:.2f} G multiply-adds for {UTTERANCE_SECONDS} s, {whole.params:,.0f} parameters\n"
        f"{about['backend']}, {about['precision']} bits, {about['threads']} threads, {about['made_by']['device']}"
    )
    _table("where they go", _shares(model, profile))
    units = args.pruning_units.split(",")
    freed = {}
    for name, chosen in {**{unit: [unit] for unit in units}, "all together": units}.items():
        masked = _meta(with_masks(config, chosen))
        for mask in masked.modules():
            if isinstance(mask, HardConcrete):
                mask.to_empty(device="cpu")  # their values are all that smallest_size needs
        smallest = smallest_size(masked, profile)
        freed[name] = Size(*(1 - least / size for least, size in zip(smallest, whole, strict=True)))
    _table("what can go at most", freed)
    print(
        f"No target reaches {smallest.latency / 1e3:.1f} ms, {smallest.macs / 1e9:.2f} G multiply-adds or "
        f"{smallest.params:,.0f} parameters with these units."
    )


def _shares(model: "Wav2Vec2Model", profile: "Profile") -> "dict[str, Size]":
    """Return the shares of each kind of operation in a model's parameters, multiply-adds and time."""
    from wav2vec2.flops import UTTERANCE_SECONDS
    from wav2vec2.operations import MACS, macs_of
    from wav2vec2.sparsity import Size

    operations = model.operations(profile.num_samples)
    modules = {name: module for name, module in model.named_modules()}
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
    print(f"\n{title:20} {'time':>7} {'MACs':>7} {'parameters':>11}")
    for name, (params, macs, latency) in rows.items():
        bar = "#" * round(40 * latency)
        print(f"{name:20} {latency:7.1%} {macs:7.1%} {params:11.1%}  {bar}".rstrip())


def _readable(value: Any, indent: str = "") -> str:
    """Return JSON in which each list of numbers is a line."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(one, (dict, list)) for one in inner):
        return json.dumps(value)
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    lines = [f"{indent} {name}{_readable(one, indent + ' ')}" for name, one in zip(names, inner, strict=True)]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return start + "\n" + ",\n".join(lines) + f"\n{indent}{end}"


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
    units = ",".join(PRUNING_UNITS)
    parser.add_argument("--pruning_units", default=units, help="for --show: kinds of units, comma separated")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each model, three passes each")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.show is not None:
        show(args)
    else:
        profile(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
