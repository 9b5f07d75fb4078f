"""Export of a trained model to ONNX and to `torch.export`, for programs without maskloss and torchvision's models."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.errors import InputError
from maskloss.files import write_bytes
from maskloss.training.file_fields import first_line
from maskloss.training.model_file import ModelDescription

#: Outputs of an exported model.
OUTPUTS = ("boxes", "labels", "scores", "masks", "mask_scores")
#: Opset of ONNX files.
OPSET = 20


class ExportedDetector(nn.Module):
    """A converted model as a function of one image that returns tensors.

    Args:
        model: a model converted with `paste=None`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Detect objects.

        Args:
            image: (3, H, W) RGB in [0, 1].

        Returns:
            boxes (D, 4), xyxy in px of the image; labels (D,) int64, label i is category i - 1 of the description;
            scores (D,), descending; masks (D, 1, M, M), probabilities on the grid of each box, if the model has masks;
            and mask_scores (D,) if it scores them.
        """
        (detection,) = self.model([image])
        return {name: detection[name] for name in OUTPUTS if name in detection}


def export(model: nn.Module, description: ModelDescription, path: str | Path) -> None:
    """Write a model as FILE.onnx or FILE.pt2.

    The exported model takes one image of any size whose shorter side is longer than 64 px after resizing. It includes
    resizing, normalization and NMS, and leaves masks unpasted. Its description is in the file: JSON under "maskloss" in
    the metadata of an ONNX file, and in the extra file "maskloss" of a .pt2 file, with the categories, the score
    threshold of each, and the input.

    Args:
        model: a model from `load_model`.
        description: its description.
        path: the file; its ending decides the format.

    Raises:
        InputError: the ending is another one, the packages for ONNX are missing, or the model cannot be exported, as
            its code depends on values that are unknown in the export.
        RunError: the disk is full, or the folder is not writable.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{path}: must end in .onnx or .pt2")
    if path.suffix == ".onnx":
        _check_packages()
    # A copy, whose parameters need no gradients: whoever runs the file should not need torch.no_grad().
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    detector = ExportedDetector(model)
    transform: Any = model.transform
    # Sides that are neither equal nor multiples of anything, so that the export does not take them for constants.
    side = max(int(transform.min_size[-1]), 64)
    image = torch.rand((3, side + 37, side + 91), generator=torch.Generator().manual_seed(0))
    text = json.dumps(description_of(model, description, OPSET if path.suffix == ".onnx" else None))
    with torch.no_grad(), _quiet():
        outputs = list(detector(image))  # also lets poolers infer the strides of the feature maps
        sizes = {"image": {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}}
        try:
            program = torch.export.export(detector, (image,), dynamic_shapes=sizes, strict=False)
        except Exception as error:  # torch raises many types
            raise InputError(
                f"{path}: the model cannot be exported: {type(error).__name__}: {first_line(error)}; mask branches "
                "and models of your own must not depend on the number of detections in Python"
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            # Not under the final name, whose letters torch's writer may not be able to encode.
            file = Path(folder) / f"model{path.suffix}"
            if path.suffix == ".pt2":
                torch.export.save(program, file, extra_files={"maskloss": text})
            else:
                onnx_program = torch.onnx.export(
                    program, (image,), output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
                )
                assert onnx_program is not None
                onnx_program.model.metadata_props["maskloss"] = text
                onnx_program.save(str(file), external_data=False)
            write_bytes(path, file.read_bytes())


def description_of(model: nn.Module, description: ModelDescription, opset: int | None) -> dict[str, Any]:
    """Return the description of an exported model, as plain values."""
    transform: Any = model.transform
    thresholds = description.score_thresholds or (None,) * len(description.categories)
    return {
        "input": {"image": "float32 (3, H, W), RGB in [0, 1], any size"},
        "outputs": "boxes (D, 4) xyxy in px of the image, labels (D,), scores (D,), masks (D, 1, M, M) in [0, 1] on "
        "the grid of each box, and mask_scores (D,) if the model scores its masks",
        "resized_to": {"shorter_side": transform.min_size[-1], "longer_side_at_most": transform.max_size},
        "opset": opset,
        "aligned": description.aligned,
        "categories": [
            {"label": label, "id": category.id, "name": category.name, "score_threshold": threshold}
            for label, (category, threshold) in enumerate(
                zip(description.categories, thresholds, strict=True), start=1
            )
        ],
    }


def _check_packages() -> None:
    missing = []
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise InputError(f"ONNX files need {' and '.join(missing)}: pip install 'maskloss[export]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporters log and warn about their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
