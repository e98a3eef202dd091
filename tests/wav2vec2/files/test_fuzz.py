"""Mutated files and configs for the readers: each is refused in one line, or loads what is valid, and runs no code.

The seconds per kind of input are few; ``FUZZ_SECONDS=60 FUZZ_SEED=1 pytest tests/wav2vec2/files/test_fuzz.py`` looks
longer and elsewhere.
"""

import argparse
import collections
import copy
import os
import pickletools
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config

from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import wav2vec2_model
from wav2vec2.utils.import_fairseq import _ENCODER_NAMES, _EXTRACTOR_NAMES, import_fairseq_model
from wav2vec2.utils.importing import source_name

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0.7))  # per kind of input
SEED = int(os.environ.get("FUZZ_SEED", 0))
SLOWEST = 5.0  # seconds of processor time that one input may take
FORBIDDEN_EVENTS = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}


class Watch:
    """Notes forbidden audit events while it is on; an audit hook cannot be taken away again."""

    on = False
    events: list[str] = []  # noqa: RUF012


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if Watch.on and event in FORBIDDEN_EVENTS:
        Watch.events.append(f"{event} {str(arguments)[:100]}")


@pytest.fixture
def watch() -> Iterator[type[Watch]]:
    if not hasattr(Watch, "hooked"):
        sys.addaudithook(_hook)
        Watch.hooked = True
    yield Watch
    Watch.on = False


# --- seeds -----------------------------------------------------------------------------------------


def tiny_config() -> dict[str, Any]:
    return small_config("hubert") | {
        "extractor_conv_layer_config": [[4, 10, 5], [4, 3, 2]],
        "encoder_embed_dim": 8,
        "encoder_pos_conv_kernel": 4,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_use_attention": [True] * 2,
        "encoder_use_feed_forward": [True] * 2,
        "encoder_ff_interm_features": [6] * 2,
        "encoder_num_heads": [2] * 2,
        "encoder_head_dim": 4,
    }


def model_contents() -> dict[str, Any]:
    model = wav2vec2_model(**tiny_config())
    return {"state_dict": model.state_dict(), "config": model.config}


def fairseq_contents() -> dict[str, Any]:
    names = _EXTRACTOR_NAMES["group_norm"] + _ENCODER_NAMES
    state_dict = wav2vec2_model(**tiny_config()).state_dict()
    settings = {
        "arch": "hubert",
        "conv_feature_layers": "[(4, 10, 5)] + [(4, 3, 2)]",
        "encoder_embed_dim": 8,
        "conv_pos": 4,
        "conv_pos_groups": 2,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_embed_dim": 6,
        "normalize": False,
    }
    return {
        "args": argparse.Namespace(**settings),
        "model": {source_name(key, names): value for key, value in state_dict.items() if "dummy_weight" not in key},
    }


# --- mutations -------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Make a few small changes, or one large one."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        end = at + rng.choice((1, 2, 8, 100, 5000))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = bytes(len(data[at:end]))
            case 4:
                del data[max(at, 1) : rng.choice((end, len(data)))]
    return bytes(data)


NAMES = ["posix system", "builtins eval", "builtins getattr", "torch load", "argparse Namespace", "typing Any"]
NAMES += ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2"]
NAMES += ["torch FloatStorage", "torch DoubleStorage", "torch Size", "collections OrderedDict", "builtins list"]
NAMES += ["_codecs encode", "omegaconf.nodes AnyNode", "numpy.core.multiarray scalar", "collections defaultdict"]
OPERATIONS = [b"R", b"b", b"\x81", b"s", b"u", b"a", b"e", b"(", b"t", b"\x85", b"\x86", b"N", b"]", b"}", b")", b"0"]
OPERATIONS += [b"Q", b".", b"\x88", b"J\xff\xff\xff\xff", b"K\x00", b"X\x01\x00\x00\x00a", b"h\x00", b"h\x01"]


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """Delete, double, exchange or replace a few operations, and change names."""
    starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    operations = [data[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(operations)), rng.randrange(len(operations))
        match rng.randrange(5):
            case 0:
                operations[at] = b""
            case 1:
                operations.insert(at, operations[other])
            case 2:
                operations[at], operations[other] = operations[other], operations[at]
            case 3:
                operations[at] = rng.choice(OPERATIONS)
            case 4:
                places = [i for i, operation in enumerate(operations) if operation.startswith(b"c")] or [at]
                operations[rng.choice(places)] = b"c" + rng.choice(NAMES).replace(" ", "\n").encode() + b"\n"
    return b"".join(operations)


def mutate_archive(rng: random.Random, path: Path) -> None:
    """Write the archive anew, its pickle mutated, checksums right."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(name, mutate_pickle(rng, contents) if name.endswith("data.pkl") else contents)


def strange_value(rng: random.Random) -> Any:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return rng.choice(
        [
            *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 10**12, -(10**12), 2**63, 10**600, 0.0, 0.5, 1.5, -0.1),
            *(float("nan"), float("inf"), "", "8", "layer_norm", "x" * 10_000, "\x1b[2J\n", "\ud800", "(" * 300),
            *([], [1], [1, 2], [[1, 2, 3]], [[10, 10, 5]] * 70, ["a", "b"], [True, False], [1.0, 2.0], [[0], [1]]),
            *((), {}, {"a": 1}, b"bytes", {1, 2}, torch.zeros(2), torch.tensor(1), cyclic),
            collections.OrderedDict(a=1),
        ]
    )


def mutate_dict(rng: random.Random, settings: dict[Any, Any]) -> dict[Any, Any]:
    """Drop, add or change a few keys."""
    settings = copy.copy(settings)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*settings]) if settings else "a"
        value = settings.get(key)
        match rng.randrange(5):
            case 0:
                settings.pop(key, None)
            case 1:
                settings[rng.choice(("extra", "", 5, None, ("a", 1), "encoder_speed\n"))] = 1
            case 2 if isinstance(value, list):
                settings[key] = value[:-1] if rng.random() < 0.5 else [*value, strange_value(rng)]
            case 3 if type(value) is int:
                settings[key] = value + rng.choice((-1, 1, 2, -value, value))
            case _:
                settings[key] = strange_value(rng)
    return settings


def mutate_weights(rng: random.Random, weights: dict[str, Any]) -> dict[str, Any]:
    key = rng.choice([*weights])
    value = weights[key]
    strange = [
        *(value.long(), value.double(), value.half(), value.to(torch.complex64), value.flatten(), value[:0]),
        *(value * torch.nan, torch.zeros(()).expand(value.shape), value.to("meta"), value.to_sparse()),
        *(torch.nn.Parameter(value), value.to(torch.float8_e4m3fn), torch.zeros(1).expand(2**20, 2**20)),
        strange_value(rng),
    ]
    return weights | {rng.choice((key, key, key, "extra", 5)): rng.choice(strange)}


# --- the test --------------------------------------------------------------------------------------


def check_config(config: dict[Any, Any]) -> None:
    """A config that is accepted has a model; a small one is built."""
    if sum(value.numel() for value in checkpoint.expected_state(config).values()) < 100_000:
        checkpoint.build_model(config)


@torch.inference_mode()
def check_file(read: Callable[[Path], Any], path: Path) -> None:
    loaded = read(path)
    model = getattr(loaded, "model", loaded).eval()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    model.extract_features(torch.zeros(1, 300))


READERS = {
    "model": (checkpoint.load_model, model_contents, "config", "state_dict"),
    "fairseq": (import_fairseq_model, fairseq_contents, "args", "model"),
}
KINDS = [f"{name}, {what}" for name in READERS for what in ("bytes", "older format", "pickle", "settings", "weights")]


def make_input(kind: str, rng: random.Random, path: Path) -> Callable[[], None]:
    """Make one mutated input, and return what reads it."""
    if kind == "config":
        config = mutate_dict(rng, tiny_config())
        return lambda: check_config(config)
    name, what = kind.split(", ")
    read, make, settings, weights = READERS[name]
    contents = make()
    if what == "settings":
        place = contents[settings]
        if isinstance(place, argparse.Namespace):
            contents[settings] = argparse.Namespace()
            contents[settings].__dict__.update(mutate_dict(rng, vars(place)))
        else:
            contents[settings] = mutate_dict(rng, place)
    elif what == "weights":
        contents[weights] = mutate_weights(rng, contents[weights])
    torch.save(contents, path, _use_new_zipfile_serialization=what != "older format")
    if what in ("bytes", "older format"):
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif what == "pickle":
        mutate_archive(rng, path)
    return lambda: check_file(read, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*KINDS, "config"])
def test_mutated_inputs(kind: str, tmp_path: Path, watch: type[Watch]) -> None:
    rng, path = random.Random(f"{SEED} {kind}"), tmp_path / "input"
    end, outcomes = time.monotonic() + SECONDS, collections.Counter()
    while time.monotonic() < end or not outcomes["refused"]:
        read = make_input(kind, rng, path)
        watch.on, start = True, time.process_time()
        try:
            read()
            outcomes["loaded"] += 1
        except UserError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1500 and message.isprintable(), message
            outcomes["refused"] += 1
        finally:
            watch.on = False
        assert time.process_time() - start < SLOWEST, f"input {outcomes.total()}"
        assert not watch.events, f"input {outcomes.total()}: {watch.events}"
