"""Imports HuBERT, wav2vec 2.0, WavLM and UniSpeech from transformers' format, with or without heads or a decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import wavlm_attention
from ..files.errors import UserError, one_line, short_repr
from ..files.hub import TRANSFORMERS_NAMES, asking_hub, found_in
from ..files.storage import read_json, read_safetensors
from ..files.unpickling import kind_of_contents, read_torch_file
from .importing import (
    FIRST_CONV,
    Architecture,
    Dropouts,
    ImportedModel,
    compare_outputs,
    import_weights,
    load_source_state,
    stated_normalization,
)
from .quiet import quiet


class Family(NamedTuple):
    name: str
    model_class: str


# By model_type.
FAMILIES = {
    "hubert": Family("HuBERT", "HubertModel"),
    "wav2vec2": Family("wav2vec 2.0", "Wav2Vec2Model"),
    "wavlm": Family("WavLM", "WavLMModel"),
    "unispeech": Family("UniSpeech", "UniSpeechModel"),
    "unispeech-sat": Family("UniSpeech-SAT", "UniSpeechSatModel"),
}
# What keeps out their kin.
_OTHER_NETWORKS = {
    "data2vec-audio": "a stack of positional convolutions",
    "wav2vec2-conformer": "Conformer layers",
    "wav2vec2-bert": "Conformer layers on filter banks",
}

EXTRACTOR_MODES = {"group": "group_norm", "layer": "layer_norm"}

# Settings of which only one value is supported: name -> (that value, the meaning of any other).
ACCEPTED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("gelu", "another activation"),
    "feat_extract_activation": ("gelu", "another activation"),
    "layer_norm_eps": (1e-5, "another LayerNorm epsilon"),
    "conv_pos_batch_norm": (False, "a batch norm in the positional convolution"),
    "add_adapter": (False, "an adapter on top of the encoder"),
    "adapter_attn_dim": (None, "adapters inside the encoder layers"),
    "quantization_config": (None, "quantised weights"),
}

# Settings of the backbone. Others (of heads, pre-training, generation, ...) are ignored.
_BACKBONE_NAMES = """
feat_extract_norm conv_dim conv_kernel conv_stride conv_bias feat_proj_layer_norm num_feat_extract_layers hidden_size
num_conv_pos_embeddings num_conv_pos_embedding_groups num_hidden_layers num_attention_heads intermediate_size
do_stable_layer_norm num_buckets max_bucket_distance
"""
_BACKBONE_SETTINGS = _BACKBONE_NAMES.split()

_WRITTEN_BY = "a directory that transformers' save_pretrained wrote"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


def fetch_huggingface_model(model: str) -> Path:
    """Return the directory of ``model``: a local one, or that of a hub id, downloaded or from the cache.

    Raises:
        UserError: it is neither a directory nor a model that the hub gives.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.is_file():
        if (directory.parent / "config.json").is_file():
            problem = "a file, where the folder that it lies in is wanted"
            raise UserError(f"--model {model}: {problem}; give --model {directory.parent}")
        kind = kind_of_contents(read_torch_file(directory), model)
        raise UserError(f"--model {model}: {kind or 'a file'}, where a folder with config.json is wanted")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"--model {model}: no such folder; give one with config.json, or a hub id (ORG/NAME)")
    with asking_hub(f"--model {model}") as hub:
        directory = Path(hub.snapshot_download(model, allow_patterns=["*.json", "model*.safetensors"]))
        if not any(directory.glob("model*.safetensors")):
            directory = Path(hub.snapshot_download(model, allow_patterns=["*.json", "pytorch_model*.bin"]))
    return directory


def import_huggingface_model(
    directory: str | Path, dropouts: Dropouts | None = None, normalize_waveform: bool | None = None
) -> ImportedModel:
    """Import a model saved by transformers' ``save_pretrained``.

    The directory holds config.json, preprocessor_config.json and the weights (safetensors or pytorch_model.bin, in one
    file or in shards, in full or half precision). ``dropouts`` are written into the config; ``normalize_waveform``
    overrides what the extractor's mode decides.

    Raises:
        UserError: a file is missing or damaged, or the model is of another architecture.
    """
    directory = Path(directory)
    architecture = _read_architecture(directory)
    weights = _read_weights(directory)
    if (directory / "adapter_config.json").exists():
        raise UserError(f"{directory}: holds an adapter (adapter_config.json); convert the model that it was added to")
    return import_weights(
        architecture, dropouts or Dropouts(), normalize_waveform, weights, TRANSFORMERS_NAMES, str(directory)
    )


def compare_with_source(imported: ImportedModel, directory: str | Path) -> float:
    """Return the largest difference from the outputs of transformers' own model, see :func:`compare_outputs`.

    Raises:
        UserError: transformers cannot load the model, or the difference is too large.
    """
    import transformers

    directory = Path(directory)
    config = _source_config(directory / "config.json")
    try:
        with quiet():
            source = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
            load_source_state(source, _read_weights(directory), FIRST_CONV)
    except Exception as error:  # any failure means that the conversion cannot be checked
        raise UserError(f"{directory}: transformers cannot load the source model ({one_line(error)})") from error

    def run(waveform: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        outputs = source(waveform, output_hidden_states=True)
        return outputs.hidden_states[1:], outputs.last_hidden_state

    return compare_outputs(imported, run, str(directory))


def _source_config(source: Path) -> Any:
    """Build transformers' config of the backbone alone, which fills in the settings that older files lack."""
    settings = read_json(source, f"{_WRITTEN_BY}, {found_in(source.parent)}")
    if isinstance(settings.get("encoder"), dict):  # of a model with a decoder
        settings = settings["encoder"]
    model_type = settings.get("model_type")
    if "encoder_embed_dim" in settings:
        raise UserError(f"{source}: describes a model of this project, which needs no conversion; give its folder")
    families = list(FAMILIES)
    if model_type not in families:
        problem = f"model_type {short_repr(model_type)}, expected one of {families}"
        reason = _OTHER_NETWORKS.get(str(model_type), "another architecture")
        raise UserError(f"{source}: {problem}; {reason} cannot be converted")
    for name, (accepted, meaning) in ACCEPTED.items():
        found = settings.get(name, accepted)
        if found != accepted:
            problem = f"{name} is {short_repr(found)}, expected {accepted!r}"
            raise UserError(f"{source}: {problem}: {meaning} has no counterpart here and cannot be converted")
    import transformers

    backbone = {name: settings[name] for name in _BACKBONE_SETTINGS if name in settings}
    try:
        with quiet():
            return transformers.AutoConfig.for_model(model_type, **backbone)
    except Exception as error:  # its validation raises classes of its own that share no base
        family = FAMILIES[model_type].name
        raise UserError(f"{source}: not a {family} config ({one_line(error)}); download it again") from error


def _read_architecture(directory: Path) -> Architecture:
    source = directory / "config.json"
    config = _source_config(source)
    norm, modes = config.feat_extract_norm, list(EXTRACTOR_MODES)
    if norm not in modes:
        raise UserError(f"{source}: feat_extract_norm {short_repr(norm)}, expected one of {modes}")
    convs = [config.conv_dim, config.conv_kernel, config.conv_stride]
    if not all(isinstance(entries, (list, tuple)) and len(entries) == len(convs[0]) for entries in convs):
        problem = "conv_dim, conv_kernel and conv_stride are not lists, or of different lengths"
        raise UserError(f"{source}: {problem}; download it again")
    attention: dict[str, Any] = {"encoder_num_heads": config.num_attention_heads}
    if config.model_type == "wavlm":
        sizes = config.num_hidden_layers, config.num_attention_heads, config.num_buckets, config.max_bucket_distance
        attention = wavlm_attention(*sizes)
    our_config = {
        "extractor_mode": EXTRACTOR_MODES[norm],
        "extractor_conv_layer_config": [list(layer) for layer in zip(*convs, strict=True)],
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_feature_projection_layer_norm": getattr(config, "feat_proj_layer_norm", True),
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        **attention,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
    }
    return Architecture(FAMILIES[config.model_type].name, our_config, _stated_normalization(directory))


def _stated_normalization(directory: Path) -> bool | None:
    """Return ``do_normalize`` of the feature extractor's settings, which newer files keep inside the processor's."""
    stated = None
    for path in (directory / "processor_config.json", directory / "preprocessor_config.json"):
        if not path.is_file():
            continue
        settings = read_json(path, _WRITTEN_BY)
        if path.name == "processor_config.json":
            settings = settings.get("feature_extractor", {})
        if not isinstance(settings, dict):
            raise UserError(f"{path}: expected a JSON object under feature_extractor, found {short_repr(settings)}")
        normalizes = stated_normalization(settings, "sampling_rate", "do_normalize", str(path))
        stated = stated if normalizes is None else normalizes
    return stated


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of the first weight file that exists, in one piece or in shards."""
    weights: dict[str, Tensor] = {}
    for path in _weight_paths(directory):
        found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise UserError(f"{path}: expected a dict of tensors by name, found {type(found).__name__}")
        weights |= found
    return weights


def _weight_paths(directory: Path) -> list[Path]:
    for file_name in _WEIGHT_FILES:
        index = directory / f"{file_name}.index.json"
        if (directory / file_name).is_file():
            return [directory / file_name]
        if not index.is_file():
            continue
        weight_map = read_json(index, _WRITTEN_BY).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: no weight_map that names the shards; download it again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if (directory / name).parent != directory or not (directory / name).is_file():
                problem = f"names the shard {short_repr(name)}, which is not beside it"
                raise UserError(f"{index}: {problem}; download the whole model")
        return [directory / name for name in names]
    expected = f"expected {' or '.join(_WEIGHT_FILES)}, or their shards with an index, {found_in(directory)}"
    raise UserError(f"{directory}: no weights; {expected}")
