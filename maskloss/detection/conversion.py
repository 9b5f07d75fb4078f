"""Convert torchvision's detection models to maskloss, and compute losses and detections in evaluation mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign

from maskloss.detection.box_coder import BoxCoder
from maskloss.detection.compatibility import (
    check_functions,
    check_num_classes,
    check_parts,
    check_postprocess,
    check_sync_free,
    full_name,
    has_replaceable_transform,
    not_a_detector,
    not_converted,
)
from maskloss.detection.forward_hooks import add_hooks, checked_targets
from maskloss.detection.loss_holder import ImageRandomStates, move_to
from maskloss.detection.mask_branch import MaskBranch
from maskloss.detection.mask_iou import MaskIoUBranch
from maskloss.detection.mask_predictor import (
    SECOND_UPSAMPLING,
    STOCK_LAYERS,
    ClassSelectedMaskPredictor,
)
from maskloss.detection.point_rend import PointRendBranch
from maskloss.detection.pooling import MultiScaleRoIAlign
from maskloss.detection.roi_heads import RoIHeads
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.transform import Paste, RCNNTransform
from maskloss.losses.criterion import MaskRCNNLoss, PresetName

Model = TypeVar("Model", bound=nn.Module)

#: The names of mask branches.
MaskBranchName = Literal["point_rend", "mask_iou"]

MASK_BRANCHES: dict[str, Callable[[nn.Module], MaskBranch]] = {
    "point_rend": PointRendBranch.of,
    "mask_iou": MaskIoUBranch.of,
}


def convert(
    model: Model,
    loss: MaskRCNNLoss | PresetName | None = None,
    *,
    paste: Paste = "torchvision",
    sync_free: bool = False,
    mask_branch: MaskBranchName | MaskBranch | None = None,
) -> Model:
    """Replace the losses, mask targets and heads of a torchvision model by maskloss's, in place.

    Parameters remain the same objects, so existing optimizers stay valid. `state_dict` keeps torchvision's keys and
    shapes, so weights load strictly before and after. Call `convert` before wrapping the model in
    DistributedDataParallel or torch.compile. Converting again replaces the loss, the paste, the mask branch and the way
    of sampling.

    Args:
        model: torchvision's `FasterRCNN`, `MaskRCNN` or `KeypointRCNN`, or a subclass, with torchvision's own `rpn` and
            `roi_heads`. Backbone, heads, poolers, predictors, matchers and samplers may be custom. A custom transform
            is kept unchanged: it must take masks as tensors, and resizes and pastes them itself. Targets are not
            validated for subclasses whose `forward` does not start with `(images, targets)`.
        loss: a `MaskRCNNLoss`, the name of a preset, or None for "torchvision". The loss moves with the model, so every
            model needs its own. The loss's parameters are not part of `model.parameters()`; pass them to the optimizer
            with `loss_parameters(model)`.
        paste: how the masks of detections are pasted into the image. "torchvision" pastes as torchvision does.
            "matched" samples at pixel centers and undoes the offset that the loss's mask targets have; use it for
            networks trained with this loss, such as torchvision's published weights with the preset "torchvision".
            "aligned" samples at pixel centers and undoes no offset; use it for other weights, such as Detectron2's and
            mmdetection's. Undoing half a pixel that such a network does not have cost 0.4 mask AP with MaskRCNN2Go on
            131 COCO photographs. None returns the probabilities (D, 1, M, M), for `paste_masks` with `mask_offset`, and
            for `coco_results`.
        sync_free: in training, sample anchors and RoIs without synchronizing to count the positives, so that the GPU
            does not become idle while the host waits. The samples have torchvision's sizes and distribution, but are
            not the same, so losses agree in expectation, not number by number. Between the transform and the losses,
            the host then synchronizes only for NMS, once per image, and for the sizes of the RoI sample, after it has
            launched the box branch.
        mask_branch: predicts masks and computes their losses; None for torchvision's layers. "point_rend" refines masks
            at uncertain points (`PointRendBranch.of(model)`), "mask_iou" scores torchvision's masks by their predicted
            quality (`MaskIoUBranch.of(model)`). Its parameters become the model's. Every model needs its own.

    Returns:
        The same model.

    Raises:
        TypeError: the model, or a part whose code would be replaced, is not torchvision's; torchvision's loss
            functions have been replaced and no `loss` is given; other code of torchvision's has been replaced that the
            converted model would not call; or `sync_free` is requested with a custom sampler. The message names the
            cause. The model is not changed.
        ValueError: the preset or paste is unknown; a term of the loss holds the model itself; the loss has tensors on
            the meta device; the loss or the mask branch is already used by another model; the mask branch has fewer
            classes than the model; or `sync_free` is requested with a BatchNorm in the RoI heads, whose statistics
            would include rows without a sample.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = convert(model, "aligned", paste="matched")
    """
    needs_loss = loss not in (None, "torchvision") or mask_branch is not None
    if loss is None:
        check_functions()
    if loss is None or isinstance(loss, str):
        with torch.device("cpu"):  # the user may make the model under torch.device("meta")
            loss = MaskRCNNLoss.preset("torchvision" if loss is None else loss)
    _check_arguments(model, loss, paste, sync_free, mask_branch)
    if isinstance(mask_branch, str):
        mask_branch = MASK_BRANCHES[mask_branch](model)
    if mask_branch is not None:
        check_num_classes(mask_branch, model)
        mask_branch.hold(loss)  # a branch may refuse the loss, before anything is changed
    _replace_parts(model, loss, paste, sync_free)
    _hold(model, loss, mask_branch)
    add_hooks(model, paste, needs_loss=needs_loss)
    return model


def _check_arguments(model: Any, loss: Any, paste: Any, sync_free: Any, mask_branch: Any) -> None:
    """Check the arguments of `convert`, before anything is changed."""
    if paste not in ("torchvision", "matched", "aligned", None):
        raise ValueError(f'paste must be "torchvision", "matched", "aligned" or None, not {paste!r}')
    if not isinstance(loss, MaskRCNNLoss):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(
            f"loss must be a MaskRCNNLoss or a preset's name, not {kind}; a single term is given as in "
            "MaskRCNNLoss(mask=maskloss.losses.MaskDiceLoss())"
        )
    if not isinstance(sync_free, bool):
        raise TypeError(f"sync_free must be True or False, got {sync_free!r}")
    if not isinstance(model, GeneralizedRCNN):
        raise not_a_detector("convert takes torchvision's FasterRCNN, MaskRCNN or KeypointRCNN", model)
    if any(tensor.is_meta for tensor in (*loss.parameters(), *loss.buffers())):
        raise ValueError(
            'the loss has tensors on the meta device, which have no values; make it outside of torch.device("meta")'
        )
    if any(module is model for module in loss.modules()):
        raise ValueError(
            "a term of the loss holds the model itself, which would make the model a part of its own loss; let the "
            "term hold only the layers that it needs, or refer to the model in a function"
        )
    if isinstance(mask_branch, str) and mask_branch not in MASK_BRANCHES:
        raise ValueError(f"no mask branch is named {mask_branch!r}; available: {', '.join(MASK_BRANCHES)}")
    if mask_branch is not None and not isinstance(mask_branch, str | MaskBranch):
        what = mask_branch.__name__ if isinstance(mask_branch, type) else full_name(mask_branch)
        raise TypeError(f"mask_branch must be an instance of a MaskBranch, not {what}")
    check_parts(model)
    _check_unshared(loss, model)
    for branch in _branches_in(mask_branch):
        _check_unshared(branch, model)
    own_transform = has_replaceable_transform(model)
    if not own_transform and paste != "torchvision":
        raise TypeError(
            f"paste={paste!r} would replace the code of model.transform, which is not torchvision's "
            f"GeneralizedRCNNTransform but {full_name(model.transform)}"
        )
    if not own_transform and loss.uses_image:
        raise TypeError(
            "the loss's mask term needs the images, which only torchvision's own GeneralizedRCNNTransform can keep, "
            f"but model.transform is {full_name(model.transform)}"
        )
    if paste != "torchvision":
        check_postprocess(model.transform, paste)
    if sync_free:
        check_sync_free(model)


def _replace_parts(model: Any, loss: MaskRCNNLoss, paste: Paste, sync_free: bool) -> None:
    """Replace torchvision's code in the parts of a model, and configure them."""
    own_transform = has_replaceable_transform(model)
    # The instances change their class instead of being rebuilt, to keep everything that a user has set on them,
    # including hooks and custom submodules.
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
        model.transform.keeps_images = loss.uses_image
    predictor = model.roi_heads.mask_predictor
    if (
        type(predictor) is MaskRCNNPredictor
        and "forward" not in vars(predictor)
        # The predictor is a Sequential, to which users may have added layers.
        and tuple(name for name in predictor._modules if name not in SECOND_UPSAMPLING) == STOCK_LAYERS
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


def _hold(model: Any, loss: MaskRCNNLoss, mask_branch: MaskBranch | None) -> None:
    """Attach the loss and the mask branch to a model with converted parts, and move them to its device."""
    heads = model.roi_heads
    move_to(loss, next(model.parameters()))
    heads.use_mask_branch(mask_branch)
    if mask_branch is not None:
        mask_branch.to(next(model.parameters()))
    model.rpn.hold(loss)
    heads.hold(loss)
    for held in (loss, *_branches_in(mask_branch)):
        _OWNERS[held] = weakref.ref(model)


#: The converted model of each loss and mask branch. Copies of a model have losses and branches of their own.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def _branches_in(branch: Any) -> list[MaskBranch]:
    """Return a mask branch and the ones that it wraps."""
    if not isinstance(branch, MaskBranch):
        return []
    return [module for module in branch.modules() if isinstance(module, MaskBranch)]


def _check_unshared(held: MaskRCNNLoss | MaskBranch, model: nn.Module) -> None:
    """Check that no other model uses a mask branch, or a loss that has tensors.

    Converting a second model would move the loss to its device, and give its loss to the branch, in the first model,
    too. A loss without tensors has nothing that could change.

    Raises:
        ValueError: another model that still exists uses it.
    """
    if isinstance(held, MaskRCNNLoss) and not [*held.parameters(), *held.buffers()]:
        return
    if not _is_used_by_another(held, model):
        return
    what = "loss" if isinstance(held, MaskRCNNLoss) else "mask branch"
    raise ValueError(
        f"the {what} belongs to another converted model; every model needs its own: make another one, or pass "
        f"copy.deepcopy({'loss' if what == 'loss' else 'branch'})"
    )


def _is_used_by_another(held: MaskRCNNLoss | MaskBranch, model: nn.Module) -> bool:
    # A function of its own, because an error's traceback keeps the variables of its functions, here the other model,
    # which then could not be deleted in a notebook.
    owner: Any = _OWNERS[held]() if held in _OWNERS else None
    if owner is None or owner is model:
        return False
    heads = owner.roi_heads
    return isinstance(heads, RoIHeads) and held in (heads.loss, *_branches_in(heads.mask_branch))


def loss_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a converted model's loss, such as learned weights of its terms.

    They are not part of `model.parameters()`, so that checkpoints keep torchvision's keys. Pass them separately to the
    optimizer, to gradient clipping and to the averaging of gradients over processes.

    Args:
        model: a converted model.

    Raises:
        TypeError: the model has not been converted.

    Example:
        >>> import torch, torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = convert(model)
        >>> parameters = [*model.parameters(), *loss_parameters(model)]
        >>> optimizer = torch.optim.SGD(parameters, lr=0.01)
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, RoIHeads):
        needs = "loss_parameters takes a model from maskloss.convert"
        raise (not_converted if isinstance(model, GeneralizedRCNN) else not_a_detector)(needs, model)
    # Terms may refer to layers of the model, whose parameters belong to the model.
    of_model = {id(parameter) for parameter in model.parameters()}
    yield from (parameter for parameter in heads.loss.parameters() if id(parameter) not in of_model)


def losses_and_detections(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Compute losses and detections in evaluation mode.

    The model runs in evaluation mode: running statistics do not change, and the detections equal those of
    `model.eval()(images)`. The losses use the proposals of evaluation, of which there are fewer than in training, so
    they differ from the losses of training.

    Losses do not depend on how images are grouped into batches. They are means over images, each computed without the
    padding that a larger image in the batch would add. Random sampling starts from the same generator state for each
    image. Images of equal size share one forward pass, which also computes the detections.

    Sampling uses a fork of the random generators, so the caller's generators do not change. Whether gradients are
    recorded depends on the caller's context. Each module's mode is restored.

    Args:
        model: a converted model.
        images: N tensors (3, H, W) in [0, 1].
        targets: one dict per image, as in training.

    Returns:
        The losses, with the same keys as in training; and the detections.

    Raises:
        TypeError: the model has not been converted.
        ValueError: there is no image, or the targets are invalid, as in training.

    Example:
        >>> import torch, torchvision
        >>> build = torchvision.models.detection.maskrcnn_resnet50_fpn
        >>> model = build(weights=None, weights_backbone=None, min_size=128)
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 50]]), "labels": torch.tensor([1]),
        ...           "masks": torch.ones(1, 64, 64, dtype=torch.bool)}
        >>> losses, detections = losses_and_detections(convert(model), [torch.rand(3, 64, 64)], [target])

    Source: requested from torchvision since 2019, github.com/pytorch/vision/issues/1574.
    """
    needs = "losses_and_detections takes a model from maskloss.convert"
    if not isinstance(model, GeneralizedRCNN):
        raise not_a_detector(needs, model)
    rpn, heads = model.rpn, model.roi_heads
    if not isinstance(rpn, RegionProposalNetwork) or not isinstance(heads, RoIHeads):
        raise not_converted(needs, model)
    if len(images) == 0:
        raise ValueError("images is empty: losses and detections need at least one image")
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(getattr(image, "shape", ())[-2:]), []).append(index)
    # Before the first pass, so that errors name an image by its index in this batch, not in its group.
    conversion: Any = model.conversion
    if conversion.checks_targets:
        targets = checked_targets(model, images, targets)
    cuda_devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    totals: dict[str, Tensor] = {}
    # The loss is not a submodule of the model. Its terms may update statistics in training mode.
    with evaluation_mode(model, rpn.loss), torch.random.fork_rng(devices=cuda_devices):
        states = ImageRandomStates(cuda_devices)
        for indices in by_size.values():
            losses: dict[str, Tensor] = {}
            with _losses_in_eval(rpn, heads, states.fresh_copy(), losses):
                detections = _detections_of(
                    model([images[i] for i in indices], [targets[i] for i in indices])
                )
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + value * (len(indices) / len(images))
        if len(by_size) > 1:
            # Detections come from one padded batch, as in `model.eval()(images)`.
            detections = _detections_of(model(images))
    return totals | heads.loss.regularization_losses(model), detections


def _detections_of(output: Any) -> Any:
    """Return the detections, without the losses that a subclass may return beside them, as scripted models do."""
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], dict):
        return output[1]
    return output


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and restore the mode of each of their parts afterwards."""
    modes = {module: module.training for part in modules for module in part.modules()}
    for part in modules:
        part.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _losses_in_eval(
    rpn: RegionProposalNetwork, heads: RoIHeads, states: ImageRandomStates, losses: dict[str, Tensor]
) -> Iterator[None]:
    """Make the RPN and the heads compute losses in evaluation mode, and collect them in `losses`."""

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
