"""Counted operations and parameters, held against torch's own counters."""

import pytest
import torch
from helpers import FAMILIES, hubert_base_flops, num_elements, small_config, torch_counts

from wav2vec2.flops import count_flops, count_params
from wav2vec2.model import hubert_base, wav2vec2_model, with_masks

IRREGULAR = {"encoder_use_attention": [True, False, True], "encoder_ff_interm_features": [20, 7, 0]}
NO_HEADS = {
    "hubert": {"encoder_num_heads": [4, 0, 1]},
    "wavlm": {"encoder_remaining_heads": [[0, 1, 3], [], [2]]},
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("family", "size"), FAMILIES)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
@pytest.mark.parametrize("num_samples", [400, 16_000])
def test_as_torch_counts(family, size, plain, num_samples):
    """Every part, for dense, irregular and masked models, with an odd kernel, and the first layers alone."""
    masks = {"extractor_prune_conv_channels": True, "encoder_prune_attention_heads": True}
    for changes in ({}, IRREGULAR | NO_HEADS[family], masks, {"encoder_pos_conv_kernel": 7}):
        config = small_config(family, size, **changes)
        for num_layers in (None, 2):
            counted = count_flops(config, num_samples, num_layers)
            assert counted._asdict() == torch_counts(config, num_samples, num_layers, plain)
        assert 2 * wav2vec2_model(**with_masks(config, ())).get_num_macs(num_samples) == sum(
            count_flops(config, num_samples)
        )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_steps(family, size):
    """A streaming model's are of its steps: in each the extractor makes a chunk, which sees the frames that it may."""
    for changes in ({}, IRREGULAR | {"encoder_pos_conv_kernel": 7}):
        chunks = {"encoder_chunk_frames": 4, "encoder_left_frames": 6}
        config = small_config(family, size, **changes, **chunks)
        num_samples = wav2vec2_model(**config).feature_extractor.num_samples(20)
        counted, found = count_flops(config, num_samples), torch_counts(config, num_samples)
        assert sum(counted) == sum(found.values())
        assert (counted.attention, counted.feed_forward) == (found["attention"], found["feed_forward"])
    keys = {operation.fixed.get("keys") for operation in wav2vec2_model(**config).operations(num_samples)}
    assert keys == {None, 10}


def test_parts():
    """The parameters of all parts are all there are, and HuBERT Base's operations are those counted by hand."""
    with torch.device("meta"):
        model = hubert_base()
    params = count_params(model)
    assert sum(params) == num_elements(model) and params.feed_forward == 12 * (2 * 768 * 3072 + 3072 + 768)
    assert sum(count_flops(model.config, 16_000)) == pytest.approx(hubert_base_flops(16_000), rel=2e-3)
