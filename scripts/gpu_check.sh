#!/usr/bin/env bash
# The tests of the GPU's kernels and of an engine on them, sampling throughput next to plain vLLM, and as many of the
# other engine tests as there is time for: one page of output, at most eight minutes.
#
#     scripts/gpu_check.sh [ARGUMENTS OF eggroll-llm bench]
#
# By default it measures --random-weights qwen2.5-1.5b --variants population --repeats 2.
#
# Needs the CUDA builds of PyTorch and vLLM, pytest, and no network: the weights are random. It runs from a checkout with
# .venv/bin/python where there is one, else with $PYTHON or python3, which may find packages by PYTHONPATH. The whole
# output of each part and bench.json go to $OUT, by default build/gpu_check. Status 0: all is well, though the last part
# may have been cut off; 1: a test failed, or another part was cut off; 2: there is no GPU, or no PyTorch or vLLM.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

seconds=${SECONDS_IN_ALL:-450} seconds_of_bench=${SECONDS_OF_BENCH:-290}
out=${OUT:-build/gpu_check}
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
[[ $# -gt 0 ]] || set -- --random-weights qwen2.5-1.5b --variants population --repeats 2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

machine=$("$python" -W ignore - <<'PYTHON'
import importlib.util, sys
missing = [name for name in ("torch", "vllm", "eggroll_llm") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_check: {sys.executable} does not find {', '.join(missing)}: make install EXTRAS=cuda,dev")
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} of {sys.executable} finds no CUDA GPU")
from importlib.metadata import version
memory = torch.cuda.get_device_properties(0).total_memory / 2**30
print(f"{torch.cuda.get_device_name()}, {memory:.0f} GiB; torch {torch.__version__}, vllm {version('vllm')}")
PYTHON
) || exit 2

# The least of so many seconds and those until all has to be over; 0 would be no limit.
at_most() {
    local left=$((seconds > SECONDS ? seconds - SECONDS : 1))
    echo $(($1 < left ? $1 : left))
}

# Runs what follows for at most so many seconds, into a file of $out. An interrupted part still says what it has found.
limited() {
    local limit=$1 log=$out/$2
    shift 2
    timeout --foreground --signal=INT --kill-after=30 "$limit" "$@" >"$log" 2>&1
    local status=$?
    [[ $status != 124 && $status != 137 ]] || echo "stopped after $limit s" >>"$log"
    return "$status"
}

# Warnings are errors in the pinned environment; torch and vLLM may be others here.
pytest=("$python" -m pytest -q --tb=line -p no:cacheprovider -o filterwarnings=default)
status=0
tests() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    limited "$(at_most "$limit")" "$name.log" "${pytest[@]}" "$@"
    local ended=$?
    echo "== tests of $name ($((SECONDS - start)) s, $out/$name.log)"
    grep -vE '^(SKIPPED|$)|^[.sxFE]+ *(\[ *[0-9]+%\])?$' "$out/$name.log" | tail -n 12
    return "$ended"
}

# Those of the files that exist, a line each.
there() {
    for file; do [[ ! -e $file ]] || echo "$file"; done
}

echo "$machine; $(git describe --always --dirty 2>/dev/null || echo 'no git')"
# What says most comes first. Kernels side by side, as each is to be compiled; engines one at a time, as another would
# disturb their look at free memory.
"$python" -c 'import xdist' 2>/dev/null && processes=(--numprocesses=8) || processes=()
tests kernels 120 "${processes[@]}" tests/kernels || status=1
mapfile -t files < <(there tests/engine/test_cuda.py tests/engine/*_triton.py)
VLLM_GPU_SYNC_CHECK=warn tests engines 130 "${files[@]}" || status=1
# Where a step waited for the GPU, if it did: in these lines something reads back what it should not.
grep -E 'synchronizing CUDA operation|Implicit GPU<->CPU sync' "$out/engines.log" | sort | uniq -c | sort -rn | head -n 5

limited "$(at_most "$seconds_of_bench")" bench.log "$python" -m eggroll_llm bench "$@" --out "$out/bench.json" || status=1
echo "== bench $* ($SECONDS s, $out/bench.json)"
tail -n 60 "$out/bench.log"

mapfile -t files < <(there tests/engine/test_engine.py tests/engine/test_quantization.py)
tests others "$seconds" "${files[@]}"
ended=$?
[[ $ended == 0 || $ended == 124 ]] || status=1
! grep -qE '^(FAILED|ERROR) ' "$out/others.log" || status=1  # before it was cut off
exit "$status"
