"""Writes a model in Hugging Face transformers' format.

A model that transformers knows is written as import_huggingface.py reads it, by the same tables. Any other is written
with the code of its network, modeling_dphubert.py. Both folders are read back by wav2vec2.files.hub.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.components import WEIGHT_NORM_NAMES, published_name
from wav2vec2.config import is_wavlm
from wav2vec2.files.checkpoint import expected_state
from wav2vec2.files.errors import UserError
from wav2vec2.files.hub import CONFIG, CTC_PREFIX, OWN_ENTRY, OWN_PREFIX, OWN_TYPE, TRANSFORMERS_NAMES, WEIGHTS
from wav2vec2.files.storage import atomic_path
from wav2vec2.model import wav2vec2_model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head
from wav2vec2.utils.import_huggingface import ACCEPTED, EXTRACTOR_MODES, FAMILIES
from wav2vec2.utils.importing import source_name

from .bundle import CONFIGURATION, MODELING, PIPELINE, code_files

PREPROCESSOR, VOCABULARY, TOKENIZER = "preprocessor_config.json", "vocab.json", "tokenizer_config.json"
_BLANK = "<pad>"  # transformers' CTC takes the padding token for the blank
_SPACE = "|"  # transformers' CTC tokenizer reads this as a space, whatever its settings say
_PROJECTION_NORM = "encoder_feature_projection_layer_norm"
_SCALE = "feature_extractor.dummy_weight"

# By kind of head: the Auto class that opens a model with code of its own, and the model's class.
_OWN_CLASSES: dict[str | None, tuple[str, str]] = {
    None: ("AutoModel", "DPHuBERTModel"),
    TEXT: ("AutoModelForCTC", "DPHuBERTForCTC"),
    CLIPS: ("AutoModelForAudioClassification", "DPHuBERTForAudioClassification"),
    SEGMENTS: ("AutoModelForAudioFrameClassification", "DPHuBERTForAudioFrameClassification"),
}


def export_huggingface(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    model_type: str | None = None,
    head: Head | None = None,
) -> str:
    """Write a folder that transformers' Auto classes open, and that ``wav2vec2.load`` opens.

    It holds config.json, model.safetensors, preprocessor_config.json, code (:data:`~.bundle.PIPELINE`, and of a model
    that transformers does not know its whole network, which ``trust_remote_code=True`` loads), and the tokenizer's
    vocab.json and tokenizer_config.json of a model with a head of text.

    Weights keep their precision and their bits. transformers' parameter for masked frames, which acts in its training
    only, is not in them, so config.json switches that masking off.

    Args:
        state_dict: of the model, weights of a head among them as :func:`~wav2vec2.files.heads.joined_state` gives them.
        config: as in a model file.
        folder: made if it is not there.
        model_type: "hubert" or "wav2vec2", which are the same network; the default is "hubert". WavLM is "wavlm".
        head: of the model file, if it has one.

    Returns:
        The model type, which is :data:`~wav2vec2.files.hub.OWN_TYPE` if the code of the model lies in the folder.

    Raises:
        UserError: no such model can be written; the message says why.
    """
    model_type = check_exportable(state_dict, config, model_type, head)
    state_dict = {published_name(name): tensor for name, tensor in state_dict.items()}
    ours = {**_per_layer(config), **({"head": head.to_dict()} if head else {})}
    if model_type == OWN_TYPE:
        names = {name: OWN_PREFIX + name for name in state_dict}
        settings = _own_settings(ours, head)
    else:
        prefix = f"{model_type}." if head else ""
        names = {name: _their_name(name, prefix) for name in expected_state(dict(config)) if name != _SCALE}
        settings = _their_settings(ours, model_type, head)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}
    if len(dtypes) == 1:
        settings["dtype"] = dtypes.pop()
    settings["custom_pipelines"] = _pipelines(head)
    _write_safetensors({theirs: state_dict[name] for name, theirs in names.items()}, folder / WEIGHTS)
    files = {CONFIG: settings, PREPROCESSOR: _preprocessor_settings(ours, model_type, head)}
    if head is not None and head.kind == TEXT:
        files |= _tokenizer_settings(head)
    for name, contents in files.items():
        write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", folder / name)
    for name, source in code_files(MODELING if model_type == OWN_TYPE else PIPELINE).items():
        write_text(source, folder / name)
    return model_type


def _write_safetensors(state_dict: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def model_classes(model_type: str, head: Head | None) -> tuple[str, str]:
    """Name transformers' class that opens a model, and the class of the model."""
    if model_type == OWN_TYPE:
        return _OWN_CLASSES[head.kind if head else None]
    name = FAMILIES[model_type].model_class
    name = name.replace("Model", "ForCTC") if head else name
    return name, name


def check_exportable(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model_type: str | None = None,
    head: Head | None = None,
) -> str:
    """Choose the model type that :func:`export_huggingface` writes.

    Raises:
        UserError: the model cannot be written, or not as this ``model_type``.
    """
    if head is None and config.get("aux_num_out") is not None:
        raise UserError(
            f"huggingface format: the model has an output layer (aux_num_out {config['aux_num_out']}), whose outputs "
            "have no names in the file; export the model without it: --drop_head"
        )
    for token, meaning in ((_BLANK, "blank"), (_SPACE, "space")):
        if head is not None and head.kind == TEXT and token in head.labels:
            raise UserError(
                f"huggingface format: {token!r} is one of the labels, but transformers' name of the {meaning}; export "
                "the model to another format"
            )
    possible = ["wavlm"] if is_wavlm(config) else ["hubert", "wav2vec2"]
    if model_type is not None and model_type not in possible:
        raise UserError(f"model_type: expected {' or '.join(possible)}, by the model's config, found {model_type}")
    chosen = model_type or possible[0]
    if _fits_transformers(_per_layer(config), state_dict[_SCALE], chosen, head):
        return chosen
    if model_type is None:
        return OWN_TYPE
    raise UserError(
        f"--model_type {model_type}: transformers' class does not hold this model: it has all heads and one "
        "feed-forward width in every layer, a LayerNorm before the projection (of wav2vec2), no output scale of the "
        "extractor, and no head but of text; leave out --model_type to have the model written with code of its own"
    )


def _per_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with one entry per layer, where one for all is allowed."""
    with torch.device("meta"):
        return wav2vec2_model(**config).config


def _fits_transformers(config: Mapping[str, Any], scale: Tensor, model_type: str, head: Head | None) -> bool:
    """Return True if transformers' class of this type holds a model, given its extractor's output scale."""
    total, widths = _total_heads(config), config["encoder_ff_interm_features"]
    head_dim = config.get("encoder_head_dim", config["encoder_embed_dim"] // total)
    return (
        (head is None or head.kind == TEXT)
        and (model_type == "hubert" or config.get(_PROJECTION_NORM, True))
        and all(config["encoder_use_attention"] + config["encoder_use_feed_forward"])
        and set(_heads(config)) == {total}
        and total * head_dim == config["encoder_embed_dim"]
        and set(widths) == {widths[0]} != {0}
        and bool((scale == 1).all())
    )


def _heads(config: Mapping[str, Any]) -> list[int]:
    """Return the number of attention heads that each layer has."""
    return (
        [len(heads) for heads in config["encoder_remaining_heads"]] if is_wavlm(config) else config["encoder_num_heads"]
    )


def _total_heads(config: Mapping[str, Any]) -> int:
    """Return the number of attention heads before pruning."""
    if is_wavlm(config):
        return config["encoder_total_num_heads"][0]
    return config["encoder_embed_dim"] // config["encoder_head_dim"]


def _their_name(name: str, prefix: str) -> str:
    """Return transformers' name of a parameter, as its current version writes it; ``prefix`` is the backbone's."""
    if name.startswith("aux."):
        return name.replace("aux.", CTC_PREFIX)
    name = prefix + source_name(name, TRANSFORMERS_NAMES)
    for theirs, published in WEIGHT_NORM_NAMES.items():
        if name.endswith("." + published):
            return name.removesuffix(published) + theirs
    return name


def _their_settings(config: Mapping[str, Any], model_type: str, head: Head | None) -> dict[str, Any]:
    """config.json of a model that transformers knows; what is not in it has transformers' defaults."""
    channels, kernels, strides = (list(column) for column in zip(*config["extractor_conv_layer_config"], strict=True))
    settings = {
        **{name: accepted for name, (accepted, _) in ACCEPTED.items() if accepted is not None},
        OWN_ENTRY: config,
        "model_type": model_type,
        "architectures": [model_classes(model_type, head)[1]],
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
        "num_attention_heads": _total_heads(config),
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
    if model_type == "wavlm":
        settings["num_buckets"] = config["encoder_num_buckets"]
        settings["max_bucket_distance"] = config["encoder_max_distance"]
    if head is not None:
        settings |= {"vocab_size": head.num_outputs, "pad_token_id": 0}
    return settings


def _own_settings(config: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """config.json of a model with code of its own."""
    auto_map = {auto: f"{MODELING}.{own}" for auto, own in _OWN_CLASSES.values()}
    settings = {
        **config,
        "model_type": OWN_TYPE,
        "architectures": [model_classes(OWN_TYPE, head)[1]],
        "auto_map": {"AutoConfig": f"{CONFIGURATION}.DPHuBERTConfig", **auto_map},
    }
    if head is None or head.kind == TEXT:
        return settings
    return settings | {
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: number for number, label in enumerate(head.labels)},
        "use_weighted_layer_sum": head.layers == "weighted",
        "classifier_pooling": head.pooling or "mean",
    }


def _pipelines(head: Head | None) -> dict[str, dict[str, Any]]:
    """Name, by task, the classes of transformers' pipelines that the code in the folder has."""
    pipelines = {"feature-extraction": {"impl": f"{PIPELINE}.SpeechFeaturesPipeline", "pt": ["AutoModel"]}}
    if head is not None and head.units == "words":
        pipelines["automatic-speech-recognition"] = {"impl": f"{PIPELINE}.WordsPipeline", "pt": ["AutoModelForCTC"]}
    return pipelines


def _tokenizer_settings(head: Head) -> dict[str, dict[str, Any]]:
    """vocab.json, and tokenizer_config.json for a tokenizer that has no other tokens than the blank and the labels."""
    tokens = [_BLANK, *(_SPACE if label == " " else label for label in head.labels)]
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": _BLANK,
        "word_delimiter_token": _SPACE,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token")),
    }
    return {VOCABULARY: {token: number for number, token in enumerate(tokens)}, TOKENIZER: settings}


def _preprocessor_settings(config: Mapping[str, Any], model_type: str, head: Head | None) -> dict[str, Any]:
    """preprocessor_config.json; of transformers' own models, only those with layer_norm extractors see masks."""
    settings = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config["normalize_waveform"],
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": model_type == OWN_TYPE or config["extractor_mode"] == "layer_norm",
        "sampling_rate": SAMPLE_RATE,
    }
    return settings | ({"processor_class": "Wav2Vec2Processor"} if head is not None and head.kind == TEXT else {})
