#!/usr/bin/env bash
# `make gpu`: everything that needs the chip, in under 10 minutes, with this machine's own Python and no network.
# Builds for this device, runs the GPU tests, memcheck on the self-test, and the benchmarks. Each step runs whether or
# not the one before it passed; the exit status is 0 only when all did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=()

step() { # name, seconds, command...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - began)) s"
}

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || { echo "gpu: no CUDA device in $python's torch"; exit 1; }
arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + {9: "a", 10: "f"}.get(a, ""))')
results=benchmarks/results/${device// /-}
stem=$results/$(date -u +%F)-$(git rev-parse --short HEAD 2>/dev/null || echo uncommitted)
mkdir -p "$results"

step build 120 env TORCH_CUDA_ARCH_LIST="$arch" FORCE_CUDA=1 "$python" setup.py build_ext --inplace
step info 20 "$python" -m spectral_ops info
workers=() # thousands of small cases, most of them waiting for Triton's compiler: several processes share the GPU
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist worksteal)
step tests 240 "$python" -m pytest tests/test_gpu.py -m gpu -q -p no:cacheprovider "${workers[@]}"
step memcheck 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all "$python" -m spectral_ops check

peers=() # PEFT's own layers are timed beside ours where this machine has PEFT
"$python" -c 'import peft' 2>/dev/null || peers=(--no-peers)
step bench 120 "$python" -m spectral_ops bench --device cuda --dtype bfloat16 --tokens 128 4096 8192 16384 \
  --shape 4096 4096 --json "$stem.json" "${peers[@]}"

echo "results: $stem.json"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
