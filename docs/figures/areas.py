"""Losses of whole masks, over how certain each cell is."""

from curves import plot_curves, whole_mask

from maskloss import losses

plot_curves(
    "signed logit of every cell, right if > 0",
    -6,
    6,
    {
        "Dice": whole_mask(losses.MaskDiceLoss()),
        "generalized Dice": whole_mask(losses.MaskGeneralizedDiceLoss()),
        "background Dice": whole_mask(losses.MaskBackgroundDiceLoss()),
        "Tversky, 0.3, 0.7": whole_mask(losses.MaskTverskyLoss()),
        "cross-entropy / 6": whole_mask(lambda logits, targets: losses.mask_bce_loss(logits, targets) / 6),
    },
)
