"""Models by name, released and trained ones, and the transforms that belong to them.

name of a variant, weights -> file -> architecture, pooling and statistics that belong to it -> model, with a report of
what became of every tensor

Source: spec section 1.9 for what is taken, resized, dropped and started afresh.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openeva.backbones.base import Backbone
from openeva.backbones.vit import VARIANTS, Config, VisionTransformer
from openeva.checkpoints.clip import holds_text
from openeva.checkpoints.load import LoadReport, Weights, described_backbone, described_clip, load_into, read_weights
from openeva.checkpoints.native import WEIGHTS_FILE, model_path
from openeva.checkpoints.pretrained import TIMM, find_entry
from openeva.checkpoints.released import PretrainedWeights
from openeva.checkpoints.weights import digest_of_file
from openeva.config import ConfigError, validate
from openeva.data.loader import DataConfig
from openeva.data.transform import Transform
from openeva.data.views import CropConfig
from openeva.heads.classifier import ImageClassifier, Pooling
from openeva.heads.clip import CLIP_VARIANTS, ClipConfig, ClipModel
from openeva.text.tower import TextTower

Model = VisionTransformer | ImageClassifier | ClipModel

FRESH_HEAD = ("backbone.norm", "fc_norm", "attention_pool", "classifier")
"""What may start anew where a classifier is made of weights that hold none, or one for other classes."""
SAME_ARCHITECTURE = ("width", "depth", "mlp_hidden", "mlp")
"""Keys in which weights must agree with the variant that was asked for; the others are taken from the weights."""
SAME_TEXT_TOWER = ("width", "depth")
"""The same for the text tower of a CLIP."""
_DEFAULTS = {key: field.default for key, field in Config.model_fields.items()}
RANDAUGMENT = "rand-m9-mstd0.5-inc1"
CLIP_CROP = CropConfig(scale=(0.9, 1.0), hflip=0.0)
"""Of the official CLIP training, which neither mirrors nor changes colours."""
VIDEO_CROP = CropConfig(
    kind="multiscale", interpolation="bilinear", antialias=False, color_jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8,
    grey_prob=0.2,
)  # fmt: skip
"""Of the official training on videos."""
OFFICIAL_EVALUATION = CropConfig(kind="center", hflip=0.0, crop_pct=1.0)
"""The whole shorter side, bicubic."""


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from and what belongs to them; on loaded models as `model.origin`.

    Attributes:
        weights: As they were asked for; None without any.
        entry: Facts about released weights; None for others.
        config: Content of `config.json` of an openeva folder, else empty.
        crop: How images are cut in evaluation.
    """

    weights: str | None = None
    entry: PretrainedWeights | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    crop: CropConfig = OFFICIAL_EVALUATION


@dataclass(frozen=True)
class Transforms:
    """What makes the input of a model.

    Attributes:
        train: Random crop, mirroring, RandAugment, normalisation: that of the official fine-tuning recipes; for a CLIP
            the crop of its training alone; for a model of clips what each of their frames gets.
        evaluate: What `openeva evaluate` and `openeva predict` do with these weights.
    """

    train: Transform
    evaluate: Transform


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, by wildcard."""
    return sorted(fnmatch.filter([*VARIANTS, *CLIP_VARIANTS], pattern))


def create_model(
    name: str,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    pooling: Pooling | None = None,
    batch_norm: bool | None = None,
    **overrides: Any,
) -> Model:
    """A model of the EVA family.

    A `ClipModel` for the variants of CLIP, a classifier where the weights hold one or `num_classes` asks for it, else a
    backbone.

    Args:
        name: A variant such as "eva_g_14" or "eva02_clip_b_16" (see `list_models`), or released weights, which say what
            they are.
        weights: What to load: an official name such as "eva_21k_1k_336px_psz14_ema_89p6", timm's or open_clip's for it
            (see `openeva list --weights`), a run, a model folder or a file. Image size, pooling and normalisation are
            those of the weights. `model.load_report` tells what became of every tensor, `model.origin` what is known of
            them.
        num_classes: Of the classifier: None = that of the weights, 0 = none; any other number than the weights' starts
            a fresh one.
        pooling: "mean", "cls" or "attention"; default: the weights', or mean.
        batch_norm: Batch norm in front of a fresh linear classifier, as in linear probing; default: the weights', or
            none.
        **overrides: Any key of the transformer's config, such as `image_size=448` (positions are resized) or
            `patch_size=16`; of a CLIP also `text={...}` and `embed_dim`.

    Raises:
        ConfigError: Unknown name or key, values that do not fit together, or weights that are out of reach.
        ValueError: The weights are of another architecture, or damaged.
    """
    entry = find_entry(name) if name not in VARIANTS and weights is None else None
    if entry is not None:  # timm has the image tower of a CLIP alone
        pair = entry.clip if num_classes is None and name not in TIMM else None
        name, weights = pair or entry.variant, name
    head = _Head(num_classes, pooling, batch_norm)
    if name in CLIP_VARIANTS:
        if head != _Head(None, None, None):
            raise ConfigError(
                [
                    f"{name} classifies by texts and takes no num_classes, pooling or batch_norm; for a classifier on"
                    f" its image tower name that: create_model({_image_variant(name)!r}, ...)"
                ]
            )
        if weights is not None:
            return _load_clip(weights, name, overrides)
        return ClipModel(validate(ClipConfig, {"variant": name, **_clip_keys(overrides)}, where=name))
    if weights is not None:
        _known_variant(name)
        return _load(weights, name, head, overrides)
    content = {"variant": name, **overrides}
    if not num_classes:
        return validate(Config, content, where=name).build()
    content = {"final_norm": pooling not in {None, "mean"}, "init": "classifier", **content}
    return head.on(validate(Config, content, where=name).build(), num_classes)


def load_checkpoint(
    path: str,
    *,
    num_classes: int | None = None,
    pooling: Pooling | None = None,
    batch_norm: bool | None = None,
    **overrides: Any,
) -> Model:
    """A trained model in evaluation mode: a CLIP or classifier where the weights hold one, else the backbone.

    Args:
        path: A run such as "runs/demo", a model folder, a file, or an official name; what it says decides the
            architecture.
        num_classes: As in `create_model`; any number, also 0, takes the image tower of a CLIP alone.
        pooling: As in `create_model`.
        batch_norm: As in `create_model`.
        **overrides: As in `create_model`.

    Raises:
        WeightsError: Nothing there.
        ValueError: Damaged, or not weights of such a model.
    """
    return _load(path, None, _Head(num_classes, pooling, batch_norm), overrides).eval()


def load_text_tower(path: str) -> TextTower:
    """The text tower of a trained CLIP alone, in evaluation mode: without the larger image tower it loads at once.

    Args:
        path: As in `load_checkpoint`.

    Raises:
        WeightsError: Nothing there.
        ValueError: Damaged, or without a text tower.
    """
    weights = read_weights(model_path(path))
    config = _clip_config(path, None, {}, weights)
    tower = config.text.build(config.embed_dim)
    load_into(tower, weights, part="text")
    return tower.eval()


def transforms_for(model: Backbone | ImageClassifier | ClipModel) -> Transforms:
    """The transforms that belong to a model's weights: their image size, statistics and crop.

    For a model without weights: evaluation as for the official ones (the whole shorter side, bicubic).
    """
    backbone = model if isinstance(model, Backbone) else model.backbone
    origin = getattr(model, "origin", None) or getattr(backbone, "origin", None) or Origin()
    statistics = backbone.normalisation
    train = CropConfig(scale=(0.08, 1.0), randaugment=RANDAUGMENT)
    if isinstance(model, ClipModel):
        train = CLIP_CROP
    elif backbone.num_frames is not None:
        train = VIDEO_CROP
    return Transforms(
        train=Transform(train, backbone.image_size, statistics.mean, statistics.std),
        evaluate=Transform(origin.crop, backbone.image_size, statistics.mean, statistics.std),
    )


@dataclass(frozen=True)
class _Head:
    """What was asked for behind the backbone."""

    num_classes: int | None
    pooling: Pooling | None
    batch_norm: bool | None

    def on(self, backbone: VisionTransformer, num_classes: int) -> ImageClassifier:
        return ImageClassifier(backbone, num_classes, pooling=self.pooling or "mean", batch_norm=bool(self.batch_norm))

    def completed_by(self, found: "_Found") -> "_Head":
        """With the weights' own values where nothing was asked; their batch norm belongs to their own classifier."""
        num_classes = found.num_classes if self.num_classes is None else self.num_classes
        same = num_classes == found.num_classes
        batch_norm = (found.batch_norm and same) if self.batch_norm is None else self.batch_norm
        return _Head(num_classes, self.pooling or found.pooling, batch_norm)


@dataclass(frozen=True)
class _Found:
    """The classifier that weights hold: 0 classes for none."""

    num_classes: int
    pooling: Pooling
    batch_norm: bool


def _load(address: str, variant: str | None, head: _Head, overrides: Mapping[str, Any]) -> Model:
    path = model_path(address)
    weights = read_weights(path)
    if variant is None and head.num_classes is None and holds_text(weights.state_dict):
        return _load_clip(address, None, overrides, weights)
    found = _classifier_in(weights)
    wanted = head.completed_by(found)
    content = _architecture(address, weights, variant, overrides)
    if wanted.num_classes:
        content = {**content, **_for_classifying(content, wanted, found), **overrides}
    config = validate(Config, content, where=address)
    backbone = config.build()
    model: Model = backbone
    if wanted.num_classes:
        model = wanted.on(backbone, wanted.num_classes)
        own = wanted == _Head(found.num_classes, found.pooling, found.batch_norm)
        report = load_into(model, weights, fresh=() if own else FRESH_HEAD, grid=config.token_grid)
    else:
        report = load_into(backbone, weights, part="backbone", fresh=("backbone.mask_token",), grid=config.token_grid)
    _tell_origin(model, backbone, address, weights, report)
    return model


def _tell_origin(model: Model, backbone: Backbone, address: str, weights: Weights, report: LoadReport) -> None:
    path = weights.source
    digest = digest_of_file(path / WEIGHTS_FILE if path.is_dir() else path)
    backbone.identity = f"{backbone.identity}/{path.name}-{digest}"
    facts = {"origin": _origin(address, weights), "load_report": report}
    for part in (model, backbone):
        vars(part).update(facts)


def _for_classifying(content: Mapping[str, Any], wanted: _Head, found: _Found) -> dict[str, Any]:
    """Keys of a backbone that change where weights without such a classifier get one (spec sections 1.1 and 1.4)."""
    changes: dict[str, Any] = {}
    if not found.num_classes and content.get("positions") == "sincos":
        changes["positions"] = "learned"  # fixed while pre-training, only the start of what fine-tuning learns
    if not found.num_classes or wanted.pooling != found.pooling:
        changes["final_norm"] = wanted.pooling != "mean"
    if content.get("projection"):
        changes["projection"] = None  # to the joint space of a CLIP
    return changes


def _architecture(address: str, weights: Weights, variant: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's config: what the weights say, within the variant, with the overrides."""
    entry = weights.entry
    recorded = _recorded(weights).get("backbone") or {}
    known = variant or recorded.get("variant") or (entry.variant if entry is not None else None)
    expected = VARIANTS.get(known or "", {})
    described = described_backbone(weights, num_heads=overrides.get("num_heads", expected.get("num_heads")))
    described = {key: value for key, value in described.items() if key not in {"name", "variant"}}
    if variant is not None:
        _check_variant(address, entry, variant, {**expected, **described, **overrides}, overrides)
    return {**expected, **described, "variant": known, **overrides}


def _recorded(weights: Weights) -> dict[str, Any]:
    """The task that a run recorded, or nothing."""
    task: Any = weights.config.get("task")
    return task if isinstance(task, dict) else {}


def _check_variant(
    address: str,
    entry: PretrainedWeights | None,
    variant: str,
    described: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> None:
    """Refuse weights of another architecture than the one that was asked for, in one line."""
    if entry is not None and entry.variant != variant:
        raise ValueError(
            f"weights {address!r} are of {entry.variant}, not of {variant}; use create_model({entry.variant!r}, "
            f"weights={address!r})"
        )

    def differing(name: str) -> list[str]:
        expected = {**_DEFAULTS, **VARIANTS[name], **overrides}
        return [key for key in SAME_ARCHITECTURE if expected.get(key) != described.get(key, _DEFAULTS.get(key))]

    if other := differing(variant):
        told = ", ".join(f"{key} {described.get(key)} instead of {VARIANTS[variant].get(key)}" for key in other)
        fitting = [name for name in VARIANTS if not differing(name)]
        hint = f"they fit {' and '.join(fitting)}" if fitting else "load_checkpoint takes what the file says"
        raise ValueError(f"weights {address!r} are not of {variant}: {told}; {hint}")


def _classifier_in(weights: Weights) -> _Found:
    state_dict, task = weights.state_dict, _recorded(weights)
    linear = next((n for n in ("classifier.weight", "classifier.1.weight") if n in state_dict), None)
    num_classes = 0 if linear is None else state_dict[linear].shape[0]
    parts = {key.split(".", 1)[0] for key in state_dict}
    pooling: Pooling = "attention" if "attention_pool" in parts else "mean"
    if linear is not None and pooling == "mean" and "fc_norm" not in parts:
        pooling = "cls"
    if linear is not None and "pooling" in task:
        pooling = task["pooling"]
    return _Found(num_classes, pooling, linear == "classifier.1.weight")


def _origin(address: str, weights: Weights) -> Origin:
    crop = OFFICIAL_EVALUATION
    recorded = weights.config.get("val_crop")
    if isinstance(recorded, dict):
        crop = validate(CropConfig, recorded, where=f"val_crop of {weights.source}")
    elif weights.config and "converted_from" not in weights.config:  # of a run that did not record it
        crop = DataConfig.model_fields["val_crop"].default
    elif weights.entry is not None:
        facts: dict[str, Any] = {"crop_pct": weights.entry.crop_pct, "interpolation": weights.entry.interpolation}
        if weights.entry.kind == "video":
            facts["antialias"] = False
        crop = crop.model_copy(update=facts)
    return Origin(address, weights.entry, weights.config, crop)


# ---------------------------------------------------------------------------------------------------------- CLIP


def _load_clip(
    address: str, variant: str | None, overrides: Mapping[str, Any], weights: Weights | None = None
) -> ClipModel:
    """Both towers, of the architecture that the weights say, within the variant, with the overrides."""
    weights = weights or read_weights(model_path(address))
    config = _clip_config(address, variant, overrides, weights)
    model = ClipModel(config, bias="logit_bias" in weights.state_dict)
    report = load_into(model, weights, grid=getattr(config.backbone, "grid", None))
    _tell_origin(model, model.backbone, address, weights, report)
    return model


def _clip_config(address: str, variant: str | None, overrides: Mapping[str, Any], weights: Weights) -> ClipConfig:
    if not holds_text(weights.state_dict):
        raise ValueError(
            f"weights {address!r} hold no text tower, only {' and '.join(weights.layout.parts)}; for the image tower "
            f"alone name its variant: create_model({_image_variant(variant)!r}, weights={address!r})"
        )
    entry, task, keys = weights.entry, _recorded(weights), _clip_keys(overrides)
    known = variant or task.get("variant") or (entry.clip if entry is not None else None)
    expected = None if known is None else validate(ClipConfig, {"variant": known}, where=known)
    towers = (None, None) if expected is None else (expected.backbone, expected.text)
    image_heads, text_heads = (
        keys[name].get("num_heads", getattr(tower, "num_heads", None))
        for name, tower in zip(("backbone", "text"), towers, strict=True)
    )
    content = described_clip(weights, num_heads=image_heads, text_heads=text_heads)
    if variant is not None and expected is not None:
        _check_clip_variant(address, entry, expected, content, keys)
    content = {**content, **keys, **{tower: {**content[tower], **keys[tower]} for tower in ("backbone", "text")}}
    return validate(ClipConfig, {"variant": known, **content}, where=address)


def _clip_keys(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as a CLIP's config has them: those that are not named otherwise are of the image tower."""
    own = {key: value for key, value in overrides.items() if key in ClipConfig.model_fields}
    backbone = {key: value for key, value in overrides.items() if key not in own}
    return {**own, "backbone": {**backbone, **own.get("backbone", {})}, "text": dict(own.get("text", {}))}


def _check_clip_variant(
    address: str,
    entry: PretrainedWeights | None,
    expected: ClipConfig,
    content: Mapping[str, Any],
    keys: Mapping[str, Any],
) -> None:
    """Refuse weights of another pair of towers than the one that was asked for, in one line."""
    if entry is not None and entry.clip not in {None, expected.variant}:
        raise ValueError(
            f"weights {address!r} are of {entry.clip}, not of {expected.variant}; use create_model({entry.clip!r}, "
            f"weights={address!r})"
        )
    wanted = {"backbone": expected.backbone.model_dump(), "text": expected.text.model_dump()}
    differing = {
        f"{tower}.{key}": (content[tower].get(key, wanted[tower].get(key)), wanted[tower].get(key))
        for tower, same in (("backbone", SAME_ARCHITECTURE), ("text", SAME_TEXT_TOWER))
        for key in same
        if key not in keys[tower]
    }
    differing["embed_dim"] = (content["embed_dim"], keys.get("embed_dim", expected.embed_dim))
    told = [f"{key} {found} instead of {other}" for key, (found, other) in differing.items() if found != other]
    if told:
        raise ValueError(
            f"weights {address!r} are not of {expected.variant}: {', '.join(told)}; load_checkpoint takes what the file"
            " says"
        )


def _image_variant(clip: str | None) -> str:
    """Variant of the image tower of a pair, as far as it has a name."""
    return str(CLIP_VARIANTS.get(clip or "", {}).get("backbone", {}).get("variant", "eva_g_14"))


def _known_variant(name: str) -> None:
    if name not in VARIANTS:
        validate(Config, {"variant": name}, where=name)  # says which names there are
        raise ConfigError([f"unknown variant {name!r}"])
