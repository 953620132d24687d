"""openeva: EVA (arXiv 2211.07636) as a tool.

model = openeva.create_model("eva_s_16")           # a fresh transformer
model = openeva.load_checkpoint("runs/demo")       # the trained backbone of a run
features = model(images)                           # .pooled [B, D], .patches [B, N, D]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openeva.models import create_model, list_models, load_checkpoint

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when they are first asked for."""
    if name in {"create_model", "list_models", "load_checkpoint"}:
        from openeva import models

        return getattr(models, name)
    raise AttributeError(f"module 'openeva' has no attribute {name!r}")
