"""The drop-in RoIHeads: torchvision's, with our losses, targets and mask predictor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import keypointrcnn_inference, keypointrcnn_loss

from maskloss.detection.heads import ClassSelectedMaskPredictor
from maskloss.detection.loss_holder import LossHolder
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.conventions import at_least_float32
from maskloss.losses.criterion import KEYS, MaskBatch, RoIBatch, zero_of
from maskloss.losses.masks import select_class_masks
from maskloss.losses.weighting import BatchCounts
from maskloss.masks.targets import mask_targets

Features = dict[str, Tensor]
Detections = list[dict[str, Tensor]]
ImageShapes = list[tuple[int, int]]


class RoIHeads(LossHolder, TorchvisionRoIHeads):
    """torchvision's `RoIHeads` whose losses are the criterion's.

    `forward` is rewritten, because torchvision's calls its loss functions by name and mixes training with
    inference. Matching, sampling, decoding and NMS are inherited, and the random numbers are drawn in the
    same order.
    """

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: ImageShapes,
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[Detections, dict[str, Tensor]]:
        """Compute losses in training, detections in evaluation.

        Args:
            features: feature maps (N, channels, H_l, W_l), by level.
            proposals: N tensors of boxes, xyxy in px of the resized images.
            image_shapes: N sizes (H, W) of the resized images, without padding.
            targets: per image, boxes (G, 4), labels (G,), and masks and keypoints for such branches.

        Returns:
            Detections per image with boxes, labels, scores, masks (D, 1, M, M) and keypoints, an empty list in
            training; and the losses under torchvision's keys, an empty dict where none are wanted.
        """
        detections = [] if self.training else self._detect(features, proposals, image_shapes)
        losses = self._losses(features, proposals, image_shapes, targets) if self.wants_losses else {}
        return detections, losses

    def _losses(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: ImageShapes,
        targets: list[dict[str, Any]] | None,
    ) -> dict[str, Tensor]:
        if targets is None:
            raise ValueError("targets are needed to compute losses, got None")
        proposals, matched_idxs, labels_by_image, target_deltas = self.select_training_samples(
            proposals, targets
        )
        labels = torch.cat(labels_by_image)  # (R,)
        positives = torch.where(labels > 0)[0]  # (P,)
        counts = BatchCounts(
            num_images=len(proposals),
            sampled=labels.numel(),
            positives=positives.numel(),
            batch_size_per_image=self.fg_bg_sampler.batch_size_per_image,
        )

        class_logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        positive_proposals = torch.cat(proposals)[positives]
        deltas_by_class = deltas.reshape(counts.sampled, deltas.shape[1] // 4, 4)
        losses = self.loss.roi_losses(
            RoIBatch(
                class_logits=class_logits,
                labels=labels,
                box=BoxRegression(
                    deltas_by_class[positives, labels[positives]],
                    torch.cat(list(target_deltas))[positives],
                    lambda encoded: self.box_coder.decode_single(encoded, positive_proposals),
                ),
                counts=counts,
            )
        )
        if not (self.has_mask() or self.has_keypoint()):
            return losses
        positives_by_image = [torch.where(image_labels > 0)[0] for image_labels in labels_by_image]
        positive_boxes = [p[i] for p, i in zip(proposals, positives_by_image, strict=True)]
        positive_matches = [m[i] for m, i in zip(matched_idxs, positives_by_image, strict=True)]
        if self.has_mask():
            losses |= self._mask_losses(
                features, positive_boxes, positive_matches, labels[positives], image_shapes, targets, counts
            )
        if self.has_keypoint():
            losses["loss_keypoint"] = keypointrcnn_loss(
                self._predict_keypoints(features, positive_boxes, image_shapes),
                positive_boxes,
                [target["keypoints"] for target in targets],
                positive_matches,
            )
        return losses

    def _mask_losses(
        self,
        features: Features,
        boxes: list[Tensor],
        matched_idxs: list[Tensor],
        labels: Tensor,
        image_shapes: ImageShapes,
        targets: list[dict[str, Any]],
        counts: BatchCounts,
    ) -> dict[str, Tensor]:
        """Give `loss_mask` of the positives: N tensors of boxes and matches, and their (P,) labels."""
        if self.loss.weights.mask == 0:
            # The branch is not run, but its parameters still get a gradient, of zeros: without one,
            # DistributedDataParallel would wait for it.
            branch = [*self.mask_head.parameters(), *self.mask_predictor.parameters()]
            return {KEYS["mask"]: zero_of(branch)}
        selected = None if self.loss.needs_all_mask_classes else labels
        mask_logits = self._predict_masks(features, boxes, image_shapes, selected)
        settings = self.loss.mask_targets
        grids = [
            mask_targets(
                target["masks"],
                image_boxes,
                image_matches,
                mask_logits.shape[-1],
                aligned=settings.aligned,
                binary=settings.binary,
            )
            for target, image_boxes, image_matches in zip(targets, boxes, matched_idxs, strict=True)
        ]
        return self.loss.mask_losses(MaskBatch(mask_logits, torch.cat(grids), labels, counts))

    def _detect(self, features: Features, proposals: list[Tensor], image_shapes: ImageShapes) -> Detections:
        class_logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(
            at_least_float32(class_logits), at_least_float32(deltas), proposals, image_shapes
        )
        detections = [
            {"boxes": image_boxes, "labels": image_labels, "scores": image_scores}
            for image_boxes, image_labels, image_scores in zip(boxes, labels, scores, strict=True)
        ]
        # Pooling needs boxes in the features' dtype, which decoding in float32 may have left.
        boxes = [b.to(p.dtype) for b, p in zip(boxes, proposals, strict=True)]
        if self.has_mask():
            all_labels = torch.cat(labels)
            logits = self._predict_masks(features, boxes, image_shapes, all_labels)
            probs = at_least_float32(select_class_masks(logits, all_labels)).sigmoid()[:, None]
            for detection, mask_probs in zip(detections, probs.split([len(b) for b in boxes]), strict=True):
                detection["masks"] = mask_probs
        if self.has_keypoint():
            keypoint_logits = self._predict_keypoints(features, boxes, image_shapes)
            keypoints, keypoint_scores = keypointrcnn_inference(keypoint_logits, boxes)
            for detection, image_keypoints, image_scores in zip(
                detections, keypoints, keypoint_scores, strict=True
            ):
                detection["keypoints"] = image_keypoints
                detection["keypoints_scores"] = image_scores
        return detections

    def _predict_boxes(
        self, features: Features, proposals: list[Tensor], image_shapes: ImageShapes
    ) -> tuple[Tensor, Tensor]:
        """Class logits (R, C) and box deltas (R, 4 C)."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        class_logits, deltas = self.box_predictor(self.box_head(pooled))
        return class_logits, deltas

    def _predict_masks(
        self, features: Features, boxes: list[Tensor], image_shapes: ImageShapes, labels: Tensor | None
    ) -> Tensor:
        """Mask logits: (P, 1, M, M) of the labels' classes where the predictor can select, else (P, C, M, M)."""
        hidden = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
        if labels is not None and isinstance(self.mask_predictor, ClassSelectedMaskPredictor):
            return self.mask_predictor(hidden, labels)
        return self.mask_predictor(hidden)

    def _predict_keypoints(
        self, features: Features, boxes: list[Tensor], image_shapes: ImageShapes
    ) -> Tensor:
        """Keypoint heatmap logits (P, K, S, S)."""
        pooled = self.keypoint_roi_pool(features, boxes, image_shapes)
        return self.keypoint_predictor(self.keypoint_head(pooled))
