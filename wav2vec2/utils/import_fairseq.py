"""Imports HuBERT, wav2vec 2.0 and WavLM checkpoints in fairseq's format, without fairseq.

Settings come in three published layouts: ``cfg`` with one dict per component (fairseq from 2021 on, plain or as an
omegaconf DictConfig), ``args`` (an argparse.Namespace, before 2021), and a flat ``cfg`` (Microsoft's WavLM). s3prl
writes the first as ``model_cfg``, ``task_cfg`` and ``model_weight``. Missing settings have the defaults of the program
that wrote the file.
"""

import ast
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor

from ..config import MAX_CONV_LAYERS, wavlm_attention
from ..files.errors import UserError, one_line, short_repr, single_line
from ..files.unpickling import kind_of_contents, read_torch_file, to_plain
from .importing import (
    Architecture,
    Dropouts,
    ImportedModel,
    compare_outputs,
    import_weights,
    load_source_state,
    stated_normalization,
)
from .quiet import quiet

# (our prefix, fairseq's prefix); {} is a layer index.
_ENCODER_NAMES = [
    ("encoder.feature_projection.layer_norm", "layer_norm"),
    ("encoder.feature_projection.projection", "post_extract_proj"),
    ("encoder.transformer.pos_conv_embed.conv", "encoder.pos_conv.0"),
    ("encoder.transformer.layer_norm", "encoder.layer_norm"),
    ("encoder.transformer.layers.{}.attention.gru_rel_pos_const", "encoder.layers.{}.self_attn.grep_a"),
    ("encoder.transformer.layers.{}.attention.gru_rel_pos_linear", "encoder.layers.{}.self_attn.grep_linear"),
    ("encoder.transformer.layers.{}.attention.rel_attn_embed", "encoder.layers.{}.self_attn.relative_attention_bias"),
    ("encoder.transformer.layers.{}.attention", "encoder.layers.{}.self_attn"),
    ("encoder.transformer.layers.{}.layer_norm", "encoder.layers.{}.self_attn_layer_norm"),
    ("encoder.transformer.layers.{}.feed_forward.intermediate_dense", "encoder.layers.{}.fc1"),
    ("encoder.transformer.layers.{}.feed_forward.output_dense", "encoder.layers.{}.fc2"),
    ("encoder.transformer.layers.{}.final_layer_norm", "encoder.layers.{}.final_layer_norm"),
]
# fairseq keeps conv, dropout, norm and activation of a layer in one Sequential. In layer_norm mode the norm lies
# between two transpositions in a Sequential of its own.
_EXTRACTOR_NAMES = {
    mode: [
        ("feature_extractor.conv_layers.{}.conv", "feature_extractor.conv_layers.{}.0"),
        ("feature_extractor.conv_layers.{}.layer_norm", f"feature_extractor.conv_layers.{{}}.{place}"),
    ]
    for mode, place in (("group_norm", "2"), ("layer_norm", "2.1"))
}

# A fine-tuned model, with or without a decoder, holds the backbone under this name, and its settings under w2v_args.
_FINE_TUNED = "encoder.w2v_model."

_FAMILIES = {"hubert": "HuBERT", "wav2vec2": "wav2vec 2.0"}
_FAMILY_BY_KEY = {"label_embs_concat": "hubert", "quantizer.vars": "wav2vec2"}

_EXTRACTOR_MODES = {"default": "group_norm", "layer_norm": "layer_norm"}

# fairseq's and WavLM's defaults, for settings that the file lacks.
_DEFAULTS: dict[str, Any] = {
    "extractor_mode": "default",
    "conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2",
    "conv_bias": False,
    "encoder_embed_dim": 768,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "encoder_layers": 12,
    "encoder_attention_heads": 12,
    "encoder_ffn_embed_dim": 3072,
    "layer_norm_first": False,
    "num_buckets": 320,
    "max_distance": 1280,
    "relative_position_embedding": False,
    "gru_rel_pos": False,
}

# Settings of which only some values are supported: name -> those values. All settings may be absent.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "extractor_mode": tuple(_EXTRACTOR_MODES),
    "activation_fn": ("gelu",),
    "layer_type": ("transformer",),
    "pos_conv_depth": (1,),
    "conv_pos_batch_norm": (False,),
    "attn_type": ("", None),
    "quantize_input": (False,),
    "expand_attention_head_size": (-1,),
}
_ACCEPTED_OF_WAVLM: dict[str, tuple[Any, ...]] = {"relative_position_embedding": (True,), "gru_rel_pos": (True,)}

_LONGEST_EXPRESSION = 4000  # characters


def import_fairseq_model(
    path: str | PathLike, dropouts: Dropouts | None = None, normalize_waveform: bool | None = None
) -> ImportedModel:
    """Import a fairseq-format checkpoint: pre-trained, or fine-tuned (head and decoder are left out).

    ``dropouts`` are written into the config; ``normalize_waveform`` overrides what the extractor's mode decides.

    Raises:
        UserError: the file is damaged, asks for foreign code, or holds a model of another architecture.
    """
    source = str(path)
    weights, settings, task = _read_checkpoint(path)
    if task is None and normalize_waveform is None:
        raise UserError(
            f"{source}: no settings of the task (cfg.task, or task_cfg as s3prl names it), which say whether the model "
            "wants normalised waveforms; give --normalize_waveform true or false"
        )
    architecture = _read_architecture(settings, task or {}, weights, source)
    names = _EXTRACTOR_NAMES[architecture.config["extractor_mode"]] + _ENCODER_NAMES
    return import_weights(architecture, dropouts or Dropouts(), normalize_waveform, weights, names, source)


def compare_with_fairseq(imported: ImportedModel, path: str | PathLike) -> float | None:
    """Return the largest difference from the outputs of fairseq's own model, see :func:`compare_outputs`.

    fairseq's model is built from settings that are checked here, and filled with tensors that are read here, so no
    file can make fairseq run code.

    Returns:
        None without fairseq, with one that this Python cannot import (the model's remarks say so), and for WavLM,
        which fairseq does not have.

    Raises:
        UserError: fairseq cannot take the model, or the difference is too large.
    """
    if imported.family not in _FAMILIES.values() or importlib.util.find_spec("fairseq") is None:
        return None
    weights, settings, task = _read_checkpoint(path)
    architecture = _read_architecture(settings, task or {}, weights, str(path))
    try:
        with quiet():
            importlib.import_module("fairseq.models.hubert")
    except Exception as error:  # fairseq's own releases raise many kinds on newer versions of Python
        imported.remarks.append(f"not compared with fairseq, which cannot be imported here ({one_line(error)})")
        return None
    try:
        with quiet():
            model = _fairseq_model(architecture, settings)
            load_source_state(model, weights, "feature_extractor.conv_layers.0.0.weight")
    except Exception as error:  # any failure means that the conversion cannot be checked
        raise UserError(
            f"{path}: fairseq cannot take the source model ({one_line(error)}), so the conversion cannot be "
            "checked; nothing was written; uninstall fairseq to convert without the check"
        ) from error
    layers: list[Tensor] = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, outputs: layers.append(outputs[0].transpose(0, 1)))

    def run(waveform: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        final = model(waveform, mask=False, features_only=True)["x"]
        return [layer[:, : final.size(1)] for layer in layers], final  # fairseq makes the number of frames even

    return compare_outputs(imported, run, str(path))


def _fairseq_model(architecture: Architecture, settings: dict[str, Any]) -> Any:
    """Build fairseq's own model, with random weights."""
    from fairseq.models.hubert import HubertConfig, HubertModel
    from fairseq.models.wav2vec import Wav2Vec2Config, Wav2Vec2Model
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    is_hubert = architecture.family == _FAMILIES["hubert"]
    config = HubertConfig() if is_hubert else Wav2Vec2Config()
    for name in _DEFAULTS.keys() & vars(config).keys():
        setattr(config, name, settings.get(name, _DEFAULTS[name]))
    # fairseq evaluates this as Python.
    config.conv_feature_layers = repr([tuple(layer) for layer in architecture.config["extractor_conv_layer_config"]])
    if not is_hubert:
        return Wav2Vec2Model(config).eval()
    config.label_rate = 50  # of targets, which are not used here
    return HubertModel(config, HubertPretrainingConfig(), [None]).eval()


def _read_checkpoint(path: str | PathLike) -> tuple[Mapping[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Return the weights of a checkpoint, the backbone's settings, and the task's, which describe the waveforms."""
    source = str(path)
    contents = read_torch_file(path)
    if isinstance(contents, dict) and "model_weight" in contents:  # s3prl's names for the same
        cfg = {"model": contents.get("model_cfg"), "task": contents.get("task_cfg")}
        contents = {"model": contents["model_weight"], "cfg": cfg}
    weights = contents.get("model") if isinstance(contents, dict) else None
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        found = f"keys {short_repr([*contents])}" if isinstance(contents, dict) else type(contents).__name__
        found = kind_of_contents(contents, path) or found
        raise UserError(f"{source}: expected a fairseq checkpoint with its weights under 'model', found {found}")
    components = ((entry, to_plain(contents.get(entry), source)) for entry in ("cfg", "args"))
    entry, found_settings = next((found for found in components if isinstance(found[1], dict)), ("", None))
    if found_settings is None:
        reason = f"expected the model's settings under 'cfg' or 'args', found keys {short_repr([*contents])}"
        raise UserError(f"{source}: {reason}; give a checkpoint that fairseq or WavLM's program wrote")
    settings, task = _split_settings(found_settings, f"{source}: {entry}")
    if "w2v_args" in settings or any(_FINE_TUNED in name for name in weights):
        backbone = settings.get("w2v_args")
        if not isinstance(backbone, dict):
            problem = "a fine-tuned model that does not hold its backbone's settings (w2v_args)"
            raise UserError(f"{source}: {problem}; convert the pre-trained checkpoint, or the same model from the hub")
        settings, backbone_task = _split_settings(backbone, f"{source}: w2v_args")
        stated_normalization(backbone_task or {}, "sample_rate", "normalize", f"{source}: w2v_args")
    return weights, settings, task


def _split_settings(settings: dict[str, Any], place: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split settings into the model's and the task's; settings without components serve as both."""
    if "model" not in settings:
        return settings, settings
    model, task = settings["model"], settings.get("task")
    if not isinstance(model, dict):
        raise UserError(f"{place}.model: expected a dict of settings, found {type(model).__name__}")
    return model, task if isinstance(task, dict) else None


def _read_architecture(
    settings: dict[str, Any], task: dict[str, Any], weights: Mapping[str, Any], source: str
) -> Architecture:
    is_wavlm = "relative_position_embedding" in settings or any(".self_attn.grep_" in name for name in weights)
    family = "WavLM" if is_wavlm else _family(settings, weights, source)
    settings = _DEFAULTS | settings
    for name, accepted in (_ACCEPTED | (_ACCEPTED_OF_WAVLM if is_wavlm else {})).items():
        value = settings.get(name, accepted[0])
        if not any(type(value) is type(option) and value == option for option in accepted):
            problem = f"{family} with {name} {short_repr(value)}, expected {' or '.join(map(repr, accepted))}"
            raise UserError(f"{source}: {problem}; such a model has no counterpart here and cannot be converted")

    # The config refuses numbers and flags that are impossible.
    num_layers, num_heads = settings["encoder_layers"], settings["encoder_attention_heads"]
    attention: dict[str, Any] = {"encoder_num_heads": num_heads}
    if is_wavlm:
        attention = wavlm_attention(num_layers, num_heads, settings["num_buckets"], settings["max_distance"])
    config = {
        "extractor_mode": _EXTRACTOR_MODES[settings["extractor_mode"]],
        "extractor_conv_layer_config": parse_conv_layers(settings["conv_feature_layers"], source),
        "extractor_conv_bias": settings["conv_bias"],
        "encoder_embed_dim": settings["encoder_embed_dim"],
        "encoder_pos_conv_kernel": settings["conv_pos"],
        "encoder_pos_conv_groups": settings["conv_pos_groups"],
        "encoder_num_layers": num_layers,
        **attention,
        "encoder_ff_interm_features": settings["encoder_ffn_embed_dim"],
        "encoder_layer_norm_first": settings["layer_norm_first"],
    }
    return Architecture(family, config, stated_normalization(task, "sample_rate", "normalize", source))


def _family(settings: dict[str, Any], weights: Mapping[str, Any], source: str) -> str:
    name = next((settings[key] for key in ("_name", "arch") if settings.get(key) is not None), None)
    for key, family in _FAMILY_BY_KEY.items():  # the two differ in their pre-training targets only
        if name is None and any(f".{weight}".endswith(f".{key}") for weight in weights):
            name = family
    if not isinstance(name, str) or name not in _FAMILIES:
        problem = f"a fairseq model of kind {short_repr(name)}, expected one of {list(_FAMILIES)} or a WavLM"
        raise UserError(f"{source}: {problem}; other architectures cannot be converted")
    return _FAMILIES[name]


def parse_conv_layers(expression: Any, source: str = "conv_feature_layers") -> Any:
    """Read fairseq's conv layers, a Python expression such as ``[(512,10,5)] + [(512,3,2)] * 4``, without running it.

    The config checks the result.

    Raises:
        UserError: it holds more than lists and tuples of whole numbers, joined by + and repeated by *.
    """
    try:
        if not isinstance(expression, str) or len(expression) > _LONGEST_EXPRESSION:
            raise ValueError(f"not a text of at most {_LONGEST_EXPRESSION} characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about input that is refused below
            return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        problem = f"conv_feature_layers {short_repr(expression)} cannot be read ({single_line(str(error))})"
        raise UserError(f"{source}: {problem}, expected lists of (channels, kernel, stride)") from error


def _evaluate(node: ast.expr) -> Any:
    """Evaluate a literal of whole numbers, lists and tuples (both become lists), + and *."""
    match node:
        case ast.Constant(value=number) if type(number) is int:
            return number
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_evaluate(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _evaluate(left), _evaluate(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            items, times = _evaluate(left), _evaluate(right)
            # The bound comes before the multiplication: the file may ask for more than memory holds.
            if isinstance(items, list) and isinstance(times, int) and len(items) * times <= MAX_CONV_LAYERS:
                return items * times
    raise ValueError(f"{ast.unparse(node)} is not allowed")
