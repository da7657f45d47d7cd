#!/usr/bin/env bash
# Builds both libraries for this machine's GPU and the exactness check, runs all checks and times a step against torch.
# From anywhere: bash bench/gpu.sh [arguments of gpu_check.py]. Needs nvcc, cmake, and torch with CUDA.
# A8_BUILD: where to build (default build/gpu). PYTHON: the interpreter that holds torch.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${A8_BUILD:-build/gpu}
architecture=${A8_ARCHITECTURE:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
arithmetic=(-fmad=false -ftz=true -prec-div=true -prec-sqrt=true)
mkdir -p "$build"

cmake -S . -B "$build" -DA8_CUDA=ON -DA8_CUDA_ARCHITECTURES="$architecture" >"$build/configure.log" ||
  { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --parallel
nvcc -O3 -std=c++17 "${arithmetic[@]}" -arch="sm_$architecture" -Inative/include -Inative/cuda/kernels \
  bench/gpu_exact.cu -o "$build/gpu_exact"

"$build/gpu_exact"
"${PYTHON:-python3}" bench/gpu_check.py --cpu "$build/liba8multi_cpu.so" --cuda "$build/liba8multi_cuda.so" "$@"
