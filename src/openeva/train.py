"""Assembles ONE run: recipe -> task -> data -> optimiser -> loop. Start reading here.

An image's way: recipe -> this file -> data/sources -> data/views + data/masking -> engine/loop.py ->
tasks/pretrain.py or classify.py -> backbones/vit.py -> targets/features.py or labels -> loss.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.console import Console

from openeva.backbones.vit import VisionTransformer
from openeva.checkpoints.load import LoadReport
from openeva.checkpoints.native import CONFIG_FILE, is_complete, save_native
from openeva.config import Config, ConfigError, Duration, Eval, dump_yaml
from openeva.config import Task as TaskField
from openeva.data.loader import DataConfig, EvalLoader, TrainLoader
from openeva.data.mixture import HELD_OUT, Mixture, Streams, write_held_out
from openeva.engine import distributed
from openeva.engine.distributed import CompileMode, Shard, Strategy, World
from openeva.engine.ema import Ema
from openeva.engine.hardware import environment, peak_flops
from openeva.engine.log import Record, RunLog, counting, scanning
from openeva.engine.loop import LoopConfig, StopSignal, run_loop
from openeva.engine.optim import OptimConfig, build_optimizer, check_towers
from openeva.engine.precision import Precision, PrecisionName
from openeva.engine.state import Checkpoints, Progress, TrainState, parameter_tensors, seed_everything
from openeva.evals.base import Evaluation, check_fit, less_is_better, needs_of, once, shared_features
from openeva.tasks.base import Task, TaskConfig
from openeva.tune import Tune, TuneAll, apply_tuning


class RunConfig(Config):
    """How long, how large, where to."""

    out: Path = Field(description="the run's folder; the same folder continues the run")
    length: Duration = Field(description="of the whole run, as in '150 epochs'")
    batch_size: int = Field(gt=0, description="samples per optimizer step, over all processes")
    micro_batch: int | None = Field(
        None, gt=0, description="samples per forward pass and process; the rest is accumulated"
    )
    seed: int = 0
    device: str = "auto"
    precision: PrecisionName = Field(
        "auto", description="of the forward pass; fp32 means all of it: no TF32 on a GPU either"
    )
    strategy: Strategy = "auto"
    shard: Shard = Field(
        "all", description="with strategy fsdp: spread weights over all processes, or (node) over those of each node"
    )
    compile: CompileMode = "off"
    log_every: Duration = Duration(10, "steps")
    evaluate_every: Duration = Duration(1, "epochs")
    save_every: Duration = Duration(1, "epochs")
    keep_last: int = Field(2, gt=0, description="newest checkpoints to keep")
    keep_every: Duration = Field(
        Duration(0, "steps"), description="also keep the first one after each such stretch; 0 for none"
    )
    keep_best: str | None = Field(
        None, description="held-out metric, such as top1 or ema_top1: the weights where it was best stay in model_best"
    )
    max_bad_in_a_row: int = Field(20, gt=0, description="non-finite steps before returning to the last checkpoint")
    max_rewinds: int = Field(3, ge=0, description="such returns in the whole run before it gives up")
    eval_train_limit: int = Field(20_000, gt=0, description="training images that evaluations may look at")
    wandb: str | None = Field(None, description="also log to this W&B project")

    @model_validator(mode="after")
    def _never_silent(self) -> "RunConfig":
        if not self.log_every.value:
            raise ValueError("log_every cannot be 0: skipped steps and broken files would stay unseen; log less often")
        return self


class Recipe(Config):
    """Everything that defines a run."""

    task: TaskField
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    tune: Tune = Field(TuneAll(), description="which part of the model learns: all, head, blocks, lora, peft")
    run: RunConfig
    evals: list[Eval] = Field([], description="measured every run.evaluate_every beside the task's own held-out loss")

    @model_validator(mode="after")
    def _evals_need_held_out_images(self) -> "Recipe":
        if self.evals and not (self.data.val or self.data.holdout):
            raise ValueError("evals are measured on held-out images: give data.val or data.holdout, or set evals=[]")
        return self

    @model_validator(mode="after")
    def _best_needs_a_metric(self) -> "Recipe":
        wanted = self.run.keep_best
        if wanted and not ((self.data.val or self.data.holdout) and self.run.evaluate_every.value):
            raise ValueError("run.keep_best goes by held-out images: give data.val or data.holdout, and evaluate_every")
        if wanted and wanted.startswith("ema_") and self.optim.ema is None:
            raise ValueError(
                f"run.keep_best {wanted} is a metric of the averaged weights: set optim.ema, such as 0.9999"
            )
        return self

    @model_validator(mode="after")
    def _cache_needs_fixed_crops(self) -> "Recipe":
        target = getattr(self.task, "target", None)
        crop = self.data.crop
        if getattr(target, "cache", False) and (crop.kind != "center" or crop.color_jitter or crop.randaugment):
            raise ValueError(
                "task.target.cache keeps the features of fixed crops: set data.crop.kind=center, no color_jitter and no"
                " randaugment, or task.target.cache=false"
            )
        return self


@dataclass(frozen=True)
class RunResult:
    """How a run ended: "stopped" by a signal with everything saved, or "finished".

    Attributes:
        status: Which of the two.
        out: The run's folder.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        signal: Number of the signal that stopped it, where this process got one (and not another of the run).
    """

    status: Literal["finished", "stopped"]
    out: Path
    step: int
    total_steps: int
    signal: int | None = None


def train(recipe: Recipe, *, console: Console | None = None) -> RunResult:
    """Do the run, or continue it where `run.out` holds one (collective under `torchrun`).

    Raises:
        ConfigError: The recipe's parts do not fit together.
        ValueError: Data or weights are missing; raised before any model is built where it can be.
        CheckpointError: `run.out` holds a run with another teacher or model.
        NonFiniteError: Training does not get past non-finite losses.
    """
    run = recipe.run
    world = distributed.start(run.device, tf32=run.precision != "fp32")
    try:
        split_batch(run, world)  # before anything is built
        seed_everything(run.seed)
        with scanning(console if world.is_main else None) as progress:
            train_data, val_data = recipe.data.open(progress, kept=run.out / HELD_OUT)
        evals = build_evals(recipe, train_data, val_data)
        task = build_task(recipe, train_data, val_data)
        check_evals(recipe, evals, task)
        apply_tuning(recipe.tune, task)
        task = task.to(world.device)
        seed_everything(run.seed + 1 + world.rank)  # stochastic depth and dropout differ between processes
        loader = train_loader(recipe, task, train_data, world)
        held_out = held_out_loaders(recipe, task, train_data, val_data, world)
        lengths = _Lengths(recipe, loader.steps_per_epoch)
        if console is not None and world.is_main:
            for line in describe(recipe, task, loader, lengths, world):
                console.print(line, highlight=False)
        prepare(recipe, task, train_data, world, console)

        precision = Precision(run.precision, world.device)
        task.trainable = distributed.wrap(
            task.trainable, task.blocks(), world, run.strategy, run.compile, precision.dtype, run.shard
        )
        task.speed_up_frozen(compile_forward=run.compile != "off")
        optimizer = build_optimizer(
            distributed.unwrap(task.trainable), recipe.optim, no_decay=task.backbone.no_weight_decay(),
            num_layers=task.backbone.num_layers, towers=task.towers,
        )  # fmt: skip
        ema = Ema(distributed.unwrap(task.trainable), recipe.optim.ema) if recipe.optim.ema else None
        part = task.trained_part
        state = TrainState(task.trainable, optimizer, precision, Progress(), ema, part.names if part else None)
        checkpoints = Checkpoints(
            run.out / "checkpoints", task.identity() | (part.identity() if part else {}), keep_last=run.keep_last,
            keep_every=lengths.steps(run.keep_every),
            notes={"data": train_data.identity} if isinstance(train_data, Mixture) else None,
        )  # fmt: skip
        loop, stop = loop_config(recipe, task, lengths, precision, world), StopSignal()
        with RunLog(
            run.out, active=world.is_main, total_steps=lengths.total, console=console, wandb_project=run.wandb,
            config=recipe.model_dump(mode="json"), unit="clips" if task.backbone.num_frames else "img",
        ) as log:  # fmt: skip
            resumed = checkpoints.load(state)  # last: whatever comes between this and the loop may use chance
            if world.is_main:
                _write_run_files(recipe, world, val_data)
            if resumed:
                log.say(f"continuing {run.out} after step {state.progress.step} of {lengths.total}")
                for line in inexact(loader, checkpoints):
                    log.say(line)
                if checkpoints.changed_settings:
                    log.say(f"the optimizer differs from the checkpoint's: {'; '.join(checkpoints.changed_settings)}")

            def evaluate(step: int) -> Record:
                record = evaluate_all(task, evals, held_out, precision, state.ema)
                for images in held_out.values():
                    loader.broken.update(images.broken)  # named and counted with those met in training
                keep_best(recipe, task, state, record, world)
                return record

            status = run_loop(
                task, loader, state, loop, world=world, checkpoints=checkpoints, log=log,
                evaluate=evaluate if "val" in held_out else None, stop_signal=stop,
            )  # fmt: skip
            log.write_summary({"broken_files": len(log.broken), "broken": dict(sorted(log.broken.items())[:100])})
        if status == "finished":
            export(recipe, task, state, run.out / "model", world)
        signal = stop.received if status == "stopped" else None
        return RunResult(status, run.out, state.progress.step, lengths.total, signal)
    finally:
        distributed.stop()


def split_batch(run: RunConfig, world: World) -> tuple[int, int]:
    """Accumulation steps and micro-batch size per process.

    Raises:
        ConfigError: The batch cannot be divided evenly.
    """
    if run.batch_size % world.size:
        raise ConfigError([f"run.batch_size {run.batch_size} is not a multiple of the {world.size} processes"])
    per_process = run.batch_size // world.size
    micro_batch = run.micro_batch or per_process
    if per_process % micro_batch:
        each = f"run.batch_size {run.batch_size} over {world.size} processes is {per_process} samples each"
        fitting = max(size for size in range(1, micro_batch + 1) if per_process % size == 0)
        raise ConfigError([f"{each}, not a multiple of run.micro_batch {micro_batch}; {fitting} would fit"])
    return per_process // micro_batch, micro_batch


def build_task(recipe: Recipe, train: Mixture | Streams, val: Mixture | None) -> Task:
    """The recipe's task, with what only the data says (such as the number of classes).

    Raises:
        ConfigError: The data does not suit it, or it has not the towers of `optim.towers`.
        ValueError: Its parts do not fit together.
    """
    config = recipe.task
    task: Task = (config.fit_to(train, val) if isinstance(config, TaskConfig) else config).build()
    check_towers(recipe.optim, task.towers)
    return task


def build_evals(recipe: Recipe, train: Mixture | Streams, val: Mixture | None) -> list[Evaluation]:
    """The recipe's evaluations; those that care for the classes of held-out images have `check_held_out(names)`.

    Raises:
        ConfigError: The data lack what one of them needs.
    """
    evals: list[Evaluation] = [config.build() for config in recipe.evals]
    problems = []
    for config, evaluation in zip(recipe.evals, evals, strict=True):
        needs = needs_of(evaluation)
        if "train" in needs and isinstance(train, Streams):
            problems.append(f"evals: {config.name} needs training images that are files: streams cannot be read twice")
        labelled = {"train": train, "val": val} if "labels" in needs else {"val": val} if "val_labels" in needs else {}
        for part, data in labelled.items():
            if data is not None and not all(source.num_classes for source in data.sources):
                problems.append(
                    f"evals: {config.name} needs labels, but data.{part} has none (image_folder: labels=true)"
                )
        try:
            getattr(evaluation, "check_held_out", lambda _: None)([] if val is None else val.class_names)
        except ValueError as error:
            problems.append(f"evals: {config.name}: {error}")
    if problems:
        raise ConfigError(problems)
    return evals


def check_evals(recipe: Recipe, evals: list[Evaluation], task: Task) -> None:
    """Whether the task can do what the evaluations ask of it.

    Raises:
        ConfigError: It is of another kind, such as one that does not classify.
        ValueError: One of them does not fit it, as images of other classes.
    """
    asked = {
        "logits": ("logits", "a task that classifies images"),
        "targets": ("targets", "a task that predicts hidden patches"),
        "text": ("encode_text", "a task of images and texts (clip)"),
    }
    problems = [
        f"evals: {config.name} needs {asked[need][1]}, not {recipe.task.name}; remove it"
        for config, evaluation in zip(recipe.evals, evals, strict=True)
        for need in sorted(needs_of(evaluation) & set(asked))
        if not hasattr(task, asked[need][0])
    ]
    if problems:
        raise ConfigError(problems)
    check_fit(evals, task)


def train_loader(recipe: Recipe, task: Task, data: Mixture | Streams, world: World) -> TrainLoader:
    """The loader of training batches for this process."""
    accumulation, micro_batch = split_batch(recipe.run, world)
    task.check_batch(micro_batch)
    return TrainLoader(
        data, task.view_spec(train=True), recipe.data.crop, batch_size=micro_batch, accumulation=accumulation,
        seed=recipe.run.seed, rank=world.rank, world_size=world.size, num_workers=recipe.data.workers,
        prefetch=recipe.data.prefetch, max_broken=recipe.data.max_broken,
    )  # fmt: skip


def held_out_loaders(
    recipe: Recipe, task: Task, train: Mixture | Streams, val: Mixture | None, world: World
) -> dict[str, EvalLoader]:
    """Loaders for evaluations: "val", and "train" with the evaluation crop (a sample of it where it is large)."""
    _, micro_batch = split_batch(recipe.run, world)

    def loader(data: Mixture, limit: int | None) -> EvalLoader:
        return EvalLoader(
            data, task.view_spec(train=False), recipe.data.val_crop, batch_size=micro_batch, rank=world.rank,
            world_size=world.size, limit=limit, num_workers=recipe.data.workers, max_broken=recipe.data.max_broken,
        )  # fmt: skip

    loaders = {} if val is None else {"val": loader(val, None)}
    if isinstance(train, Mixture):
        loaders["train"] = loader(train, recipe.run.eval_train_limit)
    return loaders


def prepare(recipe: Recipe, task: Task, data: Mixture | Streams, world: World, console: Console | None) -> None:
    """Let the task look at each training image once, never mirrored (collective; every process sees all of them)."""
    if isinstance(data, Mixture):
        crop = recipe.data.crop.model_copy(update={"hflip": 0.0})
        images = EvalLoader(
            data, task.view_spec(train=False), crop, batch_size=64, num_workers=recipe.data.workers,
            max_broken=recipe.data.max_broken,
        )  # fmt: skip
        with counting(console if world.is_main else None, "looking at the training images", len(data)) as progress:
            task.prepare(images, recipe.run.out / "target", progress)


class _Lengths:
    """The recipe's durations in optimizer steps."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.steps_per_epoch, self.batch_size = steps_per_epoch, recipe.run.batch_size
        self.total = 0
        self.total = self.steps(recipe.run.length)
        if self.total < 1:
            raise ConfigError([f"run.length {recipe.run.length} is less than one step of {self.batch_size} samples"])
        self.warmup = self.steps(recipe.optim.warmup)
        if self.warmup > self.total:
            raise ConfigError([f"optim.warmup {recipe.optim.warmup} is longer than run.length {recipe.run.length}"])

    def steps(self, duration: Duration) -> int:
        steps = duration.steps(
            steps_per_epoch=self.steps_per_epoch, samples_per_step=self.batch_size, total_steps=self.total or None
        )
        return max(steps, 1) if duration.value else 0


def inexact(loader: TrainLoader, checkpoints: Checkpoints) -> list[str]:
    """Why a resumed run does not see the very samples that it would have seen without the stop; none where it does."""
    reasons = []
    if not loader.exact_resume:
        reasons.append(
            "pipes and URLs cannot be read from the middle: the epoch's shards start again at their beginning, in"
            " another order, so that some samples are seen twice in this epoch and others not at all"
        )
    if "data" in checkpoints.changed:
        reasons.append(
            "the training images are not those of the checkpoint (files added, removed or moved, or another data.train"
            " or data.holdout): from here on they come in another order, and data.holdout may hold out others"
        )
    return reasons


def loop_config(recipe: Recipe, task: Task, lengths: _Lengths, precision: Precision, world: World) -> LoopConfig:
    """The loop's settings in steps."""
    lr, weight_decay = recipe.optim.schedules(lengths.total, lengths.warmup)
    return LoopConfig(
        total_steps=lengths.total,
        lr=lr,
        weight_decay=weight_decay,
        samples_per_step=recipe.run.batch_size,
        clip_grad=recipe.optim.clip_grad,
        log_every=lengths.steps(recipe.run.log_every),
        evaluate_every=lengths.steps(recipe.run.evaluate_every),
        save_every=lengths.steps(recipe.run.save_every),
        flops_per_sample=task.flops_per_sample(),
        peak_flops=peak_flops(world.device, precision.dtype),
        max_bad_in_a_row=recipe.run.max_bad_in_a_row,
        max_rewinds=recipe.run.max_rewinds,
    )


def evaluate_all(
    task: Task, evals: list[Evaluation], loaders: dict[str, EvalLoader], precision: Precision, ema: Ema | None = None
) -> Record:
    """The task's held-out metrics and all evaluations, in the precision of the training's forward pass.

    With an averaged copy, the held-out metrics of that too.
    """
    if "val" not in loaders:
        return {}
    task.eval()
    with distributed.gathered(task.trainable), precision.autocast(), shared_features():
        record: Record = dict(task.evaluate(loaders["val"]))
        for evaluation in evals:
            record.update(evaluation.run(task, loaders))
    if ema is not None:
        with ema.applied(), distributed.gathered(task.trainable), precision.autocast():
            record.update({f"ema_{key}": value for key, value in task.evaluate(loaders["val"]).items()})
    return record


def describe(recipe: Recipe, task: Task, loader: TrainLoader, lengths: _Lengths, world: World) -> list[str]:
    """What is about to run, in a few lines."""
    num_parameters = sum(p.numel() for p in task.trainable.parameters() if p.requires_grad)
    num_all = sum(p.numel() for p in task.trainable.parameters())
    share = f" of {num_all:,} ({num_parameters / num_all:.2%})" if task.trained_part else ""
    gflops = task.flops_per_sample() / 1e9
    return [
        f"{recipe.task.name}: {num_parameters:,}{share} parameters learn, {gflops:.2f} GFLOP per sample",
        *(f"  {key}: {value}" for key, value in task.identity().items()),
        f"  data: {loader.samples_per_epoch:,} samples per epoch,"
        f" {lengths.steps_per_epoch} steps of {recipe.run.batch_size};"
        f" {lengths.total} steps in all, {lengths.warmup} of warm-up",
        *(f"  {line}" for report in _load_reports(task) for line in report.lines()),
        *_rates(recipe.optim),
        *_random_and_frozen(task),
        f"  on {world.size} x {world.device} -> {recipe.run.out}",
    ]


def _rates(optim: OptimConfig) -> list[str]:
    """Which part learns at which rate, where they differ: `optim.lr` alone does not change those of towers."""
    rates = [f"{name} {optim.lr if tower.lr is None else tower.lr:g}" for name, tower in optim.towers.items()]
    return [f"  learning rates: {', '.join(rates)}, the rest {optim.lr:g}"] if rates else []


def _random_and_frozen(task: Task) -> list[str]:
    """A warning where nothing was loaded into what will not learn."""
    if not task.trained_part or not isinstance(task.backbone, VisionTransformer) or _load_reports(task):
        return []
    return ["  WARNING: what is frozen has random weights; set task.init_from or task.backbone.weights"]


def _load_reports(task: Task) -> list[LoadReport]:
    found = (getattr(part, "load_report", None) for part in (task, task.backbone))
    return [report for report in found if isinstance(report, LoadReport)]


def dry_run(recipe: Recipe) -> list[str]:
    """Build everything but train nothing; returns what would run.

    Raises:
        ConfigError: As `train`.
        ValueError: As `train`.
    """
    world = distributed.start(recipe.run.device, tf32=recipe.run.precision != "fp32")
    try:
        split_batch(recipe.run, world)
        train_data, val_data = recipe.data.open()
        evals = build_evals(recipe, train_data, val_data)
        task = build_task(recipe, train_data, val_data)
        check_evals(recipe, evals, task)
        apply_tuning(recipe.tune, task)
        loader = train_loader(recipe, task, train_data, world)
        return describe(recipe, task, loader, _Lengths(recipe, loader.steps_per_epoch), world)
    finally:
        distributed.stop()


def export(recipe: Recipe, task: Task, state: TrainState, folder: Path, world: World) -> None:
    """Write the trained weights in openeva's own format (collective); averaged ones too, beside them."""
    if state.ema is not None:  # first: where `folder` is complete, everything is
        _export(recipe, task, state, folder.with_name(folder.name + "_ema"), world, averaged=True)
    _export(recipe, task, state, folder, world)


def keep_best(recipe: Recipe, task: Task, state: TrainState, record: Record, world: World) -> None:
    """Write the weights to `model_best` where `run.keep_best` is best so far (collective).

    Raises:
        ConfigError: There is no such metric.
    """
    metric, folder = recipe.run.keep_best, recipe.run.out / "model_best"
    if metric is None:
        return
    if metric not in record:
        raise ConfigError([f"run.keep_best {metric!r} is not measured; measured are {', '.join(record)}"])

    def better() -> bool:
        value = record[metric]
        best = json.loads((folder / CONFIG_FILE).read_text("utf-8"))["best"] if is_complete(folder) else {}
        return metric not in best or (value < best[metric] if less_is_better(metric) else value > best[metric])

    if once(better):
        _export(recipe, task, state, folder, world, averaged=metric.startswith("ema_"), best={metric: record[metric]})


def _export(
    recipe: Recipe, task: Task, state: TrainState, folder: Path, world: World, *, averaged: bool = False, **notes: Any
) -> None:
    with state.ema.applied() if averaged and state.ema is not None else nullcontext():
        tensors, part = parameter_tensors(task.trainable), task.trained_part
        if world.is_main:
            tensors, delta = part.export(tensors) if part else (tensors, {})
            config = {
                "format": "openeva/1",
                "task": task.config.model_dump(mode="json"),
                "identity": task.identity(),
                "step": state.progress.step,
                "environment": environment(world.device),
                "val_crop": recipe.data.val_crop.model_dump(mode="json"),
                **delta,
                **notes,
            }
            save_native(folder, tensors, config)
    distributed.barrier()


def _write_run_files(recipe: Recipe, world: World, val: Mixture | None) -> None:
    recipe.run.out.mkdir(parents=True, exist_ok=True)
    (recipe.run.out / "config.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    if val is not None and recipe.data.holdout:
        write_held_out(val, recipe.run.out / HELD_OUT)
    facts = {**environment(world.device), "processes": world.size}
    (recipe.run.out / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
