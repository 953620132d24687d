"""Shared set-up of all tests."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)
settings.register_profile("openeva", deadline=None)  # machines differ, and the first example may import a library
settings.load_profile("openeva")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    from parity import golden

    if hasattr(session.config, "workeroutput"):  # a worker of xdist: only it has imported the tests
        session.config.workeroutput["golden_covered"] = sorted(golden.COVERED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    from parity import golden

    golden.COVERED.update(getattr(node, "workeroutput", {}).get("golden_covered", ()))


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
