"""Terms that are sums of terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from maskloss.losses.checks import check_in_range, check_same_shape
from maskloss.losses.term_checks import check_callable, check_unreduced, register_parts


class WeightedSum(nn.Module):
    """A weighted sum of losses that take the same arguments, such as BCE + Dice.

    Args:
        terms: the losses, each giving one tensor of the same shape: `reduction="none"`.
        weights: of each; all 1 where not given.

    Raises:
        TypeError: a term is a class, or no callable; or the terms are no sequence.
        ValueError: no terms, a term that reduces its values, another number of weights, a weight that is negative or
            infinite, terms with and without `all_classes` together, whose arguments differ, or a term with
            `mask_probs`.

    Example:
        >>> from maskloss.losses import MaskBCELoss, MaskDiceLoss
        >>> WeightedSum([MaskBCELoss(), MaskDiceLoss()], weights=[1.0, 2.0]).weights
        (1.0, 2.0)
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
            raise ValueError("some terms take all classes' mask logits and some their own class's: no sum")
        if any(hasattr(term, "mask_probs") for term in terms):
            raise ValueError("a term with mask_probs changes inference, which a sum has no one answer for")
        self.all_classes = all_classes[0]
        self.terms = tuple(terms)
        # Modules among them are registered, so that they move with the sum to a device.
        self.registered = nn.ModuleList(term for term in terms if isinstance(term, nn.Module))
        register_parts(self, terms)

    def extra_repr(self) -> str:
        """Show the weights."""
        return f"weights={self.weights}"

    def forward(self, *arguments: Any) -> Tensor:
        """Give the weighted sum of what the terms give."""
        values = [term(*arguments) for term in self.terms]
        for index, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"term {index} of the sum gives a {type(value).__name__}, not a tensor: a loss that gives its "
                    "weights too, which enter the divisor, cannot be added to one that does not"
                )
        check_same_shape(**{f"term_{index}": value for index, value in enumerate(values)})
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return sum(weighted[1:], start=weighted[0])
