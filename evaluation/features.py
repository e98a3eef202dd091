"""Hidden states of one utterance, checked."""

import torch
from torch import Tensor

from wav2vec2.errors import UserError
from wav2vec2.model import Wav2Vec2Model


@torch.inference_mode()
def hidden_states(
    model: Wav2Vec2Model, waveform: Tensor, num_layers: int | None, model_source: str, audio_source: str
) -> list[Tensor]:
    """The projected extractor output and each layer's output for a waveform (T,): tensors (frames, D).

    Args:
        model: in eval mode.
        waveform: at 16 kHz, on the model's device.
        num_layers: stop after this many layers; None runs all.
        model_source, audio_source: what to name in errors.

    Raises:
        UserError: the waveform is too short for a frame, or a hidden state is not finite.
    """
    needed = model.feature_extractor.receptive_field
    if waveform.numel() < needed:
        raise UserError(
            f"{audio_source}: has {waveform.numel()} samples at 16 kHz, expected at least {needed}, which make one "
            "frame; take it out of the list"
        )
    states, _ = model.extract_features(waveform[None], num_layers=num_layers)
    for layer, state in enumerate(states):
        if not state.isfinite().all():
            raise UserError(
                f"{model_source}: hidden state {layer} holds NaN or infinite values for {audio_source}, expected "
                "numbers; the model's training failed, or its file is damaged"
            )
    return [state[0] for state in states]
