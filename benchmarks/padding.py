"""Measure the padding of batches, with and without grouping by aspect ratio.

    python benchmarks/padding.py --images photos --annotations instances.json

Only the sizes of the images are read, not their pixels. Images are resized to a shorter side of 800 px and a longer
side of at most 1333 px; a batch is padded to its largest height and width, rounded up to multiples of 32.
"""

from __future__ import annotations

import argparse
import math

from maskloss.data.coco import read_coco
from maskloss.data.sampler import TrainingBatches

SHORTER, LONGER, DIVISOR, EPOCHS = 800, 1333, 32, 10


def padded_over_real(sizes: list[tuple[float, float]], groups: list[int], batch_size: int) -> float:
    """Compute the ratio of padded pixels to image pixels, over some epochs of batches."""
    padded = real = 0.0
    for batch in TrainingBatches(groups, batch_size, EPOCHS * len(sizes) // batch_size):
        chosen = [sizes[index] for index, _ in batch]
        height, width = (math.ceil(max(side) / DIVISOR) * DIVISOR for side in zip(*chosen, strict=True))
        padded += batch_size * height * width
        real += sum(h * w for h, w in chosen)
    return padded / real


def main() -> None:
    """Print a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    arguments = parser.parse_args()
    sizes, groups = [], []
    for image in read_coco(arguments.images, arguments.annotations).images:
        scale = min(SHORTER / min(image.height, image.width), LONGER / max(image.height, image.width))
        sizes.append((image.height * scale, image.width * scale))
        groups.append(int(image.width >= image.height))
    print(f"{len(sizes)} images, {sum(groups)} of them wide: padded pixels over real ones")
    for batch_size in (1, 2, 4, 8, 16):
        plain = padded_over_real(sizes, [0] * len(sizes), batch_size)
        grouped = padded_over_real(sizes, groups, batch_size)
        print(f"batch {batch_size:2d}: {plain:.2f} as they come, {grouped:.2f} in two groups")


if __name__ == "__main__":
    main()
