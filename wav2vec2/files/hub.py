"""Models as the Hugging Face hub has them: folders with model.safetensors, config.json and README.md.

config.json holds the arguments of ``wav2vec2_model``, model.safetensors its state dict under the published names; of a
model with a task head also the settings of ``head``, and its weights under ``head.``.
Reading needs safetensors; only what asks the hub, and the card of a folder that is written, need huggingface_hub.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from torch import Tensor

from ..components import published_state
from ..config import check_config
from ..model import Wav2Vec2Model
from .checkpoint import check_weights, expected_state
from .errors import UserError, listed, one_line
from .heads import TaskModel, contents_of, joined_state, split_state
from .storage import atomic_path, read_json, read_safetensors
from .unpickling import FILE_SUFFIXES, model_files

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class HubModel(Wav2Vec2Model):
    """HuBERT, wav2vec 2.0 or WavLM that comes from the Hugging Face hub and goes there.

    Args:
        config: the arguments of ``wav2vec2_model``.

    Raises:
        UserError: no model can be built from the config.
    """

    def __init__(self, **config: Any) -> None:
        try:
            super().__init__(check_config(config))
        except (TypeError, ValueError) as error:
            raise UserError(f"no model can be built from its config: {error}") from error

    @classmethod
    def from_pretrained(cls, folder_or_id: str | os.PathLike, *, revision: str | None = None, **options: Any) -> Self:
        """Load a folder, or a model on the hub, strictly; returned in eval mode, in the precision of its file.

        Args:
            folder_or_id: a folder, or a hub id (ORG/NAME).
            revision: of a hub id: a branch, tag or commit.
            options: as of ``huggingface_hub.snapshot_download``.

        Raises:
            UserError: as :func:`download` and :func:`read_folder`.
        """
        folder = Path(folder_or_id)
        contents = read_folder(folder if folder.is_dir() else download(str(folder_or_id), revision, **options))
        model = cls(**contents["config"])
        dtypes = {tensor.dtype for tensor in contents["state_dict"].values()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        model.load_state_dict(contents["state_dict"])
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """See :func:`save_folder`."""
        save_folder(self, folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Upload the model, in one commit.

        Args:
            repo_id: ORG/NAME, made if it is not there.
            private: of a repository that is made.
            token: of the hub; by default that of ``hf auth login``.
            options: as of ``huggingface_hub.HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr``, ...

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            save_folder(self, folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def save_folder(model: Wav2Vec2Model, folder: str | os.PathLike, card: str | None = None) -> None:
    """Write a model as a folder that :func:`read_folder` reads and that can be uploaded as it is.

    Args:
        model: its tensors are written in the precision that they have.
        folder: made if it is not there; other files in it are left alone.
        card: the contents of README.md; by default what the model itself tells.

    Raises:
        UserError: safetensors is missing, or huggingface_hub, which makes the card.
    """
    if card is None:
        from exporters.card import Card

        card = Card(model.config, head=model.head_settings if isinstance(model, TaskModel) else None).text("hub")
    is_task_model = isinstance(model, TaskModel)
    contents = contents_of(model) if is_task_model else {"config": model.config, "state_dict": model.state_dict()}
    write_folder(contents["state_dict"], contents["config"], folder, card, contents.get("head"))


def write_folder(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: str | os.PathLike,
    card: str,
    head: Mapping[str, Any] | None = None,
) -> None:
    """As :func:`save_folder`, for a state dict, its config and perhaps a head, all as in a model file."""
    folder = Path(folder)
    if head is not None:
        state_dict = joined_state(state_dict, head["state_dict"])
        config = {**config, "head": {key: value for key, value in head.items() if key != "state_dict"}}
    write_safetensors(state_dict, folder / WEIGHTS)
    write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", folder / CONFIG)
    write_text(card, folder / CARD)


def write_safetensors(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as they are (precision included), whole or not at all.

    Raises:
        UserError: the safetensors package is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(f"{path}: writing it needs the safetensors package: pip install safetensors") from error
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a folder that :func:`save_folder` wrote, with the checks of ``checkpoint.read_model_file``.

    Returns:
        ``{"state_dict": ..., "config": ...}`` and perhaps ``head``, as a model file has them.

    Raises:
        UserError: not such a folder, a file is damaged, or the weights are not those of the config.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (names := model_files(folder)):
        raise UserError(f"{folder}: a folder without {CONFIG}, {listed('model files', names)}; give one of them")
    config = read_json(folder / CONFIG, f"a folder with {CONFIG} and {WEIGHTS}", "export or download it again")
    if config.get("model_type") == "dphubert":
        raise UserError(
            f"{folder}: a folder that export.py wrote for transformers' Auto classes, with the code of the model; give "
            "the model file that it was made of, or export that as hub"
        )
    if "model_type" in config:
        raise UserError(
            f"{folder}: a folder in transformers' format (its {CONFIG} has model_type); make a model file of it: "
            f"python convert_hubert_from_hf.py --model {folder}"
        )
    has_head, settings = "head" in config, config.pop("head", None)
    expected = expected_state(config, folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a folder with {CONFIG} and {WEIGHTS}")
    state_dict = published_state(read_safetensors(path, "export or download it again"))
    own: dict[str, Tensor] = {}
    if has_head:
        state_dict, own = split_state(state_dict)
        settings = {**settings, "state_dict": own} if isinstance(settings, dict) else settings
    check_weights(expected, state_dict, path)
    contents = {"state_dict": {name: state_dict[name] for name in expected}, "config": config}
    return contents | ({"head": settings} if has_head else {})


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a model's name on the hub, ORG/NAME."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII))


def download(
    repo_id: str,
    revision: str | None = None,
    *,
    allow_patterns: Sequence[str] = (WEIGHTS, CONFIG, CARD),
    **options: Any,
) -> Path:
    """The folder of a model on the Hugging Face hub, from its cache if it is there.

    Args:
        repo_id: ORG/NAME.
        revision: a branch, tag or commit; by default the newest.
        allow_patterns: the files that are wanted.
        options: others of ``huggingface_hub.snapshot_download``, as ``token`` or ``cache_dir``.

    Raises:
        UserError: huggingface_hub is missing, the hub does not give the model, or it holds files of another kind.
    """

    def get(hub: ModuleType) -> Path:
        folder = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(allow_patterns), **options))
        if CONFIG in allow_patterns and not (folder / CONFIG).is_file():
            api = hub.HfApi(endpoint=options.get("endpoint"), token=options.get("token"))
            names = [name for name in api.list_repo_files(repo_id, revision=revision) if name.endswith(FILE_SUFFIXES)]
            advice = f'load one of them: wav2vec2.load("{repo_id}", filename="{names[0]}")' if names else "give another"
            raise UserError(f"{repo_id}: a repository without {CONFIG}, {listed('model files', names)}; {advice}")
        return folder

    return _from_hub(get, repo_id, revision)


def download_file(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """One file of a repository on the Hugging Face hub, from its cache if it is there.

    Raises:
        UserError: huggingface_hub is missing, or the hub does not give the file.
    """

    return _from_hub(
        lambda hub: Path(hub.hf_hub_download(repo_id, filename, revision=revision)),
        f"{repo_id}, file {filename}",
        revision,
    )


def _from_hub(get: Callable[[ModuleType], Path], wanted: str, revision: str | None) -> Path:
    """What ``get`` finds on the hub with huggingface_hub, whose errors become :class:`UserError`."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError(
            f"{wanted}: no such folder, and to ask the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        return get(huggingface_hub)
    except UserError:
        raise
    # No network, no such model, file or revision, not public, not a valid id.
    except (OSError, ValueError, HfHubHTTPError) as error:
        wanted = wanted if revision is None else f"{wanted} (revision {revision})"
        raise UserError(
            f"{wanted}: the Hugging Face hub did not give it ({type(error).__name__}: {one_line(error)}); check the "
            "name and the network, or give a folder"
        ) from error
