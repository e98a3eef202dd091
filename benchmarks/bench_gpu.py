"""Time updates on one GPU: the published setting against ours, in about five minutes.

    python -m benchmarks.bench_gpu --out results/bench_gpu.csv

An update of joint distillation and pruning, 160 s of audio in 13 utterances, HuBERT Base and WavLM Base+: the plain
paths in float16 with a loss scaler (published, the baseline), the fast paths in bfloat16 (ours), and these compiled;
with the memory that each needs beside what is always held, and the share of the device's peak.
"""

import argparse

import cli
from benchmarks.results import Result, compare, make_parser, write_results
from wav2vec2.files.errors import UserError

# Torch is imported once the flags are known to be right: it takes seconds.

SHAPE = (13, 196_923)  # 160 s
VARIANTS = {"published": ("plain", "16"), "ours": ("fast", "bf16"), "ours compiled": ("fast", "bf16")}


def bench_updates(name: str, repetitions: int, device: str) -> list[Result]:
    """Measure the seconds of a teacher's updates; on a GPU their memory and share of the device's peak as well."""
    import torch

    from benchmarks.updates import Update
    from training.speed import compile_steps, peak_flops, update_flops

    memory, label = [], f"{name}, {{}}"
    updates = {variant: Update(name, "joint", *setting, SHAPE, device) for variant, setting in VARIANTS.items()}
    for variant, update in updates.items():
        if "compiled" in variant:
            compile_steps(update.module)
        for _ in range(3):  # kernels are chosen, code is compiled, the optimiser's state is made
            update()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            update()
            needed = (torch.cuda.max_memory_allocated() - held) / 1e6
            memory.append(Result("memory", label.format(variant), needed, "MB", None, 1))
    results = compare("update", label, updates, repetitions)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if device == "cuda" else None
    if peak is not None:
        flops = SHAPE[0] * update_flops(updates["ours"].module)(SHAPE[1])
        results += [
            each._replace(value=flops / each.value / peak, unit="of peak", ratio_to_baseline=None) for each in results
        ]
    return memory + results


def main(args: argparse.Namespace) -> None:
    import torch

    from benchmarks import updates

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; --device cpu shows that this script runs, and takes long")
    results = [result for name in updates.TEACHERS for result in bench_updates(name, args.repetitions, args.device)]
    write_results(args.out, results, args.device)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, repetitions=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args())
