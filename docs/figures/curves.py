"""Figures of the documentation: a loss and its gradient over one variable. `make docs` draws them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from maskloss import losses

Losses = dict[str, Callable[[Tensor], Tensor]]


def plot_curves(x_label: str, start: float, end: float, curves: Losses) -> None:
    """Draw each loss, a function (X,) -> (X,) of the variable, and beside it its derivative."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    for label, function in curves.items():
        x = torch.linspace(start, end, 401, dtype=torch.float64, requires_grad=True)
        values = function(x)
        (gradients,) = torch.autograd.grad(values.sum(), x)
        left.plot(x.detach(), values.detach(), label=label)
        right.plot(x.detach(), gradients, label=label)
    left.set(title="loss", xlabel=x_label)
    right.set(title="derivative", xlabel=x_label)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def pixel(loss: Callable[[Tensor, Tensor], Tensor], target: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return the loss of a mask of one pixel as a function of its logit."""
    return lambda logits: loss(logits[:, None, None], torch.full((len(logits), 1, 1), target).double())


def square_mask() -> Tensor:
    """Return a target of 28 x 28 cells, half of whose width and height an object fills."""
    target = torch.zeros(28, 28, dtype=torch.float64)
    target[7:21, 7:21] = 1
    return target


def whole_mask(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the loss of `square_mask` as a function of the signed logit of all cells, above 0 where right."""
    target = square_mask()
    return lambda confidence: loss(
        confidence[:, None, None] * (2 * target - 1), target.expand(len(confidence), -1, -1)
    )


def moved_box(loss: Callable[[losses.BoxRegression], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the loss of a box of 20 x 20 px as a function of its horizontal offset in px."""

    def function(offset: Tensor) -> Tensor:
        deltas = torch.stack([offset, 0 * offset, offset, 0 * offset], dim=1)
        box = torch.tensor([0.0, 0.0, 20.0, 20.0], dtype=torch.float64)
        return loss(losses.BoxRegression(deltas, torch.zeros_like(deltas), decode=lambda moved: box + moved))

    return function


def one_delta(loss: Callable[[losses.BoxRegression], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the loss of one wrong box delta as a function of its error."""

    def function(error: Tensor) -> Tensor:
        deltas = torch.stack([error, 0 * error, 0 * error, 0 * error], dim=1)
        return loss(losses.BoxRegression(deltas, torch.zeros_like(deltas)))

    return function


def class_logit(loss: Callable[[Tensor, Tensor], Tensor], classes: int = 4) -> Callable[[Tensor], Tensor]:
    """Return the loss of a RoI of class 1 as a function of that class's logit, with all others at 0."""

    def function(logit: Tensor) -> Tensor:
        logits = logit[:, None] * torch.eye(classes, dtype=torch.float64)[1]
        return loss(logits, torch.ones(len(logit), dtype=torch.long))

    return function


def anchor_logit(loss: Callable[[Tensor, Tensor], Tensor], label: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return the loss of an anchor as a function of its logit."""
    return lambda logits: loss(logits, torch.full_like(logits, label).detach())
