"""Check that `convert` replaces only torchvision's code, and that the converted model calls all user code.

If a conversion would replace or skip code that a user has written, these checks raise an error, before the conversion
and at every later forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection import transform as torchvision_transform
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign
from torchvision.ops import boxes as torchvision_boxes
from torchvision.ops import poolers as torchvision_poolers

from maskloss.detection.mask_branch import MaskBranch
from maskloss.detection.roi_heads import RoIHeads
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.sampling import SeededSampler
from maskloss.detection.transform import RCNNTransform

_PARTS: dict[str, tuple[type, type]] = {
    "rpn": (TorchvisionRPN, RegionProposalNetwork),
    "roi_heads": (TorchvisionRoIHeads, RoIHeads),
}

#: Methods of torchvision's parts that the converted parts never call, so that a user's replacement would be skipped.
_UNCALLED_METHODS = {
    "rpn": ("compute_loss",),
    "roi_heads": (
        "fastrcnn_loss",
        "maskrcnn_loss",
        "keypointrcnn_loss",
        "project_masks_on_boxes",
        "maskrcnn_inference",
    ),
}

#: torchvision's functions that the converted model does not call: where each is defined, and what to use instead.
_REPLACED_FUNCTIONS: dict[str, tuple[Any, str]] = {
    "fastrcnn_loss": (torchvision_roi_heads, "the classification and box terms"),
    "maskrcnn_loss": (torchvision_roi_heads, "the mask term"),
    "keypointrcnn_loss": (torchvision_roi_heads, "the keypoint term"),
    "project_masks_on_boxes": (torchvision_roi_heads, "mask_targets"),
    "maskrcnn_inference": (torchvision_roi_heads, "a mask term with mask_probs"),
    "compute_loss": (TorchvisionRPN, "the objectness and rpn_box terms"),
}

_SUBCLASS = "derive your part from maskloss.detection.{} and override the method there"
_TRANSFORM = "patch model.transform.{} of this model instead"
_CODER = "give model.rpn and model.roi_heads a subclass of BoxCoder that overrides {}"
_POOLER = "give model.roi_heads a subclass of MultiScaleRoIAlign with the change"

#: torchvision's other code that the converted model does not call, or not always: where it is, names, and the way out.
_UNCALLED_CODE: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (TorchvisionRoIHeads, ("forward", "postprocess_detections"), _SUBCLASS.format("RoIHeads")),
    (
        TorchvisionRPN,
        ("forward", "filter_proposals", "assign_targets_to_anchors"),
        _SUBCLASS.format("RegionProposalNetwork"),
    ),
    (TorchvisionBoxCoder, ("encode", "encode_single"), _CODER.format("encode_single")),
    (TorchvisionBoxCoder, ("decode", "decode_single"), _CODER.format("decode_single")),
    (torchvision_utils, ("encode_boxes",), _CODER.format("encode_single")),
    (TorchvisionMultiScaleRoIAlign, ("forward",), _POOLER),
    (torchvision_poolers, ("roi_align",), _POOLER),
    (MaskRCNNPredictor, ("forward",), "give model.roi_heads a subclass of MaskRCNNPredictor with the change"),
)

#: The same for the transform, if it is torchvision's own.
_UNCALLED_IN_TRANSFORM: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (GeneralizedRCNNTransform, ("resize",), _TRANSFORM.format("resize")),
    (GeneralizedRCNNTransform, ("normalize",), _TRANSFORM.format("normalize")),
    (GeneralizedRCNNTransform, ("postprocess",), _TRANSFORM.format("postprocess")),
    (
        torchvision_transform,
        ("resize_boxes", "resize_keypoints", "_resize_image_and_masks"),
        _TRANSFORM.format("resize"),
    ),
)

#: The same with `sync_free`.
_UNCALLED_IF_SYNC_FREE: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (TorchvisionRoIHeads, ("select_training_samples", "subsample"), "leave sync_free out"),
    (BalancedPositiveNegativeSampler, ("__call__",), "leave sync_free out"),
    (torchvision_boxes, ("batched_nms", "remove_small_boxes"), "leave sync_free out"),
)


class _Code(NamedTuple):
    """A function or method of torchvision's: where it is, its name, what it was at first, and the way out."""

    owner: Any
    name: str
    original: Any
    way_out: str


def _recorded(rows: Iterable[tuple[Any, Iterable[str], str]]) -> list[_Code]:
    """Record the code that the rows name, before user code replaces it.

    Code that has been replaced before maskloss was imported is recognized by its module, if it is a plain function.
    """
    found = []
    for owner, names, way_out in rows:
        for name in names:
            original = getattr(owner, name)
            if not str(getattr(original, "__module__", None)).startswith(("torchvision.", "torch.")):
                original = None
            found.append(_Code(owner, name, original, way_out))
    return found


def full_name(thing: Any) -> str:
    """Return the qualified name of an object's type.

    Example:
        >>> full_name(nn.Linear(1, 1))
        'torch.nn.modules.linear.Linear'
    """
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def not_a_detector(needs: str, model: Any) -> TypeError:
    """Return the error for an argument that is not a torchvision detector, naming a detector wrapped inside it.

    Args:
        needs: beginning of the message: which function takes which type.
        model: the argument.

    Example:
        >>> not_a_detector("convert takes a MaskRCNN", nn.Linear(1, 1))
        TypeError('convert takes a MaskRCNN, not torch.nn.modules.linear.Linear')
    """
    inside = ""
    if isinstance(model, nn.Module):
        names = [name for name, module in model.named_modules() if isinstance(module, GeneralizedRCNN)]
        if names:
            inside = (
                f"; the detector inside is model.{names[0]}: pass that, and convert it before wrapping it"
            )
    found = full_name(model)
    if isinstance(model, type) or inspect.isroutine(model):
        found = f"{model.__name__} itself; call it to make a model"
    if isinstance(model, nn.Module) and not inside and hasattr(model, "roi_heads"):
        inside = (
            "; derive it from torchvision.models.detection.generalized_rcnn.GeneralizedRCNN, or build "
            "torchvision's MaskRCNN with your backbone and heads"
        )
    return TypeError(f"{needs}, not {found}{inside}")


def not_converted(needs: str, model: nn.Module) -> TypeError:
    """Return the error for a torchvision detector that has not been converted.

    Args:
        needs: beginning of the message: which function takes which type.
        model: the detector.

    Example:
        >>> not_converted("this takes a converted model", nn.Identity())  # doctest: +ELLIPSIS
        TypeError('this takes a converted model, not a stock torch...Identity: call maskloss.convert(model) first')
    """
    return TypeError(f"{needs}, not a stock {full_name(model)}: call maskloss.convert(model) first")


def has_replaceable_transform(model: GeneralizedRCNN) -> bool:
    """Return whether a model's transform is exactly torchvision's, or already converted.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> has_replaceable_transform(build_model(ModelSettings("resnet18", num_classes=2)))
        True
    """
    transform = model.transform
    return type(transform) is GeneralizedRCNNTransform or isinstance(transform, RCNNTransform)


def check_parts(model: GeneralizedRCNN) -> None:
    """Check that the parts whose code `convert` replaces are torchvision's, or already converted.

    Raises:
        TypeError: a part has another type or is sharded, or has user methods that would not be called; or such methods
            of torchvision's classes have been replaced.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> check_parts(build_model(ModelSettings("resnet18", num_classes=2)))
    """
    for name, (stock, ours) in _PARTS.items():
        part = getattr(model, name, None)
        if any(base.__name__ == "FSDPModule" for base in type(part).__mro__):
            raise TypeError(f"model.{name} is sharded already: call convert before fully_shard")
        _check_unwrapped(name, part)
        if type(part) is not stock and not isinstance(part, ours):
            raise TypeError(
                f"convert would replace the code of model.{name}, which is not torchvision's "
                f"{stock.__name__} but {full_name(part)}; derive it from maskloss.detection.{ours.__name__} to keep it"
            )
        if not isinstance(part, ours) and "forward" in vars(part):
            raise TypeError(
                f"convert would drop model.{name}.forward, which has been patched on the instance; call convert first, "
                f"and let the patch call type(model.{name}).forward"
            )
        _check_code(name, part)
    check_code(model)


def _check_unwrapped(name: str, part: Any) -> None:
    """Check that a part is not inside another module, such as one of torch.compile or of activation checkpointing.

    Raises:
        TypeError: it is; converting again would not help.
    """
    stock, _ = _PARTS[name]
    if isinstance(part, stock) or not isinstance(part, nn.Module):
        return
    inside = [path for path, module in part.named_modules() if isinstance(module, stock)]
    if inside:
        way_out = f"model.{name}.compile()" if inside[0] == "_orig_mod" else f"layers of model.{name}"
        raise TypeError(
            f"model.{name} is a {full_name(part)} around the {stock.__name__}, which convert needs itself: set "
            f"model.{name} = model.{name}.{inside[0]}, and use {way_out} instead"
        )


def check_num_classes(branch: MaskBranch | None, model: GeneralizedRCNN) -> None:
    """Check that a mask branch predicts the masks of all of a model's classes.

    The number of classes is known for torchvision's box predictor.

    Raises:
        ValueError: the model has more classes.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> from maskloss.detection.point_rend import PointRendBranch
        >>> model = build_model(ModelSettings("resnet18", num_classes=3))
        >>> check_num_classes(PointRendBranch(256, num_classes=2), model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the mask branch has 2 classes, but model.roi_heads.box_predictor has 3 ...
    """
    predictor = model.roi_heads.box_predictor
    if branch is None or branch.num_classes is None or type(predictor) is not FastRCNNPredictor:
        return
    count = getattr(predictor.cls_score, "out_features", 0)
    if count > branch.num_classes:
        raise ValueError(
            f"the mask branch has {branch.num_classes} classes, but model.roi_heads.box_predictor has {count} (both "
            "with the background); call maskloss.convert again with a new mask branch"
        )


def check_sync_free(model: GeneralizedRCNN) -> None:
    """Check that a model supports sampling without synchronization: torchvision's samplers, no BatchNorm in the heads.

    Raises:
        TypeError: a sampler is not torchvision's, or code that would not be called has been patched.
        ValueError: a BatchNorm in the RoI heads would include rows without a sample in its statistics.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> check_sync_free(build_model(ModelSettings("resnet18", num_classes=2)))
    """
    for name in _PARTS:
        sampler = getattr(model, name).fg_bg_sampler
        if type(sampler) not in (BalancedPositiveNegativeSampler, SeededSampler):
            raise TypeError(
                f"sync_free would not call model.{name}.fg_bg_sampler, which is not torchvision's "
                f"BalancedPositiveNegativeSampler but {full_name(sampler)}"
            )
    heads: Any = model.roi_heads
    for method in ("select_training_samples", "subsample"):
        if where := _where_changed(heads, method, RoIHeads):
            raise TypeError(f"sync_free would drop model.roi_heads.{method}, which has been {where}")
    _check_unchanged(_SYNC_FREE_CODE)
    for name, module in model.roi_heads.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"sync_free does not support model.roi_heads.{name}, a {type(module).__name__}: its statistics "
                "would include rows without a sample"
            )


def replaced_functions() -> list[str]:
    """Return the names of torchvision's loss functions that user code has replaced.

    Example:
        >>> replaced_functions()
        []
    """
    return [
        name
        for name, (owner, _) in _REPLACED_FUNCTIONS.items()
        if getattr(owner, name) is not _ORIGINAL_FUNCTIONS[name]
    ]


def check_functions(allowed: Collection[str] = ()) -> None:
    """Check that torchvision's loss functions have not been replaced.

    Args:
        allowed: names of functions that may be replaced, because the user has explicitly passed a loss to `convert`.

    Raises:
        TypeError: another function has been replaced; the converted model would not call the replacement.

    Example:
        >>> check_functions()
    """
    for name in replaced_functions():
        if name not in allowed:
            owner, instead = _REPLACED_FUNCTIONS[name]
            raise TypeError(
                f"{_home(owner)}.{name} has been replaced, and a converted model does not call it; pass {instead} to "
                "MaskRCNNLoss, or pass a preset's name to convert"
            )


def check_code(model: GeneralizedRCNN) -> None:
    """Check that no code of torchvision's that a converted model does not call has been replaced.

    Raises:
        TypeError: some has been; the message has the way out.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> check_code(build_model(ModelSettings("resnet18", num_classes=2)))
    """
    _check_unchanged(_CODE)
    if has_replaceable_transform(model):
        _check_unchanged(_TRANSFORM_CODE)


def _check_unchanged(recorded: Iterable[_Code]) -> None:
    for owner, name, original, way_out in recorded:
        if getattr(owner, name) is not original:
            place = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
            raise TypeError(
                f"{place}.{name} has been replaced, and a converted model would not call the replacement; {way_out}"
            )


def check_still_converted(model: GeneralizedRCNN, *, paste: str | None, allowed: Collection[str]) -> None:
    """Check, at each forward pass, that no part has been replaced or patched since `convert`.

    Args:
        model: a converted model.
        paste: the `paste` argument of `convert`.
        allowed: see `check_functions`.

    Raises:
        TypeError: a part has been replaced or patched since `convert`.
        ValueError: see `check_sync_free` and `check_num_classes`.

    Example:
        >>> import maskloss
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> model = maskloss.convert(build_model(ModelSettings("resnet18", num_classes=2)), paste="matched")
        >>> check_still_converted(model, paste="matched", allowed=[])
    """
    for name, (_, ours) in _PARTS.items():
        part = getattr(model, name)
        _check_unwrapped(name, part)
        if not isinstance(part, ours):
            raise TypeError(
                f"model.{name} has been replaced by {full_name(part)} since convert, so its losses would differ; "
                "call maskloss.convert again"
            )
        _check_code(name, part)
    check_functions(allowed)
    check_code(model)
    check_num_classes(model.roi_heads.mask_branch, model)
    if paste != "torchvision":
        transform = model.transform
        if not isinstance(transform, RCNNTransform):
            raise TypeError(
                f"model.transform has been replaced by {full_name(transform)} since convert, which drops "
                f"paste={paste!r}; call maskloss.convert again"
            )
        check_postprocess(transform, paste)
    if model.training and model.rpn.sync_free:
        check_sync_free(model)


def check_postprocess(transform: nn.Module, paste: str | None) -> None:
    """Check that pasting differently from torchvision would not drop a user's `postprocess`.

    Raises:
        TypeError: `postprocess` has been patched on the instance.

    Example:
        >>> check_postprocess(nn.Identity(), paste="matched")
    """
    if "postprocess" in vars(transform):
        raise TypeError(
            f"paste={paste!r} would drop model.transform.postprocess, which has been patched on the instance"
        )


def _check_code(name: str, part: Any) -> None:
    """Check that a part has no patched method that would not be called, and that its box coder is torchvision's.

    A subclass of torchvision's coder may override `encode_single` and `decode_single`, which are called.

    Raises:
        TypeError: a method has been patched or overridden, or the coder overrides `encode` or `decode`.
    """
    ours: Any = _PARTS[name][1]
    for method in _UNCALLED_METHODS[name]:
        where = _where_changed(part, method, ours)
        # A subclass with a forward of its own may call the methods that it overrides.
        has_own_forward = isinstance(part, ours) and type(part).forward is not ours.forward
        if where and (method in vars(part) or not has_own_forward):
            _, instead = _REPLACED_FUNCTIONS[method]
            raise TypeError(
                f"model.{name}.{method} has been {where}, and a converted model does not call it; pass {instead} to "
                "MaskRCNNLoss"
            )
    coder = part.box_coder
    for method in ("encode", "decode"):
        own = getattr(type(coder), method, None) is getattr(TorchvisionBoxCoder, method)
        if not own or method in getattr(coder, "__dict__", ()):
            raise TypeError(
                f"convert would not call {method} of model.{name}.box_coder, which is not torchvision's BoxCoder but "
                f"{full_name(coder)}; override {method}_single instead"
            )


def _where_changed(part: Any, method: str, ours: type) -> str:
    """Return where a method has been changed: on the instance, or in a subclass of ours; "" if it has not been."""
    if method in vars(part):
        return "patched on the instance"
    if isinstance(part, ours) and getattr(type(part), method, None) is not getattr(ours, method, None):
        return f"overridden in {full_name(part)}"
    return ""


def _home(owner: Any) -> str:
    """Return the `__module__` of the functions that a module or a class defines itself."""
    home: str = owner.__module__ if isinstance(owner, type) else owner.__name__
    return home


_CODE, _TRANSFORM_CODE, _SYNC_FREE_CODE = map(
    _recorded, (_UNCALLED_CODE, _UNCALLED_IN_TRANSFORM, _UNCALLED_IF_SYNC_FREE)
)
_ORIGINAL_FUNCTIONS = {
    code.name: code.original
    for code in _recorded((owner, (name,), way_out) for name, (owner, way_out) in _REPLACED_FUNCTIONS.items())
}
