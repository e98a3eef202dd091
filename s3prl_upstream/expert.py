"""A model of this project as an upstream of s3prl, for SUPERB (see README.md beside this file).

It works inside this repository, and copied or linked into ``s3prl/upstream``. It needs nothing of s3prl: an upstream is
a module that takes a list of waveforms and returns a dict with ``hidden_states``.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

_REPOSITORY = Path(__file__).resolve().parent.parent


def _checkpoint_module() -> ModuleType:
    """Import ``wav2vec2.files.checkpoint`` of this repository, or else of the installed package ``dphubert``.

    The repository is in ``sys.path`` during the import only, because its lightning.py would hide the package of that
    name. s3prl's own folders (``s3prl.upstream.wav2vec2``) have other full names.
    """
    in_place = all((_REPOSITORY / name).is_file() for name in ("hardconcrete.py", "wav2vec2/files/checkpoint.py"))
    if in_place:
        sys.path.insert(0, str(_REPOSITORY))
    try:
        return import_module("wav2vec2.files.checkpoint")
    except ImportError as error:
        found = getattr(sys.modules.get("wav2vec2"), "__path__", None)
        other = f"; the wav2vec2 in {list(found)} is another one" if found else ""
        raise ImportError(
            f"{Path(__file__).parent} needs wav2vec2/ and hardconcrete.py of the DPHuBERT repository ({error}{other}): "
            "link to the folder in the repository instead of copying it, or pip install /path/to/the/repository"
        ) from error
    finally:
        if in_place:
            sys.path.remove(str(_REPOSITORY))


class UpstreamExpert(nn.Module):
    """Hidden states of a model file, pruned or not, HuBERT, wav2vec 2.0 or WavLM.

    Made in training mode, with all but the convolutional extractor trainable, as s3prl's own. s3prl switches to eval
    mode, and gradients off, unless it fine-tunes the upstream (``-f``).

    Args:
        ckpt: path of the ``.pth`` (s3prl's ``-k``).
        model_config: s3prl's ``-g``; must be left out, as the file holds its config.
        refresh: s3prl's ``-r``, for downloaded files; ignored.
    """

    def __init__(self, ckpt: str, model_config: str | None = None, refresh: bool = False) -> None:
        super().__init__()
        if model_config is not None:
            raise ValueError(f"-g {model_config}: a model file holds its config; leave -g out")
        self.model = _checkpoint_module().load_model(ckpt)
        self.model.feature_extractor.requires_grad_(False)  # as in s3prl's own wav2vec 2.0, HuBERT and WavLM

    def get_downsample_rates(self, key: str) -> int:
        """Return the samples per frame, the same for every ``key``: 320 in all published models."""
        return self.model.feature_extractor.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Return hidden states of waveforms of any lengths.

        Padding is masked, so that it reaches no frame, except through the extractor's norm of Base models, which is
        over the whole padded waveform in every implementation. s3prl reads up to two frames beyond an utterance's end;
        its last frame is repeated there, as s3prl does for the longest one.

        Returns:
            ``hidden_states``: num_layers + 1 tensors (B, frames, D), the projected extractor output and the output of
            every layer (without the final LayerNorm of pre-norm models); ``last_hidden_state``: the last of them.
        """
        # Shorter waveforms are padded to one frame.
        lengths = [max(len(wav), self.model.feature_extractor.receptive_field) for wav in wavs]
        waveforms = pad_sequence(wavs, batch_first=True)
        waveforms = F.pad(waveforms, (0, max(lengths) - waveforms.size(1)))
        is_padded = len(set(lengths)) > 1
        padded_lengths = torch.tensor(lengths, device=waveforms.device) if is_padded else None
        hidden_states, frames = self.model.extract_features(waveforms, padded_lengths)
        if frames is not None:
            num_frames = hidden_states[0].size(1)
            index = torch.arange(num_frames, device=frames.device).minimum(frames[:, None] - 1)  # (B, T)
            hidden_states = [x.gather(1, index[..., None].expand_as(x)) for x in hidden_states]
        return {"hidden_states": hidden_states, "last_hidden_state": hidden_states[-1]}
