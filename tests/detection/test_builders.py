"""`maskloss.detection.builders`."""

from __future__ import annotations

import pytest

from maskloss.detection.builders import ModelSettings, build_model


@pytest.mark.parametrize(
    ("min_size", "max_size", "expected"),
    [
        (None, None, 512),
        ((128,), None, 512),
        # As much more as the shorter side is than 320.
        ((320, 800), None, 1280),
        ((800,), 900, 900),
    ],
)
def test_the_longest_side_does_not_cut_back_the_shorter_one(min_size, max_size, expected):
    model = build_model(ModelSettings("resnet18", 3, min_size=min_size, max_size=max_size))
    assert model.transform.max_size == expected
