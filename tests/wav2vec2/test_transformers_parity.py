"""Live parity with transformers: random models saved by ``save_pretrained``, imported, compared stage by stage."""

from pathlib import Path

import pytest
import torch
from helpers import assert_same_frames, make_pair, random_waveforms, transformers_stages

FAMILIES = ["hubert", "wav2vec2", "wavlm", "unispeech", "unispeech-sat"]
SIZES = ["base", "large"]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # within transformers' WavLM
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_stages_of_transformers(family: str, size: str, padded: bool, tmp_path: Path) -> None:
    """Conv features, projection, each layer and the final output."""
    theirs, ours = make_pair(family, size, tmp_path)
    waveforms, lengths = random_waveforms(1500, 900, 1203)
    lengths = lengths if padded else None

    conv_features, _ = ours.feature_extractor(waveforms, lengths)
    assert_same_frames([conv_features], [theirs.feature_extractor(waveforms).transpose(1, 2)])

    hidden_states, frame_lengths = ours.extract_features(waveforms, lengths)
    output, _ = ours(waveforms, lengths)
    assert_same_frames([*hidden_states, output], transformers_stages(theirs, waveforms, lengths), frame_lengths)
    if padded:
        assert frame_lengths.tolist() == theirs._get_feat_extract_output_lengths(lengths).tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_parameters(family: str, size: str, tmp_path: Path) -> None:
    """Theirs, less what only masks training frames, and our extractor's ``dummy_weight``."""
    theirs, ours = make_pair(family, size, tmp_path)
    backbone = sum(p.numel() for name, p in theirs.named_parameters() if name != "masked_spec_embed")
    assert ours.get_num_params() == backbone + 9
