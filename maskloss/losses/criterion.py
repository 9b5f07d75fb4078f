"""`MaskRCNNLoss`: the terms of Mask R-CNN's loss, with a divisor and a weight for each.

Each head passes its samples as one small batch, such as `RPNBatch` or `MaskBatch`. Only this file sums the values of a
term, divides and weights them. Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.checks import check_same_shape
from maskloss.losses.mask_classes import select_class_masks
from maskloss.losses.normalizers import BatchCounts, Normalizer, per_location
from maskloss.losses.term_checks import check_term, register_parts
from maskloss.losses.terms import (
    TERMS,
    AnyMaskTerm,
    BoxTerm,
    ClassificationTerm,
    KeypointBatch,
    KeypointTerm,
    LossWeights,
    MaskBatch,
    MaskLabels,
    ObjectnessTerm,
    RegularizationTerm,
    RoIBatch,
    RPNBatch,
    Supervision,
)
from maskloss.masks.targets import MaskTargets

if TYPE_CHECKING:
    from typing_extensions import Self


#: The names of the presets, which `maskloss.losses.presets` makes.
PresetName = Literal["torchvision", "detectron2", "matterport", "paper", "aligned", "weak"]


class MaskRCNNLoss(nn.Module):
    """The loss of a Mask R-CNN: one callable, one normalizer and one weight per term.

    Omitted arguments default to torchvision's, so `MaskRCNNLoss()` is the preset "torchvision", and
    `MaskRCNNLoss(mask=my_mask_loss)` differs from it only in the mask term.

    Args:
        objectness: (logits (S,), labels (S,) float) -> (S,).
        rpn_box: (`BoxRegression`) -> (P,), or (P, 4), summed over the last axis.
        classification: (logits (R, C), labels (R,)) -> (R,), or a tuple (values, weights) of (R,) each. The sum of
            the weights is then the divisor of `per_weight_sum`.
        box: same as `rpn_box`.
        mask: (mask_logits (P, M, M), mask_targets (P, M, M)) -> (P,), or (P, M, M), averaged over the grid.
            A term with the attribute `all_classes = True` is called with
            (mask_logits (P, C, M, M), mask_targets (P, M, M), labels (P,)). If it also has a method
            `mask_probs(mask_logits (D, C, M, M), labels (D,)) -> (D, M, M)`, inference takes the masks from it
            instead of the sigmoid of the own class's channel. If it has an attribute `channel`, only that channel
            is computed, and C is 1.
            A term with the attribute `uses_image = True` is called with (mask_logits (P, M, M), mask_targets (P, M, M),
            image_crops (P, 3, M, M), gt_box_grids (P, M, M)): the image in [0, 1] and the object's box under each RoI.
            A term with the attribute `uses_mask_labels = True`, such as `MaskBySupervision`, is called with
            (mask_logits (P, M, M), `MaskLabels`), and learns also from objects without a mask.
        keypoint: (keypoint_logits (V, M * M), cells (V,) int64) -> (V,), for the V visible keypoints of a Keypoint
            R-CNN. `cells` is the target cell of each heatmap.
        regularization: (model) -> scalar; None for no such term and no such key in the losses.
        weights: the factor of each term.
        normalizers: mapping from the name of a term, except "regularization", to a callable on `BatchCounts` that
            returns the divisor of the term's summed values, such as `per_positive`. Other terms keep torchvision's.
            A divisor of 0 counts as 1.
        mask_targets: how mask targets are computed from the ground truth; default: torchvision's, which are soft
            and shifted by half a pixel.
        synchronized: in distributed training, divide by the counts of the global batch instead of each process's own.
            DistributedDataParallel averages gradients, so the counts are averaged too. With False, as in the libraries,
            the loss of a global batch depends on how it is split over the processes.

    `torch.nn` losses with `reduction="none"` are valid terms where their signature fits. Parameters of a term become
    parameters of the loss, even if the term is an object that is not a module; `maskloss.loss_parameters` returns
    those of a model, for its optimizer. Terms are called with autocast off, and with float32 instead of half
    precision; float64 stays float64.

    Raises:
        TypeError: a term is a class, a name or a mapping, or takes other arguments; `weights`, `mask_targets`,
            `synchronized` or a normalizer has the wrong type.
        ValueError: a term reduces its values, `normalizers` has an unknown name, or a term of the detector, which has
            no anchor locations, is given `per_location`.

    Example:
        >>> from maskloss import LossWeights, MaskRCNNLoss
        >>> def mask_l1(mask_logits, mask_targets):
        ...     return (mask_logits.sigmoid() - mask_targets).abs()
        >>> loss = MaskRCNNLoss(mask=mask_l1, weights=LossWeights(mask=2.0))
        >>> loss.weights.mask
        2.0

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870; the defaults are torchvision 0.29.2's
    `fastrcnn_loss`, `maskrcnn_loss`, `keypointrcnn_loss` and `RegionProposalNetwork.compute_loss`.
    """

    #: Makes a preset by its name. `presets`, which builds presets from this class, sets it.
    _make_preset: ClassVar[Callable[[str, Tensor | None], MaskRCNNLoss]]

    objectness: ObjectnessTerm
    rpn_box: BoxTerm
    classification: ClassificationTerm
    box: BoxTerm
    mask: AnyMaskTerm
    keypoint: KeypointTerm
    regularization: RegularizationTerm | None

    def __init__(
        self,
        *,
        objectness: ObjectnessTerm | None = None,
        rpn_box: BoxTerm | None = None,
        classification: ClassificationTerm | None = None,
        box: BoxTerm | None = None,
        mask: AnyMaskTerm | None = None,
        keypoint: KeypointTerm | None = None,
        regularization: RegularizationTerm | None = None,
        weights: LossWeights | None = None,
        normalizers: Mapping[str, Normalizer] | None = None,
        mask_targets: MaskTargets | None = None,
        synchronized: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(synchronized, bool):
            raise TypeError(f"synchronized must be True or False, not {type(synchronized).__name__}")
        self.synchronized = synchronized
        terms: dict[str, Any] = {
            "objectness": objectness,
            "rpn_box": rpn_box,
            "classification": classification,
            "box": box,
            "mask": mask,
            "keypoint": keypoint,
            "regularization": regularization,
        }
        for name, term in terms.items():
            if term is not None:
                check_term(name, term)
        for argument, kind, value in (
            ("weights", LossWeights, weights),
            ("mask_targets", MaskTargets, mask_targets),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{argument} must be a maskloss.{kind.__name__}, not {type(value).__name__}")
        for name, entry in TERMS.items():
            term = terms[name]
            setattr(self, name, entry.default() if term is None and entry.default is not None else term)
        register_parts(self, [term for term in terms.values() if term is not None])
        self.weights = LossWeights() if weights is None else weights
        self.mask_targets = MaskTargets(aligned=False, binary=False) if mask_targets is None else mask_targets
        self.normalizers: dict[str, Normalizer] = {
            name: entry.normalizer for name, entry in TERMS.items() if entry.normalizer is not None
        }
        if normalizers is not None and not isinstance(normalizers, Mapping):
            raise TypeError(
                'normalizers must be a mapping such as {"box": maskloss.losses.per_positive}, not '
                f"{type(normalizers).__name__}"
            )
        unknown = set(normalizers or ()) - set(self.normalizers)
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"no term is named {names}; the names are {', '.join(self.normalizers)}")
        for name, normalizer in (normalizers or {}).items():
            if not callable(normalizer) or isinstance(normalizer, type):
                is_class = isinstance(normalizer, type)
                found = f"the class {normalizer.__name__}" if is_class else type(normalizer).__name__
                raise TypeError(
                    f"the normalizer of {name} must be a callable on BatchCounts such as "
                    f"maskloss.losses.per_positive, not {found}"
                )
        self.normalizers.update(normalizers or {})
        for name in self.normalizers.keys() - {"objectness", "rpn_box"}:
            if self.normalizers[name] is per_location:
                raise ValueError(
                    f"only the RPN has anchor locations, so {name} cannot be divided by per_location"
                )

    @classmethod
    def preset(cls, name: PresetName, *, active_classes: Tensor | None = None) -> Self:
        """Return the loss with the conventions of a library or of the paper.

        Args:
            name: "torchvision", "detectron2", "matterport", "paper", "aligned" (torchvision's terms with aligned
                soft mask targets) or "weak" ("aligned" with a mask term for weak labels). They are defined in
                `maskloss.losses.presets`.
            active_classes: for "matterport" only: (C,) bool, the classes that are annotated (including the
                background), or None for all.

        Raises:
            ValueError: no preset has this name, or it takes no `active_classes`.

        Example:
            >>> from maskloss import MaskRCNNLoss
            >>> MaskRCNNLoss.preset("paper").weights.rpn_box
            10.0
        """
        return cls(**cls._make_preset(name, active_classes).settings())

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this loss, so that a copy can change some of them.

        Example:
            >>> from maskloss import LossWeights, MaskRCNNLoss
            >>> detectron2 = MaskRCNNLoss.preset("detectron2")
            >>> doubled = MaskRCNNLoss(**{**detectron2.settings(), "weights": LossWeights(mask=2.0)})
            >>> doubled.mask_targets.binary
            True
        """
        names = (*TERMS, "weights", "mask_targets", "synchronized")
        return {**{name: getattr(self, name) for name in names}, "normalizers": dict(self.normalizers)}

    @property
    def needs_all_mask_classes(self) -> bool:
        """Whether the mask term takes the logits of all classes."""
        return bool(getattr(self.mask, "all_classes", False))

    @property
    def uses_image(self) -> bool:
        """Whether the mask term needs the image under each RoI."""
        return bool(getattr(self.mask, "uses_image", False))

    @property
    def uses_mask_labels(self) -> bool:
        """Whether the mask term takes all labels of an object's mask, not its mask alone."""
        return bool(getattr(self.mask, "uses_mask_labels", False))

    @property
    def mask_supervision(self) -> frozenset[Supervision]:
        """The kinds of labels that the mask term learns from; positives without any of them are left out of it."""
        mask: Any = self.mask
        return mask.supervision if self.uses_mask_labels else frozenset({Supervision.MASK})

    def mask_channels(self, labels: Tensor) -> Tensor | None:
        """Return the channel (P,) of the mask head that the term reads for each label (P,), or None for all channels.

        That is the channel of the label, unless the term takes all classes: then it is the term's `channel`, if it
        has this attribute.
        """
        if not self.needs_all_mask_classes:
            return labels
        channel: int | None = getattr(self.mask, "channel", None)
        return None if channel is None else torch.full_like(labels, channel)

    @property
    def own_mask_probs(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The mask term's conversion of logits to probabilities, or None for the sigmoid."""
        own: Callable[[Tensor, Tensor], Tensor] | None = getattr(self.mask, "mask_probs", None)
        return own if self.needs_all_mask_classes else None

    def rpn_losses(self, batch: RPNBatch) -> dict[str, Tensor]:
        """Return the weighted scalars `loss_objectness` and `loss_rpn_box_reg`."""
        return {
            TERMS["objectness"].key: self._term(
                "objectness",
                batch.objectness,
                lambda logits: self.objectness(logits, batch.labels),
                batch.counts,
                batch.weights,
            ),
            TERMS["rpn_box"].key: self._box_term("rpn_box", batch.box, batch.counts, batch.box_weights),
        }

    def roi_losses(self, batch: RoIBatch) -> dict[str, Tensor]:
        """Return the weighted scalars `loss_classifier` and `loss_box_reg`."""
        return {
            TERMS["classification"].key: self._term(
                "classification",
                batch.class_logits,
                lambda logits: self.classification(logits, batch.labels),
                batch.counts,
                batch.weights,
            ),
            TERMS["box"].key: self._box_term("box", batch.box, batch.counts, batch.box_weights),
        }

    def mask_losses(self, batch: MaskBatch) -> dict[str, Tensor]:
        """Return the weighted scalar `loss_mask`."""

        def evaluate(mask_logits: Tensor) -> Tensor:
            mask: Any = self.mask
            if self.needs_all_mask_classes:
                values: Tensor = mask(mask_logits, batch.mask_targets, batch.labels)
            else:
                own_logits, labels = select_class_masks(mask_logits, batch.labels), batch.mask_labels
                if self.uses_mask_labels:
                    values = mask(own_logits, labels or MaskLabels.of_masks(batch.mask_targets))
                elif self.uses_image:
                    if labels is None or labels.image_crops is None:
                        raise ValueError("the mask term has uses_image, but the MaskBatch has no image crops")
                    values = mask(own_logits, batch.mask_targets, labels.image_crops, labels.gt_box_grids)
                else:
                    values = mask(own_logits, batch.mask_targets)
            per_pixel = getattr(values, "shape", None) == batch.mask_targets.shape
            return values.mean(dim=(1, 2)) if per_pixel else values

        return {
            TERMS["mask"].key: self._term("mask", batch.mask_logits, evaluate, batch.counts, batch.weights)
        }

    def keypoint_losses(self, batch: KeypointBatch) -> dict[str, Tensor]:
        """Return the weighted scalar `loss_keypoint`."""
        return {
            TERMS["keypoint"].key: self._term(
                "keypoint",
                batch.keypoint_logits,
                lambda logits: self.keypoint(logits, batch.cells),
                batch.counts,
                batch.weights,
            )
        }

    def regularization_losses(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weighted scalar `loss_regularization` of a model, or an empty dict if there is no such term."""
        if self.regularization is None:
            return {}
        if self.weights.regularization == 0:
            return {TERMS["regularization"].key: zero_of(model.parameters())}
        value = self.regularization(model)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"the regularization term must return a scalar tensor, not {_describe(value)}")
        return {TERMS["regularization"].key: self.weights.regularization * value}

    def synchronize(self, counts: BatchCounts, device: torch.device) -> BatchCounts:
        """Return the mean of the counts over all processes if the loss is `synchronized` and in training mode.

        Args:
            counts: the process's own counts.
            device: the device of the process group's tensors.

        Returns:
            Counts whose numbers are tensors on the device, so that the host need not wait for them; or `counts`.
        """
        distributed = torch.distributed
        if not (self.synchronized and self.training and distributed.is_available()):
            return counts
        if not distributed.is_initialized():
            return counts
        names = ("num_images", "sampled", "positives", "weight_sum", "locations")
        values = torch.stack(
            [torch.as_tensor(getattr(counts, name), dtype=torch.float32, device=device) for name in names]
        )
        distributed.all_reduce(values.detach_())
        return replace(counts, **dict(zip(names, values / distributed.get_world_size(), strict=True)))

    def _box_term(self, name: str, box: BoxRegression, counts: BatchCounts, weights: Tensor | None) -> Tensor:
        term: BoxTerm = getattr(self, name)

        def evaluate(deltas: Tensor) -> Tensor:
            targets = at_least_float32(box.target_deltas)
            values: Tensor = term(BoxRegression(deltas, targets, box.decode))
            per_coordinate = getattr(values, "shape", None) == deltas.shape
            return values.sum(dim=-1) if per_coordinate else values

        return self._term(name, box.deltas, evaluate, counts, weights)

    def _term(
        self,
        name: str,
        predictions: Tensor,
        evaluate: Callable[[Tensor], Any],
        counts: BatchCounts,
        weights: Tensor | None,
    ) -> Tensor:
        """Return one term's loss: evaluate it in at least float32, sum its values, divide and weight them."""
        weight: float = getattr(self.weights, name)
        predictions = at_least_float32(predictions)
        if weight == 0:
            return zero_of([predictions])
        count = predictions.shape[0]
        with torch.autocast(predictions.device.type, enabled=False):
            values = evaluate(predictions)
            weight_sum: float | Tensor = counts.sampled
            if name == "classification" and isinstance(values, tuple):
                values, value_weights = values
                _check_values(name, value_weights, count)
                weight_sum = value_weights.sum()
            _check_values(name, values, count)
            if weights is not None:
                check_same_shape(weights=weights, values=values)
                # The divisor stays the same, so that the weight of one object does not change the others.
                values = values * weights.to(values.dtype)
            counts = self.synchronize(replace(counts, weight_sum=weight_sum), predictions.device)
            divisor = divisor_of(self.normalizers[name](counts))
            loss: Tensor = weight * (values.sum() / divisor)
            return loss


def divisor_of(count: float | Tensor) -> float | Tensor:
    """Return a count, or 1 for a count of 0: then there are no values to sum, and the loss is 0 instead of 0 / 0.

    Example:
        >>> divisor_of(0), divisor_of(2.5)
        (1, 2.5)
    """
    if isinstance(count, Tensor):
        return torch.where(count == 0, torch.ones_like(count), count)
    return count or 1


def zero_of(tensors: Any) -> Tensor:
    """Return a scalar 0 that backpropagates zero gradients to each tensor.

    It sums an empty slice of each, which is 0 also where `tensor.sum() * 0` would be NaN because of an infinity. Of a
    parameter that `fully_shard` has divided, it takes the part on this process: the parameter's own gradient is divided
    in the same way, and its other parts need not be collected.

    Example:
        >>> import torch
        >>> zero_of([torch.tensor([float("inf")])])
        tensor(0.)
    """
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    sums = [part.reshape(-1)[:0].sum() for part in parts]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float32)


def _check_values(name: str, values: Any, count: int) -> None:
    if isinstance(values, Tensor) and values.shape == (count,):
        return
    or_cells = f" or ({count}, M, M)" if name == "mask" else ""
    raise ValueError(
        f"the {name} term must return one value per {TERMS[name].per}, shape ({count},){or_cells}, not "
        f"{_describe(values)}"
        "; a torch.nn loss needs reduction='none'"
    )


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
