"""Times of a forward pass, of the whole and by operation, in PyTorch and in ONNX Runtime.

Operations are timed inside whole passes: caches are as they will be, and the parts add up to the whole. An operation's
time is that of its module, without that of the operations inside it.
"""

import copy
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.cost import made_by, timed
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
_PASSES, _TURNS = 3, 8
_LAYER = re.compile(r".*\.layers\.\d+")


class Conditions(NamedTuple):
    """The conditions that times are measured under, as a profile's file names them."""

    backend: str  # "torch" or "onnx"
    device: str  # "cpu" or "cuda"
    precision: str  # a key of DTYPES
    threads: int
    batch: int  # waveforms of one pass
    seconds: float  # of each

    @classmethod
    def of(cls, profile: Profile) -> "Conditions":
        """Return those of a profile."""
        return cls(*(profile.contents[name] for name in cls._fields))

    @property
    def num_samples(self) -> int:
        return round(self.seconds * SAMPLE_RATE)

    def waveforms(self) -> torch.Tensor:
        """Return noise (B, T) on the CPU, in float32."""
        return torch.randn(self.batch, self.num_samples, generator=torch.Generator().manual_seed(0))


class TorchPasses:
    """Passes of a model in PyTorch."""

    def __init__(self, model: Wav2Vec2Model, conditions: Conditions) -> None:
        self.device, dtype = torch.device(conditions.device), DTYPES[conditions.precision]
        self.model = copy.deepcopy(model).eval().to(self.device, dtype)
        self.model.fold_weight_norm()
        self.waveforms = conditions.waveforms().to(self.device, dtype)
        self.modules = [operation.module for operation in model.operations(conditions.num_samples)]
        names = {module: name for name, module in model.named_modules()}
        self.modules = [self.model.get_submodule(names[module]) for module in self.modules]

    def whole(self) -> float:
        """Return the microseconds of a pass."""
        return 1e6 * timed(self.model, self.waveforms)

    def parts(self) -> np.ndarray:
        """Return the microseconds (passes, n) of the model's n operations, after a pass to warm up."""
        timed(self.model, self.waveforms)
        return np.array([self._parts() for _ in range(_PASSES)])

    def _parts(self) -> list[float]:
        with _traced(self.modules, self.model, self.device) as borders:
            timed(self.model, self.waveforms)
        spent: Counter[int] = Counter()
        for (_, start), (owner, end) in zip(borders, borders[1:], strict=False):
            spent[owner] += 1e3 * start.elapsed_time(end) if self.device.type == "cuda" else 1e6 * (end - start)
        return [spent[index] for index in range(len(self.modules))]


@contextmanager
def _traced(modules: list[Any], model: Wav2Vec2Model, device: torch.device) -> Iterator[list[tuple[int, Any]]]:
    """Record each border between operations: the number of the one before it, and the time or the CUDA event."""
    borders: list[tuple[int, Any]] = []
    running = [len(modules) - 1]  # the whole model's own time is the last

    def border() -> None:
        now: Any = time.perf_counter()
        if device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        borders.append((running[-1], now))

    def charged(function: Callable[..., Any], number: int, *args: Any, **options: Any) -> Any:
        border()
        running.append(number)
        try:
            return function(*args, **options)
        finally:
            border()
            running.pop()

    def first_layer(function: Callable[..., Any], waveforms: torch.Tensor) -> Callable[..., Any]:
        return partial(charged, charged(function, 0, waveforms), 0)

    extractor = model.feature_extractor
    replaced = [(extractor, "_first_layer", partial(first_layer, extractor._first_layer))]
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


class OnnxPasses:
    """Passes of a model in ONNX Runtime, as export.py writes it."""

    def __init__(self, model: Wav2Vec2Model, conditions: Conditions, folder: Path) -> None:
        self.model, self.path = model, folder / ONNX
        if not folder.exists():
            with atomic_path(folder) as temporary, quiet():
                temporary.mkdir()
                convert(model, OnnxOptions(), temporary / ONNX)
        operations = model.operations(conditions.num_samples)
        names = {module: name for name, module in model.named_modules()}
        self.owners = {names[operation.module]: number for number, operation in enumerate(operations)}
        if (table := model.encoder.transformer.bucket_table) is not None:
            self.owners[names[table]] = self.owners[""]  # one layer's, but looked up before the layers
        self.num_operations = len(operations)
        waveforms = conditions.waveforms().numpy()
        self.feeds = {"waveforms": waveforms, "lengths": np.full(len(waveforms), waveforms.shape[1])}
        self.session: Any = None

    def whole(self) -> float:
        """Return the microseconds of a pass."""
        self.session = self.session or onnx_session(self.path)
        start = time.perf_counter()
        self.session.run(None, self.feeds)
        return 1e6 * (time.perf_counter() - start)

    def parts(self) -> np.ndarray:
        """Return the microseconds (passes, n) of the model's n operations, after a pass to warm up."""
        with tempfile.TemporaryDirectory() as folder:
            session = onnx_session(self.path, trace=Path(folder, "trace"))
            for _ in range(1 + _PASSES):
                session.run(None, self.feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        passes = [event for event in events if event["name"] == "SequentialExecutor::Execute"]
        nodes = [event for event in events if event["name"].endswith("_kernel_time")]
        return np.array([self._parts(one, nodes) for one in passes[1:]])

    def _parts(self, one: Mapping[str, Any], nodes: list[dict[str, Any]]) -> list[float]:
        spent: Counter[int] = Counter()
        owner = norms = self.owners[""]
        for node in nodes:
            if not 0 <= node["ts"] - one["ts"] < one["dur"]:
                continue
            module, slash, _ = node["name"].rpartition("/")
            if slash:
                norms = self.owners[layer[0]] if (layer := _LAYER.match(module)) else norms
                while module not in self.owners:
                    module = module.rpartition(".")[0]
                owner = self.owners[module]
            elif "LayerNorm" in node["name"]:  # made of a norm and the residual before it
                owner = norms
            spent[owner] += node["dur"]
        return [spent[number] for number in range(self.num_operations)]


Passes = TorchPasses | OnnxPasses


def passes(model: Wav2Vec2Model, conditions: Conditions, folder: Path) -> Passes:
    """Make a model without masks, on the CPU, ready to run; a file that it needs is in ``folder``, made if missing."""
    if conditions.backend == "torch":
        return TorchPasses(model, conditions)
    check_onnx(DEFAULT_OPSET)
    return OnnxPasses(model, conditions, folder)


def in_turns(work: Sequence[Callable[[], float]]) -> list[float]:
    """Call functions that return a time in turns, after a call each to warm up; returns the least times."""
    for one in work:
        one()
    found = [[one() for one in work] for _ in range(_TURNS)]
    return [min(times) for times in zip(*found, strict=True)]


class Part(NamedTuple):
    """The microseconds of an operation."""

    name: str  # such as "attention 3", counted from 1
    expected: float
    measured: float


class Comparison(NamedTuple):
    """The microseconds that a pass of a model should take by a profile, and those that it takes."""

    expected: float
    measured: float
    parts: list[Part]


def is_this_machine(profile: Profile) -> bool:
    """Return whether a profile was made on a machine like this one."""
    device = profile.contents["device"]
    if device == "cuda" and not torch.cuda.is_available():
        return False
    return made_by(torch.device(device))["device"] == profile.contents["made_by"]["device"]


def compare(profile: Profile, models: Mapping[str, Wav2Vec2Model]) -> dict[str, Comparison]:
    """Time models without masks, on the CPU, which take turns under a profile's conditions on this machine.

    Raises:
        UserError: the profile has no times for a part of a model, or its backend is not installed.
    """
    conditions, threads = Conditions.of(profile), torch.get_num_threads()
    operations = {name: model.operations(profile.num_samples) for name, model in models.items()}
    expected = {name: profile.costs(found).tolist() for name, found in operations.items()}
    torch.set_num_threads(conditions.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ready = {name: passes(model, conditions, Path(folder, name)) for name, model in models.items()}
            measured = dict(zip(ready, in_turns([one.whole for one in ready.values()]), strict=True))
            turns = [{name: one.parts().min(0) for name, one in ready.items()} for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    own = {name: np.minimum(turns[0][name], turns[1][name]).tolist() for name in models}
    return {
        name: Comparison(
            sum(expected[name]),
            measured[name],
            list(map(Part, _numbered([op.kind for op in operations[name]]), expected[name], own[name])),
        )
        for name in models
    }


# Relative difference between expected and measured times that is worth a warning, and the parts that it names.
ACCEPTED, _NAMED = 0.1, 3


def times_of(
    profile: Profile, pruned: dict[str, Any], original: dict[str, Any], teacher_time: float
) -> tuple[str, list[str]]:
    """Say which share of the teacher's time a pruned model takes: expected, and measured where this is the machine.

    Args:
        profile: the times that the model was pruned for.
        pruned: its config.
        original: the config of the model before pruning, which may be of another shape than the teacher.
        teacher_time: the teacher's expected microseconds.

    Returns:
        A line, and lines that warn of a difference of more than :data:`ACCEPTED`.
    """
    models = {
        name: wav2vec2_model(**with_masks(config, ())).eval() for name, config in (("o", original), ("p", pruned))
    }
    expected = {
        name: float(profile.costs(model.operations(profile.num_samples)).sum()) for name, model in models.items()
    }
    milliseconds = 1e3 * profile.audio_seconds

    def words(time: float, teacher: float) -> str:
        return f"{time / teacher:.4f} of the teacher's ({time / milliseconds:.3g}ms/s)"

    line = f"time: {words(expected['p'], teacher_time)} expected"
    if not is_this_machine(profile):
        return f"{line}; the profile is of another machine, {profile.contents['made_by']['device']}", []
    try:
        found = compare(profile, models)
    except UserError as error:  # the backend is not installed here
        return f"{line}; not measured: {error}", []
    speed = found["o"].measured / expected["o"]  # a machine that is slower now is slower for both
    line += f", {words(found['p'].measured, speed * teacher_time)} measured"
    if abs(found["p"].measured / speed / expected["p"] - 1) <= ACCEPTED:
        return line, []
    parts = sorted(found["p"].parts, key=lambda part: -abs(part.measured / speed - part.expected))[:_NAMED]
    named = ", ".join(f"{part.name} takes {part.measured / speed / part.expected:.2f} of its time" for part in parts)
    advice = "make the profile again on a quiet machine"
    return line, [f"warning: expected and measured are more than {ACCEPTED:.0%} apart: {named}; {advice}"]


def _numbered(kinds: Sequence[str]) -> list[str]:
    """Number kinds that are there more than once."""
    totals, seen, names = Counter(kinds), Counter[str](), []
    for kind in kinds:
        seen[kind] += 1
        names.append(f"{kind.replace('_', '-')} {seen[kind]}" if totals[kind] > 1 else kind)
    return names
