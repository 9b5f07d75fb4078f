"""`EncodedMasks`: COCO's polygons and RLEs instead of bitmaps."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskloss import EncodedMasks, mask_targets
from maskloss.masks.encoded import are_canonical, checked_rle, decode_counts, encode_counts, polygon_area

SQUARE = [1.0, 1.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0]  # pixels 1 to 3 of both axes
TRIANGLE = [0.0, 0.0, 6.0, 0.0, 0.0, 6.0]

bitmaps = st.builds(
    lambda height, width, seed, density: (
        torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density
    ),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)


def encode(bitmap: torch.Tensor) -> dict:
    return coco_mask.encode(np.asfortranarray(bitmap.numpy().astype(np.uint8)))


def runs_of(bitmap: torch.Tensor) -> list[int]:
    """COCO's uncompressed counts: runs of 0, 1, 0, ... down the columns, starting with 0."""
    runs, value = [0], False
    for pixel in bitmap.T.reshape(-1).tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


# Construction and decoding


@given(bitmap=bitmaps, form=st.sampled_from(["bytes", "str", "list", "array"]))
def test_an_rle_of_every_form_decodes_to_its_mask(bitmap, form):
    counts = {
        "bytes": lambda: encode(bitmap)["counts"],
        "str": lambda: encode(bitmap)["counts"].decode(),
        "list": lambda: runs_of(bitmap),
        "array": lambda: np.array(runs_of(bitmap)),
    }[form]()
    masks = EncodedMasks([{"size": list(bitmap.shape), "counts": counts}], *bitmap.shape)
    assert masks.bitmaps().dtype == torch.uint8
    assert torch.equal(masks.bitmaps()[0].bool(), bitmap)
    assert masks.is_rle(0)


@given(bitmap=bitmaps)
def test_decoded_counts_are_the_runs(bitmap):
    assert decode_counts(encode(bitmap)["counts"]).tolist() == runs_of(bitmap)


@given(bitmap=bitmaps)
def test_runs_down_the_columns_cover_each_pixel_of_the_mask_once(bitmap):
    runs = EncodedMasks([encode(bitmap)], *bitmap.shape).runs(0)
    covered = torch.zeros(bitmap.shape, dtype=torch.int64)
    for column, top, bottom in zip(runs.column, runs.top, runs.bottom, strict=True):
        assert 0 <= top < bottom <= bitmap.shape[0]
        covered[top:bottom, column] += 1
    assert torch.equal(covered, bitmap.long())


def test_runs_without_a_pixel_are_left_out():
    # Down the columns of 2 pixels: 0, 0 | 0, 1 | 1, 0.
    masks = EncodedMasks([{"size": [2, 3], "counts": [1, 0, 2, 2, 0, 0, 1]}], 2, 3)
    assert masks.bitmaps()[0].tolist() == [[0, 0, 1], [0, 1, 0]]
    runs = masks.runs(0)
    found = zip(runs.column.tolist(), runs.top.tolist(), runs.bottom.tolist(), strict=True)
    assert list(found) == [(1, 1, 2), (2, 0, 1)]


def test_long_runs_and_differences_of_either_sign_decode():
    # Up to seven characters a number; and each number from the fourth on is stored as a difference.
    runs = [0, 1, 2**31, 40_000_000_000, 3, 0, 5]
    compressed = b"".join(_characters(value) for value in [*runs[:3], *np.subtract(runs[3:], runs[1:-2])])
    assert decode_counts(compressed).tolist() == runs


def _characters(value: int) -> bytes:
    """One number in COCO's code."""
    characters = b""
    while True:
        five, value = value & 31, value >> 5
        last = value == (-1 if five & 16 else 0)
        characters += bytes([48 + five + 32 * (not last)])
        if last:
            return characters


def _random_counts(random: np.random.Generator) -> tuple[bytes, int]:
    """Return compressed counts as pycocotools writes them, or damaged in some way, and the pixels of their image."""
    height, width = random.integers(1, 30, 2).tolist()
    bitmap = random.random((height, width)) < random.choice([0, 0.02, 0.5, 1])
    counts = bytearray(coco_mask.encode(np.asfortranarray(bitmap, dtype=np.uint8))["counts"])
    damage = random.integers(0, 12)  # half of them are intact
    if damage == 1:
        counts[random.integers(len(counts))] = random.integers(48, 112)
    elif damage == 2:
        counts[random.integers(len(counts))] = random.integers(256)
    elif damage == 3:
        del counts[-1:]
    elif damage == 4:
        counts.append(random.integers(48, 112))
    elif damage == 5:  # the last number in one character more
        counts[-1] += 32
        counts.append(48 + (31 if (counts[-1] - 48) & 16 else 0))
    elif damage == 6:
        counts = bytearray(random.integers(48, 112, random.integers(0, 20), dtype=np.uint8).tobytes())
    return bytes(counts), height * width


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_many_rles_are_judged_as_each_alone_is(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("maskloss.masks.encoded._CHUNK", chunk)
    random = np.random.default_rng(0)
    rles, pixels = zip(*(_random_counts(random) for _ in range(2_000)), strict=True)

    def is_kept(counts: bytes, size: int) -> bool:
        try:
            return checked_rle({"size": [size, 1], "counts": counts}, size, 1, "x")["counts"] == counts
        except ValueError:
            return False

    expected = [is_kept(*rle) for rle in zip(rles, pixels, strict=True)]
    assert are_canonical(rles, np.array(pixels)).tolist() == expected
    assert 500 < sum(expected) < 1_500


def test_numbers_of_more_than_31_bits_do_not_overflow() -> None:
    for runs in ([2**31], [2**40, 6], [0, 2**58, 6], [1, 2**31, 2**31 + 1]):
        assert not are_canonical([encode_counts(np.array(runs))], np.array([6]))[0]
    assert are_canonical([encode_counts(np.array([2**30, 5, 2**30]))], np.array([2**31 + 5]))[0]


def test_counts_are_compressed_as_pycocotools_does() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        runs = random.integers(0, 2 ** random.integers(1, 18), random.integers(1, 12))
        size = max(int(runs.sum()), 1)
        expected = coco_mask.frPyObjects({"size": [size, 1], "counts": runs.tolist()}, size, 1)["counts"]
        assert encode_counts(runs) == expected
        assert np.array_equal(decode_counts(encode_counts(runs)), runs)
    for number in (15, 16, 2**24 - 1, 2**24, 2**29, 2**59 - 1):
        assert decode_counts(encode_counts(np.array([number, 0, number, 0]))).tolist() == [
            number,
            0,
            number,
            0,
        ]


def test_runs_that_overflow_the_buffer_of_pycocotools_are_encoded() -> None:
    # pycocotools reserves six characters per run, and these take six each, besides the end of the text.
    runs = [2**24, 2**24, 2**24, 0] * 3
    rle = checked_rle({"size": [2**24, 9], "counts": runs}, 2**24, 9, "x")
    assert decode_counts(rle["counts"]).tolist() == runs


def test_polygons_are_points_and_rasterize_as_pycocotools_does():
    masks = EncodedMasks([[SQUARE], [TRIANGLE, SQUARE]], 8, 7)
    assert masks.polygons(0)[0].tolist() == [[1, 1], [4, 1], [4, 4], [1, 4]]
    assert len(masks.polygons(1)) == 2
    assert not masks.is_rle(0)
    square = torch.zeros(8, 7, dtype=torch.uint8)
    square[1:4, 1:4] = 1
    triangle = torch.from_numpy(coco_mask.decode(coco_mask.frPyObjects([TRIANGLE], 8, 7))[..., 0])
    assert torch.equal(masks.bitmaps(), torch.stack([square, square | triangle]))


def test_numbers_of_any_kind_make_a_polygon():
    whole = EncodedMasks([[np.array([0, 0, 6, 0, 0, 6])], [(0, 0, 6, 0, 0, 6)]], 8, 8)
    assert torch.equal(whole.bitmaps(), EncodedMasks([[TRIANGLE], [TRIANGLE]], 8, 8).bitmaps())


def test_length_and_shape_are_those_of_the_bitmaps():
    masks = EncodedMasks([[SQUARE], [TRIANGLE], [SQUARE]], 8, 7)
    assert len(masks) == 3
    assert masks.shape == tuple(masks.bitmaps().shape) == (3, 8, 7)


def test_no_instances_are_fine():
    masks = EncodedMasks([], 5, 6)
    assert len(masks) == 0
    assert masks.bitmaps().shape == (0, 5, 6)


def test_repr_shows_count_and_size():
    assert repr(EncodedMasks([[SQUARE]], 8, 7)) == "EncodedMasks(1 instances, height=8, width=7)"


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda masks: pickle.loads(pickle.dumps(masks))])
def test_a_copy_holds_the_same_masks(make_copy):
    rle = encode(torch.eye(8).bool())
    masks = EncodedMasks([[SQUARE], rle], 8, 8).horizontal_flip()
    assert torch.equal(make_copy(masks).bitmaps(), masks.bitmaps())


def test_to_a_device_returns_itself():
    masks = EncodedMasks([[SQUARE]], 8, 8)
    assert masks.to("cuda", non_blocking=True) is masks


# Selecting


@pytest.mark.parametrize(
    "index",
    [
        slice(1, None),
        slice(None, None, 2),
        [2, 0],
        1,
        torch.tensor([True, False, True]),
        torch.tensor([2, 2, 1]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=str,
)
def test_selecting_instances_selects_bitmaps(index):
    masks = EncodedMasks([[SQUARE], [TRIANGLE], encode(torch.eye(8).bool())], 8, 8)
    selected = masks[index]
    assert isinstance(selected, EncodedMasks)
    assert torch.equal(selected.bitmaps(), masks.bitmaps()[index].reshape(-1, 8, 8))
    assert len(masks) == 3


def test_selecting_instances_keeps_earlier_resizes_and_flips():
    masks = EncodedMasks([[SQUARE], [TRIANGLE]], 8, 8).resize(16, 12).horizontal_flip()
    assert torch.equal(masks[[1]].bitmaps(), masks.bitmaps()[[1]])


# Resize, flip, crop

IMAGE = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) > 0.5


def encoded_pair() -> EncodedMasks:
    """An RLE and a polygon in an 8 x 6 image."""
    return EncodedMasks([encode(IMAGE), [SQUARE]], 8, 6)


def test_flip_is_the_flip_of_the_bitmap():
    flipped = encoded_pair().horizontal_flip()
    assert flipped.shape == (2, 8, 6)
    assert torch.equal(flipped.bitmaps(), encoded_pair().bitmaps().flip(2))


def test_flipping_twice_is_the_identity():
    masks = encoded_pair().horizontal_flip().horizontal_flip()
    assert torch.equal(masks.bitmaps(), encoded_pair().bitmaps())
    assert masks.polygons(1)[0].tolist() == encoded_pair().polygons(1)[0].tolist()


def test_crop_is_the_crop_of_the_bitmap():
    cropped = encoded_pair().crop(top=2, left=1, height=5, width=4)
    assert cropped.shape == (2, 5, 4)
    assert torch.equal(cropped.bitmaps(), encoded_pair().bitmaps()[:, 2:7, 1:5])


def test_enlarging_by_a_whole_factor_repeats_the_pixels():
    resized = encoded_pair().resize(16, 18)
    repeated = encoded_pair().bitmaps().repeat_interleave(2, dim=1).repeat_interleave(3, dim=2)
    assert resized.shape == (2, 16, 18)
    assert torch.equal(resized.bitmaps()[0], repeated[0])


def test_resizing_scales_polygons_exactly_and_each_axis_by_its_own_factor():
    resized = encoded_pair().resize(12, 15)  # 1.5 in y, 2.5 in x
    assert resized.polygons(1)[0].tolist() == [[2.5, 1.5], [10, 1.5], [10, 6], [2.5, 6]]


def test_resizing_down_and_up_again_loses_nothing():
    masks = encoded_pair().resize(4, 3).resize(8, 6)
    assert torch.equal(masks.bitmaps(), encoded_pair().bitmaps())


def test_translating_moves_masks_down_and_right_within_the_same_image():
    moved = encoded_pair().translate(y=2, x=1)
    assert moved.shape == (2, 8, 6)
    expected = torch.zeros(2, 8, 6, dtype=torch.uint8)
    expected[:, 2:, 1:] = encoded_pair().bitmaps()[:, :-2, :-1]
    assert torch.equal(moved.bitmaps(), expected)
    by_fractions = encoded_pair().translate(y=-0.75, x=0.25)
    assert by_fractions.polygons(1)[0].tolist() == [[1.25, 0.25], [4.25, 0.25], [4.25, 3.25], [1.25, 3.25]]


def test_operations_compose_in_their_order():
    # Resize, then crop, then flip moves x = 1 to 2 * 1 = 2, then to 2 - 3 = -1, then to 7 - (-1) = 8.
    masks = encoded_pair().resize(16, 12).crop(top=4, left=3, height=10, width=7).horizontal_flip()
    assert masks.polygons(1)[0].tolist() == [[8, -2], [2, -2], [2, 4], [8, 4]]
    expected = encoded_pair().resize(16, 12).bitmaps()[:, 4:14, 3:10].flip(2)
    assert torch.equal(masks.bitmaps()[0], expected[0])


def test_a_crop_beyond_the_image_pads_with_zeros():
    padded = encoded_pair().crop(top=-5, left=-4, height=16, width=13)
    assert padded.shape == (2, 16, 13)
    expected = torch.zeros(2, 16, 13, dtype=torch.uint8)
    expected[:, 5:13, 4:10] = encoded_pair().bitmaps()
    assert torch.equal(padded.bitmaps(), expected)
    # The crop removed nothing, so more padding is allowed.
    assert padded.crop(top=-1, left=0, height=20, width=9).shape == (2, 20, 9)


@pytest.mark.parametrize("window", [(-1, 0, 5, 4), (0, -1, 5, 4), (0, 0, 6, 4), (0, 0, 5, 5)])
def test_padding_after_a_crop_or_a_translation_raises(window):
    cropped = encoded_pair().crop(top=2, left=1, height=5, width=4)
    assert cropped.crop(top=1, left=1, height=4, width=3).shape == (2, 4, 3)
    moved = encoded_pair().translate(y=0, x=-2).resize(5, 4)
    for masks in (cropped, cropped.horizontal_flip().resize(5, 4), cropped.crop(0, 0, 5, 4), moved):
        with pytest.raises(ValueError, match="that were cropped or moved cannot be padded"):
            masks.crop(*window)


def test_extents_are_the_tight_boxes_within_the_current_image():
    bitmap = torch.zeros(8, 6, dtype=torch.bool)
    bitmap[2:5, 1:4] = True
    outline = [1, 2, 4, 2, 4, 5, 1, 5]
    masks = EncodedMasks([None, encode(torch.zeros(8, 6)), encode(bitmap), [outline]], 8, 6)
    for changed, expected in (
        (masks, [1, 2, 4, 5]),
        (masks.resize(16, 24), [4, 4, 16, 10]),  # 2 in y, 4 in x
        (masks.horizontal_flip(), [2, 2, 5, 5]),
        (masks.vertical_flip(), [1, 3, 4, 6]),
        (masks.crop(top=1, left=0, height=5, width=6), [1, 1, 4, 4]),
        (masks.crop(top=3, left=2, height=1, width=1), [0, 0, 1, 1]),
    ):
        boxes = changed.extents()
        assert boxes[:2].isnan().all()
        assert boxes[2:].tolist() == [expected, expected]
    below = masks.crop(top=5, left=0, height=3, width=6)
    assert below.extents().isnan().all()


def test_operations_do_not_change_the_original():
    masks = encoded_pair()
    masks.resize(16, 12), masks.horizontal_flip(), masks.crop(0, 0, 2, 2)
    assert masks.shape == (2, 8, 6)
    assert torch.equal(masks.bitmaps()[0].bool(), IMAGE)


# Errors

GOOD_RLE = {"size": [2, 3], "counts": [1, 2, 3]}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "the segmentation has no polygon"),
        ("1 2 3", "a list of polygons or an RLE, not str"),
        (5, "a list of polygons or an RLE, not int"),
        ([[0, 0, 1, 0, 1]], r"an odd number of coordinates \(5\)"),
        ([[0, 0, 1, 0]], "has 2 points, fewer than 3"),
        ([[]], "has 0 points, fewer than 3"),
        ([[0, 0, 1, 0, 1, float("nan")]], "not finite"),
        ([[0, 0, 1, 0, 1, float("inf")]], "not finite"),
        ([[0, 0, 1, 0, 1, "x"]], "a flat list of numbers"),
        ([[[0, 0], [1, 0], [1, 1]]], "a flat list of numbers"),
        (
            [0, 0, 1, 0, 1, 1],
            r"a list of polygons, not a flat list of numbers; write \[\[x0, y0, x1, y1, ...\]\]",
        ),
        ({"counts": [6]}, r"needs the keys size and counts, got \['counts'\]"),
        ({"size": [2, 3]}, r"needs the keys size and counts, got \['size'\]"),
        ({"size": [3, 2], "counts": [6]}, r"the RLE's size is \[3, 2\], the image's is \[2, 3\]"),
        ({"size": 6, "counts": [6]}, "the RLE's size is 6"),
        ({"size": [2, 3], "counts": [5]}, "they cover 5 pixels of 6"),
        ({"size": [2, 3], "counts": [7]}, "they cover 7 pixels of 6"),
        ({"size": [2, 3], "counts": []}, "they cover 0 pixels of 6"),
        ({"size": [2, 3], "counts": [8, -2]}, "a run length is negative"),
        ({"size": [2, 3], "counts": [5.5, 0.5]}, "a run length is not an integer"),
        ({"size": [2, 3], "counts": [2**63, -(2**63) + 6]}, "a run length has more than 64 bits"),
        # The sum of int64 would overflow to 6.
        ({"size": [2, 3], "counts": [2**62] * 4 + [6]}, "they cover 18446744073709551622 pixels of 6"),
        ({"size": [2, 3], "counts": None}, "corrupt"),
        ({"size": [2, 3], "counts": ["a"]}, "corrupt"),
        ({"size": [2, 3], "counts": [float("nan"), 6]}, "corrupt"),
        ({"size": [2, 3], "counts": "!"}, "the character '!' is not allowed"),
        ({"size": [2, 3], "counts": "p"}, "the character 'p' is not allowed"),
        ({"size": [2, 3], "counts": "ü"}, "corrupt"),
        ({"size": [2, 3], "counts": "6o"}, "the last number is incomplete"),
        ({"size": [2, 3], "counts": b""}, "they cover 0 pixels of 6"),
        ({"size": [2, 3], "counts": "o" * 12 + "0"}, "a number has more than 12 characters"),
        ({"size": [2, 3], "counts": "o" * 11 + "7"}, "they cover"),
    ],
)
def test_a_bad_segmentation_raises_and_names_the_instance(segmentation, message):
    with pytest.raises(ValueError, match=f"instance 1: .*{message}"):
        EncodedMasks([GOOD_RLE, segmentation], 2, 3)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_raises(height, width):
    with pytest.raises(ValueError, match="height and width must be positive"):
        EncodedMasks([], height, width)


@settings(max_examples=200)
@given(
    counts=st.one_of(st.binary(max_size=12), st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=12))
)
def test_counts_of_any_characters_either_decode_or_raise(counts):
    try:
        masks = EncodedMasks([{"size": [3, 4], "counts": counts}], 3, 4)
    except ValueError:
        return
    # pycocotools writes beyond its buffer if the runs do not sum to H * W, so accepted runs must.
    runs = decode_counts(counts.encode() if isinstance(counts, str) else counts).tolist()
    assert sum(runs) == 12
    assert masks.bitmaps()[0].sum() == sum(runs[1::2])


def test_an_rle_with_numbers_in_longer_form_than_needed_decodes():
    # The runs 4, 300, 2 and 200 in 506 pixels, the last as its difference -100 to the run before last. "lL"
    # is -100 in two characters; each "o" between is five more bits of its sign, which the code allows.
    runs = [4, 300, 2, 200]
    for counts in ("4\\92lL", "4\\92llooooO"):
        assert decode_counts(counts.encode()).tolist() == runs
        masks = EncodedMasks([{"size": [506, 1], "counts": counts}], 506, 1)
        expected = torch.repeat_interleave(torch.tensor([0, 1, 0, 1], dtype=torch.uint8), torch.tensor(runs))
        assert torch.equal(masks.bitmaps()[0, :, 0], expected)


# polygon_area


def test_area_of_a_triangle():
    assert polygon_area(np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 5.0]])) == 15


def test_area_does_not_depend_on_the_direction():
    triangle = np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 5.0]])
    assert polygon_area(triangle[::-1]) == polygon_area(triangle)


def test_of_checked_equals_the_constructor(generator):
    bitmap = (torch.rand(30, 40, generator=generator) > 0.5).numpy().astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(bitmap))
    segmentations = [[[2.0, 1.0, 30.5, 1.0, 30.5, 20.25], [1, 22, 9, 22, 9, 29]], rle]
    checked = EncodedMasks.of_checked(segmentations, 30, 40).horizontal_flip()
    made = EncodedMasks(segmentations, 30, 40).horizontal_flip()
    assert checked.shape == made.shape == (2, 30, 40)
    assert torch.equal(checked.bitmaps(), made.bitmaps())
    boxes = torch.tensor([[1.0, 2.0, 33.0, 25.0], [4.5, 3.5, 36.0, 28.0]])
    index = torch.tensor([0, 1])
    assert torch.equal(mask_targets(checked, boxes, index, 14), mask_targets(made, boxes, index, 14))


def test_an_instance_without_a_mask_keeps_its_index_through_every_operation() -> None:
    square = [[1, 1, 3, 1, 3, 3, 1, 3]]
    masks = EncodedMasks([square, None, square], 4, 6)
    for changed in (masks, masks.resize(8, 12), masks.horizontal_flip(), masks.crop(0, 0, 4, 5)):
        assert len(changed) == 3
        assert [changed.has_mask(index) for index in range(3)] == [True, False, True]
        assert not changed.is_rle(1)
        assert changed.bitmaps().sum(dim=(1, 2)).gt(0).tolist() == [True, False, True]
    assert masks[[1]].segmentations == (None,)
    assert masks.extents()[1].isnan().all()
    assert masks.horizontal_flip().extents()[0].tolist() == [3, 1, 5, 3]
    with pytest.raises(ValueError, match="instance 1 has no mask"):
        masks.polygons(1)


def test_mask_targets_of_an_instance_without_a_mask_raise() -> None:
    masks = EncodedMasks([[[1, 1, 3, 1, 3, 3, 1, 3]], None], 4, 6)
    boxes = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2]])
    assert mask_targets(masks, boxes, torch.tensor([0, 0]), 2).shape == (2, 2, 2)
    with pytest.raises(ValueError, match="instance 1 has no mask"):
        mask_targets(masks, boxes, torch.tensor([0, 1]), 2)


@pytest.mark.parametrize(
    ("segmentations", "message"),
    [
        (
            {"size": [2, 3], "counts": [6]},
            "must be a list with the segmentation of each instance, not a dict$",
        ),
        (None, "not a NoneType"),
        ("[[]]", "not a str"),
        (torch.ones(1, 2, 3), r"not a Tensor; bitmaps \(G, H, W\) need no EncodedMasks"),
    ],
)
def test_what_is_no_list_of_segmentations_raises(segmentations, message) -> None:
    with pytest.raises(TypeError, match=message):
        EncodedMasks(segmentations, 2, 3)


@pytest.mark.parametrize("size", [("2", 3), (2.5, 3), (None, 3), ((2, 3), 3), (math.inf, 3)])
def test_sizes_that_are_not_integers_raise(size) -> None:
    masks = EncodedMasks([[[0, 0, 1, 0, 1, 1]]], 2, 3)
    for make in (
        lambda: EncodedMasks([], *size),
        lambda: masks.resize(*size),
        lambda: masks.crop(0, 0, *size),
    ):
        with pytest.raises(TypeError, match="height and width must be integers, got "):
            make()


@pytest.mark.parametrize("size", [(0, 3), (2, -3)])
def test_resizing_and_cropping_to_no_pixels_raise(size) -> None:
    masks = EncodedMasks([[[0, 0, 1, 0, 1, 1]]], 2, 3)
    for change in (masks.resize, lambda *size: masks.crop(0, 0, *size)):
        with pytest.raises(ValueError, match="height and width must be positive"):
            change(*size)


def test_sizes_may_be_whole_numbers_of_any_kind() -> None:
    rle = {"size": np.array([2, 3]), "counts": [1, 2, 3]}
    masks = EncodedMasks([rle], torch.tensor(2), 3.0)
    assert masks.shape == (1, 2, 3)
    assert repr(masks.resize(np.int64(4), 6.0)) == "EncodedMasks(1 instances, height=4, width=6)"
