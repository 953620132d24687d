"""Images of a folder by what a text says or another image shows.

folder -> `Index.update` (new and changed images only) -> features[N, E] on disk; texts and images -> mean direction ->
`Index.search` -> cosines -> `Hit`s

Source: ours; features and cosines are those of zero-shot classification (spec sections 1.5 and 3.1 of EVA-CLIP). As in
`data/file_index.py`, indexes lie in the user's cache and not among the photographs, unless a place is named.
"""

import os
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openeva.data.file_index import IMAGE_EXTENSIONS, cache_dir, index_path, locked, scan
from openeva.engine.precision import PrecisionName
from openeva.heads.clip import ClipModel
from openeva.inference.index_file import Files, Parts, Stamp, Stored, compare, read
from openeva.inference.inputs import FoundImage, ImageInput, file_image, find_images
from openeva.inference.predictor import BATCH_SIZE, Wanted
from openeva.inference.texts import checked_texts
from openeva.inference.towers import Towers, unit

DEFAULT_WEIGHTS = "EVA02_CLIP_B_psz16_s8B"
TOP = 20
PART_ROWS = 4096
"""Images after which what is done is written down, or after so many seconds:"""
PART_SECONDS = 20.0
BLOCK_ROWS = 1024
"""Rows that are compared at a time: they stay in the processor's cache."""

NOT_FINITE = "the model's answer is not finite; try precision fp32"

Finished = Callable[[int, int, str | None], None]
"""Called after every image with the number done, the number to do and, where it was broken, its name and why."""


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        path: Of the file, below the folder as it was given.
        score: Cosine of the image with what was asked for.
    """

    path: Path
    score: float


@dataclass
class Update:
    """What `Index.update` did.

    Attributes:
        num_new: Images encoded for the first time.
        num_changed: Images encoded again, since their file changed.
        num_removed: Images that are no longer there.
        broken: Images that could not be read this time, and why. Those that are no whole images are tried again when
            their file changes, files that could not be opened every time.
        num_broken: All of those, with the ones met earlier.
        num_images: Images that can be found now.
        replaced: Weights whose index made way for this one; None where there was none, or of the same weights.
    """

    num_new: int = 0
    num_changed: int = 0
    num_removed: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    num_broken: int = 0
    num_images: int = 0
    replaced: str | None = None

    def lines(self) -> list[str]:
        """The account for people."""
        counts = {"new": self.num_new, "changed": self.num_changed, "no longer there": self.num_removed}
        counts["not readable"] = self.num_broken
        told = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        again = [f"the index was of other weights ({self.replaced}), so it was made anew"] if self.replaced else []
        return [*again, f"{self.num_images:,} images in the index{told}"]


class Index:
    """Features of all images of a folder, kept on disk.

    index = Index("photos")
    index.update()                                  # encodes what is new or changed since the last time
    index.search("a dog on a beach", top=5)         # [Hit(path, score), ...]

    Args:
        folder: Searched at any depth.
        weights: Those of a CLIP: official name, run, model folder or file, or a model. Default: those of the index, or
            `DEFAULT_WEIGHTS`.
        place: File of the index. Default: one in the cache folder (`$OPENEVA_CACHE`), named after the folder.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", ...
        precision: Of the image tower.
        num_readers: Threads that read images; default: one per processor, at most 16.

    Raises:
        ValueError: No such folder, or `place` is something else.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        weights: str | Path | ClipModel | None = None,
        place: str | Path | None = None,
        batch_size: int = BATCH_SIZE,
        device: str = "auto",
        precision: PrecisionName = "auto",
        num_readers: int | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._root = Path(os.path.abspath(self.folder))  # noqa: PTH100 (links stay as they are)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the folder whose images are to be found")
        self.place = Path(place).expanduser() if place is not None else place_of(self._root)
        if self.place.suffix == ".lock":
            raise ValueError(f"{self.place}: files ending in .lock are for locks; give another file (--index)")
        self._parts = Parts(self.place)
        self._stored = read(self.place)
        if self._stored is not None:
            self._check_folder(self._stored.meta["folder"])
        settings = {"batch_size": batch_size, "device": device, "precision": precision, "num_readers": num_readers}
        self._towers = Towers(weights or self._recorded_weights(), settings)

    def __len__(self) -> int:
        return 0 if self._stored is None else len(self._stored)

    @property
    def weights(self) -> str:
        """What the index is made with, in words."""
        return self._towers.name

    def _check_folder(self, of: str) -> None:
        if Path(of) != self._root and Path(of).is_dir() and not self._root.samefile(of):
            raise ValueError(f"{self.place} is the index of {of}, not of {self._root}; give another place (--index)")

    def _recorded_weights(self) -> str:
        held = [*([] if self._stored is None else [self._stored]), *self._parts.read()]
        if not held:
            return DEFAULT_WEIGHTS
        address = held[-1].meta["weights"]
        if address is None:
            raise ValueError(f"{self.place} was made with a model in memory; give weights")
        return str(address)

    # ------------------------------------------------------------------------------------------------- update

    def update(self, finished: Finished | None = None) -> Update:
        """Bring the index up to date: encode new and changed images, forget those that are gone.

        What is done when it is interrupted is kept. Of several processes, one works and the others wait for it.

        Args:
            finished: Told about every image that is encoded.

        Raises:
            ConfigError: The weights are unknown or out of reach.
            ValueError: They have no text tower, there is no image at all (then the index stays as it is: a drive may
                not be there), or the index cannot be written where it is.
            OSError: The folder cannot be read, or the disk is full.
        """
        done = Update()
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.place, waiting=f"another process is indexing {self.folder}; waiting"))
            except OSError as error:
                raise ValueError(
                    f"{self.place}: the index cannot be written there ({error.strerror}); give another file (--index),"
                    " or search what is indexed (--no-update)"
                ) from error
            self._parts.tidy()
            self._update(self._files(), done, finished)
        return done

    def _update(self, files: Files, done: Update, finished: Finished | None) -> None:
        base = self._usable(done)
        held = [] if base is None else [base]
        kept = compare([*held, *self._parts.read()], files)
        todo, known, gone = kept.unknown(), kept.known, kept.gone
        unsettled = self._encode(files, todo, done, finished)
        parts = self._parts.read()
        if len(todo):
            kept = compare([*held, *parts], files)
        num_images = int(np.count_nonzero(kept.source >= 0))
        settled = base is not None and (num_images, len(kept.broken)) == (len(base), len(base.broken))
        if base is None or parts or not settled or self._moved(base):
            kept.write(self.place, self._meta())
            self._parts.remove()
        self._stored = read(self.place)
        encoded = todo[kept.source[todo] >= 0]
        done.num_changed = int(np.count_nonzero(known[encoded]))
        done.num_new, done.num_removed = len(encoded) - done.num_changed, len(gone)
        done.num_broken, done.num_images = len(kept.broken) + unsettled, num_images

    def _usable(self, done: Update) -> Stored | None:
        """The index as it is on disk, if it is of these weights; what is of others is given up."""
        if any(not self._towers.made(part.meta) for part in self._parts.read()):
            self._parts.remove()
        base = read(self.place)
        if base is None or self._towers.made(base.meta):
            return base
        done.replaced = str(base.meta["weights"] or base.meta["identity"])
        return None

    def _moved(self, base: Stored) -> bool:
        """Whether folder or weight file are elsewhere now, or the same in new clothes."""
        return any(base.meta[key] != value for key, value in self._meta().items())

    def _meta(self) -> dict[str, Any]:
        return {"folder": str(self._root), **self._towers.facts()}

    def _files(self) -> Files:
        """Images of the folder, as they are now."""
        names: list[bytes] = []
        stamps = array("q")
        begin = len(os.fsencode(self.folder).rstrip(b"/")) + 1
        for folder in scan(self.folder, IMAGE_EXTENSIONS):
            for name in folder.names:
                path = folder.path + b"/" + name
                try:
                    status = os.stat(path)  # noqa: PTH116 (bytes, and a million of them)
                except OSError:  # gone meanwhile, or a link to nowhere
                    continue
                names.append(path[begin:])
                stamps.extend((status.st_size, status.st_mtime_ns))
        if not names:
            kept = f"; the index of its {len(self):,} images is kept ({self.place})" if len(self) else ""
            raise ValueError(f"{self.folder}: no images in this folder ({', '.join(IMAGE_EXTENSIONS)}){kept}")
        stamp_N2 = np.frombuffer(stamps, np.int64).reshape(-1, 2)
        return Files(names, stamp_N2[:, 0], stamp_N2[:, 1])

    def _path(self, name: bytes) -> Path:
        return self.folder / os.fsdecode(name)

    def _encode(self, files: Files, todo: NDArray[np.int64], done: Update, finished: Finished | None) -> int:
        """Encode images; every so often, and whatever happens, what is done goes to a part.

        Returns:
            How many could not be encoded, but may be the next time, though their files stay as they are.
        """
        if not len(todo):
            return 0
        waiting, unsettled = _Waiting(), 0
        images = (file_image(os.fsencode(self._path(files.names[position]))) for position in todo.tolist())
        with closing(self._towers.predictor(images, Wanted(embedding=True))) as answers:
            try:
                for number, (position, answer) in enumerate(zip(todo.tolist(), answers, strict=True), start=1):
                    error = answer.error
                    if answer.embedding is not None and np.isfinite(answer.embedding.pooled).all():
                        waiting.features.append((position, unit(answer.embedding.pooled).astype(np.float16)))
                    elif error is not None and _can_be_opened(self._path(files.names[position])):
                        waiting.broken[position] = error
                    else:
                        error, unsettled = error or NOT_FINITE, unsettled + 1
                    if error is not None:
                        done.broken[answer.source] = error
                    if waiting.is_due():
                        self._put_down(files, waiting)
                        waiting = _Waiting()
                    if finished is not None:
                        finished(number, len(todo), error and f"{answer.source}: {error}")
            finally:
                self._put_down(files, waiting)
        return unsettled

    def _put_down(self, files: Files, waiting: "_Waiting") -> None:
        if waiting.features or waiting.broken:
            rows = np.array([position for position, _ in waiting.features], np.int64)
            features = [feature_E for _, feature_E in waiting.features]
            broken = {files.names[position]: (files.stamp(position), why) for position, why in waiting.broken.items()}
            matrix_NE = np.stack(features) if features else np.empty((0, 0), np.float16)
            self._parts.add(files.take(rows), matrix_NE, broken, self._meta())

    # ------------------------------------------------------------------------------------------------- search

    def search(
        self,
        texts: str | Sequence[str] = (),
        images: ImageInput | Iterable[ImageInput] = (),
        *,
        top: int | None = TOP,
        threshold: float | None = None,
    ) -> list[Hit]:
        """The images that fit best, best first. Only the text tower is loaded, and that only for texts.

        Args:
            texts: What is looked for; several count together, with equal weight.
            images: What is looked for looks like this (see `find_images`); counts together with the texts. An image of
                the index needs no model.
            top: Most images to return; None = all.
            threshold: Least cosine.

        Raises:
            ImageError: An image to look for cannot be read.
            ValueError: Nothing to look for, no index yet, or one of other weights.
        """
        if top is not None and top < 1:
            raise ValueError(f"top {top} must be at least 1")
        stored = self._of_these_weights()
        query_E = self._query(stored, checked_texts(texts), images)
        if not len(stored):
            return []
        score_N = cosines(stored.features, query_E)
        best = _largest(score_N, top)
        return [
            Hit(self._path(stored.files.names[row]), float(score_N[row]))
            for row in best
            if threshold is None or score_N[row] >= threshold
        ]

    def _of_these_weights(self) -> Stored:
        if self._stored is None:
            raise ValueError(
                f"there is no index of {self.folder} yet ({self.place}); make it with update() (on the"
                " command line: leave out --no-update)"
            )
        if not self._towers.made(self._stored.meta):
            raise ValueError(
                f"{self.place} was made with other weights ({self._stored.meta['weights']}) than {self.weights}; make"
                " it anew with update(), or give those"
            )
        return self._stored

    def _query(
        self, stored: Stored, texts: Sequence[str], images: ImageInput | Iterable[ImageInput]
    ) -> NDArray[np.float32]:
        """The direction `[E]` of what is looked for: the mean of all parts, each of length 1."""
        parts = [*self._towers.texts(texts)] if texts else []
        looked_for = list(find_images(images))
        rows = self._rows_of(stored, looked_for)
        parts += [unit(stored.features[row].astype(np.float32)) for row in rows.values()]
        unknown = [image for number, image in enumerate(looked_for) if number not in rows]
        parts += self._towers.images(unknown) if unknown else []
        if not parts:
            raise ValueError("nothing to look for: give a text or an image")
        return unit(np.mean(parts, axis=0))

    def _rows_of(self, stored: Stored, images: Sequence[FoundImage]) -> dict[int, int]:
        """Number of an image -> its row in the index, of images that are there and have not changed since."""
        root = os.fsencode(self._root).rstrip(b"/") + b"/"
        paths = {n: os.path.abspath(image.path) for n, image in enumerate(images) if image.path is not None}  # noqa: PTH100 (bytes; links stay as they are)
        numbers: dict[bytes, list[int]] = {}
        for number, path in paths.items():
            if path.startswith(root):
                numbers.setdefault(path[len(root) :], []).append(number)
        found: dict[int, int] = {}
        for row, name in enumerate(stored.files.names) if numbers else ():
            if name in numbers:
                with suppress(OSError):
                    if Stamp.of(root + name) == stored.files.stamp(row):
                        found |= dict.fromkeys(numbers[name], row)
        return found


def place_of(folder: Path) -> Path:
    """Where the index of a folder (an absolute path) lies unless a place is named."""
    return cache_dir() / "search" / index_path([folder], IMAGE_EXTENSIONS).name


def cosines(features_NE: NDArray[np.float16], query_E: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of rows of length 1 with a direction of length 1, in single precision, a block of rows at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mapped file cannot be written to, and nothing here does
        rows_NE = torch.from_numpy(features_NE)
    query = torch.from_numpy(query_E)
    score_N, block_BE = torch.empty(len(rows_NE)), torch.empty(BLOCK_ROWS, rows_NE.shape[1])
    for begin in range(0, len(rows_NE), BLOCK_ROWS):
        rows = rows_NE[begin : begin + BLOCK_ROWS]
        block_BE[: len(rows)].copy_(rows)
        torch.mv(block_BE[: len(rows)], query, out=score_N[begin : begin + len(rows)])
    return score_N.numpy()


def _largest(score_N: NDArray[np.float32], top: int | None) -> list[int]:
    """Numbers of the largest values, largest first, equal ones in their order."""
    if top is not None and top < len(score_N):
        least = np.partition(score_N, -top)[-top]
        rows = np.flatnonzero(score_N >= least)
    else:
        rows = np.arange(len(score_N))
    order: list[int] = rows[np.argsort(-score_N[rows], kind="stable")][:top].tolist()
    return order


def _can_be_opened(path: Path) -> bool:
    """Whether bytes of a file can be had; if not, the image in it may be whole."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


@dataclass
class _Waiting:
    """What is not on disk yet, by position in the files.

    Attributes:
        features: (position, `[E]`).
        broken: Position -> why.
        begun: When, in seconds.
    """

    features: list[tuple[int, NDArray[np.float16]]] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        """Whether it is time to put it down."""
        return len(self.features) >= PART_ROWS or time.monotonic() - self.begun > PART_SECONDS
