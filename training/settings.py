"""Typed settings of the trainings, each documented and checked where it is declared; the flags are made from them.

Checkpoints record the settings that decide what comes out of a run, and a run is continued only with the same. Nothing
here needs torch, so that wrong flags are refused at once.
"""

import argparse
import dataclasses
import json
import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from labels.lists import UNITS
from wav2vec2.audio import MAX_SECONDS, MIN_SECONDS
from wav2vec2.config import PRUNING_UNITS
from wav2vec2.files.errors import UserError, check_utf8, short_repr
from wav2vec2.files.profiles import read_profile
from wav2vec2.files.storage import read_json

if TYPE_CHECKING:
    from wav2vec2.profiles import Profile

# The published number of GPUs of one node (run.sh), place of the teacher and sparsity.
DEFAULT_GPUS = 4
DEFAULT_MODEL = Path("pretrained_ckpts/hubert-base-ls960.pth")
TARGET_SPARSITY = 0.75
# Behind a number, it makes it a time for each second of audio.
PER_SECOND = "ms/s"
# The value of --resume_checkpoint that finds the checkpoint by itself.
AUTO = "auto"
# The value of --freeze_updates for an encoder that is never trained.
ALWAYS = "all"
# The value of --init_layers for layers that start fresh, and the named choice of --extractor.
RANDOM, LIGHT = "random", "light"
# The default of --left_frames.
LEFT_FRAMES = 64


def parse_distill_layers(text: str) -> list[list[int]]:
    """``"0.4,8"`` -> ``[[0], [4, 8]]``: a period separates groups, a comma the layers of a group."""
    try:
        groups = [[int(layer) for layer in group.split(",")] for group in text.split(".")]
    except ValueError:
        raise UserError(f"--distill_layers: expected layers and groups such as 0.4,8,12, found {text!r}") from None
    layers = [layer for group in groups for layer in group]
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise UserError(f"--distill_layers: expected every layer once and none below 0, found {text!r}")
    return groups


# Checks of a value: a condition, and what is expected.
_Check = tuple[Callable[[Any], bool], str]
_ANY: _Check = (lambda value: True, "")
_POSITIVE: _Check = (lambda value: value > 0, "a number above 0")
_NOT_NEGATIVE: _Check = (lambda value: value >= 0, "0 or more")
_FRACTION: _Check = (lambda value: 0 < value < 1, "a number between 0 and 1")
_SHARE: _Check = (lambda value: 0 <= value < 1, "a number from 0 to below 1")


def _is_latency(text: str) -> bool:
    number = re.fullmatch(r"([0-9]{0,9}\.?[0-9]{1,9})(ms/s)?", text)
    return number is not None and 0 < float(number[1]) < (math.inf if number[2] else 1)


def _option(
    default: Any, help: str, check: _Check = _ANY, *, choices: Sequence[str] = (), recorded: bool = False
) -> Any:
    """Declare a field that is a flag; with the default MISSING the flag is required."""
    return field(default=default, metadata={"help": help, "check": check, "choices": choices, "recorded": recorded})


# A setting that decides what comes out of a run.
_recorded = partial(_option, recorded=True)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Base of the groups of settings, each field of which is a flag."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        """Make the settings that parsed flags give, None where they are not used; a UserError names a wrong option."""
        return cls(**{option.name: getattr(args, option.name) for option in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            is_right, expected = option.metadata["check"]
            if value is not None and not is_right(value):
                raise UserError(f"--{option.name}: expected {expected}, found {value}")

    def recorded(self) -> dict[str, Any]:
        """The values that decide what comes out of a run."""
        options = dataclasses.fields(self)
        return {option.name: getattr(self, option.name) for option in options if option.metadata["recorded"]}


@dataclass(frozen=True, kw_only=True)
class BatchSettings(_Settings):
    """Batches."""

    seconds_per_batch: float = _recorded(87.5, "seconds of audio per batch and process", _POSITIVE)
    num_workers: int = _option(1, "data loading processes per training process", _NOT_NEGATIVE)
    max_bad_files: str = _option(
        "1%", "number or share of the training files that may be unreadable; each is replaced by another"
    )
    seed: int = _recorded(2022, "seed of batches, crops and noise", _NOT_NEGATIVE)

    def max_bad_files_of(self, num_files: int) -> int:
        """``"5"`` is 5 files, ``"1%"`` that share of ``num_files``, rounded down; a UserError if it is neither."""
        match = re.fullmatch(r"([0-9]{1,18})|([0-9]{1,3}(?:\.[0-9]{1,9})?)%", self.max_bad_files)
        if match and match[1]:
            return int(match[1])
        # A fraction, not a float: 0.7% of 1000 files are 7.
        if match and (share := Fraction(match[2]) / 100) <= 1:
            return int(share * num_files)
        raise UserError(
            f"--max_bad_files {self.max_bad_files}: expected a number of files such as 5, or a share of them such as 1%"
        )


@dataclass(frozen=True, kw_only=True)
class DataSettings(BatchSettings):
    """Data. With --task_tsv only --seconds_per_batch, --num_workers, --max_bad_files and --seed apply."""

    tsv_dir: Path | None = _option(None, "directory of prepare_data.py's manifests (required without --task_tsv)")
    train_subset: str = _option("train100", "train on TSV_DIR/NAME.tsv")
    min_seconds: float = _recorded(MIN_SECONDS, "leave out shorter utterances")
    max_seconds: float = _recorded(MAX_SECONDS, "leave out longer utterances")
    max_crop_seconds: float | None = _recorded(None, "crop to this length (default: the batch's shortest)", _POSITIVE)

    @property
    def manifest_dir(self) -> Path:
        """``--tsv_dir``; a UserError if it is not given."""
        if self.tsv_dir is None:
            raise UserError("--tsv_dir: is not given, expected the directory of the manifests from prepare_data.py")
        return self.tsv_dir


@dataclass(frozen=True, kw_only=True)
class LabelSettings(BatchSettings):
    """Labelled audio."""

    tsv: Path = _option(MISSING, "list of labelled audio: split (train, valid, test), path, and text, or label")
    units: str | None = _recorded(
        None, f"units of a text to recognise (default: those of the model's head, or {UNITS[0]})", choices=UNITS
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Settings):
    """Models."""

    teacher_ckpt: Path = _option(DEFAULT_MODEL, "teacher .pth from a converter")
    student_ckpt: Path = _option(MISSING, ".pth that the student starts from")
    student_dropout: float | None = _recorded(None, "dropout of the student (default: that of its file)", _SHARE)
    distill_layers: str = _recorded(
        "0.4,8,12", "the teacher's layers to distil: a period separates groups with a projection each, a comma layers"
    )
    distill_mode: Literal["layer2layer", "predlayer"] = _recorded(
        "layer2layer", "match layers of equal relative depth, or predict all from the student's last (DistilHuBERT)"
    )
    l2_weight: float = _recorded(0.0, "weight of the mean squared error")
    l1_weight: float = _recorded(1.0, "weight of the mean absolute error")
    cos_weight: float = _recorded(1.0, "weight of the cosine term")
    cos_type: Literal["raw", "log_sig"] = _recorded("raw", "the cosine, or the log of its sigmoid")
    distill_weight: float = _recorded(
        1.0,
        "weight of these together; with 0 no teacher is needed, and sparsity counts from the student's size",
        _NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distill_weight and self.teacher_ckpt == DEFAULT_MODEL:
            object.__setattr__(self, "teacher_ckpt", self.student_ckpt)
        for option in ("teacher_ckpt", "student_ckpt"):
            if getattr(self, option) == DEFAULT_MODEL and not DEFAULT_MODEL.is_file():
                raise UserError(
                    f"--{option}: {DEFAULT_MODEL}, the default, does not exist; make it with "
                    f"python convert_hubert_from_hf.py --out {DEFAULT_MODEL}, or give another file"
                )
        parse_distill_layers(self.distill_layers)


@dataclass(frozen=True, kw_only=True)
class TaskSettings(_Settings):
    """A task, learnt beside distillation or instead of it."""

    task_tsv: Path = _option(MISSING, "list of labelled audio, as for finetune.py; the batches are whole clips of it")
    task_weight: float = _recorded(1.0, "weight of the loss on these labels; 0 switches it off", _NOT_NEGATIVE)
    task_units: str | None = _recorded(
        None, "as --units of finetune.py, if the student has no head for the labels", choices=UNITS
    )
    task_layers: Literal["last", "weighted"] | None = _recorded(None, "as --layers of finetune.py")
    task_pooling: Literal["mean", "attentive"] | None = _recorded(None, "as --pooling of finetune.py")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        if args.task_tsv is not None:
            settings = super().from_args(args)
            return settings if args.task_weight else None
        for option in dataclasses.fields(cls):
            value = getattr(args, option.name)
            if value and value != option.default:
                raise UserError(f"--{option.name} {value}: needs --task_tsv, which is not given")
        return None


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(_Settings):
    """Optimisation."""

    learning_rate: float = _recorded(MISSING, "learning rate of weights and projections", _POSITIVE)
    weight_decay: float = _recorded(0.0, "weight decay of weights and projections", _NOT_NEGATIVE)
    warmup_updates: int = _recorded(MISSING, "updates over which the learning rate rises", _NOT_NEGATIVE)
    max_updates: int = _recorded(MISSING, "updates of the whole run", _POSITIVE)
    clip_norm: float = _recorded(10.0, "clip the gradient's norm; 0 switches it off", _NOT_NEGATIVE)
    accum_grad: int = _option(1, "batches per update", _POSITIVE)  # recorded times the processes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_updates > self.max_updates:
            raise UserError(f"--warmup_updates {self.warmup_updates} is above --max_updates {self.max_updates}")


@dataclass(frozen=True, kw_only=True)
class PruningSettings(_Settings):
    """Pruning."""

    pruning_units: str = _recorded(
        ",".join(name for name, unit in PRUNING_UNITS.items() if unit.is_published),
        f"units to put masks on, of {', '.join(PRUNING_UNITS)}",
    )
    reg_learning_rate: float = _recorded(0.02, "learning rate of masks and multipliers", _NOT_NEGATIVE)
    target_sparsity: float | None = _recorded(
        None, f"share of parameters to remove (default: {TARGET_SPARSITY}, or any with another target)", _FRACTION
    )
    target_macs: float | None = _recorded(
        None, "share of multiply-adds of an average utterance to remove, instead of parameters or as well", _FRACTION
    )
    target_latency: str | None = _recorded(
        None,
        f"share of the time on a machine to remove, or the time that may be left, such as 40{PER_SECOND} of audio; "
        "instead of parameters or as well",
    )
    latency_profile: Path | None = _recorded(None, "times of that machine, a file of benchmarks.profile")
    sparsity_warmup_updates: int = _recorded(5000, "updates over which the target rises", _NOT_NEGATIVE)
    sparsity_control: Literal["lagrangian", "exact"] = _recorded(
        "lagrangian",
        "learn the multipliers of a Lagrangian, as published, or move the masks to the target at every update "
        "(default: lagrangian, or exact with a target beside parameters)",
    )
    save_at_sparsity: str | None = _recorded(
        None, "save EXP_DIR/sparsity_0.5 and so on for prune.py where the target reaches these, such as 0.5,0.65"
    )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        others = args.target_macs, args.target_latency
        control = args.sparsity_control or ("lagrangian" if others == (None, None) else "exact")
        return super().from_args(argparse.Namespace(**{**vars(args), "sparsity_control": control}))

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [unit for unit in self.units if unit not in PRUNING_UNITS]:
            raise UserError(
                f"--pruning_units: {', '.join(map(repr, unknown))} unknown; choose from {', '.join(PRUNING_UNITS)}"
            )
        others = {"macs": self.target_macs, "latency": self.target_latency}
        if self.target_sparsity is None and set(others.values()) == {None}:
            object.__setattr__(self, "target_sparsity", TARGET_SPARSITY)
        for name, other in others.items():
            if other is not None and self.sparsity_control != "exact":
                raise UserError(
                    f"--target_{name} {other}: the {self.sparsity_control} knows parameters only; leave out "
                    "--sparsity_control, or give exact"
                )
        if (self.target_latency is None) != (self.latency_profile is None):
            raise UserError("--target_latency and --latency_profile: give both, or neither")
        if self.target_latency is not None and not _is_latency(self.target_latency):
            raise UserError(
                f"--target_latency: expected a share between 0 and 1, or milliseconds such as 40{PER_SECOND}, found "
                f"{short_repr(self.target_latency)}"
            )
        _ = self.times  # a file that cannot be read is refused before all else
        target, sizes = self.target_sparsity, self.sizes
        are_right = all(re.fullmatch(r"0\.[0-9]{1,6}", size) and 0 < float(size) < (target or 0) for size in sizes)
        if not are_right or len({float(size) for size in sizes}) < len(sizes):
            raise UserError(
                f"--save_at_sparsity: expected different numbers between 0 and --target_sparsity "
                f"({target or 'not given'}), such as 0.5,0.65; found {short_repr(self.save_at_sparsity)}"
            )

    @cached_property
    def times(self) -> dict[str, Any] | None:
        """The contents of ``--latency_profile``, if there is one; a UserError if it cannot be read."""
        return None if self.latency_profile is None else read_profile(self.latency_profile)

    @cached_property
    def profile(self) -> "Profile | None":
        """``--latency_profile`` as a price list."""
        from wav2vec2.profiles import Profile  # it imports torch

        return None if self.times is None else Profile(self.times)

    def recorded(self) -> dict[str, Any]:
        """The contents of the profile, wherever it lies, and the other options."""
        times = None if self.times is None else json.dumps(self.times, sort_keys=True)
        return super().recorded() | {"latency_profile": times}

    @property
    def sizes(self) -> list[str]:
        """The sparsities of ``--save_at_sparsity``, as they are written."""
        return self.save_at_sparsity.split(",") if self.save_at_sparsity is not None else []

    @property
    def units(self) -> list[str]:
        return self.pruning_units.split(",")


@dataclass(frozen=True, kw_only=True)
class StudentSettings(_Settings):
    """Student."""

    model: Path = _option(MISSING, "model file that the student is made from")
    student_config: Path | None = _option(
        None, "JSON of the config's keys in which the student differs from the model; one number stands for all layers"
    )
    init_layers: str | None = _option(
        None, f"the model's layers, from 1, that the student's start from, or '{RANDOM}' (default: spread evenly)"
    )
    extractor: str | None = _recorded(
        None, f"train an extractor, '{LIGHT}' or JSON [[channels, kernel, stride], ...], to make the model's frames"
    )
    streaming: int | None = _option(None, "make a student that streams, in chunks of this many frames", _POSITIVE)
    left_frames: int | None = _option(
        None,
        f"frames before its chunk that a frame of such a student attends to (default: {LEFT_FRAMES})",
        _NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming is None and self.left_frames is not None:
            raise UserError(f"--left_frames {self.left_frames}: is for a student that streams; give --streaming too")
        if all(each is None for each in (self.student_config, self.init_layers, self.extractor, self.streaming)):
            raise UserError("nothing to make: give --student_config, --init_layers, --extractor or --streaming")
        for key in ("encoder_chunk_frames", "encoder_left_frames"):
            if key in self.changes:
                raise UserError(f"--student_config: {key}: not for a slice; give --streaming and --left_frames instead")
        _ = self.changes, self.layers, self.extractor_layers  # what is wrong is refused before all else

    @property
    def changes(self) -> dict[str, Any]:
        """The config's keys in which the student differs; a UserError if the file cannot be read."""
        if self.student_config is None:
            return {}
        expected = "JSON of the config's keys in which the student differs from the model"
        return read_json(self.student_config, expected, "give such JSON with --student_config")

    @property
    def layers(self) -> Sequence[int] | str | None:
        """--init_layers as a list of layers, ``RANDOM`` or None; a UserError if it is none of these."""
        if self.init_layers in (None, RANDOM):
            return self.init_layers
        words = str(self.init_layers).split(",")
        if not all(re.fullmatch("[1-9][0-9]{0,3}", word) for word in words):
            raise UserError(
                f"--init_layers: expected {RANDOM}, or layers from 1 such as 1,2, found {short_repr(self.init_layers)}"
            )
        return [int(word) for word in words]

    @property
    def num_left_frames(self) -> int:
        """--left_frames, or its default."""
        return LEFT_FRAMES if self.left_frames is None else self.left_frames

    @property
    def extractor_layers(self) -> Any:
        """--extractor as a list from JSON, ``LIGHT`` or None; a UserError if it is none of these."""
        if self.extractor in (None, LIGHT):
            return self.extractor
        try:
            layers = json.loads(str(self.extractor))
        except (ValueError, RecursionError):
            layers = None
        if not isinstance(layers, list):
            raise UserError(
                f"--extractor: expected {LIGHT}, or a list of layers in JSON such as "
                f"[[128, 40, 40], [192, 6, 4], [128, 2, 2]], found {short_repr(self.extractor)}"
            )
        return layers

    def recorded(self) -> dict[str, Any]:
        """The contents of the JSON file, wherever it lies, and the other options."""
        changes = json.dumps(self.changes, sort_keys=True)
        recorded = super().recorded() | {"student_config": changes, "init_layers": self.init_layers}
        if self.streaming is not None:
            recorded |= {"streaming": self.streaming, "left_frames": self.num_left_frames}
        return recorded


@dataclass(frozen=True, kw_only=True)
class MachineSettings(_Settings):
    """Machine. Of these only the precision changes what comes out of a run."""

    exp_dir: Path = _option(Path("./exp"), "where checkpoints and logs go")
    resume_checkpoint: str | None = _option(
        None, f"a .ckpt to continue from, or '{AUTO}': the newest whole one of --exp_dir, if there is one"
    )
    save_interval: int = _option(500, "save every this many updates, and each epoch", _POSITIVE)
    log_interval: int = _option(50, "log every this many updates", _POSITIVE)
    valid_interval: int | None = _option(None, "validate every this many batches (default: each epoch)", _POSITIVE)
    accelerator: Literal["auto", "cpu", "gpu"] = _option("auto", "what to train on")
    num_nodes: int = _option(1, "nodes", _POSITIVE)
    gpus: int | None = _option(
        None, f"GPUs per node (default: {DEFAULT_GPUS}); with --accelerator cpu, processes (default: 1)", _POSITIVE
    )
    precision: Literal["32", "16", "bf16"] = _recorded("32", "bits of the matrix products")
    compile: bool = _option(False, "compile models and loss with torch.compile: the same numbers up to rounding")
    check: bool = _option(False, "train nothing: read all inputs, say what the run will need and what would stop it")
    checkpoint_activations: bool = _option(
        False, "run each layer again for the backward pass: far less memory, a quarter more time, the same numbers"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_utf8("--exp_dir", self.exp_dir)
        resumed = self.resume_checkpoint
        if resumed not in (None, AUTO) and not Path(str(resumed)).is_file():
            raise UserError(f"--resume_checkpoint: {resumed} does not exist; give a .ckpt of a run, or {AUTO}")
        if self.accelerator == "cpu":
            _ = self.devices  # a precision that it has not

    @property
    def devices(self) -> tuple[Literal["gpu", "cpu"], int]:
        """The accelerator and the number of processes per node; a UserError if the machine lacks them."""
        available = 0
        if self.accelerator != "cpu":
            import torch  # the only question here that takes it

            available = torch.cuda.device_count()
        if self.accelerator == "cpu" or (self.accelerator == "auto" and not (available or self.gpus)):
            if self.precision == "16":
                raise UserError(
                    "--precision 16 needs a GPU (its small gradients need a loss scaler); use 32 or bf16 on a CPU"
                )
            return "cpu", self.gpus or 1
        wanted = self.gpus or DEFAULT_GPUS
        if wanted > available and not self.check:
            advice = "use --accelerator cpu to train without one"
            if available:
                advice = f"give --gpus {available} (and --accum_grad to keep the total batch)"
            given = "asked for" if self.gpus else "are the default"
            raise UserError(f"--gpus: {wanted} GPUs {given}, {available} found on this machine; {advice}")
        return "gpu", wanted

    @property
    def num_processes(self) -> int:
        return self.devices[1] * self.num_nodes


# --- all settings of a run -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Base of all settings of a training: each field is a group of flags."""

    stage: ClassVar[str]  # the name of the training, for people
    optimisation: ScheduleSettings
    machine: MachineSettings

    @classmethod
    def groups(cls) -> dict[str, type[_Settings]]:
        """The groups of flags, by field; those of all trainings last."""
        hints = typing.get_type_hints(cls)
        names = [option.name for option in dataclasses.fields(cls) if option.init]
        names.sort(key=lambda name: name in ("optimisation", "machine"))
        return {name: (typing.get_args(hints[name]) or (hints[name],))[0] for name in names}  # X of X | None

    def recorded(self) -> dict[str, Any]:
        """The settings that decide what comes out of the run."""
        groups = [getattr(self, option.name) for option in dataclasses.fields(self)]
        settings = {name: value for group in groups if group is not None for name, value in group.recorded().items()}
        # Four processes, or one with --accum_grad 4: the same updates.
        num_batches = self.machine.num_processes * self.optimisation.accum_grad
        return {"stage": self.stage, **settings, "gpus x accum_grad": num_batches}


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(RunSettings):
    """All settings of either distillation."""

    data: DataSettings
    models: ModelSettings
    task: TaskSettings | None = None

    def __post_init__(self) -> None:
        if self.task is None:
            if not self.distils:
                raise UserError(
                    "--l2_weight, --l1_weight and --cos_weight are all 0: nothing would be distilled"
                    if self.models.distill_weight
                    else "--distill_weight 0: nothing would be learnt; give --task_tsv and --task_weight"
                )
            _ = self.data.manifest_dir  # it must be given
        elif self.machine.compile:
            raise UserError("--compile: batches of --task_tsv have padding, which it does not support; leave it out")

    @property
    def distils(self) -> bool:
        """True if equation 1 has a weight."""
        models = self.models
        return bool(models.distill_weight and (models.l2_weight or models.l1_weight or models.cos_weight))

    @property
    def layer_groups(self) -> list[list[int]]:
        """The layers to be matched, by group; none if the task is all."""
        return parse_distill_layers(self.models.distill_layers) if self.distils else []

    @property
    def layers(self) -> list[int]:
        """The layers to be matched, all groups together."""
        return [layer for group in self.layer_groups for layer in group]


@dataclass(frozen=True, kw_only=True)
class DistillSettings(DistillationSettings):
    """All settings of the joint distillation and pruning."""

    stage = "distill and prune"
    pruning: PruningSettings


@dataclass(frozen=True, kw_only=True)
class FinalSettings(DistillationSettings):
    """All settings of the final distillation."""

    stage = "final distillation"


@dataclass(frozen=True, kw_only=True)
class StudentRunSettings(DistillationSettings):
    """All settings of make_student.py, which trains an extractor as a distillation of layer 0."""

    stage = "extractor"
    student: StudentSettings
    models: ModelSettings = field(init=False)
    task: TaskSettings | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # The extractor learns by the mean squared error behind the projection, which it and the model's own share.
        model = self.student.model
        losses: dict[str, Any] = {"distill_layers": "0", "l2_weight": 1.0, "l1_weight": 0.0, "cos_weight": 0.0}
        object.__setattr__(self, "models", ModelSettings(teacher_ckpt=model, student_ckpt=model, **losses))
        if self.student.extractor is not None:
            super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(_Settings):
    """Model and head."""

    model: Path = _option(MISSING, "model file or folder: the encoder; a head for the same labels is trained further")
    layers: Literal["last", "weighted"] | None = _recorded(
        None,
        "what the head reads: the last layer, or a learnt sum of all (default: as the model's head; a new head reads "
        "the last for a text, the sum for other labels)",
    )
    pooling: Literal["mean", "attentive"] | None = _recorded(
        None,
        "join the frames of a clip by their mean, or one with learnt weights (default: as the model's head, or mean)",
    )
    freeze_updates: str = _recorded(
        "0", f"updates in which the head is trained alone, or '{ALWAYS}'; the extractor is never trained"
    )
    encoder_learning_rate: float = _recorded(1e-4, "learning rate of the encoder", _POSITIVE)
    mask_prob: float = _recorded(
        0.05, "share of the encoder's frames to hide in spans, as wav2vec 2.0; 0 hides none", _SHARE
    )
    mask_length: int = _recorded(10, "frames of such a span", _POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_updates != ALWAYS and not re.fullmatch("[0-9]{1,18}", self.freeze_updates):
            raise UserError(
                f"--freeze_updates: expected a number of updates, or {ALWAYS}, found {short_repr(self.freeze_updates)}"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneRunSettings(RunSettings):
    """All settings of a fine-tuning."""

    stage = "fine-tuning"
    data: LabelSettings
    finetune: FinetuneSettings


def recorded_defaults() -> dict[str, Any]:
    """The value of each recorded setting where a record has none: its flag's default, None for a required flag.

    A record may be older than a setting, and need not have the settings of a group that was not used.
    """
    groups = {group for run in (DistillSettings, FinetuneRunSettings) for group in run.groups().values()}
    options = [option for group in groups for option in dataclasses.fields(group) if option.metadata["recorded"]]
    return {option.name: None if option.default is MISSING else option.default for option in options}


def add_arguments(parser: argparse.ArgumentParser, run: type[RunSettings], **defaults: Any) -> None:
    """Add the flags of a run; ``defaults`` are those that are the stage's own."""
    # Whether these are given decides, see TaskSettings.from_args and PruningSettings.from_args.
    defaults = {"task_tsv": None, "sparsity_control": None} | defaults
    for settings in run.groups().values():
        group = parser.add_argument_group((settings.__doc__ or "").partition(".")[0].lower())
        hints = typing.get_type_hints(settings)
        for option in dataclasses.fields(settings):
            kind, choices = hints[option.name], option.metadata["choices"]
            if type(None) in typing.get_args(kind):  # X | None
                kind = typing.get_args(kind)[0]
            if typing.get_origin(kind) is Literal:
                kind, choices = str, typing.get_args(kind)
            default = defaults.get(option.name, option.default)
            given: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
            given |= {"action": "store_true"} if kind is bool else {"type": kind, "choices": choices or None}
            group.add_argument(f"--{option.name}", help=option.metadata["help"], **given)


_Run = TypeVar("_Run", bound=RunSettings)


def read_arguments(args: argparse.Namespace, run: type[_Run]) -> _Run:
    """Make the settings that parsed flags give, checked as far as they can be without torch and any file but them."""
    values: dict[str, Any] = {name: group.from_args(args) for name, group in run.groups().items()}
    return run(**values)
