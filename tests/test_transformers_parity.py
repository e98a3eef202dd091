"""Live parity with transformers: random models saved by ``save_pretrained``, imported, compared stage by stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_same_frames, random_waveforms, randomize
from torch import Tensor

from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.import_huggingface import import_huggingface_model

FAMILIES = {
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
}
SIZES = ["base", "large"]


def make_pair(family: str, size: str, directory: Path) -> tuple[torch.nn.Module, Wav2Vec2Model]:
    """transformers' random model and ours, imported from where it saved itself; both in eval mode.

    base: group_norm extractor and post-norm; large: layer_norm extractor, pre-norm, conv bias.
    """
    large = size == "large"
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 28,
        "conv_dim": (10, 12, 9),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 9 if large else 8,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer" if large else "group",
        "do_stable_layer_norm": large,
        "conv_bias": large,
        "apply_spec_augment": False,
        "attn_implementation": "eager",
    }
    if family == "wavlm":
        settings |= {"num_buckets": 16, "max_bucket_distance": 40}
    config_class, model_class = FAMILIES[family]
    theirs = model_class(config_class(**settings)).eval()
    randomize(theirs, seed=1)
    theirs.save_pretrained(directory)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(directory)
    return theirs, import_huggingface_model(directory).model.eval()


def transformers_stages(theirs: torch.nn.Module, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The projection, every layer's output before any final LayerNorm, and the last hidden state.

    ``output_hidden_states`` of pre-norm models holds the normalised last layer, so hooks read them.
    """
    stages: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        stages.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in (theirs.feature_projection, *theirs.encoder.layers)]
    attention_mask = None if lengths is None else (torch.arange(waveforms.size(1)) < lengths[:, None]).long()
    output = theirs(waveforms, attention_mask=attention_mask).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*stages, output]


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
