"""Writes a model as ONNX for ONNX Runtime: in float32 and of 8 bits, for any length or by chunks.

Standard operators only: ONNX Runtime's builds for phones and browsers may have no others. A file by chunks has fixed
shapes, which such builds want, and keeps nothing from call to call.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError, listed
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.quiet import quiet

from .chunks import Chunk, ChunkOutputs, by_chunks, chunk_windows
from .int8 import LARGEST_ONNX_FILE, quantize
from .options import DEFAULT_OPSET, check_onnx
from .traced import (
    CHECKED_BATCHES,
    Difference,
    Outputs,
    Program,
    Run,
    check_difference,
    compare,
    head_metadata,
    noise,
    output_name,
    trace,
    traced,
)

ONNX, ONNX_INT8 = "model.onnx", "model.int8.onnx"
# So many windows of the speech are enough to measure ranges on.
_CALIBRATION_WINDOWS = 200


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written.

    Attributes:
        path: path of the file.
        num_bytes: with the files of weights beside it.
        difference: from the model, on noise; of a quantised file on speech, if there is some.
        compared_on: the noise or speech, in words.
        operators: the operators in it, all of the domain ai.onnx.
        from_whole: how far a file by chunks is from the model on whole utterances of the speech.
        run: runs the file.
    """

    path: Path
    num_bytes: int
    difference: Difference
    compared_on: str
    operators: list[str]
    from_whole: Difference | None
    run: Run


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the onnx format.

    Attributes:
        outputs: one of :data:`~.options.OUTPUTS`.
        opset: version of the operators, in all files.
        int8: write model.int8.onnx as well: matrix products of 8 bits and, with ``speech``, the positional convolution
            and those of an extractor with LayerNorm.
        chunk: write files by chunks.
        speech: waveforms (T,), to measure ranges of the convolutions' inputs, and differences, on.
    """

    outputs: str = "last"
    opset: int = DEFAULT_OPSET
    int8: bool = False
    chunk: Chunk | None = None
    speech: Sequence[Tensor] = ()


def write_onnx(model: Wav2Vec2Model, options: OnnxOptions, folder: Path) -> list[OnnxFile]:
    """Write model.onnx and the other files of the options.

    Inputs are ``waveforms`` and ``lengths``, outputs ``last_hidden_state``, ``hidden_states`` or ``logits``, and
    ``frames``; by chunks ``waveforms`` and the first output alone. The labels of logits are in the metadata, under
    ``head``, the frames of a chunk under ``chunk``.

    Args:
        model: in eval mode, on the CPU.
        options: see :class:`OnnxOptions`.
        folder: made if it is not there.

    Raises:
        UserError: see :func:`~.options.check_onnx`; or model.onnx differs from the model by more than
            :data:`~.traced.LARGEST_DIFFERENCE`. Nothing is written then.
    """
    check_onnx(options.opset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as name, quiet():
        path = Path(name) / ONNX
        _convert(model, options, path)
        paths = [path]
        if options.int8:
            paths.append(path.with_name(ONNX_INT8))
            has_norms = model.feature_extractor.conv_layers[-1].layer_norm is not None
            quantize(path, paths[-1], has_norms, _feeds(model, options))
        files = [_measured(path, model, options, folder) for path in paths]
        folder.mkdir(exist_ok=True)
        for part in Path(name).iterdir():
            part.replace(folder / part.name)
    return files


def _program(model: Wav2Vec2Model, options: OnnxOptions) -> Program:
    if options.chunk is None:
        return trace(model, options.outputs)
    shape = 1, model.feature_extractor.num_samples(options.chunk.window)
    return traced(ChunkOutputs(model, options.outputs, options.chunk), (torch.randn(shape),))


def _convert(model: Wav2Vec2Model, options: OnnxOptions, path: Path) -> None:
    """Write a model as ONNX in float32."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    output, opset = output_name(model, options.outputs), options.opset
    # Any: its type says that it may be None, which the exporter with dynamo never returns.
    converted: Any = torch.onnx.export(
        _program(model, options),
        dynamo=True,
        input_names=["waveforms"] if options.chunk else ["waveforms", "lengths"],
        output_names=[output] if options.chunk else [output, "frames"],
        opset_version=opset,
        verbose=False,
    )
    graph = converted.model.graph
    found = converted.model.opset_imports.get("")
    if found != opset:
        raise UserError(f"opset {opset}: PyTorch's exporter cannot write it (it gave {found}); take {DEFAULT_OPSET}")
    converted.model.ir_version = find_min_ir_version_for([make_opsetid("", opset)])  # for older programs, too
    properties = {"sample_rate": str(SAMPLE_RATE), "config": json.dumps(model.config), **head_metadata(model)}
    if options.chunk:
        properties["chunk"] = json.dumps(options.chunk._asdict())
    else:
        batch, samples = graph.inputs[0].shape
        converted.rename_axes({batch: "batch", samples: "samples"})
        if len(graph.outputs[0].shape) > 2:  # not of whole clips
            graph.outputs[0].shape[-2] = "frames"  # else a formula
        properties["min_samples"] = str(model.feature_extractor.receptive_field)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # where each was traced: more than the graph itself
    converted.model.metadata_props.update(properties)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    converted.save(path, external_data=num_bytes > LARGEST_ONNX_FILE)


def _feeds(model: Wav2Vec2Model, options: OnnxOptions) -> Iterator[dict[str, np.ndarray]]:
    """Yield the speech as inputs of the file."""
    if options.chunk is None:
        for waveform in options.speech:
            yield {"waveforms": waveform[None].numpy(), "lengths": np.array([len(waveform)])}
        return
    windows = [window for waveform in options.speech for window in chunk_windows(waveform, model, options.chunk)]
    for window in windows[:: max(1, len(windows) // _CALIBRATION_WINDOWS)]:
        yield {"waveforms": window.numpy()}


def _measured(path: Path, model: Wav2Vec2Model, options: OnnxOptions, folder: Path) -> OnnxFile:
    """Compare a file with the model, and check that it can run everywhere."""
    operators = _operators(path, folder)
    session = _session(path)
    whole = Outputs(model, options.outputs).eval()
    speech = [(waveform[None], torch.tensor([len(waveform)])) for waveform in options.speech]
    from_whole = None
    function: Callable[[Tensor, Tensor], Any] = whole
    if options.chunk is None:
        run, checked, compared_on = _run_whole(session), noise(model, CHECKED_BATCHES), "noise"
    else:
        function = by_chunks(ChunkOutputs(model, options.outputs, options.chunk).eval(), model, options.chunk)
        run = by_chunks(_run_window(session), model, options.chunk)
        frames = options.chunk.frames
        checked, compared_on = noise(model, ((2 * frames + 1,), (frames, 1))), "noise, chunk by chunk"
        from_whole = compare(whole, run, speech) if speech else None
    is_exact = path.name == ONNX
    if speech and not is_exact:  # what is quantised fits speech, and not noise
        checked, compared_on = speech, f"{len(speech)} utterances"
    difference = compare(function, run, checked)
    if is_exact:
        check_difference(difference, folder / path.name)
    num_bytes = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    return OnnxFile(folder / path.name, num_bytes, difference, compared_on, operators, from_whole, run)


def _operators(path: Path, folder: Path) -> list[str]:
    """Return the operators that a file needs.

    Raises:
        UserError: one of them is not standard.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graphs, nodes = [model.graph], []
    while graphs:
        nodes += (graph := graphs.pop()).node
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    others = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    if others or model.functions:
        raise UserError(
            f"{folder / path.name}: has {listed('operators', others)} beyond the standard ones, which ONNX Runtime's "
            "builds for phones and browsers may lack; nothing was written; please report it"
        )
    return sorted({node.op_type for node in nodes})


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run_whole(session: Any) -> Run:
    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found, frames = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        return torch.from_numpy(found), torch.from_numpy(frames)

    return run


def _run_window(session: Any) -> Callable[[Tensor], Tensor]:
    return lambda window: torch.from_numpy(session.run(None, {"waveforms": window.numpy()})[0])
