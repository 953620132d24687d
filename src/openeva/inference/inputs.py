"""Anybody's images: paths, folders, patterns, URLs, Pillow images, arrays and tensors, one after the other.

whatever was given -> `find_images` -> `FoundImage`s (a name, and how to read the pixels later, in a worker thread)
"""

import glob
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openeva.data.decode import RGB, decode
from openeva.data.file_index import IMAGE_EXTENSIONS, printable, scan
from openeva.data.transform import pixels_of

TIMEOUT_SECONDS = 20.0
"""How long a server may stay silent."""
MAX_DOWNLOAD_BYTES = 256 * 2**20
"""Larger answers are refused: no photograph is that large."""


class ImageError(OSError):
    """An image that cannot be used; the message starts with its name."""

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
            raise ImageError(self.source, _reason(error)) from error


ImageInput = str | Path | bytes | Image.Image | NDArray[Any] | Tensor | FoundImage
"""One image, or an address that stands for one or many (folder, pattern)."""

_ONE = (str, Path, bytes, Image.Image, np.ndarray, Tensor, FoundImage)


def find_images(images: ImageInput | Iterable[ImageInput]) -> Iterator[FoundImage]:
    """The images that an input stands for, in its order; folders and patterns sorted.

    A list is checked as a whole before the first image is read; any other iterable is consumed as it goes, so that it
    may be endless.

    Args:
        images: A path, a folder (searched at any depth), a pattern (`photos/**/*.jpg`), an http(s) URL, an encoded
            image (bytes), a Pillow image, an array `[Y, X]`, `[Y, X, 1 | 3 | 4]` or a tensor `[3, Y, X]` (of bytes, or
            floats in 0..1), a batch of such, or an iterable of all these.

    Raises:
        ValueError: An address leads to no image; the message names all such addresses of a list.
    """
    items: Iterable[ImageInput] = [images] if isinstance(images, _ONE) else images
    if isinstance(items, list | tuple):
        found = [_found_at(item) if isinstance(item, str | Path) else None for item in items]
        problems = [problem for problem in found if isinstance(problem, str)]
        if problems:
            raise ValueError("\n".join(problems))
        return _in_order(items, found)
    return _in_order(items, None)


def _in_order(items: Iterable[ImageInput], found: "list[list[FoundImage] | str | None] | None") -> Iterator[FoundImage]:
    number = 0
    for position, item in enumerate(items):
        if isinstance(item, str | Path):
            here = found[position] if found is not None else _found_at(item)
            if isinstance(here, str):
                raise ValueError(here)
            yield from here or ()
        elif isinstance(item, FoundImage):
            yield item
        else:
            for image in _single(item):
                number += 1
                yield FoundImage(getattr(image, "filename", "") or f"image {number}", partial(pixels_of, image))


def _single(item: Any) -> Iterator[Any]:
    """The images of a batch, or the one image."""
    if isinstance(item, np.ndarray | Tensor) and item.ndim == 4:
        yield from item
    else:
        yield item


def _found_at(address: str | Path) -> list[FoundImage] | str:
    """The images at an address, or what is wrong with it."""
    text = str(address)
    if text.startswith(("http://", "https://")):
        return [FoundImage(text, partial(_read_url, text))]
    if "://" in text:
        return f"{text}: only http and https addresses are fetched"
    path = Path(text).expanduser()
    if path.is_dir():
        files = [folder.path + b"/" + name for folder in scan(path, IMAGE_EXTENSIONS) for name in folder.names]
        return [
            file_image(file) for file in files
        ] or f"{text}: no images in this folder ({', '.join(IMAGE_EXTENSIONS)})"
    if path.exists():
        return [file_image(os.fsencode(path))]
    if glob.has_magic(text):
        suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
        hits = sorted(hit for hit in glob.glob(str(path), recursive=True) if hit.lower().endswith(suffixes))  # noqa: PTH207
        return [file_image(os.fsencode(hit)) for hit in hits] or f"{text}: no image fits this pattern"
    return f"{text}: no such file or folder"


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


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
