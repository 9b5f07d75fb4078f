"""The region proposal network with our losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.models.detection.rpn import concat_box_prediction_layers

from maskloss.detection.loss_holder import LossHolder
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.conventions import at_least_float32
from maskloss.losses.criterion import RPNBatch
from maskloss.losses.weighting import BatchCounts


class RegionProposalNetwork(LossHolder, TorchvisionRPN):
    """torchvision's `RegionProposalNetwork` whose two losses are the criterion's.

    Only `forward` differs: anchors, matching, sampling, decoding and NMS are inherited, and the random
    numbers are drawn in the same order. Target deltas are encoded for the sampled positives instead of for
    every anchor, and boxes are decoded in float32 under mixed precision.
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

        # Proposals are inputs of the detector, not outputs to be trained through it: no gradient.
        proposals = self.box_coder.decode(at_least_float32(deltas.detach()), anchors)
        proposals = proposals.view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(proposals, objectness, images.image_sizes, anchors_per_level)
        boxes = [box.to(images.tensors.dtype) for box in boxes]

        if not self.wants_losses:
            return boxes, {}
        if targets is None:
            raise ValueError("targets are needed to compute losses, got None")
        return boxes, self.loss.rpn_losses(self._batch(objectness, deltas, anchors, targets, locations))

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
