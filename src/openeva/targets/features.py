"""The features of any frozen backbone as the target: CLIP, EVA-CLIP, DINO, a ConvNet, an openeva checkpoint.

view of the crop -> teacher (no gradient, reduced precision) -> patches -> fp32 -> student's grid -> [standardised]
with `cache`: training images -> the same, once per image and flip -> memory-mapped fp16 file -> `lookup`

Paper: EVA section 2.1 (the target is not normalised). Source: spec sections 2.1 to 2.3. Differences: bf16 where the
hardware has it instead of fp16; standardising each channel (for teachers whose channels differ much in scale) and
caching (for fixed crops) are ours.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from openeva.backbones.base import STATISTICS, Backbone
from openeva.checkpoints.files import write_atomically
from openeva.checkpoints.weights import digest_of_weights
from openeva.config import Backbone as BackboneField
from openeva.config import ComponentConfig
from openeva.data.batches import Batch
from openeva.data.feature_cache import CacheWriter, FeatureCache, bytes_needed, check_space, finish, is_complete
from openeva.data.views import normalise, target_pixels
from openeva.engine.distributed import barrier
from openeva.engine.precision import DTYPES, PrecisionName, resolve_precision
from openeva.losses.cosine import negative_cosine
from openeva.targets.base import Images, Target, View

FINGERPRINT_IMAGES = 8
"""So many images, from anywhere in the data set, are looked at to tell whether a cache is of the same pixels."""


class Config(ComponentConfig):
    """Predict a frozen teacher's features."""

    name: str = "features"
    teacher: BackboneField = Field(
        description="any backbone; whether its patches are projected is the teacher's own key"
    )
    layer: int | None = Field(
        None, description="layer of the teacher (negative from the end); default: the teacher's own output"
    )
    image_size: int | None = Field(None, description="pixels of the teacher's input; default: the teacher's own")
    resize: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="how features come to the student's grid where the teacher's differs; antialiased"
    )
    standardise: bool = Field(
        False, description="true = each channel gets mean 0 and deviation 1 over the training images"
    )
    standardise_images: int = Field(512, ge=1, description="images that the statistics are estimated on")
    cache: bool = Field(False, description="true = compute each training image's features once; needs fixed crops")
    precision: PrecisionName = Field("auto", description="of the teacher's forward pass")

    def build(self, grid: tuple[int, int]) -> "FeatureTarget":
        """Make the target for a student with this patch grid.

        Raises:
            WeightsError: The teacher's weights cannot be reached.
            ValueError: The teacher has no such layer or cannot take this image size.
        """
        return FeatureTarget(self, grid)


class FeatureTarget(Target):
    """A frozen teacher.

    Attributes:
        teacher: The backbone, always in eval mode.
        grid: The student's patch grid, to which features are resized.
        needs_preparation: True where `prepare` must see the training images before the first use.
    """

    mean_V: Tensor
    std_V: Tensor

    def __init__(self, config: Config, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        teacher = config.teacher
        if config.image_size is not None:
            teacher = type(teacher).model_validate({**teacher.model_dump(), "image_size": config.image_size})
        self.teacher: Backbone = teacher.build().eval().requires_grad_(False)
        if self.teacher.num_frames is not None:
            raise ValueError("the teacher in task.target.teacher sees clips; pre-training needs one that sees images")
        self.view = View(self.teacher.image_size, self.teacher.normalisation)
        self.layer = None if config.layer is None else config.layer % self.teacher.num_layers
        self.width = self._width()
        self._features_identity = self._identify()
        self.identity = self._features_identity + (", standardised" if config.standardise else "")
        self.needs_preparation = config.standardise or config.cache
        self._cache: FeatureCache | None = None
        self.register_buffer("mean_V", torch.zeros(self.width))
        self.register_buffer("std_V", torch.ones(self.width))

    @property
    def cached(self) -> bool:
        """True once `prepare` has made the cache; from then on `lookup` replaces the teacher on training images."""
        return self._cache is not None

    def _identify(self) -> str:
        """What `_features` depends on: the teacher, its input, its layer and the way to the student's grid."""
        teacher, config = self.teacher, self.config
        weights = teacher.identity
        if getattr(config.teacher, "weights", teacher) is None:  # freshly drawn ones, which no file tells
            weights += f"/random-{digest_of_weights(teacher)}"
        rows, columns = teacher.image_size
        known = [name for name, statistics in STATISTICS.items() if statistics == teacher.normalisation]
        parts = [weights, f"{rows} x {columns} px", f"{known[0] if known else teacher.normalisation} statistics"]
        if self.layer is not None:
            parts.append(f"layer {self.layer}")
        if config.resize != "bilinear":
            parts.append(config.resize)
        return ", ".join(parts)

    def _width(self) -> int:
        if self.layer is None:
            return self.teacher.width
        with torch.inference_mode():
            return (
                self.teacher(torch.zeros(1, 3, *self.view.image_size), layers=(self.layer,))
                .pyramid[self.layer]
                .shape[1]
            )

    def train(self, mode: bool = True) -> "FeatureTarget":
        """Training mode of everything but the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, image_BCYX: Shaped[Tensor, "B C Y X"]) -> Float[Tensor, "B N V"]:
        """Features of all patches of the student's grid, in fp32."""
        return self._standardise(self._features(image_BCYX))

    @torch.no_grad()
    def _features(self, image_BCYX: Shaped[Tensor, "B C Y X"]) -> Float[Tensor, "B N V"]:
        device = image_BCYX.device
        precision = resolve_precision(self.config.precision, device)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            features = self.teacher(image_BCYX, layers=() if self.layer is None else (self.layer,))
        if self.layer is None:
            map_BVyx = features.patches.float().transpose(1, 2).unflatten(2, features.grid)
        else:
            map_BVyx = features.pyramid[self.layer].float()
        if map_BVyx.shape[2:] != self.grid:
            map_BVyx = F.interpolate(map_BVyx, self.grid, mode=self.config.resize, antialias=True, align_corners=False)
        return map_BVyx.flatten(2).transpose(1, 2)

    def _standardise(self, target_BNV: Float[Tensor, "B N V"]) -> Float[Tensor, "B N V"]:
        return (target_BNV - self.mean_V) / self.std_V if self.config.standardise else target_BNV

    def loss(
        self,
        predicted_MV: Float[Tensor, "M V"],
        target_MV: Float[Tensor, "M V"],
        weight_M: Float[Tensor, "M"] | None = None,
    ) -> Float[Tensor, ""]:
        """Minus the mean cosine over the masked patches of the batch, in fp32."""
        return negative_cosine(predicted_MV, target_MV, weight_M)

    def speed_up(self, *, compile_forward: bool) -> None:
        """Store the teacher's large weights as its forward pass on a GPU reads them, and compile it where asked for."""
        precision = resolve_precision(self.config.precision, self.mean_V.device)
        if self.mean_V.is_cuda and precision != "fp32":
            store_reduced(self.teacher, DTYPES[precision])
        if compile_forward:
            self.teacher.compile()

    def flops(self) -> float:
        """FLOPs of the teacher for one image; 0 when its features are cached."""
        return 0.0 if self.cached else self.teacher.flops()

    def cache_bytes(self, num_images: int) -> int:
        """Size on disk that caching the features of this many images takes."""
        return bytes_needed(num_images, self.grid[0] * self.grid[1], self.width)

    def prepare(self, images: Images, folder: Path, progress: Callable[[int], None] | None = None) -> None:
        """Make or re-use what the recipe asks for: the cache of features, the statistics of the channels (collective).

        Args:
            images: Each training sample once, cut as in training and never mirrored; every process gives the same
                loader, and they share the work.
            folder: Where they are kept, and found again by a continued run.
            progress: Called with the number of further images done.

        Raises:
            ValueError: The folder holds those of another teacher, crop or data; the disk is too small; an image is
                mirrored.
        """
        report = progress or (lambda num_images: None)
        if self.config.cache:
            self._cache = self._open_cache(images, folder / "features", report)
        if self.config.standardise:
            self._load_statistics(images, folder / "statistics.json", report)

    def lookup(self, index_B: Int[Tensor, "B"], flip_B: Bool[Tensor, "B"]) -> Float[Tensor, "B N V"]:
        """What `forward` gives for these training samples, mirrored where `flip_B`, from the cache (rounded to fp16).

        Args:
            index_B: Numbers of the samples, on the host: nothing here waits for the device.
            flip_B: Which of them are mirrored, on the host too.

        Raises:
            ValueError: There is no cache (see `prepare`), or it lacks a sample.
        """
        if self._cache is None:
            raise ValueError("there are no cached features: set cache: true and call prepare() first")
        size = (len(index_B), self.grid[0] * self.grid[1], self.width)
        found_BNV = torch.empty(size, dtype=torch.float16, pin_memory=self.mean_V.is_cuda)
        self._cache.lookup(index_B.numpy(), flip_B.numpy(), out_BNV=found_BNV.numpy())
        return self._standardise(found_BNV.to(self.mean_V.device, non_blocking=True).float())

    def _of_batch(self, batch: Batch, *, flip: bool = False) -> Float[Tensor, "B N V"]:
        """Features of a batch of bytes, not standardised."""
        if batch["flip"].any():
            raise ValueError("features are prepared from images as they are: set hflip to 0 in the crop of this loader")
        image_BCYX = target_pixels(batch).to(self.mean_V.device, non_blocking=True)
        view = self.view.normalisation
        return self._features(normalise(image_BCYX.flip(-1) if flip else image_BCYX, view.mean, view.std))

    def _open_cache(self, images: Images, folder: Path, report: Callable[[int], None]) -> FeatureCache:
        key = {
            "teacher": self._features_identity, "grid": list(self.grid), "num_images": images.num_samples,
            **images.identity, "pixels": _fingerprint(images),
        }  # fmt: skip
        complete = is_complete(folder, key)
        barrier()  # all have looked before one begins to write
        if not complete:
            check_space(folder, self.cache_bytes(images.num_samples))
            rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            with CacheWriter(folder, rank, size, self.grid[0] * self.grid[1], self.width) as writer:
                for batch in images.part(rank=rank, world_size=size):
                    both_B2NV = torch.stack([self._of_batch(batch), self._of_batch(batch, flip=True)], dim=1)
                    writer.append(batch["index"].numpy(), both_B2NV.cpu().numpy())
                    report(len(batch["index"]) * size)  # the others are about as far
            barrier()
            if rank == 0:
                finish(folder, key, size)
            barrier()
        return FeatureCache(folder)

    def _load_statistics(self, images: Images, file: Path, report: Callable[[int], None]) -> None:
        if not file.is_file() and not (dist.is_initialized() and dist.get_rank()):
            mean_V, std_V = _mean_and_std(self._sample(images, report))
            content = {"target": self.identity, "mean": mean_V.tolist(), "std": std_V.tolist()}
            write_atomically(file, lambda path: _write_json(path, content))
        barrier()
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["target"] != self.identity:
            raise ValueError(
                f"{file} holds the statistics of another teacher ({content['target']}, now {self.identity}); "
                "delete it or choose another run.out"
            )
        self.mean_V.copy_(torch.tensor(content["mean"]))
        self.std_V.copy_(torch.tensor(content["std"]))

    def _sample(self, images: Images, report: Callable[[int], None]) -> Iterator[Float[Tensor, "B N V"]]:
        """Features of `standardise_images` images from all over the data set, which may be sorted by class."""
        wanted = self.config.standardise_images
        if self._cache is not None:
            samples = self._cache.samples
            spread = np.linspace(0, len(samples) - 1, min(wanted, len(samples))).round().astype(np.int64)
            for index_B in np.array_split(samples[spread], -(-len(spread) // 64)):
                yield torch.from_numpy(self._cache.lookup(index_B, np.zeros(len(index_B), bool))).float()
            return
        for batch in images.part(limit=wanted):
            yield self._of_batch(batch)
            report(len(batch["index"]))


def store_reduced(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that autocast would cast at each use; it remembers its casts only of weights that learn."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _mean_and_std(features: Iterable[Float[Tensor, "B N V"]]) -> tuple[Float[Tensor, "V"], Float[Tensor, "V"]]:
    """Mean and standard deviation of each channel over all patches; a channel that never changes gets deviation 1."""
    count, total_V, squares_V = 0, torch.zeros(()), torch.zeros(())
    for features_BNV in features:
        tokens_MV = features_BNV.flatten(0, 1).double().cpu()
        count, total_V, squares_V = (
            count + len(tokens_MV),
            total_V + tokens_MV.sum(0),
            squares_V + tokens_MV.square().sum(0),
        )
    mean_V = total_V / count
    std_V = (squares_V / count - mean_V.square()).clamp_min(0).sqrt()
    constant_V = std_V <= 1e-6 * squares_V.div(count).sqrt()
    return mean_V, torch.where(constant_V, 1.0, std_V)


def _fingerprint(images: Images) -> str:
    """Digest of some images as the teacher will see them: tells changed files that keep their names."""
    digest = hashlib.sha256()
    for batch in images.part(limit=FINGERPRINT_IMAGES):
        digest.update(batch["index"].numpy().tobytes() + target_pixels(batch).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
