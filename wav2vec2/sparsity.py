"""How large a masked model becomes when it is pruned, and how to make that meet a target exactly.

Training drives the *expected* size to the target (paper, section 2.3). Each deterministic mask then
rounds its own number of units, and a short schedule can end before the Lagrangian has settled, so the
pruned size differs from the target. :func:`fit_masks` closes that gap with one number, which moves
the threshold between kept and dropped units in all masks and leaves their order alone.

A size is parameters, multiply-adds (MACs), or both. With budgets for both it is met where none is
exceeded and one is used up.

:func:`round_widths` makes the widths that masks decide multiples of a number, for hardware that
multiplies such matrices faster; the functions below then count and fit with it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardconcrete import HardConcrete

from .audio import SAMPLE_RATE
from .components import assumed_sizes
from .flops import UTTERANCE_SECONDS
from .model import Wav2Vec2Model

# What MACs are counted for: attention grows with the square of it.
_MACS_SAMPLES = round(UTTERANCE_SECONDS * SAMPLE_RATE)

# Relative; float32 masks cannot be brought nearer than about a tenth of it.
_EXPECTED_SIZE_TOLERANCE = 1e-5

# sigmoid(+-40) is exactly 1 and practically 0 in float32: a mask without any doubt left in it.
_CERTAIN = 40.0


class Size(NamedTuple):
    """Parameters, and MACs of :data:`~wav2vec2.flops.UTTERANCE_SECONDS` of speech; None where there is no budget."""

    params: Any
    macs: Any


def size_of(model: Wav2Vec2Model) -> Size:
    """Expected parameters and MACs: differentiable scalars while there are masks, and the exact numbers without."""
    return Size(model.get_num_params(), model.get_num_macs(_MACS_SAMPLES))


def _masks(model: Wav2Vec2Model) -> list[HardConcrete]:
    return [module for module in model.modules() if isinstance(module, HardConcrete)]


def _width_masks(model: Wav2Vec2Model) -> list[HardConcrete]:
    """The masks over conv channels and intermediate dimensions, whose units are rows of a matrix each."""
    masks = [layer.hard_concrete for layer in model.feature_extractor.conv_layers]
    blocks = [layer.feed_forward for layer in model.encoder.transformer.layers]
    masks += [block.hard_concrete_for_intermediate for block in blocks if block is not None]
    return [mask for mask in masks if mask is not None]


def round_widths(model: Wav2Vec2Model, multiple: int) -> None:
    """Let the deterministic masks keep conv channels and intermediate dimensions in multiples of ``multiple``.

    A width is rounded up, by the strongest of the units that would go, but never above the layer's own;
    a block whose units all go stays gone. Training, heads and layer masks are not touched. 1 is the
    published rounding.
    """
    for mask in _width_masks(model):
        mask.multiple = min(multiple, mask.n_in)  # more than all units means all units


@torch.no_grad()
def num_params_without_rounding(model: Wav2Vec2Model) -> int:
    """Parameters that ``model.prune()`` would leave without :func:`round_widths`, with the same masks."""
    unrounded = copy.deepcopy(model)
    round_widths(unrounded, 1)
    unrounded.prune()
    return int(unrounded.get_num_params())


@contextmanager
def _log_alphas(masks: list[HardConcrete], values: list[Tensor]) -> Iterator[None]:
    """Other ``log_alpha`` values for the length of the block."""
    originals = [mask.log_alpha.detach().clone() for mask in masks]
    try:
        for mask, value in zip(masks, values, strict=True):
            mask.log_alpha.copy_(value)
        yield
    finally:
        for mask, original in zip(masks, originals, strict=True):
            mask.log_alpha.copy_(original)


@torch.no_grad()
def expected_size(model: Wav2Vec2Model) -> Size:
    """:func:`size_of` in plain numbers."""
    return Size(*map(float, size_of(model)))


@torch.no_grad()
def smallest_size(model: Wav2Vec2Model) -> Size:
    """The expected size if every mask dropped what it may: no target below this can be reached."""
    masks = _masks(model)
    with _log_alphas(masks, [torch.full_like(mask.log_alpha, -_CERTAIN) for mask in masks]):
        return expected_size(model)


@torch.no_grad()
def initial_size(model: Wav2Vec2Model) -> Size:
    """The expected size with every ``log_alpha`` at the mean that it is drawn around."""
    masks = _masks(model)
    with _log_alphas(masks, [torch.full_like(mask.log_alpha, mask.init_log_alpha) for mask in masks]):
        return expected_size(model)


@torch.no_grad()
def pruned_size(model: Wav2Vec2Model) -> Size:
    """The size that ``model.prune()`` would leave, without pruning it; the model must be in eval mode.

    Biases and gates that go with a block whose units all go are still counted here.
    """
    masks = _masks(model)
    decided = [torch.where(mask() != 0, _CERTAIN, -_CERTAIN) for mask in masks]
    with _log_alphas(masks, decided):
        return expected_size(model)


# ---------------------------------------------------------------------------------------------------
# Meeting a target
# ---------------------------------------------------------------------------------------------------


def _crossing(excess: Callable[[float], float], tolerance: float, precision: float) -> tuple[float, float]:
    """Two numbers, ``precision`` apart, between which a growing function passes 0; the same one twice where it is there
    up to ``tolerance``, or where it does not pass 0 between the masks' extremes: then the extreme that is nearer.
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
    """By how much of what is wanted a size is above it, by the names of what is wanted."""
    wanted_parts = {name: value for name, value in wanted._asdict().items() if value is not None}
    return {name: (getattr(size, name) - value) / max(value, 1.0) for name, value in wanted_parts.items()}


@torch.no_grad()
def meet_expected_size(model: Wav2Vec2Model, wanted: Size) -> str:
    """Add one number to all ``log_alpha`` of ``model``, so that its expected size is the wanted one.

    Nothing is changed where it is, up to :data:`_EXPECTED_SIZE_TOLERANCE`. Sizes are counted on the CPU in double
    precision, from the few sums of probabilities that they depend on.

    Returns:
        The part of the size that binds: the name that :func:`compete` takes.
    """
    masks = _masks(model)
    # One copy from the device for all of them.
    scores = torch.cat([mask.log_alpha + mask.bias for mask in masks]).cpu().double()

    def excesses(offset: float) -> dict[str, float]:
        parts = (scores + offset).sigmoid().split([mask.n_in for mask in masks])
        with assumed_sizes(dict(zip(masks, [float(part.sum()) for part in parts], strict=True))):
            return _excesses(size_of(model), wanted)

    def excess(offset: float) -> float:
        return max(excesses(offset).values())

    offset = 0.0
    if abs(excess(offset)) > _EXPECTED_SIZE_TOLERANCE:
        offset, _ = _crossing(excess, _EXPECTED_SIZE_TOLERANCE / 10, precision=1e-7)
        for mask in masks:
            mask.log_alpha.add_(offset)
    found = excesses(offset)
    return max(found, key=found.__getitem__)


def compete(model: Wav2Vec2Model, name: str) -> None:
    """Make the gradients of ``log_alpha`` those of masks that are moved back to the size: they compete for it.

    They are those of log_alpha + c(log_alpha), where c is what :func:`meet_expected_size` adds: by the implicit
    function theorem dc/dlog_alpha = -n / sum(n) with n = dN/dlog_alpha, N the size. The change is linear, and done
    twice it gives the same, so that each batch of an update may do it.

    Args:
        model: whose masks have gradients.
        name: of a field of :class:`Size`.
    """
    log_alphas = [mask.log_alpha for mask in _masks(model)]
    size_gradients = torch.autograd.grad(getattr(size_of(model), name), log_alphas)
    total = torch.stack([parameter.grad.sum() for parameter in log_alphas]).sum()
    size_total = torch.stack([gradient.sum() for gradient in size_gradients]).sum()
    for parameter, gradient in zip(log_alphas, size_gradients, strict=True):
        parameter.grad -= gradient * (total / size_total)


@torch.no_grad()
def fit_masks(model: Wav2Vec2Model, wanted: Size, tolerance: Size) -> float:
    """Set the ``shift`` of all masks of ``model`` to the one number that brings its pruned size to the wanted one.

    Nothing is changed where the masks already land within ``tolerance``. Otherwise the nearest size that
    a shift can give is taken; with :func:`round_widths`, whose steps are coarse, the nearest that is not
    above the target where none is within ``tolerance``.

    Args:
        model: a masked model; put in eval mode.
        wanted: parameters, MACs, or both.
        tolerance: the deviations that need no correction.

    Returns:
        The shift (0.0 if none was needed), see :class:`hardconcrete.HardConcrete`.
    """
    model.eval()
    masks = _masks(model)

    def excess(shift: float) -> float:
        for mask in masks:
            mask.shift = shift
        return max(_excesses(pruned_size(model), wanted).values())

    def is_met(shift: float) -> bool:
        excess(shift)
        sizes = zip(pruned_size(model), wanted, tolerance, strict=True)
        beyond = [(size - value, allowed) for size, value, allowed in sizes if value is not None]
        return (
            max(above - allowed for above, allowed in beyond) <= 0 <= max(above + allowed for above, allowed in beyond)
        )

    if is_met(0.0):
        return 0.0
    low, high = _crossing(excess, tolerance=0.0, precision=1e-5)
    shift = min(low, high, key=lambda value: abs(excess(value)))
    if any(mask.multiple > 1 for mask in masks) and not is_met(shift):
        shift = low
    excess(shift)
    return shift
