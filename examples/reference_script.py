"""Run torchvision's reference script for detection with another loss, without changing it.

    git clone https://github.com/pytorch/vision
    python examples/reference_script.py vision/references/detection/train.py --loss aligned \
        --dataset coco --data-path coco --model maskrcnn_resnet50_fpn --epochs 26

All other options are passed to the reference script.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import torchvision

import maskloss

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("script", type=Path, help="train.py of torchvision's references/detection")
parser.add_argument("--loss", default="torchvision", help="a preset of maskloss")
arguments, options = parser.parse_known_args()

build = torchvision.models.get_model


def get_model(name: str, **settings: Any) -> Any:
    """Build a model as torchvision does, and convert it."""
    return maskloss.convert(build(name, **settings), arguments.loss)  # the one line


torchvision.models.get_model = get_model
# The script imports modules beside it, and reads its options from the command line.
sys.path.insert(0, str(arguments.script.parent))
sys.argv = [str(arguments.script), *options]
runpy.run_path(str(arguments.script), run_name="__main__")
