"""What the tests of both importers share: the stored fixtures and the comparison stage by stage."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wav2vec2 import checkpoint
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.paths import plain_paths
from wav2vec2.utils.importing import ImportedModel

REPOSITORY = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "data" / "fixtures"
TOLERANCE = 1e-5


def load_expected(directory: Path) -> dict[str, Tensor]:
    with np.load(directory / "expected.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) with zeros behind the shorter ones, and (B,) lengths."""
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), torch.tensor([len(w) for w in waveforms])


def check_stages(
    model: Wav2Vec2Model,
    waveforms: Tensor,
    lengths: Tensor | None,
    stages: list[Tensor | None],
    final: Tensor | None,
    frame_lengths: Tensor | None = None,
) -> None:
    """Compare projection, every layer and the final output on valid frames; a failure names its stage.

    Args:
        model: in eval mode.
        waveforms: (B, T).
        lengths: (B,) valid samples, or None if all are.
        stages: the projection, then each layer's output, (B, frames, D) each; one that was not stored is None.
        final: output of the whole model (B, frames, D), or None.
        frame_lengths: (B,) valid frames; None if all are.
    """
    for plain in (True, False):
        with torch.inference_mode(), plain_paths(plain):
            features, feature_lengths = model.extract_features(waveforms, lengths)
            output, _ = model(waveforms, lengths)
        assert len(features) == len(stages)
        if frame_lengths is not None:
            assert feature_lengths.tolist() == frame_lengths.tolist()
        else:
            assert feature_lengths is None
        valid = [features[0].size(1)] * len(waveforms) if frame_lengths is None else frame_lengths.tolist()
        names = ["projection"] + [f"layer {k}" for k in range(1, len(stages))] + ["final"]
        for name, ours, theirs in zip(names, [*features, output], [*stages, final], strict=True):
            if theirs is None:
                continue
            assert ours.shape == theirs.shape, name
            # The plain paths make the operations that made the numbers, the fast ones round elsewhere.
            tolerance = TOLERANCE if plain else TOLERANCE * max(1.0, theirs.abs().max().item())
            for row, length in enumerate(valid):
                difference = (ours[row, :length] - theirs[row, :length]).abs().max().item()
                assert difference <= tolerance, f"{name}, row {row}, {plain=}: largest difference {difference:.1e}"


def check_same_model(first: ImportedModel, second: ImportedModel) -> None:
    """Equal configs and bit-equal weights."""
    assert first.config == second.config
    theirs = second.model.state_dict()
    assert list(first.model.state_dict()) == list(theirs)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def run_script(name: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository as a user does."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_script_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status 1 and one ``error:`` line on stderr that contains all of ``parts``."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def check_written_model(path: Path) -> Wav2Vec2Model:
    """Load a written file as users do, check the published names, and return the model in eval mode."""
    contents = torch.load(path, weights_only=True)
    assert set(contents) == {"state_dict", "config"}
    assert "encoder.transformer.pos_conv_embed.conv.weight_g" in contents["state_dict"]
    assert "encoder.transformer.pos_conv_embed.conv.weight_v" in contents["state_dict"]
    dummy_weight = contents["state_dict"]["feature_extractor.dummy_weight"]
    assert torch.equal(dummy_weight, torch.ones(contents["config"]["extractor_conv_layer_config"][-1][0]))
    assert all(tensor.dtype == torch.float32 for tensor in contents["state_dict"].values())
    return checkpoint.load_model(path).eval()
