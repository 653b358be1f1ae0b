#!/usr/bin/env bash
# Tests and measurements on a machine with one NVIDIA GPU and no network.
#
#   benchmarks/run_gpu.sh [--dry-run] RESULTS_DIR [tests|op|decode|e2e]      without a stage: all four
#
# Builds the CUDA C++ kernels, where there are some, in place for the GPU that is found, then runs the stage for 5 (tests, op) or
# 4 minutes (decode, e2e) at most, the build included. RESULTS_DIR/STAGE.json is written as it goes; started again, a stage goes
# on where it stopped.
# PYTHON  interpreter with torch; default: .venv's, else python3
# COMMIT  the commit to record where this folder is a copy without git, or within another repository
# --dry-run  tiny shapes on any machine, without a build
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "run_gpu: $*"; }
usage() { say "usage: benchmarks/run_gpu.sh [--dry-run] RESULTS_DIR [tests|op|decode|e2e]" >&2; exit 2; }

DRY_RUN=""
if [[ "${1:-}" == --dry-run ]]; then DRY_RUN=$1; shift; fi
[[ $# -ge 1 && $# -le 2 && "$1" != -* ]] || usage
case "${2:-}" in
    "") STAGES=(tests op decode e2e) ;;
    tests | op | decode | e2e) STAGES=("$2") ;;
    *) usage ;;
esac
mkdir -p "$1" || exit 2
RESULTS=$(cd "$1" && pwd)
readonly DRY_RUN STAGES RESULTS BUILD_SECONDS=150
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH=.:python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

limit() { case $1 in tests | op) echo 300 ;; *) echo 240 ;; esac; }

# For this GPU alone. What cannot be built is left out: backends without compiled code still run.
build() {
    local capability architecture
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d ' .')
    architecture=$capability
    if [[ "$capability" == 90 ]]; then architecture=90a; fi
    say "building for architecture ${architecture:-unknown}"
    PREFIX_KERNELS_BUILD=cuda CMAKE_ARGS="${architecture:+-DPREFIX_KERNELS_CUDA_ARCHITECTURES=$architecture}" \
        timeout "$BUILD_SECONDS" "$PYTHON" setup.py -q build_ext --inplace >"$RESULTS/build.log" 2>&1 ||
        say "the build failed, its output is in $RESULTS/build.log; going on without: $(tail -n 1 "$RESULTS/build.log")"
}

# All kernels of the operator on all cores, before one process measures them in turn.
warm_up() { timeout 60 "$PYTHON" benchmarks/warm_up.py 2>>"$RESULTS/workers.log" || say "not all kernels were compiled beforehand"; }

begin=$SECONDS
if [[ -z "$DRY_RUN" ]] && compgen -G "csrc/cuda/*.cu" >/dev/null; then build; fi
status=0
warm=""
for stage in "${STAGES[@]}"; do
    if [[ -z "$DRY_RUN$warm" && ("$stage" == op || "$stage" == decode) ]]; then warm=1; warm_up; fi
    seconds=$(($(limit "$stage") - (SECONDS - begin)))
    timeout --kill-after=5 $((seconds + 10)) "$PYTHON" benchmarks/run_gpu.py "$RESULTS" "$stage" --seconds "$seconds" $DRY_RUN ||
        status=1
    begin=$SECONDS
done
exit $status
