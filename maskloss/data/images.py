"""Reading image files of any mode and EXIF orientation, with a check of their size against the annotations."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Pillow loads only its most common format plugins by itself; importing those of TIFF and WebP registers them too.
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from maskloss.errors import InputError

#: Formats that Pillow may open. Its other decoders are for formats that photographs do not use, and some of them fail
#: in unusual ways on damaged files.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as RGB, upright: JPEG, PNG, BMP, TIFF, WebP, GIF (the first frame) or PPM.

    Gray, palette, CMYK and 16-bit files are converted; transparency is dropped. 32-bit pixels are refused, because
    their range is unknown.

    Args:
        path: Path of the file.
        size: (width, height) in px that the annotations refer to. If the file has an EXIF orientation and only the
            unturned size equals `size`, the annotations were made on the unturned image, so it is not turned.

    Raises:
        InputError: The file is missing, truncated or not an image, its size differs from `size`, or its pixels are
            32-bit numbers.
    """
    path = Path(path)
    with _open_image(path) as file:
        return _to_rgb(_load_upright(file, path, size), file.format)


def read_image_size(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Read the width and height in px of an upright image from the header of its file.

    Args:
        path: Path of the file.
        size: (width, height) in px that the annotations refer to; see `read_image`.

    Raises:
        InputError: The file is missing or not an image.
    """
    with _open_image(Path(path)) as file:
        return file.size if file.size == size else _turned_size(file)


def is_turned_unseen(path: str | os.PathLike[str]) -> bool:
    """Return whether an image has an EXIF orientation that turns or mirrors it without changing its size.

    Raises:
        InputError: The file is missing or not an image.
    """
    with _open_image(Path(path)) as file:
        orientation = _orientation(file)
        return orientation in (2, 3, 4) or (orientation in _SWAPPING and file.width == file.height)


@contextlib.contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open a file with Pillow, and raise any exception from opening or decoding it as an InputError.

    Pillow's decoders raise many kinds of exceptions on damaged files, including those of struct and zlib.
    """
    try:
        # Pillow's warnings are redundant: files that cannot be read raise an error anyway, and the others are fine.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as file:
                yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: the image does not exist") from None
    except Exception as error:
        raise InputError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            return "not a readable image but a Git LFS pointer: run `git lfs pull`"
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image: it is no JPEG, PNG, BMP, TIFF, WebP, GIF or PPM, or its beginning is damaged"
    says = " ".join(str(error).split()) or type(error).__name__
    return f"not a readable image: {says[:150]}"


def _load_upright(file: Image.Image, path: Path, size: tuple[int, int] | None) -> Image.Image:
    """Decode an image and apply its EXIF orientation, unless the annotations were made on the unturned image."""
    turned = _turned_size(file)
    as_stored = size is not None and turned != size and file.size == size
    if size is not None and turned != size and not as_stored:
        raise InputError(
            f"{path}: the file is {turned[0]} x {turned[1]}, but {size[0]} x {size[1]} (width x height) "
            "is recorded for it"
        )
    file.load()
    image = file if as_stored else ImageOps.exif_transpose(file)
    if size is not None and image.size != size:
        # Pillow turns TIFFs while loading them, so the unturned image is not available.
        raise InputError(
            f"{path}: {size[0]} x {size[1]} is recorded for the image before its EXIF orientation is applied; save it "
            "without one"
        )
    return image


def _turned_size(file: Image.Image) -> tuple[int, int]:
    """Return the image's size after its EXIF orientation is applied."""
    width, height = file.size
    return (height, width) if _orientation(file) in _SWAPPING else (width, height)


#: EXIF orientations that swap width and height.
_SWAPPING = (5, 6, 7, 8)


def _orientation(file: Image.Image) -> int:
    orientation: int = file.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):
        raise ValueError("its pixels are 32-bit numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        # PIL clips 16-bit gray to 255 instead of scaling it.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return image.convert("RGB")
