"""What can be known about a released weight file; the rows are in `pretrained.py` and `released_clip.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EVA = "BAAI/EVA"
LAION = "LAION-400M"

Kind = Literal["mim", "in21k", "in1k", "probe", "clip", "video"]
"""What the weights are: pre-trained; fine-tuned on ImageNet-21K or -1K; a linear probe; a CLIP or its image tower; a
classifier of videos."""


@dataclass(frozen=True)
class Accuracy:
    """A published accuracy, in percent.

    Attributes:
        top1: Share of images whose first answer is right.
        top5: Share of images with the right answer among five; None where it was not published.
    """

    top1: float
    top5: float | None = None


Published = Mapping[str, Accuracy]
"""Benchmark -> accuracy. Benchmarks: imagenet_1k, imagenet_v2, imagenet_real, imagenet_a, imagenet_r, imagenet_sketch,
objectnet; of videos kinetics_722, kinetics_400, kinetics_600, kinetics_700."""


@dataclass(frozen=True)
class PretrainedWeights:
    """What is known about a released weight file.

    Attributes:
        name: Stem of the official file.
        kind: What the weights are.
        variant: Architecture of the image tower, a name in `VARIANTS` of `backbones/vit.py`.
        image_size: Pixels of the side.
        num_parameters: Of the model in the file, its head included, fixed tables excluded; None where not known.
        data: Data sets, in the order of training.
        teacher: Whose features masked pre-training predicted.
        file: Official file within `repository`.
        repository: On the Hugging Face hub; None where the file is not published.
        timm: timm's names for the same weights.
        overrides: Keys of the architecture that differ from the variant.
        num_classes: Of the classifier; None without one.
        predict_width: Channels that the pre-training head predicts; None without one.
        pooling: In front of the classifier; None without one.
        batch_norm: A batch norm stands in front of the linear layer.
        averaged: The published accuracy is that of the averaged weights, under `model_ema` where a file has both.
        published: Accuracies by benchmark, of the official README or log; those of a CLIP are zero-shot, those of
            videos are of 4 clips x 3 crops.
        statistics: Mean and deviation of the input, by name.
        crop_pct: Share of the resized shorter side that the evaluation crop keeps.
        interpolation: Of the evaluation.
        licence: Of the weights.
        clip: Both towers, a name in `CLIP_VARIANTS` of `heads/clip.py`; None where there is no text tower.
        open_clip: open_clip's "name:tag" for the same weights.
        started_from: Of a CLIP: (image tower, text tower) before training.
        retrieval: Published recalls in percent, such as "coco_t2i_r5" (text to image, among five).
        note: What else must be known.
    """

    name: str
    kind: Kind
    variant: str
    image_size: int
    num_parameters: int | None
    data: str
    teacher: str
    file: str
    repository: str | None = EVA
    timm: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    predict_width: int | None = None
    pooling: Literal["mean", "cls"] | None = None
    batch_norm: bool = False
    averaged: bool = False
    published: Published = field(default_factory=dict)
    statistics: Literal["clip", "imagenet", "half"] = "clip"
    crop_pct: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    licence: str | None = "MIT"
    clip: str | None = None
    open_clip: str | None = None
    started_from: tuple[str, str] | None = None
    retrieval: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def source(self) -> str:
        """Where the file is, for people."""
        return f"{self.repository}: {self.file}" if self.repository else "not published; give a local file"

    @property
    def task(self) -> str:
        """What they can do, for people."""
        if self.clip is not None:
            return "CLIP, zero-shot"
        return {
            "mim": "pre-trained",
            "in21k": "IN-21K",
            "in1k": "IN-1K",
            "probe": "IN-1K probe",
            "clip": "CLIP tower",
            "video": "video actions",
        }[self.kind]
