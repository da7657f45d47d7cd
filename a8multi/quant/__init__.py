"""Storage formats of optimizer state."""

from .formats import FORMATS, StateFormat, block_count, state_format

__all__ = ["FORMATS", "StateFormat", "block_count", "state_format"]
