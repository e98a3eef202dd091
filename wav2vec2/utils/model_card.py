"""The README.md of an exported model: what it is, how to load it, what was measured, where it comes from."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..config import is_wavlm
from ..errors import UserError, short_repr, single_line
from ..model import Wav2Vec2Model, wav2vec2_model

_SAMPLE_RATE = 16_000

# ORG/NAME, and the form of the hub's identifiers of licences.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

_PADDING = "`waveforms` is (batch, samples), `lengths` (batch,) the valid samples of each."
_STATES = (
    "hidden_states[0] is the projected extractor output, hidden_states[k] the output of layer k, each "
    "(batch, frames, dimensions)"
)


class _Format(NamedTuple):
    """How a format is loaded.

    Attributes:
        title: for people.
        library: for the hub.
        needs: what must be installed.
        lines: Python; ``{output}`` and ``{model_class}`` are left open.
        notes: what the lines do not say; ``{min_samples}`` is left open.
    """

    title: str
    library: str | None
    needs: str
    lines: str
    notes: str


FORMATS = {
    "hub": _Format(
        "DPHuBERT (safetensors and the config)",
        "dphubert",
        "DPHuBERT's `wav2vec2/` (`pip install .` in its checkout), torch, safetensors and huggingface_hub",
        """\
from wav2vec2.hub_model import HubModel

model = HubModel.from_pretrained(".")  # this folder, or ORG/NAME on the hub
hidden_states, frames = model.extract_features(waveforms, lengths)
""",
        f"{_PADDING} {_STATES}; `frames` says how many are valid. Without huggingface_hub, "
        "`wav2vec2.hub.read_folder` reads the folder.",
    ),
    "onnx": _Format(
        "ONNX",
        "onnx",
        "onnxruntime",
        """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
{output}, frames = session.run(None, {{"waveforms": waveforms, "lengths": lengths}})
""",
        "`waveforms` is a float32 array (batch, samples), `lengths` an int64 array (batch,): valid samples of each. "
        "Any batch, and any number of samples from {min_samples}: pad shorter ones with zeros. {states}; `frames` says "
        "how many are valid.",
    ),
    "torch_export": _Format(
        "torch.export (.pt2)",
        None,
        f"torch alone, {torch.__version__.partition('+')[0]} or newer",
        """\
import torch

run = torch.export.load("model.pt2").module()
{output}, frames = run(waveforms, lengths)
""",
        f"{_PADDING} Any batch, and any number of samples from {{min_samples}}: pad shorter ones with zeros. "
        "{states}; `frames` says how many are valid. It was traced on a CPU; "
        "`torch.export.passes.move_to_device_pass` moves the program to another device.",
    ),
    "huggingface": _Format(
        "transformers",
        "transformers",
        "transformers",
        """\
from transformers import {model_class}

model = {model_class}.from_pretrained(".")  # this folder, or ORG/NAME on the hub
hidden_states = model(waveforms, output_hidden_states=True).hidden_states
""",
        "`waveforms` is (batch, samples); what is padded is said with an `attention_mask`. `AutoFeatureExtractor` "
        "prepares them as preprocessor_config.json says.",
    ),
}


def state_words(outputs: str) -> dict[str, str]:
    """The words that :meth:`Card.text` wants for "last" or "all" hidden states."""
    if outputs == "all":
        return {"output": "hidden_states", "states": _STATES}
    return {"output": "last_hidden_state", "states": "last_hidden_state is (batch, frames, dimensions)"}


@dataclass(frozen=True)
class Card:
    """What is known of a model, whatever the format.

    Attributes:
        config: the model's.
        name: the title.
        macs_per_second: multiply-accumulate operations for a second of audio, within ``macs_seconds``.
        macs_seconds: the length that they were counted for; attention makes them depend on it.
        teacher: the teacher's name; its id on the hub (ORG/NAME) becomes the card's ``base_model``.
        teacher_num_params: gives the sparsity.
        data: what it was trained on.
        licence: an identifier that the hub knows; None leaves it to whoever publishes the model.
        made_by: the entry of the model file that says which script made it, and from what.
        source: name of the model file.

    Raises:
        UserError: the licence has not the form of an identifier.
    """

    config: Mapping[str, Any]
    name: str = "Speech model"
    macs_per_second: float | None = None
    macs_seconds: float = 10.0
    teacher: str | None = None
    teacher_num_params: int | None = None
    data: str | None = None
    licence: str | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            raise UserError(
                f"--licence {single_line(self.licence)}: expected one of the hub's identifiers, in small letters: mit, "
                "apache-2.0, cc-by-4.0, other, ..."
            )

    def text(self, format_name: str, measured: Sequence[str] = (), words: Mapping[str, Any] | None = None) -> str:
        """README.md.

        Args:
            format_name: a key of :data:`FORMATS`.
            measured: lines on how the exported model compares with PyTorch's.
            words: what the format's lines and notes leave open.
        """
        words = words or {}
        chosen = FORMATS[format_name]
        with torch.device("meta"):
            model = wav2vec2_model(**self.config)
        sections = [
            self._front_matter(chosen.library),
            f"# {_cell(self.name)}",
            f"Turns 16 kHz speech into frames of features. Format: {chosen.title}.",
            _table(self._numbers(model)),
            "## Load",
            f"Needs {chosen.needs}.",
            f"```python\n{chosen.lines.format(**words)}```",
            chosen.notes.format(**words),
            *(["## Measured", "\n".join(f"- {line}" for line in measured)] if measured else []),
            "## Shape",
            _shape(model.config),
            "## Where it comes from",
            _table(self._provenance()),
        ]
        return "\n\n".join(sections) + "\n"

    def _front_matter(self, library: str | None) -> str:
        """The metadata that the hub reads; JSON's strings and lists are YAML's."""
        family = "wavlm" if is_wavlm(self.config) else "hubert"
        metadata = {
            "license": self.licence,
            "library_name": library,
            "pipeline_tag": "feature-extraction",
            "tags": ["speech", "audio", "self-supervised", "dphubert", family],
            "base_model": self.teacher if self.teacher and _HUB_ID.fullmatch(self.teacher) else None,
        }
        lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value is not None]
        return "\n".join(["---", *lines, "---"])

    def _numbers(self, model: Wav2Vec2Model) -> dict[str, str]:
        num_params = int(model.get_num_params())
        numbers = {"parameters": f"{num_params:,}"}
        if self.teacher_num_params:
            sparsity = 1 - num_params / self.teacher_num_params
            numbers["sparsity"] = f"{sparsity:.2%} (the teacher has {self.teacher_num_params:,} parameters)"
        if self.macs_per_second is not None:
            numbers["multiply-accumulates"] = (
                f"{self.macs_per_second / 1e9:.3g} G for each second of audio, in waveforms of {self.macs_seconds:g} s"
            )
        stride = model.feature_extractor.stride
        numbers["frames"] = f"{_SAMPLE_RATE / stride:g} a second, of {self.config['encoder_embed_dim']} dimensions"
        numbers["waveforms"] = (
            "normalised inside of the model" if model.normalize_waveform else "taken as they are, full scale 1"
        )
        return numbers

    def _provenance(self) -> dict[str, str]:
        rows = {
            "teacher": self.teacher,
            "training data": self.data,
            "model file": self.source,
            "method": "DPHuBERT, [arXiv 2305.17651](https://arxiv.org/abs/2305.17651)",
            "licence": self.licence or "not stated: whoever publishes this model adds `license:` above",
        }
        # What a file says is shown as it is, and cannot become markup.
        made_by = {
            f"made by: {single_line(key)}": f"`{single_line(value) if isinstance(value, str) else short_repr(value)}`"
            for key, value in self.made_by.items()
            if value is not None
        }
        return {key: value for key, value in rows.items() if value} | made_by


def _cell(text: str) -> str:
    return single_line(text).replace("|", "\\|")


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _shape(config: Mapping[str, Any]) -> str:
    """The widths of the conv layers and of each layer's blocks; 0 where there is none."""
    channels = ", ".join(str(layer[0]) for layer in config["extractor_conv_layer_config"])
    heads = map(len, config["encoder_remaining_heads"]) if is_wavlm(config) else config["encoder_num_heads"]
    rows = zip(
        _present(heads, config["encoder_use_attention"]),
        _present(config["encoder_ff_interm_features"], config["encoder_use_feed_forward"]),
        strict=True,
    )
    lines = [f"| {layer} | {heads} | {width} |" for layer, (heads, width) in enumerate(rows, start=1)]
    table = "\n".join(["| layer | heads | feed-forward |", "| --- | --- | --- |", *lines])
    return f"Conv channels: {channels}.\n\n{table}"


def _present(sizes: Iterable[int], used: Iterable[bool]) -> list[int]:
    return [size if is_used else 0 for size, is_used in zip(sizes, used, strict=True)]
