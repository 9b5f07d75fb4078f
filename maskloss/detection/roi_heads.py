"""Drop-in replacement for torchvision's `RoIHeads`, with maskloss's losses, mask targets and mask branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.ops import boxes as torchvision_boxes

from maskloss.detection.loss_holder import LossHolder, mean_losses
from maskloss.detection.mask_branch import DetectedBoxes, MaskBranch, Positives, TorchvisionMaskBranch
from maskloss.detection.matching import mostly_inside, object_weights
from maskloss.detection.nms import batched_nms
from maskloss.detection.sampling import SampleCounts, sample_padded
from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.criterion import MaskRCNNLoss, zero_of
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import TERMS, KeypointBatch, RoIBatch, Supervision
from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.transfer import AsyncHostCopy, send

Features = dict[str, Tensor]
Detections = list[dict[str, Tensor]]
ImageShapes = list[tuple[int, int]]


class RoIHeads(LossHolder, TorchvisionRoIHeads):
    """torchvision's `RoIHeads` with the losses of a `MaskRCNNLoss`.

    This class rewrites `forward`, because torchvision's method calls its loss functions by name and mixes training with
    inference. Matching and sampling are inherited and use random numbers in the same order.

    Attributes:
        sync_free: in training, sample without synchronizing; see `convert`.
        mask_branch: predicts masks and computes their losses, if `has_mask()`.

    Example:
        >>> import maskloss
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> type(maskloss.convert(build_model(ModelSettings("resnet18", num_classes=2))).roi_heads).__name__
        'RoIHeads'
    """

    sync_free: bool = False

    # No class-level default: it would hide a branch that is registered as a submodule.
    mask_branch: MaskBranch

    def use_mask_branch(self, branch: MaskBranch | None) -> None:
        """Set the mask branch; None for torchvision's layers, as long as the model has any."""
        self._modules.pop("mask_branch", None)
        self.__dict__.pop("mask_branch", None)
        # Names, because `load_state_dict(assign=True)` replaces the parameters.
        excluded = self.__dict__.pop("_excluded", ())
        for name, parameter in self.named_parameters():
            if name in excluded:
                parameter.requires_grad_(True)
        if branch is not None:
            self.mask_branch = branch
        else:
            # Not a submodule: the layers that it uses are submodules of the heads already.
            self.__dict__["mask_branch"] = TorchvisionMaskBranch(self)
        # Stock mask layers that no branch calls get no gradients, for which DistributedDataParallel would wait.
        unused = dict(self._unused_parameters())
        for parameter in unused.values():
            parameter.requires_grad_(False)
        self.__dict__["_excluded"] = frozenset(unused)

    def _unused_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and the trained parameters of torchvision's mask layers if the branch does not call these."""
        if self.mask_branch.uses_stock_layers:
            return
        own = {id(parameter) for parameter in self.mask_branch.parameters()}
        for name in ("mask_head", "mask_predictor"):
            layer = getattr(self, name)
            # A layer may also be None, or a plain function.
            for key, parameter in layer.named_parameters() if isinstance(layer, nn.Module) else ():
                if parameter.requires_grad and id(parameter) not in own:
                    yield f"{name}.{key}", parameter

    def has_mask(self) -> bool:
        """Return whether there is a mask branch, and torchvision's mask layers if the branch calls them."""
        branch: MaskBranch | None = getattr(self, "mask_branch", None)
        if branch is None:
            return False
        return not branch.uses_stock_layers or bool(super().has_mask())

    def hold(self, loss: MaskRCNNLoss) -> None:
        """Set the loss, also of the mask branch."""
        self.mask_branch.hold(loss)  # first, because a branch may refuse the loss
        super().hold(loss)

    def extra_repr(self) -> str:
        """Return the loss as text for `repr`."""
        return f"loss={self.loss}" if "_loss" in self.__dict__ else "no loss yet, see maskloss.convert"

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
            targets: per image, boxes (G, 4), labels (G,), and masks and keypoints if the model has these branches.

        Returns:
            Detections per image with boxes, labels, scores, masks (D, 1, M, M) and keypoints, or an empty list in
            training; and the losses with torchvision's keys, or an empty dict in evaluation. Inside
            `losses_and_detections`, both.
        """
        if self.wants_losses and targets is None:
            raise ValueError("targets are needed to compute losses, got None")
        if self.training and targets is not None:
            return [], self._losses(features, proposals, image_shapes, targets)
        detections = self._detect(features, proposals, image_shapes)
        if self.eval_states is None or targets is None:
            return detections, {}
        by_image = []
        for image, target in enumerate(targets):
            here = slice(image, image + 1)
            with self.eval_states.of_image(image):
                own_features = {level: maps[here] for level, maps in features.items()}
                by_image.append(self._losses(own_features, proposals[here], image_shapes[here], [target]))
        return detections, mean_losses(by_image)

    def _losses(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: ImageShapes,
        targets: list[dict[str, Any]],
    ) -> dict[str, Tensor]:
        select = self._select_padded if self.training and self.sync_free else self._select
        rois = select(proposals, targets)
        class_logits, deltas = self._predict_boxes(features, rois.proposals, image_shapes)
        sampled = rois.sampled()
        labels = torch.cat(rois.labels)  # (R,), or all N * B entries of padded samples
        positives = sampled.positives  # (P,)
        positive_labels, positive_boxes = labels[positives], torch.cat(rois.proposals)[positives]
        deltas_by_class = deltas.reshape(len(labels), deltas.shape[1] // 4, 4)
        if sampled.rows is not None:
            class_logits, labels = class_logits[sampled.rows], labels[sampled.rows]
        counts = BatchCounts(
            num_images=len(proposals),
            sampled=labels.numel(),
            positives=positives.numel(),
            batch_size_per_image=getattr(self.fg_bg_sampler, "batch_size_per_image", 0),
        )
        weights, box_weights = None, None
        if sampled.weights is not None:
            box_weights = torch.cat(sampled.weights)
            weights = box_weights.new_ones(len(deltas_by_class)).index_copy(0, positives, box_weights)
            weights = weights if sampled.rows is None else weights[sampled.rows]
        losses = self.loss.roi_losses(
            RoIBatch(
                class_logits=class_logits,
                labels=labels,
                box=BoxRegression(
                    deltas_by_class[positives, positive_labels],
                    sampled.target_deltas,
                    lambda encoded: self.box_coder.decode_single(encoded, positive_boxes),
                ),
                counts=counts,
                weights=weights,
                box_weights=box_weights,
            )
        )
        if self.has_mask():
            masked = Positives(
                boxes=sampled.boxes,
                labels=list(positive_labels.split([len(boxes) for boxes in sampled.boxes])),
                matched_idxs=sampled.matched_idxs,
                image_sizes=image_shapes,
                counts=counts,
                on_host=sampled.on_host,
                weights=sampled.weights,
                supervision=sampled.supervision,
            )
            if sampled.supervision is not None:
                masked = masked.select([torch.where(kinds >= 0)[0] for kinds in sampled.supervision])
            losses |= self.mask_branch(features, masked, targets)
            # The user may have unfrozen or replaced the layers that `use_mask_branch` has excluded from training.
            unused = [parameter for _, parameter in self._unused_parameters()]
            if unused:
                key = TERMS["classification"].key
                losses[key] = losses[key] + zero_of(unused)
        if self.has_keypoint():
            losses |= self._keypoint_losses(features, sampled, image_shapes, counts, targets)
        return losses

    def _keypoint_losses(
        self,
        features: Features,
        positives: _SampledPositives,
        image_shapes: ImageShapes,
        counts: BatchCounts,
        targets: list[dict[str, Any]],
    ) -> dict[str, Tensor]:
        """Compute the keypoint loss with the criterion's term, on the targets of torchvision's `keypointrcnn_loss`."""
        if self.loss.weights.keypoint == 0:
            layers = (self.keypoint_head, self.keypoint_predictor)
            return {TERMS["keypoint"].key: zero_of(p for layer in layers for p in layer.parameters())}
        heatmaps = self._predict_keypoints(features, positives.boxes, image_shapes)  # (P, K, S, S)
        cells, visible = [], []
        for image, (target, boxes, matched_idxs) in enumerate(
            zip(targets, positives.boxes, positives.matched_idxs, strict=True)
        ):
            given = target["keypoints"].shape[1]
            # `check_inputs` does not know the number of a custom predictor.
            if len(target["boxes"]) and given != heatmaps.shape[1]:
                raise ValueError(
                    f"image {image} of the batch, keypoints: got {given} keypoints per object, but the model predicts "
                    f"{heatmaps.shape[1]}"
                )
            keypoints = target["keypoints"][matched_idxs]
            image_cells, image_visible = torchvision_roi_heads.keypoints_to_heatmap(
                keypoints, boxes, heatmaps.shape[-1]
            )
            cells.append(image_cells.view(-1))
            visible.append(image_visible.view(-1))
        rows = torch.where(torch.cat(visible) > 0)[0]  # (V,)
        logits = heatmaps.flatten(2).flatten(0, 1)[rows]
        weights = None
        if positives.weights is not None:
            # All keypoints of an object have its weight.
            weights = torch.cat(positives.weights)[:, None].expand(-1, heatmaps.shape[1]).flatten()[rows]
        batch = KeypointBatch(logits, torch.cat(cells)[rows], replace(counts, sampled=len(rows)), weights)
        return self.loss.keypoint_losses(batch)

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Any]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Match and sample as torchvision does, but sample no background in a target's `ignore_boxes` (I, 4)."""
        if targets is None or not any("ignore_boxes" in target for target in targets):
            samples: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = (
                super().select_training_samples(proposals, targets)
            )
            return samples
        candidates, gt_boxes, matched_idxs, labels = self._candidates(proposals, targets)
        sampled = self.subsample(labels)
        candidates, matched_idxs, labels = (
            [values[kept] for values, kept in zip(by_image, sampled, strict=True)]
            for by_image in (candidates, matched_idxs, labels)
        )
        matched_boxes = [
            boxes[idxs] if len(boxes) else torch.zeros_like(candidate)
            for boxes, idxs, candidate in zip(gt_boxes, matched_idxs, candidates, strict=True)
        ]
        return candidates, matched_idxs, labels, self.box_coder.encode(matched_boxes, candidates)

    def _candidates(
        self, proposals: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Match the proposals and the ground-truth boxes to the objects.

        Returns:
            Per image: candidates (K, 4), the proposals and the ground-truth boxes; ground-truth boxes (G, 4) on the
            proposals' device; matched_idxs (K,); and labels (K,), 0 for background, negative for candidates that must
            not be sampled.
        """
        self.check_targets(targets)
        device, dtype = proposals[0].device, proposals[0].dtype
        gt_boxes = [send(target["boxes"].to(dtype), device) for target in targets]
        candidates = self.add_gt_proposals(proposals, gt_boxes)
        matched_idxs, labels = self.assign_targets_to_proposals(
            candidates, gt_boxes, [target["labels"] for target in targets]
        )
        for image, target in enumerate(targets):
            if "ignore_boxes" in target:
                ignored = mostly_inside(candidates[image], send(target["ignore_boxes"], device))
                labels[image] = labels[image].masked_fill(ignored & (labels[image] == 0), -1)
        return candidates, gt_boxes, matched_idxs, labels

    def _supervision(self, targets: list[dict[str, Any]], device: torch.device) -> list[Tensor] | None:
        """Return, per image, which label supervises each object's mask, (G,) int8 on the device.

        It is the best `Supervision` that the mask term learns from and that the object has, or -1 if there is none.
        None if all objects have masks, and the mask term learns from masks.
        """
        if not self.has_mask():
            return None
        usable = self.loss.mask_supervision
        have_masks = _have_masks(targets, device)
        if have_masks is None and Supervision.MASK in usable:
            return None
        kinds = []
        for image, target in enumerate(targets):
            kind = torch.full((len(target["boxes"]),), -1, dtype=torch.int8, device=device)
            if Supervision.BOX in usable:
                kind.fill_(Supervision.BOX)
            if Supervision.POINTS in usable and "points" in target:
                has_points = send((target["points"][..., 2] >= 0).any(dim=1), device)
                kind = kind.masked_fill(has_points, Supervision.POINTS)
            if Supervision.MASK in usable and have_masks is not None:
                kind = kind.masked_fill(have_masks[image], Supervision.MASK)
            kinds.append(kind)
        return kinds

    def _select(self, proposals: list[Tensor], targets: list[dict[str, Any]]) -> _RoIs:
        """Match and sample as torchvision does."""
        proposals, matched_idxs, labels, target_deltas = self.select_training_samples(proposals, targets)
        device = proposals[0].device
        kinds = self._supervision(targets, device)
        weights = object_weights(targets, device)

        def sampled() -> _SampledPositives:
            positives = torch.where(torch.cat(labels) > 0)[0]
            by_image = [torch.where(image_labels > 0)[0] for image_labels in labels]
            positive_idxs = [m[i] for m, i in zip(matched_idxs, by_image, strict=True)]
            return _SampledPositives(
                rows=None,
                positives=positives,
                target_deltas=torch.cat(list(target_deltas))[positives],
                boxes=[p[i] for p, i in zip(proposals, by_image, strict=True)],
                matched_idxs=positive_idxs,
                weights=_of_positives(weights, positive_idxs),
                supervision=kinds and [k[i].cpu() for k, i in zip(kinds, positive_idxs, strict=True)],
            )

        return _RoIs(proposals, labels, sampled)

    def _select_padded(self, proposals: list[Tensor], targets: list[dict[str, Any]]) -> _RoIs:
        """Match, and sample without synchronizing, padded to B RoIs in each image.

        The box branch processes the padding too. `_RoIs.sampled` then synchronizes, and removes the padding,
        so that they enter no loss.
        """
        device = proposals[0].device
        candidates, gt_boxes, matched_idxs, labels = self._candidates(proposals, targets)
        padded = sample_padded(labels, self.fg_bg_sampler)
        images = torch.arange(len(labels), device=device)[:, None]
        boxes, idxs, padded_labels = (
            pad_sequence(values, batch_first=True)[images, padded.indices]
            for values in (candidates, matched_idxs, labels)
        )  # (N, B, 4), (N, B), (N, B)
        weights = object_weights(targets, device)
        kinds = self._supervision(targets, device)
        padded_kinds = []
        if kinds is not None:
            # Padded so that index 0 exists even if no image of the batch has objects.
            padded_kinds = [F.pad(pad_sequence(kinds, batch_first=True), (0, 1))[images, idxs]]  # (N, B)
        host_copy = AsyncHostCopy(padded.num_positives, padded.num_sampled, boxes, idxs, *padded_kinds)

        def sampled() -> _SampledPositives:
            num_positives, num_sampled, host_boxes, host_idxs, *host_kinds = host_copy.result()
            counts = SampleCounts.of(num_positives, num_sampled)
            rows = torch.arange(padded_labels.numel(), device=device).view_as(padded_labels)
            positive_boxes, positive_idxs = counts.positives(boxes), counts.positives(idxs)
            matched_boxes = [gt[i] for gt, i in zip(gt_boxes, positive_idxs, strict=True)]
            return _SampledPositives(
                rows=None if sum(counts.num_sampled) == rows.numel() else torch.cat(counts.both(rows)),
                positives=torch.cat(counts.positives(rows)),
                target_deltas=self.box_coder.encode_single(
                    torch.cat(matched_boxes), torch.cat(positive_boxes)
                ),
                boxes=positive_boxes,
                matched_idxs=positive_idxs,
                on_host=list(zip(counts.positives(host_boxes), counts.positives(host_idxs), strict=True)),
                weights=_of_positives(weights, positive_idxs),
                supervision=counts.positives(host_kinds[0]) if host_kinds else None,
            )

        return _RoIs(list(boxes), list(padded_labels), sampled)

    def _detect(self, features: Features, proposals: list[Tensor], image_shapes: ImageShapes) -> Detections:
        class_logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(
            at_least_float32(class_logits), at_least_float32(deltas), proposals, image_shapes
        )
        detections = [
            {"boxes": image_boxes, "labels": image_labels, "scores": image_scores}
            for image_boxes, image_labels, image_scores in zip(boxes, labels, scores, strict=True)
        ]
        # Boxes were decoded in float32, but pooling needs the features' dtype.
        boxes = [b.to(p.dtype) for b, p in zip(boxes, proposals, strict=True)]
        if self.has_mask():
            masks, mask_scores = self.mask_branch(
                features, DetectedBoxes(boxes, labels, scores, image_shapes)
            )
            for detection, probs in zip(detections, masks, strict=True):
                detection["masks"] = probs
            for detection, image_scores in zip(detections, mask_scores or (), strict=False):
                detection["mask_scores"] = image_scores
        if self.has_keypoint():
            keypoint_logits = self._predict_keypoints(features, boxes, image_shapes)
            keypoints, keypoint_scores = torchvision_roi_heads.keypointrcnn_inference(keypoint_logits, boxes)
            for detection, image_keypoints, image_scores in zip(
                detections, keypoints, keypoint_scores, strict=True
            ):
                detection["keypoints"] = image_keypoints
                detection["keypoints_scores"] = image_scores
        return detections

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: ImageShapes,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Convert the box branch's output to detections as torchvision does, bit for bit.

        torchvision decodes and clips the boxes of all classes, and then drops nearly all of them because of their
        scores. This method decodes only boxes whose score exceeds the threshold.

        Args:
            class_logits: (R, C).
            box_regression: (R, 4 C).
            proposals: per image, (R_i, 4), xyxy in px.
            image_shapes: N sizes (H, W).

        Returns:
            Per image: boxes (D, 4), scores (D,) and labels (D,), by descending score.
        """
        counts = [boxes.shape[0] for boxes in proposals]  # len() is no number yet in torch.export
        all_scores = class_logits.softmax(dim=-1).split(counts)
        all_deltas = box_regression.unflatten(1, (-1, 4)).split(counts)
        found = []
        for scores, deltas, image_proposals, size in zip(
            all_scores, all_deltas, proposals, image_shapes, strict=True
        ):
            # Class 0 is background.
            roi, label = torch.where(scores[:, 1:] > self.score_thresh)
            label = label + 1
            scores = scores[roi, label]
            boxes = self.box_coder.decode_single(deltas[roi, label], image_proposals[roi])
            boxes = torchvision_boxes.clip_boxes_to_image(boxes, size)
            kept = torchvision_boxes.remove_small_boxes(boxes, min_size=1e-2)
            boxes, scores, label = boxes[kept], scores[kept], label[kept]
            kept = batched_nms(boxes, scores, label, self.nms_thresh)[: self.detections_per_img]
            found.append((boxes[kept], scores[kept], label[kept]))
        all_boxes, all_found_scores, all_labels = (list(values) for values in zip(*found, strict=True))
        return all_boxes, all_found_scores, all_labels

    def _predict_boxes(
        self, features: Features, proposals: list[Tensor], image_shapes: ImageShapes
    ) -> tuple[Tensor, Tensor]:
        """Compute class logits (R, C) and box deltas (R, 4 C)."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        class_logits, deltas = self.box_predictor(self.box_head(pooled))
        return class_logits, deltas

    def _predict_keypoints(
        self, features: Features, boxes: list[Tensor], image_shapes: ImageShapes
    ) -> Tensor:
        """Compute keypoint heatmap logits (P, K, S, S)."""
        pooled = self.keypoint_roi_pool(features, boxes, image_shapes)
        return self.keypoint_predictor(self.keypoint_head(pooled))


@dataclass(frozen=True)
class _RoIs:
    """The RoIs of N images that the box branch processes.

    Attributes:
        proposals: per image, (B_i, 4).
        labels: per image, (B_i,) int64.
        sampled: returns which RoIs were sampled, and the matches of the positives; may synchronize.
    """

    proposals: list[Tensor]
    labels: list[Tensor]
    sampled: Callable[[], _SampledPositives]


@dataclass(frozen=True)
class _SampledPositives:
    """The sampled RoIs among the RoIs of the box branch, and the matches of the positives.

    Attributes:
        rows: (R,) indices of the sampled RoIs among the RoIs of all images; None if all are sampled.
        positives: (P,) indices of the positives among the RoIs of all images.
        target_deltas: (P, 4).
        boxes: per image, (P_i, 4), boxes of the positives.
        matched_idxs: per image, (P_i,), index of the object matched to each positive.
        on_host: per image, copies of boxes and matched_idxs on the host; None if there are no copies.
        weights: per image, (P_i,), weight of the object matched to each positive; None for 1.
        supervision: per image, (P_i,) int8 on the host, the label that supervises the mask of each positive, a
            `Supervision`, or -1 if there is none; None if all objects have masks.
    """

    rows: Tensor | None
    positives: Tensor
    target_deltas: Tensor
    boxes: list[Tensor]
    matched_idxs: list[Tensor]
    on_host: list[tuple[Tensor, Tensor]] | None = None
    weights: list[Tensor] | None = None
    supervision: list[Tensor] | None = None


def _of_positives(values: list[Tensor] | None, matched_idxs: list[Tensor]) -> list[Tensor] | None:
    """Return, per image, the values of the objects matched to the positives."""
    if values is None:
        return None
    return [of_image[idxs] for of_image, idxs in zip(values, matched_idxs, strict=True)]


def _have_masks(targets: list[dict[str, Any]], device: torch.device) -> list[Tensor] | None:
    """Return, per image, whether each object has a mask, (G,) bool on the device; None if all objects have masks."""
    have_masks = []
    some_missing = False
    for target in targets:
        masks = target["masks"]
        has_mask = target.get("has_mask")
        some_missing |= has_mask is not None
        if has_mask is None:
            has_mask = torch.ones(len(target["boxes"]), dtype=torch.bool, device="cpu")
        if isinstance(masks, EncodedMasks):
            encoded = [masks.has_mask(index) for index in range(len(masks))]
            if not all(encoded):
                some_missing = True
                has_mask = has_mask & torch.tensor(encoded, device=has_mask.device)
        have_masks.append(has_mask)
    return [send(has_mask, device) for has_mask in have_masks] if some_missing else None
