"""The byte-level transformer."""

from __future__ import annotations

import math

import pytest
import torch

from a8multi.cli.model import ByteTransformer, next_byte_loss


@pytest.fixture
def model() -> ByteTransformer:
    return ByteTransformer(width=32, layers=2, heads=4, context=12, seed=0)


def test_a_byte_does_not_see_later_ones(model: ByteTransformer) -> None:
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7] = 200
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


def test_untrained_model_knows_nothing(model: ByteTransformer) -> None:
    sequences = torch.randint(256, (8, 13), generator=torch.Generator().manual_seed(0))
    assert next_byte_loss(model, sequences).item() == pytest.approx(math.log(256), abs=0.05)


def test_loss_compares_each_byte_with_the_next(model: ByteTransformer) -> None:
    sequences = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probabilities = model(sequences[:, :-1]).double().log_softmax(-1)
        loss = next_byte_loss(model, sequences).item()
    of_targets = [log_probabilities[row, at, sequences[row, at + 1]].item() for row in range(2) for at in range(12)]
    assert loss == pytest.approx(-sum(of_targets) / 24, rel=1e-5)


def test_seed_decides_the_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(torch.seed())
        return [parameter.detach() for parameter in ByteTransformer(32, 1, 2, 8, seed).parameters()]

    assert all(map(torch.equal, weights(1), weights(1)))
    assert not torch.equal(weights(1)[0], weights(2)[0])


def test_every_parameter_learns(model: ByteTransformer) -> None:
    next_byte_loss(model, torch.randint(256, (2, 13))).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_width_is_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        ByteTransformer(30, 1, 4, 8, 0)
