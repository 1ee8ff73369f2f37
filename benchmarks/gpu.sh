#!/usr/bin/env bash
# `make gpu`: everything that needs the chip, in under 10 minutes, with this machine's own Python and no network.
# SECTIONS chooses among: build info test memcheck racecheck tune bench training report. Each runs whether or not the one
# before it passed, a table of how each ended closes the run, and the exit status is 0 only when all passed. `report`
# turns the file that `bench` wrote at this commit today into pictures beside it and the tables in README and docs. LIMIT seconds
# (590) bound the whole run: a section gets what is left of them, and is cut off there.
# `make gpu-dry` (DRY=1) runs the same script without a chip: one CUDA file is compiled, the GPU tests are collected, one
# Triton operator is interpreted and compiled ahead of time, and what takes a device takes the CPU, at small sizes, its
# results thrown away. No sanitizer runs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sections=" ${SECTIONS:-build info test memcheck racecheck tune bench training report} "
dry=${DRY:-}
LIMIT=${LIMIT:-590}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=0 summary=() logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

for name in $sections; do
  [[ " build info test memcheck racecheck tune bench training report " == *" $name "* ]] || { echo "gpu: no section $name" >&2; exit 2; }
done

step() { # section, seconds, command...
  local name=$1 limit=$2 began=$SECONDS verdict=ok
  shift 2
  [[ $sections == *" $name "* ]] || return 0
  local left=$((LIMIT - SECONDS))
  [[ $name == report ]] || left=$((left - 30)) # which the report has to itself
  if ((left < 5)); then
    failed=1
    summary+=("$(printf '%-10s %5d s  %-12s' "$name" 0 "NO TIME LEFT")")
    return 0
  fi
  ((limit <= left)) || limit=$left
  echo "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/$name" || { verdict="FAILED ($?)"; failed=1; }
  summary+=("$(printf '%-10s %5d s  %-12s %s' "$name" $((SECONDS - began)) "$verdict" "$(grep -v '^ *$' "$logs/$name" | tail -1 | cut -c1-100)")")
}

show() { # python, results file, directory of the pictures, pages
  if "$1" -c 'import matplotlib' 2>/dev/null; then
    "$1" -m spectral_ops bench --draw "$2" --png "$3"
  else
    echo "gpu: no matplotlib, so no pictures"
  fi
  "$1" -m benchmarks.publish results "$2" "${@:4}"
}
export -f show

report() { # results file, directory of the pictures, pages
  step report 90 bash -ec 'show "$@"' show "$python" "$@"
}

if [ -n "$dry" ]; then
  tool() { command -v "$1" || { echo "$1 is not on PATH"; return 1; }; }
  export -f tool
  small=(--device cpu --dtype float32 bfloat16 --tokens 16 --shape 64 48 --repeats 2)
  step build 120 bash -c 'tool nvcc && nvcc -std=c++17 -arch=sm_90a -c csrc/cuda/blocksum.cu -o "$0"' "$logs/blocksum.o"
  step info 60 "$python" -m spectral_ops info
  step test 300 bash -c '"$0" -m pytest tests/kernels/test_gpu.py -m gpu -q --collect-only -p no:cacheprovider &&
    "$0" -m pytest tests/kernels/test_triton.py tests/kernels/test_triton_aot.py -q -k magnitude_grad -p no:cacheprovider' "$python"
  step memcheck 120 "$python" -m spectral_ops check
  step racecheck 120 "$python" -m spectral_ops check --operators csr_sddmm lowrank_backward
  step tune 60 "$python" -m spectral_ops tune "${small[@]}"
  step bench 120 "$python" -m spectral_ops bench "${small[@]}" --rank 4 --quick --overhead --json "$logs/results.json"
  step training 120 "$python" -m spectral_ops bench --training --model tiny --blocks 1 --length 16 --rank 8 --device cpu \
    --dtype float32 --checkpointing --repeats 2 --json "$logs/training.json"
  cp README.md docs/PERFORMANCE.md "$logs"
  report "$logs/results.json" "$logs" "$logs/README.md" "$logs/PERFORMANCE.md"
else
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || { echo "gpu: no CUDA device in $python's torch"; exit 1; }
  arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + {9: "a", 10: "f"}.get(a, ""))')
  results=benchmarks/results/${device// /-}
  stem=$results/$(date -u +%F)-$(git rev-parse --short HEAD 2>/dev/null || echo uncommitted)
  mkdir -p "$results"
  step build 150 env TORCH_CUDA_ARCH_LIST="$arch" FORCE_CUDA=1 "$python" setup.py build_ext --inplace
  step info 20 "$python" -m spectral_ops info
  workers=() # thousands of small cases, most of them waiting for Triton's compiler: several processes share the GPU
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist worksteal)
  step test 240 "$python" -m pytest tests/kernels/test_gpu.py -m gpu -q -p no:cacheprovider "${workers[@]}"
  sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all)
  step memcheck 90 "${sanitizer[@]}" --tool memcheck "$python" -m spectral_ops check --samples 2
  step racecheck 60 "${sanitizer[@]}" --tool racecheck "$python" -m spectral_ops check --backends cuda --operators \
    bat_contract_ bat_weight_ block_sum column_norm csr_sddmm lowrank_backward
  step tune 60 "$python" -m spectral_ops tune --device cuda --dtype bfloat16 --tokens 1 128 8192 \
    --shape 4096 4096 --rank 16 --repeats 9 --seconds 40 --write
  peers=() # PEFT's own layers are timed beside ours where this machine has PEFT
  "$python" -c 'import peft' 2>/dev/null || peers=(--no-peers)
  # what there is no time for is named and left out, here and in training: the targets' length first, growth last
  step bench 150 "$python" -m spectral_ops bench --device cuda --dtype bfloat16 --shapes llama3-8b --tokens 8192 128 4096 \
    --methods dora bat rosa lora bone --ops all --overhead --growth --seconds 120 --json "$stem.json" "${peers[@]}"
  if "$python" -c 'import peft, transformers' 2>/dev/null; then
    step training 120 "$python" -m spectral_ops bench --training --model llama3-8b --blocks 2 --length 4096 \
      --device cuda --dtype bfloat16 --compiled --repeats 8 --seconds 80 --json "$stem-training.json"
  elif [[ $sections == *" training "* ]]; then
    echo "gpu: no peft or no transformers, so no training steps"
  fi
  report "$stem.json" "$results" README.md docs/PERFORMANCE.md
  echo "results: $stem.json"
fi

printf '\n%s\n' "section    seconds  ended        last line"
printf '%s\n' "${summary[@]}"
exit $failed
