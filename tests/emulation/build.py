"""native/cuda compiled for the host: translated sources, the headers in device/, the C++ compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

from emulation.translate import translate

NATIVE = Path(__file__).parents[2] / "native"
DEVICE = Path(__file__).parent / "device"

# Same arithmetic as CMakeLists.txt asks of nvcc, but for flush-to-zero, which fibers.h sets. The sanitizer's two checks
# end in fibers.h, so its library is not linked. setjmp between fibers is what _FORTIFY_SOURCE would take for an attack.
FLAGS = (
    *("-std=c++17", "-Og", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fsanitize=alignment,bounds", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
)


def build(compiler: str, source: Path, output: Path, architecture: int) -> Path:
    """Compiles one source for the host, as ``output``; what it includes from its own folder is translated too.

    Args:
        compiler: a C++ compiler with the flags of gcc.
        source: of CUDA C++, such as native/cuda/abi.cu.
        output: the shared library; its folder takes the translated sources.
        architecture: which code of the sources to take, as __CUDA_ARCH__ has it: 750 or 900.
    """
    root = output.parent / "translated"
    for path in sorted(source.parent.rglob("*.cu*")):
        target = root / path.relative_to(source.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(translate(path.read_text(encoding="utf-8")), encoding="utf-8")
    unit = output.with_suffix(".o")
    few = 0 if architecture >= 900 else 2048  # one with runs of chunks, one without: the cases would all be few
    _run(
        *(compiler, *FLAGS, f"-DEMULATED_ARCHITECTURE={architecture}", f"-DA8_FEW_CHUNKS={few}"),
        '-DA8_VERSION="emulated"',
        *(f'-DA8_ARCHITECTURES="emulated sm_{architecture // 10}"', f"-I{DEVICE}", f"-I{NATIVE / 'include'}"),
        *("-include", "cuda_language.h", "-x", "c++", "-c", str(root / source.name), "-o", str(unit)),
    )
    _run(compiler, "-shared", "-o", str(output), str(unit))
    return output


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
