"""Thirty million image paths: how long the index takes to build and to open, and what it costs in memory.

    python benchmarks/file_index.py [--files 30000000] [--out benchmarks/results/file_index_cpu.json]

Made-up names in the shape of merged-30M go through the real writer. The folders are real but empty, so that the check
for changed folders is real too. Then a fresh process opens the source by its recipe keys, forks workers as a data
loader does, and all of them look up random paths. PSS is what they take in all; the sum of RSS counts every shared
page (also those of torch) once per process. The peer is the list of `(path, class)` that torchvision's ImageFolder
keeps, on a million of the same names. Nothing is left on disk.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYOUT = {  # data set: (folders, files in all of them, file name)
    "21k": (21_841, 14_197_122, "n{folder:08d}_{number}.JPEG"),
    "ade": (1, 20_210, "ADE_train_{number:08d}.jpg"),
    "cc12m": (1_243, 10_900_000, "{folder:05d}{number:04d}.jpg"),
    "cc3m": (332, 2_950_000, "{folder:05d}{number:04d}.jpg"),
    "coco": (1, 118_287, "{number:012d}.jpg"),
    "o365": (51, 1_742_289, "objects365_v1_{number:08d}.jpg"),
}
"""About the sizes that the paper names; scaled to `--files`."""


def made_up(root: Path, num_files: int) -> Iterator["Folder"]:
    """Folders of the layout below `root`, made on disk but empty, with made-up sorted file names."""
    from openeva.data.file_index import Folder

    def folder(path: Path, group: str, names: list[bytes]) -> Folder:
        return Folder(os.fsencode(path), names, group.encode(), path.stat().st_mtime_ns)

    parts = [(s, f) for s, (folders, _, _) in LAYOUT.items() for f in range(folders)]
    for dataset, number in parts:
        (root / dataset / f"{number:06d}").mkdir(parents=True)
    scale = num_files / sum(files for _, files, _ in LAYOUT.values())
    yield folder(root, "", [])
    left = num_files
    for position, (dataset, number) in enumerate(parts):
        if number == 0:
            yield folder(root / dataset, dataset, [])
        folders, files, template = LAYOUT[dataset]
        share = round(files * scale * (number + 1) / folders) - round(files * scale * number / folders)
        share = left if position == len(parts) - 1 else min(share, left)
        left -= share
        names = [template.format(folder=number, number=i).encode() for i in range(share)]
        yield folder(root / dataset / f"{number:06d}", dataset, names)


def build(root: Path, num_files: int) -> dict[str, Any]:
    """Write the index and time it, without the time that making up the names takes."""
    from openeva.data.file_index import IMAGE_EXTENSIONS, FileIndexWriter, index_path

    path = index_path([root], IMAGE_EXTENSIONS)
    adding = 0.0
    with FileIndexWriter(path) as writer:
        for folder in made_up(root, num_files):
            started = time.perf_counter()
            writer.add(folder)
            adding += time.perf_counter() - started
        started = time.perf_counter()
        writer.commit(seconds=3600.0)
        adding += time.perf_counter() - started
    size = path.stat().st_size
    return {
        "files": writer.num_files,
        "write_s": adding,
        "write_files_per_s": writer.num_files / adding,
        "writer_peak_rss_mb": peak_mb(),
        "index_mb": size / 2**20,
        "index_bytes_per_file": size / writer.num_files,
    }


def scan_real(root: Path, num_folders: int = 100, files_per_folder: int = 2000) -> dict[str, Any]:
    """Scan real (empty) files."""
    from openeva.data.file_index import open_or_build

    for number in range(num_folders):
        folder = root / f"{number:03d}"
        folder.mkdir(parents=True)
        for i in range(files_per_folder):
            (folder / f"{i:06d}.jpg").touch()
    started = time.perf_counter()
    index = open_or_build([root], ["jpg"])
    seconds = time.perf_counter() - started
    return {"files": len(index), "files_per_s": len(index) / seconds}


def peak_mb() -> float:
    """Highest RSS of this process so far (`ru_maxrss` would begin with that of the process that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def memory_mb(pid: int) -> dict[str, float]:
    """RSS and PSS of a process."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    values = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}
    return {"rss": values["Rss"], "pss": values["Pss"]}


def look_up(source: Any, seed: int, count: int, done: Any, finish: Any) -> None:
    """A worker: random paths, then wait so that its memory can be read."""
    rng = random.Random(seed)
    numbers = [rng.randrange(len(source)) for _ in range(count)]
    started = time.perf_counter()
    for number in numbers:
        source._index.path_of(number)
    done.put(count / (time.perf_counter() - started))
    finish.wait()


def start_and_use(root: Path, num_workers: int, lookups: int) -> dict[str, Any]:
    """What a run does: import, open the source, fork workers, look up paths in all of them."""
    started = time.perf_counter()
    import torch  # noqa: F401 (its memory belongs to every real run)

    from openeva.data.file_index import IMAGE_EXTENSIONS, index_path
    from openeva.data.sources.image_folder import Config

    import_s = time.perf_counter() - started
    with index_path([root], IMAGE_EXTENSIONS).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = memory_mb(os.getpid())
    opens = []
    for _ in range(2):
        started = time.perf_counter()
        source = Config(roots=[root], labels=True).build()
        source._index.path_of(len(source) // 2)
        opens.append(time.perf_counter() - started)
    context = multiprocessing.get_context("fork")
    done, finish = context.Queue(), context.Event()
    workers = [context.Process(target=look_up, args=(source, s, lookups, done, finish)) for s in range(num_workers)]
    for worker in workers:
        worker.start()
    rates = [done.get() for _ in workers]
    rng = random.Random(-1)
    for _ in range(lookups):
        source._index.path_of(rng.randrange(len(source)))
    memory = [memory_mb(pid) for pid in [os.getpid(), *(w.pid for w in workers if w.pid)]]
    finish.set()
    for worker in workers:
        worker.join()
    return {
        "files": len(source),
        "import_s": import_s,
        "open_cold_s": opens[0],
        "open_warm_s": opens[1],
        "main_before_opening_rss_mb": before["rss"],
        "load_average": os.getloadavg()[0],
        "workers": num_workers,
        "lookups_per_process": lookups,
        "lookups_per_s_per_worker": sum(rates) / len(rates),
        "main_and_workers_rss_sum_mb": sum(m["rss"] for m in memory),
        "of_that_rss_sum_before_opening_mb": before["rss"] * len(memory),
        "main_and_workers_pss_mb": sum(m["pss"] for m in memory),
    }


def peer_list(num_files: int = 1_000_000) -> dict[str, float]:
    """Memory of a Python list of (path, class) in one process."""
    before = memory_mb(os.getpid())["rss"]
    files = [(f"/data/merged30m/21k/{i // 650:06d}/n{i // 650:08d}_{i % 650}.JPEG", i // 650) for i in range(num_files)]
    return {"bytes_per_file_per_process": (memory_mb(os.getpid())["rss"] - before) * 2**20 / len(files)}


def machine() -> dict[str, Any]:
    """Where this was measured."""
    import numpy as np
    import torch

    cpu = [
        x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("model name", "cpu family", "model"))
    ]
    described = dict(line.replace("\t", "").split(": ", 1) for line in cpu)
    return {
        "cpu": f"{described['model name']} (family {described['cpu family']}, model {described['model']})",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    """Run each part in a process of its own and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=30_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--lookups", type=int, default=1_000_000, help="random paths per process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "file_index_cpu.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = {
        "build": lambda: build(args.folder / "merged30m", args.files),
        "scan": lambda: scan_real(args.folder / "real"),
        "use": lambda: start_and_use(args.folder / "merged30m", args.workers, args.lookups),
        "peer_list": peer_list,
    }
    if args.part:
        print(json.dumps(parts[args.part]()))
        return
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="openeva-bench-") as folder:
        environment = {**os.environ, "OPENEVA_CACHE": str(Path(folder) / "cache")}
        for part in parts:
            command = [sys.executable, __file__, "--part", part, "--folder", folder]
            command += ["--files", str(args.files), "--workers", str(args.workers), "--lookups", str(args.lookups)]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            results[part] = json.loads(done.stdout)
            print(part, json.dumps(results[part], indent=1), flush=True)
    use = results["use"]
    results["goals"] = {
        "opens_in_under_10_s": use["import_s"] + use["open_cold_s"] < 10,
        "under_4_gb_in_all": use["main_and_workers_pss_mb"] < 4096,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
