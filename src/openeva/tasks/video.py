"""Video action recognition: joint space-time attention over all patches of a clip.

videos -> clips[B,T,3,Y,X] -> normalise -> backbone with a time axis -> pooling -> classifier -> cross-entropy
held out: one or several views of each video, their probabilities averaged

A clip is classified as an image is; what differs is what the loader brings and what the model may start from: an image
model (its positions repeated for each time slot, its patch kernel spread over the frames) or a video model with other
frames, resolution or classes.

Paper: EVA section 3.2. Source: spec of video, sections 2 to 5. Deliberate differences: the clips of a test are not
random; each video is counted once on however many processes; what weights hold (frames, resolution) is read from them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from openeva.checkpoints.class_map import map_by_names, read_class_map, select_classes
from openeva.checkpoints.detect import grid_of_clips
from openeva.checkpoints.load import Weights
from openeva.config import ConfigError
from openeva.data.clips import ClipSpec, ViewsConfig
from openeva.data.kinetics_classes import ALIASES
from openeva.data.labels import has_videos
from openeva.data.mixture import Mixture, Streams
from openeva.data.views import ViewSpec
from openeva.tasks.classify import ClassifyTask
from openeva.tasks.classify import Config as ClassifyConfig


class Config(ClassifyConfig):
    """Classification of videos; the frames of a clip are `backbone.num_frames`."""

    name: str = "video"
    class_map: Path | list[int] | None = Field(
        None,
        description="old class of each new one, for a classifier of other classes in init_from: a list, .json or .npy;"
        " where all new classes are among the old ones by name it is not needed",
    )
    init_frames: int | None = Field(
        None, gt=0, description="frames of the video model in init_from, where neither its file nor its name tells"
    )
    views: ViewsConfig = Field(ViewsConfig(), description="of held-out videos")

    @model_validator(mode="after")
    def _clips(self) -> "Config":
        if getattr(self.backbone, "num_frames", None) is None:
            raise ValueError("task video needs a model of clips: set task.backbone.num_frames, such as 8 or 16")
        if self.erasing.prob:
            raise ValueError("random erasing is for images: set task.erasing.prob=0")
        for key in ("class_map", "init_frames"):
            if getattr(self, key) is not None and self.init_from is None:
                raise ValueError(f"{key} speaks of the weights in init_from, which is not given")
        return self

    def fit_to(self, train: Mixture | Streams, val: Mixture | None) -> "Config":
        """As a classifier of images, with sources of videos.

        Raises:
            ConfigError: As that one, or a source has images.
        """
        parts = {"data.train": train, "data.val": val}
        problems = [
            f"{part}.{number} has no videos; task video reads them from video_folder, video_list or webdataset"
            for part, data in parts.items()
            if isinstance(data, Mixture)
            for number, source in enumerate(data.sources)
            if not has_videos(source)
        ]
        if problems:
            raise ConfigError(problems)
        fitted = super().fit_to(train, val)
        assert isinstance(fitted, Config)
        return fitted

    def build(self) -> "VideoTask":
        """Make the model.

        Raises:
            ValueError: The number of classes is not known, or the weights do not fit.
        """
        return VideoTask(self)


class VideoTask(ClassifyTask):
    """Classifier of clips, augmentation on the device, and loss."""

    config: Config

    def weights_to_start_from(self, address: str) -> Weights:
        """What `init_from` names, its classifier with the rows of the wanted classes.

        Raises:
            ValueError: The map does not fit.
        """
        weights = super().weights_to_start_from(address)
        if self.config.init_frames is not None:
            grid = grid_of_clips(weights.state_dict, self.config.init_frames)
            if grid is None or weights.grid not in {None, grid}:
                raise ValueError(f"init_frames {self.config.init_frames} does not fit the weights of {address}")
            weights = replace(weights, grid=grid)
        if not self.config.init_head:
            return weights
        if self.config.class_map is not None:
            chosen = self.config.class_map
            rows = read_class_map(chosen.expanduser()) if isinstance(chosen, Path) else chosen
            return select_classes(weights, rows, self.class_names, "by task.class_map")
        task: Any = weights.config.get("task") or {}
        rows = map_by_names(task.get("class_names") or [], self.class_names, ALIASES)
        return select_classes(weights, rows, self.class_names, "by their names") if rows else weights

    def view_spec(self, *, train: bool) -> ViewSpec:
        """Clips of the backbone's size; in training a frame of each segment by chance."""
        num_frames = self.backbone.num_frames
        assert num_frames is not None
        clip = ClipSpec(num_frames, "random") if train else self.config.views.spec(num_frames)
        return replace(super().view_spec(train=train), clip=clip)
