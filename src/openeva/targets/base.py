"""The target contract: what a masked patch should predict, and the loss for it.

A file in this folder holds one target: `class Config(ComponentConfig)` whose `build(grid)` returns a `Target`; `grid`
is the student's patch grid `(y, x)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from openeva.backbones.base import Normalisation


@dataclass(frozen=True)
class View:
    """Which copy of the crop a target wants: side lengths in pixels and normalisation."""

    image_size: tuple[int, int]
    normalisation: Normalisation


@runtime_checkable
class Images(Protocol):
    """What a target that must look at the training images first is given (`data/loader.py`'s `EvalLoader`).

    Attributes:
        num_samples: Number of images.
    """

    num_samples: int

    @property
    def identity(self) -> dict[str, Any]:
        """What the pixels depend on, as JSON values."""
        ...

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches as the loader makes them."""
        ...

    def part(self, *, limit: int | None = None, rank: int = 0, world_size: int = 1) -> "Images":
        """The same views of some of the images: of `limit` ones from anywhere, the share of one process."""
        ...


class Target(nn.Module):
    """What to predict at masked patches.

    Attributes:
        view: The view of the crop that `forward` takes.
        width: V, length of one target vector.
        identity: Says what is predicted, down to the teacher's weights; stored in checkpoints and compared on resume.
    """

    view: View
    width: int
    identity: str

    def forward(self, image_BCYX: Shaped[Tensor, "B C Y X"]) -> Float[Tensor, "B N V"]:
        """Targets of all patches of normalised images of `view.image_size`, without gradient, in fp32."""
        raise NotImplementedError

    def loss(
        self,
        predicted_MV: Float[Tensor, "M V"],
        target_MV: Float[Tensor, "M V"],
        weight_M: Float[Tensor, "M"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss over the masked patches of a batch; rows of weight 0 (padding) do not count."""
        raise NotImplementedError

    def speed_up(self, *, compile_forward: bool) -> None:
        """Make `forward` faster, with the same result up to rounding; called once, on the device, before training."""

    def flops(self) -> float:
        """FLOPs that one image costs the target (a teacher's forward pass; 0 for pixels)."""
        return 0.0
