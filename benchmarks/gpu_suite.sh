#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh [--list]
#
# Everything that needs a GPU in one go, in under 9 minutes and without a network: builds the extension in place, runs the GPU tests,
# the kernel and decoding benchmarks and a short training. Every part has a time limit, and none stops the next. Results and logs go to
# $OUT (default benchmarks/results/gpu), a table is printed last.
#
# WHEELS         a folder of wheels to install first, into a temporary folder, for packages that the machine lacks
# PYTHON         the interpreter (default python3)
# GPU_SUITE_PARTS  a file that replaces the list of parts below, for tests of this script; then no GPU is needed
#
# Exit code: 0 every part passed, 1 a part failed, 2 a wrong argument, 3 there is no GPU, 4 none failed but some were skipped.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# name | seconds | log file | command. A command that exits with 77 was skipped; the last line it prints says why.
parts() {
    if [ -n "${GPU_SUITE_PARTS:-}" ]; then cat "$GPU_SUITE_PARTS"; return; fi
    cat <<'END'
environment     | 20  | build      | nvidia-smi; nvcc --version; "$PYTHON" -m torch.utils.collect_env | head -40; "$PYTHON" benchmarks/gpu_parts.py packages
build           | 100 | build      | "$PYTHON" setup.py build_ext --inplace && "$PYTHON" benchmarks/gpu_parts.py extension
backends        | 20  | build      | "$PYTHON" -m diffpo_kernels
tests of GPU    | 60  | tests      | ls tests/gpu/test_*.py || { echo "no tests in tests/gpu"; exit 77; }; "$PYTHON" -m pytest $WORKERS $QUIET $(alone tests/gpu) tests/gpu
kernel tests    | 100 | tests      | "$PYTHON" -m pytest $WORKERS $QUIET $(alone tests/kernels) -k cuda tests/kernels
row_statistics  | 45  | benchmarks | kernels --operators row_statistics --compile-budget 12
eb_commit       | 25  | benchmarks | kernels --operators entropy_bounded_commit_ --compile-budget 6
linear_logprob  | 65  | benchmarks | kernels --operators linear_logprob --compile-budget 12
surrogate_loss  | 20  | benchmarks | kernels --operators surrogate_loss --compile-budget 6
decoding        | 30  | benchmarks | [ -f benchmarks/decoding.py ] || { echo "there is no benchmarks/decoding.py"; exit 77; }; "$PYTHON" benchmarks/decoding.py --device cuda --quick --out "$OUT/decoding_cuda.json"
training        | 45  | benchmarks | "$PYTHON" benchmarks/gpu_parts.py training "$OUT/training_summary.json"
END
}

if [ "${1:-}" = --list ]; then parts; exit; fi
if [ $# -gt 0 ]; then echo "gpu_suite.sh: unknown argument '$1'; usage: bash benchmarks/gpu_suite.sh [--list]" >&2; exit 2; fi
if [ -z "${GPU_SUITE_PARTS:-}" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_suite.sh: no GPU: torch of $PYTHON is missing or sees no CUDA device; nothing was run" >&2
    exit 3
fi

mkdir -p "${OUT:=benchmarks/results/gpu}" && OUT=$(cd "$OUT" && pwd) || exit 2
export OUT
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl && PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
# Operators do not share a process, in tests and benchmarks: a kernel that reads beyond its memory ends CUDA for its whole process.
export QUIET="-q --tb=short -rfE --no-header -p no:cacheprovider" WORKERS=""
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS="-n 8 --dist loadfile"
# tests/conftest.py imports diffpo; tests that need no more than the kernels run without it where its dependencies are missing
alone() { "$PYTHON" -c 'import diffpo' 2>/dev/null || echo "--confcutdir=$1"; }
kernels() { "$PYTHON" benchmarks/kernels.py --device cuda --seconds 0.2 --append --out "$OUT/kernels_cuda.json" "$@"; }
export -f alone kernels

rm -f "$OUT"/{build,tests,benchmarks}.log "$OUT/kernels_cuda.json"
rows=() json=() failed=0 skipped=0
while IFS='|' read -r -u 9 name limit log command; do
    read -r name <<<"$name"; limit=${limit// /} log="$OUT/${log// /}.log"
    [ -n "$name" ] || continue
    printf '== %s (at most %s s)\n' "$name" "$limit"
    printf '\n======== %s ========\n' "$name" >>"$log"
    size=$(wc -c <"$log") start=$SECONDS
    timeout -s INT -k 5 "$limit" bash -o pipefail -c "$command" >>"$log" 2>&1 9<&-
    code=$? seconds=$((SECONDS - start))
    case $code in
        0) status=ok ;;
        77) status=skipped skipped=1 ;;
        124 | 137) status="failed: stopped after $limit s" failed=1 ;;
        *) status="failed: exit code $code" failed=1 ;;
    esac
    lines=2; case $status in failed*) lines=15 ;; esac
    tail -c "+$((size + 1))" "$log" | tail -n "$lines" | cut -c 1-240
    rows+=("$(printf '%-14s %5s s  %-28s %s' "$name" "$seconds" "$status" "$log")")
    json+=("$(printf '{"part": "%s", "status": "%s", "exit_code": %d, "seconds": %d}' "$name" "$status" "$code" "$seconds")")
done 9< <(parts)

for log in "$OUT"/{build,tests,benchmarks}.log; do  # what is brought back from a remote machine has limits
    [ -f "$log" ] && tail -c 8000000 "$log" >"$scratch/tail" && cp "$scratch/tail" "$log"
done
(IFS=,; printf '[%s]\n' "${json[*]}") >"$OUT/suite.json"
printf '\n'; printf '%s\n' "${rows[@]}"
printf 'total %d s, results in %s\n' "$SECONDS" "$OUT"
[ "$failed" = 0 ] || exit 1
[ "$skipped" = 0 ] || exit 4
