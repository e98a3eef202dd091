"""Fine-tune any model file with labels: recognise text, classify utterances, or label stretches of them.

The columns of --tsv, separated by tabs, say what is learnt; split is train, test and perhaps valid:

  split path text               text: words, or with --units characters letters, by CTC
  split path label              a label for each file; speakers that only the test has are compared (verification)
  split path start end label    a label for each frame of 20 ms; times in seconds

  python finetune.py --model exp/hubert-base/final/ckpts/pruned_hubert_base.pth --tsv data/commands.tsv \\
      --units characters --gpus 1 --exp_dir exp/commands
  python -m wav2vec2.prediction exp/commands/finetuned.pth recording.flac

Without clips of the split valid, a tenth of the training clips chooses the best weights. The result is
EXP_DIR/finetuned.pth, a model file with its head and labels; EXP_DIR/finetuned.json has its scores on the test clips.
A head that the file has for the same labels is trained further.

Several GPUs, nodes, SLURM, CPU: as in distill.py.
"""

import argparse

import cli
from training.settings import FinetuneRunSettings, add_arguments, read_arguments


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    defaults = {"seconds_per_batch": 32.0, "learning_rate": 1e-2, "warmup_updates": 200, "max_updates": 2000}
    add_arguments(parser, FinetuneRunSettings, **defaults, clip_norm=1.0)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    settings = read_arguments(args, FinetuneRunSettings)
    # These imports take seconds: flags are checked first.
    import pytorch_lightning as pl

    from training.finetuning import finetune, finish

    pl.seed_everything(settings.data.seed, verbose=False)
    if (data := finetune(settings)) is not None:
        finish(settings, data)


if __name__ == "__main__":
    cli.run(main, parse_args())
