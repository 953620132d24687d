"""Evaluations without training: of a finished run, or of any weights on data sets of their own.

run folder -> recipe, task with the trained weights, loaders -> `{metric: value}`
evaluation recipe (weights + evaluations that bring their images) -> `Classifier` or `ImageTextModel` -> `Measurement`
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.checkpoints.load import load_into, read_model
from openeva.checkpoints.native import is_complete
from openeva.checkpoints.pretrained import PRETRAINED, find_entry
from openeva.checkpoints.published_clip import published_retrieval, published_zero_shot
from openeva.config import (
    ComponentConfig,
    Config,
    ConfigError,
    Eval,
    find_recipe,
    load_config,
    parse_yaml,
    read_recipe,
    validate,
)
from openeva.data.clips import ClipSpec
from openeva.data.loader import EvalLoader, TrainLoader
from openeva.data.mixture import HELD_OUT
from openeva.data.views import ViewSpec, normalise
from openeva.engine import distributed
from openeva.engine.distributed import World
from openeva.engine.hardware import environment
from openeva.engine.log import Record, scanning
from openeva.engine.precision import Precision, PrecisionName
from openeva.evals import retrieval, zeroshot
from openeva.evals.base import Evaluation, check_fit, needs_of
from openeva.evals.robustness import COLUMNS, Comparison, compare
from openeva.evals.topk import TopK
from openeva.heads.classifier import ImageClassifier, over_views
from openeva.heads.clip import ClipModel
from openeva.inference.classes import class_names
from openeva.models import load_checkpoint, transforms_for
from openeva.tasks.base import Task
from openeva.text.tokenizer import Tokenizer
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
        state_dict, _ = read_model(run / "model")
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
    return _evaluate(run, evals, console)[0]


def _evaluate(
    run: Path, evals: Sequence[str] | None, console: Console | None
) -> tuple[Record, OpenRun, list[Evaluation]]:
    opened = open_run(run, console=console)
    if "val" not in opened.held_out:
        raise ValueError(f"{run} has no held-out data: its recipe gives neither data.val nor data.holdout")
    configs = opened.recipe.evals if evals is None else validate(_Evals, {"evals": list(evals)}).evals
    precision = Precision(opened.recipe.run.precision, opened.world.device)
    built = [config.build() for config in configs]
    check_fit(built, opened.task)
    record = evaluate_all(opened.task, built, opened.held_out, precision)
    return record, opened, built


class _Evals(Config):
    evals: list[Eval]


# ------------------------------------------------------------------------------------------------ weights by name


class EvaluationConfig(Config):
    """How to measure, and where to."""

    out: Path = Field(Path("runs/evaluation"), description="folder for evaluation.json")
    device: str = "auto"
    precision: PrecisionName = Field("auto", description="of the forward pass")


class EvaluationRecipe(Config):
    """Which weights to measure on what."""

    weights: str = Field(description="official name, timm's name.tag, run, model folder or file; with a classifier")
    backbone: dict[str, Any] = Field({}, description="keys to change, such as image_size or statistics: imagenet")
    evals: list[Eval] = Field(min_length=1, description="such as robustness, or topk with a source")
    run: EvaluationConfig = EvaluationConfig()


def recipe_type(name: str) -> type[Recipe] | type[EvaluationRecipe]:
    """What a recipe (a shipped one, or a path) describes: a run, or an evaluation without one.

    Raises:
        ConfigError: No such recipe.
    """
    content = read_recipe(find_recipe(name))
    return EvaluationRecipe if "weights" in content and "data" not in content else Recipe


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        weights: Name or address of the model.
        metrics: By name; accuracies are shares.
        rows: The tables of robustness and of Kinetics, beside the published numbers; empty where not asked for.
        notes: What a reader should know.
        facts: Settings and machine, for the file.
        file: Where it is written as JSON; None in processes that do not write.
        zero_shot: Table of zero-shot classification.
        recall: Table of retrieval.
    """

    weights: str
    metrics: Record
    rows: list[Comparison]
    notes: list[str]
    facts: Record
    file: Path | None
    zero_shot: list[zeroshot.Row] = field(default_factory=list)
    recall: list[retrieval.Row] = field(default_factory=list)

    def tables(self) -> list[tuple[Sequence[str], list[tuple[str, ...]]]]:
        """What was measured as columns and rows of text."""
        all_tables = ((COLUMNS, self.rows), (zeroshot.COLUMNS, self.zero_shot), (retrieval.COLUMNS, self.recall))
        return [(columns, [row.cells() for row in rows]) for columns, rows in all_tables if rows]

    def other_metrics(self) -> Record:
        """Those that the tables do not show."""

        def shown(name: str) -> bool:
            if "zeroshot_" in name or "retrieval_" in name:
                return bool(self.zero_shot if "zeroshot_" in name else self.recall)
            start = ("imagenet_", "objectnet", "standard_", *(f"{name}_" for name in KINETICS))
            return bool(self.rows) and (name in {"mean", "gap"} or name.startswith(start))

        return {name: value for name, value in self.metrics.items() if not shown(name)}

    def write(self, file: Path) -> None:
        """Write everything as JSON."""
        content = {
            "weights": self.weights, "metrics": self.metrics, "table": [row._asdict() for row in self.rows],
            "zero_shot": [row._asdict() for row in self.zero_shot],
            "retrieval": [row._asdict() for row in self.recall], "notes": self.notes, **self.facts,
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")


RESULTS_FILE = "evaluation.json"
DEFAULT_RECIPE = "evaluate/imagenet_robustness"


def load_recipe(
    name: str | None,
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    imagenet: Path | None = None,
) -> EvaluationRecipe:
    """An evaluation recipe, for other weights or data than it names.

    Args:
        name: Of the recipe; None = `DEFAULT_RECIPE`. A run's folder stands for its weights in that recipe.
        overrides: As on the command line; they win.
        weights: Instead of the recipe's; results then go to a folder of their own.
        imagenet: Folder of the ImageNet sets, for the recipe's first evaluation.

    Raises:
        ConfigError: Anything wrong with it.
    """
    if name is not None and weights is None and Path(name).is_dir():
        name, weights = None, name
    if name is not None:
        try:
            find_recipe(name)
        except ConfigError as error:
            raise ConfigError([f"{name} is neither the folder of a run nor a recipe: {error.problems[0]}"]) from None
    changes = []
    if imagenet is not None:
        changes = [f"{_place_of_imagenet(name or DEFAULT_RECIPE)}={json.dumps(str(imagenet))}"]
    if weights is not None:
        out = Path("runs") / f"evaluation-{Path(weights).stem}"
        changes += [f"weights={json.dumps(weights)}", f"run.out={json.dumps(str(out))}"]
    return load_config(EvaluationRecipe, name or DEFAULT_RECIPE, [*changes, *overrides])


def _place_of_imagenet(recipe: str) -> str:
    """Key of the folder of the ImageNet sets in a recipe whose first evaluation measures them."""
    first = (read_recipe(find_recipe(recipe)).get("evals") or [{}])[0]
    first = first if isinstance(first, dict) else {"name": first}
    if first.get("name") == "robustness":
        return "evals.0.roots"
    if first.get("name") == "zeroshot" and "source" not in first:
        return "evals.0.roots.imagenet"
    text = f"--imagenet says where the ImageNet sets lie, which the first evaluation of {recipe} does not measure"
    raise ConfigError([f"{text}; leave it out, or take evaluate/imagenet_robustness or evaluate/zeroshot_suite"])


class Classifier(nn.Module):
    """A trained classifier of images or videos as evaluations ask for it, without a task: there is nothing to train.

    Attributes:
        class_names: By label.
        crop: How these weights want images cut.
    """

    def __init__(self, model: ImageClassifier, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.class_names = list(names)
        self.crop = transforms_for(model).evaluate.crop

    @property
    def backbone(self) -> Backbone:
        """The image encoder."""
        return self.model.backbone

    def view_spec(self, *, train: bool) -> ViewSpec:
        """Images of the backbone's size, or clips."""
        frames = self.backbone.num_frames
        return ViewSpec(self.backbone.image_size, clip=None if frames is None else ClipSpec(frames))

    def logits(self, image_BCYX: UInt8[Tensor, "B *views C Y X"]) -> Float[Tensor, "B V"]:
        """Logits of images or clips as the loader gives them, not normalised; of several views, over all of them."""
        statistics = self.backbone.normalisation
        return over_views(lambda x: self.model(normalise(x, statistics.mean, statistics.std)).float(), image_BCYX)


class ImageTextModel(nn.Module):
    """A trained CLIP as evaluations ask for it, without a task: there is nothing to train.

    Attributes:
        crop: How these weights want images cut.
    """

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        self.model = model
        self.crop = transforms_for(model).evaluate.crop

    @property
    def backbone(self) -> Backbone:
        """The image encoder."""
        return self.model.backbone

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes token ids of captions."""
        return self.model.tokenizer

    def view_spec(self, *, train: bool) -> ViewSpec:
        """Images of the image tower's size."""
        return ViewSpec(self.backbone.image_size)

    @torch.no_grad()
    def encode_image(self, image_BCYX: UInt8[Tensor, "B C Y X"]) -> Float[Tensor, "B E"]:
        """Features of images as the loader gives them, not normalised; not of length 1."""
        weight, statistics = next(self.parameters()), self.backbone.normalisation
        image_BCYX = image_BCYX.to(weight.device)
        return self.model.encode_image(normalise(image_BCYX, statistics.mean, statistics.std, weight.dtype)).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """Features of texts, not of length 1."""
        return self.model.encode_text(texts).float()


def open_model(weights: str, needs: Collection[str], **overrides: Any) -> "Classifier | ImageTextModel":
    """What evaluations of these needs ("logits", "text") can measure, by the address of its weights.

    Raises:
        ConfigError: Unknown keys, or the weights hold no text tower where one is asked for.
        WeightsError: Nothing there.
        ValueError: They do not fit, or hold no classifier where one is asked for.
    """
    model = load_checkpoint(weights, **overrides)
    if "text" not in needs:
        return _classifier(model, weights)
    if not isinstance(model, ClipModel):
        names = " or ".join(name for name, entry in PRETRAINED.items() if entry.clip and entry.open_clip)
        raise ConfigError([
            f"weights {weights} hold no text tower, which zero-shot classification and retrieval need; give those of a"
            f" CLIP: a run of the task clip, or {names}"
        ])  # fmt: skip
    if "logits" in needs:
        raise ConfigError([
            "evals: zeroshot and retrieval measure a CLIP, topk and robustness a classifier: one recipe for each"
        ])  # fmt: skip
    return ImageTextModel(model)


def open_classifier(weights: str, **overrides: Any) -> Classifier:
    """A classifier by the address of its weights; `overrides` are keys of the transformer.

    Raises:
        ConfigError: Unknown keys.
        WeightsError: Nothing there.
        ValueError: They do not fit, or hold no classifier.
    """
    return _classifier(load_checkpoint(weights, **overrides), weights)


def _classifier(model: nn.Module, weights: str) -> Classifier:
    if not isinstance(model, ImageClassifier):
        clip = isinstance(model, ClipModel)
        hint = "; a CLIP is measured by evaluate/zeroshot_suite and evaluate/retrieval" if clip else ""
        raise ValueError(
            f"weights {weights} hold no classifier; evaluate ones that were fine-tuned (`openeva list --weights`){hint}"
        )
    origin = getattr(model, "origin", None)
    videos = model.backbone.num_frames is not None
    return Classifier(model, class_names(model.num_classes, origin.config if origin else None, of_videos=videos).names)


def published_row(weights: str) -> dict[str, float]:
    """Published top-1 accuracies of some weights in percent, by benchmark; empty where there are none."""
    entry = find_entry(weights)
    return {} if entry is None else {name: accuracy.top1 for name, accuracy in entry.published.items()}


KINETICS = {f"kinetics_{number}": f"Kinetics-{number}" for number in (722, 400, 600, 700)}
"""Sets of videos that accuracies are published for, by the prefix of `topk` -> title."""


def kinetics_rows(evals: Sequence[Evaluation], metrics: Record, published: Mapping[str, float]) -> list[Comparison]:
    """Rows of the `topk` evaluations whose prefix names a set of Kinetics, such as `kinetics_400_`."""
    rows = []
    for one in evals:
        if not isinstance(one, TopK) or (key := one.config.prefix.removesuffix("_")) not in KINETICS:
            continue
        views = one.config.views
        title = KINETICS[key] + ("" if views is None else f", {views.num_clips} x {views.num_crops} views")
        top1, top5 = (100 * metrics[f"{key}_{name}"] for name in ("top1", "top5"))
        images, number, verdict = round(metrics[f"{key}_images"]), published.get(key), ""
        if number is not None:
            same = views is not None and (views.num_clips, views.num_crops) == (4, 3)
            verdict = f"{round(top1 - number, 2) + 0.0:+.2f}; " + (
                "published with clips drawn by chance" if same else "published with 4 x 3 views"
            )
        rows.append(Comparison(title, top1, top5, round(metrics[f"{key}_top1"] * images), images, number, verdict))
    return rows


def measure(recipe: EvaluationRecipe, console: Console | None = None) -> Measurement:
    """Do an evaluation recipe (collective under `torchrun`), and write its results.

    Raises:
        ConfigError: Data is missing, or an evaluation needs a run with its training data.
        ValueError: The weights do not fit.
    """
    world = distributed.start(recipe.run.device, tf32=recipe.run.precision != "fp32")
    try:
        evals: list[Evaluation] = [config.build() for config in recipe.evals]  # first: it looks for the data
        unfit = [c.name for c, e in zip(recipe.evals, evals, strict=True) if _needs_a_run(c, e)]
        if unfit:
            text = "measured on the images of a run: evaluate a run, or give it images of its own (key `source`)"
            raise ConfigError([f"evals: {name} is {text}" for name in unfit])
        needs = frozenset().union(*map(needs_of, evals))
        task = open_model(recipe.weights, needs, **recipe.backbone).to(world.device).eval()
        if console is not None and world.is_main:
            report = getattr(task.model, "load_report", None)
            for line in (f"{recipe.weights} on {world.size} x {world.device}", *(report.lines() if report else ())):
                console.print(line, highlight=False, markup=False)
            for evaluation in evals:
                if hasattr(evaluation, "tell"):
                    evaluation.tell = lambda line: console.print(line, highlight=False, markup=False)
        check_fit(evals, task)
        metrics: Record = {}
        with torch.no_grad(), Precision(recipe.run.precision, world.device).autocast():
            for evaluation in evals:
                metrics.update(evaluation.run(task, {}))
        notes = _notes(evals, task)
        facts = {"recipe": recipe.model_dump(mode="json"), **_machine(world)}
        return _finished(recipe.weights, metrics, evals, notes, facts, recipe.run.out, world)
    finally:
        distributed.stop()


def measure_run(run: Path, evals: Sequence[str] | None = None, *, console: Console | None = None) -> Measurement:
    """`evaluate` with a table where the robustness sets are among the evaluations; the results are written to the run.

    Raises:
        ConfigError: Not a run folder.
        ValueError: The run has no held-out data.
    """
    metrics, opened, done = _evaluate(run, evals, console)
    facts = {"recipe": opened.recipe.model_dump(mode="json"), **_machine(opened.world)}
    return _finished(str(run), metrics, done, _notes(done, opened.task), facts, run, opened.world)


def _needs_a_run(config: ComponentConfig, evaluation: Evaluation) -> bool:
    """Whether an evaluation asks for the data of a run, or would measure its held-out images."""
    own = getattr(config, "source", None) is not None or bool(getattr(config, "roots", None))
    return bool(needs_of(evaluation) - {"logits", "text"}) or not own


def _notes(evals: Sequence[Evaluation], task: Any) -> list[str]:
    return [note for evaluation in evals for note in getattr(evaluation, "notes", lambda _: [])(task)]


def _machine(world: World) -> Record:
    return {"environment": environment(world.device), "processes": world.size}


def _finished(
    weights: str,
    metrics: Record,
    evals: Sequence[Evaluation],
    notes: list[str],
    facts: Record,
    out: Path,
    world: World,
) -> Measurement:
    file = out / RESULTS_FILE if world.is_main else None
    released = "" if Path(weights).is_dir() else weights  # the folder of a run may be called like released weights
    accuracies, recalls = published_zero_shot(released), published_retrieval(released)
    done = Measurement(
        weights, metrics,
        [*compare(metrics, published_row(released)), *kinetics_rows(evals, metrics, published_row(released))],
        notes, facts, file,
        [row for one in evals if isinstance(one, zeroshot.ZeroShot) for row in one.rows(metrics, accuracies)],
        [row for one in evals if isinstance(one, retrieval.Retrieval) for row in one.rows(metrics, recalls)],
    )  # fmt: skip
    if file is not None:
        done.write(file)
    return done
