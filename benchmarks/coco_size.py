"""Time and memory to read an annotation file of the size of COCO train2017, and memory of data loader workers.

    python benchmarks/coco_size.py [--images 118287] [--workers 2]

Writes an annotation file with that many images to a temporary folder, with the numbers of annotations, polygons and
coordinates per image of COCO: about 405 MiB at full size, removed at the end. The images are empty files, because
only targets are read. Reads the file in a separate process, iterates over all targets with a data loader, and prints
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

#: Statistics of train2017: 860,001 annotations in 118,287 images; 1.2 % crowds; 1.14 polygons per object, most with 10
#: to 70 points.
_ANNOTATIONS_PER_IMAGE = 860_001 / 118_287
_CROWDS = 0.0118


def write_file(folder: Path, images: int) -> Path:
    """Write images/ with empty files, and annotations.json; return the path of the latter."""
    generator = random.Random(0)
    (folder / "images").mkdir()
    path = folder / "annotations.json"
    identity = 0
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for image in range(images):
            name = f"{image:012d}.jpg"
            (folder / "images" / name).touch()
            entry = {
                "license": 3,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
                "id": image,
            }
            file.write((", " if image else "") + json.dumps(entry))
        file.write('], "annotations": [')
        annotations = round(images * _ANNOTATIONS_PER_IMAGE)
        for identity in range(annotations):
            file.write((", " if identity else "") + json.dumps(_annotation(generator, identity, images)))
        categories = [{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def _annotation(generator: random.Random, identity: int, images: int) -> dict[str, Any]:
    x, y = generator.uniform(0, 400), generator.uniform(0, 300)
    width, height = generator.uniform(5, 240), generator.uniform(5, 180)
    annotation: dict[str, Any] = {"area": round(0.6 * width * height, 5), "iscrowd": 0}
    if generator.random() < _CROWDS:
        runs, left = [], 640 * 480
        for _ in range(200):
            runs.append(generator.randint(1, left // 400))
            left -= runs[-1]
        annotation |= {"segmentation": {"counts": [*runs, left], "size": [480, 640]}, "iscrowd": 1}
    else:
        polygons = []
        for _ in range(1 + (generator.random() < 0.1) + (generator.random() < 0.03)):
            points = max(3, min(int(generator.lognormvariate(2.72, 0.75)), 400))
            polygons.append(
                [
                    round(corner + generator.random() * side, 2)
                    for _ in range(points)
                    for corner, side in ((x, width), (y, height))
                ]
            )
        annotation["segmentation"] = polygons
    return annotation | {
        "image_id": generator.randrange(images),
        "bbox": [round(x, 2), round(y, 2), round(width, 2), round(height, 2)],
        "category_id": generator.randint(1, 80),
        "id": identity + 1,
    }


def memory(field: str) -> float:
    """Return this process's memory in MiB: "Pss", or "Private_Dirty", which is not shared with other processes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Targets:
    """Targets of a data set without its images, each with the private memory of the worker."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, float]:
        _, target = self.dataset[index]
        own = memory("Private_Dirty") if index % 100 == 0 else 0.0
        return os.getpid(), len(target["boxes"]), own


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Read the file, iterate over its targets, and return the time and memory."""
    from torch.utils.data import DataLoader

    from maskloss.data import dataset
    from maskloss.data.coco import read_coco

    pixel = Image.new("RGB", (1, 1))
    dataset.read_image = lambda path, size: pixel  # type: ignore[assignment]

    before = memory("Pss")
    start = time.process_time()
    data = read_coco(folder / "images", folder / "annotations.json")
    seconds = time.process_time() - start
    result = {
        "images": len(data.images),
        "annotations": len(data.records.ids),
        "file_MiB": round((folder / "annotations.json").stat().st_size / 2**20),
        "cpu_seconds": round(seconds, 1),
        "kept_MiB": round(memory("Pss") - before),
        "arrays_MiB": round(data.records.nbytes / 2**20),
    }
    loader = DataLoader(
        Targets(dataset.CocoDataset(data)),  # type: ignore[arg-type]
        batch_size=50,
        num_workers=workers,
        collate_fn=list,
        shuffle=True,
    )
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    objects = 0
    for batch in loader:
        for process, count, own in batch:
            objects += count
            if own:
                first.setdefault(process, own)
                last[process] = max(last.get(process, 0.0), own)
    growth = max((last[process] - first[process] for process in first), default=0.0)
    return result | {
        "objects": objects,
        "worker_own_MiB": round(max(last.values(), default=0.0)),
        "worker_growth_MiB": round(growth),
    }


def main() -> None:
    """Write the file, measure reading it in a separate process, and remove it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(measure(Path(arguments.folder), arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder), arguments.images)
        command = [sys.executable, __file__, "--folder", folder, "--workers", str(arguments.workers)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
