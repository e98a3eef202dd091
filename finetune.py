"""Fine-tune any model file with labels: recognise text, classify utterances, or label stretches of them.

The columns of --tsv say what is learnt (tabs between them; split is train, test and perhaps valid):

  split path text               text: words, or with --units characters letters, by CTC
  split path label              a label for each file; speakers that only the test has are compared (verification)
  split path start end label    a label for each frame of 20 ms; times in seconds

  python finetune.py --model exp/hubert-base/final/ckpts/pruned_hubert_base.pth --tsv data/commands.tsv \\
      --units characters --gpus 1 --exp_dir exp/commands
  python -m wav2vec2.predict exp/commands/finetuned.pth recording.flac

Without clips of the split valid, a tenth of those for training chooses the best weights. The result is
EXP_DIR/finetuned.pth, a model file with its head and labels; EXP_DIR/finetuned.json says what it reaches on the test
clips. A file that has a head for the same labels already is trained further with it.

Several GPUs, nodes, SLURM, CPU: as in distill.py.
"""

import argparse

import pytorch_lightning as pl

import cli
from training.arguments import add_finetune_arguments, read_finetune_arguments
from training.finetuning import finetune


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_finetune_arguments(
        parser, seconds_per_batch=32.0, learning_rate=1e-3, warmup_updates=200, max_updates=2000, clip_norm=1.0
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    settings = read_finetune_arguments(args, "fine-tuning")
    pl.seed_everything(settings.data.seed, verbose=False)
    finetune(settings)


if __name__ == "__main__":
    cli.run(main, parse_args())
