"""`maskloss.masks.transfer`: copies between the host and a device, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maskloss.masks.transfer import AsyncHostCopy, send

from .copies import BlockingCopies

# A fake GPU, on which every copy is recorded and nothing is computed.


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    with FakeTensorMode(), patch.object(Tensor, "pin_memory", lambda tensor: tensor):
        yield


def test_the_host_does_not_wait_to_send_a_tensor(fake_gpu: None) -> None:
    tensor = torch.zeros(3)
    with BlockingCopies() as copies:
        sent = send(tensor, torch.device("cuda"))
        tensor.to("cuda")
    assert sent.device.type == "cuda"
    # The second copy shows that the record works.
    assert copies.found == ["cpu to cuda:0, shape (3,)"]


def test_only_tensors_on_the_host_are_pinned_and_only_for_a_gpu(fake_gpu: None) -> None:
    pinned: list[Tensor] = []
    with patch.object(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor):
        on_gpu = torch.zeros(2, device="cuda")
        send(on_gpu, torch.device("cuda"))
        send(on_gpu, torch.device("cpu"))
        send(torch.zeros(2), torch.device("cpu"))
        assert pinned == []
        host = torch.zeros(2)
        send(host, torch.device("cuda"))
    assert len(pinned) == 1
    assert pinned[0] is host


class Event:
    """Replacement for a CUDA event that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def record(self, stream: str) -> None:
        self.calls.append(f"record on {stream}")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def test_the_host_waits_for_the_copy_and_only_when_it_asks_for_the_result(fake_gpu: None) -> None:
    events: list[Event] = []
    with (
        patch.object(torch.cuda, "Event", lambda: events.append(Event()) or events[-1]),
        patch.object(torch.cuda, "current_stream", lambda device: f"the stream of {device}"),
        BlockingCopies() as copies,
    ):
        copied = AsyncHostCopy(torch.zeros(2, device="cuda:0"), torch.ones(3, device="cuda:0"))
        assert events[0].calls == ["record on the stream of cuda:0"]
        result = copied.result()
    assert events[0].calls == ["record on the stream of cuda:0", "synchronize"]
    assert [tuple(tensor.shape) for tensor in result] == [(2,), (3,)]
    assert {tensor.device.type for tensor in result} == {"cpu"}
    assert copies.found == []


# Without a GPU, and with one.


def test_on_the_host_values_and_dtypes_are_kept() -> None:
    tensors = [torch.tensor([1, 2]), torch.tensor([[0.5]], dtype=torch.float64), torch.tensor(True)]
    copied = AsyncHostCopy(*tensors).result()
    assert [tensor.tolist() for tensor in copied] == [[1, 2], [[0.5]], True]
    assert [tensor.dtype for tensor in copied] == [torch.int64, torch.float64, torch.bool]
    assert send(tensors[0], torch.device("cpu")).tolist() == [1, 2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_values_survive_the_way_to_a_gpu_and_back() -> None:
    values = torch.arange(1000)
    on_gpu = send(values, torch.device("cuda"))
    assert on_gpu.device.type == "cuda"
    [back] = AsyncHostCopy(2 * on_gpu).result()
    assert back.device.type == "cpu"
    assert torch.equal(back, 2 * values)
