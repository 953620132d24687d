"""Losses of pairs: each image should be most like its own text among all texts of the batch, and the other way round.

features of length 1 of this process's pairs -> all processes' features, gathered differentiably -> logits of own rows
-> InfoNCE (CLIP), or the sigmoid loss (SigLIP)

Paper: CLIP (arXiv 2103.00020) section 2.3; SigLIP (arXiv 2303.15343) section 2. Source: spec section 2.1, the mode of
every published recipe: own rows against all columns (`local_loss`), through a gather whose backward pass sums a
feature's gradients over all processes (`gather_with_grad`). Data-parallel training then averages parameters' gradients
over processes, which gives those of the whole batch in one process. The other three modes give the same or a wrong
gradient at a higher or the same cost, and do not exist here. Deliberate differences: logits are fp32 under autocast
too; the logit of a pair is the product of its two features, so that what the loss keeps for the backward pass is one
matrix per direction, and one in all where there is a single process.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all processes in their order; backward sums what all processes want of a row."""

    @staticmethod
    def forward(ctx: Any, own_BE: Tensor) -> Tensor:
        all_GE = own_BE.new_empty(dist.get_world_size() * len(own_BE), own_BE.shape[1])
        dist.all_gather_into_tensor(all_GE, own_BE.contiguous())
        return all_GE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient_GE,) = gradients
        own_BE = gradient_GE.new_empty(len(gradient_GE) // dist.get_world_size(), gradient_GE.shape[1])
        dist.reduce_scatter_tensor(own_BE, gradient_GE.contiguous())
        return own_BE


def gather_rows(own_BE: Float[Tensor, "B E"]) -> Float[Tensor, "G E"]:
    """Rows of all processes, which must have equally many, in the order of the processes (collective).

    Its backward pass is collective too, and sums a row's gradients over all processes.
    """
    return _Gather.apply(own_BE) if _num_processes() > 1 else own_BE  # type: ignore[no-any-return,no-untyped-call]


class Contrast(NamedTuple):
    """A loss and the logits that it saw.

    Attributes:
        loss: Mean over own pairs.
        to_texts_BG: Logits of own images with all texts.
        to_images_BG: Logits of own texts with all images; None where the loss needs none.
    """

    loss: Float[Tensor, ""]
    to_texts_BG: Float[Tensor, "B G"]
    to_images_BG: Float[Tensor, "B G"] | None

    def accuracies(self) -> dict[str, Tensor]:
        """Shares of own images and texts whose own partner is the most alike of all; after a loss that gathered."""
        first = dist.get_rank() * len(self.to_texts_BG) if _num_processes() > 1 else 0
        partner_B = torch.arange(first, first + len(self.to_texts_BG), device=self.to_texts_BG.device)
        directions = {"accuracy_i2t": self.to_texts_BG, "accuracy_t2i": self.to_images_BG}
        return {
            name: (logits_BG.detach().argmax(1) == partner_B).float().mean()
            for name, logits_BG in directions.items()
            if logits_BG is not None
        }


Others = tuple[Float[Tensor, "G E"], Float[Tensor, "G E"]]
"""Images and texts that own rows are compared with."""


def info_nce(
    image_BE: Float[Tensor, "B E"],
    text_BE: Float[Tensor, "B E"],
    scale_1: Float[Tensor, "1"],
    *,
    smoothing: float = 0.0,
    others: Others | None = None,
) -> Contrast:
    """Mean over own pairs of the cross-entropies image -> all texts and text -> all images, halved.

    The mean over processes is the loss of the whole batch.

    Args:
        image_BE: Features of length 1; row i belongs to row i of the texts. All processes have equally many.
        text_BE: The same of the texts.
        scale_1: What products of features are multiplied with: exp(logit_scale).
        smoothing: Label smoothing over all columns.
        others: All images and texts, own ones included; those of all processes when None (collective then).
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        image_GE, text_GE = others or _of_all_processes(image_BE, text_BE)
        scaled_image_BE, scaled_text_BE = scale_1 * image_BE, scale_1 * text_BE
        to_texts_BG = scaled_image_BE @ text_GE.T
        to_images_BG = to_texts_BG.T if image_GE is image_BE else scaled_text_BE @ image_GE.T
        right_B = (scaled_image_BE * text_BE).sum(1)
        # means over both directions
        wanted_B = (1 - smoothing) * right_B
        if smoothing:
            means_B = scaled_image_BE @ text_GE.mean(0) + scaled_text_BE @ image_GE.mean(0)
            wanted_B = wanted_B + smoothing / 2 * means_B
        loss_B = (to_texts_BG.logsumexp(1) + to_images_BG.logsumexp(1)) / 2 - wanted_B
        return Contrast(loss_B.mean(), to_texts_BG, to_images_BG)


def sigmoid_loss(
    image_BE: Float[Tensor, "B E"],
    text_BE: Float[Tensor, "B E"],
    scale_1: Float[Tensor, "1"],
    bias_1: Float[Tensor, "1"],
    *,
    others: Others | None = None,
) -> Contrast:
    """Whether they belong together, asked of each own image with each text: a sum over texts, a mean over own images.

    The mean over processes is the loss of the whole batch.

    Args:
        image_BE: Features of length 1, as in `info_nce`.
        text_BE: The same of the texts.
        scale_1: As in `info_nce`.
        bias_1: Added to the logits; negative, as wrong pairs are far more than right ones.
        others: As in `info_nce`.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        text_GE = gather_rows(text_BE) if others is None else others[1]
        scaled_BE = scale_1 * image_BE
        logits_BG = scaled_BE @ text_GE.T + bias_1
        right_B = (scaled_BE * text_BE).sum(1) + bias_1
        # -log sigmoid(x) = softplus(x) - x for the right one, -log sigmoid(-x) = softplus(x) for the others
        return Contrast((F.softplus(logits_BG).sum(1) - right_B).mean(), logits_BG, None)


def _of_all_processes(image_BE: Tensor, text_BE: Tensor) -> Others:
    """Both kinds of features in one exchange."""
    if _num_processes() == 1:
        return image_BE, text_BE
    image_GE, text_GE = gather_rows(torch.cat([image_BE, text_BE], dim=1)).chunk(2, dim=1)
    return image_GE, text_GE


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
