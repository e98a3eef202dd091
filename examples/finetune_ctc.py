"""Speech recognition with a compressed model as encoder: fine-tuning with CTC, in plain PyTorch.

  python -m examples.finetune_ctc --model exp/hubert-base_sp0.75/final/ckpts/pruned_hubert_base.pth \\
      --tsv data/commands.tsv --out exp/commands.pth
  python -m examples.finetune_ctc --model exp/commands.pth --transcribe recording.flac

The TSV's header names its columns: path (from the TSV's folder) and text, or label. A third, split, says "train" or
"test"; without it each tenth row is test. The model learns the characters of the training texts. Written is a model
file like all others, whose config has aux_num_out, with the characters under "vocabulary" (the first is the blank).
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchaudio.functional import edit_distance
from tqdm import tqdm

import cli
import wav2vec2
from dataset.batches import make_batches
from dataset.labels import read_table
from wav2vec2 import checkpoint
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.errors import UserError, one_line, short_repr
from wav2vec2.model import Wav2Vec2Model

BLANK = "<blank>"
WARMUP, HOLD = 0.1, 0.4  # shares of the updates; the rate decays to 0 in the rest
MAX_GRADIENT_NORM = 1.0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the encoder, or with --transcribe the result")
    parser.add_argument("--transcribe", nargs="+", metavar="FILE", help="write what is said in these files, and end")
    parser.add_argument("--tsv", type=Path, help="labelled audio")
    parser.add_argument("--out", type=Path, help="the fine-tuned model file")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="the highest")
    parser.add_argument("--seconds_per_batch", type=float, default=32.0)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read audio")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Utterance(NamedTuple):
    path: Path
    text: str
    is_test: bool


def read_labels(tsv: Path) -> list[Utterance]:
    """The rows of a labelled TSV.

    Raises:
        UserError: the file is no such list, a column is missing, a row is incomplete, or there is nothing to train on
            or to test with.
    """
    columns, rows = read_table(tsv)
    text_column = "text" if "text" in columns else "label"
    if "path" not in columns or text_column not in columns:
        raise UserError(f"{tsv}: found columns {short_repr(columns)}, expected path, text (or label) and perhaps split")
    utterances = []
    for index, (number, row) in enumerate(rows):
        text = " ".join((row[text_column] or "").split())
        split = row["split"] if "split" in columns else ("test" if index % 10 == 9 else "train")
        if not row["path"] or not text or split not in ("train", "test"):
            raise UserError(f"{tsv}: line {number} is {short_repr(row)}, expected a path, a text, and train or test")
        utterances.append(Utterance(tsv.parent / row["path"], text, split == "test"))
    if len({utterance.is_test for utterance in utterances}) < 2:
        raise UserError(f"{tsv}: expected rows of both splits, train and test, found one of them; add rows")
    return utterances


def read_lengths(utterances: Sequence[Utterance], needed: int) -> list[int]:
    """The samples of each utterance; all files are read once, which finds those that cannot be used.

    Raises:
        UserError: a file cannot be read, or has fewer than the ``needed`` samples.
    """
    lengths = []
    for utterance in cli.progress(utterances, "reading", unit="file"):
        lengths.append(len(read_audio(utterance.path)))
        if lengths[-1] < needed:
            raise UserError(
                f"{utterance.path}: has {lengths[-1]} samples at 16 kHz, expected at least {needed}, of which the "
                "model makes one frame; take it out of --tsv"
            )
    return lengths


class Batches(Dataset):
    """Batches of utterances of about the same length, which ``lengths`` are."""

    def __init__(
        self, utterances: Sequence[Utterance], lengths: Sequence[int], vocabulary: Sequence[str], seconds: float
    ) -> None:
        self.utterances = utterances
        self.index = {character: number for number, character in enumerate(vocabulary)}
        try:
            self.batches = make_batches(lengths, max_tokens=seconds * SAMPLE_RATE)
        except UserError as error:
            raise UserError(f"{error}; raise --seconds_per_batch, or take the utterance out of --tsv") from error

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Waveforms (B, T), their lengths (B,), the characters of all texts (N,), and how many each has (B,)."""
        chosen = [self.utterances[index] for index in self.batches[number]]
        waveforms = [read_audio(utterance.path) for utterance in chosen]
        labels = [[self.index[character] for character in utterance.text] for utterance in chosen]
        lengths, num_labels = (torch.tensor([len(row) for row in rows]) for rows in (waveforms, labels))
        return pad_sequence(waveforms, batch_first=True), lengths, torch.tensor([*chain(*labels)]), num_labels


def check_device(name: str) -> None:
    """Check that there is such a device.

    Raises:
        UserError: names the option.
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {one_line(error)}; give cpu, or cuda where there is a GPU") from error


def with_head(path: Path, num_outputs: int) -> Wav2Vec2Model:
    """The model of a file with a fresh linear layer on top; its extractor is not trained."""
    contents = checkpoint.read_model_file(path)
    model = checkpoint.build_model({**contents["config"], "aux_num_out": num_outputs}, path)
    encoder = {name: tensor for name, tensor in contents["state_dict"].items() if not name.startswith("aux.")}
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("aux.")}
    checkpoint.load_state(model, {**encoder, **head}, path)
    model.feature_extractor.requires_grad_(False)
    return model


def rate(update: int, num_updates: int) -> float:
    """The learning rate of an update, from 0, as a share of the highest: up, constant, down."""
    progress = (update + 1) / num_updates
    return min(progress / WARMUP, 1.0, max(0.0, (1 - progress) / (1 - WARMUP - HOLD)))


def train(model: Wav2Vec2Model, loader: DataLoader, args: argparse.Namespace) -> None:
    """Minimise the CTC loss; prints its mean ten times."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(update, args.updates))
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")
    interval, losses = max(1, args.updates // 10), []
    batches = cli.progress(chain.from_iterable(repeat(loader)), "training", total=args.updates, unit="update")
    for update, batch in enumerate(batches, start=1):
        waveforms, lengths, labels, num_labels = (tensor.to(args.device) for tensor in batch)
        with autocast:
            scores, num_frames = model(waveforms, lengths)
        log_probs = scores.float().log_softmax(-1).transpose(0, 1)  # (frames, B, characters)
        # zero_infinity: a text with more characters than frames cannot be learnt, and must not spoil the others.
        loss = F.ctc_loss(log_probs, labels, num_frames, num_labels, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if update % interval == 0:
            tqdm.write(f"update {update}: loss {torch.stack(losses).mean():.4f}")
            losses = []
        if update == args.updates:
            return


def transcribe(model: Wav2Vec2Model, vocabulary: Sequence[str], paths: Sequence[str | Path]) -> Iterator[str]:
    """Greedy decoding: the best character of each frame, repetitions joined, blanks dropped."""
    for scores in wav2vec2.extract_iter(model, paths, layers="output"):  # (frames, characters)
        best = [index for index, _ in groupby(scores.argmax(-1).tolist())]
        yield "".join(vocabulary[index] for index in best if index != 0)


def error_rate(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """Insertions, deletions and substitutions, by the number of wanted characters, or words."""
    return sum(map(edit_distance, wanted, found)) / sum(map(len, wanted))


def main(args: argparse.Namespace) -> None:
    check_device(args.device)
    if args.transcribe:
        vocabulary = checkpoint.read_model_file(args.model).get("vocabulary")
        if not isinstance(vocabulary, list):
            raise UserError(f"{args.model}: holds no vocabulary, expected what --out wrote; fine-tune it first")
        model = wav2vec2.load(args.model, device=args.device)
        for path, text in zip(args.transcribe, transcribe(model, vocabulary, args.transcribe), strict=True):
            print(f"{path}\t{text}")
        return
    if args.tsv is None or args.out is None or args.updates < 1:
        raise UserError("expected --tsv and --out and a positive number of --updates (or --transcribe FILE)")
    torch.manual_seed(args.seed)
    utterances = read_labels(args.tsv)
    training, test = ([u for u in utterances if u.is_test == is_test] for is_test in (False, True))
    vocabulary = [BLANK, *sorted({character for utterance in training for character in utterance.text})]
    model = with_head(args.model, len(vocabulary)).to(args.device).train()
    needed = model.feature_extractor.receptive_field
    read_lengths(test, needed)  # bad ones are found now, not after the training
    batches = Batches(training, read_lengths(training, needed), vocabulary, args.seconds_per_batch)
    train(model, DataLoader(batches, batch_size=None, shuffle=True, num_workers=args.num_workers), args)
    state_dict = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    checkpoint.save(args.out, {"state_dict": state_dict, "config": model.config, "vocabulary": vocabulary})
    wanted = [utterance.text for utterance in test]
    found = list(transcribe(model.eval(), vocabulary, [utterance.path for utterance in test]))
    cer, wer = error_rate(wanted, found), error_rate([*map(str.split, wanted)], [*map(str.split, found)])
    print(f"test: {len(test)} utterances, character error rate {cer:.2%}, word error rate {wer:.2%}: {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
