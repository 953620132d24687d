"""Pictures of objects on textured grounds, drawn from a seed: any index, any size, nothing on disk.

(seed, index) -> `draw_scene` (a `Scene`: what there is, in numbers) -> `render` (pixels), `captions_of` -> `Sample`.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from openeva.data.sampler import seed_of
from openeva.data.scene import COLOURS, PATTERNS, SHAPES, Scene, draw_scene, render
from openeva.data.scene_captions import PATTERN_WORDS, captions_of
from openeva.data.sources.base import Sample, SourceConfig

_CAPTION_KEY = 0x5CE7E


class Config(SourceConfig):
    """Drawn pictures.

    Attributes:
        num_images: Length of the source.
        size: Side length in pixels, or (rows, columns).
        max_objects: Each picture shows between one and this many objects.
        seed: Another seed, other pictures: take another one for held-out samples.
        captions: True = each picture comes with five texts about it, the first of which says the most. They speak of
            left and right: train on them without mirroring (`hflip: 0` of the crop).
        label: What is the class: the main object's shape, its colour (the first of two), or its pattern.
    """

    name: Literal["scenes"] = "scenes"
    num_images: int = Field(10_000, gt=0)
    size: int | tuple[int, int] = 64
    max_objects: int = Field(4, ge=1)
    seed: int = 0
    captions: bool = False
    label: Literal["shape", "colour", "pattern"] = "shape"

    def build(self) -> "Scenes":
        """Open the source."""
        return Scenes(self)


class Scenes:
    """Numbered scenes; nothing is stored.

    Attributes:
        class_names: As they stand in captions: `disc`, `red`, or `striped`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._size = (config.size, config.size) if isinstance(config.size, int) else config.size
        self.has_captions = config.captions
        names: dict[str, list[str]] = {
            "shape": [*SHAPES],
            "colour": [*COLOURS],
            "pattern": [PATTERN_WORDS[pattern] for pattern in PATTERNS],
        }
        self.class_names = names[config.label]
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return self._config.num_images

    def read(self, index: int) -> Sample:
        """The picture of this index and its label, `extra = {"scene": Scene}`, with `captions` if they are wanted."""
        scene = self._scene(index)
        extra: dict[str, Any] = {"scene": scene}
        if self.has_captions:
            extra["captions"] = captions_of(scene, seed_of(self._config.seed, index, _CAPTION_KEY))
        image = Image.fromarray(render(scene, self._size))
        return Sample(image, self.name_of(index), self._label(scene), extra)

    def name_of(self, index: int) -> str:
        """Its name, without drawing it."""
        return f"scenes/{self._config.seed}/{index}"

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every scene; the scenes are described, not drawn."""
        labels = (self._label(self._scene(index)) for index in range(len(self)))
        return np.fromiter(labels, np.int64, len(self))

    def _scene(self, index: int) -> Scene:
        return draw_scene(self._config.seed, index, self._config.max_objects)

    def _label(self, scene: Scene) -> int:
        main = scene.things[-1]
        match self._config.label:
            case "shape":
                return scene.label
            case "colour":
                return list(COLOURS).index(main.texture.colours[0])
            case _:
                return PATTERNS.index(main.texture.pattern)
