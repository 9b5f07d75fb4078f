"""Losses of box deltas."""

from curves import one_delta, plot_curves

from maskloss import losses

plot_curves(
    "error of one delta",
    -2,
    2,
    {
        "smooth L1, β = 1/9": one_delta(losses.BoxSmoothL1Loss(beta=1 / 9)),
        "smooth L1, β = 1": one_delta(losses.BoxSmoothL1Loss(beta=1.0)),
        "balanced L1": one_delta(losses.BoxBalancedL1Loss()),
    },
)
