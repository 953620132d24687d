"""What the pictures show: a run's model brought back and asked about a few dozen held-out images.

run folder -> task with the run's weights -> images, masks, predictions, features -> `Look` (arrays on the CPU)

The nearest images are found by cosine of the student's pooled features, the whole image visible. The colours of the
feature maps come from one principal component analysis per model over all shown images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from openeva.backbones.base import Features
from openeva.checkpoints.load import load_into, read_model
from openeva.checkpoints.native import is_complete
from openeva.config import ComponentConfig
from openeva.data.loader import EvalLoader
from openeva.data.mixture import HELD_OUT, Mixture, Streams
from openeva.data.views import normalise
from openeva.engine.distributed import World
from openeva.engine.loop import to_device
from openeva.engine.state import Checkpoints
from openeva.evals.masked_cosine import masks_of, predict_patches
from openeva.tasks.base import TaskConfig
from openeva.tasks.pretrain import PretrainTask
from openeva.train import Recipe, prepare
from openeva.tune import apply_tuning

LOOKED_AT = 96
"""Held-out images whose predictions are judged; the worst patches are found among them."""
GALLERY = 512
"""Training images among which the nearest ones are found."""
NUM_NEIGHBOURS = 5
BATCH = 16

Progress = Callable[[int, int], None]
"""Called with the number of images done and of images in all."""


Pixels = NDArray[np.uint8]
Colours = NDArray[np.float32]


class NoPicturesError(ValueError):
    """Why a run's report has no pictures."""


@dataclass(frozen=True)
class Neighbour:
    """An image that the student finds similar.

    Attributes:
        image: Its pixels, `[Y, X, 3]`.
        cosine: Of the pooled features.
        same_label: None where the images have no labels.
    """

    image: Pixels
    cosine: float
    same_label: bool | None


@dataclass(frozen=True)
class Shown:
    """One image and what was predicted for it.

    Attributes:
        name: Where it came from.
        image: Pixels `[Y, X, 3]`, as the larger of the two inputs (student, teacher).
        mask: `[y, x]`, true = hidden.
        cosine: `[y, x]`, prediction against target, hidden or not.
        target: `[y, x, 3]` in 0..1: the target's main components as colours.
        prediction: The same components of the prediction.
        features: `[y, x, 3]` in 0..1: main components of the student's own features, the whole image visible.
        neighbours: Most similar first.
    """

    name: str
    image: Pixels
    mask: NDArray[np.bool_]
    cosine: NDArray[np.float32]
    target: Colours
    prediction: Colours
    features: Colours
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Worst:
    """The hidden patch of an image that was predicted worst: its image, its place `(row, column)` and cosine."""

    name: str
    image: Pixels
    mask: NDArray[np.bool_]
    place: tuple[int, int]
    cosine: float


@dataclass(frozen=True)
class Look:
    """Everything that the pictures need.

    Attributes:
        source: Which weights these are, in words.
        held_out: True = the images are held-out ones, false = the run has none and training images are shown.
        num_parameters: Of what learns.
        num_train: Training images, None for streams.
        num_held_out: Held-out images, None where there are none.
        shown: The images in full.
        worst: Worst first, one per image.
        cosines: Of all hidden patches of all images looked at.
        num_images: Images looked at.
        num_gallery: Images among which neighbours were sought.
    """

    source: str
    held_out: bool
    num_parameters: int
    num_train: int | None
    num_held_out: int | None
    shown: list[Shown]
    worst: list[Worst]
    cosines: NDArray[np.float32]
    num_images: int
    num_gallery: int


@torch.no_grad()
def look(run: Path, recipe: Recipe, *, num_images: int, num_worst: int, progress: Progress | None = None) -> Look:
    """Bring the model back and collect what the pictures show.

    Args:
        run: The run's folder.
        recipe: Its recipe.
        num_images: Images to show in full.
        num_worst: Worst patches to show, from one image each.
        progress: See `Progress`.

    Raises:
        NoPicturesError: There are no weights yet, or the task does not predict patches.
        ConfigError: The teacher's weights cannot be reached.
        ValueError: Weights or data do not fit the recipe.
        OSError: The data cannot be found.
    """
    task, source = bring_back(run, recipe)
    train, held_out = recipe.data.open(kept=run / HELD_OUT)
    prepare(recipe.model_copy(update={"task": task.config}), task, train, World(0, 1, _device(task)), None)
    data = train if held_out is None else held_out
    if isinstance(data, Streams):
        raise NoPicturesError("it has no held-out images, and its training images come from streams in no fixed order")
    gallery = train if isinstance(train, Mixture) else data
    loader, gallery_loader = _loader(task, recipe, data, LOOKED_AT), _loader(task, recipe, gallery, GALLERY)
    count = _Count(progress, loader.num_samples + gallery_loader.num_samples)

    seen = _predict(task, loader, count)
    candidates = _pool(task, gallery_loader, count)
    chosen = evenly_spread(len(seen.image), num_images)
    target_BNC, prediction_BNC, features_BNC = _colours(seen, chosen)
    rows, columns = task.grid
    shown = [
        Shown(
            name=data.read(int(seen.index[i])).name,
            image=_pixels(seen.image[i]),
            mask=seen.mask[i].view(rows, columns).numpy(),
            cosine=seen.cosine[i].view(rows, columns).numpy(),
            target=target_BNC[k].reshape(rows, columns, 3),
            prediction=prediction_BNC[k].reshape(rows, columns, 3),
            features=features_BNC[k].reshape(rows, columns, 3),
            neighbours=_neighbours(seen, i, candidates, same_images=gallery is data),
        )
        for k, i in enumerate(chosen)
    ]
    return Look(
        source=source,
        held_out=held_out is not None,
        num_parameters=sum(p.numel() for p in task.trainable.parameters() if p.requires_grad),
        num_train=len(train) if isinstance(train, Mixture) else None,
        num_held_out=None if held_out is None else len(held_out),
        shown=shown,
        worst=_worst(seen, data, task.grid, num_worst),
        cosines=seen.cosine[seen.mask].numpy(),
        num_images=len(seen.image),
        num_gallery=len(candidates.image),
    )


def bring_back(run: Path, recipe: Recipe) -> tuple[PretrainTask, str]:
    """The task in eval mode with the run's weights, and which weights these are: the exported or the newest saved ones.

    What only training needs is left out: initial weights from elsewhere, which would be overwritten, and the cache of
    target features, which would be made anew where it is gone.

    Raises:
        NoPicturesError: As `look`.
        ValueError: The weights do not fit the recipe.
    """
    checkpoints = Checkpoints(run / "checkpoints", {})
    exported = run / "model"
    finished = is_complete(exported)
    if not finished and not checkpoints.steps():
        raise NoPicturesError("it has not saved any weights yet")
    config = recipe.task
    if isinstance(config, TaskConfig):  # cannot be built without the data
        raise NoPicturesError(f"its task {config.name!r} does not predict patches")
    partly = not finished and recipe.tune.mode != "all"  # then the checkpoint holds only what was trained
    if "init_from" in type(config).model_fields and not partly:
        config = config.model_copy(update={"init_from": None})
    target = getattr(config, "target", None)
    if isinstance(target, ComponentConfig) and "cache" in type(target).model_fields:
        config = config.model_copy(update={"target": target.model_copy(update={"cache": False})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)  # as the run did: a teacher may have random weights
        task = config.build()
    if not isinstance(task, PretrainTask):
        raise NoPicturesError(f"its task {config.name!r} does not predict patches")
    if finished:
        load_into(task.trainable, read_model(exported)[0])
        source = "the finished model"
    else:
        step = checkpoints.steps()[-1]
        apply_tuning(recipe.tune, task)
        part, tensors = task.trained_part, get_model_state_dict(task.trainable)
        state = {"model": {name: value for name, value in tensors.items() if part is None or name in part.names}}
        load_tensors(state, checkpoint_id=checkpoints.path(step), no_dist=True)
        task.trainable.load_state_dict(tensors | state["model"])
        source = f"the checkpoint of step {step:,}"
    return task.to("cuda" if torch.cuda.is_available() else "cpu").eval(), source


def evenly_spread(length: int, number: int) -> list[int]:
    """At most so many positions in a sequence, first and last among them."""
    chosen: list[int] = np.unique(np.linspace(0, length - 1, number).round().astype(int)).tolist()
    return chosen


def _device(task: PretrainTask) -> torch.device:
    return next(task.parameters()).device


def _loader(task: PretrainTask, recipe: Recipe, data: Mixture, limit: int) -> EvalLoader:
    return EvalLoader(
        data, task.view_spec(train=False), recipe.data.val_crop, batch_size=BATCH, limit=limit,
        max_broken=recipe.data.max_broken,
    )  # fmt: skip


class _Count:
    """Adds up the images of several loaders."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, number: int) -> None:
        self.done += number
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class _Pooled:
    """Images and what the student makes of each as a whole."""

    image: UInt8[Tensor, "B 3 Y X"]
    index: Int[Tensor, "B"]
    label: Int[Tensor, "B"]
    pooled: Float[Tensor, "B D"]


@dataclass(frozen=True)
class _Seen(_Pooled):
    """The same with masks, targets and predictions."""

    mask: Bool[Tensor, "B N"]
    target: Float[Tensor, "B N V"]
    prediction: Float[Tensor, "B N V"]
    features: Float[Tensor, "B N D"]

    @cached_property
    def cosine(self) -> Float[Tensor, "B N"]:
        return F.cosine_similarity(self.prediction, self.target, dim=-1)


def _batches(task: PretrainTask, loader: EvalLoader, count: _Count) -> Iterator[dict[str, Any]]:
    for batch in loader:
        yield to_device(batch, _device(task))
        count.add(len(batch["index"]))


def _encode(task: PretrainTask, batch: dict[str, Any]) -> Features:
    statistics = task.backbone.normalisation
    return task.backbone(normalise(batch["image"], statistics.mean, statistics.std))


def _best_pixels(batch: dict[str, Any]) -> UInt8[Tensor, "B 3 Y X"]:
    """The larger of the student's and the teacher's view of the same crop."""
    views = [batch["image"], batch.get("target_image", batch["image"])]
    return max(views, key=lambda view: view.shape[-1])


def _pool(task: PretrainTask, loader: EvalLoader, count: _Count) -> _Pooled:
    parts = [
        [_best_pixels(batch), batch["index"], batch["label"], _encode(task, batch).pooled.float()]
        for batch in _batches(task, loader, count)
    ]
    return _Pooled(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _predict(task: PretrainTask, loader: EvalLoader, count: _Count) -> _Seen:
    parts = []
    for batch in _batches(task, loader, count):
        mask_BN = masks_of(task, batch["index"], seed=0).to(_device(task))
        features = _encode(task, batch)
        parts.append([
            _best_pixels(batch), batch["index"], batch["label"], features.pooled.float(), mask_BN, task.targets(batch),
            predict_patches(task, batch, mask_BN).float(), features.patches.float(),
        ])  # fmt: skip
    if not parts:
        raise NoPicturesError("none of its images can be read")
    return _Seen(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _pixels(image_CYX: UInt8[Tensor, "3 Y X"]) -> Pixels:
    return image_CYX.permute(1, 2, 0).numpy()


def _colours(seen: _Seen, chosen: list[int]) -> tuple[Colours, Colours, Colours]:
    """Main components of target, prediction and student features as colours, `[B, N, 3]` in 0..1.

    Directions only, since the loss sees no lengths. The prediction is shown in the target's components; the student's
    own components are turned so that their colours agree with the target's as well as a rotation allows.
    """
    target, prediction, features = (
        F.normalize(part[chosen], dim=-1).numpy() for part in (seen.target, seen.prediction, seen.features)
    )
    shape = (*target.shape[:2], 3)
    pca = PCA(3, whiten=True, random_state=0).fit(target.reshape(-1, target.shape[2]))
    target_M3, prediction_M3 = (pca.transform(part.reshape(-1, part.shape[2])) for part in (target, prediction))
    features_M3 = PCA(3, whiten=True, random_state=0).fit_transform(features.reshape(-1, features.shape[2]))
    features_M3 = features_M3 @ orthogonal_procrustes(features_M3, target_M3)[0]

    def scaled(values_M3: Any, like_M3: Any) -> Colours:
        low_3, high_3 = np.percentile(like_M3, [2, 98], axis=0)
        return ((values_M3 - low_3) / np.maximum(high_3 - low_3, 1e-6)).clip(0, 1).astype(np.float32).reshape(shape)

    return scaled(target_M3, target_M3), scaled(prediction_M3, target_M3), scaled(features_M3, features_M3)


def _neighbours(seen: _Seen, i: int, candidates: _Pooled, *, same_images: bool) -> list[Neighbour]:
    cosine_B = F.cosine_similarity(seen.pooled[i], candidates.pooled, dim=-1)
    if same_images:
        cosine_B = cosine_B.masked_fill(candidates.index == seen.index[i], -torch.inf)
    best = cosine_B.topk(min(NUM_NEIGHBOURS, int(cosine_B.isfinite().sum()))).indices.tolist()
    label = int(seen.label[i])
    return [
        Neighbour(
            _pixels(candidates.image[j]), cosine_B[j].item(), None if label < 0 else label == int(candidates.label[j])
        )
        for j in best
    ]


def _worst(seen: _Seen, data: Mixture, grid: tuple[int, int], number: int) -> list[Worst]:
    """Of each image the hidden patch with the lowest cosine; the lowest of these."""
    hidden_BN = seen.cosine.masked_fill(~seen.mask, torch.inf)
    lowest_B, patch_B = hidden_BN.min(dim=1)
    order = lowest_B.argsort()[:number].tolist()
    return [
        Worst(
            data.read(int(seen.index[i])).name, _pixels(seen.image[i]), seen.mask[i].view(grid).numpy(),
            (int(patch_B[i]) // grid[1], int(patch_B[i]) % grid[1]), lowest_B[i].item(),
        )
        for i in order
    ]  # fmt: skip
