"""Kinetics-400, -600 and -700 as they lie on disk, and the labels that follow from their class folders.

folders k400, k600, k700 -> `locate` -> `scan`: a `Table` of videos per set and split
names of the validation folders -> `merge_classes`: labels of K-722 and of each set, and the arrays between them

A video is known by its YouTube id, the first 11 characters of its file name. Listings are sorted, so that "the first"
is the same on every machine.

Source: spec section 3.1 of video. Deliberate difference: three classes have two spellings in the official lists, and
are one class here (`ALIASES`); by equal names alone there would be 725 classes.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

from openeva.config import ConfigError

SetName = Literal["k400", "k600", "k700"]
Split = Literal["train", "val"]
SETS: tuple[SetName, ...] = ("k400", "k600", "k700")
SPLITS: tuple[Split, ...] = ("train", "val")
ID_LENGTH = 11
"""Characters of a YouTube id, with which every file name begins."""

ALIASES = {
    "changing wheel": "changing wheel (not on bike)",
    "cooking sausages": "cooking sausages (not on barbeque)",
    "passing american football (not in game)": "passing American football (not in game)",
}
"""Names of K-400 (the first two) and K-600 (the last) -> the name that the other sets and K-722 give the class."""

NUM_CLASSES = {"k400": 400, "k600": 600, "k700": 700, "k722": 722}

OFFICIAL_COUNTS = {
    "k400_train": "~234,600", "k400_val": "19,760", "k600_train": "~412,700", "k600_val": "29,779",
    "k700_train": "~534,000", "k700_val": "33,914", "k722_train": "~629,300", "k722_val": "69,692",
}  # fmt: skip
"""Videos of EVA's own lists, by its logs: the training lists from steps per epoch × 256. They depend on which videos
could still be downloaded."""

Watch = Callable[[str, int, int | None], None]
"""Told what is done now, how much of it is done, and of how much (None = unknown)."""
_BREAKS_LINES = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029\ud800-\udfff]")
"""What cannot stand in a line of a UTF-8 list, with the bytes that were not UTF-8 on disk."""


class Clip(NamedTuple):
    """One video file: its path in the lists, its class folder and its YouTube id."""

    path: str
    class_name: str
    youtube_id: str


@dataclass(frozen=True)
class Table:
    """The videos of one split of one set.

    Attributes:
        clips: In the order in which the first of several counts.
        classes: Names of all class folders, those without videos too.
    """

    clips: list[Clip]
    classes: list[str]


Tables = Mapping[SetName, Mapping[Split, Table]]


def table_of(prefix: str, files: Mapping[str, Sequence[str]]) -> Table:
    """The table of a split whose classes have these file names, in sorted order.

    Args:
        prefix: What comes before the class in a path, "k400/train".
        files: Class folder -> names of its videos.
    """
    clips = [
        Clip(f"{prefix}/{name}/{file}", name, file[:ID_LENGTH])
        for name in sorted(files)
        for file in sorted(files[name])
    ]
    return Table(clips, sorted(files))


# ------------------------------------------------------------------------------------------------------ folders


def locate(root: Path | None, given: Mapping[SetName, Path | None]) -> tuple[Path, dict[SetName, Path]]:
    """Where paths in the lists begin, and the folder of each set.

    Args:
        root: Folder with the folders k400, k600 and k700; without it their common parent folder is where paths begin.
        given: Folders of sets that lie elsewhere.

    Raises:
        ConfigError: A set or a split of it is missing; all that is missing is named.
    """
    folders: dict[SetName, Path] = {}
    problems = []
    for key in SETS:
        place = given.get(key) or (root / key if root is not None else None)
        if place is None:
            problems.append(f"--{key}: missing; K-722 is made of all three sets: give their common folder, or this one")
            continue
        folders[key] = Path(os.path.normpath(place.expanduser().absolute()))
        problems += _missing(key, folders[key])
    for one, other in itertools.combinations(folders, 2):
        if folders[one].exists() and folders[one].resolve() == folders[other].resolve():
            problems.append(f"{one} and {other} are the same folder, {folders[one]}; give each set its own")
    if problems:
        raise ConfigError(problems, "the folders of Kinetics")
    if root is not None:
        return Path(os.path.normpath(root.expanduser().absolute())), folders
    return Path(os.path.commonpath(list(folders.values()))), folders


def _missing(key: SetName, folder: Path) -> list[str]:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        return [f"{key}: {folder} {what}; K-722 is made of all three sets: put it there, or say where with --{key}"]
    there = _folder_names(folder)
    seen = f" (it has {', '.join(there[:5])}{' ...' if len(there) > 5 else ''})" if there else " (it has no folders)"
    return [
        f"{key}: no folder {split} in {folder}{seen}; expected is {split}/<class>/<YouTube id>...: rename or link it"
        for split in SPLITS
        if split not in there
    ]


@dataclass
class Scan:
    """What lies in the folders, and what is odd about it."""

    tables: dict[SetName, dict[Split, Table]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def scan(root: Path, folders: Mapping[SetName, Path], watch: Watch | None = None) -> Scan:
    """List all videos.

    Args:
        root: Paths in the lists are relative to it; those that lie elsewhere are absolute.
        folders: Of the three sets, from `locate`.
        watch: Told how far it is.

    Raises:
        ConfigError: A split has no videos, or names that cannot be understood.
        OSError: A folder cannot be read.
    """
    found, problems = Scan(), []
    for key, folder in folders.items():
        place = folder.relative_to(root) if folder.is_relative_to(root) else folder
        found.tables[key] = {}
        for split in SPLITS:
            files, notes = _files_of(folder / split, f"{key}/{split}", watch)
            found.notes += notes
            problems += _unusable(folder / split, f"{key}/{split}", files)
            found.tables[key][split] = table_of(PurePath(place, split).as_posix(), files)
    if problems:
        raise ConfigError(problems, "the videos of Kinetics")
    return found


def _files_of(folder: Path, title: str, watch: Watch | None) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the videos in each class folder, and notes."""
    from openeva.data.video import VIDEO_EXTENSIONS

    wanted = frozenset(VIDEO_EXTENSIONS)

    def is_video(entry: "os.DirEntry[str]") -> bool:
        name = entry.name
        is_wanted = name.rpartition(".")[2].lower() in wanted and not name.startswith(".")
        return is_wanted and not entry.is_dir(follow_symlinks=False)

    with os.scandir(folder) as entries:
        strays = sum(map(is_video, entries))
    files = {}
    names = _folder_names(folder)
    for number, name in enumerate(names):
        with os.scandir(folder / name) as entries:
            files[name] = [entry.name for entry in entries if is_video(entry)]
        if watch is not None:
            watch(f"listing {title}", number + 1, len(names))
    notes = []
    if strays:
        notes.append(f"{title}: videos beside the class folders, in no list for want of a class: {strays:,}")
    if empty := [name for name in names if not files[name]]:
        notes.append(f"{title}: {some(empty)} without videos")
    return files, notes


def _folder_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def some(names: Sequence[str], what: str = "class folder") -> str:
    """How many there are, and the first of them."""
    listed = ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
    return f"{len(names):,} {what}{'s' if len(names) != 1 else ''} ({listed})"


def _unusable(folder: Path, title: str, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Problems of a split that has no videos, or names that lists cannot hold."""
    if not any(files.values()):
        what = "no videos in its class folders" if files else "no class folders"
        return [f"{title}: {folder} has {what}; expected is {title}/<class>/<YouTube id>_<start>_<end>.mp4"]
    paths = [(name, file) for name, inside in files.items() for file in inside]
    short = [f"{name}/{file}" for name, file in paths if len(file.rpartition(".")[0]) < ID_LENGTH]
    odd = [f"{name}/{file}" for name, file in paths if _BREAKS_LINES.search(file) or _BREAKS_LINES.search(name)]
    problems = _twice(title, files)
    if short:
        text = f"{title}: {some(short, 'file')} in {folder} with a name of fewer than {ID_LENGTH} characters"
        problems.append(f"{text}; names begin with the YouTube id, by which copies are found: rename or remove them")
    if odd:
        text = f"{title}: {some(odd, 'file')} in {folder} whose path has a line break or is not UTF-8"
        problems.append(f"{text}; no list can hold it: rename them")
    return problems


# ------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Classes:
    """The classes of the merged set and of the three.

    Attributes:
        names: Of K-722, by label.
        own_names: Of each set, by its own label, as its folders spell them.
        mapping: Of each set: the K-722 label of each of its labels; it rises.
    """

    names: list[str]
    own_names: dict[SetName, list[str]]
    mapping: dict[SetName, list[int]]


def canonical(name: str) -> str:
    """A class's name in K-722."""
    return ALIASES.get(name, name)


def merge_classes(class_names: Mapping[SetName, Iterable[str]]) -> Classes:
    """Labels by the ASCII order of the class names.

    Args:
        class_names: Those of each set's validation folders.

    Raises:
        ConfigError: A class has two folders in a set, or other spellings in different sets.
    """
    own = {key: {canonical(name): name for name in sorted(class_names[key])} for key in SETS}
    names = sorted(set().union(*own.values()))
    problems = [text for key in SETS for text in _twice(f"{key}/val", class_names[key])]
    if len(names) != NUM_CLASSES["k722"]:  # else they are the official ones, however alike
        problems += _alike(own)
    if problems:
        raise ConfigError(problems, "the class folders")
    mapping = {key: [label for label, name in enumerate(names) if name in own[key]] for key in SETS}
    return Classes(names, {key: [own[key][names[label]] for label in mapping[key]] for key in SETS}, mapping)


def _twice(where: str, class_names: Iterable[str]) -> list[str]:
    present = set(class_names)
    return [
        f"{where}: the folders {name!r} and {other!r} are one class; move the videos of both into {other!r}"
        for name, other in ALIASES.items()
        if {name, other} <= present
    ]


def _alike(own: Mapping[SetName, Mapping[str, str]]) -> list[str]:
    """Names that differ by case or punctuation alone: one class, which would get two labels."""
    spellings: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key in SETS:
        for name, folder in own[key].items():
            spellings["".join(filter(str.isalnum, name.casefold()))].setdefault(name, f"{key}/val/{folder}")
    pairs = [list(found.values()) for found in spellings.values() if len(found) > 1]
    texts = [f"{' and '.join(pair)} are one class, spelled differently; rename the folders alike" for pair in pairs]
    more = [f"... and {len(texts) - 5} more classes that are spelled differently"] if len(texts) > 5 else []
    return texts[:5] + more
