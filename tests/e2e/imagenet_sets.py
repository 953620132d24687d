"""Miniature copies of ImageNet-1K's validation images and the six robustness sets, and a classifier that reads colours.

Folders, file names, WordNet ids and indices are those of the real archives. Each image has the colour of the class that
it shows, which need not be the class that its folder names: `Colours` answers what is shown, then the classes after it,
so that every hit can be worked out by hand.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from openeva.data.imagenet_classes import subset_rows, wordnet_ids
from openeva.data.views import ViewSpec

SIZE = 32
STEP = 25
"""Between two levels of a colour: far more than JPEG changes."""

Shown = dict[str, int]
"""File below the set's folder -> class that it shows."""

V2_FOLDER = "imagenetv2-matched-frequency-format-val"
KIT_FOX, CLOCK, DIGITAL_CLOCK, BACKPACK = 278, 409, 530, 414

VAL: Shown = {
    f"{wordnet_ids()[folder]}/ILSVRC2012_val_{number:08d}.JPEG": shown
    for number, folder, shown in [
        (9, 0, 0), (3, 0, 1), (1, 1, 1), (10, 2, 998), (4, 6, 6), (2, 13, 10), (7, KIT_FOX, 500), (8, 999, 999),
    ]
}  # fmt: skip
REAL: list[list[int]] = [[1, 2], [10], [], [7], [5], [5], [504, 278, 3], [1], [1], []]
"""Of images 1 to 10."""
_V2 = [(0, 0), (1, 1), (10, 10), (100, 100), (2, 3), (999, 997), (20, 20)]
_A = [(6, 6), (11, 10), (13, 12), (988, 988), (15, 500)]
_R = [(1, 1), (2, 1), (4, 3), (8, 7)]
_SKETCH = [(0, 0), (5, 4), (500, 500)]
V2: Shown = {f"{folder}/{number:02x}f3.jpeg": shown for number, (folder, shown) in enumerate(_V2)}
A: Shown = {f"{wordnet_ids()[row]}/0.00{n}_digital clock _ {n}.jpg": shown for n, (row, shown) in enumerate(_A)}
R: Shown = {f"{wordnet_ids()[row]}/art_{number}.jpg": shown for number, (row, shown) in enumerate(_R)}
SKETCH: Shown = {f"{wordnet_ids()[row]}/sketch_{number}.JPEG": shown for number, (row, shown) in enumerate(_SKETCH)}
OBJECTNET: Shown = {
    "alarm_clock/0a.png": CLOCK, "alarm_clock/0b.png": DIGITAL_CLOCK, "alarm_clock/0c.png": 700,
    "backpack/1a.png": BACKPACK, "air_freshener/2a.png": CLOCK,
}  # fmt: skip
MAPPINGS: dict[str, Any] = {
    "folder_to_objectnet_label.json": {
        "alarm_clock": "Alarm clock", "backpack": "Backpack", "air_freshener": "Air freshener",
    },
    "objectnet_to_imagenet_1k.json": {
        "Alarm clock": "digital clock; analog clock", "Backpack": "backpack, back pack, knapsack",
    },
    # class index -> line: here another order than the lines', as in the real file
    "pytorch_to_imagenet_2012_id.json": {str(index): (index + 7) % 1000 for index in range(1000)},
}  # fmt: skip
NAMES = {CLOCK: "analog clock", DIGITAL_CLOCK: "digital clock", BACKPACK: "backpack, back pack, knapsack"}


def write_images(folder: Path, images: Shown, border: bool = False) -> None:
    for path, shown in images.items():
        colour = (shown // 100 * STEP, shown // 10 % 10 * STEP, shown % 10 * STEP)
        image = Image.new("RGB", (SIZE + 8, SIZE), colour)
        if border:
            image = Image.new("RGB", (SIZE + 12, SIZE + 4), "red")
            image.paste(colour, (2, 2, SIZE + 10, SIZE + 2))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / path, quality=95)


def write_mappings(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in MAPPINGS.items():
        (folder / name).write_text(json.dumps(content))
    lines = [NAMES.get((line - 7) % 1000, f"name of {line}") for line in range(1000)]
    (folder / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")


def write_sets(root: Path) -> Path:
    """All seven, under the names of their archives."""
    write_images(root / "imagenet" / "val", VAL)
    (root / "imagenet" / "real.json").write_text(json.dumps(REAL))
    write_images(root / V2_FOLDER, V2)
    write_images(root / "imagenet-a", A)
    (root / "imagenet-a" / "README.txt").write_text("see the paper")
    write_images(root / "imagenet-r", R)
    write_images(root / "sketch", SKETCH)
    write_images(root / "objectnet-1.0" / "images", OBJECTNET, border=True)
    write_mappings(root / "objectnet-1.0" / "mappings")
    return root


class Colours(nn.Module):
    """Answers the class whose colour an image shows in its middle, then the classes after it.

    `seen` has the sizes of the images, `corners` the red of a pixel at their upper edge.
    """

    class_names = tuple(map(str, range(1000)))

    def __init__(self, image_size: int = SIZE, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.backbone = nn.Module()
        self.backbone.config = SimpleNamespace(**config)
        self.image_size = (image_size, image_size)
        self.seen: list[tuple[int, ...]] = []
        self.corners: list[int] = []

    def view_spec(self, *, train: bool) -> ViewSpec:
        return ViewSpec(self.image_size)

    def logits(self, image_BCYX: torch.Tensor) -> torch.Tensor:
        self.seen += [tuple(image_BCYX.shape[2:])] * len(image_BCYX)
        self.corners += image_BCYX[:, 0, 0, image_BCYX.shape[3] // 2].tolist()
        middle_BC = image_BCYX[:, :, image_BCYX.shape[2] // 2, image_BCYX.shape[3] // 2].double()
        shown_B = ((middle_BC / STEP).round() @ torch.tensor([100.0, 10.0, 1.0]).double()).long()
        order_BV = (torch.arange(1000)[None] - shown_B[:, None]) % 1000
        return -order_BV.float() / 10


def answers(shown: int, rows: tuple[int, ...] = tuple(range(1000))) -> list[int]:
    """The first five answers of `Colours` to an image, among some classes."""
    return sorted(rows, key=lambda row: (row - shown) % 1000)[:5]


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def folder_of(path: str) -> str:
    return path.partition("/")[0]


def wordnet_index(path: str) -> int:
    return wordnet_ids().index(folder_of(path))


def expected() -> dict[str, tuple[float, float, int]]:
    """Top-1, top-5 and images of each set, by the words of its protocol, one image at a time."""
    found: dict[str, list[tuple[list[int], list[int]]]] = {
        "imagenet_1k": [(answers(shown), [wordnet_index(path)]) for path, shown in VAL.items()],
        "imagenet_real": [
            (answers(shown), labels)
            for path, shown in VAL.items()
            if (labels := REAL[int(path[-13:-5]) - 1])
        ],
        "imagenet_v2": [(answers(shown), [int(folder_of(path))]) for path, shown in V2.items()],
        "imagenet_a": [(answers(shown, subset_rows("a")), [wordnet_index(path)]) for path, shown in A.items()],
        "imagenet_r": [(answers(shown, subset_rows("r")), [wordnet_index(path)]) for path, shown in R.items()],
        "imagenet_sketch": [(answers(shown), [wordnet_index(path)]) for path, shown in SKETCH.items()],
    }  # fmt: skip
    classes = {"alarm_clock": [DIGITAL_CLOCK, CLOCK], "backpack": [BACKPACK]}
    overlapping = [(answers(shown), classes[folder_of(path)]) for path, shown in OBJECTNET.items() if "air" not in path]
    found["objectnet"] = [(said, right[:1]) for said, right in overlapping]
    found["objectnet_any"] = overlapping
    return {
        name: (
            share([said[0] in right for said, right in pairs]),
            share([bool(set(said) & set(right)) for said, right in pairs]),
            len(pairs),
        )
        for name, pairs in found.items()
    }
