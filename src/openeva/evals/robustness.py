"""ImageNet-1K and what remains of it elsewhere: V2, ReaL, A, R, Sketch and ObjectNet, their mean, and the gap to it.

seven sets on disk (`data/imagenet_layout.py`) -> one pass over each kind of pixels -> `task.logits` -> hits per set

Metrics (accuracies are shares): `imagenet_1k_top1`, `..._top5`, `..._loss`, `..._images`, and so on for `imagenet_v2`,
`imagenet_real`, `imagenet_a`, `imagenet_r`, `imagenet_sketch`, `objectnet` (the first ImageNet class of an ObjectNet
class) and `objectnet_any` (any of them); `mean` of the six sets 1K, V2, A, R, Sketch and ObjectNet, and `gap` = 1K -
mean, where all six were measured.

Protocols: "official" does what the official code does: crop_pct 1 and bicubic, but V2 and ObjectNet bilinear at a
fixed size (336 pixels in EVA-01, 448 in EVA-02), ObjectNet with its red border and counted by the first class.
"standard" cuts every set as the model's own held-out images, without the border, and counts any class; its metrics are
named `standard_...`. "both" measures both.

Paper: the gap is that of arXiv 2103.00020, section 3.3, averaged as EVA-CLIP does. Source: spec section 7 and section
10, items 11 to 13; clip_and_eva02 section 4.6. Differences: every image counts once on however many processes (the
official sampler pads 7,500, 18,574 and 50,889 images with duplicates), ReaL goes by file name, the loss is a mean over
images, and the few photographs that lie on their side are turned upright (`data/decode.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from openeva.config import ConfigError
from openeva.data.imagenet_classes import wordnet_ids
from openeva.data.imagenet_layout import FACTS, SETS, SetName, survey, survey_beneath
from openeva.data.sources.imagenet import Config as ImageNetConfig
from openeva.data.sources.imagenet import ImageNet
from openeva.data.views import CropConfig
from openeva.engine.distributed import merge_over_processes
from openeva.evals.base import OFFICIAL_CROP, OwnImages, Tally, check_classes, image_size_of, own_crop

Protocol = Literal["official", "standard"]

BILINEAR: tuple[SetName, ...] = ("v2", "objectnet")
"""PARITY: sets for which the official code has transforms of their own, with a fixed size and another kernel."""
OFFICIAL_SIZES = {"EVA-01": 336, "EVA-02": 448}

AVERAGED: tuple[SetName, ...] = ("1k", "v2", "a", "r", "sketch", "objectnet")
PREFIX: dict[Protocol, str] = {"official": "", "standard": "standard_"}
METRIC: dict[SetName, str] = {name: name if name == "objectnet" else f"imagenet_{name}" for name in SETS}
"""Names of the sets in metrics, the same as in the table of published accuracies."""


class Config(OwnImages):
    """ImageNet-1K and the robustness sets.

    Attributes:
        roots: The folder that holds all sets, or one folder for each (`openeva data check imagenet` says what is
            there).
        sets: Which ones; default: all, or those that `roots` names, and ReaL where 1K is among them.
        protocol: See the module's text.
        crop: How "standard" cuts images; default: as the run's held-out images, or as the weights want it.
        official_size: Pixels of V2 and ObjectNet in "official"; default: 336, or 448 for models with rotary positions.
            Where a model takes its own size only, that is used instead (the official code then takes none).
        allow_incomplete: Measure on what is there, although images are missing.
    """

    name: str = "robustness"
    roots: Path | dict[SetName, Path]
    sets: list[SetName] | None = None
    protocol: Protocol | Literal["both"] = "official"
    crop: CropConfig | None = None
    official_size: int | None = Field(None, gt=0)
    allow_incomplete: bool = False

    def build(self) -> "Robustness":
        """Open the sets.

        Raises:
            ConfigError: Something is missing on disk; one message per piece.
        """
        return Robustness(self, _open_sets(self))


def _open_sets(config: Config) -> dict[SetName, Path]:
    """Where each set lies.

    Raises:
        ConfigError: What is missing.
    """
    given = config.roots if isinstance(config.roots, dict) else dict.fromkeys(SETS, config.roots)
    if "1k" in given and "real" not in given:
        given = {**given, "real": given["1k"]}
    wanted = [name for name in SETS if name in (given if config.sets is None else config.sets)]
    problems = [f"{FACTS[name].title}: roots has no folder for {name}" for name in wanted if name not in given]
    found: dict[SetName, Path] = {}
    for name in wanted:
        if name not in given:
            continue
        root = given[name].expanduser().absolute()
        missing = survey(root, name) if isinstance(config.roots, dict) else survey_beneath(root, name)
        if not (config.allow_incomplete and missing.num_images):
            problems += [problem for problem in missing.problems if problem not in problems]
        found[name] = missing.root
    if problems:
        hint = "" if config.allow_incomplete else ", and `allow_incomplete: true` measures on what is there"
        where = "key `roots`, or `openeva evaluate --imagenet FOLDER`, says where they are"
        raise ConfigError(
            problems, f"evaluation robustness (`openeva data check imagenet PATH` shows all; {where}{hint})"
        )
    return found


@dataclass
class _Pass:
    """One way through the pixels of a set: what is counted on them, as metric -> labels of each image `[N, L]`."""

    source: ImageNet
    crop: CropConfig
    image_size: tuple[int, int]
    counted: dict[str, Int[Tensor, "N L"]] = field(default_factory=dict)


class Robustness:
    """See the module's text.

    Attributes:
        roots: Where each set lies.
        broken: Name -> reason of the files that could not be read.
        tell: Called with a line for each set when it is done.
    """

    needs = frozenset({"logits"})

    def __init__(self, config: Config, roots: dict[SetName, Path]) -> None:
        self.config, self.roots = config, roots
        self.broken: dict[str, str] = {}
        self.tell: Callable[[str], None] | None = None
        self._sources: dict[tuple[SetName, bool], ImageNet] = {}

    def check(self, task: Any) -> None:
        """Whether the task classifies into the 1,000 classes of ImageNet in their usual order.

        Raises:
            ValueError: It does not.
        """
        image_size_of(task, self.config.name)
        check_classes(task, 1000, self.config.name)
        names = list(task.class_names)
        if set(names) == set(wordnet_ids()) and names != list(wordnet_ids()):
            raise ValueError("the model's classes are not in the order of their WordNet ids, as the sets' labels are")

    @torch.no_grad()
    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """Metrics as in the module's text.

        Raises:
            ValueError: See `check`.
        """
        self.check(task)
        size = image_size_of(task, self.config.name)
        metrics: dict[str, float] = {}
        for one in self._passes(size, self._official_size(task, size), self.config.crop or own_crop(task, loaders)):
            metrics.update(self._measure(task, one))
        for protocol in self._protocols:
            metrics.update(_summary(metrics, protocol))
        return metrics

    def notes(self, task: Any) -> list[str]:
        """What a reader of the numbers should know."""
        size, notes = image_size_of(task, self.config.name), []
        if "official" in self._protocols and self._official_size(task, size) != (self._wanted(task),) * 2:
            notes.append(
                f"V2 and ObjectNet at the model's own {size[0]} x {size[1]} pixels: it takes no other, and the official"
                f" code, which fixes {self._wanted(task)} there, could not have measured it"
            )
        if self.broken:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.broken.items())[:5])
            notes.append(f"{len(self.broken)} files could not be read and were left out: {some}")
        return notes

    @property
    def _protocols(self) -> tuple[Protocol, ...]:
        return ("official", "standard") if self.config.protocol == "both" else (self.config.protocol,)

    def _wanted(self, task: Any) -> int:
        rotary = getattr(getattr(task.backbone, "config", None), "rope_grid", None) is not None
        return self.config.official_size or OFFICIAL_SIZES["EVA-02" if rotary else "EVA-01"]

    def _official_size(self, task: Any, own: tuple[int, int]) -> tuple[int, int]:
        any_size = getattr(getattr(task.backbone, "config", None), "dynamic_size", False)
        return (self._wanted(task),) * 2 if any_size else own

    def _source(self, name: SetName, crop_border: bool = False) -> ImageNet:
        key = (name, crop_border)
        if key not in self._sources:
            self._sources[key] = ImageNetConfig(set=name, root=self.roots[name], crop_border=crop_border).build()
        return self._sources[key]

    def _passes(self, own: tuple[int, int], official: tuple[int, int], own_crop: CropConfig) -> list[_Pass]:
        """Every kind of pixels once: ReaL shares those of 1K, and the protocols share what is the same in both."""
        passes: dict[tuple[Any, ...], _Pass] = {}
        for protocol in self._protocols:
            for name in self.roots:
                crop, size = (OFFICIAL_CROP, own) if protocol == "official" else (own_crop, own)
                if protocol == "official" and name in BILINEAR:
                    crop, size = OFFICIAL_CROP.model_copy(update={"interpolation": "bilinear"}), official
                border = name == "objectnet" and protocol == "standard"
                shown = "1k" if name == "real" and self.roots.get("1k") == self.roots["real"] else name
                one = passes.setdefault(
                    (shown, crop, size, border), _Pass(self._source(shown, border), crop, size)
                )  # fmt: skip
                metric = PREFIX[protocol] + METRIC[name]
                if name == "real":
                    one.counted[metric] = _by_name(one.source, self._source("real"))
                else:
                    one.counted[metric] = _table([one.source.label_set(i)[:1] for i in range(len(one.source))])
                if name == "objectnet":
                    one.counted[f"{metric}_any"] = _table([one.source.label_set(i) for i in range(len(one.source))])
        return list(passes.values())

    def _measure(self, task: Any, one: _Pass) -> dict[str, float]:
        """All that is counted on the same pixels."""
        rows = None if one.source.rows is None else list(one.source.rows)
        device = next(task.parameters()).device
        tallies = {metric: Tally() for metric in one.counted}
        loader = self.config.loader(one.source, one.image_size, one.crop)
        for batch in loader:
            logits_BV = task.logits(batch["image"].to(device, non_blocking=True))
            logits_BV = logits_BV if rows is None else logits_BV[:, rows]
            for metric, tally in tallies.items():
                tally.add(logits_BV, one.counted[metric][batch["index"]])
        self.broken |= merge_over_processes(loader.broken)
        metrics: dict[str, float] = {}
        for metric, tally in tallies.items():
            found = tally.result()
            number = max(found.num_images, 1)
            if self.tell is not None:
                self.tell(f"{metric}: {100 * found.top1 / number:.2f} % of {found.num_images:,} images")
            metrics |= {f"{metric}_top1": found.top1 / number, f"{metric}_top5": found.top5 / number}
            metrics |= {f"{metric}_loss": found.loss, f"{metric}_images": float(found.num_images)}
        return metrics


def _table(labels: Sequence[tuple[int, ...]]) -> Int[Tensor, "N L"]:
    """Labels of every image, filled up with -1."""
    length = max(map(len, labels))
    return torch.tensor([[*some, *[-1] * (length - len(some))] for some in labels])


def _by_name(shown: ImageNet, labelled: ImageNet) -> Int[Tensor, "N L"]:
    """Labels of the images of one source by those of another, found by path; -1 where it does not have them."""
    labels_of = {labelled.name_of(index): labelled.label_set(index) for index in range(len(labelled))}
    return _table([labels_of.get(shown.name_of(index), (-1,)) for index in range(len(shown))])


def _summary(metrics: dict[str, float], protocol: Protocol) -> dict[str, float]:
    """Mean over the six sets and the gap to it; nothing where one was not measured."""
    prefix = PREFIX[protocol]
    of_objectnet = "objectnet" if protocol == "official" else "objectnet_any"
    keys = [of_objectnet if name == "objectnet" else METRIC[name] for name in AVERAGED]
    if not all(f"{prefix}{key}_top1" in metrics for key in keys):
        return {}
    mean = sum(metrics[f"{prefix}{key}_top1"] for key in keys) / len(keys)
    return {f"{prefix}mean": mean, f"{prefix}gap": metrics[f"{prefix}imagenet_1k_top1"] - mean}


# --------------------------------------------------------------------------------------------- published numbers

TOLERANCE = 0.1
"""Points of accuracy that a repetition may differ by: 50 of 50,000 images, for another JPEG decoder, resize kernel and
precision. To it comes what padding may have changed: the official sampler repeated up to 7 images of a set."""
PROCESSES = 8
"""Of the official evaluations; ReaL's took one."""


COLUMNS = ("set", "top-1 %", "top-5 %", "right", "published", "against it")
"""Of `Comparison.cells`."""


class Comparison(NamedTuple):
    """One row of the table.

    Attributes:
        title: What was measured.
        top1: In percent.
        top5: In percent; None for mean and gap.
        correct: Images whose first answer is right.
        images: Images counted.
        published: In percent, None where nothing is.
        verdict: Of the comparison, in words.
    """

    title: str
    top1: float
    top5: float | None
    correct: int | None
    images: int | None
    published: float | None
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """As text."""
        right = "" if self.correct is None else f"{self.correct:,} / {self.images:,}"
        top5, published = ("" if value is None else f"{value:.2f}" for value in (self.top5, self.published))
        return (self.title, f"{self.top1:.2f}", top5, right, published, self.verdict)


def compare(metrics: Mapping[str, float], published: Mapping[str, float]) -> list[Comparison]:
    """The table of a measurement, beside the published accuracies.

    Args:
        metrics: Of `Robustness.run`.
        published: Top-1 in percent by set, named as in `METRIC`.
    """
    rows = []
    for prefix in PREFIX.values():
        for name in SETS:
            for suffix, what in (("", ""), ("_any", ", any of its classes")):
                key = f"{prefix}{METRIC[name]}{suffix}"
                if f"{key}_top1" not in metrics:
                    continue
                first = ", its first class" if name == "objectnet" and not suffix else what
                title = f"{FACTS[name].title}{first}{' (standard)' if prefix else ''}"
                number = None if suffix or prefix else published.get(METRIC[name])
                rows.append(_row(metrics, key, title, name, number))
        if f"{prefix}mean" in metrics:
            rows += _summary_rows(metrics, {} if prefix else published, prefix)
    return rows


def _summary_rows(metrics: Mapping[str, float], published: Mapping[str, float], prefix: str) -> list[Comparison]:
    """Mean and gap; compared where all six sets are complete and published, within what their tolerances add up to."""
    keys = {name: METRIC[name] for name in AVERAGED}
    known = [published[key] for key in keys.values() if key in published]
    mean = sum(known) / len(known) if len(known) == len(AVERAGED) else None
    gap = None if mean is None else known[0] - mean
    images = {name: round(metrics.get(f"{prefix}{key}_images", 0)) for name, key in keys.items()}
    complete = all(images[name] == FACTS[name].num_images for name in AVERAGED)
    tolerances = [tolerance(images[name]) if complete else 0.0 for name in AVERAGED]
    of_mean = sum(tolerances) / len(AVERAGED)
    of_gap = of_mean + (1 - 2 / len(AVERAGED)) * tolerances[0]  # 1K counts 5/6 there, 1/6 in the mean
    rows = []
    for key, title, number, allowed in (
        ("mean", "mean of six", mean, of_mean), ("gap", "gap: ImageNet-1K - mean", gap, of_gap),
    ):  # fmt: skip
        value, verdict = 100 * metrics[f"{prefix}{key}"], ""
        if not complete:
            verdict = "not all sets are complete: not to be compared"
        elif number is not None:
            verdict = _verdict(value - number, allowed)
        rows.append(Comparison(f"{title}{' (standard)' if prefix else ''}", value, None, None, None, number, verdict))
    return rows


def _row(metrics: Mapping[str, float], key: str, title: str, name: SetName, published: float | None) -> Comparison:
    images = round(metrics[f"{key}_images"])
    top1, top5 = 100 * metrics[f"{key}_top1"], 100 * metrics[f"{key}_top5"]
    correct = round(metrics[f"{key}_top1"] * images)
    verdict = ""
    if images != FACTS[name].num_images:
        verdict = f"{images:,} of {FACTS[name].num_images:,} images: not to be compared"
    elif published is not None:
        verdict = judge(top1, published, images, padded=name != "real")
    return Comparison(title, top1, top5, correct, images, published, verdict)


def judge(top1: float, published: float, images: int, *, padded: bool = True) -> str:
    """Whether an accuracy repeats the published one, both in percent, over so many images.

    See `tolerance`; `padded` is False for the set that was measured in one process.
    """
    more = _padding(images) if padded else 0
    note = f"; officially of {images + more:,} with padding" if more else ""
    return _verdict(top1 - published, tolerance(images, padded=padded), note)


def tolerance(images: int, *, padded: bool = True) -> float:
    """Points that may differ: `TOLERANCE`, and as much as if the padded images had all been right, or all wrong."""
    return TOLERANCE + (100 * _padding(images) / images if padded else 0.0)


def _padding(images: int) -> int:
    return -images % PROCESSES


def _verdict(difference: float, allowed: float, note: str = "") -> str:
    word = "repeats it" if abs(difference) <= allowed + 1e-9 else "DIFFERS"
    return f"{_signed(difference)}: {word} (within {allowed:.2f}{note})"


def _signed(difference: float) -> str:
    return f"{round(difference, 2) + 0.0:+.2f}"
