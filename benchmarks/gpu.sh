#!/usr/bin/env bash
# `make gpu`: everything that needs the chip, with this machine's own Python and no network, in two halves of under ten minutes:
#   SECTIONS=truth     build info check verdict memcheck racecheck test: is it right? `verdict` is every operator in bfloat16 and
#                      float32 beside float64, `test` the rest, as far as the time goes
#   SECTIONS=figures   build kernels host bench experts training report: how fast is it?
# SECTIONS also takes the names of sections, among them `tuners` (PEFT's other tuners) and `tune`; without it both halves
# run. Each section runs whether or not the one before it passed, a table of how each ended closes the run, and the exit status is 0 only when all passed. LIMIT seconds
# bound the run (540, without SECTIONS or a chip 1200): a section gets what is left of them, and is cut off there. A failed test is
# written to build/gpu/failures.txt as it happens, each test's outcome to build/gpu/tests.txt.
# `build` compiles nothing where compiled extensions came along, load, have this package's schemas and run on this chip.
# `report` turns what `bench` wrote at this commit today into pictures and the tables in README and docs. Whatever the run
# writes is copied to the folder $OUT too, where that is set: at most 8 files,
# what `tuners` and `tune` measured and the pictures in extras.tar.
# `make gpu-dry` (DRY=1) runs the same script without a chip: one CUDA file is compiled, the GPU tests are collected, one
# Triton operator is interpreted and compiled ahead of time, and what takes a device takes the CPU, at small sizes, its
# results thrown away. No sanitizer runs.
set -uo pipefail
OUT=${OUT:+$(realpath "$OUT")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} dry=${DRY:-}
truth="build info check verdict memcheck racecheck test" figures="kernels host bench experts training report"
LIMIT=${LIMIT:-$([ -n "${SECTIONS:-}" ] && [ -z "$dry" ] && echo 540 || echo 1200)}
sections=${SECTIONS:-truth figures${dry:+ tune}}
sections=${sections/truth/$truth} sections=" ${sections/figures/build $figures} "
for name in $sections; do
  [[ " $truth $figures tuners tune " == *" $name "* ]] || { echo "gpu: no section $name" >&2; exit 2; }
done
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=0 summary=() cores=$(env -u OMP_NUM_THREADS nproc) # which would answer that variable
made=$([ -n "$dry" ] && mktemp -d || echo build/gpu) # logs, and the tests' outcomes
stem=$made/results                                   # of the results files
mkdir -p "$made" && rm -f "$made"/{gpu.log,last,tuned} || exit 1
[[ $sections != *" verdict "* && $sections != *" test "* ]] || rm -f "$made"/{tests,failures}.txt # the other half's stay
trap 'share; [ -z "$dry" ] || rm -rf "$made"' EXIT
trap 'exit 143' TERM INT

has() { # packages; not imported, which takes seconds of PEFT
  "$python" -c 'import sys, importlib.util as u; sys.exit(not all(u.find_spec(n.strip()) for n in sys.argv[1].split(",")))' "$1"
}

able() { # section, packages that it needs
  [[ $sections == *" $1 "* ]] || return 1
  has "$2" || { echo "gpu: no $1, which needs $2" | tee -a "$made/gpu.log"; return 1; }
}

share() { # what was written so far, to $OUT
  [[ -n ${OUT:-} ]] || return 0
  local file extras=()
  for file in "$made"/{gpu.log,tests.txt,failures.txt} "$stem"{,-training,-kernels,-experts}.json; do
    [ ! -s "$file" ] || cp "$file" "$OUT"
  done
  [ ! -s "$stem-tuners.json" ] || extras+=("$stem-tuners.json")
  [ ! -e "$made/tuned" ] || extras+=(spectral_ops/tuned spectral_ops/functional/rates.json)
  [ ! -d "$made/pictures" ] || extras+=(-C "$made" pictures)
  [ ${#extras[@]} = 0 ] || tar -cf "$OUT/extras.tar" "${extras[@]}"
}

counted() { # passed, failed and skipped of the tests that the last pytest collected, as far as it came
  awk '/^==/ { total = $2; split("", n) } /^(passed|failed|skipped) / { n[$1]++ }
    END { printf "%d passed, %d failed, %d skipped of %s tests", n["passed"], n["failed"], n["skipped"], total }' \
    "$made/tests.txt"
}

step() { # section, seconds, command...
  local name=$1 limit=$2 began=$SECONDS verdict=ok status last function=()
  shift 2
  [[ $sections == *" $name "* ]] || return 0
  local left=$((LIMIT - SECONDS))
  [[ $name == report || $sections != *" report "* ]] || left=$((left - 30)) # which the report has to itself
  ((limit <= left)) || limit=$left
  if ((left < 5)); then
    failed=1
    summary+=("$(printf '%-10s %5d s  %-12s' "$name" 0 "NO TIME LEFT")")
    return 0
  fi
  echo "== $name: $*" | tee -a "$made/gpu.log"
  ! declare -F "$1" >/dev/null || function=(bash -c '"$@"' bash) # timeout takes commands only
  timeout --kill-after=10 "$limit" "${function[@]}" "$@" 2>&1 | tee "$made/last" | tee -a "$made/gpu.log"
  status=${PIPESTATUS[0]}
  last=$({ ((status)) && grep -E 'RED:|Error' "$made/last" || grep -v '^ *$' "$made/last"; } | tail -1 | cut -c1-100)
  case $status in
    0) ;;
    124 | 137) verdict="CUT OFF" failed=1 ;;
    *) verdict="FAILED ($status)" failed=1 ;;
  esac
  [[ $name != verdict && $name != test || ! -s $made/tests.txt ]] || last=$(counted)
  summary+=("$(printf '%-10s %5d s  %-12s %s' "$name" $((SECONDS - began)) "$verdict" "$last")")
  share
}

sources() { find csrc CMakeLists.txt setup.py -type f -not -path '*/__pycache__/*' -exec sha256sum {} + | sort | sha256sum; }

build() { # what this checkout compiled itself may be older than its sources; what came along prebuilt is taken as it is
  if [[ -n $dry ]]; then
    "$python" -m benchmarks.prebuilt cpu
    nvcc -std=c++17 --expt-relaxed-constexpr -arch=sm_90a -c csrc/cuda/blocksum.cu -o "$made/blocksum.o"
  elif [[ -d build/cmake && $(cat build/cmake/sources 2>/dev/null) != "$(sources)" ]] ||
    ! "$python" -m benchmarks.prebuilt cuda; then
    "$python" setup.py build_ext --inplace && sources >build/cmake/sources
  fi
}

shards() { # command...: `check`'s operators in processes of a few, so that Triton's compiler has every core, and one
  # operator that loses the GPU does not take the others with it
  "$python" -c 'from spectral_ops._library import OPERATORS; print(*OPERATORS)' | tr ' ' '\n' |
    OMP_NUM_THREADS=1 xargs -P "$cores" -n ${dry:+2}3 "$@" --operators
}

report() { # python, results file, directory of the pictures, pages
  if has matplotlib; then
    mkdir -p "$made/pictures" && "$1" -m spectral_ops bench --draw "$2" --png "$made/pictures"
    find "$made/pictures" -name '*.png' -exec cp {} "$3" \; # none, where the bench was cut off early
  else
    echo "gpu: no matplotlib, so no pictures"
  fi &&
    "$1" -m benchmarks.publish results "$2" "${@:4}"
}
export -f build has report shards sources
export dry made python cores

# --- the sections -----------------------------------------------------------------------------------------------------

pytest=("$python" -m pytest -q -p no:cacheprovider -p tests.support.outcomes --outcomes "$made")
first="matmul_reads or test_operator_against_float64 and (bfloat16 or float32)" rest=()
[[ $sections != *" verdict "* ]] || rest=(-k "not ($first)")
if [ -n "$dry" ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # at these sizes threads only wait for each other
  small=(--device cpu --dtype float32 bfloat16 --tokens 16 --shape 64 48 --repeats 2)
  step build 240 build
  step info 240 "$python" -m spectral_ops info
  step check 240 shards "$python" -m spectral_ops check --samples 2
  step verdict 240 "${pytest[@]}" -m gpu tests/kernels/test_gpu.py -k "$first" --collect-only
  step memcheck 240 "$python" -m spectral_ops check --operators csr_sddmm
  step racecheck 240 "$python" -m spectral_ops check --operators lowrank_backward
  step test 300 "${pytest[@]}" tests/kernels/test_triton.py -k magnitude_grad
  step kernels 240 "$python" -m benchmarks.estimates --measure --device cpu --shrink 32 --tokens 16 --repeats 2 \
    --seconds 8 --json "$stem-kernels.json"
  able host peft && step host 240 "$python" -m benchmarks.bench_host --device cpu --turns 1 --calls 2 lora
  step bench 240 "$python" -m spectral_ops bench "${small[@]}" --rank 4 --quick --overhead --methods lora dora bat rosa \
    --json "$stem.json"
  able experts "peft, transformers" &&
    step experts 240 "$python" -m benchmarks.bench_experts --shape 4 32 16 2 16 4 --repeats 2 --json "$stem-experts.json"
  able training "peft, transformers" &&
    step training 240 "$python" -m spectral_ops bench --training --model tiny --blocks 1 --length 16 --rank 8 --device cpu \
      --dtype float32 --checkpointing --repeats 2 --json "$stem-training.json"
  cp README.md docs/PERFORMANCE.md "$made"
  able tuners peft && step tuners 240 "$python" -m benchmarks.bench_tuners lokr --device cpu --tokens 16 --features 64 \
    --repeats 2 --json "$stem-tuners.json"
  step report 240 report "$python" "$stem.json" "$made" "$made/README.md" "$made/PERFORMANCE.md"
  step tune 240 "$python" -m spectral_ops tune "${small[@]}"
else
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') ||
    { echo "gpu: no CUDA device in $python's torch"; exit 1; }
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability()
print(f"{a}.{b}" + {9: "a", 10: "f"}.get(a, ""))')
  export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1
  results=benchmarks/results/${device// /-}
  stem=$results/$(date -u +%F)-$(git rev-parse --short HEAD 2>/dev/null || echo uncommitted)
  mkdir -p "$results"
  # thousands of small cases, most of them waiting for Triton's compiler: several processes share the GPU, in the tests' order
  ! has xdist || pytest+=(-n $((cores < 12 ? cores : 12)) --dist load --maxschedchunk 1 --max-worker-restart 100)
  ! has pytest_timeout || pytest+=(--timeout 100 --timeout-method thread) # ends a process whose kernel hangs
  sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all)
  step build 150 build
  step info 40 "$python" -m spectral_ops info
  step check 75 shards "$python" -m spectral_ops check
  step verdict 120 "${pytest[@]}" -m gpu tests/kernels/test_gpu.py -k "$first"
  step memcheck 75 shards "${sanitizer[@]}" --tool memcheck "$python" -m spectral_ops check --samples 2
  step racecheck 45 shards "${sanitizer[@]}" --tool racecheck "$python" -m spectral_ops check --samples 2 --backends cuda
  step test 300 "${pytest[@]}" -m gpu tests/kernels/test_gpu.py "${rest[@]}"
  step kernels 100 "$python" -m benchmarks.estimates --measure --seconds 85 --json "$stem-kernels.json"
  able host peft && step host 40 "$python" -m benchmarks.bench_host --device cuda --turns 15
  peers=() # PEFT's own layers are timed beside ours where this machine has PEFT
  has peft || peers=(--no-peers)
  # what there is no time for is named and left out, here and in training: the targets' length first, growth last
  step bench 190 "$python" -m spectral_ops bench --device cuda --dtype bfloat16 --shapes llama3-8b --tokens 8192 2048 512 \
    --methods dora bat rosa lora bone --ops all --overhead --growth --seconds 165 --json "$stem.json" "${peers[@]}"
  able experts "peft, transformers" &&
    step experts 30 "$python" -m benchmarks.bench_experts --device cuda --json "$stem-experts.json"
  able training "peft, transformers" &&
    step training 110 "$python" -m spectral_ops bench --training --model llama3-8b --blocks 2 --length 4096 \
      --device cuda --dtype bfloat16 --compiled --repeats 8 --seconds 80 --json "$stem-training.json"
  able tuners peft && step tuners 240 "$python" -m benchmarks.bench_tuners --device cuda --dtype bfloat16 --tokens 4096 \
    --features 4096 --json "$stem-tuners.json"
  step report 60 report "$python" "$stem.json" "$results" README.md docs/PERFORMANCE.md
  step tune 150 "$python" -m spectral_ops tune --device cuda --dtype bfloat16 --tokens 1 512 8192 \
    --shape 4096 4096 --rank 16 --repeats 9 --seconds 120 --write
  [[ $sections != *" tune "* ]] || touch "$made/tuned"
fi

{
  printf '\n%s\n' "section    seconds  ended        last line"
  printf '%s\n' "${summary[@]}"
  [ ! -s "$made/failures.txt" ] || { echo "tests that failed:"; grep '^failed' "$made/tests.txt" | cut -c1-150 | head -20; }
} | tee -a "$made/gpu.log"
exit $failed
