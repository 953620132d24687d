"""Golden cases of the official code, found by kind in the directory that `OPENEVA_GOLDEN` names."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("OPENEVA_GOLDEN", ROOT / "../shared/golden"))
COVERED: set[str] = set()
"""Kinds that some test asked for; the rest is listed in the run's output (see conftest)."""


@dataclass
class Case:
    json: dict[str, Any]
    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (file := self.path.with_suffix(".safetensors")).is_file():
            self.tensors = load_file(file)

    def __str__(self) -> str:
        return self.path.stem

    @property
    def config(self) -> dict[str, Any]:
        return self.json["config"]

    def prefix(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def close(self, actual: Tensor, name: str, kind: str = "tolerance") -> None:
        """Assert that a tensor equals the case's tensor of this name within the case's own tolerance."""
        tolerance = self.json[kind]
        expected = self.tensors[name]
        torch.testing.assert_close(
            actual.detach().reshape(expected.shape).to(expected.dtype),
            expected,
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
            msg=lambda text: f"{self.path.stem} {name}: {text}",
        )


def all_kinds() -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for path in sorted(DIRECTORY.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "kind" in content:
            kinds.setdefault(content["kind"], []).append(path)
    return kinds


def cases(kind: str) -> list[Any]:
    """All cases of a kind as pytest parameters; one skipped parameter where the directory is absent."""
    COVERED.add(kind)
    found = all_kinds().get(kind, [])
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(f"no golden case of kind {kind!r} under {DIRECTORY.name}"))]
    return [Case(json.loads(path.read_text()), path) for path in found]
