"""The files of a run: which checkpoint to continue from, what it is of, and who may write."""

import fcntl
import hashlib
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cli import print_line
from training.settings import AUTO, recorded_defaults
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError, listed, short_repr, single_line
from wav2vec2.files.heads import Head, head_of
from wav2vec2.files.storage import check_writable

CHECKPOINTS = "ckpts"
LAST_CHECKPOINT = "last.ckpt"
# What last.ckpt was before, while a run is going on: should the disk damage one, the other is there. Its ending keeps
# it out of ckpts/*.ckpt, which the published commands give to prune.py.
PREVIOUS_CHECKPOINT = f"{LAST_CHECKPOINT}.previous"
# Where --save_at_sparsity saves, with the sparsity behind it.
SIZE_FOLDER = "sparsity_"
# The published name of what prune.py and save_final_ckpt.py write, whatever the model.
PRUNED_MODEL = "pruned_hubert_base.pth"
# What finetune.py leaves: the weights of the best validation so far, and the result.
BEST_MODEL, FINETUNED_MODEL = "best.pth", "finetuned.pth"
# What a training checkpoint can be of, with the beginning of its weights' names and its scripts.
DISTILLATION, FINETUNING = "distillation", "finetuning"
_TRAINED = {DISTILLATION: ("student_model.", "distill.py or final_distill.py"), FINETUNING: ("model.", "finetune.py")}
# The entry under DISTILLATION that marks a checkpoint of --save_at_sparsity.
INTERMEDIATE = "intermediate"
# Weights that an earlier version averaged over the updates (--ema), for the stages that follow.
AVERAGED = "averaged_state_dict"
# Settings of the version before that made another training, or another student, of it.
REMOVED_SETTINGS = (
    *("star_weight", "unit_weight", "unit_layer", "num_units", "ema"),
    *("student_extractor", "extractor_updates", "student_config", "init_layers"),
)
# The numbers that a checkpoint says of its run beside its settings: least and greatest.
MAX_NUMBER = 2**53
_NUMBERS = {
    "global_step": (0, MAX_NUMBER),
    **dict.fromkeys(("target_sparsity", "target_macs", "target_latency"), (0, 1)),
}
_NUMBERS |= dict.fromkeys(("original_num_params", "original_num_macs", "original_latency"), (1, MAX_NUMBER))
# What messages advise.
CONTINUE = f"continue with --resume_checkpoint {AUTO}"


def fingerprint(path: str | os.PathLike) -> str:
    """A digest of a checkpoint's contents, whatever its name; of a folder that of all its files.

    ``torch.save`` keeps a CRC-32 of every record in the archive's directory, so the tensors need not be read.
    """
    digest = hashlib.sha256()
    if Path(path).is_dir():
        for entry in sorted(Path(path).iterdir()):
            digest.update(f"{entry.name} {fingerprint(entry)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]
    try:
        with zipfile.ZipFile(path) as archive:
            for record in sorted(archive.infolist(), key=lambda record: record.filename.partition("/")[2]):
                name = record.filename.partition("/")[2]  # before it: the name that the file was saved under
                digest.update(f"{name} {record.file_size} {record.CRC}\n".encode())
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return digest.hexdigest()[:16]


def read_training_checkpoint(path: str | os.PathLike, kind: str = DISTILLATION) -> dict[str, Any]:
    """Read a ``.ckpt`` of one of the distillations, of this program or the published one, or of a fine-tuning.

    The dict under ``kind`` is what the checkpoint says of its run; it is empty for the published program's.

    Raises:
        UserError: it is something else, or damaged.
    """
    contents = ckpt.read(path)
    prefix, scripts = _TRAINED[kind]
    state_dict = contents.get("state_dict")
    if not isinstance(state_dict, dict) or not any(key.startswith(prefix) for key in state_dict):
        found = "a model file (.pth)" if "config" in contents else "neither a training checkpoint nor a model file"
        for other, (_, makers) in _TRAINED.items():
            if other in contents:
                found = f"a training checkpoint of {makers}"
        raise UserError(f"{path}: {found} where a training checkpoint (.ckpt) of {scripts} is wanted")
    contents = {kind: {}, AVERAGED: {}, **contents}
    for name, wanted in {"global_step": int, kind: dict, AVERAGED: dict}.items():
        if type(value := contents.get(name)) is not wanted:
            raise UserError(f"{path}: {name}: expected {wanted.__name__}, found {short_repr(value)}; it is damaged")
    for name in ("state_dict", AVERAGED):
        for key, value in contents[name].items():
            is_named = isinstance(key, str) and isinstance(value, Tensor)
            if not (is_named and value.is_floating_point() and value.isfinite().all()):
                raise UserError(f"{path}: {name}: {short_repr(key)} is not a tensor of finite floats; it is damaged")
    for name, (least, most) in _NUMBERS.items():
        value = {**contents[kind], "global_step": contents["global_step"]}.get(name)
        if value is not None and not (type(value) in (int, float) and least <= value <= most):
            found = f"expected {least} to {most}, found {short_repr(value)}"
            raise UserError(f"{path}: {name}: {found}; it is damaged")
    return contents


def choose_checkpoint(
    choice: str | None, exp_dir: Path, kind: str = DISTILLATION
) -> tuple[Path, dict[str, Any]] | None:
    """Choose the checkpoint that a run continues from, and read it; None starts afresh.

    ``choice`` is a path, "auto" for the newest whole checkpoint of ``exp_dir`` if there is one, or None.

    Raises:
        UserError: no such file, or not a training checkpoint; with "auto", all that there are are damaged;
            with None or a path from elsewhere, ``exp_dir`` has a checkpoint, which would be overwritten.
    """
    folder = exp_dir / CHECKPOINTS
    found = [path for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT) if (path := folder / name).is_file()]
    # A checkpoint from elsewhere would start another run here, as none does.
    is_own = choice == AUTO or (choice is not None and Path(choice).resolve().parent == folder.resolve())
    if found and not is_own:
        raise UserError(
            f"--exp_dir {exp_dir}: holds a run already ({found[0]}), which would be overwritten; add "
            "--resume_checkpoint auto to continue it, or give another --exp_dir"
        )
    if choice is None:
        return None
    if choice != AUTO:
        return Path(choice), read_training_checkpoint(choice, kind)
    damaged = []
    for path in found:
        try:
            return path, read_training_checkpoint(path, kind)
        except UserError as error:
            damaged.append(error)
            print_line(f"passed over: {error}")
    if damaged:
        raise UserError(
            f"--resume_checkpoint auto: no checkpoint of {folder} can be read ({damaged[0]}); "
            "move them away to start afresh"
        )
    return None


def changed_settings(recorded: dict[str, Any] | None, current: dict[str, Any]) -> list[str]:
    """List the settings that differ from those that a checkpoint records, each as ``name: there, now``."""
    if not isinstance(recorded, dict):
        return ["its settings are not recorded there"]
    recorded = {name: value for name, value in recorded.items() if isinstance(name, str)}
    defaults = recorded_defaults()
    there, now = ({**dict.fromkeys(recorded.keys() | current.keys()), **defaults, **own} for own in (recorded, current))
    # A tensor or a nest, which no run records now, is not compared.
    same = [name for name in now if isinstance(there[name], str | int | float | None) and there[name] == now[name]]
    return [f"{name}: {shown(there[name])} there, {now[name]} now" for name in sorted(now.keys() - same)]


def shown(value: Any) -> str:
    """Return a setting from a checkpoint on one short line."""
    return single_line(value) if isinstance(value, str) else short_repr(value)


def restorable(expected: Any, found: Any, place: str) -> Any:
    """Return what of ``found``, from a checkpoint, a fresh run would save as well: ``expected``, with other values.

    An empty dict is expected where texts by name may be, None where a number may be; numbered entries may be missing.
    Tensors are copied: an optimiser writes to their memory as if it were laid out as the expected one's.

    Raises:
        UserError: something is missing, or of another kind; names its ``place``.
    """
    if type(found) is not type(expected):
        if expected is not None or type(found) is not float:
            refuse(place, "a number" if expected is None else type(expected).__name__, short_repr(found))
    elif isinstance(found, dict) and not expected:
        if not all(isinstance(text, str) for item in found.items() for text in item):
            refuse(place, "texts by name", short_repr(found))
    elif isinstance(found, dict):
        if missing := [key for key in expected if isinstance(key, str) and key not in found]:
            refuse(place, "all that this run saves", listed("missing", missing))
        return {key: restorable(expected[key], found[key], f"{place}: {key}") for key in expected if key in found}
    elif isinstance(found, list):
        if len(found) != len(expected):
            refuse(place, f"{len(expected)} entries", f"{len(found)}")
        return [restorable(*pair, place) for pair in zip(expected, found, strict=True)]
    elif isinstance(found, Tensor):
        shapes = [f"{list(tensor.shape)} of {tensor.dtype}" for tensor in (expected, found)]
        if shapes[0] != shapes[1]:
            refuse(place, *shapes)
        if not found.isfinite().all():
            refuse(place, "finite numbers", "NaN or infinite ones")
        return torch.empty_like(expected).copy_(found)
    elif type(found) is int and not 0 <= found < MAX_NUMBER:
        refuse(place, "a count", short_repr(found))
    return found


def refuse(place: str, wanted: str, found: str) -> NoReturn:
    """Raise the UserError about something in a checkpoint that cannot be restored."""
    raise UserError(
        f"{place}: expected {wanted}, found {found}; the checkpoint is damaged, or of another run: continue another "
        f"({PREVIOUS_CHECKPOINT} beside it, if it is there), or start afresh with another --exp_dir"
    )


def split_state_dict(contents: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of student and projections in a training checkpoint, without their prefixes."""
    state_dict = contents[AVERAGED] or contents["state_dict"]
    return part_of(state_dict, "student_model."), part_of(state_dict, "distill_linear_projs.")


def recorded_head(distillation: dict[str, Any], path: str | os.PathLike) -> Head | None:
    """The head of the student in a training checkpoint, from what that says of its run; None if it has none.

    Raises:
        UserError: the entry is no head; names ``path``.
    """
    entry = distillation.get("head")
    if entry is None:
        return None
    head = {**entry, "state_dict": {}} if isinstance(entry, dict) else entry  # its weights are the student's
    return head_of({"head": head}, f"{path}: distillation")


def part_of(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def made_before(out: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of a model file if it is whole and was made by the same script from the same input; else None."""
    try:
        contents = ckpt.read_model_file(out)
        return contents if contents.get("made_by") == made_by else None
    except (UserError, OSError, RuntimeError):  # the last from comparing with a tensor
        return None


@contextmanager
def exclusive(exp_dir: Path) -> Iterator[None]:
    """Hold ``exp_dir`` for this run, whose process keeps the lock; a file system without locks has none.

    Raises:
        UserError: another run holds it, or checkpoints cannot be written there.
    """
    check_writable(exp_dir / CHECKPOINTS / LAST_CHECKPOINT)
    exp_dir.mkdir(parents=True, exist_ok=True)
    with (exp_dir / ".lock").open("a+") as file:
        try:
            # Not flock: loader processes would inherit it and hold it for seconds after this process is gone.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"--exp_dir {exp_dir}: another run is writing to it ({file.read().strip() or 'unknown'}); "
                "wait for its end, or give another --exp_dir"
            ) from None
        except OSError:
            yield
            return
        file.truncate(0)
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        file.write(f"process {os.getpid()} on {os.uname().nodename}{job}\n")
        file.flush()
        yield
