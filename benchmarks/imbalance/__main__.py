"""Binary segmentation of objects that fill 0.1 to 5 % of the image, with different losses and networks.

    python -m benchmarks.imbalance [--networks FCN U-Net SegNet small] [--seeds 5] [--output runs/imbalance]

Takes just under an hour on two CPU cores, and resumes after an interruption from the results in the folder. Prints
foreground IoU, Dice, precision and recall on test images, by the object's share of the image, and writes them to
results/imbalance.json and imbalance/table.md. All losses are trained in the same way: the same images and initial
weights for the same seed, AdamW, and a threshold at a probability of 1/2.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.imbalance.experiment import Setting, experiment, losses, table
from benchmarks.imbalance.networks import NETWORKS
from benchmarks.imbalance.pictures import pictures
from benchmarks.measuring import write_results


def main() -> None:
    """Execute the outstanding runs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/imbalance"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    setting = Setting()
    names = list(losses(pictures(8, setting.size, seed=0)[1]))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed in range(arguments.seeds):
        for network in arguments.networks:
            for loss in names:
                path = arguments.output / f"{network}-{loss.replace(' ', '-')}-{seed}.json"
                found = json.loads(path.read_text()) if path.exists() else {}
                if found.get("setting") != vars(setting):
                    found = {**experiment(network, loss, seed, setting), "setting": vars(setting)}
                    path.write_text(json.dumps(found))
                    iou = found["scores"]["all"]["IoU"]
                    print(
                        f"{network}, {loss}, seed {seed}: IoU {iou:.3f}, {found['seconds']:.0f} s", flush=True
                    )
                of_run = {key: value for key, value in found.items() if key != "setting"}
                results.setdefault(network, {}).setdefault(loss, []).append(of_run)
    text = table(results)
    print(text)
    (Path(__file__).parent / "table.md").write_text(text)
    write_results("imbalance", "cpu", {"setting": vars(setting), "runs": results})


if __name__ == "__main__":
    main()
