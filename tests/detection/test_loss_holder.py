"""`maskloss.detection.loss_holder`: a loss in a module but not in its state, and random states per image."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import maskloss
from benchmarks.pretended_device import pretended_device, sent
from maskloss import MaskRCNNLoss
from maskloss.detection import RoIHeads
from maskloss.detection.loss_holder import ImageRandomStates, LossHolder, mean_losses, move_to

from .small_models import CLASS_WEIGHTS, batch, class_weighted, tiny_mask_rcnn, training_pass


def test_class_weights_take_effect_and_are_not_in_the_state_dict():
    stock = tiny_mask_rcnn()
    keys = list(stock.state_dict())
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted())
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in stock.named_buffers()]
    weighted, _ = training_pass(model, *batch())
    plain, _ = training_pass(stock, *batch())
    assert weighted["loss_classifier"] != plain["loss_classifier"]


def test_the_loss_moves_with_the_model_to_another_device():
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted())
    with pretended_device():
        for part in (model.roi_heads, model.rpn):
            part.loss.classification.weight = CLASS_WEIGHTS.clone()
            for module in part.modules():
                module._parameters.clear()  # only the loss can move to the pretended device
                module._buffers.clear()
            part.to("cuda")
            assert part.loss.classification.weight.device.type == "cuda"


def test_the_loss_moves_to_the_models_device():
    loss = class_weighted()
    with pretended_device():
        move_to(loss, sent(torch.zeros(1)))
        assert loss.classification.weight.device.type == "cuda"
        assert torch.equal(loss.classification.weight.cpu(), CLASS_WEIGHTS)


def counting() -> MaskRCNNLoss:
    """Return a loss with a buffer of floats, and one of integers."""
    loss = class_weighted()
    loss.classification.register_buffer("counts", torch.tensor([1, 2]))
    return loss


def convert_outside_of_the_context() -> nn.Module:
    with torch.device("meta"):
        model = tiny_mask_rcnn()
    return maskloss.convert(model, counting())


def convert_inside_the_context() -> nn.Module:
    loss = counting()
    with torch.device("meta"):
        return maskloss.convert(tiny_mask_rcnn(), loss)


def move_to_meta() -> nn.Module:
    return maskloss.convert(tiny_mask_rcnn(), counting()).to("meta")


@pytest.mark.parametrize("make", [convert_outside_of_the_context, convert_inside_the_context, move_to_meta])
def test_a_model_on_the_meta_device_trains_after_it_gets_its_values(make):
    stock = tiny_mask_rcnn()
    expected, _ = training_pass(maskloss.convert(copy.deepcopy(stock), counting()), *batch())
    model = make()
    assert next(model.parameters()).is_meta
    model.to_empty(device="cpu").load_state_dict(stock.state_dict())
    for part in (model.rpn, model.roi_heads):
        assert torch.equal(part.loss.classification.weight, CLASS_WEIGHTS)
        assert part.loss.classification.counts.tolist() == [1, 2]
    losses, _ = training_pass(model, *batch())
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-7)


def test_a_presets_buffers_have_values_in_a_model_made_on_the_meta_device():
    with torch.device("meta"):
        model = maskloss.convert(tiny_mask_rcnn(), "weak")
    assert not any(buffer.is_meta for buffer in model.roi_heads.loss.buffers())
    assert list(model.roi_heads.loss.buffers())


def test_a_loss_without_values_is_refused():
    with torch.device("meta"):
        loss = MaskRCNNLoss(classification=nn.CrossEntropyLoss(weight=torch.ones(4), reduction="none"))
    with pytest.raises(
        ValueError, match=r"the loss has tensors on the meta device.*outside of torch\.device"
    ):
        maskloss.convert(tiny_mask_rcnn(), loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_keeps_class_weights_in_float32(dtype):
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted()).to(dtype)
    assert model.roi_heads.box_predictor.cls_score.weight.dtype == dtype
    weight = model.roi_heads.loss.classification.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, CLASS_WEIGHTS)


def test_a_double_precision_model_trains_with_class_weights():
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted()).double()
    images, targets = batch()
    losses, _ = training_pass(model, [image.double() for image in images], targets)
    assert losses["loss_classifier"].isfinite()


def test_a_copy_has_its_own_loss():
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted())
    twin = copy.deepcopy(model)
    twin.double()
    assert twin.roi_heads.loss.classification.weight.dtype == torch.float64
    assert model.roi_heads.loss.classification.weight.dtype == torch.float32
    assert twin.roi_heads.loss is twin.rpn.loss


def test_a_model_converted_in_float64_trains_with_class_weights():
    model = maskloss.convert(tiny_mask_rcnn().double(), class_weighted())
    images, targets = batch()
    losses, _ = training_pass(model, [image.double() for image in images], targets)
    assert losses["loss_classifier"].dtype == torch.float64


def test_our_parts_in_an_unconverted_model_raise_with_the_way_out():
    model = tiny_mask_rcnn().train()
    model.roi_heads.__class__ = RoIHeads
    assert "no loss yet" in repr(model)
    with pytest.raises(RuntimeError, match=r"has no loss yet: call maskloss\.convert\(model\) first"):
        model(*batch())


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.filterwarnings("ignore:RCNN always returns")
def test_scripting_raises_and_the_suggested_way_out_works():
    model = maskloss.convert(tiny_mask_rcnn()).eval()
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script does not support .*load its state_dict"):
        torch.jit.script(model)
    stock = tiny_mask_rcnn(seed=1).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    images = batch()[0]
    _, detections = torch.jit.script(stock)(images)
    assert torch.equal(detections[0]["boxes"], model(images)[0]["boxes"])


# A module by itself.


class Holder(LossHolder, nn.Linear):
    """A linear layer that holds a loss."""


def holder() -> Holder:
    module = Holder(2, 1)
    module.hold(class_weighted())
    return module


def test_the_loss_is_no_part_of_the_modules_state() -> None:
    module = holder()
    assert list(module.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in module.named_modules()] == [""]
    assert list(module.buffers()) == []
    assert isinstance(module.loss, MaskRCNNLoss)


def test_a_module_without_a_loss_names_itself_and_can_be_moved() -> None:
    module = Holder(2, 1).to(torch.float64)
    with pytest.raises(
        RuntimeError, match=r"^this Holder has no loss yet: call maskloss\.convert\(model\) first$"
    ):
        _ = module.loss


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_module_holds_a_copy_of_the_loss(duplicate) -> None:
    module = holder()
    twin = duplicate(module)
    weight = twin.loss.classification.weight
    assert torch.equal(weight, CLASS_WEIGHTS)
    weight.zero_()
    assert torch.equal(module.loss.classification.weight, CLASS_WEIGHTS)


def test_losses_are_wanted_in_training_and_with_random_states() -> None:
    module = holder()
    assert module.wants_losses
    assert not module.eval().wants_losses
    module.eval_states = ImageRandomStates([])
    assert module.wants_losses


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_moved_loss_has_at_least_float32_and_keeps_integers(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    loss = class_weighted()
    loss.classification.register_buffer("counts", torch.tensor([1, 2]))
    move_to(loss, torch.zeros(1, dtype=dtype))
    assert loss.classification.weight.dtype == expected
    assert torch.equal(loss.classification.weight, CLASS_WEIGHTS.to(expected))
    assert loss.classification.counts.dtype == torch.int64


def test_a_float64_loss_does_not_stay_float64_with_a_float32_model() -> None:
    loss = class_weighted().double()
    move_to(loss, torch.zeros(1))
    assert loss.classification.weight.dtype == torch.float32


# Random states, and means.


def test_each_image_continues_its_own_random_numbers_from_the_same_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    states = ImageRandomStates([])
    numbers: dict[int, list[Tensor]] = {0: [], 1: []}
    for image in (0, 1, 1, 0, 0, 1, 1, 0):
        with states.of_image(image):
            numbers[image].append(torch.rand(1))
    assert torch.equal(torch.cat(numbers[0]), expected)
    assert torch.equal(torch.cat(numbers[1]), expected)


def test_a_fresh_copy_starts_again_and_changes_nothing_in_the_first() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    states = ImageRandomStates([])
    with states.of_image(0):
        torch.rand(1)
    torch.rand(17)
    other = states.fresh_copy()
    with other.of_image(0):
        assert torch.equal(torch.rand(2), expected)
    with states.of_image(0):
        assert torch.equal(torch.rand(1), expected[1:])


def test_the_mean_over_images_keeps_each_loss_apart_and_its_gradient() -> None:
    values = torch.tensor([1.0, 3.0, 8.0], requires_grad=True)
    by_image = [{"loss_mask": value, "loss_box": 10 * value.detach()} for value in values]
    means = mean_losses(by_image)
    assert {key: value.item() for key, value in means.items()} == {"loss_mask": 4.0, "loss_box": 40.0}
    means["loss_mask"].backward()
    torch.testing.assert_close(values.grad, torch.full((3,), 1 / 3))
