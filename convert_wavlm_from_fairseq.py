"""Convert a fairseq-format checkpoint (WavLM, HuBERT or wav2vec 2.0) into a model file (.pth).

    python convert_wavlm_from_fairseq.py --ckpt WavLM-Base+.pt
    python convert_wavlm_from_fairseq.py --ckpt hubert_large_ll60k.pt --out pretrained/hubert-large.pth

fairseq is not needed, and no code from the file is run. If fairseq is installed (requirements-fairseq.txt), the
outputs of HuBERT and wav2vec 2.0 are compared with its outputs before anything is written.
"""

import argparse
from pathlib import Path

from cli import make_parser, run
from wav2vec2.files.storage import check_writable
from wav2vec2.utils.converter_flags import add_converter_flags, importer_options


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint in fairseq's format")
    parser.add_argument("--out", type=Path, help="file to write; if not given, pretrained/NAME.pth")
    add_converter_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    options, out = importer_options(args), args.out or Path("pretrained") / f"{args.ckpt.stem}.pth"
    check_writable(out)
    # After the flags: --help and a wrong flag should not wait for torch.
    from wav2vec2.utils.import_fairseq import compare_with_fairseq, import_fairseq_model
    from wav2vec2.utils.importing import write_model

    imported = import_fairseq_model(args.ckpt, **options)
    difference = compare_with_fairseq(imported, args.ckpt)
    if difference is not None:
        print(f"largest difference from fairseq's outputs: {difference:.1e}")
    write_model(imported, out)


if __name__ == "__main__":
    run(main, parse_args())
