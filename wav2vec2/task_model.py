"""Models with a task head: speech to text by CTC, one label for a clip, or labels for stretches of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .files.errors import short_repr
from .kinds import CLIPS, LAYERS, POOLINGS, SEGMENTS, TEXT, UNITS
from .model import Wav2Vec2Model

# What each setting of a head may be, by kind; None where the kind has no such setting.
_CHOICES: dict[str, dict[str, tuple[str | None, ...]]] = {
    TEXT: {"units": UNITS, "layers": ("last",), "pooling": (None,)},
    CLIPS: {"units": (None,), "layers": LAYERS, "pooling": POOLINGS},
    SEGMENTS: {"units": (None,), "layers": LAYERS, "pooling": (None,)},
}


@dataclass(frozen=True)
class Head:
    """The settings of a head: what it recognises, and from which frames.

    Raises:
        ValueError: a setting is impossible (the message names it).
    """

    kind: str  # "text" (units by CTC), "clips" (one label for an utterance) or "segments" (a label for each frame)
    labels: tuple[str, ...]  # names of the outputs; for text, of those after the blank
    units: str | None = None  # of text: "words" or "characters"
    layers: str = "last"  # or "weighted", a learnt softmax-weighted sum of all hidden states, as in arXiv 2105.01051
    pooling: str | None = None  # of clips, over frames: "mean", or "attentive", a mean weighted by a learnt softmax

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
                wanted = " or ".join(map(repr, choices))
                raise ValueError(f"{key}: expected {wanted} with {self.kind}, found {short_repr(value)}")

    @property
    def num_outputs(self) -> int:
        """One for each label, and for text one more for the blank."""
        return len(self.labels) + (self.kind == TEXT)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a file holds them."""
        return asdict(self) | {"labels": list(self.labels)}


class TaskHead(nn.Module):
    """The head of clips or segments: a linear layer on frames (B, T, D) of ``num_states`` hidden states, or pooled."""

    def __init__(self, head: Head, embed_dim: int, num_states: int) -> None:
        super().__init__()
        self.pools = head.kind == CLIPS
        self.layer_scores = nn.Parameter(torch.zeros(num_states)) if head.layers == "weighted" else None
        self.attention = nn.Linear(embed_dim, 1) if head.pooling == "attentive" else None
        self.linear = nn.Linear(embed_dim, head.num_outputs)

    def forward(self, states: Sequence[Tensor], lengths: Tensor | None) -> Tensor:
        """Logits from all hidden states (B, frames, D) for weighted layers, else from one; see TaskModel.logits."""
        x = states[0]
        if self.layer_scores is not None:
            weights = self.layer_scores.softmax(0)
            x = weights[0] * x
            for weight, state in zip(weights[1:], states[1:], strict=True):
                x = x + weight * state
        if not self.pools:
            return self.linear(x)
        scores = x.new_zeros(x.shape[:2]) if self.attention is None else self.attention(x).squeeze(-1)  # (B, frames)
        if lengths is not None:
            padded = torch.arange(x.size(1), device=x.device) >= lengths[:, None]
            # Not -inf: a row without any frame must not become NaN.
            scores = scores.masked_fill(padded, torch.finfo(scores.dtype).min)
        return self.linear((scores.softmax(1)[:, None] @ x).squeeze(1))


class TaskModel(Wav2Vec2Model):
    """A model with a head: ``forward`` returns logits; all else is as in the encoder.

    Raises:
        ValueError: the config's ``aux_num_out`` is not the number of outputs of text, None for other heads.
    """

    def __init__(self, config: ModelConfig, head: Head) -> None:
        expected = head.num_outputs if head.kind == TEXT else None
        if config.aux_num_out != expected:
            wanted = f"{expected} with a head of {head.kind} and {len(head.labels)} labels"
            raise ValueError(f"aux_num_out: expected {wanted}, found {config.aux_num_out}")
        super().__init__(config)
        self.head_settings = head
        num_states = config.encoder_num_layers + 1
        self.head = None if head.kind == TEXT else TaskHead(head, config.encoder_embed_dim, num_states)
        self.kind, self.labels = head.kind, head.labels

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return :meth:`logits` and (B,) valid frames; arguments as in :meth:`extract_features`."""
        features, lengths, padded_lengths = self.extract_frames(waveforms, lengths)
        if self.head_settings.layers == "weighted":
            return self.logits(self.encoder.extract_features(features, padded_lengths), None, lengths), lengths
        return self.logits([], self.encoder(features, padded_lengths), lengths), lengths

    def logits(self, hidden_states: Sequence[Tensor], output: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Apply the head to the encoder's frames, of which (B,) ``lengths`` are valid.

        Weighted layers need ``hidden_states``, as ``extract_features`` returns them, the last layer needs ``output``,
        as the encoder's ``forward`` returns it. The result is (B, classes) for clips, else (B, frames, outputs).
        """
        is_weighted = self.head_settings.layers == "weighted"
        states = hidden_states if is_weighted or output is None else [output]
        return self.apply_aux(states[0]) if self.head is None else self.head(states, lengths)

    def _output_layers(self) -> list[nn.Linear]:
        own = [] if self.head is None else [self.head.linear, self.head.attention]
        return super()._output_layers() + [layer for layer in own if layer is not None]
