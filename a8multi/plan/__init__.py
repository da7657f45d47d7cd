"""Which tensors go to which kernel: the layout of state, the tensor table, the chunk map."""

from .item import Item, Moments, MomentSpec, is_plain, matrix_shape, plain
from .schedule import Live, Schedule
from .step_plan import StepPlan

__all__ = ["Item", "Live", "MomentSpec", "Moments", "Schedule", "StepPlan", "is_plain", "matrix_shape", "plain"]
