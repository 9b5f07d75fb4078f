"""Predict a large image by tiles with SAHI. `maskloss predict --tile` does the same without SAHI.

python examples/sahi_tiles.py --checkpoint runs/first --image large.jpg --tile 512
"""

from __future__ import annotations

import argparse

from sahi.models.torchvision import TorchVisionDetectionModel
from sahi.predict import get_sliced_prediction

import maskloss
from maskloss.training.model_file import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", required=True, help="a run's folder, or a model file")
parser.add_argument("--image", required=True)
parser.add_argument("--tile", type=int, default=512)
parser.add_argument("--score-threshold", type=float, default=0.5)
arguments = parser.parse_args()

loaded = load_model(arguments.checkpoint)
# SAHI expects masks of the whole tile, but the loaded model leaves masks unpasted.
model = maskloss.convert(loaded.model, loaded.model.roi_heads.loss, paste="matched")
names = {str(label): category.name for label, category in enumerate(loaded.description.categories, start=1)}

detector = TorchVisionDetectionModel(
    model=model,
    category_mapping={"0": "background", **names},
    confidence_threshold=arguments.score_threshold,
    device="cpu",
)
result = get_sliced_prediction(
    arguments.image, detector, slice_height=arguments.tile, slice_width=arguments.tile, verbose=0
)
for found in result.object_prediction_list:
    print(f"{found.category.name} {found.score.value:.2f}: {found.mask.bool_mask.sum()} px")
