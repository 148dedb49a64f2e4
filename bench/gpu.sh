#!/usr/bin/env bash
# One GPU machine, eight minutes: correctness of the kernels, then their benchmarks, most telling
# first. Writes one JSON file under ${OUT:-bench/results}/<gpu>-torch<version>/, complete or not.
# Needs this repository and a Python (${PYTHON:-python3}) with torch, triton, numpy, pytest and
# pytest-benchmark; nothing has to be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="engine:kernels:tests/kernels:bench${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"' || exit 2

# SIGINT, not SIGTERM: pytest stops where it is and still writes what it has measured.
timeout --signal=INT "${SECONDS_ALLOWED:-450}" \
    "$python" -m pytest tests/kernels bench \
    --ignore=tests/kernels/test_aot.py \
    --import-mode=importlib --continue-on-collection-errors \
    --results="${OUT:-bench/results}" --allow-dirty \
    --benchmark-columns=median --benchmark-warmup=off \
    -p no:cacheprovider "$@"
