"""Predictions for people and for programs, and the files that go with them.

images or videos -> `Job.answers` (features and pictures written on the way) -> table, JSON or CSV, row by row

Of a video JSON and CSV have every window with its first and last second, and the table has its actions.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from openeva.checkpoints.files import write_atomically
from openeva.data.video import Video
from openeva.heads.classifier import ImageClassifier
from openeva.inference.embeddings import NoFeaturesError, check_suffix, writing
from openeva.inference.inputs import FoundImage, Kind, Media
from openeva.inference.maps import MapKind, natural_map
from openeva.inference.picture import draw, free_name, is_picture_file
from openeva.inference.predictor import SEES_IMAGES, Embedding, Guess, Prediction, Predictor, Wanted
from openeva.inference.strip import draw_strip
from openeva.inference.videos import Segment, VideoPrediction, Windows, why_videos

Format = Literal["json", "csv"]
CSV_COLUMNS = ("rank", "class", "name", "probability", "error")
"""Behind the name of the image or video, and of a video `start` and `end` in seconds; of texts with their cosines."""

Finished = Callable[[int, str | None], None]
"""Called after every image with the number done and, where it was broken, its name and why."""


class Job:
    """What to do with images or videos: checked before any work, then done one after the other.

    Args:
        media: What to answer for.
        features: `.npz` or `.parquet` file for embeddings, of videos one per window.
        picture: A picture's file, or a folder for one picture per image or video.
        kind: What pictures show; default: what suits the model.
        patches: Embeddings with one vector per patch.
        layers: Embeddings with the output of these blocks, numbers with commas between them.
        windows: How videos are looked at.

    Attributes:
        kind: Images or videos; only the model decides, so that it is known after `choose`.
        inputs: What is done; likewise.

    Raises:
        ValueError: A file name of an unknown kind, one picture file for several images, or an option without the one
            that it belongs to.
        ImportError: A package that writes the file is missing.
    """

    def __init__(
        self,
        media: Media,
        features: Path | None = None,
        picture: Path | None = None,
        kind: MapKind | None = None,
        *,
        patches: bool = False,
        layers: str = "",
        windows: Windows | None = None,
    ) -> None:
        self.features, self.picture, self.map, self.windows = features, picture, kind, windows
        self.patches, self.layers = patches, _numbers(layers)
        if features is None and (patches or layers):
            raise ValueError("--patches and --layers say what --features holds; give --features FILE too")
        if picture is None and kind is not None:
            raise ValueError("--map says what a picture shows; give --picture FILE or FOLDER too")
        if features is not None:
            check_suffix(features)
        self._media, self.kind = media, media.kind or "images"
        self.inputs: Sequence[FoundImage | Video] = []
        if media.kind is not None:
            self._take(media.images() if media.kind == "images" else media.videos())
        elif picture is not None:
            is_picture_file(picture)

    def _take(self, inputs: Sequence[FoundImage | Video]) -> None:
        self.inputs = inputs
        if self.picture is not None and is_picture_file(self.picture) and len(inputs) > 1:
            raise ValueError(
                f"--picture {self.picture} is one file, but there are {len(inputs)} {self.kind}; give a folder"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a table that say what a row is about."""
        return ("image",) if self.kind == "images" else ("video", "time")

    def choose(self, predictor: Predictor) -> None:
        """Take what the model sees of what is there.

        Raises:
            ValueError: An address leads to the other kind alone.
        """
        of_images = predictor.num_frames is None and (self.windows is None or self.windows.num_frames is None)
        self.kind = "images" if of_images else "videos"
        self._take(self._media.images(SEES_IMAGES) if of_images else self._media.videos(why_videos(predictor)))

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
            predictions = predictor(self.inputs, self._wanted(predictor), self.windows)
            for done, prediction in enumerate(predictions, start=1):
                if writer is not None:
                    _write_features(prediction, writer.add)
                if self.picture is not None and prediction.error is None:
                    single = is_picture_file(self.picture)
                    place = self.picture if single else free_name(self.picture, prediction.source, taken)
                    draw_strip(prediction, place) if isinstance(prediction, VideoPrediction) else draw(
                        prediction, place
                    )
                broken = prediction.error
                finished(done, broken and f"{prediction.source}: {broken}")
                yield prediction

    def _wanted(self, predictor: Predictor) -> Wanted:
        map_ = None
        if self.picture is not None and isinstance(predictor.model, ImageClassifier):
            map_ = self.map or natural_map(predictor.model)
        elif self.picture is not None:
            fix = "give texts too (--text)" if predictor.is_clip else "leave out --picture"
            raise ValueError(f"a picture explains a class, but these weights have no classifier; {fix}")
        return Wanted(self.features is not None, self.patches, self.layers, map_)


def _write_features(prediction: Prediction, add: Callable[[str, Embedding], None]) -> None:
    """One row, or of a video one per window."""
    for part in prediction.segments if isinstance(prediction, VideoPrediction) else (prediction,):
        if part.embedding is not None:
            add(part.source, part.embedding)


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


def write(
    format_: Format,
    predictions: Iterable[Prediction],
    place: Path | TextIO,
    *,
    texts: bool = False,
    kind: Kind = "images",
) -> None:
    """Write predictions to a file, which appears whole at the end, or to a stream as they come.

    Args:
        format_: From `format_of`.
        predictions: What to write.
        place: Where.
        texts: The classes are texts, which have cosines too.
        kind: What the predictions are of.
    """
    pieces = as_json(predictions) if format_ == "json" else as_csv(predictions, texts=texts, kind=kind)
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


def as_csv(predictions: Iterable[Prediction], *, texts: bool = False, kind: Kind = "images") -> Iterator[str]:
    """CSV with a header, a row per guess, of videos per window; a broken image has one row with its error."""
    times = ("start", "end") if kind == "videos" else ()
    columns = [kind.removesuffix("s"), *times, *CSV_COLUMNS[:-1], *(["cosine"] if texts else []), CSV_COLUMNS[-1]]
    yield csv_row(columns)
    for prediction in predictions:
        if prediction.error is not None:
            yield csv_row((prediction.source, *[""] * (len(columns) - 2), prediction.error))
        for part in prediction.segments if isinstance(prediction, VideoPrediction) else (prediction,):
            when = (f"{part.start:.3f}", f"{part.end:.3f}") if isinstance(part, Segment) else ()
            for rank, guess in enumerate(part.top, start=1):
                cosine = [] if guess.cosine is None else [f"{guess.cosine:.6g}"]
                numbers = (rank, guess.index, guess.name, f"{guess.probability:.6g}")
                yield csv_row((prediction.source, *when, *numbers, *cosine, ""))


def as_rows(predictions: Iterable[Prediction], topk: int | None = None) -> Iterator[tuple[str, ...]]:
    """Rows (image, class, probability, of texts also cosine) of a table; the image stands in its first row only.

    Of videos (video, time, class, probability ...), an action's most probable class alone where there are several and
    `topk` is None.
    """
    for prediction in predictions:
        parts = prediction.actions if isinstance(prediction, VideoPrediction) else (prediction,)
        for number, part in enumerate(parts):
            shown = part.top if len(parts) == 1 else part.top[: topk or 1]
            for rank, guess in enumerate(shown):
                name = prediction.source if number == rank == 0 else ""
                when = (part.span if rank == 0 else "",) if isinstance(part, Segment) else ()
                cosine = () if guess.cosine is None else (f"{guess.cosine:.3f}",)
                yield name, *when, guess.name, f"{guess.probability:.1%}", *cosine


FORMATS = ("json", "csv")


def _record(prediction: Prediction) -> dict[str, Any]:
    if not isinstance(prediction, VideoPrediction):
        if prediction.error is not None:
            return {"image": prediction.source, "error": prediction.error}
        return {"image": prediction.source, "top": [_guess(guess) for guess in prediction.top]}
    if prediction.error is not None:
        return {"video": prediction.source, "error": prediction.error}
    segments = [
        {"start": round(part.start, 3), "end": round(part.end, 3), "top": [_guess(guess) for guess in part.top]}
        for part in prediction.segments
    ]
    return {
        "video": prediction.source,
        "duration": round(prediction.duration, 3),
        "top": [_guess(guess) for guess in prediction.top],
        "segments": segments,
    }


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
