"""What a student can learn beside equation 1: relations between frames, units of masked frames, groups of layers."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning import student_layers
from training.arguments import MachineSettings, RunSettings
from training.data import BatchDataModule
from wav2vec2.files.checkpoint import load_state
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model


class Seen(NamedTuple):
    """What an objective can see of a batch.

    Attributes:
        model: the student.
        frames: what its extractor made (B, frames, C).
        lengths: how many of them are valid (B,), or None if all are.
        student: its hidden states, as of ``extract_features``, if any objective reads them.
        teacher: the teacher's hidden states, by layer.
        drawn: what :meth:`Objective.draw` gave.
    """

    model: Wav2Vec2Model
    frames: Tensor
    lengths: Tensor | None
    student: Sequence[Tensor]
    teacher: Mapping[int, Tensor]
    drawn: Tensor | None


class Objective(nn.Module):
    """Something that the student learns beside equation 1, or instead of it.

    Attributes:
        weight: in the sum of losses.
        teacher_layers: of which it needs the hidden states.
        student_depth: how many of the student's layers it trains.
        reads_student: whether it reads the hidden states that equation 1 does.
    """

    weight: float
    teacher_layers: Sequence[int]
    student_depth: int
    reads_student: bool

    def draw(self, batch: Any, num_frames: int) -> Tensor | None:
        """What it takes of a batch beside the frames: labels, or noise, which is not drawn in what is compiled."""
        return None

    def forward(self, *seen: Any) -> Tensor:
        """The loss of a batch, a scalar; the fields of :class:`Seen` in their order."""
        return self.loss(Seen(*seen))

    def loss(self, seen: Seen) -> Tensor:
        """The loss of a batch, a scalar."""
        raise NotImplementedError


class TemporalRelations(Objective):
    """How much each frame resembles each other one, the same in student and teacher (STaR, arXiv 2312.09040).

    Of each distilled layer's output with itself, and with its input (where it has one: layer 0, the projection, has
    not; layer 1's is layer 0), the mean squared error of the Gram matrices over time. Frames of another width need no
    projection.

    Args:
        weight: in the sum of losses.
        pairs: the teacher's layers and the student's that learn them.
    """

    reads_student = True

    def __init__(self, weight: float, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.weight = weight
        # (teacher's, student's) two layers of each relation.
        self.relations = [((t, t), (s, s)) for t, s in pairs] + [((t - 1, t), (s - 1, s)) for t, s in pairs if t and s]
        self.teacher_layers = sorted({layer for layers, _ in self.relations for layer in layers})
        self.student_depth = max(student for _, student in pairs)

    def loss(self, seen: Seen) -> Tensor:
        losses = [
            F.mse_loss(
                temporal_relations(*(seen.student[i] for i in own)),
                temporal_relations(*(seen.teacher[i] for i in others)),
            )
            for others, own in self.relations
        ]
        return torch.stack(losses).mean()


def temporal_relations(x: Tensor, y: Tensor) -> Tensor:
    """The Gram matrix over time, divided by the width: (B, frames, D) twice -> (B, frames, frames), in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ y.float().transpose(1, 2) / x.size(-1)


# HuBERT's (arXiv 2106.07447): the share of frames that spans begin for, times their length; the length; the size of
# what is compared; and the temperature.
MASK_PROBABILITY, MASK_LENGTH, MIN_MASKS = 0.8, 10, 2
CODE_DIM, TEMPERATURE = 256, 0.1
# Frames that k-means sees for each unit.
FRAMES_PER_UNIT = 200


class MaskedUnits(Objective):
    """HuBERT's own objective (arXiv 2106.07447), with a teacher's units as DiceHuBERT has it (arXiv 2507.02911).

    Spans of frames are hidden behind one learnt frame, and the student's last layer says which unit the teacher's layer
    is nearest to there: cross-entropy on the hidden frames. It runs the transformer a second time, with masks of units
    that are to be pruned drawn anew.

    Args:
        weight: in the sum of losses.
        teacher_layer: whose units these are.
        num_units: of k-means.
        teacher_dim, student_dim: widths.
        student_depth: the student's layers.
    """

    reads_student = False

    def __init__(
        self, weight: float, teacher_layer: int, num_units: int, teacher_dim: int, student_dim: int, student_depth: int
    ) -> None:
        super().__init__()
        self.weight = weight
        self.teacher_layers = [teacher_layer]
        self.student_depth = student_depth
        # A parameter, so that all processes get the first one's.
        self.centroids = nn.Parameter(torch.zeros(num_units, teacher_dim), requires_grad=False)
        self.hidden_frame = nn.Parameter(torch.empty(student_dim).uniform_())
        self.projection = nn.Linear(student_dim, CODE_DIM)
        self.codes = nn.Parameter(torch.empty(num_units, CODE_DIM).uniform_())

    def draw(self, batch: Any, num_frames: int) -> Tensor:
        """Which frames are hidden (B, frames), on the CPU, from torch's generator."""
        from torchaudio.models.wav2vec2.components import _compute_mask_indices

        return _compute_mask_indices(
            (len(batch[0]), num_frames), None, MASK_PROBABILITY, MASK_LENGTH, min_masks=MIN_MASKS
        ).to(self.codes.device)

    def loss(self, seen: Seen) -> Tensor:
        last = self.student_depth
        hidden = seen.drawn, self.hidden_frame
        states = seen.model.encoder.extract_features(seen.frames, seen.lengths, kept=(last,), hidden=hidden)
        similarity = F.normalize(self.projection(states[last]), dim=-1) @ F.normalize(self.codes, dim=-1).T
        units = nearest(seen.teacher[self.teacher_layers[0]], self.centroids)
        losses = F.cross_entropy(similarity.float().transpose(1, 2) / TEMPERATURE, units, reduction="none")
        return (losses * seen.drawn).sum() / seen.drawn.sum()


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid (units, D) of each frame: (B, frames, D) -> (B, frames)."""
    with torch.autocast(frames.device.type, enabled=False):
        return torch.cdist(frames.float(), centroids).argmin(-1)


# ---------------------------------------------------------------------------------------------------
# From settings and data
# ---------------------------------------------------------------------------------------------------


def new_objectives(
    settings: RunSettings,
    teacher: Wav2Vec2Model,
    student: Wav2Vec2Model,
    learnt: Mapping[str, Tensor] | None,
) -> nn.ModuleDict:
    """The objectives of a run, by name.

    Args:
        settings: of the run.
        teacher, student: of the run.
        learnt: the state dict of those of the stage before, where there was one with units.

    Raises:
        UserError: a layer that does not exist or has no counterpart, or units that do not fit.
    """
    wanted, objectives = settings.objectives, nn.ModuleDict()
    if wanted is None:
        return objectives
    num_layers, num_student_layers = (len(model.encoder.transformer.layers) for model in (teacher, student))
    if wanted.star_weight:
        layers = [layer for group in settings.models.layers for layer in group]
        try:
            pairs = [(t, *student_layers((t,), num_layers, num_student_layers)) for t in layers]
        except UserError as error:
            raise UserError(f"--star_weight {wanted.star_weight:g}: {error}") from None
        objectives["star"] = TemporalRelations(wanted.star_weight, pairs)
    if wanted.unit_weight:
        layer = round(0.75 * num_layers) if wanted.unit_layer is None else wanted.unit_layer
        if layer > num_layers:
            raise UserError(f"--unit_layer {layer}: the teacher has {num_layers} layers")
        dims = [model.config["encoder_embed_dim"] for model in (teacher, student)]
        objectives["units"] = MaskedUnits(wanted.unit_weight, layer, wanted.num_units, *dims, num_student_layers)
        if learnt:
            learnt = {key: value for key, value in learnt.items() if key.startswith("units.")}
            star = {key: value for key, value in objectives.state_dict().items() if not key.startswith("units.")}
            load_state(objectives, star | learnt, f"the units of --student_ckpt {settings.models.student_ckpt}")
    return objectives


def find_units(settings: RunSettings, data: BatchDataModule, teacher: Wav2Vec2Model, units: MaskedUnits) -> None:
    """Set the centroids: k-means of a teacher's layer, over frames of the first epoch's batches.

    Raises:
        UserError: there are more units than frames.
    """
    from sklearn.cluster import MiniBatchKMeans

    num_units, num_wanted = len(units.centroids), len(units.centroids) * FRAMES_PER_UNIT
    (frames,) = teacher_frames(settings, data, teacher, units.teacher_layers, num_wanted)
    if len(frames) < num_units:
        raise UserError(
            f"--num_units {num_units}: the training data make {len(frames)} frames; give fewer units, or more data"
        )
    kmeans = MiniBatchKMeans(num_units, batch_size=10_000, n_init=3, random_state=settings.data.seed)
    centroids = kmeans.fit(frames.numpy()).cluster_centers_
    units.centroids.data.copy_(torch.from_numpy(centroids))


def with_layer_groups(settings: RunSettings, data: BatchDataModule, teacher: Wav2Vec2Model) -> RunSettings:
    """``--distill_layers auto:K`` spelt out: layer 0, and the means of K groups of layers that are alike.

    As SKILL (arXiv 2402.16830) does: hierarchical clustering by linear CKA.

    Raises:
        UserError: more groups than layers.
    """
    from sklearn.cluster import AgglomerativeClustering

    num_groups, num_layers = settings.models.num_auto_groups, len(teacher.encoder.transformer.layers)
    if num_groups is None or not settings.has_projections:
        return settings
    if num_groups > num_layers:
        raise UserError(f"--distill_layers {settings.models.distill_layers}: the teacher has {num_layers} layers")
    every = range(1, num_layers + 1)
    distances = 1 - cka(teacher_frames(settings, data, teacher, every, CKA_FRAMES))
    clusters = AgglomerativeClustering(num_groups, metric="precomputed", linkage="average").fit(distances.numpy())
    groups: dict[int, list[str]] = {}
    for layer, cluster in zip(every, clusters.labels_.tolist(), strict=True):
        groups.setdefault(cluster, []).append(str(layer))
    found = f"0.{','.join('+'.join(group) for group in groups.values())}"
    print(f"--distill_layers {settings.models.distill_layers}: {found}", flush=True)
    return dataclasses.replace(settings, models=dataclasses.replace(settings.models, distill_layers=found))


# 40 s: the order of layers by CKA does not need more.
CKA_FRAMES = 2000


def cka(features: Sequence[Tensor]) -> Tensor:
    """Linear centred kernel alignment (arXiv 1905.00414) of each with each: (frames, D) each -> (N, N), float64."""
    grams = []
    for feature in features:
        centred = feature.double() - feature.double().mean(0)
        gram = centred @ centred.T
        grams.append((gram / gram.norm()).flatten())
    return torch.stack(grams) @ torch.stack(grams).T


def own_device(machine: MachineSettings) -> torch.device:
    """Where this process will train, before Lightning says so."""
    if machine.devices[0] == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))


@torch.no_grad()
def teacher_frames(
    settings: RunSettings, data: BatchDataModule, teacher: Wav2Vec2Model, layers: Sequence[int], num_frames: int
) -> list[Tensor]:
    """Hidden states of the first batches of training: for each layer (frames, D) on the CPU, in float32.

    There are ``num_frames``, or as many as an epoch has. The teacher stays on the device that it ran on.
    """
    speech = data.datasets[data.train_subset]
    device = own_device(settings.machine)
    teacher.eval().to(device)
    found: list[list[Tensor]] = [[] for _ in layers]
    num_found = 0
    for crop in data.sampler(data.train_subset, 1, 0):
        waveforms, lengths = (None if x is None else x.to(device) for x in speech[crop][:2])
        hidden_states, lengths = teacher.extract_features(waveforms, lengths, max(1, *layers), kept=layers)
        for frames, layer in zip(found, layers, strict=True):
            rows = [row[: None if lengths is None else lengths[i]] for i, row in enumerate(hidden_states[layer])]
            frames.append(torch.cat(rows).float().cpu())
        num_found += len(found[0][-1])
        if num_found >= num_frames:
            break
    return [torch.cat(frames)[:num_frames] for frames in found]
