"""Make a student of another shape than its teacher, as a model file for distill.py or final_distill.py.

A slice: a JSON file says in which keys of the config the student differs (conf/students/ has some):
  python make_student.py --model pretrained/hubert-base-ls960.hf.pth --student_config conf/students/half_width.json \\
      --exp_dir exp/half_width/student

Another depth, here two layers that start from the model's first two:
  python make_student.py --model pretrained/hubert-base-ls960.hf.pth --init_layers 1,2 --exp_dir exp/two_layers/student

A student that streams, here in chunks of 16 frames, each of which sees 64 before; the manifest gives it statistics of
speech:
  python make_student.py --model pretrained/hubert-base-ls960.hf.pth --streaming 16 --left_frames 64 \\
      --tsv_dir data/librispeech --train_subset train960 --exp_dir exp/streaming/student

A light extractor, which is trained to make the frames of the model's own. Only this needs the flags of optimisation and
machine; several GPUs, nodes, SLURM, CPU: as in distill.py:
  python make_student.py --model pretrained/hubert-base-ls960.hf.pth --extractor light --tsv_dir data/librispeech \\
      --train_subset train960 --gpus 1 --precision 16 --exp_dir exp/light/student --resume_checkpoint auto

The result is EXP_DIR/student.pth. Give it to distill.py and final_distill.py as --student_ckpt, and to prune.py as
--original_ckpt.
"""

import argparse

import cli
from training.settings import StudentRunSettings, add_arguments, read_arguments

RESULT = "student.pth"


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_arguments(parser, StudentRunSettings, learning_rate=1e-3, warmup_updates=400, max_updates=4000)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    settings = read_arguments(args, StudentRunSettings)

    # Imported once the flags are known to be right: it takes seconds.
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from training.checkpoints import fingerprint, made_before
    from training.data import SpeechDataModule
    from training.extractor import train_extractor
    from training.students import slice_model, streaming_model
    from wav2vec2.files.checkpoint import model_of, read_model_file, save

    chosen, seed = settings.student, settings.data.seed
    contents = read_model_file(chosen.model)
    out = settings.machine.exp_dir / RESULT
    made_by = {"script": "make_student.py", "model": fingerprint(chosen.model), "seed": seed, **chosen.recorded()}
    data = None
    if chosen.extractor is not None:
        data = SpeechDataModule(settings.data)
        made_by |= {"train_subset": data.fingerprint(), **settings.recorded()}
    elif chosen.streaming is not None and settings.data.tsv_dir is not None:
        data = SpeechDataModule(settings.data)
        made_by |= {"train_subset": data.fingerprint(), **settings.data.recorded()}
    if made_before(out, made_by) is not None:
        rank_zero_only(print)(f"made already, from the same files with the same settings: {out}")
        return

    pl.seed_everything(seed, verbose=False)
    if (chosen.student_config, chosen.init_layers, chosen.streaming) != (None, None, None):
        contents, origins = slice_model(contents, chosen.changes, chosen.layers, str(chosen.model))
        rank_zero_only(print)(f"student of {chosen.model}: {origins}", flush=True)
    if chosen.extractor is not None and data is not None:
        contents = train_extractor(settings, data, contents)
    if chosen.streaming is not None:
        contents = streaming_model(contents, chosen.streaming, chosen.num_left_frames, data)
    rank_zero_only(save)(out, {**contents, "made_by": made_by})
    rank_zero_only(print)(f"{model_of(contents, out).get_num_params():,} parameters: {out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
