"""Drop-in replacement for torchvision's `RegionProposalNetwork`, with maskloss's losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.ops import boxes as torchvision_boxes

from maskloss.detection.loss_holder import LossHolder, mean_losses
from maskloss.detection.matching import match, mostly_inside, object_weights
from maskloss.detection.nms import batched_nms, batched_nms_once
from maskloss.detection.sampling import SampleCounts, sample_padded
from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import TERMS, RPNBatch
from maskloss.masks.transfer import AsyncHostCopy, send


class RegionProposalNetwork(LossHolder, TorchvisionRPN):
    """torchvision's `RegionProposalNetwork` with the two RPN losses of a `MaskRCNNLoss`.

    It matches and samples the same anchors, with random numbers in the same order, and proposes the same boxes. It
    computes less: matching works in chunks, target deltas are encoded only for sampled positives instead of all
    anchors, and only the best anchors of each level are decoded. Under mixed precision, boxes are decoded in float32.
    A `filter_proposals` that a subclass overrides, or that has been patched on the instance, is called as in
    torchvision.

    Attributes:
        sync_free: in training, sample without synchronizing; see `convert`.

    Example:
        >>> import maskloss
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> isinstance(maskloss.convert(build_model(ModelSettings("resnet18", num_classes=2))).rpn, LossHolder)
        True
    """

    sync_free: bool = False

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes, and compute losses in training.

        Args:
            images: the padded batch and the N sizes before padding.
            features: feature maps (N, channels, H_l, W_l), by level.
            targets: per image, boxes (G, 4) in px of the resized image.

        Returns:
            N tensors of proposals, xyxy in px; and the losses `loss_objectness` and `loss_rpn_box_reg`, or an empty
            dict in evaluation (outside `losses_and_detections`).
        """
        maps = list(features.values())
        objectness_maps, delta_maps = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        anchors_per_level = [o.shape[1] * o.shape[2] * o.shape[3] for o in objectness_maps]
        locations = sum(o.shape[0] * o.shape[2] * o.shape[3] for o in objectness_maps)
        # torchvision's functions are looked up at each call, as there, so that a user's replacements are called.
        objectness, deltas = torchvision_rpn.concat_box_prediction_layers(objectness_maps, delta_maps)

        if self.wants_losses and targets is None:
            raise ValueError("targets are needed to compute losses, got None")
        boxes: list[Tensor] | None = None
        if self._has_own_filter():
            decoded = self.box_coder.decode(at_least_float32(deltas.detach()), anchors).view(
                len(anchors), -1, 4
            )
            boxes, _ = self.filter_proposals(decoded, objectness, images.image_sizes, anchors_per_level)
        # Sample before proposing: NMS synchronizes, so the sample's sizes have then arrived as well.
        sample = self._sample(anchors, targets) if self.training and targets is not None else None
        if boxes is None:
            boxes = self._proposals(objectness, deltas, anchors, images.image_sizes, anchors_per_level)
        boxes = [box.to(images.tensors.dtype) for box in boxes]
        if sample is not None:
            return boxes, self.loss.rpn_losses(self._batch(objectness, deltas, anchors, sample, locations))
        if self.eval_states is None or targets is None:
            return boxes, {}
        by_image = []
        of_images = zip(
            objectness.chunk(len(anchors)), deltas.chunk(len(anchors)), anchors, targets, strict=True
        )
        for image, (image_objectness, image_deltas, image_anchors, target) in enumerate(of_images):
            with self.eval_states.of_image(image):
                sample = self._sample([image_anchors], [target])
                batch = self._batch(
                    image_objectness, image_deltas, [image_anchors], sample, locations // len(anchors)
                )
                by_image.append(self.loss.rpn_losses(batch))
        return boxes, mean_losses(by_image)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors to objects.

        Args:
            anchors: N tensors (A, 4).
            targets: per image, boxes (G, 4). Unmatched anchors that lie mostly inside one of its `ignore_boxes` (I, 4)
                are neither object nor background.

        Returns:
            Per image, labels (A,) float: 1 for objects, 0 for background, -1 for neither; and boxes (A, 4) of the
            matched objects, which are meaningful only where the label is 1.
        """
        labels, matched_boxes = [], []
        for image_anchors, target in zip(anchors, targets, strict=True):
            gt_boxes = target["boxes"]
            if len(gt_boxes) == 0:
                image_labels = torch.zeros_like(image_anchors[:, 0], dtype=torch.float32)
                matched_boxes.append(torch.zeros_like(image_anchors, dtype=torch.float32))
            else:
                matches = match(gt_boxes, image_anchors, self.proposal_matcher, self.box_similarity)
                between = matches == self.proposal_matcher.BETWEEN_THRESHOLDS
                image_labels = (matches >= 0).float().masked_fill(between, -1.0)
                matched_boxes.append(gt_boxes[matches.clamp(min=0)])
            if "ignore_boxes" in target:
                ignored = mostly_inside(image_anchors, send(target["ignore_boxes"], image_anchors.device))
                image_labels = image_labels.masked_fill(ignored & (image_labels == 0), -1.0)
            labels.append(image_labels)
        return labels, matched_boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Compute the two RPN losses of the `MaskRCNNLoss`, with torchvision's signature.

        `forward` does not call this method. It exists for code that reimplements torchvision's forward pass, such as
        recipes for validation losses, which `losses_and_detections` makes unnecessary.

        Args:
            objectness: (N A, 1) logits of all anchors.
            pred_bbox_deltas: (N A, 4).
            labels: N tensors (A,), from `assign_targets_to_anchors`.
            regression_targets: N tensors (A, 4), from `box_coder.encode`.

        Returns:
            The weighted objectness and box losses, scalars.

        Raises:
            ValueError: the rpn_box term needs decoded boxes, which cannot be computed without the anchors.
        """
        indices = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        positives, negatives = indices
        sampled = torch.cat([positives, negatives])
        losses = self.loss.rpn_losses(
            RPNBatch(
                objectness=objectness.flatten()[sampled],
                labels=torch.cat(labels)[sampled],
                box=BoxRegression(pred_bbox_deltas[positives], torch.cat(regression_targets)[positives]),
                counts=BatchCounts(
                    num_images=len(labels),
                    sampled=sampled.numel(),
                    positives=positives.numel(),
                    batch_size_per_image=getattr(self.fg_bg_sampler, "batch_size_per_image", 0),
                    locations=objectness.numel() // self.anchor_generator.num_anchors_per_location()[0],
                ),
            )
        )
        return losses[TERMS["objectness"].key], losses[TERMS["rpn_box"].key]

    def _has_own_filter(self) -> bool:
        overridden = type(self).filter_proposals is not TorchvisionRPN.filter_proposals
        return overridden or "filter_proposals" in vars(self)

    def _proposals(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: list[Tensor],
        image_sizes: list[tuple[int, int]],
        anchors_per_level: list[int],
    ) -> list[Tensor]:
        """Compute the proposals of torchvision's `filter_proposals`, but decode only the best anchors of each level.

        Proposals carry no gradient: the detector's losses do not train the RPN through them.
        """
        objectness = objectness.detach().reshape(len(anchors), -1)  # (N, A)
        deltas = deltas.detach().reshape(len(anchors), -1, 4)
        best = self._get_top_n_idx(objectness, anchors_per_level)  # (N, K), level by level
        best_per_level = [min(self.pre_nms_top_n(), count) for count in anchors_per_level]
        levels = torch.cat(
            [torch.full((count,), level, device=best.device) for level, count in enumerate(best_per_level)]
        )  # (K,)
        proposals = []
        for image, size in enumerate(image_sizes):
            chosen = best[image]
            boxes = self.box_coder.decode_single(
                at_least_float32(deltas[image, chosen]), anchors[image][chosen]
            )
            boxes = torchvision_boxes.clip_boxes_to_image(boxes, size)
            scores = at_least_float32(objectness[image, chosen].sigmoid())
            suppress = batched_nms
            if self.training and self.sync_free:
                boxes, scores, levels_kept = self._replace_invalid_boxes(boxes, scores, levels, size)
                suppress = batched_nms_once
            else:
                kept = torchvision_boxes.remove_small_boxes(boxes, self.min_size)
                kept = kept[scores[kept] >= self.score_thresh]
                boxes, scores, levels_kept = boxes[kept], scores[kept], levels[kept]
            kept = suppress(boxes, scores, levels_kept, self.nms_thresh)[: self.post_nms_top_n()]
            proposals.append(boxes[kept])
        return proposals

    def _replace_invalid_boxes(
        self, boxes: Tensor, scores: Tensor, levels: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace invalid boxes (too small, low-scoring or NaN) by copies of the best box, which NMS then removes.

        Removing them directly would synchronize with the device to count them. If all boxes are invalid, they become
        the whole image, so that there is at least one proposal to pool.
        """
        sides = boxes[:, 2:] - boxes[:, :2]
        # Negate the condition for valid boxes, as NaN must be invalid and compares false.
        dropped = ~((sides >= self.min_size).all(dim=1) & (scores >= self.score_thresh))
        scores = scores.masked_fill(dropped, -1.0)
        best = scores.argmax()[None]  # (1,): indexing with a scalar tensor would synchronize
        whole = torch.zeros_like(boxes[:1])
        whole[:, 2], whole[:, 3] = image_size[1], image_size[0]
        boxes = torch.where(dropped[:, None], torch.where(dropped[best], whole, boxes[best]), boxes)
        return boxes, scores, torch.where(dropped, levels[best], levels)

    def _sample(self, anchors: list[Tensor], targets: list[dict[str, Any]]) -> _Sample:
        """Match anchors to objects and sample them; if `sync_free`, start copying the sample's sizes to the host."""
        targets = [{**target, "boxes": send(target["boxes"], anchors[0].device)} for target in targets]
        labels, matched_boxes = self.assign_targets_to_anchors(anchors, targets)
        if not (self.training and self.sync_free):
            positives, negatives = self.fg_bg_sampler(labels)
            indices = torch.where(torch.cat(positives))[0], torch.where(torch.cat(negatives))[0]
            return _Sample(torch.cat(labels), torch.cat(matched_boxes), lambda: indices, targets)
        padded = sample_padded(labels, self.fg_bg_sampler)
        host_copy = AsyncHostCopy(padded.num_positives, padded.num_sampled)

        def sampled() -> tuple[Tensor, Tensor]:
            images = torch.arange(len(anchors), device=padded.indices.device)
            among_all = padded.indices + len(anchors[0]) * images[:, None]
            counts = SampleCounts.of(*host_copy.result())
            return torch.cat(counts.positives(among_all)), torch.cat(counts.negatives(among_all))

        return _Sample(torch.cat(labels), torch.cat(matched_boxes), sampled, targets)

    def _batch(
        self, objectness: Tensor, deltas: Tensor, anchors: list[Tensor], sample: _Sample, locations: int
    ) -> RPNBatch:
        positives, negatives = sample.indices()  # (P,), (S - P,)
        sampled = torch.cat([positives, negatives])
        positive_anchors = torch.cat(anchors)[positives]
        weights = box_weights = _positive_weights(
            sample.matched_boxes[positives], positives // len(anchors[0]), sample.targets
        )
        if box_weights is not None:
            # The positives come first, and background has the weight 1.
            weights = torch.cat([box_weights, torch.ones_like(negatives, dtype=box_weights.dtype)])
        # Images without objects have matched boxes of zeros, whose size has the logarithm -inf. They have no positives,
        # so encoding only positives avoids them.
        target_deltas = self.box_coder.encode_single(sample.matched_boxes[positives], positive_anchors)
        return RPNBatch(
            objectness=objectness.flatten()[sampled],
            labels=sample.labels[sampled],
            box=BoxRegression(
                deltas[positives],
                target_deltas,
                lambda encoded: self.box_coder.decode_single(encoded, positive_anchors),
            ),
            counts=BatchCounts(
                num_images=len(anchors),
                sampled=sampled.numel(),
                positives=positives.numel(),
                batch_size_per_image=getattr(self.fg_bg_sampler, "batch_size_per_image", 0),
                locations=locations,
            ),
            weights=weights,
            box_weights=box_weights,
        )


@dataclass(frozen=True)
class _Sample:
    """A sample of the anchors of all images.

    Attributes:
        labels: (N A,) float, from `assign_targets_to_anchors`.
        matched_boxes: (N A, 4), boxes of the matched objects.
        indices: returns the indices of the positives (P,) and of the negatives (S - P,) among the anchors of all
            images; may synchronize.
        targets: per image, with boxes (G, 4) on the anchors' device.
    """

    labels: Tensor
    matched_boxes: Tensor
    indices: Callable[[], tuple[Tensor, Tensor]]
    targets: list[dict[str, Any]]


def _positive_weights(matched_boxes: Tensor, images: Tensor, targets: list[dict[str, Any]]) -> Tensor | None:
    """Return the weights of the objects matched to the positive anchors, (P,), without synchronizing.

    Args:
        matched_boxes: (P, 4), boxes of the matched objects, which identify them: matching copies them.
        images: (P,) int64, index of each positive's image.
        targets: per image, boxes (G, 4) and optionally weights (G,).

    Returns:
        None if no target has weights.
    """
    weights = object_weights(targets, matched_boxes.device)
    if weights is None:
        return None
    # Padded by one object, so that index 0 exists even if no image has objects.
    padded_weights = F.pad(pad_sequence(weights, batch_first=True), (0, 1))
    padded_boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    padded_boxes = F.pad(padded_boxes, (0, 0, 0, 1), value=torch.nan)  # (N, G + 1, 4)
    is_match = (padded_boxes[images] == matched_boxes[:, None]).all(dim=2)  # (P, G + 1)
    return padded_weights[images, is_match.to(torch.uint8).argmax(dim=1)]
