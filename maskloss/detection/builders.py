"""Build Mask R-CNNs by name: torchvision's, and two small ones for CPUs and small datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import FrozenBatchNorm2d

from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.detection.mask_size import MaskSize, set_mask_size

MODEL_NAMES = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "resnet18", "mobilenet_v2")

#: Upper limit of `max_detections`; larger values are probably typos.
MOST_DETECTIONS = 100_000

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSettings:
    """Settings from which a model is built.

    Attributes:
        name: one of `MODEL_NAMES`.
        num_classes: number of classes, background included.
        image_mean: mean that is subtracted from pixels in [0, 1], per channel.
        image_std: standard deviation that pixels are divided by, per channel.
        frozen_normalization: whether the backbone's batch norms are frozen, as pretrained weights and small batches
            require.
        min_size: sizes in px to which the shorter side of images is resized; training picks one at random per image,
            evaluation uses the last. None for the model's default.
        max_size: maximum longer side in px. None for the model's default.
        normalization_eps: epsilon that frozen batch norms add to the variance. torchvision's COCO weights of
            maskrcnn_resnet50_fpn need 0.
        trainable_layers: number of backbone stages that are trained, counted from the end: at most five for a resnet
            and six for the mobilenet; None for all. The FPN and the heads are always trained.
        max_detections: maximum detections per image. COCO's 100 is too low for cells or crowds.
        mask_size: side of the predicted masks in cells: 14, 28 or 56; None for the model's own, which is 28 for the
            models named here.

    Example:
        >>> ModelSettings("resnet18", num_classes=3).max_detections
        100
    """

    name: str
    num_classes: int
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    frozen_normalization: bool = False
    min_size: tuple[int, ...] | None = None
    max_size: int | None = None
    normalization_eps: float = 1e-5
    trainable_layers: int | None = None
    max_detections: int = 100
    mask_size: MaskSize | None = None


def build_model(settings: ModelSettings) -> MaskRCNN:
    """Build a torchvision Mask R-CNN with random weights; `maskloss.convert` is not applied yet.

    Raises:
        ValueError: no model has this name.

    Example:
        >>> build_model(ModelSettings("resnet18", num_classes=3)).roi_heads.mask_predictor.mask_fcn_logits.out_channels
        3
    """
    if settings.name not in MODEL_NAMES:
        raise ValueError(f"no model is named {settings.name!r}; available: {', '.join(MODEL_NAMES)}")
    small = settings.name in ("resnet18", "mobilenet_v2")
    shorter, longer = (320, 512) if small else (800, 1333)
    min_size = settings.min_size or (shorter,)
    common: dict[str, Any] = {
        "num_classes": settings.num_classes,
        "image_mean": list(settings.image_mean),
        "image_std": list(settings.image_std),
        "min_size": min_size,
        # Scale the default maximum with the shorter side, which it would otherwise limit.
        "max_size": settings.max_size or max(longer, round(max(min_size) * longer / shorter)),
        "box_detections_per_img": settings.max_detections,
        **_proposals(settings.max_detections, *((500, 300) if small else (1000, 1000))),
    }
    if settings.name == "maskrcnn_resnet50_fpn":
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **common)
    elif settings.name == "maskrcnn_resnet50_fpn_v2":
        model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **common)
    else:
        backbone = _resnet18_fpn() if settings.name == "resnet18" else _mobilenet_v2_fpn()
        model = _small_mask_rcnn(backbone, common)
    if settings.frozen_normalization:
        _freeze_normalization(model.backbone.body, settings.normalization_eps)
    _freeze_stages(model.backbone.body, settings.name, settings.trainable_layers)
    if settings.mask_size is not None:
        set_mask_size(model, settings.mask_size)
    return model


def _proposals(max_detections: int, before_nms: int, after_nms: int) -> dict[str, int]:
    """Return the numbers of proposals in evaluation: the model's defaults, or three per detection if that is more."""
    return {
        "rpn_pre_nms_top_n_test": max(before_nms, 3 * max_detections),
        "rpn_post_nms_top_n_test": max(after_nms, 3 * max_detections),
    }


#: Layer names of each backbone's stages, from its end. The stages are those of torchvision's `_resnet_fpn_extractor`
#: and `_mobilenet_extractor`.
_RESNET_STAGES = (("layer4",), ("layer3",), ("layer2",), ("layer1",), ("conv1", "bn1"))
_MOBILENET_STAGES = (
    ("18",),
    ("14", "15", "16", "17"),
    ("7", "8", "9", "10", "11", "12", "13"),
    ("4", "5", "6"),
    ("2", "3"),
    ("0", "1"),
)


def _freeze_stages(body: nn.Module, name: str, trainable_layers: int | None) -> None:
    """Freeze the parameters of all but the last `trainable_layers` stages."""
    stages = _MOBILENET_STAGES if name == "mobilenet_v2" else _RESNET_STAGES
    trained = {layer for stage in stages[:trainable_layers] for layer in stage}
    for parameter_name, parameter in body.named_parameters():
        if parameter_name.split(".")[0] not in trained:
            parameter.requires_grad_(False)


#: Number of channels in the FPN and the heads of the small models.
_SMALL_WIDTH = 128


def _resnet18_fpn() -> BackboneWithFPN:
    body = torchvision.models.resnet18(weights=None)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    return BackboneWithFPN(body, layers, [body.inplanes // 2**i for i in (3, 2, 1, 0)], _SMALL_WIDTH)


def _mobilenet_v2_fpn() -> BackboneWithFPN:
    features = torchvision.models.mobilenet_v2(weights=None).features
    # The last blocks before strides 8, 16 and 32, and the very last one.
    layers = {"3": "0", "6": "1", "13": "2", "18": "3"}
    return BackboneWithFPN(features, layers, [24, 32, 96, 1280], _SMALL_WIDTH)


def _small_mask_rcnn(backbone: BackboneWithFPN, common: dict[str, Any]) -> MaskRCNN:
    """Build a Mask R-CNN with heads half as wide as torchvision's, an eighth of its RoIs, and anchors from 16 px."""
    num_classes = common.pop("num_classes")
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            sizes=((16,), (32,), (64,), (128,), (256,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5
        ),
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=500,
        box_batch_size_per_image=64,
        box_head=TwoMLPHead(_SMALL_WIDTH * 7 * 7, 512),
        box_predictor=FastRCNNPredictor(512, num_classes),
        mask_head=MaskRCNNHeads(_SMALL_WIDTH, (_SMALL_WIDTH,) * 4, 1),
        mask_predictor=ClassSelectedMaskPredictor(_SMALL_WIDTH, _SMALL_WIDTH, num_classes),
        **common,
    )
    return model


def _freeze_normalization(module: nn.Module, eps: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=eps)
            state = child.state_dict()
            frozen.load_state_dict({key: state[key] for key in frozen.state_dict()})
            setattr(module, name, frozen)
        else:
            _freeze_normalization(child, eps)


def published_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's published weights of a whole model, or of a small model's backbone.

    Raises:
        OSError: the download failed.
    """
    weights = torchvision.models.get_model_weights(name)
    state: dict[str, Tensor] = weights.DEFAULT.get_state_dict(progress=True, check_hash=True)
    return state


def published_settings(name: str) -> dict[str, Any]:
    """Return the fields of `ModelSettings` that match a model's published weights.

    They are those of torchvision's builders: maskrcnn_resnet50_fpn freezes its batch norms and uses no epsilon with
    the COCO weights; maskrcnn_resnet50_fpn_v2 trains its batch norms. Small models load only an ImageNet backbone,
    and freeze its batch norms.

    Example:
        >>> published_settings("maskrcnn_resnet50_fpn")
        {'frozen_normalization': True, 'normalization_eps': 0.0}
    """
    return {
        "frozen_normalization": name != "maskrcnn_resnet50_fpn_v2",
        "normalization_eps": 0.0 if name == "maskrcnn_resnet50_fpn" else 1e-5,
    }


@dataclass(frozen=True)
class LoadedWeights:
    """The result of loading weights into a model.

    Attributes:
        loaded: number of the model's tensors that were loaded.
        left: names of the model's tensors that keep their start values.
        unused: names of the file's tensors that the model does not have, or has with another shape.

    Example:
        >>> print(LoadedWeights(2, [], ["fc.weight", "fc.bias"]))
        loaded 2 tensors; 0 of the model keep their start values; 2 of the file are not used (fc)
    """

    loaded: int
    left: list[str]
    unused: list[str]

    def __str__(self) -> str:
        return (
            f"loaded {self.loaded} tensors; "
            f"{len(self.left)} of the model keep their start values{_shown(self.left)}; "
            f"{len(self.unused)} of the file are not used{_shown(self.unused)}"
        )


def load_weights(model: MaskRCNN, weights: dict[str, Tensor]) -> LoadedWeights:
    """Load all weights whose names and shapes match the model or its backbone.

    Args:
        model: from `build_model`.
        weights: tensors by name, with the names of the whole model, of torchvision's resnet
            ("layer1.0.conv1.weight") or of its mobilenet ("features.0.0.weight").

    Example:
        >>> model = build_model(ModelSettings("resnet18", num_classes=2))
        >>> load_weights(model, torchvision.models.resnet18(weights=None).state_dict()).unused
        ['fc.weight', 'fc.bias']
    """
    state = model.state_dict()
    placed: dict[str, Tensor] = {}
    unused: list[str] = []
    for key, tensor in weights.items():
        candidates = [key, f"backbone.body.{key.removeprefix('features.')}"]
        name = next((c for c in candidates if c in state and state[c].shape == tensor.shape), None)
        if name is not None:
            placed[name] = tensor
        elif not key.endswith("num_batches_tracked"):
            unused.append(key)
    model.load_state_dict(placed, strict=False)
    left = [key for key in state if key not in placed and not key.endswith("num_batches_tracked")]
    return LoadedWeights(len(placed), left, unused)


def _shown(names: Sequence[str]) -> str:
    """Return the names of at most four modules that own the named tensors, in parentheses; "" without names."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    if not modules:
        return ""
    return f" ({', '.join(modules[:4])}{', ...' if len(modules) > 4 else ''})"
