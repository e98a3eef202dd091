"""The one place that reads and writes model files ``{"state_dict", "config", ...}``.

Files hold plain tensors, lists, tuples and numbers, so that they load with
``torch.load(path, weights_only=True)``; nothing in this project unpickles more than that.
"""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .model import Wav2Vec2Model, wav2vec2_model, with_masks


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` that becomes ``path`` if the block succeeds.

    What stood at ``path`` stays until then; if the block fails, the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a checkpoint is shared as any output is
        # The name must not reach the disk before the contents do, or a crash of the machine leaves an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: str | os.PathLike, contents: dict[str, Any]) -> None:
    """Write ``contents`` with ``torch.save``, whole or not at all; the same contents make the same bytes."""
    # To an open file: given a path, torch.save writes its (temporary, random) name into the archive.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file written by ``torch.save`` without running code from it; tensors are put on the CPU.

    Raises:
        UserError: the file is missing, damaged, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint that can be read safely ({reason}); "
            "convert foreign files with convert_hubert_from_hf.py or convert_wavlm_from_fairseq.py"
        ) from error
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a dict of tensors and settings, found {type(contents).__name__}")
    return contents


def read_model_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a model ``.pth`` and check that it is one (``state_dict`` and ``config`` present).

    Raises:
        UserError: not a model file; a training checkpoint is named as such.
    """
    contents = read(path)
    if "pytorch-lightning_version" in contents or "optimizer_states" in contents:
        raise UserError(
            f"{path}: a training checkpoint (.ckpt) where a model file (.pth) is wanted; "
            "prune.py or save_final_ckpt.py makes the model file from it"
        )
    missing = [key for key in ("state_dict", "config") if not isinstance(contents.get(key), dict)]
    if missing:
        raise UserError(
            f"{path}: not a model file: no dict under {missing}, found keys {sorted(map(str, contents))[:8]}; "
            "convert foreign checkpoints with convert_hubert_from_hf.py or convert_wavlm_from_fairseq.py"
        )
    return contents


def build_model(config: dict[str, Any], source: str | os.PathLike = "config") -> Wav2Vec2Model:
    """Build the model of a config; ``source`` is named in errors.

    Raises:
        UserError: a key is missing, unknown or has an impossible value.
    """
    try:
        return wav2vec2_model(**config)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{source}: no model can be built from its config: {error}") from error


def load_state(model: torch.nn.Module, state_dict: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Load ``state_dict`` strictly; ``source`` is named in errors.

    Raises:
        UserError: a key is missing, left over, or has another shape.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(f"{source}: weights do not fit the model: {' '.join(reasons)[:600]}") from error


def load_model(path: str | os.PathLike) -> Wav2Vec2Model:
    """Build the model of a ``.pth`` file and load its weights strictly; returned in training mode, on the CPU.

    Raises:
        UserError: the file is missing, damaged, of another kind, or its weights do not fit its config.
    """
    contents = read_model_file(path)
    model = build_model(contents["config"], path)
    load_state(model, contents["state_dict"], path)
    return model


def load_masked_model(path: str | os.PathLike, units: Iterable[str]) -> Wav2Vec2Model:
    """Build the model of an unmasked ``.pth`` file with fresh masks on ``units`` (names as in ``--pruning_units``).

    Raises:
        UserError: as :func:`load_model`.
    """
    contents = read_model_file(path)
    model = build_model(with_masks(contents["config"], units), path)
    # The one thing that the file cannot have is the state of the masks; everything else must be there.
    fresh_masks = {key: value for key, value in model.state_dict().items() if key.endswith("log_alpha")}
    load_state(model, {**fresh_masks, **contents["state_dict"]}, path)
    return model
