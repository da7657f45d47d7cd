"""Parameter shapes that `a8multi bench` steps through: models as their optimizer sees them.

Each is a function because the largest list has hundreds of rows. docs and README name the sets by these keys.
"""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]


def tinyllama_1_1b() -> list[Shape]:
    """TinyLlama 1.1B: 201 tensors, 1.10 G parameters; grouped-query attention and a gated MLP in each layer."""
    width, hidden, key_value, vocabulary = 2048, 5632, 256, 32000
    layer: list[Shape] = [
        (width, width),
        (key_value, width),
        (key_value, width),
        (width, width),
        (hidden, width),
        (hidden, width),
        (width, hidden),
        (width,),
        (width,),
    ]
    return [(vocabulary, width), *layer * 22, (width,), (vocabulary, width)]


def lora_r16_7b() -> list[Shape]:
    """LoRA of rank 16 on every linear layer of a 7B model: 448 small tensors, 29.4 M parameters."""
    pair: list[Shape] = [(16, 4096), (4096, 16)]
    return pair * 7 * 32


def vit_s() -> list[Shape]:
    """ViT-S/16: 149 tensors, many of them vectors."""
    width = 384
    layer: list[Shape] = [
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        *[(width,)] * 5,
    ]
    return [(width, 3, 16, 16), (1, 197, width), (1, 1, width), *layer * 12, (1000, width), (1000,)]


def gpt2_52m() -> list[Shape]:
    """A GPT-2 of six layers: 73 tensors, 52.2 M parameters, small enough for two CPU cores."""
    width = 768
    layer: list[Shape] = [
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        *[(width,)] * 5,
    ]
    return [(12564, width), *layer * 6]


def lora_r8() -> list[Shape]:
    """LoRA of rank 8: 128 small tensors, 2.1 M parameters."""
    pair: list[Shape] = [(8, 2048), (2048, 8)]
    return pair * 4 * 16


PARAMETER_SETS: dict[str, Callable[[], list[Shape]]] = {
    "tinyllama-1.1b": tinyllama_1_1b,
    "lora-r16-7b": lora_r16_7b,
    "vit-s": vit_s,
    "gpt2-52m": gpt2_52m,
    "lora-r8": lora_r8,
}
