"""benchmarks/pretended_device.py: it computes what a CPU computes, and counts what makes a host wait for a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pretended_device import PretendedTensor, counted, pretended_device, sent
from maskloss.masks.transfer import send


@pytest.mark.parametrize(
    ("work", "waits", "launches"),
    [
        (lambda x: x * 2 + 1, 0, 2),
        (lambda x: x[1:3].T.reshape(-1)[None], 0, 1),  # of which only the reshape copies
        (lambda x: x[0, 0].item(), 1, 0),
        (lambda x: x.tolist(), 1, 1),
        (lambda x: bool((x > 0).any()), 1, 2),
        (lambda x: x.cpu(), 1, 1),
        (lambda x: x.to("cpu", non_blocking=True), 0, 1),
        (lambda x: torch.where(x > 0.5), 1, 2),
        (lambda x: x[x > 0.5], 1, 2),
        (lambda x: x[torch.tensor([0, 1])], 1, 1),  # the index is copied
        (lambda x: torch.zeros_like(x).masked_fill_(x > 0.5, 3), 0, 3),
        (lambda x: x.new_tensor([1.0, 2.0]), 1, 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1, 1),
        (lambda x: torch.zeros(3).to(x), 1, 1),
        (lambda x: send(torch.zeros(3), x.device), 0, 1),
        (lambda x: torch.arange(3, device=x.device), 0, 1),
        (lambda x: torch.nn.utils.rnn.pad_sequence([x[0], x[1, :2]], batch_first=True), 0, 3),
    ],
)
def test_waits_and_launches_of_an_operation(work: Callable[[Tensor], Any], waits: int, launches: int) -> None:
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    expected = work(values)
    with pretended_device():
        there = sent(values)
        assert there.device.type == "cuda"
        with counted() as counts:
            found = work(there)
    assert (counts.waits.total(), counts.launches.total()) == (waits, launches), counts.__dict__
    if isinstance(found, PretendedTensor):
        assert torch.equal(found.values, expected)
    elif isinstance(found, Tensor):
        assert torch.equal(found, expected)


def test_a_number_is_put_where_a_mask_is_true_without_waiting() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    with pretended_device():
        there = sent(values)
        mask = there > 1.5
        with counted() as counts:
            there[mask] = -1
            there[0] = 7.0
    assert there.values.tolist() == [7, -1, -1]
    assert counts.waits.total() == 0


def test_the_host_waits_for_an_event_only_if_it_has_not_waited_since() -> None:
    with pretended_device():
        there = sent(torch.ones(2))
        for read_before, waits in ((False, 1), (True, 1)):
            with counted() as counts:
                event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                if read_before:
                    there.sum().item()
                event.synchronize()
            assert counts.waits.total() == waits


def test_gradients_are_those_of_a_cpu() -> None:
    weight, values = torch.rand(3, 2, requires_grad=True), torch.rand(4, 3)
    (values @ weight).square().sum().backward()
    with pretended_device():
        there = sent(weight.detach()).requires_grad_()
        (sent(values) @ there).square().sum().backward()
    assert isinstance(there.grad, PretendedTensor)
    assert torch.equal(there.grad.values, weight.grad)


@pytest.mark.slow
def test_the_script_prints_a_table_and_writes_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import launches
    import measuring

    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["launches.py", "--batch-sizes", "1", "--objects", "3", "--min-size", "64"]
    )
    launches.main()
    results = json.loads((tmp_path / "launches.json").read_text())["results"]
    assert results["training step, batch 1"]["sync_free"]["waits"] == 3
    for sides in results.values():
        assert sides["ours"]["waits"] < sides["torchvision"]["waits"]
        assert sides["ours"]["launches"] < sides["torchvision"]["launches"]
    assert "sync_free" in capsys.readouterr().out
