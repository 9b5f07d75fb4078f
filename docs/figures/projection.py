"""The projection loss of a mask that fills the box to some share of its width."""

from curves import plot_curves, square_mask

from maskloss import losses


def filled(loss):
    """Return the loss over the logits of the box's columns right of the middle; the left half is predicted."""
    box = square_mask()
    left = box.clone()
    left[:, 14:] = 0
    right = box - left

    def function(logit):
        logits = 6 * (2 * left - 1) + logit[:, None, None] * right + 6 * right
        return loss(logits, box.expand(len(logit), -1, -1))

    return function


plot_curves(
    "logit of the box's right half",
    -6,
    6,
    {
        "projection": filled(losses.mask_projection_loss),
        "Dice to the filled box": filled(losses.mask_dice_loss),
    },
)
