"""Model folders: those of export.py, in each of its forms, are read back or refused, and come from the hub."""

import http.server
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import (
    TASK_HEADS,
    TRAINING_PACKAGES,
    head_id,
    random_model,
    random_waveforms,
    run_without,
    small_config,
    task_contents,
    write_hub_folder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import wav2vec2
from exporters.huggingface import export_huggingface
from wav2vec2.files import checkpoint, hub
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import contents_of, head_of, model_with_its_head
from wav2vec2.files.storage import read_json


def pruned_contents(family: str = "wavlm", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    heads = {"encoder_remaining_heads": [[1, 3], [], [2]]} if family == "wavlm" else {"encoder_num_heads": [2, 0, 1]}
    config = small_config(
        family,
        "large",
        encoder_use_attention=[True, False, True],
        encoder_use_feed_forward=[False, True, True],
        encoder_ff_interm_features=[0, 7, 0],
        **heads,
    )
    return contents_of(random_model(config).to(dtype))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same config, head and weights, bit for bit in the same precision."""
    assert found.keys() == wanted.keys() and found["config"] == wanted["config"]
    assert head_of(found, "found") == head_of(wanted, "wanted")
    for place in ("state_dict", "head"):
        weights = [x.get("head", {}).get("state_dict", {}) if place == "head" else x[place] for x in (found, wanted)]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[1].items():
            assert weights[0][name].dtype == tensor.dtype and torch.equal(weights[0][name], tensor), name


@pytest.mark.parametrize(
    ("family", "dtype"), [("wavlm", dtype) for dtype in checkpoint.FLOAT_DTYPES] + [("hubert", torch.float32)]
)
def test_folder_with_its_own_code(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In every precision, blocks without any width too."""
    contents = pruned_contents(family, dtype)
    assert export_huggingface(contents, tmp_path / "new" / "folder") == hub.OWN_TYPE
    assert_same(checkpoint.read_model_file(tmp_path / "new" / "folder"), contents)


@pytest.mark.parametrize(("family", "size"), [("hubert", "base"), ("hubert", "large"), ("wavlm", "base")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folder_in_transformers_format(family: str, size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    contents = contents_of(random_model(small_config(family, size)).to(dtype))
    contents["state_dict"]["feature_extractor.dummy_weight"].fill_(1)
    assert export_huggingface(contents, tmp_path) == family
    assert_same(checkpoint.read_model_file(tmp_path), contents)


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
@pytest.mark.parametrize("is_known", [False, True])
def test_head_of_a_folder(head: Any, is_known: bool, tmp_path: Path) -> None:
    """With its own code or, if transformers knows the model, in its format; what it gives is what the file gives."""
    contents = task_contents(head)
    if is_known:
        contents["state_dict"]["feature_extractor.dummy_weight"].fill_(1)
    assert export_huggingface(contents, tmp_path) == ("hubert" if is_known and head.kind == "text" else hub.OWN_TYPE)
    assert_same(checkpoint.read_model_file(tmp_path), contents)
    waveforms, lengths = random_waveforms(900, 500)
    model = model_with_its_head(contents, "model.pth").eval()
    assert torch.equal(wav2vec2.load(tmp_path)(waveforms, lengths)[0], model(waveforms, lengths)[0])


def test_folder_of_version_1(tmp_path: Path) -> None:
    """``--formats hub`` wrote published names, and our config as config.json."""
    for name, contents in (("plain", pruned_contents()), ("head", task_contents(TASK_HEADS[5]))):
        write_hub_folder(tmp_path / name, contents)
        assert_same(checkpoint.read_model_file(tmp_path / name), contents)


def edit_config(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def update_config(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config.update(changes))


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors")

    return change


def update_weights(**changes: Tensor) -> Callable[[Path], None]:
    return edit_weights(lambda weights: weights.update(changes))


def write(name: str, contents: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(contents)


NORM = "encoder.transformer.layer_norm.weight"
OWN_NORM, THEIR_NORM = f"network.{NORM}", "encoder.layer_norm.weight"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DAMAGES = {
    "version 1": [
        (lambda folder: (folder / CONFIG).unlink(), "config.json: no such file; expected a folder with"),
        (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors: no such file; expected a folder"),
        (write(CONFIG, b"{"), "config.json: not readable as JSON"),
        (write(CONFIG, b"[" * 10**5), "config.json: not readable as JSON"),
        (write(CONFIG, b"\xff\xfe{}"), "config.json: not readable as JSON"),
        (write(CONFIG, b"[1]"), "config.json: expected a JSON object, found list"),
        (write(WEIGHTS, b"\xff" * 99), "not readable as safetensors"),
        (write(WEIGHTS, b""), "not readable as safetensors"),
        (edit_config(lambda config: config.pop("encoder_embed_dim")), "missing key encoder_embed_dim"),
        (update_config(extra=1), "unknown key extra"),
        (update_config(encoder_embed_dim=2**19), "weights do not fit the model"),
        (update_config(encoder_dropout=float("nan")), "encoder_dropout: expected a number"),
        (update_config(model_type="hubert"), "transformers' format .* convert_hubert_from"),
        (edit_weights(lambda weights: weights.pop(NORM)), rf"1 missing \({NORM}\)"),
        (update_weights(extra=torch.ones(2)), r"1 left over \(extra\)"),
        (update_weights(**{NORM: torch.ones(17)}), r"has shape \[17\], expected \[16\]"),
        (edit_weights(lambda weights: weights[NORM].fill_(torch.nan)), "holds NaN"),
        (update_weights(**{NORM: torch.ones(16).long()}), "is torch.int64, .*expected"),
    ],
    "own": [
        (edit_weights(lambda weights: weights.pop(OWN_NORM)), rf"1 missing \({NORM}\)"),
        (update_weights(**{NORM: torch.ones(16)}), "two tensors for one weight"),
        (update_weights(extra=torch.ones(2)), r"1 left over \(extra\)"),
        (edit_config(lambda config: config.pop("encoder_embed_dim")), "missing key encoder_embed_dim"),
    ],
    "theirs": [
        (edit_weights(lambda weights: weights.pop(THEIR_NORM)), rf"1 missing \({NORM}\)"),
        (update_weights(masked_spec_embed=torch.ones(16)), r"1 left over \(masked_spec_embed\)"),
        (edit_weights(lambda weights: weights.pop("feature_projection.projection.weight")), "2 missing"),
        (edit_config(lambda config: config.pop("dphubert")), "transformers' format .* convert_hubert_from"),
    ],
}


@pytest.mark.parametrize(
    ("form", "damage", "message"), [(form, *damage) for form, damages in DAMAGES.items() for damage in damages]
)
def test_refused_folders(form: str, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    if form == "version 1":
        write_hub_folder(tmp_path, pruned_contents())
    else:
        contents = pruned_contents() if form == "own" else contents_of(random_model(small_config("hubert")))
        if form == "theirs":
            contents["state_dict"]["feature_extractor.dummy_weight"].fill_(1)
        export_huggingface(contents, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.read_model_file(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


class Hub:
    """Takes the place of huggingface_hub's calls to its server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[dict[str, Any]] = []

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append({"repo_id": repo_id, **options})
        return str(self.root / repo_id)

    def hf_hub_download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.asked.append({"repo_id": repo_id, "filename": filename, **options})
        if not (self.root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such entry")
        return str(self.root / repo_id / filename)

    def list_repo_files(self, repo_id: str, **_options: Any) -> list[str]:
        return [*sorted(file.name for file in (self.root / repo_id).iterdir()), "README.md", ".gitattributes"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    server = Hub(tmp_path / "server")
    for name in ("snapshot_download", "hf_hub_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, getattr(server, name))
    return server


def test_json_of_an_editor_on_windows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n1}\r\n')
    assert read_json(tmp_path / "a.json", "settings") == {"a": 1}


def test_download(server: Hub) -> None:
    contents = pruned_contents()
    export_huggingface(contents, server.root / "someone/small")
    loaded = wav2vec2.load("someone/small", revision="v1")
    assert loaded.config == contents["config"]
    files = ["model.safetensors", "config.json", "README.md"]
    assert server.asked == [{"repo_id": "someone/small", "revision": "v1", "allow_patterns": files}]


def test_repository_of_model_files(server: Hub, tmp_path: Path) -> None:
    """As the published models are: files, and no config.json."""
    contents = pruned_contents()
    for name in ("pruned-sp0.75.pth", "pruned-sp0.80.pth"):
        checkpoint.save(server.root / "someone/pruned" / name, contents)
    loaded = wav2vec2.load("someone/pruned", filename="pruned-sp0.75.pth", revision="v1")
    assert server.asked == [{"repo_id": "someone/pruned", "filename": "pruned-sp0.75.pth", "revision": "v1"}]
    assert_same(contents_of(loaded), contents)
    with pytest.raises(UserError, match=r"someone/pruned.* config.json, 2 model files .*sp0.80.*, filename="):
        wav2vec2.load("someone/pruned")
    with pytest.raises(UserError, match=r"someone/pruned, file other.pth: the Hugging Face hub did not give it"):
        wav2vec2.load("someone/pruned", filename="other.pth")

    folder = server.root / "someone/pruned"
    assert_same(contents_of(wav2vec2.load(folder, filename="pruned-sp0.80.pth")), contents)
    with pytest.raises(UserError, match=r"without config.json, 2 model files \(pruned-sp0.75.pth, .*give one of them"):
        wav2vec2.load(folder)


@pytest.mark.parametrize("name", ["someone/small", "not a name", "a/b/c"])
def test_download_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network nothing comes from the hub: huggingface_hub's own offline switch and name check."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"{name}.*the Hugging Face hub did not give it .*check the name") as error:
        hub.download(name)
    assert "\n" not in str(error.value)


class NotFound(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does about a repository that is not there."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_arguments: Any) -> None:
        pass


def test_hub_answers_that_there_is_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(UserError, match=r"someone/small \(revision v1\): .*RepositoryNotFoundError"):
            hub.download("someone/small", "v1")
        server.shutdown()


def test_download_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub.download("someone/small")


@pytest.mark.slow
def test_loads_without_training_packages(tmp_path: Path) -> None:
    """Reading needs torch and safetensors."""
    contents = pruned_contents()
    export_huggingface(contents, tmp_path)
    printed = run_without(
        (*TRAINING_PACKAGES, "huggingface_hub", "exporters"),
        f"import wav2vec2\nmodel = wav2vec2.load({str(tmp_path)!r})\n"
        "print(sum(float(w.double().sum()) for w in model.state_dict().values()))",
    )
    wanted: list[Tensor] = list(contents["state_dict"].values())
    assert float(printed) == pytest.approx(sum(float(tensor.double().sum()) for tensor in wanted))
