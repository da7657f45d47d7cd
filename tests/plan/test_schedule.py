"""What follows from the step: the same bits in Python and in the compiled library, near what math.pow gives."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import a8multi
from a8multi.errors import BackendUnavailable, NativeError
from a8multi.loader import structs
from a8multi.loader.structs import ScheduleRule
from a8multi.plan.schedule import SCHEDULE, Live, Schedule, decay
from a8multi.plan.step_plan import HYPER

STEPS = (*range(1, 130), 255, 256, 257, 999, 1000, 1001, 4095, 10**5 + 1, 2**20, 2**24 + 1, 10**9 + 7, 2**31, 2**40 + 3)
BETAS = (0.0, 0.3, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 2**-30)
DECAYS = (0.0, -1e-9, -0.1, -0.5, -0.8, -math.pi / 4, -1.0)
RULES = {
    "adam": ScheduleRule.ADAM_BIAS,
    "nothing": ScheduleRule(0),
    "corrected": ScheduleRule.CORRECT_BIAS,
    "decays": ScheduleRule.BETA2_DECAYS,
    "decays, corrected": ScheduleRule.BETA2_DECAYS | ScheduleRule.CORRECT_BIAS,
    "decays, relative": ScheduleRule.BETA2_DECAYS | ScheduleRule.RELATIVE_STEP,
}
SCHEDULES = [
    Schedule(rules, beta1, beta2, power)
    for rules in RULES.values()
    for beta1, beta2, power in zip((BETAS * 3)[: 3 * len(DECAYS)], BETAS[::-1] * 3, DECAYS * 3, strict=False)
]


def _library() -> ctypes.CDLL:
    with a8multi.use_backend("cpu"):
        return a8multi.backend_for("cpu").library  # type: ignore[attr-defined, no-any-return]


def _derive(schedules: Sequence[Schedule], counters: np.ndarray, advance: int) -> np.ndarray:
    """The rows that the library writes, into rows of 7 and 0.5 everywhere."""
    records = np.array([schedule.record() for schedule in schedules], SCHEDULE)
    records["step"] = counters.ctypes.data + 8 * np.arange(len(counters), dtype=np.uint64)
    hypers = np.zeros(len(schedules), HYPER)
    hypers["step"], hypers["beta2"], hypers["one_minus_beta2"], hypers["bias1"], hypers["eps"] = 7, 0.5, 0.5, 0.5, 0.5
    _call(records, hypers, advance)
    return hypers


def _call(records: np.ndarray, hypers: np.ndarray, advance: int) -> None:
    tables = ((records, structs.Schedule), (hypers, structs.Hyper))
    pointers = [ctypes.cast(table.ctypes.data, ctypes.POINTER(kind)) for table, kind in tables]
    _library().call("a8_derive", ctypes.byref(structs.Exec()), *pointers, len(records), advance)


def test_the_library_derives_the_same_bits() -> None:
    for step in STEPS:
        counters = np.full(len(SCHEDULES), step - 1, np.int64)
        found = _derive(SCHEDULES, counters, 1)
        assert (counters == step).all()
        expected = np.zeros(len(SCHEDULES), HYPER)
        expected["beta2"] = expected["one_minus_beta2"] = expected["eps"] = 0.5
        for row, schedule in enumerate(SCHEDULES):
            for name, value in schedule.derived(step).items():
                expected[name][row] = value
        for name in HYPER.names or ():
            assert found[name].tobytes() == expected[name].tobytes(), f"{name} at step {step}"


def test_a_second_derivation_of_a_step_counts_nothing() -> None:
    counters = np.array([4], np.int64)
    schedules = [Schedule(RULES["adam"], 0.9, 0.999)]
    first = _derive(schedules, counters, 1)
    again = _derive(schedules, counters, 0)
    assert counters[0] == 5
    assert first.tobytes() == again.tobytes()
    assert first["step"][0] == 5


def test_a_row_without_a_counter_stays() -> None:
    records = np.array([Schedule(RULES["adam"], 0.9, 0.999).record()], SCHEDULE)
    hypers = np.frombuffer(bytes(range(HYPER.itemsize)), HYPER).copy()
    _call(records, hypers, 1)
    assert hypers.tobytes() == bytes(range(HYPER.itemsize))
    with pytest.raises(NativeError, match="advance"):
        _call(records, hypers, 2)


@pytest.mark.parametrize("exponent", DECAYS)
def test_decay_is_a_power(exponent: float) -> None:
    for step in STEPS:
        assert decay(step, exponent) == pytest.approx(math.pow(step, exponent), rel=1e-15, abs=0), step


def test_decay_of_odd_exponents() -> None:
    assert decay(1, -1e308) == 1.0
    assert decay(2, -1e308) == 0.0
    assert decay(2**62, -1.0) == 2.0**-62
    assert decay(3, -30.0) == pytest.approx(3.0**-30, rel=1e-13)


@pytest.mark.parametrize("beta", BETAS)
def test_bias_corrections_are_those_of_the_papers(beta: float) -> None:
    """In float32, as the kernels get them. 1 - beta^t loses what beta itself does not hold of 1."""
    loss = 4e-16 / (1 - beta)
    for step in STEPS:
        adam = Schedule(RULES["adam"], beta, beta).derived(step)
        assert adam["bias1"] == pytest.approx(1 / (1 - math.pow(beta, step)), rel=1e-15 + loss)
        assert adam["bias2"] == pytest.approx(1 / math.sqrt(1 - math.pow(beta, step)), rel=1e-15 + loss)
        corrected = Schedule(RULES["corrected"], beta, beta).derived(step)["bias1"]
        assert corrected == pytest.approx(1 / math.sqrt(1 - math.pow(beta, step)), rel=1e-15 + 2 * loss)
        decays = Schedule(RULES["decays, corrected"], beta, 0.0, -0.8).derived(step)
        assert decays["bias1"] == adam["bias1"]
        assert decays["beta2"] == 1.0 - decays["one_minus_beta2"] == 1.0 - decay(step, -0.8)
        assert Schedule(RULES["decays, relative"]).derived(step)["bias2"] == 1 / math.sqrt(step)


def test_steps_wrap_as_the_kernels_count_them() -> None:
    assert Schedule(RULES["adam"], 0.9, 0.999).derived(2**32 + 5)["step"] == 5


def test_what_lives_on_the_device_is_read_for_backends_that_need_it() -> None:
    schedule = Schedule(RULES["adam"], 0.9, 0.999)
    counters = [torch.tensor(4), None, torch.tensor(8)]
    live = Live(np.empty(0, SCHEDULE), [schedule] * 3, counters, [None, torch.tensor([0.25]), None])
    table = np.zeros(3, HYPER)
    table["lr"], table["step"], table["lr_device"][1] = 0.5, 7, 1234
    for _ in range(2):  # a second plan of the same step
        read = live.read(table)
        assert read["step"].tolist() == [5, 7, 9]
        assert read["lr"].tolist() == [0.5, 0.25, 0.5]
        assert not read["lr_device"].any()
        assert read["bias1"][2] == np.float32(schedule.derived(9)["bias1"])
        assert read["bias1"][1] == 0
    assert [int(counter) for counter in counters if counter is not None] == [5, 9]
    assert table["step"].tolist() == [7, 7, 7]


def test_a_captured_step_cannot_be_read() -> None:
    live = Live(np.empty(0, SCHEDULE), [], [], [], capturing=True)
    with pytest.raises(BackendUnavailable, match="CUDA graph"):
        live.read(np.zeros(0, HYPER))
