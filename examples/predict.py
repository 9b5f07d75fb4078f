"""Predict with a trained model from Python: COCO results of an image, and the masks as a tensor.

python examples/predict.py --checkpoint runs/first --image photo.jpg
"""

from __future__ import annotations

import argparse
import json

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

import maskloss
from maskloss.training.model_file import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", required=True, help="a run's folder, or a model file")
parser.add_argument("--image", required=True)
parser.add_argument("--score-threshold", type=float, default=0.5)
arguments = parser.parse_args()

loaded = load_model(arguments.checkpoint)  # in evaluation mode; it leaves masks unpasted
names = {label: category.name for label, category in enumerate(loaded.description.categories, start=1)}
image = to_dtype(pil_to_tensor(Image.open(arguments.image).convert("RGB")), torch.float32, scale=True)
size = (image.shape[-2], image.shape[-1])

with torch.inference_mode():
    (detection,) = loaded.model([image])
kept = detection["scores"] >= arguments.score_threshold
detection = {key: value[kept] for key, value in detection.items()}

# As bitmaps (D, H, W), for anything that works on pixels.
offset = maskloss.mask_offset(loaded.model, size)
masks = maskloss.paste_masks(detection["masks"][:, 0], detection["boxes"], size, offset=offset)
for label, score, mask in zip(detection["labels"].tolist(), detection["scores"].tolist(), masks, strict=True):
    print(f"{names[label]} {score:.2f}: {int(mask.sum())} px")

# As COCO results with RLE masks, without making bitmaps.
ids = [category.id for category in loaded.description.categories]
results = maskloss.coco_results(loaded.model, [detection], [size], image_ids=[1], category_ids=ids)
print(json.dumps(results[:1]))
