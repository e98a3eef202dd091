"""Writes a model as ONNX for ONNX Runtime: in float32, with float16 or 8-bit weights, of any length or by chunks.

Standard operators only: the builds of ONNX Runtime for phones and browsers have no others for certain. A file by chunks
has fixed shapes, which such builds want: a chunk of speech with what was before it (and, if wanted, some that follows)
-> the frames of the chunk. It keeps nothing from call to call.
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError, listed, one_line
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.quiet import quiet

from .traced import (
    CHECKED_BATCHES,
    Difference,
    Outputs,
    Program,
    Run,
    check_difference,
    compare,
    head_settings,
    min_samples,
    noise,
    output_name,
    trace,
    traced,
)

if TYPE_CHECKING:
    import onnxruntime

ONNX, ONNX_FLOAT16, ONNX_INT8 = "model.onnx", "model.float16.onnx", "model.int8.onnx"
MIN_OPSET, DEFAULT_OPSET = 18, 20  # the oldest that PyTorch's exporter writes

# protobuf's limit is 2 GiB: the weights of larger models go beside the file.
_LARGEST_ONNX_FILE = 2**31 - 2**24
# Smaller tensors (norms, biases) stay float32: they are nothing of a file.
_LEAST_ELEMENTS = 1024
_LARGEST_FLOAT16 = 65504
# Of all windows of the speech, so many are enough for ranges.
_CALIBRATION_WINDOWS = 200


def check_onnx(opset: int) -> None:
    """Check that ONNX files with this opset can be written.

    Raises:
        UserError: a package is missing, or the opset is too old for the exporter or too new for the installed onnx.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(
                f"onnx format: needs {package} ({one_line(error)}): pip install -r requirements-export.txt"
            ) from error
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise UserError(
            f"opset {opset}: expected at least {MIN_OPSET}, the oldest that PyTorch's exporter writes, and at most "
            f"{newest}, the newest of the installed onnx {onnx.__version__}"
        )


class Chunk(NamedTuple):
    """How a file by chunks hears an utterance; everything is counted in frames.

    Attributes:
        frames: of the chunk, which are what comes out.
        left, right: before and behind it, which are heard too.
    """

    frames: int
    left: int
    right: int

    @property
    def window(self) -> int:
        """All frames that are computed for a chunk."""
        return self.left + self.frames + self.right


class ChunkOutputs(Outputs):
    """The function of a file by chunks: (1, samples of the window) -> the chunk's frames."""

    def __init__(self, model: Wav2Vec2Model, outputs: str, chunk: Chunk) -> None:
        super().__init__(model, outputs)
        self.chunk = chunk

    def forward(self, waveforms: Tensor) -> Tensor:
        found, _ = super().forward(waveforms, None)
        return found[..., self.chunk.left : self.chunk.left + self.chunk.frames, :]


def chunk_windows(waveform: Tensor, model: Wav2Vec2Model, chunk: Chunk) -> list[Tensor]:
    """What a file by chunks is given of a waveform (T,), one window (1, samples) for each chunk.

    Before the waveform and behind its end there are zeros.
    """
    extractor = model.feature_extractor
    num_chunks = -(-extractor.num_frames(len(waveform)) // chunk.frames)
    if num_chunks == 0:
        return []
    size, hop = extractor.num_samples(chunk.window), chunk.frames * extractor.stride
    left = chunk.left * extractor.stride
    right = max(0, (num_chunks - 1) * hop + size - left - len(waveform))
    heard = nn.functional.pad(waveform, (left, right))
    return [heard[None, number * hop : number * hop + size] for number in range(num_chunks)]


def by_chunks(run: Callable[[Tensor], Tensor], model: Wav2Vec2Model, chunk: Chunk) -> Run:
    """What ``run``, which takes a window as :class:`ChunkOutputs` does, makes of whole waveforms."""

    def whole(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        counts = [model.feature_extractor.num_frames(length) for length in lengths.tolist()]
        rows = []
        for waveform, length, count in zip(waveforms, lengths.tolist(), counts, strict=True):
            windows = chunk_windows(waveform[:length], model, chunk)
            row = torch.cat([run(window) for window in windows], -2)[..., :count, :]
            rows.append(nn.functional.pad(row, (0, 0, 0, max(counts) - count)))
        return torch.cat(rows, -3), torch.tensor(counts)

    return whole


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written.

    Attributes:
        path: of it.
        num_bytes: with all that lies beside it.
        opset, operators: what must run it; all of the domain ai.onnx.
        difference: from the model, on noise, or of what was quantised on speech where there is some.
        from_whole: of a file by chunks, from the model on whole utterances of the speech.
        run: what it computes.
    """

    path: Path
    num_bytes: int
    opset: int
    operators: list[str]
    difference: Difference
    from_whole: Difference | None
    run: Run


@dataclass(frozen=True)
class OnnxOptions:
    """What to write.

    Attributes:
        outputs: one of :data:`~.export_traced.OUTPUTS`.
        opset: of all files.
        float16: write model.float16.onnx as well: float16 weights, which are cast to float32 to compute.
        int8: write model.int8.onnx as well: matrix products of 8 bits and, with ``speech``, the positional convolution
            and those of an extractor with LayerNorm.
        chunk: write files by chunks.
        speech: waveforms (T,), for the ranges of the convolutions' values and for differences.
    """

    outputs: str = "last"
    opset: int = DEFAULT_OPSET
    float16: bool = False
    int8: bool = False
    chunk: Chunk | None = None
    speech: Sequence[Tensor] = ()


def write_onnx(
    model: Wav2Vec2Model,
    options: OnnxOptions,
    folder: Path,
    program: Program | None = None,
    check: Callable[[Sequence[OnnxFile]], None] = lambda files: None,
) -> list[OnnxFile]:
    """Write model.onnx and the other files of the options.

    Inputs are ``waveforms`` and ``lengths``, outputs ``last_hidden_state``, ``hidden_states`` or ``logits``, and
    ``frames``; by chunks ``waveforms`` and the first output alone. The labels of logits are in the metadata, under
    ``head``, the frames of a chunk under ``chunk``.

    Args:
        model: in eval mode, on the CPU.
        options: what to write.
        folder: where to.
        program: the model as :func:`~.export_traced.trace` traces it, where that has been done; not of chunks.
        check: looks at the files before they are kept, and raises.

    Raises:
        UserError: see :func:`check_onnx`; or model.onnx differs from the model by more than
            :data:`~.export_traced.LARGEST_DIFFERENCE`, or ``check`` raises. Nothing is written then.
    """
    check_onnx(options.opset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as name, quiet():
        path = Path(name) / ONNX
        _convert(program or _program(model, options), model, options, path)
        paths = [path]
        if options.float16:
            paths.append(path.with_name(ONNX_FLOAT16))
            _to_float16(path, paths[-1])
        if options.int8:
            paths.append(path.with_name(ONNX_INT8))
            _quantize(path, paths[-1], model, options)
        files = [_measured(path, model, options, folder) for path in paths]
        check(files)
        folder.mkdir(exist_ok=True)
        for part in Path(name).iterdir():
            part.replace(folder / part.name)
    return files


def _program(model: Wav2Vec2Model, options: OnnxOptions) -> Program:
    if options.chunk is None:
        return trace(model, options.outputs)
    shape = 1, min_samples(model, options.chunk.window)
    return traced(ChunkOutputs(model, options.outputs, options.chunk), (torch.randn(shape),))


def _convert(program: Program, model: Wav2Vec2Model, options: OnnxOptions, path: Path) -> None:
    """Write a program as ONNX in float32."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    output, opset = output_name(model, options.outputs), options.opset
    converted = torch.onnx.export(
        program,
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
    properties = {"sample_rate": str(SAMPLE_RATE), "config": json.dumps(model.config), **head_settings(model)}
    if options.chunk:
        properties["chunk"] = json.dumps(options.chunk._asdict())
    else:
        batch, samples = graph.inputs[0].shape
        converted.rename_axes({batch: "batch", samples: "samples"})
        if len(graph.outputs[0].shape) > 2:  # not of whole clips
            graph.outputs[0].shape[-2] = "frames"  # else a formula
        properties["min_samples"] = str(min_samples(model, 1))
    for node in graph.all_nodes():
        node.metadata_props.clear()  # where each was traced: more than the graph itself
    converted.model.metadata_props.update(properties)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    converted.save(path, external_data=num_bytes > _LARGEST_ONNX_FILE)


def _to_float16(source: Path, destination: Path) -> None:
    """Keep weights as float16, each cast to float32 before it is used: no operator need know float16 but Cast."""
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
    beside = model.ByteSize() > _LARGEST_ONNX_FILE
    onnx.save(model, destination, save_as_external_data=beside, location=f"{destination.name}.data")


def _quantize(source: Path, destination: Path, model: Wav2Vec2Model, options: OnnxOptions) -> None:
    """8 bits for the products with weights, whose inputs' ranges are taken anew each time, and for convolutions.

    Weights have 7 bits, by output channel: sums of pairs of products of 8 x 8 bits overflow on CPUs without VNNI. What
    stays float32 to compute is kept as float16.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(source, load_external_data=False).graph
    weights = {weight.name: weight.dims for weight in graph.initializer}
    # Matrices of nothing, of blocks without any width, are more than the quantiser can take.
    empty = [node.name for node in graph.node if any(0 in weights.get(name, ()) for name in node.input)]
    convolutions = [node.name for node in graph.node if node.op_type == "Conv" and _suits_8_bits(node.input[1], model)]
    beside = source.stat().st_size > _LARGEST_ONNX_FILE
    with tempfile.TemporaryDirectory() as folder:
        quantized = products = Path(folder) / "products.onnx"
        quantize_dynamic(
            source,
            products,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=empty,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=beside,
            extra_options={"MatMulConstBOnly": True},
        )
        if options.speech and convolutions:
            quantized = Path(folder) / "all.onnx"
            quantize_static(
                products,
                quantized,
                _Inputs(model, options),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=convolutions,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=beside,
            )
        _to_float16(quantized, destination)


def _suits_8_bits(weight: str, model: Wav2Vec2Model) -> bool:
    """Whether the convolution with the weight of this name does with 8 bits for what it hears, all frames on one scale.

    The waveform does not, and the first takes the least time. Where the extractor's frames are as loud as the sound
    that they are of, too little is left of quiet ones; a LayerNorm in each layer makes them alike.
    """
    if "feature_extractor" not in weight:
        return True
    return "conv_layers.0." not in weight and model.feature_extractor.conv_layers[-1].layer_norm is not None


class _Inputs:
    """The speech as the quantiser asks for it."""

    def __init__(self, model: Wav2Vec2Model, options: OnnxOptions) -> None:
        if options.chunk is None:
            feeds = [{"waveforms": one[None].numpy(), "lengths": np.array([len(one)])} for one in options.speech]
        else:
            windows = [window for one in options.speech for window in chunk_windows(one, model, options.chunk)]
            every = max(1, len(windows) // _CALIBRATION_WINDOWS)
            feeds = [{"waveforms": window.numpy()} for window in windows[::every]]
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _measured(path: Path, model: Wav2Vec2Model, options: OnnxOptions, folder: Path) -> OnnxFile:
    """Compare a file with the model, and look whether it can run everywhere."""
    opset, operators = _operators(path, folder)
    session = _session(path)
    whole = Outputs(model, options.outputs).eval()
    speech = [(waveform[None], torch.tensor([len(waveform)])) for waveform in options.speech]
    from_whole = None
    if options.chunk is None:
        function, run, checked = whole, _run_whole(session), noise(model, CHECKED_BATCHES)
    else:
        function = by_chunks(ChunkOutputs(model, options.outputs, options.chunk).eval(), model, options.chunk)
        run = by_chunks(_run_window(session), model, options.chunk)
        frames = options.chunk.frames
        checked = noise(model, ((2 * frames + 1,), (frames, 1)))
        from_whole = compare(whole, run, speech) if speech else None
    # What is quantised fits speech, and not noise.
    is_exact = path.name == ONNX
    difference = compare(function, run, checked if is_exact or not speech else speech)
    if is_exact:
        check_difference(difference, folder / path.name)
    num_bytes = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    return OnnxFile(folder / path.name, num_bytes, opset, operators, difference, from_whole, run)


def _operators(path: Path, folder: Path) -> tuple[int, list[str]]:
    """The opset of a file and what operators it needs.

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
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return opset, sorted({node.op_type for node in nodes})


def _session(path: Path) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run_whole(session: "onnxruntime.InferenceSession") -> Run:
    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found, frames = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        return torch.from_numpy(found), torch.from_numpy(frames)

    return run


def _run_window(session: "onnxruntime.InferenceSession") -> Callable[[Tensor], Tensor]:
    return lambda window: torch.from_numpy(session.run(None, {"waveforms": window.numpy()})[0])
