"""Write a model in formats that other programs load: a folder for each, with a model card (README.md).

  huggingface  model.safetensors and config.json for the Hugging Face hub: transformers' Auto classes open the folder,
               with the model's code in it where transformers does not know the model, and so does wav2vec2.load
  onnx         model.onnx for ONNX Runtime, for any length or, of a streaming model, of one step, and with --int8 a
               smaller file beside it; pip install -r requirements-export.txt

Every file is loaded again and compared with the model before it is kept; the card says what was measured. Of a
fine-tuned model both formats give logits; --drop_head leaves the encoder.

  python export.py --model exp/hubert-base/final/ckpts/pruned_hubert_base.pth --out exp/hubert-base/export \\
      --formats huggingface,onnx --card card.yaml

where card.yaml holds what the card cannot know, under the keys of the hub's model cards:

  license: mit
  base_model: facebook/hubert-base-ls960
  datasets: librispeech_asr
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import cli
from exporters.options import FORMATS, ONNX_FLAGS, OUTPUTS, check_flags, read_card
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path, check_writable


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path, help="model file (.pth)")
    parser.add_argument("--out", required=True, type=Path, help="folder, in which each format gets one of its name")
    parser.add_argument("--formats", default="huggingface", help=f"comma-separated, of {', '.join(FORMATS)}")
    parser.add_argument("--drop_head", action="store_true", help="export the encoder alone, as a plain model")
    parser.add_argument(
        "--model_type",
        choices=("hubert", "wav2vec2"),
        help="transformers' name for a network that both have (default: hubert; a WavLM is always one)",
    )
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument(
        "--outputs", choices=OUTPUTS, help="the last hidden state (logits, if there is a head), or all hidden states"
    )
    onnx.add_argument("--opset", type=int, help="version of ONNX's operators")
    onnx.add_argument("--int8", action="store_true", help="write a second file, which computes with 8 bits; see --tsv")
    onnx.add_argument(
        "--tsv", type=Path, help="manifest of speech, from prepare_data.py: with it convolutions have 8 bits, too"
    )
    parser.set_defaults(**ONNX_FLAGS)
    card = parser.add_argument_group("card")
    card.add_argument(
        "--card", type=Path, metavar="YAML", help="the hub's metadata: license, base_model, datasets, ..."
    )
    card.add_argument("--evaluation", type=Path, metavar="JSON", help="results of evaluate.py on this model")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    formats, metadata = check_flags(args), read_card(args.card)
    check_writable(args.out / "README.md")
    # Imports from here on take seconds, which a wrong flag need not wait for.
    from evaluation.backends import read_speech
    from evaluation.cost import UTTERANCE_SECONDS, macs_per_second
    from exporters.card import card_text
    from exporters.huggingface import write_huggingface
    from exporters.onnx import OnnxOptions, onnx_facts, write_onnx
    from wav2vec2.files.checkpoint import read_model_file
    from wav2vec2.files.heads import model_with_its_head, without_head
    from wav2vec2.model import masked_units

    contents = read_model_file(args.model)
    made_by = contents.get("made_by")
    facts: dict[str, Any] = {
        "made_by": made_by if isinstance(made_by, dict) else {},
        "source": described_file(args.model),
    }
    if args.drop_head:
        contents = without_head(contents)
    if units := masked_units(contents["state_dict"]):
        raise UserError(f"{args.model}: has masks on {', '.join(units)}; prune.py makes the model file to export")
    model = model_with_its_head(contents, args.model).eval()
    facts |= {"macs_per_second": macs_per_second(model.config)["total"], "macs_seconds": UTTERANCE_SECONDS}
    evaluation = measured_metrics(args, model.config) if args.evaluation else ()
    speech = read_speech(args.tsv) if args.tsv else []
    onnx = OnnxOptions(args.outputs, args.opset, args.int8, speech)
    metadata = {"model_name": args.out.resolve().name, **metadata}
    for name in formats:
        with atomic_path(args.out / name) as folder:
            folder.mkdir()
            if name == "huggingface":
                found = write_huggingface(contents, model, folder, args.model_type)
            else:
                found = onnx_facts(model, onnx, write_onnx(model, onnx, folder))
            text = card_text(model, name, metadata, evaluation, **facts, **found)
            (folder / "README.md").write_text(text, encoding="utf-8")
        print(args.out / name, *found["measured"], sep="\n  ")


def measured_metrics(args: argparse.Namespace, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Read what --evaluation says of the model with this config, without its head's scores if the head is dropped."""
    from evaluation.tables import card_metrics, model_of_shape, results_of

    with results_of(args.evaluation) as results:
        measured = model_of_shape(results, config, args.model)
        return card_metrics(results, {**measured, "head": None} if args.drop_head else measured)


def described_file(path: Path) -> str:
    if path.is_dir():
        return path.name
    with path.open("rb") as file:
        return f"{path.name}, SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


if __name__ == "__main__":
    cli.run(main, parse_args())
