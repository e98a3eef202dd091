"""The flags of an export, checked before torch, transformers or onnx are imported."""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wav2vec2.files.errors import UserError, check_utf8, one_line, short_repr

# By format, the library that the hub names for it.
FORMATS = {"huggingface": "transformers", "onnx": "onnx"}
OUTPUTS = ("last", "all")
MIN_OPSET, DEFAULT_OPSET = 18, 20  # 18 is the oldest that PyTorch's exporter writes

# The flags of the onnx format alone, and their defaults.
ONNX_FLAGS = {"outputs": "last", "opset": DEFAULT_OPSET, "int8": False, "tsv": None}

# The metadata that --card may give: keys of huggingface_hub's ModelCardData, of text, and of text or lists of texts.
_TEXT_KEYS = {
    *("license", "license_name", "license_link", "library_name", "model_name", "pipeline_tag", "base_model_relation"),
    *("new_version", "thumbnail"),
}
_LIST_KEYS = {"base_model", "datasets", "language", "metrics", "tags"}


def check_flags(args: argparse.Namespace) -> list[str]:
    """Check the flags of export.py.

    Returns:
        The formats of ``--formats``, each once.

    Raises:
        UserError: a flag has an impossible value, needs another flag, or would overwrite files.
    """
    wanted = [name.strip() for name in args.formats.split(",")]
    if unknown := [name for name in wanted if name not in FORMATS]:
        raise UserError(f"--formats: expected some of {', '.join(FORMATS)}, separated by commas, found {unknown[0]!r}")
    formats = [name for name in FORMATS if name in wanted]  # what takes longer comes last
    given = [name for name, default in ONNX_FLAGS.items() if getattr(args, name) != default]
    if given and "onnx" not in formats:
        raise UserError(f"--{given[0]}: applies to the onnx format; add onnx to --formats, or leave it out")
    if args.tsv and not args.int8:
        raise UserError("--tsv: nothing is measured on it; give --int8, too")
    check_utf8("--out", args.out)
    for folder in [args.out / name for name in formats]:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder}: exists, expected a new folder or an empty one; give another --out, or remove it"
            )
    if "onnx" in formats:  # last, as it imports onnx
        check_onnx(args.opset)
    return formats


def check_onnx(opset: int) -> None:
    """Check that ONNX files with this opset can be written.

    Raises:
        UserError: a package is missing, or the opset is too old for the exporter or too new for the installed onnx.
    """
    if opset < MIN_OPSET:
        raise UserError(f"opset {opset}: expected at least {MIN_OPSET}, the oldest that PyTorch's exporter writes")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"onnx format: needs {package}, which is missing: pip install -r requirements-export.txt")
    import onnx

    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise UserError(
            f"opset {opset}: expected at most {newest}, the newest of the installed onnx {onnx.__version__}"
        )


def read_card(path: Path | None) -> dict[str, Any]:
    """Read the metadata of ``--card``: YAML, with the keys that the hub's model cards have.

    Returns:
        Strings and lists of strings by key; nothing without a file.

    Raises:
        UserError: the file is not YAML, a key is unknown, or a value has another form.
    """
    import yaml

    if path is None:
        return {}
    try:
        metadata = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--card {path}: not readable as YAML ({one_line(error)}); mend it") from error
    if not isinstance(metadata, dict):
        raise UserError(f"--card {path}: expected lines 'key: value', found {short_repr(metadata)}")
    if unknown := [key for key in metadata if key not in _TEXT_KEYS | _LIST_KEYS]:
        raise UserError(
            f"--card {path}: {short_repr(unknown[0])} is not a key of the hub's model cards; expected some of "
            f"{', '.join(sorted(_TEXT_KEYS | _LIST_KEYS))}"
        )
    for key, value in metadata.items():
        texts = value if key in _LIST_KEYS and isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            expected = "text, or a list of texts" if key in _LIST_KEYS else "text"
            raise UserError(
                f"--card {path}: {key}: expected {expected} (in quotes, if need be), found {short_repr(value)}"
            )
    licence = metadata.get("license", "other")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(
            f"--card {path}: license: expected one of the hub's identifiers, in small letters (mit, apache-2.0, "
            f"cc-by-4.0, other, ...), found {licence!r}"
        )
    return metadata
