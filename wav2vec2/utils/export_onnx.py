"""Writes a model as ONNX, in float32 and with 8-bit weights, each compared with PyTorch before it is kept."""

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, one_line
from ..model import Wav2Vec2Model
from .export_torch import Difference, Run, check_difference, compare, min_samples, quiet, trace

MODEL, MODEL_INT8 = "model.onnx", "model.int8.onnx"
MIN_OPSET, DEFAULT_OPSET = 18, 20  # the oldest that PyTorch's exporter writes

# protobuf's limit is 2 GiB: the weights of larger models go beside the file.
_LARGEST_FILE = 2**31 - 2**24

# What dynamic quantisation takes: the matrix products with weights, which hold nearly all of them.
_QUANTIZED = ("MatMul", "Gemm")


class OnnxFile(NamedTuple):
    """A file that was written, and how it differs from the model."""

    path: Path
    num_bytes: int
    difference: Difference


def check_opset(opset: int) -> None:
    """Check ``--opset``.

    Raises:
        UserError: too old for the exporter, or newer than the installed onnx.
    """
    onnx = _needed("onnx")
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise UserError(
            f"--opset {opset}: expected at least {MIN_OPSET}, the oldest that PyTorch's exporter writes, and at most "
            f"{newest}, the newest of the installed onnx {onnx.__version__}"
        )


def export_onnx(model: Wav2Vec2Model, folder: Path, outputs: str, opset: int, int8: bool) -> list[OnnxFile]:
    """Write model.onnx, and model.int8.onnx if ``int8``; nothing is left behind if one of them fails.

    Inputs are ``waveforms`` and ``lengths``, outputs ``last_hidden_state`` or ``hidden_states``, and ``frames``.

    Args:
        model: without masks.
        folder: made if it is not there.
        outputs: one of ``export_torch.OUTPUTS``.
        opset: of the file.
        int8: write a second file whose matrix products have 8-bit weights.

    Raises:
        UserError: a package is missing, the opset cannot be had, or model.onnx differs from the model by more than
            ``export_torch.LARGEST_DIFFERENCE``. That of int8 is only measured.
    """
    check_opset(opset)
    for package in ("onnxscript", "onnxruntime"):
        _needed(package)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
        written = Path(name) / MODEL
        with quiet():
            _write(model, written, outputs, opset)
        difference = compare(model, outputs, _session(written))
        check_difference(difference, folder / MODEL)
        measured = [(written, difference)]
        if int8:
            quantized = Path(name) / MODEL_INT8
            with quiet():
                _quantize(written, quantized)
            measured.append((quantized, compare(model, outputs, _session(quantized))))
        files = [
            OnnxFile(
                folder / path.name, sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")), measure
            )
            for path, measure in measured
        ]
        for path in Path(name).iterdir():  # a large model has its weights beside it
            path.replace(folder / path.name)
    return files


def _write(model: Wav2Vec2Model, path: Path, outputs: str, opset: int) -> None:
    names = ["last_hidden_state" if outputs == "last" else "hidden_states", "frames"]
    program = torch.onnx.export(
        trace(model, outputs, plain=True),
        dynamo=True,
        input_names=["waveforms", "lengths"],
        output_names=names,
        opset_version=opset,
        verbose=False,
    )
    found = program.model.opset_imports.get("")
    if found != opset:
        raise UserError(f"--opset {opset}: PyTorch's exporter cannot write it (it gave {found}); give {DEFAULT_OPSET}")
    batch, samples = program.model.graph.inputs[0].shape
    program.rename_axes({batch: "batch", samples: "samples"})
    program.model.graph.outputs[0].shape[-2] = "frames"  # else a formula
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where each was traced: more than the graph itself
    program.model.metadata_props.update(
        {
            "sample_rate": "16000",
            "min_samples": str(min_samples(model, 1)),
            "config": json.dumps(model.config),
        }
    )
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(path, external_data=num_bytes > _LARGEST_FILE)


def _quantize(source: Path, destination: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Matrices of nothing, of blocks without any width, are more than the quantiser can take.
    graph = onnx.load(source, load_external_data=False).graph
    empty = {weight.name for weight in graph.initializer if 0 in weight.dims}
    quantize_dynamic(
        source,
        destination,
        op_types_to_quantize=list(_QUANTIZED),
        nodes_to_exclude=[node.name for node in graph.node if not empty.isdisjoint(node.input)],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=source.stat().st_size > _LARGEST_FILE,
        extra_options={"MatMulConstBOnly": True},
    )


def _session(path: Path) -> Run:
    """The function that ONNX Runtime computes, on tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, frames = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        return torch.from_numpy(hidden_states), torch.from_numpy(frames)

    return run


def _needed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"--formats onnx: needs {package} ({one_line(error)}): pip install -r requirements-export.txt"
        ) from error
