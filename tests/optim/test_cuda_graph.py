"""Steps in CUDA graphs: a hundred replays give the bits of a hundred eager steps. Needs a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, differences, gradients, parameters, snapshot

import a8multi

compiled = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cupy")], indirect=True
)

# A gradient that is not contiguous too: it is copied on the way.
SHAPES = ((65, 300), (4097,), (129,), (3, 5, 7), (513, 1025), ())
MAKES: dict[str, Callable[..., Any]] = {
    "adamw": a8multi.AdamW8bit,
    "factored, relative": a8multi.Adafactor8bit,
    "nf4": lambda params, **o: a8multi.Adafactor8bit(params, beta1=0.9, relative_step=False, **o),
    "full": lambda params, **o: a8multi.Adafactor8bit(params, factored=False, relative_step=False, beta2=0.99, **o),
    "apollo": lambda params, **o: a8multi.APOLLO8bit(params, rank=4, update_proj_gap=3, min_8bit_size=512, **o),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def _rate(step: int) -> float:
    return 1e-2 / (1 + step % 7)


def _static_grads(params: list[Any]) -> list[torch.Tensor]:
    grads = [torch.zeros_like(param) for param in params]
    grads[3] = torch.zeros_like(params[3].permute(2, 0, 1).contiguous()).permute(1, 2, 0)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return grads


def _fill(grads: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for grad, value in zip(grads, values, strict=True):
        grad.copy_(value)


def _captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _counted(optimizer: Any, params: list[Any]) -> list[dict[str, Any]]:
    found = snapshot(optimizer, params)
    for held, param in zip(found, params, strict=True):
        held["step"] = int(optimizer.state[param]["step"])
    return found


class _Pair:
    """The same model twice: stepped eagerly with numbers, and by an optimizer to be captured with a rate tensor."""

    def __init__(self, make: Callable[..., Any], dtype: torch.dtype = torch.float32, skips: bool = False) -> None:
        self.eager_params, self.params = (parameters(SHAPES, dtype, "cuda") for _ in range(2))
        self.rate = torch.tensor(_rate(0), device="cuda")
        options = {"stochastic_rounding_writeback": dtype is not torch.float32}
        self.eager = make(self.eager_params, lr=_rate(0), **options)
        self.optimizer = make(self.params, lr=self.rate, capturable=True, skip_nonfinite=skips, **options)
        self.grads = _static_grads(self.params)
        self.sets = [gradients(self.params, k) for k in range(5)]

    def step(self, number: int, advance: Callable[[], Any]) -> None:
        """One eager step, and ``advance`` for the other with the same gradients and rate."""
        values = self.sets[number % 5]
        self.eager.param_groups[0]["lr"] = _rate(number)
        apply(self.eager, self.eager_params, values)
        self.rate.fill_(_rate(number))
        _fill(self.grads, values)
        advance()

    def assert_same(self) -> None:
        found = _counted(self.optimizer, self.params)
        assert not differences(found, _counted(self.eager, self.eager_params))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@makes
def test_a_hundred_replays(make: Any, dtype: torch.dtype, backend: BackendCase) -> None:
    pair = _Pair(make, dtype)
    pair.step(0, pair.optimizer.step)
    graph = _captured(pair.optimizer.step)
    pair.assert_same()  # a capture runs nothing
    for number in range(1, 101):
        pair.step(number, graph.replay)
    pair.assert_same()
    assert int(pair.optimizer.state[pair.params[0]]["step"]) == 101


@compiled
@makes
def test_replays_eager_steps_and_other_graphs_in_turn(make: Any, backend: BackendCase) -> None:
    pair = _Pair(make)
    pair.step(0, pair.optimizer.step)
    graphs = [_captured(pair.optimizer.step) for _ in range(3)]
    for number in range(1, 13):
        advance = [*[graph.replay for graph in graphs], pair.optimizer.step][number % 4]
        pair.step(number, advance)
    # An eager step that finds another set of gradients makes a new plan; the graphs do not depend on the old one.
    missing = pair.params[1].grad
    pair.params[1].grad = None
    pair.eager.param_groups[0]["lr"] = _rate(13)
    apply(pair.eager, pair.eager_params, [None if i == 1 else g for i, g in enumerate(pair.sets[3])])
    pair.rate.fill_(_rate(13))
    _fill(pair.grads, pair.sets[3])
    pair.optimizer.step()
    pair.params[1].grad = missing
    _ = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(8)]  # into memory that was freed
    for number in range(14, 20):
        pair.step(number, graphs[number % 3].replay)
    pair.assert_same()


@compiled
@makes
def test_bad_replays_leave_no_trace(make: Any, backend: BackendCase) -> None:
    """One with a bad gradient of each parameter in turn before every good one."""
    pair = _Pair(make, skips=True)
    pair.step(0, pair.optimizer.step)
    graph = _captured(pair.optimizer.step)
    for number in range(1, 13):
        pair.grads[number % len(pair.grads)].fill_(float("inf"))
        graph.replay()
        pair.step(number, graph.replay)
    assert pair.optimizer.skipped_steps == 12
    pair.assert_same()


@compiled
@makes
def test_the_whole_of_a_training_step(make: Any, backend: BackendCase) -> None:
    """Forward, backward and step in one graph; the gradients are made in the graph's memory."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8)).cuda()
    optimizer = make(model.parameters(), lr=torch.tensor(1e-2, device="cuda"), capturable=True)
    inputs, targets = torch.randn(32, 64, device="cuda"), torch.randn(32, 8, device="cuda")
    loss = torch.zeros((), device="cuda")

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        found = torch.nn.functional.mse_loss(model(inputs), targets)
        found.backward()
        optimizer.step()
        loss.copy_(found.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    start = float(loss)
    optimizer.zero_grad(set_to_none=True)
    graph = _captured(train)
    for _ in range(200):
        graph.replay()
    assert float(loss) < 0.2 * start
    assert int(optimizer.state[next(model.parameters())]["step"]) == 203


@compiled
@pytest.mark.parametrize(("capturable", "words"), [(False, "capturable=True"), (True, "before it has run like this")])
@makes
def test_a_capture_needs_capturable_and_a_step(make: Any, capturable: bool, words: str, backend: BackendCase) -> None:
    params = parameters(SHAPES, device="cuda")
    optimizer = make(params, capturable=capturable)
    _static_grads(params)

    def step() -> None:
        torch.ones(8, device="cuda").neg_()  # torch warns of an empty graph
        optimizer.step()

    with pytest.raises(RuntimeError, match=words):
        _captured(step)
    assert not optimizer.state


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        yield lambda: torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")


@compiled
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rate_dtype", [None, torch.float32, torch.float64], ids=str)
@makes
def test_no_step_waits_for_the_device(
    make: Any, rate_dtype: Any, capturable: bool, backend: BackendCase, no_synchronisation: Callable[[], None]
) -> None:
    """The first step, an unchanged one, and one with other gradients; a rate tensor gives the bits of a number."""
    params, twins = parameters(SHAPES, device="cuda"), parameters(SHAPES, device="cuda")
    rate = _rate(1) if rate_dtype is None else torch.tensor(_rate(1), device="cuda", dtype=rate_dtype)
    optimizer, expected = make(params, lr=rate, capturable=capturable), make(twins, lr=_rate(1))
    sets = [gradients(params, k) for k in range(4)]
    present: list[Any] = [*sets[:2], [None if i == 1 else g for i, g in enumerate(sets[2])], sets[3]]
    warm = parameters(SHAPES, device="cuda")
    apply(make(warm, capturable=capturable), warm, sets[0])
    torch.cuda.synchronize()
    no_synchronisation()
    for grads in present:
        apply(optimizer, params, grads)
    torch.cuda.set_sync_debug_mode("default")
    for grads in present:
        apply(expected, twins, grads)
    assert not differences(_counted(optimizer, params), _counted(expected, twins))
