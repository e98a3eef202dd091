"""Model folders as on the Hugging Face hub: written, read, refused, loaded and pushed by huggingface_hub's class."""

import http.server
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import (
    TRAINING_PACKAGES,
    num_elements,
    random_model,
    random_waveforms,
    run_without,
    small_config,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import wav2vec2
from wav2vec2.files import checkpoint, hub
from wav2vec2.files.errors import UserError
from wav2vec2.files.hub import HubModel
from wav2vec2.model import Wav2Vec2Model


def pruned_model(family: str = "wavlm") -> Wav2Vec2Model:
    heads = {"encoder_remaining_heads": [[1, 3], [], [2]]} if family == "wavlm" else {"encoder_num_heads": [2, 0, 1]}
    return random_model(
        small_config(
            family,
            "large",
            encoder_use_attention=[True, False, True],
            encoder_use_feed_forward=[False, True, True],
            encoder_ff_interm_features=[0, 7, 0],
            **heads,
        )
    )


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("family", "dtype"), [("wavlm", dtype) for dtype in checkpoint.FLOAT_DTYPES] + [("hubert", torch.float32)]
)
def test_round_trip(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Published names, the config, and weights bit for bit in every precision, blocks without any width too."""
    model = pruned_model(family).to(dtype)
    hub.save_folder(model, tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["README.md", "config.json", "model.safetensors"]
    assert load_file(tmp_path / "new" / "folder" / "model.safetensors").keys() == model.state_dict().keys()
    assert "encoder.transformer.pos_conv_embed.conv.weight_g" in model.state_dict()
    contents = hub.read_folder(tmp_path / "new" / "folder")
    assert_same_weights(contents["state_dict"], model.state_dict())
    assert contents["config"] == model.config
    loaded = checkpoint.model_of(contents, tmp_path)
    waveforms, lengths = random_waveforms(900, 700)
    with torch.inference_mode():
        wanted, frames = model.float()(waveforms, lengths)
        found, found_frames = loaded.eval()(waveforms, lengths)
    assert torch.equal(found, wanted) and torch.equal(frames, found_frames)


def test_card(tmp_path: Path) -> None:
    """What the model itself tells, with metadata that huggingface_hub reads."""
    model = pruned_model()
    hub.save_folder(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "dphubert"
    assert card.data.pipeline_tag == "feature-extraction"
    assert card.data.license is None
    assert f"| parameters | {num_elements(model):,} |" in card.text
    assert "| 2 | 0 | 7 |" in card.text
    assert "HubModel.from_pretrained" in card.text


def test_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the file before it."""
    hub.save_folder(pruned_model(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        hub.save_folder(pruned_model(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


def edit_config(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors")

    return change


NORM = "encoder.transformer.layer_norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file; expected a folder with"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file; expected a folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "config.json: not readable as JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: not readable as JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: expected a JSON object, found list"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "not readable as safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not readable as safetensors"),
        (edit_config(lambda config: config.pop("encoder_embed_dim")), "missing key encoder_embed_dim"),
        (edit_config(lambda config: config.update(extra=1)), "unknown key extra"),
        (edit_config(lambda config: config.update(encoder_embed_dim=2**19)), "weights do not fit the model"),
        (edit_config(lambda config: config.update(encoder_dropout=float("nan"))), "encoder_dropout: expected a number"),
        (
            edit_config(lambda config: config.update(model_type="hubert")),
            "transformers' format .* convert_hubert_from",
        ),
        (edit_weights(lambda weights: weights.pop(NORM)), rf"1 missing \({NORM}\)"),
        (edit_weights(lambda weights: weights.update(extra=torch.ones(2))), r"1 left over \(extra\)"),
        (edit_weights(lambda weights: weights.update({NORM: torch.ones(17)})), r"has shape \[17\], expected \[16\]"),
        (edit_weights(lambda weights: weights[NORM].fill_(torch.nan)), "holds NaN"),
        (edit_weights(lambda weights: weights.update({NORM: torch.ones(16).long()})), "is torch.int64, expected"),
    ],
)
def test_refused_folders(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    hub.save_folder(pruned_model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        hub.read_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_hub_model(tmp_path: Path) -> None:
    """Built from a config, saved and loaded in half precision, pruned in between."""
    with pytest.raises(UserError, match="unknown key nonsense"):
        HubModel(**small_config("hubert"), nonsense=1)
    model = HubModel(**small_config("hubert", "base", encoder_prune_attention_heads=True))
    with torch.no_grad():
        model.encoder.transformer.layers[1].attention.hard_concrete_for_heads.log_alpha[2] = -10
    model.prune()
    model.half().save_pretrained(tmp_path)
    loaded = HubModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.config["encoder_num_heads"] == [4, 3, 4]
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert isinstance(loaded, Wav2Vec2Model)


def test_hub_model_saves_twice(tmp_path: Path) -> None:
    """The second save replaces the first, card included, whose numbers would be wrong."""
    HubModel(**small_config("hubert")).save_pretrained(tmp_path)
    model = HubModel(**small_config("hubert", encoder_ff_interm_features=[3, 4, 5]))
    model.save_pretrained(tmp_path)
    assert HubModel.from_pretrained(tmp_path).config == model.config
    assert "| 3 | 4 | 5 |" in (tmp_path / "README.md").read_text()


class Hub:
    """Takes the place of huggingface_hub's calls to its server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[dict[str, Any]] = []

    def create_repo(self, _api: Any, repo_id: str, **_options: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, _api: Any, *, repo_id: str, folder_path: Path, **_options: Any) -> str:
        target = self.root / repo_id
        target.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append({"repo_id": repo_id, **options})
        return str(self.root / repo_id)

    def hf_hub_download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.asked.append({"repo_id": repo_id, "filename": filename, **options})
        if not (self.root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such entry")
        return str(self.root / repo_id / filename)

    def list_repo_files(self, _api: Any, repo_id: str, **_options: Any) -> list[str]:
        return [*sorted(file.name for file in (self.root / repo_id).iterdir()), "README.md", ".gitattributes"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    server = Hub(tmp_path / "server")
    for name in ("create_repo", "upload_folder", "list_repo_files"):
        method = getattr(server, name)
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda api, *args, _method=method, **options: _method(api, *args, **options)
        )
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(server, name))
    return server


def test_push_and_pull(server: Hub) -> None:
    model = HubModel(**small_config("wavlm", "large"))
    assert model.push_to_hub("someone/small") == "https://huggingface.co/someone/small/commit/1"
    files = sorted(path.name for path in (server.root / "someone/small").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    loaded = HubModel.from_pretrained("someone/small", revision="v1", token="secret")
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert server.asked == [
        {
            "repo_id": "someone/small",
            "revision": "v1",
            "allow_patterns": ["model.safetensors", "config.json", "README.md"],
            "token": "secret",
        }
    ]
    hub.download("someone/small", allow_patterns=["*.json"])
    assert server.asked[-1]["allow_patterns"] == ["*.json"]


def test_repository_of_model_files(server: Hub, tmp_path: Path) -> None:
    """As the published models are: files, and no config.json."""
    model = pruned_model()
    for name in ("pruned-sp0.75.pth", "pruned-sp0.80.pth"):
        checkpoint.save(
            server.root / "someone/pruned" / name, {"state_dict": model.state_dict(), "config": model.config}
        )
    loaded = wav2vec2.load("someone/pruned", filename="pruned-sp0.75.pth", revision="v1")
    assert server.asked == [{"repo_id": "someone/pruned", "filename": "pruned-sp0.75.pth", "revision": "v1"}]
    assert_same_weights(loaded.state_dict(), model.state_dict())
    for load in (wav2vec2.load, HubModel.from_pretrained):
        with pytest.raises(UserError, match=r"someone/pruned.* config.json, 2 model files .*sp0.80.*, filename="):
            load("someone/pruned")
    with pytest.raises(UserError, match=r"someone/pruned, file other.pth: the Hugging Face hub did not give it"):
        wav2vec2.load("someone/pruned", filename="other.pth")

    folder = server.root / "someone/pruned"
    assert_same_weights(wav2vec2.load(folder, filename="pruned-sp0.80.pth").state_dict(), model.state_dict())
    with pytest.raises(UserError, match=r"without config.json, 2 model files \(pruned-sp0.75.pth, .*give one of them"):
        wav2vec2.load(folder)


@pytest.mark.parametrize("name", ["someone/small", "not a name", "a/b/c"])
def test_download_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network nothing comes from the hub: huggingface_hub's own offline switch and name check."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"{name}.*the Hugging Face hub did not give it .*check the name") as error:
        hub.download(name, cache_dir=tmp_path)
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


def test_hub_answers_that_there_is_no_such_model(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=r"someone/small \(revision v1\): .*RepositoryNotFoundError"):
            hub.download("someone/small", "v1", endpoint=endpoint, cache_dir=tmp_path)
        server.shutdown()


def test_download_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub.download("someone/small")


@pytest.mark.slow
def test_loads_without_training_packages(tmp_path: Path) -> None:
    """Reading needs torch and safetensors, by the class too."""
    model = pruned_model()
    hub.save_folder(model, tmp_path)
    printed = run_without(
        (*TRAINING_PACKAGES, "huggingface_hub"),
        f"from wav2vec2.files.hub import HubModel\nmodel = HubModel.from_pretrained({str(tmp_path)!r})\n"
        "print(sum(float(w.double().sum()) for w in model.state_dict().values()))",
    )
    assert float(printed) == sum(float(tensor.double().sum()) for tensor in model.state_dict().values())
