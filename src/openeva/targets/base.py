"""The target contract: what a masked patch should predict, and the loss for it.

A file in this folder holds one target: `class Config(ComponentConfig)` whose `build(grid)` returns a `Target`; `grid`
is the student's patch grid `(y, x)`.
"""

from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from openeva.backbones.base import Normalisation


@dataclass(frozen=True)
class View:
    """Which copy of the crop a target wants: side lengths in pixels and normalisation."""

    image_size: tuple[int, int]
    normalisation: Normalisation


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

    def flops(self) -> float:
        """FLOPs that one image costs the target (a teacher's forward pass; 0 for pixels)."""
        return 0.0
