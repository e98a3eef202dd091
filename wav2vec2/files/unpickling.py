"""Reads files that ``torch.save`` wrote, including those of other programs, without running code from them.

torch's ``weights_only`` unpickler calls only the names on an allow-list. This module adds the names that checkpoints of
fairseq and its relatives need beyond tensors, each replaced by a stand-in that only holds data.
"""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, listed, single_line
from .judge import Inert, check_torch_file, judged
from .storage import placeholder

FILE_SUFFIXES = (".pth", ".pt", ".ckpt")  # of files that torch.save writes


def _plain_dict(*_factory: Any) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``: an empty dict without a factory."""
    return {}


# The training state, which is never read, holds numpy's scalars and arrays. numpy 1 and 2 name them differently.
_NUMPY_NAMES = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_NUMPY_NAMES += ["numpy.dtype", "numpy.ndarray"]
_NODES = [f"nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")]
_NODES += ["dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata"]
_OTHERS = ("argparse.Namespace", "fairseq.data.dictionary.Dictionary", "typing.Any")
_SAFE_GLOBALS: list[Any] = [
    *((Inert, name) for name in (*_NUMPY_NAMES, *_OTHERS)),
    *((Inert, f"omegaconf.{name}") for name in _NODES),
    (_plain_dict, "collections.defaultdict"),
    # As types in omegaconf's metadata; torch translates Python 2's names for them.
    *((Inert, f"builtins.{name}") for name in ("dict", "list", "int")),
]
# What a file may name: of torch's own names no sets, byte arrays, sparse or other tensors with parts of their own.
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = {
    *(name for _, name in _SAFE_GLOBALS),
    *("__builtin__.dict", "__builtin__.list", "__builtin__.int", "__builtin__.long"),
    *("collections.OrderedDict", "collections.Counter", "_codecs.encode", "torch.device", "torch.Size"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    *(f"torch.{name}Storage" for name in _STORAGES),
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool")),
}


def read_torch_file(path: str | PathLike) -> Any:
    """Read a file written by ``torch.save`` (zip or the older format); tensors are put on the CPU.

    Objects of foreign classes become inert stand-ins; :func:`to_plain` opens those that hold settings.

    Raises:
        UserError: the file is missing, of another kind, damaged, or asks for a name outside the allow-list.
    """
    path = Path(path)
    if kind := kind_of_path(path):
        raise UserError(f"{path}: {kind}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    try:
        check_torch_file(path, _NAMES)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # the file decides which operation fails, and so which of many exceptions is raised
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: damaged, or not a checkpoint written by torch.save ({single_line(reason)}); download it "
            "again; convert_hubert_from_hf.py and convert_wavlm_from_fairseq.py read models of other programs"
        ) from error
    return judged(contents, path)


def kind_of_path(path: Path) -> str | None:
    """Describe a folder, a safetensors file, a program or a placeholder, and what to do with it; None for all else."""
    if path.is_dir():
        own = f"give a file, {listed('in it', model_files(path))}"
        convert = f"convert it: python convert_hubert_from_hf.py --model {path}"
        return f"a folder, where a file is wanted; {own}, or, if transformers wrote it, {convert}"
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(9)
            file.seek(max(path.stat().st_size - 2**16, 0))
            tail = file.read()  # with a zip's directory
        if head[:2] == b"PK" and (b"/constants.pkl" in tail or b"/archive_format" in tail):
            return "a program (TorchScript or torch.export), not a checkpoint; give the checkpoint that it came from"
        # The length of its header, then JSON. Files of torch.save are zip files or pickles.
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            own = f"give the folder that it lies in, {path.parent}"
            return f"a safetensors file; {own}, or, if transformers wrote it, {_convert_folder(path.parent)}"
        return placeholder(path)
    return None


def model_files(folder: Path) -> list[str]:
    """Return the names of files in a folder that ``torch.save`` may have written."""
    return [file.name for file in sorted(folder.glob("*")) if file.suffix in FILE_SUFFIXES]


def kind_of_contents(contents: Any, path: str | PathLike) -> str | None:
    """Describe the contents of a file that another command takes, and name the command; None for all else."""
    if not isinstance(contents, dict):
        return None
    if "pytorch-lightning_version" in contents or "optimizer_states" in contents:
        advice = "prune.py or save_final_ckpt.py makes the model file from it"
        return f"a training checkpoint (.ckpt) where a model file (.pth) is wanted; {advice}"
    if isinstance(contents.get("state_dict"), dict) and isinstance(contents.get("config"), dict):
        return "a model file (.pth) of this project, which needs no conversion"
    if "model_weight" in contents or ("model" in contents and ("cfg" in contents or "args" in contents)):
        return f"a checkpoint in fairseq's format; convert it: python convert_wavlm_from_fairseq.py --ckpt {path}"
    if contents and all(isinstance(value, torch.Tensor) for value in contents.values()):
        advice = _convert_folder(Path(path).parent)
        return f"bare weights without their config, as transformers' pytorch_model.bin; {advice}"
    return None


def _convert_folder(folder: Path) -> str:
    return f"convert the folder that it lies in: python convert_hubert_from_hf.py --model {folder}"


def to_plain(value: Any, source: str | PathLike) -> Any:
    """Replace Namespace, DictConfig, ListConfig and their nodes in ``value`` by dicts, lists and plain values."""
    try:
        return _to_plain(value)
    except RecursionError as error:  # of what has not been judged
        raise UserError(f"{source}: the settings in the file are damaged (endless); download it again") from error


def _to_plain(value: Any) -> Any:
    if isinstance(value, Inert):
        value = value.settings
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    return value
