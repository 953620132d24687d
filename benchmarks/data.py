"""From disk to batch: images per second of openeva's loader against torchvision's, one core, alternating in one run.

    python benchmarks/data.py [--images 2000] [--rounds 5] [--workers 1] [--out benchmarks/results/data_cpu.json]

Both read the same folder of 500 x 375 JPEG files (photographs that scikit-image carries, cut and mirrored at random;
drawn scenes where it is missing), cut a random resized crop (bicubic, antialiased) of 224 pixels, mirror it and
collate:

- peer: torchvision `ImageFolder` + `DataLoader`, `RandomResizedCrop`, `RandomHorizontalFlip`, `ToTensor`, `Normalize`;
- ours: `image_folder` + `TrainLoader`, and `normalise` in the consuming process, which is timed too (a GPU would do
  it);
- decoder: simplejpeg alone on the same bytes in memory, one thread: no loader on that decoder can be faster per core.

Also: masks per second and drawn scenes per second.
"""

import argparse
import io
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from openeva.data.decode import decode
from openeva.data.loader import TrainLoader
from openeva.data.masking import BlockMasking
from openeva.data.mixture import Mixture
from openeva.data.sources import image_folder, scenes
from openeva.data.views import CropConfig, ViewSpec, normalise

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE = 224
HEIGHT, WIDTH = 375, 500


def photographs() -> list[Image.Image]:
    """The colour photographs of scikit-image that lie in the package itself, or drawn scenes."""
    try:
        from skimage import data
    except ImportError:
        return [Image.fromarray(scenes.render(scenes.draw_scene(0, i), (600, 800))) for i in range(8)]
    return [
        Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "chelsea", "coffee", "rocket")
    ]


def write_folder(root: Path, num_images: int) -> None:
    """JPEG files of different content, quality 90."""
    rng = random.Random(0)
    sources = photographs()
    folder = root / "photographs"
    folder.mkdir()
    for number in range(num_images):
        image = rng.choice(sources)
        short = min(image.width / 4, image.height / 3)
        scale = rng.uniform(0.6, 1.0) * short
        left, top = rng.uniform(0, image.width - 4 * scale), rng.uniform(0, image.height - 3 * scale)
        box = (left, top, left + 4 * scale, top + 3 * scale)
        cut = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut
        cut.save(folder / f"{number:06d}.jpg", quality=90)


def rate(count: int, job: Callable[[], object]) -> float:
    """Items per second of a job that handles `count` of them."""
    start = time.perf_counter()
    job()
    return count / (time.perf_counter() - start)


def peer(root: Path, batch_size: int, workers: int, num_batches: int) -> float:
    """Images per second of torchvision, from the second batch on."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    batches = iter(DataLoader(ImageFolder(root, transform), batch_size, shuffle=True, num_workers=workers))
    next(batches)
    return rate(num_batches * batch_size, lambda: [next(batches) for _ in range(num_batches)])


def ours(mixture: Mixture, batch_size: int, workers: int, num_batches: int) -> float:
    """Images per second of this package, from the second batch on."""
    loader = TrainLoader(mixture, ViewSpec((SIZE, SIZE)), CropConfig(), batch_size=batch_size, num_workers=workers)
    batches = loader.batches()
    next(batches)
    speed = rate(
        num_batches * batch_size,
        lambda: [normalise(next(batches)[0]["image"], MEAN, STD) for _ in range(num_batches)],
    )
    batches.close()
    return speed


def machine() -> dict[str, object]:
    """What the numbers belong to."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
    }


def measure(root: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """All speeds, each measured `args.rounds` times, the candidates taking turns."""
    mixture = Mixture([image_folder.Config(roots=[root], reindex=True).build()], [1.0])
    data = [mixture.read(i).image for i in range(min(500, len(mixture)))]
    num_batches = (args.images - args.batch_size) // args.batch_size - 2 * max(args.workers, 1)
    masking = BlockMasking(num_masked=105).build((16, 16))
    rng = random.Random(0)
    candidates: dict[str, Callable[[], float]] = {
        "torchvision_loader": lambda: peer(root, args.batch_size, args.workers, num_batches),
        "openeva_loader": lambda: ours(mixture, args.batch_size, args.workers, num_batches),
        "decoder_simplejpeg": lambda: rate(len(data), lambda: [simplejpeg.decode_jpeg(d) for d in data]),
        "decoder_openeva": lambda: rate(len(data), lambda: [decode(d) for d in data]),
        "decoder_pillow": lambda: rate(len(data), lambda: [np.asarray(Image.open(io.BytesIO(d))) for d in data]),
        "block_masks_16x16": lambda: rate(20_000, lambda: [masking(rng) for _ in range(20_000)]),
        "scenes_64px": lambda: rate(
            1000, lambda: [scenes.render(scenes.draw_scene(0, i), (64, 64)) for i in range(1000)]
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(args.rounds + 1):
        for name, candidate in candidates.items():
            speed = candidate()
            if number:  # the first round warms the page cache up
                speeds[name].append(speed)
    return speeds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of both loaders; 0 = none")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/data_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {
        "machine": machine(),
        "images": args.images,
        "workers": args.workers,
        "unit": "items/s",
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OPENEVA_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "images"
        root.mkdir()
        write_folder(root, args.images)
        speeds = measure(root, args)
    result["median"] = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    result["rounds"] = {name: [round(v, 1) for v in values] for name, values in speeds.items()}
    pairs = {
        "openeva_loader / torchvision_loader": ("openeva_loader", "torchvision_loader"),
        "openeva_loader / decoder_simplejpeg": ("openeva_loader", "decoder_simplejpeg"),
        "decoder_openeva / decoder_pillow": ("decoder_openeva", "decoder_pillow"),
    }
    result["ratio"] = {
        text: round(statistics.median(a / b for a, b in zip(speeds[x], speeds[y], strict=True)), 3)
        for text, (x, y) in pairs.items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
