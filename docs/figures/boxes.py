"""Losses of decoded boxes."""

from curves import moved_box, plot_curves

from maskloss import losses

plot_curves(
    "horizontal offset of a box of 20 x 20 px, px",
    -40,
    40,
    {
        "IoU": moved_box(losses.BoxIoULoss()),
        "GIoU": moved_box(losses.BoxGIoULoss()),
        "DIoU, CIoU": moved_box(losses.BoxDIoULoss()),
    },
)
