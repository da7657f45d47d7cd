"""Parameter shapes of models as their optimizer sees them: `a8multi bench` steps through them, `info` counts them.

Each is a function because the largest list has hundreds of rows. docs and README name the sets by these keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]

LEAST_LLAMA = 1e7
MOST_LLAMA = 1e13


def _llama(width: int, hidden: int, key_value: int, layers: int) -> list[Shape]:
    """Attention, a gated MLP and two norms in each layer; embedding and head are not tied."""
    vocabulary = 32000
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
    return [(vocabulary, width), *layer * layers, (width,), (vocabulary, width)]


def tinyllama_1_1b() -> list[Shape]:
    """TinyLlama 1.1B: 201 tensors, 1.10 G parameters; grouped-query attention and a gated MLP in each layer."""
    return _llama(2048, 5632, 256, 22)


def llama_like(parameters: float) -> list[Shape]:
    """A Llama scaled to about that many parameters: 7e9 gives 33 layers of width 4096, 6.94 G parameters.

    The width is a multiple of 128, the size of a head; the MLP's is 8/3 of it, rounded up to 256. Of the widths whose
    layers are width / 128, as in Llama 7B and 13B, the one with the nearest count is taken, and then the nearest number
    of layers.

    Raises:
        ValueError: not from LEAST_LLAMA to MOST_LLAMA.
    """
    if not LEAST_LLAMA <= parameters <= MOST_LLAMA:
        raise ValueError(f"{parameters:g} parameters are not from {LEAST_LLAMA:g} to {MOST_LLAMA:g}")

    def hidden(width: int) -> int:
        return -(-width * 8 // (3 * 256)) * 256

    def count(width: int, layers: int) -> int:
        whole, bare = (sum(map(math.prod, _llama(width, hidden(width), width, n))) for n in (1, 0))
        return bare + layers * (whole - bare)

    widths = range(128, 65536, 128)
    width = min(widths, key=lambda width: abs(count(width, width // 128) - parameters))
    layers = max(1, round((parameters - count(width, 0)) / (count(width, 1) - count(width, 0))))
    return _llama(width, hidden(width), width, layers)


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
