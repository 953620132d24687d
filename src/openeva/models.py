"""Models by name, and trained ones from disk, in one line each."""

import fnmatch
from typing import Any

from openeva.backbones.vit import VARIANTS, Config, VisionTransformer
from openeva.config import validate


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, by wildcard."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def create_model(name: str, *, weights: str | None = None, **overrides: Any) -> VisionTransformer:
    """A vision transformer of the EVA family.

    Args:
        name: A variant such as "eva_b_16".
        weights: Run, model folder, or official file to load; positions and patch kernels are resized where needed.
            The model's
            `load_report` tells what became of every tensor.
        **overrides: Any key of the transformer's config, such as `image_size=336` or `patch_size=16`.

    Raises:
        ConfigError: Unknown name or key, or values that do not fit together.
        ValueError: The weights do not fit.
    """
    return validate(Config, {"variant": name, "weights": weights, **overrides}, where=name).build()


def load_checkpoint(path: str, **overrides: Any) -> VisionTransformer:
    """The trained backbone of a run, a model folder or an official file, in evaluation mode.

    Args:
        path: For example "runs/demo"; what the file says decides the architecture.
        **overrides: Keys to change, such as `image_size=336`.

    Raises:
        WeightsError: Nothing there.
        ValueError: Damaged, or not weights of such a transformer.
    """
    return validate(Config, {"weights": path, **overrides}, where=path).build().eval()
