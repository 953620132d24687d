"""Image to patch tokens.

image[B,3,Y,X] -> non-overlapping patches -> linear -> x[B,N,D]

Source: spec section 1.1 of EVA-01: a convolution whose kernel is its stride, with a bias.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to D channels, in raster order."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, image_BCYX: Float[Tensor, "B C Y X"], visible_BM: Int[Tensor, "B M"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Embed all patches, or those of the index `visible_BM` in its order.

        The convolution is written as one matrix product: faster in reduced precision, and easy for compilers. In fp32 a
        CPU takes half its time for the convolution itself.
        """
        on_cpu = image_BCYX.device.type == "cpu" and image_BCYX.dtype == torch.float32
        if on_cpu and visible_BM is None and not torch.is_autocast_enabled("cpu"):
            return self.proj(image_BCYX).flatten(2).transpose(1, 2)
        patch = self.proj.kernel_size[0]
        rows = image_BCYX.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C y p x q
        flat_BNF = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        if visible_BM is not None:
            flat_BNF = flat_BNF.take_along_dim(visible_BM[:, :, None], dim=1)
        return F.linear(flat_BNF, self.proj.weight.flatten(1), self.proj.bias)
