"""benchmarks/claims.py: pages state what is measured, and claims that take no time to check hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("claims")


def test_every_claim_is_on_its_page(claims: Any) -> None:
    missing = [claim.words for claim in claims.CLAIMS.values() if not claims.stated(claim)]
    assert not missing


@pytest.mark.parametrize(
    "name", ["losses", "detections", "number", "files", "branches", "mask losses", "rare classes"]
)
def test_a_claim_holds(name: str, claims: Any) -> None:
    measured, holds = claims.CLAIMS[name].measure()
    assert holds, measured


def test_a_claim_that_is_not_on_its_page_fails(claims: Any) -> None:
    claim = claims.CLAIMS["number"]._replace(words="more than a thousand losses")
    assert not claims.stated(claim)
