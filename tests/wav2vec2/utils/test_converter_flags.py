"""Commands of this room parse their flags, and refuse wrong ones, before torch or transformers are imported."""

import sys

import pytest
from helpers import run_command

CODE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "numpy", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert_hubert_from_hf.py", "--help"), "usage:"),
        (("convert_hubert_from_hf.py", "--layer_drop", 1.5), "error: --layer_drop 1.5: expected a probability"),
        (("convert_wavlm_from_fairseq.py", "--ckpt", "x", "--dropout", "high"), "invalid float value: 'high'"),
        (("wav2vec2.prediction", "--help"), "usage:"),
        (("examples.extract_features", "--help"), "usage:"),
        (("wav2vec2.prediction", "model.pth"), "the following arguments are required: AUDIO"),
    ],
)
def test_flags_come_before_torch(words, message):
    result = run_command(sys.executable, "-c", CODE, *words)
    assert message in result.stdout + result.stderr and "AssertionError" not in result.stderr
