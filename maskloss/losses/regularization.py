"""Regularization terms: penalties on a model's weights, added to the loss.

All skip frozen parameters and the parameters of normalization layers, which are recognized by their type. A smaller
scale in a normalization layer does not make the function simpler, because another layer can compensate for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.checks import check_in_range
from maskloss.losses.modules import LossModule

#: Layers whose weights and biases are not regularized.
NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def regularized_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each trainable parameter once, except those of normalization layers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> [tuple(parameter.shape) for parameter in regularized_parameters(model)]
        [(3, 2), (3,)]
    """
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, NORMALIZATIONS):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


class RegularizationLoss(LossModule):
    """A penalty on a model's parameters: a term for `MaskRCNNLoss(regularization=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        super().__init__(function, nn.Module(), **knobs)

    def forward(self, model: nn.Module) -> Tensor:
        """Compute the penalty of a model."""
        loss: Tensor = self.function(model, **self.knobs)
        return loss


def matterport_l2_loss(model: nn.Module, *, weight_decay: float = 1e-4) -> Tensor:
    r"""Compute matterport's L2 term: the mean square of each parameter tensor, summed over the tensors.

    loss = λ Σ_w Σ_i w_i² / size(w). The number of weights in a tensor does not matter, so this differs from the
    weight decay of an optimizer, whose penalty is (λ/2) Σ_w Σ_i w_i².

    Args:
        model: any module.
        weight_decay: λ >= 0.

    Returns:
        Scalar, at least float32, >= 0; 0 for a model without trainable parameters outside normalization layers.

    Raises:
        ValueError: weight_decay < 0.

    Example:
        >>> from torch import nn
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(linear.weight, 3.0)
        >>> matterport_l2_loss(linear, weight_decay=0.5).item()  # 0.5 · (9 + 9) / 2
        4.5

    Source: matterport/Mask_RCNN 0038eff, `MaskRCNN.compile`: λ = 1e-4, including biases, without parameters that have
    "gamma" or "beta" in their names.
    """
    check_in_range(0, weight_decay=weight_decay)
    return weight_decay * _total(
        at_least_float32(p).square().mean() for p in regularized_parameters(model) if p.numel()
    )


class MatterportL2Loss(RegularizationLoss):
    """`matterport_l2_loss` with its λ."""

    def __init__(self, weight_decay: float = 1e-4) -> None:
        super().__init__(matterport_l2_loss, weight_decay=weight_decay)


def weight_decay_loss(model: nn.Module, *, weight_decay: float = 1e-4) -> Tensor:
    r"""Compute the L2 penalty (λ/2) Σ_w Σ_i w_i², whose gradient is that of SGD's `weight_decay`, λ w.

    Unlike the weight decay of an optimizer, it is part of the loss and skips normalization layers. An adaptive
    optimizer such as Adam scales its gradient like any other; AdamW's weight decay bypasses that scaling.

    Args:
        model: any module.
        weight_decay: λ >= 0.

    Returns:
        Scalar, at least float32, >= 0; 0 for a model without trainable parameters outside normalization layers.

    Raises:
        ValueError: weight_decay < 0.

    Example:
        >>> from torch import nn
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(linear.weight, 3.0)
        >>> weight_decay_loss(linear, weight_decay=0.5).item()  # 0.5 / 2 · (9 + 9)
        4.5

    Source: Krogh and Hertz, A simple weight decay can improve generalization, 1991, equation 2.
    """
    check_in_range(0, weight_decay=weight_decay)
    squares = (at_least_float32(p).square().sum() for p in regularized_parameters(model))
    return weight_decay / 2 * _total(squares)


class WeightDecayLoss(RegularizationLoss):
    """`weight_decay_loss` with its λ."""

    def __init__(self, weight_decay: float = 1e-4) -> None:
        super().__init__(weight_decay_loss, weight_decay=weight_decay)


def l1_regularization_loss(model: nn.Module) -> Tensor:
    r"""Compute the L1 penalty, the sum of the absolute values of all weights, Σ_w Σ_i |w_i|.

    A Mask R-CNN has tens of millions of weights, so set a small `LossWeights(regularization=...)`, about 1e-7.

    Args:
        model: any module.

    Returns:
        Scalar, at least float32, >= 0; 0 for a model without trainable parameters outside normalization layers.

    Example:
        >>> from torch import nn
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(linear.weight, -3.0)
        >>> l1_regularization_loss(linear).item()  # 3 + 3
        6.0

    Source: Tibshirani, Regression shrinkage and selection via the lasso, 1996.
    """
    return _total(at_least_float32(p).abs().sum() for p in regularized_parameters(model))


class L1RegularizationLoss(RegularizationLoss):
    """`l1_regularization_loss` as a term."""

    def __init__(self) -> None:
        super().__init__(l1_regularization_loss)


def _total(penalties: Iterator[Tensor]) -> Tensor:
    # fully_shard splits a parameter over processes; its penalty is that of the whole parameter.
    values = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in penalties]
    return torch.stack(values).sum() if values else torch.zeros(())
