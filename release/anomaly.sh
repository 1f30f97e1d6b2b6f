#!/usr/bin/env bash
# From `pip install` of a wheel to a found anomaly, by the commands of docs/anomalies.md, each with the seconds that it
# took and those of the processor.
#
#     release/anomaly.sh dist/dyadlm-VERSION-py3-none-any.whl [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel=$(realpath "$1")
place=${2:-$(mktemp -d)}
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 DYADLM_CACHE="$place/cache" NUMBA_CACHE_DIR="$place/numba"
unset PYTHONPATH
mkdir -p "$place"
cd "$place"
rm -rf runs normal.json times.txt
TIMEFORMAT='%R s, %U + %S s of the processor'
timed() {
    { time "$@" 2> errors.txt; } 2> time.txt
    echo "$(cat time.txt): ${*/$wheel/WHEEL}" | tee -a times.txt
}

log() { "$python" "$here/benchmarks/synthetic_log.py" "$@"; }
log --lines 8000 --seed 1 > train.log
log --lines 3000 --seed 2 > normal.log
log --lines 3000 --seed 3 --odd 1 > today.log 2> planted.txt
if [ ! -d venv ]; then
    timed "$python" -m venv venv
    timed venv/bin/pip install --quiet --constraint "$here/constraints.txt" "$wheel"
fi
export PATH="$place/venv/bin:$PATH"
timed dyadlm train --preset tiny --data train.log --output runs/log --set max_steps=300 learning_rate=2e-3 > train.txt
timed dyadlm score runs/log normal.log --calibrate normal.json
timed dyadlm score runs/log today.log --top 10
timed dyadlm score runs/log today.log --calibration normal.json --alert 0.001
