"""Anybody's images and videos: paths, folders, patterns, URLs, Pillow images, arrays and tensors, one after the other.

whatever was given -> `find_images` -> `FoundImage`s (a name, and how to read the pixels later, in a worker thread)
whatever was given -> `find_videos` -> `Video`s
addresses -> `Media`, where it is not known yet which of the two a model sees
"""

import glob
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openeva.data.decode import RGB, decode
from openeva.data.file_index import IMAGE_EXTENSIONS, printable, scan
from openeva.data.transform import pixels_of
from openeva.data.video import VIDEO_EXTENSIONS, Video

TIMEOUT_SECONDS = 20.0
"""How long a server may stay silent."""
MAX_DOWNLOAD_BYTES = 256 * 2**20
"""Larger answers are refused: no photograph is that large."""


IMAGES_NEEDED, VIDEOS_NEEDED = "images are needed here", "videos are needed here"
"""What is said of an address that leads to the other kind alone, where nothing is known of the model."""
Kind = Literal["images", "videos"]


class ImageError(OSError):
    """An image, or a video, that cannot be used; the message starts with its name."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source, self.reason = source, reason


@dataclass(frozen=True)
class FoundImage:
    """An image that can be read.

    Attributes:
        source: Path, URL, or "image 3" for one from memory.
        open: Reads it; may raise anything that a broken file can cause.
        path: Of a file; None for others.
    """

    source: str
    open: Callable[[], RGB]
    path: bytes | None = None

    def read(self) -> RGB:
        """RGB pixels, uint8 `[Y, X, 3]`.

        Raises:
            ImageError: It cannot be fetched or is not an image.
        """
        try:
            return self.open()
        except ImageError:
            raise
        except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
            raise ImageError(self.source, reason_of(error)) from error


ImageInput = str | Path | bytes | Image.Image | NDArray[Any] | Tensor | FoundImage
"""One image, or an address that stands for one or many (folder, pattern)."""

VideoInput = str | Path | bytes | Video
"""One video, or an address that stands for one or many (folder, pattern)."""
Input = ImageInput | VideoInput

_ONE = (str, Path, bytes, Image.Image, np.ndarray, Tensor, FoundImage, Video)


def find_images(images: Input | Iterable[Input], because: str = IMAGES_NEEDED) -> Iterator[FoundImage]:
    """The images that an input stands for, in its order; folders and patterns sorted.

    A list is checked as a whole before the first image is read; any other iterable is consumed as it goes, so that it
    may be endless.

    Args:
        images: A path, a folder (searched at any depth), a pattern (`photos/**/*.jpg`), an http(s) URL, an encoded
            image (bytes), a Pillow image, an array `[Y, X]`, `[Y, X, 1 | 3 | 4]` or a tensor `[3, Y, X]` (of bytes, or
            floats in 0..1), a batch of such, or an iterable of all these.
        because: Why videos will not do, for the message.

    Raises:
        ValueError: An address leads to no image; the message names all such addresses of a list.
    """
    return _images(_looked_up(images, "images", because), because)


def find_videos(videos: Input | Iterable[Input], because: str = VIDEOS_NEEDED) -> Iterator[Video]:
    """The videos that an input stands for, as `find_images` does it.

    Args:
        videos: A path, a folder (searched at any depth), a pattern (`clips/**/*.mp4`), an encoded video (bytes), a
            `Video`, or an iterable of these.
        because: Why images will not do, for the message.

    Raises:
        ValueError: An address leads to no video; the message names all such addresses of a list.
    """
    return _videos(_looked_up(videos, "videos", because), because)


class Media:
    """What lies at some addresses, while it is not known yet whether images or videos are wanted.

    Args:
        addresses: Paths, folders, patterns, URLs.

    Raises:
        ValueError: Some lead to neither; the message names them all.
    """

    def __init__(self, addresses: Sequence[str | Path]) -> None:
        self._places = [_Place.at(address) for address in addresses]
        if problems := [place.problem() for place in self._places if place.is_empty]:
            raise ValueError("\n".join(problems))

    @property
    def kind(self) -> Kind | None:
        """What they can only be; None where both are there, or files whose names do not tell."""
        found = [(bool(place.images), bool(place.videos)) for place in self._places]
        if all(images and not videos for images, videos in found):
            return "images"
        return "videos" if all(videos and not images for images, videos in found) else None

    def images(self, because: str = IMAGES_NEEDED) -> list[FoundImage]:
        """All images.

        Raises:
            ValueError: An address leads to videos alone.
        """
        return [image for found in _of_kind(self._places, "images", because) for image in found]

    def videos(self, because: str = VIDEOS_NEEDED) -> list[Video]:
        """All videos.

        Raises:
            ValueError: An address leads to images alone.
        """
        return [video for found in _of_kind(self._places, "videos", because) for video in found]


def _looked_up(items: Any, kind: Kind, because: str) -> Iterator[Any]:
    """The items, with what lies there in the place of addresses; a list is checked before the first is taken."""
    items = [items] if isinstance(items, _ONE) else items
    if isinstance(items, list | tuple):
        places = [_Place.at(item) for item in items if isinstance(item, str | Path)]
        found = iter(_of_kind(places, kind, because))
        parts = [next(found) if isinstance(item, str | Path) else [item] for item in items]
        return (one for part in parts for one in part)
    return _one_by_one(items, kind, because)


def _one_by_one(items: Iterable[Any], kind: Kind, because: str) -> Iterator[Any]:
    for item in items:
        if isinstance(item, str | Path):
            yield from _of_kind([_Place.at(item)], kind, because)[0]
        else:
            yield item


def _images(items: Iterable[Any], because: str) -> Iterator[FoundImage]:
    number = 0
    for item in items:
        if isinstance(item, FoundImage):
            yield item
        elif isinstance(item, Video):
            raise ValueError(f"{item.name}: a video, but {because}")
        else:
            for image in _single(item):
                number += 1
                yield FoundImage(getattr(image, "filename", "") or f"image {number}", partial(pixels_of, image))


def _videos(items: Iterable[Any], because: str) -> Iterator[Video]:
    for number, item in enumerate(items, start=1):
        if isinstance(item, Video):
            yield item
        elif isinstance(item, bytes):
            yield Video(item, f"video {number}")
        else:
            name = item.source if isinstance(item, FoundImage) else f"{type(item).__name__} {number}"
            raise ValueError(f"{name}: no video, but {because}; give a path, bytes or openeva.data.video.Video")


def _single(item: Any) -> Iterator[Any]:
    """The images of a batch, or the one image."""
    if isinstance(item, np.ndarray | Tensor) and item.ndim == 4:
        yield from item
    else:
        yield item


@dataclass(frozen=True)
class _Place:
    """What lies at an address.

    Attributes:
        text: The address.
        images: Images there, and files that may be some.
        videos: The same of videos.
        nothing: Why there is nothing, where it does not depend on what is looked for.
        kind: "folder", "pattern" or "file".
    """

    text: str
    images: list[FoundImage] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    nothing: str = ""
    kind: Literal["file", "folder", "pattern"] = "file"

    @classmethod
    def at(cls, address: str | Path) -> "_Place":
        """Look it up."""
        text = str(address)
        if text.startswith(("http://", "https://")):
            return cls(text, [FoundImage(text, partial(_read_url, text))])
        if "://" in text:
            return cls(text, nothing="only http and https addresses are fetched")
        path = Path(text).expanduser()
        if path.is_dir():
            folders = scan(path, (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
            return cls._of_files(
                text, "folder", [folder.path + b"/" + name for folder in folders for name in folder.names]
            )
        if path.exists():
            file = os.fsencode(path)
            images, videos = _has_ending(file, IMAGE_EXTENSIONS), _has_ending(file, VIDEO_EXTENSIONS)
            return cls(text, [] if videos else [file_image(file)], [] if images else [_file_video(file)])
        if glob.has_magic(text):
            hits = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (the sign ** of texts)
            return cls._of_files(text, "pattern", [os.fsencode(hit) for hit in hits])
        return cls(text, nothing="no such file or folder")

    @classmethod
    def _of_files(cls, text: str, kind: Literal["folder", "pattern"], files: list[bytes]) -> "_Place":
        images = [file_image(file) for file in files if _has_ending(file, IMAGE_EXTENSIONS)]
        return cls(
            text, images, [_file_video(file) for file in files if _has_ending(file, VIDEO_EXTENSIONS)], kind=kind
        )

    @property
    def is_empty(self) -> bool:
        return not self.images and not self.videos

    def problem(self, wanted: Kind | None = None, because: str = "") -> str:
        """Why there is nothing of what is wanted, None = of either; `because` of what only the other kind is there."""
        if self.nothing:
            return f"{self.text}: {self.nothing}"
        if self.text.startswith(("http://", "https://")):
            return f"{self.text}: videos are not fetched; {because}; download it first if it is one"
        if not self.is_empty:
            other = "videos" if self.videos else "images"
            one = {"videos": "a video", "images": "an image"}[other]
            return f"{self.text}: {one if self.kind == 'file' else f'{other}, no {wanted}'}, but {because}"
        if self.kind == "pattern":
            return f"{self.text}: no {(wanted or 'images or videos').replace('s', '')} fits this pattern"
        endings = {"images": IMAGE_EXTENSIONS, "videos": VIDEO_EXTENSIONS, None: IMAGE_EXTENSIONS + VIDEO_EXTENSIONS}
        return f"{self.text}: no {wanted or 'images or videos'} in this folder ({', '.join(endings[wanted])})"


def _of_kind(places: Iterable[_Place], kind: Kind, because: str) -> list[list[Any]]:
    """What is wanted of each place; none may be without.

    Raises:
        ValueError: Some are; the message names them all.
    """
    found: list[tuple[_Place, list[Any]]] = [(place, list(getattr(place, kind))) for place in places]
    if problems := [place.problem(kind, because) for place, files in found if not files]:
        raise ValueError("\n".join(problems))
    return [files for _, files in found]


def _has_ending(file: bytes, extensions: Sequence[str]) -> bool:
    return file.lower().endswith(tuple(f".{extension}".encode() for extension in extensions))


def _file_video(path: bytes) -> Video:
    return Video(Path(os.fsdecode(path)), printable(path))


def file_image(path: bytes) -> FoundImage:
    """The image in a file, whose name need not be valid UTF-8."""
    return FoundImage(printable(path), lambda: decode(Path(os.fsdecode(path)).read_bytes()), path)


def _read_url(url: str) -> RGB:
    from openeva import __version__

    request = urllib.request.Request(url, headers={"User-Agent": f"openeva/{__version__}", "Accept": "image/*"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            kind = answer.headers.get_content_type()
            data: bytes = answer.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(url, f"the server answers {error.code} {error.reason}") from None
    except TimeoutError:
        raise ImageError(url, f"no answer within {TIMEOUT_SECONDS:g} seconds") from None
    except urllib.error.URLError as error:
        raise ImageError(url, f"cannot be reached ({error.reason})") from None
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageError(url, f"larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB")
    try:
        return decode(data)
    except OSError as error:
        raise ImageError(url, f"{error} (the server calls it {kind})") from None


def reason_of(error: Exception) -> str:
    """What went wrong, without the name of the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
