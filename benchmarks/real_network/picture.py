"""Draw the detections of a network beside the photograph, for docs/photograph.jpg.

    python -m benchmarks.real_network.picture --network network.py --image photo.jpg --output docs/photograph.jpg

The photograph of the documentation is number 261888 of COCO 2017.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

import maskloss
from benchmarks.real_network.network import read_network
from maskloss.report.pictures import draw_results

SCORE = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()

    network = read_network(arguments.network)
    model = maskloss.convert(network.build(), "aligned", paste=None).eval()
    photograph = Image.open(arguments.image).convert("RGB")
    image = to_dtype(pil_to_tensor(photograph), torch.float32, scale=True)
    with torch.inference_mode():
        (detection,) = model([image])
    kept = detection["scores"] >= SCORE
    detection = {key: value[kept] for key, value in detection.items()}
    results = maskloss.coco_results(
        model, [detection], [(photograph.height, photograph.width)], [0], network.CATEGORY_IDS
    )
    drawn = draw_results(photograph, results, dict.fromkeys(network.CATEGORY_IDS, ""))
    both = Image.new("RGB", (2 * photograph.width, photograph.height))
    both.paste(photograph, (0, 0))
    both.paste(drawn, (photograph.width, 0))
    both.save(arguments.output, quality=85)


if __name__ == "__main__":
    main()
