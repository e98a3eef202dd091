"""Shared by the tests: small models without trivial parameters, short runs, comparisons."""

import collections
import csv
import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cli
from hardconcrete import HardConcrete
from lightning import DistillLoss, DistillModule, make_projections
from training import saving
from training.pairing import freeze_unreached
from wav2vec2 import streaming
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.fast import plain_paths
from wav2vec2.files import checkpoint
from wav2vec2.files.heads import (
    Head,
    contents_of,
    joined_state,
    masked_model_with_its_head,
    task_model_of,
    with_head,
)
from wav2vec2.model import Wav2Vec2Model, wav2vec2_model, with_masks
from wav2vec2.operations import Operation
from wav2vec2.utils.import_huggingface import import_huggingface_model
from wav2vec2.utils.importing import ImportedModel

REPOSITORY = Path(__file__).resolve().parent.parent
# Of hidden states, absolute and relative, against stored fixtures.
TOLERANCE = 1e-5
REFERENCE = REPOSITORY / "tests" / "data" / "reference"

# Flags of a joint distillation that prunes something in a few updates.
PRUNING = ("--pruning_units", "conv,head,interm", "--target_sparsity", 0.4, "--sparsity_warmup_updates", 10)

# 40 samples a frame, so that short waveforms make enough of them.
SMALL_CONV_LAYERS = [[10, 10, 5], [12, 3, 2], [8, 3, 2], [9, 2, 2]]
# Others for the same frames.
SMALL_LIGHT_LAYERS = [[7, 20, 10], [9, 5, 4]]


def small_config(family: str, size: str = "base", **changes: Any) -> dict[str, Any]:
    """Return a config of three small layers without dropout.

    Args:
        family: "hubert" or "wavlm".
        size: "base" (group_norm extractor, post-norm) or "large" (layer_norm extractor, pre-norm, conv
            bias, normalised waveform).
        changes: keys to override.
    """
    large = size == "large"
    heads = (
        {
            "encoder_total_num_heads": [4, 4, 4],
            "encoder_remaining_heads": [[0, 1, 2, 3]] * 3,
            "encoder_num_buckets": 16,
            "encoder_max_distance": 40,
        }
        if family == "wavlm"
        else {"encoder_num_heads": [4, 4, 4], "encoder_head_dim": 4}
    )
    return {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": SMALL_CONV_LAYERS,
        "extractor_conv_bias": large,
        "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_use_attention": [True, True, True],
        "encoder_use_feed_forward": [True, True, True],
        **heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": [20, 20, 20],
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
        "normalize_waveform": large,
        "extractor_prune_conv_channels": False,
        "encoder_prune_attention_heads": False,
        "encoder_prune_attention_layer": False,
        "encoder_prune_feed_forward_intermediate": False,
        "encoder_prune_feed_forward_layer": False,
        **changes,
    }


def one_layer_config(family: str) -> dict[str, Any]:
    """Return a config of one layer, and two of the extractor, for exports and compiled code, which take long."""
    config = small_config(family, encoder_num_layers=1, extractor_conv_layer_config=SMALL_LIGHT_LAYERS)
    per_layer = [key for key, value in config.items() if key.startswith("encoder_") and isinstance(value, list)]
    return config | {key: config[key][:1] for key in per_layer}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter, masks apart, away from its start: no norm, bias, gate or scale stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("log_alpha"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def random_model(config: dict[str, Any], seed: int = 0) -> Wav2Vec2Model:
    """The model of a config with random weights, in eval mode."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = wav2vec2_model(**config)
    randomize(model, seed)
    return model.eval()


def random_waveforms(*num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Waveforms (B, T) with an offset and zeros behind the shorter ones, and their lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [0.3 * torch.randn(n, generator=generator) + 0.1 for n in num_samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(num_samples)


# Every kind of head, with every choice that it leaves.
TASK_HEADS = [
    Head("text", ("a", "b", " "), units="characters"),
    Head("text", ("yes", "no"), units="words"),
    *(
        Head("clips", ("yes", "no", "up"), layers=layers, pooling=pooling)
        for layers in ("last", "weighted")
        for pooling in ("mean", "attentive")
    ),
    *(Head("segments", ("speech", "noise"), layers=layers) for layers in ("last", "weighted")),
]


def head_id(head: Head) -> str:
    """Return the name of a test's parameter."""
    return "-".join(filter(None, (head.kind, head.units, head.layers, head.pooling)))


def task_contents(head: Head, family: str = "hubert", size: str = "base") -> dict[str, Any]:
    """Return the contents of a small fine-tuned model file without trivial weights."""
    plain = random_model(small_config(family, size))
    contents = {"config": plain.config, "state_dict": plain.state_dict()}
    model = task_model_of(with_head(contents, head, "model.pth", torch.Generator().manual_seed(1)), "model.pth")
    randomize(model, seed=2)
    return contents_of(model)


def write_hub_folder(folder: Path, contents: dict[str, Any]) -> None:
    """Write the contents of a model file as the folder that ``export.py --formats hub`` wrote in version 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    config, weights, head = contents["config"], contents["state_dict"], contents.get("head")
    if head is not None:
        config = {**config, "head": {key: value for key, value in head.items() if key != "state_dict"}}
        weights = joined_state(weights, head["state_dict"])
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def masks_of(model: torch.nn.Module) -> dict[str, HardConcrete]:
    """The masks of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HardConcrete)}


def num_elements(model: torch.nn.Module) -> int:
    """The exact number of parameters, masks apart."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))


def assert_same_frames(
    ours: list[Tensor], theirs: list[Tensor], lengths: Tensor | None = None, tolerance: float = 1e-5
) -> None:
    """Both lists hold equal (B, frames, D) tensors up to each row's valid frames (None: all are valid).

    The tolerance is relative to the largest value: processors round in their own ways.
    """
    assert len(ours) == len(theirs)
    for stage, (our_stage, their_stage) in enumerate(zip(ours, theirs, strict=True)):
        assert our_stage.shape == their_stage.shape, f"stage {stage}"
        for row in range(len(our_stage)):
            valid = slice(None if lengths is None else int(lengths[row]))
            torch.testing.assert_close(
                our_stage[row, valid],
                their_stage[row, valid],
                rtol=tolerance,
                atol=tolerance * max(1.0, float(their_stage.abs().max())),
                msg=lambda text, stage=stage, row=row: f"stage {stage}, row {row}: {text}",
            )


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """Run a stage script in this process, as ``python NAME.py ARGUMENTS`` does."""
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    cli.run(script.main, script.parse_args())


def run_command(*command: object, **environment: object) -> subprocess.CompletedProcess:
    """Run a command in the checkout, with this Python."""
    settings = {"python": sys.executable, **environment}
    return subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
    )


# Makes forks of a process that has the training scripts' imports behind it and has done nothing else: importing
# Lightning takes longer than a small run.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["training.extractor", "training.finetuning", "finetune", "omegaconf", "sklearn.cluster", "torch.utils.tensorboard"]
)


def _run_forked(name: str, words: list[str], output: Path, environment: dict[str, str]) -> None:
    os.setsid()
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(REPOSITORY)
    os.environ |= environment
    sys.argv = [f"{name}.py", *words]
    runpy.run_path(f"{name}.py", run_name="__main__")


def start_script(name: str | Path, *arguments: object, output: Path, **environment: object) -> BaseProcess:
    """Start a training script as a process of its own, in a session of its own, without what its imports take.

    Args:
        name: of the script, without .py; a path for one that is not in the checkout.
        arguments: its words.
        output: what it prints is added to this file.
        environment: variables to set.
    """
    settings = {variable: str(value) for variable, value in environment.items()}
    process = _FORKED.Process(target=_run_forked, args=(str(name), [*map(str, arguments)], output, settings))
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(name: str, *arguments: object, output: Path) -> list[BaseProcess]:
    """Start the two processes of one run as torchrun does; the script needs ``--gpus 2``."""
    shared = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start_script(name, *arguments, output=output, **shared, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]


def save_small_model(path: Path, family: str, size: str, **changes: object) -> Path:
    """Write a random teacher of three small layers as a converter does."""
    model = random_model(small_config(family, size, encoder_dropout=0.1, **changes))
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": model.config})
    return path


def as_words(flags: dict[str, object]) -> list[object]:
    """Flags as a command has them; a value of None leaves a flag out."""
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


def small_run(manifests: Path, teacher: Path, **changes: object) -> list[object]:
    """Shared flags of a run that takes a second; a value of None leaves a flag out."""
    flags = {
        "tsv_dir": manifests,
        "seconds_per_batch": 4,
        "max_crop_seconds": 0.2,
        "num_workers": 0,
        "teacher_ckpt": teacher,
        "student_ckpt": teacher,
        "distill_layers": "0.1,3",
        "max_updates": 6,
        "warmup_updates": 2,
        "accelerator": "cpu",
        "log_interval": 1,
    }
    return as_words({**flags, **changes})


def finetuning_run(tsv: Path, model: Path, **changes: object) -> list[object]:
    """Flags of a short fine-tuning; a value of None leaves a flag out."""
    flags = {
        "tsv": tsv,
        "model": model,
        "seconds_per_batch": 2,
        "num_workers": 0,
        "max_updates": 6,
        "warmup_updates": 2,
        "accelerator": "cpu",
        "log_interval": 1,
    }
    return as_words({**flags, **changes})


def load_masked_model(path: Path, units: list[str]) -> Wav2Vec2Model:
    """The student that joint distillation begins with."""
    return masked_model_with_its_head(checkpoint.read_model_file(path), units, path)


def made_up_profile(
    model: Wav2Vec2Model, seconds: float, price: Callable[[Operation, float, float], float], points: int = 4
) -> dict[str, Any]:
    """The contents of a profile that has a price by formula, at some sizes up to those of a model."""
    prices = {}
    for operation in model.operations(round(seconds * SAMPLE_RATE)):
        sizes = [sorted({max(1, size * point // points) for point in range(1, points + 1)}) for size in operation.sizes]
        rows = [[price(operation, first, second) for second in sizes[1]] for first in sizes[0]]
        prices[operation.key] = {"sizes": sizes, "microseconds": rows, "spread": 0.0}
    return {
        "format": 1,
        "made_by": {"device": "made up"},
        **{"backend": "torch", "device": "cpu", "precision": "32", "threads": 1, "batch": 1, "seconds": seconds},
        "prices": prices,
        "checked": [],
    }


def load_as_others_do(path: Path) -> torch.nn.Module:
    """Load a compressed model as other people's programs do."""
    contents = torch.load(path, weights_only=True)
    model = wav2vec2_model(**contents["config"])
    model.load_state_dict(contents["state_dict"])
    return model.eval()


def run_to_exit(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """Run a script that ends with an exit status other than 0."""
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, name, *arguments)
    return stop.value.code


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The one error line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


# The columns of a run's log that say how fast it was.
SPEED_COLUMNS = (
    "audio_seconds_per_second",
    "updates_per_second",
    "data_wait",
    "tflops_per_second",
    "share_of_peak",
    "peak_memory_gb",
    "compiled_graphs",
)


def _versions(exp_dir: Path) -> list[list[dict[str, str]]]:
    """The rows of each version of a run's log: each start of the run writes one."""
    versions = sorted((exp_dir / "csv").iterdir(), key=lambda version: int(version.name.removeprefix("version_")))
    return [list(csv.DictReader((version / "metrics.csv").read_text().splitlines())) for version in versions]


def logged(exp_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's log, without its speed, which no two runs share.

    A version takes the place of what the one before logged after its last checkpoint.
    """
    rows: list[dict[str, str]] = []
    for version in _versions(exp_dir):
        new = [{name: row[name] for name in row if name not in SPEED_COLUMNS and row[name]} for row in version]
        if new:  # a killed run may have written no row
            rows = [row for row in rows if int(row["step"]) < int(new[0]["step"])]
        rows += [row for row in new if len(row) > 1]
    return rows


def logged_speed(exp_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's log that say how fast it was."""
    return [row for version in _versions(exp_dir) for row in version if row.get("updates_per_second")]


def read_reference(name: str) -> dict[str, Any]:
    return torch.load(REFERENCE / f"{name}.pt", weights_only=True)


def make_module(cls: type = DistillModule, **changes: Any) -> DistillModule:
    """Return a module of two small HuBERTs that distils layers 0, 1 and 3, with masks."""
    config = small_config("hubert")
    settings = {
        "teacher_model": random_model(config, seed=1),
        "student_model": random_model(with_masks(config, ["conv", "head", "interm"]), seed=1),
        "distill_mode": "layer2layer",
        "distill_layers": [0, 1, 3],
        "distill_linear_projs": make_projections("layer2layer", [[0], [1, 3]], 16, 16),
        "distill_loss": DistillLoss(0, 1, 1, "raw"),
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "warmup_updates": 2,
        "max_updates": 6,
        "use_reg": True,
        "reg_learning_rate": 0.02,
        "target_sparsity": 0.5,
        "sparsity_warmup_updates": 3,
    }
    module = cls(**(settings | changes))
    freeze_unreached(module.student_model, module.student_depth)
    return module


def train_on(module: DistillModule, batch: Any) -> torch.Tensor:
    return module.loss(batch, "train")[0]


def last_checkpoint(exp_dir: Path) -> dict[str, Any]:
    return torch.load(exp_dir / "ckpts" / "last.ckpt", weights_only=True)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested structure by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: tensor for key, item in items for path, tensor in tensors(item, f"{name}.{key}").items()}


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Over all tensors of two checkpoints: weights, masks, multipliers, the optimiser's moments."""
    ones, others = tensors(one), tensors(other)
    assert ones.keys() == others.keys() and len(ones) > 50
    return max(float((tensor.double() - others[name].double()).abs().max()) for name, tensor in ones.items())


def assert_same_run(one: Path, other: Path, killed_after: Sequence[int] = ()) -> None:
    """Same weights, optimiser, multipliers and counters, bit for bit, and the same log.

    A kill between a checkpoint and the row of its update, one of ``killed_after``, loses the row.
    """
    ones, others = last_checkpoint(one), last_checkpoint(other)
    assert largest_difference(ones, others) == 0
    for key in ("global_step", "loops", "lr_schedulers", "distillation", "finetuning", "callbacks"):
        assert ones.get(key) == others.get(key), key
    rows, others_rows = logged(one), logged(other)
    assert [row for row in rows if row in others_rows] == others_rows
    lost = {int(row["step"]) for row in rows if row not in others_rows}
    assert lost <= {step - 1 for step in killed_after}


def disturb_run(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return ``at``: what a run in this process calls, once, at the start of each update (the first is 1)."""
    disturbance = SimpleNamespace(at={})
    original = saving.RunCheckpoints.on_train_batch_start

    def on_train_batch_start(self: saving.RunCheckpoints, trainer: Any, *rest: Any) -> None:
        original(self, trainer, *rest)
        disturbance.at.pop(trainer.global_step + 1, lambda: None)()

    monkeypatch.setattr(saving.RunCheckpoints, "on_train_batch_start", on_train_batch_start)
    return disturbance


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


# Importing any of these in the process below fails: training wants them, loading a model does not.
TRAINING_PACKAGES = ("pytorch_lightning", "lightning", "transformers", "soundfile", "torchaudio", "tensorboard", "tqdm")


def run_without(packages: tuple[str, ...], code: str) -> str:
    """Return the output of a process that runs ``code`` and cannot import ``packages``."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"  # None: not to be imported
    result = run_command(sys.executable, "-W", "ignore", "-c", block + code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def take_steps(model: Wav2Vec2Model, waveforms: Tensor) -> Tensor:
    """Compute the frames of whole chunks, a chunk at a time."""
    extractor, state, frames = model.feature_extractor, streaming.first_state(model, len(waveforms)), []
    for chunk in waveforms.unfold(1, extractor.num_samples(extractor.chunk_frames), extractor.hop).unbind(1):
        lengths = torch.full((len(chunk),), chunk.size(1), device=chunk.device)
        x, _, state = streaming.step(model, chunk, lengths, state)
        frames.append(x)
    return torch.cat(frames, dim=1)


def torch_counts(
    config: dict[str, Any], num_samples: int, num_layers: int | None = None, plain: bool = True
) -> dict[str, int]:
    """Operations of each part as torch meets them on its meta device; see ``wav2vec2.flops.Parts``.

    Those of a streaming model are of the steps that ``num_samples`` take, all of its layers.
    """
    with torch.device("meta"):
        model = wav2vec2_model(**config).eval()
        waveforms = torch.empty(1, num_samples)
    layers = model.encoder.transformer.layers
    parts = {
        "conv": [model.feature_extractor],
        "attention": [layer.attention for layer in layers if layer.attention is not None],
        "feed_forward": [layer.feed_forward for layer in layers if layer.feed_forward is not None],
    }
    counter = FlopCounterMode(display=False)
    counts = dict.fromkeys(parts, 0)

    def add(part: str, sign: int) -> None:
        counts[part] += sign * counter.get_total_flops()

    for part, modules in parts.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, part=part: add(part, -1))
            module.register_forward_hook(lambda *_, part=part: add(part, 1))
    with torch.no_grad(), plain_paths(plain), counter:
        if model.encoder.chunk_frames is None:
            model.extract_features(waveforms, num_layers=num_layers)
        else:
            model.feature_extractor.heard = None  # a norm's sums, which do not count
            take_steps(model, waveforms)
    return {**counts, "projection": counter.get_total_flops() - sum(counts.values())}


def hubert_base_flops(num_samples: int) -> int:
    """Count by hand: two operations per multiplication of convolutions, projections, attention and feed-forward."""
    macs, channels, frames = 0, 1, num_samples
    for out, kernel, stride in [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2:
        frames = (frames - kernel) // stride + 1
        macs += frames * out * channels * kernel
        channels = out
    macs += frames * 512 * 768
    macs += (frames + 1) * 768 * 48 * 128  # an even kernel makes one frame more, which is dropped
    macs += 12 * (frames * 4 * 768 * 768 + 2 * frames * frames * 768 + frames * 2 * 768 * 3072)
    return 2 * macs


def to_omegaconf(value: Any, classes: dict[str, type], parent: Any = None) -> Any:
    """Wrap plain settings as omegaconf 2.0 does."""

    def make(name: str, **state: Any) -> Any:
        made = classes[name]()
        made.__dict__.update(state)
        return made

    if not isinstance(value, (dict, list)):
        metadata = make("Metadata", ref_type=typing.Any, object_type=None, optional=True, key=None, flags={})
        return make("AnyNode", _metadata=metadata, _parent=parent, _val=value)
    metadata = make(
        "ContainerMetadata",
        ref_type=typing.Any,
        object_type=dict if isinstance(value, dict) else list,
        optional=True,
        key_type=int,
        element_type=typing.Any,
        resolver_cache=collections.defaultdict(dict, {"env": {"HOME": "/root"}}),
    )
    container = make("DictConfig" if isinstance(value, dict) else "ListConfig", _metadata=metadata, _parent=parent)
    if isinstance(value, dict):
        container._content = {key: to_omegaconf(item, classes, container) for key, item in value.items()}
    else:
        container._content = [to_omegaconf(item, classes, container) for item in value]
    return container


FIXTURES = Path(__file__).resolve().parent / "data" / "fixtures"


def load_expected(directory: Path) -> dict[str, Tensor]:
    with np.load(directory / "expected.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) with zeros behind the shorter ones, and (B,) lengths."""
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), torch.tensor([len(w) for w in waveforms])


def check_stages(
    model: Wav2Vec2Model,
    waveforms: Tensor,
    lengths: Tensor | None,
    stages: list[Tensor | None],
    final: Tensor | None,
    frame_lengths: Tensor | None = None,
) -> None:
    """Compare projection, every layer and the final output on valid frames; a failure names its stage.

    Args:
        model: in eval mode.
        waveforms: (B, T).
        lengths: (B,) valid samples, or None if all are.
        stages: the projection, then each layer's output, (B, frames, D) each; one that was not stored is None.
        final: output of the whole model (B, frames, D), or None.
        frame_lengths: (B,) valid frames; None if all are.
    """
    for plain in (True, False):
        with torch.inference_mode(), plain_paths(plain):
            features, feature_lengths = model.extract_features(waveforms, lengths)
            output, _ = model(waveforms, lengths)
        assert len(features) == len(stages)
        if frame_lengths is not None:
            assert feature_lengths.tolist() == frame_lengths.tolist()
        else:
            assert feature_lengths is None
        valid = [features[0].size(1)] * len(waveforms) if frame_lengths is None else frame_lengths.tolist()
        names = ["projection"] + [f"layer {k}" for k in range(1, len(stages))] + ["final"]
        for name, ours, theirs in zip(names, [*features, output], [*stages, final], strict=True):
            if theirs is None:
                continue
            assert ours.shape == theirs.shape, name
            # Of the largest value: processors round in their own ways.
            tolerance = TOLERANCE * max(1.0, theirs.abs().max().item())
            for row, length in enumerate(valid):
                difference = (ours[row, :length] - theirs[row, :length]).abs().max().item()
                assert difference <= tolerance, f"{name}, row {row}, {plain=}: largest difference {difference:.1e}"


def check_same_model(first: ImportedModel, second: ImportedModel) -> None:
    """Equal configs and bit-equal weights."""
    assert first.config == second.config
    theirs = second.model.state_dict()
    assert list(first.model.state_dict()) == list(theirs)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def check_written_model(path: Path) -> Wav2Vec2Model:
    """Load a written file as users do, check the published names, and return the model in eval mode."""
    contents = torch.load(path, weights_only=True)
    assert set(contents) == {"state_dict", "config"}
    assert "encoder.transformer.pos_conv_embed.conv.weight_g" in contents["state_dict"]
    assert "encoder.transformer.pos_conv_embed.conv.weight_v" in contents["state_dict"]
    dummy_weight = contents["state_dict"]["feature_extractor.dummy_weight"]
    assert torch.equal(dummy_weight, torch.ones(contents["config"]["extractor_conv_layer_config"][-1][0]))
    assert all(tensor.dtype == torch.float32 for tensor in contents["state_dict"].values())
    return checkpoint.load_model(path).eval()


def make_pair(family: str, size: str, directory: Path, **changes: Any) -> tuple[torch.nn.Module, Wav2Vec2Model]:
    """transformers' random model and ours, imported from where it saved itself; both in eval mode.

    base: group_norm extractor and post-norm; large: layer_norm extractor, pre-norm, conv bias. ``changes`` are to
    transformers' config.
    """
    large = size == "large"
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 28,
        "conv_dim": (10, 12, 9),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 9 if large else 8,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer" if large else "group",
        "do_stable_layer_norm": large,
        "conv_bias": large,
        "apply_spec_augment": False,
        "attn_implementation": "eager",
    }
    if family == "wavlm":
        settings |= {"num_buckets": 16, "max_bucket_distance": 40}
    settings |= changes
    classes = {
        "hubert": (transformers.HubertConfig, transformers.HubertModel),
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
        "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
        "unispeech": (transformers.UniSpeechConfig, transformers.UniSpeechModel),
        "unispeech-sat": (transformers.UniSpeechSatConfig, transformers.UniSpeechSatModel),
    }
    config_class, model_class = classes[family]
    theirs = model_class(config_class(**settings)).eval()
    randomize(theirs, seed=1)
    theirs.save_pretrained(directory)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(directory)
    return theirs, import_huggingface_model(directory, normalize_waveform=False).model.eval()


def transformers_stages(theirs: torch.nn.Module, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The projection, every layer's output before any final LayerNorm, and the last hidden state.

    ``output_hidden_states`` of pre-norm models holds the normalised last layer, so hooks read them.
    """
    stages: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        stages.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in (theirs.feature_projection, *theirs.encoder.layers)]
    attention_mask = None if lengths is None else (torch.arange(waveforms.size(1)) < lengths[:, None]).long()
    output = theirs(waveforms, attention_mask=attention_mask).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*stages, output]


FAMILIES = [("hubert", "base"), ("hubert", "large"), ("wavlm", "base"), ("wavlm", "large")]
