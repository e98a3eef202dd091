"""Models with a task head: speech to text, a label for a clip, labels for stretches of it.

A fine-tuned model file is a model file as all others, with one entry more, ``head``: what it recognises, and the
head's weights. Of ``text`` there are none: its head is the model's own output layer ``aux``, trained with CTC, whose
output 0 is the blank. Of ``clips`` and ``segments`` the file's config and weights are those of the plain encoder.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import build_model, check_weights, masked_model_of, model_of
from .config import ModelConfig, check_config
from .errors import UserError, short_repr
from .model import Wav2Vec2Model
from .pruning_utils import prune_linear

TEXT, CLIPS, SEGMENTS = "text", "clips", "segments"
# What each setting of a head may be, by kind; None where the kind has no such setting.
_CHOICES: dict[str, dict[str, tuple[str | None, ...]]] = {
    TEXT: {"units": ("words", "characters"), "layers": ("last",), "pooling": (None,)},
    CLIPS: {"units": (None,), "layers": ("last", "weighted"), "pooling": ("mean", "attentive")},
    SEGMENTS: {"units": (None,), "layers": ("last", "weighted"), "pooling": (None,)},
}
_PREFIX = "head."  # of the head's weights among the model's
_FRESH_DEVIATION = 0.02  # of a fresh head's weights, as in transformers


@dataclass(frozen=True)
class Head:
    """What a head recognises, and of what.

    Attributes:
        kind: "text" (units by CTC), "clips" (one label for an utterance) or "segments" (a label for each frame).
        labels: the names of the outputs; of text those behind the blank.
        units: of text, what the labels are: "words" or "characters".
        layers: "last", what the encoder's ``forward`` gives; or "weighted", a learnt softmax-weighted sum of all hidden
            states, as in SUPERB (arXiv 2105.01051).
        pooling: of clips, over frames: "mean", or "attentive", a mean weighted by a learnt softmax.

    Raises:
        ValueError: a setting cannot be (the message names it).
    """

    kind: str
    labels: tuple[str, ...]
    units: str | None = None
    layers: str = "last"
    pooling: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _CHOICES:
            raise ValueError(f"kind: expected one of {', '.join(_CHOICES)}, found {short_repr(self.kind)}")
        labels = self.labels
        if not (isinstance(labels, (list, tuple)) and labels and all(isinstance(x, str) and x for x in labels)):
            raise ValueError(f"labels: expected names, found {short_repr(labels)}")
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels: expected each once, found {short_repr(labels)}")
        object.__setattr__(self, "labels", tuple(labels))
        for key, choices in _CHOICES[self.kind].items():
            value = getattr(self, key)
            if not (value is None or isinstance(value, str)) or value not in choices:
                raise ValueError(
                    f"{key}: expected {' or '.join(map(repr, choices))} with {self.kind}, found {short_repr(value)}"
                )

    @property
    def num_outputs(self) -> int:
        """One for each label, and of text one for the blank."""
        return len(self.labels) + (self.kind == TEXT)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a file holds them."""
        return asdict(self) | {"labels": list(self.labels)}


class TaskHead(nn.Module):
    """The head of clips or segments: a linear layer on frames, or on what pooling makes of them.

    Args:
        head: its settings.
        embed_dim: D.
        num_states: hidden states of the encoder, the projected extractor output among them.
    """

    def __init__(self, head: Head, embed_dim: int, num_states: int) -> None:
        super().__init__()
        self.pools = head.kind == CLIPS
        self.layer_scores = nn.Parameter(torch.zeros(num_states)) if head.layers == "weighted" else None
        self.attention = nn.Linear(embed_dim, 1) if head.pooling == "attentive" else None
        self.linear = nn.Linear(embed_dim, head.num_outputs)

    def forward(self, hidden_states: Sequence[Tensor], output: Tensor | None, lengths: Tensor | None) -> Tensor:
        """See :meth:`TaskModel.logits`."""
        x = output
        if self.layer_scores is not None:
            weights = self.layer_scores.softmax(0)
            x = sum(weight * state for weight, state in zip(weights, hidden_states, strict=True))
        return self.linear(self._pool(x, lengths) if self.pools else x)

    def _pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, frames, D) -> (B, D), over the valid frames"""
        scores = x.new_zeros(x.shape[:2]) if self.attention is None else self.attention(x).squeeze(-1)  # (B, frames)
        if lengths is not None:
            padded = torch.arange(x.size(1), device=x.device) >= lengths[:, None]
            # Not -inf: a row without any frame must not become NaN.
            scores = scores.masked_fill(padded, torch.finfo(scores.dtype).min)
        return (scores.softmax(1)[:, None] @ x).squeeze(1)

    def prune_embed(self, index: Tensor) -> None:
        """Keep these dimensions (n,) of frames."""
        for layer in (self.attention, self.linear):
            if layer is not None:
                prune_linear(layer, index, "input")


class TaskModel(Wav2Vec2Model):
    """A model with a head: ``forward`` gives logits; all else is the encoder's.

    Args:
        config: of the encoder; of text its ``aux_num_out`` is one more than there are labels, else None.
        head: the settings of the head.

    Raises:
        ValueError: the two do not fit each other.
    """

    def __init__(self, config: ModelConfig, head: Head) -> None:
        expected = head.num_outputs if head.kind == TEXT else None
        if config.aux_num_out != expected:
            raise ValueError(
                f"aux_num_out: expected {expected} with a head of {head.kind} and {len(head.labels)} labels, found "
                f"{config.aux_num_out}"
            )
        super().__init__(config)
        self.head_settings = head
        num_states = config.encoder_num_layers + 1
        self.head = None if head.kind == TEXT else TaskHead(head, config.encoder_embed_dim, num_states)

    @property
    def kind(self) -> str:
        """What the head recognises, see :class:`Head`."""
        return self.head_settings.kind

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the outputs; of text those behind the blank."""
        return self.head_settings.labels

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, see :meth:`logits`, and (B,) valid frames; arguments as of :meth:`extract_features`."""
        features, lengths, padded_lengths = self.extract_frames(waveforms, lengths)
        if self.head_settings.layers == "weighted":
            return self.logits(self.encoder.extract_features(features, padded_lengths), None, lengths), lengths
        return self.logits([], self.encoder(features, padded_lengths), lengths), lengths

    def logits(self, hidden_states: Sequence[Tensor], output: Tensor | None, lengths: Tensor | None) -> Tensor:
        """What :meth:`forward` does behind the encoder.

        Args:
            hidden_states: all of them (B, frames, D), as ``extract_features`` gives them; read for weighted layers.
            output: (B, frames, D) as the encoder's ``forward`` gives it; read where the layers are the last.
            lengths: (B,) valid frames, or None if all are.

        Returns:
            (B, frames, outputs) of text and segments, (B, classes) of clips.
        """
        return self.aux(output) if self.head is None else self.head(hidden_states, output, lengths)

    @torch.no_grad()
    def prune(self) -> dict[str, Any]:
        """As of the base class; the head takes the dimensions of frames that are left."""
        self.eval()  # the deterministic masks
        kept_dims = self.encoder.kept_dims()
        config = super().prune()
        if self.head is not None and kept_dims is not None:
            self.head.prune_embed(kept_dims)
        return config


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
