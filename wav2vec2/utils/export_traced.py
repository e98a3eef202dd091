"""Writes a model as a .pt2 file and as ONNX, from one program that ``torch.export`` traces for any batch and length.

The program is ``(waveforms, lengths) -> (hidden state or states, frames)``: (B, T) samples at 16 kHz, (B,) valid
samples of each; (B, frames, D), or (layers + 1, B, frames, D) for all of them; (B,) valid frames. Of a model with a
task head it gives logits, (B, frames, outputs) or, of whole clips, (B, classes). Each file is loaded again and compared
with the model before it is kept.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..audio import SAMPLE_RATE
from ..errors import UserError, one_line
from ..files import atomic_path
from ..heads import TaskModel
from ..model import Wav2Vec2Model
from .quiet import quiet

OUTPUTS = ("last", "all")
PT2, ONNX, ONNX_INT8 = "model.pt2", "model.onnx", "model.int8.onnx"
MIN_OPSET, DEFAULT_OPSET = 18, 20  # the oldest that PyTorch's exporter writes

# Of an exported model from PyTorch's; relative to the largest value of a hidden state, where that is above 1: float32
# resolves no better.
LARGEST_DIFFERENCE = 1e-4

# Frames of each waveform of each batch that an export is checked on; 0 frames are less than the receptive field.
CHECKED_BATCHES = ((77,), (131, 62, 2, 0), (38, 38), (347, 250))
_TRACED_BATCH = (11, 7)

# protobuf's limit is 2 GiB: the weights of larger models go beside the file.
_LARGEST_ONNX_FILE = 2**31 - 2**24

Program = torch.export.ExportedProgram
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Difference(NamedTuple):
    """Of an exported model's hidden states from PyTorch's, over the valid frames of :data:`CHECKED_BATCHES`.

    Attributes:
        largest: the largest absolute difference, relative as :data:`LARGEST_DIFFERENCE` says.
        mean_cosine, lowest_cosine: similarity of frames, at the worst of the hidden states.
    """

    largest: float
    mean_cosine: float
    lowest_cosine: float


class Exported(NamedTuple):
    """A file that was written, its size with all that lies beside it, and how it differs from the model."""

    path: Path
    num_bytes: int
    difference: Difference


class Outputs(nn.Module):
    """The function that is exported.

    Args:
        model: in eval mode.
        outputs: "last" for what ``forward`` gives, which may be logits; "all" for what ``extract_features`` gives.
    """

    def __init__(self, model: Wav2Vec2Model, outputs: str) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.outputs == "last":
            return self.model(waveforms, lengths)
        hidden_states, frames = self.model.extract_features(waveforms, lengths)
        return torch.stack(hidden_states), frames


def output_name(model: Wav2Vec2Model, outputs: str) -> str:
    """What the first output is called."""
    if outputs == "all":
        return "hidden_states"
    return "logits" if isinstance(model, TaskModel) else "last_hidden_state"


def trace(model: Wav2Vec2Model, outputs: str) -> Program:
    """Trace a model without masks for any batch and any length of at least two frames.

    Args:
        model: in eval mode, on the CPU.
        outputs: one of :data:`OUTPUTS`.
    """
    function = Outputs(_with_plain_convolution(model), outputs).eval()
    dynamic = torch.export.Dim.DYNAMIC  # torch derives the least length itself: what makes two frames
    with torch.no_grad(), quiet():
        program = torch.export.export(
            function,
            _waveforms(model, _TRACED_BATCH, seed=0),
            dynamic_shapes={"waveforms": {0: dynamic, 1: dynamic}, "lengths": {0: dynamic}},
            strict=False,
        )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # the file need not tell where this project lies on this machine
    return program


def _with_plain_convolution(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """A copy whose positional convolution has its weight, and not the two factors that training wants."""
    model = copy.deepcopy(model).requires_grad_(False)
    normed = model.encoder.transformer.pos_conv_embed.conv
    channels = len(normed.bias)
    with torch.device("meta"):
        conv = nn.Conv1d(channels, channels, normed.kernel_size, padding=normed.padding, groups=normed.groups)
    conv.weight, conv.bias = nn.Parameter(normed.weight, requires_grad=False), normed.bias
    model.encoder.transformer.pos_conv_embed.conv = conv
    return model


def write_pt2(program: Program, model: Wav2Vec2Model, outputs: str, folder: Path) -> Exported:
    """Write model.pt2, which ``torch.export.load`` loads.

    Raises:
        UserError: it differs from the model by more than :data:`LARGEST_DIFFERENCE`; nothing is written.
    """
    path = folder / PT2
    with atomic_path(path) as temporary, quiet():
        with temporary.open("wb") as file:
            torch.export.save(program, file, extra_files=_head_settings(model))
        with temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        difference = compare(model, outputs, loaded)
        check_difference(difference, path)
    return Exported(path, path.stat().st_size, difference)


def _head_settings(model: Wav2Vec2Model) -> dict[str, str]:
    """What the logits of a model with a task head are of, as JSON for a file's metadata; nothing of other models."""
    return {"head": json.dumps(model.head_settings.to_dict())} if isinstance(model, TaskModel) else {}


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


def write_onnx(
    program: Program, model: Wav2Vec2Model, outputs: str, folder: Path, opset: int, int8: bool
) -> list[Exported]:
    """Write model.onnx, and with ``int8`` model.int8.onnx, whose matrix products have 8-bit weights.

    Inputs are ``waveforms`` and ``lengths``, outputs ``last_hidden_state``, ``hidden_states`` or ``logits``, and
    ``frames``. The labels of logits are in the metadata, under ``head``.

    Raises:
        UserError: see :func:`check_onnx`; or model.onnx differs from the model by more than
            :data:`LARGEST_DIFFERENCE`, and nothing is written. The difference of the int8 file is only measured.
    """
    check_onnx(opset)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
        path = Path(name) / ONNX
        with quiet():
            _convert_to_onnx(program, model, outputs, path, opset)
        difference = compare(model, outputs, onnx_session(path))
        check_difference(difference, folder / ONNX)
        differences = {ONNX: difference}
        if int8:
            with quiet():
                _quantize(path, path.with_name(ONNX_INT8))
            differences[ONNX_INT8] = compare(model, outputs, onnx_session(path.with_name(ONNX_INT8)))
        files = []
        for file, measured in differences.items():
            parts = list(Path(name).glob(f"{file}*"))  # a large model has its weights beside it
            files.append(Exported(folder / file, sum(part.stat().st_size for part in parts), measured))
            for part in parts:
                part.replace(folder / part.name)
    return files


def _convert_to_onnx(program: Program, model: Wav2Vec2Model, outputs: str, path: Path, opset: int) -> None:
    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["waveforms", "lengths"],
        output_names=[output_name(model, outputs), "frames"],
        opset_version=opset,
        verbose=False,
    )
    found = converted.model.opset_imports.get("")
    if found != opset:
        raise UserError(f"opset {opset}: PyTorch's exporter cannot write it (it gave {found}); take {DEFAULT_OPSET}")
    batch, samples = converted.model.graph.inputs[0].shape
    converted.rename_axes({batch: "batch", samples: "samples"})
    states = converted.model.graph.outputs[0]
    if len(states.shape) > 2:  # not of whole clips
        states.shape[-2] = "frames"  # else a formula
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # where each was traced: more than the graph itself
    converted.model.metadata_props.update(
        {
            "sample_rate": str(SAMPLE_RATE),
            "min_samples": str(min_samples(model, 1)),
            "config": json.dumps(model.config),
            **_head_settings(model),
        }
    )
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    converted.save(path, external_data=num_bytes > _LARGEST_ONNX_FILE)


def _quantize(source: Path, destination: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Matrices of nothing, of blocks without any width, are more than the quantiser can take.
    graph = onnx.load(source, load_external_data=False).graph
    empty = {weight.name for weight in graph.initializer if 0 in weight.dims}
    quantize_dynamic(
        source,
        destination,
        op_types_to_quantize=["MatMul", "Gemm"],  # the products with weights, which hold nearly all of them
        nodes_to_exclude=[node.name for node in graph.node if not empty.isdisjoint(node.input)],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # with signed ones the sums overflow on CPUs without VNNI
        use_external_data_format=source.stat().st_size > _LARGEST_ONNX_FILE,
        extra_options={"MatMulConstBOnly": True},
    )


def onnx_session(path: Path) -> Run:
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


def compare(model: Wav2Vec2Model, outputs: str, run: Run) -> Difference:
    """How ``run``, an exported model, differs from the model on batches that it was not traced with.

    Raises:
        UserError: its outputs have other shapes or other valid frames.
    """
    function = Outputs(model, outputs).eval()
    differences, cosines = [], []
    for seed, batch in enumerate(CHECKED_BATCHES, start=1):
        waveforms, lengths = _waveforms(model, batch, seed)
        with torch.inference_mode():
            wanted, wanted_frames = function(waveforms, lengths)
            found, frames = run(waveforms, lengths)
        if found.shape != wanted.shape or not torch.equal(frames, wanted_frames):
            raise UserError(
                f"the exported model gives {list(found.shape)} with {frames.tolist()} valid frames, expected "
                f"{list(wanted.shape)} with {wanted_frames.tolist()}; please report it"
            )
        if wanted.ndim == 2:  # of whole clips: as if each were one frame
            wanted, found, wanted_frames = wanted[:, None], found[:, None], wanted_frames.clamp(max=1)
        valid = torch.arange(wanted.size(-2)) < wanted_frames[:, None]  # (B, frames)
        # (hidden states, valid frames, D)
        wanted, found = (x.reshape(-1, *x.shape[-3:])[:, valid].double() for x in (wanted, found))
        scale = wanted.abs().amax((1, 2), keepdim=True).clamp(min=1)
        differences.append(((found - wanted).abs() / scale).max())
        cosines.append(torch.cosine_similarity(found, wanted, dim=-1))
    cosine = torch.cat(cosines, dim=1)
    return Difference(float(torch.stack(differences).max()), float(cosine.mean(1).min()), float(cosine.min()))


def check_difference(difference: Difference, path: Path) -> None:
    """Refuse an export that is not the model.

    Raises:
        UserError: the difference is above :data:`LARGEST_DIFFERENCE`.
    """
    if not difference.largest <= LARGEST_DIFFERENCE:  # NaN is not smaller either
        raise UserError(
            f"{path}: the exported model's hidden states differ from PyTorch's by {difference.largest:.1e}, expected "
            f"at most {LARGEST_DIFFERENCE:.0e}; it was not written; please report it"
        )


def min_samples(model: Wav2Vec2Model, num_frames: int) -> int:
    """The samples that ``num_frames`` frames take at least."""
    extractor = model.feature_extractor
    return extractor.num_samples(num_frames)


def _waveforms(model: Wav2Vec2Model, batch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, T) with an offset, which shows a lost normalisation, of this many frames each; and lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    # Any number of samples but less than one more frame.
    lengths = [max(min_samples(model, frames + 1) - 1 - 7 * row, 5) for row, frames in enumerate(batch)]
    rows = [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
