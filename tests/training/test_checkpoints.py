"""maskloss/training/checkpoints.py: files are read back exactly, and none that could run code."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from maskloss.errors import InputError, RunError
from maskloss.training.checkpoints import (
    checkpoint_files,
    load_checkpoint,
    read_weights,
    restore,
    save_checkpoint,
)
from tests.training.small_runs import largest_file

STATE = {"model": {"w": torch.arange(3.0)}, "optimizer": {"lr": 0.1}, "config": "{}", "seconds": 1.5}


class RunsCode:
    """Writes a file when it is unpickled, as a malicious checkpoint could."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_write_file, (self.path,))


def _write_file(path: str) -> str:
    Path(path).write_text("code has run")
    return path


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_weights_are_read_from_either_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    weights, _ = read_weights(path)
    assert set(weights) == {"a", "b"}
    assert torch.equal(weights["a"], state["a"])


def test_weights_of_torchvisions_reference_scripts_are_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "weights.pt")
    weights, _ = read_weights(tmp_path / "weights.pt")
    assert list(weights) == ["a"]


@pytest.mark.parametrize("content", [{}, {"a": 3}, [torch.ones(2)], torch.ones(2), 3, {"model": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: must hold a state_dict, which is a dict of tensors"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_pt_weights_are_refused(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.rand(100)}, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    for kept in {0, 1, 2, 4, 10, *range(20, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"weights\.pt: truncated") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_damaged_pt_weights_are_read_or_refused_and_never_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.rand(20)}, path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 6):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except InputError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("writer", ["pickle", "torch", "legacy torch"])
@pytest.mark.parametrize("reader", [read_weights, load_checkpoint])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, writer: str, reader: Any
) -> None:
    path, proof = tmp_path / "weights.pt", tmp_path / "proof"
    content = {**STATE, "step": 1, "evil": RunsCode(proof)}
    if writer == "pickle":
        # torch warns of protocols above 2.
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(InputError, match=r"weights\.pt: .*not read because such files can run code"):
        reader(path)
    assert not proof.exists()
    # The test itself can fail: a plain load does run it.
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()


def test_a_checkpoint_reads_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 12, STATE)
    state = load_checkpoint(tmp_path / "step-00000012.pt")
    assert state["step"] == 12
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert {k: v for k, v in state.items() if k not in ("step", "model")} == {
        k: v for k, v in STATE.items() if k != "model"
    }


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, STATE)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-00000010.pt", "step-00000100.pt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.pt.123.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, 1, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_an_interruption_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, STATE)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, STATE)
    with largest_file(1000), pytest.raises(RunError, match=r"step-00000003\.pt: cannot be written"):
        save_checkpoint(tmp_path, 3, {**STATE, "model": {"w": torch.rand(5000)}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.pt", "step-00000002.pt"]
    assert load_checkpoint(tmp_path / "step-00000002.pt")["step"] == 2


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    path = tmp_path / "step-00000001.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"step-00000001\.pt: truncated"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.ones(2)},
        [1, 2],
        3,
        {"step": 1, "model": {}},
        # The optimizer's side of some other library's checkpoint.
        {"step": 1, "model": {}, "optimizer": {}},
    ],
    ids=str,
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "step-00000001.pt")
    with pytest.raises(InputError, match=r"step-00000001\.pt: is not a checkpoint of maskloss train"):
        load_checkpoint(tmp_path / "step-00000001.pt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", value) for value in ("3", None, 1.5, True, -1, 0, [3], torch.ones(2))),
        *(("seconds", value) for value in ("1", None, float("nan"), -1.0, True, [1.0])),
        *(("config", value) for value in ("", "{", "[]", "3", None, {"max_steps": 3}, "[" * 100_000)),
        *(("model", value) for value in (None, 3, [], {"w": 3}, {3: torch.ones(1)})),
        ("model", {"w": torch.tensor([1.0, torch.nan])}),
        *(("model", {"w": torch.ones(2, device="meta")}), ("model", {"w": torch.ones(2).to_sparse()})),
        *(("optimizer", value) for value in (None, 3, [])),
        *(("loss", value) for value in (3, None, [], {"w": torch.ones(2, device="meta")})),
        *(("scaler", value) for value in (3, "x")),
        *(("categories", value) for value in (3, "x", {})),
    ],
)  # fmt: skip
def test_an_odd_checkpoint_is_one_line_that_names_the_field(tmp_path: Path, field: str, value: Any) -> None:
    state = {
        "step": 3,
        "seconds": 1.5,
        "config": "{}",
        "model": {"w": torch.ones(2)},
        "optimizer": {},
        "loss": {},
    }
    path = tmp_path / "step-00000003.pt"
    torch.save(state, path)
    assert load_checkpoint(path)["step"] == 3
    torch.save({**state, field: value}, path)
    with pytest.raises(
        InputError, match=rf"step-00000003\.pt: is not a checkpoint of maskloss train: (its )?{field}"
    ) as caught:
        load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "how",
    ["shape", "state shape", "meta", "nan", "groups", "text", "rate", "state a number", "missing", "params"],
)
def test_an_optimizer_state_that_does_not_fit_is_one_line(how: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = torch.nn.Module()
    restore(Path("run"), copy.deepcopy(checkpoint), model, loss, fresh)
    assert torch.equal(fresh.state[model.weight]["momentum_buffer"], torch.ones(2, 3))
    state: Any = checkpoint["optimizer"]
    if how == "shape":
        checkpoint["model"]["weight"] = torch.ones(4, 4)
    elif how == "state shape":
        state["state"][0]["momentum_buffer"] = torch.ones(5)
    elif how == "meta":
        state["state"][0]["momentum_buffer"] = torch.ones(2, 3, device="meta")
    elif how == "nan":
        state["state"][0]["momentum_buffer"] = torch.full((2, 3), torch.nan)
    elif how == "groups":
        state["param_groups"] = state["param_groups"] * 2
    elif how == "text":
        state["param_groups"] = "x"
    elif how == "rate":
        state["param_groups"][0]["momentum"] = "0.9"
    elif how == "state a number":
        state["state"][0] = 3
    elif how == "missing":
        del state["state"]
    else:
        state["param_groups"][0]["params"] = [0]
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match="run: the checkpoint belongs to another model: ") as caught:
        restore(Path("run"), checkpoint, model, loss, fresh)
    assert len(str(caught.value).splitlines()) == 1
