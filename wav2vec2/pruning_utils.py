"""Slicing of layers in place: keep the units of ``index`` along one dimension, drop the others."""

from torch import Tensor, nn

# Which dimension of ``weight`` holds a layer's units. (out, in) for Linear, (out, in, kernel) for Conv1d.
_WEIGHT_DIM = {"output": 0, "input": 1}


def _keep(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index).clone(), requires_grad=parameter.requires_grad)


def prune_linear(layer: nn.Linear, index: Tensor, side: str) -> None:
    """Keep the ``side`` ("input" or "output") features of ``layer`` listed in ``index`` (n,)."""
    layer.weight = _keep(layer.weight, index, _WEIGHT_DIM[side])
    if side == "input":
        layer.in_features = len(index)
        return
    layer.out_features = len(index)
    if layer.bias is not None:
        layer.bias = _keep(layer.bias, index, 0)


def prune_conv1d(layer: nn.Conv1d, index: Tensor, side: str) -> None:
    """Keep the ``side`` ("input" or "output") channels of an ungrouped ``layer`` listed in ``index`` (n,)."""
    layer.weight = _keep(layer.weight, index, _WEIGHT_DIM[side])
    if side == "input":
        layer.in_channels = len(index)
        return
    layer.out_channels = len(index)
    if layer.bias is not None:
        layer.bias = _keep(layer.bias, index, 0)


def prune_norm(layer: nn.LayerNorm | nn.GroupNorm, index: Tensor) -> None:
    """Keep the channels of a LayerNorm, or of a GroupNorm with one group per channel, listed in ``index`` (n,)."""
    layer.weight = _keep(layer.weight, index, 0)
    layer.bias = _keep(layer.bias, index, 0)
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(index),)
    else:
        layer.num_groups = layer.num_channels = len(index)
