"""What several test files share: small models with no parameter at a trivial value, short runs, comparisons."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cli
import throughput
from hardconcrete import HardConcrete
from wav2vec2 import checkpoint
from wav2vec2.model import Wav2Vec2Model, wav2vec2_model

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "tests" / "data" / "reference"

# Flags of a joint distillation that prunes something in a few updates.
PRUNING = ("--pruning_units", "conv,head,interm", "--target_sparsity", 0.4, "--sparsity_warmup_updates", 10)

# 40 samples a frame, so that short waveforms make enough of them.
SMALL_CONV_LAYERS = [[10, 10, 5], [12, 3, 2], [8, 3, 2], [9, 2, 2]]


def small_config(family: str, size: str = "base", **changes: Any) -> dict[str, Any]:
    """A config of three small layers without dropout.

    Args:
        family: "hubert" or "wavlm".
        size: "base" (group_norm extractor, post-norm) or "large" (layer_norm extractor, pre-norm, conv
            bias, normalised waveform).
        changes: keys to override.
    """
    large = size == "large"
    heads = (
        {
            "encoder_total_num_heads": [4, 4, 4],
            "encoder_remaining_heads": [[0, 1, 2, 3]] * 3,
            "encoder_num_buckets": 16,
            "encoder_max_distance": 40,
        }
        if family == "wavlm"
        else {"encoder_num_heads": [4, 4, 4], "encoder_head_dim": 4}
    )
    return {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": SMALL_CONV_LAYERS,
        "extractor_conv_bias": large,
        "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_use_attention": [True, True, True],
        "encoder_use_feed_forward": [True, True, True],
        **heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": [20, 20, 20],
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
        "normalize_waveform": large,
        "extractor_prune_conv_channels": False,
        "encoder_prune_attention_heads": False,
        "encoder_prune_attention_layer": False,
        "encoder_prune_feed_forward_intermediate": False,
        "encoder_prune_feed_forward_layer": False,
        **changes,
    }


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter, masks apart, away from its start: no norm, bias, gate or scale stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("log_alpha"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def random_model(config: dict[str, Any], seed: int = 0) -> Wav2Vec2Model:
    """The model of a config with random weights, in eval mode."""
    model = wav2vec2_model(**config)
    randomize(model, seed)
    return model.eval()


def random_waveforms(*num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Waveforms (B, T) with an offset and zeros behind the shorter ones, and their lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [0.3 * torch.randn(n, generator=generator) + 0.1 for n in num_samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(num_samples)


def masks_of(model: torch.nn.Module) -> dict[str, HardConcrete]:
    """The masks of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HardConcrete)}


def num_elements(model: torch.nn.Module) -> int:
    """The exact number of parameters, masks apart."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))


def assert_same_frames(
    ours: list[Tensor], theirs: list[Tensor], lengths: Tensor | None = None, tolerance: float = 1e-5
) -> None:
    """Both lists hold equal (B, frames, D) tensors up to each row's valid frames (None: all are valid)."""
    assert len(ours) == len(theirs)
    for stage, (our_stage, their_stage) in enumerate(zip(ours, theirs, strict=True)):
        assert our_stage.shape == their_stage.shape, f"stage {stage}"
        for row in range(len(our_stage)):
            valid = slice(None if lengths is None else int(lengths[row]))
            torch.testing.assert_close(
                our_stage[row, valid],
                their_stage[row, valid],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, stage=stage, row=row: f"stage {stage}, row {row}: {text}",
            )


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """Run a stage script in this process, as ``python NAME.py ARGUMENTS`` does."""
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    cli.run(script.main, script.parse_args())


def run_command(*command: object, **environment: object) -> subprocess.CompletedProcess:
    """Run a command in the checkout, with this Python."""
    settings = {"python": sys.executable, **environment}
    return subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
    )


def save_small_model(path: Path, family: str, size: str, **changes: object) -> Path:
    """A random teacher of three small layers, as a converter writes it."""
    model = random_model(small_config(family, size, encoder_dropout=0.1, **changes))
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": model.config})
    return path


def small_run(manifests: Path, teacher: Path, **changes: object) -> list[object]:
    """Shared flags of a run that takes a second; a value of None leaves a flag out."""
    flags = {
        "tsv_dir": manifests,
        "seconds_per_batch": 4,
        "max_crop_seconds": 0.2,
        "num_workers": 0,
        "teacher_ckpt": teacher,
        "student_ckpt": teacher,
        "distill_layers": "0.1,3",
        "max_updates": 6,
        "warmup_updates": 2,
        "accelerator": "cpu",
        "log_interval": 1,
    }
    chosen = {name: value for name, value in {**flags, **changes}.items() if value is not None}
    return [word for name, value in chosen.items() for word in (f"--{name}", value)]


def load_as_others_do(path: Path) -> torch.nn.Module:
    """How other people's programs load a compressed model."""
    contents = torch.load(path, weights_only=True)
    model = wav2vec2_model(**contents["config"])
    model.load_state_dict(contents["state_dict"])
    return model.eval()


def run_to_exit(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """Run a script that ends with an exit status other than 0."""
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, name, *arguments)
    return stop.value.code


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The one error line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def logged(exp_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's log, without its speed, which no two runs share."""
    with (exp_dir / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        return [{name: row[name] for name in row if name not in throughput.COLUMNS} for row in csv.DictReader(file)]
