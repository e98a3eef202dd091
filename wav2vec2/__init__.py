"""HuBERT, wav2vec 2.0 and WavLM with per-layer shapes and pruning masks; importing it needs torch alone.

``load`` reads any model, ``extract`` and ``extract_iter`` give the features of audio: see :mod:`wav2vec2.inference`.
"""

from .inference import extract, extract_iter, load

__all__ = ["extract", "extract_iter", "load"]
