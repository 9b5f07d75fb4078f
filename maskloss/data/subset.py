"""Subsets of a data set, with some of its images or categories."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloss.data.coco import CocoData, Content, read_coco, read_content
from maskloss.data.findings import Findings
from maskloss.data.reading.formats import listed
from maskloss.errors import InputError
from maskloss.files import check_unused, copy_file, make_folder, read_bytes, write_text


def write_subset(
    image_folder: str,
    annotation_file: str,
    output: str,
    *,
    images_per_class: int | None = None,
    max_images: int | None = None,
    fraction: float | None = None,
    rest: str | None = None,
    categories: Sequence[str] | None = None,
) -> CocoData:
    """Copy some images and their annotations into `output`, as `images/` and `annotations.json`.

    Images are taken in the file's order; with `fraction`, they are stratified by category. The same call gives the same
    subset. Annotations are copied unchanged.

    Args:
        image_folder: image folder of the whole data set.
        annotation_file: annotation file of the whole data set.
        output: a new or empty folder.
        images_per_class: take images until each category is in this number of images, or in all of its images if it
            has fewer.
        max_images: take at most this number of images.
        fraction: take this share of the images, above 0 and below 1, and of the images of each category.
        rest: a new or empty folder for the remaining images; only with `fraction`.
        categories: names of the categories to copy, all that have one of these names; a name with commas may be split
            at its commas. Only images with at least one object of these categories are copied.

    Returns:
        The subset, read from the new files.

    Raises:
        InputError: the whole data set has errors, a category is unknown, no image is left, a part would be refused as a
            set of its own, the options contradict each other, or a folder is not empty. Nothing is written then.
    """
    data = read_coco(image_folder, annotation_file)
    _check_options(images_per_class, max_images, fraction, output, rest, categories)
    kept_categories = _category_ids(data, categories)
    if fraction is None:
        chosen = _choose_images(data, kept_categories, images_per_class, max_images, categories is not None)
        others: set[int] = set()
    else:
        chosen, others = stratified(data, kept_categories, fraction, objects_only=categories is not None)
    if not chosen:
        raise InputError(f"{annotation_file}: no image has an object of these categories")
    if rest is not None and not others:
        raise InputError(
            f"{annotation_file}: --fraction {fraction:g} of {len(chosen)} images leaves none for --rest"
        )
    parts = [(Path(output), chosen), *([(Path(rest), others)] if rest is not None else [])]
    for folder, _ in parts:
        check_unused(folder)
    document = json.loads(read_bytes(data.annotation_file))
    listed(document)
    documents = [part_of(document, images, kept_categories) for _, images in parts]
    texts = [_encode_part(data, part, folder) for part, (folder, _) in zip(documents, parts, strict=True)]
    for text, (folder, images) in zip(texts, parts, strict=True):
        _write_part(data, text, folder, images)
    return read_coco(Path(output) / "images", Path(output) / "annotations.json")


def _check_options(
    images_per_class: int | None,
    max_images: int | None,
    fraction: float | None,
    output: str,
    rest: str | None,
    categories: Sequence[str] | None,
) -> None:
    if images_per_class is None and max_images is None and categories is None and fraction is None:
        raise InputError(
            "give --images-per-class, --max-images, --fraction or --categories; otherwise the subset is the whole set"
        )
    for name, value in (("images-per-class", images_per_class), ("max-images", max_images)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
        if value is not None and fraction is not None:
            raise InputError(f"--fraction and --{name} each say how many images to take; give one of them")
    if fraction is not None and not 0 < fraction < 1:
        raise InputError(f"--fraction must be above 0 and below 1, got {fraction:g}")
    if rest is None:
        return
    if fraction is None:
        raise InputError("--rest takes what --fraction leaves; give --fraction too")
    one, other = Path(output).resolve(), Path(rest).resolve()
    if one == other or one in other.parents or other in one.parents:
        raise InputError(
            f"--rest {rest} and --output {output}: one contains the other; name separate folders"
        )


def _encode_part(data: CocoData, part: dict[str, Any], folder: Path) -> str:
    """Encode the annotation file of a part as JSON.

    Raises:
        InputError: the part would be refused as a set of its own, for example because all of its annotations are
            crowds.
    """
    findings = Findings()
    read_content(Content.of_document(part), data.annotation_file, data.image_folder, None, findings)
    errors = [problem for problem in findings.problems(str(folder)) if problem.error]
    if errors:
        raise InputError(f"{data.annotation_file}: nothing is written: {errors[0].shortened(200)}")
    try:
        return json.dumps(part)
    except RecursionError:
        raise InputError(f"{data.annotation_file}: is nested too deeply to be written") from None


def _write_part(data: CocoData, text: str, folder: Path, chosen: set[int]) -> None:
    """Write a folder with the images of the given ids and an annotation file."""
    make_folder(folder / "images")
    for image in data.images:
        if image.id in chosen:
            destination = folder / "images" / image.file_name
            make_folder(destination.parent)
            copy_file(data.image_path(image), destination)
    # Written last, so that a folder that has an annotation file is complete.
    write_text(folder / "annotations.json", text)


def part_of(document: dict[str, Any], images: set[int], categories: set[int]) -> dict[str, Any]:
    """Return the part of a COCO document with the given images and categories, by their ids."""
    return {
        **document,
        "images": [image for image in document["images"] if image["id"] in images],
        "annotations": [
            annotation
            for annotation in document["annotations"]
            if annotation["image_id"] in images and annotation["category_id"] in categories
        ],
        "categories": [c for c in document["categories"] if c["id"] in categories],
    }


def stratified(
    data: CocoData, categories: set[int], fraction: float, *, objects_only: bool = False
) -> tuple[set[int], set[int]]:
    """Split the images into two parts, so that each part has its share of every category's images.

    The category with the fewest remaining images is distributed first. Each of its images goes to the part that lacks
    most images of the category. So the image of a category with one image goes to the larger part.

    Args:
        data: the images.
        categories: ids of the categories.
        fraction: share of the first part, above 0 and below 1.
        objects_only: leave out images without an object of these categories.

    Returns:
        The ids of the images of both parts.

    Source: Sechidis et al., On the stratification of multi-label data, 2011, algorithm 1.
    """
    present = {
        image.id: frozenset({a.category_id for a in image.annotations if not a.crowd} & categories)
        for image in data.images
    }
    left = {image: found for image, found in present.items() if found or not objects_only}
    shares = (fraction, 1 - fraction)
    counts = Counter(category for found in left.values() for category in found)
    wanted = [{category: share * count for category, count in counts.items()} for share in shares]
    room = [share * len(left) for share in shares]
    parts: tuple[set[int], set[int]] = (set(), set())

    def assign(image: int, part: int) -> None:
        parts[part].add(image)
        room[part] -= 1
        for category in left.pop(image):
            wanted[part][category] -= 1
            counts[category] -= 1

    while any(counts.values()):
        rarest = min((category for category in counts if counts[category] > 0), key=lambda c: (counts[c], c))
        for image in [image for image, found in left.items() if rarest in found]:
            assign(image, max((0, 1), key=lambda part: (wanted[part][rarest], room[part])))
    for image in list(left):
        assign(image, max((0, 1), key=lambda part: room[part]))
    return parts


def _category_ids(data: CocoData, names: Sequence[str] | None) -> set[int]:
    if names is None:
        return {category.id for category in data.categories}
    by_name: dict[str, set[int]] = {}
    for category in data.categories:
        by_name.setdefault(_plain(category.name), set()).add(category.id)
    found: set[int] = set()
    unknown = []
    first = 0
    while first < len(names):
        # A name with commas comes in several parts from the command line.
        ends = range(len(names), first, -1)
        end = next((e for e in ends if _plain(",".join(names[first:e])) in by_name), None)
        if end is None:
            unknown.append(names[first])
        found |= by_name[_plain(",".join(names[first:end]))] if end is not None else set()
        first = end or first + 1
    if unknown:
        raise InputError(f"{data.annotation_file}: no category is named {', '.join(map(repr, unknown))}")
    return found


def _plain(name: str) -> str:
    """Return a category's name without the spaces around it and around its commas."""
    return ",".join(part.strip() for part in name.split(","))


def _choose_images(
    data: CocoData,
    categories: set[int],
    images_per_class: int | None,
    max_images: int | None,
    objects_only: bool,
) -> set[int]:
    taken: list[int] = []
    images_of: Counter[int] = Counter()
    for image in data.images:
        if max_images is not None and len(taken) == max_images:
            break
        present = {a.category_id for a in image.annotations if not a.crowd} & categories
        if objects_only and not present:
            continue
        if images_per_class is not None and all(images_of[c] >= images_per_class for c in present):
            continue
        images_of.update(present)
        taken.append(image.id)
    return set(taken)
