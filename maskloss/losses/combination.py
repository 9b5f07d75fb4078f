"""`WeightedSum`, a term that adds several losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from maskloss.losses.checks import check_in_range, check_same_shape
from maskloss.losses.term_checks import check_callable, check_unreduced, register_parts


class WeightedSum(nn.Module):
    """A weighted sum of losses that take the same arguments, such as BCE + Dice.

    Args:
        terms: the losses, each with `reduction="none"`. All return one tensor of the same shape.
        weights: one per term, >= 0; all 1 by default.

    Raises:
        TypeError: a term is a class or not callable, or `terms` is not a sequence.
        ValueError: `terms` is empty, a term reduces its values, the number of weights differs from the number of
            terms, a weight is negative or not finite, terms with and without `all_classes` are mixed (their arguments
            differ), or a term has `mask_probs`.

    Example:
        >>> import torch
        >>> from maskloss.losses import MaskBCELoss, MaskDiceLoss
        >>> loss = WeightedSum([MaskBCELoss(), MaskDiceLoss()], weights=[1.0, 2.0])
        >>> loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # ln 2 + 2 · 2/7
        tensor([1.2646])
    """

    def __init__(
        self, terms: Sequence[Callable[..., Tensor]], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(terms, Sequence) or isinstance(terms, str):
            raise TypeError(f"terms must be a list of losses, not {type(terms).__name__}")
        if not terms:
            raise ValueError("a sum needs at least one term")
        self.weights = tuple(float(w) for w in ([1.0] * len(terms) if weights is None else weights))
        if len(self.weights) != len(terms):
            raise ValueError(f"got {len(terms)} terms and {len(self.weights)} weights")
        for index, term in enumerate(terms):
            check_callable(f"term {index} of the sum", term)
            check_unreduced(f"term {index} of the sum", term)
        check_in_range(0, **{f"weights[{index}]": weight for index, weight in enumerate(self.weights)})
        all_classes = [bool(getattr(term, "all_classes", False)) for term in terms]
        if any(all_classes) != all(all_classes):
            raise ValueError(
                "a term of all classes' mask logits (all_classes = True) and a term of each RoI's own class take "
                "different arguments, so they cannot be added"
            )
        if any(getattr(term, "uses_mask_labels", False) for term in terms):
            raise ValueError("a MaskBySupervision cannot be part of a sum; use the sum as one of its terms")
        uses_image = [bool(getattr(term, "uses_image", False)) for term in terms]
        if any(uses_image) != all(uses_image):
            raise ValueError(
                "a term with uses_image = True and one without take different arguments, so they cannot be added"
            )
        if any(hasattr(term, "mask_probs") for term in terms):
            raise ValueError(
                "a term with mask_probs cannot be part of a sum: it computes the masks in inference, which a sum cannot"
            )
        self.all_classes = all_classes[0]
        self.uses_image = uses_image[0]
        self.terms = tuple(terms)
        # Modules among the terms are registered, so that they move to a device with the sum.
        self.registered = nn.ModuleList(term for term in terms if isinstance(term, nn.Module))
        register_parts(self, terms)

    def extra_repr(self) -> str:
        """Show the weights."""
        return f"weights={self.weights}"

    def forward(self, *arguments: Any) -> Tensor:
        """Return the weighted sum of the terms' values."""
        values = [term(*arguments) for term in self.terms]
        for index, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"term {index} of the sum must return a tensor, not {type(value).__name__}; a loss that also "
                    "returns weights for the divisor cannot be added to others"
                )
        check_same_shape(**{f"term_{index}": value for index, value in enumerate(values)})
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return sum(weighted[1:], start=weighted[0])
