"""Model folders as the Hugging Face hub holds them: config.json, model.safetensors and README.md.

Reading a folder needs safetensors; only asking the hub needs huggingface_hub.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import HubertConfig, WavLMConfig
from .errors import UserError, listed, one_line
from .storage import read_json, read_safetensors
from .unpickling import FILE_SUFFIXES, model_files

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

# A folder with the code of its model: model_type, and the prefix of its weights.
OWN_TYPE, OWN_PREFIX = "dphubert", "network."
# A folder in transformers' own format: the entry of config.json that holds our config.
OWN_ENTRY = "dphubert"
# (our prefix, transformers' prefix); below these, transformers' names are ours.
TRANSFORMERS_NAMES = [
    ("feature_extractor", "feature_extractor"),
    ("encoder.feature_projection", "feature_projection"),
    ("encoder.transformer", "encoder"),
]
CTC_PREFIX = "lm_head."  # transformers' "aux."

_CONFIG_KEYS = {"head", *(field.name for family in (HubertConfig, WavLMConfig) for field in fields(family))}
_ADVICE = "export or download it again"

# Files and folders that show another form of a model -> what to do with it.
_OTHER_FORMS = {
    "snapshots": "a cache of the hub; give a folder in its snapshots",
    r"checkpoint-\d+": "checkpoints of a training; give one of them",
    "adapter_.*": "an adapter; merge it into its model (PEFT's merge_and_unload) and give what that saves",
    r".*\.(h5|msgpack|onnx|gguf|ot|tflite|nemo)": "a model of another framework; get its weights for PyTorch",
}


def read_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a folder that export.py wrote.

    - With the code of the model (``model_type`` is ``dphubert``), config.json holds our config among transformers'
      settings, and the names of weights have a prefix.
    - In transformers' own format, config.json holds our config under ``dphubert``, and weights have its names.
    - As ``--formats hub`` of version 1 wrote it, config.json is our config, and weights have the published names.

    Our config has the settings of a task head under ``head``.

    Returns:
        The contents of a model file, not yet checked.

    Raises:
        UserError: the folder is of another kind, or a file is missing or damaged.
    """
    folder, expected = Path(folder), f"a folder with {CONFIG} and {WEIGHTS}, {found_in(Path(folder))}"
    if not (folder / CONFIG).is_file() and (names := model_files(folder)):
        raise UserError(f"{folder}: a folder without {CONFIG}, {listed('model files', names)}; give one of them")
    settings = read_json(folder / CONFIG, expected, _ADVICE)
    model_type = settings.get("model_type")
    config = settings
    if model_type == OWN_TYPE:
        config = {key: value for key, value in settings.items() if key in _CONFIG_KEYS}
    elif isinstance(settings.get(OWN_ENTRY), dict):
        config = settings[OWN_ENTRY]
    elif "model_type" in settings:
        raise UserError(
            f"{folder}: a folder in transformers' format (its {CONFIG} has model_type); make a model file of it: "
            f"python convert_hubert_from_hf.py --model {folder}"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {expected}")
    weights = read_safetensors(path, _ADVICE)
    state_dict = {_our_name(name, model_type): tensor for name, tensor in weights.items()}
    if len(state_dict) < len(weights):
        raise UserError(f"{path}: two tensors for one weight of the model, expected one; {_ADVICE}")
    projection = state_dict.get("encoder.feature_projection.projection.weight")
    if OWN_ENTRY in settings and projection is not None and projection.ndim == 2:
        # transformers has no output scale of the extractor; only models whose scale is 1 are written in its format.
        state_dict.setdefault("feature_extractor.dummy_weight", projection.new_ones(projection.size(1)))
    contents = {"state_dict": state_dict, "config": config}
    if (head := config.pop("head", None)) is not None:
        names = [name for name in state_dict if name.startswith("head.")]
        own = {name.removeprefix("head."): state_dict.pop(name) for name in names}
        contents["head"] = {**head, "state_dict": own} if isinstance(head, dict) else head
    return contents


def found_in(folder: Path) -> str:
    """Say what lies in a folder without the wanted file, and what to do if that is another form of a model."""
    names = sorted(path.name + ("" if path.exists() else " (a broken link)") for path in folder.glob("*"))
    advice = next((a for pattern, a in _OTHER_FORMS.items() if any(re.fullmatch(pattern, name) for name in names)), "")
    return f"found {listed('entries', names)}{advice and f', {advice}'}"


def _our_name(name: str, model_type: str | None) -> str:
    """Return the published name of a weight in a folder of this ``model_type``."""
    if model_type is None:
        return name
    if model_type == OWN_TYPE:
        return name.removeprefix(OWN_PREFIX)
    if name.startswith(CTC_PREFIX):
        return "aux." + name.removeprefix(CTC_PREFIX)
    name = name.removeprefix(f"{model_type}.")
    for ours, theirs in TRANSFORMERS_NAMES:
        if name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def is_hub_id(text: str) -> bool:
    """Return True if ``text`` has the form of a model's name on the hub, ORG/NAME."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII))


@contextmanager
def asking_hub(wanted: str) -> Iterator[Any]:
    """Yield the module huggingface_hub; where it is missing or fails, a UserError names what was ``wanted``."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError(
            f"{wanted}: no such folder, and asking the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        yield huggingface_hub
    # No network, no such model, file or revision, not public, not a valid id.
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"{wanted}: the Hugging Face hub did not give it ({type(error).__name__}: {one_line(error)}); check the "
            "name and the network, or give a folder"
        ) from error


def download(repo_id: str, revision: str | None = None, filename: str | None = None) -> Path:
    """Fetch a model from the Hugging Face hub, or from its local cache.

    Args:
        repo_id: ORG/NAME.
        revision: a branch, tag or commit; by default the newest.
        filename: fetch this file of the repository alone, instead of the folder.

    Raises:
        UserError: huggingface_hub is missing, the hub does not give the model, or it holds files of another kind.
    """
    wanted = repo_id + (f", file {filename}" if filename else "") + (f" (revision {revision})" if revision else "")
    with asking_hub(wanted) as hub:
        if filename is not None:
            return Path(hub.hf_hub_download(repo_id, filename, revision=revision))
        files = [WEIGHTS, CONFIG, CARD]
        folder = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=files))
        if (folder / CONFIG).is_file():
            return folder
        names = [name for name in hub.list_repo_files(repo_id, revision=revision) if name.endswith(FILE_SUFFIXES)]
    advice = f'load one of them: wav2vec2.load("{repo_id}", filename="{names[0]}")' if names else "give another"
    raise UserError(f"{repo_id}: a repository without {CONFIG}, {listed('model files', names)}; {advice}")
