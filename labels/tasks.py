"""A task: a list of labelled audio, the head for it, the head's loss on a batch, and its score on the test clips."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from labels.batches import FrameTimes, read_clips, target_of
from labels.lists import CLIPS, SEGMENTS, TEXT, UNITS, VERIFICATION, Clip, Probe, read_probe
from labels.scores import Score, clip_results, score_of
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.heads import Head, TaskModel, head_of, with_head


def read_task(
    tsv: Path,
    contents: dict[str, Any],
    source: Path,
    seed: int,
    *,
    prefix: str,
    units: str | None,
    layers: str | None,
    pooling: str | None,
) -> tuple[Probe, dict[str, Any], str]:
    """Read a list, and give a model's contents the head for it.

    The head that the model has decides what the options leave open (None); their names begin with ``prefix``.

    Returns:
        The list, the contents, and whose the head is: "its own" if the model has such a head, or "a fresh", drawn with
        the seed.

    Raises:
        UserError: the list cannot be used, or an option is not for lists of its kind.
    """
    own = head_of(contents, source)
    text_units = units or (own and own.units) or UNITS[0]
    probe = read_probe(tsv, text_units)
    is_text, is_clips = probe.kind == TEXT, probe.kind in (CLIPS, VERIFICATION)
    for name, value, is_fitting, needed in (
        ("units", units, is_text, "text"),
        ("layers", layers, not is_text or layers == "last", "label (of text the last layer is read)"),
        ("pooling", pooling, is_clips, "label and without start and end"),
    ):
        if value is not None and not is_fitting:
            option = f"--{prefix}{name}"
            raise UserError(
                f"{option} {value}: is for lists with the column {needed}; {tsv} is one of {probe.kind}; "
                f"leave out {option}"
            )
    if is_text:
        head = Head(TEXT, probe.labels, units=text_units)
    else:
        kind = CLIPS if is_clips else SEGMENTS
        if own is not None and own.kind == kind:
            layers, pooling = layers or own.layers, pooling or own.pooling
        pooling = (pooling or "mean") if is_clips else None
        head = Head(kind, probe.labels, layers=layers or "weighted", pooling=pooling)
    if own == head:
        return probe, contents, "its own"
    fresh = with_head(contents, head, source, torch.Generator().manual_seed(seed))
    return probe, {**contents, **fresh}, "a fresh"


def task_loss(kind: str, logits: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
    """CTC for a text, its mean over units, then over utterances; else cross-entropy, its mean over clips or frames.

    Args:
        logits: (B, frames, outputs), or (B, outputs) for whole clips.
        lengths: (B,) valid frames, or None if all are.
        targets: (B, N), see :func:`labels.batches.target_of`; -1 is padding.
    """
    logits = logits.float()
    if kind == TEXT:
        if lengths is None:
            lengths = torch.full((len(logits),), logits.size(1))
        # zero_infinity: a text that does not fit into its frames must not spoil the others.
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), targets + 1, lengths, (targets >= 0).sum(1), zero_infinity=True
        )
    if kind == CLIPS:
        logits = logits[:, None]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum")
    return losses / (targets >= 0).sum().clamp(min=1)  # a batch may have no frame in a segment


def fitting_probe(model: TaskModel, probe: Probe) -> Probe | str:
    """Read a list again in the units and with the numbers of a model's head, or say why the head is not for it.

    Raises:
        UserError: see :func:`labels.lists.read_probe`.
    """
    kind = CLIPS if probe.kind == VERIFICATION else probe.kind
    if kind != model.kind:
        return f"its head is one of {model.kind}, the list one of {probe.kind}"
    units = model.head_settings.units or UNITS[0]
    if kind == TEXT:
        probe = read_probe(probe.path, units)
    if unknown := sorted(set(probe.labels) - set(model.labels)):
        return f"its head does not know the label {short_repr(unknown[0])}"
    return read_probe(probe.path, units, model.labels)


def score_head(model: TaskModel, probe: Probe, source: str) -> Score:
    """Score a model's own head on the test clips; a verification compares logits from their mean over training.

    The model is in eval mode, and its labels are the list's; ``source`` names it in progress bars and errors.

    Raises:
        UserError: a clip cannot be read or is too short, or a logit is not finite.
    """
    times = FrameTimes.of(model)
    results: list[list[float]] = []
    for clip, logits in _logits(model, probe, probe.test, source):
        target = target_of(probe.kind, clip, times.middles(len(logits)))
        results += clip_results(probe.kind, logits[None], None, target[None])
    centre = None
    if probe.kind == VERIFICATION:
        centre = torch.stack([logits for _, logits in _logits(model, probe, probe.train, source)]).mean(0).numpy()
    return score_of(probe.kind, results, probe.test, centre)


@torch.inference_mode()
def _logits(model: TaskModel, probe: Probe, clips: Sequence[Clip], source: str) -> Iterator[tuple[Clip, Tensor]]:
    """Each clip with its logits on the CPU, (frames, outputs), or (outputs,) for whole clips."""
    window, device = model.feature_extractor.receptive_field, next(model.parameters()).device
    for clip, waveform in read_clips(probe, clips, window, f"{source}, own head"):
        (logits,), _ = model(waveform[None].to(device))
        if not logits.isfinite().all():
            raise UserError(
                f"{source}: its head gives NaN or infinite values for {probe.place(clip)}, expected numbers; its "
                "training failed, or its file is damaged"
            )
        yield clip, logits.float().cpu()
