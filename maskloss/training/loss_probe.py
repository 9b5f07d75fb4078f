"""Trying a loss on a few random RoIs, so that a term that cannot train is named before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from maskloss.errors import InputError
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import TERMS, KeypointBatch, MaskBatch, RoIBatch, RPNBatch
from maskloss.training.import_paths import described


def probe_copy(
    loss: MaskRCNNLoss,
    num_classes: int,
    model: nn.Module,
    device: torch.device | None = None,
    *,
    require_finite: bool = True,
) -> None:
    """Probe a loss that is to train: neither its parameters nor what its terms have gathered changes.

    Args:
        loss: to check.
        num_classes: C of the model, background included.
        model: for the regularization term.
        device: where to evaluate; a term may hold tensors that are there already.
        require_finite: raise for values and gradients that are not finite, too.

    Raises:
        InputError: see `probe`.
    """
    state = {key: value.detach().clone() for key, value in loss.state_dict().items()}
    try:
        probed = copy.deepcopy(loss)
    except Exception:  # a user's object may refuse to be copied: then its state is restored
        probed = loss
    place = next(iter(loss.state_dict().values()), torch.empty(0)).device
    try:
        probe(probed.to(device), num_classes, model, device, require_finite=require_finite)
    finally:
        if probed is loss:
            loss.to(place)
            loss.load_state_dict(state)


def probe(
    loss: MaskRCNNLoss,
    num_classes: int,
    model: nn.Module | None = None,
    device: torch.device | None = None,
    *,
    require_finite: bool = True,
) -> None:
    """Evaluate every term once on a few random RoIs, forward and backward.

    Args:
        loss: to be looked at; what its terms gather, they gather from this too.
        num_classes: C of the model, background included.
        model: what the regularization term is evaluated on; without one it is not.
        device: where to evaluate; the CPU where not given.
        require_finite: raise for values and gradients that are not finite, too.

    Raises:
        InputError: a term raises, gives another shape, or is not finite, in value or gradient. The message names
            the term.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    def boxes(count: int) -> BoxRegression:
        low = torch.rand(count, 2, generator=generator).to(device) * 40
        anchors = torch.cat([low, low + 20], dim=1)
        return BoxRegression(random(count, 4), random(count, 4).detach(), lambda deltas: anchors + deltas)

    labels = torch.randint(0, num_classes, (12,), generator=generator).to(device)
    labels[:4] = labels[:4].clamp(min=1)
    positives = labels > 0
    count = int(positives.sum())
    counts = BatchCounts(num_images=2, sampled=12, positives=count, batch_size_per_image=6, locations=40)
    objectness, class_logits, mask_logits = (
        random(12),
        random(12, num_classes),
        random(count, num_classes, 7, 7),
    )
    rpn = RPNBatch(objectness, positives.float(), boxes(count), counts)
    rois = RoIBatch(class_logits, labels, boxes(count), counts)
    targets = torch.rand(count, 7, 7, generator=generator).to(device)
    masks = MaskBatch(mask_logits, targets, labels[positives], counts)
    keypoint_logits = random(12, 49)
    cells = torch.randint(0, 49, (12,), generator=generator).to(device)
    keypoints = KeypointBatch(keypoint_logits, cells, counts)
    evaluations: list[tuple[Callable[[], dict[str, torch.Tensor]], list[list[torch.Tensor]]]] = [
        (lambda: loss.rpn_losses(rpn), [[objectness], [rpn.box.deltas]]),
        (lambda: loss.roi_losses(rois), [[class_logits], [rois.box.deltas]]),
        (lambda: loss.mask_losses(masks), [[mask_logits]]),
        (lambda: loss.keypoint_losses(keypoints), [[keypoint_logits]]),
    ]
    if model is not None and loss.regularization is not None:
        parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        evaluations.append((lambda: loss.regularization_losses(model), [parameters]))
    for evaluate, predictions in evaluations:
        try:
            for (key, value), of in zip(evaluate().items(), predictions, strict=True):
                _expect_usable(key, value, of, require_finite)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # a user's term may raise anything
            raise InputError(f"the loss fails on random RoIs: {described(error)}") from error


def _expect_usable(
    key: str, value: torch.Tensor, predictions: list[torch.Tensor], require_finite: bool
) -> None:
    """Expect a finite value with finite gradients to predictions, or to a model's parameters."""
    of = "the model" if key == TERMS["regularization"].key else "random RoIs"
    if require_finite and not value.isfinite():
        raise InputError(f"{key} of {of} is {float(value.detach())}, not finite")
    if not value.requires_grad:
        raise InputError(f"{key} of {of} has no gradient")
    gradients = torch.autograd.grad(value, predictions, retain_graph=True, allow_unused=True)
    known = [gradient for gradient in gradients if gradient is not None]
    if not known:
        raise InputError(f"{key} of {of} does not depend on what the model predicts")
    if require_finite and not all(gradient.isfinite().all() for gradient in known):
        raise InputError(f"the gradient of {key} of {of} is not finite")
