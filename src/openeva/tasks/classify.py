"""Image classification: fine-tuning, intermediate fine-tuning, linear and attentive probes.

batch -> normalise -> backbone -> pooling -> classifier -> cross-entropy; held out: top-1, top-5, per class, AUC

Paper: EVA section 3.1. Source: spec sections 1.4, 1.9, 4 and 7. Deliberate differences: held-out images are counted
once each, on however many processes; the held-out loss is a mean over images, not over batches; accuracies are shares.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.backbones.vit import architecture_to_fine_tune
from openeva.checkpoints.load import LoadReport, Weights, check_unseen, load_into, read_weights
from openeva.checkpoints.native import model_path
from openeva.config import Backbone as BackboneField
from openeva.config import ConfigError
from openeva.data.erasing import ErasingConfig
from openeva.data.labels import balanced_weights, classes_in_short
from openeva.data.loader import EvalLoader
from openeva.data.mixture import Mixture, Streams, label_problems
from openeva.data.mixup import MixupConfig
from openeva.data.views import ViewSpec, normalise
from openeva.engine.distributed import unwrap
from openeva.evals.base import encode_all, held_out_accuracy, once, own_share
from openeva.evals.linear_probe import StoredProbe, probe_problems
from openeva.heads.classifier import HEAD_SCALE, ImageClassifier, Pooling, over_views
from openeva.layers.flops import training_passes
from openeva.tasks.base import Batch, Task, TaskConfig

HEAD = ("backbone.norm", "fc_norm", "attention_pool", "classifier")
"""Parts that start anew where the weights to start from lack them, or have them for other classes."""


class Config(TaskConfig):
    """Classification with any backbone; the classes are those of the data."""

    name: str = "classify"
    backbone: BackboneField = Field(
        description="the image encoder; with init_from, keys that are left out are those of the weights"
    )
    num_classes: int | Literal["auto"] = Field("auto", description="auto = as many as the data has")
    class_names: list[str] | None = Field(None, description="by label; those of the data when left out")
    pooling: Pooling = Field("mean", description="what is classified: mean of the patches, cls, or attentive pooling")
    batch_norm: bool = Field(False, description="non-affine batch norm before the linear layer, as in linear probing")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    mixup: MixupConfig = Field(MixupConfig(), description="mixing of the images of a batch; needs an even micro-batch")
    erasing: ErasingConfig = Field(ErasingConfig(), description="random erasing")
    class_weights: Literal["none", "balanced"] | list[float] = Field(
        "none", description="weight of a sample by its class: balanced = inversely to how many training samples it has"
    )
    init_from: str | None = Field(
        None, description="run, model folder, official name or file whose weights to start from"
    )
    init_head: bool = Field(True, description="take over its classifier too, where it is for the same classes")
    head_scale: float = Field(
        HEAD_SCALE,
        gt=0,
        description="weights of a fresh classifier have the deviation 0.02 times this; the official 0.001 leaves nearly"
        " no gradient to the backbone at first: small models that do not come off chance may want 1 to 5",
    )
    probe_first: bool = Field(
        False,
        description="start the classifier as a logistic regression on the frozen features of the training images"
        " instead of at zero, so that few labels do not first distort them; for data that fit into memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_backbone(cls, values: Any) -> Any:
        """Fill in the architecture from the weights, and leave the final norm to the pooling (spec section 1.4)."""
        if not isinstance(values, dict):
            return values
        backbone = values.get("backbone", {"name": "vit"} if values.get("init_from") else None)
        backbone = {"name": backbone} if isinstance(backbone, str) else backbone
        if not isinstance(backbone, dict) or backbone.get("name") != "vit":
            return values
        if isinstance(values.get("init_from"), str) and not {"variant", "width", "weights"} & set(backbone):
            backbone = {
                **architecture_to_fine_tune(values["init_from"], backbone.get("num_heads"), values.get("init_frames")),
                **backbone,
            }
        norm = values.get("pooling", "mean") != "mean"
        return {**values, "backbone": {"final_norm": norm, "init": "classifier", **backbone}}

    @model_validator(mode="after")
    def _several_classes(self) -> "Config":
        if self.name == "classify" and getattr(self.backbone, "num_frames", None) is not None:
            raise ValueError("a model of clips is for task video; set task.name=video, or num_frames: null")
        if self.num_classes != "auto" and self.num_classes < 2:
            raise ValueError(f"num_classes {self.num_classes}: a classifier needs two classes or more")
        if self.probe_first and (self.pooling == "attention" or self.batch_norm):
            raise ValueError("probe_first is for a linear classifier on mean or cls pooling, without batch_norm")
        return self

    def fit_to(self, train: Mixture | Streams, val: Mixture | None) -> "Config":
        """With the classes of the data and, where they should be balanced, the weights of the classes.

        Raises:
            ConfigError: The data has no labels, fewer than two classes or more than `num_classes`, or its parts do not
                agree on them.
        """
        found = train.num_classes
        num_classes = found if self.num_classes == "auto" else self.num_classes
        problems = label_problems(train, val) + (probe_problems(train) if self.probe_first else [])
        if found > num_classes:
            problems.append(f"data.train has {found} classes, but task.num_classes is {num_classes}; set it to auto")
        for key, given in (("class_names", self.class_names), ("class_weights", self.class_weights)):
            if isinstance(given, list) and len(given) != num_classes:
                problems.append(f"task.{key} has {len(given)} entries for {num_classes} classes")
        if problems:
            raise ConfigError(problems)
        names = self.class_names or [*train.class_names, *(str(number) for number in range(found, num_classes))]
        weights: Any = self.class_weights
        if weights == "balanced":
            if isinstance(train, Streams):
                raise ConfigError(["task.class_weights: classes of a stream cannot be counted; give a list, or none"])
            weights = balanced_weights(train.labels(), np.repeat(train.weights, train.lengths), num_classes)
        return self.model_copy(update={"num_classes": num_classes, "class_names": names, "class_weights": weights})

    def build(self) -> "ClassifyTask":
        """Make the model.

        Raises:
            ValueError: The number of classes is not known, or the weights do not fit.
        """
        return ClassifyTask(self)


class ClassifyTask(Task):
    """Classifier, augmentation on the device, and loss.

    Attributes:
        class_names: By label.
        load_report: What became of the weights it starts from.
    """

    config: Config
    class_weight_V: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.num_classes == "auto":
            raise ValueError("task.num_classes is auto, which only a run with its data can tell; give the number")
        self.config, self.num_classes = config, config.num_classes
        self.class_names = config.class_names or [str(number) for number in range(config.num_classes)]
        backbone: Backbone = config.backbone.build()
        self.trainable = ImageClassifier(
            backbone, config.num_classes, pooling=config.pooling, batch_norm=config.batch_norm,
            head_scale=config.head_scale,
        )  # fmt: skip
        self.mixup = config.mixup.build()
        weights = config.class_weights if isinstance(config.class_weights, list) else None
        self.register_buffer("class_weight_V", None if weights is None else torch.tensor(weights), persistent=False)
        self.load_report: LoadReport | None = None
        if config.init_from is not None:
            self.load_report = self._start_from(config.init_from)

    def weights_to_start_from(self, address: str) -> Weights:
        """What `init_from` names."""
        return read_weights(model_path(address))

    def _start_from(self, address: str) -> LoadReport:
        weights = self.weights_to_start_from(address)
        check_unseen(self.config.backbone, weights, f"init_from {address}")
        task: Any = weights.config.get("task") or {}
        names, why = task.get("class_names"), ""
        if not self.config.init_head:
            why = "left fresh as asked (task.init_head=false)"
        elif names is not None and names != self.class_names:
            why = "it is for other classes"
        dropped = [key for key in weights.state_dict if why and key.startswith("classifier.")]
        for key in dropped:
            del weights.state_dict[key]
        report = load_into(self.classifier, weights, fresh=HEAD, grid=getattr(self.backbone, "token_grid", None))
        report.dropped |= dict.fromkeys(dropped, why)
        return report

    @property
    def classifier(self) -> ImageClassifier:
        """What learns, without the wrapper of data-parallel training."""
        return cast("ImageClassifier", unwrap(self.trainable))

    @property
    def backbone(self) -> Backbone:
        """The image encoder."""
        return self.classifier.backbone

    def view_spec(self, *, train: bool) -> ViewSpec:
        """Images of the backbone's size."""
        return ViewSpec(self.backbone.image_size, mean=self.backbone.normalisation.mean)

    def prepare(self, images: Iterable[Batch], folder: Path, progress: Callable[[int], None] | None = None) -> None:
        """Start the classifier as a logistic regression where the recipe asks for it (`probe_first`)."""
        if not self.config.probe_first:
            return
        start = StoredProbe(
            folder / "probe.safetensors", images=getattr(images, "identity", None), init_from=self.config.init_from,
            classes=self.class_names, pooling=self.config.pooling,
        )  # fmt: skip
        if not once(start.is_there):
            self.eval()
            seen = encode_all(self.classifier.pool, self.backbone, own_share(cast("EvalLoader", images)), progress)
            self.train()
            once(lambda: start.fit(*seen, balanced=self.class_weight_V is not None))
        start.copy_into(cast("nn.Linear", self.classifier.classifier))

    def check_batch(self, size: int) -> None:
        """Images that are mixed are mixed in pairs."""
        self.mixup.check(size)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of a batch, and the share of right answers where images are not mixed."""
        statistics, target = self.backbone.normalisation, batch["label"]
        image_BCYX = normalise(batch["image"], statistics.mean, statistics.std)
        if self.training:
            image_BCYX = self.config.erasing(image_BCYX)
            if self.config.mixup.active:
                image_BCYX, target = self.mixup(image_BCYX, target, self.num_classes, self.config.smoothing)
        logits_BV = self.trainable(image_BCYX)
        loss = self.loss(logits_BV, target)
        if target.is_floating_point():
            return loss, {}
        return loss, {"accuracy": (logits_BV.detach().argmax(1) == target).float().mean()}

    def loss(
        self, logits_BV: Float[Tensor, "B V"], target: Int[Tensor, "B"] | Float[Tensor, "B V"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy by spec section 4: with soft targets as they are, with labels smoothed.

        Class weights scale whole samples, so that smoothing and mixing keep their meaning, and the mean is over the
        number of samples, so that micro-batches and processes count alike.
        """
        logits_BV = logits_BV.float()
        smoothing = 0.0 if target.is_floating_point() else self.config.smoothing
        loss_B = F.cross_entropy(logits_BV, target, label_smoothing=smoothing, reduction="none")
        if self.class_weight_V is not None:
            weighted = target @ self.class_weight_V if target.is_floating_point() else self.class_weight_V[target]
            loss_B = loss_B * weighted
        return loss_B.mean()

    def logits(self, image_BCYX: UInt8[Tensor, "B *views C Y X"]) -> Float[Tensor, "B V"]:
        """Logits of images or clips as the loader gives them, not normalised; of several views, over all of them."""
        statistics = self.backbone.normalisation
        return over_views(lambda x: self.trainable(normalise(x, statistics.mean, statistics.std)).float(), image_BCYX)

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """As `held_out_accuracy` (collective)."""
        self.classifier.share_batch_norm_statistics()
        return held_out_accuracy(self, loader, self.num_classes)

    def flops_per_sample(self) -> float:
        """Three forward passes of what learns; one of a frozen backbone."""
        return training_passes(self.backbone) * self.backbone.flops() + 6.0 * self.backbone.width * self.num_classes

    def identity(self) -> dict[str, Any]:
        """A checkpoint continues only with the same classes."""
        return {"classes": classes_in_short(self.class_names)}
