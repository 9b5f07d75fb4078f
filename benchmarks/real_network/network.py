"""Read a network from a Python file."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType


def read_network(path: str | os.PathLike[str]) -> ModuleType:
    """Import a Python file that defines a network.

    Args:
        path: file with `build()`, which returns a torchvision Mask R-CNN in evaluation mode, and `CATEGORY_IDS`, the
            category of each label from 1 on.
    """
    spec = importlib.util.spec_from_file_location("network", path)
    assert spec is not None
    assert spec.loader is not None
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    return network
