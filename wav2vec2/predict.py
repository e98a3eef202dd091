"""Write what a fine-tuned model recognises in audio files: ``python -m wav2vec2.predict MODEL AUDIO...``

A line for each file, of fields separated by tabs: its path, then the text; or the label and its probability; or, a line
for each stretch, start and end in seconds and the label. A file that cannot be used is named on stderr, and the exit
status is 1.
"""

import argparse
import sys

import torch

from .errors import UserError, single_line
from .inference import load
from .prediction import Labelled, Prediction, predict, predict_iter


def lines(path: str, found: Prediction) -> list[str]:
    """What is written of one file; what a label holds cannot steer a terminal."""
    if isinstance(found, str):
        rows = [[found]]
    elif isinstance(found, Labelled):
        rows = [[found.label, f"{found.probability:.4f}"]]
    else:
        rows = [[f"{start:.3f}", f"{end:.3f}", label] for start, end, label in found]
    return ["\t".join([path, *(single_line(field, len(field)) for field in row)]) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wav2vec2.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a fine-tuned model: a file, a folder or ORG/NAME on the hub")
    parser.add_argument("audio", metavar="AUDIO", nargs="+", help="audio files")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default: {device}")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    status = 0

    def report(_: int | None, error: Exception) -> None:
        nonlocal status
        status = 1
        print("error: " + " ".join(str(error).split()), file=sys.stderr)

    try:
        model = load(args.model, device=args.device)
        for path, found in zip(args.audio, predict_iter(model, args.audio, on_error=report), strict=True):
            if found is not None:
                print(*lines(path, found), sep="\n", flush=True)
    except (UserError, OSError) as error:
        report(None, error)
    return status


if __name__ == "__main__":
    sys.exit(main())
# Imported by its name, the command must not hide the package's function of the same name.
sys.modules[__name__] = predict
