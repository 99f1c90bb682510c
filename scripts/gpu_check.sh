#!/usr/bin/env bash
# All tests that run on a GPU, then sampling throughput next to plain vLLM: one page of output, at most eight minutes.
#
#     scripts/gpu_check.sh [ARGUMENTS OF eggroll-llm bench]
#
# By default it measures --random-weights qwen2.5-1.5b --variants population --repeats 2.
#
# Needs the CUDA builds of PyTorch and vLLM, pytest, and no network: the weights are random. It runs from a checkout with
# .venv/bin/python where there is one, else with $PYTHON or python3, which may find packages by PYTHONPATH. The whole
# output of both parts and bench.json go to $OUT, by default build/gpu_check. Status 0: all is well; 1: a test failed, or
# there is no table; 2: there is no GPU, or no PyTorch or vLLM.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

seconds=${SECONDS_IN_ALL:-460} seconds_of_tests=${SECONDS_OF_TESTS:-200}
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

# Runs what follows for at most so many seconds, into a file of $out. An interrupted part still says what it has found.
limited() {
    local limit=$1 log=$out/$2
    shift 2
    timeout --foreground --signal=INT --kill-after=20 "$limit" "$@" >"$log" 2>&1
    local status=$?
    [[ $status != 124 && $status != 137 ]] || echo "stopped after $limit s" >>"$log"
    return "$status"
}

echo "$machine; $(git describe --always --dirty 2>/dev/null || echo 'no git')"
tests=()
for test in tests/kernels tests/engine/test_cuda.py tests/engine/test_blocks.py tests/engine/*_triton.py tests/engine/test_engine.py; do
    [[ -e $test ]] && tests+=("$test")
done
# Warnings are errors in the pinned environment; torch and vLLM may be others here.
limited "$seconds_of_tests" tests.log "$python" -m pytest -q --tb=line -p no:cacheprovider -o filterwarnings=default "${tests[@]}"
tests_status=$?
echo "== tests (${SECONDS} s, $out/tests.log)"
grep -vE '^(SKIPPED|$)|^[.sxFE]+ *(\[ *[0-9]+%\])?$' "$out/tests.log" | tail -n 15

start=$SECONDS
limited $((seconds - SECONDS)) bench.log "$python" -m eggroll_llm bench "$@" --out "$out/bench.json"
bench_status=$?
echo "== bench $* ($((SECONDS - start)) s, $out/bench.json)"
tail -n 40 "$out/bench.log"

[[ $tests_status == 0 && $bench_status == 0 ]] || exit 1
