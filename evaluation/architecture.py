"""The shape of a model, layer by layer, read from its config."""

from typing import Any

from wav2vec2.model import CONV_LAYERS


def conv_channels(config: dict[str, Any]) -> list[int]:
    """Output channels of each layer of the convolutional extractor."""
    return [channels for channels, *_ in config["extractor_conv_layer_config"] or CONV_LAYERS]


def num_heads(config: dict[str, Any], layer: int) -> int:
    """Attention heads of a layer (the first is 0); 0 if its attention is gone."""
    if not config["encoder_use_attention"][layer]:
        return 0
    if "encoder_remaining_heads" in config:
        return len(config["encoder_remaining_heads"][layer])
    return config["encoder_num_heads"][layer]


def ffn_size(config: dict[str, Any], layer: int) -> int:
    """Intermediate dimensions of a layer's feed-forward (the first is 0); 0 if its feed-forward is gone."""
    return config["encoder_ff_interm_features"][layer] if config["encoder_use_feed_forward"][layer] else 0


def print_architecture(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print the kept units of each layer, as ``after/before``."""
    print("\nconv layer   channels")
    for layer, (old, new) in enumerate(zip(conv_channels(before), conv_channels(after), strict=True)):
        print(f"{layer:10}   {new:>5}/{old}")
    print("\n     layer      heads          FFN")
    for layer in range(after["encoder_num_layers"]):
        heads = f"{num_heads(after, layer)}/{num_heads(before, layer)}"
        ffn = f"{ffn_size(after, layer)}/{ffn_size(before, layer)}"
        print(f"{layer + 1:10}   {heads:>8}   {ffn:>10}")
