#!/usr/bin/env bash
# One GPU machine, under eight minutes: correctness of the kernels, then their benchmarks, the most
# telling first. Writes one JSON file under ${OUT:-bench/results}/<gpu>-torch<version>/. Every step
# is a process of its own that leaves what it has measured line by line, so that none can take the
# others' results with it; the exit status is 0 only if all of them succeeded.
#
# Needs this repository and a Python (${PYTHON:-python3}) with torch, triton, numpy, pytest and
# pytest-benchmark; nothing has to be installed. Without a GPU, ON_CPU=1 runs the same cases at
# small shapes on the CPU, which shows that this script works and nothing about the kernels.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="engine:kernels:tests/kernels:bench${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-python3}
allowed=${SECONDS_ALLOWED:-450}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=0

# step NAME SECONDS COMMAND...: runs it, notes how it ended. SIGINT, not SIGTERM: pytest then stops
# where it is and says what it has.
step() {
    local name=$1 seconds=$2 start=$SECONDS status=124
    shift 2
    local left=$((allowed - SECONDS))
    ((seconds = seconds < left ? seconds : left))
    if ((seconds >= 5)); then
        timeout --signal=INT --kill-after=10 "$seconds" "$@"
        status=$?
        ((status != 5)) || status=0 # pytest: none of the cases is for this machine
    fi
    printf '{"name": "%s", "seconds": %d, "status": %d}\n' \
        "$name" $((SECONDS - start)) "$status" >>"$parts/steps.jsonl"
    ((status == 0)) || { failed=1 && echo "gpu.sh: $name ended with status $status" >&2; }
}

tests=("$python" -m pytest -p run_parts -p no:cacheprovider -q --parts "$parts")
tests+=(--import-mode=importlib --continue-on-collection-errors)
cases=("${tests[@]}" --benchmark-quiet --benchmark-warmup=off)

"$python" -c 'import torch, triton, numpy, pytest, pytest_benchmark' || exit 2
if gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
    echo "gpu.sh: on $gpu"
elif [[ ${ON_CPU:-} ]]; then
    gpu=""
    OUT=${OUT:-$(mktemp -d)} # bench/results is for measurements
    echo "gpu.sh: no GPU here; small shapes on the CPU, the kernels in Triton's interpreter"
else
    echo "gpu.sh: no GPU here; ON_CPU=1 tries the script at small shapes" >&2
    exit 2
fi

# Compiling is most of what tests and first calls do, and needs no quiet GPU: all at once, in as
# many processes as there are cores to spare. The benchmarks find the compiled kernels in caches.
mapfile -t files < <(ls tests/kernels/test_*.py | grep -v test_aot |
    xargs "$python" bench/importable.py)
((${#files[@]})) || { echo "gpu.sh: no test of the kernels can be imported" >&2 && exit 2; }
shards=$(($(nproc) > 8 ? 4 : 1))
for ((shard = 0; shard < shards; shard++)); do
    mine=()
    for ((i = shard; i < ${#files[@]}; i += shards)); do mine+=("${files[i]}"); done
    step "correctness $shard" 240 "${tests[@]}" "${mine[@]}" &
done
if [[ $gpu ]]; then
    for file in bench/test_*.py; do
        step "compile ${file##*/}" 150 "${cases[@]}" "$file" --warm >/dev/null &
    done
fi
wait
# The processes above could not set `failed` here.
grep -q '"status": [1-9]' "$parts/steps.jsonl" && failed=1

step "short table" 150 "${cases[@]}" bench -m short
for file in norm mlp attention fp8 gemm block head patches temporal evl; do
    step "$file" 120 "${cases[@]}" "bench/test_$file.py" -m "not short" -k "not torch.compile"
done
step "torch.compile" 150 "${cases[@]}" bench -m "not short" -k torch.compile

"$python" bench/kernel_results.py "$parts" "${OUT:-bench/results}" || failed=1
exit "$failed"
