"""Convert a HuBERT, wav2vec 2.0, WavLM or UniSpeech from Hugging Face transformers into a model file (.pth).

    python convert_hubert_from_hf.py
    python convert_hubert_from_hf.py --model facebook/hubert-large-ll60k
    python convert_hubert_from_hf.py --model path/to/directory --out pretrained/mine.pth

Heads and decoders are left out. The outputs of the converted model are compared
with those of transformers before anything is written.
"""

import argparse
from pathlib import Path

from cli import make_parser, run
from wav2vec2.files.storage import check_writable
from wav2vec2.utils.converter_flags import add_converter_flags, importer_options


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="facebook/hubert-base-ls960", help="hub id or local directory")
    parser.add_argument("--out", type=Path, help="file to write; if not given, pretrained/NAME.hf.pth")
    add_converter_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    options, out = importer_options(args), args.out or Path("pretrained") / f"{Path(args.model).resolve().name}.hf.pth"
    check_writable(out)
    # After the flags: --help and a wrong flag should not wait for torch.
    from wav2vec2.utils.import_huggingface import compare_with_source, fetch_huggingface_model, import_huggingface_model
    from wav2vec2.utils.importing import write_model

    directory = fetch_huggingface_model(args.model)
    imported = import_huggingface_model(directory, **options)
    difference = compare_with_source(imported, directory)
    print(f"largest difference from transformers' outputs: {difference:.1e}")
    write_model(imported, out)


if __name__ == "__main__":
    run(main, parse_args())
