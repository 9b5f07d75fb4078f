"""convert: torchvision's model with our losses, targets and heads; losses_and_detections: both in one pass."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign

from maskloss.detection.box_coder import BoxCoder
from maskloss.detection.compatibility import (
    check_functions,
    check_parts,
    check_postprocess,
    check_still_converted,
    check_sync_free,
    full_name,
    has_replaceable_transform,
    not_a_detector,
    replaced_functions,
)
from maskloss.detection.loss_holder import ImageRandomStates, move_to
from maskloss.detection.mask_branch import MaskBranch
from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.detection.pooling import MultiScaleRoIAlign
from maskloss.detection.roi_heads import RoIHeads
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.target_checks import ModelInputs, check_inputs, in_plain_form
from maskloss.detection.transform import Paste, RCNNTransform
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.presets import PresetName
from maskloss.masks.encoded import EncodedMasks

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    loss: MaskRCNNLoss | PresetName | None = None,
    *,
    paste: Paste = "torchvision",
    sync_free: bool = False,
    mask_branch: MaskBranch | None = None,
) -> Model:
    """Give torchvision's model our losses, targets and heads, in place.

    Parameters stay the same objects, so an optimizer made before stays valid, and `state_dict` keeps
    torchvision's keys and shapes, so its weights load strictly before and after. Call it before wrapping the
    model in DistributedDataParallel or torch.compile. Converting again replaces the loss, the paste and the way
    of sampling.

    Args:
        model: torchvision's `FasterRCNN`, `MaskRCNN` or `KeypointRCNN`, or a subclass, whose `rpn` and
            `roi_heads` are torchvision's own. Backbones, heads, poolers, predictors, matchers and samplers may
            be anybody's. So may the transform, which is then left alone: masks come as tensors and are
            resized and pasted by it. What a subclass is given whose `forward` does not begin with (images, targets) is
            not checked.
        loss: a `MaskRCNNLoss`, the name of a preset, or None for "torchvision". It becomes this model's: it moves
            with it, so two models need two. Parameters that it has are not among the model's; an optimizer needs
            to be given them: `loss_parameters(model)`.
        paste: how detections' masks get into the image. "torchvision" gives torchvision's masks. "matched" samples at
            the pixels' centers and undoes what masks are off by that were learned from this loss's targets: right for a
            network that was trained with this loss, as torchvision's published weights were with the preset
            "torchvision". "aligned" undoes nothing: right for weights from elsewhere, such as Detectron2's and
            mmdetection's; to undo half a pixel that such a network never had cost .4 mask AP on 131 COCO photographs.
            None leaves the probabilities (D, 1, M, M), for `paste_masks` with `mask_offset`, and for `coco_results`.
        sync_free: in training, sample anchors and RoIs without asking the GPU how many positives there are, so
            that it need not run dry while the host waits for the answer. The samples are as large as torchvision's
            and as random, but others, so losses agree in expectation, not number by number. Between the
            transform and the losses the host then waits for NMS, once per image, and for the sizes of the RoI
            sample, with the box branch's work already handed over.

        mask_branch: what predicts masks and computes their losses; None takes torchvision's layers. Parameters that it
            has become the model's. It is this model's alone.

    Returns:
        The same model.

    Raises:
        TypeError: the model, or a part whose code ours would replace, is not torchvision's; torchvision's loss
            functions have been replaced and no `loss` is given; or `sync_free` is asked for with another sampler
            than torchvision's. Nothing is changed then. The message names what was found.
        ValueError: no such preset or paste; or `sync_free` is asked for with a BatchNorm in the RoI heads, whose
            statistics would take in the rows that nothing was drawn into.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = convert(model, "aligned", paste="matched")
    """
    if paste not in ("torchvision", "matched", "aligned", None):
        raise ValueError(f'paste must be "torchvision", "matched", "aligned" or None, not {paste!r}')
    if loss is None:
        check_functions()
    if loss is None or isinstance(loss, str):
        loss = MaskRCNNLoss.preset(loss or "torchvision")
    if not isinstance(loss, MaskRCNNLoss):
        raise TypeError(f"loss must be a MaskRCNNLoss or a preset's name, not {type(loss).__name__}")
    if not isinstance(model, GeneralizedRCNN):
        raise not_a_detector("convert takes torchvision's FasterRCNN, MaskRCNN or KeypointRCNN", model)
    if any(module is model for module in loss.modules()):
        raise ValueError(
            "a term of the loss holds the model itself, which would make the model a part of its own loss; give the "
            "term what it needs of the model, or refer to it in a function"
        )
    if mask_branch is not None and not isinstance(mask_branch, MaskBranch):
        what = mask_branch.__name__ if isinstance(mask_branch, type) else full_name(mask_branch)
        raise TypeError(f"mask_branch must be an instance of a MaskBranch, not {what}")
    check_parts(model)
    own_transform = has_replaceable_transform(model)
    if not own_transform and paste != "torchvision":
        raise TypeError(
            f"paste={paste!r} would replace the code of model.transform, which is not torchvision's "
            f"GeneralizedRCNNTransform but {full_name(model.transform)}"
        )
    if paste != "torchvision":
        check_postprocess(model.transform, paste)
    if sync_free:
        check_sync_free(model)

    # The instances change their class instead of being rebuilt: whatever a user has set on them, hooks and
    # custom submodules included, stays.
    for part, ours in (
        (model.rpn, RegionProposalNetwork),
        (model.roi_heads, RoIHeads),
        *([(model.transform, RCNNTransform)] if own_transform else []),
    ):
        if not isinstance(part, ours):
            part.__class__ = ours
    if own_transform:
        model.transform.paste = paste
        model.transform.aligned_masks = loss.mask_targets.aligned
        model.transform.boxes_on_host = sync_free
    predictor = model.roi_heads.mask_predictor
    if (
        type(predictor) is MaskRCNNPredictor
        and "forward" not in vars(predictor)
        # It is a Sequential, to which layers can be added.
        and list(predictor._modules) == ["conv5_mask", "relu", "mask_fcn_logits"]
    ):
        predictor.__class__ = ClassSelectedMaskPredictor
    heads = model.roi_heads
    for pooler in (heads.box_roi_pool, heads.mask_roi_pool, heads.keypoint_roi_pool):
        if type(pooler) is TorchvisionMultiScaleRoIAlign and "forward" not in vars(pooler):
            pooler.__class__ = MultiScaleRoIAlign
        if isinstance(pooler, MultiScaleRoIAlign):
            pooler.sync_free = sync_free
    for part in (model.rpn, heads):
        if type(part.box_coder) is TorchvisionBoxCoder:
            part.box_coder.__class__ = BoxCoder
    model.rpn.sync_free = heads.sync_free = sync_free
    move_to(loss, next(model.parameters()))
    heads.use_mask_branch(mask_branch)
    if mask_branch is not None:
        mask_branch.to(next(model.parameters()))
    model.rpn.hold(loss)
    heads.hold(loss)

    model.conversion = _Conversion(paste, replaced_functions())
    if _check_inputs not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
        model.register_forward_hook(_add_regularization)
    return model


def loss_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a converted model's loss has of its own, such as learned weights of its terms.

    They are not among `model.parameters()`, so that checkpoints stay torchvision's: an optimizer, gradient clipping and
    the averaging of gradients over processes need to be given them.

    Args:
        model: a converted model.

    Raises:
        TypeError: the model is not a converted one.

    Example:
        >>> import torch, torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = convert(model)
        >>> parameters = [*model.parameters(), *loss_parameters(model)]
        >>> optimizer = torch.optim.SGD(parameters, lr=0.01)
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, RoIHeads):
        raise not_a_detector("loss_parameters takes a model from maskloss.convert", model)
    # A term that refers to layers of the model does not own their parameters.
    of_model = {id(parameter) for parameter in model.parameters()}
    yield from (parameter for parameter in heads.loss.parameters() if id(parameter) not in of_model)


def losses_and_detections(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Compute losses and detections in evaluation mode.

    The model runs as in evaluation: no running statistics are touched, and the detections are those of
    `model.eval()(images)`. The losses are those of test-time proposals and the ground truth, so they differ
    from training's, which sees more proposals. They are the means over the images of what each gives by itself, without
    the padding that a larger image beside it would bring, and with random draws that begin for each image with the
    generators' present state: so they do not depend on how images are grouped into batches. Images of one size share
    one pass through the backbone with the detections.

    Random draws come from a fork of the generators, which the caller finds as they were; gradients are as the caller's
    context has them. Each module's mode is restored.

    Args:
        model: a converted model.
        images: N tensors (3, H, W) in [0, 1].
        targets: one dict per image, as in training.

    Returns:
        The losses under the keys of training, and the detections.

    Raises:
        TypeError: the model is not a converted one.
        ValueError: as in training, on bad targets.

    Example:
        >>> import torch, torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 50]]), "labels": torch.tensor([1]),
        ...           "masks": torch.ones(1, 64, 64, dtype=torch.bool)}
        >>> losses, detections = losses_and_detections(convert(model), [torch.rand(3, 64, 64)], [target])

    Source: asked of torchvision since 2019, github.com/pytorch/vision/issues/1574.
    """
    needs = "losses_and_detections takes a model from maskloss.convert"
    if not isinstance(model, GeneralizedRCNN):
        raise not_a_detector(needs, model)
    rpn, heads = model.rpn, model.roi_heads
    if not isinstance(rpn, RegionProposalNetwork) or not isinstance(heads, RoIHeads):
        raise TypeError(f"{needs}, not a stock {full_name(model)}: call maskloss.convert(model) first")
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(getattr(image, "shape", ())[-2:]), []).append(index)
    # Before the first pass, and by their places in this batch.
    if _takes_images_and_targets(type(model).forward):
        targets = _checked_targets(model, images, targets)
    cuda_devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    totals: dict[str, Tensor] = {}
    with _evaluation_mode(model, rpn.loss), torch.random.fork_rng(devices=cuda_devices):
        states = ImageRandomStates(cuda_devices)
        for indices in by_size.values():
            losses: dict[str, Tensor] = {}
            with _losses_in_eval(rpn, heads, states.anew(), losses):
                detections = model([images[i] for i in indices], [targets[i] for i in indices])
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + value * (len(indices) / len(images))
        if len(by_size) > 1:
            # Padded to one size, as a batch is.
            detections = model(images)
    return totals | heads.loss.regularization_losses(model), detections


@contextmanager
def _evaluation_mode(model: nn.Module, loss: nn.Module) -> Iterator[None]:
    """Put a model and its loss into evaluation mode, and each module back into the mode that it had."""
    # The loss is no submodule of the model: terms that gather something as they train must not do so now either.
    modes = {module: module.training for part in (model, loss) for module in part.modules()}
    model.eval()
    loss.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _losses_in_eval(
    rpn: RegionProposalNetwork, heads: RoIHeads, states: ImageRandomStates, losses: dict[str, Tensor]
) -> Iterator[None]:
    """Let the RPN and the heads compute losses in evaluation mode too, gathered into `losses`."""

    def gather(module: nn.Module, args: Any, output: tuple[Any, dict[str, Tensor]]) -> None:
        losses.update(output[1])

    handles = [module.register_forward_hook(gather) for module in (heads, rpn)]
    rpn.eval_states = heads.eval_states = states
    try:
        yield
    finally:
        del rpn.eval_states, heads.eval_states
        for handle in handles:
            handle.remove()


@dataclass
class _Conversion:
    """What the checks of each forward pass need to know of the conversion.

    Attributes:
        paste: as given to `convert`.
        replaced_functions: torchvision's loss functions that had been replaced before, when a loss was given knowingly.
        box_format_checks: batches whose boxes are still to be compared with their masks.
        warned_of_border: whether boxes outside of the image have been warned of.
    """

    paste: Paste
    replaced_functions: list[str]
    box_format_checks: int = 10
    warned_of_border: bool = False


def _check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: raise on parts that were patched since `convert`, and on bad targets, before the transform.

    `losses_and_detections` has checked the targets of all its passes itself, by their places in the whole batch.
    """
    conversion: _Conversion = model.conversion
    check_still_converted(model, paste=conversion.paste, allowed=conversion.replaced_functions)
    if not model.roi_heads.training or not _takes_images_and_targets(type(model).forward):
        return None
    given: dict[str, Any] = {**dict(zip(("images", "targets"), args, strict=False)), **kwargs}
    if given.get("images") is None:
        return None
    images = given["images"]
    targets = _checked_targets(model, images, given.get("targets"))
    return (images, targets, *args[2:]), {k: v for k, v in kwargs.items() if k not in ("images", "targets")}


def _checked_targets(model: Any, images: Any, targets: Any) -> list[dict[str, Any]]:
    """Check a batch, and return its targets in the form that torchvision's code needs.

    Raises:
        TypeError, ValueError: see `check_inputs`; or the transform cannot take what a target has.
    """
    conversion: _Conversion = model.conversion
    outside = check_inputs(
        images, targets, _expected_inputs(model), check_box_format=conversion.box_format_checks > 0
    )
    if outside is not None and not conversion.warned_of_border:
        conversion.warned_of_border = True
        warnings.warn(outside, stacklevel=2)
    if any(len(target["boxes"]) for target in targets):
        conversion.box_format_checks -= 1
    targets = in_plain_form(targets, images)
    if not isinstance(model.transform, RCNNTransform):
        for index, target in enumerate(targets):
            if isinstance(target.get("masks"), EncodedMasks):
                raise TypeError(
                    f"image {index} of the batch, masks: EncodedMasks need torchvision's own transform, "
                    f"model.transform is {full_name(model.transform)}; give `masks.bitmaps()`"
                )
            if "ignore_boxes" in target:
                raise TypeError(
                    f"image {index} of the batch, ignore_boxes: need torchvision's own transform, which resizes them "
                    f"with the image; model.transform is {full_name(model.transform)}"
                )
    return targets


@cache
def _takes_images_and_targets(forward: Callable[..., Any]) -> bool:
    """Whether a model's `forward` begins with (images, targets), as a subclass's own need not."""
    return list(inspect.signature(forward).parameters)[1:3] == ["images", "targets"]


def _expected_inputs(model: GeneralizedRCNN) -> ModelInputs:
    heads, transform = model.roi_heads, model.transform
    # Of another predictor, a layer of that name may be anything.
    own_predictor = type(heads.box_predictor) is FastRCNNPredictor
    sizes: dict[str, Any] = {}
    if isinstance(transform, RCNNTransform):
        mean, std = transform.image_mean, transform.image_std
        sizes = {
            "num_channels": len(mean),
            "unit_range": all(0 < m < 1 and 0 < s < 1 for m, s in zip(mean, std, strict=True)),
        }
        if transform.fixed_size is None and not transform._skip_resize:
            sizes |= {"min_size": min(transform.min_size), "max_size": transform.max_size}
    return ModelInputs(
        num_classes=heads.box_predictor.cls_score.out_features if own_predictor else None,
        has_masks=heads.has_mask(),
        has_keypoints=heads.has_keypoint(),
        **sizes,
    )


def _add_regularization(model: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: the penalty on the parameters of this very model, a copy's own when it is a copy."""
    heads: Any = model.roi_heads
    if not model.training or heads.loss.regularization is None:
        return None
    penalty = heads.loss.regularization_losses(model)
    if isinstance(output, dict):
        return {**output, **penalty}
    if isinstance(output, tuple) and output and isinstance(output[0], dict):
        # A subclass that returns losses and detections, as torchvision's scripted models do.
        return ({**output[0], **penalty}, *output[1:])
    raise TypeError(f"{full_name(model)} returns no dict of losses that a regularization term could join")
