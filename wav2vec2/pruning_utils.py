"""Slicing of layers in place: keep the units of ``index`` (n,) along one dimension, drop the others."""

from torch import Tensor, nn


def keep(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    """Return a parameter of its own memory with the entries of ``index`` along ``dim``."""
    return nn.Parameter(parameter.detach().index_select(dim, index).clone(), requires_grad=parameter.requires_grad)


def prune_inputs(layer: nn.Linear | nn.Conv1d, index: Tensor) -> None:
    """Keep input features of a Linear, or input channels of an ungrouped Conv1d."""
    layer.weight = keep(layer.weight, index, dim=1)
    if isinstance(layer, nn.Linear):
        layer.in_features = len(index)
    else:
        layer.in_channels = len(index)


def prune_outputs(layer: nn.Linear | nn.Conv1d, index: Tensor) -> None:
    """Keep output features of a Linear, or output channels of an ungrouped Conv1d."""
    layer.weight = keep(layer.weight, index, dim=0)
    if layer.bias is not None:
        layer.bias = keep(layer.bias, index, dim=0)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(index)
    else:
        layer.out_channels = len(index)


def prune_norm(layer: nn.LayerNorm | nn.GroupNorm, index: Tensor) -> None:
    """Keep channels of a LayerNorm, or of a GroupNorm with one group per channel."""
    layer.weight = keep(layer.weight, index, dim=0)
    layer.bias = keep(layer.bias, index, dim=0)
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(index),)
    else:
        layer.num_groups = layer.num_channels = len(index)
