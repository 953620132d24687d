"""What the device could do at best, and how much memory is in use: the denominators of the log."""

import platform
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PEAK_TFLOPS = {
    "B200": 2250.0, "B300": 2250.0, "GB200": 2500.0, "GB300": 2500.0, "GH200": 989.0, "H200": 989.0, "H200 NVL": 835.0,
    "H100": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "A100": 312.0, "A10G": 70.0,
    "A10": 125.0, "A30": 165.0, "A40": 150.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "V100": 125.0, "T4": 65.0,
    "RTX 3090": 71.0, "RTX 4090": 165.0, "RTX 5090": 209.5, "RTX 6000 Ada": 182.0, "MI300X": 1307.0, "MI250X": 191.5,
}  # fmt: skip
"""Dense bf16/fp16 matrix throughput (fp32 accumulation) by words of the device's name, from the makers' data sheets."""


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the CPU with its number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  a pseudo file, read line by line
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of the device: from its data sheet where known, else measured by matrix products (about 0.3 s)."""
    if device.type == "cuda" and dtype != torch.float32:
        words = re.findall(r"\w+", torch.cuda.get_device_name(device))  # whole words: an "A4000" is no "A40"
        for part in sorted(PEAK_TFLOPS, key=len, reverse=True):
            if set(part.split()) <= set(words) and "Laptop" not in words:
                return PEAK_TFLOPS[part] * 1e12
    return measured_matmul_flops(device, dtype)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The best FLOP/s of square matrix products on this device."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device="cpu").manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best, begun = float("inf"), time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """Most memory in use so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for `environment.json` and benchmark results."""
    packages = ("openeva", "torch", "torchvision", "timm")
    return {
        **{name: version(name) for name in packages},  # from their metadata: importing timm takes seconds
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """Revision of the checkout that this package runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
