"""The page: a run's facts, tables, pictures and curves as one HTML document without scripts or outside files.

`Facts` (what the run's folder says) + `Look` (what its model shows) -> `page`
"""

import html
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openeva.checkpoints.native import is_complete
from openeva.engine.log import Record, read_log
from openeva.engine.state import Checkpoints
from openeva.evaluate import read_run_recipe
from openeva.report import pictures
from openeva.report.curves import legend_key, line_chart, number_text, series
from openeva.report.document import document, paragraph, section, table_html
from openeva.report.look import Look
from openeva.report.pairs import Pairs
from openeva.report.tables import Table, read_results
from openeva.train import Recipe

SHARES = {"student": "student", "teacher": "teacher", "optimiser": "optimiser", "data": "waiting for data"}
PACKAGES = ("openeva", "python", "torch", "torchvision", "timm")
SHOWN_BROKEN = 50


@dataclass(frozen=True)
class Facts:
    """What a run's folder says, without its model."""

    run: Path
    recipe: Recipe
    recipe_text: str
    environment: dict[str, Any]
    training: list[Record]
    evaluations: list[Record]
    summary: dict[str, Any]
    results: list[Table]

    @property
    def finished(self) -> bool:
        """True once the model was exported."""
        return is_complete(self.run / "model")

    @property
    def predicts_features(self) -> bool:
        """True where the loss is minus a cosine."""
        target = getattr(self.recipe.task, "target", None)
        return getattr(target, "name", None) == "features"

    @property
    def samples(self) -> str:
        """What the run trains on, in the plural."""
        return "clips" if getattr(getattr(self.recipe.task, "backbone", None), "num_frames", None) else "images"

    @property
    def identity(self) -> dict[str, Any]:
        """What the newest weights were trained against (see `Task.identity`)."""
        saved: dict[str, Any] = _read_json(self.run / "model" / "config.json")
        steps = Checkpoints(self.run / "checkpoints", {})
        if not saved and steps.steps():
            saved = _read_json(steps.path(steps.steps()[-1]) / "trainer.json")
        return saved.get("identity", {})

    @property
    def num_broken(self) -> int:
        """Files that could not be read."""
        logged = self.training[-1].get("broken_files") if self.training else None
        return int(self.summary.get("broken_files") or logged or 0)

    @property
    def seconds(self) -> float:
        """Time spent in training steps, evaluations and saving left out."""
        return sum(seconds for _, seconds in self.intervals())

    def intervals(self) -> Iterable[tuple[Record, float]]:
        """Each log line with the seconds of training that it stands for."""
        step = 0
        for record in self.training:
            yield record, (record["step"] - step) * record.get("step_ms", 0.0) / 1000
            step = record["step"]


def read_facts(run: Path) -> Facts:
    """Read everything but the model.

    Raises:
        ConfigError: Not a run folder, or one of an incompatible version.
        ValueError: A file in it is damaged.
    """
    recipe = read_run_recipe(run)
    records = read_log(run)
    return Facts(
        run=run, recipe=recipe, recipe_text=(run / "config.yaml").read_text(encoding="utf-8"),
        environment=_read_json(run / "environment.json"), training=[r for r in records if "loss" in r],
        evaluations=[r for r in records if "loss" not in r], summary=_read_json(run / "summary.json"),
        results=read_results(run),
    )  # fmt: skip


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); delete it and write the report again") from None
    return content


def page(facts: Facts, look: Look | Pairs | None, no_pictures: str = "") -> str:
    """The whole document; `no_pictures` says why `look` is None."""
    name = facts.run.resolve().name
    sections = [
        _head(facts, look),
        _results(facts),
        _pictures(look)
        if look is not None
        else section("Pictures", paragraph(f"There are no pictures of this run: {no_pictures}")),
        _curves(facts),
        _time_split(facts),
        _broken(facts),
        _what_was_run(facts, look),
    ]
    return document(name, sections)


# ------------------------------------------------------------------------------------------------ sections


def _head(facts: Facts, look: Look | Pairs | None) -> str:
    last = facts.training[-1] if facts.training else {}
    state = "finished" if facts.finished else f"unfinished, at step {last.get('step', 0):,}"
    when = f" · {_date(last['time'])}" if "time" in last else ""
    tiles = "".join(
        f'<div class="number"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in _key_numbers(facts, look)
    )
    return (
        f'<header><p class="kicker">openeva · {html.escape(facts.recipe.task.name)} · {state}{when}</p>'
        f"<h1>{html.escape(facts.run.resolve().name)}</h1><p>{html.escape(_in_words(facts, look))}</p>"
        f'<div class="numbers">{tiles}</div></header>'
    )


def _key_numbers(facts: Facts, look: Look | Pairs | None) -> Iterable[tuple[str, str]]:
    losses = series(facts.evaluations, "held_out_loss", "").points
    if losses and facts.predicts_features:
        yield "held-out cosine", f"{-losses[-1][1]:.3f}"
    elif losses:
        yield "held-out loss", f"{losses[-1][1]:.3f}"
    if facts.training:
        yield f"{facts.samples} seen", number_text(facts.training[-1]["samples"])
        yield "training time", duration(facts.seconds)
        yield f"{facts.samples}/s", number_text(facts.training[-1]["samples"] / max(facts.seconds, 1e-9))
    if look is not None:
        yield "parameters", number_text(look.num_parameters)
    if facts.num_broken:
        yield "broken files", f"{facts.num_broken:,}"


def _in_words(facts: Facts, look: Look | Pairs | None) -> str:
    """A paragraph for someone who has not seen the recipe."""
    student = _student(facts, look)
    sentences = [f"A {student} learns the task {facts.recipe.task.name}."]
    if facts.recipe.task.name == "clip":
        size = f" ({number_text(look.num_parameters)} parameters)" if look is not None else ""
        sentences = [f"A {_student(facts, None)} and a text tower{size} learn which texts belong to which images."]
    if facts.predicts_features:
        sentences = [f"A {student} learns to predict what a frozen teacher sees at patches that are hidden from it."]
    if not facts.training:
        return " ".join([*sentences, "The run has not logged a step yet."])
    last = facts.training[-1]
    epochs = ""
    if look is not None and look.num_train:
        epochs = f" ({last['samples'] / look.num_train:.3g} times through the {look.num_train:,} {facts.samples})"
    on = f" on {facts.environment['device']}" if "device" in facts.environment else ""
    verb = "took" if facts.finished else "have taken so far"
    sentences.append(
        f"{last['step']:,} steps of {facts.recipe.run.batch_size} {facts.samples}{epochs} {verb}"
        f" {duration(facts.seconds)}{on}."
    )
    losses = series(facts.evaluations, "held_out_loss", "").points
    if losses and facts.predicts_features:
        begun = f", up from {-losses[0][1]:.2f} at step {losses[0][0]:,.0f}" if len(losses) > 1 else ""
        sentences.append(
            f"On held-out images the cosine between prediction and teacher is now {-losses[-1][1]:.2f}{begun}"
            " (every second patch hidden; 1 is perfect)."
        )
    if facts.summary:
        sentences.append(
            "Every file could be read." if not facts.num_broken else f"{facts.num_broken:,} files could not be read."
        )
    return " ".join(sentences)


def _student(facts: Facts, look: Look | Pairs | None) -> str:
    size = f"{number_text(look.num_parameters)}-parameter " if look is not None else ""
    backbone: Any = getattr(facts.recipe.task, "backbone", None)
    name = str(getattr(backbone, "variant", None) or getattr(backbone, "name", "model"))
    return size + {"vit": "vision transformer"}.get(name, name)


def _dimensions(backbone: Any) -> str:
    sizes = {
        "layers": getattr(backbone, "depth", None),
        "wide": getattr(backbone, "width", None),
        "pixels": getattr(backbone, "image_size", None),
    }
    patch = getattr(backbone, "patch_size", None)
    return ", ".join(f"{size} {name}" for name, size in sizes.items() if size) + (
        f" in patches of {patch}" if patch else ""
    )


def _results(facts: Facts) -> str:
    return section("Results", "".join(map(table_html, facts.results))) if facts.results else ""


def _pictures(look: Look | Pairs) -> str:
    if isinstance(look, Pairs):
        texts = (
            f"Held-out images through {look.source}, each with its caption, and the nearest of {look.num_texts:,} texts"
            " by cosine. ✓ marks the image's own."
        )
        images = f"The same captions, and the nearest of {look.num_images:,} held-out images."
        return section("Texts found for images", paragraph(texts) + pictures.texts_found(look), "texts") + section(
            "Images found for texts", paragraph(images) + pictures.images_found(look), "images"
        )
    kind = "held-out" if look.held_out else "training"
    fifth, mean = np.percentile(look.cosines, 5), look.cosines.mean()
    same = pictures.share_of_same_labels(look.shown)
    labels = f" ✓ marks the query's label: {same[0]} of {same[1]} agree." if same else ""
    others = "held-out" if look.num_train is None else "training"
    predicted = (
        f"{len(look.shown)} {kind} images through {look.source}. Grey patches are hidden from the student. The cosine"
        " says how well its prediction at a hidden patch agrees with what the teacher sees there. The last three tiles"
        " show features as colours: similar colours are similar features. Teacher and prediction share one palette; the"
        " student's own features, the whole image visible, have another, turned to resemble it."
    )
    nearest = (
        f"Each query with the images that the student finds most similar among {look.num_gallery:,} {others} images, by"
        f" cosine of its pooled features.{labels}"
    )
    worst = (
        f"Over all hidden patches of {look.num_images:,} {kind} images the cosine is {mean:.2f} on average, and below"
        f" {fifth:.2f} for one patch in twenty. These are the lowest, one per image, outlined in their surroundings."
    )
    return (
        section(
            "What it predicts",
            paragraph(predicted) + pictures.colour_scale() + pictures.predictions(look),
            "predictions",
        )
        + section("Nearest neighbours", paragraph(nearest) + pictures.neighbours(look), "neighbours")
        + section("Worst patches", paragraph(worst) + pictures.worst_patches(look), "worst")
    )


def _curves(facts: Facts) -> str:
    training, evaluations = facts.training, facts.evaluations
    other = sorted(
        {key for record in evaluations for key in record} - {"step", "time", "held_out_loss", "ema_held_out_loss"}
    )
    loss = [
        series(training, "loss", "training"),
        series(evaluations, "held_out_loss", "held-out", dots=True),
        series(evaluations, "ema_held_out_loss", "held-out, averaged weights", dots=True),
    ]
    note = "Minus the cosine at hidden patches: −1 is perfect." if facts.predicts_features else ""
    charts = [
        line_chart("Loss", loss, note=note),
        line_chart("Learning rate", [series(training, "lr", "")]),
        line_chart("Gradient norm", [series(training, "grad_norm", "before clipping")], log_scale=True),
        line_chart("Images per second", [series(training, "samples_per_s", "")]),
        *(line_chart(key.replace("_", " "), [series(evaluations, key, "held-out", dots=True)]) for key in other),
    ]
    skipped = sum(record.get("skipped_steps", 0.0) for record in training[-1:])
    warning = paragraph(f"{skipped:.0f} steps were skipped because of non-finite gradients.") if skipped else ""
    return section("Curves", f'{warning}<div class="charts">{"".join(charts)}</div>') if any(charts) else ""


def _time_split(facts: Facts) -> str:
    total = facts.seconds
    if not total:
        return ""
    shares = {
        name: sum(record.get(f"share_{key}", 0.0) * seconds for record, seconds in facts.intervals()) / total
        for key, name in SHARES.items()
    }
    parts = "".join(
        f'<div class="c{number}" style="width:{100 * share:.2f}%">{f"{share:.0%}" if share >= 0.08 else ""}</div>'
        for number, share in enumerate(shares.values())
    )
    steps = facts.training[-1]["step"]
    legend = "".join(legend_key(number, name, f"{share:.1%}") for number, (name, share) in enumerate(shares.items()))
    speed = facts.training[-1]
    ms = 1000 * total / steps
    words = f"Where the time of a training step goes: {number_text(ms)} ms on average."
    if speed.get("tflops_per_s"):
        words += (
            f" At the end {number_text(speed['tflops_per_s'])} TFLOP/s, {speed['mfu']:.0%} of what the device can do"
        )
        words += f"; {speed['memory_gib']:.1f} GiB of memory."
    return section("Time", f'{paragraph(words)}<div class="stack">{parts}</div><div class="legend">{legend}</div>')


def _broken(facts: Facts) -> str:
    if not facts.num_broken:
        return ""
    names: dict[str, str] = facts.summary.get("broken", {})
    items = "".join(
        f"<li><code>{html.escape(name)}</code> {html.escape(reason)}</li>"
        for name, reason in list(names.items())[:SHOWN_BROKEN]
    )
    more = facts.num_broken - min(len(names), SHOWN_BROKEN)
    tail = paragraph(f"and {more:,} more, named in log.jsonl") if more > 0 else ""
    words = paragraph("These were skipped; another image took their place.")
    return section(f"Broken files ({facts.num_broken:,})", f"{words}<ul>{items}</ul>{tail}")


def _what_was_run(facts: Facts, look: Look | Pairs | None) -> str:
    recipe, environment = facts.recipe, facts.environment
    target: Any = getattr(recipe.task, "target", None)
    num_train = f"{look.num_train:,} for training" if look is not None and look.num_train else ""
    num_val = f"{look.num_held_out:,} held out" if look is not None and look.num_held_out else ""
    counts = ", ".join(filter(None, [num_train, num_val]))
    versions = ", ".join(f"{key} {environment[key]}" for key in PACKAGES if key in environment)
    machine = [
        str(environment.get("device", "")),
        f"{environment.get('processes', 1)} process(es)",
        str(environment.get("platform", "")),
    ]
    optim = recipe.optim
    rows = {
        "student": ": ".join(
            filter(None, [_student(facts, look), _dimensions(getattr(recipe.task, "backbone", None))])
        ),
        "teacher": facts.identity.get("target", getattr(target, "name", "")),
        "data": "; ".join(filter(None, [", ".join(source.name for source in recipe.data.train), counts])),
        "training": f"{recipe.run.length}, batches of {recipe.run.batch_size}, learning rate {optim.lr:g}"
        f" ({optim.schedule}, warm-up {optim.warmup}), weight decay {optim.weight_decay:g}, seed {recipe.run.seed}",
        "machine": " · ".join(filter(None, machine)) if environment else "",
        "versions": versions,
        "git": environment.get("git") or "",
        "folder": str(facts.run.resolve()),
    }
    listed = "".join(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in rows.items() if value)
    details = f"<details><summary>The whole recipe</summary><pre>{html.escape(facts.recipe_text)}</pre></details>"
    return section("What was run", f"<dl>{listed}</dl>{details}")


# ------------------------------------------------------------------------------------------------ pieces


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    units: Sequence[tuple[str, float]] = (("d", 86400), ("h", 3600), ("min", 60))
    for (name, length), (smaller, part) in zip(units, [*units[1:], ("s", 1.0)], strict=True):
        whole, rest = divmod(round(seconds / part), round(length / part))
        if whole:
            return f"{whole} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.3g} s"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
