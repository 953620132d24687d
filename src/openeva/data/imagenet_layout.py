"""How ImageNet-1K's validation images and the six robustness sets lie on disk, and whether all of them are there.

folder -> `list_images` (path, class) per image -> `data/sources/imagenet.py`; `survey` counts them and says what is
missing, where it belongs and from which archive it comes.

The layouts are those of the official archives, unpacked: folders of WordNet ids (1K, A, R, Sketch), folders whose names
are class indices (V2), folders of ObjectNet's own classes beside its `mappings/`. ReaL has no images: its labels are
keyed by the file names of the 1K validation images.
Source: spec section 7 (counts, mappings).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openeva.data.file_index import IMAGE_EXTENSIONS
from openeva.data.imagenet_classes import VAL_NAME, real_labels, subset_rows, wordnet_ids

SetName = Literal["1k", "v2", "real", "a", "r", "sketch", "objectnet"]


@dataclass(frozen=True)
class SetFacts:
    """What a complete copy of a set has, and where it is looked for.

    Attributes:
        title: Its name.
        num_classes: Classes that have images.
        num_images: Images that count.
        per_class: Images of each class, where all have the same number.
        folders: Names under which it may lie in a common folder of all sets.
        inside: Places of the class folders within it.
        archive: What to get, in words.
    """

    title: str
    num_classes: int
    num_images: int
    per_class: int | None
    folders: tuple[str, ...]
    inside: tuple[str, ...]
    archive: str


_1K = SetFacts(
    "ImageNet-1K", 1000, 50_000, 50, ("imagenet-1k", "imagenet", "ILSVRC2012", "."),
    ("val", "ILSVRC/Data/CLS-LOC/val", "."),
    "ILSVRC2012_img_val.tar from image-net.org (with an account), sorted into one folder per WordNet id",
)  # fmt: skip
FACTS: dict[SetName, SetFacts] = {
    "1k": _1K,
    "v2": SetFacts(
        "ImageNet-V2", 1000, 10_000, 10,
        ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2"),
        (".", "imagenetv2-matched-frequency-format-val"),
        "imagenetv2-matched-frequency.tar.gz of the ImageNetV2 project",
    ),
    "real": SetFacts(
        "ImageNet-ReaL", 1000, 46_837, None, _1K.folders, _1K.inside,
        f"{_1K.archive}; labels: real.json of the project 'reassessed-imagenet', or the copy that timm carries",
    ),
    "a": SetFacts(
        "ImageNet-A", 200, 7_500, None, ("imagenet-a",), (".", "imagenet-a"),
        "imagenet-a.tar of the project 'Natural Adversarial Examples'",
    ),
    "r": SetFacts(
        "ImageNet-R", 200, 30_000, None, ("imagenet-r",), (".", "imagenet-r"),
        "imagenet-r.tar of the project 'The Many Faces of Robustness'",
    ),
    "sketch": SetFacts(
        "ImageNet-Sketch", 1000, 50_889, None, ("sketch", "imagenet-sketch", "ImageNet-Sketch"), (".", "sketch"),
        "ImageNet-Sketch.zip of the ImageNet-Sketch project",
    ),
    "objectnet": SetFacts(
        "ObjectNet", 113, 18_574, None, ("objectnet-1.0", "objectnet"), ("images", "objectnet-1.0/images", "."),
        "objectnet-1.0.zip from objectnet.dev, with its folders images/ and mappings/",
    ),
}  # fmt: skip
SETS: tuple[SetName, ...] = tuple(FACTS)

LABEL_FILES = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")
"""Either gives the WordNet ids of 1K validation images that lie in one flat folder (Kaggle's, TensorFlow's)."""
MAPPINGS = (
    "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json", "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)  # fmt: skip
"""Files in ObjectNet's own folder `mappings`."""


class LayoutError(ValueError):
    """A set does not lie on disk as it should; `problems` has one message per missing piece."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Image(NamedTuple):
    """One image file of a set.

    Attributes:
        path: Relative to `Listing.folder`.
        labels: Indices of the ImageNet-1K classes that it shows, the set's own first; never empty.
    """

    path: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """All images of a set that count, sorted by path."""

    folder: Path
    images: list[Image]


@dataclass
class Survey:
    """What was found of a set in `root`, for a table; complete where there are no `problems`."""

    root: Path
    num_classes: int = 0
    num_images: int = 0
    problems: list[str] = field(default_factory=list)


def find_set(path: Path, set_name: SetName) -> Path | None:
    """Folder of a set beneath a common folder of all sets (its names are in `FACTS`), None where there is none."""
    places = (path / name for name in FACTS[set_name].folders)
    return next((place for place in places if place.is_dir() and _image_folder(place, set_name)), None)


def survey(root: Path, set_name: SetName) -> Survey:
    """Count the classes and images of the set in `root`; `problems` says what is missing or does not belong there."""
    facts = FACTS[set_name]
    try:
        listing = list_images(root, set_name)
    except LayoutError as error:
        return Survey(root, problems=error.problems)
    per_class = Counter(image.labels[0] for image in listing.images)
    num_classes = len(per_class)
    if set_name == "objectnet":  # two of its classes may have the same first label
        num_classes = len({image.path.partition("/")[0] for image in listing.images})
    problems = []
    if num_classes < facts.num_classes and set_name != "real":  # that its lists begin with every class is not promised
        problems.append(_missing_classes(listing, set_name, num_classes, per_class))
    if len(listing.images) != facts.num_images:
        text = f"{facts.title}: {len(listing.images):,} of {facts.num_images:,} images in {listing.folder}"
        problems.append(f"{text}{_uneven(facts, per_class)}; unpack again {facts.archive}")
    return Survey(root, num_classes, len(listing.images), problems)


def survey_beneath(path: Path, set_name: SetName) -> Survey:
    """The same for a set that lies under one of its names in a common folder of all sets."""
    if not path.is_dir():
        return Survey(path, problems=[f"{path} does not exist; say where the sets are, and check that it is mounted"])
    if (root := find_set(path, set_name)) is not None:
        return survey(root, set_name)
    facts = FACTS[set_name]
    here = next((path / name for name in facts.folders if name != "." and (path / name).is_dir()), None)
    if here is not None:
        return survey(here, set_name)
    names = " or ".join(name for name in facts.folders if name != ".")
    return Survey(
        path, problems=[f"{facts.title}: no folder {names} in {path}; {_where(set_name)}; get {facts.archive}"]
    )


def check_layout(root: Path, set_name: SetName) -> list[str]:
    """What a set in `root` lacks, one message per piece; empty where it is complete."""
    return survey(root, set_name).problems


def _missing_classes(listing: Listing, set_name: SetName, found: int, per_class: Counter[int]) -> str:
    facts = FACTS[set_name]
    text = f"{facts.title}: {found:,} of {facts.num_classes:,} class folders with images in {listing.folder}"
    if set_name == "objectnet":
        return f"{text}; unpack again {facts.archive}"
    rows = subset_rows(set_name) if set_name in {"a", "r"} else range(1000)
    names = [str(row) if set_name == "v2" else wordnet_ids()[row] for row in rows if not per_class[row]]
    return f"{text}; missing are {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


def _uneven(facts: SetFacts, per_class: Counter[int]) -> str:
    """Which classes have too few or too many images, where that is known."""
    odd = [(index, n) for index, n in sorted(per_class.items()) if facts.per_class and n != facts.per_class]
    if not odd:
        return ""
    some = ", ".join(f"{wordnet_ids()[index]} (class {index}) has {n}" for index, n in odd[:3])
    return f"; {some}{' ...' if len(odd) > 3 else ''} of {facts.per_class}"


# ------------------------------------------------------------------------------------------------------ listing


def list_images(root: Path, set_name: SetName) -> Listing:
    """The images of a set with their labels.

    Raises:
        LayoutError: No such folder, no class folders in it, folders that are no class of this set, or labels missing.
    """
    facts = FACTS[set_name]
    folder = _image_folder(root, set_name) if root.is_dir() else None
    if folder is None:
        what = f"holds no {facts.title}" if root.is_dir() else "does not exist"
        raise LayoutError([f"{facts.title}: {root} {what}; {_where(set_name)}; get {facts.archive}"])
    if set_name == "objectnet":
        return Listing(folder, _in_class_folders(folder, objectnet_labels(folder, root), facts))
    if set_name == "v2":
        return Listing(folder, _in_class_folders(folder, {str(i): (i,) for i in range(1000)}, facts))
    if set_name in {"a", "r"}:
        classes = {wordnet_ids()[row]: (row,) for row in subset_rows("a" if set_name == "a" else "r")}
        return Listing(folder, _in_class_folders(folder, classes, facts))
    classes = {wordnet_id: (index,) for index, wordnet_id in enumerate(wordnet_ids())}
    if set_name == "sketch":
        return Listing(folder, _in_class_folders(folder, classes, facts))
    flat = not _class_folders(folder, _is_wordnet_id)
    images = _flat(folder, root, classes) if flat else _in_class_folders(folder, classes, facts)
    return Listing(folder, _with_real_labels(images, folder, root) if set_name == "real" else images)


def _where(set_name: SetName) -> str:
    if set_name == "objectnet":
        return "expected are images/<ObjectNet's class>/*.png and mappings/"
    if set_name == "v2":
        return "expected are the folders 0 to 999"
    if set_name in {"1k", "real"}:
        return (
            "expected is val/ with a folder per WordNet id (n01440764 ...), or with ILSVRC2012_val_*.JPEG and"
            f" {' or '.join(LABEL_FILES)} beside it"
        )
    return "expected is a folder per WordNet id (n01440764 ...)"


def _is_wordnet_id(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _is_image(name: str) -> bool:
    return _is_shown(name) and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _class_folders(folder: Path, fits: Callable[[str], bool]) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if fits(entry.name) and entry.is_dir())


def _flat_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.startswith("ILSVRC2012_val_"))


def _image_folder(root: Path, set_name: SetName) -> Path | None:
    """Where in `root` the class folders (or the flat files of 1K) lie."""
    places = [root / inside for inside in FACTS[set_name].inside]
    return next((place for place in places if place.is_dir() and _holds(place, root, set_name)), None)


def _holds(place: Path, root: Path, set_name: SetName) -> bool:
    if set_name == "objectnet":
        return bool(_mappings(place, root) and _class_folders(place, lambda n: _is_shown(n) and n != "mappings"))
    if _class_folders(place, str.isdecimal if set_name == "v2" else _is_wordnet_id):
        return True
    return set_name in {"1k", "real"} and bool(_flat_names(place))


def _in_class_folders(folder: Path, classes: Mapping[str, tuple[int, ...]], facts: SetFacts) -> list[Image]:
    """Images of all class folders; classes without labels are known and do not count."""
    found = _class_folders(folder, _is_shown)
    images = [
        Image(f"{name}/{file}", classes[name])
        for name in found
        if classes.get(name)
        for file in sorted(os.listdir(folder / name))  # noqa: PTH208 (tens of thousands of names, not paths)
        if _is_image(file)
    ]
    if unknown := [name for name in found if name not in classes]:
        some = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        text = f"{facts.title}: folders in {folder} that are no class of this set: {some}"
        raise LayoutError([f"{text}; move them, or check that this is {facts.title} and not another set"])
    if not images:
        raise LayoutError([f"{facts.title}: no images in the class folders of {folder}; get {facts.archive}"])
    return images


def _beside(folder: Path, root: Path, name: str) -> Path | None:
    """A file or folder in `folder`, or in a folder above it up to `root`, or right beside that."""
    above = [folder, *folder.parents]
    last = above.index(root) + 1 if root in above else 1
    return next((place / name for place in above[: last + 1] if (place / name).exists()), None)


# ------------------------------------------------------------------------------------------------------- labels


def _flat(folder: Path, root: Path, classes: Mapping[str, tuple[int, ...]]) -> list[Image]:
    """1K validation images in one folder, with a file that says which class each shows."""
    files = [path for name in LABEL_FILES if (path := _beside(folder, root, name))]
    if not files:
        raise LayoutError(
            [
                f"ImageNet-1K: the images in {folder} are not sorted into class folders, and none of"
                f" {', '.join(LABEL_FILES)} lies there or above it; add one of them, or sort the images"
            ]
        )
    lines = [line for line in files[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    if files[0].name == LABEL_FILES[0]:  # image,"wordnet_id x y x y wordnet_id ..."
        label_of = {image: boxes.split()[0] for image, _, boxes in (row.partition(",") for row in lines[1:])}
    else:
        label_of = {VAL_NAME.format(number): line.strip() for number, line in enumerate(lines, start=1)}
    names = _flat_names(folder)
    wrong = [name for name in names if label_of.get(Path(name).stem) not in classes]
    if wrong:
        raise LayoutError([f"ImageNet-1K: {files[0]} has no class for {', '.join(wrong[:5])}; is it complete?"])
    return [Image(name, classes[label_of[Path(name).stem]]) for name in names]


def _with_real_labels(images: list[Image], folder: Path, root: Path) -> list[Image]:
    """The images that have reassessed labels, with these; by file name, whatever their order."""
    file = _beside(folder, root, "real.json")
    lists = real_labels() if file is None else _read_json(file)
    try:
        label_of = {VAL_NAME.format(number): tuple(map(int, labels)) for number, labels in enumerate(lists, start=1)}
    except (TypeError, ValueError):
        raise LayoutError([f"ImageNet-ReaL: {file} is not a list of lists of class indices"]) from None
    stems = [Path(image.path).stem for image in images]
    if unknown := [stem for stem in stems if stem not in label_of]:
        text = f"ImageNet-ReaL: no labels for {len(unknown):,} images of {folder}, such as {unknown[0]}"
        raise LayoutError([f"{text}; the labels are keyed by the original file names ({VAL_NAME.format(1)}.JPEG ...)"])
    return [Image(image.path, label_of[stem]) for image, stem in zip(images, stems, strict=True) if label_of[stem]]


def _mappings(folder: Path, root: Path) -> Path | None:
    return _beside(folder, root, "mappings")


def objectnet_labels(folder: Path, root: Path) -> dict[str, tuple[int, ...]]:
    """ImageNet class indices of each of ObjectNet's folders, in the order of its mapping; none without overlap.

    folder -> ObjectNet's label -> ImageNet's labels, separated by "; " -> line of `imagenet_to_label_2012_v2`, counted
    from 0 -> class index (the inverse of `pytorch_to_imagenet_2012_id`).

    Raises:
        LayoutError: A file of the mapping is missing or does not fit the others.
    """
    place = _mappings(folder, root)
    assert place is not None
    if missing := [name for name in MAPPINGS if not (place / name).is_file()]:
        raise LayoutError([f"ObjectNet: {place} lacks {', '.join(missing)}; get {FACTS['objectnet'].archive}"])
    label_of_folder, names_of_label, id_of_index = (_read_json(place / name) for name in MAPPINGS[:3])
    lines = (place / MAPPINGS[3]).read_text(encoding="utf-8").splitlines()
    index_of_id = {int(number): int(index) for index, number in id_of_index.items()}
    id_of_name = {line.strip(): number for number, line in enumerate(lines)}
    try:
        return {
            name: tuple(index_of_id[id_of_name[part]] for part in names_of_label[label].split("; "))
            if label in names_of_label
            else ()
            for name, label in label_of_folder.items()
        }
    except KeyError as error:
        raise LayoutError([f"ObjectNet: the files in {place} do not fit each other: {error} is unknown"]) from None


def objectnet_class_names(listing: Listing, root: Path) -> dict[str, str]:
    """ObjectNet's own name, in lower case, of each of its folders that has images which count; sorted by folder.

    Raises:
        LayoutError: Its file of names is missing or damaged.
    """
    place = _mappings(listing.folder, root)
    assert place is not None
    label_of_folder = _read_json(place / MAPPINGS[0])
    return {
        folder: str(label_of_folder[folder]).lower()
        for folder in sorted({image.path.partition("/")[0] for image in listing.images})
    }


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LayoutError([f"{file} is not valid JSON ({error}); get it again"]) from None
