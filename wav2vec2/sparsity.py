"""How large a masked model becomes when it is pruned, and how to make that meet a target exactly.

Training drives the *expected* size to the target (paper, section 2.3). Each deterministic mask then
rounds its own number of units, and a short schedule can end before the Lagrangian has settled, so the
pruned size differs from the target. :func:`fit_masks` closes that gap with one number, which moves
the threshold between kept and dropped units in all masks and leaves their order alone.

:func:`round_widths` makes the widths that masks decide multiples of a number, for hardware that
multiplies such matrices faster; the functions below then count and fit with it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hardconcrete import HardConcrete

from .components import assumed_sizes
from .errors import UserError, short_repr
from .model import Wav2Vec2Model

# Relative; float32 masks cannot be brought nearer than about a tenth of it.
_EXPECTED_SIZE_TOLERANCE = 1e-5

# sigmoid(+-40) is exactly 1 and practically 0 in float32: a mask without any doubt left in it.
_CERTAIN = 40.0


def _masks(model: Wav2Vec2Model) -> list[HardConcrete]:
    return [module for module in model.modules() if isinstance(module, HardConcrete)]


def _width_masks(model: Wav2Vec2Model) -> list[HardConcrete]:
    """The masks over conv channels and intermediate dimensions, whose units are rows of a matrix each."""
    masks = [layer.hard_concrete for layer in model.feature_extractor.conv_layers]
    blocks = [layer.feed_forward for layer in model.encoder.transformer.layers]
    masks += [block.hard_concrete_for_intermediate for block in blocks if block is not None]
    return [mask for mask in masks if mask is not None]


# Far above any width; a number without bounds could not be read back from the file that it is recorded in.
MAX_ROUND_TO = 1_000_000


def check_round_to(value: Any, source: str) -> None:
    """Check the multiple of widths that ``source``, an option or an entry of a file, asks for.

    Raises:
        UserError: not a whole number from 1 to :data:`MAX_ROUND_TO`.
    """
    if type(value) is not int or not 1 <= value <= MAX_ROUND_TO:
        raise UserError(f"{source}: expected a whole number from 1 to {MAX_ROUND_TO}, found {short_repr(value)}")


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
def expected_num_params(model: Wav2Vec2Model) -> float:
    """``model.get_num_params()`` as a plain number."""
    return float(model.get_num_params())


@torch.no_grad()
def smallest_num_params(model: Wav2Vec2Model) -> float:
    """Expected parameters if every mask dropped what it may: no target below this can be reached."""
    masks = _masks(model)
    with _log_alphas(masks, [torch.full_like(mask.log_alpha, -_CERTAIN) for mask in masks]):
        return float(model.get_num_params())


@torch.no_grad()
def initial_num_params(model: Wav2Vec2Model) -> float:
    """Expected parameters with every ``log_alpha`` at the mean that it is drawn around."""
    masks = _masks(model)
    with _log_alphas(masks, [torch.full_like(mask.log_alpha, mask.init_log_alpha) for mask in masks]):
        return float(model.get_num_params())


@torch.no_grad()
def meet_expected_size(model: Wav2Vec2Model, num_params: float) -> float:
    """Add one number to all ``log_alpha`` of ``model``, so that it is expected to have ``num_params`` parameters.

    Nothing is changed where it has, up to :data:`_EXPECTED_SIZE_TOLERANCE`. The number is found by bisection, for which
    sizes are counted on the CPU in double precision, from the few sums of probabilities that they depend on.

    Returns:
        The number added.
    """
    masks = _masks(model)
    # One copy from the device for all of them.
    scores = torch.cat([mask.log_alpha + mask.bias for mask in masks]).cpu().double()

    def excess(offset: float) -> float:
        parts = (scores + offset).sigmoid().split([mask.n_in for mask in masks])
        with assumed_sizes(dict(zip(masks, [float(part.sum()) for part in parts], strict=True))):
            return model.get_num_params() / num_params - 1

    start = excess(0.0)
    if abs(start) <= _EXPECTED_SIZE_TOLERANCE:
        return 0.0
    bound = -0.01 if start > 0 else 0.01  # the size grows with the offset
    while abs(bound) < _CERTAIN and excess(bound) * start > 0:
        bound *= 4
    low, high = sorted((0.0, bound))
    while high - low > 1e-7:
        middle = (low + high) / 2
        if excess(middle) > 0:
            high = middle
        else:
            low = middle
    for mask in masks:
        mask.log_alpha.add_(low)
    return low


@torch.no_grad()
def pruned_num_params(model: Wav2Vec2Model) -> float:
    """Parameters that ``model.prune()`` would leave, without pruning it; the model must be in eval mode.

    Biases and gates that go with a block whose units all go are still counted here.
    """
    masks = _masks(model)
    decided = [torch.where(mask() != 0, _CERTAIN, -_CERTAIN) for mask in masks]
    with _log_alphas(masks, decided):
        return float(model.get_num_params())


@torch.no_grad()
def fit_masks(model: Wav2Vec2Model, target_num_params: float, tolerance: float) -> float:
    """Set the ``shift`` of all masks of ``model`` to the one number that brings its pruned size to the target.

    Nothing is changed where the masks already land within ``tolerance``. Otherwise the nearest size that
    a shift can give is taken; with :func:`round_widths`, whose steps are coarse, the nearest that is not
    above the target where none is within ``tolerance``.

    Args:
        model: a masked model; put in eval mode.
        target_num_params: the size wanted.
        tolerance: the deviation, in parameters, that needs no correction.

    Returns:
        The shift (0.0 if none was needed), see :class:`hardconcrete.HardConcrete`.
    """
    model.eval()
    masks = _masks(model)

    def size(shift: float) -> float:
        for mask in masks:
            mask.shift = shift
        return pruned_num_params(model)

    if abs(size(0.0) - target_num_params) <= tolerance:
        return 0.0
    low, high = -_CERTAIN, _CERTAIN  # the size grows with the shift
    while high - low > 1e-5:
        middle = (low + high) / 2
        if size(middle) <= target_num_params:
            low = middle
        else:
            high = middle
    shift = min(low, high, key=lambda value: abs(size(value) - target_num_params))
    if any(mask.multiple > 1 for mask in masks) and abs(size(shift) - target_num_params) > tolerance:
        shift = low
    size(shift)
    return shift
