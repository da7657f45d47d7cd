"""The tensor table and the chunk map against brute force; when a plan is reused and when it is made anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import a8multi
from a8multi.loader import geometry, structs
from a8multi.plan import StepPlan

SHAPES = ((), (1,), (31,), (4096,), (16383,), (16384,), (16385,), (65, 300), (512, 1024), (513, 1025), (3, 20, 30))


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """Whatever the environment forces: the torch backend has no use for the addresses in a table."""
    with a8multi.use_backend("cpu"):
        yield


def _optimizer(shapes: Sequence[tuple[int, ...]], kind: Any = a8multi.Adafactor8bit, **options: Any) -> Any:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = kind(params, **options)
    _gradients(params)
    return optimizer, params


def _gradients(params: Sequence[torch.Tensor]) -> None:
    for param in params:
        param.grad = torch.ones_like(param)


def _plan(optimizer: Any) -> StepPlan:
    (work,) = optimizer._roster.works.values()
    return work.plan


# --- Tables. ---


def test_chunks_cover_every_element_once() -> None:
    optimizer, params = _optimizer(SHAPES, a8multi.AdamW8bit)
    optimizer.step()
    plan = _plan(optimizer)
    size = geometry()["A8_CHUNK"]
    expected = [(t, part) for t, p in enumerate(params) for part in range(math.ceil(p.numel() / size))]
    assert plan.chunks.tolist() == expected
    table = plan.tensors
    for row, param in zip(table, params, strict=True):
        assert row["numel"] == param.numel()
        mine = plan.chunks[row["chunk_at"] : row["chunk_at"] + row["chunks"]]
        assert mine["part"].tolist() == list(range(math.ceil(param.numel() / size)))
    assert len(plan.tiles) == 0


def test_tiles_cover_every_matrix_once() -> None:
    optimizer, _ = _optimizer(SHAPES)
    optimizer.step()
    plan = _plan(optimizer)
    sizes = geometry()
    expected = []
    for t, item in enumerate(plan.items):
        tiles = [
            (row, col)
            for row in range(0, item.rows, sizes["A8_TILE_ROWS"])
            for col in range(0, item.cols, sizes["A8_TILE_COLS"])
        ]
        expected += [(t, part) for part in range(len(tiles))]
        assert plan.tensors[t]["tiles"] == len(tiles)
        assert plan.tensors[t]["tile_at"] == len(expected) - len(tiles)
    assert plan.tiles.tolist() == expected
    by_shape = {tuple(item.param.shape): int(row["tiles"]) for item, row in zip(plan.items, plan.tensors, strict=True)}
    assert (by_shape[(512, 1024)], by_shape[(513, 1025)], by_shape[(16385,)]) == (1, 4, 0)


def test_chunks_by_kind_begin_with_those_of_factored_tensors() -> None:
    optimizer, _ = _optimizer(SHAPES)
    optimizer.step()
    plan = _plan(optimizer)
    chunks, factored = plan.chunks_by_kind
    kinds = [plan.items[t].moments.factored for t in chunks["tensor"]]
    assert 0 < factored < len(kinds)
    assert kinds == [True] * factored + [False] * (len(kinds) - factored)
    assert sorted(chunks.tolist()) == sorted(plan.chunks.tolist())
    for kind in (chunks[:factored], chunks[factored:]):
        assert kind.tolist() == sorted(kind.tolist()), "each kind by tensor, then part"


def test_scratch_regions_do_not_overlap() -> None:
    """Of every tensor: a row sum a tile column, a column sum a tile row, the totals, three words a chunk."""
    optimizer, _ = _optimizer(SHAPES)
    optimizer.step()
    plan = _plan(optimizer)
    sizes = geometry()
    used = torch.zeros(plan.scratch_floats, dtype=torch.int64)
    for row in plan.tensors:
        rows, cols, chunks = int(row["rows"]), int(row["cols"]), int(row["chunks"])
        across = math.ceil(cols / sizes["A8_TILE_COLS"])
        down = math.ceil(rows / sizes["A8_TILE_ROWS"])
        sums = sizes["A8_TOTALS"] + 3 * chunks
        for start, length in (("row_at", across * rows), ("col_at", down * cols), ("sum_at", sums)):
            at = int(row[start])
            assert at + length <= len(used)
            used[at : at + length] += 1
    # Between them only what rounds each up to 16 bytes.
    assert (used <= 1).all()
    assert (used == 0).sum() <= 3 * 4 * len(plan.tensors)
    for name in ("row_at", "col_at", "residual_at", "sum_at"):
        assert (plan.tensors[name] % 4 == 0).all()
    assert plan.scratch.numel() == plan.scratch_floats


@pytest.mark.parametrize("kind", [a8multi.AdamW8bit, a8multi.Adafactor8bit])
def test_scratch_is_small(kind: Any) -> None:
    """No temporary larger than one tensor: two per cent of a model like GPT-2's."""
    shapes = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    optimizer, params = _optimizer(shapes, kind)
    optimizer.step()
    size = sum(p.numel() * p.element_size() for p in params)
    assert _plan(optimizer).scratch_floats * 4 <= 0.02 * size


def test_rows_describe_the_tensors() -> None:
    optimizer, params = _optimizer([(65, 300), (4097,), (33,)], beta1=0.9, block_size=512, m_block_size=64)
    optimizer.step()
    plan = _plan(optimizer)
    table = plan.tensors
    formats = structs.Format
    assert table["first_format"].tolist() == [formats.NF4, formats.NF4, formats.STATE_F32]
    assert table["second_format"].tolist() == [formats.FACTORED, formats.LOG8, formats.STATE_F32]
    assert table["first_block_size"].tolist() == [64, 64, 0]
    assert table["second_block_size"].tolist() == [0, 512, 0]
    assert table["noise_id"].tolist() == [0, 1, 2]
    assert (table["rows"].tolist(), table["cols"].tolist()) == ([65, 0, 0], [300, 0, 0])
    for row, param in zip(table, params, strict=True):
        state = optimizer.state[param]
        assert row["param"] == param.data_ptr()
        assert row["grad"] == param.grad.data_ptr()
        assert row["first"] == state["exp_avg"].data_ptr()
        assert row["second"] == state.get("exp_avg_sq", state.get("row_var")).data_ptr()
    assert table[0]["second_block"] == optimizer.state[params[0]]["col_var"].data_ptr()
    assert table[2]["first_block"] == table[2]["second_block"] == 0


def test_hints_say_how_most_elements_are_stored() -> None:
    """A hint changes no bit, so that a few vectors in float32 do not count, but a model in nf4 does."""
    usual, other = structs.BatchHint(0), structs.BatchHint.OTHER_FORMATS
    shapes = ((64, 96), (8192,), (100,))

    def hints(kind: Any = a8multi.AdamW8bit, **options: Any) -> structs.BatchHint:
        optimizer, _ = _optimizer(shapes, kind, **options)
        optimizer.step()
        return _plan(optimizer).hints

    assert hints() == usual
    assert hints(a8multi.Lion8bit) == usual
    assert hints(a8multi.SGD8bit) == other, "without momentum"
    for options in (
        {"first_moment": "nf4"},
        {"second_moment": "fp32"},
        {"block_size": 64},
        {"min_quantized_numel": 1 << 20},
    ):
        assert hints(**options) == other, options
    params = [torch.nn.Parameter(torch.zeros(8192, dtype=torch.bfloat16))]
    item = a8multi.AdamW8bit(params)
    params[0].grad = torch.ones(8192, dtype=torch.bfloat16)
    item.step()
    assert _plan(item).hints == usual


def test_dtypes_follow_the_tensors() -> None:
    params = [torch.nn.Parameter(torch.zeros(8, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float16)]
    optimizer = a8multi.AdamW8bit(params)
    _gradients(params)
    optimizer.step()
    expected = [structs.Dtype.F32, structs.Dtype.BF16, structs.Dtype.F16]
    assert _plan(optimizer).tensors["param_dtype"].tolist() == expected
    assert _plan(optimizer).tensors["grad_dtype"].tolist() == expected


# --- Reuse. ---

OPTIMIZERS = [
    lambda: _optimizer([(65, 300), (4097,), (33,)], a8multi.AdamW8bit),
    lambda: _optimizer([(65, 300), (4097,), (33,)], a8multi.Adafactor8bit, beta1=0.9),
]


@pytest.fixture(params=OPTIMIZERS, ids=["adamw", "adafactor"])
def stepped(request: pytest.FixtureRequest) -> Any:
    optimizer, params = request.param()
    optimizer.step()
    return optimizer, params


def test_a_plan_is_reused_while_only_values_change(stepped: Any) -> None:
    optimizer, params = stepped
    plan = _plan(optimizer)
    tables = plan.tensors, plan.chunks, plan.tiles
    for step in range(3):
        for param in params:
            param.grad.fill_(step)
        optimizer.param_groups[0]["lr"] = 10.0**-step
        optimizer.step()
    assert _plan(optimizer) is plan
    assert all(a is b for a, b in zip((plan.tensors, plan.chunks, plan.tiles), tables, strict=True))


def test_addresses_follow_gradients_and_parameters(stepped: Any) -> None:
    """zero_grad(set_to_none=True) gives new gradients at every step, and .data may be replaced."""
    optimizer, params = stepped
    plan = _plan(optimizer)
    kept = [p.grad for p in params]
    _gradients(params)
    params[1].data = params[1].data.clone()
    optimizer.step()
    assert _plan(optimizer) is plan
    table = plan.tensors
    assert table["grad"].tolist() == [p.grad.data_ptr() for p in params]
    assert table["grad"].tolist() != [g.data_ptr() for g in kept]
    assert table["param"].tolist() == [p.data_ptr() for p in params]


def test_a_cast_model_keeps_its_state(stepped: Any) -> None:
    """float32 parameters become bfloat16 ones: the state stays, the types in the table change."""
    optimizer, params = stepped
    held = [list(optimizer.state[p].values())[1:] for p in params]
    for param in params:
        param.grad = None
        param.data = param.data.bfloat16()
    _gradients(params)
    optimizer.step()
    assert set(_plan(optimizer).tensors["param_dtype"].tolist()) == {structs.Dtype.BF16}
    assert all(p.isfinite().all() for p in params)
    for param, before in zip(params, held, strict=True):
        assert all(a is b for a, b in zip(list(optimizer.state[param].values())[1:], before, strict=True))


@pytest.mark.parametrize("index", [0, 1])
def test_state_that_was_replaced_is_used(stepped: Any, index: int) -> None:
    """Any one of its tensors: the new one is what the next step reads and writes."""
    optimizer, params = stepped
    state = optimizer.state[params[index]]
    for name in [n for n, v in state.items() if isinstance(v, torch.Tensor)]:
        plan = _plan(optimizer)
        old = state[name]
        state[name] = old.clone()
        before = old.clone()
        _gradients(params)
        for param in params:
            param.grad.mul_(3)
        optimizer.step()
        assert _plan(optimizer) is not plan, name
        assert torch.equal(old, before), f"{name}: the tensor that was taken away has been written"
        held = _plan(optimizer).items[index]
        assert any(state[name] is t for t in (held.first, held.first_block, held.second, held.second_block)), name


@pytest.mark.parametrize("change", ["state deleted", "state replaced", "a gradient missing", "a group added", "loaded"])
def test_a_plan_is_made_anew(stepped: Any, change: str) -> None:
    optimizer, params = stepped
    plan = _plan(optimizer)
    expected = len(params)
    if change == "state deleted":
        del optimizer.state[params[0]]
    elif change == "state replaced":
        optimizer.state[params[0]] = dict(optimizer.state[params[0]])
    elif change == "a gradient missing":
        params[1].grad = None
        expected -= 1
    elif change == "a group added":
        params.append(torch.nn.Parameter(torch.ones(5)))
        params[-1].grad = torch.ones(5)
        optimizer.add_param_group({"params": params[-1:]})
        expected += 1
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert _plan(optimizer) is not plan
    assert len(_plan(optimizer).items) == expected
    for item in _plan(optimizer).items:
        assert item.state is optimizer.state[item.param]
    assert optimizer.state[params[0]]["step"] == (1 if change == "state deleted" else 2)


def test_an_optimizer_without_contiguous_parameters() -> None:
    param = torch.nn.Parameter(torch.ones(40, 30).t())
    optimizer = a8multi.AdamW8bit([param])
    param.grad = torch.ones(30, 40)
    optimizer.step()
    assert _plan(optimizer).items == []
    assert (param != 1).all()
