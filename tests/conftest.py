"""Shared set-up of all tests."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from parity import golden

    if not golden.DIRECTORY.is_dir():
        terminalreporter.write_line("golden cases: none here (set OPENEVA_GOLDEN), parity tests skipped")
        return
    missing = {kind: len(paths) for kind, paths in golden.all_kinds().items() if kind not in golden.COVERED}
    if golden.COVERED and missing:
        terminalreporter.write_line(f"golden kinds that no test covers yet: {', '.join(sorted(missing))}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip("needs a CUDA device"))
