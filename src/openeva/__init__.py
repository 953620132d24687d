"""openeva: EVA (arXiv 2211.07636) as a tool.

model = openeva.create_model("eva_s_16")           # a fresh transformer
model = openeva.create_model("eva_g_14", weights="eva_21k_1k_336px_psz14_ema_89p6")  # a released classifier
model = openeva.load_checkpoint("runs/demo")       # what a run trained
features = model(images)                           # .pooled [B, D], .patches [B, N, D]; a classifier gives logits
view = openeva.transforms_for(model).evaluate(image)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openeva.models import create_model, list_models, load_checkpoint, transforms_for

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "load_checkpoint", "transforms_for"]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when they are first asked for."""
    if name in {"create_model", "list_models", "load_checkpoint", "transforms_for"}:
        from openeva import models

        return getattr(models, name)
    raise AttributeError(f"module 'openeva' has no attribute {name!r}")
