"""pytest plugin: torchvision's builders of Faster, Mask and Keypoint R-CNNs return converted models."""

from __future__ import annotations

import functools
from typing import Any

from torchvision.models import _api, detection

import maskloss


def pytest_configure() -> None:
    """Replace the builders before torchvision's tests import them."""
    for name, build in list(_api.BUILTIN_MODELS.items()):
        if name.startswith(("fasterrcnn", "maskrcnn", "keypointrcnn")):
            converting = _converting(build)
            _api.BUILTIN_MODELS[name] = converting
            setattr(detection, name, converting)


def _converting(build: Any) -> Any:
    @functools.wraps(build)
    def converted(*arguments: Any, **options: Any) -> Any:
        return maskloss.convert(build(*arguments, **options))

    return converted
