"""Makes an ONNX file that computes with 8 bits: products with weights, and convolutions if there is speech."""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# protobuf's limit is 2 GiB: the weights of larger models go beside the file.
LARGEST_ONNX_FILE = 2**31 - 2**24
# Smaller tensors (norms, biases) stay float32: they hardly add to a file's size.
_LEAST_ELEMENTS = 1024
_LARGEST_FLOAT16 = 65504


def quantize(
    source: Path, destination: Path, layer_norm_extractor: bool, speech: Iterable[dict[str, np.ndarray]]
) -> None:
    """Quantise an ONNX file.

    The inputs of products are scaled anew in each call, those of convolutions as measured on the speech. Weights have
    7 bits, by output channel: sums of pairs of products of 8 x 8 bits overflow on CPUs without VNNI. What still
    computes in float32 is stored as float16.

    Args:
        source, destination: files.
        layer_norm_extractor: the model's extractor has a LayerNorm in each layer.
        speech: inputs of the file; without any, convolutions stay as they are.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(source, load_external_data=False).graph
    shapes = {weight.name: weight.dims for weight in graph.initializer}
    # The quantiser fails on empty matrices, of blocks without any width.
    empty = [node.name for node in graph.node if any(0 in shapes.get(name, ()) for name in node.input)]
    suitable = [node for node in graph.node if node.op_type == "Conv" and _suits_8_bits(node, layer_norm_extractor)]
    both = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": source.stat().st_size > LARGEST_ONNX_FILE,
    }
    with tempfile.TemporaryDirectory() as folder:
        quantized = products = Path(folder) / "products.onnx"
        quantize_dynamic(
            source,
            products,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=empty,
            extra_options={"MatMulConstBOnly": True},
            **both,
        )
        feeds = list(speech)
        if feeds and suitable:
            quantized = Path(folder) / "all.onnx"
            quantize_static(
                products,
                quantized,
                _Feeds(feeds),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=[node.name for node in suitable],
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                **both,
            )
        _to_float16(quantized, destination)


class _Feeds:
    """The speech, as the quantiser asks for it."""

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _suits_8_bits(convolution: Any, layer_norm_extractor: bool) -> bool:
    """Tell by the name of its weight if a convolution works with inputs of 8 bits, all frames on one scale.

    The first, whose input is the waveform, does not, and takes the least time. In an extractor without LayerNorms
    frames are as loud as the sound that they come from, and too few bits are left for quiet ones.
    """
    weight = convolution.input[1]
    if "feature_extractor" not in weight:
        return True
    return layer_norm_extractor and "conv_layers.0." not in weight


def _to_float16(source: Path, destination: Path) -> None:
    """Store weights as float16, each cast to float32 before it is used: no operator but Cast need know float16."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    casts, weights = [], []
    for weight in model.graph.initializer:
        # Scales of channels, of one dimension, may be smaller than what float16 resolves.
        is_matrix = weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1
        is_large = is_matrix and math.prod(weight.dims) >= _LEAST_ELEMENTS
        values = numpy_helper.to_array(weight)
        if is_large and abs(values).max() <= _LARGEST_FLOAT16:
            weights.append(numpy_helper.from_array(values.astype("float16"), f"{weight.name}.float16"))
            casts.append(helper.make_node("Cast", [weights[-1].name], [weight.name], to=TensorProto.FLOAT))
        else:
            weights.append(weight)
    nodes = [*casts, *model.graph.node]
    for entries, new in ((model.graph.initializer, weights), (model.graph.node, nodes)):
        kept = list(new)
        del entries[:]
        entries.extend(kept)
    beside = model.ByteSize() > LARGEST_ONNX_FILE
    onnx.save(model, destination, save_as_external_data=beside, location=f"{destination.name}.data")
