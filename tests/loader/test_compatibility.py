"""Which compiled CUDA code runs on which device and driver. Expectations are from NVIDIA's compatibility documents."""

import pytest

from a8multi.loader import compatibility

WHAT = "liba8multi_cuda.so"


def misfit(architectures: str, capability: tuple[int, int] | None, toolkit: int = 13000, driver: int = 13000) -> str:
    found = compatibility.misfit(
        WHAT, "cuda:0", toolkit=toolkit, driver=driver, architectures=architectures, capability=capability
    )
    assert found is None or found.startswith(WHAT)
    return found or ""


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        # Machine code: the same major, the same minor or higher.
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_75 sm_90", [(7, 5), (9, 0)], [(7, 0), (8, 0), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(1, 2), (11, 0), (13, 0)]),
        # PTX: that device and every later one.
        ("compute_80", [(8, 0), (8, 6), (9, 0), (12, 1)], [(7, 5)]),
        ("sm_75 compute_90", [(7, 5), (9, 0), (10, 3)], [(8, 0), (7, 0)]),
        # Suffixes: the very device, or its family.
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("compute_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_100f compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_architectures(architectures: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    for capability in runs:
        assert misfit(architectures, capability) == "", capability
    for major, minor in does_not:
        reason = misfit(architectures, (major, minor))
        for word in (architectures, f"{major}.{minor}", f"A8_CUDA_ARCHITECTURES={major}{minor}", "A8MULTI_BACKEND"):
            assert word in reason


@pytest.mark.parametrize(
    ("toolkit", "driver", "runs"),
    [
        (13000, 13000, True),
        (13010, 13000, True),  # minor version compatibility
        (12000, 13000, True),  # a newer driver runs what is older
        (13000, 12090, False),
        (12000, 11080, False),
        (0, 12000, True),  # not known
        (13000, 0, True),  # not known
    ],
)
def test_machine_code_needs_a_driver_of_the_toolkits_major_version(toolkit: int, driver: int, runs: bool) -> None:
    reason = misfit("sm_90 compute_90", (9, 0), toolkit, driver)
    assert (reason == "") is runs
    if not runs:
        versions = [f"{version // 1000}.{version % 1000 // 10}" for version in (toolkit, driver)]
        for word in (f"CUDA {versions[0]} toolkit", f"supports CUDA {versions[1]}", "newer NVIDIA driver"):
            assert word in reason


def test_ptx_needs_a_driver_that_knows_it() -> None:
    """A device newer than the machine code in the library, where the driver has to compile."""
    assert misfit("sm_90 compute_120", (12, 1), 13010, 13010) == ""
    assert misfit("sm_90 compute_120", (12, 1), 12080, 13010) == ""
    reason = misfit("sm_90 compute_120", (12, 1), 13010, 13000)
    for word in ("PTX of CUDA 13.1", "supports CUDA 13.0", "sm_121", "newer NVIDIA driver"):
        assert word in reason
    assert misfit("sm_120 compute_120", (12, 1), 13010, 13000) == "", "its machine code runs"


def test_the_driver_is_the_better_reason() -> None:
    assert "compute capability" not in misfit("sm_80", (9, 0), 13000, 12040)


@pytest.mark.parametrize(("architectures", "capability"), [("unknown", (9, 0)), ("", (9, 0)), ("sm_80", None)])
def test_what_is_not_known_is_not_refused(architectures: str, capability: tuple[int, int] | None) -> None:
    assert misfit(architectures, capability) == ""
