#!/usr/bin/env bash
# Builds for this machine's GPU, checks everything that needs one and times it beside the peers that are installed.
# From anywhere: bash bench/gpu.sh [STAGE...], of: exact bits tests sanitize steps bench; all of them by default.
# Needs nvcc (found as CMake finds it), cmake, a C++ compiler, and a Python with torch for CUDA, numpy and pytest; no
# network. pytest-xdist, cupy, compute-sanitizer and the peers are used where they are there.
# A8_BUILD: where to build (default build/gpu). OUT: where results go (default the same). PYTHON: the interpreter with torch.
# A8_ARCHITECTURE: default the first GPU's. A8_WORKERS: of pytest, default 8. A8_COMMIT: to be recorded, default git's.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
all="exact bits tests sanitize steps bench"
stages=${*:-$all}
for stage in $stages; do
  [[ " $all " == *" $stage "* ]] || { echo "no stage $stage, only: $all" >&2; exit 2; }
done
python=${PYTHON:-python3}
mkdir -p "${A8_BUILD:=build/gpu}" "${OUT:=$A8_BUILD}"
build=$(cd "$A8_BUILD" && pwd) out=$(cd "$OUT" && pwd)
site=$build/site
architecture=${A8_ARCHITECTURE:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
export A8_COMMIT=${A8_COMMIT:-$(git describe --always --dirty --exclude '*' 2>/dev/null || true)}
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
unset "${!A8MULTI_@}" # what is tested is what was built
cd "$build"           # not in the checkout, whose a8multi/ has no libraries
echo "commit ${A8_COMMIT:-unknown}, sm_$architecture, into $out"

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

failed=0
try() { "$@" || failed=1; } # of a stage whose rest is worth running all the same

build() { # a wheel's contents in a folder, without pip: it would want scikit-build-core
  local version where
  version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
  rm -rf "$site"
  mkdir -p "$site/a8multi/loader" "$site/a8multi-$version.dist-info"
  cp -R "$root/a8multi/." "$site/a8multi"
  cp -R "$root/loader/." "$site/a8multi/loader"
  printf 'Metadata-Version: 2.1\nName: a8multi\nVersion: %s\n' "$version" >"$site/a8multi-$version.dist-info/METADATA"
  where=$("$python" -c "import a8multi; print(a8multi.__file__)")
  if [[ $where != "$site"/* ]]; then # an editable install goes before PYTHONPATH
    echo "$python would test $where instead of what is built here: uninstall a8multi there" >&2
    exit 1
  fi
  cmake -S "$root" -B cmake -D A8_CUDA=ON -D A8_CUDA_ARCHITECTURES="$architecture"
  cmake --build cmake --parallel
  cmake --install cmake --prefix "$site" >/dev/null
}

exact() { # the unguarded square roots and divisions, beside the compiler's
  "$nvcc" -O3 -std=c++17 -fmad=false -ftz=true -prec-div=true -prec-sqrt=true -arch="sm_$architecture" \
    -I"$root/native/include" -I"$root/native/cuda/kernels" "$root/bench/gpu_exact.cu" -o gpu_exact
  ./gpu_exact
}

bits() { # the libraries beneath the optimizers, hundreds of odd tensors at once
  local lib=$site/a8multi/lib
  "$python" "$root/bench/gpu_check.py" --cpu "$lib/liba8multi_cpu.so" --cuda "$lib/liba8multi_cuda.so" --steps 100
}

tests() { # every optimizer through the package, both backends
  local backends=cuda workers=()
  if has cupy; then backends=cuda,cupy; fi
  if has xdist; then workers=(-p xdist -p xdist.looponfail -n "${A8_WORKERS:-8}"); fi
  # Every warning is an error, so no plugin but xdist may give one, nor this machine's settings of pytest.
  A8MULTI_REQUIRE_BACKEND=$backends PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -c "$root/pyproject.toml" \
    -W ignore::pytest.PytestConfigWarning -p no:cacheprovider -q --tb=short -m gpu "${workers[@]}" \
    "$root/tests/quant" "$root/tests/optim" "$root/tests/backend" "$root/tests/bench" 2>&1 |
    tee "$out/tests.log" | tail -n 40
}

sanitize() {
  local tool pid tools=(memcheck racecheck initcheck) pids=()
  export A8MULTI_BACKEND=cuda
  for tool in "${tools[@]}"; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "$root/bench/gpu_short.py" >"$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do try wait "$pid"; done
  tail -n 20 "${tools[@]/%/.log}"
}

steps() { # what a step costs: kernels, host, first step, memory
  local cupy=(--only "torch AdamW fused" "a8multi AdamW8bit" "a8multi Lion8bit" "a8multi Adafactor8bit*" "a8multi CAME8bit"
    --sets tinyllama-1.1b/bf16)
  A8MULTI_BACKEND=cuda try "$python" "$root/bench/gpu_steps.py" --json "$out/steps.json"
  has cupy || { echo "no cupy here"; return; }
  # Twice: CuPy compiles in the first process, and finds it on disk in the second.
  rm -rf cupy-cache
  export A8MULTI_BACKEND=cupy CUPY_CACHE_DIR=$build/cupy-cache
  try "$python" "$root/bench/gpu_steps.py" "${cupy[@]}" --json cupy-compiling.json
  try "$python" "$root/bench/gpu_steps.py" "${cupy[@]}" --compiling cupy-compiling.json --json "$out/steps-cupy.json"
}

bench() { # a whole step through the package, beside the peers
  local set
  for set in tinyllama-1.1b/bf16 tinyllama-1.1b/fp32 lora-r16-7b/bf16 vit-s/fp32; do
    # Few steps: most of the time goes into what the peers compile.
    A8MULTI_BACKEND=cuda try "$python" -m a8multi bench --device cuda --set "${set%/*}" --dtype "${set#*/}" --steps 5 \
      --json "$out/bench-${set/\//-}.json"
  done
}

summary="" status=0
report() { # STAGE SECONDS RESULT
  summary+=$(printf '%-9s %4d s  %s' "$@")$'\n'
  echo "--- $1: $3 after $2 s"
}
run() { # STAGE, in a shell of its own that ends at the first error
  local began=$SECONDS result=ok
  echo "--- $1"
  set +e
  (
    set -e
    "$1"
    exit "$failed"
  )
  # shellcheck disable=SC2181
  [ $? -eq 0 ] || result=FAILED status=1
  set -e
  report "$1" $((SECONDS - began)) "$result"
}

run build
if [ "$status" -eq 0 ]; then
  nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[^=]*=//p' cmake/CMakeCache.txt)
  PATH=$PATH:$(dirname "$nvcc"):/usr/local/cuda/bin # where compute-sanitizer lies
  for stage in $stages; do
    if [[ $stage == sanitize && $# -eq 0 ]] && ! command -v compute-sanitizer >/dev/null; then
      report sanitize 0 "skipped (no compute-sanitizer)"
    else
      run "$stage"
    fi
  done
fi
printf '%s' "$summary"
exit "$status"
