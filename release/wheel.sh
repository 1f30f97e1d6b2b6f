#!/usr/bin/env bash
# A wheel in a fresh environment, as a new user meets it; the seconds of each command are printed.
#
#     release/wheel.sh dist/dyadlm-VERSION-py3-none-any.whl [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel=$(realpath "$1")
place=${2:-$(mktemp -d)}
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 DYADLM_CACHE="$place/cache" NUMBA_CACHE_DIR="$place/numba"
unset PYTHONPATH
cd "$place"

timed() {
    local start
    start=$(date +%s%N)
    "$@"
    printf '%8.1f s  %s\n' "$((($(date +%s%N) - start) / 100000000))e-1" "${*/$wheel/WHEEL}" >> times.txt
}

rm -rf venv run wheel.state times.txt
timed "$python" -m venv venv
timed venv/bin/pip install --quiet --constraint "$here/constraints.txt" "$wheel"
test "$(venv/bin/dyadlm --version)" = "dyadlm $(basename "$wheel" | cut -d- -f2)"
venv/bin/python - <<'END'
from importlib.resources import files

package = files("dyadlm")
for name in ("py.typed", "report/usual.json", "report/diagnosis.html", "report/diagnosis.css",
             "pretrained/tiny-en/model.safetensors", "pretrained/tiny-en/README.md"):
    assert package.joinpath(name).is_file(), f"the wheel lacks {name}"
END
timed venv/bin/dyadlm generate tiny-en --prompt "In the beginning" --seed 1
"$python" -c 'for number in range(2000): print(f"line {number % 50}: all is well")' > text.txt
timed venv/bin/dyadlm train --preset tiny --data text.txt --output run --device cpu \
    --set max_steps=20 per_device_train_batch_size=4 data.sequence_length=64
timed venv/bin/dyadlm generate run --prompt "line 1" --max-new-tokens 20 --seed 1
timed venv/bin/dyadlm score run text.txt --top 3
printf 'line\n' | timed venv/bin/dyadlm repl run --max-new-tokens 5 --state-out wheel.state
test -s wheel.state
echo "The wheel works. Seconds:"
cat times.txt
