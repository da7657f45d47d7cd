"""The flattened sources through NVRTC with CuPy's options, for an old and a recent architecture."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from cuda_build.nvrtc import Compiled, Nvrtc
from kernel_sources import entry_files, kernels_of

import a8multi
from a8multi.loader import flatten

# The oldest that the library is built for, with the least shared memory, and one with everything.
ARCHITECTURES = ("sm_75", "sm_90")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def cupy_options() -> tuple[str, ...]:
    """The options of backend/cupy.py, read from its text: importing it needs torch."""
    path = Path(a8multi.__file__).parent / "backend" / "cupy.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_OPTIONS":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no _OPTIONS")


def compiled(nvrtc: Nvrtc, text: str, architecture: str, *more: str) -> Compiled:
    return nvrtc.compile(text, "flat.cu", (*cupy_options(), f"-arch={architecture}", "--ptxas-options=-v", *more))


def spilled_bytes(log: str) -> list[int]:
    """Bytes stored and loaded to spill registers, summed, of every function that ptxas reports on."""
    return [int(stores) + int(loads) for stores, loads in SPILLS.findall(log)]


def test_there_are_entry_files() -> None:
    assert {"cuda/kernels/adam.cuh", "cuda/kernels/codec.cuh"} <= set(entry_files())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("entry", entry_files())
def test_the_flattened_sources_compile_without_warnings_and_spills(entry: str, architecture: str, nvrtc: Nvrtc) -> None:
    text = flatten(entry)
    result = compiled(nvrtc, text, architecture)
    assert result.status == 0, result.log
    assert [line for line in result.log.splitlines() if "warning" in line.lower()] == []
    assert set(re.findall(r"\.entry (\w+)", result.ptx)) == kernels_of(text)
    assert result.cubin.startswith(b"\x7fELF")
    spilled = spilled_bytes(result.log)
    assert len(spilled) >= len(kernels_of(text)), "ptxas reported on every kernel"
    assert not any(spilled), [line for line in result.log.splitlines() if "spill" in line]


def test_messages_name_the_original_file_and_line(nvrtc: Nvrtc) -> None:
    """What CuPy's user sees when a toolkit rejects a kernel."""
    entry = "cuda/kernels/codec.cuh"
    result = compiled(nvrtc, flatten(entry).replace("a8_share_levels(levels);", "a8_nowhere(levels);", 1), "sm_90")
    assert result.status != 0
    assert re.search(rf"{entry}\(\d+\): error: .*a8_nowhere", result.log), result.log


def test_spills_are_seen(nvrtc: Nvrtc) -> None:
    """The check above can fail: 64 live values do not fit into the 32 registers that 2048 threads leave each other."""
    text = """
        extern "C" __global__ void __launch_bounds__(1024, 2) a8_greedy(float* values) {
          float kept[64];
          #pragma unroll
          for (int i = 0; i < 64; ++i) kept[i] = values[i * 32 + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 64; ++i) values[i * 32 + threadIdx.x] = kept[i] * kept[63 - i];
        }
    """
    result = compiled(nvrtc, text, "sm_90")
    assert result.status == 0, result.log
    assert any(spilled_bytes(result.log)), result.log
