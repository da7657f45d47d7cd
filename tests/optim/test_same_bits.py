"""The same bits whatever the instruction set, the number of threads and, for element-wise rules, the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim.helpers import decoded, differences, gradients, parameters, run, snapshot

import a8multi
from a8multi import settings

SHAPES = ((65, 300), (16385,), (4097,), (129,), (4, 33, 5), (1,), ())
STEPS = 100
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW8bit", {}),
    "adamw nf4": ("AdamW8bit", {"first_moment": "nf4"}),
    "adamw bf16": ("AdamW8bit", {"first_moment": "bf16", "block_size": 64}),
    "adamw fp32": ("AdamW8bit", {"first_moment": "fp32", "second_moment": "fp32"}),
    "adam": ("Adam8bit", {"weight_decay": 0.1, "maximize": True, "block_size": 2048}),
    "factored": ("Adafactor8bit", {"weight_decay": 0.1}),
    "full": ("Adafactor8bit", {"factored": False}),
    "nf4": ("Adafactor8bit", {"beta1": 0.9}),
    "int8": ("Adafactor8bit", {"beta1": 0.9, "first_moment": "int8", "factored": False, "block_size": 32}),
}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "lion": ("Lion8bit", {"weight_decay": 0.1}),
    "rmsprop": ("RMSprop8bit", {}),
    "rmsprop all": ("RMSprop8bit", {"momentum": 0.9, "centered": True, "first_moment": "nf4"}),
    "sgd": ("SGD8bit", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adagrad": ("Adagrad8bit", {"initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    "ademamix": ("AdEMAMix8bit", {"third_moment": "int8", "t_alpha": 8, "t_beta3": 8}),
    "lamb": ("LAMB8bit", {"weight_decay": 0.1}),
    "lars": ("LARS8bit", {"momentum": 0.9, "weight_decay": 0.1}),
}
# Those that sum over a tensor, which torch does in another order.
SUMMING = ("lamb", "lars")
ADAFACTOR = [name for name, case in CASES.items() if case[0] == "Adafactor8bit"]
EXACT = {name: case for name, case in {**CASES, **RULES}.items() if name not in (*ADAFACTOR, *SUMMING)}


def _trained(
    case: tuple[str, dict[str, Any]],
    dtype: torch.dtype,
    write_back: bool = False,
    steps: int = STEPS,
    shapes: Any = SHAPES,
) -> list[dict[str, Any]]:
    params = parameters(shapes, dtype)
    optimizer = getattr(a8multi, case[0])(params, lr=1e-2, stochastic_rounding_writeback=write_back, **case[1])
    # A few sets of gradients in turn: making them costs more than the step.
    sets = [gradients(params, k) for k in range(4)]
    for step in range(steps):
        for param, grad in zip(params, sets[step % 4], strict=True):
            param.grad = grad
        optimizer.step()
    return snapshot(optimizer, params)


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Iterator[tuple[str, int]]]]:
    """Every usable instruction set with 1, 2 and 3 threads, each set up while it is yielded, baseline first."""
    monkeypatch.delenv(settings.CPU_ISA.name, raising=False)
    with a8multi.use_backend("cpu"):
        usable = a8multi.backend_for("cpu").library.info.isa_usable

        def each() -> Iterator[tuple[str, int]]:
            for isa in usable:
                monkeypatch.setenv(settings.CPU_ISA.name, isa)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    yield isa, threads

        yield each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_variant_and_thread_count(variants: Any, case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """Parameters and states after 100 steps, byte for byte."""
    expected = None
    for isa, threads in variants():
        write_back = dtype is torch.bfloat16
        found = _trained(case, dtype, write_back)
        assert a8multi.backend_for("cpu").isa_ran == isa, "the forced variant did not run"
        expected = expected or found
        assert not differences(found, expected), f"{isa} with {threads} threads"


@pytest.mark.parametrize("case", RULES.values(), ids=RULES.keys())
def test_every_rule_on_every_variant(variants: Any, case: tuple[str, dict[str, Any]]) -> None:
    expected = None
    for isa, threads in variants():
        found = _trained(case, torch.bfloat16, True, steps=12)
        assert a8multi.backend_for("cpu").isa_ran == isa, "the forced variant did not run"
        expected = expected or found
        assert not differences(found, expected), f"{isa} with {threads} threads"


@pytest.mark.parametrize("case", ["adamw", "factored", "nf4", *SUMMING])
def test_many_chunks_and_tiles(variants: Any, case: str) -> None:
    """Sums over several tiles and chunks are combined in one order, whoever computed them first."""
    expected = None
    for isa, threads in variants():
        found = _trained({**CASES, **RULES}[case], torch.float32, steps=3, shapes=((513, 1025), (7, 5000)))
        expected = expected or found
        assert not differences(found, expected), f"{isa} with {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())
def test_element_rules_on_the_torch_backend(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    with a8multi.use_backend("cpu"):
        expected = _trained(case, dtype, write_back=dtype is not torch.float32, steps=10)
    with a8multi.use_backend("torch"):
        found = _trained(case, dtype, write_back=dtype is not torch.float32, steps=10)
    assert not differences(found, expected)


@pytest.mark.parametrize("case", ADAFACTOR)
def test_adafactor_on_the_torch_backend(case: str) -> None:
    """Only the order of its sums differs: parameters within 1e-5 of the way, codes by at most one, and few of them."""
    _, options = CASES[case]
    trained = {}
    for backend in ("cpu", "torch"):
        with a8multi.use_backend(backend):
            params = parameters(SHAPES)
            optimizer = a8multi.Adafactor8bit(params, lr=1e-2, **options)
            run(optimizer, params, range(10))
            trained[backend] = params, [optimizer.state[p] for p in params]
    start = parameters(SHAPES)
    for i, (p, q) in enumerate(zip(trained["cpu"][0], trained["torch"][0], strict=True)):
        way = float((p - start[i]).detach().abs().max())
        assert float((p - q).detach().abs().max()) <= 1e-4 * way, f"parameter {i}"
        ours, theirs = trained["cpu"][1][i], trained["torch"][1][i]
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name in ("row_var", "col_var"):
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)
        for name, size in (
            ("exp_avg", optimizer.param_groups[0]["m_block_size"]),
            ("exp_avg_sq", optimizer.param_groups[0]["block_size"]),
        ):
            if name in ours:
                a, b = (decoded(state, name, p.shape, size) for state in (ours, theirs))
                assert float((a - b).abs().max()) <= 0.1 * float(a.abs().max()), f"{name} of parameter {i}"
                assert float(((a - b).abs() > 1e-5 * a.abs().max()).double().mean()) < 0.01, f"{name} of parameter {i}"


@pytest.mark.parametrize("stochastic", [False, True])
def test_bits_depend_on_the_seed_alone(stochastic: bool) -> None:
    """Pitfall 14: replicas with one seed stay identical; another seed gives other codes, unless nothing is random."""

    def trained(seed: int, **options: Any) -> list[dict[str, Any]]:
        options = {"stochastic_rounding": stochastic, **options}
        torch.manual_seed(seed + 100)  # no device generator takes part
        return _trained(("AdamW8bit", {"seed": seed, **options}), torch.float32, steps=5)

    assert not differences(trained(1), trained(1))
    assert bool(differences(trained(1), trained(2))) is stochastic
    assert bool(differences(trained(1), trained(1 + (1 << 32)))) is stochastic


def test_noise_differs_between_parameters_and_steps() -> None:
    """Pitfall 14: two parameters with the same values and gradients get different codes, and one at two steps too."""
    params = [torch.nn.Parameter(torch.ones(4096)) for _ in range(2)]
    grads = [gradients(params[:1], 0)[0]] * 2
    optimizer = a8multi.AdamW8bit(params, lr=0.0, betas=(0.0, 0.0))
    codes = []
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        codes.append([optimizer.state[p]["exp_avg_sq"].clone() for p in params])
    # With no averages the same values are stored each time: nothing but the noise differs.
    assert not torch.equal(codes[0][0], codes[0][1])
    assert not torch.equal(codes[0][0], codes[1][0])
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq_block"], optimizer.state[params[1]]["exp_avg_sq_block"])
