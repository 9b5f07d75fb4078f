"""Reading image files of any mode and EXIF orientation, with a check of their size against the annotations."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Pillow loads only its most common format plugins by itself; importing those of TIFF and WebP registers them too.
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from maskloss.errors import InputError

#: Formats that Pillow may open. Its other decoders are for formats that photographs do not use, and some of them fail
#: in unusual ways on damaged files.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")

# Pillow logs why it cannot open a TIFF; without a handler, Python prints that to stderr. The error says it too.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Tags of TIFF files.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _BANDS, _SAMPLE_FORMAT = 256, 257, 258, 262, 277, 339
_SIGNED = 2
#: Marker of a JPEG after which the image itself follows.
_START_OF_SCAN = 0xDA


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as RGB, upright: JPEG, PNG, BMP, TIFF, WebP, GIF (the first frame) or PPM.

    Gray, palette, CMYK, 12-bit and 16-bit files are converted; transparency is dropped. Pixels that are signed or have
    32 bits are refused, because their range is unknown.

    Args:
        path: path of the file.
        size: (width, height) in px that the annotations refer to. If the file has an EXIF orientation and only the
            stored size equals `size`, the annotations were made on the stored image, so it is not rotated.

    Raises:
        InputError: the file is missing, truncated or not an image, its size differs from `size`, or its pixels are
            signed or 32-bit numbers.
    """
    path = Path(path)
    with _open_image(path) as file:
        tags = _Tags.of(file)
        return _to_rgb(_load_upright(file, path, size), file.format, tags)


def read_image_size(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Read the width and height in px of an upright image from the header of its file.

    Args:
        path: path of the file.
        size: (width, height) in px that the annotations refer to; see `read_image`.

    Raises:
        InputError: the file is missing or not an image.
    """
    with _open_image(Path(path)) as file:
        return size if size is not None and _stored_size(file) == size else _turned_size(file)


def orientation_of(path: str | os.PathLike[str]) -> int:
    """Return the EXIF orientation of an image, 1 without one.

    Raises:
        InputError: the file is missing or not an image.
    """
    with _open_image(Path(path)) as file:
        found = _orientation(file)
        return found if found in range(1, 9) else 1


def has_no_end(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a JPEG without an end marker, so that a part of the image may be missing."""
    with open(path, "rb") as file:
        content = file.read(2)
        if content != b"\xff\xd8":
            return False
        content += file.read()
    position = 2
    # Skip the segments before the image, which may hold a thumbnail with an end of its own.
    while content[position : position + 1] == b"\xff":
        marker, length = content[position + 1], content[position + 2 : position + 4]
        if marker == _START_OF_SCAN:
            return b"\xff\xd9" not in content[position:]
        position += 1 if marker == 0xFF else 2 + int.from_bytes(length, "big")
    return False


def is_turned_unseen(path: str | os.PathLike[str]) -> bool:
    """Return whether an image has an EXIF orientation that rotates or mirrors it without changing its size.

    Raises:
        InputError: the file is missing or not an image.
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
    beginning = b"?"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        beginning = file.read(132)
    if beginning.startswith(b"version https://git-lfs"):
        return "not a readable image but a Git LFS pointer: run `git lfs pull`"
    if isinstance(error, UnidentifiedImageError):
        kind = _other_format(beginning)
        if kind is not None:
            return f"not a readable image: it is {kind}"
        tiff = _describe_tiff(path)
        if tiff is not None:
            return f"not a readable image: {tiff}, which cannot be decoded; convert it to 8-bit RGB"
        return "not a readable image: it is no JPEG, PNG, BMP, TIFF, WebP, GIF or PPM, or its beginning is damaged"
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        return (
            f"not a readable image: it has {int(pixels[0]) if pixels else 0:,} pixels, and at most "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,} are read; cut it into tiles or shrink it, with its annotations"
        )
    says = " ".join(str(error).split()) or type(error).__name__
    return f"not a readable image: {says[:150]}"


def _other_format(beginning: bytes) -> str | None:
    """Return what a file is that Pillow does not open, judged by its first 132 bytes, or None if unknown."""
    if not beginning:
        return "empty"
    if beginning.lstrip().startswith(b"<"):
        return "HTML, SVG or other XML, such as an error message instead of the download"
    brand = beginning[8:12] if beginning[4:8] == b"ftyp" else b""
    kinds = {
        "AVIF": brand in (b"avif", b"avis"),
        "HEIC": brand in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1"),
        "JPEG 2000": beginning.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
        "JPEG XL": beginning.startswith((b"\0\0\0\x0cJXL ", b"\xff\x0a")),
        "PDF": beginning.startswith(b"%PDF"),
        "DICOM": beginning[128:] == b"DICM",
    }
    return next((f"{kind}; convert it to PNG or JPEG" for kind, found in kinds.items() if found), None)


def _load_upright(file: Image.Image, path: Path, size: tuple[int, int] | None) -> Image.Image:
    """Decode an image and apply its EXIF orientation, unless the annotations were made on the stored image."""
    turned = _turned_size(file)
    as_stored = size is not None and turned != size and _stored_size(file) == size
    if size is not None and turned != size and not as_stored:
        raise InputError(
            f"{path}: the file is {turned[0]} x {turned[1]}, but {size[0]} x {size[1]} (width x height) "
            "is recorded for it"
        )
    file.load()
    image = file if as_stored else ImageOps.exif_transpose(file)
    if size is not None and image.size != size:
        # Pillow rotates TIFFs while loading them, so the stored image is not available.
        raise InputError(
            f"{path}: {size[0]} x {size[1]} is recorded for the image before its EXIF orientation is applied; save it "
            "without one"
        )
    return image


def _describe_tiff(path: str | os.PathLike[str]) -> str | None:
    """Return the bands and bits of a TIFF, or None for other files and for those whose header is damaged."""
    # A file may be damaged anywhere, and Pillow raises many kinds of exceptions then.
    with contextlib.suppress(Exception), warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")
        header = file.read(8)
        if header[:4] not in (b"II*\0", b"MM\0*"):
            return None
        file.seek(struct.unpack("<I" if header[:1] == b"I" else ">I", header[4:])[0])
        directory = TiffImagePlugin.ImageFileDirectory_v2(header)
        directory.load(file)
        bands, bits = int(directory.get(_BANDS, 1)), directory.get(_BITS, (1,))
        kind = "signed " if directory.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED else ""
        if bands >= 1 and bits[0] >= 1:
            return f"a TIFF of {bands} band{'s' if bands > 1 else ''} of {kind}{bits[0]} bits"
    return None


@dataclass(frozen=True)
class _Tags:
    """What a TIFF's header says about its pixels, and Pillow does not apply.

    Attributes:
        bits: bits of a sample.
        signed: whether samples are signed.
        inverted: whether 0 is white.
    """

    bits: int = 16
    signed: bool = False
    inverted: bool = False

    @classmethod
    def of(cls, file: Image.Image) -> _Tags:
        if not isinstance(file, TiffImagePlugin.TiffImageFile):
            return cls()
        tags = file.tag_v2
        bits = int(tags.get(_BITS, (1,))[0])
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
        return cls(bits, signed, tags.get(_PHOTOMETRIC) == 0)


def _stored_size(file: Image.Image) -> tuple[int, int]:
    """Return the image's size in its file; Pillow swaps that of a rotated TIFF already when it opens the file."""
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        stored = file.tag_v2.get(_WIDTH), file.tag_v2.get(_HEIGHT)
        return file.size[::-1] if stored == file.size[::-1] else file.size
    return file.size


def _turned_size(file: Image.Image) -> tuple[int, int]:
    """Return the image's size after its EXIF orientation is applied."""
    width, height = _stored_size(file)
    return (height, width) if _orientation(file) in _SWAPPING else (width, height)


#: EXIF orientations that swap width and height.
_SWAPPING = (5, 6, 7, 8)


def _orientation(file: Image.Image) -> int:
    orientation: int = file.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _to_rgb(image: Image.Image, file_format: str | None, tags: _Tags) -> Image.Image:
    if tags.signed and tags.bits <= 16:
        raise ValueError("its pixels are signed numbers; save it with 8 or 16 bits without a sign")
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):
        raise ValueError("its pixels are 32-bit numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        # PIL clips 16-bit gray to 255 instead of scaling it.
        image = image.convert("I").point(lambda value: value / 2 ** (tags.bits - 8)).convert("L")
        if tags.inverted:  # for 8 bits and less, Pillow does it
            image = ImageOps.invert(image)
    return image.convert("RGB")
