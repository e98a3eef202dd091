"""Writes a model in Hugging Face transformers' format.

One that transformers knows is written as import_huggingface.py reads it, by its tables. Any other is written with code
of its own: this package's network in modeling_dphubert.py.
"""

import inspect
import json
import re
import sys
import types
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.components import WEIGHT_NORM_NAMES, published_name
from wav2vec2.config import is_wavlm
from wav2vec2.files.checkpoint import expected_state
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.hub import CONFIG, WEIGHTS, write_safetensors, write_text
from wav2vec2.model import wav2vec2_model
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head
from wav2vec2.utils.import_huggingface import ACCEPTED, EXTRACTOR_MODES, FAMILIES, NAMES
from wav2vec2.utils.importing import source_name

PREPROCESSOR = "preprocessor_config.json"
VOCABULARY, TOKENIZER = "vocab.json", "tokenizer_config.json"
CTC_PREFIX = "lm_head."
_BLANK = "<pad>"  # transformers' CTC takes the padding token for the blank
_SPACE = "|"  # what its tokenizer has for it, and reads as it, whatever its settings say
_PROJECTION_NORM = "encoder_feature_projection_layer_norm"
_DUMMY_WEIGHT = "feature_extractor.dummy_weight"

# Of models that transformers does not know: model_type, where their weights lie, and the modules of their code.
OWN_TYPE, OWN_PREFIX = "dphubert", "network."
CONFIGURATION, MODELING, PIPELINE = "configuration_dphubert", "modeling_dphubert", "pipeline_dphubert"
# By kind of head: transformers' class that opens such a model, and the model's own.
_OWN_CLASSES = {
    None: ("AutoModel", "DPHuBERTModel"),
    TEXT: ("AutoModelForCTC", "DPHuBERTForCTC"),
    CLIPS: ("AutoModelForAudioClassification", "DPHuBERTForAudioClassification"),
    SEGMENTS: ("AutoModelForAudioFrameClassification", "DPHuBERTForAudioFrameClassification"),
}
_OWN_IMPORT = re.compile(r"^( *)from (\.+|(?=(?:hardconcrete|wav2vec2)\b))((?:\w+\.)*)(\w+) import", re.MULTILINE)
_CODE_HEADER = """# {name} of DPHuBERT, copied by its export.py: only imports differ.
# SPDX-License-Identifier: MIT. Copyright (c) 2026 the maintainers of DPHuBERT.
"""


def export_huggingface(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    model_type: str | None = None,
    head: Head | None = None,
) -> str:
    """Write a folder that transformers' Auto classes open, as its ``save_pretrained`` does.

    It holds config.json, model.safetensors, preprocessor_config.json, of a model with a head of text its tokenizer's
    vocab.json and tokenizer_config.json, and code: :data:`PIPELINE`, and of a model that transformers does not know
    all that it is made of, which ``trust_remote_code=True`` loads.

    Weights keep their precision and their bits. transformers' parameter for masked frames, which acts in its training
    only, is not in them, so config.json switches that masking off.

    Args:
        state_dict: of the model, weights of a head among them as :func:`~wav2vec2.files.heads.joined_state` gives them.
        config: as in a model file.
        folder: made if it is not there.
        model_type: "hubert" or "wav2vec2", which are the same network; the default is "hubert". WavLM is "wavlm".
        head: of the model file, if it has one.

    Returns:
        The model type, or :data:`OWN_TYPE` where the code of the model is its own.

    Raises:
        UserError: no such model can be written; it says why.
    """
    model_type = check_exportable(state_dict, config, model_type, head)
    config = _per_layer(config)
    state_dict = {published_name(name): tensor for name, tensor in state_dict.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}
    preprocessor = _preprocessor_settings(config, model_type)
    files = {PREPROCESSOR: preprocessor}
    if model_type == OWN_TYPE:
        settings, names = _own_settings(config, head), {name: OWN_PREFIX + name for name in state_dict}
    else:
        settings = _settings(config, model_type)
        if head is not None:
            settings |= {"architectures": [ctc_class(model_type)], "vocab_size": head.num_outputs, "pad_token_id": 0}
        prefix = "" if head is None else f"{model_type}."
        names = {name: _their_name(name, prefix) for name in expected_state(config) if name != _DUMMY_WEIGHT}
    if head is not None and head.kind == TEXT:
        preprocessor["processor_class"] = "Wav2Vec2Processor"
        files |= _tokenizer_settings(head)
    if len(dtypes) == 1:
        settings["dtype"] = dtypes.pop()
    settings["custom_pipelines"] = _pipelines(head)
    write_safetensors({theirs: state_dict[ours] for ours, theirs in names.items()}, folder / WEIGHTS)
    for name, contents in {CONFIG: settings, **files}.items():
        write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", folder / name)
    for name, source in code_files(MODELING if model_type == OWN_TYPE else PIPELINE).items():
        write_text(source, folder / name)
    return model_type


def code_files(name: str) -> dict[str, str]:
    """A module beside this one and all of this project that it imports, as modules of one folder.

    Returns:
        The source of each by the name of its file, importing the others relatively.
    """
    sources: dict[str, str] = {}

    def add(module: types.ModuleType) -> set[str]:
        """Its source and those of what it imports; returns the names of the latter."""
        source, needed = inspect.getsource(module), set()
        for _, dots, parents, imported in _OWN_IMPORT.findall(source):
            needed |= {imported, *add(import_module(dots + parents + imported, module.__package__))}
        text = _CODE_HEADER.format(name=module.__name__) + _OWN_IMPORT.sub(r"\1from .\4 import", source)
        if module.__package__ == __package__ and needed:  # transformers loads these, and its version 4 looks no further
            text += "\nif False:  # so that transformers copies them\n"
            text += "".join(f"    from .{name} import __name__  # noqa: F401\n" for name in sorted(needed))
        sources[f"{module.__name__.rpartition('.')[2]}.py"] = text
        return needed

    add(import_module(f".{name}", __package__))
    return sources


def load_with_its_code(folder: Path, head: Head | None) -> Any:
    """The model of a folder of :data:`OWN_TYPE`, in single precision, by transformers and the code in the folder."""
    package = types.ModuleType("_exported_model")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    try:
        module = import_module(f"{package.__name__}.{MODELING}")
        return getattr(module, own_class(head)).from_pretrained(folder, dtype=torch.float32)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]


def own_class(head: Head | None) -> str:
    """The class of a model of :data:`OWN_TYPE`."""
    return _OWN_CLASSES[head and head.kind][1]


def auto_class(head: Head | None) -> str:
    """transformers' class that opens a model of :data:`OWN_TYPE`."""
    return _OWN_CLASSES[head and head.kind][0]


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
    _check_head(config, head)
    try:
        known_type = _known_type(config, model_type)
        if head is not None and head.kind != TEXT:
            raise UserError(
                f"huggingface format: the model has a head of {head.kind}, of which transformers has none of the same "
                "form"
            )
        _check_shapes(_per_layer(config))
        _check_scale(state_dict[_DUMMY_WEIGHT])
    except UserError as error:
        if model_type is None:
            return OWN_TYPE
        raise UserError(
            f"{error}; leave out --model_type to have the model written with code of its own, or export it to another "
            "format"
        ) from error
    return known_type


def _per_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with one entry per layer, where one for all is allowed."""
    with torch.device("meta"):
        return wav2vec2_model(**config).config


def _known_type(config: Mapping[str, Any], model_type: str | None) -> str:
    possible = ["wavlm"] if is_wavlm(config) else ["hubert", "wav2vec2"]
    if model_type is None:
        model_type = possible[0]
    if model_type not in possible:
        raise UserError(f"model_type: expected {' or '.join(possible)}, by the model's config, found {model_type}")
    if model_type != "hubert" and not config.get(_PROJECTION_NORM, True):
        raise UserError(
            f"huggingface format: the model has no LayerNorm before its feature projection ({_PROJECTION_NORM}), but "
            f"transformers' {model_type} models have"
        )
    return model_type


def _check_head(config: Mapping[str, Any], head: Head | None) -> None:
    """Check that a model with such a head, or with none, can be written.

    Raises:
        UserError: it cannot.
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


def _check_shapes(config: Mapping[str, Any]) -> None:
    """Check that all layers are what transformers makes of one number of heads and one feed-forward width.

    Raises:
        UserError: names the first layer that is not.
    """

    def refuse(layer: int, found: str, expected: str) -> None:
        raise UserError(f"huggingface format: layer {layer + 1} has {found}, but transformers' models have {expected}")

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
            f"transformers' models divide the embedding, which has {config['encoder_embed_dim']}"
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
            "models have no place for it"
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


def _own_settings(config: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """config.json of a model of :data:`OWN_TYPE`."""
    auto_map = {auto: f"{MODELING}.{own}" for auto, own in _OWN_CLASSES.values()}
    settings = {
        **config,
        "model_type": OWN_TYPE,
        "architectures": [own_class(head)],
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
    """By task, the classes of transformers' pipelines that the code in the folder has."""
    pipelines = {"feature-extraction": {"impl": f"{PIPELINE}.SpeechFeaturesPipeline", "pt": ["AutoModel"]}}
    if head is not None and head.units == "words":
        pipelines["automatic-speech-recognition"] = {"impl": f"{PIPELINE}.WordsPipeline", "pt": ["AutoModelForCTC"]}
    return pipelines


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


def _preprocessor_settings(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """preprocessor_config.json: of transformers' own models, only those with layer_norm extractors see masks."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config["normalize_waveform"],
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": model_type == OWN_TYPE or config["extractor_mode"] == "layer_norm",
        "sampling_rate": SAMPLE_RATE,
    }
