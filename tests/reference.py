"""Reference implementations of the formulas: slow loops over Python floats, written from the papers.

The functions take tensors and return Python numbers. They share no arithmetic with the package that they test.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def mask_bce(mask_logits: Tensor, mask_targets: Tensor) -> list[float]:
    """Mask R-CNN, section 3: the average binary cross-entropy over each RoI's mask."""
    losses = []
    for logits, targets in zip(mask_logits.tolist(), mask_targets.tolist(), strict=True):
        total, cells = 0.0, 0
        for logit_row, target_row in zip(logits, targets, strict=True):
            for logit, target in zip(logit_row, target_row, strict=True):
                p = sigmoid(logit)
                total -= target * math.log(p) + (1 - target) * math.log(1 - p)
                cells += 1
        losses.append(total / cells)
    return losses


def smooth_l1(deltas: Tensor, target_deltas: Tensor, beta: float) -> list[float]:
    """Fast R-CNN, equation 3, with the corner at beta instead of 1; summed over a box's coordinates."""
    losses = []
    for delta, target in zip(deltas.tolist(), target_deltas.tolist(), strict=True):
        total = 0.0
        for predicted, wanted in zip(delta, target, strict=True):
            d = abs(predicted - wanted)
            total += d * d / (2 * beta) if d < beta else d - beta / 2
        losses.append(total)
    return losses


def giou(boxes: Tensor, target_boxes: Tensor) -> list[float]:
    """Generalized Intersection over Union, algorithm 1: 1 - (IoU - |C without the union| / |C|)."""
    losses = []
    for (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) in zip(boxes.tolist(), target_boxes.tolist(), strict=True):
        width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
        intersection = max(width, 0.0) * max(height, 0.0)
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
        hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
        losses.append(1 - (intersection / union - (hull - union) / hull))
    return losses


def cross_entropy(class_logits: Tensor, labels: Tensor) -> list[float]:
    losses = []
    for logits, label in zip(class_logits.tolist(), labels.tolist(), strict=True):
        highest = max(logits)
        normalizer = highest + math.log(sum(math.exp(logit - highest) for logit in logits))
        losses.append(normalizer - logits[label])
    return losses


def active_class_cross_entropy(class_logits: Tensor, labels: Tensor, active: list[bool]) -> tuple[list, list]:
    """matterport's `mrcnn_class_loss_graph`: values and weights of the RoIs predicted as an active class."""
    weights = [float(active[logits.index(max(logits))]) for logits in class_logits.tolist()]
    losses = cross_entropy(class_logits, labels)
    return [loss * weight for loss, weight in zip(losses, weights, strict=True)], weights


def l2_regularization(weights: list[Tensor], weight_decay: float) -> float:
    """matterport's `compile`: weight decay times the sum of squares over the size, for each tensor."""
    total = 0.0
    for weight in weights:
        values = weight.detach().reshape(-1).tolist()
        total += weight_decay * math.fsum(value * value for value in values) / len(values)
    return total


def l1_regularization(weights: list[Tensor]) -> float:
    return math.fsum(abs(value) for weight in weights for value in weight.detach().reshape(-1).tolist())


def module_of(*weights: Tensor) -> nn.Module:
    """Return a model with only these parameters."""
    module = nn.Module()
    for index, weight in enumerate(weights):
        module.register_parameter(f"weight_{index}", nn.Parameter(weight.clone()))
    return module


def pasted(grid: Tensor, box: list[float], height: int, width: int, *, aligned: bool) -> Tensor:
    """Paste one (M, M) grid into an image of zeros, one pixel and four grid cells at a time.

    The grid covers the box, with cell centers at half cells, and is 0 outside. Only pixels whose center is in the box
    are set. If aligned, the value of a pixel is read at its center. If not, it is read half a pixel further up and to
    the left, and a cell beyond the top or left edge is a tenth of the edge cell.
    """
    values, size = grid.tolist(), grid.shape[0]
    x1, y1, x2, y2 = box

    def cell(row: int, column: int) -> float:
        share = 1.0
        if not aligned:
            share = (0.1 if row == -1 else 1.0) * (0.1 if column == -1 else 1.0)
            row, column = (0 if row == -1 else row), (0 if column == -1 else column)
        if not (0 <= row < size and 0 <= column < size):
            return 0.0
        return share * values[row][column]

    image = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            if not (y1 <= i + 0.5 < y2 and x1 <= j + 0.5 < x2):
                continue
            read_at = 0.5 if aligned else 0.0
            v = min(max((i + read_at - y1) / (y2 - y1) * size - 0.5, -1.0), float(size))
            u = min(max((j + read_at - x1) / (x2 - x1) * size - 0.5, -1.0), float(size))
            top, left = math.floor(v), math.floor(u)
            image[i, j] = (
                (top + 1 - v) * (left + 1 - u) * cell(top, left)
                + (top + 1 - v) * (u - left) * cell(top, left + 1)
                + (v - top) * (left + 1 - u) * cell(top + 1, left)
                + (v - top) * (u - left) * cell(top + 1, left + 1)
            )
    return image


def clipped_area(polygon: np.ndarray, x1: float, y1: float, x2: float, y2: float) -> float:
    """Return the area of a simple polygon (V, 2) inside a rectangle, clipped by Sutherland and Hodgman's algorithm."""
    points = [tuple(point) for point in polygon.tolist()]
    for axis, bound, sign in ((0, x1, 1), (0, x2, -1), (1, y1, 1), (1, y2, -1)):
        kept = []
        for start, end in zip(points, points[1:] + points[:1], strict=True):
            inside, next_inside = sign * (start[axis] - bound) >= 0, sign * (end[axis] - bound) >= 0
            if inside:
                kept.append(start)
            if inside != next_inside:
                t = (bound - start[axis]) / (end[axis] - start[axis])
                kept.append(tuple(a + t * (b - a) for a, b in zip(start, end, strict=True)))
        points = kept
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return abs(math.fsum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs)) / 2


def clipped_coverage(polygon: np.ndarray, box: list[float], size: int) -> Tensor:
    """Return the fraction (M, M) of each cell of the box's grid that is inside a simple polygon."""
    x1, y1, x2, y2 = box
    width, height = (x2 - x1) / size, (y2 - y1) / size
    rows = [
        [
            clipped_area(
                polygon, x1 + j * width, y1 + i * height, x1 + (j + 1) * width, y1 + (i + 1) * height
            )
            for j in range(size)
        ]
        for i in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64) / (width * height)


def supersampled_coverage(polygons: list[np.ndarray], box: list[float], size: int, samples: int) -> Tensor:
    """Return the fraction (M, M) of each cell that is inside the union of polygons (V, 2), by counting points.

    A point is inside a polygon when a ray to the right crosses its outline an odd number of times.
    """
    x1, y1, x2, y2 = box
    steps = (np.arange(size * samples) + 0.5) / (size * samples)
    x, y = np.meshgrid(x1 + steps * (x2 - x1), y1 + steps * (y2 - y1))
    union = np.zeros(x.shape, dtype=bool)
    for polygon in polygons:
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            if ay != by:
                crosses = (ay > y) != (by > y)
                inside ^= crosses & (x < ax + (y - ay) * (bx - ax) / (by - ay))
        union |= inside
    return torch.from_numpy(union.reshape(size, samples, size, samples).mean(axis=(1, 3)))


def boundary_bce(
    mask_logits: Tensor, mask_targets: Tensor, boundary_weight: float, width: int
) -> list[float]:
    """F3Net's weighted cross-entropy, with windows cut off at the border."""
    losses = []
    for logits, targets in zip(mask_logits.tolist(), mask_targets.tolist(), strict=True):
        rows, columns, reach = len(logits), len(logits[0]), width // 2
        total = weights = 0.0
        for y in range(rows):
            for x in range(columns):
                window = [
                    targets[v][u]
                    for v in range(max(y - reach, 0), min(y + reach + 1, rows))
                    for u in range(max(x - reach, 0), min(x + reach + 1, columns))
                ]
                weight = 1 + boundary_weight * abs(sum(window) / len(window) - targets[y][x])
                p, t = sigmoid(logits[y][x]), targets[y][x]
                total -= weight * (t * math.log(p) + (1 - t) * math.log(1 - p))
                weights += weight
        losses.append(total / weights)
    return losses


def softmax(logits: list[float]) -> list[float]:
    highest = max(logits)
    exponentials = [math.exp(logit - highest) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def mask_softmax(mask_logits: Tensor, mask_targets: Tensor, labels: list[int]) -> list[float]:
    """Mask R-CNN, table 2b: a softmax over the classes at every pixel; background is class 0."""
    losses = []
    for logits, targets, label in zip(mask_logits, mask_targets.tolist(), labels, strict=True):
        costs = []
        for y, row in enumerate(targets):
            for x, t in enumerate(row):
                q = softmax(logits[:, y, x].tolist())
                costs.append(-(t * math.log(q[label]) + (1 - t) * math.log(q[0])))
        losses.append(sum(costs) / len(costs))
    return losses


def balanced_l1(
    deltas: Tensor, target_deltas: Tensor, alpha: float, gamma: float, beta: float
) -> list[float]:
    """Libra R-CNN, equation 8, with the corner at beta."""
    b = math.exp(gamma / alpha) - 1
    losses = []
    for delta, target in zip(deltas.tolist(), target_deltas.tolist(), strict=True):
        total = 0.0
        for predicted, wanted in zip(delta, target, strict=True):
            x = abs(predicted - wanted)
            if x < beta:
                total += alpha / b * (b * x + 1) * math.log(b * x / beta + 1) - alpha * x
            else:
                total += gamma * x + gamma / b - alpha * beta
        losses.append(total)
    return losses


def seesaw(class_logits: Tensor, labels: list[int], counts: list[float], p: float, q: float) -> list[float]:
    """Seesaw loss, equations 3 to 7, with S = 1 between a class and the background."""
    losses = []
    for logits, i in zip(class_logits.tolist(), labels, strict=True):
        scores = softmax(logits)
        normalizer = 0.0
        for j, logit in enumerate(logits):
            factor = 1.0
            if 0 not in (i, j) and i != j:
                n_i, n_j = max(counts[i], 1.0), max(counts[j], 1.0)
                if n_j < n_i:
                    factor *= (n_j / n_i) ** p
                own = max(scores[i], 0.01)
                if scores[j] > own:
                    factor *= (scores[j] / own) ** q
            normalizer += factor * math.exp(logit)
        losses.append(math.log(normalizer) - logits[i])
    return losses


def equalized(
    class_logits: Tensor, labels: list[int], ratio: list[float], gamma: float, mu: float, alpha: float
) -> tuple[list[float], list[float], list[float]]:
    """EQL v2, equations 4 to 6: values per RoI; positive and negative gradients per class."""
    num_classes = len(ratio)
    positive, negative = [0.0] * num_classes, [0.0] * num_classes
    losses = []
    for logits, label in zip(class_logits.tolist(), labels, strict=True):
        total = 0.0
        for j in range(1, num_classes):
            f = 1 / (1 + math.exp(-gamma * (ratio[j] - mu)))
            s = sigmoid(logits[j])
            if j == label:
                weight = 1 + alpha * (1 - f)
                total -= weight * math.log(s)
                positive[j] += weight * (1 - s)
            else:
                total -= f * math.log(1 - s)
                negative[j] += f * s
        losses.append(total)
    return losses, positive, negative
