"""torchvision's own tests of its detectors pass with converted models.

They are not part of an installed torchvision. TORCHVISION_TESTS names the folder `test` of its sources.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = os.environ.get("TORCHVISION_TESTS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TESTS, reason="TORCHVISION_TESTS does not name the tests in torchvision's sources"
    ),
]

#: Tests of R-CNNs that neither script models nor compare with files of expected detections.
CHOSEN = "(rcnn or krcnn) and (validation or double or switch_devices or forward_negative_sample)"


def test_torchvisions_tests_pass_with_converted_models() -> None:
    assert TESTS is not None
    files = ["test_models.py", "test_models_detection_negative_samples.py"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.detection.converted_builders",
            "-k",
            CHOSEN,
            *files,
        ],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10
