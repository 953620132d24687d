"""The same CLIP built by openeva and by open_clip with timm's towers, and a training step of each.

The peer's step is open_clip's own function, `open_clip_train.train.train_one_epoch`, over an epoch of one batch; its
optimizer is made as open_clip's `main` makes it. `clip_step.py` and `gpu.py` time them.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CustomTextCLIP
from open_clip_train.train import train_one_epoch
from timm.models import register_model
from torch import Tensor, nn

from alternate import task_step
from openeva.config import validate
from openeva.data.views import normalise
from openeva.engine.optim import OptimConfig, build_optimizer
from openeva.engine.precision import Precision
from openeva.heads.clip import CLIP_VARIANTS
from openeva.tasks.clip import ClipTask
from openeva.tasks.clip import Config as ClipTaskConfig
from openeva.text.tokenizer import Tokenizer

OPTIM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.05, "clip_grad": 5.0}
CAPTIONS = (
    "a dog",
    "two children playing football in the rain",
    "A red double-decker bus drives past the houses of parliament on a cloudy afternoon",
    "wooden chair",
    "Fresh tomatoes, basil and mozzarella on a white plate next to a glass of wine",
    "Vintage 1967 convertible parked in front of an old gas station along Route 66",
    "portrait of a woman with a blue scarf",
    "the night sky over the desert, long exposure, with the Milky Way rising behind a lone Joshua tree",
    "A man in a grey suit is talking on his phone while he waits for the train",
    "Hand-knitted winter socks, size 38-40, wool, striped",
    "cat sleeping on a keyboard",
    "An aerial photograph of a river delta at low tide",
    "Black and white drawing of a sailing ship in a storm",
    "Living room with a green sofa, two floor lamps and a large window overlooking the garden",
    "street market in Hanoi",
    "Close-up of a honeybee collecting pollen from a purple lavender flower in early summer",
)  # fmt: skip
"""Of the kind and length that captions of pictures on the web have; they take turns in a batch."""

PEERS: dict[str, str | dict[str, Any]] = {
    "eva02_clip_b_16": "EVA02-B-16",
    "eva01_clip_g_14": "EVA01-g-14",
    "eva_clip_ti_16": {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 224, "timm_model_name": "eva_tiny_patch16_openeva_benchmark",
                       "timm_pool": "token", "timm_proj": None},
        "text_cfg": {"width": 192, "heads": 3, "layers": 6},
    },
}  # fmt: skip
"""Our variant -> the same model of open_clip: by its name, or, where it has none, in its terms."""


@register_model
def eva_tiny_patch16_openeva_benchmark(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Timm's EVA-01 class at the size of `eva_ti_16`; open_clip wants a name for it."""
    size = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}
    return timm.create_model("eva_giant_patch14_224", pretrained=pretrained, **size, **arguments)


def ours(name: str, *, checkpointing: bool = False, tiny: dict[str, Any] | None = None) -> ClipTask:
    """Our task of a variant.

    Args:
        name: In `CLIP_VARIANTS`.
        checkpointing: Activation checkpointing in both towers.
        tiny: Other dimensions of the towers, to show that everything runs.
    """
    content: dict[str, Any] = {"variant": name, "backbone": {}, "text": {}, **(tiny or {})}
    for tower in ("backbone", "text"):
        content[tower] = {**content[tower], "activation_checkpointing": checkpointing}
    return validate(ClipTaskConfig, content).build()


def open_clips(name: str, *, checkpointing: bool = False) -> CustomTextCLIP:
    """open_clip's model of the same size, as its training builds it.

    Raises:
        ValueError: It is not of the same size.
    """
    peer = PEERS[name]
    config = dict(open_clip.get_model_config(peer)) if isinstance(peer, str) else dict(peer)
    config.pop("custom_text", None)
    model = CustomTextCLIP(**config, output_dict=True)
    model.set_grad_checkpointing(checkpointing)
    return model


def same_size(own: ClipTask, peer: nn.Module) -> None:
    """Make sure that the two are the same model.

    Raises:
        ValueError: They are not.
    """
    own_count, peer_count = (sum(p.numel() for p in model.parameters()) for model in (own.trainable, peer))
    if own_count != peer_count:
        raise ValueError(f"ours has {own_count:,} parameters, open_clip's {peer_count:,}: not the same model")


def make_batch(size: int, image_size: tuple[int, int], context_length: int, *, padded: bool) -> dict[str, Tensor]:
    """Images of noise as bytes `image` and captions as token ids `text`, as our loader gives them."""
    generator = torch.Generator().manual_seed(0)
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(size)]
    return {
        "image": torch.randint(0, 256, (size, 3, *image_size), generator=generator, dtype=torch.uint8),
        "text": Tokenizer(context_length)(captions, padded=padded),
    }


def our_step(task: ClipTask, batch: dict[str, Tensor], precision: Precision) -> Callable[[], Tensor]:
    """A step as our loop does it, from bytes."""
    task.train()
    optimizer = build_optimizer(
        task.trainable, OptimConfig(**OPTIM), no_decay=task.backbone.no_weight_decay(),
        num_layers=task.backbone.num_layers, towers=task.towers,
    )  # fmt: skip
    return task_step(task, batch, optimizer, precision, OPTIM["clip_grad"])


def open_clip_step(
    model: CustomTextCLIP, batch: dict[str, Tensor], device: torch.device, precision: str
) -> Callable[[], None]:
    """A step as open_clip does it: its tokenizer's rows of 77, its loss, its loop.

    Args:
        model: On the device.
        batch: From `make_batch`; its images are normalised beforehand, which open_clip does in its workers.
        device: Where it runs.
        precision: "fp32", "bf16" or "fp16", all with fp32 weights.
    """
    image_BCYX = normalise(batch["image"], open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    loader = _OneBatch(image_BCYX.to(device), batch["text"].to(device))
    names = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}
    arguments = SimpleNamespace(
        device=str(device), precision=names[precision], distill=False, accum_freq=1, skip_scheduler=True,
        horovod=False, grad_clip_norm=OPTIM["clip_grad"], rank=0, local_rank=0, log_local=False, world_size=1,
        log_every_n_steps=100, batch_size=len(image_BCYX), wandb=False,
    )  # fmt: skip
    optimizer = _open_clip_optimizer(model)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    data, loss = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}, open_clip.ClipLoss()

    def step() -> None:
        train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, arguments)

    return step


class _OneBatch:
    """A loader of open_clip's kind with a single batch."""

    num_batches = 1

    def __init__(self, image_BCYX: Tensor, text_BL: Tensor) -> None:
        self.batch, self.num_samples = (image_BCYX, text_BL), len(image_BCYX)

    def __iter__(self):
        yield self.batch


def _open_clip_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups, as open_clip's `main` makes it (it stands in the middle of that function)."""
    small, rest = [], []
    for name, parameter in model.named_parameters():
        no_decay = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        (small if no_decay else rest).append(parameter)
    groups = [{"params": small, "weight_decay": 0.0}, {"params": rest, "weight_decay": OPTIM["weight_decay"]}]
    return torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=OPTIM["betas"], eps=OPTIM["eps"])


def flops(task: ClipTask, length: int) -> float:
    """FLOPs of one pair in a training step: three forward passes of both towers, texts of `length` tokens."""
    model = task.model
    return 3 * (model.backbone.flops() + model.text.flops(length))


def variants() -> list[str]:
    """Our variants that open_clip has too."""
    return [name for name in CLIP_VARIANTS if name in PEERS]
