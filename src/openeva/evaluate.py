"""A finished run -> evaluations, without training.

run folder -> recipe, task with the trained weights, loaders -> `{metric: value}`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from openeva.checkpoints.load import load_into
from openeva.checkpoints.native import is_complete, read_native
from openeva.config import Config, ConfigError, Eval, parse_yaml, validate
from openeva.data.loader import EvalLoader, TrainLoader
from openeva.data.mixture import HELD_OUT
from openeva.engine import distributed
from openeva.engine.distributed import World
from openeva.engine.log import Record, scanning
from openeva.engine.precision import Precision
from openeva.tasks.base import Task
from openeva.train import Recipe, build_task, evaluate_all, held_out_loaders, prepare, train_loader


@dataclass(frozen=True)
class OpenRun:
    """A run brought back: its task in eval mode with the trained weights, and its data."""

    recipe: Recipe
    task: Task
    held_out: dict[str, EvalLoader]
    train: TrainLoader
    world: World


def read_run_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        ConfigError: Not a run folder, or one of an incompatible version.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError([f"{run} is not the folder of a run: it has no config.yaml"])
    content = parse_yaml(path.read_text(encoding="utf-8"))
    content["run"]["out"] = str(run)  # the folder may have been moved
    return validate(Recipe, content, where=str(path))


def open_run(run: Path, *, trained: bool = True, console: Console | None = None) -> OpenRun:
    """Bring a finished run back.

    Args:
        run: The run's folder.
        trained: False leaves the student at its initial weights, for comparison.
        console: Where to show progress.

    Raises:
        ConfigError: Not a run folder.
        FileNotFoundError: The run has not finished: there is no exported model yet.
    """
    recipe = read_run_recipe(run)
    if trained and not is_complete(run / "model"):
        raise FileNotFoundError(f"{run} has no model yet: finish it with `openeva train {run / 'config.yaml'}`")
    world = distributed.start(recipe.run.device, tf32=recipe.run.precision != "fp32")
    torch.manual_seed(recipe.run.seed)
    with scanning(console) as progress:
        train_data, val_data = recipe.data.open(progress, kept=run / HELD_OUT)
    task = build_task(recipe, train_data, val_data).to(world.device)
    prepare(recipe, task, train_data, world, console)
    if trained:
        state_dict, _ = read_native(run / "model")
        load_into(task.trainable, state_dict)
    loaders = held_out_loaders(recipe, task, train_data, val_data, world)
    return OpenRun(recipe, task.eval(), loaders, train_loader(recipe, task, train_data, world), world)


def evaluate(run: Path, evals: Sequence[str] | None = None, *, console: Console | None = None) -> Record:
    """Metrics of a finished run.

    Args:
        run: The run's folder.
        evals: Names of evaluations to do beside the task's own held-out metrics; those of the recipe when None.
        console: Where to show progress.

    Raises:
        ConfigError: Not a run folder.
        ValueError: The run has no held-out data.
    """
    opened = open_run(run, console=console)
    if "val" not in opened.held_out:
        raise ValueError(f"{run} has no held-out data: its recipe gives neither data.val nor data.holdout")
    configs = opened.recipe.evals if evals is None else validate(_Evals, {"evals": list(evals)}).evals
    precision = Precision(opened.recipe.run.precision, opened.world.device)
    return evaluate_all(opened.task, [config.build() for config in configs], opened.held_out, precision)


class _Evals(Config):
    evals: list[Eval]
