"""openeva: EVA (arXiv 2211.07636) as a tool.

model = openeva.create_model("eva_s_16")           # a fresh transformer
model = openeva.load_checkpoint("runs/demo")       # the trained model of a run
features = model(images)                           # .pooled [B, D], .patches [B, N, D]
openeva.predict("photo.jpg", weights=NAME)         # classes of an image; openeva.features for embeddings
openeva.Index("photos").search("a dog on a beach") # images by text or image, after .update()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openeva.export import export_model
    from openeva.hub import push_to_hub
    from openeva.inference import Index, Predictor, features, predict
    from openeva.models import create_model, list_models, load_checkpoint, transforms_for

__version__ = "0.1.0"
__all__ = [
    "Index", "Predictor", "__version__", "create_model", "export_model", "features", "list_models", "load_checkpoint",
    "predict", "push_to_hub", "transforms_for",
]  # fmt: skip

_HOMES = {
    "create_model": "models", "list_models": "models", "load_checkpoint": "models", "transforms_for": "models",
    "predict": "inference", "features": "inference", "Predictor": "inference", "Index": "inference",
    "export_model": "export", "push_to_hub": "hub",
}  # fmt: skip
"""Public name -> module that it lives in."""


def __getattr__(name: str) -> Any:
    """Import torch and the models only when they are first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"openeva.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'openeva' has no attribute {name!r}")
