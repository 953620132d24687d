"""Embeddings of many images, in memory or on disk.

`Predictor` -> one `Embedding` per image -> arrays (`features`), `.npz` (kept in memory until the end) or `.parquet`
(written as they come, in row groups)
"""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from openeva.checkpoints.files import write_atomically
from openeva.engine.precision import PrecisionName
from openeva.inference.inputs import ImageInput
from openeva.inference.predictor import BATCH_SIZE, Embedding, Predictor, Wanted, Weights, checked

ROW_GROUP_BYTES = 64 * 2**20
"""About so much is kept in memory before it is written to a parquet file."""
SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True)
class Embeddings:
    """Features of images, one row each, float32.

    Attributes:
        sources: Path, URL, or "image 3" for one from memory.
        pooled: What the classifier sees (or the backbone's own pooled vector), `[B, D]`.
        patches: `[B, N, D]` in raster order; None where not asked for.
        layers: By number of the block, from 0: its output before the final norm, mean over patches `[B, D]`, or
            `[B, N, D]` with `patches`.
        grid: Rows and columns of patches.
    """

    sources: list[str]
    pooled: NDArray[np.float32]
    patches: NDArray[np.float32] | None
    layers: dict[int, NDArray[np.float32]]
    grid: tuple[int, int]


def features(
    images: ImageInput | Iterable[ImageInput],
    *,
    weights: Weights,
    patches: bool = False,
    layers: tuple[int, ...] = (),
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    precision: PrecisionName = "auto",
    image_size: int | tuple[int, int] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Embeddings:
    """Embeddings of images, from any weights, with a classifier or without.

    Args:
        images: See `openeva.inference.inputs.find_images`.
        weights: See `Predictor`, as are the others.
        patches: One vector per patch too.
        layers: Blocks whose output to return too, from 0; negative ones count from the end.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", ...
        precision: Of the forward pass; the result is float32.
        image_size: Pixels to look at.
        on_error: What a broken image does: "raise", or "skip" it (`sources` tells which are there).

    Raises:
        ImageError: An image is broken and `on_error` is "raise".
        ConfigError: The weights are unknown or out of reach.
        ValueError: No such images or layers, or no image could be read.
    """
    predictor = Predictor(weights, batch_size=batch_size, device=device, precision=precision, image_size=image_size)
    wanted = Wanted(embedding=True, patches=patches, layers=layers)
    rows = _Rows()
    for prediction in checked(predictor(images, wanted), "raise" if on_error == "raise" else "return"):
        if prediction.embedding is not None:
            rows.add(prediction.source, prediction.embedding)
    columns, first = rows.columns(), rows.first
    return Embeddings(
        rows.sources,
        columns["pooled"],
        columns.get("patches"),
        {layer: columns[_layer_name(layer)] for layer in first.layers},
        first.grid,
    )


class NoFeaturesError(ValueError):
    """There is nothing to write: every image was broken."""


class EmbeddingWriter(Protocol):
    """Takes embeddings one by one."""

    def add(self, source: str, embedding: Embedding) -> None:
        """Append one image."""


@contextmanager
def writing(path: Path) -> Iterator[EmbeddingWriter]:
    """A writer for an `.npz` or `.parquet` file, which appears whole at the end or not at all.

    `.npz`: `source` (texts), `pooled` [B, D], `patches` [B, N, D], `layer_3` ..., `grid`. `.parquet`: the same as
    columns of lists, patch vectors one after the other; their shapes are in the file's metadata.

    Raises:
        ValueError: Another ending, or (`NoFeaturesError`) no image came.
        ImportError: pyarrow is missing.
    """
    check_suffix(path)
    writer = _Parquet(path) if path.suffix == ".parquet" else _Rows()
    try:
        yield writer
        if isinstance(writer, _Rows):
            columns = {"source": np.array(writer.sources), **writer.columns(), "grid": np.array(writer.first.grid)}
            write_atomically(path, lambda file: _save_npz(file, columns))
        else:
            writer.finish()
    finally:
        if isinstance(writer, _Parquet):
            writer.discard()


def check_suffix(path: Path) -> None:
    """Tell what cannot be written before hours of work.

    Raises:
        ValueError: Another ending.
        ImportError: pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"features go to a file ending in {' or '.join(SUFFIXES)}, not {str(path)!r}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError("parquet files need pyarrow: pip install 'openeva[parquet]' (or write .npz)")


def _layer_name(layer: int) -> str:
    return f"layer_{layer}"


def _named(embedding: Embedding) -> dict[str, NDArray[np.float32]]:
    columns = {"pooled": embedding.pooled}
    if embedding.patches is not None:
        columns["patches"] = embedding.patches
    return columns | {_layer_name(layer): values for layer, values in embedding.layers.items()}


class _Rows:
    """Embeddings in memory."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.embeddings: list[Embedding] = []

    def add(self, source: str, embedding: Embedding) -> None:
        self.sources.append(source)
        self.embeddings.append(embedding)

    @property
    def first(self) -> Embedding:
        if not self.embeddings:
            raise NoFeaturesError("none of the images could be read, so there are no features")
        return self.embeddings[0]

    def columns(self) -> dict[str, NDArray[np.float32]]:
        rows = [_named(embedding) for embedding in self.embeddings]
        return {name: np.stack([row[name] for row in rows]) for name in _named(self.first)}


def _save_npz(file: Path, columns: dict[str, NDArray[Any]]) -> None:
    with file.open("wb") as stream:  # given a name, numpy would append .npz
        np.savez(stream, **columns)  # type: ignore[arg-type]


class _Parquet:
    """Embeddings on their way to a parquet file, a row group at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.rows, self.bytes = _Rows(), 0
        self.writer: Any = None

    def add(self, source: str, embedding: Embedding) -> None:
        self.rows.add(source, embedding)
        self.bytes += sum(values.nbytes for values in _named(embedding).values())
        if self.bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = self.rows.columns()
        arrays = [pa.array(self.rows.sources, pa.string())]
        fields = [pa.field("source", pa.string())]
        for name, values in columns.items():
            length = int(np.prod(values.shape[1:]))
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), length))
            shape = ",".join(str(size) for size in values.shape[1:])
            fields.append(pa.field(name, arrays[-1].type, metadata={"shape": shape}))
        rows, cols = self.rows.first.grid
        schema = pa.schema(fields, metadata={"openeva.grid": f"{rows},{cols}"})
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.part, schema)
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        self.rows, self.bytes = _Rows(), 0

    def finish(self) -> None:
        if self.rows.sources or self.writer is None:
            self._flush()
        assert self.writer is not None
        self.writer.close()
        self.part.replace(self.path)

    def discard(self) -> None:
        """Take away what is unfinished."""
        if self.writer is not None:
            self.writer.close()
        self.part.unlink(missing_ok=True)
