"""Zero-shot classification by a CLIP: on held-out images, on any images with classes, on the twelve sets of the paper.

class names x templates -> `zero_shot_classifier` [E, V]; image -> features [B, E] -> 100 x cosine -> accuracies

Metrics (shares), of the held-out images or a `source`: `zeroshot_top1`, `zeroshot_top5` (more than five classes),
`zeroshot_mean_class`. Of the twelve sets (`roots`): the same by set, `zeroshot_imagenet_1k_top1` and so on;
`zeroshot_mean` over the sets that were measured, in which a set of Kinetics counts with the mean of its top-1 and
top-5; `zeroshot_gap` = ImageNet-1K - mean of the six ImageNet sets, where all six were measured.

Paper: EVA section 3.4, EVA-CLIP table 3. Source: clip_and_eva02 sections 3.1 to 3.3, the conventions of CLIP_benchmark:
all ImageNet sets take the 80 templates; A and R tell their 200 classes apart, ObjectNet its own 113, with the red
border on; CIFAR takes torchvision's names as they stand; one centre frame per video. Differences: every image counts
once on however many processes, and products of features are taken in full precision.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from openeva.config import ConfigError
from openeva.config import Source as SourceField
from openeva.data.benchmarks import IMAGENET, KINETICS, Benchmark, ImageSet, open_benchmarks
from openeva.data.clips import ClipSpec
from openeva.data.imagenet_classes import class_names as imagenet_names
from openeva.data.imagenet_classes import wordnet_ids
from openeva.data.labels import class_names_of, has_videos
from openeva.data.sources.torchvision import benchmark_name
from openeva.data.views import CropConfig
from openeva.engine.distributed import merge_over_processes
from openeva.evals.base import OFFICIAL_CROP, Accuracies, OwnImages, accuracy_of, encode_images, own_crop, text_task
from openeva.text import prompts

HELD_OUT = ImageSet("", "held-out images")
Percent = tuple[float, float | None, float | None]
"""Top-1, top-5 and mean per class."""
COLUMNS = ("set", "top-1 %", "top-5 %", "mean per class %", "images", "published", "difference")
"""Of `Row.cells`."""
_CHUNK = 4096


class Config(OwnImages):
    """Zero-shot classification of the held-out images, of `source`, or of the sets in `roots`."""

    name: str = "zeroshot"
    source: SourceField | None = Field(None, description="images with classes; the held-out ones when left out")
    roots: dict[Benchmark | Literal["imagenet"], Path] = Field(
        {},
        description="where the paper's twelve sets lie; `imagenet` is the folder that holds the ImageNet sets. What is"
        " not there is not measured",
    )
    sets: list[Benchmark] | None = Field(None, min_length=1, description="which of them; all if left out")
    templates: str | list[str] | None = Field(
        None,
        description="texts with {c} for the class, a file of them (one per line), or a name such as imagenet or simple;"
        " default: the data set's own, or the 80 of ImageNet",
    )
    class_names: str | list[str] | dict[str, str] | None = Field(
        None, description="names in words: a list by label, own name -> name in words, or a file of either"
    )
    crop: CropConfig | None = Field(None, description="of images of its own; as the model's held-out ones if left out")
    prefix: str = Field("", description="of the metrics' names, where several of these stand in one recipe")
    frames: int = Field(
        1,
        gt=0,
        description="of videos: so many evenly spaced ones, their features averaged; 1 = the middle one (paper)",
    )
    text_batch_size: int = Field(256, gt=0, description="texts per forward pass")
    allow_incomplete: bool = Field(False, description="measure ImageNet sets of which images are missing")
    download: bool = Field(False, description="let torchvision fetch CIFAR where it is missing")

    @model_validator(mode="after")
    def _one_kind_of_images(self) -> "Config":
        if self.roots and self.source is not None:
            raise ValueError("give either `source` (one data set) or `roots` (the paper's sets), or two evaluations")
        if self.roots and (self.templates is not None or self.class_names is not None):
            raise ValueError("the sets in `roots` have templates and class names: leave yours out, or give a `source`")
        if self.sets is not None and not self.roots:
            raise ValueError("`sets` chooses among the sets in `roots`: say where they are")
        return self

    def build(self) -> "ZeroShot":
        """Open the images.

        Raises:
            ConfigError: Images, templates or class names are missing or do not fit.
        """
        try:
            templates = None if self.templates is None else prompts.read_templates(self.templates)
        except ValueError as error:
            raise ConfigError([f"evaluation zeroshot: {error}"]) from None
        if self.roots:
            found, missing = open_benchmarks(
                self.roots, self.sets, allow_incomplete=self.allow_incomplete, download=self.download
            )
            return ZeroShot(self, found, missing, None)
        if self.source is None:
            return ZeroShot(self, [HELD_OUT], {}, templates)
        source = self.source.build()
        if not source.num_classes:
            text = f"source {self.source.name} has no classes (image_folder: labels: true)"
            raise ConfigError([f"evaluation zeroshot: {text}"])
        title = getattr(self.source, "dataset", self.source.name)
        return ZeroShot(self, [ImageSet("", self.prefix.rstrip("_") or title, source)], {}, templates)


class Row(NamedTuple):
    """One line of the table, in percent; None where there is no such number."""

    title: str
    top1: float
    top5: float | None
    mean_class: float | None
    images: int | None
    published: float | None

    def cells(self) -> tuple[str, ...]:
        """As text."""
        top5, mean_class, published = (
            "" if value is None else f"{value:.2f}" for value in (self.top5, self.mean_class, self.published)
        )
        difference = "" if self.published is None else f"{round(self.top1 - self.published, 2) + 0.0:+.2f}"
        images = "" if self.images is None else f"{self.images:,}"
        return (self.title, f"{self.top1:.2f}", top5, mean_class, images, published, difference)


class ZeroShot:
    """See the module's text.

    Attributes:
        sets: What is measured.
        missing: Title of a set that is not measured -> reason.
        broken: Name -> reason of the files that could not be read.
        tell: Called with a line for each set when it is done.
    """

    def __init__(
        self, config: Config, sets: Sequence[ImageSet], missing: Mapping[str, str], templates: Sequence[str] | None
    ) -> None:
        self.config, self.sets, self.missing = config, list(sets), dict(missing)
        self.needs = frozenset({"text", "val_labels"} if self.sets == [HELD_OUT] else {"text"})
        self.broken: dict[str, str] = {}
        self.tell: Callable[[str], None] | None = None
        self._templates = templates

    def check(self, task: Any) -> None:
        """Whether the task encodes images and texts, and class names that were given are those of the images.

        Raises:
            ValueError: It does not, or they are not.
        """
        text_task(task, self.config.name)
        for one in self.sets:
            if one.source is not None:
                self._names(one, class_names_of(one.source))

    def check_held_out(self, known: Sequence[str]) -> None:
        """Whether class names that were given are those of the held-out images, where those are measured.

        Raises:
            ValueError: They are not.
        """
        if self.sets == [HELD_OUT] and known:
            self._names(HELD_OUT, known)

    @torch.no_grad()
    def run(self, task: Any, loaders: Mapping[str, Any]) -> dict[str, float]:
        """Metrics as in the module's text.

        Raises:
            ValueError: See `check`; or there are no images with labels.
        """
        self.check(task)
        metrics: dict[str, float] = {}
        made: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}  # several sets have the same classes
        for one in self.sets:
            loader, known = self._images(one, task, loaders)
            texts = (tuple(self._names(one, known)), tuple(self._templates_of(one)))
            if texts not in made:
                made[texts] = prompts.zero_shot_classifier(
                    task.encode_text, *texts, batch_size=self.config.text_batch_size
                )
            found = _measure(task, loader, made[texts])
            if one.source is not None:
                self.broken |= merge_over_processes(loader.broken)
            if self.tell is not None:
                self.tell(f"{one.title}: {100 * found.top1:.2f} % of {found.num_images:,} images")
            metrics |= self._named(one, found, len(known))
        return metrics | _summary(metrics, self._start(), [one.key for one in self.sets if one.key])

    def _images(self, one: ImageSet, task: Any, loaders: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """A loader, and the own names of its classes by label."""
        if one.source is not None:
            crop = self.config.crop or own_crop(task, loaders)
            view = task.view_spec(train=False)
            view = replace(view, tokenizer=None, clip=self._clip(one.source))
            return self.config.loader(one.source, view, crop), class_names_of(one.source)
        if "val" not in loaders:
            raise ValueError("evaluation zeroshot has no images: give it a `source`, or data.val or data.holdout")
        names = list(loaders["val"].class_names)
        if not names:
            raise ValueError("evaluation zeroshot needs held-out images with classes; remove it, or give it a `source`")
        loader = loaders["val"]
        if (clip := self._clip(loader)) is not None:
            loader = loader.seen_as(replace(task.view_spec(train=False), tokenizer=None, clip=clip))
        return loader, names

    def _clip(self, source: Any) -> ClipSpec | None:
        return ClipSpec(self.config.frames) if self.config.frames > 1 and has_videos(source) else None

    def _names(self, one: ImageSet, known: Sequence[str]) -> list[str]:
        """What stands for the classes in the texts: what was given, names made for texts, or folders in words."""
        names = list(known)
        if not hasattr(one.source, "templates"):
            in_words = dict(zip(wordnet_ids(), imagenet_names(), strict=True))
            names = [in_words.get(name) or prompts.in_words(name) for name in known]
        given = self.config.class_names
        return names if given is None else prompts.read_class_names(given, known, names)

    def _templates_of(self, one: ImageSet) -> Sequence[str]:
        if self._templates is not None:
            return self._templates
        own = getattr(one.source, "templates", one.key)
        if not isinstance(own, str):
            return tuple(own)
        return prompts.templates_for(own if prompts.has_templates(own) else "imagenet")

    def _by_protocol(self) -> bool:
        """Whether texts and crop are those that the published numbers were made with."""
        config = self.config
        crop = config.crop and config.crop.model_copy(update={"resizer": None})
        return not (config.templates or config.class_names) and config.frames == 1 and crop in (None, OFFICIAL_CROP)

    def _start(self, one: ImageSet = HELD_OUT) -> str:
        """Beginning of the names of a set's metrics."""
        return f"{self.config.prefix}zeroshot_{one.key + '_' if one.key else ''}"

    def _named(self, one: ImageSet, found: Accuracies, num_classes: int) -> dict[str, float]:
        start = self._start(one)
        metrics = {f"{start}top1": found.top1, f"{start}mean_class": found.mean_class}
        if num_classes > 5:
            metrics[f"{start}top5"] = found.top5
        return metrics if one == HELD_OUT else {**metrics, f"{start}images": float(found.num_images)}

    def notes(self, task: Any) -> list[str]:
        """What a reader of the numbers should know."""
        notes = [one.note for one in self.sets if one.note]
        if self.missing:
            notes.append("not measured: " + "; ".join(f"{title} ({why})" for title, why in self.missing.items()))
        for one in self.sets:
            own = getattr(one.source, "templates", one.key)
            if self._templates is None and isinstance(own, str) and not prompts.has_templates(own):
                text = "no templates of their own are at hand: those of ImageNet (80) took their place"
                notes.append(f"{one.title}: {text} (`templates` chooses others)")
        if self.broken:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.broken.items())[:5])
            notes.append(f"{len(self.broken)} files could not be read and were left out: {some}")
        return notes

    def rows(self, metrics: Mapping[str, float], published: Mapping[str, Percent]) -> list[Row]:
        """The table of what was measured.

        Args:
            metrics: Of `run`.
            published: Of the same weights by set, in percent: top-1, top-5, mean per class. Left out where texts or
                crop are not those of that protocol.
        """
        published = published if self._by_protocol() else {}
        rows, theirs = [], _as_metrics(published, self._start())
        for one in self.sets:
            start, name = self._start(one), one.key or _name_of(self.config.source)
            top5, images = metrics.get(f"{start}top5"), metrics.get(f"{start}images")
            row = Row(
                one.title, 100 * metrics[f"{start}top1"], None if top5 is None else 100 * top5,
                100 * metrics[f"{start}mean_class"], None if images is None else round(images),
                published[name][0] if name in published else None,
            )  # fmt: skip
            rows.append(row)
            if one.key in KINETICS and row.top5 is not None:  # the paper's number of such a set
                known = [value for value in published.get(name, ())[:2] if value is not None]
                both = sum(known) / 2 if len(known) == 2 else None
                rows.append(Row(f"{one.title}, mean of both", (row.top1 + row.top5) / 2, None, None, row.images, both))
        keys = [one.key for one in self.sets if one.key]
        expected = _summary(theirs, self._start(), keys) if set(keys) <= set(published) else {}
        titles = {"mean": f"mean of {len(keys)}", "gap": "gap: ImageNet-1K - mean of its six"}
        for key, title in titles.items():
            name = self._start() + key
            if name in metrics:
                number = 100 * expected[name] if name in expected else None
                rows.append(Row(title, 100 * metrics[name], None, None, None, number))
        return rows


def _name_of(source: Any) -> str:
    """By what name a data set's accuracies may have been published; "" for training images."""
    is_training = str(getattr(source, "split", "")).startswith("train")
    return "" if is_training else benchmark_name(str(getattr(source, "dataset", "")))


def _measure(task: Any, loader: Iterable[dict[str, Any]], classifier_EV: Float[Tensor, "E V"]) -> Accuracies:
    """Accuracies of a classifier made of texts on all images with labels (collective)."""
    seen, device = encode_images(task, loader), classifier_EV.device
    parts = zip(seen.features.split(_CHUNK), seen.labels.split(_CHUNK), strict=True)
    answers = ((prompts.zero_shot_logits(part.to(device), classifier_EV), labels.to(device)) for part, labels in parts)
    found = accuracy_of(answers, classifier_EV.shape[1], device)
    if not found.num_images:
        raise ValueError("evaluation zeroshot found no images with labels; remove it from `evals`")
    return found


def _as_metrics(published: Mapping[str, Percent], start: str) -> dict[str, float]:
    """Published percentages by the names of metrics, as shares."""
    kinds = ("top1", "top5", "mean_class")
    return {
        f"{start}{name}_{kind}": value / 100
        for name, values in published.items()
        for kind, value in zip(kinds, values, strict=True)
        if value is not None
    }


def _summary(metrics: Mapping[str, float], start: str, keys: Sequence[str]) -> dict[str, float]:
    """Mean over some sets, and the gap from ImageNet-1K to the mean of its six where all are among them."""

    def headline(key: str) -> float:
        top1, top5 = metrics[f"{start}{key}_top1"], metrics.get(f"{start}{key}_top5")
        return (top1 + top5) / 2 if key in KINETICS and top5 is not None else top1

    if not keys:
        return {}
    summary = {f"{start}mean": sum(map(headline, keys)) / len(keys)}
    if set(IMAGENET) <= set(keys):
        summary[f"{start}gap"] = headline("imagenet_1k") - sum(map(headline, IMAGENET)) / len(IMAGENET)
    return summary
