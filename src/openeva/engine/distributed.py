"""One process, DDP or FSDP2 under `torchrun`; every helper works without a process group too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

Strategy = Literal["auto", "none", "ddp", "fsdp"]
Shard = Literal["all", "node"]
CompileMode = Literal["off", "blocks", "model"]


@dataclass(frozen=True)
class World:
    """Which process this is."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs and files."""
        return self.rank == 0


def start(device: str = "auto", *, tf32: bool = True) -> World:
    """Join the process group that `torchrun` announces in the environment, or run alone.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        tf32: Whether matrix products and convolutions in fp32 may round their factors to TF32 on a GPU.

    Raises:
        ValueError: No such device, or CUDA is asked for and absent.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    target = find_device(device, local_rank)
    if target.type == "cuda":
        torch.cuda.set_device(target)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo")
    return World(dist.get_rank() if dist.is_initialized() else 0, size, target)


def find_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that a word of the user stands for; `local_rank` is that of the GPU where the word is "cuda".

    Raises:
        ValueError: No such device, or CUDA is asked for and absent.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asked for, but torch sees no CUDA device; use device=cpu or auto")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        found = torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; give auto, cpu, cuda, cuda:1, ...") from None
    if device.startswith("cuda:") and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} asked for, but torch counts {torch.cuda.device_count()} CUDA devices")
    return found


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(
    module: nn.Module,
    blocks: list[nn.Module],
    world: World,
    strategy: Strategy,
    compile_mode: CompileMode,
    dtype: torch.dtype,
    shard: Shard = "all",
) -> nn.Module:
    """Compile, then wrap for data parallel training.

    Args:
        module: The task's `trainable`.
        blocks: Its repeated layers: the units of sharding and of block-wise compilation.
        world: This process.
        strategy: "auto" is DDP with several processes. With one process nothing is wrapped, whatever it says.
        compile_mode: "blocks" compiles one block once and uses it for all; "model" compiles the whole forward pass.
        dtype: Compute precision; FSDP gathers weights in it and reduces gradients in fp32.
        shard: Over which processes FSDP spreads the weights: all, or those of a node, each of which has all weights.

    Raises:
        ValueError: Several processes, but a strategy that does not join them, or nodes of different sizes.
    """
    if world.size > 1 and strategy == "none":
        raise ValueError(f"run.strategy none would train {world.size} unconnected models; use auto, ddp or fsdp")
    if compile_mode == "blocks":
        for block in blocks:
            block.compile()
    elif compile_mode == "model":
        module.compile()
    if world.size == 1:
        return module
    if strategy == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = _mesh(world, shard)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        return module
    # buffers are constants (positions); broadcasting them would make evaluation a collective operation
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)


def _mesh(world: World, shard: Shard) -> DeviceMesh:
    """Processes in a row, or nodes x processes of a node: weights are spread over the last axis."""
    if shard == "all":
        return init_device_mesh(world.device.type, (world.size,))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.size % per_node:
        raise ValueError(f"run.shard node needs as many processes on each node: {world.size} are not {per_node} each")
    shape = (world.size // per_node, per_node)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within this context every process holds all weights of a sharded module (collective on entry only).

    For evaluation: forward passes need no other process, so that processes may run different numbers of them.
    """
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not module, recurse=False)  # the root keeps its own, as is usual
            shard.reshard()


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP (FSDP2 and compilation change modules in place)."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes (in place)."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes (in place)."""
    return sum_over_processes(value) / (dist.get_world_size() if dist.is_initialized() else 1)


def gather_over_processes(value: Tensor) -> list[Tensor]:
    """The tensors of all processes, of any shapes; give ones on the CPU."""
    if not dist.is_initialized():
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def any_process(flag: bool) -> bool:
    """True where it is true on any process; goes through the CPU, so that no device is waited for."""
    if not dist.is_initialized():
        return flag
    tensor = torch.tensor(float(flag))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def merge_over_processes(found: dict[str, str]) -> dict[str, str]:
    """The entries of all processes; goes through the CPU, as `any_process`."""
    if not dist.is_initialized():
        return found
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    return {name: value for part in parts for name, value in part.items()}


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
