"""The flags that both converters share; parsed before torch is imported."""

import argparse
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..files.errors import UserError


def _dropout(default: float, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Dropouts:
    """Dropouts of the written config. They act on the student; the defaults are the published training's."""

    projection_dropout: float = _dropout(0.1, "dropout after the feature projection")
    attention_dropout: float = _dropout(0.1, "dropout on the attention weights")
    ff_interm_dropout: float = _dropout(0.0, "dropout inside the feed-forward blocks")
    dropout: float = _dropout(0.1, "dropout on hidden states")
    layer_drop: float = _dropout(0.05, "probability of skipping a layer in training")

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1:
                raise UserError(f"--{name} {value}: expected a probability, 0 or more and less than 1")


def add_converter_flags(parser: argparse.ArgumentParser) -> None:
    """Add the dropouts and the waveform normalisation."""
    group = parser.add_argument_group("dropouts written into the config (they act on the student)")
    for entry in fields(Dropouts):
        group.add_argument(f"--{entry.name}", type=float, default=entry.default, help=entry.metadata["help"])
    parser.add_argument(
        "--normalize_waveform",
        choices=("true", "false"),
        help="the model expects zero-mean, unit-variance waveforms; by default true for models with a layer_norm "
        "extractor and false for those with a group_norm extractor, as they were trained",
    )


def importer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the importers; None leaves the normalisation to the extractor's mode."""
    dropouts = Dropouts(**{entry.name: getattr(args, entry.name) for entry in fields(Dropouts)})
    return {"dropouts": dropouts, "normalize_waveform": {"true": True, "false": False}.get(args.normalize_waveform)}
