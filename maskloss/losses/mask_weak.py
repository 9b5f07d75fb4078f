"""Mask losses for weak labels: a few labeled points, or only a box.

`MaskBySupervision` combines them with a loss for whole masks, so that each object is supervised by the best label that
it has. Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.arithmetic import at_least_float32, reduced
from maskloss.losses.checks import Reduction, check_in_range, check_integer, check_same_shape
from maskloss.losses.modules import LossModule

#: ε, added to the divisor of a projection's Dice loss, as in BoxInst.
_DICE_EPSILON = 1e-5


def sample_at_points(values: Tensor, point_coords: Tensor) -> Tensor:
    """Sample maps bilinearly at points.

    Args:
        values: (P, C, H, W).
        point_coords: (P, K, 2), x and y in [0, 1], relative to the outer edges of the map.

    Returns:
        (P, C, K) in the dtype of `values`. Within half a cell of an edge, values fade toward 0.

    Example:
        >>> import torch
        >>> values = torch.tensor([[[[1.0, 3.0]]]])  # cell centers at x = 1/4 and 3/4
        >>> sample_at_points(values, torch.tensor([[[0.25, 0.5], [0.5, 0.5]]]))
        tensor([[[1., 2.]]])

    Source: Kirillov et al., PointRend, 2019, arXiv:1912.08193; Detectron2's `point_sample`.
    """
    grid = 2 * point_coords.to(values.dtype)[:, :, None] - 1  # (P, K, 1, 2)
    return F.grid_sample(values, grid, align_corners=False)[..., 0]


def mask_point_loss(
    mask_logits: Tensor, point_coords: Tensor, point_labels: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the mean binary cross-entropy at labeled points, instead of over a whole mask.

    With x_k the logit sampled bilinearly at point k, y_k the label of the point, and w_k = 1 if it has a label, else 0,
    loss = (1/K) Σ_k w_k BCE(sigmoid(x_k), y_k). Points without a label count in K, so that a point has the same weight
    in every object.

    Args:
        mask_logits: (P, M, M), pre-sigmoid.
        point_coords: (P, K, 2), x and y in [0, 1], relative to the RoI.
        point_labels: (P, K): 1 inside the object, 0 outside, -1 for no label, for example outside the RoI.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. P = 0 or K = 0 returns zeros that still backpropagate.

    Raises:
        ValueError: shapes differ from the above.

    Example:
        >>> import torch
        >>> points = torch.tensor([[[0.5, 0.5], [0.9, 0.9]]])
        >>> mask_point_loss(torch.zeros(1, 2, 2), points, torch.tensor([[1, -1]]))  # ln 2 at one of two points
        tensor([0.3466])

    Source: Cheng et al., Pointly-supervised instance segmentation, 2021, arXiv:2104.06404, section 3.
    """
    if mask_logits.dim() != 3 or point_coords.shape != (len(mask_logits), point_coords.shape[1], 2):
        raise ValueError(
            f"mask_logits must be (P, M, M) and point_coords (P, K, 2), not {tuple(mask_logits.shape)} and "
            f"{tuple(point_coords.shape)}"
        )
    check_same_shape(point_labels=point_labels, x_of_point_coords=point_coords[..., 0])
    logits = sample_at_points(at_least_float32(mask_logits)[:, None], point_coords)[:, 0]  # (P, K)
    labels = point_labels.to(logits.dtype)
    per_point = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
    per_point = torch.where(labels >= 0, per_point, 0.0)
    return reduced(per_point.sum(dim=1) / max(per_point.shape[1], 1), reduction)


class MaskPointLoss(LossModule):
    """`mask_point_loss` as a module."""

    of_weak_labels = True

    def __init__(self, reduction: Reduction = "none") -> None:
        no_logits, no_points = torch.zeros(0, 1, 1), torch.zeros(0, 1, 2)
        super().__init__(mask_point_loss, no_logits, no_points, no_points[..., 0], reduction=reduction)

    def forward(self, mask_logits: Tensor, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        """Compute `mask_point_loss`."""
        return mask_point_loss(mask_logits, point_coords, point_labels, **self.knobs)


def mask_projection_loss(
    mask_logits: Tensor, gt_box_grids: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the Dice loss between the projections of each RoI's mask and box, summed over the x and the y axis.

    With p = sigmoid(mask_logits), m_x and m_y the maxima of p over the rows and over the columns, b_x and b_y those of
    the box, and D(m, b) = 1 - 2 Σ m b / (Σ m² + Σ b² + ε), loss = D(m_x, b_x) + D(m_y, b_y). A mask has the
    lowest loss if it lies inside the box and occupies part of each of the box's rows and columns, whatever its shape.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        gt_box_grids: same shape as the logits, in [0, 1]: the matched ground-truth box in the grid of the RoI.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 2]. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> import torch
        >>> box = torch.ones(1, 2, 2)
        >>> mask = torch.tensor([[[0., 0.], [0., 1.]]])  # on each axis 1 of the box's 2 cells
        >>> mask_projection_loss(40 * mask - 20, box)  # 2 · (1 - 2 · 1 / (1 + 2))
        tensor([0.6667])

    Source: Tian et al., BoxInst, 2020, arXiv:2012.02310, equation 3, with the squared divisor and ε = 1e-5 of its code.
    """
    check_same_shape(mask_logits=mask_logits, gt_box_grids=gt_box_grids)
    p = at_least_float32(mask_logits).sigmoid()
    boxes = gt_box_grids.to(p.dtype)
    loss = _squared_dice(p.amax(dim=-2), boxes.amax(dim=-2)) + _squared_dice(
        p.amax(dim=-1), boxes.amax(dim=-1)
    )
    return reduced(loss, reduction)


class MaskProjectionLoss(LossModule):
    """`mask_projection_loss` as a module."""

    of_weak_labels = True

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(mask_projection_loss, *2 * [torch.zeros(0, 1, 1)], reduction=reduction)

    def forward(self, mask_logits: Tensor, gt_box_grids: Tensor) -> Tensor:
        """Compute `mask_projection_loss`."""
        return mask_projection_loss(mask_logits, gt_box_grids, **self.knobs)


def _squared_dice(p: Tensor, t: Tensor) -> Tensor:
    overlap = 2 * (p * t).sum(dim=-1)
    return 1 - overlap / (p.square().sum(dim=-1) + t.square().sum(dim=-1) + _DICE_EPSILON)


def mask_pairwise_loss(
    mask_logits: Tensor,
    image_crops: Tensor,
    gt_box_grids: Tensor,
    *,
    color_threshold: float = 0.3,
    dilation: int = 2,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the pairwise loss, which is low if neighboring pixels of similar color are both inside or both outside.

    An edge e joins a pixel i to one of its eight neighbors j at a distance of `dilation`. With
    p = sigmoid(mask_logits), P_e = p_i p_j + (1 - p_i)(1 - p_j) the probability that both pixels agree, and E the
    edges from pixels inside the box with a color similarity of at least τ,
    loss = -(1 / max(|E|, 1)) Σ_{e in E} log P_e. Together with `mask_projection_loss`, it trains masks from boxes
    alone.

    Args:
        mask_logits: (P, M, M), pre-sigmoid.
        image_crops: (P, 3, M, M), RGB in [0, 1], the image in the grid of the RoI.
        gt_box_grids: (P, M, M), in [0, 1]; at least 0.5 inside the matched ground-truth box.
        color_threshold: τ in [0, 1].
        dilation: distance of the neighbors in pixels, at least 1.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0; 0 for an object without edges in E. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: shapes differ from the above, or a knob is out of its range.

    Example:
        >>> import torch
        >>> crops = torch.zeros(1, 3, 3, 3)  # one color, so that all edges count, each with P_e = 1/4 + 1/4
        >>> mask_pairwise_loss(torch.zeros(1, 3, 3), crops, torch.ones(1, 3, 3), dilation=1)  # ln 2
        tensor([0.6931])

    Source: Tian et al., BoxInst, 2020, arXiv:2012.02310, equations 5 to 7; τ = 0.3 and dilation 2 are its defaults.
    BoxInst divides by the number of edges in the whole batch; here each object is divided by its own edges.
    """
    check_same_shape(mask_logits=mask_logits, gt_box_grids=gt_box_grids)
    _check_image_crops(image_crops, mask_logits)
    check_in_range(0, 1, color_threshold=color_threshold)
    check_integer(dilation=dilation)
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    similarity = color_similarity(
        rgb_to_lab(at_least_float32(image_crops)), dilation=dilation
    )  # (P, 8, M, M)
    is_inside = neighbors(torch.ones_like(gt_box_grids[:, None]), dilation=dilation)[:, 0] > 0
    counted = is_inside & (similarity >= color_threshold) & (gt_box_grids >= 0.5)[:, None]
    disagreement = pairwise_disagreement(mask_logits, dilation=dilation)  # (P, 8, M, M)
    values = torch.where(counted, disagreement, 0.0).sum(dim=(1, 2, 3))
    return reduced(values / counted.sum(dim=(1, 2, 3)).clamp(min=1), reduction)


def _check_image_crops(image_crops: Tensor, mask_logits: Tensor) -> None:
    expected = (len(mask_logits), 3, *mask_logits.shape[1:])
    if image_crops.shape != expected:
        raise ValueError(
            f"image_crops must have three channels for each mask, {tuple(expected)}, got {tuple(image_crops.shape)}"
        )


class MaskPairwiseLoss(LossModule):
    """`mask_pairwise_loss` with its threshold and dilation."""

    of_weak_labels = True
    uses_image = True

    def __init__(
        self, color_threshold: float = 0.3, dilation: int = 2, reduction: Reduction = "none"
    ) -> None:
        super().__init__(
            mask_pairwise_loss,
            torch.zeros(0, 1, 1),
            torch.zeros(0, 3, 1, 1),
            torch.zeros(0, 1, 1),
            color_threshold=color_threshold,
            dilation=dilation,
            reduction=reduction,
        )

    def forward(self, mask_logits: Tensor, image_crops: Tensor, gt_box_grids: Tensor) -> Tensor:
        """Compute `mask_pairwise_loss`."""
        return mask_pairwise_loss(mask_logits, image_crops, gt_box_grids, **self.knobs)


def mask_box_loss(
    mask_logits: Tensor,
    image_crops: Tensor,
    gt_box_grids: Tensor,
    *,
    pairwise_weight: float = 1.0,
    color_threshold: float = 0.3,
    dilation: int = 2,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute BoxInst's mask loss of an object with only a box: projection loss + λ pairwise loss.

    Args:
        mask_logits: (P, M, M), pre-sigmoid.
        image_crops: (P, 3, M, M), RGB in [0, 1], the image in the grid of the RoI.
        gt_box_grids: (P, M, M), in [0, 1]: the matched ground-truth box in the grid of the RoI.
        pairwise_weight: λ >= 0.
        color_threshold: see `mask_pairwise_loss`.
        dilation: see `mask_pairwise_loss`.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: shapes differ from the above, or a knob is out of its range.

    Example:
        >>> import torch
        >>> crops = torch.zeros(1, 3, 3, 3)
        >>> mask_box_loss(torch.zeros(1, 3, 3), crops, torch.ones(1, 3, 3), dilation=1)  # 2 / 5 + ln 2
        tensor([1.0932])

    Source: Tian et al., BoxInst, 2020, arXiv:2012.02310, equation 8.
    """
    check_in_range(0, pairwise_weight=pairwise_weight)
    return _box_loss(
        mask_logits,
        image_crops,
        gt_box_grids,
        pairwise_weight,
        color_threshold=color_threshold,
        dilation=dilation,
        reduction=reduction,
    )


def _box_loss(
    mask_logits: Tensor,
    image_crops: Tensor,
    gt_box_grids: Tensor,
    pairwise_weight: float | Tensor,
    *,
    reduction: Reduction,
    **knobs: Any,
) -> Tensor:
    """Compute `mask_box_loss`, also with a weight on the device, whose range cannot be checked without waiting."""
    projection = mask_projection_loss(mask_logits, gt_box_grids)
    pairwise = mask_pairwise_loss(mask_logits, image_crops, gt_box_grids, **knobs)
    return reduced(projection + pairwise_weight * pairwise, reduction)


class MaskBoxLoss(LossModule):
    """`mask_box_loss` with its knobs, and a warm-up of the pairwise weight.

    At first, all pixels of a mask are about equally uncertain, and the pairwise loss would only keep them that way.

    Args:
        pairwise_weight: λ of `mask_box_loss` after the warm-up.
        warmup_steps: number of training steps in which the weight rises linearly from 0; 10,000 in BoxInst.
        color_threshold: see `mask_pairwise_loss`.
        dilation: see `mask_pairwise_loss`.
        reduction: see `mask_box_loss`.

    Raises:
        ValueError: a knob is out of its range.
    """

    of_weak_labels = True
    uses_image = True
    #: Number of training steps so far; int64, saved with the loss.
    steps: Tensor

    def __init__(
        self,
        pairwise_weight: float = 1.0,
        warmup_steps: int = 0,
        color_threshold: float = 0.3,
        dilation: int = 2,
        reduction: Reduction = "none",
    ) -> None:
        no_masks = torch.zeros(0, 1, 1)
        super().__init__(
            mask_box_loss,
            no_masks,
            torch.zeros(0, 3, 1, 1),
            no_masks,
            pairwise_weight=pairwise_weight,
            color_threshold=color_threshold,
            dilation=dilation,
            reduction=reduction,
        )
        check_integer(warmup_steps=warmup_steps)
        check_in_range(0, warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Show the knobs and the warm-up."""
        return f"{super().extra_repr()}, warmup_steps={self.warmup_steps}"

    def forward(self, mask_logits: Tensor, image_crops: Tensor, gt_box_grids: Tensor) -> Tensor:
        """Compute `mask_box_loss`, and count the step in training."""
        knobs = self.knobs
        # Computed on the device, because reading the number of steps would synchronize.
        ramp = (self.steps / max(self.warmup_steps, 1)).clamp(max=1.0) if self.warmup_steps else 1.0
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        weight = knobs.pop("pairwise_weight") * ramp
        return _box_loss(mask_logits, image_crops, gt_box_grids, weight, **knobs)


def pairwise_disagreement(mask_logits: Tensor, *, dilation: int = 2) -> Tensor:
    """Return -log of the probability that a pixel and each of its neighbors are both inside or both outside.

    Args:
        mask_logits: (P, M, M), pre-sigmoid.
        dilation: distance of the neighbors in pixels.

    Returns:
        (P, 8, M, M), at least float32. Beyond the border of the grid, both log probabilities of the neighbor are taken
        as 0, as in BoxInst.

    Example:
        >>> import torch
        >>> pairwise_disagreement(torch.zeros(1, 3, 3), dilation=1)[0, 0, 1, 1]  # -ln(1/4 + 1/4)
        tensor(0.6931)
    """
    logits = at_least_float32(mask_logits)
    log_in, log_out = F.logsigmoid(logits), F.logsigmoid(-logits)
    both_in = log_in[:, None] + neighbors(log_in[:, None], dilation=dilation)[:, 0]
    both_out = log_out[:, None] + neighbors(log_out[:, None], dilation=dilation)[:, 0]
    return -torch.logaddexp(both_in, both_out)


def color_similarity(image_crops: Tensor, *, dilation: int = 2) -> Tensor:
    """Return the color similarity of each pixel and its eight neighbors, exp(-‖c_i - c_j‖ / 2).

    Args:
        image_crops: (P, 3, M, M), in Lab, with L in [0, 100]: see `rgb_to_lab`.
        dilation: distance of the neighbors in pixels.

    Returns:
        (P, 8, M, M) in [0, 1]; 0 for neighbors beyond the border.

    Example:
        >>> import torch
        >>> color_similarity(torch.zeros(1, 3, 2, 2), dilation=1)[0, :, 0, 0]  # three neighbors of the same color
        tensor([0., 0., 0., 0., 1., 0., 1., 1.])

    Source: Tian et al., BoxInst, 2020, arXiv:2012.02310, equation 6, with θ = 2.
    """
    difference = image_crops[:, :, None] - neighbors(image_crops, dilation=dilation)  # (P, 3, 8, M, M)
    is_inside = neighbors(torch.ones_like(image_crops[:, :1]), dilation=dilation)[:, 0]
    return torch.exp(-0.5 * difference.norm(dim=1)) * is_inside


def neighbors(values: Tensor, *, dilation: int) -> Tensor:
    """Return the eight neighbors of each pixel, row by row, with 0 beyond the border.

    Args:
        values: (P, C, M, M).
        dilation: distance of the neighbors along each axis, in pixels.

    Returns:
        (P, C, 8, M, M).

    Example:
        >>> import torch
        >>> neighbors(torch.arange(9.0).reshape(1, 1, 3, 3), dilation=1)[0, 0, :, 1, 1]
        tensor([0., 1., 2., 3., 5., 6., 7., 8.])
    """
    height, width = values.shape[-2:]
    padded = F.pad(values, (dilation,) * 4)
    shifts = [(y, x) for y in (0, 1, 2) for x in (0, 1, 2) if (y, x) != (1, 1)]
    return torch.stack(
        [
            padded[..., y * dilation : y * dilation + height, x * dilation : x * dilation + width]
            for y, x in shifts
        ],
        dim=2,
    )


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB to CIE Lab under the D65 illuminant.

    Args:
        images: (P, 3, H, W), RGB in [0, 1].

    Returns:
        (P, 3, H, W): L in [0, 100], a and b in about [-128, 127].

    Example:
        >>> import torch
        >>> rgb_to_lab(torch.zeros(1, 3, 1, 1)).flatten()  # black
        tensor([0., 0., 0.])

    Source: IEC 61966-2-1 (sRGB) and CIE 15 (Lab), with the D65 white point of the 2° observer.
    """
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055).clamp(min=0) ** 2.4, images / 12.92)
    to_xyz = images.new_tensor(
        [
            [0.412453, 0.357580, 0.180423],
            [0.212671, 0.715160, 0.072169],
            [0.019334, 0.119193, 0.950227],
        ]
    )
    white = images.new_tensor([0.95047, 1.0, 1.08883])[:, None, None]
    xyz = torch.einsum("ij,pjhw->pihw", to_xyz, linear) / white
    cube_root = xyz.clamp(min=0.008856) ** (1 / 3)
    x, y, z = torch.where(xyz > 0.008856, cube_root, 7.787 * xyz + 16 / 116).unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
