"""Writes a model as ONNX for ONNX Runtime: in float32 and of 8 bits, for any length or, if it streams, one step.

Standard operators only: ONNX Runtime's builds for phones and browsers may have no others. A step has fixed shapes,
which such builds want; the state of the stream goes in and comes out.
"""

import ast
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError, listed
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task_model import TaskModel
from wav2vec2.utils.quiet import quiet

from .comparison import CHECKED_BATCHES, LARGEST_DIFFERENCE, Run, compare, noise
from .int8 import LARGEST_ONNX_FILE, quantize
from .options import DEFAULT_OPSET
from .steps import StepFunction, by_steps, check_step, description, first_step, names_of_step, stepped, streams

ONNX, ONNX_INT8 = "model.onnx", "model.int8.onnx"
# So many chunks of the speech are enough to measure ranges on.
_CALIBRATION_CHUNKS = 200
# Where PyTorch's exporter notes the modules around a node, as a list.
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written."""

    path: Path
    num_bytes: int  # with the files of weights beside it
    operators: set[str]  # all of the domain ai.onnx
    measured: list[str]  # lines about its size and how far it is from the model
    run: Run


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the onnx format."""

    outputs: str = "last"  # one of OUTPUTS
    opset: int = DEFAULT_OPSET  # in all files
    int8: bool = False  # write model.int8.onnx as well, see int8.py
    speech: Sequence[Tensor] = ()  # waveforms (T,), to measure ranges of convolutions' inputs, and differences, on

    def output_of(self, model: Wav2Vec2Model) -> str:
        """Name the first output."""
        if self.outputs == "all":
            return "hidden_states"
        return "logits" if isinstance(model, TaskModel) else "last_hidden_state"


class Outputs(nn.Module):
    """The function of whole waveforms: see :data:`~.comparison.Run`.

    ``outputs`` is "last" for what ``forward`` gives, which may be logits, or "all" for what ``extract_features`` gives.
    """

    def __init__(self, model: Wav2Vec2Model, outputs: str) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Any:
        if self.outputs == "last":
            return self.model(waveforms, lengths)
        states, frames = self.model.extract_features(waveforms, lengths)
        return torch.stack(states), frames


def write_onnx(model: Wav2Vec2Model, options: OnnxOptions, folder: Path) -> list[OnnxFile]:
    """Write model.onnx and the other files of the options.

    Inputs are ``waveforms`` and ``lengths``, outputs ``last_hidden_state``, ``hidden_states`` or ``logits``, and
    ``frames``; a streaming model's are those of a step, which the metadata describe under ``step``. The labels of
    logits are there too, under ``head``.

    Args:
        model: in eval mode, on the CPU.
        options: how the files are made; :func:`~.options.check_onnx` has accepted the opset.
        folder: made if it is not there.

    Raises:
        UserError: model.onnx differs from the model by too much, PyTorch's exporter cannot write it, or a streaming
            model's steps do not have the wanted output.
    """
    check_step(model, options.outputs)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / ONNX]
    with quiet():
        convert(model, options, paths[0])
        if options.int8:
            paths.append(folder / ONNX_INT8)
            has_norms = model.feature_extractor.conv_layers[-1].layer_norm is not None
            quantize(paths[0], paths[1], has_norms, _feeds(paths[0], model, options.speech))
        return [_measured(path, model, options) for path in paths]


def onnx_facts(model: Wav2Vec2Model, options: OnnxOptions, files: Sequence[OnnxFile]) -> dict[str, Any]:
    """Return what the card says about the files."""
    return {
        "measured": [line for file in files for line in file.measured],
        "output": options.output_of(model),
        "operators": sorted(set().union(*(file.operators for file in files))),
        "opset": options.opset,
        "step": description(model) if streams(model) else None,
        "extractor": model.feature_extractor,
    }


def traced(model: Wav2Vec2Model, options: OnnxOptions) -> torch.export.ExportedProgram:
    """Trace a model without masks for any batch and any length of at least two frames, or one step of it."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.fold_weight_norm()  # one weight instead of weight norm's two factors
    function: nn.Module
    inputs: tuple[Any, ...]
    if streams(model):
        function, inputs, shapes = StepFunction(model), first_step(model), None
    else:
        function, dynamic = Outputs(model, options.outputs), torch.export.Dim.DYNAMIC
        (inputs,) = noise(model, [(11, 7)])
        shapes = {"waveforms": {0: dynamic, 1: dynamic}, "lengths": {0: dynamic}}
    with torch.no_grad(), quiet():
        return torch.export.export(function.eval(), inputs, dynamic_shapes=shapes, strict=False)


def convert(model: Wav2Vec2Model, options: OnnxOptions, path: Path) -> None:
    """Write a model as ONNX in float32, without a look at what it computes; errors as in :func:`write_onnx`.

    A node's name begins with its module's and a slash, which profilers and viewers show.
    """
    from onnx.helper import find_min_ir_version_for, make_opsetid

    opset, output = options.opset, options.output_of(model)
    inputs, outputs = names_of_step(model, output) if streams(model) else (["waveforms", "lengths"], [output, "frames"])
    # Any: its type says that it may be None, which the exporter with dynamo never returns.
    converted: Any = torch.onnx.export(
        traced(model, options),
        dynamo=True,
        input_names=inputs,
        output_names=outputs,
        opset_version=opset,
        verbose=False,
    )
    graph = converted.model.graph
    found = converted.model.opset_imports.get("")
    if found != opset:
        raise UserError(f"opset {opset}: PyTorch's exporter cannot write it (it gave {found}); take {DEFAULT_OPSET}")
    converted.model.ir_version = find_min_ir_version_for([make_opsetid("", opset)])  # for older programs, too
    properties = {"sample_rate": str(SAMPLE_RATE), "config": json.dumps(model.config)}
    if isinstance(model, TaskModel):
        properties["head"] = json.dumps(model.head_settings.to_dict())
    if streams(model):
        properties["step"] = json.dumps(description(model))
    else:
        batch, samples = graph.inputs[0].shape
        converted.rename_axes({batch: "batch", samples: "samples"})
        if len(graph.outputs[0].shape) > 2:  # not of whole clips
            graph.outputs[0].shape[-2] = "frames"  # else a formula
        properties["min_samples"] = str(model.feature_extractor.receptive_field)
    for node in graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]  # the last is the node itself
        if scopes and scopes[-1].startswith("model"):
            node.name = f"{scopes[-1].removeprefix('model').removeprefix('.')}/{node.name}"
        node.metadata_props.clear()  # where each was traced: more than the graph itself, and paths of this machine
    converted.model.metadata_props.update(properties)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    converted.save(path, external_data=num_bytes > LARGEST_ONNX_FILE)


def _feeds(path: Path, model: Wav2Vec2Model, speech: Sequence[Tensor]) -> list[dict[str, np.ndarray]]:
    """Return speech as inputs of a file; of a step some of its chunks, with the state before each."""
    if not streams(model):
        return [{"waveforms": x[None].numpy(), "lengths": np.array([len(x)])} for x in speech]
    run, names = _function(path), names_of_step(model, "")[0]
    num_chunks = sum(model.feature_extractor.num_frames(len(x)) for x in speech) // model.config["encoder_chunk_frames"]
    steps = (inputs for x in speech for inputs, _ in stepped(run, model, x))
    chosen = islice(steps, 0, None, max(1, num_chunks // _CALIBRATION_CHUNKS))
    return [{name: x.numpy() for name, x in zip(names, inputs, strict=True)} for inputs in chosen]


def _measured(path: Path, model: Wav2Vec2Model, options: OnnxOptions) -> OnnxFile:
    """Compare a file with the model, and check that it can run everywhere."""
    operators, is_exact = _operators(path), path.name == ONNX
    run: Run = _function(path)
    checked, compared_on = noise(model, CHECKED_BATCHES), "noise"
    if options.speech and not is_exact:  # what is quantised fits speech, and not noise
        checked = [(waveform[None], torch.tensor([len(waveform)])) for waveform in options.speech]
        compared_on = f"{len(checked)} utterances"
    if streams(model):
        run, compared_on = by_steps(run, model), f"{compared_on}, step by step"
    difference = compare(Outputs(model, options.outputs).eval(), run, checked)
    if is_exact:
        difference.check(path.name)
    num_bytes = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    limit = f" (at most {LARGEST_DIFFERENCE:.0e} is accepted)" if is_exact else ""
    line = (
        f"{path.name}: {num_bytes:,} bytes; {options.output_of(model).replace('_', ' ')} differs from PyTorch's by at "
        f"most {difference.largest:.1e}{limit}, relative to the largest value where that is above 1; cosine of a frame "
        f"{difference.mean_cosine:.6f} on average, {difference.lowest_cosine:.6f} at least; {compared_on}"
    )
    return OnnxFile(path, num_bytes, operators, [line], run)


def _operators(path: Path) -> set[str]:
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
            f"{path.name}: has {listed('operators', others)} beyond the standard ones, which ONNX Runtime's builds for "
            "phones and browsers may lack; nothing was written; please report it"
        )
    return {node.op_type for node in nodes}


def onnx_session(path: Path, trace: Path | None = None) -> Any:
    """Load a file into ONNX Runtime, with torch's number of threads; ``trace`` begins the name of a file of times."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _function(path: Path) -> Callable[..., Any]:
    """Load a file; returns its function of tensors."""
    session = onnx_session(path)
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return run
