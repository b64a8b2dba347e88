#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh [--list]
#
# Everything that needs a GPU in one go and without a network: builds the extension in place, runs the GPU tests, the kernel and decoding
# benchmarks and a short training. Every part has a time limit, and none stops the next: were all stopped at theirs, and killed 5 s later,
# the parts would take 9 minutes, beside the seconds to look for a GPU and to install $WHEELS. Results and logs go to $OUT (default
# benchmarks/results/gpu), a table is printed last.
#
# WHEELS         a folder of wheels to install first, into a temporary folder, for packages that the machine lacks
# PYTHON         the interpreter (default python3)
# GPU_SUITE_PARTS  a file that replaces the list of parts below, for tests of this script; then no GPU is needed
#
# Exit code: 0 every part passed, 1 a part failed, 2 a wrong argument, 3 there is no GPU, 4 none failed but some were skipped.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHON="${PYTHON:-python3}"
export PATH="$PATH:/usr/local/cuda/bin"  # where nvcc is if it is not on the PATH; setup.py looks there
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# name | seconds | log file | command. A command that exits with 77 was skipped; the last line it prints says why.
parts() {
    if [ -n "${GPU_SUITE_PARTS:-}" ]; then cat "$GPU_SUITE_PARTS"; return; fi
    cat <<'END'
environment    | 15  | build      | nvidia-smi; nvcc --version; "$PYTHON" benchmarks/gpu_parts.py packages
build          | 105 | build      | "$PYTHON" setup.py build_ext --inplace && "$PYTHON" benchmarks/gpu_parts.py extension && "$PYTHON" -m diffpo_kernels
tests of GPU   | 55  | tests      | ls tests/gpu/test_*.py || { echo "no tests in tests/gpu"; exit 77; }; "$PYTHON" -m pytest $(workers loadfile) $QUIET tests/gpu
kernel tests   | 150 | tests      | "$PYTHON" -m pytest $(workers worksteal) $QUIET -k "$ON_GPU" tests/kernels
row_statistics | 35  | benchmarks | kernels --operators row_statistics --compile-budget 10
eb_commit      | 20  | benchmarks | kernels --operators entropy_bounded_commit_ --compile-budget 5
linear_logprob | 50  | benchmarks | kernels --operators linear_logprob --compile-budget 10
surrogate_loss | 20  | benchmarks | kernels --operators surrogate_loss --compile-budget 5
decoding       | 15  | benchmarks | [ -f benchmarks/decoding.py ] || { echo "there is no benchmarks/decoding.py"; exit 77; }; "$PYTHON" benchmarks/decoding.py --device cuda --quick --out "$OUT/decoding_cuda.json"
training       | 24  | benchmarks | "$PYTHON" benchmarks/gpu_parts.py training "$OUT/training_summary.json"
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
export QUIET="-q --tb=short -rfE --no-header -p no:cacheprovider"
export ON_GPU="reference-cuda or triton-cuda or cuda-cuda"  # the ids of the targets in tests/kernels/conftest.py
workers() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8 --dist $1"; }
# An operator a process: a kernel that reads beyond its memory ends CUDA for its whole process.
kernels() { "$PYTHON" benchmarks/kernels.py --device cuda --seconds 0.2 --append --out "$OUT/kernels_cuda.json" "$@"; }
export -f workers kernels

rm -f "$OUT"/{build,tests,benchmarks}.log "$OUT/kernels_cuda.json"
grace=5 rows=() json=() failed=0 skipped=0
while IFS='|' read -r -u 9 name limit log command; do
    read -r name <<<"$name"; limit=${limit// /} log="$OUT/${log// /}.log"
    [ -n "$name" ] || continue
    printf '== %s (at most %s s)\n' "$name" "$limit"
    printf '\n======== %s ========\n' "$name" >>"$log"
    size=$(wc -c <"$log") start=$SECONDS
    timeout -s INT -k "$grace" "$limit" bash -o pipefail -c "$command" >>"$log" 2>&1 9<&-
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
