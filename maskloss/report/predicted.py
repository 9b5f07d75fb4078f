"""The files of `maskloss predict`: pictures, COCO results, a table of objects, cut-outs and label maps."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from maskloss.errors import RunError
from maskloss.files import make_folder, reason_of, temporary_path, write_bytes
from maskloss.report.pictures import cut_out_results, draw_results, names_for, png

#: Columns of objects.csv. Lengths are in px, areas in px².
COLUMNS = (
    "image",
    "object",
    "category",
    "score",
    "mask_score",
    "x",
    "y",
    "width",
    "height",
    "area",
    "perimeter",
)

#: Maximum length of a picture's name without suffix, in bytes; file systems allow 255 for the whole name.
_LONGEST_STEM = 200


class PredictedFiles:
    """Writer of the results of many images, which keeps none of them in memory.

    `results.json` and `objects.csv` are complete after the `with` statement, also if an image fails. Until then, they
    have temporary names.

    Args:
        folder: existing folder to write to.
        names: name of each category, by id.
        crops: whether to write a PNG of each object with a transparent background, as crops/IMAGE-OBJECT.png.
        label_maps: whether to write a 16-bit PNG for each image, as labels/IMAGE.png: 0 is background, and other
            values are the objects' numbers in objects.csv. Of overlapping objects, the one with the best score is
            shown.
    """

    def __init__(
        self, folder: Path, names: Mapping[int, str], *, crops: bool = False, label_maps: bool = False
    ) -> None:
        self.folder, self.names, self.crops, self.label_maps = folder, dict(names), crops, label_maps
        self.images = 0
        self._first = True
        self._temporary = {name: temporary_path(folder) for name in ("results.json", "objects.csv")}

    def __enter__(self) -> PredictedFiles:
        for wanted, name in ((self.crops, "crops"), (self.label_maps, "labels")):
            if wanted:
                make_folder(self.folder / name)
        with ExitStack() as opened:
            try:
                # File names that are not UTF-8 contain characters that cannot be encoded.
                self._results, self._objects = (
                    opened.enter_context(
                        path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                    )
                    for path in self._temporary.values()
                )
                self._results.write("[")
                self._table = csv.writer(self._objects)
                self._table.writerow(COLUMNS)
            except OSError as error:
                raise RunError(f"{self.folder}: cannot be written: {reason_of(error)}") from error
            opened.pop_all()  # `__exit__` closes them
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._results, self._objects:
                self._results.write("]")
            for name, path in self._temporary.items():
                if self.images:
                    path.replace(self.folder / name)
                else:
                    path.unlink()
        except OSError as failure:
            raise RunError(f"{self.folder}: cannot be written: {reason_of(failure)}") from failure

    def add(self, name: str, path: Path, image: Image.Image, results: Sequence[Mapping[str, Any]]) -> Path:
        """Write the files of an image.

        Args:
            name: file name of its picture, with the ending .png.
            path: path of the image.
            image: the image.
            results: its COCO results by descending score.

        Returns:
            Path of the picture.

        Raises:
            RunError: the disk is full, or the folder is not writable.
        """
        names = names_for(self.names, len(results))
        cuts = cut_out_results(results)
        write_bytes(self.folder / name, png(draw_results(image, results, names, cuts=cuts)))
        label_map = np.zeros((image.height, image.width), dtype=np.uint16) if self.label_maps else None
        try:
            for number, (result, cut) in enumerate(zip(results, cuts, strict=True), start=1):
                self._results.write(
                    ("" if self._first else ",\n") + json.dumps({**result, "file_name": path.name})
                )
                self._first = False
                self._table.writerow(self._row(path.name, number, result, None if cut is None else cut[0]))
            self._results.flush()
            self._objects.flush()
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {reason_of(error)}") from error
        for number, cut in reversed(list(enumerate(cuts, start=1))):
            if cut is None:
                continue
            mask, (left, top) = cut
            height, width = mask.shape
            if label_map is not None:
                label_map[top : top + height, left : left + width][mask > 0] = min(number, 65_535)
            if self.crops and mask.size:
                part = image.convert("RGB").crop((left, top, left + width, top + height))
                part.putalpha(Image.fromarray(mask * np.uint8(255)))
                write_bytes(self.folder / "crops" / f"{Path(name).stem}-{number}.png", png(part))
        if label_map is not None:
            write_bytes(self.folder / "labels" / name, png(Image.fromarray(label_map)))
        self.images += 1
        return self.folder / name

    def _row(
        self, image: str, number: int, result: Mapping[str, Any], mask: npt.NDArray[np.uint8] | None
    ) -> list[Any]:
        area: Any = ""
        length: Any = ""
        if mask is not None:
            area, length = int(mask.sum()), round(perimeter(mask), 1)
        mask_score = result.get("mask_score")
        return [
            image,
            number,
            self.names[result["category_id"]],
            round(float(result["score"]), 4),
            "" if mask_score is None else round(float(mask_score), 4),
            *(round(float(value), 2) for value in result["bbox"]),
            area,
            length,
        ]


def picture_names(images: Iterable[Path]) -> list[str]:
    """Return a different PNG file name for each image, short enough for every file system.

    Names also differ from each other on file systems that ignore case.

    Example:
        >>> picture_names([Path("a/1.jpg"), Path("b/1.jpg"), Path("b/2.tif")])
        ['1.png', '1-2.png', '2.png']
    """
    names: list[str] = []
    taken: set[str] = set()
    for image in images:
        stem = image.stem
        if len(os.fsencode(stem)) > _LONGEST_STEM:
            digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
            stem = os.fsencode(stem)[:_LONGEST_STEM].decode(errors="ignore") + f"-{digest}"
        name, number = f"{stem}.png", 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name.casefold())
        names.append(name)
    return names


def perimeter(mask: npt.NDArray[np.uint8]) -> float:
    """Estimate the length of a mask's outline, holes included, in px.

    It counts where lines in four directions enter and leave the mask, which is right on average over all directions of
    the outline: a circle has its true length, an upright square about 5 % less.

    Args:
        mask: (H, W), 0 or 1.

    Example:
        >>> y, x = np.mgrid[-50:51, -50:51]
        >>> round(perimeter((x * x + y * y <= 40**2).astype(np.uint8)) / (2 * np.pi * 40), 1)
        1.0

    Source: the Cauchy-Crofton formula.
    """
    framed = np.pad(mask.astype(bool), 1)
    straight = (framed[1:] != framed[:-1]).sum() + (framed[:, 1:] != framed[:, :-1]).sum()
    diagonal = (framed[1:, 1:] != framed[:-1, :-1]).sum() + (framed[1:, :-1] != framed[:-1, 1:]).sum()
    return float(math.pi / 8 * (straight + diagonal / math.sqrt(2)))
