"""`torchrun` on one node and on two: with `synchronized`, the losses are those of one process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from maskloss.detection.builders import ModelSettings, build_model

from .small_runs import TERMS, full_models, lines, small_config, write_data

pytestmark = pytest.mark.slow

BATCH, LIMIT_S = 4, 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the data, and weights with which the scores of proposals do not nearly tie.

    Convolutions round differently in larger batches. Where scores nearly tie, proposals would swap places, and other
    ones would be sampled.
    """
    folder = write_data(tmp_path_factory.mktemp("data"))
    torch.manual_seed(0)
    with full_models():
        model = build_model(ModelSettings("resnet18", num_classes=4))
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.5)
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def settings(data: Path, output: Path, batch_size: int) -> Any:
    return small_config(
        data,
        output,
        batch_size=batch_size,
        weights=str(data / "weights.safetensors"),
        # Other norms would have the statistics of each process's own images.
        frozen_normalization=True,
        trainable_layers=5,
        synchronized=True,
        horizontal_flip=0.5,
        val_losses=False,
    )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def first_step(data: Path, folder: Path, nodes: int, per_node: int) -> dict[str, Any]:
    """Train with torchrun on a number of nodes of this machine, and return the losses of the first step."""
    config = settings(data, folder / "run", BATCH // (nodes * per_node))
    (folder / "config.yaml").write_text(
        json.dumps({key: value for key, value in vars(config).items() if key != "resume"})
    )
    launch = [sys.executable, "-m", "torch.distributed.run"]
    launch += ["--nnodes", str(nodes), "--nproc-per-node", str(per_node)]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    running = [
        subprocess.Popen(
            [
                *launch,
                "--node-rank",
                str(node),
                "-m",
                "maskloss",
                "train",
                "--config",
                folder / "config.yaml",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in range(nodes)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    return lines(folder / "run/history.jsonl")[0]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return first_step(data, tmp_path_factory.mktemp("alone"), nodes=1, per_node=1)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (1, 4), (2, 2)])
def test_the_losses_of_a_batch_do_not_depend_on_the_processes(
    nodes: int, per_node: int, data: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    together = first_step(data, tmp_path, nodes, per_node)
    for key in TERMS:
        assert together[key] == pytest.approx(alone[key], rel=1e-6), key
