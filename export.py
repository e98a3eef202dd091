"""Write a model in formats that other programs load: one folder each, with a model card (README.md).

  hub           model.safetensors and config.json, as the Hugging Face hub has them; read by wav2vec2.hub
  onnx          model.onnx (--int8: model.int8.onnx too) for ONNX Runtime; pip install -r requirements-export.txt
  torch_export  model.pt2 for torch.export.load, without this project
  huggingface   for transformers' Auto classes: its own format where it knows the model, else with the model's code

Every file is loaded again and compared with the model before it is kept; the card says what was measured. Of a
fine-tuned model onnx, torch_export and huggingface give logits; --drop_head leaves the encoder.

  python export.py --model exp/hubert-base/final/ckpts/pruned_hubert_base.pth --out exp/hubert-base/export \\
      --formats hub,onnx,torch_export --teacher facebook/hubert-base-ls960 --licence mit
"""

import argparse
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cli
from evaluation.cost import UTTERANCE_SECONDS, macs_per_second
from evaluation.tables import card_metrics, model_of_shape, read_results
from wav2vec2.checkpoint import read_model_file
from wav2vec2.errors import UserError, listed
from wav2vec2.files import read_safetensors
from wav2vec2.heads import head_of, joined_state, model_with_its_head, without_head
from wav2vec2.hub import CARD, WEIGHTS, read_folder, write_folder, write_text
from wav2vec2.model import Wav2Vec2Model, masked_units, wav2vec2_model
from wav2vec2.task_model import Head
from wav2vec2.utils.export_huggingface import (
    CTC_PREFIX,
    OWN_PREFIX,
    OWN_TYPE,
    auto_class,
    check_exportable,
    ctc_class,
    export_huggingface,
    load_with_its_code,
)
from wav2vec2.utils.export_traced import (
    CHECKED_BATCHES,
    DEFAULT_OPSET,
    LARGEST_DIFFERENCE,
    ONNX_INT8,
    OUTPUTS,
    Exported,
    Program,
    check_difference,
    check_onnx,
    compare,
    min_samples,
    output_name,
    trace,
    write_onnx,
    write_pt2,
)
from wav2vec2.utils.import_huggingface import FAMILIES, compare_with_source, import_huggingface_model
from wav2vec2.utils.model_card import FORMATS, Card


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path, help="model file (.pth)")
    parser.add_argument("--out", required=True, type=Path, help="folder; each format gets one in it, of its name")
    parser.add_argument("--formats", default="hub", help=f"comma-separated, of {', '.join(FORMATS)}")
    parser.add_argument(
        "--outputs",
        choices=OUTPUTS,
        default="last",
        help="of onnx and torch_export: the last hidden state (logits, if there is a head), or all",
    )
    parser.add_argument("--drop_head", action="store_true", help="export the encoder alone, as a plain model")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="of onnx")
    parser.add_argument("--int8", action="store_true", help="of onnx: a second file, with 8-bit weights")
    parser.add_argument(
        "--model_type",
        choices=("hubert", "wav2vec2"),
        help="of huggingface, where transformers knows the model: which of the two, which are one network (default: "
        "hubert; a WavLM is one)",
    )
    card = parser.add_argument_group("what the card cannot know")
    card.add_argument("--name", help="title (default: the name of --out)")
    card.add_argument("--teacher", help="the teacher's name; ORG/NAME links to it on the hub")
    card.add_argument("--teacher_ckpt", type=Path, help="the teacher's model file: gives the sparsity")
    card.add_argument("--data", help="what the model was trained on")
    card.add_argument("--licence", help="of the weights, one of the hub's identifiers: mit, apache-2.0, cc-by-4.0, ...")
    card.add_argument("--teacher_licence", help="of the teacher's weights")
    card.add_argument("--data_licence", help="of --data")
    card.add_argument(
        "--evaluation", type=Path, metavar="JSON", help="results of evaluate.py, with this model among them"
    )
    return parser.parse_args()


def chosen_formats(args: argparse.Namespace) -> list[str]:
    """The formats of --formats, once each, after a look at the other options."""
    formats = list(dict.fromkeys(name.strip() for name in args.formats.split(",")))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UserError(f"--formats: expected some of {', '.join(FORMATS)}, separated by commas, found {unknown[0]!r}")
    if "onnx" in formats:
        check_onnx(args.opset)
    elif args.int8:
        raise UserError("--int8: it is a second file of the onnx format; add onnx to --formats, or leave it out")
    for name, of in (("licence", "model"), ("teacher_licence", "teacher"), ("data_licence", "data")):
        licence = getattr(args, name)
        if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
            raise UserError(
                f"--{name} {licence}: expected one of the hub's identifiers, in small letters: mit, apache-2.0, "
                "cc-by-4.0, other, ..."
            )
        if licence and not (getattr(args, of) or (of == "teacher" and args.teacher_ckpt)):
            raise UserError(f"--{name} {licence}: the card does not say of what; add --{of}")
    return formats


def describe(contents: dict[str, Any], args: argparse.Namespace) -> Card:
    """What the card says, whatever the format."""
    teacher = args.teacher or (args.teacher_ckpt.name if args.teacher_ckpt else None)
    with args.model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    made_by = contents.get("made_by")
    return Card(
        config=contents["config"],
        name=args.name or args.out.resolve().name,
        macs_per_second=macs_per_second(contents["config"])["total"],
        macs_seconds=UTTERANCE_SECONDS,
        teacher=teacher,
        teacher_num_params=num_params(args.teacher_ckpt) if args.teacher_ckpt else None,
        data=args.data,
        licence=args.licence,
        teacher_licence=args.teacher_licence,
        data_licence=args.data_licence,
        evaluation=measured_of(contents["config"], args) if args.evaluation else (),
        made_by=made_by if isinstance(made_by, dict) else {},
        source=f"{args.model.name}, SHA-256 {digest}",
        head=head_of(contents, args.model),
    )


def measured_of(config: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What --evaluation says of the model, but for its head's scores if that is dropped.

    Raises:
        UserError: the file is not evaluate.py's, or does not tell which of its models this one is.
    """
    results = read_results(args.evaluation)
    with torch.device("meta"):
        config = wav2vec2_model(**config).config  # with the keys that a published one leaves out
    try:
        model = model_of_shape(results, config, args.model)
        return card_metrics(results, {**model, "head": None} if args.drop_head else model)
    except UserError as error:
        raise UserError(f"--evaluation {args.evaluation}: {error}") from error


def num_params(path: Path) -> int:
    with torch.device("meta"):
        return int(wav2vec2_model(**read_model_file(path)["config"]).get_num_params())


@dataclass(frozen=True)
class Job:
    """What every writer needs: a model file's contents, its model in eval mode, what the card says, the options."""

    contents: dict[str, Any]
    model: Wav2Vec2Model
    card: Card
    args: argparse.Namespace

    @cached_property
    def program(self) -> Program:
        """The model as torch.export traces it, once for all formats."""
        return trace(self.model, self.args.outputs)


def write_hub(job: Job, folder: Path) -> None:
    measured = ["the weights are those of the model file, bit for bit, in its precision"]
    card = job.card.text("hub", measured)
    write_folder(job.contents["state_dict"], job.contents["config"], folder, card, job.contents.get("head"))
    check_weights_written(job.model, model_with_its_head(read_folder(folder), folder).state_dict(), folder)
    report(folder / WEIGHTS, measured)


def check_weights_written(model: Wav2Vec2Model, weights: dict[str, Tensor], folder: Path) -> None:
    """Check that ``weights``, read from ``folder``, are the model's.

    Raises:
        UserError: names a weight that differs.
    """
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, weights[name]):
            raise UserError(f"{folder}: {name} is not what was written; try again, or check the disk")


def write_onnx_format(job: Job, folder: Path) -> None:
    files = write_onnx(job.program, job.model, job.args.outputs, folder, job.args.opset, job.args.int8)
    write_traced_card(job, "onnx", files, min_frames=1)


def write_torch_export(job: Job, folder: Path) -> None:
    file = write_pt2(job.program, job.model, job.args.outputs, folder)
    write_traced_card(job, "torch_export", [file], min_frames=2)


def write_traced_card(job: Job, format_name: str, files: list[Exported], min_frames: int) -> None:
    frames = [frames for batch in CHECKED_BATCHES for frames in batch]
    measured, output = [], output_name(job.model, job.args.outputs)
    what = "logits" if output == "logits" else "hidden states"
    for path, num_bytes, difference in files:
        limit = "" if path.name == ONNX_INT8 else f" (at most {LARGEST_DIFFERENCE:.0e} is accepted)"
        measured.append(
            f"{path.name}: {num_bytes:,} bytes; {what} differ from PyTorch's by at most "
            f"{difference.largest:.1e}{limit}, relative to the largest value where that is above 1; cosine of a frame "
            f"{difference.mean_cosine:.6f} on average, {difference.lowest_cosine:.6f} at least; noise in "
            f"{len(CHECKED_BATCHES)} batches that were not traced, with and without padding, {min(frames)} to "
            f"{max(frames)} frames"
        )
    text = job.card.text(
        format_name,
        measured,
        output=output,
        min_samples=min_samples(job.model, min_frames),
    )
    folder = files[0].path.parent
    write_text(text, folder / CARD)
    report(folder, measured)


def write_huggingface(job: Job, folder: Path) -> None:
    head = job.card.head
    state_dict = joined_state(job.contents["state_dict"], job.contents["head"]["state_dict"] if head else {})
    model_type = export_huggingface(state_dict, job.contents["config"], folder, job.args.model_type, head)
    if model_type == OWN_TYPE:
        model_class, difference = auto_class(head), check_own_model(job.model, folder, head)
    else:
        model_class = FAMILIES[model_type].model_class if head is None else ctc_class(model_type)
        difference = check_known_model(job.model, folder)
    measured = ["the weights are those of the model file, bit for bit, in its precision", difference]
    card = job.card.text("huggingface", measured, model_class=model_class, own_code=model_type == OWN_TYPE)
    write_text(card, folder / CARD)
    report(folder / WEIGHTS, measured)


def check_known_model(model: Wav2Vec2Model, folder: Path) -> str:
    """Compare a folder of a model that transformers knows with the model; what is found is in words."""
    imported = import_huggingface_model(folder, normalize_waveform=model.config["normalize_waveform"])
    written = read_safetensors(folder / WEIGHTS)
    own = {name.replace(CTC_PREFIX, "aux."): x.float() for name, x in written.items() if name.startswith(CTC_PREFIX)}
    check_weights_written(model, {**imported.model.state_dict(), **own}, folder)
    difference = compare_with_source(imported, folder)
    return f"largest difference of transformers' hidden states from ours on a second of noise: {difference:.1e}"


def check_own_model(model: Wav2Vec2Model, folder: Path, head: Head | None) -> str:
    """The same for a folder with the code of its model."""
    loaded = load_with_its_code(folder, head)
    weights = {name.removeprefix(OWN_PREFIX): tensor for name, tensor in loaded.state_dict().items()}
    check_weights_written(model, weights, folder)

    def run(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(waveforms.size(1)) < lengths[:, None]
        return loaded(waveforms, attention_mask=mask)[0], loaded._get_feat_extract_output_lengths(lengths)

    difference = compare(model, "last", run)
    check_difference(difference, folder)
    return (
        f"largest difference from the model on noise, with and without padding: {difference.largest:.1e} (at most "
        f"{LARGEST_DIFFERENCE:.0e} is accepted), relative to the largest value where that is above 1"
    )


WRITERS: dict[str, Callable[[Job, Path], None]] = {
    "hub": write_hub,
    "onnx": write_onnx_format,
    "torch_export": write_torch_export,
    "huggingface": write_huggingface,
}


def report(path: Path, measured: Sequence[str]) -> None:
    """Print what was written, and what is known of it."""
    size = f", {path.stat().st_size:,} bytes" if path.is_file() else ""
    print(f"{path}{size}")
    for line in measured:
        print(f"  {line}")


def check_folders(folders: Iterable[Path]) -> None:
    """Check that nothing can be overwritten.

    Raises:
        UserError: a folder has files in it, or is none.
    """
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"{folder}: a file, where the folder of a format is to be; give another --out, or remove it"
            )
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if found:
            raise UserError(
                f"{folder}: exists, with {listed('files in it', found)}, expected a new folder or an empty one; give "
                "another --out, or remove it"
            )


def main(args: argparse.Namespace) -> None:
    formats = chosen_formats(args)
    check_folders(args.out / name for name in formats)
    contents = read_model_file(args.model)
    if args.drop_head:
        contents |= without_head(contents)
        contents.pop("head", None)
    units = masked_units(contents["state_dict"])
    if units:
        raise UserError(f"{args.model}: has masks on {', '.join(units)}; prune.py makes the model file to export")
    if "huggingface" in formats:  # before the others, which take longer
        head = head_of(contents, args.model)
        check_exportable(contents["state_dict"], contents["config"], args.model_type, head)
    job = Job(contents, model_with_its_head(contents, args.model).eval(), describe(contents, args), args)
    for name in formats:
        try:
            WRITERS[name](job, args.out / name)
        except BaseException:
            shutil.rmtree(args.out / name, ignore_errors=True)  # it was not there before
            raise


if __name__ == "__main__":
    cli.run(main, parse_args())
