"""Files of models with a task head.

A fine-tuned model file is a model file with one entry more, ``head``: the settings of the head and its weights. A head
for ``text`` has no weights of its own: it is the model's output layer ``aux``, trained with CTC, whose output 0 is the
blank. For ``clips`` and ``segments`` the file's config and weights are those of the plain encoder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..config import check_config, with_masks
from ..model import Wav2Vec2Model
from ..task_model import TEXT, Head, TaskModel
from .checkpoint import Source, build_model, check_weights, load_state, model_of
from .errors import UserError, short_repr

_PREFIX = "head."  # of the head's weights among the model's
_FRESH_DEVIATION = 0.02  # of a fresh head's weights, as in transformers


def head_of(contents: Mapping[str, Any], source: Source) -> Head | None:
    """Return the settings of the head in a model file's contents, or None if it has none.

    Raises:
        UserError: the entry is not a head.
    """
    if "head" not in contents:
        return None
    entry, keys = contents["head"], [field.name for field in fields(Head)]
    weights = entry.get("state_dict") if isinstance(entry, dict) else None
    is_named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not is_named or entry.keys() != {*keys, "state_dict"}:
        found = short_repr(sorted(entry, key=keys.__contains__) if isinstance(entry, dict) else entry)  # unknown first
        raise UserError(
            f"{source}: head: expected {', '.join(keys)} and a state_dict of names, found {found}; the file "
            "is damaged, or a newer version wrote it"
        )
    try:
        return Head(**{key: entry[key] for key in keys})
    except ValueError as error:
        raise UserError(f"{source}: head: {error}") from error


def task_model_of(contents: Mapping[str, Any], source: Source) -> TaskModel:
    """Build the model with its head from checked contents; returned in training mode, on the CPU.

    Raises:
        UserError: there is no head, it is damaged, or it does not fit its weights or the encoder.
    """
    head = head_of(contents, source)
    if head is None:
        raise UserError(f"{source}: a model without a task head; add one with finetune.py")
    weights = contents["head"]["state_dict"]
    with torch.device("meta"):  # no memory for the number of labels that the file claims
        _, expected = split_state(_build_task_model(contents["config"], head, source).state_dict())
    check_weights(expected, weights, f"{source}: head")
    model = _build_task_model(contents["config"], head, source)
    model.load_state_dict(joined_state(contents["state_dict"], weights))
    return model


def model_with_its_head(contents: Mapping[str, Any], source: Source) -> Wav2Vec2Model:
    """Build the model of checked contents, with its head if there is one."""
    return task_model_of(contents, source) if "head" in contents else model_of(contents, source)


def masked_model_with_its_head(contents: Mapping[str, Any], units: Iterable[str], source: Source) -> Wav2Vec2Model:
    """Build the model of checked contents with fresh masks on ``units``, and with its head if there is one.

    ``units`` are names as in ``--pruning_units``.
    """
    model = build_model(with_masks(contents["config"], units), source)
    # Only the state of the masks can be absent from the file.
    fresh_masks = {key: value for key, value in model.state_dict().items() if key.endswith("log_alpha")}
    load_state(model, {**fresh_masks, **contents["state_dict"]}, source)
    if "head" not in contents:
        return model
    with torch.random.fork_rng(devices=()):  # later random numbers must not depend on the head
        return task_model_of({**contents, "config": model.config, "state_dict": model.state_dict()}, source)


def with_head(
    contents: Mapping[str, Any], head: Head, source: Source, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Return checked contents with a fresh head, whose weights come from ``generator``, in the place of any other.

    Raises:
        UserError: no model can be built from the config.
    """
    plain = without_head(contents)
    config = with_outputs(plain["config"], head)
    with torch.device("meta"):
        shapes = _build_task_model(config, head, source).state_dict()
    fresh = {name: torch.zeros(x.shape) for name, x in shapes.items() if name.startswith(("aux.", _PREFIX))}
    for name in fresh.keys() & {"aux.weight", "head.linear.weight"}:
        fresh[name].normal_(std=_FRESH_DEVIATION, generator=generator)
    return _contents(config, plain["state_dict"] | fresh, head)


def without_head(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"config", "state_dict"}`` of the plain encoder in a model file's contents: no head, no output layer."""
    config = dict(contents["config"])
    if config.get("aux_num_out") is not None:
        config["aux_num_out"] = None
    state_dict = {name: tensor for name, tensor in contents["state_dict"].items() if not name.startswith("aux.")}
    return {"config": config, "state_dict": state_dict}


def contents_of(model: Wav2Vec2Model) -> dict[str, Any]:
    """Return the contents of a model's file: ``config``, ``state_dict``, and ``head`` if it has one."""
    if isinstance(model, TaskModel):
        return _contents(model.config, model.state_dict(), model.head_settings)
    return {"state_dict": model.state_dict(), "config": model.config}


def _contents(config: dict[str, Any], state_dict: Mapping[str, Tensor], head: Head) -> dict[str, Any]:
    encoder, own = split_state(state_dict)
    return {"config": config, "state_dict": encoder, "head": {**head.to_dict(), "state_dict": own}}


def split_state(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the state dict of a :class:`TaskModel` into the encoder's weights and the head's, under their own names."""
    own = {name.removeprefix(_PREFIX): x for name, x in state_dict.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(_PREFIX)}, own


def joined_state(encoder: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`split_state`."""
    return {**encoder, **{_PREFIX + name: tensor for name, tensor in own.items()}}


def with_outputs(config: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """Return a config with the output layer that a head needs; without a head, the config as it is."""
    if head is None:
        return dict(config)
    return {**config, "aux_num_out": head.num_outputs if head.kind == TEXT else None}


def build_with_head(config: Mapping[str, Any], head: Head | None, source: Source) -> Wav2Vec2Model:
    """Build the model of a config, with this head if there is one.

    Raises:
        UserError: no model can be built from the config, or the head does not fit it.
    """
    return build_model(config, source) if head is None else _build_task_model(config, head, source)


def _build_task_model(config: Mapping[str, Any], head: Head, source: Source) -> TaskModel:
    try:
        return TaskModel(check_config(config), head)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no model with this head can be built from its config: {error}") from error


def greedy_units(logits: Tensor) -> list[int]:
    """Decode CTC greedily: labels (from 0) of the best of (frames, outputs), without repeats and blanks (output 0)."""
    best = logits.argmax(-1).unique_consecutive()
    return (best[best > 0] - 1).tolist()
