"""Where a classifier looks: one number per patch.

normalised images or clips -> forward pass, watched -> `HeatMaps`: attention (what the model mixes) or relevance (what
speaks for a class)

Attention is that of the last layer of attention, mean of its heads: of the query that pools (the cls token, or the
query of an attentive head) where one does; for mean pooling, which has none, the mean over all patches. Relevance is
gradient x activation of a class's logit, where patches last differ in what they contribute: the backbone's output for
mean and attentive pooling, the input of the last block for cls pooling. Only its positive part is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from openeva.backbones.base import Features
from openeva.heads.classifier import ImageClassifier
from openeva.inference.texts import TextClassifier

MapKind = Literal["attention", "relevance"]


@dataclass(frozen=True)
class HeatMaps:
    """Maps of a batch.

    Attributes:
        values: Not below 0; only their ratio within an image or clip means something. Of clips `[B, slots, y, x]`.
        meaning: What they are, in words.
    """

    values: Float[Tensor, "B *slots y x"]
    meaning: str


class _LastAttention(TorchFunctionMode):
    """Keeps queries, keys and mask of the last call of fused attention: whatever the model did to them is in them."""

    call: tuple[Tensor, Tensor, Tensor | None, float] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            scale = given.get("scale") or given["query"].shape[-1] ** -0.5
            self.call = given["query"], given["key"], given.get("attn_mask"), scale
        return func(*args, **kwargs)

    def over_keys(self, num_patches: int, *, of_cls: bool) -> Float[Tensor, "B S"]:
        """Attention weights of that call, mean over heads and queries.

        Heads pass one after the other: all weights between the thousands of patches of a clip would fill the memory.

        Args:
            num_patches: Keys that are patches, the last ones.
            of_cls: Of the first query, else of all patches.

        Raises:
            ValueError: The model never called it, or not over patches.
        """
        if self.call is None:
            raise ValueError("this model has no attention that could be shown; ask for the relevance map")
        q_BHQK, k_BHSK, mask, scale = self.call
        prefix = k_BHSK.shape[2] - num_patches
        if prefix < 0:
            raise ValueError("the last attention of this model is not over patches; ask for the relevance map")
        queries = slice(0, 1) if of_cls else slice(prefix, None)
        if mask is not None:
            mask = mask.broadcast_to(*q_BHQK.shape[:3], k_BHSK.shape[2])[:, :, queries]
        total_BS = torch.zeros(1, device=q_BHQK.device)
        for head in range(q_BHQK.shape[1]):
            logits_BQS = (q_BHQK[:, head, queries].float() * scale) @ k_BHSK[:, head].float().transpose(-2, -1)
            if mask is not None:
                one = mask[:, head]
                logits_BQS = logits_BQS.masked_fill(~one, -torch.inf) if one.dtype == torch.bool else logits_BQS + one
            total_BS = total_BS + logits_BQS.softmax(dim=-1).mean(dim=1)
        return total_BS / q_BHQK.shape[1]


@torch.no_grad()
def attention_map(
    model: ImageClassifier, image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"]
) -> HeatMaps:
    """Attention to each patch in the model's last attention.

    Raises:
        ValueError: The model has no attention over patches.
    """
    if model.pooling == "attention":
        return _pooling_attention(model, model.backbone(image_BCYX))
    with _LastAttention() as watched:
        features = model.backbone(image_BCYX)
    num_patches, of_cls = features.patches.shape[1], model.pooling == "cls"
    map_BN = watched.over_keys(num_patches, of_cls=of_cls)[:, -num_patches:]
    whose = "of the cls token" if of_cls else "of all patches, mean"
    return HeatMaps(_laid_out(map_BN, model, features), f"attention {whose} (last block, mean of heads)")


def _laid_out(
    map_BN: Float[Tensor, "B N"], model: ImageClassifier, features: Features
) -> Float[Tensor, "B *slots y x"]:
    """Values of patches where they lie in an image, or in space and time."""
    slots = () if model.backbone.num_frames is None else (features.slots,)
    return map_BN.unflatten(1, (*slots, *features.grid))


def _pooling_attention(model: ImageClassifier, features: Features) -> HeatMaps:
    pool, patches_BND = model.attention_pool, features.patches
    query_B1D = pool.query.to(patches_BND.dtype).expand(len(patches_BND), -1, -1)
    _, weights_B1N = pool.attn(query_B1D, patches_BND, patches_BND, need_weights=True)
    return HeatMaps(_laid_out(weights_B1N[:, 0], model, features), "attention of the pooling query (mean of heads)")


def relevance_map(
    model: ImageClassifier,
    image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"],
    class_B: Int[Tensor, "B"],
) -> HeatMaps:
    """How much each patch speaks for a class.

    Args:
        model: In evaluation mode.
        image_BCYX: Normalised images, or clips.
        class_B: The class to explain, per image or clip.

    Raises:
        ValueError: A cls-pooled model whose blocks cannot be reached.
    """
    kept: list[Tensor] = []
    seen: list[Features] = []
    handles = [
        _cut_before_last_block(model, kept) if model.pooling == "cls" else _cut_after_backbone(model, kept),
        model.backbone.register_forward_hook(lambda _m, _i, output: seen.append(output)),
    ]
    try:
        with torch.no_grad():  # switched on again at the cut: nothing before it needs a gradient
            logits_BV = model(image_BCYX)
            chosen = logits_BV.float().gather(1, class_B[:, None]).sum()
            (gradient_BSD,) = torch.autograd.grad(chosen, kept[0])
    finally:
        for handle in handles:
            handle.remove()
    evidence_BS = (gradient_BSD.float() * kept[0].detach().float()).sum(dim=-1)
    map_BN = evidence_BS[:, -seen[0].patches.shape[1] :].clamp_min(0)
    where = "entering the last block" if model.pooling == "cls" else "leaving the backbone"
    return HeatMaps(_laid_out(map_BN, model, seen[0]), f"evidence for the class (gradient × patch tokens {where})")


def _cut_after_backbone(model: ImageClassifier, kept: list[Tensor]) -> RemovableHandle:
    def cut(_module: Any, _inputs: Any, output: Features) -> Features:
        kept.append(_leaf(output.patches))
        return replace(output, patches=kept[0])

    return model.backbone.register_forward_hook(cut)


def _cut_before_last_block(model: ImageClassifier, kept: list[Tensor]) -> RemovableHandle:
    blocks = getattr(model.backbone, "blocks", None)
    if not blocks:
        raise ValueError(f"{type(model.backbone).__name__} shows no blocks to explain; ask for the attention map")

    def cut(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(_leaf(inputs[0]))
        return (kept[0], *inputs[1:])

    return blocks[-1].register_forward_pre_hook(cut)


def _leaf(x_BSD: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    return x_BSD.detach().requires_grad_()


MAPS: dict[MapKind, Callable[..., HeatMaps]] = {
    "attention": lambda model, image_BCYX, _class_B: attention_map(model, image_BCYX),
    "relevance": relevance_map,
}


def natural_map(model: ImageClassifier) -> MapKind:
    """The kind that fits how a model pools.

    Mean pooling has no query whose attention would explain a class, and attention does not depend on the text that a
    CLIP compares with.
    """
    return "relevance" if model.pooling == "mean" or isinstance(model, TextClassifier) else "attention"
