"""The optimizers."""

from .adafactor import Adafactor8bit
from .adamw import Adam8bit, AdamW8bit

Adafactor8Bit = Adafactor8bit  # the name that the package adafactor8bit gives it

__all__ = ["Adafactor8Bit", "Adafactor8bit", "Adam8bit", "AdamW8bit"]
