"""Writes a model in Hugging Face transformers' format: the inverse of import_huggingface.py, by its tables."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..audio import SAMPLE_RATE
from ..checkpoint import expected_state
from ..components import WEIGHT_NORM_NAMES, published_name
from ..config import is_wavlm
from ..errors import UserError, short_repr
from ..heads import TEXT, Head
from ..hub import CONFIG, WEIGHTS, write_safetensors, write_text
from ..model import wav2vec2_model
from .import_huggingface import ACCEPTED, EXTRACTOR_MODES, FAMILIES, NAMES
from .importing import source_name

PREPROCESSOR = "preprocessor_config.json"
VOCABULARY, TOKENIZER = "vocab.json", "tokenizer_config.json"
CTC_PREFIX = "lm_head."
_BLANK = "<pad>"  # transformers' CTC takes the padding token for the blank
_SPACE = "|"  # what its tokenizer has for it, and reads as it, whatever its settings say
_PROJECTION_NORM = "encoder_feature_projection_layer_norm"
_DUMMY_WEIGHT = "feature_extractor.dummy_weight"


def export_huggingface(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    model_type: str | None = None,
    head: Head | None = None,
) -> str:
    """Write config.json, model.safetensors and preprocessor_config.json, as transformers' ``save_pretrained`` does.

    Of a model with a head of text they are those of transformers' ...ForCTC, with its tokenizer's vocab.json and
    tokenizer_config.json.

    Weights keep their precision and their bits. transformers' parameter for masked frames, which acts in its training
    only, is not in them, so config.json switches that masking off.

    Args:
        state_dict, config: as in a model file.
        folder: made if it is not there.
        model_type: "hubert" or "wav2vec2", which are the same network; the default is "hubert". WavLM is "wavlm".
        head: of the model file, if it has one.

    Returns:
        The model type.

    Raises:
        UserError: transformers has no such model; it says which layer and why.
    """
    model_type = check_exportable(state_dict, config, model_type, head)
    config = _per_layer(config)
    state_dict = {published_name(name): tensor for name, tensor in state_dict.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}
    settings = _settings(config, model_type)
    if len(dtypes) == 1:
        settings["dtype"] = dtypes.pop()
    prefix, files = "", {CONFIG: settings, PREPROCESSOR: _preprocessor_settings(config)}
    if head is not None:
        prefix = f"{model_type}."
        settings |= {"architectures": [ctc_class(model_type)], "vocab_size": head.num_outputs, "pad_token_id": 0}
        files |= _tokenizer_settings(head)
    names = {name: _their_name(name, prefix) for name in expected_state(config) if name != _DUMMY_WEIGHT}
    write_safetensors({theirs: state_dict[ours] for ours, theirs in names.items()}, folder / WEIGHTS)
    for name, contents in files.items():
        write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", folder / name)
    return model_type


def ctc_class(model_type: str) -> str:
    """transformers' class of a model with a head of text."""
    return FAMILIES[model_type].model_class.replace("Model", "ForCTC")


def check_exportable(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model_type: str | None = None,
    head: Head | None = None,
) -> str:
    """The model type of a model that :func:`export_huggingface` can write.

    Raises:
        UserError: it cannot.
    """
    model_type = _model_type(config, model_type)
    _check_head(config, head)
    _check_shapes(_per_layer(config))
    _check_scale(state_dict[_DUMMY_WEIGHT])
    return model_type


def _per_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with one entry per layer, where one for all is allowed."""
    with torch.device("meta"):
        return wav2vec2_model(**config).config


def _model_type(config: Mapping[str, Any], model_type: str | None) -> str:
    possible = ["wavlm"] if is_wavlm(config) else ["hubert", "wav2vec2"]
    if model_type is None:
        model_type = possible[0]
    if model_type not in possible:
        raise UserError(f"model_type: expected {' or '.join(possible)}, by the model's config, found {model_type}")
    if model_type != "hubert" and not config.get(_PROJECTION_NORM, True):
        raise UserError(
            f"huggingface format: the model has no LayerNorm before its feature projection ({_PROJECTION_NORM}), but "
            f"transformers' {model_type} models have; export it "
            f"{'to another format' if model_type == 'wavlm' else 'as model_type hubert'}"
        )
    return model_type


def _check_head(config: Mapping[str, Any], head: Head | None) -> None:
    """Check that transformers has a model with such a head, or with none.

    Raises:
        UserError: it has not.
    """
    if head is None and config.get("aux_num_out") is not None:
        raise UserError(
            f"huggingface format: the model has an output layer (aux_num_out {config['aux_num_out']}), which "
            "transformers' base models have not; export the model without it: --drop_head"
        )
    if head is not None and head.kind != TEXT:
        raise UserError(
            f"huggingface format: the model has a head of {head.kind}, of which transformers has none of the same "
            "form; export it to another format, or its encoder alone: --drop_head"
        )
    for token, meaning in ((_BLANK, "blank"), (_SPACE, "space")):
        if head is not None and token in head.labels:
            raise UserError(
                f"huggingface format: {token!r} is one of the labels, but transformers' name of the {meaning}; export "
                "the model to another format"
            )


def _check_shapes(config: Mapping[str, Any]) -> None:
    """Check that all layers are what transformers makes of one number of heads and one feed-forward width.

    Raises:
        UserError: names the first layer that is not.
    """

    def refuse(layer: int, found: str, expected: str) -> None:
        raise UserError(
            f"huggingface format: layer {layer + 1} has {found}, but transformers' models have {expected}; export a "
            "pruned model to another format"
        )

    widths = config["encoder_ff_interm_features"]
    total, remaining = _heads(config)
    for layer in range(config["encoder_num_layers"]):
        if not config["encoder_use_attention"][layer]:
            refuse(layer, "no attention", "it in every layer")
        if not config["encoder_use_feed_forward"][layer]:
            refuse(layer, "no feed-forward", "it in every layer")
        if remaining[layer] != total:
            refuse(layer, f"{remaining[layer]} attention heads", f"{total} in every layer, which fill its dimensions")
        if widths[layer] != widths[0] or not widths[layer]:
            refuse(layer, f"a feed-forward of {widths[layer]}", f"one width in every layer (layer 1 has {widths[0]})")


def _heads(config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The heads that fill the embedding, and those that each layer has."""
    wavlm = is_wavlm(config)
    total, rest = divmod(config["encoder_embed_dim"], config.get("encoder_head_dim", 1))
    if wavlm and "encoder_head_dim" not in config:
        return config["encoder_total_num_heads"][0], [len(heads) for heads in config["encoder_remaining_heads"]]
    if rest or wavlm:
        raise UserError(
            f"huggingface format: attention heads of {config['encoder_head_dim']} dimensions, but those of "
            f"transformers' models divide the embedding, which has {config['encoder_embed_dim']}; export it "
            "to another format"
        )
    return total, config["encoder_num_heads"]


def _check_scale(scale: Tensor) -> None:
    """Check the extractor's output scale, which transformers' models do not have.

    Raises:
        UserError: it is not 1.
    """
    if not bool((scale == 1).all()):
        channel = int((scale != 1).nonzero()[0])
        raise UserError(
            f"huggingface format: the extractor's last conv layer, which was pruned, has an output scale other than 1 "
            f"({_DUMMY_WEIGHT}: {short_repr(float(scale[channel]))} of channel {channel}), but transformers' "
            "models have no "
            "place for it; export the model to another format"
        )


def _their_name(name: str, prefix: str) -> str:
    """transformers' name of a parameter, as its current version writes it; ``prefix`` is the backbone's."""
    if name.startswith("aux."):
        return name.replace("aux.", CTC_PREFIX)
    name = prefix + source_name(name, NAMES)
    for theirs, published in WEIGHT_NORM_NAMES.items():
        if name.endswith("." + published):
            return name.removesuffix(published) + theirs
    return name


def _settings(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """config.json; what is not in it has transformers' defaults."""
    channels, kernels, strides = (list(column) for column in zip(*config["extractor_conv_layer_config"], strict=True))
    wavlm = (
        {"num_buckets": config["encoder_num_buckets"], "max_bucket_distance": config["encoder_max_distance"]}
        if model_type == "wavlm"
        else {}
    )
    return {
        **{name: accepted for name, (accepted, _) in ACCEPTED.items() if accepted is not None},
        **wavlm,
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].model_class],
        "feat_extract_norm": {ours: theirs for theirs, ours in EXTRACTOR_MODES.items()}[config["extractor_mode"]],
        "num_feat_extract_layers": len(channels),
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": config["extractor_conv_bias"],
        "hidden_size": config["encoder_embed_dim"],
        "num_conv_pos_embeddings": config["encoder_pos_conv_kernel"],
        "num_conv_pos_embedding_groups": config["encoder_pos_conv_groups"],
        "num_hidden_layers": config["encoder_num_layers"],
        "num_attention_heads": _heads(config)[0],
        "intermediate_size": config["encoder_ff_interm_features"][0],
        "do_stable_layer_norm": config["encoder_layer_norm_first"],
        "feat_proj_layer_norm": config.get(_PROJECTION_NORM, True),
        "feat_proj_dropout": config["encoder_projection_dropout"],
        "attention_dropout": config["encoder_attention_dropout"],
        "activation_dropout": config["encoder_ff_interm_dropout"],
        "hidden_dropout": config["encoder_dropout"],
        "layerdrop": config["encoder_layer_drop"],
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }


def _tokenizer_settings(head: Head) -> dict[str, dict[str, Any]]:
    """vocab.json, and tokenizer_config.json for a tokenizer that has no other tokens than the blank and the labels."""
    tokens = [_BLANK, *(_SPACE if label == " " else label for label in head.labels)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": _BLANK,
        "word_delimiter_token": _SPACE,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token")),
    }
    return {VOCABULARY: vocabulary, TOKENIZER: settings}


def _preprocessor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: the published convention is that only models with layer_norm extractors see masks."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config["normalize_waveform"],
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config["extractor_mode"] == "layer_norm",
        "sampling_rate": SAMPLE_RATE,
    }
