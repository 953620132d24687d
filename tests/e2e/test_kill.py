"""Killed at any moment, also while saving, a run goes on from its last complete checkpoint."""

import json
import random
import time
from pathlib import Path

import pytest

from e2e.toy import CHANCE, checkpoint, differences, join, recipe, start, train_here
from openeva.engine.log import read_log
from openeva.engine.state import Checkpoints
from openeva.train import Recipe

NUM_KILLS = 20
STEPS = 50


def made(out: Path) -> Recipe:
    """Saves after every step, and large enough that saving takes a good share of the time."""
    return recipe(out, *CHANCE, f"run.length={STEPS} steps", "run.save_every=1 steps", "run.evaluate_every=0 steps",
                  "run.keep_last=3", "task.backbone.mlp_hidden=4096", "data.holdout=0")  # fmt: skip


def log_size(out: Path) -> int:
    path = out / "log.jsonl"
    return path.stat().st_size if path.is_file() else 0


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole, killed = made(tmp_path / "whole"), made(tmp_path / "killed")
    join(start(train_here, whole.model_dump(mode="json"), errors=whole.run.out), whole.run.out)
    checkpoints = Checkpoints(killed.run.out / "checkpoints", {})
    in_saving, before = 0, []
    for number in range(NUM_KILLS):
        seen = log_size(killed.run.out)
        (process,) = start(train_here, killed.model_dump(mode="json"), errors=killed.run.out)
        deadline = time.monotonic() + 60
        while number % 5 and log_size(killed.run.out) == seen:  # every fifth is killed while it starts
            assert process.is_alive(), (killed.run.out / "error_0.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        complete = checkpoints.steps()
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run was over before the last kill: raise STEPS"
        in_saving += bool(list((killed.run.out / "checkpoints").glob(".step_*.partial")))
        before.append(complete[-1] if complete else 0)
    assert in_saving > 0
    assert 0 < checkpoints.steps()[-1] < STEPS
    join(start(train_here, killed.model_dump(mode="json"), errors=killed.run.out), killed.run.out)

    lines = [json.loads(line) for line in (killed.run.out / "log.jsonl").read_text().splitlines()]  # all of them valid
    resumed = [
        int(line["message"].split("after step ")[1].split()[0])
        for line in lines
        if "continuing" in line.get("message", "")
    ]
    assert resumed == sorted(resumed)
    assert set(before) - {0} <= set(range(max(resumed) + 1))
    assert resumed[-1] >= before[-1]
    assert differences(checkpoint(whole.run.out, STEPS), checkpoint(killed.run.out, STEPS)) == []
    losses = [[(record["step"], record["loss"]) for record in read_log(r.run.out)] for r in (whole, killed)]
    assert losses[0] == losses[1]
    assert not list((killed.run.out / "checkpoints").glob(".step_*"))
    assert len(checkpoints.steps()) == 3
