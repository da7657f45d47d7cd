#!/usr/bin/env bash
# Builds for this machine's GPU, checks everything that needs one and times it beside the peers that are installed.
# From anywhere: bash bench/gpu.sh [STAGE...], of: exact bits tests sanitize steps bench; all of them by default.
# Needs nvcc, cmake, ninja, scikit-build-core, and torch with CUDA; cupy and compute-sanitizer where they are to be tried too.
# A8_BUILD: where to build (default build/gpu). OUT: where results go (default the same). PYTHON: the interpreter with torch.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
mkdir -p "${A8_BUILD:-build/gpu}" "${OUT:=${A8_BUILD:-build/gpu}}"
build=$(cd "${A8_BUILD:-build/gpu}" && pwd) out=$(cd "$OUT" && pwd)
architecture=${A8_ARCHITECTURE:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
stages=${*:-exact bits tests sanitize steps bench}

# The wheel's contents in a folder, so that what is tested is what a user gets.
rm -rf "$build/site"
SKBUILD_CMAKE_DEFINE="A8_CUDA=ON;A8_CUDA_ARCHITECTURES=$architecture" "$python" -m pip install --quiet --no-deps \
  --no-build-isolation --target "$build/site" .
export PYTHONPATH=$build/site${PYTHONPATH:+:$PYTHONPATH}
libraries=(--cpu "$build/site/a8multi/lib/liba8multi_cpu.so" --cuda "$build/site/a8multi/lib/liba8multi_cuda.so")
cd "$build" # not in the checkout, whose a8multi/ has no libraries

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

for stage in $stages; do
  echo "--- $stage"
  case $stage in
    exact) # the unguarded square roots and divisions, beside the compiler's
      nvcc -O3 -std=c++17 -fmad=false -ftz=true -prec-div=true -prec-sqrt=true -arch="sm_$architecture" \
        -I"$root/native/include" -I"$root/native/cuda/kernels" "$root/bench/gpu_exact.cu" -o gpu_exact
      ./gpu_exact
      ;;
    bits) # the libraries beneath the optimizers, hundreds of odd tensors at once
      "$python" "$root/bench/gpu_check.py" "${libraries[@]}" --steps 100
      ;;
    tests) # every optimizer through the package, both backends
      backends=cuda
      has cupy && backends=cuda,cupy
      workers=()
      has xdist && workers=(-n "${A8_WORKERS:-8}" -p no:benchmark)
      A8MULTI_REQUIRE_BACKEND=$backends "$python" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider -q -m gpu \
        "${workers[@]}" "$root/tests/quant" "$root/tests/optim" "$root/tests/backend" "$root/tests/bench" | tail -n 30
      ;;
    sanitize)
      command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; continue; }
      for tool in memcheck racecheck initcheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "$root/bench/gpu_short.py"
      done
      ;;
    steps) # what a step costs: kernels, host, first step, memory
      "$python" "$root/bench/gpu_steps.py" --json "$out/steps.json"
      ;;
    bench) # a whole step through the package, beside the peers
      for set in tinyllama-1.1b/bf16 tinyllama-1.1b/fp32 lora-r16-7b/bf16 vit-s/fp32; do
        "$python" -m a8multi bench --set "${set%/*}" --dtype "${set#*/}" --json "$out/bench-${set/\//-}.json"
      done
      ;;
    *)
      echo "no stage $stage" >&2
      exit 2
      ;;
  esac
done
