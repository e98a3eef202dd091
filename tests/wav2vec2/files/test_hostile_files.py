"""Files that would run code, and damaged ones, by every reader: nothing is run, and one line names the file."""

import argparse
import ast
import collections
import functools
import io
import json
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FIXTURES, REPOSITORY, random_model, small_config, to_omegaconf
from safetensors.torch import load_file

from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.unpickling import read_torch_file
from wav2vec2.utils.import_fairseq import import_fairseq_model
from wav2vec2.utils.import_huggingface import import_huggingface_model

pytestmark = pytest.mark.slow

HUGGINGFACE = FIXTURES / "hf" / "hubert_base"

# --- payloads --------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function``, which an unpickler makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Stateful:
    """Acts when its state is set."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


class Dictionary(collections.OrderedDict):
    """Acts when an entry is set."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Dictionary, (), None, None, iter(self.items())

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "marker" and value:
            Path(value).touch()
        super().__setitem__(key, value)


def quiet_dictionary(marker: Path) -> Dictionary:
    made = Dictionary()
    collections.OrderedDict.__setitem__(made, "marker", str(marker))
    return made


def touch(marker: Path) -> Call:
    return Call(os.system, f"touch {marker}")


def touching_script(marker: Path) -> str:
    script = marker.parent / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w').close()")
    return str(script)


def saved(marker: Path) -> Path:
    torch.save(touch(marker), marker.parent / "inner.pt")
    return marker.parent / "inner.pt"


PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "os.system": touch,
    "subprocess.check_call": lambda marker: Call(subprocess.check_call, ["touch", str(marker)]),
    "subprocess.Popen": lambda marker: Call(operator.methodcaller("wait"), Call(subprocess.Popen, ["touch", marker])),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "builtins.open": lambda marker: Call(open, str(marker), "w"),
    "functools.partial": lambda marker: Call(functools.partial(os.system, f"touch {marker}")),
    "map over a list": lambda marker: Call(list, Call(map, os.system, [f"touch {marker}"])),
    "runpy.run_path": lambda marker: Call(runpy.run_path, touching_script(marker)),
    "class with __setstate__": Stateful,
    "OrderedDict subclass": quiet_dictionary,
    "torch.load without weights_only": lambda marker: Call(
        functools.partial(torch.load, saved(marker), weights_only=False)
    ),
    "torch.storage._load_from_bytes": lambda marker: Call(torch.storage._load_from_bytes, saved(marker).read_bytes()),
    "torch._tensor._rebuild_from_type_v2": lambda marker: Call(
        torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {marker}",), None
    ),
    "torch._utils._rebuild_parameter": lambda marker: Call(
        torch._utils._rebuild_parameter, torch.zeros(1), False, touch(marker)
    ),
    "NumPy array of objects": lambda marker: np.array([touch(marker)], dtype=object),
    "numpy.load of a pickle": lambda marker: Call(functools.partial(np.load, allow_pickle=True), numpy_file(marker)),
}


def numpy_file(marker: Path) -> str:
    np.save(marker.parent / "inner.npy", np.array([touch(marker)], dtype=object), allow_pickle=True)
    return str(marker.parent / "inner.npy")


# --- files and readers -----------------------------------------------------------------------------


def model_contents() -> dict[str, Any]:
    model = random_model(small_config("hubert"))
    return {"state_dict": model.state_dict(), "config": model.config}


def fairseq_contents() -> dict[str, Any]:
    contents = read_torch_file(FIXTURES / "fairseq/hubert_base/checkpoint.pt")
    return {key: contents[key] for key in ("cfg", "model")}


def huggingface_contents() -> dict[str, Any]:
    return load_file(HUGGINGFACE / "model.safetensors")


def read_huggingface(path: Path) -> Any:
    """The file as the weights of a directory; the readers of its other files find nothing wrong."""
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(HUGGINGFACE / name, path.parent)
    return import_huggingface_model(path.parent)


# What reads a file, and what the file holds where it is good.
READERS: dict[str, tuple[Callable[[Path], Any], Callable[[], dict[str, Any]]]] = {
    "load_model": (checkpoint.load_model, model_contents),
    "import_fairseq_model": (import_fairseq_model, fairseq_contents),
    "import_huggingface_model": (read_huggingface, huggingface_contents),
}
readers = pytest.mark.parametrize("reader", READERS)


def write_pickle(contents: Any, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(contents, protocol=protocol))


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "zip, protocol 4": functools.partial(torch.save, pickle_protocol=4),
    "older format": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle, protocol 0": functools.partial(write_pickle, protocol=0),
    "pickle, protocol 2": write_pickle,
    "pickle, protocol 5": functools.partial(write_pickle, protocol=5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the file; every reader takes this name."""
    return tmp_path / "pytorch_model.bin"


def check_refused(read: Callable[[Path], Any], path: Path, match: str | None = None) -> None:
    """One line that names the file; the payloads' file is not there."""
    with pytest.raises(UserError, match=match) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.isprintable(), message
    assert not (path.parent / "marker").exists()


# --- payloads are not run --------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_not_run(payload: str, path: Path) -> None:
    """Every reader refuses every format; a plain unpickler runs each of them."""
    marker = path.parent / "marker"
    for read, _ in READERS.values():
        for write in FORMATS.values():
            write({"extra": PAYLOADS[payload](marker)}, path)
            check_refused(read, path, "asks for|damaged, or not a checkpoint")
    torch.save(PAYLOADS[payload](marker), path)
    try:
        torch.load(path, weights_only=False)
    except Exception:
        assert marker.exists()
    assert marker.exists(), "the payload is harmless, and the test shows nothing"


@readers
def test_payloads_are_not_run_wherever_they_are(reader: str, path: Path) -> None:
    read, make = READERS[reader]
    for place in [(), *((key,) for key in list(make())[:3]), ("extra",), ("state_dict", "extra"), ("model", "extra")]:
        contents: Any = make()
        inner = contents
        for name in place[:-1]:
            inner = inner.setdefault(name, {})
        if place:
            inner[place[-1]] = touch(path.parent / "marker")
        else:
            contents = touch(path.parent / "marker")
        for form in ("zip", "older format"):
            FORMATS[form](contents, path)
            check_refused(read, path, r"asks for posix\.system")


def test_payloads_in_stand_ins(path: Path, omegaconf_classes: dict[str, type]) -> None:
    """Nested in what the reader lets through: Namespace, omegaconf's containers, defaultdict, numpy's arrays."""
    poison = touch(path.parent / "marker")
    node = to_omegaconf({"model": {"layers": [1, 2]}}, omegaconf_classes)
    node._content["model"]._content["layers"]._content[0]._val = poison
    metadata = to_omegaconf({"model": {}}, omegaconf_classes)
    metadata._metadata.resolver_cache = collections.defaultdict(dict, {"x": poison})
    for settings in (
        argparse.Namespace(arch=poison),
        argparse.Namespace(w2v_args=argparse.Namespace(arch=[{"x": (poison,)}])),
        node,
        metadata,
        collections.defaultdict(list, {"x": poison}),
        np.array([1, poison], dtype=object),
    ):
        torch.save({"cfg": settings, "model": {}}, path)
        check_refused(import_fairseq_model, path, r"asks for posix\.system")


def test_allowed_names_do_nothing_by_themselves(path: Path) -> None:
    """The allowed functions cannot be made to call others, or to set attributes of shared classes."""
    # GLOBAL argparse.Namespace, BUILD with a dict: on the class itself, not on an instance.
    on_class = b"\x80\x02cargparse\nNamespace\n}X\x05\x00\x00\x00stateK\x01sb."
    # A codec that decodes code.
    codec = Call(__import__("_codecs").encode, "print(1)", "rot13")
    for contents in (on_class, pickle.dumps(codec, protocol=2), pickle.dumps(Call(int, "9" * 5000), protocol=2)):
        path.write_bytes(contents)
        check_refused(import_fairseq_model, path)


# --- damaged files ---------------------------------------------------------------------------------


@readers
@pytest.mark.parametrize("form", ["zip", "older format"])
def test_truncated_at_many_lengths(form: str, reader: str, path: Path) -> None:
    read, make = READERS[reader]
    FORMATS[form](make(), path)
    whole = path.read_bytes()
    for length in sorted({*range(0, 300, 50), *range(0, len(whole), len(whole) // 10), len(whole) - 1}):
        path.write_bytes(whole[:length])
        check_refused(read, path)


def test_flipped_bits_are_noticed(path: Path) -> None:
    """A flipped bit of any weight is found, which torch.load alone does not notice."""
    torch.save(model_contents(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if "/data/" in record.filename and record.file_size]
    for record in records[::5]:
        # The record's bytes follow its local header, whose length it says itself, and the padding in it.
        extra = int.from_bytes(whole[record.header_offset + 28 : record.header_offset + 30], "little")
        damaged = bytearray(whole)
        damaged[record.header_offset + 30 + len(record.filename) + extra + record.file_size // 2] ^= 1
        path.write_bytes(damaged)
        check_refused(checkpoint.load_model, path, f"the checksum of {record.filename} is wrong")


def test_files_without_checksums_load(path: Path) -> None:
    """Files without checksums load: torch writes them on request."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model_contents(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint.load_model(path)


def test_records_that_are_not_what_they_claim(path: Path) -> None:
    torch.save(model_contents(), path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}

    def rewrite(changes: dict[str, bytes | None], **options: Any) -> None:
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in records.items():
                changed = changes.get(name.partition("/")[2], data)
                if changed is not None:
                    archive.writestr(name, changed)

    rewrite({})
    checkpoint.load_model(path)
    for changes in ({"data.pkl": None}, {"data/7": None}, {"data/7": b"short"}, {"data.pkl": b""}):
        rewrite(changes)
        check_refused(checkpoint.load_model, path)
    rewrite({"data/7": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    check_refused(checkpoint.load_model, path, "its records are compressed")


def test_shapes_larger_than_the_file(path: Path) -> None:
    """A file of some kB that claims a terabyte is refused before there is memory for it."""
    contents = model_contents()
    contents["config"] |= {"encoder_ff_interm_features": [2**20] * 3}
    for key, value in contents["state_dict"].items():
        if "intermediate_dense" in key or key.endswith("output_dense.weight"):
            shape = [2**20 if size == 20 else size for size in value.shape]
            contents["state_dict"][key] = torch.zeros(1).expand(shape)
    torch.save(contents, path)
    check_refused(checkpoint.load_model, path, "more than the numbers stored for it")


def write_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("storages")
        member.size = 3
        file.addfile(member, io.BytesIO(b"abc"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
@readers
@pytest.mark.parametrize(
    "write",
    [
        write_torchscript,
        write_tar,
        lambda path: path.write_text("not a model"),
        lambda path: torch.save({"weights": torch.zeros(3)}, path),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["TorchScript", "tar", "a text", "another dict", "a list"],
)
def test_files_of_another_kind(write: Callable[[Path], Any], reader: str, path: Path) -> None:
    write(path)
    with pytest.raises(UserError) as error:
        READERS[reader][0](path)
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)


# --- Hugging Face directories ----------------------------------------------------------------------


def edit_json(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


HUGGINGFACE_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.json of other bytes": ("config.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
    "config.json, nested without end": ("config.json", lambda path: path.write_text("[" * 100_000)),
    "config.json, a list": ("config.json", lambda path: path.write_text("[]")),
    "config.json, a number of 5,000 digits": (
        "config.json",
        lambda path: path.write_text('{"model_type": "hubert", "hidden_size": ' + "9" * 5000 + "}"),
    ),
    "config.json, conv_dim 7": ("config.json", edit_json(conv_dim=7)),
    "config.json, hidden_size 10^12": ("config.json", edit_json(hidden_size=10**12)),
    "config.json, num_hidden_layers 10^12": ("config.json", edit_json(num_hidden_layers=10**12)),
    "config.json, num_attention_heads null": ("config.json", edit_json(num_attention_heads=None)),
    "config.json, feat_extract_norm a list": ("config.json", edit_json(feat_extract_norm=[])),
    "preprocessor_config.json, do_normalize 'yes'": ("preprocessor_config.json", edit_json(do_normalize="yes")),
    "model.safetensors, header of garbage": (
        "model.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:8] + os.urandom(1000)),
    ),
    "model.safetensors, header larger than the file": (
        "model.safetensors",
        lambda path: path.write_bytes(b"\xff" * 7 + b"\x00" + path.read_bytes()[8:]),
    ),
    "model.safetensors, a pickle": (
        "model.safetensors",
        lambda path: write_pickle(touch(path.parent / "marker"), path),
    ),
}


@pytest.mark.parametrize("case", HUGGINGFACE_FILES)
def test_huggingface_directories(case: str, tmp_path: Path) -> None:
    directory = shutil.copytree(HUGGINGFACE, tmp_path / "model")
    name, edit = HUGGINGFACE_FILES[case]
    edit(directory / name)
    with pytest.raises(UserError) as error:
        import_huggingface_model(directory)
    assert str(error.value).startswith(str(directory)) and "\n" not in str(error.value)
    assert not (directory / "marker").exists()


# --- the sources -----------------------------------------------------------------------------------

FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler"}
FORBIDDEN |= {"yaml.load", "yaml.unsafe_load", "numpy.load", "torch.hub.load", "torch.jit.load"}
FORBIDDEN |= {"os.system", "os.popen", "marshal.loads", "shelve.open"}


def test_sources_load_nothing_unsafely() -> None:
    """Every torch.load of the program says weights_only=True, and nothing else that runs what it reads is called."""
    sources = [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.py")]
    sources = [path for path in sources if path.parts[0] != "tests" and not any(p.startswith(".") for p in path.parts)]
    num_loads = 0
    for path in sources:
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, place = ast.unparse(node.func), f"{path}:{node.lineno}"
            assert name not in FORBIDDEN, f"{place}: {name}"
            options = {option.arg: option.value for option in node.keywords}
            if name == "np.load":  # its own format holds numbers only, unless it is told to unpickle
                assert ast.unparse(options.get("allow_pickle", ast.Constant(None))) == "False", place
            if name == "torch.load":
                num_loads += 1
                assert ast.unparse(options.get("weights_only", ast.Constant(None))) == "True", place
            if name.endswith((".fit", ".load_from_checkpoint")) and "ckpt_path" in options:
                assert ast.unparse(options.get("weights_only", ast.Constant(None))) == "True", place
    assert num_loads == 1, "one place reads files"
