"""HuBERT, wav2vec 2.0 and WavLM with per-layer shapes and pruning masks; importing it needs torch alone.

``load`` reads any model, and ``extract`` and ``extract_iter`` return features of audio, see :mod:`wav2vec2.inference`.
``predict`` and ``predict_iter`` return the predictions of a fine-tuned model, see :mod:`wav2vec2.prediction`.
``stream`` runs a streaming model as the sound comes, see :class:`wav2vec2.streaming.Stream`; ``predict_stream`` a
fine-tuned one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import extract, extract_iter, load
    from .prediction import predict, predict_iter, predict_stream
    from .streaming import Stream as stream

__all__ = ["extract", "extract_iter", "load", "predict", "predict_iter", "predict_stream", "stream"]


def __getattr__(name: str) -> Any:
    # A late import: reading audio headers and printing --help should not wait for torch.
    if name in __all__:
        from . import inference, prediction, streaming

        if name == "stream":
            return streaming.Stream
        return getattr(prediction if name.startswith("predict") else inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
