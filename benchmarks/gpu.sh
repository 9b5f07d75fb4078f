#!/usr/bin/env bash
# Run the GPU tests and all benchmarks on a GPU, in under eight minutes and without downloads; print the table last.
#
#     benchmarks/gpu.sh          run on CUDA, and write results/*-cuda.json
#     benchmarks/gpu.sh cpu      try every script on a CPU at a small size, and keep no results
#
# Each part has a time limit, and a part that fails does not stop the others: the parts that failed are listed last, and
# make the exit code 1. Every script writes its results when it ends.
#
# A machine with torch and torchvision may lack the other packages. Carry them as wheels, in the folder that WHEELS names
# (wheels/ by default), made on a machine with the same Python and a network:
#
#     pip download --no-deps --dest wheels pycocotools faster-coco-eval jsonargparse accelerate psutil safetensors \
#         filelock tqdm jinja2 markupsafe pyyaml huggingface_hub packaging pytest pluggy iniconfig hypothesis \
#         sortedcontainers pillow scipy matplotlib
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
device=${1:-cuda}
wheels=${WHEELS:-wheels}
failed=()

# Run a part for at most some seconds.
part() {
    local limit=$1
    shift
    echo "--- $*"
    timeout "$limit" "$@" || failed+=("$* (exit code $?)")
}

if [ -d "$wheels" ]; then
    part 60 python -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
fi
if [ "$device" = cpu ]; then
    kept=$(mktemp -d)
    cp -r benchmarks/results "$kept"
    trap 'rm -rf benchmarks/results && mv "$kept/results" benchmarks/results' EXIT
    part 120 python benchmarks/mask_tail.py --rois 4 --repeats 2
    part 120 python benchmarks/masks.py --repeats 2
    part 120 python benchmarks/matching.py --repeats 2
    part 120 python benchmarks/roi_path.py --classes 21 --repeats 2
    part 120 python benchmarks/inference_tail.py --repeats 2
    part 120 python benchmarks/profile_step.py --repeats 2 --min-size 100
else
    # The files with tests for a GPU, because collecting all tests needs packages that are not carried.
    part 120 python -m pytest -q -m cuda -p no:cacheprovider tests/masks/test_paste.py tests/masks/test_targets.py \
        tests/masks/test_transfer.py tests/detection/test_target_checks.py tests/detection/test_on_a_gpu.py \
        tests/detection/test_cuda_graphs.py
    part 40 python benchmarks/mask_tail.py --device "$device"
    part 60 python benchmarks/masks.py --device "$device"
    part 40 python benchmarks/matching.py --device "$device"
    part 60 python benchmarks/roi_path.py --device "$device" --repeats 9
    part 40 python benchmarks/inference_tail.py --device "$device" --repeats 9
    part 120 python benchmarks/profile_step.py --device "$device" --batch-sizes 2 8 --classes 91 1204 --repeats 5
fi
part 30 python benchmarks/table.py
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
