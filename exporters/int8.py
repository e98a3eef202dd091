"""Makes an ONNX file that computes with 8 bits: products with weights, and convolutions if there is speech."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# protobuf's limit is 2 GiB: the weights of larger models go beside the file.
LARGEST_ONNX_FILE = 2**31 - 2**24
# Smaller tensors (norms, biases) stay float32: they hardly add to a file's size.
_LEAST_ELEMENTS = 1024
_LARGEST_FLOAT16 = 65504


def quantize(
    source: Path, destination: Path, layer_norm_extractor: bool, speech: Sequence[dict[str, np.ndarray]]
) -> None:
    """Quantise an ONNX file.

    The inputs of products are scaled anew in each call, those of convolutions as measured on the speech. Weights have
    7 bits, by output channel: sums of pairs of products of 8 x 8 bits overflow on CPUs without VNNI. What still
    computes in float32 is stored as float16.

    Args:
        source, destination: files.
        layer_norm_extractor: the model's extractor has a LayerNorm in each layer. In one without, frames are as loud
            as the sound that they come from, and 8 bits on one scale are too few for quiet ones.
        speech: inputs of the file; without any, convolutions stay as they are.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(source, load_external_data=False).graph
    shapes = {weight.name: weight.dims for weight in graph.initializer}
    # The quantiser fails on empty matrices, of blocks without any width.
    empty = [node.name for node in graph.node if any(0 in shapes.get(name, ()) for name in node.input)]
    # The extractor's first convolution, whose input is the waveform, never suits 8 bits, and takes the least time.
    kept = "feature_extractor.conv_layers.0." if layer_norm_extractor else "feature_extractor."
    suitable = [node.name for node in graph.node if node.op_type == "Conv" and kept not in node.input[1]]
    both = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": source.stat().st_size > LARGEST_ONNX_FILE,
    }
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:  # where there must be room anyway
        quantized = products = Path(folder) / "products.onnx"
        quantize_dynamic(
            source,
            products,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=empty,
            extra_options={"MatMulConstBOnly": True},
            **both,
        )
        if speech and suitable:
            quantized, feeds = Path(folder) / "all.onnx", iter(speech)
            quantize_static(
                products,
                quantized,
                SimpleNamespace(get_next=lambda: next(feeds, None)),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=suitable,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                **both,
            )
        _to_float16(quantized, destination)


def _to_float16(source: Path, destination: Path) -> None:
    """Store weights as float16, each cast to float32 before it is used: no operator but Cast need know float16."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph, nodes = model.graph, []
    for weight in graph.initializer:
        # Scales of channels, of one dimension, may be smaller than what float16 resolves.
        is_matrix = weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1
        if is_matrix and math.prod(weight.dims) >= _LEAST_ELEMENTS:
            name, values = weight.name, numpy_helper.to_array(weight)
            if abs(values).max() <= _LARGEST_FLOAT16:
                weight.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}.float16"))
                nodes.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    beside = model.ByteSize() > LARGEST_ONNX_FILE
    onnx.save(model, destination, save_as_external_data=beside, location=f"{destination.name}.data")
