#!/usr/bin/env bash
# All that a GPU is to show, in one command of at most nine minutes: most valuable first, each part within its own limit,
# its result written at once.
#
#     OUT=FOLDER bash tests/benchmarks/gpu_in_one_go.sh
#
# Rehearsed without one: DEVICE=pretended or DEVICE=cpu, at small sizes. gpu_prepare.sh brings what the machine lacks.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:?a folder for results}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
export PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/support:$PWD/tests/benchmarks" OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
if [ -d .gpu-wheels ]; then
  python3 -m pip install --quiet --no-index --no-deps --find-links .gpu-wheels --target "$OUT/site" .gpu-wheels/*.whl
  export PYTHONPATH="$PYTHONPATH:$OUT/site"
fi
small=()
[ "$DEVICE" = cuda ] || small=(--small)

part() { # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - start)) of $limit s" | tee -a "$OUT/summary.txt"
  tail -n 1 "$OUT/$name.log" | cut -c1-2000 >> "$OUT/summary.txt"
  sync
}

gpu() { # the benchmark on torch alone, by part
  if [ "$DEVICE" = pretended ]; then
    python3 -c "import runpy, sys, pretended_cuda
sys.argv = ['gpu.py', '--device', 'cuda', *sys.argv[1:]]
with pretended_cuda.pretended_cuda():
    runpy.run_path('tests/benchmarks/gpu.py', run_name='__main__')" "$@"
  else
    python3 tests/benchmarks/gpu.py --device "$DEVICE" "$@"
  fi
}
export -f gpu
export DEVICE

part digits 45 python3 tests/benchmarks/gpu_pipeline.py digits --device "$DEVICE" "${small[@]}" --dtype float64
part mnist 80 python3 tests/benchmarks/gpu_pipeline.py mnist --device "$DEVICE" "${small[@]}" --only-timed
part transformer 50 python3 tests/benchmarks/gpu_pipeline.py transformer --device "$DEVICE" "${small[@]}" --dtype float64
part tensor_cores 50 python3 tests/benchmarks/gpu_pipeline.py mnist --device "$DEVICE" "${small[@]}" --only-timed \
  --engine factored_tf32x3
[ "$DEVICE" = pretended ] || # of which another process knows nothing
  part ray 45 python3 tests/benchmarks/gpu_pipeline.py digits --device "$DEVICE" "${small[@]}" --dtype float64 --ray
part engines 30 bash -c 'gpu "$@"' _ "${small[@]}" --only engines --results "$OUT/engines.json"
part headline 90 bash -c 'gpu "$@"' _ "${small[@]}" --only headline --results "$OUT/headline.json"
part peers 60 bash -c 'gpu "$@"' _ "${small[@]}" --only peers --results "$OUT/peers.json"
part tests 40 python3 -m pytest -q -p no:cacheprovider -n0 -m "gpu and not full and not long" tests
part zoo 50 bash -c 'gpu "$@"' _ "${small[@]}" --only zoo --results "$OUT/zoo.json"
