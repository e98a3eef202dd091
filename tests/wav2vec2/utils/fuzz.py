"""Mutated inputs for the readers: ``python tests/fuzz.py --seed 0 --folder FOLDER`` prints what came of them as JSON.

A process of its own, because it limits its memory and watches, with an audit hook, that nothing is run and nothing
written. Every input must end in a UserError or in a valid object, in time; ``test_fuzz.py`` holds it to that.
"""

import argparse
import collections
import copy
import encodings
import json
import pickletools
import random
import resource
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import FIXTURES, small_config

from wav2vec2 import checkpoint
from wav2vec2.config import check_config
from wav2vec2.errors import UserError
from wav2vec2.model import Wav2Vec2Model, wav2vec2_model
from wav2vec2.utils.import_fairseq import _ENCODER_NAMES, _EXTRACTOR_NAMES, import_fairseq_model
from wav2vec2.utils.importing import ImportedModel, source_name

SLOWEST = 2.0  # seconds that one input may take
HANG = 20  # seconds after which one is given up
MORE_MEMORY = 2 * 2**30  # bytes beyond what the process has at its start

FORBIDDEN_EVENTS = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.chmod"}
FORBIDDEN_EVENTS |= {"subprocess.Popen", "pickle.find_class", "ctypes.dlopen", "socket.connect", "pty.spawn"}
IMPORTABLE = (str(Path(torch.__file__).parent), str(Path(encodings.__file__).parent))
WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC


class Hang(BaseException):
    """An input took too long."""


def stop(signum: int, frame: Any) -> None:
    raise Hang


class Watch:
    """Notes every forbidden event while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            forbidden = isinstance(arguments[2], int) and arguments[2] & WRITING
        elif event == "import":  # torch imports some of its parts when they are needed
            forbidden = arguments[0].partition(".")[0] not in ("torch", "encodings")
        elif event == "exec":
            forbidden = not arguments[0].co_filename.startswith(IMPORTABLE)
        else:
            forbidden = event in FORBIDDEN_EVENTS
        if forbidden:
            self.events.append(f"{event} {str(arguments)[:100]}")


# --- seeds -----------------------------------------------------------------------------------------

TINY = {
    "extractor_conv_layer_config": [[4, 10, 5], [4, 3, 2]],
    "encoder_embed_dim": 8,
    "encoder_pos_conv_kernel": 4,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 2,
    "encoder_use_attention": [True] * 2,
    "encoder_use_feed_forward": [True] * 2,
    "encoder_ff_interm_features": [6] * 2,
}
TINY_HEADS = {
    "hubert": {"encoder_num_heads": [2] * 2, "encoder_head_dim": 4},
    "wavlm": {"encoder_total_num_heads": [2] * 2, "encoder_remaining_heads": [[0, 1]] * 2},
}


def tiny_config(family: str) -> dict[str, Any]:
    return copy.deepcopy(small_config(family) | TINY | TINY_HEADS[family])


def tiny_model(family: str) -> dict[str, Any]:
    """Contents of a model file."""
    model = wav2vec2_model(**tiny_config(family))
    return {"state_dict": model.state_dict(), "config": model.config}


def tiny_fairseq(family: str, layout: str) -> dict[str, Any]:
    """Contents of a fairseq checkpoint with the settings as ``layout``: "components", "flat" or "namespace"."""
    names = _EXTRACTOR_NAMES["group_norm"] + _ENCODER_NAMES
    state_dict = wav2vec2_model(**tiny_config(family)).state_dict()
    weights = {source_name(key, names): value for key, value in state_dict.items() if not key.endswith("dummy_weight")}
    settings = {
        "conv_feature_layers": "[(4, 10, 5)] + [(4, 3, 2)]",
        "encoder_embed_dim": 8,
        "conv_pos": 4,
        "conv_pos_groups": 2,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_embed_dim": 6,
        "extractor_mode": "default",
        "layer_norm_first": False,
        "normalize": False,
    }
    if family == "wavlm":
        settings |= {"relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": 16, "max_distance": 40}
    else:
        settings |= {"arch": "hubert", "activation_fn": "gelu"}
    if layout == "namespace":
        return {"args": argparse.Namespace(**settings), "model": weights}
    return {"cfg": {"model": settings, "task": settings} if layout == "components" else settings, "model": weights}


def write_seeds(folder: Path) -> dict[str, list[bytes]]:
    """Valid files by kind."""

    def saved(contents: Any, **options: Any) -> bytes:
        torch.save(contents, folder / "seed", **options)
        return (folder / "seed").read_bytes()

    fairseq = [tiny_fairseq("hubert", "components"), tiny_fairseq("hubert", "namespace"), tiny_fairseq("wavlm", "flat")]
    models = [tiny_model("hubert"), tiny_model("wavlm")]
    older = {"_use_new_zipfile_serialization": False}
    return {
        "fairseq": [saved(contents) for contents in fairseq] + [saved(fairseq[0], **older)],
        "published fairseq": [path.read_bytes() for path in sorted(FIXTURES.glob("*/*/checkpoint.pt"))],
        "model": [saved(contents) for contents in models] + [saved(models[0], **older)],
    }


# --- mutations -------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to four small changes, or one large one."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(len(data))
        end = min(len(data), at + rng.choice((1, 2, 8, 100, 5000)))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end]
            case 5:
                del data[at:]
            case 6:
                data[at:] = other[rng.randrange(len(other)) :]
    return bytes(data)


NAMES = [
    *("posix system", "builtins eval", "builtins exec", "builtins getattr", "torch load", "argparse Namespace"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_nested_tensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass"),
    *("torch._utils _rebuild_parameter_with_state", "torch._tensor _rebuild_from_type_v2", "torch Tensor"),
    *("torch._utils _rebuild_device_tensor_from_cpu_tensor", "torch._utils _rebuild_device_tensor_from_numpy"),
    *("torch FloatStorage", "torch DoubleStorage", "torch.storage UntypedStorage", "torch.nn.parameter Parameter"),
    *("torch Size", "torch device", "collections OrderedDict", "collections Counter", "collections defaultdict"),
    *("_codecs encode", "builtins bytearray", "builtins set", "builtins int", "builtins list", "builtins dict"),
    *("omegaconf.dictconfig DictConfig", "omegaconf.nodes AnyNode", "typing Any", "torch float32", "torch bfloat16"),
]
OPERATIONS = [b"R", b"b", b"\x81", b"s", b"u", b"a", b"e", b"(", b"t", b"\x85", b"\x86", b"\x87", b"N", b"]", b"}"]
OPERATIONS += [b")", b"0", b"2", b"Q", b".", b"\x8f", b"\x88", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"K\x00"]
OPERATIONS += [b"G\x7f\xf8" + bytes(6), b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"X\x01\x00\x00\x00a", b"h\x00", b"h\x01"]


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """A few operations deleted, doubled, exchanged or replaced; numbers, strings and names changed."""
    starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    operations = [data[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(operations)), rng.randrange(len(operations))
        match rng.randrange(8):
            case 0:
                del operations[at]
            case 1:
                operations.insert(at, operations[other])
            case 2:
                operations[at], operations[other] = operations[other], operations[at]
            case 3:
                operations[at] = rng.choice(OPERATIONS)
            case 4:
                operations.insert(at, rng.choice(OPERATIONS))
            case 5:
                name = rng.choice(NAMES).replace(" ", "\n")
                places = [i for i, operation in enumerate(operations) if operation.startswith(b"c")] or [at]
                operations[rng.choice(places)] = f"c{name}\n".encode()
            case 6:
                places = [i for i, operation in enumerate(operations) if operation[:1] in b"KMJ"] or [at]
                number = rng.choice((0, 1, 2, 7, 255, 65_536, 2**31 - 1, -1, -(2**31)))
                operations[rng.choice(places)] = b"J" + number.to_bytes(4, "little", signed=True)
            case 7:
                places = [i for i, operation in enumerate(operations) if operation[:1] == b"X"] or [at]
                operations[rng.choice(places)] = operations[rng.choice(places)]
        if not operations:
            break
    return b"".join(operations)


def mutate_archive(rng: random.Random, path: Path, data: bytes) -> None:
    """Write the archive ``data`` anew to ``path``, its pickle or another record mutated, checksums right."""
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    chosen = rng.randrange(len(records)) if rng.random() < 0.2 else 0
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubled names
        for number, (name, contents) in enumerate(records):
            if name.endswith("data.pkl") and (chosen == 0 or number == chosen):
                contents = mutate_pickle(rng, contents)
            elif number == chosen:
                contents = mutate_bytes(rng, contents or b"0", records[0][1])
                if rng.random() < 0.3:
                    name = rng.choice(records)[0]
            archive.writestr(name, contents)


def endless() -> Any:
    """A list of a few kB whose text would not fit into any memory."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


def strange_values(rng: random.Random) -> list[Any]:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return [
        *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 10**12, -(10**12), 2**63, 10**600, 0.0, 0.5, 1.0, 1.5, -0.1),
        *(float("nan"), float("inf"), "", "8", "group_norm", "layer_norm", "gelu", "x" * 10_000, "\x1b[2J\n", "\ud800"),
        *([], [1], [1, 2], [[1, 2, 3]], [[10, 10, 5]] * 70, [None, None], ["a", "b"], [True, False], [1.0, 2.0]),
        *([[0], [1]], [[0, 1], [1, 0]], [[0, 5], []], (), (1, 2), {}, {"a": 1}, b"bytes", {1, 2}),
        *(torch.zeros(2), torch.tensor(1), torch.zeros(0), collections.OrderedDict(a=1), cyclic, endless()),
        "[" + "(" * rng.randint(1, 300),
        rng.randint(-(2**40), 2**40),
    ]


def mutate_dict(rng: random.Random, settings: dict[Any, Any]) -> dict[Any, Any]:
    """A few keys dropped, added or given other values."""
    settings = copy.copy(settings)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*settings]) if settings else "a"
        value = settings.get(key)
        match rng.randrange(8):
            case 0:
                settings.pop(key, None)
            case 1:
                settings[rng.choice(("extra", "", 5, None, ("a", 1), "encoder_speed\n"))] = 1
            case 2 if isinstance(value, list) and value:
                settings[key] = [*value]
                settings[key][rng.randrange(len(value))] = rng.choice(strange_values(rng))
            case 3 if isinstance(value, list) and value:
                settings[key] = value[:-1] if rng.random() < 0.5 else value * 2
            case 4 if type(value) is int:
                settings[key] = value + rng.choice((-1, 1, 2, -value, value))
            case 5 if isinstance(value, list) and all(type(entry) is int for entry in value):
                settings[key] = [entry + rng.choice((-1, 0, 0, 1)) for entry in value]
            case 6 if isinstance(value, str):
                settings[key] = mutate_bytes(rng, value.encode(errors="replace") or b"a", b"a").decode(errors="replace")
            case _:
                settings[key] = rng.choice(strange_values(rng))
    return settings


def mutate_weights(rng: random.Random, weights: dict[str, Any]) -> dict[str, Any]:
    weights = dict(weights)
    key = rng.choice([*weights])
    value = weights[key]
    strange = [
        *(value.long(), value.double(), value.half(), value.bool(), value.to(torch.complex64), value.flatten()),
        *(value[None], value[:0], value * torch.nan, torch.zeros(()).expand(value.shape), value.to("meta")),
        *(value.to_sparse(), torch.nn.Parameter(value), torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)),
        *(value.expand(3, *value.shape), value.to(torch.float8_e4m3fn), torch.zeros(1).expand(2**20, 2**20)),
        *strange_values(rng),
    ]
    if rng.random() < 0.2:
        del weights[key]
    elif rng.random() < 0.2:
        weights[rng.choice(("extra", key + ".x", 5))] = value
    else:
        weights[key] = rng.choice(strange)
    return weights


# --- one input -------------------------------------------------------------------------------------


def check_import(path: Path) -> None:
    imported = import_fairseq_model(path)
    assert isinstance(imported, ImportedModel)
    check_config(imported.config)
    check_runs(imported.model)


def check_model_file(path: Path) -> None:
    model = checkpoint.load_model(path)
    assert isinstance(model, Wav2Vec2Model)
    check_runs(model.eval())


def check_built(config: dict[Any, Any]) -> None:
    """A config that is accepted has a model; a small one runs, and its config builds the same model again."""
    state_dict = checkpoint.expected_state(config, "config")
    if sum(value.numel() for value in state_dict.values()) < 100_000:
        model = checkpoint.build_model(config, "config").eval()
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: value.shape for key, value in state_dict.items()
        }
        check_config(model.config)
        check_runs(model)


@torch.inference_mode()
def check_runs(model: Wav2Vec2Model) -> None:
    assert all(value.device.type == "cpu" and torch.isfinite(value).all() for value in model.state_dict().values())
    hidden, _ = model.extract_features(torch.zeros(1, 300))
    assert hidden[-1].size(-1) == model.config["encoder_embed_dim"]


Work = Callable[[], Callable[[], None]]
"""Makes one mutated input and returns what reads it."""


def make_kinds(rng: random.Random, seeds: dict[str, list[bytes]], path: Path) -> dict[str, tuple[int, Work]]:
    """Name -> (how many inputs, one of them)."""
    fairseq = [("hubert", "components"), ("hubert", "namespace"), ("wavlm", "flat")]
    fairseq_contents = [tiny_fairseq(*options) for options in fairseq]
    model_contents = [tiny_model("hubert"), tiny_model("wavlm")]

    def from_bytes(kind: str, check: Callable[[Path], None]) -> Work:
        def work() -> Callable[[], None]:
            path.write_bytes(mutate_bytes(rng, rng.choice(seeds[kind]), rng.choice(seeds[kind])))
            return lambda: check(path)

        return work

    def from_archive(kind: str, check: Callable[[Path], None]) -> Work:
        def work() -> Callable[[], None]:
            mutate_archive(rng, path, rng.choice([seed for seed in seeds[kind] if seed.startswith(b"PK")]))
            return lambda: check(path)

        return work

    def fairseq_settings() -> Callable[[], None]:
        contents = dict(rng.choice(fairseq_contents))
        if "args" in contents:
            contents["args"] = argparse.Namespace()
            contents["args"].__dict__.update(mutate_dict(rng, vars(fairseq_contents[1]["args"])))
        elif "model" in contents["cfg"]:
            contents["cfg"] = contents["cfg"] | {"model": mutate_dict(rng, contents["cfg"]["model"])}
        else:
            contents["cfg"] = mutate_dict(rng, contents["cfg"])
        if rng.random() < 0.1:
            contents = mutate_dict(rng, contents)
        torch.save(contents, path)
        return lambda: check_import(path)

    def weights(kind: list[dict[str, Any]], entry: str, check: Callable[[Path], None]) -> Work:
        def work() -> Callable[[], None]:
            contents = dict(rng.choice(kind))
            torch.save(contents | {entry: mutate_weights(rng, contents[entry])}, path)
            return lambda: check(path)

        return work

    def config_in_file() -> Callable[[], None]:
        contents = dict(rng.choice(model_contents))
        torch.save(contents | {"config": mutate_dict(rng, contents["config"])}, path)
        return lambda: check_model_file(path)

    def config() -> Callable[[], None]:
        mutated = mutate_dict(rng, tiny_config(rng.choice(("hubert", "wavlm"))))
        return lambda: check_built(mutated)

    return {
        "fairseq reader, bytes": (2000, from_bytes("fairseq", check_import)),
        "fairseq reader, bytes of the stored fixtures": (200, from_bytes("published fairseq", check_import)),
        "fairseq reader, pickle operations and records": (600, from_archive("fairseq", check_import)),
        "fairseq reader, settings": (450, fairseq_settings),
        "fairseq reader, weights": (150, weights(fairseq_contents, "model", check_import)),
        "config reader": (5000, config),
        "model reader, configs": (200, config_in_file),
        "model reader, bytes": (1800, from_bytes("model", check_model_file)),
        "model reader, pickle operations and records": (300, from_archive("model", check_model_file)),
        "model reader, weights": (150, weights(model_contents, "state_dict", check_model_file)),
    }


def run(read: Callable[[], None], watch: Watch) -> tuple[str, str]:
    """The outcome of one input, "loaded", "refused" or "failed", and the message."""
    start = time.perf_counter()
    signal.alarm(HANG)
    watch.on = True
    try:
        read()
        outcome = "loaded", ""
    except UserError as error:
        message = str(error)
        fine = "\n" not in message and len(message) < 1500 and message.isprintable()
        outcome = ("refused" if fine else "failed"), message[:2000]
    except BaseException as error:
        outcome = "failed", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        watch.on = False
        signal.alarm(0)
    seconds = time.perf_counter() - start
    return outcome if seconds < SLOWEST else ("failed", f"took {seconds:.1f} s: {outcome}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1, help="times as many inputs of every kind")
    parser.add_argument("--folder", type=Path, required=True, help="for temporary files; inputs that fail stay here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    warnings.simplefilter("ignore")
    rng, path = random.Random(args.seed), args.folder / "input"
    seeds = write_seeds(args.folder)
    for kind, check in (("fairseq", check_import), ("model", check_model_file)):
        for seed in seeds[kind]:  # they are valid, and whatever is imported on first use is imported now
            path.write_bytes(seed)
            check(path)
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory + MORE_MEMORY,) * 2)
    signal.signal(signal.SIGALRM, stop)

    watch, counts, failures = Watch(), {}, []
    for kind, (number, make) in make_kinds(rng, seeds, path).items():
        counts[kind] = collections.Counter()
        start = time.perf_counter()
        for index in range(round(number * args.scale)):
            read = make()
            outcome, message = run(read, watch)
            if watch.events:
                outcome, message = "failed", f"did {watch.events}"
                watch.events.clear()
            counts[kind][outcome] += 1
            if outcome == "failed":
                failures.append(f"{kind} {index}: {message}")
                if kind != "config reader":
                    (args.folder / f"failed-{len(failures)}").write_bytes(path.read_bytes())
        counts[kind]["seconds"] = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"counts": counts, "failures": failures, "peak_mib": peak}))


if __name__ == "__main__":
    main()
