"""Hugging Face datasets, from the hub or a local folder, with captions and labels where they have them.

name of a data set -> the `datasets` library (Arrow files, memory-mapped) -> `read(i)`: encoded bytes of image i, its
captions and label

Random access, so that order and resume are exact as for files. Images stay encoded until the loader decodes them. Needs
the extra `hf`.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

from openeva.config import ConfigError
from openeva.data.caption_rows import CAPTION_NAMES, captions_in
from openeva.data.sources.base import Sample, SourceConfig
from openeva.registry import did_you_mean


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Config(SourceConfig):
    """A data set of the `datasets` library.

    Attributes:
        dataset: Its name on the hub (`nlphuji/flickr30k`), or a local folder: one that `save_to_disk` wrote, or one of
            Parquet files or of images with `metadata.csv`.
        subset: Its configuration, where it has several.
        split: As the library writes it: `train`, `test[:10%]`.
        revision: Commit or tag on the hub; default: the latest.
        image_column: Default: the one that holds images.
        caption_column: One or several; default: caption, captions, text, title, ..., where there is one.
        label_column: Default: the one that holds classes, where there is one; numbers are taken too if named here.
    """

    name: Literal["huggingface"] = "huggingface"
    dataset: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str | None = None
    caption_column: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    label_column: str | None = None

    def build(self) -> "HuggingFace":
        """Open the source; what is not on this machine is downloaded by the library.

        Raises:
            ImportError: The library is not installed.
            ConfigError: There is no such data set, split or column.
        """
        try:
            import datasets
        except ImportError:
            raise ImportError("the source huggingface needs the package datasets: pip install 'openeva[hf]'") from None
        data = _load(self, datasets)
        columns = _Columns(self, data)
        identity = hashlib.blake2b(repr((data._fingerprint, columns)).encode(), digest_size=16).hexdigest()
        class_names = _class_names(data, columns.label)
        data = data.select_columns(columns.all)
        if isinstance(data.features[columns.image], datasets.Image):
            data = data.cast_column(columns.image, datasets.Image(decode=False))
        return HuggingFace(self, data, columns.image, columns.captions, columns.label, class_names, identity)


def _load(config: Config, datasets: Any) -> Any:
    """The split as the library has it.

    Raises:
        ConfigError: There is none.
    """
    folder = Path(config.dataset).expanduser()
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        with _no_progress_bars(datasets):
            if not saved:
                path = str(folder) if folder.exists() else config.dataset
                return datasets.load_dataset(path, config.subset, split=config.split, revision=config.revision)
            data = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds: no such name, no such split, no connection, a damaged file
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "" if folder.exists() else "; it is a name on the hub, or the path of a folder that exists"
        raise ConfigError(
            [f"huggingface: cannot load {config.dataset!r} (split {config.split}): {first}{hint}"]
        ) from error
    if not isinstance(data, datasets.DatasetDict):
        return data  # saved as one split
    if config.split not in data:
        raise ConfigError(
            [f"huggingface: {folder} has no split {config.split!r}{did_you_mean(config.split, list(data))}; it has"
             f" {', '.join(data)}"]
        )  # fmt: skip
    return data[config.split]


@contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    """The library draws its own bars, into logs too."""
    shown = datasets.is_progress_bar_enabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class _Columns:
    """Which columns hold what.

    Raises:
        ConfigError: There are no such columns.
    """

    def __init__(self, config: Config, data: Any) -> None:
        self._names, self._problems = list(data.features), list[str]()
        kinds = {name: _kind_of(feature) for name, feature in data.features.items()}
        of_image = [name for name, kind in kinds.items() if kind in {"image", "bytes"}]
        if config.image_column is None and len(of_image) != 1:
            found = f"{', '.join(of_image)} do" if of_image else "none does"
            self._problems.append(f"which column holds the images? By its type, {found}; set image_column")
        self.image = self._named("image_column", config.image_column) or (of_image or [""])[0]
        if self.image and self.image not in of_image:
            self._problems.append(f"column {self.image!r} holds {kinds[self.image]}, no images; cast it to `Image`")
        lower = {name.lower(): name for name in reversed(self._names)}
        guess = [lower[name] for name in CAPTION_NAMES if name in lower and kinds[lower[name]] == "text"][:1]
        named = [self._named("caption_column", name) for name in config.caption_column or []]
        self.captions = [name for name in named if name] if config.caption_column is not None else guess
        classes = [name for name, kind in kinds.items() if kind == "class"]
        self.label = self._named("label_column", config.label_column) or (classes[0] if len(classes) == 1 else None)
        if self.label and kinds[self.label] not in {"class", "number"}:
            self._problems.append(
                f"column {self.label!r} holds {kinds[self.label]}, no classes; cast it to `ClassLabel`"
            )
        if self._problems:
            where = f"huggingface: {config.dataset} ({config.split})"
            known = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise ConfigError([f"{where}: {problem}; the columns are {known}" for problem in self._problems])

    def _named(self, key: str, name: str | None) -> str | None:
        if name is None or name in self._names:
            return name
        self._problems.append(f"there is no column {name!r} ({key}){did_you_mean(name, self._names)}")
        return None

    @property
    def all(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([self.image, *self.captions, *([self.label] if self.label else [])]))

    def __repr__(self) -> str:
        return repr(self.all)


def _kind_of(feature: Any) -> str:
    """What a column holds, in one word."""
    kind = type(feature).__name__
    if kind in {"Image", "ClassLabel"}:
        return {"Image": "image", "ClassLabel": "class"}[kind]
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in {"binary", "large_binary"}:
        return "bytes"
    if "int" in dtype:
        return "number"
    # a text, a list of texts, a list of objects with texts
    return "text" if "string" in repr(feature) else dtype or kind.lower()


def _class_names(data: Any, label: str | None) -> list[str]:
    """Class names by label; their numbers where they have no names."""
    if label is None:
        return []
    if names := getattr(data.features[label], "names", None):
        return list(names)
    return list(map(str, range(int(_column(data, label).max()) + 1)))


def _column(data: Any, name: str) -> npt.NDArray[np.int64]:
    """A column of numbers, missing ones as -1."""
    table = data.select_columns([name]).with_format("arrow")[:]
    numbers: npt.NDArray[np.int64] = table.column(0).combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
    return numbers.astype(np.int64)


class HuggingFace:
    """One split, as a `Source`.

    Attributes:
        class_names: By label, empty without labels.
        has_captions: Whether it has a column of captions.
        identity: Two sources of the same identity have the same samples in the same order.
    """

    def __init__(
        self, config: Config, data: Any, image: str, captions: Sequence[str], label: str | None,
        class_names: Sequence[str], identity: str,
    ) -> None:  # fmt: skip
        self._name, self._data = f"{config.dataset}/{config.split}", data
        self._image, self._captions, self._label = image, list(captions), label
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self.has_captions, self.identity = bool(captions), identity

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """The encoded image of a row, its captions and its label.

        Raises:
            OSError: It has no image, or a file that cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self._data[index]
        label = -1 if self._label is None or row[self._label] is None else int(row[self._label])
        captions = [caption for name in self._captions for caption in captions_in(row[name])]
        extra = {"captions": captions} if self._captions else None
        return Sample(self._bytes_of(row[self._image], index), self.name_of(index), label, extra)

    def _bytes_of(self, image: Any, index: int) -> bytes:
        if isinstance(image, dict):
            content, path = image.get("bytes"), image.get("path")
            if content is None and path is not None:
                return Path(path).read_bytes()
            image = content
        if not image:
            raise OSError(errno.EIO, "no image in this row", self.name_of(index))
        return bytes(image)

    def name_of(self, index: int) -> str:
        """Data set, split and number of a row."""
        return f"{self._name}:{index}"

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every row, -1 where there is none."""
        return np.full(len(self), -1) if self._label is None else _column(self._data, self._label)
