"""Sizes of a masked model before and after pruning, and ways to meet a target size exactly.

Training drives the *expected* size to the target (paper, section 2.3). Each deterministic mask then rounds its own
number of units, and a short schedule can end before the Lagrangian has settled. :func:`fit_masks` closes that gap with
one number, which moves the threshold between kept and dropped units in all masks and leaves their order alone.
A size is parameters, multiply-adds (MACs), time, or several; these are met when none is exceeded and one is used up.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardconcrete import HardConcrete

from .audio import SAMPLE_RATE
from .components import ConvLayerBlock, FeedForward, assumed_sizes
from .flops import UTTERANCE_SECONDS
from .model import Wav2Vec2Model
from .profiles import Profile

# Samples of the utterance that MACs are counted on: attention grows with their square.
_MACS_SAMPLES = round(UTTERANCE_SECONDS * SAMPLE_RATE)

# Relative; float32 masks can come about ten times nearer.
_EXPECTED_SIZE_TOLERANCE = 1e-5

# sigmoid(+-40) is exactly 1 and practically 0 in float32.
_CERTAIN = 40.0


class Size(NamedTuple):
    """Parameters, MACs of :data:`~wav2vec2.flops.UTTERANCE_SECONDS` of speech, a profile's time; None for no budget."""

    params: Any
    macs: Any
    latency: Any = None  # in microseconds


def size_of(model: Wav2Vec2Model, profile: Profile | None = None) -> Size:
    """Return the expected sizes: differentiable scalars with masks, else numbers; no time without a profile.

    Raises:
        UserError: the profile has no times for a part of the model.
    """
    latency = None if profile is None else profile.total(model.operations(profile.num_samples))
    return Size(model.get_num_params(), model.get_num_macs(_MACS_SAMPLES), latency)


def _masks(model: Wav2Vec2Model) -> list[HardConcrete]:
    return [module for module in model.modules() if isinstance(module, HardConcrete)]


def round_widths(model: Wav2Vec2Model, multiple: int) -> None:
    """Make the deterministic masks keep conv channels and intermediate dimensions in multiples of ``multiple``.

    Hardware multiplies such matrices faster. A width is rounded up, by the strongest of the units that would go, but
    never above the layer's own; a block whose units all go stays gone. Training, heads and layer masks do not change.
    1 is the published rounding.
    """
    for block in model.modules():
        mask = block.hard_concrete if isinstance(block, ConvLayerBlock) else None
        mask = block.hard_concrete_for_intermediate if isinstance(block, FeedForward) else mask
        if mask is not None:
            mask.multiple = min(multiple, mask.n_in)  # more than all units means all units


@torch.no_grad()
def num_params_without_rounding(model: Wav2Vec2Model) -> int:
    """Return the parameters that ``model.prune()`` would leave without :func:`round_widths`."""
    unrounded = copy.deepcopy(model)
    round_widths(unrounded, 1)
    unrounded.prune()
    return int(unrounded.get_num_params())


@torch.no_grad()
def expected_size(model: Wav2Vec2Model, profile: Profile | None = None) -> Size:
    """Return :func:`size_of` in plain numbers."""
    return Size(*(None if size is None else float(size) for size in size_of(model, profile)))


@torch.no_grad()
def _size_if(model: Wav2Vec2Model, profile: Profile | None, log_alpha_of: Callable[[HardConcrete], Tensor]) -> Size:
    """Return the expected size if every mask had another ``log_alpha``."""
    masks = _masks(model)
    originals = [mask.log_alpha.clone() for mask in masks]
    try:
        for mask in masks:
            mask.log_alpha.copy_(log_alpha_of(mask))
        return expected_size(model, profile)
    finally:
        for mask, original in zip(masks, originals, strict=True):
            mask.log_alpha.copy_(original)


def smallest_size(model: Wav2Vec2Model, profile: Profile | None = None) -> Size:
    """Return the expected size if every mask dropped all it may: no target below this can be reached."""
    return _size_if(model, profile, lambda mask: torch.full_like(mask.log_alpha, -_CERTAIN))


def initial_size(model: Wav2Vec2Model, profile: Profile | None = None) -> Size:
    """Return the expected size with every ``log_alpha`` at its initial mean."""
    return _size_if(model, profile, lambda mask: torch.full_like(mask.log_alpha, mask.init_log_alpha))


def pruned_size(model: Wav2Vec2Model, profile: Profile | None = None) -> Size:
    """Return the size that ``model.prune()`` would leave, without pruning it; the model must be in eval mode.

    Biases and gates of a block whose units all go are still counted here.
    """
    return _size_if(model, profile, lambda mask: torch.where(mask() != 0, _CERTAIN, -_CERTAIN))


# --- Meeting a target


def _crossing(excess: Callable[[float], float], tolerance: float, precision: float) -> tuple[float, float]:
    """Find where a growing function passes 0, by secants and bisection.

    Returns:
        Two numbers on either side of 0, at most ``precision`` apart. The same number twice if the function is 0 there
        up to ``tolerance``, or if it never passes 0: then the nearer extreme of the masks.
    """
    start = excess(0.0)
    low = high = bound = 0.0
    at_low = at_high = start
    step = -0.01 if start > 0 else 0.01
    while abs(start) > tolerance and at_low * at_high > 0:
        if abs(bound) == _CERTAIN:
            return bound, bound
        bound = max(-_CERTAIN, min(bound + step, _CERTAIN))
        step *= 4
        if start > 0:
            low, at_low, high, at_high = bound, excess(bound), low, at_low
        else:
            low, at_low, high, at_high = high, at_high, bound, excess(bound)
    by_secant = True
    while high - low > precision:
        # Secants find zeros of smooth functions, bisection those of steps.
        middle = low + (high - low) * (at_low / (at_low - at_high) if by_secant else 0.5)
        by_secant = not by_secant
        value = excess(middle)
        if abs(value) <= tolerance:
            return middle, middle
        if value > 0:
            high, at_high = middle, value
        else:
            low, at_low = middle, value
    return low, high


def _excesses(size: Size, wanted: Size) -> dict[str, float]:
    """Return the relative excess of a size over each part that is wanted, by name."""
    parts = zip(Size._fields, size, wanted, strict=True)
    return {name: (found - value) / max(value, 1.0) for name, found, value in parts if value is not None}


@torch.no_grad()
def meet_expected_size(model: Wav2Vec2Model, wanted: Size, profile: Profile | None = None) -> str:
    """Add one number to all ``log_alpha`` of ``model``, so that its expected size is the wanted one.

    Nothing changes if it already is, up to :data:`_EXPECTED_SIZE_TOLERANCE`. Sizes are counted on the CPU in double
    precision, from the sums of probabilities that they depend on.

    Returns:
        The name of the part of the size that binds, for :func:`compete`.
    """
    masks = _masks(model)
    # One copy from the device for all of them.
    scores = torch.cat([mask.log_alpha + mask.bias for mask in masks]).cpu().double()

    def excesses(offset: float) -> dict[str, float]:
        parts = (scores + offset).sigmoid().split([mask.n_in for mask in masks])
        with assumed_sizes(dict(zip(masks, [float(part.sum()) for part in parts], strict=True))):
            return _excesses(size_of(model, profile), wanted)

    def excess(offset: float) -> float:
        return max(excesses(offset).values())

    offset = 0.0
    if abs(excess(offset)) > _EXPECTED_SIZE_TOLERANCE:
        offset, _ = _crossing(excess, _EXPECTED_SIZE_TOLERANCE / 10, precision=1e-7)
        for mask in masks:
            mask.log_alpha.add_(offset)
    found = excesses(offset)
    return max(found, key=found.__getitem__)


def compete(model: Wav2Vec2Model, name: str, profile: Profile | None = None) -> None:
    """Project mask gradients onto constant size, so that masks compete for it.

    The result is the gradient through log_alpha + c(log_alpha), where c is the number that :func:`meet_expected_size`
    adds: by the implicit function theorem dc/dlog_alpha = -n / sum(n) with n = dN/dlog_alpha, N the size, the field
    ``name`` of :class:`Size`. Projecting is linear and idempotent, so each batch of an update may do it.
    """
    log_alphas = [mask.log_alpha for mask in _masks(model)]
    size_gradients = torch.autograd.grad(getattr(size_of(model, profile), name), log_alphas)
    gradients = [parameter.grad for parameter in log_alphas if parameter.grad is not None]
    total = torch.stack([gradient.sum() for gradient in gradients]).sum()
    size_total = torch.stack([gradient.sum() for gradient in size_gradients]).sum()
    for gradient, size_gradient in zip(gradients, size_gradients, strict=True):
        gradient -= size_gradient * (total / size_total)


@torch.no_grad()
def fit_masks(model: Wav2Vec2Model, wanted: Size, tolerance: float, profile: Profile | None = None) -> float:
    """Set the ``shift`` of all masks of ``model`` to the one number that brings its pruned size to the wanted one.

    Nothing changes if the masks already land within ``tolerance``, a share of the wanted size. Otherwise the shift
    gives the nearest size there is; with :func:`round_widths`, whose steps are coarse, the nearest that is not above
    the target if none is within ``tolerance``. The model is put in eval mode.

    Returns:
        The shift (0.0 if none was needed), see :class:`hardconcrete.HardConcrete`.
    """
    model.eval()
    masks = _masks(model)

    def excess(shift: float) -> float:
        for mask in masks:
            mask.shift = shift
        return max(_excesses(pruned_size(model, profile), wanted).values())

    if abs(excess(0.0)) <= tolerance:
        return 0.0
    low, high = _crossing(excess, tolerance=0.0, precision=1e-5)
    shift = min(low, high, key=lambda value: abs(excess(value)))
    if any(mask.multiple > 1 for mask in masks) and abs(excess(shift)) > tolerance:
        shift = low
    excess(shift)
    return shift
