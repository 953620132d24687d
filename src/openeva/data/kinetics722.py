"""Kinetics-722: the lists of Kinetics-400, -600 and -700 merged, each video once and none of any validation set.

`kinetics_classes.scan` -> tables -> `merge` (classes, eight lists, what was dropped and why) -> `check` (does every
file open?) -> `write` (lists, names of labels, arrays between label sets, report)

Paper: EVA (arXiv 2211.07636), video action recognition.
Source: spec section 3.1 of video. As there, K-400's training list is not filtered by its validation list unless asked
for, and a file that does not open is not replaced by its copy in another set. Deliberate difference: what is dropped is
recorded, and which copies have different classes.
"""

import csv
import filecmp
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from openeva.config import ConfigError
from openeva.data.building import run_jobs
from openeva.data.kinetics_classes import (
    NUM_CLASSES,
    OFFICIAL_COUNTS,
    SETS,
    SPLITS,
    Classes,
    Clip,
    SetName,
    Split,
    Tables,
    Watch,
    canonical,
    merge_classes,
    scan,
    some,
)

Reason = Literal["duplicate", "in val", "no label", "does not open"]
REASONS: tuple[Reason, ...] = ("duplicate", "in val", "no label", "does not open")
REPORT = "report.md"
# -------------------------------------------------------------------------------------------------------- lists


class Dropped(NamedTuple):
    """A video that is not in a list: why, in favour of which, and what exactly was wrong with it."""

    clip: Clip
    reason: Reason
    kept: Clip | None = None
    detail: str = ""

    @property
    def other_class(self) -> str:
        """Class of the video that was kept, where it is another one."""
        if self.kept is None or canonical(self.kept.class_name) == canonical(self.clip.class_name):
            return ""
        return self.kept.class_name


@dataclass(frozen=True)
class ClipList:
    """One list of videos with labels.

    Attributes:
        clips: In the list's order.
        label_of: Label of each class, by its K-722 name.
        dropped: In the order of the files.
    """

    clips: list[Clip]
    label_of: Mapping[str, int]
    dropped: list[Dropped]

    def lines(self) -> Iterator[str]:
        """`path label` for each video, without line ends."""
        return (f"{clip.path} {self.label_of[canonical(clip.class_name)]}" for clip in self.clips)


@dataclass(frozen=True)
class Merged:
    """The eight lists, "k400_train" to "k722_val", and the classes that they count."""

    classes: Classes
    lists: dict[str, ClipList]

    def without(self, broken: Mapping[str, str]) -> "Merged":
        """The same without some files, which nothing replaces.

        Args:
            broken: Path of each -> why it does not open.
        """
        lists = {
            name: replace(
                one,
                clips=[clip for clip in one.clips if clip.path not in broken],
                dropped=one.dropped
                + [Dropped(c, "does not open", detail=broken[c.path]) for c in one.clips if c.path in broken],
            )
            for name, one in self.lists.items()
        }
        return Merged(self.classes, lists)


def merge(tables: Tables, *, filter_k400: bool = False) -> Merged:
    """All lists of the three sets and of K-722.

    Args:
        tables: Per set and split; the first of several videos with one id is kept.
        filter_k400: Also take out of K-400's training list what its validation list holds. K-722's training list never
            has videos of any validation set.

    Raises:
        ConfigError: The class folders do not fit each other.
    """
    classes = merge_classes({key: tables[key]["val"].classes for key in SETS})
    label_of: dict[str, dict[str, int]] = {"k722": {name: label for label, name in enumerate(classes.names)}}
    for key in SETS:
        label_of[key] = {canonical(name): label for label, name in enumerate(classes.own_names[key])}
    lists = {}
    for key in SETS:
        train, val = tables[key]["train"].clips, tables[key]["val"].clips
        is_filtered = key != "k400" or filter_k400
        lists[f"{key}_train"] = _select(train, label_of[key], _by_id(val) if is_filtered else {})
        lists[f"{key}_val"] = _select(val, label_of[key], {})
    every: dict[Split, list[Clip]] = {
        split: list(itertools.chain.from_iterable(tables[key][split].clips for key in SETS)) for split in SPLITS
    }
    lists["k722_train"] = _select(every["train"], label_of["k722"], _by_id(every["val"]))
    lists["k722_val"] = _select(every["val"], label_of["k722"], {})
    return Merged(classes, lists)


def _by_id(clips: Iterable[Clip]) -> dict[str, Clip]:
    """The first video of each id."""
    first: dict[str, Clip] = {}
    for clip in clips:
        first.setdefault(clip.youtube_id, clip)
    return first


def _select(clips: Iterable[Clip], label_of: Mapping[str, int], held_out: Mapping[str, Clip]) -> ClipList:
    """Those that have a label, are not held out and have an id that was not there before."""
    first: dict[str, Clip] = {}
    dropped: list[Dropped] = []
    for clip in clips:
        key = clip.youtube_id
        if canonical(clip.class_name) not in label_of:
            dropped.append(Dropped(clip, "no label"))
        elif key in held_out:
            dropped.append(Dropped(clip, "in val", held_out[key]))
        elif key in first:
            dropped.append(Dropped(clip, "duplicate", first[key]))
        else:
            first[key] = clip
    return ClipList(list(first.values()), label_of, dropped)


# --------------------------------------------------------------------------------------------- do the files open?


def opening_problem(path: str) -> str:
    """Why a file is no video; an empty string where it opens and has pictures."""
    import av

    try:
        with av.open(path, metadata_errors="ignore") as container:
            return "" if container.streams.video else "it has no pictures"
    except (av.FFmpegError, OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)


def check(paths: Iterable[str], num_workers: int) -> Generator[tuple[str, str], None, None]:
    """Open every file once, in worker processes (0 = in this one).

    Yields:
        Path and `opening_problem` of each, in the order in which they are done; a file that ends the process which
        opens it is a broken one.
    """
    for outcome in run_jobs(opening_problem, paths, num_workers):
        yield outcome.job, outcome.problem or outcome.result or ""


# -------------------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Options:
    """How the lists are made.

    Attributes:
        filter_k400: Take out of K-400's training list what its validation list holds; the official list has it.
        check: Open every file once, and leave out those that do not open.
        num_workers: Processes that do this; 0 = this one.
        overwrite: Replace other lists in the folder.
    """

    filter_k400: bool = False
    check: bool = False
    num_workers: int = 0
    overwrite: bool = False


@dataclass
class Built:
    """The lists that were written, with what is worth knowing about them."""

    root: Path
    merged: Merged
    notes: list[str]


def build(
    out: Path, root: Path, folders: Mapping[SetName, Path], options: Options, watch: Watch | None = None
) -> Built:
    """Make and write all lists.

    With `options.check` they are written before the files are opened, and again without those that do not open; when
    this is interrupted, without those that were found until then. The next call opens all again.

    Args:
        out: Folder for them.
        root: From `locate`; paths in the lists are relative to it.
        folders: From `locate`.
        options: How.
        watch: Told how far it is.

    Raises:
        ConfigError: The data is not Kinetics as expected, or `out` holds other lists.
        ImportError: Files should be opened, and PyAV is missing.
        OSError: A folder cannot be read or written.
    """
    from openeva.data.video import decoder_problem

    if out.exists() and not out.is_dir():
        raise ConfigError([f"--out: {out} is a file; give a folder for the lists"])
    if options.check and (problem := decoder_problem("pyav")):
        raise ImportError(f"--check: {problem}")
    scanned = scan(root, folders, watch)
    if watch is not None:
        watch("merging the lists", 0, None)
    merged = merge(scanned.tables, filter_k400=options.filter_k400)
    notes = [*_notes_on_classes(merged, scanned.tables), *scanned.notes, *_notes_on_copies(merged)]
    built = Built(root, merged, notes)
    if not options.check:
        write(out, built, overwrite=options.overwrite)
        return built
    unfinished = "opening every file has not finished, or was ended by force; the lists may hold files that do not open"
    known = _known_broken(out, merged)
    before = Built(root, merged.without(known), [*notes, unfinished])
    write(out, before, overwrite=options.overwrite)  # now, rather than refusing to after hours
    paths = list(dict.fromkeys(clip.path for one in merged.lists.values() for clip in one.clips))
    done, broken, interrupt = _open_all(root, paths, known, options.num_workers, watch)
    built = Built(root, merged.without(broken), [*notes, _note_on_opening(len(paths), done, len(broken))])
    write(out, built, overwrite=True)
    if interrupt is not None:
        raise interrupt
    return built


def _known_broken(out: Path, merged: Merged) -> dict[str, str]:
    """What an earlier call found: without it the lists would look like others, and an interrupt would lose it."""
    files = [out / _error_file(name) for name in merged.lists]
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return {path: reason for path, _, reason in (line.partition("\t") for line in lines)}


def _open_all(
    root: Path, paths: list[str], known: Mapping[str, str], num_workers: int, watch: Watch | None
) -> tuple[int, dict[str, str], KeyboardInterrupt | None]:
    """How many were opened, which are broken and why, and what interrupted it."""
    done = 0
    broken = {path: known[path] for path in paths if path in known}
    listed = {str(root / path): path for path in paths}
    try:
        with closing(check(list(listed), num_workers)) as results:
            for place, problem in results:
                done += 1
                broken.pop(listed[place], None)
                if problem:
                    broken[listed[place]] = " ".join(problem.split())
                if watch is not None:
                    watch("opening every file", done, len(paths))
    except KeyboardInterrupt as interrupt:
        return done, broken, interrupt
    return done, broken, None


# ------------------------------------------------------------------------------------------------------- reports


def _notes_on_classes(merged: Merged, tables: Tables) -> list[str]:
    classes = merged.classes
    counts: dict[str, int] = {key: len(classes.own_names[key]) for key in SETS}
    counts["k722"] = len(classes.names)
    notes = [
        f"{key} has {count:,} classes, the official one {NUM_CLASSES[key]}: its labels are not the official ones, and"
        " do not fit released weights"
        for key, count in counts.items()
        if count != NUM_CLASSES[key]
    ]
    for key in SETS:
        in_train, in_val = (set(map(canonical, tables[key][split].classes)) for split in SPLITS)
        if unknown := sorted(in_train - in_val):
            text = f"{key}/train: {some(unknown)} that {key}/val does not have; classes are those of val"
            notes.append(f"{text}, so that their videos have no label in {key}_train")
        if absent := sorted(in_val - in_train):
            notes.append(f"{key}/train: {some(absent)} missing, which {key}/val has")
    return notes


def _notes_on_copies(merged: Merged) -> list[str]:
    notes = []
    for name, one in merged.lists.items():
        if conflicts := sum(bool(dropped.other_class) for dropped in one.dropped):
            notes.append(f"{name}: dropped though of another class than the video that is kept: {conflicts:,}")
    held_out = {clip.youtube_id for clip in merged.lists["k400_val"].clips}
    if leaks := sum(clip.youtube_id in held_out for clip in merged.lists["k400_train"].clips):
        notes.append(f"k400_train: in k400_val too, as in the official list: {leaks:,}; --filter-k400 drops them")
    return notes


def _note_on_opening(num_files: int, done: int, num_broken: int) -> str:
    if done < num_files:
        return (
            f"opening every file was interrupted after {done:,} of {num_files:,}; {num_broken:,} are known not to open;"
            " the same command opens all again"
        )
    return f"every one of {num_files:,} files was opened once; {num_broken:,} do not open"


def rows_of(built: Built) -> list[tuple[str, ...]]:
    """Per list: videos, those of the official list, files that were found, and those dropped by each of `REASONS`."""
    rows = []
    for name, one in built.merged.lists.items():
        by_reason = Counter(dropped.reason for dropped in one.dropped)
        found = len(one.clips) + len(one.dropped)
        counts = [f"{by_reason[reason]:,}" for reason in REASONS]
        rows.append((name, f"{len(one.clips):,}", OFFICIAL_COUNTS[name], f"{found:,}", *counts))
    return rows


COLUMNS = ["list", "videos", "official", "found", *REASONS]
"""Of `rows_of`."""

_GUIDE = """
Files:

- `k722_train.txt`, `k722_val.txt`, `k400_train.txt` ...: a line `path label` per video; paths hold spaces, so the label
  is what follows the last one.
- `labels_722.csv`, `labels_400.csv` ...: name of each label.
- `k722_to_k400.json` ...: for each label of the smaller set its label in K-722, with which a head for K-722 becomes one
  for the smaller set.
- `report.csv`: every file that is not in a list, with the reason: `duplicate` = the same YouTube id stands earlier,
  `in val` = it is in a validation set, `no label` = its class is not among those of the validation folders,
  `does not open` = no video, or a broken one. `kept` is the file that stands for it, `other_class` the class of that
  file where it is another one.
- `k722_train_error.txt` ...: after `--check`, the files of a list that do not open, each with a tab and the reason.
"""


def _report(built: Built) -> str:
    head = ["# Kinetics-722", "", f"Written by `openeva data kinetics722`; paths are relative to `{built.root}`.", ""]
    rows = [tuple(COLUMNS), ("---", *["---:"] * (len(COLUMNS) - 1)), *rows_of(built)]
    lines = head + [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "`official` are the lists of EVA's own training; what can be downloaded has become less since.", ""]
    return "\n".join([*lines, *(f"- {note}" for note in built.notes), _GUIDE.rstrip(), ""])


def _files(built: Built) -> Iterator[tuple[str, Iterable[str]]]:
    """Name and lines of every file; the report is the last."""
    merged = built.merged
    for name, one in merged.lists.items():
        yield f"{name}.txt", (f"{line}\n" for line in one.lines())
    for name, one in merged.lists.items():
        broken = [dropped for dropped in one.dropped if dropped.reason == "does not open"]
        if broken:
            yield _error_file(name), (f"{dropped.clip.path}\t{dropped.detail}\n" for dropped in broken)
    yield "labels_722.csv", _csv([("id", "name"), *enumerate(merged.classes.names)])
    for key in SETS:
        yield f"labels_{key[1:]}.csv", _csv([("id", "name"), *enumerate(merged.classes.own_names[key])])
        yield f"k722_to_{key}.json", [json.dumps(merged.classes.mapping[key]) + "\n"]
    yield "report.csv", _csv(_dropped_rows(merged))
    yield REPORT, [_report(built)]


def _error_file(name: str) -> str:
    return f"{name}_error.txt"


def _dropped_rows(merged: Merged) -> Iterator[tuple[str, ...]]:
    yield "list", "path", "reason", "kept", "other_class", "detail"
    for name, one in merged.lists.items():
        for dropped in one.dropped:
            kept = dropped.kept.path if dropped.kept else ""
            yield name, dropped.clip.path, dropped.reason, kept, dropped.other_class, dropped.detail


class _Line:
    def write(self, text: str) -> str:  # what a csv writer returns for each row
        return text


def _csv(rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    writer = csv.writer(_Line(), lineterminator="\n")
    return (writer.writerow(row) for row in rows)


def write(out: Path, built: Built, *, overwrite: bool = False) -> None:
    """Write all files, each under its name only once all are whole.

    Args:
        out: Folder for them.
        built: What to write.
        overwrite: Replace files of other content.

    Raises:
        ConfigError: There are such files, and they may not be replaced.
        OSError: The folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".kinetics722-", dir=out))
    try:
        names = []
        for name, lines in _files(built):
            names.append(name)
            with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        changed = [name for name in names if not _is_same(partial / name, out / name)]
        stale = {_error_file(name) for name in built.merged.lists} - set(names)
        old = [name for name in [*changed, *sorted(stale)] if name != REPORT and (out / name).exists()]
        if old and not overwrite:
            text = f"--out: {out} holds {some(old, 'file')} of other content; replace with --overwrite, or give another"
            raise ConfigError([text])
        for name in changed:
            (partial / name).replace(out / name)
        for name in stale:
            (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
