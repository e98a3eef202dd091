"""A model of this project as an upstream of s3prl, for SUPERB (see README.md beside this file).

Works inside this repository, and copied or linked into ``s3prl/upstream``. Needs nothing of s3prl itself: an upstream
is a module that takes a list of waveforms and returns a dict with ``hidden_states``.
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
    """``wav2vec2.files.checkpoint`` of this repository, or else of the installed package ``dphubert``.

    The repository is in ``sys.path`` during the import only, because its lightning.py would hide the package of that
    name. The names that s3prl gives its own folders (``s3prl.upstream.wav2vec2``) do not get in the way.

    Raises:
        ImportError: neither is there.
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


def _hold_last_frame(x: Tensor, frames: Tensor) -> Tensor:
    """(B, T, D) with what is behind the (B,) valid frames of each row replaced by its last valid frame."""
    index = torch.arange(x.size(1), device=x.device).minimum(frames[:, None] - 1)  # (B, T)
    return x.gather(1, index[..., None].expand_as(x))


class UpstreamExpert(nn.Module):
    """Hidden states of a model file, pruned or not, HuBERT, wav2vec 2.0 or WavLM.

    Made as s3prl makes it: in training mode, with all but the convolutional extractor trainable. s3prl switches to eval
    mode, and gradients off, unless the upstream is to be fine-tuned (``-f``).

    Args:
        ckpt: path of the ``.pth`` (s3prl's ``-k``).
        model_config: s3prl's ``-g``; must be left out, as the file holds its config.
        refresh: s3prl's ``-r``, for files that are downloaded; means nothing here.

    Raises:
        ImportError: this folder has been copied and the package ``dphubert`` is not installed.
        wav2vec2.files.errors.UserError: the file is missing or not a model.
        ValueError: ``model_config`` is given.
    """

    def __init__(self, ckpt: str, model_config: str | None = None, refresh: bool = False) -> None:
        super().__init__()
        if model_config is not None:
            raise ValueError(f"-g {model_config}: a model file holds its config; leave -g out")
        self.model = _checkpoint_module().load_model(ckpt)
        self.model.feature_extractor.requires_grad_(False)  # as in s3prl's own wav2vec 2.0, HuBERT and WavLM

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame, the same for every ``key``: 320 in all published models."""
        return self.model.feature_extractor.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Hidden states of waveforms of any lengths.

        Padding is masked, so that it reaches no frame (but for the extractor's norm of Base models, which is over the
        whole padded waveform, as in every implementation of them). Behind an utterance's end, where s3prl takes up to
        two frames more than there are, its last frame is repeated, as s3prl does for the longest one.

        Args:
            wavs: (samples,) each, at 16 kHz.

        Returns:
            ``hidden_states``: num_layers + 1 tensors (B, frames, D), the projected extractor output and the output of
            every layer (of pre-norm models without the final LayerNorm); ``last_hidden_state``: the last of them.
        """
        # Shorter ones are padded to one frame.
        lengths = [max(len(wav), self.model.feature_extractor.receptive_field) for wav in wavs]
        waveforms = pad_sequence(wavs, batch_first=True)
        waveforms = F.pad(waveforms, (0, max(lengths) - waveforms.size(1)))
        if len(set(lengths)) == 1:
            hidden_states, _ = self.model.extract_features(waveforms)
        else:
            hidden_states, frames = self.model.extract_features(
                waveforms, torch.tensor(lengths, device=waveforms.device)
            )
            hidden_states = [_hold_last_frame(x, frames) for x in hidden_states]
        return {"hidden_states": hidden_states, "last_hidden_state": hidden_states[-1]}
