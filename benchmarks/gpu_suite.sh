#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh [--list]
#
# Everything that needs a GPU in one go and without a network: builds the extension in place, runs the GPU tests, a short training, and the
# kernel and decoding benchmarks, in the order of what is worth most. Every part has a time limit, and none stops the next: were all stopped
# at theirs, and killed 3 s later, it would take less than 10 minutes with the look for a GPU. Results and logs go to $OUT (default
# benchmarks/results/gpu) as they come, the verdict on a part to $OUT/suite.json when it ends; a table is printed last.
#
# The machine has to have torch, triton, transformers, numpy, rich, matplotlib, safetensors, pytest, cmake, ninja and pybind11; pytest-xdist
# makes the tests faster. What else the training needs comes from a folder of wheels, filled beforehand where there is a network:
#
#   pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d benchmarks/wheels pydantic tyro math-verify
#
# WHEELS         that folder (default benchmarks/wheels, else wheels; both are ignored by git). Without it the training is skipped where
#                packages are missing
# WORKERS        processes of the tests, with pytest-xdist (default 8)
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
environment    | 10  | build      | nvidia-smi; nvcc --version; "$PYTHON" benchmarks/gpu_parts.py packages
build          | 75  | build      | "$PYTHON" setup.py build_ext --inplace && "$PYTHON" benchmarks/gpu_parts.py extension && "$PYTHON" -m diffpo_kernels
tests of GPU   | 60  | tests      | tests loadfile tests/gpu --ignore tests/gpu/test_decoding_on_gpu.py
decoding tests | 100 | tests      | tests worksteal tests/gpu/test_decoding_on_gpu.py
kernel tests   | 110 | tests      | tests worksteal -k "$ON_GPU" tests/kernels
training       | 40  | benchmarks | "$PYTHON" benchmarks/gpu_parts.py training "$OUT/training_summary.json"
row_statistics | 35  | benchmarks | kernels --operators row_statistics --compile-budget 10
linear_logprob | 45  | benchmarks | kernels --operators linear_logprob --compile-budget 10
decoding       | 40  | benchmarks | "$PYTHON" benchmarks/decoding.py --device cuda --quick --seconds 36 --out "$OUT/decoding_cuda.json"
eb_commit      | 15  | benchmarks | kernels --operators entropy_bounded_commit_ --compile-budget 4
surrogate_loss | 15  | benchmarks | kernels --operators surrogate_loss --compile-budget 4
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
export ON_GPU="reference-cuda or triton-cuda or cuda-cuda"  # the ids of the targets in tests/kernels/conftest.py
# A line a test, so that a part that is stopped leaves what it found; a file that cannot be imported stops no other.
tests() {
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "${WORKERS:-8}" --dist "$1")
    "$PYTHON" -m pytest "${workers[@]}" -v --tb=short -rfE --no-header -p no:cacheprovider --continue-on-collection-errors "${@:2}"
}
# An operator a process: a kernel that reads beyond its memory ends CUDA for its whole process.
kernels() { "$PYTHON" benchmarks/kernels.py --device cuda --seconds 0.2 --append --out "$OUT/kernels_cuda.json" "$@"; }
export -f tests kernels

rm -f "$OUT"/{build,tests,benchmarks}.log "$OUT/kernels_cuda.json"
grace=3 rows=() json=() failed=0 skipped=0
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
    (IFS=,; printf '[%s]\n' "${json[*]}") >"$OUT/suite.json"
done 9< <(parts)

for log in "$OUT"/{build,tests,benchmarks}.log; do  # what is brought back from a remote machine has limits
    [ -f "$log" ] && tail -c 8000000 "$log" >"$scratch/tail" && cp "$scratch/tail" "$log"
done
printf '\n'; printf '%s\n' "${rows[@]}"
printf 'total %d s, results in %s\n' "$SECONDS" "$OUT"
[ "$failed" = 0 ] || exit 1
[ "$skipped" = 0 ] || exit 4
