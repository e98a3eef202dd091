"""Speech recognition with a compressed model as encoder: fine-tuning with CTC, in plain PyTorch.

  python examples/finetune_ctc.py --model exp/hubert-base_sp0.75/final/ckpts/pruned_hubert_base.pth \\
      --tsv data/commands.tsv --out exp/commands.pth
  python examples/finetune_ctc.py --model exp/commands.pth --transcribe recording.flac

The TSV's header names its columns: path (from the TSV's folder) and text, or label. A third, split, says "train" or
"test"; without it each tenth row is test. The model learns the characters of the training texts. Written is a model
file like all others, whose config has aux_num_out, with the characters under "vocabulary" (the first is the blank).
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from the checkout, not installed

import cli
import wav2vec2
from dataset.batches import make_batches
from wav2vec2 import checkpoint
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.errors import UserError, short_repr
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
        UserError: a column is missing, a row is incomplete, or there is nothing to train on or to test with.
    """
    with tsv.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = list(rows[0]) if rows else []
    text_column = "text" if "text" in columns else "label"
    if "path" not in columns or text_column not in columns:
        raise UserError(f"{tsv}: found columns {short_repr(columns)}, expected path, text (or label) and perhaps split")
    utterances = []
    for number, row in enumerate(rows):
        text = " ".join((row[text_column] or "").split())
        split = row["split"] if "split" in columns else ("test" if number % 10 == 9 else "train")
        if not row["path"] or not text or split not in ("train", "test"):
            raise UserError(
                f"{tsv}: line {number + 2} is {short_repr(row)}, expected a path, a text, and train or test"
            )
        utterances.append(Utterance(tsv.parent / row["path"], text, split == "test"))
    if len({utterance.is_test for utterance in utterances}) < 2:
        raise UserError(f"{tsv}: expected rows of both splits, train and test, found one of them; add rows")
    return utterances


class Labelled(Dataset):
    """Utterances as waveforms and the indices of their characters."""

    def __init__(self, utterances: Sequence[Utterance], vocabulary: Sequence[str]) -> None:
        self.utterances = utterances
        self.index = {character: number for number, character in enumerate(vocabulary)}

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        path, text, _ = self.utterances[number]
        return read_audio(path), torch.tensor([self.index[character] for character in text])


class LengthBatches(Sampler[list[int]]):
    """Batches of utterances of about the same length, drawn anew in each epoch."""

    def __init__(self, lengths: Sequence[int], seconds_per_batch: float, seed: int) -> None:
        self.lengths, self.max_tokens = lengths, seconds_per_batch * SAMPLE_RATE
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        batches = make_batches(self.lengths, 10, self.max_tokens, generator=self.generator)
        for number in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[number]


def collate(utterances: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Waveforms (B, T), their lengths (B,), the characters of all texts (N,), and how many each has (B,)."""
    waveforms, labels = zip(*utterances, strict=True)
    lengths, num_labels = (torch.tensor([len(row) for row in rows]) for rows in (waveforms, labels))
    return pad_sequence(waveforms, batch_first=True), lengths, torch.cat(labels), num_labels


def loader_of(utterances: Sequence[Utterance], vocabulary: Sequence[str], args: argparse.Namespace) -> DataLoader:
    """Batches to train on; all files are read once, which finds the ones that cannot be."""
    data = Labelled(utterances, vocabulary)
    lengths = [len(waveform) for waveform, _ in tqdm(map(data.__getitem__, range(len(data))), "reading", len(data))]
    batches = LengthBatches(lengths, args.seconds_per_batch, args.seed)
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=args.num_workers)


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
    for update, batch in enumerate(tqdm(endless(loader), "training", args.updates), start=1):
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


def endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def transcribe(model: Wav2Vec2Model, vocabulary: Sequence[str], paths: Sequence[str | Path]) -> Iterator[str]:
    """Greedy decoding: the best character of each frame, repetitions joined, blanks dropped."""
    for scores in wav2vec2.extract_iter(model, paths, layers="output"):  # (frames, characters)
        best = [index for index, _ in groupby(scores.argmax(-1).tolist())]
        yield "".join(vocabulary[index] for index in best if index != 0)


def distance(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    row = list(range(len(found) + 1))
    for i, symbol in enumerate(wanted, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != other))
    return row[-1]


def error_rates(wanted: Sequence[str], found: Sequence[str]) -> tuple[float, float]:
    """Character and word error rate of transcripts: errors by the number of wanted characters or words."""
    words = [([*a.split()], [*b.split()]) for a, b in zip(wanted, found, strict=True)]
    characters = zip(wanted, found, strict=True)
    return (
        sum(distance(a, b) for a, b in characters) / sum(map(len, wanted)),
        sum(distance(a, b) for a, b in words) / sum(len(a) for a, _ in words),
    )


def main(args: argparse.Namespace) -> None:
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
    train(model, loader_of(training, vocabulary, args), args)
    state_dict = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    checkpoint.save(args.out, {"state_dict": state_dict, "config": model.config, "vocabulary": vocabulary})
    found = list(transcribe(model.eval(), vocabulary, [utterance.path for utterance in test]))
    cer, wer = error_rates([utterance.text for utterance in test], found)
    print(f"test: {len(test)} utterances, character error rate {cer:.2%}, word error rate {wer:.2%}: {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
