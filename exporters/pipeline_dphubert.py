"""What transformers' ``pipeline`` lacks: features of audio, and words by CTC; travels with models of export.py."""

from functools import partial
from typing import Any

from transformers import AudioClassificationPipeline, AutomaticSpeechRecognitionPipeline, PretrainedConfig
from transformers.modeling_outputs import ModelOutput


def _restore_names(config: PretrainedConfig) -> None:
    """Undo that ``pipeline`` put classes in the place of their names, which could not be saved."""
    for task in config.custom_pipelines.values():
        task["pt"] = [getattr(cls, "__name__", cls) for cls in task["pt"]]


class SpeechFeaturesPipeline(AudioClassificationPipeline):
    """``pipeline("feature-extraction")``: the last hidden state of audio, given as to "audio-classification"."""

    def check_model_type(self, supported_models: Any) -> None:
        """Any model that has hidden states will do."""
        _restore_names(self.model.config)

    def _sanitize_parameters(self, return_tensors: bool | None = None, **_: Any) -> tuple[dict, dict, dict]:
        return {}, {}, {} if return_tensors is None else {"return_tensors": return_tensors}

    def postprocess(self, model_outputs: ModelOutput, return_tensors: bool = False) -> Any:
        """(1, frames, D), a tensor or nested lists."""
        return model_outputs[0] if return_tensors else model_outputs[0].tolist()


class WordsPipeline(AutomaticSpeechRecognitionPipeline):
    """``pipeline("automatic-speech-recognition")`` of a model whose units are words: with spaces between them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _restore_names(self.model.config)
        self.tokenizer.decode = partial(self.tokenizer.decode, spaces_between_special_tokens=True)
