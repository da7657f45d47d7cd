"""The structs and enums of native/include/a8/abi.h, for ctypes. tests/loader compares them with the header.

Layouts are natural (no ``_pack_``), and every pointer is a plain ``c_void_p``: a table of tensors may hold device
addresses, and ``numpy.dtype(Tensor)`` gives a record type of the same layout.
"""

from __future__ import annotations

from ctypes import (
    Structure,
    c_char,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_void_p,
)
from enum import IntEnum, IntFlag

ABI_VERSION = 3


class Status(IntEnum):
    """``a8_status``: what an entry returns."""

    OK = 0
    ERROR_ARGUMENT = 1
    ERROR_UNSUPPORTED = 2
    ERROR_MEMORY = 3
    ERROR_DEVICE = 4
    ERROR_INTERNAL = 5


class Dtype(IntEnum):
    """``a8_dtype``: types of parameters and gradients."""

    F32 = 0
    BF16 = 1
    F16 = 2


class Format(IntEnum):
    """``a8_format``: how a moment is stored."""

    NONE = 0
    STATE_F32 = 1
    STATE_BF16 = 2
    INT8 = 3
    NF4 = 4
    LOG8 = 5
    FACTORED = 6


class Isa(IntEnum):
    """``a8_isa``: instruction-set variants of the CPU library, worst first. ``a8_info`` holds sets of ``1 << isa``."""

    AUTO = 0
    BASELINE = 1
    AVX2 = 2
    AVX512 = 3
    NEON = 4


class Op(IntFlag):
    """``a8_op``: what a library can do."""

    CODEC = 1
    ELEMENTWISE = 2
    ADAFACTOR = 4
    READER = 8
    UPLOAD = 16


class RuleKind(IntEnum):
    """``a8_rule_kind``: what an element-wise step does."""

    ADAM = 0
    LION = 1
    RMSPROP = 2
    SGD = 3
    ADAGRAD = 4
    ADEMAMIX = 5
    LAMB = 6
    LARS = 7


class Flag(IntFlag):
    """``a8_flag``: bits of ``Hyper.flags``."""

    MAXIMIZE = 1
    L2_DECAY = 2
    STOCHASTIC_STATE = 4
    STOCHASTIC_WRITE = 8
    SCALE_PARAMETER = 16
    SCALE_DECAY = 32
    NESTEROV = 64
    AVERAGE_UPDATE = 128


class TensorFlag(IntFlag):
    """``a8_tensor_flag``: bits of ``Tensor.flags``."""

    SQUARES_KNOWN = 1


class BatchHint(IntFlag):
    """``a8_batch_hint``: bits of ``Batch.hints``."""

    OTHER_FORMATS = 1


class ScheduleRule(IntFlag):
    """``a8_schedule_rule``: bits of ``Schedule.rules``."""

    ADAM_BIAS = 1
    BETA2_DECAYS = 2
    CORRECT_BIAS = 4
    RELATIVE_STEP = 8
    UNBIASED = 16
    LR_DECAYS = 32
    FIRST_WHOLE = 64
    MIX_WARMS_UP = 128
    BETA3_WARMS_UP = 256


class Phase(IntFlag):
    """``a8_phase``: phases of a step, in order."""

    REDUCE = 1
    MOMENTS = 2
    NORM = 4
    RESIDUAL = 8
    CONFIDENCE = 16
    LIMIT = 32
    APPLY = 64
    ALL_PHASES = 127


class Info(Structure):
    """``a8_info``: what a library is."""

    _fields_ = [
        ("abi_version", c_uint32),
        ("ops", c_uint32),
        ("sizeof_info", c_uint32),
        ("sizeof_exec", c_uint32),
        ("sizeof_hyper", c_uint32),
        ("sizeof_tensor", c_uint32),
        ("sizeof_chunk", c_uint32),
        ("sizeof_batch", c_uint32),
        ("sizeof_codec", c_uint32),
        ("sizeof_schedule", c_uint32),
        ("sizeof_interpreter", c_uint32),
        ("chunk", c_uint32),
        ("tile_rows", c_uint32),
        ("tile_cols", c_uint32),
        ("isa_built", c_uint32),
        ("isa_usable", c_uint32),
        ("isa_best", c_uint32),
        ("toolkit", c_uint32),
        ("backend", c_char * 16),
        ("version", c_char * 32),
        ("architectures", c_char * 128),
    ]


class Exec(Structure):
    """``a8_exec``: where and how to run."""

    _fields_ = [
        ("device", c_int32),
        ("threads", c_uint32),
        ("isa", c_uint32),
        ("isa_ran", c_uint32),
        ("stream", c_void_p),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
    ]


class Hyper(Structure):
    """``a8_hyper``: hyper-parameters of the tensors that share them."""

    _fields_ = [
        ("lr", c_float),
        ("beta1", c_float),
        ("beta2", c_float),
        ("beta3", c_float),
        ("one_minus_beta1", c_float),
        ("one_minus_beta2", c_float),
        ("one_minus_beta3", c_float),
        ("eps", c_float),
        ("eps2", c_float),
        ("eps3", c_float),
        ("weight_decay", c_float),
        ("bias1", c_float),
        ("bias2", c_float),
        ("clip", c_float),
        ("growth", c_float),
        ("mix", c_float),
        ("trust", c_float),
        ("flags", c_uint32),
        ("seed_low", c_uint32),
        ("seed_high", c_uint32),
        ("step", c_uint32),
        ("reserved", c_uint32),
        ("lr_device", c_void_p),
    ]


class Tensor(Structure):
    """``a8_tensor``: one parameter with its gradient and state."""

    _fields_ = [
        ("param", c_void_p),
        ("grad", c_void_p),
        ("first", c_void_p),
        ("first_block", c_void_p),
        ("second", c_void_p),
        ("second_block", c_void_p),
        ("third", c_void_p),
        ("third_block", c_void_p),
        ("limiter", c_void_p),
        ("numel", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("chunk_at", c_int64),
        ("tile_at", c_int64),
        ("row_at", c_int64),
        ("col_at", c_int64),
        ("residual_at", c_int64),
        ("sum_at", c_int64),
        ("chunks", c_uint32),
        ("tiles", c_uint32),
        ("hyper", c_uint32),
        ("noise_id", c_uint32),
        ("first_block_size", c_uint32),
        ("second_block_size", c_uint32),
        ("third_block_size", c_uint32),
        ("flags", c_uint32),
        ("param_dtype", c_uint8),
        ("grad_dtype", c_uint8),
        ("first_format", c_uint8),
        ("second_format", c_uint8),
        ("third_format", c_uint8),
        ("reserved", c_uint8),
        ("reserved2", c_uint16),
    ]


class Chunk(Structure):
    """``a8_chunk``: one unit of work."""

    _fields_ = [
        ("tensor", c_uint32),
        ("part", c_uint32),
    ]


class Batch(Structure):
    """``a8_batch``: all tensors of a step on one device."""

    _fields_ = [
        ("tensors", c_void_p),
        ("chunks", c_void_p),
        ("tiles", c_void_p),
        ("hypers", c_void_p),
        ("skip", c_void_p),
        ("tensor_count", c_uint32),
        ("chunk_count", c_uint32),
        ("tile_count", c_uint32),
        ("hyper_count", c_uint32),
        ("factored_chunks", c_uint32),
        ("rule", c_uint32),
        ("hints", c_uint32),
        ("reserved", c_uint32),
    ]


class Codec(Structure):
    """``a8_codec``: one array to quantise or dequantise."""

    _fields_ = [
        ("values", c_void_p),
        ("codes", c_void_p),
        ("blocks", c_void_p),
        ("numel", c_int64),
        ("block_size", c_uint32),
        ("stochastic", c_uint32),
        ("seed_low", c_uint32),
        ("seed_high", c_uint32),
        ("dtype", c_uint8),
        ("format", c_uint8),
        ("reserved", c_uint16),
        ("reserved2", c_uint32),
    ]


class Schedule(Structure):
    """``a8_schedule``: how one row of hypers follows from its step."""

    _fields_ = [
        ("step", c_void_p),
        ("skip", c_void_p),
        ("beta1", c_double),
        ("beta2", c_double),
        ("beta3", c_double),
        ("beta2_decay", c_double),
        ("mix", c_double),
        ("mix_steps", c_double),
        ("beta3_steps", c_double),
        ("first_half", c_double),
        ("last_half", c_double),
        ("decay", c_double),
        ("rules", c_uint32),
        ("reserved", c_uint32),
    ]


class Interpreter(Structure):
    """``a8_interpreter``: what the reader needs of Python and torch."""

    _fields_ = [
        ("list_item", c_void_p),
        ("put_item", c_void_p),
        ("attribute", c_void_p),
        ("next_entry", c_void_p),
        ("look", c_void_p),
        ("none", c_void_p),
        ("grad", c_void_p),
    ]


# In the order of the sizeof_* fields of Info: the C name of each struct is "a8_" + key.
STRUCTS: dict[str, type[Structure]] = {
    "info": Info,
    "exec": Exec,
    "hyper": Hyper,
    "tensor": Tensor,
    "chunk": Chunk,
    "batch": Batch,
    "codec": Codec,
    "schedule": Schedule,
    "interpreter": Interpreter,
}

# The C name of each enum is "a8_" + key.
ENUMS: dict[str, type[IntEnum] | type[IntFlag]] = {
    "status": Status,
    "dtype": Dtype,
    "format": Format,
    "isa": Isa,
    "op": Op,
    "rule_kind": RuleKind,
    "flag": Flag,
    "tensor_flag": TensorFlag,
    "schedule_rule": ScheduleRule,
    "phase": Phase,
    "batch_hint": BatchHint,
}


def isa_names(mask: int) -> tuple[str, ...]:
    """Lower-case names of the variants in a set of ``1 << isa`` (``Info.isa_built``); unknown bits are left out."""
    return tuple(isa.name.lower() for isa in Isa if isa is not Isa.AUTO and mask >> isa & 1)
