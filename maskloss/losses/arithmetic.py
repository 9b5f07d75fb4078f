"""Arithmetic shared by the losses: float32 for half-precision inputs, exact probabilities, the three reductions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.checks import Reduction, check_reduction


def power(base: Tensor, exponent: float) -> Tensor:
    """Return `base ** exponent` for an exponent >= 0, with a finite gradient where the base is 0.

    For an exponent below 1, autograd's gradient at 0 is infinite, and NaN once it is multiplied by a loss of 0; here it
    is 0.
    A base that rounding has made negative counts as 0, because its fractional powers are NaN.

    Example:
        >>> import torch
        >>> base = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> power(base, 0.5).sum().backward()
        >>> base.grad  # 0 instead of infinity, and 1 / (2 √4)
        tensor([0.0000, 0.2500])
    """
    base = base.clamp(min=0)
    if exponent == 0 or exponent >= 1:
        return base**exponent
    above = base > 0
    return torch.where(above, torch.where(above, base, 1.0) ** exponent, 0.0)


def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """Return the focal loss of each logit, -α_t (1 - p_t)^γ log p_t, with p_t the probability of its target.

    Unlike `torchvision.ops.sigmoid_focal_loss`, its gradient is finite for every γ >= 0, also for γ in (0, 1)
    where p_t is 1.

    Args:
        logits: at least float32, any shape.
        targets: same shape and dtype as the logits, in [0, 1].
        alpha: α in [0, 1], the weight of positives; negatives have 1 - α. None for no weights.
        gamma: γ >= 0.

    Example:
        >>> import torch
        >>> sigmoid_focal(torch.zeros(1), torch.ones(1), alpha=0.25, gamma=2.0)  # 0.25 · (1/2)² · ln 2
        tensor([0.0433])
    """
    p, q = probabilities(logits)
    missed = p * (1 - targets) + q * targets  # 1 - p_t
    values = power(missed, gamma) * binary_cross_entropy(logits, targets)
    return values if alpha is None else (alpha * targets + (1 - alpha) * (1 - targets)) * values


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of each logit, -t log p - (1 - t) log(1 - p).

    Its gradient is accurate for logits far from 0 too, where that of `F.binary_cross_entropy_with_logits`,
    p - t, keeps few digits.

    Example:
        >>> import torch
        >>> binary_cross_entropy(torch.zeros(1), torch.ones(1))  # ln 2
        tensor([0.6931])
    """
    return -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits))


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return p = sigmoid(logits) and q = 1 - p, the smaller of the two exact to rounding.

    Where p is near 1, `1 - p` and the derivative p (1 - p) of `sigmoid` keep few digits in float32: at a logit of 12
    they are 1 % off, at 17 they are 0.

    Example:
        >>> import torch
        >>> p, q = probabilities(torch.tensor([20.0]))
        >>> q, 1 - torch.tensor([20.0]).sigmoid()  # e^-20, and what rounding leaves of it
        (tensor([2.0612e-09]), tensor([0.]))
    """
    # Products take a tenth of the time of torch.where on a CPU. The sign is a constant ±1, also at a logit of 0, where
    # the derivative of abs would be 0.
    is_high = (logits > 0).to(logits.dtype)
    sign = 1 - 2 * is_high
    smaller = sign * (sign * logits).sigmoid()
    return is_high + smaller, (1 - is_high) - smaller


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in half precision, bool or integer; float32 and float64 stay as they are.

    Example:
        >>> import torch
        >>> at_least_float32(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Apply `reduction` to values, one per RoI.

    The mean of no values is 0 and backpropagates; torch's mean would be NaN.

    Raises:
        ValueError: the reduction is not "none", "sum" or "mean".

    Example:
        >>> import torch
        >>> reduced(torch.tensor([1.0, 3.0]), "mean"), reduced(torch.zeros(0), "mean")
        (tensor(2.), tensor(0.))
    """
    if check_reduction(reduction) == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)
