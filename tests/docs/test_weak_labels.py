"""docs/weak_labels.md: its config is the preset `weak`, its code trains, and its command's options exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

from maskloss import MaskRCNNLoss
from maskloss.cli import COMMANDS
from maskloss.parser import make_parser
from maskloss.training.config import TrainConfig
from maskloss.training.loss_config import make_loss

PAGE = (Path(__file__).parents[2] / "docs" / "weak_labels.md").read_text("utf-8")


REQUIRED = [
    f"--{name}=x" for name in ("train_images", "train_annotations", "val_images", "val_annotations", "output")
]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


def test_the_config_is_the_preset() -> None:
    found, preset = make_loss(yaml.safe_load(block("yaml"))["loss"]), MaskRCNNLoss.preset("weak")
    assert repr(found) == repr(preset)
    assert found.mask_supervision == preset.mask_supervision
    assert found.mask_targets == preset.mask_targets


def test_the_command_line_reads_the_config(tmp_path: Path) -> None:
    (tmp_path / "loss.yaml").write_text(block("yaml"))
    parsed = make_parser(COMMANDS, "train").parse_args(
        ["train", "--config", str(tmp_path / "loss.yaml"), *REQUIRED]
    )
    assert repr(make_loss(parsed.train.loss)) == repr(MaskRCNNLoss.preset("weak"))


def test_the_code_trains() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block("python"), "weak_labels.md", "exec"), names)
    losses = names["losses"]
    assert isinstance(losses, dict)
    assert losses["loss_mask"] > 0


def test_the_command_is_valid() -> None:
    options = dict(re.findall(r"--([\w-]+) (\S+)", block("sh").replace("\\\n", " ")))
    config = TrainConfig(**{key.replace("-", "_"): value for key, value in options.items()})
    assert repr(config.make_loss()) == repr(MaskRCNNLoss.preset("weak"))
