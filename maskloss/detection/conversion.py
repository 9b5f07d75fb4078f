"""convert: torchvision's model with our losses, targets and heads; losses_and_detections: both in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign

from maskloss.detection.box_coder import BoxCoder
from maskloss.detection.heads import ClassSelectedMaskPredictor
from maskloss.detection.loss_holder import move_to
from maskloss.detection.pooling import MultiScaleRoIAlign
from maskloss.detection.roi_heads import RoIHeads
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.targets import check_targets
from maskloss.detection.transform import Paste, RCNNTransform
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.masks.encoded import EncodedMasks

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    loss: MaskRCNNLoss | str | None = None,
    *,
    paste: Paste = "torchvision",
    fixed_size: bool = False,
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
            with it, so two models need two. Parameters that it has are not among the model's; the optimizer needs
            to be given them.
        paste: how detections' masks get into the image: "torchvision" gives torchvision's masks; "matched"
            samples at pixel centres on the side of the half pixel that the loss's targets train; None leaves
            the probabilities (D, 1, M, M), for `paste_masks(output="rle")`.
        fixed_size: in training, sample anchors and RoIs without asking the GPU how many positives there are, so
            that it need not run dry while the host waits for the answer. The samples are as large as torchvision's
            and as random, but others, so losses agree in expectation, not number by number. Between the
            transform and the losses the host then waits for NMS, once per image, and for the sizes of the RoI
            sample, with the box branch's work already handed over.

    Returns:
        The same model.

    Raises:
        TypeError: the model, or a part whose code ours would replace, is not torchvision's; torchvision's loss
            functions have been replaced and no `loss` is given; or `fixed_size` is asked for with another sampler
            than torchvision's. Nothing is changed then. The message names what was found.
        ValueError: no such preset or paste; or `fixed_size` is asked for with a BatchNorm in the RoI heads, whose
            statistics would take in the rows that nothing was drawn into.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = convert(model, "aligned", paste="matched")
    """
    if paste not in ("torchvision", "matched", None):
        raise ValueError(f'paste must be "torchvision", "matched" or None, not {paste!r}')
    if loss is None:
        _expect_own_losses()
    if loss is None or isinstance(loss, str):
        loss = MaskRCNNLoss.preset(loss or "torchvision")
    if not isinstance(loss, MaskRCNNLoss):
        raise TypeError(f"loss must be a MaskRCNNLoss or a preset's name, not {type(loss).__name__}")
    if not isinstance(model, GeneralizedRCNN):
        raise TypeError(
            f"convert takes torchvision's FasterRCNN, MaskRCNN or KeypointRCNN, not {_full_name(model)}"
        )
    _expect_own(model, "rpn", TorchvisionRPN, RegionProposalNetwork)
    _expect_own(model, "roi_heads", TorchvisionRoIHeads, RoIHeads)
    for name in ("rpn", "roi_heads"):
        _expect_own_coder(name, getattr(model, name).box_coder)
    own_transform = type(model.transform) in (GeneralizedRCNNTransform, RCNNTransform)
    if not own_transform and paste != "torchvision":
        raise TypeError(
            f"paste={paste!r} would replace the code of model.transform, which is not torchvision's "
            f"GeneralizedRCNNTransform but {_full_name(model.transform)}"
        )
    if paste != "torchvision" and "postprocess" in vars(model.transform):
        raise TypeError(
            f"paste={paste!r} would drop model.transform.postprocess, which has been patched on the instance"
        )
    if fixed_size:
        _expect_fixed_size_fits(model)

    # The instances change their class instead of being rebuilt: whatever a user has set on them, hooks and
    # custom submodules included, stays.
    model.rpn.__class__ = RegionProposalNetwork
    model.roi_heads.__class__ = RoIHeads
    if own_transform:
        model.transform.__class__ = RCNNTransform
        model.transform.paste = paste
        model.transform.aligned_masks = loss.mask_targets.aligned
        model.transform.boxes_on_host = fixed_size
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
            pooler.fixed_size = fixed_size
    for part in (model.rpn, heads):
        if type(part.box_coder) is TorchvisionBoxCoder:
            part.box_coder.__class__ = BoxCoder
    model.rpn.fixed_size = heads.fixed_size = fixed_size
    move_to(loss, next(model.parameters()))
    model.rpn.hold(loss)
    model.roi_heads.hold(loss)

    if _check_inputs not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
        model.register_forward_hook(_add_regularization)
    return model


def losses_and_detections(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Compute losses and detections in evaluation mode, with one pass through the backbone.

    The model runs as in evaluation: no running statistics are touched, and the detections are those of
    `model.eval()(images)`. The losses are those of test-time proposals and the ground truth, so they differ
    from training's, which sees more proposals. Random draws come from a fork of the generators, which the
    caller finds as they were; gradients are as the caller's context has them. Each module's mode is restored.

    Args:
        model: a converted model.
        images: N tensors (3, H, W) in [0, 1].
        targets: one dict per image, as in training.

    Returns:
        The losses under the keys of training, and the detections.

    Raises:
        TypeError: the model is not a converted one.
        ValueError: as in training, on bad targets.

    Source: asked of torchvision since 2019, github.com/pytorch/vision/issues/1574.
    """
    rpn, heads = getattr(model, "rpn", None), getattr(model, "roi_heads", None)
    if not isinstance(rpn, RegionProposalNetwork) or not isinstance(heads, RoIHeads):
        raise TypeError(f"losses_and_detections takes a model from maskloss.convert, not {_full_name(model)}")
    losses: dict[str, Tensor] = {}
    cuda_devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with _evaluation_with_losses(model, rpn, heads, losses), torch.random.fork_rng(devices=cuda_devices):
        detections = model(images, targets)
    losses |= heads.loss.regularization_losses(model)
    return losses, detections


@contextmanager
def _evaluation_with_losses(
    model: nn.Module, rpn: RegionProposalNetwork, heads: RoIHeads, losses: dict[str, Tensor]
) -> Iterator[None]:
    """Evaluation mode in which the RPN and the heads compute losses too, gathered into `losses`."""

    def gather(module: nn.Module, args: Any, output: tuple[Any, dict[str, Tensor]]) -> None:
        losses.update(output[1])

    # The loss is no submodule of the model: terms that gather something as they train must not do so now either.
    parts = [model, rpn.loss, heads.loss]
    modes = {module: module.training for part in parts for module in part.modules()}
    handles = [module.register_forward_hook(gather) for module in (heads, rpn)]
    for part in parts:
        part.eval()
    rpn.losses_in_eval = heads.losses_in_eval = True
    try:
        yield
    finally:
        del rpn.losses_in_eval, heads.losses_in_eval
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse bad targets before the transform."""
    images = args[0] if args else kwargs.get("images")
    targets = args[1] if len(args) > 1 else kwargs.get("targets")
    heads: Any = model.roi_heads
    if images is None or not heads.wants_losses:
        return
    if list(inspect.signature(type(model).forward).parameters)[1:3] != ["images", "targets"]:
        return
    # Of another predictor, a layer of that name may be anything.
    own_predictor = type(heads.box_predictor) is FastRCNNPredictor
    check_targets(
        images,
        targets,
        num_classes=heads.box_predictor.cls_score.out_features if own_predictor else None,
        has_masks=heads.has_mask(),
        has_keypoints=heads.has_keypoint(),
    )
    if not isinstance(model.transform, RCNNTransform) and targets is not None:
        for index, target in enumerate(targets):
            if isinstance(target.get("masks"), EncodedMasks):
                raise TypeError(
                    f"image {index} of the batch, masks: EncodedMasks need torchvision's own transform, "
                    f"model.transform is {_full_name(model.transform)}; give `masks.bitmaps()`"
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
    raise TypeError(f"{_full_name(model)} returns no dict of losses that a regularization term could join")


def _expect_own(model: nn.Module, name: str, stock: type, ours: type) -> None:
    part = getattr(model, name, None)
    if type(part) not in (stock, ours):
        raise TypeError(
            f"convert would replace the code of model.{name}, which is not torchvision's "
            f"{stock.__name__} but {_full_name(part)}"
        )
    for method in ("forward", "compute_loss", "filter_proposals"):
        if method in vars(part):
            raise TypeError(
                f"convert would drop model.{name}.{method}, which has been patched on the instance"
            )


def _expect_own_coder(name: str, coder: Any) -> None:
    """Expect deltas that are encoded and decoded box by box, by methods of torchvision's names."""
    for method in ("encode", "decode"):
        if getattr(type(coder), method, None) is not getattr(TorchvisionBoxCoder, method):
            raise TypeError(
                f"convert would not call {method} of model.{name}.box_coder, which is not torchvision's BoxCoder but "
                f"{_full_name(coder)}; override {method}_single instead"
            )


def _expect_own_losses() -> None:
    """Expect that nobody has put a loss of his own in the place of torchvision's, where ours would not call it."""
    for name, term in (("fastrcnn_loss", "classification and box"), ("maskrcnn_loss", "mask")):
        function = getattr(torchvision_roi_heads, name)
        if getattr(function, "__module__", None) != torchvision_roi_heads.__name__:
            raise TypeError(
                f"{torchvision_roi_heads.__name__}.{name} has been replaced, and convert would not call it; give the "
                f"{term} term to MaskRCNNLoss, or a preset by name"
            )


def _expect_fixed_size_fits(model: GeneralizedRCNN) -> None:
    for name in ("rpn", "roi_heads"):
        sampler = getattr(model, name).fg_bg_sampler
        if type(sampler) is not BalancedPositiveNegativeSampler:
            raise TypeError(
                f"fixed_size would replace the draws of model.{name}.fg_bg_sampler, which is not torchvision's "
                f"BalancedPositiveNegativeSampler but {_full_name(sampler)}"
            )
    if "select_training_samples" in vars(model.roi_heads):
        raise TypeError(
            "fixed_size would drop model.roi_heads.select_training_samples, which has been patched on the instance"
        )
    for name, module in model.roi_heads.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"fixed_size does not go with model.roi_heads.{name}, a {type(module).__name__}: its statistics "
                "would take in rows that nothing was drawn into"
            )


def _full_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
