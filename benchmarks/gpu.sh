#!/usr/bin/env bash
# Run the GPU tests and all benchmarks on a GPU, in under eight minutes and without downloads; print the table last.
#
#     benchmarks/gpu.sh          run on CUDA, and write results/*-cuda.json
#     benchmarks/gpu.sh cpu      try every script on a CPU at a small size, and keep no results
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
device=${1:-cuda}
if [ "$device" = cpu ]; then
    kept=$(mktemp -d)
    cp -r benchmarks/results "$kept"
    trap 'rm -rf benchmarks/results && mv "$kept/results" benchmarks/results' EXIT
    python benchmarks/mask_tail.py --rois 4 --repeats 2
    python benchmarks/masks.py --repeats 2
    python benchmarks/matching.py --repeats 2
    python benchmarks/roi_path.py --classes 21 --repeats 2
    python benchmarks/inference_tail.py --repeats 2
    python benchmarks/profile_step.py --repeats 2 --min-size 100
else
    python -m pytest -q -m cuda tests
    python benchmarks/mask_tail.py --device "$device"
    python benchmarks/masks.py --device "$device"
    python benchmarks/matching.py --device "$device"
    python benchmarks/roi_path.py --device "$device" --repeats 9
    python benchmarks/inference_tail.py --device "$device" --repeats 9
    python benchmarks/profile_step.py --device "$device" --batch-sizes 2 8 --classes 91 1204 --repeats 5
fi
python benchmarks/table.py
