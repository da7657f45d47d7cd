"""Optimizer state of other packages, brought into ours."""

from .convert import convert_state_dict

__all__ = ["convert_state_dict"]
