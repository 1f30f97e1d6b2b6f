#!/usr/bin/env bash
# The fast tests, with the smallest version of every direct dependency that pyproject.toml allows. Needs uv.
#
#     release/lowest.sh [FOLDER]
#
# torch is left out: TORCH (2.13.0 by default) is installed, since older builds are several GB. Old packages warn of
# newer ones that they meet, so warnings are no errors here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
place=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
uv=${UV:-uv}
mkdir -p "$place"
echo "torch==${TORCH:-2.13.0}" > "$place/torch.txt"
"$uv" pip compile --quiet pyproject.toml --extra dev --resolution lowest-direct --override "$place/torch.txt" \
    ${FIND_LINKS:+--find-links "$FIND_LINKS"} --python "$python" --output-file "$place/versions.txt"
"$uv" venv --quiet --allow-existing --python "$python" "$place/venv"
"$uv" pip sync --quiet --python "$place/venv/bin/python" ${FIND_LINKS:+--find-links "$FIND_LINKS"} "$place/versions.txt"
OMP_NUM_THREADS=1 PYTHONPATH="$PWD/src" NUMBA_CACHE_DIR="$place/numba" "$place/venv/bin/python" -m pytest \
    -p no:cacheprovider -m "not slow" -W default --numprocesses "${PROCESSES:-2}"
