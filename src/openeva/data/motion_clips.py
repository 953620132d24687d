"""A folder of short videos whose class is what happens in them: of drawn objects, or of windows moving over images.

`Options` -> which clip shows what (`Clip`, known without drawing) -> `motion.py` or `image_motion.py` ->
`OUT/{train,val}/ACTION/NAME.mp4`, `OUT/{train,val}.txt`, `OUT/labels.csv`, `OUT/README.md`, `OUT/clips.json`

Validation clips have other objects, or are of other images. A clip has its name only once it is whole: a command that
was cut short goes on with those that are missing.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from openeva.config import ConfigError
from openeva.data.building import BrokenInputError, claim, run_jobs, write_text
from openeva.data.decode import RGB, DecodeError, decode
from openeva.data.file_index import IMAGE_EXTENSIONS
from openeva.data.motion import ACTIONS, MIN_FRAMES, action_of, check_actions, draw_motion, render_motion
from openeva.data.sampler import seed_of
from openeva.data.video_writer import require_av, write_video

MARKER = "clips.json"
PHOTOGRAPHS = "skimage"
"""Instead of a folder: the photographs that come with scikit-image."""
SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Those of its files that are photographs and come with the package."""

_CRF = 18
"""Small clips are cheap: their quality may be good."""
_VAL_KEY = 0x7E57


@dataclass(frozen=True)
class Options:
    """What to build.

    Attributes:
        images: Folder of images, or "skimage"; None = drawn objects.
        num: Clips, training and validation together.
        frames: Of each clip.
        fps: Frames per second.
        size: Side length in pixels, even.
        actions: The classes; empty = all of `ACTIONS` or `IMAGE_ACTIONS`.
        val_share: Share of the clips, and of the images, that are for validation.
        drift: Whether the other drawn objects move, too.
        easy: Whether drawn grounds are plain, objects larger and paths longer.
        seed: Another one, other clips.
    """

    images: Path | None = None
    num: int = 1200
    frames: int = 32
    fps: float = 16
    size: int = 96
    actions: tuple[str, ...] = ()
    val_share: float = 0.2
    drift: bool = False
    easy: bool = False
    seed: int = 0

    @property
    def classes(self) -> list[str]:
        """Names in the order of the labels."""
        if self.actions or self.images is None:
            return sorted(self.actions or ACTIONS)
        from openeva.data.image_motion import IMAGE_ACTIONS  # needs torch, which drawn clips do without

        return sorted(IMAGE_ACTIONS)


@dataclass(frozen=True)
class Clip:
    """One file that is to be.

    Attributes:
        path: Relative to the folder, `train/move_left/000012.mp4`.
        action: What happens in it.
        seed: Of its look.
        index: Its number in its part.
        image: What it is of; None = drawn objects.
    """

    path: str
    action: str
    seed: int
    index: int
    image: Path | None


@dataclass
class Built:
    """What lies in the folder.

    Attributes:
        options: As given.
        clips: Those that are there.
        made: How many of them were made now.
        images: Part -> number of images.
        broken: Image -> why it cannot be used.
    """

    options: Options
    clips: list[Clip] = field(default_factory=list)
    made: int = 0
    images: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def count(self, part: str) -> int:
        """Clips of "train" or "val"."""
        return sum(clip.path.startswith(f"{part}/") for clip in self.clips)


def build(out: Path, options: Options, *, num_workers: int = 0, watch: Callable[[int], None] | None = None) -> Built:
    """Make the clips, or those that are still missing.

    Args:
        out: Folder for them; it may hold what an earlier call with the same options left.
        options: What to build.
        num_workers: Processes; 0 = this one.
        watch: Told how many clips are there.

    Raises:
        ConfigError: An option makes no sense, there are no images, or the folder holds something else.
        ImportError: PyAV or scikit-image is missing.
        OSError: The disk is full.
    """
    check(options)
    images = find_images(options.images)
    parts = _split(images, options)
    clips = [clip for part in ("train", "val") for clip in clips_of(part, parts[part], options)]
    claim(out, MARKER, _record(options, images))
    built = Built(options, images={part: len(found) for part, found in parts.items()})
    missing = [clip for clip in clips if not (out / clip.path).is_file()]
    there = len(clips) - len(missing)
    outcomes = run_jobs(partial(make_clip, out, options), missing, min(num_workers, len(missing)))
    for number, outcome in enumerate(outcomes, start=1):
        if outcome.problem is not None:
            built.broken[str(outcome.job.image or outcome.job.path)] = outcome.problem
        if watch:
            watch(there + number)
    built.clips = [clip for clip in clips if (out / clip.path).is_file()]
    built.made = len(built.clips) - there
    _write_lists(out, built)
    return built


def check(options: Options) -> None:
    """Raise ConfigError for what makes no sense, ImportError where PyAV is missing."""
    require_av()
    problems = []
    if options.num < 1:
        problems.append(f"--num: {options.num} clips; choose 1 or more")
    if options.frames < MIN_FRAMES:
        problems.append(f"--frames: {options.frames}; a motion needs at least {MIN_FRAMES}")
    if options.fps <= 0:
        problems.append(f"--fps: {options.fps}; choose a number above 0")
    if not 16 <= options.size <= 1024 or options.size % 2:
        problems.append(f"--size: {options.size} pixels; choose an even number from 16 to 1024")
    if not 0 <= options.val_share < 1:
        problems.append(f"--val-share: {options.val_share} is no share; choose from 0 to below 1, such as 0.2")
    if options.drift and options.images is not None:
        problems.append("--drift: images have no other objects that could drift; leave out --drift or --images")
    if options.easy and options.images is not None:
        problems.append("--easy: this says how clips are drawn; leave out --easy or --images")
    try:
        if options.images is None:
            check_actions(options.classes)
        else:
            from openeva.data.image_motion import check_image_actions

            check_image_actions(options.classes)
    except ValueError as error:
        problems.append(f"--{error}")
    if problems:
        raise ConfigError(problems)


def find_images(images: Path | None) -> list[Path]:
    """Image files below a folder, or those of scikit-image; none for drawn objects.

    Raises:
        ConfigError: There is no such folder, or no image below it.
        ImportError: scikit-image is missing.
    """
    if images is None:
        return []
    if str(images) == PHOTOGRAPHS:
        try:
            import skimage.data
        except ImportError:
            raise ImportError("--images skimage needs scikit-image: pip install 'openeva[demo]'") from None
        folder = Path(skimage.data.__file__).parent
        return [folder / name for name in SKIMAGE if (folder / name).is_file()]
    if not images.is_dir():
        raise ConfigError([f"--images: there is no folder {images}; name one, or {PHOTOGRAPHS}"])
    endings = {f".{ending}" for ending in IMAGE_EXTENSIONS}
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise ConfigError([f"--images: no images below {images}; they must end in {', '.join(IMAGE_EXTENSIONS)}"])
    return found


def _split(images: list[Path], options: Options) -> dict[str, list[Path]]:
    """No image is in both parts."""
    if not images:
        return {"train": [], "val": []}
    order = list(images)
    random.Random(f"{options.seed}/images").shuffle(order)
    num_val = max(1, round(options.val_share * len(order))) if options.val_share else 0
    if num_val >= len(order):
        raise ConfigError([
            f"--images: {len(order)} are too few to keep {options.val_share:.0%} of them for validation; --val-share 0"
            " leaves it out"
        ])  # fmt: skip
    return {"train": order[num_val:], "val": order[:num_val]}


def clips_of(part: str, images: list[Path], options: Options) -> Iterator[Clip]:
    """What is to be in a part, "train" or "val"; each action equally often, up to one."""
    num_val = round(options.num * options.val_share)
    seed = options.seed if part == "train" else seed_of(options.seed, _VAL_KEY)
    for index in range(options.num - num_val if part == "train" else num_val):
        if options.images is None:
            action, image, name = action_of(seed, index, options.classes), None, f"{index:06d}"
        else:
            from openeva.data.image_motion import assign

            number, action = assign(index, len(images), options.classes)
            image = images[number]
            name = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', image.stem)}-{index:06d}"
        yield Clip(f"{part}/{action}/{name}.mp4", action, seed, index, image)


def make_clip(out: Path, options: Options, clip: Clip) -> None:
    """Draw and write one clip.

    Raises:
        BrokenInputError: Its image cannot be used.
    """
    if clip.image is None:
        motion = draw_motion(
            clip.seed, clip.index, options.frames, actions=options.classes, drift=options.drift, easy=options.easy
        )
        assert motion.action == clip.action
        frames = render_motion(motion, options.size)
    else:
        import torch

        from openeva.data.image_motion import draw_image_motion, render_image_motion

        torch.set_num_threads(1)  # there is a process per core
        how = draw_image_motion(clip.seed, clip.index, clip.action, options.frames)
        frames = render_image_motion(_image(clip.image), how, options.size)
    write_video(out / clip.path, frames, fps=options.fps, crf=_CRF)


@lru_cache(maxsize=8)
def _image(path: Path) -> RGB:
    from openeva.data.image_motion import MIN_SIDE

    try:
        image = decode(path.read_bytes())
    except DecodeError as error:
        raise BrokenInputError(str(error)) from None
    if min(image.shape[:2]) < MIN_SIDE:
        raise BrokenInputError(f"{image.shape[1]}x{image.shape[0]} pixels; both sides must be at least {MIN_SIDE}")
    return np.ascontiguousarray(image)


# ---------------------------------------------------------------------------------------------------------- texts


def _record(options: Options, images: list[Path]) -> dict[str, Any]:
    """What decides about the clips; where the images lie does not, which they are does."""
    folder = None if str(options.images) == PHOTOGRAPHS else options.images
    names = "\n".join(str(path.relative_to(folder)) if folder else path.name for path in images)
    digest = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest() if images else None
    return asdict(options) | {"images": digest, "actions": options.classes}


def _write_lists(out: Path, built: Built) -> None:
    labels = {name: label for label, name in enumerate(built.options.classes)}
    for part in ("train", "val"):
        lines = sorted(
            f"{clip.path} {labels[clip.action]}\n" for clip in built.clips if clip.path.startswith(f"{part}/")
        )
        if lines:
            write_text(out / f"{part}.txt", "".join(lines))
    write_text(out / "labels.csv", "id,name\n" + "".join(f"{label},{name}\n" for name, label in labels.items()))
    write_text(out / "README.md", _readme(built))


def rows_of(built: Built) -> list[tuple[str, ...]]:
    """Label, action and numbers of clips, for people."""
    counts = Counter(tuple(clip.path.split("/")[:2]) for clip in built.clips)
    return [
        (str(label), name, *(f"{counts[part, name]:,}" for part in ("train", "val")))
        for label, name in enumerate(built.options.classes)
    ]


def _readme(built: Built) -> str:
    options = built.options
    if options.images is None:
        others = "drift slowly" if options.drift else "stand still"
        grounds = " Grounds are plain, objects large and their paths long." if options.easy else ""
        how = f"Drawn objects, one of which does something: that is the class. The others {others}.{grounds}\n"
        module = "motion"
    else:
        of = "the photographs of scikit-image" if str(options.images) == PHOTOGRAPHS else "images"
        how = (
            f"A window moves over {of}: how it moves is the class. {built.images['train']:,} images are for training,\n"
            f"{built.images['val']:,} others for validation.\n"
        )
        module = "image_motion"
    return _README.format(
        total=len(built.clips), frames=options.frames, size=options.size, fps=options.fps, how=how, module=module,
        num_classes=len(options.classes), table="\n".join(f"| {' | '.join(row)} |" for row in rows_of(built)),
    )  # fmt: skip


_README = """# Clips of motions

{total:,} videos of {frames} frames of {size} x {size} pixels, {fps:g} frames per second, built by `openeva data clips`.
{how}
The look of a clip says nothing about its class: whatever is in a picture was drawn without regard to it, and the frames
of a motion in the reverse order are those of the opposite motion. A model that does not know the order of the frames
cannot tell a motion from its opposite. `openeva.data.{module}` says how clips are drawn.

| label | class | train | val |
| ---: | --- | ---: | ---: |
{table}

`train/CLASS/NAME.mp4` and `val/CLASS/NAME.mp4`; `train.txt` and `val.txt` name each file and its label, `labels.csv`
the labels. As data of a recipe ({num_classes} classes):

```yaml
data:
  train: [{{name: video_list, file: DIR/train.txt, labels: DIR/labels.csv}}]
  val: [{{name: video_list, file: DIR/val.txt, labels: DIR/labels.csv}}]
```

Do not mirror them, and do not play them backwards: both change the class.
"""
