"""The student compiles without a graph break (in a fresh process: the run-time checks of shapes would break graphs)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.toy import STUDENT, join, start
from openeva.backbones.vit import Config
from openeva.heads.mim import MimStudent
from openeva.losses.cosine import negative_cosine

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"patch_grad_scale": 0.5, "dropout": 0.1},
    "shared bias": {"positions": "none", "relative_position": "shared", "layer_scale": 0.1},
    "own biases": {"relative_position": "per_block_decoupled", "qkv_bias": "full", "positions": "sincos"},
    "post-norm": {"norm_order": "post", "attention_dropout": 0.1},
    "checkpointing": {"activation_checkpointing": True},
    "EVA-02": {"rope_grid": 3, "mlp": "swiglu", "sub_norm": "mlp_attention"},
    "another size": {"image_size": 48, "dynamic_size": True, "relative_position": "per_block", "rope_grid": 3},
}


def students(option: str) -> tuple[MimStudent, MimStudent]:
    torch.manual_seed(0)
    config = Config(**{**STUDENT, **OPTIONS[option], "drop_path": 0.2})
    one, other = MimStudent(config.build(), 8), MimStudent(config.build(), 8)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(one.state_dict())
    return one, other


def step(student: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    image_BCYX, mask_BN = torch.randn(3, 3, 32, 32), torch.rand(3, 16) < 0.4
    index_M = mask_BN.flatten().nonzero()[:, 0]
    target_MV = torch.randn(len(index_M), 8)
    loss = negative_cosine(student(image_BCYX, mask_BN, index_M), target_MV)
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()]


def compare(option: str) -> None:
    """The whole student compiled, and each block by itself, as the two settings of `run.compile` do."""
    for mode in ("model", "blocks"):
        torch._dynamo.reset()
        eager, compiled = students(option)
        for part in [compiled] if mode == "model" else compiled.backbone.blocks:
            part.compile(fullgraph=True, backend="aot_eager")
        expected_loss, expected = step(eager)
        loss, gradients = step(compiled)
        torch.testing.assert_close(loss, expected_loss)
        for name, one, other in zip(dict(eager.named_parameters()), expected, gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6, msg=f"{mode}: {name}")


@pytest.mark.parametrize("option", OPTIONS)
def test_one_graph_with_the_same_loss_and_gradients(option: str, tmp_path: Path) -> None:
    join(start(compare, option, errors=tmp_path), tmp_path)
