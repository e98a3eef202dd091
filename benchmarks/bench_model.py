"""How fast the model runs and trains: the fast paths beside the plain ones, and beside transformers.

    python benchmarks/bench_model.py --out results/bench_model.csv
    python benchmarks/bench_model.py --out results/bench_model.csv --sections update --threads 2

Sections:

    update      one update on 2 x 8 s from FLAC files, HuBERT Base and WavLM Base, with dropout, in parts: wait for
                data (one loader process), teacher, student, backward, optimiser; of joint distillation and pruning (a
                student of the teacher's shape, with masks) and of the final distillation (a compressed student);
                baseline: the plain paths in float32
    inference   hidden states of waveforms of 1, 5 and 15 s, one and eight at a time; baseline: transformers' model of
                the teacher's shape in float32; peak memory above what the process held before

Weights are random; what is compared takes turns; values are medians.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch.utils.data import DataLoader

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import cli  # noqa: E402
import prepare_data  # noqa: E402
from benchmarks.bench_data import make_corpus  # noqa: E402
from benchmarks.results import Result, take_turns, write_results  # noqa: E402
from dataset.batches import Crop  # noqa: E402
from dataset.manifest import read_manifest  # noqa: E402
from dataset.speech import SpeechDataset  # noqa: E402
from lightning import DistillLoss, DistillModule, cast_products, clip_gradients, make_projections  # noqa: E402
from training.speed import keep_freed_memory  # noqa: E402
from wav2vec2.fast import plain_paths  # noqa: E402
from wav2vec2.model import Wav2Vec2Model, hubert_base, wav2vec2_model, wavlm_base, with_masks  # noqa: E402

# The dropouts that converters write into a teacher's config, for every model: the published training's.
DROPOUTS = {
    "encoder_projection_dropout": 0.1,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_drop": 0.05,
}
TEACHERS = {"HuBERT Base": partial(hubert_base, **DROPOUTS), "WavLM Base": partial(wavlm_base, **DROPOUTS)}
PUBLISHED_80 = REPOSITORY / "tests" / "data" / "reference" / "published_wavlm_base_s80.json"
UNITS = ["conv", "head", "interm"]
STAGES = ("joint", "final")
DISTILLED = [[0], [4, 8, 12]]
NUM_FILES = 16


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of this script, from ``arguments`` or the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--out", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", nargs="+", type=float, default=[1, 5, 15], help="lengths for inference")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="waveforms at a time for inference")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="for updates")
    parser.add_argument("--update_seconds", type=float, default=8, help="length of each of an update's two waveforms")
    return parser.parse_args(arguments)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by itself; elsewhere it is emulated, and slow."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# ---------------------------------------------------------------------------------------------- update


def bench_update(args: argparse.Namespace) -> list[Result]:
    """Seconds of one update and of its parts."""
    results = []
    precisions = ["32", "bf16"] if has_bfloat16() else ["32"]
    variants = [(path, precision) for precision in precisions for path in ("plain", "fast")]
    for name, stage in itertools.product(TEACHERS, args.stages):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            manifest = make_manifest(Path(folder), args.update_seconds)
            updates = {
                " ".join(variant): stack.enter_context(
                    InProcess(name, stage, manifest, args.update_seconds, *variant, args.threads)
                )
                for variant in variants
            }
            for update in updates.values():
                update()  # memory, kernels
                update.parts.clear()
            taken = take_turns(updates, args.repetitions)
        for variant, (total, ratio) in taken.items():
            label = f"{name}, {stage}, {variant}"
            results.append(Result("update", label, total, "s", ratio, args.repetitions))
            for part, *values in zip(TimedUpdate.PARTS, *updates[variant].parts, strict=True):
                middle = statistics.median(values)
                results.append(Result("update", f"{label}: {part}", middle, "s", None, args.repetitions))
    return results


def make_manifest(folder: Path, seconds: float) -> Path:
    """The manifest of a few FLAC files that are a little longer than ``seconds``."""
    make_corpus(folder / "audio", NUM_FILES, seconds + 0.1, seconds + 1)
    names = prepare_data.find_audio(str(folder / "audio"))
    rows = [f"{name}\t{soundfile.info(folder / 'audio' / name).frames}\n" for name in names]
    (folder / "train.tsv").write_text(f"{folder / 'audio'}\n" + "".join(rows))
    return folder / "train.tsv"


def load_batches(manifest: Path, seconds: float) -> Iterator[torch.Tensor]:
    """Batches of two crops of ``seconds``, (2, T), from one loader process, without an end."""
    num_samples = round(seconds * 16000)
    pairs = itertools.cycle(range(0, NUM_FILES, 2))
    crops = (Crop((first, first + 1), (0, 0), num_samples, seed=0, tops_up=False) for first in pairs)
    loader = DataLoader(SpeechDataset(read_manifest(manifest)), sampler=crops, batch_size=None, num_workers=1)
    return (batch.waveforms for batch in loader)


def masked_copy(teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    """A student that starts as its teacher, with masks on :data:`UNITS`."""
    student = wav2vec2_model(**with_masks(teacher.config, UNITS))
    masks = {key: value for key, value in student.state_dict().items() if key.endswith("log_alpha")}
    student.load_state_dict({**masks, **teacher.state_dict()})
    return student


def distill_module(
    teacher: Wav2Vec2Model, student: Wav2Vec2Model, groups: list[list[int]], use_reg: bool
) -> DistillModule:
    """What trains ``student`` with the published loss on the layers of ``groups``, without a log."""
    width = teacher.config["encoder_embed_dim"]
    module = DistillModule(
        teacher_model=teacher,
        student_model=student,
        distill_mode="layer2layer",
        distill_layers=[layer for group in groups for layer in group],
        distill_linear_projs=make_projections("layer2layer", groups, width, width),
        distill_loss=DistillLoss(0, 1, 1, "raw"),
        learning_rate=2e-4,
        weight_decay=0.0,
        warmup_updates=10,
        max_updates=100,
        use_reg=use_reg,
        reg_learning_rate=0.02,
        target_sparsity=0.75,
        sparsity_warmup_updates=10,
    )
    module._log_training = lambda values: None
    return module


class TimedUpdate:
    """Makes an update and says how long its parts took.

    Args:
        name: a teacher's, of :data:`TEACHERS`.
        stage: "joint", where the student starts as the teacher's copy with masks, or "final", where it is small.
        batches: of waveforms (B, T).
        plain: take the plain paths.
        precision: "32" or "bf16".
    """

    PARTS = ("data", "teacher", "student", "backward", "optimiser")

    def __init__(self, name: str, stage: str, batches: Iterator[torch.Tensor], plain: bool, precision: str) -> None:
        teacher = TEACHERS[name]()
        student = masked_copy(teacher) if stage == "joint" else wav2vec2_model(**compressed_config(name))
        self.module = distill_module(teacher, student, DISTILLED, use_reg=stage == "joint")
        self.plain, self.precision = plain, precision
        if not plain:
            teacher.fold_weight_norm()
            if precision == "bf16":
                cast_products(teacher, torch.bfloat16)
        with plain_paths(plain):
            self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.batches = batches

    def __call__(self) -> tuple[float, ...]:
        moments = [time.perf_counter()]
        waveforms = next(self.batches)
        # The loader knows that crops have no padding; the published program gives lengths all the same.
        batch = (waveforms, torch.full((len(waveforms),), waveforms.size(1)) if self.plain else None)
        moments.append(time.perf_counter())
        with plain_paths(self.plain):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                targets = self.module.targets(batch)
                moments.append(time.perf_counter())
                loss = self.module.loss(batch, targets, "train")
                moments.append(time.perf_counter())
            loss.backward()
            moments.append(time.perf_counter())
            clip_gradients(self.optimizer, 10.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            moments.append(time.perf_counter())
        return tuple(end - start for start, end in zip(moments, moments[1:], strict=False))


class InProcess:
    """A :class:`TimedUpdate` in a process of its own: how memory is kept is a setting of the whole process."""

    def __init__(self, *setting: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve_updates, args=(theirs, *setting))
        self.parts: list[tuple[float, ...]] = []

    def __enter__(self) -> "InProcess":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # ends it, and with it its loader
        self._process.join()

    def __call__(self) -> float:
        self._connection.send("update")
        self.parts.append(self._connection.recv())
        return sum(self.parts[-1])


def _serve_updates(
    connection: Any,
    name: str,
    stage: str,
    manifest: Path,
    seconds: float,
    path: str,
    precision: str,
    threads: int,
) -> None:
    """Make an update whenever asked and send the seconds of its parts."""
    torch.set_num_threads(threads)
    if path == "fast":
        keep_freed_memory()
    update = TimedUpdate(name, stage, load_batches(manifest, seconds), path == "plain", precision)
    with contextlib.suppress(EOFError):  # nobody asks any more
        while connection.recv():
            connection.send(update())


# ---------------------------------------------------------------------------------------------- inference


def compressed_config(name: str) -> dict[str, Any]:
    """HuBERT Base at a quarter of its parameters, every kind of unit pruned alike: 23.6 M; WavLM's published 80%."""
    if name == "WavLM Base":
        return json.loads(PUBLISHED_80.read_text())["config"]
    config = hubert_base().config
    shapes = {
        "extractor_conv_layer_config": [
            (320, kernel, stride) for _, kernel, stride in config["extractor_conv_layer_config"]
        ],
        "encoder_num_heads": [4] * 12,
        "encoder_ff_interm_features": [410] * 12,
    }
    return {**config, **shapes}


def transformers_model(family: str) -> torch.nn.Module:
    """transformers' HuBERT Base or WavLM Base, with its fused attention where it has one."""
    import transformers

    if family == "HuBERT Base":
        return transformers.HubertModel(transformers.HubertConfig(attn_implementation="sdpa")).eval()
    return transformers.WavLMModel(transformers.WavLMConfig()).eval()


def bench_inference(args: argparse.Namespace) -> list[Result]:
    """Real-time factor (seconds of work per second of audio) and peak memory."""
    results = []
    for family, small in (("HuBERT Base", "HuBERT, 75% less"), ("WavLM Base", "WavLM, 80% less")):
        models = {family: TEACHERS[family](), small: wav2vec2_model(**compressed_config(family))}
        theirs = transformers_model(family)
        for seconds in args.seconds:
            for batch in args.batch:
                waveforms = torch.randn(batch, round(seconds * 16000), generator=torch.Generator().manual_seed(0))
                variants = {"transformers 32": lambda x=waveforms, model=theirs: model(x, output_hidden_states=True)}
                for name, model in models.items():
                    variants |= our_variants(name, model.eval(), waveforms)
                where = f"{seconds:g} s x {batch}"
                results += compare_inference(family, where, variants, batch * seconds, args.repetitions)
    return results


def our_variants(name: str, model: Wav2Vec2Model, waveforms: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Functions that run a model on its plain and fast paths, and as a whole in bfloat16."""
    model.fold_weight_norm()  # only the fast paths use it

    def run(chosen: Wav2Vec2Model, x: torch.Tensor, plain: bool) -> Any:
        with plain_paths(plain):
            return chosen.extract_features(x)

    variants = {
        f"{name}, {path} 32": lambda path=path: run(model, waveforms, path == "plain") for path in ("plain", "fast")
    }
    if has_bfloat16():
        half = wav2vec2_model(**model.config).eval()
        half.load_state_dict(model.state_dict())
        half.fold_weight_norm()
        half.bfloat16()
        variants[f"{name}, fast bf16"] = lambda: run(half, waveforms.bfloat16(), False)
    return variants


def compare_inference(
    family: str, where: str, variants: dict[str, Callable[[], Any]], audio_seconds: float, repetitions: int
) -> list[Result]:
    """Real-time factors in turns, then the peak memory of one run each; the first variant is the baseline."""

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            work()
        return time.perf_counter() - start

    peaks = {name: peak_memory(work) for name, work in variants.items()}
    taken = take_turns({name: lambda work=work: timed(work) for name, work in variants.items()}, repetitions)
    first = next(iter(variants))
    results = []
    for name, (duration, ratio) in taken.items():
        label = f"{family}: {name}, {where}"
        results.append(Result("inference", label, duration / audio_seconds, "RTF", ratio, repetitions))
        results.append(Result("inference", label, peaks[name], "MB", peaks[name] / peaks[first], 1))
    return results


def peak_memory(work: Callable[[], Any]) -> float:
    """MB that ``work`` needs at its highest above what the process holds now (Linux)."""
    with torch.inference_mode():
        work()  # what is made once and kept does not count
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A number of kB from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


SECTIONS = {"update": bench_update, "inference": bench_inference}


def main(args: argparse.Namespace) -> None:
    """Measure, write and show."""
    torch.set_num_threads(args.threads)
    results: list[Result] = []
    for name in args.sections:
        results += SECTIONS[name](args)
    write_results(args.out, results)


if __name__ == "__main__":
    cli.run(main, parse_args())
