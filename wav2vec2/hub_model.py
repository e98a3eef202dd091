"""The model with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``; importing it needs huggingface_hub."""

import os
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin

from .config import check_config
from .errors import UserError
from .hub import download, read_folder, save_folder
from .model import Wav2Vec2Model


class HubModel(Wav2Vec2Model, PyTorchModelHubMixin):
    """HuBERT, wav2vec 2.0 or WavLM that comes from the Hugging Face hub and goes there.

    Files are those of :mod:`wav2vec2.hub`; ``push_to_hub(repo_id)`` is huggingface_hub's.

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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, revision: str | None = None, **download_options: Any
    ) -> Self:
        """Load a folder, or a model on the hub, strictly; returned in eval mode, in the precision of its file.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id (ORG/NAME).
            revision: of a hub id: a branch, tag or commit.
            download_options: as of ``huggingface_hub.snapshot_download``.

        Raises:
            UserError: as :func:`wav2vec2.hub.download` and :func:`wav2vec2.hub.read_folder`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(str(pretrained_model_name_or_path), revision, **download_options)
        contents = read_folder(folder)
        model = cls(**contents["config"])
        dtypes = {tensor.dtype for tensor in contents["state_dict"].values()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        model.load_state_dict(contents["state_dict"])
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_folder(self, save_directory)
