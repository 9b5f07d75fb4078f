"""maskloss/training/term_errors.py: errors in a term name it and the line in the user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskloss.errors import InputError, RunError
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import MaskBatch
from maskloss.training.loop import train
from maskloss.training.term_errors import terms_named
from tests.training.small_runs import (
    history,
    small_config,
)


def fails_in_training(mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
    if mask_logits.shape[-1] > 7:  # the probe's masks have 7 x 7
        raise KeyError("no such thing")
    return (mask_logits - mask_targets).abs()


def test_an_error_in_a_training_step_names_the_term_and_the_line_and_the_run_can_be_restarted(
    shapes: Path, tmp_path: Path
) -> None:
    config = small_config(shapes, tmp_path / "run", max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "make_loss", lambda _: MaskRCNNLoss(mask=fails_in_training))
        with pytest.raises(RunError) as caught:
            train(config)
    line = fails_in_training.__code__.co_firstlineno + 2
    assert str(caught.value) == (
        f"step 1: the mask term fails: KeyError: 'no such thing' ({__file__}:{line})"
    )
    train(config)
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


def run(loss: MaskRCNNLoss, source: str, **names: Any) -> None:
    """Run code in step 4 of a training, as code that is not the user's."""
    code = compile(f"with terms_named(loss, 4):\n    {source}", "<library>", "exec")
    exec(code, {"terms_named": terms_named, "loss": loss, **names})


def raising(*_: Tensor) -> Tensor:
    raise KeyError("no such thing")


class Raising(nn.Module):
    def forward(self, *_: Tensor) -> Tensor:
        return raising()


RAISING_LINE = raising.__code__.co_firstlineno + 1


def test_a_function_is_named_with_its_line() -> None:
    with pytest.raises(RunError) as caught:
        run(MaskRCNNLoss(box=raising), "loss.box()")
    assert str(caught.value) == (
        f"step 4: the box term fails: KeyError: 'no such thing' ({__file__}:{RAISING_LINE})"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_module_is_named_with_the_innermost_line_of_the_users_code() -> None:
    with pytest.raises(RunError) as caught:
        run(MaskRCNNLoss(mask=Raising()), "loss.mask()")
    assert str(caught.value) == (
        f"step 4: the mask term fails: KeyError: 'no such thing' ({__file__}:{RAISING_LINE})"
    )


def test_an_error_in_a_users_code_outside_the_terms_is_named_with_its_line() -> None:
    with pytest.raises(RunError) as caught:
        run(MaskRCNNLoss(), "raising()", raising=raising)
    assert (
        str(caught.value) == f"step 4: the loss fails: KeyError: 'no such thing' ({__file__}:{RAISING_LINE})"
    )


def test_a_value_that_the_criterion_refuses_is_an_error_of_the_loss() -> None:
    loss = MaskRCNNLoss(mask=lambda mask_logits, mask_targets: mask_logits.mean())
    counts = BatchCounts(num_images=1, sampled=2, positives=2, batch_size_per_image=2, locations=2)
    masks = MaskBatch(torch.zeros(2, 3, 7, 7), torch.zeros(2, 7, 7), torch.ones(2, dtype=torch.int64), counts)
    with pytest.raises(RunError, match=r"^step 4: the loss fails: \w+: the mask term must return one value"):
        run(loss, "loss.mask_losses(masks)", masks=masks)


def test_an_error_in_a_library_passes_unchanged() -> None:
    with pytest.raises(json.JSONDecodeError):
        run(MaskRCNNLoss(), "json.loads('{')", json=json)


@pytest.mark.parametrize(
    "error",
    [InputError("a.png: not a readable image"), RunError("step 4: nan"), torch.OutOfMemoryError("8 GiB")],
)
def test_errors_that_already_name_their_cause_pass_unchanged(error: Exception) -> None:
    def failing(*_: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        run(MaskRCNNLoss(mask=failing), "loss.mask()")
    assert caught.value is error


def test_a_long_message_is_cut_to_one_line() -> None:
    def failing(*_: Tensor) -> Tensor:
        raise ValueError("first\n" + "x" * 1000)

    with pytest.raises(RunError) as caught:
        run(MaskRCNNLoss(mask=failing), "loss.mask()")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 240 + len(__file__)
