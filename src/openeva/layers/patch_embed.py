"""Image or clip to patch tokens.

image[B,3,Y,X] -> non-overlapping patches -> linear -> x[B,N,D]
clip[B,T,3,Y,X] -> tubelets of t frames, each an image of 3 t channels -> the same, time-major

Source: spec section 1.1 of EVA-01: a convolution whose kernel is its stride, with a bias; section 2.1 of video: so
too in three dimensions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to D channels, in raster order.

    Args:
        patch_size: Pixels of the side.
        width: D.
        tubelet: Frames of a patch of a clip; None = patches of images.
    """

    def __init__(self, patch_size: int, width: int, tubelet: int | None = None) -> None:
        super().__init__()
        self.patch_size, self.tubelet = patch_size, tubelet
        if tubelet is None:
            self.proj: nn.Conv2d | nn.Conv3d = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        else:
            kernel = (tubelet, patch_size, patch_size)
            self.proj = nn.Conv3d(3, width, kernel_size=kernel, stride=kernel)

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"],
        visible_BM: Int[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Embed all patches, or those of the index `visible_BM` in its order.

        The convolution is written as one matrix product: faster in reduced precision, and easy for compilers. In fp32 a
        CPU takes half its time for the convolution itself.
        """
        num_slots, weight_DCYX = 1, self.proj.weight
        if self.tubelet is not None:
            slots = image_BCYX.unflatten(1, (-1, self.tubelet))  # B slot t C Y X
            num_slots, image_BCYX = slots.shape[1], slots.flatten(0, 1).flatten(1, 2)
            weight_DCYX = weight_DCYX.transpose(1, 2).flatten(1, 2)
        on_cpu = image_BCYX.device.type == "cpu" and image_BCYX.dtype == torch.float32
        patch = self.patch_size
        if on_cpu and visible_BM is None and not torch.is_autocast_enabled("cpu"):
            x_BND = F.conv2d(image_BCYX, weight_DCYX, self.proj.bias, stride=patch).flatten(2).transpose(1, 2)
            return x_BND.unflatten(0, (-1, num_slots)).flatten(1, 2)
        rows = image_BCYX.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C y p x q
        flat_BNF = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        flat_BNF = flat_BNF.unflatten(0, (-1, num_slots)).flatten(1, 2)
        if visible_BM is not None:
            flat_BNF = flat_BNF.take_along_dim(visible_BM[:, :, None], dim=1)
        return F.linear(flat_BNF, weight_DCYX.flatten(1), self.proj.bias)
