"""The flags that both converters share; parsed before torch is imported."""

import argparse
from dataclasses import asdict, dataclass

from ..files.errors import UserError

_DROPOUT_HELP = {
    "projection_dropout": "dropout after the feature projection",
    "attention_dropout": "dropout on the attention weights",
    "ff_interm_dropout": "dropout inside the feed-forward blocks",
    "dropout": "dropout on hidden states",
    "layer_drop": "probability of skipping a layer in training",
}


@dataclass(frozen=True)
class Dropouts:
    """Dropouts of the written config. They act on the student; the defaults are the published training's.

    Raises:
        UserError: a value is not in [0, 1).
    """

    projection_dropout: float = 0.1
    attention_dropout: float = 0.1
    ff_interm_dropout: float = 0.0
    dropout: float = 0.1
    layer_drop: float = 0.05

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1:
                raise UserError(f"--{name} {value}: expected a probability, 0 or more and less than 1")


def add_converter_flags(parser: argparse.ArgumentParser) -> None:
    """Add the dropouts and the waveform normalisation."""
    group = parser.add_argument_group("dropouts written into the config (they act on the student)")
    for name, default in asdict(Dropouts()).items():
        group.add_argument(f"--{name}", type=float, default=default, help=_DROPOUT_HELP[name])
    parser.add_argument(
        "--normalize_waveform",
        choices=("true", "false"),
        help="the model expects zero-mean, unit-variance waveforms; by default true for models with a layer_norm "
        "extractor and false for those with a group_norm extractor, as they were trained",
    )


def dropouts_from(args: argparse.Namespace) -> Dropouts:
    """Return the dropouts given on the command line."""
    return Dropouts(**{name: getattr(args, name) for name in _DROPOUT_HELP})


def normalize_waveform_from(args: argparse.Namespace) -> bool | None:
    """Return the value of ``--normalize_waveform``; None leaves the decision to the extractor's mode."""
    return None if args.normalize_waveform is None else args.normalize_waveform == "true"
