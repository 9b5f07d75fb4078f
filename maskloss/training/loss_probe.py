"""Evaluate a loss on random RoIs before the first step, to find terms that cannot be trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from maskloss.errors import InputError
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import TERMS, KeypointBatch, MaskBatch, MaskLabels, RoIBatch, RPNBatch
from maskloss.training.import_paths import described
from maskloss.training.term_errors import failing_term


def probe_copy(
    loss: MaskRCNNLoss,
    num_classes: int,
    model: nn.Module,
    device: torch.device | None = None,
    *,
    require_finite: bool = True,
) -> None:
    """Probe a loss without changing its parameters or the statistics that its terms collect.

    Args:
        loss: the loss to check.
        num_classes: C of the model, background included.
        model: the model that the regularization term is evaluated on.
        device: where to evaluate. Terms may hold tensors that are already there.
        require_finite: also raise for values and gradients that are not finite.

    Raises:
        InputError: see `probe`.
    """
    state = {key: value.detach().clone() for key, value in loss.state_dict().items()}
    try:
        probed = copy.deepcopy(loss)
    except Exception:  # a user's term may not support copying; its state is restored below
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
        loss: the loss to check. Terms that collect statistics collect them from the random RoIs too.
        num_classes: C of the model, background included.
        model: the model that the regularization term is evaluated on. If omitted, this term is not probed.
        device: where to evaluate. The CPU if omitted.
        require_finite: also raise for values and gradients that are not finite.

    Raises:
        InputError: a term raises, returns another shape, does not depend on the predictions, or its value or gradient
            is not finite. The message names the term.
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
    kinds = sorted(loss.mask_supervision)
    # A few positives of each kind of label that the mask term learns from.
    rows = {kind: torch.arange(index, count, len(kinds), device=device) for index, kind in enumerate(kinds)}
    points = torch.rand(count, 4, 2, generator=generator).to(device)
    mask_labels = MaskLabels(
        targets,
        rows,
        gt_box_grids=torch.ones_like(targets),
        point_coords=points,
        point_labels=(points[..., 0] > 0.5).float(),
        image_crops=torch.zeros(count, 3, 7, 7, device=device),
    )
    masks = MaskBatch(mask_logits, targets, labels[positives], counts, mask_labels=mask_labels)
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
            for (key, value), inputs in zip(evaluate().items(), predictions, strict=True):
                _check_trainable(key, value, inputs, require_finite)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # a user's term may raise anything
            term = failing_term(loss, error)
            what = "the loss" if term is None else f"the {term} term"
            raise InputError(f"{what} fails on random RoIs: {described(error)}") from error


def _check_trainable(
    key: str, value: torch.Tensor, predictions: list[torch.Tensor], require_finite: bool
) -> None:
    """Check that a loss value has a gradient to predictions or parameters, and that both are finite if required."""
    source = "the model" if key == TERMS["regularization"].key else "random RoIs"
    if require_finite and not value.isfinite():
        raise InputError(f"{key} of {source} is {float(value.detach())}, not finite")
    if not value.requires_grad:
        raise InputError(f"{key} of {source} has no gradient")
    gradients = torch.autograd.grad(value, predictions, retain_graph=True, allow_unused=True)
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        raise InputError(f"{key} of {source} does not depend on what the model predicts")
    if require_finite and not all(gradient.isfinite().all() for gradient in found):
        raise InputError(f"the gradient of {key} of {source} is not finite")
