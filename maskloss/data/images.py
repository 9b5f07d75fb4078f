"""Reading image files: any mode, any EXIF orientation, checked against the size that the annotations mean."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Of the plugins Pillow knows the first when it is imported, and these when they are.
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from maskloss.errors import InputError

#: What Pillow may open. Its other decoders are for formats that no photograph comes in, and damaged files have made
#: some of them fail in ways of their own.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as RGB, upright: JPEG, PNG, BMP, TIFF, WebP, GIF (its first picture) or PPM.

    Gray, palette, CMYK and 16-bit files are converted; transparency is dropped. Pixels that are 32-bit numbers have no
    range that is known, so they are refused.

    Args:
        path: of the file.
        size: (width, height) in px that the annotations were made in. Where the file has an EXIF orientation
            and only the unturned size agrees, the annotations were made on the unturned image, so it is left.

    Raises:
        InputError: the file is missing, is no image or is truncated, its size is another, or its pixels are 32-bit
            numbers.
    """
    path = Path(path)
    with _opened(path) as file:
        return _to_rgb(_upright(file, path, size), file.format)


def read_image_size(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Read an image's width and height in px, upright, from the header of its file.

    Args:
        path: of the file.
        size: (width, height) that the annotations were made in; see `read_image`.

    Raises:
        InputError: the file is missing or is no image.
    """
    with _opened(Path(path)) as file:
        return file.size if file.size == size else _turned_size(file)


def is_turned_unseen(path: str | os.PathLike[str]) -> bool:
    """Say whether an image has an EXIF orientation that leaves its size as it is.

    Raises:
        InputError: the file is missing or is no image.
    """
    with _opened(Path(path)) as file:
        orientation = _orientation(file)
        return orientation in (2, 3, 4) or (orientation in _SWAPPING and file.width == file.height)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a file with Pillow, and raise InputError whatever it raises then.

    Pillow's decoders raise many kinds of errors on damaged files, such as those of struct and zlib.
    """
    try:
        # Of what Pillow warns, a file that cannot be read is told by an error, and the rest reads well.
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


def _upright(file: Image.Image, path: Path, size: tuple[int, int] | None) -> Image.Image:
    """Decode an image, turned as its EXIF orientation says unless the annotations were made on it unturned."""
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
        # Pillow turns TIFFs by itself.
        raise InputError(
            f"{path}: {size[0]} x {size[1]} is recorded for the image before its EXIF orientation is applied; save it "
            "without one"
        )
    return image


def _turned_size(file: Image.Image) -> tuple[int, int]:
    """The size once the EXIF orientation is applied."""
    width, height = file.size
    return (height, width) if _orientation(file) in _SWAPPING else (width, height)


#: EXIF orientations that swap the sides.
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
