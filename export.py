"""Write a model in formats that other programs load: one folder each, with a model card (README.md).

  hub           model.safetensors and config.json, as the Hugging Face hub has them; read by wav2vec2.files.hub
  onnx          model.onnx for ONNX Runtime, with --float16 and --int8 smaller ones beside it, of any length or, with
                --chunk_seconds, by chunks; pip install -r requirements-export.txt
  torch_export  model.pt2 for torch.export.load, without this project
  huggingface   for transformers' Auto classes: its own format where it knows the model, else with the model's code

Every file is loaded again and compared with the model before it is kept; the card says what was measured. Of a
fine-tuned model onnx, torch_export and huggingface give logits; --drop_head leaves the encoder.

  python export.py --model exp/hubert-base/final/ckpts/pruned_hubert_base.pth --out exp/hubert-base/export \\
      --formats hub,onnx,huggingface --teacher facebook/hubert-base-ls960 --licence mit
"""

import argparse
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cli
from evaluation.backends import read_speech
from evaluation.cost import UTTERANCE_SECONDS, macs_per_second
from evaluation.losses import Loss, losses
from evaluation.tables import card_metrics, model_of_shape, read_results
from exporters.card import FORMATS, Card
from exporters.huggingface import (
    CTC_PREFIX,
    OWN_PREFIX,
    OWN_TYPE,
    auto_class,
    check_exportable,
    ctc_class,
    export_huggingface,
    load_with_its_code,
)
from exporters.onnx import (
    DEFAULT_OPSET,
    ONNX,
    Chunk,
    OnnxFile,
    OnnxOptions,
    check_onnx,
    write_onnx,
)
from exporters.traced import (
    CHECKED_BATCHES,
    LARGEST_DIFFERENCE,
    OUTPUTS,
    Exported,
    Outputs,
    Program,
    check_difference,
    compare,
    min_samples,
    noise,
    output_name,
    trace,
    write_pt2,
)
from labels.lists import Probe, read_probe
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError, listed
from wav2vec2.files.heads import head_of, joined_state, model_with_its_head, without_head
from wav2vec2.files.hub import CARD, WEIGHTS, read_folder, write_folder, write_text
from wav2vec2.files.storage import read_safetensors
from wav2vec2.model import Wav2Vec2Model, masked_units, wav2vec2_model
from wav2vec2.task_model import CLIPS, Head, TaskModel
from wav2vec2.utils.import_huggingface import FAMILIES, compare_with_source, import_huggingface_model

# Flags of the onnx format alone.
ONNX_FLAGS = ("float16", "int8", "tsv", "chunk_seconds", "probes", "max_loss")
# Seconds of a chunk, and of what is around it: more than this, and it is no streaming.
MAX_SECONDS = 60.0


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
    parser.add_argument(
        "--model_type",
        choices=("hubert", "wav2vec2"),
        help="of huggingface, where transformers knows the model: which of the two, which are one network (default: "
        "hubert; a WavLM is one)",
    )
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="%(default)s by default")
    onnx.add_argument("--float16", action="store_true", help="a second file, half as large; computes in float32")
    onnx.add_argument("--int8", action="store_true", help="a second file, which computes with 8 bits; see --tsv")
    onnx.add_argument(
        "--tsv", type=Path, help="manifest of speech, from prepare_data.py: with it int8 is of convolutions too"
    )
    onnx.add_argument("--chunk_seconds", type=float, help="take speech by chunks of this length, for streaming")
    onnx.add_argument("--left_seconds", type=float, help="what is heard before a chunk (default: 2)")
    onnx.add_argument("--right_seconds", type=float, help="what is heard behind a chunk (default: 0)")
    onnx.add_argument("--probes", type=Path, nargs="+", default=[], metavar="TSV", help="measure what files lose")
    onnx.add_argument("--max_loss", type=float, metavar="POINTS", help="keep nothing if a file loses more quality")
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
        check_onnx_options(args)
    elif given := [f"--{name}" for name in ONNX_FLAGS if getattr(args, name) not in (None, False, [])]:
        raise UserError(f"{given[0]}: is of the onnx format; add onnx to --formats, or leave it out")
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


def check_onnx_options(args: argparse.Namespace) -> None:
    """Refuse options of the onnx format that cannot be, or that nothing comes of.

    Raises:
        UserError: there is one.
    """
    if args.max_loss is not None and not args.probes:
        raise UserError("--max_loss: quality is measured on --probes, lists of labelled clips; give some")
    if args.max_loss is not None and not 0 <= args.max_loss < math.inf:
        raise UserError(f"--max_loss {args.max_loss:g}: expected points of quality, at least 0")
    if args.chunk_seconds is None:
        for name in ("left_seconds", "right_seconds"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: is beside a chunk; give --chunk_seconds, too")
        if args.tsv and not (args.int8 or args.float16):
            raise UserError("--tsv: nothing is measured on it; give --int8, --float16 or --chunk_seconds")
        return
    for name, value in zip(("chunk", "left", "right"), seconds_of_chunk(args), strict=True):
        if not 0 <= value <= MAX_SECONDS:
            raise UserError(f"--{name}_seconds {value:g}: expected 0 to {MAX_SECONDS:g}")
    if not args.tsv:
        raise UserError("--chunk_seconds: give --tsv, speech to measure how far chunks are from whole utterances")


def seconds_of_chunk(args: argparse.Namespace) -> tuple[float, float, float]:
    """A chunk's, and those heard before and behind it."""
    left, right = args.left_seconds, args.right_seconds
    return args.chunk_seconds, 2.0 if left is None else left, right or 0.0


def chosen_onnx_options(model: Wav2Vec2Model, args: argparse.Namespace) -> OnnxOptions:
    """The options of the onnx format, which the model is looked at for, with the speech of --tsv.

    Raises:
        UserError: a chunk is no frame, or the model's head answers to whole clips; or the speech cannot be read.
    """
    speech = read_speech(args.tsv) if args.tsv else []
    options = OnnxOptions(args.outputs, args.opset, args.float16, args.int8, None, speech)
    if args.chunk_seconds is None:
        return options
    if isinstance(model, TaskModel) and model.kind == CLIPS and args.outputs == "last":
        raise UserError("--chunk_seconds: the model's head answers to whole clips; give --drop_head or --outputs all")
    hop = model.feature_extractor.stride / SAMPLE_RATE
    chunk = Chunk(*(round(seconds / hop) for seconds in seconds_of_chunk(args)))
    if chunk.frames == 0:
        raise UserError(f"--chunk_seconds {args.chunk_seconds:g}: expected at least {hop:g}, which is one frame")
    return replace(options, chunk=chunk)


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
    """What every writer needs: a model file's contents, its model in eval mode, what the card says, the options.

    ``probes`` are those of --probes.
    """

    contents: dict[str, Any]
    model: Wav2Vec2Model
    card: Card
    args: argparse.Namespace
    onnx_options: OnnxOptions
    probes: list[Probe]

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
    args, options = job.args, job.onnx_options
    lost: dict[str, Loss] = {}

    def check(files: Sequence[OnnxFile]) -> None:
        if job.probes:
            lost.update(losses(job.model, args.outputs, {file.path.name: file.run for file in files}, job.probes))
        for name, loss in lost.items():
            if args.max_loss is not None and not loss.points <= args.max_loss:
                raise UserError(
                    f"{folder / name}: {loss.reached}: {loss.points:.1f} points lost, --max_loss allows "
                    f"{args.max_loss:g}; no file was kept"
                )

    files = write_onnx(job.model, options, folder, None if options.chunk else job.program, check)
    measured = []
    for file in files:
        name, is_exact = file.path.name, file.path.name == ONNX
        on = f"{len(options.speech)} utterances of {args.tsv.name}" if options.speech else ""
        noise = f"{'noise, chunk by chunk' if options.chunk else NOISE}"
        measured.append(described(job, file, is_exact, noise if is_exact or not on else on))
        if file.from_whole:
            apart = file.from_whole
            measured.append(
                f"{name}, chunk by chunk: cosine of a frame with that of the whole utterance {apart.mean_cosine:.4f} "
                f"on average, {apart.lowest_cosine:.4f} at least; {on}"
            )
        if name in lost:
            measured.append(f"{name}: {lost[name].reached}; {lost[name].points:.1f} points lost")
    hop, (whole, *_) = job.model.feature_extractor.stride, files
    write_traced_card(
        job,
        "onnx",
        folder,
        measured,
        min_frames=1,
        opset=whole.opset,
        operators=sorted(set().union(*(file.operators for file in files))),
        chunk=options.chunk,
        hop=hop,
        window_samples=options.chunk and min_samples(job.model, options.chunk.window),
    )


def write_torch_export(job: Job, folder: Path) -> None:
    file = write_pt2(job.program, job.model, job.args.outputs, folder)
    write_traced_card(job, "torch_export", folder, [described(job, file, True, NOISE)], min_frames=2)


_FRAMES = [frames for batch in CHECKED_BATCHES for frames in batch]
NOISE = (
    f"noise in {len(CHECKED_BATCHES)} batches that were not traced, with and without padding, {min(_FRAMES)} to "
    f"{max(_FRAMES)} frames"
)


def described(job: Job, file: Exported | OnnxFile, is_exact: bool, compared_on: str) -> str:
    """Size of a file, and how far it is from the model."""
    difference = file.difference
    what = "logits" if output_name(job.model, job.args.outputs) == "logits" else "hidden states"
    limit = f" (at most {LARGEST_DIFFERENCE:.0e} is accepted)" if is_exact else ""
    return (
        f"{file.path.name}: {file.num_bytes:,} bytes; {what} differ from PyTorch's by at most "
        f"{difference.largest:.1e}{limit}, relative to the largest value where that is above 1; cosine of a frame "
        f"{difference.mean_cosine:.6f} on average, {difference.lowest_cosine:.6f} at least; {compared_on}"
    )


def write_traced_card(
    job: Job, format_name: str, folder: Path, measured: Sequence[str], min_frames: int, **words: Any
) -> None:
    output = output_name(job.model, job.args.outputs)
    text = job.card.text(format_name, measured, output=output, min_samples=min_samples(job.model, min_frames), **words)
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

    difference = compare(Outputs(model, "last").eval(), run, noise(model, CHECKED_BATCHES))
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
    model = model_with_its_head(contents, args.model).eval()
    options = chosen_onnx_options(model, args)
    probes = [read_probe(path) for path in args.probes]
    job = Job(contents, model, describe(contents, args), args, options, probes)
    # onnx may lose too much; nothing has been written then.
    for name in sorted(formats, key="onnx".__ne__):
        try:
            WRITERS[name](job, args.out / name)
        except BaseException:
            shutil.rmtree(args.out / name, ignore_errors=True)  # it was not there before
            raise


if __name__ == "__main__":
    cli.run(main, parse_args())
