"""Files that would run code, and damaged ones, for every option of every entry point that takes a file.

Nothing of a hostile file is run, and each ends with one line that names the file.
"""

import argparse
import ast
import collections
import functools
import json
import operator
import os
import pickle
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import FIXTURES, REPOSITORY, random_model, run_command, run_script, small_config, small_run, to_omegaconf

from lightning import make_projections, parse_distill_layers
from wav2vec2 import checkpoint
from wav2vec2.errors import UserError
from wav2vec2.model import with_masks
from wav2vec2.utils.import_fairseq import import_fairseq_model
from wav2vec2.utils.restricted_unpickler import read_foreign_file

# --- payloads --------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function``, which an unpickler makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class CallByProtocol(Call):
    """The same, for picklers that ask with their protocol."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
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
    "os.system by __reduce_ex__": lambda marker: CallByProtocol(os.system, f"touch {marker}"),
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


# --- files -----------------------------------------------------------------------------------------


def model_contents() -> dict[str, Any]:
    model = random_model(small_config("hubert"))
    return {"state_dict": model.state_dict(), "config": model.config}


def training_contents() -> dict[str, Any]:
    """What a Lightning checkpoint of distill.py holds, as far as it is read."""
    model = random_model(with_masks(small_config("hubert"), ["interm"]))
    return {
        "epoch": 0,
        "global_step": 4,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"student_model.{key}": value for key, value in model.state_dict().items()},
        "loops": {},
        "callbacks": {},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [],
        "distillation": {},
    }


def fairseq_contents() -> dict[str, Any]:
    contents = read_foreign_file(FIXTURES / "fairseq/hubert_base/checkpoint.pt")
    return {key: contents[key] for key in ("cfg", "model")}


def placed(contents: dict[str, Any], place: str, payload: Any) -> dict[str, Any]:
    """``contents`` with the payload at ``place``: names of nested entries, joined by dots."""
    *outer, last = place.split(".")
    inner = contents
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = payload
    return contents


def write_pickle(contents: Any, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(contents, protocol=protocol))


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "zip, protocol 4": functools.partial(torch.save, pickle_protocol=4),
    "older format": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": write_pickle,
    "pickle, protocol 0": functools.partial(write_pickle, protocol=0),
    "pickle, protocol 5": functools.partial(write_pickle, protocol=5),
}

READERS: dict[str, Callable[[Path], Any]] = {
    "load_model": checkpoint.load_model,
    "read": checkpoint.read,
    "import_fairseq_model": import_fairseq_model,
}


def one_line(error: UserError, path: Path) -> str:
    message = str(error)
    assert str(path) in message and "\n" not in message and message.isprintable(), message
    return message


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_not_run(payload: str, tmp_path: Path) -> None:
    """In every format, by every reader; a plain unpickler runs each of them."""
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    for contents in (model_contents(), training_contents(), fairseq_contents()):
        contents["extra"] = PAYLOADS[payload](marker)
        for write in FORMATS.values():
            write(contents, path)
            for reader in READERS.values():
                with pytest.raises(UserError) as error:
                    reader(path)
                one_line(error.value, path)
                assert not marker.exists()
    torch.save(PAYLOADS[payload](marker), path)
    try:
        torch.load(path, weights_only=False)
    except Exception:
        assert marker.exists()
    assert marker.exists(), "the payload is harmless, and the test shows nothing"


PLACES = {
    "a model file": (
        model_contents,
        ["extra", "state_dict.encoder.transformer.layer_norm.weight", "config.encoder_dropout", "distill_linear_projs"],
    ),
    "a training checkpoint": (
        training_contents,
        ["state_dict.extra", "optimizer_states", "callbacks.extra", "hyper_parameters.extra", "loops", "distillation"],
    ),
    "a fairseq checkpoint": (
        fairseq_contents,
        ["cfg", "args", "cfg.model", "cfg.task.normalize", "model.extra", "optimizer_history", "last_optimizer_state"],
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_payloads_are_not_run_wherever_they_are(kind: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    make, places = PLACES[kind]
    for place in places:
        contents = placed(make(), place, touch(marker))
        for write in (FORMATS["zip"], FORMATS["older format"]):
            write(contents, path)
            for reader in READERS.values():
                with pytest.raises(UserError, match=r"asks for posix\.system") as error:
                    reader(path)
                one_line(error.value, path)
                assert not marker.exists()


def test_payloads_in_stand_ins(tmp_path: Path, omegaconf_classes: dict[str, type]) -> None:
    """Nested in what the fairseq reader lets through: Namespace, omegaconf's containers, defaultdict."""
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "marker"
    for payload in PAYLOADS.values():
        poison = payload(marker)
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
        ):
            torch.save({"cfg": settings, "model": {}}, path)
            with pytest.raises(UserError, match=r"asks for|damaged, or not a checkpoint") as error:
                import_fairseq_model(path)
            one_line(error.value, path)
            assert not marker.exists()


def test_allowed_names_do_nothing_by_themselves(tmp_path: Path) -> None:
    """What the readers may call cannot be led to call something else, nor to set attributes of shared classes."""
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "marker"
    # GLOBAL argparse.Namespace, BUILD with a dict: on the class itself, not on an instance.
    on_class = b"\x80\x02cargparse\nNamespace\n}X\x05\x00\x00\x00stateK\x01sb."
    # A codec that decodes code.
    codec = Call(__import__("_codecs").encode, "print(1)", "rot13")
    for contents in (on_class, pickle.dumps(codec, protocol=2), pickle.dumps(Call(int, "9" * 5000), protocol=2)):
        path.write_bytes(contents)
        with pytest.raises(UserError) as error:
            import_fairseq_model(path)
        one_line(error.value, path)
    assert not marker.exists()


# --- entry points ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tsv_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of a few seconds of noise."""
    root = tmp_path_factory.mktemp("corpus")
    samples = 0.1 * np.random.default_rng(0).standard_normal(40_000)
    for split, count in (("train100", 4), ("valid", 2)):
        rows = [f"{split}-{number}.wav\t{len(samples)}" for number in range(count)]
        for row in rows:
            soundfile.write(root / row.split("\t")[0], samples, 16_000)
        (root / f"{split}.tsv").write_text("\n".join([str(root), *rows]))
    return root


def good_files(folder: Path) -> SimpleNamespace:
    """Files that the scripts accept, for the options that are not under test."""
    files = SimpleNamespace(teacher=folder / "teacher.pth", last=folder / "exp" / "ckpts" / "last.ckpt", out=folder)
    files.pruned = files.last.with_name("pruned_hubert_base.pth")
    files.final = folder / "exp" / "final" / "ckpts" / "pruned_hubert_base.pth"
    model = model_contents()
    checkpoint.save(files.teacher, model)
    checkpoint.save(files.last, training_contents() | {"distillation": {"target_sparsity": 0.5}})
    for path in (files.pruned, files.final):
        projections = make_projections("layer2layer", parse_distill_layers("0.1,3"), 16, 16)
        checkpoint.save(path, model | {"distill_linear_projs": projections.state_dict()})
    files.student = {"distill": files.teacher, "final_distill": files.pruned}
    return files


Command = tuple[str, list[object]]

# "script --option" -> the command with ``hostile`` for that option.
ENTRY_POINTS: dict[str, Callable[[SimpleNamespace, Path], Command]] = {
    **{
        f"{script} --{option}": lambda files, hostile, script=script, option=option: (
            script,
            [
                *small_run(
                    files.tsv_dir,
                    files.teacher,
                    **{"student_ckpt": files.student[script], "min_seconds": 1, option: hostile},
                ),
                *("--exp_dir", files.out / "new"),
            ],
        )
        for script in ("distill", "final_distill")
        for option in ("teacher_ckpt", "student_ckpt", "resume_checkpoint")
    },
    "prune --distilled_ckpt": lambda files, hostile: (
        "prune",
        ["--distilled_ckpt", hostile, "--original_ckpt", files.teacher],
    ),
    "prune --original_ckpt": lambda files, hostile: (
        "prune",
        ["--distilled_ckpt", files.last, "--original_ckpt", hostile],
    ),
    "save_final_ckpt --config_path": lambda files, hostile: (
        "save_final_ckpt",
        ["--config_path", hostile, "--ckpt_after_final_distill", files.last],
    ),
    "save_final_ckpt --ckpt_after_final_distill": lambda files, hostile: (
        "save_final_ckpt",
        ["--config_path", files.pruned, "--ckpt_after_final_distill", hostile],
    ),
    "convert_wavlm_from_fairseq --ckpt": lambda files, hostile: (
        "convert_wavlm_from_fairseq",
        ["--ckpt", hostile, "--out", files.out / "new.pth"],
    ),
    "convert_hubert_from_hf --model": lambda files, hostile: (
        "convert_hubert_from_hf",
        ["--model", as_huggingface_model(hostile), "--out", files.out / "new.pth"],
    ),
    "evaluate --teacher": lambda files, hostile: evaluate(files, hostile, files.final),
    "evaluate --models": lambda files, hostile: evaluate(files, files.teacher, hostile),
    "report --teacher_ckpt": lambda files, hostile: report(files, teacher=hostile),
    "report --exp_dir (last.ckpt)": lambda files, hostile: report(files, last=hostile),
    "report --exp_dir (pruned model)": lambda files, hostile: report(files, pruned=hostile),
    "report --exp_dir (final model)": lambda files, hostile: report(files, final=hostile),
}


def as_huggingface_model(weights: Path) -> Path:
    """A model directory whose weights are this file."""
    for name in ("config.json", "preprocessor_config.json"):
        (weights.parent / name).write_bytes((FIXTURES / "hf" / "hubert_base" / name).read_bytes())
    return weights.parent


def evaluate(files: SimpleNamespace, teacher: Path, model: Path) -> Command:
    return "evaluate", [
        *("--teacher", teacher, "--models", model, "--names", "model", "--tsv", files.tsv_dir / "valid.tsv"),
        *("--distill_layers", "0.1,3", "--speed_seconds", 0.1, "--device", "cpu", "--out", files.out / "new.json"),
    ]


def report(files: SimpleNamespace, **hostile: Path) -> Command:
    for name, path in hostile.items():
        getattr(files, name).write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(getattr(files, name))
    return "demo.report", [
        *("--exp_dir", files.last.parents[1], "--teacher_ckpt", files.teacher),
        *("--tsv", files.tsv_dir / "valid.tsv", "--distill_layers", "0.1,3"),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
def write_torchscript(contents: Any, path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def truncated(contents: Any, path: Path) -> None:
    torch.save(contents, path)
    path.write_bytes(path.read_bytes()[:-5000])


def flipped(contents: dict[str, Any], path: Path) -> None:
    """One bit of one weight is another."""
    torch.save(contents, path)
    weight = next(value for value in contents.get("state_dict", contents.get("model", {})).values() if value.numel())
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(data)


def with_payload(place: str, write: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
    return lambda contents, path: write(placed(contents, place, touch(path.parent / "marker")), path)


HOSTILE = {
    "a payload in a zip": with_payload("extra", FORMATS["zip"]),
    "a payload in the older format": with_payload("extra", FORMATS["older format"]),
    "a payload in a bare pickle": with_payload("extra", FORMATS["pickle"]),
    "a payload in its state_dict": with_payload("state_dict.extra", FORMATS["zip"]),
    "a payload in its optimizer states": with_payload("optimizer_states", FORMATS["zip"]),
    "a TorchScript archive": write_torchscript,
    "its end cut off": truncated,
    "one bit of a weight flipped": flipped,
    "an empty file": lambda contents, path: path.write_bytes(b""),
    "a text": lambda contents, path: path.write_text("not a model"),
    "a folder": lambda contents, path: path.mkdir(),
    "another dict": lambda contents, path: torch.save({"weights": torch.zeros(3)}, path),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_entry_points(
    entry_point: str,
    tsv_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 1, one line that names the file, nothing run, nothing written."""
    messages = {}
    for number, (name, write) in enumerate(HOSTILE.items()):
        folder = tmp_path / str(number)
        files = good_files(folder)
        files.tsv_dir = tsv_dir
        if entry_point.startswith("report") and name == "a folder":
            continue
        hostile = folder / "hostile" / "pytorch_model.bin"
        hostile.parent.mkdir()
        trains = any(part in entry_point for part in ("resume", "distilled", "after", "last.ckpt"))
        make = training_contents if trains else fairseq_contents if "convert" in entry_point else model_contents
        write(make(), hostile)
        script, arguments = ENTRY_POINTS[entry_point](files, hostile)
        before = sorted(folder.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run_script(monkeypatch, script, *arguments)
        captured = capsys.readouterr()
        assert stop.value.code == 1
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), (name, captured.err)
        whole_folder = "--model" in entry_point and name in ("a folder", "another dict")
        assert str(hostile.parent if whole_folder else hostile.resolve()) in lines[0], (name, lines[0])
        assert sorted(folder.rglob("*")) == before, name
        messages[name] = lines[0]
    assert not list(tmp_path.rglob("marker"))


def test_real_processes(tmp_path: Path) -> None:
    """Two of them as a user starts them."""
    files, hostile = good_files(tmp_path), tmp_path / "hostile.pt"
    torch.save({"cfg": touch(tmp_path / "marker"), "model": {}}, hostile)
    for entry_point in ("prune --distilled_ckpt", "convert_wavlm_from_fairseq --ckpt"):
        script, arguments = ENTRY_POINTS[entry_point](files, hostile)
        result = run_command(sys.executable, f"{script}.py", *arguments)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"error: {hostile}: ")
    assert not (tmp_path / "marker").exists()


# --- Hugging Face directories ----------------------------------------------------------------------


def edit_json(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


HUGGINGFACE_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.json, not JSON": ("config.json", lambda path: path.write_text("{")),
    "config.json of other bytes": ("config.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
    "config.json, nested without end": ("config.json", lambda path: path.write_text("[" * 100_000)),
    "config.json, a list": ("config.json", lambda path: path.write_text("[]")),
    "config.json, a number of 5,000 digits": (
        "config.json",
        lambda path: path.write_text('{"model_type": "hubert", "hidden_size": ' + "9" * 5000 + "}"),
    ),
    "config.json, conv_dim 7": ("config.json", edit_json(conv_dim=7)),
    "config.json, hidden_size 'wide'": ("config.json", edit_json(hidden_size="wide")),
    "config.json, hidden_size 10^12": ("config.json", edit_json(hidden_size=10**12)),
    "config.json, num_hidden_layers 10^12": ("config.json", edit_json(num_hidden_layers=10**12)),
    "config.json, num_attention_heads null": ("config.json", edit_json(num_attention_heads=None)),
    "config.json, model_type a list": ("config.json", edit_json(model_type=["hubert"])),
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
    "model.safetensors, its end cut off": (
        "model.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
    ),
    "model.safetensors, a pickle": (
        "model.safetensors",
        lambda path: write_pickle(touch(path.parent / "marker"), path),
    ),
}


@pytest.mark.parametrize("case", HUGGINGFACE_FILES)
def test_huggingface_directories(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for source in (FIXTURES / "hf" / "hubert_base").iterdir():
        (directory / source.name).write_bytes(source.read_bytes())
    name, edit = HUGGINGFACE_FILES[case]
    edit(directory / name)
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, "convert_hubert_from_hf", "--model", directory, "--out", tmp_path / "new.pth")
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {directory}")
    assert not (tmp_path / "new.pth").exists() and not (directory / "marker").exists()


# --- damaged files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "older format", "pickle"])
def test_truncated_at_many_lengths(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    for contents in (model_contents(), fairseq_contents()):
        FORMATS[form](contents, path)
        whole = path.read_bytes()
        lengths = {*range(0, 300, 11), *range(0, len(whole), len(whole) // 50), *range(len(whole) - 20, len(whole))}
        for length in sorted(lengths):
            path.write_bytes(whole[:length])
            for reader in READERS.values():
                with pytest.raises(UserError) as error:
                    reader(path)
                one_line(error.value, path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Of any weight, which torch.load alone does not notice, and of the zip's own tables."""
    path = tmp_path / "model.pth"
    contents = model_contents()
    torch.save(contents, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if "/data/" in record.filename and record.file_size]
    for record in records:
        # The record's bytes follow its local header, whose length it says itself, and the padding in it.
        extra = int.from_bytes(whole[record.header_offset + 28 : record.header_offset + 30], "little")
        start = record.header_offset + 30 + len(record.filename) + extra
        damaged = bytearray(whole)
        damaged[start + int(rng.integers(record.file_size))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="Bad CRC-32") as error:
            checkpoint.load_model(path)
        one_line(error.value, path)


def test_records_that_are_not_what_they_claim(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(model_contents(), path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}

    def rewrite(kept: Callable[[str], bool], **options: Any) -> None:
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in records.items():
                if kept(name):
                    archive.writestr(name, data)

    def refused(tried: str) -> None:
        with pytest.raises(UserError):
            checkpoint.load_model(path)

    rewrite(lambda name: True)
    checkpoint.load_model(path)
    rewrite(lambda name: not name.endswith("data.pkl"))
    refused("a zip without its data.pkl")
    rewrite(lambda name: not name.endswith("data/7"))
    refused("a zip without one of its tensors")
    rewrite(lambda name: True, compression=zipfile.ZIP_DEFLATED)
    refused("a zip of compressed records (which could be a bomb)")
    for name in records:
        if name.endswith("data/7"):
            records[name] = records[name][:-4]
    rewrite(lambda name: True)
    refused("a zip with a tensor shorter than it says")


def shared_memory(contents: dict[str, Any]) -> None:
    """All square weights are one."""
    state_dict = contents["state_dict"]
    shared = next(value for key, value in state_dict.items() if key.endswith("k_proj.weight"))
    for key in state_dict:
        if key.endswith("_proj.weight") and state_dict[key].shape == shared.shape:
            state_dict[key] = shared


@pytest.mark.parametrize("claim", ["strides of 0", "one record for many weights"])
def test_shapes_larger_than_the_file(claim: str, tmp_path: Path) -> None:
    """A file of some kB that claims a terabyte is refused before there is memory for it."""
    path, contents = tmp_path / "model.pth", model_contents()
    if claim == "strides of 0":
        contents["config"] |= {"encoder_ff_interm_features": [2**20] * 3}
        for key, value in contents["state_dict"].items():
            if "intermediate_dense" in key or key.endswith("output_dense.weight"):
                shape = [2**20 if size == 20 else size for size in value.shape]
                contents["state_dict"][key] = torch.zeros(1).expand(shape)
    else:
        shared_memory(contents)
    checkpoint.save(path, contents)
    with pytest.raises(UserError, match="more than the numbers stored for it"):
        checkpoint.load_model(path)


def nested_tuples(levels: int, wide: bool) -> bytes:
    """A pickled dict whose key is a tuple in a tuple and so on; a wide one holds each twice."""
    level = b"q\x00h\x00\x86" if wide else b"\x85"
    return b"\x80\x02}K\x01" + level * levels + b"K\x01s."


@pytest.mark.parametrize("wide", [True, False])
def test_endless_nesting(wide: bool, tmp_path: Path) -> None:
    """A few bytes a level, and the hash of the whole would take years, or overflow the stack."""
    path = tmp_path / "model.pth"
    contents = nested_tuples(60 if wide else 1_000_000, wide)
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, contents if name.endswith("data.pkl") else data)
    in_zip = path.read_bytes()
    for data in (in_zip, contents):
        path.write_bytes(data)
        for reader in READERS.values():
            with pytest.raises(UserError, match="a tuple in it is nested") as error:
                reader(path)
            one_line(error.value, path)


def test_files_without_checksums_load(tmp_path: Path) -> None:
    """As torch writes them where it is told to."""
    path, contents = tmp_path / "model.pth", model_contents()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(contents, path)
    finally:
        torch.serialization.set_crc32_options(True)
    state_dict = checkpoint.load_model(path).state_dict()
    assert all(torch.equal(value, contents["state_dict"][key]) for key, value in state_dict.items())


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
