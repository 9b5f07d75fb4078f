"""`maskloss.detection.builders`."""

from __future__ import annotations

import pytest

from maskloss.detection.builders import ModelSettings, build_model


@pytest.mark.parametrize(
    ("min_size", "max_size", "expected"),
    [
        (None, None, 512),
        ((128,), None, 512),
        # 512 * 800 / 320, the ratio of the shorter sides.
        ((320, 800), None, 1280),
        ((800,), 900, 900),
    ],
)
def test_the_default_longest_side_grows_with_the_shorter_side(min_size, max_size, expected):
    model = build_model(ModelSettings("resnet18", 3, min_size=min_size, max_size=max_size))
    assert model.transform.max_size == expected
