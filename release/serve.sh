#!/usr/bin/env bash
# From `pip install` of a wheel to a page and an answer, by the commands of docs/serve.md, each with the seconds that it
# took and those of the processor.
#
#     release/serve.sh dist/dyadlm-VERSION-py3-none-any.whl [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel=$(realpath "$1")
place=${2:-$(mktemp -d)}
python=${PYTHON:-python3}
port=${PORT:-8765}
address=http://127.0.0.1:$port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 DYADLM_CACHE="$place/cache" NUMBA_CACHE_DIR="$place/numba"
unset PYTHONPATH
mkdir -p "$place"
cd "$place"
rm -rf venv numba sessions times.txt
TIMEFORMAT='%R s, %U + %S s of the processor'
timed() {
    { time "$@" 2> errors.txt; } 2> time.txt || { cat errors.txt >&2; exit 1; }
    echo "$(cat time.txt): ${*/$wheel/WHEEL}" | tee -a times.txt
}

began=$(date +%s)
timed "$python" -m venv venv
timed venv/bin/pip install --quiet --constraint "$here/constraints.txt" "$wheel[serve]"
venv/bin/dyadlm serve tiny-en --port "$port" --sessions sessions 2> server.txt &
server=$!
trap 'kill $server' EXIT
listens() {
    until curl --silent --fail --output /dev/null "$address/health"; do
        kill -0 $server 2> /dev/null || { cat server.txt >&2; return 1; }
        sleep 0.1
    done
}
timed listens
timed curl --silent --fail --output page.html "$address/"
grep --quiet '<script' page.html
timed curl --silent --fail --output answer.json "$address/v1/completions" \
    --data '{"prompt": "In the beginning", "max_tokens": 40, "seed": 1}'
grep --quiet '"completion_tokens":40' answer.json
timed curl --silent --fail --no-buffer --output watched.txt "$address/v1/watch" \
    --data '{"text": "In the beginning", "max_tokens": 20, "seed": 1}'
test "$(grep --count '"bits"' watched.txt)" = 36
echo "From nothing to a page that answers: $(($(date +%s) - began)) s"
