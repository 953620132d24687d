"""Predictions for people and for programs, and the files that go with them.

images -> `Job.answers` (features and pictures written on the way) -> table, JSON or CSV, row by row
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from openeva.checkpoints.files import write_atomically
from openeva.heads.classifier import ImageClassifier
from openeva.inference.embeddings import NoFeaturesError, check_suffix, writing
from openeva.inference.inputs import FoundImage
from openeva.inference.maps import MapKind, natural_map
from openeva.inference.picture import draw, free_name, is_picture_file
from openeva.inference.predictor import Guess, Prediction, Predictor, Wanted

Format = Literal["json", "csv"]
CSV_COLUMNS = ("image", "rank", "class", "name", "probability", "error")
CSV_COLUMNS_TEXTS = ("image", "rank", "class", "name", "probability", "cosine", "error")


Finished = Callable[[int, str | None], None]
"""Called after every image with the number done and, where it was broken, its name and why."""


class Job:
    """What to do with images: checked before any work, then done image by image.

    Args:
        images: What to answer for.
        features: `.npz` or `.parquet` file for embeddings.
        picture: A picture's file, or a folder for one picture per image.
        kind: What pictures show; default: what suits the model.
        patches: Embeddings with one vector per patch.
        layers: Embeddings with the output of these blocks, numbers with commas between them.

    Raises:
        ValueError: A file name of an unknown kind, one picture file for several images, or an option without the one
            that it belongs to.
        ImportError: A package that writes the file is missing.
    """

    def __init__(
        self,
        images: Sequence[FoundImage],
        features: Path | None = None,
        picture: Path | None = None,
        kind: MapKind | None = None,
        *,
        patches: bool = False,
        layers: str = "",
    ) -> None:
        self.images, self.features, self.picture, self.kind = images, features, picture, kind
        self.patches, self.layers = patches, _numbers(layers)
        if features is None and (patches or layers):
            raise ValueError("--patches and --layers say what --features holds; give --features FILE too")
        if picture is None and kind is not None:
            raise ValueError("--map says what a picture shows; give --picture FILE or FOLDER too")
        if features is not None:
            check_suffix(features)
        if picture is not None and is_picture_file(picture) and len(images) > 1:
            raise ValueError(f"--picture {picture} is one file, but there are {len(images)} images; give a folder")

    def answers(self, predictor: Predictor, finished: Finished) -> Iterator[Prediction]:
        """Predictions as they come; features and pictures are written on the way.

        Raises:
            ValueError: The model cannot give what is wanted.
        """
        with suppress(NoFeaturesError):  # each image was named as broken
            yield from self._answers(predictor, finished)

    def _answers(self, predictor: Predictor, finished: Finished) -> Iterator[Prediction]:
        taken: set[str] = set()
        with nullcontext() if self.features is None else writing(self.features) as writer:
            for done, prediction in enumerate(predictor(self.images, self._wanted(predictor)), start=1):
                if writer is not None and prediction.embedding is not None:
                    writer.add(prediction.source, prediction.embedding)
                if self.picture is not None and prediction.heat is not None:
                    single = is_picture_file(self.picture)
                    draw(prediction, self.picture if single else free_name(self.picture, prediction.source, taken))
                broken = prediction.error
                finished(done, broken and f"{prediction.source}: {broken}")
                yield prediction

    def _wanted(self, predictor: Predictor) -> Wanted:
        map_ = None
        if self.picture is not None and isinstance(predictor.model, ImageClassifier):
            map_ = self.kind or natural_map(predictor.model)
        elif self.picture is not None:
            fix = "give texts too (--text)" if predictor.is_clip else "leave out --picture"
            raise ValueError(f"a picture explains a class, but these weights have no classifier; {fix}")
        return Wanted(self.features is not None, self.patches, self.layers, map_)


def format_of(out: Path | None, *, json: bool, csv: bool) -> Format | None:
    """JSON or CSV by what was asked for, or by the ending of the file; None = neither.

    Raises:
        ValueError: Both, a file whose kind cannot be told, or one whose ending says otherwise.
    """
    if json and csv:
        raise ValueError("--json and --csv exclude each other")
    if json or csv:
        asked: Format = "json" if json else "csv"
        if out is not None and out.suffix.lstrip(".") in set(FORMATS) - {asked}:
            raise ValueError(
                f"--{asked} does not fit --out {out}; leave one of them out, or give a file ending in .{asked}"
            )
        return asked
    if out is None:
        return None
    if (ending := out.suffix.lstrip(".")) not in FORMATS:
        raise ValueError(f"--out {out} must end in .json or .csv, or give --json or --csv")
    return "json" if ending == "json" else "csv"


def write(format_: Format, predictions: Iterable[Prediction], place: Path | TextIO, *, texts: bool = False) -> None:
    """Write predictions to a file, which appears whole at the end, or to a stream as they come.

    Args:
        format_: From `format_of`.
        predictions: What to write.
        place: Where.
        texts: The classes are texts, which have cosines too.
    """
    pieces = as_json(predictions) if format_ == "json" else as_csv(predictions, texts=texts)
    put(pieces, place)


def put(pieces: Iterable[str], place: Path | TextIO) -> None:
    """Write text to a file, which appears whole at the end, or to a stream as it comes."""
    if isinstance(place, Path):
        write_atomically(place, lambda file: _write_pieces(file, pieces))
    else:
        place.writelines(pieces)


def _write_pieces(file: Path, pieces: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(pieces)


def as_json(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A JSON list, piece by piece."""
    before = "[\n  "
    for prediction in predictions:
        yield before + json.dumps(_record(prediction), ensure_ascii=False)
        before = ",\n  "
    yield "[]\n" if before.startswith("[") else "\n]\n"


def as_csv(predictions: Iterable[Prediction], *, texts: bool = False) -> Iterator[str]:
    """CSV with a header, a row per guess; a broken image has one row with its error."""
    columns = CSV_COLUMNS_TEXTS if texts else CSV_COLUMNS
    yield csv_row(columns)
    for prediction in predictions:
        if prediction.error is not None:
            yield csv_row((prediction.source, *[""] * (len(columns) - 2), prediction.error))
        for rank, guess in enumerate(prediction.top, start=1):
            cosine = [] if guess.cosine is None else [f"{guess.cosine:.6g}"]
            yield csv_row((prediction.source, rank, guess.index, guess.name, f"{guess.probability:.6g}", *cosine, ""))


def as_rows(predictions: Iterable[Prediction]) -> Iterator[tuple[str, ...]]:
    """Rows (image, class, probability, of texts also cosine) of a table; the image stands in its first row only."""
    for prediction in predictions:
        for rank, guess in enumerate(prediction.top):
            cosine = () if guess.cosine is None else (f"{guess.cosine:.3f}",)
            yield prediction.source if rank == 0 else "", guess.name, f"{guess.probability:.1%}", *cosine


FORMATS = ("json", "csv")


def _record(prediction: Prediction) -> dict[str, Any]:
    if prediction.error is not None:
        return {"image": prediction.source, "error": prediction.error}
    return {"image": prediction.source, "top": [_guess(guess) for guess in prediction.top]}


def _guess(guess: Guess) -> dict[str, Any]:
    cosine = {} if guess.cosine is None else {"cosine": round(guess.cosine, 6)}
    return {"class": guess.index, "name": guess.name, "probability": round(guess.probability, 6), **cosine}


def csv_row(values: Sequence[object]) -> str:
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(
            f"--layers {text}: numbers of blocks with commas between them are needed, such as 3,6,-1"
        ) from None
