"""Writes a model in Hugging Face transformers' format.

A model that transformers knows is written as import_huggingface.py reads it, by the same tables. Any other is written
with the code of its network, modeling_dphubert.py. Both folders are read back by wav2vec2.files.hub.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.components import WEIGHT_NORM_NAMES, published_name
from wav2vec2.config import ModelConfig, WavLMConfig, check_config
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import head_of, joined_state
from wav2vec2.files.hub import CONFIG, CTC_PREFIX, OWN_ENTRY, OWN_PREFIX, OWN_TYPE, TRANSFORMERS_NAMES, WEIGHTS
from wav2vec2.model import Wav2Vec2Model, normalize_waveforms
from wav2vec2.task_model import CLIPS, SEGMENTS, TEXT, Head
from wav2vec2.utils.import_huggingface import ACCEPTED, EXTRACTOR_MODES, FAMILIES
from wav2vec2.utils.importing import DUMMY_WEIGHT, source_name
from wav2vec2.utils.quiet import quiet

from . import modeling_dphubert
from .bundle import code_files
from .comparison import CHECKED_BATCHES, LARGEST_DIFFERENCE, compare, noise

_MODELING, _PIPELINE = "modeling_dphubert", "pipeline_dphubert"
_BLANK = "<pad>"  # transformers' CTC takes the padding token for the blank
_SPACE = "|"  # transformers' CTC tokenizer reads this as a space, whatever its settings say

# By kind of head: the Auto class that opens a model with code of its own, and the model's class.
_OWN_CLASSES: dict[str | None, tuple[str, str]] = {
    None: ("AutoModel", "DPHuBERTModel"),
    TEXT: ("AutoModelForCTC", "DPHuBERTForCTC"),
    CLIPS: ("AutoModelForAudioClassification", "DPHuBERTForAudioClassification"),
    SEGMENTS: ("AutoModelForAudioFrameClassification", "DPHuBERTForAudioFrameClassification"),
}


def write_huggingface(
    contents: Mapping[str, Any], model: Wav2Vec2Model, folder: Path, model_type: str | None
) -> dict[str, Any]:
    """Write a folder as :func:`export_huggingface`, load it again, and compare it with ``model``, built from contents.

    Returns:
        What the card says about the folder.
    """
    model_type = export_huggingface(contents, folder, model_type)
    auto_class, own_class = _classes(model_type, head_of(contents, folder))
    weights, written = _weights(contents), _weights(read_model_file(folder))
    for name, tensor in weights.items():
        if tensor.dtype != written[name].dtype or not torch.equal(tensor, written[name]):
            raise UserError(f"{folder.name}: {name} is not what was written; try again, or check the disk")
    is_own = model_type == OWN_TYPE
    transformers.utils.logging.disable_progress_bar()
    with quiet():
        loaded = getattr(modeling_dphubert if is_own else transformers, own_class).from_pretrained(
            folder, dtype=torch.float32
        )

    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if model.config["normalize_waveform"] and not is_own:
            waveforms = normalize_waveforms(waveforms, lengths)
        mask = torch.arange(waveforms.size(1)) < lengths[:, None] if is_own else None
        return loaded(waveforms, attention_mask=mask)[0], loaded._get_feat_extract_output_lengths(lengths)

    # Not all of transformers' models take padding as ours do.
    difference = compare(model, run, noise(model, CHECKED_BATCHES if is_own else CHECKED_BATCHES[:1]))
    difference.check(folder.name)
    measured = [
        f"{WEIGHTS}: {(folder / WEIGHTS).stat().st_size:,} bytes; the weights of the model file, bit for bit, in its "
        "precision",
        f"largest difference from the model on noise, {'with and without' if is_own else 'without'} padding: "
        f"{difference.largest:.1e} (at most {LARGEST_DIFFERENCE:.0e} is accepted), relative to the largest value where "
        "that is above 1",
    ]
    return {"measured": measured, "model_class": auto_class, "own_code": is_own}


def _weights(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in the contents of a model file under published names, those of a head among them."""
    state_dict = {published_name(name): tensor for name, tensor in contents["state_dict"].items()}
    return joined_state(state_dict, contents.get("head", {}).get("state_dict", {}))


def export_huggingface(contents: Mapping[str, Any], folder: Path, model_type: str | None = None) -> str:
    """Write a folder that transformers' Auto classes open, and that ``wav2vec2.load`` opens.

    It holds config.json, model.safetensors, preprocessor_config.json, code (the pipelines, and of a model that
    transformers does not know its whole network, which ``trust_remote_code=True`` loads), and the tokenizer's
    vocab.json and tokenizer_config.json of a model with a head of text.

    Weights keep their precision and their bits. transformers' parameter for masked frames, which acts in its training
    only, is not in them, so config.json switches that masking off.

    Args:
        contents: the contents of a model file.
        folder: made if it is not there.
        model_type: "hubert" or "wav2vec2", which are the same network; the default is "hubert". WavLM is "wavlm".

    Returns:
        The model type, which is :data:`~wav2vec2.files.hub.OWN_TYPE` if the code of the model lies in the folder.

    Raises:
        UserError: no such model can be written; the message says why.
    """
    config, head, weights = check_config(contents["config"]), head_of(contents, folder), _weights(contents)
    model_type = _chosen_type(config, weights[DUMMY_WEIGHT], model_type, head)
    ours = {**config.to_dict(), **({"head": head.to_dict()} if head else {})}
    if model_type == OWN_TYPE:
        names = {name: OWN_PREFIX + name for name in weights}
        settings = _own_settings(ours, head)
    else:
        prefix = f"{model_type}." if head else ""
        names = {name: _their_name(name, prefix) for name in weights if name != DUMMY_WEIGHT}
        settings = _their_settings(ours, config, model_type, head)
    # A stream's sums are in float64, in a model of any precision.
    dtypes = {str(x.dtype).removeprefix("torch.") for name, x in weights.items() if ".heard." not in name}
    if len(dtypes) == 1:
        settings["dtype"] = dtypes.pop()
    pipelines = {"feature-extraction": {"impl": f"{_PIPELINE}.SpeechFeaturesPipeline", "pt": ["AutoModel"]}}
    if head is not None and head.units == "words":
        words = {"impl": f"{_PIPELINE}.WordsPipeline", "pt": ["AutoModelForCTC"]}
        pipelines["automatic-speech-recognition"] = words
    settings["custom_pipelines"] = pipelines
    files = {CONFIG: settings, **_processor_files(config, model_type, head)}
    tensors = {theirs: weights[name].detach().cpu().contiguous() for name, theirs in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, source in code_files(_MODELING if model_type == OWN_TYPE else _PIPELINE).items():
        (folder / name).write_text(source, encoding="utf-8")
    with suppress(OSError):  # some file systems keep no permissions
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors itself makes files that others cannot read
    return model_type


def _classes(model_type: str, head: Head | None) -> tuple[str, str]:
    """Name transformers' class that opens a model, and the class of the model."""
    if model_type == OWN_TYPE:
        return _OWN_CLASSES[head.kind if head else None]
    name = FAMILIES[model_type].model_class
    name = name.replace("Model", "ForCTC") if head else name
    return name, name


def _chosen_type(config: ModelConfig, scale: Tensor, model_type: str | None, head: Head | None) -> str:
    """Choose the model type to write, given the extractor's output scale.

    Raises:
        UserError: the model cannot be written, or not as this ``model_type``.
    """
    if head is None and config.aux_num_out is not None:
        raise UserError(
            f"huggingface format: the model has an output layer (aux_num_out {config.aux_num_out}), whose outputs "
            "have no names in the file; export the model without it: --drop_head"
        )
    for token, meaning in ((_BLANK, "blank"), (_SPACE, "space")):
        if head is not None and head.kind == TEXT and token in head.labels:
            raise UserError(
                f"huggingface format: {token!r} is one of the labels, but transformers' name of the {meaning}; export "
                "the model to another format"
            )
    possible = ["wavlm"] if isinstance(config, WavLMConfig) else ["hubert", "wav2vec2"]
    if model_type is not None and model_type not in possible:
        raise UserError(f"model_type: expected {' or '.join(possible)}, by the model's config, found {model_type}")
    if _fits_transformers(config, scale, model_type or possible[0], head):
        return model_type or possible[0]
    if model_type is None:
        return OWN_TYPE
    raise UserError(
        f"--model_type {model_type}: transformers' class does not hold this model: it has all heads and one "
        "feed-forward width in every layer, a LayerNorm before the projection (of wav2vec2), no output scale of the "
        "extractor, no head but of text, and does not stream; leave out --model_type to have the model written with "
        "code of its own"
    )


def _fits_transformers(config: ModelConfig, scale: Tensor, model_type: str, head: Head | None) -> bool:
    """Return True if transformers' class of this type holds a model, given its extractor's output scale."""
    if isinstance(config, WavLMConfig):
        heads = [config.encoder_total_num_heads[0], *map(len, config.encoder_remaining_heads)]
    else:
        heads = config.encoder_num_heads
    widths = config.encoder_ff_interm_features
    return (
        (head is None or head.kind == TEXT)
        and (model_type == "hubert" or config.encoder_feature_projection_layer_norm)
        and all(config.encoder_use_attention + config.encoder_use_feed_forward)
        and {count * config.encoder_head_dim for count in heads} == {config.encoder_embed_dim}
        and set(widths) == {widths[0]} != {0}
        and bool((scale == 1).all())
        and config.encoder_chunk_frames is None
    )


def _their_name(name: str, prefix: str) -> str:
    """Return transformers' name of a parameter, as its current version writes it; ``prefix`` is the backbone's."""
    if name.startswith("aux."):
        return name.replace("aux.", CTC_PREFIX)
    name = prefix + source_name(name, TRANSFORMERS_NAMES)
    for theirs, published in WEIGHT_NORM_NAMES.items():
        if name.endswith("." + published):
            return name.removesuffix(published) + theirs
    return name


def _their_settings(ours: dict[str, Any], config: ModelConfig, model_type: str, head: Head | None) -> dict[str, Any]:
    """config.json of a model that transformers knows; what is not in it has transformers' defaults."""
    channels, kernels, strides = zip(*config.extractor_conv_layer_config, strict=True)
    shared = modeling_dphubert.DPHuBERTConfig.attribute_map
    settings = {
        **{name: accepted for name, (accepted, _) in ACCEPTED.items() if accepted is not None},
        **{theirs: getattr(config, name) for theirs, name in shared.items() if theirs != "vocab_size"},
        OWN_ENTRY: ours,
        "model_type": model_type,
        "architectures": [_classes(model_type, head)[1]],
        "feat_extract_norm": {ours: theirs for theirs, ours in EXTRACTOR_MODES.items()}[config.extractor_mode],
        "num_feat_extract_layers": len(channels),
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "num_attention_heads": config.encoder_embed_dim // config.encoder_head_dim,
        "intermediate_size": config.encoder_ff_interm_features[0],
        "feat_proj_layer_norm": config.encoder_feature_projection_layer_norm,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    if isinstance(config, WavLMConfig):
        settings |= {"num_buckets": config.encoder_num_buckets, "max_bucket_distance": config.encoder_max_distance}
    if head is not None:
        settings |= {"vocab_size": head.num_outputs, "pad_token_id": 0}
    return settings


def _own_settings(ours: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """config.json of a model with code of its own."""
    auto_map = {auto: f"{_MODELING}.{own}" for auto, own in _OWN_CLASSES.values()}
    settings = {
        **ours,
        "model_type": OWN_TYPE,
        "architectures": [_classes(OWN_TYPE, head)[1]],
        "auto_map": {"AutoConfig": f"{_MODELING}.DPHuBERTConfig", **auto_map},
    }
    if head is not None and head.kind != TEXT:
        settings |= {
            "id2label": dict(enumerate(head.labels)),
            "label2id": {label: number for number, label in enumerate(head.labels)},
            "use_weighted_layer_sum": head.layers == "weighted",
            "classifier_pooling": head.pooling or "mean",
        }
    return settings


def _processor_files(config: ModelConfig, model_type: str, head: Head | None) -> dict[str, dict[str, Any]]:
    """Settings of the feature extractor and, for text, of a tokenizer with no other tokens than blank and labels."""
    extractor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize_waveform and config.encoder_chunk_frames is None,  # not a stream as a whole
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # Of transformers' own models, only those with layer_norm extractors see masks.
        "return_attention_mask": model_type == OWN_TYPE or config.extractor_mode == "layer_norm",
        "sampling_rate": SAMPLE_RATE,
    }
    files = {"preprocessor_config.json": extractor}
    if head is not None and head.kind == TEXT:
        extractor["processor_class"] = "Wav2Vec2Processor"
        tokens = [_BLANK, *(_SPACE if label == " " else label for label in head.labels)]
        files["vocab.json"] = {token: number for number, token in enumerate(tokens)}
        files["tokenizer_config.json"] = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "pad_token": _BLANK,
            "word_delimiter_token": _SPACE,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token")),
        }
    return files
