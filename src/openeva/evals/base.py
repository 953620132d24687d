"""The evaluation contract: `run(task, loaders) -> {metric: value}`, during training or after it.

A file in this folder holds one evaluation: `class Config(ComponentConfig)` whose `build()` returns an `Evaluation`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from sklearn.metrics import roc_auc_score
from torch import Tensor

from openeva.backbones.base import Backbone
from openeva.config import ComponentConfig
from openeva.data.labels import class_names_of
from openeva.data.loader import EvalLoader
from openeva.data.mixture import Mixture
from openeva.data.sources.base import Source
from openeva.data.views import CropConfig, ViewSpec, normalise
from openeva.data.workers import resolve_workers
from openeva.engine.distributed import gather_over_processes, sum_over_processes


@runtime_checkable
class Evaluation(Protocol):
    """Measures a task's model on data.

    It may say what it cannot do without, as an attribute `needs` (see `needs_of`).
    """

    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """Metrics by name.

        Args:
            task: The task in eval mode; `task.backbone` is its image encoder.
            loaders: `"train"` (evaluation transform, in order) and `"val"`; batches as in `data/loader.py`.
        """
        ...


def needs_of(evaluation: Evaluation) -> frozenset[str]:
    """What it asks of the data ("labels", "train": images that can be read by number) and the task.

    "logits" = a task that classifies, "targets" = one that predicts hidden patches, "text" = one of images and texts;
    "val_labels" = labels of the held-out images alone.
    """
    return frozenset(getattr(evaluation, "needs", ()))


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is the better one, by its name: losses, ranks, gaps."""
    return any(word in metric for word in ("loss", "rank", "gap"))


def check_fit(evals: Sequence[Evaluation], task: Any) -> None:
    """Ask evaluations whether they can measure a task, before it is trained: those that care have `check(task)`.

    Raises:
        ValueError: One cannot, or two would give numbers of the same names.
    """
    configs: list[Any] = [config for one in evals if hasattr(config := getattr(one, "config", None), "prefix")]
    names = Counter((config.name, config.prefix, bool(getattr(config, "roots", None))) for config in configs)
    for (name, prefix, _), times in names.items():
        if times > 1:
            text = f"stands there {times} times with the prefix {prefix!r}, so that the last one's numbers would take"
            raise ValueError(f"evaluation {name} {text} the place of the others'; give each a `prefix` of its own")
    for evaluation in evals:
        getattr(evaluation, "check", lambda _: None)(task)


def _process() -> tuple[int, int]:
    """Number of this process and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(loader: EvalLoader) -> EvalLoader:
    """This process's images of a loader that gives all of them to every process."""
    rank, world_size = _process()
    return loader.part(rank=rank, world_size=world_size)


class LabelledFeatures(NamedTuple):
    """Pooled features of a data set with labels, on the CPU; in the order of sample numbers."""

    pooled: Float[Tensor, "B D"]
    labels: Int[Tensor, "B"]


Result = TypeVar("Result")


class _Shared:
    """What functions made of a model and a loader, each once.

    Both are kept as long: a loader that is gone could leave its `id` to the next one, whose features would be its.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], tuple[object, object, Any]] = {}

    def get(self, make: Callable[[Any, Any], Result], model: object, loader: object) -> Result:
        key = (make.__name__, id(model), id(loader))
        if key not in self._made:
            self._made[key] = (model, loader, make(model, loader))
        made: Result = self._made[key][2]
        return made


_shared: ContextVar[_Shared | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Within this context the weights do not change: features are extracted once, for all evaluations that ask."""
    token = _shared.set(_Shared())
    try:
        yield
    finally:
        _shared.reset(token)


def extract_features(backbone: Backbone, loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    """Pooled features of every image of a loader, gathered from all processes (collective).

    Raises:
        ValueError: Images without labels; nothing after the first batch of them is looked at.
    """
    shared = _shared.get()
    return _extract(backbone, loader) if shared is None else shared.get(_extract, backbone, loader)


def _extract(backbone: Backbone, loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    return encode_all(lambda image_BCYX: backbone(image_BCYX).pooled, backbone, loader)


@torch.no_grad()
def encode_all(
    encode: Callable[[Tensor], Tensor],
    backbone: Backbone,
    loader: Iterable[dict[str, Any]],
    progress: Callable[[int], None] | None = None,
) -> LabelledFeatures:
    """What `encode` makes of every image of a loader, gathered from all processes (collective).

    Args:
        encode: Normalised images -> one vector of the backbone's width each.
        backbone: Whose device, dtype and statistics the images get.
        loader: This process's share of the images.
        progress: Called with the number of images that all processes have done.

    Raises:
        ValueError: As `extract_features`.
    """
    weight, (_, world_size), done = next(backbone.parameters()), _process(), 0
    none = torch.empty(0, dtype=torch.int64)  # there may be no images
    pooled, labels, indices = [torch.empty(0, backbone.width)], [none], [none]
    for batch in loader:
        labels.append(batch["label"].cpu())
        indices.append(batch["index"].cpu())
        if (batch["label"] < 0).any():
            break  # all processes will see it below
        # weights that are gathered in reduced precision (FSDP) take no other input outside autocast
        statistics, views = backbone.normalisation, batch["image"].to(weight.device)
        found_BD = [
            encode(normalise(view, statistics.mean, statistics.std, weight.dtype)).float()
            for view in (views.unbind(1) if views.ndim == 6 else [views])  # of videos
        ]
        pooled.append(torch.stack(found_BD).mean(0).cpu())
        done += len(views) * world_size
        if progress is not None:
            progress(done)
    found = (torch.cat(pooled), torch.cat(labels), torch.cat(indices))
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, found)
        pooled_BD, label_B, index_B = (torch.cat(column) for column in zip(*parts, strict=True))
    else:
        pooled_BD, label_B, index_B = found
    if (label_B < 0).any():
        raise ValueError(
            "this evaluation needs labels, but the data has none; remove it from `evals`, or give labels (such as"
            " `labels: true` of image_folder: one folder per class)"
        )
    # each process has every n-th sample; the folds of a probe go by the order
    order_B = index_B.argsort()
    return LabelledFeatures(pooled_BD[order_B], label_B[order_B])


def once(compute: Callable[[], Result]) -> Result:
    """What `compute` gives on the first process, on all of them; so does a `ValueError` (collective)."""
    if not dist.is_initialized():
        return compute()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [compute()]
        except ValueError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0]
    result: Result = box[0]
    return result


# ------------------------------------------------------------------------------------------------ classification


def view_of(task: Any, evaluation: str) -> ViewSpec:
    """How a task that classifies sees held-out samples.

    Raises:
        ValueError: It does not classify.
    """
    if not hasattr(task, "logits"):
        raise ValueError(
            f"evaluation {evaluation} needs a task that classifies images, not {type(task).__name__}; remove it from"
            " `evals`, or use the task classify"
        )
    view: ViewSpec = task.view_spec(train=False)
    return view


def image_size_of(task: Any, evaluation: str) -> tuple[int, int]:
    """Rows and columns that a task classifies.

    Raises:
        ValueError: It does not classify images.
    """
    view = view_of(task, evaluation)
    if view.clip is not None:
        raise ValueError(
            f"evaluation {evaluation} has images, but this model classifies videos; remove it from `evals`"
        )
    return view.image_size


OFFICIAL_CROP = CropConfig(kind="center", hflip=0.0, crop_pct=1.0)
"""Of all published evaluations of EVA models: shorter side to the input size, centre, bicubic."""


def own_crop(task: Any, loaders: Mapping[str, Any]) -> CropConfig:
    """How a model's held-out images are cut: as those of its run, as its weights want it, or as the official ones."""
    identity = getattr(loaders.get("val"), "identity", None)
    if identity is not None:
        return CropConfig.model_validate(identity["crop"])
    crop: CropConfig = getattr(task, "crop", OFFICIAL_CROP)
    return crop


def check_classes(task: Any, num_classes: int, evaluation: str) -> None:
    """Compare the classes of a task with those of some images.

    Raises:
        ValueError: Their numbers differ.
    """
    if (known := len(task.class_names)) != num_classes:
        raise ValueError(
            f"evaluation {evaluation} has images of {num_classes:,} classes, but the model tells {known:,} apart;"
            " evaluate a model for these classes, or other images"
        )


class OwnImages(ComponentConfig):
    """Keys of an evaluation that reads images of its own."""

    batch_size: int = Field(32, gt=0, description="of own images, per forward pass and process")
    num_workers: int | Literal["auto"] = "auto"
    max_broken: float = Field(0.01, ge=0, le=1, description="share of files that may be unreadable")

    def loader(
        self, source: Source, view: ViewSpec | tuple[int, int], crop: CropConfig, tokenizer: Any = None
    ) -> EvalLoader:
        """This process's share of a source, in a view or images of a size: over all processes each comes once.

        Labels stay the source's own, also where two classes have one name (ImageNet's two missiles).
        """
        rank, world_size = _process()
        return EvalLoader(
            Mixture([source], [1.0], class_names_of(source)),
            ViewSpec(view, tokenizer=tokenizer) if isinstance(view, tuple) else view, crop,
            batch_size=self.batch_size, rank=rank, world_size=world_size,
            num_workers=resolve_workers(self.num_workers), max_broken=self.max_broken,
        )  # fmt: skip


class Accuracy(NamedTuple):
    """Counts over all images of all processes; `loss` is their mean cross-entropy with the first label."""

    num_images: int
    top1: int
    top5: int
    loss: float


class Tally:
    """Counts how often one of an image's labels is the first, or among the first five, of a classifier's answers."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, logits_BV: Float[Tensor, "B V"], labels_BL: Int[Tensor, "B L"]) -> None:
        """Count a batch.

        Args:
            logits_BV: Answers; with fewer than five classes all of them are among the first five.
            labels_BL: Labels that count as right, on any device; -1 fills up. Images without any are left out.
        """
        logits_BV, labels_BL = logits_BV.float(), labels_BL.to(logits_BV.device, non_blocking=True)
        counts_B = (labels_BL >= 0).any(1)
        best_BK = logits_BV.topk(min(5, logits_BV.shape[1])).indices
        hit_BK = (best_BK[:, :, None] == labels_BL[:, None, :]).any(2)
        loss_B = F.cross_entropy(logits_BV, labels_BL[:, 0].clamp(min=0), reduction="none")
        sums_4 = torch.stack([counts_B, hit_BK[:, 0] & counts_B, hit_BK.any(1) & counts_B, loss_B * counts_B]).double()
        self._sums.append(sums_4.sum(1))  # stays on the device: nobody waits for it

    def result(self) -> Accuracy:
        """What all processes counted together (collective)."""
        sums_4 = torch.stack([part.cpu() for part in self._sums]).sum(0) if self._sums else torch.zeros(4).double()
        num_images, top1, top5, loss = sum_over_processes(sums_4).tolist()
        return Accuracy(round(num_images), round(top1), round(top5), loss / max(num_images, 1))


def held_out_accuracy(task: Any, loader: Iterable[dict[str, Any]], num_classes: int) -> dict[str, float]:
    """Accuracies (shares) and loss of a task that classifies, each image counted once (collective).

    `top1`, `top5` (more than five classes), `mean_class_accuracy`, `held_out_loss`; with two classes, `auc`.
    """
    device = next(task.parameters()).device
    answers = ((task.logits(batch["image"].to(device)), batch["label"].to(device)) for batch in loader)
    found = accuracy_of(answers, num_classes, device)
    metrics = {"top1": found.top1, "held_out_loss": found.loss}
    if num_classes > 5:
        metrics["top5"] = found.top5
    metrics["mean_class_accuracy"] = found.mean_class
    return metrics if found.auc is None else {**metrics, "auc": found.auc}


class Accuracies(NamedTuple):
    """Over all images with a label of all processes; shares.

    Attributes:
        num_images: That were counted.
        top1: The label is the first answer.
        top5: It is among the first five.
        mean_class: Mean of the classes' own shares, over those that have images.
        loss: Mean cross-entropy.
        auc: Area under the curve, of two classes that both have images.
    """

    num_images: int
    top1: float
    top5: float
    mean_class: float
    loss: float
    auc: float | None = None


@torch.no_grad()
def accuracy_of(
    answers: Iterable[tuple[Float[Tensor, "B V"], Int[Tensor, "B"]]], num_classes: int, device: torch.device
) -> Accuracies:
    """How right a classifier's answers are, each image counted once (collective).

    Args:
        answers: Logits and labels of this process's batches, on `device`; -1 = no label.
        num_classes: V.
        device: Where to count.
    """
    tally = Tally()
    right_V, count_V = (torch.zeros(num_classes, device=device) for _ in range(2))
    scores = [torch.empty(0, 2)]
    for logits_BV, label_B in answers:
        tally.add(logits_BV, label_B[:, None])
        known_B, row_B = (label_B >= 0).float(), label_B.clamp(min=0)
        right_V.index_add_(0, row_B, (logits_BV.argmax(1) == label_B).float())
        count_V.index_add_(0, row_B, known_B)
        if num_classes == 2:
            score_B2 = torch.stack([logits_BV[:, 1] - logits_BV[:, 0], label_B.float()], dim=1)
            scores.append(score_B2[label_B >= 0].cpu())
    found = tally.result()
    seen_V = sum_over_processes(count_V)
    per_class_V = sum_over_processes(right_V) / seen_V
    auc = None
    if num_classes == 2:
        gathered = torch.cat(gather_over_processes(torch.cat(scores))).numpy()
        if len(np.unique(gathered[:, 1])) == 2:
            auc = float(roc_auc_score(gathered[:, 1], gathered[:, 0]))
    number = max(found.num_images, 1)
    mean_class = per_class_V[seen_V > 0].mean().item() if found.num_images else 0.0
    return Accuracies(found.num_images, found.top1 / number, found.top5 / number, mean_class, found.loss, auc)


# ------------------------------------------------------------------------------------------------ images and texts


class EncodedImages(NamedTuple):
    """This process's share of some images as a model of images and texts sees them.

    Attributes:
        features: On the CPU, of length 1.
        labels: -1 = none.
        numbers: Of the samples.
        captions: Of each image; empty lists where they are not read.
        broken: Name -> reason of what could not be read.
    """

    features: Float[Tensor, "B E"]
    labels: Int[Tensor, "B"]
    numbers: Int[Tensor, "B"]
    captions: list[list[str]]
    broken: dict[str, str]


def encode_images(task: Any, loader: Iterable[dict[str, Any]]) -> EncodedImages:
    """Features of the images of this process's share of a loader; within `shared_features`, once for all who ask."""
    shared = _shared.get()
    return _encode_images(task, loader) if shared is None else shared.get(_encode_images, task, loader)


@torch.no_grad()
def _encode_images(task: Any, loader: Iterable[dict[str, Any]]) -> EncodedImages:
    none = torch.empty(0, dtype=torch.int64)  # a process may have no image
    features, labels, indices = [torch.empty(0, task.model.embed_dim)], [none], [none]
    captions: list[list[str]] = []
    for batch in loader:
        features.append(_encode_batch(task, batch["image"]).cpu())
        labels.append(batch["label"].cpu())
        indices.append(batch["index"].cpu())
        captions += batch.get("captions") or [[] for _ in batch["label"]]
    broken = dict(getattr(loader, "broken", {}))
    return EncodedImages(torch.cat(features), torch.cat(labels), torch.cat(indices), captions, broken)


def _encode_batch(task: Any, image: Tensor) -> Float[Tensor, "B E"]:
    """Features of images, or of the frames of each video on average, of length 1."""
    if image.ndim == 4:
        return F.normalize(task.encode_image(image).float(), dim=-1)
    frame_BTE = F.normalize(task.encode_image(image.flatten(0, 1)).float(), dim=-1).unflatten(0, image.shape[:2])
    return F.normalize(frame_BTE.mean(1), dim=-1)


def text_task(task: Any, evaluation: str) -> Any:
    """The task, where it encodes images and texts.

    Raises:
        ValueError: It does not.
    """
    if not (hasattr(task, "encode_text") and hasattr(task, "encode_image")):
        raise ValueError(
            f"evaluation {evaluation} needs a model of images and texts (CLIP), not {type(task).__name__}; remove it"
            " from `evals`, or use the task clip"
        )
    return task
