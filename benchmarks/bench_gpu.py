"""What the fast paths, --compile and recomputed activations give on one GPU, in under eight minutes.

    bash benchmarks/gpu.sh
    python benchmarks/bench_gpu.py --out results/bench_gpu.csv --sections hubert inference
    python benchmarks/bench_gpu.py --out results/tiny.csv --tiny --device cpu     that all of it runs, nothing more

Sections, each in a process of its own with its own share of the time (what a section has measured when its time is
over counts):

    hubert, wavlm   an update of joint distillation and pruning, 160 s of audio in 13 utterances, HuBERT Base and WavLM
                    Base+: plain paths in float16 (baseline), fast paths in bfloat16, and these compiled; with the
                    share of the device's peak, peak memory, and graphs compiled after the first update
    recompute       the same update of HuBERT Base in bfloat16 with and without --checkpoint_activations
    channels        the same with and without channels last in the extractor
    inference       HuBERT Base (baseline) and a model of a quarter of its parameters in bfloat16, 10 s x 1 and x 8

Weights are random; values are medians.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from training.batch_size import MemoryMeter  # noqa: E402
from training.throughput import peak_flops  # noqa: E402

import cli  # noqa: E402
from benchmarks.bench_model import DISTILLED, compressed_config, distill_module, masked_copy  # noqa: E402
from benchmarks.results import Result, write_results  # noqa: E402
from lightning import cast_products  # noqa: E402
from training import compiling  # noqa: E402
from wav2vec2.errors import UserError  # noqa: E402
from wav2vec2.fast import plain_paths  # noqa: E402
from wav2vec2.model import Wav2Vec2Model, hubert_base, wav2vec2_model, wavlm_base  # noqa: E402

# Seconds of each section; with starting up they stay below eight minutes.
SECTION_SECONDS = {"hubert": 125, "wavlm": 125, "recompute": 45, "channels": 45, "inference": 100}
# A compilation is not begun with less time left: it cannot be cut short.
COMPILING_SECONDS = 30
UPDATES = 10
UPDATE_SHAPE = (13, 196_923)  # 160 s
INFERENCE_SHAPES = [(1, 160_000), (8, 160_000)]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of this script, from ``arguments`` or the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--out", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--sections", nargs="+", choices=SECTION_SECONDS, default=list(SECTION_SECONDS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and little audio: a test of this script")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # seconds for the one section of this process
    return parser.parse_args(arguments)


class Bench:
    """What the sections share.

    Args:
        device: "cuda" or "cpu".
        tiny: models of three small layers, audio of a moment, and compiling without Inductor.
        seconds: for everything.
    """

    def __init__(self, device: str, tiny: bool, seconds: float) -> None:
        self.device = torch.device(device)
        self.tiny = tiny
        self.groups = [[0], [1, 3]] if tiny else DISTILLED
        self.update_shape = (3, 4_000) if tiny else UPDATE_SHAPE
        self.inference_shapes = [(1, 4_000), (2, 4_000)] if tiny else INFERENCE_SHAPES
        self._end = time.monotonic() + seconds
        if tiny:
            compiling.BACKEND = "eager"

    @property
    def name(self) -> str | None:
        """The GPU's name; None for a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def model(self, make: Callable[[], Wav2Vec2Model]) -> Wav2Vec2Model:
        """A model in eval mode on the device, three small layers of it in a tiny benchmark."""
        with torch.device("meta"):
            config = make().config
        if self.tiny:
            config = tiny_config(config)
        torch.manual_seed(0)
        return wav2vec2_model(**config).eval().to(self.device)

    def has(self, seconds: float) -> bool:
        """Whether so much of the time is left."""
        return time.monotonic() + seconds < self._end

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def meter(self) -> MemoryMeter:
        """A meter for what is made from now on, with the memory of what is not needed any more given back."""
        gc.collect()  # a module and its compiled methods hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return MemoryMeter(self.device)

    def median_seconds(self, work: Callable[[], Any]) -> tuple[float, int]:
        """Of work that has run before; and how often it ran, :data:`UPDATES` times or until the time is over."""
        taken: list[float] = []
        while not taken or (len(taken) < UPDATES and self.has(2 * taken[-1])):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken), len(taken)


def tiny_config(config: dict[str, Any]) -> dict[str, Any]:
    """Three small layers of a model of the same family."""
    num_layers, dim, num_heads = 3, 32, 4
    conv_layers = [(8, kernel, stride) for _, kernel, stride in config["extractor_conv_layer_config"]]
    tiny = {
        **config,
        "extractor_conv_layer_config": conv_layers,
        "encoder_embed_dim": dim,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": num_layers,
        "encoder_ff_interm_features": [48] * num_layers,
        "encoder_use_attention": [True] * num_layers,
        "encoder_use_feed_forward": [True] * num_layers,
    }
    if "encoder_remaining_heads" in config:
        heads = {
            "encoder_total_num_heads": [num_heads] * num_layers,
            "encoder_remaining_heads": [list(range(num_heads))] * num_layers,
        }
    else:
        heads = {"encoder_num_heads": [num_heads] * num_layers, "encoder_head_dim": dim // num_heads}
    return tiny | heads


# ---------------------------------------------------------------------------------------------- update


class Update:
    """Makes updates of joint distillation and pruning.

    Args:
        bench: device and sizes.
        make: makes the teacher.
        precision: "16" (with a loss scaler), "bf16" or "32".
        plain: take the plain paths.
        compiles: as ``--compile``.
        recompute: as ``--checkpoint_activations``.
        channels_last: of both extractors; None as they like.
    """

    def __init__(
        self,
        bench: Bench,
        make: Callable[[], Wav2Vec2Model],
        precision: str,
        plain: bool = False,
        compiles: bool = False,
        recompute: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        teacher = bench.model(make)
        self._dtype = {"16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        self._device, self._plain = bench.device.type, plain
        with plain_paths(plain):
            self.module = distill_module(teacher, masked_copy(teacher), bench.groups, use_reg=True).to(bench.device)
            self._optimizer = self.module.configure_optimizers()["optimizer"]
        if not plain:
            teacher.fold_weight_norm()
            if self._dtype is not None:
                cast_products(teacher, self._dtype)
        self._scaler = torch.amp.GradScaler(self._device, enabled=precision == "16")
        self.module.student_model.recompute_activations(recompute)
        for model in (teacher, self.module.student_model):
            model.feature_extractor.channels_last = channels_last
        if compiles:
            self.module.compile_steps(1)
        waveforms = torch.randn(bench.update_shape, device=bench.device)
        # The loader knows that crops have no padding; the published program gives lengths all the same.
        lengths = torch.full(bench.update_shape[:1], bench.update_shape[1], device=bench.device)
        self._batch = (waveforms, lengths if plain else None)
        rows, samples = bench.update_shape
        self.operations = rows * self.module.update_flops()(samples)

    def __call__(self) -> None:
        with plain_paths(self._plain):
            with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
                loss = self.module.loss(self._batch, self.module.targets(self._batch), "train")
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()


def measure_updates(
    bench: Bench, section: str, make: Callable[[], Wav2Vec2Model], variants: dict[str, dict[str, Any]]
) -> Iterator[Result]:
    """Speed and memory of updates with different settings of :class:`Update`; the first is the baseline."""
    baselines: list[tuple[float, float]] = []
    for name, settings in variants.items():
        if settings.get("compiles") and not bench.has(COMPILING_SECONDS):
            continue
        meter = bench.meter()
        update = Update(bench, make, **settings)
        for _ in range(3):  # kernels are chosen, code is compiled, the optimiser's state is made
            update()
        before = compiling.num_compiled_graphs()
        megabytes = meter(update) / 1e6
        seconds, repetitions = bench.median_seconds(update)
        baselines.append((seconds, megabytes))
        first_seconds, first_megabytes = baselines[0]
        yield Result(section, f"{name}: update", seconds, "s", first_seconds / seconds, repetitions)
        # On a CPU what is tiny may fit into what the process holds already.
        memory = megabytes / first_megabytes if first_megabytes else None
        yield Result(section, f"{name}: peak memory", megabytes, "MB", memory, 1)
        peak = None if bench.name is None else peak_flops(bench.name, settings["precision"])
        if peak is not None:
            yield Result(section, f"{name}: share of peak", update.operations / seconds / peak, "", None, repetitions)
        if settings.get("compiles"):
            graphs = compiling.num_compiled_graphs() - before
            yield Result(section, f"{name}: graphs compiled after warm-up", graphs, "", None, repetitions)
        del update


def bench_family(bench: Bench, section: str, make: Callable[[], Wav2Vec2Model], label: str) -> Iterator[Result]:
    # CPUs have no loss scaler.
    baseline = "16" if bench.device.type == "cuda" else "32"
    variants = {
        f"{label}, plain {baseline}": {"precision": baseline, "plain": True},
        f"{label}, fast bf16": {"precision": "bf16"},
        f"{label}, fast bf16 compiled": {"precision": "bf16", "compiles": True},
    }
    yield from measure_updates(bench, section, make, variants)


def bench_recompute(bench: Bench) -> Iterator[Result]:
    variants = {
        "activations kept": {"precision": "bf16"},
        "activations recomputed": {"precision": "bf16", "recompute": True},
    }
    yield from measure_updates(bench, "recompute", hubert_base, variants)


def bench_channels(bench: Bench) -> Iterator[Result]:
    variants = {
        "channels first": {"precision": "bf16", "channels_last": False},
        "channels last": {"precision": "bf16", "channels_last": True},
    }
    yield from measure_updates(bench, "channels", hubert_base, variants)


# ---------------------------------------------------------------------------------------------- inference


def bench_inference(bench: Bench) -> Iterator[Result]:
    """Seconds of work per second of audio."""
    models = {
        "HuBERT Base": bench.model(hubert_base).bfloat16(),
        "HuBERT, 75% less": bench.model(lambda: wav2vec2_model(**compressed_config("HuBERT Base"))).bfloat16(),
    }
    for model in models.values():
        model.fold_weight_norm()
    for shape in bench.inference_shapes:
        waveforms = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
        baseline = None
        for compiles in (False, True):
            for name, model in models.items():
                if compiles and not bench.has(COMPILING_SECONDS):
                    continue
                run = model.extract_features
                if compiles:
                    run = compiling.compiled(run, len(bench.inference_shapes) * len(models))
                with torch.no_grad():
                    for _ in range(3):
                        run(waveforms)
                    seconds, repetitions = bench.median_seconds(lambda run=run, x=waveforms: run(x))
                baseline = baseline or seconds
                audio_seconds = waveforms.numel() / 16000
                label = f"{name}, {shape[1] / 16000:g} s x {shape[0]}{', compiled' if compiles else ''}"
                yield Result("inference", label, seconds / audio_seconds, "RTF", baseline / seconds, repetitions)


SECTIONS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "hubert": lambda bench: bench_family(bench, "hubert", hubert_base, "HuBERT Base"),
    "wavlm": lambda bench: bench_family(bench, "wavlm", wavlm_base, "WavLM Base+"),
    "recompute": bench_recompute,
    "channels": bench_channels,
    "inference": bench_inference,
}


# ---------------------------------------------------------------------------------------------- the script


def run_section(args: argparse.Namespace, section: str) -> list[Result]:
    """Measure a section in a process of its own, which is ended when its time is over."""
    seconds = 600 if args.tiny else SECTION_SECONDS[section]
    flags = ["--sections", section, "--device", args.device, *(["--tiny"] if args.tiny else [])]
    command = [sys.executable, __file__, "--out", args.out, *flags, "--child", seconds]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=seconds + 5)
            if process.returncode:
                print(f"{section}: ended with status {process.returncode}", file=sys.stderr)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            print(f"{section}: not done after {seconds} s, some numbers are missing", file=sys.stderr)
    return [Result(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]


def main(args: argparse.Namespace) -> None:
    """Measure every section, write and show; as a child, one section to standard output."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is found; --tiny --device cpu shows that this script runs")
    if args.child is not None:
        (section,) = args.sections
        for result in SECTIONS[section](Bench(args.device, args.tiny, args.child)):
            print(json.dumps(result._asdict()), flush=True)
        return
    results: list[Result] = []
    for section in args.sections:
        results += run_section(args, section)
    if not results:
        raise UserError("nothing could be measured; see the messages above")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_results(args.out, results, Bench(args.device, args.tiny, 0).name)


if __name__ == "__main__":
    cli.run(main, parse_args())
