"""The emulator itself: kernels that are wrong fail with a message that names them, right ones give what they should."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation.build import build
from emulation.translate import translate

Launch = Callable[..., tuple[str, torch.Tensor]]


@pytest.fixture(scope="session")
def launch(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """launch(kernel, order=0) runs one of faults.cu's kernels on 0, 1, 2, ...: its message, and what it left there."""
    source = Path(__file__).parent / "faults.cu"
    library = ctypes.CDLL(str(build(compiler, source, tmp_path_factory.mktemp("faults") / "faults.so", 900)))
    library.launch.restype = ctypes.c_char_p

    def run(kernel: str, order: int = 0) -> tuple[str, torch.Tensor]:
        numbers = torch.arange(1024, dtype=torch.float32)
        library.emulate(order, 1)
        message = library.launch(kernel.encode(), ctypes.c_void_p(numbers.data_ptr()))
        return (message or b"").decode(), numbers

    return run


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("some_threads_miss_the_barrier", "deadlock: of 256 threads 100 wait at __syncthreads, 156 have ended"),
        ("half_a_warp_shuffles", "128 in their warps (16 of warp 7 at __shfl_sync), 128 have ended"),
        ("a_warp_disagrees", "comes to __syncwarp while its warp waits at __any_sync"),
        ("a_mask_of_half_a_warp", "__syncwarp of the threads 0x0000ffff: only whole warps are emulated"),
        ("misaligned", "which is not aligned to 16 bytes"),
        ("beyond_an_array", "thread 32 takes element 32, which the array does not have"),
        ("not_shared", "takes an address that is not in shared memory"),
    ],
)
def test_a_fault_is_told(launch: Launch, kernel: str, message: str) -> None:
    found, _ = launch(kernel)
    assert found.startswith(f"{kernel}, block 0: ")
    assert message in found
    assert launch("reverses")[0] == "", "a failed launch leaves nothing behind"


@pytest.mark.parametrize("kernel", ["last_writer_wins", "shared_memory_is_not_cleared", "a_copy_without_a_wait"])
def test_orders_differ_where_nothing_is_promised(launch: Launch, kernel: str) -> None:
    results = [launch(kernel, order) for order in (0, 7)]
    assert [message for message, _ in results] == ["", ""]
    assert results[0][1][:2].tolist() != results[1][1][:2].tolist()


@pytest.mark.parametrize("order", [0, 1, 6])
def test_a_right_kernel(launch: Launch, order: int) -> None:
    message, out = launch("reverses", order)
    assert message == ""
    assert out[:256].tolist() == list(range(255, -1, -1))
    assert out[256:258].tolist() == [sum(range(224, 256)), 1.0]


def test_translation() -> None:
    launch = "k<A, 1><<<n + 1,\n T, 0, s>>>(x);  // asm(\n"
    assert translate(launch) == 'emulator::configure("k<A, 1>", k<A, 1>, n + 1,\n T, 0, s)(x);  \n'
    assembly = 'asm volatile("a.b.u32 %0, [%1 + %2], "\n"16;" : "=r"(y) : "l"(f(p)), "n"(4) : "memory");'
    assert translate(assembly) == "ptx::a_b_u32((y), (f(p)) + (4), 16)\n;"
    assert translate('asm("" : "+l"(*p));') == "((void)0);"
    with pytest.raises(ValueError, match="one instruction"):
        translate('asm("add.f32 %0, %1, %1; neg.f32 %0, %0;" : "=f"(x) : "f"(y));')
