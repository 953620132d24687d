"""Tar shards in the WebDataset layout (LAION, COYO, CC12M as they are): `key.jpg key.txt key.json key.cls`.

Local shards: `data/tar_index.py` -> `WebDataset.read(i)`: numbered samples, so that shuffle, split over ranks and
workers, and resume are exact.
Pipes and URLs: the webdataset library -> `WebDatasetStream.stream(...)`: in sequence only. Shards are dealt to the
readers in a seeded order that changes with the epoch, and samples pass through a small shuffle buffer. RESUME IS NOT
EXACT there: a run resumed within an epoch starts again at the beginning of the epoch's shards; some samples are seen
twice in that epoch and others not at all.

A caption comes from the first of `caption_key` that a sample has; an image whose caption is missing, empty or no text
is a broken pair where captions are read, and an image like any other where they are not.

Source: spec section 2.6; webdataset 1.0. Differences for local shards: a cut shard gives the samples before the cut
(the library raises or stops), and samples come in any order.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import random
import re
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from openeva.config import ConfigError
from openeva.data.caption_rows import captions_in
from openeva.data.file_index import IMAGE_EXTENSIONS, Progress
from openeva.data.sources.base import Sample, SourceConfig
from openeva.data.tar_index import INDEX_SUFFIX, IndexedTar, find_index, index_shard
from openeva.data.video import VIDEO_EXTENSIONS, Video

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128
"""Shards that a process keeps open: two file descriptors each, and 1024 is a common limit."""


def _as_shards(value: Any) -> Any:
    """A list; several entries in one string end with a semicolon, unless that belongs to a command."""
    if isinstance(value, str) and not value.startswith("pipe:"):
        return [entry.strip() for entry in value.split(";") if entry.strip()]
    return [value] if isinstance(value, str | Path) else value


def _as_keys(value: Any) -> Any:
    keys = value.split(";") if isinstance(value, str) else value
    return [key.strip().lower() for key in keys] if isinstance(keys, list | tuple) else keys


Keys = Annotated[list[str], BeforeValidator(_as_keys)]
"""A list, or one string in the library's way: "jpg;png"."""


class Config(SourceConfig):
    """Samples in tar shards.

    Attributes:
        shards: One entry or a list: local paths with braces and wildcards (`data/{000000..000999}.tar`, `data/*.tar`),
            or URLs (`https:`, `s3:`, `gs:`, `hf:`, `pipe:command`) with braces. Commands of `pipe:` run in a shell.
            Also one string with semicolons between the entries.
        image_keys: Keys of the image or video, the first one present counts.
        label_key: Key of the class number.
        num_classes: Number of classes; 0 = labels are not read.
        caption_key: Keys of the caption, the first one present counts: json is an object with the caption in it (or a
            list of captions), any other a text. None = no captions.
        caption_field: Field of that json; default: caption, captions, text, title, ...
        caption_lines: Each line of a text is a caption of its own.
        extra_keys: Keys that are kept in `Sample.extra`: txt as a string, json parsed, others as bytes.
        stream: True = read local shards in sequence too, like URLs (compressed ones can only be read so).
        shuffle_buffer: Samples that a reader of a stream mixes.
    """

    name: Literal["webdataset"] = "webdataset"
    shards: Annotated[list[str], BeforeValidator(_as_shards)] = Field(min_length=1)
    image_keys: Keys = Field([*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS], min_length=1)
    label_key: str = "cls"
    num_classes: int = Field(0, ge=0)
    caption_key: Keys | None = Field(["txt", "caption", "json"])
    caption_field: str | None = None
    caption_lines: bool = False
    extra_keys: Keys = Field([])
    stream: bool = False
    shuffle_buffer: int = Field(1000, ge=1)

    def build(self, progress: Progress | None = None) -> "WebDataset | WebDatasetStream":
        """Open the source; local shards without a valid index are scanned.

        Args:
            progress: Told after every scanned shard: samples so far, shard.

        Raises:
            ConfigError: No shards match, some are no tar files, or none has an image.
        """
        shards, urls, problems = _expand(self.shards)
        if urls and shards and not self.stream:
            problems.append("webdataset: local shards and URLs in one source; download the others, or set "
                            "`stream: true` to read all of them in sequence")  # fmt: skip
        if problems:
            raise ConfigError(problems)
        if not urls and not self.stream:
            return _open_local(self, [shard.absolute() for shard in shards], progress)
        if self.samples_per_epoch is None:
            raise ConfigError(
                ["webdataset: samples_per_epoch is required for pipes, URLs and `stream: true`: they cannot be counted"]
            )
        return WebDatasetStream(self, [*urls, *map(str, shards)], self.samples_per_epoch)


def _expand(entries: Sequence[str]) -> tuple[list[Path], list[str], list[str]]:
    """Local shards, URLs, problems."""
    from webdataset.gopen import gopen_schemes
    from webdataset.shardlists import expand_urls

    shards: list[Path] = []
    urls: list[str] = []
    problems: list[str] = []
    for entry in entries:
        try:
            expanded = expand_urls(entry)
        except (AssertionError, ValueError) as error:
            problems.append(f"webdataset: cannot expand shards {entry!r}: {error}; ${{X}} means the variable WDS_X")
            continue
        for item in expanded:
            scheme = re.match(r"(?!file:)([a-z][a-z0-9+]*):", item)
            if scheme and scheme[1] == "s3":
                urls.append(f"pipe:aws s3 cp {shlex.quote(item)} -")
                continue
            if scheme and scheme[1] in gopen_schemes:
                urls.append(item)
                continue
            if scheme:
                known = ", ".join(sorted({"s3", *gopen_schemes} - {"__default__"}))
                problems.append(f"webdataset: cannot open {item}: known are local paths and {known}")
                continue
            path = Path(re.sub(r"^file:(//)?", "", item)).expanduser()
            if path.is_file():
                shards.append(path)
            elif path.is_dir():
                problems.append(f"webdataset: {path} is a folder; give its shards, as in {path}/*.tar")
            elif found := _matches(path):
                shards += found
            else:
                problems.append(f"webdataset: no shard matches {path} (from shards: {entry!r}); check the path, and "
                                "where numbers are missing in between use a wildcard")  # fmt: skip
    if len(problems) > 10:
        problems = [*problems[:10], f"webdataset: ... and {len(problems) - 10} more"]
    return shards, urls, problems


def _matches(pattern: Path) -> list[Path]:
    found = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 (the pattern may be absolute)
    return [Path(path) for path in sorted(found) if not path.endswith(INDEX_SUFFIX)]


# ------------------------------------------------------------------------------------------------- local shards


def _open_local(config: Config, shards: list[Path], progress: Progress | None) -> "WebDataset":
    indexes: dict[Path, dict[str, Any]] = {}
    problems: list[str] = []
    num_samples = 0
    # each process in its own order: those of one machine share the scanning without talking to each other
    for shard in random.Random(os.getpid()).sample(shards, len(shards)):
        try:
            found = find_index(shard)
            index = found or index_shard(shard)
        except ValueError as error:
            problems.append(f"webdataset: {error}")
            continue
        except OSError as error:
            problems.append(f"webdataset: {shard}: {error.strerror or error} ({error.filename})")
            continue
        indexes[shard] = index.meta
        num_samples += index.meta["samples"]
        if progress is not None and found is None:
            progress(num_samples, str(shard))
        if cut := index.meta["cut"]:
            log.warning("%s %s; the %d samples before are used", shard, cut, index.meta["samples"])
    if problems:
        raise ConfigError(sorted(problems)[:10] + (["webdataset: ... and more"] if len(problems) > 10 else []))
    suffixes = {suffix for meta in indexes.values() for suffix in meta["suffixes"]}
    if not suffixes & set(config.image_keys):
        raise ConfigError(
            [f"webdataset: no images in {shards[0]}{' and the others' if len(shards) > 1 else ''}: its files have the "
             f"keys {', '.join(sorted(suffixes)[:20]) or '(none)'}; name those of the images in `image_keys`"]
        )  # fmt: skip
    has_captions = bool(suffixes & set(config.caption_key or []))
    table = [_ShardRow(str(s), indexes[s]["shard"][1], indexes[s]["shard"][2], indexes[s]["samples"]) for s in shards]
    has_videos = next(key for key in config.image_keys if key in suffixes) in VIDEO_EXTENSIONS
    return WebDataset(config, table, has_captions=has_captions, has_videos=has_videos)


@dataclass(frozen=True)
class _ShardRow:
    """A shard as it was when the source was opened."""

    path: str
    size: int
    mtime_ns: int
    num_samples: int


_open_shard = lru_cache(MAX_OPEN_SHARDS)(IndexedTar)
"""Shared by all sources of a process; a shard is closed when the last reader lets go of it."""


class WebDataset:
    """All samples of some local shards, as a `Source`.

    Attributes:
        has_captions: Whether there are files that hold captions.
        has_videos: Whether the samples are videos.
        identity: Two sources of the same identity have the same samples in the same order.
    """

    def __init__(
        self, config: Config, shards: Sequence[_ShardRow], *, has_captions: bool = False, has_videos: bool = False
    ) -> None:
        self._config, self._shards = config, list(shards)
        self.has_captions, self.has_videos = has_captions, has_videos
        self._ends = np.cumsum([shard.num_samples for shard in shards])
        self.num_classes = config.num_classes
        self.identity = hashlib.blake2b(repr(self._shards).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Sample:
        """The sample of this index; its name is `shard.tar:key`.

        Raises:
            OSError: It has no image, or cannot be read.
            ValueError: It has no valid label.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = self._shards[number]
        shard = _open_shard(row.path, row.size, row.mtime_ns)
        inside = index - int(self._ends[number]) + row.num_samples
        files = shard.files(inside)
        return _make_sample(
            f"{row.path}:{shard.key(inside)}", list(files), lambda k: shard.content(files[k]), self._config
        )


def _make_sample(name: str, keys: Sequence[str], content: Callable[[str], bytes], config: Config) -> Sample:
    """Put a sample together from its files, whose content is only read where the config asks for it."""
    image_key = next((key for key in config.image_keys if key in keys), None)
    if image_key is None:
        raise OSError(errno.EIO, f"no image among its keys {', '.join(keys)} (image_keys names those of images)", name)
    label = -1
    if config.num_classes:
        text = content(config.label_key).decode("utf-8", "replace").strip() if config.label_key in keys else None
        label = int(text) if text and text.isdecimal() else -1
        if not 0 <= label < config.num_classes:
            raise ValueError(f"webdataset: {name} has label {text!r} under key {config.label_key!r}, not a number below"
                             f" num_classes={config.num_classes}; correct label_key or num_classes, or set "
                             "num_classes: 0 to do without labels")  # fmt: skip
    extra: dict[str, Any] = {}
    for key in config.extra_keys:
        if key in keys:
            data = content(key)
            try:
                extra[key] = json.loads(data) if key == "json" else data.decode() if key == "txt" else data
            except ValueError as error:
                raise OSError(errno.EIO, f"its {key} is not readable: {error}", name) from None
    if config.caption_key and (captions := _captions(keys, content, config)):
        extra["captions"] = captions
    data = content(image_key)
    is_video = image_key.rpartition(".")[2] in VIDEO_EXTENSIONS
    return Sample(Video(data, name) if is_video else data, name, label, extra or None)


def _captions(keys: Sequence[str], content: Callable[[str], bytes], config: Config) -> list[str]:
    """Captions of a sample; none where what should hold them cannot be read, as nobody may want them."""
    key = next((key for key in config.caption_key or () if key in keys), None)
    if key is None:
        return []
    try:
        text = content(key).decode()
        if key == "json" or key.endswith(".json"):
            value = json.loads(text)
            return captions_in(value if config.caption_field is None else value.get(config.caption_field))
    except (ValueError, AttributeError):  # no text, no JSON, no object
        return []
    return captions_in(text.splitlines() if config.caption_lines else text)


# ------------------------------------------------------------------------------------------------- pipes and URLs


class WebDatasetStream:
    """Shards that can only be read in sequence, through the webdataset library; a `StreamSource`.

    Resume is what that allows: from the beginning of an epoch's shards, never from the middle. `epoch` alone decides
    which shards come in which order; the position within the epoch is lost.
    """

    def __init__(self, config: Config, urls: Sequence[str], samples_per_epoch: int) -> None:
        self._config, self._urls = config, list(urls)
        self.num_classes = config.num_classes
        self.has_captions = bool(config.caption_key)  # nobody can look before the run
        self.samples_per_epoch = samples_per_epoch

    def stream(self, *, epoch: int, seed: int, part: int, num_parts: int) -> Iterator[Sample]:
        """This reader's share of an epoch: exactly `samples_per_epoch / num_parts` samples (rounded).

        Every shard belongs to one reader; where there are more readers than shards, those of one shard read all of it
        and take every n-th sample. A reader whose shards end early starts them again. A shard that breaks off is left
        with a warning.

        Raises:
            ValueError: This reader's shards give no sample at all, or a label is not valid.
        """
        from webdataset.filters import shuffle
        from webdataset.tariterators import group_by_keys, tar_file_expander

        rng = random.Random(f"{seed} {epoch}")
        urls = rng.sample(self._urls, len(self._urls))
        first = part % len(urls)
        mine = urls[first::num_parts]
        place, readers = part // len(urls), max(1, len(range(first, num_parts, len(urls))))
        mixing = shuffle(self._config.shuffle_buffer, rng=random.Random(f"{seed} {epoch} {part}"))
        quota, given = len(range(part, self.samples_per_epoch, num_parts)), 0
        while given < quota:
            errors: list[str] = []
            left = partial(_left, errors=errors)
            raw = group_by_keys(tar_file_expander(_open_each(mine, left), handler=left), handler=left)
            before = given
            for sample in mixing(self._samples(islice(raw, place, None, readers), errors)):
                yield sample
                given += 1
                if given == quota:
                    return
            if given == before and readers > 1 and not errors:
                return  # a shard of fewer samples than readers
            if given == before:
                text = f"webdataset: no sample with an image in {', '.join(mine[:3])}{' ...' if len(mine) > 3 else ''}"
                raise ValueError("; ".join([text, *errors[-3:], "check the URLs and image_keys"]))

    def _samples(self, raw: Iterator[dict[str, Any]], errors: list[str]) -> Iterator[Sample]:
        for files in raw:
            name = f"{files['__url__']}:{files['__key__']}"
            keys = [key for key in files if not key.startswith("__")]
            try:
                yield _make_sample(name, keys, files.__getitem__, self._config)
            except OSError as error:
                _left(error, errors)


def _open_each(urls: Sequence[str], left: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The library's `url_opener`, which leaves the closing to the garbage collector."""
    from webdataset.gopen import gopen, set_options

    for url in urls:
        try:
            stream = gopen(url)
        except Exception as error:
            left(error)
            continue
        # a command that still writes when we stop reading: the shell reports 141 for it, a lone command is ended by the
        # signal itself; 23 is curl's word for the same
        set_options(stream, ignore_status=[0, 23, 141, -signal.SIGPIPE])
        try:
            yield {"url": url, "stream": stream}
        finally:
            try:
                stream.close()
            except OSError as error:
                left(error)


def _left(error: Exception, errors: list[str]) -> bool:
    """Handler of the library: log, remember, go on."""
    errors.append(f"{type(error).__name__}: {error}")
    log.warning("stream: skipped what could not be read: %s", errors[-1])
    return True
