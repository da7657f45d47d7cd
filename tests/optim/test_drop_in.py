"""What users of adafactor8bit 0.2.4 write runs when only the import is changed: the ways of use of its README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from a8multi import Adafactor8Bit


class Mixed(nn.Module):
    """An embedding, matrices, norms, biases and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(300, 64)
        self.position_embed = nn.Parameter(torch.zeros(16, 64))
        self.linear1 = nn.Linear(64, 256)
        self.conv = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.linear2 = nn.Linear(256, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens) + self.position_embed
        x = self.norm(x + self.linear2(self.linear1(x).relu()))
        return self.conv(x.reshape(-1, 4, 16, 16)).mean()


def _plain(model: nn.Module) -> Any:
    return Adafactor8Bit(model.parameters(), lr=1e-3)


def _is_sensitive(name: str, param: nn.Parameter) -> bool:
    return param.ndim <= 1 or "bias" in name or "norm" in name


def _grouped(model: nn.Module) -> Any:
    decay, no_decay = [], []
    for name, param in model.named_parameters():
        (no_decay if _is_sensitive(name, param) or "embed" in name else decay).append(param)
    groups = [
        {"params": decay, "weight_decay": 1e-2, "quantize": True},
        {"params": no_decay, "weight_decay": 0.0, "quantize": False},
    ]
    return Adafactor8Bit(groups, lr=1e-3, relative_step=False, beta2=0.999)


def _sorted_out(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    found: dict[str, list[nn.Parameter]] = {"vector": [], "embedding": [], "matrix": [], "tensor": []}
    for name, param in model.named_parameters():
        if _is_sensitive(name, param):
            kind = "vector"
        elif "embed" in name and "position" not in name:
            kind = "embedding"
        else:
            kind = "matrix" if param.ndim == 2 else "tensor"
        found[kind].append(param)
    return found


def _hybrid(model: nn.Module, matrices: dict[str, Any] | None = None) -> Any:
    kinds = _sorted_out(model)
    apollo = {"apollo_rank": 256, "beta1": 0.9}
    groups = [
        {"params": kinds["vector"], "weight_decay": 0.0, "quantize": False, "apollo_rank": 0},
        {
            "params": kinds["embedding"],
            "weight_decay": 0.0,
            "quantize": False,
            "apollo_rank": 0,
            "factored": False,
            "scale_parameter": False,
            "d": 1e9,
            "lr": 1e-4,
        },
        {"params": kinds["matrix"], "weight_decay": 1e-2, "quantize": True, **(matrices or apollo)},
        {
            "params": kinds["tensor"],
            "weight_decay": 1e-2,
            "quantize": True,
            "apollo_rank": 0,
            "beta1": 0.9,
            "factored": False,
        },
    ]
    return Adafactor8Bit(groups, lr=1e-3, relative_step=False, beta2=0.999, enable_fira_for_adafactor=True)


def _vanilla_came(model: nn.Module) -> Any:
    came = {
        "lr": 5e-4,
        "beta1": 0.9,
        "beta3": 0.9999,
        "apollo_rank": 0,
        "scale_parameter": False,
        "d": 1e9,
        "enable_fira_for_adafactor": False,
    }
    return _hybrid(model, came)


@pytest.mark.filterwarnings("ignore:apollo_rank=256 is above")
@pytest.mark.parametrize("build", [_plain, _grouped, _hybrid, _vanilla_came])
def test_a_model_learns(build: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = Mixed()
    optimizer = build(model)
    tokens = torch.randint(300, (8, 16))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(param.isfinite().all() for param in model.parameters())
    assert losses[-1] < losses[0]
    twin = build(Mixed())
    twin.load_state_dict(optimizer.state_dict())
