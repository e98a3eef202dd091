"""Writes the folder of each format with its card, after a comparison with the model."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import joined_state
from wav2vec2.files.hub import CARD, OWN_TYPE, WEIGHTS
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.import_huggingface import compare_with_source, import_huggingface_model

from .bundle import load_with_its_code
from .card import Card
from .huggingface import check_exportable, export_huggingface, model_classes, write_text
from .onnx import ONNX, OnnxFile, OnnxOptions, write_onnx
from .traced import (
    CHECKED_BATCHES,
    LARGEST_DIFFERENCE,
    Outputs,
    check_difference,
    compare,
    noise,
    output_name,
)


@dataclass(frozen=True)
class Job:
    """A model to write, with its card and the options.

    Attributes:
        contents: contents of the model file.
        model: the model built from them, in eval mode.
        card: the facts for the cards.
        onnx: options of the onnx format.
        model_type: option of the huggingface format, see :func:`~.huggingface.export_huggingface`.
    """

    contents: Mapping[str, Any]
    model: Wav2Vec2Model
    card: Card
    onnx: OnnxOptions
    model_type: str | None = None


def _weights(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in the contents of a model file, those of a head among them."""
    return joined_state(contents["state_dict"], contents.get("head", {}).get("state_dict", {}))


def write_folders(job: Job, formats: Sequence[str], out: Path) -> None:
    """Write a folder in ``out`` for each format, whole or not at all, and print what was measured.

    Raises:
        UserError: the model cannot be written in a format, or what was written is not the model.
    """
    if "huggingface" in formats:  # a refusal comes before the other formats, which take longer
        check_exportable(_weights(job.contents), job.contents["config"], job.model_type, job.card.head)
    for name in formats:
        folder = out / name
        try:
            card, measured = _WRITERS[name](job, folder)
            write_text(card, folder / CARD)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # it was not there before
            raise
        print(folder)
        for line in measured:
            print(f"  {line}")


def _write_huggingface(job: Job, folder: Path) -> tuple[str, list[str]]:
    head, weights = job.card.head, _weights(job.contents)
    model_type = export_huggingface(weights, job.contents["config"], folder, job.model_type, head)
    auto_class, own_class = model_classes(model_type, head)
    written = _weights(read_model_file(folder))
    for name, tensor in weights.items():
        if tensor.dtype != written[name].dtype or not torch.equal(tensor, written[name]):
            raise UserError(f"{folder}: {name} is not what was written; try again, or check the disk")
    if model_type == OWN_TYPE:
        difference = _difference_of_own_code(job.model, folder, own_class)
    else:
        imported = import_huggingface_model(folder, normalize_waveform=job.model.config["normalize_waveform"])
        largest = compare_with_source(imported, folder)
        difference = f"largest difference of transformers' hidden states from ours on a second of noise: {largest:.1e}"
    size = (folder / WEIGHTS).stat().st_size
    measured = [f"{WEIGHTS}: {size:,} bytes; the weights of the model file, bit for bit, in its precision", difference]
    return job.card.text("huggingface", measured, model_class=auto_class, own_code=model_type == OWN_TYPE), measured


def _difference_of_own_code(model: Wav2Vec2Model, folder: Path, class_name: str) -> str:
    loaded = load_with_its_code(folder, class_name)

    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(waveforms.size(1)) < lengths[:, None]
        return loaded(waveforms, attention_mask=mask)[0], loaded._get_feat_extract_output_lengths(lengths)

    difference = compare(Outputs(model, "last").eval(), run, noise(model, CHECKED_BATCHES))
    check_difference(difference, folder)
    return (
        f"largest difference from the model on noise, with and without padding: {difference.largest:.1e} (at most "
        f"{LARGEST_DIFFERENCE:.0e} is accepted), relative to the largest value where that is above 1"
    )


def _write_onnx(job: Job, folder: Path) -> tuple[str, list[str]]:
    options, extractor = job.onnx, job.model.feature_extractor
    output = output_name(job.model, options.outputs)
    files = write_onnx(job.model, options, folder)
    measured = []
    for file in files:
        measured.append(_described(file, output))
        if file.from_whole:
            measured.append(
                f"{file.path.name}, chunk by chunk: cosine of a frame with that of the whole utterance "
                f"{file.from_whole.mean_cosine:.4f} on average, {file.from_whole.lowest_cosine:.4f} at least; "
                f"{len(options.speech)} utterances"
            )
    card = job.card.text(
        "onnx",
        measured,
        output=output,
        min_samples=extractor.num_samples(1),
        opset=options.opset,
        operators=sorted(set().union(*(file.operators for file in files))),
        chunk=options.chunk,
        hop=extractor.stride,
        window_samples=options.chunk and extractor.num_samples(options.chunk.window),
    )
    return card, measured


def _described(file: OnnxFile, output: str) -> str:
    """State the size of a file, and how far it is from the model."""
    limit = f" (at most {LARGEST_DIFFERENCE:.0e} is accepted)" if file.path.name == ONNX else ""
    return (
        f"{file.path.name}: {file.num_bytes:,} bytes; {output.replace('_', ' ')} differs from PyTorch's by at most "
        f"{file.difference.largest:.1e}{limit}, relative to the largest value where that is above 1; cosine of a frame "
        f"{file.difference.mean_cosine:.6f} on average, {file.difference.lowest_cosine:.6f} at least; "
        f"{file.compared_on}"
    )


_WRITERS: dict[str, Callable[[Job, Path], tuple[str, list[str]]]] = {
    "huggingface": _write_huggingface,
    "onnx": _write_onnx,
}
