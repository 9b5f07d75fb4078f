"""maskloss/data/images.py: every kind of file gives upright RGB pixels or an error that names it."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image

from maskloss.data.images import has_no_end, orientation_of, read_image, read_image_size
from maskloss.errors import InputError

Pixels = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 6, 4


@pytest.fixture
def upright() -> Pixels:
    """Make an image in which no two pixels are equal, so that all its orientations differ."""
    values = np.arange(WIDTH * HEIGHT * 3, dtype=np.uint8) * 3
    return values.reshape(HEIGHT, WIDTH, 3)


def stored(upright: Pixels, orientation: int) -> Pixels:
    """The rows and columns of a file with this orientation.

    From the EXIF standard's table (CIPA DC-008, tag 274), which says on which side of the upright picture the
    file's first row and first column are: 6, for one, has its first row on the right and its first column on top.
    """
    first_row, first_column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    pixels = upright
    if "bottom" in (first_row, first_column):
        pixels = pixels[::-1]
    if "right" in (first_row, first_column):
        pixels = pixels[:, ::-1]
    return pixels if first_row in ("top", "bottom") else pixels.swapaxes(0, 1)


def save_turned(path: Path, upright: Pixels, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored(upright, orientation))).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_where_the_turned_size_is_recorded(
    tmp_path: Path, upright: Pixels, orientation: int
) -> None:
    save_turned(tmp_path / "a.png", upright, orientation)
    image = read_image(tmp_path / "a.png", (WIDTH, HEIGHT))
    assert np.array_equal(np.asarray(image), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_where_no_size_is_recorded(
    tmp_path: Path, upright: Pixels, orientation: int
) -> None:
    save_turned(tmp_path / "a.png", upright, orientation)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), upright)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_is_left_unturned_where_its_unturned_size_is_recorded(
    tmp_path: Path, upright: Pixels, orientation: int
) -> None:
    save_turned(tmp_path / "a.png", upright, orientation)
    image = read_image(tmp_path / "a.png", (HEIGHT, WIDTH))
    assert np.array_equal(np.asarray(image), stored(upright, orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_square_image_is_turned(tmp_path: Path, upright: Pixels, orientation: int) -> None:
    square = upright[:, :HEIGHT]
    save_turned(tmp_path / "a.png", square, orientation)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", (HEIGHT, HEIGHT))), square)


def test_an_orientation_outside_the_standard_is_ignored(tmp_path: Path, upright: Pixels) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    Image.fromarray(upright).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", (WIDTH, HEIGHT))), upright)


@pytest.mark.parametrize(("mode", "gray"), [("L", 77), ("LA", (77, 10)), ("1", 255)])
def test_a_gray_image_has_three_equal_channels(
    tmp_path: Path, mode: str, gray: int | tuple[int, int]
) -> None:
    Image.new(mode, (WIDTH, HEIGHT), gray).save(tmp_path / "a.png")
    value = gray if isinstance(gray, int) else gray[0]
    image = read_image(tmp_path / "a.png", (WIDTH, HEIGHT))
    assert np.array_equal(np.asarray(image), np.full((HEIGHT, WIDTH, 3), value))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_a_16_bit_image_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    # The upper byte of each value.
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert image.mode == "RGB"


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused_and_not_made_black(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((2, 3), 200, dtype=dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff: .*its pixels are 32-bit numbers"):
        read_image(tmp_path / "a.tiff")


def turned_file(path: Path) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_the_returned_image_has_the_recorded_turned_size(tmp_path: Path, suffix: str) -> None:
    assert read_image(turned_file(tmp_path / f"a.{suffix}"), (20, 30)).size == (20, 30)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_returned_image_has_the_recorded_unturned_size(tmp_path: Path, suffix: str) -> None:
    assert read_image(turned_file(tmp_path / f"a.{suffix}"), (30, 20)).size == (30, 20)


def test_a_tiff_that_pillow_turns_is_refused_where_its_unturned_size_is_recorded(tmp_path: Path) -> None:
    path = turned_file(tmp_path / "a.tiff")
    with Image.open(path) as file:
        file.load()
        if file.size == (30, 20):
            pytest.skip("this Pillow leaves TIFFs as they are")
    with pytest.raises(
        InputError, match=r"a\.tiff: 30 x 20 is recorded for the image before its EXIF orient"
    ):
        read_image(path, (30, 20))


def test_a_palette_image_has_its_palettes_colors(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([1, 0])
    image.save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[40, 50, 60], [10, 20, 30]]]


def test_a_palette_image_with_transparency_keeps_its_colors(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([1, 0])
    image.save(tmp_path / "a.gif", transparency=0)
    assert np.asarray(read_image(tmp_path / "a.gif")).tolist() == [[[40, 50, 60], [10, 20, 30]]]


def test_transparency_is_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (WIDTH, HEIGHT), (10, 20, 30, 0)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_a_cmyk_image_is_converted(tmp_path: Path) -> None:
    image = Image.new("CMYK", (3, 1))
    # No ink is white, magenta with yellow is red, and key alone is black.
    image.putdata([(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
    image.save(tmp_path / "a.tiff")
    assert np.asarray(read_image(tmp_path / "a.tiff")).tolist() == [[[255, 255, 255], [255, 0, 0], [0, 0, 0]]]


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "a.png")
    assert str(caught.value) == f"{tmp_path / 'a.png'}: the image does not exist"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_not_an_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: not a readable image: "):
        read_image(tmp_path / "a.png")


def test_a_folder_instead_of_an_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable image"):
        read_image(tmp_path)


# Pillow warns about a damaged TIFF before it raises.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"a\.{suffix}: not a readable image"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp", "gif", "bmp"])
def test_a_damaged_image_is_read_or_raises_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        for position in random.integers(0, min(len(content), 120), 4):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_image(path, (16, 16)).mode == "RGB"
        except InputError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (WIDTH + 1, HEIGHT), (WIDTH, 1)])
def test_a_recorded_size_that_differs_from_the_files_is_named(
    tmp_path: Path, upright: Pixels, size: tuple[int, int]
) -> None:
    Image.fromarray(upright).save(tmp_path / "a.png")
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "a.png", size)
    assert str(caught.value) == (
        f"{tmp_path / 'a.png'}: the file is 6 x 4, but {size[0]} x {size[1]} (width x height) is recorded for it"
    )


# Damaged files, and formats that are not supported.

SUFFIXES = ["jpg", "png", "bmp", "tiff", "webp", "gif", "ppm"]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_read_or_refused_and_raise_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise().save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for trial in range(120):
        spoilt = bytearray(whole)
        if trial % 3 == 0:
            spoilt = spoilt[: int(generator.integers(0, len(whole)))]
        for place in generator.integers(0, max(min(len(spoilt), 200), 1), 3) if spoilt else ():
            spoilt[place] = int(generator.integers(0, 256))
        path.write_bytes(bytes(spoilt))
        for read in (read_image, read_image_size):
            try:
                read(path)
            except InputError as error:
                refused += 1
                message = str(error)
                assert message.startswith(f"{path}: ")
                assert "\n" not in message
                assert len(message) < len(str(path)) + 250
    assert refused > 20


@pytest.mark.parametrize(
    "error", [OverflowError("x"), MemoryError(), KeyError("x"), RecursionError("a\nb"), EOFError()]
)
def test_any_exception_of_pillow_becomes_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "a.png"
    noise().save(path)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(InputError, match=r"a\.png: not a readable image: \S.*$"):
        read_image(path)


@pytest.mark.parametrize("kind", ["DDS", "ICNS", "TGA", "PCX", "SGI"])
def test_formats_that_photographs_do_not_use_are_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.img"
    noise().resize((32, 32)).save(path, format=kind)
    with pytest.raises(InputError, match=r"it is no JPEG, PNG, BMP, TIFF, WebP, GIF or PPM"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (
            b"\n<!DOCTYPE html><title>404",
            "HTML, SVG or other XML, such as an error message instead of the download",
        ),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; convert it to PNG or JPEG"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF; convert it to PNG or JPEG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000; convert it to PNG or JPEG"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000; convert it to PNG or JPEG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL; convert it to PNG or JPEG"),
        (b"%PDF-1.7", "PDF; convert it to PNG or JPEG"),
        (b"\0" * 128 + b"DICM\2\0", "DICOM; convert it to PNG or JPEG"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: not a readable image: it is {kind}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_supported_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise().save(path)
    assert read_image(path).size == read_image_size(path) == (31, 24)


def test_a_phones_two_pictures_in_one_jpeg_are_read_as_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise().save(path, format="MPO", save_all=True, append_images=[Image.new("RGB", (31, 24))])
    assert np.asarray(read_image(path)).std() > 10


# Orientations of TIFFs, which Pillow turns by itself.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiffs_orientation_is_applied_once(tmp_path: Path, upright: Pixels, orientation: int) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(np.ascontiguousarray(stored(upright, orientation))).save(
        path, tiffinfo={274: orientation}
    )
    assert orientation_of(path) == orientation
    assert read_image_size(path) == read_image_size(path, (WIDTH, HEIGHT)) == (WIDTH, HEIGHT)
    for size in (None, (WIDTH, HEIGHT)):
        assert np.array_equal(np.asarray(read_image(path, size)), upright)


# TIFFs that Pillow does not write.


def write_tiff(
    path: Path, pixels: bytes, *, bits: int, zero_is_white: bool = False, bands: int = 1, sign: int = 1
) -> Path:
    """Write an uncompressed TIFF of 4 x 2 pixels, as the TIFF 6.0 specification has it in section 2 and 4."""
    fields = [(256, 4), (257, 2), (258, bits), (259, 1), (262, 0 if zero_is_white else 1), (273, 0), (277, bands),
              (278, 2), (279, len(pixels)), (339, sign)]  # fmt: skip
    end = 8 + 2 + 12 * len(fields) + 4
    many = struct.pack(f"<{bands}H", *[bits] * bands) if bands > 2 else b""
    directory = b""
    for tag, value in fields:
        if tag == 258 and many:
            directory += struct.pack("<HHII", tag, 3, bands, end)
        else:
            directory += struct.pack("<HHII", tag, 4, 1, end + len(many) if tag == 273 else value)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4) + many + pixels)
    return path


@pytest.mark.parametrize("zero_is_white", [False, True])
@pytest.mark.parametrize("value", [0, 0x12FF, 60000, 0xFFFF])
def test_16_bit_gray_of_a_tiff_whose_zero_is_white_is_inverted(
    tmp_path: Path, value: int, zero_is_white: bool
) -> None:
    path = write_tiff(
        tmp_path / "a.tif", struct.pack("<8H", *[value] * 8), bits=16, zero_is_white=zero_is_white
    )
    gray = value >> 8  # the upper byte
    assert set(np.asarray(read_image(path)).flat) == {255 - gray if zero_is_white else gray}


@pytest.mark.parametrize("zero_is_white", [False, True])
def test_8_bit_gray_of_a_tiff_whose_zero_is_white_is_inverted(tmp_path: Path, zero_is_white: bool) -> None:
    path = write_tiff(tmp_path / "a.tif", bytes([7] * 8), bits=8, zero_is_white=zero_is_white)
    assert set(np.asarray(read_image(path)).flat) == {248 if zero_is_white else 7}


@pytest.mark.parametrize(("pattern", "gray"), [(b"\xff\xff\xff", 255), (b"\x80\x08\x00", 128), (bytes(3), 0)])
def test_12_bit_gray_is_scaled(tmp_path: Path, pattern: bytes, gray: int) -> None:
    # Two samples of 12 bits in three bytes; 0x800 is half of the range.
    path = write_tiff(tmp_path / "a.tif", pattern * 4, bits=12)
    assert set(np.asarray(read_image(path)).flat) == {gray}


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_pixels_are_refused(tmp_path: Path, bits: int) -> None:
    path = write_tiff(tmp_path / "a.tif", bytes(bits), bits=bits, sign=2)
    with pytest.raises(
        InputError, match=r"a\.tif: .*its pixels are signed numbers; save it with 8 or 16 bits"
    ):
        read_image(path)


@pytest.mark.parametrize(("bands", "bits"), [(8, 8), (8, 16), (5, 32), (1, 24)])
def test_a_tiff_that_cannot_be_decoded_is_described_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], bands: int, bits: int
) -> None:
    path = write_tiff(tmp_path / "a.tif", bytes(bands * bits), bits=bits, bands=bands)
    for read in (read_image, read_image_size):
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}: not a readable image: a TIFF of {bands} band{'s' if bands > 1 else ''} of {bits} bits, which "
            "cannot be decoded; convert it to 8-bit RGB"
        )
    assert capfd.readouterr() == ("", "")


def test_an_image_of_too_many_pixels_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    with pytest.raises(
        InputError, match=r"it has 5,000 pixels, and at most 2,000 are read; cut it into tiles"
    ):
        read_image(tmp_path / "a.png")


# JPEGs without an end.


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    noise().resize((200, 150)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_jpeg_without_an_end_is_found(tmp_path: Path) -> None:
    whole = jpeg_bytes()
    # A camera's thumbnail is a JPEG in a segment before the image; APP15 is not read by Pillow.
    thumbnail = b"\xff\xef" + struct.pack(">H", len(whole) + 2) + whole
    for beginning in (b"", thumbnail):
        content = whole[:2] + beginning + whole[2:]
        half = len(content) - len(whole) // 2
        for name, written, ends in (
            ("whole", content, True),
            ("trailer", content + b"\xff\xda" + bytes(99), True),
            ("zeros", content[:half] + bytes(len(whole) // 2), False),
            ("cut", content[:-2], False),
        ):
            (tmp_path / name).write_bytes(written)
            assert has_no_end(tmp_path / name) is not ends, name
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert not has_no_end(tmp_path / "a.png")
