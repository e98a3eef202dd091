"""Models that fairseq itself builds and runs, converted; skipped where it is not installed."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize

from wav2vec2.files.errors import UserError
from wav2vec2.utils.import_fairseq import compare_with_fairseq, import_fairseq_model

pytest.importorskip("fairseq", reason="fairseq is not installed (requirements-fairseq.txt)")

LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}


def fairseq_checkpoint(family: str, size: str, path: Path, **wrapped: Any) -> torch.nn.Module:
    """Write a checkpoint of fairseq's own small model, random; the model in eval mode."""
    from fairseq.models import hubert, wav2vec
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    logging.disable(logging.INFO)
    settings = {
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "encoder_layers": 3,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 40,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "final_dim": 8,
        **(LARGE if size == "large" else {}),
    }
    if family == "hubert":
        config = hubert.HubertConfig(**settings, label_rate=50)
        model = hubert.HubertModel(config, HubertPretrainingConfig(), [range(5)])
    else:
        config = wav2vec.Wav2Vec2Config(**settings, quantize_targets=True)
        model = wav2vec.Wav2Vec2Model(config)
    logging.disable(logging.NOTSET)
    randomize(model)
    plain = {key: value for key, value in dataclasses.asdict(config).items() if isinstance(value, (str, int, float))}
    cfg = {"model": plain | {"_name": family}, "task": {"normalize": size == "large", "sample_rate": 16000}}
    torch.save({"cfg": cfg, "model": model.state_dict()}, path)
    return model.eval()


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_outputs_are_fairseqs(family: str, size: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    theirs = fairseq_checkpoint(family, size, path)
    imported = import_fairseq_model(path)
    assert compare_with_fairseq(imported, path) < 1e-5
    ours = imported.model
    ours.normalize_waveform = False  # fairseq's task does it, outside of the model
    waveforms = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(
        [9000, 6900]
    )  # where the frames that fairseq's HuBERT takes as padded are those past the end
    padding = torch.arange(9000) >= lengths[:, None]
    with torch.inference_mode():
        wanted = theirs(waveforms * ~padding, padding_mask=padding, mask=False, features_only=True)["x"]
        found, frames = ours(waveforms * ~padding, lengths)
    for row, length in enumerate(frames):
        torch.testing.assert_close(found[row, :length], wanted[row, :length], atol=1e-5, rtol=1e-4)


def test_difference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    fairseq_checkpoint("hubert", "base", path)
    imported = import_fairseq_model(path)
    with torch.no_grad():
        imported.model.encoder.transformer.layers[1].final_layer_norm.bias[0] += 5e-3
    with pytest.raises(UserError, match="differ from the source model's"):
        compare_with_fairseq(imported, path)
