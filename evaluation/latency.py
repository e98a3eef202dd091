"""Times of a forward pass, of the whole and by operation, in PyTorch and in ONNX Runtime.

Operations are timed inside whole passes: caches are as they will be, and the parts add up to the whole. An operation's
time is that of its module, without that of the operations inside it. With one thread on a CPU the processor's time is
taken, which other programs do not lengthen; ONNX Runtime's trace has the clock's.
"""

import copy
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.cost import made_by
from exporters.onnx import ONNX, OnnxOptions, convert, onnx_session
from exporters.options import DEFAULT_OPSET, check_onnx
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path
from wav2vec2.model import Wav2Vec2Model, wav2vec2_model, with_masks
from wav2vec2.profiles import Profile
from wav2vec2.utils.quiet import quiet

DTYPES = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
# Passes that one call of `parts` times, and turns of a comparison.
_PASSES, _TURNS = 3, 6
_LAYER = re.compile(r".*\.layers\.\d+")


class Conditions(NamedTuple):
    """The conditions that times are measured under, as a profile's file names them."""

    backend: str  # "torch" or "onnx"
    device: str  # "cpu" or "cuda"
    precision: str  # a key of DTYPES
    threads: int
    batch: int  # waveforms of one pass
    seconds: float  # of each

    @property
    def num_samples(self) -> int:
        return round(self.seconds * SAMPLE_RATE)

    def waveforms(self) -> torch.Tensor:
        """Return noise (B, T) on the CPU, in float32."""
        return torch.randn(self.batch, self.num_samples, generator=torch.Generator().manual_seed(0))


class Passes:
    """Passes of a model over the waveforms of some conditions.

    ``run()`` makes one and waits for its end. ``parts()`` makes one to warm up, then returns the microseconds
    (passes, n) of the model's n operations in others.
    """

    run: Callable[[], None]
    parts: Callable[[], np.ndarray]

    def __init__(self, conditions: Conditions) -> None:
        on_one_core = conditions.device == "cpu" and conditions.threads == 1
        self.clock = time.thread_time if on_one_core else time.perf_counter

    def whole(self) -> float:
        """Return the microseconds of a pass."""
        start = self.clock()
        self.run()
        return 1e6 * (self.clock() - start)


class TorchPasses(Passes):
    """Passes in PyTorch."""

    def __init__(self, model: Wav2Vec2Model, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.device, dtype = torch.device(conditions.device), DTYPES[conditions.precision]
        self.model = copy.deepcopy(model).eval().to(self.device, dtype)
        self.model.fold_weight_norm()
        self.waveforms = conditions.waveforms().to(self.device, dtype)
        self.modules = [operation.module for operation in self.model.operations(conditions.num_samples)]

    def run(self) -> None:
        with torch.inference_mode():
            self.model(self.waveforms)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def parts(self) -> np.ndarray:
        self.run()
        return np.array([self._parts() for _ in range(_PASSES)])

    def _parts(self) -> list[float]:
        with _traced(self.modules, self.model, self._now) as borders:
            self.run()
        spent: Counter[int] = Counter()
        for (_, start), (owner, end) in zip(borders, borders[1:], strict=False):
            spent[owner] += 1e3 * start.elapsed_time(end) if self.device.type == "cuda" else 1e6 * (end - start)
        return [spent[number] for number in range(len(self.modules))]

    def _now(self) -> Any:
        """Return the time, on a GPU an event in its queue."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def _traced(modules: list[Any], model: Wav2Vec2Model, now: Callable[[], Any]) -> Iterator[list[tuple[int, Any]]]:
    """Record each border between operations: the number of the one before it, and when it was."""
    borders: list[tuple[int, Any]] = []
    running = [len(modules) - 1]  # the whole model's own time is the last

    def charged(function: Callable[..., Any], number: int, *args: Any, **options: Any) -> Any:
        borders.append((running[-1], now()))
        running.append(number)
        result = function(*args, **options)
        borders.append((running.pop(), now()))
        return result

    def first_layer(function: Callable[..., Any], waveforms: torch.Tensor) -> Callable[..., Any]:
        return partial(charged, charged(function, 0, waveforms), 0)

    extractor = model.feature_extractor
    # Memory of the layers is given back between them: the extractor's own time is the first layer's.
    replaced = [(extractor, "forward", partial(charged, extractor.forward, 0))]
    replaced.append((extractor, "_first_layer", partial(first_layer, extractor._first_layer)))
    for number, module in enumerate(modules):
        for name in ("forward", "forward_frames"):
            if hasattr(module, name):
                replaced.append((module, name, partial(charged, getattr(module, name), number)))
    for owner, name, function in replaced:
        owner.__dict__[name] = function
    try:
        yield borders
    finally:
        for owner, name, _ in replaced:
            del owner.__dict__[name]


class OnnxPasses(Passes):
    """Passes in ONNX Runtime, of the file that export.py writes."""

    def __init__(self, model: Wav2Vec2Model, conditions: Conditions, folder: Path) -> None:
        super().__init__(conditions)
        self.path = folder / ONNX
        if not folder.exists():
            with atomic_path(folder) as temporary, quiet():
                temporary.mkdir()
                convert(model, OnnxOptions(), temporary / ONNX)
        self.is_pre_norm = model.encoder.transformer.layer_norm_first
        operations = model.operations(conditions.num_samples)
        names = {module: name for name, module in model.named_modules()}
        self.owners = {names[operation.module]: number for number, operation in enumerate(operations)}
        if (table := model.encoder.transformer.bucket_table) is not None:
            self.owners[names[table]] = self.owners[""]  # one layer's, but looked up before the layers
        self.num_operations = len(operations)
        waveforms = conditions.waveforms().numpy()
        self.feeds = {"waveforms": waveforms, "lengths": np.full(len(waveforms), waveforms.shape[1])}
        self.session: Any = None

    def run(self) -> None:
        self.session = self.session or onnx_session(self.path)
        self.session.run(None, self.feeds)

    def parts(self) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            session = onnx_session(self.path, trace=Path(folder, "trace"))
            for _ in range(1 + _PASSES):
                session.run(None, self.feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        passes = [event for event in events if event["name"] == "SequentialExecutor::Execute"]
        nodes = [event for event in events if event["name"].endswith("_kernel_time")]
        return np.array([self._parts(one, nodes) for one in passes[1:]])

    def _parts(self, one: Mapping[str, Any], nodes: list[dict[str, Any]]) -> list[float]:
        spent: dict[int, float] = dict.fromkeys(range(self.num_operations), 0.0)
        owner = norms = self.owners[""]
        for node in nodes:
            if not 0 <= node["ts"] - one["ts"] < one["dur"]:
                continue
            module, slash, _ = node["name"].rpartition("/")
            if slash:
                if (layer := _LAYER.match(module)) and not self.is_pre_norm:
                    norms = self.owners[layer[0]]
                while module not in self.owners:
                    module = module.rpartition(".")[0]
                owner = self.owners[module]
            elif "LayerNorm" in node["name"]:  # made of a norm and the residual before it; pre-norm, of the last norm
                owner = norms
            spent[owner] += node["dur"] + 0.5  # the trace cuts fractions off
        return list(spent.values())


def passes(model: Wav2Vec2Model, conditions: Conditions, folder: Path) -> Passes:
    """Make a model without masks, on the CPU, ready to run; a file that it needs is in ``folder``, made if missing."""
    if conditions.backend == "torch":
        return TorchPasses(model, conditions)
    check_onnx(DEFAULT_OPSET)
    if model.encoder.chunk_frames is not None:
        raise UserError("backend onnx: found a streaming model, whose file has no whole passes to time; take torch")
    return OnnxPasses(model, conditions, folder)


class Part(NamedTuple):
    """An operation's microseconds by a profile, and as measured."""

    name: str  # its kind, and the number of its layer, from 0
    expected: float
    measured: float


class Comparison(NamedTuple):
    """The microseconds of a whole pass by a profile, and as measured, and those of its parts."""

    expected: float
    measured: float
    parts: list[Part]


def is_this_machine(profile: Profile) -> bool:
    """Return whether a profile was made on a machine like this one."""
    device = profile.contents["device"]
    has_device = device != "cuda" or torch.cuda.is_available()
    return has_device and made_by(torch.device(device))["device"] == profile.contents["made_by"]["device"]


def compare(profile: Profile, models: Mapping[str, Wav2Vec2Model]) -> dict[str, Comparison]:
    """Time models without masks, in eval mode on the CPU, taking turns under a profile's conditions.

    Raises:
        UserError: the profile has no times for a part of a model, or a package that its backend needs is missing.
    """
    conditions = Conditions(*(profile.contents[name] for name in Conditions._fields))
    operations = {name: model.operations(profile.num_samples) for name, model in models.items()}
    expected = {name: profile.costs(found).tolist() for name, found in operations.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ready = [passes(model, conditions, Path(folder, str(i))) for i, model in enumerate(models.values())]
            turns = [[(one.whole(), one.parts()) for one in ready] for _ in range(_TURNS)]
    finally:
        torch.set_num_threads(threads)
    found = {}
    for name, of_model in zip(models, zip(*turns[1:], strict=True), strict=True):  # the first is to warm up
        measured = np.concatenate([parts for _, parts in of_model]).min(0).tolist()
        numbers = {module: re.findall(r"\d+", path) for path, module in models[name].named_modules()}
        names = [" ".join([operation.kind, *numbers[operation.module]]) for operation in operations[name]]
        whole = min(whole for whole, _ in of_model)
        found[name] = Comparison(sum(expected[name]), whole, list(map(Part, names, expected[name], measured)))
    return found


# Relative difference between expected and measured times that is worth a warning, and the parts that it names.
ACCEPTED, _NAMED = 0.1, 3


def times_of(
    profile: Profile, pruned: dict[str, Any], original: dict[str, Any], teacher_time: float | None
) -> tuple[str, list[str]]:
    """Say which share of the teacher's time a pruned model takes: expected, and measured where this is the machine.

    Args:
        profile: the times that the model was pruned for.
        pruned: its config.
        original: the config of the model before pruning, which may be of another shape than the teacher.
        teacher_time: the teacher's expected microseconds (default: those of ``original``).

    Returns:
        A line, and lines that warn of a difference of more than :data:`ACCEPTED`.
    """
    configs = {"original": original, "pruned": pruned}
    models = {name: wav2vec2_model(**with_masks(config, ())).eval() for name, config in configs.items()}
    expected = {name: float(profile.total(model.operations(profile.num_samples))) for name, model in models.items()}
    whole, milliseconds = teacher_time or expected["original"], 1e3 * profile.audio_seconds

    def words(time: float, teacher: float) -> str:
        return f"{time / teacher:.4f} of the teacher's ({time / milliseconds:.3g}ms/s)"

    line = f"time: {words(expected['pruned'], whole)} expected"
    if not is_this_machine(profile):
        return f"{line}; the profile is of another machine, {profile.contents['made_by']['device']}", []
    try:
        found = compare(profile, models)
    except UserError as error:  # the backend is not installed here
        return f"{line}; not measured: {error}", []
    speed = found["original"].measured / expected["original"]  # a machine that is slower now is slower for both
    line += f", {words(found['pruned'].measured, speed * whole)} measured"
    if abs(found["pruned"].measured / speed / expected["pruned"] - 1) <= ACCEPTED:
        return line, []
    parts = sorted(found["pruned"].parts, key=lambda part: -abs(part.measured / speed - part.expected))[:_NAMED]
    named = ", ".join(f"{part.name} takes {part.measured / speed / part.expected:.2f} of its time" for part in parts)
    advice = "make the profile again on a quiet machine"
    return line, [f"warning: expected and measured are more than {ACCEPTED:.0%} apart: {named}; {advice}"]
