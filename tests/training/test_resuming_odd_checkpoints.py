"""Checkpoints that are none, or of something else: one line that names the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from maskloss.errors import InputError
from maskloss.training.checkpoints import load_checkpoint, restore


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
def test_an_optimizer_of_something_else_is_one_line(how: str) -> None:
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
