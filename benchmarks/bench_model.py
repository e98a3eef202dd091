"""Time training and inference: the fast paths beside the plain ones, and beside transformers.

    python -m benchmarks.bench_model --out results/bench_model.csv
    python -m benchmarks.bench_model --out results/bench_update.csv --sections update --threads 2

    update      one update on 2 x 8 s, with dropout, of joint distillation and pruning (a student of the teacher's
                shape, with masks) and of the final distillation (a compressed one); baseline: plain paths in float32
    inference   all hidden states of one waveform; baseline: transformers' model of the teacher's shape in float32

Weights and waveforms are random; what is compared takes turns; values are medians.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import mul
from typing import Any

import cli
from benchmarks.results import Result, compare, make_parser, seconds, write_results
from wav2vec2.audio import SAMPLE_RATE

# Torch is imported once the flags are known to be right: it takes seconds.


def bench_update(args: argparse.Namespace) -> list[Result]:
    """Measure the seconds of one update, each variant in a process of its own."""
    from benchmarks import updates

    results = []
    for name, stage in itertools.product(updates.TEACHERS, ("joint", "final")):
        pools = {}
        for precision, path in itertools.product(updates.precisions(), ("plain", "fast")):
            setting = (args.threads, name, stage, path, precision, (2, 8 * SAMPLE_RATE), "cpu")
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), updates.start_process, setting)
            pools[f"{path} {precision}"] = pool
            pool.submit(updates.run_update).result()  # memory and kernels
        work = {variant: lambda pool=pool: pool.submit(updates.run_update).result() for variant, pool in pools.items()}
        results += compare("update", f"{name}, {stage}, {{}}", work, args.repetitions)
        for pool in pools.values():
            pool.shutdown()
    return results


def timed(run: Callable[[Any], Any], waveforms: Any, plain: bool = False) -> float:
    import torch

    from wav2vec2.fast import plain_paths

    with torch.inference_mode(), plain_paths(plain):
        return seconds(partial(run, waveforms))


def bench_inference(args: argparse.Namespace) -> list[Result]:
    """Measure real-time factors: seconds of work per second of audio."""
    import torch
    import transformers

    from benchmarks import updates
    from wav2vec2.model import wav2vec2_model

    torch.set_num_threads(args.threads)
    fused: dict[str, Any] = {"attn_implementation": "sdpa"}  # WavLM has none
    theirs = {
        "HuBERT Base": transformers.HubertModel(transformers.HubertConfig(**fused)).eval(),
        "WavLM Base": transformers.WavLMModel(transformers.WavLMConfig()).eval(),
    }
    results = []
    for name, length in itertools.product(updates.TEACHERS, args.seconds):
        waveforms = torch.randn(1, round(length * SAMPLE_RATE))
        work = {"transformers 32": partial(timed, partial(theirs[name], output_hidden_states=True), waveforms)}
        configs = {"full": updates.TEACHERS[name]().config, "compressed": updates.compressed_config(name)}
        for size, precision, path in itertools.product(configs, updates.precisions(), ("plain", "fast")):
            dtype = updates.DTYPES[precision]
            model = wav2vec2_model(**configs[size]).eval().to(dtype)
            if path == "fast":
                model.fold_weight_norm()
            run = partial(timed, model.extract_features, waveforms.to(dtype), path == "plain")
            work[f"{size}, {path} {precision}"] = run
        for run in work.values():
            run()
        label = f"{name}, {{}}, {length:g} s"
        results += compare("inference", label, work, args.repetitions, "RTF", partial(mul, 1 / length))
    return results


SECTIONS = {"update": bench_update, "inference": bench_inference}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, repetitions=5)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", nargs="+", type=float, default=[1, 10], help="lengths for inference")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    write_results(args.out, [result for name in args.sections for result in SECTIONS[name](args)])


if __name__ == "__main__":
    cli.run(main, parse_args())
