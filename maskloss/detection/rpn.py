"""The region proposal network with our losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from maskloss.detection.loss_holder import LossHolder
from maskloss.detection.matching import match
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.conventions import at_least_float32
from maskloss.losses.criterion import RPNBatch
from maskloss.losses.weighting import BatchCounts


class RegionProposalNetwork(LossHolder, TorchvisionRPN):
    """torchvision's `RegionProposalNetwork` whose two losses are the criterion's.

    The same anchors are matched and sampled, with random numbers drawn in the same order, and the same boxes
    are proposed. What differs is how much is computed for it: matching goes in pieces, target deltas are
    encoded for the sampled positives instead of for every anchor, and only anchors that are among the best of
    their level are decoded. Boxes are decoded in float32 under mixed precision.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes, and compute the losses in training.

        Args:
            images: the padded batch and the N sizes before padding.
            features: feature maps (N, channels, H_l, W_l), by level.
            targets: per image, boxes (G, 4) in px of the resized image.

        Returns:
            N tensors of proposals, xyxy in px; `loss_objectness` and `loss_rpn_box_reg`, or an empty dict
            where no losses are wanted.
        """
        maps = list(features.values())
        objectness_maps, delta_maps = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        anchors_per_level = [o.shape[1] * o.shape[2] * o.shape[3] for o in objectness_maps]
        locations = sum(o.shape[0] * o.shape[2] * o.shape[3] for o in objectness_maps)
        objectness, deltas = concat_box_prediction_layers(objectness_maps, delta_maps)

        boxes = self._proposals(objectness, deltas, anchors, images.image_sizes, anchors_per_level)
        boxes = [box.to(images.tensors.dtype) for box in boxes]
        if not self.wants_losses:
            return boxes, {}
        if targets is None:
            raise ValueError("targets are needed to compute losses, got None")
        return boxes, self.loss.rpn_losses(self._batch(objectness, deltas, anchors, targets, locations))

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors to objects.

        Args:
            anchors: N tensors (A, 4).
            targets: per image, boxes (G, 4).

        Returns:
            Per image, labels (A,) float, 1 of objects, 0 of background, -1 of what is neither; and the boxes
            (A, 4) of the objects matched to, of no meaning where the label is not 1.
        """
        labels, matched_boxes = [], []
        for image_anchors, target in zip(anchors, targets, strict=True):
            gt_boxes = target["boxes"]
            if len(gt_boxes) == 0:
                labels.append(torch.zeros_like(image_anchors[:, 0], dtype=torch.float32))
                matched_boxes.append(torch.zeros_like(image_anchors, dtype=torch.float32))
                continue
            matches = match(gt_boxes, image_anchors, self.proposal_matcher, self.box_similarity)
            image_labels = (matches >= 0).float()
            labels.append(image_labels.masked_fill(matches == self.proposal_matcher.BETWEEN_THRESHOLDS, -1.0))
            matched_boxes.append(gt_boxes[matches.clamp(min=0)])
        return labels, matched_boxes

    def _proposals(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: list[Tensor],
        image_sizes: list[tuple[int, int]],
        anchors_per_level: list[int],
    ) -> list[Tensor]:
        """The boxes that `filter_proposals` keeps of all decoded anchors, decoding the best of each level only.

        Proposals are inputs of the detector, not outputs to be trained through it: no gradient.
        """
        objectness = objectness.detach().reshape(len(anchors), -1)  # (N, A)
        deltas = deltas.detach().reshape(len(anchors), -1, 4)
        best = self._get_top_n_idx(objectness, anchors_per_level)  # (N, K), level by level
        best_per_level = [min(self.pre_nms_top_n(), count) for count in anchors_per_level]
        levels = torch.arange(len(best_per_level), device=best.device).repeat_interleave(
            torch.tensor(best_per_level, device=best.device), output_size=best.shape[1]
        )  # (K,)
        proposals = []
        for image, size in enumerate(image_sizes):
            chosen = best[image]
            boxes = self.box_coder.decode_single(
                at_least_float32(deltas[image, chosen]), anchors[image][chosen]
            )
            boxes = clip_boxes_to_image(boxes, size)
            scores = objectness[image, chosen].sigmoid()
            kept = remove_small_boxes(boxes, self.min_size)
            kept = kept[scores[kept] >= self.score_thresh]
            boxes, scores = boxes[kept], scores[kept]
            kept = batched_nms(boxes, scores, levels[kept], self.nms_thresh)[: self.post_nms_top_n()]
            proposals.append(boxes[kept])
        return proposals

    def _batch(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: list[Tensor],
        targets: list[dict[str, Any]],
        locations: int,
    ) -> RPNBatch:
        labels_by_image, matched_boxes = self.assign_targets_to_anchors(anchors, targets)
        positive_masks, negative_masks = self.fg_bg_sampler(labels_by_image)
        positives = torch.where(torch.cat(positive_masks))[0]  # (P,)
        negatives = torch.where(torch.cat(negative_masks))[0]
        sampled = torch.cat([positives, negatives])  # (S,)

        positive_anchors = torch.cat(anchors)[positives]
        # Matched boxes of an image without objects are zeros, whose logarithm would be -inf; no positive is
        # ever among those, so encoding the positives alone never meets them.
        target_deltas = self.box_coder.encode_single(torch.cat(matched_boxes)[positives], positive_anchors)
        return RPNBatch(
            objectness=objectness.flatten()[sampled],
            labels=torch.cat(labels_by_image)[sampled],
            box=BoxRegression(
                deltas[positives],
                target_deltas,
                lambda encoded: self.box_coder.decode_single(encoded, positive_anchors),
            ),
            counts=BatchCounts(
                num_images=len(anchors),
                sampled=sampled.numel(),
                positives=positives.numel(),
                batch_size_per_image=self.fg_bg_sampler.batch_size_per_image,
                locations=locations,
            ),
        )
