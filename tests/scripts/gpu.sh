#!/usr/bin/env bash
# On a machine with a card, from a bare checkout: the cuda tests, the toy line, the benchmark.
#   pip download --no-deps --no-binary :all: pydensecrf2 -d .sdist    where the machine has no network: carry this along
#   bash tests/scripts/gpu.sh [tests|toy|bench ...]                  all of it without words
#   DEVICE=cpu QUICK=1 bash tests/scripts/gpu.sh                      tries the script itself on a CPU
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} PYTHONUNBUFFERED=1
export PYTHONUNBUFFERED BNR_TEST_DEVICE=$DEVICE

"$PYTHON" -c "import pydensecrf" 2>/dev/null || "$PYTHON" -m pip install --no-build-isolation .sdist/pydensecrf2* || \
  "$PYTHON" -m pip install --no-build-isolation pydensecrf2
"$PYTHON" -c "import pytest, tqdm" 2>/dev/null || "$PYTHON" -m pip install pytest tqdm
"$PYTHON" - <<EOF
import torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
print(f"torch {torch.__version__}, {card}")
EOF

for part in ${*:-tests toy bench}; do
  echo "== $part"
  case $part in
    tests) "$PYTHON" -m pytest -rs -q tests/test_cuda.py ;;
    toy)
      "$PYTHON" -m wsss.prepare toy ${QUICK:+--root out/quick-toy --train 24 --val 8}
      if [ -n "$QUICK" ]; then at=(--data out/quick-toy); else at=(--data data/toy); fi
      at+=(--preset toy --device "$DEVICE" --out "out/gpu-toy$QUICK")
      time { "$PYTHON" bnr.py train "${at[@]}" ${QUICK:+--epochs 1}
             "$PYTHON" bnr.py cams "${at[@]}"
             "$PYTHON" psa.py labels "${at[@]}"
             "$PYTHON" psa.py train "${at[@]}" ${QUICK:+--epochs 1}
             "$PYTHON" psa.py walk "${at[@]}"
             "$PYTHON" segment.py train "${at[@]}" ${QUICK:+--iterations 5}
             "$PYTHON" segment.py predict "${at[@]}"
             "$PYTHON" -m wsss.evaluate "${at[@]}"; } ;;
    bench) "$PYTHON" tests/scripts/benchmark.py --device "$DEVICE" ${QUICK:+--quick --repeats 1} ;;
    *) echo "no part $part: tests toy bench" >&2; exit 2 ;;
  esac
done
