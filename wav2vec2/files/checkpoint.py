"""Model files ``{"state_dict", "config", ...}`` of plain data: written, read, checked, and built into models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..components import published_state
from ..model import Wav2Vec2Model, wav2vec2_model
from . import hub
from .errors import UserError, listed, short_repr
from .storage import atomic_path
from .unpickling import kind_of_contents, read_torch_file

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Source = str | os.PathLike
"""A file or folder, named in errors."""


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
    contents = read_torch_file(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a dict of tensors and settings, found {type(contents).__name__}")
    for place in (contents, contents.get("state_dict"), contents.get("config")):
        odd = [key for key in place if not isinstance(key, str)] if isinstance(place, dict) else []
        if odd:
            raise UserError(f"{path}: expected names as keys, found {short_repr(odd[0])}; the file is damaged")
    return contents


def read_model_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a model ``.pth``, or a folder as export.py writes it, as :func:`checked_model` returns it."""
    return checked_model(hub.read_folder(path) if Path(path).is_dir() else read(path), path)


def checked_model(contents: dict[str, Any], path: Source) -> dict[str, Any]:
    """Check that the contents of a file are a model's; returns them with the weights under published names.

    No memory is taken for the shapes that the config claims before the weights are known to have them.

    Raises:
        UserError: they are not a model's; files of other kinds are named as such.
    """
    kind = kind_of_contents(contents, path)
    if "pytorch-lightning_version" in contents or "optimizer_states" in contents:
        raise UserError(f"{path}: {kind}")
    missing = [key for key in ("state_dict", "config") if not isinstance(contents.get(key), dict)]
    if missing:
        raise UserError(
            f"{path}: not a model file: no dict under {missing}, found keys {short_repr(sorted(contents))}; "
            f"{kind or 'convert foreign checkpoints with convert_hubert_from_hf.py or convert_wavlm_from_fairseq.py'}"
        )
    contents = {**contents, "state_dict": published_state(contents["state_dict"])}
    check_weights(expected_state(contents["config"], path), contents["state_dict"], path)
    return contents


def expected_state(config: Mapping[str, Any], source: Source = "config") -> dict[str, Tensor]:
    """Return the state dict of the model of a config, without memory for it (on torch's meta device)."""
    with torch.device("meta"):
        return build_model(config, source).state_dict()


def check_weights(expected: Mapping[str, Tensor], state_dict: Mapping[str, Any], source: Source) -> None:
    """Refuse a ``state_dict`` without the keys and shapes of ``expected`` in finite floats."""

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{source}: weights do not fit the model: {reason}")

    missing = [key for key in expected if key not in state_dict]
    left_over = [key for key in state_dict if key not in expected]
    if missing or left_over:
        refuse(f"{listed('missing', missing)}, {listed('left over', left_over)}")
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            refuse(f"{key} is {short_repr(tensor)}, expected a tensor of floats")
        if tensor.dtype not in FLOAT_DTYPES:
            refuse(f"{key} is {tensor.dtype}, expected floats")
        if tensor.shape != expected[key].shape:
            refuse(f"{key} has shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
        if tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
            refuse(f"{key} holds NaN or infinite values; the file is damaged or its training failed")


def build_model(config: Mapping[str, Any], source: Source = "config") -> Wav2Vec2Model:
    """Build the model of a config.

    Raises:
        UserError: a key is missing, unknown or has an impossible value.
    """
    try:
        return wav2vec2_model(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no model can be built from its config: {error}") from error


def load_state(model: torch.nn.Module, state_dict: Mapping[str, Tensor], source: Source) -> None:
    """Load ``state_dict`` strictly, as :func:`check_weights` says."""
    state_dict = published_state(state_dict)
    check_weights(model.state_dict(), state_dict, source)
    model.load_state_dict(state_dict)


def load_model(path: str | os.PathLike) -> Wav2Vec2Model:
    """Build the model of a file or folder and load its weights strictly; returned in training mode, on the CPU."""
    return model_of(read_model_file(path), path)


def model_of(contents: Mapping[str, Any], source: Source) -> Wav2Vec2Model:
    """Build the model of checked contents."""
    model = build_model(contents["config"], source)
    model.load_state_dict(published_state(contents["state_dict"]))
    return model
