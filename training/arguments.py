"""What the flags of the two distillations mean: typed settings, each documented and checked where it is declared.

The flags are made from the fields below. A field says with ``recorded`` whether it decides what comes out of a run:
checkpoints record these, and a run is continued only with the same.
"""

import argparse
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import torch

from labels.lists import UNITS
from lightning import COS_TYPES, DISTILL_MODES, SPARSITY_CONTROLS, Layers, parse_distill_layers
from training.checkpoints import AUTO
from wav2vec2.audio import MAX_SECONDS, MIN_SECONDS
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.storage import read_json
from wav2vec2.flops import UTTERANCE_SECONDS
from wav2vec2.model import PRUNING_UNITS

# The published number of GPUs of one node (run.sh).
DEFAULT_GPUS = 4
# The published place of the teacher, which the student starts from.
DEFAULT_MODEL = Path("pretrained_ckpts/hubert-base-ls960.pth")
# Published.
TARGET_SPARSITY = 0.75
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
# What a head reads, and how it joins the frames of a clip.
HEAD_LAYERS, HEAD_POOLINGS = ("last", "weighted"), ("mean", "attentive")


def _above_zero(value: float) -> str | None:
    return None if value > 0 else "a number above 0"


def _not_negative(value: float) -> str | None:
    return None if value >= 0 else "0 or more"


def _between_zero_and_one(value: float) -> str | None:
    return None if 0 < value < 1 else "a number between 0 and 1"


def _share(value: float) -> str | None:
    return None if 0 <= value < 1 else "a number from 0 to below 1"


def _option(
    default: Any,
    help: str,
    *,
    recorded: bool = False,
    check: Callable[[Any], str | None] = lambda value: None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field that is a flag.

    Args:
        default: MISSING makes the flag required.
        help: of the flag.
        recorded: it decides what comes out of a run.
        check: says what is expected where a value other than None is wrong, else None.
        choices: the only values.
    """
    return field(default=default, metadata={"help": help, "recorded": recorded, "check": check, "choices": choices})


class _Settings:
    """What the groups of settings below share: flags from fields, and fields from flags."""

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add one flag for each field."""
        group = parser.add_argument_group(cls.__doc__.partition(".")[0].lower())
        for name, kind in typing.get_type_hints(cls).items():
            option = cls.__dataclass_fields__[name]
            if isinstance(kind, types.UnionType):
                kind = kind.__args__[0]
            options = {"type": kind, "choices": option.metadata["choices"], "help": option.metadata["help"]}
            if kind is bool:
                options = {"action": "store_true", "help": option.metadata["help"]}
            elif option.default is MISSING:
                options["required"] = True
            else:
                options["default"] = option.default
            group.add_argument(f"--{name}", **options)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The settings that parsed flags give.

        Raises:
            UserError: names the option, what was found and what is expected.
        """
        return cls(**{option.name: getattr(args, option.name) for option in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is not None and (expected := option.metadata["check"](value)):
                raise UserError(f"--{option.name}: expected {expected}, found {value}")

    def recorded(self) -> dict[str, Any]:
        """The values that decide what comes out of a run."""
        return {
            option.name: getattr(self, option.name)
            for option in dataclasses.fields(self)
            if option.metadata["recorded"]
        }


@dataclass(frozen=True, kw_only=True)
class BatchSettings(_Settings):
    """Batches."""

    seconds_per_batch: float = _option(87.5, "seconds of audio per batch and process", recorded=True, check=_above_zero)
    num_workers: int = _option(1, "data loading processes per training process", check=_not_negative)
    max_bad_files: str = _option(
        "1%", "audio files that may be unreadable and replaced by others, a number or a share of the training files"
    )
    seed: int = _option(2022, "of batches, crops and noise", recorded=True, check=_not_negative)

    def max_bad_files_of(self, num_files: int) -> int:
        """``"5"`` is 5 files, ``"1%"`` that share of ``num_files``, rounded down.

        Raises:
            UserError: neither a whole number nor a share of 0% to 100%.
        """
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
    """Data. All but the batches' length and the last three is of the manifests, and does not matter with --task_tsv."""

    tsv_dir: Path | None = _option(None, "directory of the manifests from prepare_data.py; not read with --task_tsv")
    train_subset: str = _option("train100", "train on TSV_DIR/NAME.tsv")
    min_seconds: float = _option(MIN_SECONDS, "leave out shorter utterances", recorded=True)
    max_seconds: float = _option(MAX_SECONDS, "leave out longer utterances", recorded=True)
    max_crop_seconds: float | None = _option(
        None,
        "crop utterances to at most this length (default: only to the shortest of their batch)",
        recorded=True,
        check=_above_zero,
    )


@dataclass(frozen=True, kw_only=True)
class LabelSettings(BatchSettings):
    """Labelled audio."""

    tsv: Path = _option(MISSING, "list of labelled audio: split (train, valid, test), path, and text, or label")
    units: str | None = _option(
        None,
        f"what is recognised of a text (default: as the model's head, or {UNITS[0]})",
        recorded=True,
        choices=UNITS,
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Settings):
    """Models."""

    teacher_ckpt: Path = _option(DEFAULT_MODEL, "teacher .pth from a converter")
    student_ckpt: Path = _option(MISSING, ".pth that the student starts from")
    student_dropout: float | None = _option(
        None,
        "of the student in this training (default: as its file says, which stays in the result)",
        recorded=True,
        check=_share,
    )
    distill_layers: str = _option(
        "0.4,8,12",
        "groups by period, layers in a group by comma, layers whose mean is one target by plus; auto:K: 0, and K means "
        "of the teacher's layers that are alike",
        recorded=True,
    )
    distill_mode: str = _option("layer2layer", "see the README", recorded=True, choices=DISTILL_MODES)
    l2_weight: float = _option(0.0, "of the mean squared error", recorded=True)
    l1_weight: float = _option(1.0, "of the mean absolute error", recorded=True)
    cos_weight: float = _option(1.0, "of the cosine similarity", recorded=True)
    cos_type: str = _option("raw", "the cosine, or the log of its sigmoid", recorded=True, choices=COS_TYPES)
    distill_weight: float = _option(
        1.0,
        "of these together, beside --task_weight; 0: no teacher is needed, and sizes are measured by the student",
        recorded=True,
        check=_not_negative,
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
        if self.num_auto_groups is None:
            try:
                parse_distill_layers(self.distill_layers)
            except UserError as error:
                raise UserError(f"--distill_layers: {error}") from None

    def recorded(self) -> dict[str, Any]:
        # Runs from before the options were there are continued as those without them.
        settings = super().recorded()
        for option in ("student_dropout", "distill_weight"):
            if settings[option] == type(self).__dataclass_fields__[option].default:
                del settings[option]
        return settings

    @property
    def num_auto_groups(self) -> int | None:
        """K of ``auto:K``; None where the layers are named."""
        match = re.fullmatch(r"auto:([1-9][0-9]{0,2})", self.distill_layers)
        return int(match[1]) if match else None

    @property
    def layer_groups(self) -> list[list[Layers]]:
        """What is distilled, by group."""
        return parse_distill_layers(self.distill_layers)

    @property
    def layers(self) -> list[Layers]:
        """What is distilled, all groups together."""
        return [layers for group in self.layer_groups for layers in group]


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(_Settings):
    """Other objectives, beside --l2_weight, --l1_weight and --cos_weight or instead of them."""

    star_weight: float = _option(
        0.0,
        "of the temporal relations of --distill_layers, as STaR (arXiv 2312.09040)",
        recorded=True,
        check=_not_negative,
    )
    unit_weight: float = _option(
        0.0,
        "of the teacher's units in masked frames, as DiceHuBERT (arXiv 2507.02911)",
        recorded=True,
        check=_not_negative,
    )
    unit_layer: int | None = _option(
        None,
        "the teacher's layer of these units (default: at three quarters of its depth)",
        recorded=True,
        check=_not_negative,
    )
    num_units: int = _option(500, "clusters of k-means", recorded=True, check=_above_zero)

    def recorded(self) -> dict[str, Any]:
        """What is not as it always was: runs of before the options were there are continued as those without them."""
        settings = super().recorded()
        if not self.star_weight:
            del settings["star_weight"]
        return settings if self.unit_weight else {k: v for k, v in settings.items() if "unit" not in k}


@dataclass(frozen=True, kw_only=True)
class TaskSettings(_Settings):
    """A task, learnt beside distillation or instead of it."""

    task_tsv: Path | None = _option(
        None, "list of labelled audio, as of finetune.py; the batches are whole clips of it"
    )
    task_weight: float = _option(1.0, "of the loss on these labels; 0: none", recorded=True, check=_not_negative)
    task_units: str | None = _option(
        None, "as --units of finetune.py, if the student has no head for the labels", recorded=True, choices=UNITS
    )
    task_layers: str | None = _option(None, "as --layers", recorded=True, choices=HEAD_LAYERS)
    task_pooling: str | None = _option(None, "as --pooling", recorded=True, choices=HEAD_POOLINGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_tsv is None:
            for option in ("task_weight", "task_units", "task_layers", "task_pooling"):
                default = type(self).__dataclass_fields__[option].default
                if (value := getattr(self, option)) and value != default:
                    raise UserError(f"--{option} {value}: of --task_tsv, which is not given")

    @property
    def is_on(self) -> bool:
        """Whether labels are learnt."""
        return self.task_tsv is not None and self.task_weight > 0

    def recorded(self) -> dict[str, Any]:
        # Runs of before the options were there are continued as those without a task.
        return super().recorded() if self.is_on else {}


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(_Settings):
    """Optimisation."""

    learning_rate: float = _option(MISSING, "of weights and projections", recorded=True, check=_above_zero)
    weight_decay: float = _option(0.0, "of weights and projections", recorded=True, check=_not_negative)
    warmup_updates: int = _option(MISSING, "the learning rate rises over these", recorded=True, check=_not_negative)
    max_updates: int = _option(MISSING, "updates of the whole run", recorded=True, check=_above_zero)
    clip_norm: float = _option(10.0, "clip the gradient's norm; 0 switches it off", recorded=True, check=_not_negative)
    accum_grad: int = _option(1, "batches per update", check=_above_zero)  # recorded times the processes
    skip_nonfinite: int = _option(
        0,
        "updates with a loss or gradient that is not finite to pass over (--precision 16: 20 in a row, always)",
        check=_not_negative,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_updates > self.max_updates:
            raise UserError(f"--warmup_updates {self.warmup_updates} is above --max_updates {self.max_updates}")


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(ScheduleSettings):
    """Optimisation. The three defaults without a number are each stage's own."""

    ema: float | None = _option(
        None,
        "average student, masks and projections over the updates, each as DECAY times the average and 1 - DECAY times "
        "the update's; later stages take the average (default: none)",
        recorded=True,
        check=_share,
    )

    def recorded(self) -> dict[str, Any]:
        # As of runs from before the option was there.
        settings = super().recorded()
        if self.ema is None:
            del settings["ema"]
        return settings


@dataclass(frozen=True, kw_only=True)
class PruningSettings(_Settings):
    """Pruning."""

    pruning_units: str = _option(
        ",".join(name for name, unit in PRUNING_UNITS.items() if unit.is_published),
        f"units to put masks on, of {', '.join(PRUNING_UNITS)}",
        recorded=True,
    )
    reg_learning_rate: float = _option(0.02, "of masks and multipliers", recorded=True, check=_not_negative)
    target_sparsity: float | None = _option(
        None,
        f"share of the parameters to remove (default: {TARGET_SPARSITY}, or any where --target_macs is given)",
        recorded=True,
        check=_between_zero_and_one,
    )
    target_macs: float | None = _option(
        None,
        f"share of the multiply-adds of {UTTERANCE_SECONDS} s of speech to remove, instead of --target_sparsity or, if "
        "both are given, both at least; with --sparsity_control exact",
        recorded=True,
        check=_between_zero_and_one,
    )
    sparsity_warmup_updates: int = _option(
        5000, "the target rises over these updates", recorded=True, check=_not_negative
    )
    sparsity_control: str = _option(
        SPARSITY_CONTROLS[0],
        "a Lagrangian that learns its multipliers, as published, or masks that are moved to the target at every update",
        recorded=True,
        choices=SPARSITY_CONTROLS,
    )
    save_at_sparsity: str | None = _option(
        None,
        "sparsities below the target, such as 0.5,0.65: where the target reaches them, EXP_DIR/sparsity_0.5 and so on "
        "get a checkpoint for prune.py",
        recorded=True,
    )
    round_to: int | None = _option(
        None, "recorded for prune.py: keep conv and feed-forward widths in multiples of this", check=_above_zero
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [unit for unit in self.units if unit not in PRUNING_UNITS]:
            raise UserError(
                f"--pruning_units: {', '.join(map(repr, unknown))} unknown; choose from {', '.join(PRUNING_UNITS)}"
            )
        if self.target_macs is None and self.target_sparsity is None:
            object.__setattr__(self, "target_sparsity", TARGET_SPARSITY)
        if self.target_macs is not None and self.sparsity_control != "exact":
            raise UserError(
                f"--target_macs {self.target_macs}: the {self.sparsity_control} knows parameters only; add "
                "--sparsity_control exact"
            )
        below = self.target_sparsity
        if self.save_at_sparsity is not None and not (
            below is not None
            and all(re.fullmatch(r"0\.[0-9]{1,6}", text) and 0 < float(text) < below for text in self.sizes)
            and len(set(map(float, self.sizes))) == len(self.sizes)
        ):
            raise UserError(
                "--save_at_sparsity: expected different numbers between 0 and --target_sparsity "
                f"({'not given' if below is None else below}), such as 0.5,0.65; found "
                f"{short_repr(self.save_at_sparsity)}"
            )

    @property
    def sizes(self) -> list[str]:
        """The sparsities of ``--save_at_sparsity``, as they are written."""
        return self.save_at_sparsity.split(",") if self.save_at_sparsity is not None else []

    @property
    def units(self) -> list[str]:
        return self.pruning_units.split(",")

    def recorded(self) -> dict[str, Any]:
        """As of all groups; runs from before there was a choice have none of these recorded."""
        settings = super().recorded()
        for option in ("target_macs", "sparsity_control", "save_at_sparsity"):
            if settings[option] == type(self).__dataclass_fields__[option].default:
                del settings[option]
        return settings


# The value of --freeze_updates for an encoder that is never trained.
ALWAYS = "all"
# The value of --init_layers for layers that start fresh, and the named choice of --extractor.
RANDOM, LIGHT = "random", "light"


@dataclass(frozen=True, kw_only=True)
class StudentSettings(_Settings):
    """Student."""

    model: Path = _option(MISSING, "model file that the student is made from")
    student_config: Path | None = _option(
        None, "JSON of the config's keys in which the student differs from the model; one number stands for all layers"
    )
    init_layers: str | None = _option(
        None,
        f"layers of the model, from 1, that the student's layers start from, or '{RANDOM}' (default: spread evenly "
        "over the model's depth)",
    )
    extractor: str | None = _option(
        None,
        f"'{LIGHT}', or JSON [[channels, kernel, stride], ...]: give the student an extractor of these layers, and "
        "train it to make the frames of the model's own",
        recorded=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student_config is None and self.init_layers is None and self.extractor is None:
            raise UserError("nothing to make: give --student_config, --init_layers or --extractor")
        self.recorded()  # a file that cannot be read is refused before all else
        if self.init_layers not in (None, RANDOM) and self.layers is None:
            raise UserError(
                f"--init_layers: expected {RANDOM}, or layers from 1 such as 1,2, found {short_repr(self.init_layers)}"
            )
        if self.extractor not in (None, LIGHT) and not isinstance(self.extractor_layers, list):
            raise UserError(
                f"--extractor: expected {LIGHT}, or a list of layers in JSON such as "
                f"[[128, 40, 40], [192, 6, 4], [128, 2, 2]], found {short_repr(self.extractor)}"
            )

    @property
    def changes(self) -> dict[str, Any]:
        """The config's keys in which the student differs.

        Raises:
            UserError: the JSON file cannot be read.
        """
        if self.student_config is None:
            return {}
        expected = "JSON of the config's keys in which the student differs from the model"
        return read_json(self.student_config, expected, "give such JSON with --student_config")

    @property
    def layers(self) -> list[int] | None:
        """The layers that --init_layers names; None where it names none."""
        words = (self.init_layers or "").split(",")
        return [int(word) for word in words] if all(re.fullmatch("[1-9][0-9]{0,3}", word) for word in words) else None

    @property
    def extractor_layers(self) -> Any:
        """The JSON value of --extractor; None where it is no JSON."""
        try:
            return json.loads(self.extractor or "")
        except (ValueError, RecursionError):
            return None

    def recorded(self) -> dict[str, Any]:
        """The contents of the JSON file, wherever it lies, and the other options."""
        changes = json.dumps(self.changes, sort_keys=True)
        return super().recorded() | {"student_config": changes, "init_layers": self.init_layers}


@dataclass(frozen=True, kw_only=True)
class MachineSettings(_Settings):
    """Machine. Of these only the precision changes what comes out of a run."""

    exp_dir: Path = _option(Path("./exp"), "where checkpoints and logs go")
    resume_checkpoint: str | None = _option(
        None,
        f"a .ckpt to continue from, or '{AUTO}': the newest whole one of --exp_dir, a fresh start if there is none",
    )
    save_interval: int = _option(500, "save every this many updates, and each epoch", check=_above_zero)
    log_interval: int = _option(50, "log every this many updates", check=_above_zero)
    valid_interval: int | None = _option(
        None, "validate every this many batches (default: at the end of each epoch)", check=_above_zero
    )
    accelerator: str = _option("auto", "what to train on", choices=("auto", "cpu", "gpu"))
    num_nodes: int = _option(1, "nodes", check=_above_zero)
    gpus: int | None = _option(
        None,
        f"GPUs per node (default: {DEFAULT_GPUS}); with --accelerator cpu, processes per node (default: 1)",
        check=_above_zero,
    )
    precision: str = _option("32", "bits of the matrix products", recorded=True, choices=tuple(PRECISIONS))
    plain: bool = _option(False, "take the plain paths: slower, the same numbers")
    compile: bool = _option(
        False,
        "compile teacher, student and loss with torch.compile: the same numbers up to rounding, after some minutes of "
        "compiling",
    )
    checkpoint_activations: bool = _option(
        False,
        "keep only the input of each of the student's layers and run the layer again for the backward pass: far less "
        "memory, about a quarter more time, the same numbers",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resumed = self.resume_checkpoint
        if resumed not in (None, AUTO) and not Path(resumed).is_file():
            raise UserError(f"--resume_checkpoint: {resumed} does not exist; give a .ckpt of a run, or {AUTO}")
        if self.precision == "16" and self.devices[0] == "cpu":
            raise UserError(
                "--precision 16 needs a GPU (its small gradients need a loss scaler); use 32 or bf16 on a CPU"
            )
        if self.compile and self.plain:
            raise UserError("--compile and --plain: the plain paths are there to be read and compared with; give one")

    @property
    def devices(self) -> tuple[str, int]:
        """The accelerator ("gpu" or "cpu") and the number of processes per node.

        Raises:
            UserError: more GPUs are asked for than there are.
        """
        available = torch.cuda.device_count()
        if self.accelerator == "cpu" or (self.accelerator == "auto" and not (available or self.gpus)):
            return "cpu", self.gpus or 1
        wanted = self.gpus or DEFAULT_GPUS
        if wanted > available:
            advice = (
                f"give --gpus {available} (and --accum_grad to keep the total batch)"
                if available
                else "use --accelerator cpu to train without one"
            )
            given = "asked for" if self.gpus else "are the default"
            raise UserError(f"--gpus: {wanted} GPUs {given}, {available} found on this machine; {advice}")
        return "gpu", wanted

    @property
    def num_processes(self) -> int:
        return self.devices[1] * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All settings of a distillation.

    Attributes:
        stage: its name, for people.
        objectives: None where equation 1 is all.
        pruning: None in the final distillation.
    """

    stage: str
    data: DataSettings
    models: ModelSettings
    optimisation: OptimisationSettings
    machine: MachineSettings
    task: TaskSettings = TaskSettings()
    objectives: ObjectiveSettings | None = None
    pruning: PruningSettings | None = None

    def __post_init__(self) -> None:
        objectives, task = self.objectives, self.task
        others = [name for name in ("star_weight", "unit_weight") if objectives and getattr(objectives, name)]
        if task.is_on:
            if others:
                raise UserError(
                    f"--{others[0]}: is not for batches with padding, which --task_tsv makes; leave one out"
                )
            if self.machine.compile:
                raise UserError("--compile: is not for batches with padding, which --task_tsv makes; leave it out")
        elif not (self.distils or others):
            raise UserError(
                "--l2_weight, --l1_weight, --cos_weight, --star_weight and --unit_weight are all 0: nothing would be "
                "distilled"
                if self.models.distill_weight
                else "--distill_weight 0: nothing would be learnt; give --task_tsv and --task_weight"
            )

    @property
    def distils(self) -> bool:
        """Whether equation 1 has a weight."""
        models = self.models
        return bool(models.distill_weight and (models.l2_weight or models.l1_weight or models.cos_weight))

    @property
    def has_projections(self) -> bool:
        """Whether there are layers to be matched: not if the task is all."""
        return self.distils or not self.task.is_on

    @property
    def layer_groups(self) -> list[list[Layers]]:
        """The layers to be matched, by group."""
        return self.models.layer_groups if self.has_projections else []

    def recorded(self) -> dict[str, Any]:
        """The settings that decide what comes out of the run."""
        return _recorded(
            *(self, self.data, self.models, self.task, self.objectives, self.optimisation),
            *(self.machine, self.pruning),
        )


@dataclass(frozen=True, kw_only=True)
class StudentRunSettings(RunSettings):
    """All settings of make_student.py, which trains an extractor as a distillation of layer 0."""

    student: StudentSettings

    def recorded(self) -> dict[str, Any]:
        return super().recorded() | self.student.recorded()


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(_Settings):
    """Model and head."""

    model: Path = _option(MISSING, "model file or folder: the encoder; a head for the same labels is trained further")
    layers: str | None = _option(
        None,
        "what the head reads: the last layer, or a learnt sum of all (default: as the model's head; else of text the "
        "last, of others the sum)",
        recorded=True,
        choices=HEAD_LAYERS,
    )
    pooling: str | None = _option(
        None,
        "over the frames of a clip with one label: the mean, or a mean with learnt weights (default: as the model's "
        "head, or mean)",
        recorded=True,
        choices=HEAD_POOLINGS,
    )
    freeze_updates: str = _option(
        "0", f"updates in which the head is trained alone, or '{ALWAYS}'; the extractor is never trained", recorded=True
    )
    encoder_learning_rate: float = _option(1e-4, "of the encoder", recorded=True, check=_above_zero)
    mask_prob: float = _option(
        0.05, "share of the encoder's frames to hide in spans, as wav2vec 2.0; 0: none", recorded=True, check=_share
    )
    mask_length: int = _option(10, "frames of such a span", recorded=True, check=_above_zero)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_updates != ALWAYS and not re.fullmatch("[0-9]{1,18}", self.freeze_updates):
            raise UserError(
                f"--freeze_updates: expected a number of updates, or {ALWAYS}, found {short_repr(self.freeze_updates)}"
            )

    @property
    def num_frozen(self) -> float:
        """The updates in which the encoder is not trained."""
        return math.inf if self.freeze_updates == ALWAYS else int(self.freeze_updates)


@dataclass(frozen=True, kw_only=True)
class FinetuneRunSettings:
    """All settings of a fine-tuning.

    Attributes:
        stage: its name, for people.
    """

    stage: str
    data: LabelSettings
    finetune: FinetuneSettings
    optimisation: ScheduleSettings
    machine: MachineSettings

    def recorded(self) -> dict[str, Any]:
        """The settings that decide what comes out of the run."""
        return _recorded(self, self.data, self.finetune, self.optimisation, self.machine)


def _recorded(run: RunSettings | FinetuneRunSettings, *groups: _Settings | None) -> dict[str, Any]:
    settings = {name: value for group in groups if group for name, value in group.recorded().items()}
    # Four processes, or one with --accum_grad 4: the same updates.
    num_batches = run.machine.num_processes * run.optimisation.accum_grad
    return {"stage": run.stage, **settings, "gpus x accum_grad": num_batches}


_SHARED = {
    "data": DataSettings,
    "models": ModelSettings,
    "task": TaskSettings,
    "objectives": ObjectiveSettings,
    "optimisation": OptimisationSettings,
    "machine": MachineSettings,
}
# Of the stage that trains masks.
_JOINT = {"pruning": PruningSettings}
_STUDENT = {
    "student": StudentSettings,
    "data": DataSettings,
    "optimisation": OptimisationSettings,
    "machine": MachineSettings,
}


_FINETUNING = {
    "data": LabelSettings,
    "finetune": FinetuneSettings,
    "optimisation": ScheduleSettings,
    "machine": MachineSettings,
}


def _add_groups(parser: argparse.ArgumentParser, groups: dict[str, type[_Settings]], defaults: dict[str, Any]) -> None:
    for group in groups.values():
        group.add_to(parser)
    for action in parser._actions:
        if action.dest in defaults:
            action.required = False
    parser.set_defaults(**defaults)


def add_arguments(parser: argparse.ArgumentParser, *, prunes: bool, **defaults: Any) -> None:
    """Add the flags of a distillation.

    Args:
        parser: of the script.
        prunes: whether it trains masks.
        defaults: of the flags whose default is the stage's own.
    """
    _add_groups(parser, _SHARED | (_JOINT if prunes else {}), defaults)


def read_arguments(args: argparse.Namespace, stage: str, *, prunes: bool) -> RunSettings:
    """The settings that parsed flags give, checked as far as they can be without reading a file.

    Raises:
        UserError: names the option, what was found and what is expected.
    """
    groups = _SHARED | (_JOINT if prunes else {})
    settings = RunSettings(stage=stage, **{name: group.from_args(args) for name, group in groups.items()})
    if settings.data.tsv_dir is None and not settings.task.is_on:
        raise UserError("--tsv_dir: is not given, expected the directory of the manifests from prepare_data.py")
    return settings


def add_finetune_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags of a fine-tuning; ``defaults`` as of :func:`add_arguments`."""
    _add_groups(parser, _FINETUNING, defaults)


def read_finetune_arguments(args: argparse.Namespace, stage: str) -> FinetuneRunSettings:
    """As :func:`read_arguments`, of a fine-tuning."""
    return FinetuneRunSettings(stage=stage, **{name: group.from_args(args) for name, group in _FINETUNING.items()})


def add_student_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags of make_student.py; ``defaults`` as of :func:`add_arguments`."""
    _add_groups(parser, _STUDENT, defaults)


def read_student_arguments(args: argparse.Namespace) -> StudentRunSettings:
    """As :func:`read_arguments`, of make_student.py.

    The extractor learns by the mean squared error behind the projection, which it and the model's own share.
    """
    groups: dict[str, Any] = {name: group.from_args(args) for name, group in _STUDENT.items()}
    model = groups["student"].model
    losses = {"distill_layers": "0", "l2_weight": 1.0, "l1_weight": 0.0, "cos_weight": 0.0}
    models = ModelSettings(teacher_ckpt=model, student_ckpt=model, **losses)
    settings = StudentRunSettings(stage="extractor", models=models, **groups)
    if settings.student.extractor is not None and settings.data.tsv_dir is None:
        raise UserError("--tsv_dir: is not given, expected the directory of the manifests from prepare_data.py")
    return settings
