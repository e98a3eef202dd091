"""Files of models with a task head.

A fine-tuned model file is a model file as all others, with one entry more, ``head``: what it recognises, and the
head's weights. Of ``text`` there are none: its head is the model's own output layer ``aux``, trained with CTC, whose
output 0 is the blank. Of ``clips`` and ``segments`` the file's config and weights are those of the plain encoder.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..config import check_config
from ..model import Wav2Vec2Model
from ..task_model import TEXT, Head, TaskModel
from .checkpoint import build_model, check_weights, masked_model_of, model_of
from .errors import UserError, short_repr

_PREFIX = "head."  # of the head's weights among the model's
_FRESH_DEVIATION = 0.02  # of a fresh head's weights, as in transformers


def head_of(contents: Mapping[str, Any], source: str | os.PathLike) -> Head | None:
    """The settings of the head in a model file's contents, or None if it has none; ``source`` is named in errors.

    Raises:
        UserError: the entry is no head.
    """
    if "head" not in contents:
        return None
    entry, keys = contents["head"], [field.name for field in fields(Head)]
    if not isinstance(entry, dict) or not isinstance(entry.get("state_dict"), dict):
        raise UserError(f"{source}: head: expected its settings and a state_dict, found {short_repr(entry)}")
    missing, unknown = [key for key in keys if key not in entry], set(entry) - {*keys, "state_dict"}
    unknown |= {name for name in entry["state_dict"] if not isinstance(name, str)}
    if missing or unknown:
        raise UserError(
            f"{source}: head: expected {', '.join(keys)} and state_dict, found "
            f"{f'no {missing[0]}' if missing else short_repr(min(unknown, key=str))}; the file is damaged, or a newer "
            "version wrote it"
        )
    try:
        return Head(**{key: entry[key] for key in keys})
    except ValueError as error:
        raise UserError(f"{source}: head: {error}") from error


def task_model_of(contents: Mapping[str, Any], source: str | os.PathLike) -> TaskModel:
    """Build the model with its head of contents that are checked, as from :func:`checkpoint.read_model_file`.

    Returned in training mode, on the CPU; ``source`` is named in errors.

    Raises:
        UserError: there is no head, it is damaged, or it does not fit its weights or the encoder.
    """
    head = head_of(contents, source)
    if head is None:
        raise UserError(f"{source}: a model without a task head; make a model with one of it: finetune.py")
    weights = contents["head"]["state_dict"]
    with torch.device("meta"):  # no memory for what the labels claim
        _, expected = split_state(build_with_head(contents["config"], head, source).state_dict())
    check_weights(expected, weights, f"{source}: head")
    model = build_with_head(contents["config"], head, source)
    model.load_state_dict(joined_state(contents["state_dict"], weights))
    return model


def model_with_its_head(contents: Mapping[str, Any], source: str | os.PathLike) -> Wav2Vec2Model:
    """:func:`task_model_of` where there is a head, else :func:`checkpoint.model_of`."""
    return (task_model_of if "head" in contents else model_of)(contents, source)


def masked_model_with_its_head(
    contents: Mapping[str, Any], units: Iterable[str], source: str | os.PathLike
) -> Wav2Vec2Model:
    """:func:`checkpoint.masked_model_of`, with the head where there is one."""
    model = masked_model_of(contents, units, source)
    if "head" not in contents:
        return model
    with torch.random.fork_rng(devices=()):  # what is drawn next does not depend on the head
        return task_model_of({**contents, "config": model.config, "state_dict": model.state_dict()}, source)


def with_head(
    contents: Mapping[str, Any], head: Head, source: str | os.PathLike, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """The contents of a model file, with a fresh head in place of the one it may have.

    Args:
        contents: checked, as from :func:`checkpoint.read_model_file`.
        head: its settings.
        source: named in errors.
        generator: of the initial weights.

    Raises:
        UserError: no model can be built from the config.
    """
    plain = without_head(contents)
    config = with_outputs(plain["config"], head)
    with torch.device("meta"):
        shapes = build_with_head(config, head, source).state_dict()
    fresh = {name: torch.zeros(x.shape) for name, x in shapes.items() if name.startswith(("aux.", "head."))}
    for name in fresh.keys() & {"aux.weight", "head.linear.weight"}:
        fresh[name].normal_(std=_FRESH_DEVIATION, generator=generator)
    return _contents(config, plain["state_dict"] | fresh, head)


def without_head(contents: Mapping[str, Any]) -> dict[str, Any]:
    """``{"config", "state_dict"}`` of the plain encoder in a model file's contents: without head and output layer."""
    config = dict(contents["config"])
    if config.get("aux_num_out") is not None:
        config["aux_num_out"] = None
    state_dict = {name: tensor for name, tensor in contents["state_dict"].items() if not name.startswith("aux.")}
    return {"config": config, "state_dict": state_dict}


def contents_of(model: Wav2Vec2Model) -> dict[str, Any]:
    """What a model file holds of a model: ``config``, ``state_dict``, and ``head`` where it has one."""
    if isinstance(model, TaskModel):
        return _contents(model.config, model.state_dict(), model.head_settings)
    return {"state_dict": model.state_dict(), "config": model.config}


def _contents(config: dict[str, Any], state_dict: Mapping[str, Tensor], head: Head) -> dict[str, Any]:
    """The contents of a model file; ``state_dict`` is that of a :class:`TaskModel`."""
    encoder, own = split_state(state_dict)
    return {"config": config, "state_dict": encoder, "head": {**head.to_dict(), "state_dict": own}}


def split_state(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's weights and the head's, of the names that a :class:`TaskModel` has for them."""
    own = {name.removeprefix(_PREFIX): x for name, x in state_dict.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(_PREFIX)}, own


def joined_state(encoder: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`split_state`."""
    return {**encoder, **{_PREFIX + name: tensor for name, tensor in own.items()}}


def with_outputs(config: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """A config whose output layer is what a head needs: of text its outputs, else none. Without a head, as it is."""
    if head is None:
        return dict(config)
    return {**config, "aux_num_out": head.num_outputs if head.kind == TEXT else None}


def build_with_head(config: Mapping[str, Any], head: Head | None, source: str | os.PathLike) -> Wav2Vec2Model:
    """:func:`checkpoint.build_model`, with this head if there is one.

    Raises:
        UserError: there is no such model, or the head does not fit it.
    """
    if head is None:
        return build_model(dict(config), source)
    try:
        return TaskModel(check_config(config), head)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no model with this head can be built from its config: {error}") from error


def greedy_units(logits: Tensor) -> list[int]:
    """CTC's most likely output of each frame, repeats and blanks (output 0) taken out, as numbers of labels from 0.

    Args:
        logits: (frames, outputs) of one utterance's valid frames.
    """
    best = logits.argmax(-1).unique_consecutive()
    return (best[best > 0] - 1).tolist()
