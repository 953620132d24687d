import pytest
import torch

from openeva.engine import hardware
from openeva.engine.hardware import environment, memory_gib, peak_flops

MEASURED = 1.5


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA RTX A1000", MEASURED),
        ("NVIDIA A40", 150), ("NVIDIA RTX A4000", MEASURED), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250), ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362), ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65), ("NVIDIA T400 4GB", MEASURED),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", MEASURED),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_this_device_and_no_other(
    name: str, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_matmul_flops", lambda device, dtype: MEASURED * 1e12)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == tflops * 1e12
    assert peak_flops(torch.device("cuda"), torch.float32) == MEASURED * 1e12  # the table is of reduced precision


def test_a_cpu_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_where_and_with_what() -> None:
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert str(torch.get_num_threads()) in found["device"]
    assert memory_gib(torch.device("cpu")) > 0.01
