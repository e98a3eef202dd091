"""Adds to transformers' ``pipeline`` features of audio, and words by CTC; folders of export.py hold this file."""

from functools import partial
from typing import Any

from transformers import AudioClassificationPipeline, AutomaticSpeechRecognitionPipeline, PretrainedConfig
from transformers.modeling_outputs import ModelOutput


def _restore_names(config: PretrainedConfig) -> None:
    """Replace classes by their names again: ``pipeline`` replaced the names, and classes cannot be saved."""
    for task in config.custom_pipelines.values():
        task["pt"] = [getattr(cls, "__name__", cls) for cls in task["pt"]]


class SpeechFeaturesPipeline(AudioClassificationPipeline):
    """``pipeline("feature-extraction")``: the last hidden state of audio, given as to "audio-classification"."""

    def check_model_type(self, supported_models: Any) -> None:
        """Accept any model: all have hidden states."""
        _restore_names(self.model.config)

    def _sanitize_parameters(
        self, *args: Any, return_tensors: bool | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        return {}, {}, {} if return_tensors is None else {"return_tensors": return_tensors}

    def postprocess(self, model_outputs: ModelOutput, *args: Any, **kwargs: Any) -> Any:
        """(1, frames, D), a tensor if ``return_tensors`` is given, else nested lists."""
        return model_outputs[0] if kwargs.get("return_tensors") else model_outputs[0].tolist()


class WordsPipeline(AutomaticSpeechRecognitionPipeline):
    """``pipeline("automatic-speech-recognition")`` of a model whose units are words: with spaces between them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _restore_names(self.model.config)
        tokenizer: Any = self.tokenizer
        tokenizer.decode = partial(tokenizer.decode, spaces_between_special_tokens=True)

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Text, and with ``return_timestamps`` its words: each unit, which transformers calls a character, is one."""
        units = {"return_timestamps": "char"} if kwargs.get("return_timestamps") == "word" else {}
        return super().postprocess(model_outputs, *args, **{**kwargs, **units})
