"""Finding 20 of 100,000 or 1,000,000 images: opening the index of a folder, searching it, and what it costs in memory.

    python benchmarks/search.py [--images 100000 1000000] [--widths 512 768] [--out benchmarks/results/search_cpu.json]

Random features of length 1 go through the real writer; the folder's files are real but empty, so that the check for new
and changed images is real too. The features of the text are given: what a text tower costs depends on the tower. Peers,
alternating with ours in one process: numpy's matrix product over the same features, in memory as float32, and faiss'
exact index where faiss is installed. Each contender's memory is that of a process of its own, without what Python and
its imports take; "mapped" is the page cache of the index file, which the system takes back where it needs it. Nothing
is left on disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from alternate import alternate, speedup
from openeva.checkpoints.native import save_native
from openeva.config import validate
from openeva.engine.hardware import environment
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.inference import Index, index_file
from openeva.inference.towers import Towers

TOP, PIECE, FILES_PER_FOLDER = 20, 65_536, 10_000
Step = Callable[[], list[bytes]]
"""A search; returns the names that it finds."""


def random_units(rows: int, width: int, seed: int) -> NDArray[np.float32]:
    """Vectors of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made_up_folder(root: Path, num_images: int) -> index_file.Files:
    """Real, empty files in the order of a scan."""
    names, stamps = [], array("q")
    for number in range(num_images):
        folder = root / f"{number // FILES_PER_FOLDER:06d}"
        if number % FILES_PER_FOLDER == 0:
            folder.mkdir(parents=True)
        path = folder / f"holiday_{number:08d}.jpg"
        path.touch()
        stamp = index_file.Stamp.of(path)
        names.append(os.fsencode(path.relative_to(root)))
        stamps.extend((stamp.size, stamp.mtime_ns))
    both = np.frombuffer(stamps, np.int64).reshape(-1, 2)
    return index_file.Files(names, both[:, 0], both[:, 1])


def write_index(work: Path, files: index_file.Files, width: int) -> float:
    """A tiny CLIP of this width and the index that it might have made; returns the seconds of writing."""
    tower = {"image_size": 32, "patch_size": 16, "width": 16, "depth": 1, "num_heads": 2, "mlp_hidden": 16}
    text = {"width": 16, "num_heads": 2, "depth": 1, "context_length": 16}
    model = ClipModel(validate(ClipConfig, {"embed_dim": width, "backbone": tower, "text": text}, where="tiny"))
    task = {"name": "clip", **model.config.model_dump(mode="json"), "loss": "infonce"}
    save_native(work / "run" / "model", model.state_dict(), {"task": task})
    settings = {"batch_size": 1, "device": "cpu", "precision": "fp32", "num_readers": 1}
    meta = {"folder": str(work / "images"), **Towers(work / "run", settings).facts()}
    pieces = [min(PIECE, len(files) - begin) for begin in range(0, len(files), PIECE)]
    seconds = 0.0

    def features() -> Iterator[NDArray[np.float16]]:
        nonlocal seconds
        for seed, rows in enumerate(pieces):
            begun = time.perf_counter()
            piece = random_units(rows, width, seed).astype(np.float16)
            seconds -= time.perf_counter() - begun
            yield piece

    begun = time.perf_counter()
    index_file.write(work / "x.idx", files, features(), {}, meta)
    return seconds + time.perf_counter() - begun


class Contenders:
    """What is compared; each loads what it needs when it is asked for."""

    def __init__(self, work: Path) -> None:
        self.work = work
        stored = index_file.read(work / "x.idx")
        assert stored is not None
        self.query_E = random_units(1, stored.features.shape[1], 12345)[0]
        self.stored = stored

    def index(self) -> Index:
        """Ours, opened."""
        return Index(self.work / "images", place=self.work / "x.idx", device="cpu")

    def names(self, index: Index) -> list[bytes]:
        """A search of ours."""
        hits = index.search("a text whose features are given", top=TOP)
        return [os.fsencode(hit.path.relative_to(self.work / "images")) for hit in hits]

    def float32(self) -> NDArray[np.float32]:
        """The features of the index in memory."""
        matrix_NE = np.empty(self.stored.features.shape, np.float32)
        for begin in range(0, len(matrix_NE), PIECE):
            matrix_NE[begin : begin + PIECE] = self.stored.features[begin : begin + PIECE]
        return matrix_NE

    def ours(self) -> Step:
        """Search in an index that is open."""
        index = self.index()
        return lambda: self.names(index)

    def ours_opening(self) -> Step:
        """Open the index and search."""
        return lambda: self.names(self.index())

    def numpy(self) -> Step:
        """Matrix product, then the largest."""
        matrix_NE, names = self.float32(), list(self.stored.files.names)

        def step() -> list[bytes]:
            score_N = matrix_NE @ self.query_E
            best = np.argpartition(-score_N, TOP)[:TOP]
            return [names[row] for row in best[np.argsort(-score_N[best])].tolist()]

        return step

    def faiss(self) -> Step:
        """Exact search by inner product."""
        import faiss

        matrix_NE, names = self.float32(), list(self.stored.files.names)
        index = faiss.IndexFlatIP(matrix_NE.shape[1])
        index.add(matrix_NE)
        del matrix_NE
        return lambda: [names[row] for row in index.search(self.query_E[None], TOP)[1][0].tolist()]


STEPS = {
    "openeva, opening and searching": Contenders.ours_opening,
    "openeva, searching": Contenders.ours,
    "numpy float32 in memory": Contenders.numpy,
    "faiss IndexFlatIP": Contenders.faiss,
}


def memory_mb() -> dict[str, float]:
    """Of this process: its own, and mapped files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    values = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[0].startswith(("Vm", "Rss"))}
    return {"own": values["RssAnon"], "mapped": values["RssFile"], "peak": values["VmHWM"]}


def available() -> dict[str, Callable[[Contenders], Step]]:
    """The contenders that can run here."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return {label: make for label, make in STEPS.items() if "faiss" not in label}
    return STEPS


def time_searches(work: Path, rounds: int) -> dict[str, Any]:
    """All contenders in turn; first of all ours with nothing of the index in memory."""
    contenders = Contenders(work)
    with (work / "x.idx").open("rb") as file:
        contenders.stored.features[:1].sum()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    contenders.ours_opening()()
    cold = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(5):
        contenders.index()
    opening = (time.perf_counter() - begun) / 5
    steps = {label: make(contenders) for label, make in available().items()}
    found = {label: step() for label, step in steps.items()}
    seconds = alternate(steps, torch.device("cpu"), rounds=rounds)
    exact = set(found["numpy float32 in memory"])
    return {
        "opening_s": opening, "first_opening_and_searching_s": cold,
        "searches": {
            label: {
                "median_s": statistics.median(times), "min_s": min(times), "max_s": max(times),
                "times_as_fast_as_numpy": speedup(seconds, label, "numpy float32 in memory"),
                "same_images_of_20": len(exact & set(found[label])),
            }
            for label, times in seconds.items()
        },
    }  # fmt: skip


def memory_of(work: Path, label: str) -> dict[str, float]:
    """What a contender adds to a process that has imported everything."""
    contenders = Contenders(work)
    available()
    before = memory_mb()
    step = STEPS[label](contenders)
    step()
    after = memory_mb()
    return {
        "own_mb": after["own"] - before["own"], "mapped_mb": after["mapped"] - before["mapped"],
        "peak_mb": after["peak"] - before["peak"],
    }  # fmt: skip


def nothing_new(work: Path) -> dict[str, float]:
    """An update of a folder in which nothing has changed."""
    index = Index(work / "images", place=work / "x.idx", device="cpu")
    before, seconds = memory_mb(), []
    for _ in range(3):
        begun = time.perf_counter()
        done = index.update()
        seconds.append(time.perf_counter() - begun)
        assert done.num_new + done.num_changed + done.num_removed == 0
    return {"median_s": statistics.median(seconds), "peak_mb": memory_mb()["peak"] - before["peak"]}


def in_a_process(part: str, work: Path, args: argparse.Namespace) -> Any:
    """Run a part in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--part", part, "--work", work, "--rounds", str(args.rounds)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measure(num_images: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one number of images, one per width."""
    results = []
    with tempfile.TemporaryDirectory(prefix="openeva-bench-", dir=args.folder) as folder:
        work = Path(folder)
        files = made_up_folder(work / "images", num_images)
        for number, width in enumerate(args.widths):
            row: dict[str, Any] = {"images": num_images, "width": width, "write_s": write_index(work, files, width)}
            row["index_mb"] = (work / "x.idx").stat().st_size / 2**20
            row |= in_a_process("time", work, args)
            row["memory"] = {label: in_a_process(label, work, args) for label in available()}
            if number == 0:
                row["update_with_nothing_new"] = in_a_process("nothing new", work, args)
            results.append(row)
            print(json.dumps(row, indent=1), flush=True)
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the images; default: that of temporary files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "search_cpu.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        with mock.patch.object(Towers, "texts", return_value=Contenders(args.work).query_E[None]):
            parts = {
                "time": lambda: time_searches(args.work, args.rounds),
                "nothing new": lambda: nothing_new(args.work),
            }
            print(json.dumps(parts[args.part]() if args.part in parts else memory_of(args.work, args.part)))
        return
    results = [row for num_images in args.images for row in measure(num_images, args)]
    goal = [
        row["searches"]["openeva, opening and searching"]["median_s"] for row in results if row["images"] == 100_000
    ]
    record = {
        "what": "search", "rounds": args.rounds, "environment": environment(torch.device("cpu")),
        "load_average": os.getloadavg()[0], "results": results,
        "goals": {"100,000 images in well under a second, opening included": bool(goal) and max(goal) < 0.5},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
