"""Top-1 and top-5 accuracy and cross-entropy of a classifier, on the held-out samples or on a source of its own.

image, or video in one or many views -> `task.logits` -> is the label first, or among the first five, of the classes?

Source: spec section 7. Differences: every image counts once on however many processes (the official sampler pads with
duplicates), and the loss is a mean over images, not over batches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from openeva.config import Source as SourceField
from openeva.data.clips import ViewsConfig
from openeva.data.kinetics_classes import canonical
from openeva.data.labels import has_videos
from openeva.data.views import CropConfig
from openeva.evals.base import OwnImages, Tally, check_classes, own_crop, view_of


class Config(OwnImages):
    """Top-1, top-5 and loss."""

    name: str = "topk"
    source: SourceField | None = Field(
        None, description="images or videos to measure on; the held-out ones when left out"
    )
    views: ViewsConfig | None = Field(None, description="of each video; as held-out ones are seen if left out")
    crop: CropConfig | None = Field(None, description="of images of `source`; as the model's held-out ones if left out")
    prefix: str = Field("", description="of the metrics' names, where several of these stand in one recipe")

    def build(self) -> "TopK":
        """Make the evaluation.

        Raises:
            ConfigError: The source lacks something.
        """
        return TopK(self)


class TopK:
    """See the module's text."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._source = None if config.source is None else config.source.build()
        self.needs = frozenset({"logits"} if self._source is not None else {"logits", "labels"})

    def check(self, task: Any) -> None:
        """Whether the task tells the classes of the images apart, and the metrics from its own.

        Raises:
            ValueError: It does not.
        """
        view = view_of(task, self.config.name)
        if view.clip is None and self.config.views is not None:
            raise ValueError(f"evaluation {self.config.name}: `views` are of videos, and this model classifies images")
        if self.config.views is not None and not self.config.prefix and hasattr(task, "evaluate"):
            raise ValueError(
                f"evaluation {self.config.name} with `views` would report under the names of the held-out accuracies;"
                " tell them apart by a `prefix`, such as prefix: views_"
            )
        if self._source is not None:
            if has_videos(self._source) < (view.clip is not None):
                raise ValueError(
                    f"evaluation {self.config.name}: its source has images, but this model classifies videos"
                )
            if not self.config.prefix and hasattr(task, "evaluate"):
                raise ValueError(
                    f"evaluation {self.config.name} with a `source` would report under the names of the held-out"
                    " images' accuracies; tell them apart by a `prefix`, such as prefix: other_"
                )
            rows = getattr(self._source, "rows", None)
            check_classes(task, 1000 if rows else self._source.num_classes, self.config.name)
            theirs, ours = (
                [canonical(name) for name in names]
                for names in (getattr(self._source, "class_names", ()), task.class_names)
            )
            named = theirs and not any(all(name.isdecimal() for name in names) for names in (theirs, ours))
            if view.clip is not None and named and set(theirs) != set(ours):
                other = next(name for name in theirs + ours if (name in theirs) != (name in ours))
                raise ValueError(
                    f"evaluation {self.config.name}: the videos' classes are not the model's: {other!r} is only one of"
                    " the two; evaluate videos of its classes, or leave out their names"
                )
            if rows is None and theirs != ours and set(theirs) == set(ours):
                raise ValueError(
                    f"evaluation {self.config.name}: the images' classes are the model's in another order"
                    f" ({', '.join(theirs[:3])}, ... instead of {', '.join(ours[:3])}, ...); number them alike"
                )

    @torch.no_grad()
    def run(self, task: Any, loaders: Mapping[str, Any]) -> dict[str, float]:
        """`{"top1": ..., "top5": ..., "held_out_loss": ..., "images": ...}`; accuracies are shares.

        Raises:
            ValueError: The task does not classify, or not into the classes of the images, or there are no labels.
        """
        self.check(task)
        config, source = self.config, self._source
        view, rows = view_of(task, config.name), getattr(source, "rows", None)
        if config.views is not None and view.clip is not None:
            view = replace(view, clip=config.views.spec(view.clip.num_frames))
            if source is None and "val" in loaders:
                loaders = {"val": loaders["val"].seen_as(view)}
        if source is not None:
            crop = config.crop or own_crop(task, loaders)
            loaders = {"val": config.loader(source, view, crop)}
        if "val" not in loaders:
            raise ValueError(f"evaluation {config.name} has no images: give it a `source`, or data.val or data.holdout")
        device, tally = next(task.parameters()).device, Tally()
        for batch in loaders["val"]:
            logits_BV = task.logits(batch["image"].to(device, non_blocking=True))
            tally.add(logits_BV if rows is None else logits_BV[:, list(rows)], batch["label"][:, None])
        found = tally.result()
        if not found.num_images:
            raise ValueError(f"evaluation {config.name} found no images with labels; remove it from `evals`")
        shares = {"top1": found.top1 / found.num_images, "top5": found.top5 / found.num_images}
        # not "loss": by that name a log tells training steps from evaluations
        metrics = {**shares, "held_out_loss": found.loss, "images": float(found.num_images)}
        return {config.prefix + key: value for key, value in metrics.items()}
