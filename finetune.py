"""Fine-tune any model file with labels: recognise text, classify utterances, or label stretches of them.

The columns of --tsv say what is learnt (tabs between them; split is train, test and perhaps valid):

  split path text               text: words, or with --units characters letters, by CTC
  split path label              a label for each file; speakers that only the test has are compared (verification)
  split path start end label    a label for each frame of 20 ms; times in seconds

  python finetune.py --model exp/hubert-base/final/ckpts/pruned_hubert_base.pth --tsv data/commands.tsv \\
      --units characters --gpus 1 --exp_dir exp/commands
  python -m wav2vec2.prediction exp/commands/finetuned.pth recording.flac

Without clips of the split valid, a tenth of those for training chooses the best weights. The result is
EXP_DIR/finetuned.pth, a model file with its head and labels; EXP_DIR/finetuned.json says what it reaches on the test
clips. A file that has a head for the same labels already is trained further with it.

Several GPUs, nodes, SLURM, CPU: as in distill.py.
"""

import argparse
import json

import pytorch_lightning as pl

import cli
from evaluation.heads import score_head
from evaluation.scores import Scored
from labels.scores import METRICS
from training.checkpoints import BEST_MODEL, FINETUNED_MODEL, made_before
from training.data import TEST_SUBSET, TRAIN_SUBSET, VALID_SUBSET, LabelledDataModule
from training.finetuning import finetune
from training.processes import own_device
from training.settings import FinetuneRunSettings, add_arguments, read_arguments
from wav2vec2.files.checkpoint import read_model_file, save
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import task_model_of
from wav2vec2.files.storage import atomic_path

# What the result reaches.
RESULT = "finetuned.json"


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    defaults = {"seconds_per_batch": 32.0, "learning_rate": 1e-2, "warmup_updates": 200, "max_updates": 2000}
    add_arguments(parser, FinetuneRunSettings, **defaults, clip_norm=1.0)
    return parser.parse_args()


def finish(settings: FinetuneRunSettings, data: LabelledDataModule) -> None:
    """Score the best model on the test clips and write it as the result, unless that is done."""
    best, out, result = (settings.machine.exp_dir / name for name in (BEST_MODEL, FINETUNED_MODEL, RESULT))
    if not best.is_file():
        raise UserError(f"{best}: is gone, expected the best model of this run; train again with another --exp_dir")
    contents = read_model_file(best)
    made_by = contents["made_by"]
    if result.is_file() and made_before(out, made_by) is not None:
        print(f"{settings.stage}: complete already: {out}")
        return
    model = task_model_of(contents, best).eval().to(own_device(settings.machine))
    score = score_head(model, data.probe, out.name)
    clips, metric = data.clips, METRICS[data.probe.kind][0]
    low, high = Scored([score], len(data.probe.test)).summary()["interval"]
    summary = {
        "kind": data.probe.kind,
        "update": made_by["update"],
        "valid": {"metric": made_by["metric"], "value": made_by["valid"], "clips": len(clips[VALID_SUBSET])},
        "test": {"metric": metric, "value": score.value(), "interval": [low, high], "clips": len(clips[TEST_SUBSET])},
        "train": {"clips": len(clips[TRAIN_SUBSET])},
    }
    save(out, contents)
    with atomic_path(result) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{settings.stage}: best at update {made_by['update']}, {made_by['metric']} {made_by['valid']:.2f} in "
        f"validation; test: {metric} {score.value():.2f} ({low:.2f} to {high:.2f}): {out}"
    )


def main(args: argparse.Namespace) -> None:
    settings = read_arguments(args, FinetuneRunSettings)
    pl.seed_everything(settings.data.seed, verbose=False)
    if (data := finetune(settings)) is not None:
        finish(settings, data)


if __name__ == "__main__":
    cli.run(main, parse_args())
