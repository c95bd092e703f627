"""Tensors in every form that torch has: read right, or refused, never read or written elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from icecache import Engine, InvalidArgument, OutOfPages, Phase

Q_HEADS, KV_HEADS, DIM = 4, 2, 16
Form = Callable[[torch.Tensor], Any]


class Plain(torch.Tensor):
    """A subclass that computes as torch does."""


class Doubled(torch.Tensor):
    """A subclass whose memory is not what it stands for."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def shrunk(x: torch.Tensor, size: int) -> torch.Tensor:
    copy = x.clone()
    copy.untyped_storage().resize_(size)
    return copy


def shrunk_slice(x: torch.Tensor) -> torch.Tensor:
    copy = torch.stack([x, x])
    part = copy[1]
    copy.untyped_storage().resize_(0)
    return part


def read_only(x: torch.Tensor) -> Any:
    array = x.clone().numpy()
    array.flags.writeable = False
    return array


def fake(x: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


# Of the same value as what they are made from.
READ_RIGHT: dict[str, Form] = {
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "negative view": lambda x: torch._neg_view(-x),
    "negative view of every second": lambda x: torch._neg_view((-x).repeat_interleave(2, -1))[
        ..., ::2
    ],
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "real part": lambda x: torch.complex(x, -x).real,
    "requires a gradient": lambda x: x.clone().requires_grad_(),
    "result of a differentiable function": lambda x: x.clone().requires_grad_() * 1.0,
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "subclass": lambda x: x.clone().as_subclass(Plain),
    "odd offset": lambda x: torch.cat([torch.ones(1), x.flatten()])[1:].view(x.shape),
    "shared memory": lambda x: x.clone().share_memory_(),
    "read-only numpy": lambda x: torch.from_numpy(read_only(x)),
    "copy on write": lambda x: torch._lazy_clone(x),
    "rows apart": lambda x: torch.cat([x, x], -1)[..., :DIM],
}
REFUSED: dict[str, tuple[Form, str]] = {
    "float64": (lambda x: x.double(), r"torch\.float64"),
    "int32": (lambda x: x.int(), r"torch\.int32"),
    "bool": (lambda x: x > 0, r"torch\.bool"),
    "complex": (lambda x: x + 0j, r"torch\.complex64"),
    "bfloat16": (lambda x: x.bfloat16(), r"float32 as the cache, got torch\.bfloat16"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "meta": (lambda x: x.to("meta"), "on the CPU, got meta"),
    "sparse": (lambda x: x.to_sparse(), r"dense tensor, got one of layout torch\.sparse_coo"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
    "empty storage": (lambda x: shrunk(x, 0), "memory of its own"),
    "short storage": (lambda x: shrunk(x, x.nbytes - 4), "memory of its own"),
    "empty storage, from an offset on": (shrunk_slice, "memory of its own"),
    "zeros without memory": (lambda x: torch._efficientzerotensor(x.shape), "memory of its own"),
    "functional wrapper": (torch._to_functional_tensor, "memory of its own"),
    "fake": (fake, "FakeTensor"),
    "subclass with its own dispatch": (lambda x: x.as_subclass(Doubled), "Doubled"),
    "one dimension less": (lambda x: x[0, 0], "must be"),
    "one dimension more": (lambda x: x[None], "must be"),
    "fewer heads": (lambda x: x[:, :1], r"\[1, "),
    "half of D": (lambda x: x[..., : DIM // 2], r", 8\]"),
    "numpy": (lambda x: x.numpy(), "ndarray"),
}


def tokens(count: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, count, DIM, generator=generator)


def make() -> Engine:
    engine = Engine(
        num_layers=1,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        num_threads=1,
        index_threads=1,
    )
    engine.new_sequence()
    engine.append([0], 0, tokens(20, KV_HEADS, 1), tokens(20, KV_HEADS, 2))
    return engine


def step(engine: Engine, seqs: Any, *rows: torch.Tensor) -> torch.Tensor:
    queries, keys, values = rows
    return engine.step(seqs, 0, queries, keys, values)


def given() -> list[torch.Tensor]:
    return [tokens(3, heads, 5 + heads) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]


def call(engine: Engine, verb: str, queries: Any, keys: Any, values: Any) -> Any:
    if verb == "step":
        return engine.step([0], 0, queries, keys, values)
    if verb == "step_packed":
        outputs = torch.empty(3, Q_HEADS, DIM)
        q, k, v = (x[0].transpose(0, 1) for x in (queries, keys, values))
        engine.step_packed([0], 0, q, k, v, outputs, [0], [3], [Phase.AUTO])
        return outputs.transpose(0, 1)[None]
    in_list = verb == "lists"
    engine.append([0], 0, *([keys[0]], [values[0]]) if in_list else (keys, values))
    engine.observe([0], 0, [queries[0]] if in_list else queries)
    outputs = engine.attend([0], 0, [queries[0]] if in_list else queries)
    return outputs[0][None] if in_list else outputs


@pytest.mark.parametrize("verb", ["step", "step_packed", "tensors", "lists"])
@pytest.mark.parametrize("form", READ_RIGHT)
@pytest.mark.filterwarnings("ignore:.*not writable")
def test_tensors_of_any_form_are_read_right(form: str, verb: str) -> None:
    plain, formed = make(), make()
    want = call(plain, verb, *given())
    for _ in range(3):  # memory that was freed may still hold what is wanted
        formed = make()
        got = call(formed, verb, *(READ_RIGHT[form](x) for x in given()))
        assert torch.equal(got, want)
        assert not got.requires_grad
        for got_rows, want_rows in zip(formed.gather(0, 0), plain.gather(0, 0), strict=True):
            assert torch.equal(got_rows, want_rows)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("verb", ["step", "tensors"])
@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_tensors_without_the_memory_they_show_are_refused(form: str, verb: str, which: int) -> None:
    change, reason = REFUSED[form]
    engine = make()
    arguments: list[Any] = given()
    arguments[which] = change(arguments[which])
    with pytest.raises(InvalidArgument, match=reason):
        call(engine, verb, *arguments)
    assert engine.length(0) == (20 if verb == "step" or which > 0 else 23)
    engine.check_integrity()


def test_tensors_of_transforms_are_refused() -> None:
    engine = make()
    queries, keys, values = given()

    def step(keys: torch.Tensor) -> torch.Tensor:
        engine.step([0], 0, queries, keys, values)
        return keys.sum()

    with pytest.raises(InvalidArgument, match="keys must be a tensor with memory of its own"):
        torch.func.vmap(step)(keys[None])
    with pytest.raises(InvalidArgument, match="keys must be a tensor with memory of its own"):
        torch.func.grad(step)(keys)
    assert engine.length(0) == 20


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_results_are_on_the_cpu_whatever_torchs_default_is(device: str) -> None:
    want = call(make(), "tensors", *given())
    engine = make()
    with torch.device(device):
        got = call(engine, "tensors", *given_on_cpu())
        rows = engine.gather(0, 0)
    assert torch.equal(got, want)
    assert rows[0].device.type == "cpu"


def given_on_cpu() -> list[torch.Tensor]:
    with torch.device("cpu"):
        return given()


OUTPUTS_REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "strided": (lambda: torch.zeros(4, Q_HEADS, 2 * DIM)[..., ::2], "unit stride"),
    "expanded over rows": (lambda: torch.zeros(1, Q_HEADS, DIM).expand(4, -1, -1), "for every row"),
    "expanded over heads": (lambda: torch.zeros(4, 1, DIM).expand(-1, Q_HEADS, -1), "every row"),
    "sliding": (lambda: torch.zeros(9 * DIM).as_strided((4, Q_HEADS, DIM), (8, DIM, 1)), "row"),
    "negative view": (lambda: torch._neg_view(torch.zeros(4, Q_HEADS, DIM)), "negative view"),
    "requires a gradient": (lambda: torch.zeros(4, Q_HEADS, DIM).requires_grad_(), "gradient"),
    "meta": (lambda: torch.zeros(4, Q_HEADS, DIM, device="meta"), "meta"),
    "empty storage": (lambda: shrunk(torch.zeros(4, Q_HEADS, DIM), 0), "memory of its own"),
    "zeros without memory": (
        lambda: torch._efficientzerotensor((4, Q_HEADS, DIM)),
        "memory of its own",
    ),
    "too few rows": (lambda: torch.zeros(2, Q_HEADS, DIM), "must hold 3 rows from row 0"),
    "too few heads": (lambda: torch.zeros(4, KV_HEADS, DIM), "outputs must be"),
}


def packed_step(engine: Engine, **changed: Any) -> Any:
    queries, keys, values = (x[0].transpose(0, 1) for x in given())
    arguments: dict[str, Any] = {
        "seqs": [0],
        "layer": 0,
        "queries": queries,
        "keys": keys,
        "values": values,
        "outputs": torch.zeros(4, Q_HEADS, DIM),
        "firsts": [0],
        "counts": [3],
        "phases": [0],
    } | changed
    engine.step_packed(**arguments)
    return arguments["outputs"]


@pytest.mark.parametrize("form", OUTPUTS_REFUSED)
def test_outputs_that_cannot_be_written_row_by_row_are_refused(form: str) -> None:
    engine = make()
    change, reason = OUTPUTS_REFUSED[form]
    with pytest.raises(InvalidArgument, match=reason):
        packed_step(engine, outputs=change())
    assert engine.length(0) == 20


def test_outputs_share_no_memory_with_inputs() -> None:
    engine, twin = make(), make()
    queries = given()[0][0].transpose(0, 1).contiguous()
    with pytest.raises(InvalidArgument, match="outputs must not share memory with queries"):
        packed_step(engine, queries=queries, outputs=queries)
    one = torch.zeros(3, Q_HEADS + KV_HEADS, DIM)
    keys = given()[1][0].transpose(0, 1)
    one[:, :KV_HEADS] = keys
    with pytest.raises(InvalidArgument, match="outputs must not share memory with keys"):
        packed_step(engine, keys=one[:, :KV_HEADS], outputs=one[:, 1 : 1 + Q_HEADS])
    assert engine.length(0) == 20
    # Beside each other in one tensor: nothing is shared.
    got = packed_step(engine, keys=one[:, :KV_HEADS], outputs=one[:, KV_HEADS:])
    assert torch.equal(got, packed_step(twin)[:3])
    assert torch.equal(one[:, :KV_HEADS], keys)


def test_two_sequences_may_read_the_same_rows_but_not_write_them() -> None:
    engine, twin = make(), make()
    for one in (engine, twin):
        one.fork(0)
    two: dict[str, Any] = {"seqs": [0, 1], "counts": [1, 1], "phases": [0, 0]}
    with pytest.raises(InvalidArgument, match="memory of its own for every row"):
        packed_step(engine, **two, firsts=[1, 1])
    got = packed_step(engine, **two, firsts=[0, 1])
    want = [step(twin, [s], *(x[:, :, s : s + 1] for x in given())) for s in (0, 1)]
    assert torch.equal(got[:2], torch.cat(want)[:, :, 0])


def test_inference_tensors_are_written_in_inference_mode_only() -> None:
    engine = make()
    with torch.inference_mode():
        outputs = torch.zeros(4, Q_HEADS, DIM)
        packed_step(engine, outputs=outputs)
    with pytest.raises(InvalidArgument, match="inference tensor outside of inference mode"):
        packed_step(engine, outputs=outputs)
    with torch.no_grad():
        packed_step(engine, outputs=torch.zeros(4, Q_HEADS, DIM).requires_grad_())
    assert engine.length(0) == 26


WILD_ROWS = [
    ([2**63 - 1], [1]),
    ([2**63 - 1], [2**63 - 1]),
    ([1], [2**63 - 1]),
    ([0], [2**63 - 1]),
    ([-1], [1]),
    ([-(2**63)], [2**63 - 1]),
    ([0], [-1]),
    ([2], [-(2**63)]),
    ([4], [1]),
    ([0], [2**64]),
    ([2**64], [1]),
]


@pytest.mark.parametrize(("firsts", "counts"), WILD_ROWS)
def test_rows_outside_of_the_tensors_are_refused(firsts: list[int], counts: list[int]) -> None:
    engine = make()
    for _ in range(20):
        with pytest.raises(InvalidArgument, match=r"must hold|must fit 64 bits"):
            packed_step(engine, firsts=firsts, counts=counts)
    assert engine.length(0) == 20
    engine.check_integrity()


@pytest.mark.parametrize("layer", [-1, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), 2**64])
def test_no_other_layer_is_taken_for_one_that_exists(layer: int) -> None:
    engine = make()
    queries, keys, values = given()
    calls: list[Callable[[], Any]] = [
        lambda: engine.step([0], layer, queries, keys, values),
        lambda: engine.append([0], layer, keys, values),
        lambda: engine.attend([0], layer, queries),
        lambda: engine.observe([0], layer, queries),
        lambda: engine.attend([], layer, []),
        lambda: engine.append([], layer, [], []),
        lambda: packed_step(engine, layer=layer),
        lambda: engine.length(0, layer),
        lambda: engine.stats(layer, 0),
        lambda: engine.trace(0, layer, 0),
        lambda: engine.gather(0, layer),
    ]
    for refused in calls:
        with pytest.raises(InvalidArgument, match="layer"):
            refused()
    assert engine.length(0) == 20


@pytest.mark.parametrize("count", [2**31, 2**40, 2**31 - 1, 2**30])
def test_endless_tensors_are_refused_without_being_read(count: int) -> None:
    engine = make()
    endless = torch.zeros(1, KV_HEADS, 1, DIM).expand(-1, -1, count, -1)
    with pytest.raises((InvalidArgument, OutOfPages), match=r"a sequence must be|host_memory"):
        engine.append([0], 0, endless, endless)
    assert engine.length(0) == 20


def test_gathered_rows_that_share_memory_are_refused() -> None:
    engine = make()
    keys, values = engine.gather(0, 0)
    rows = torch.zeros_like(keys)
    for pair in (
        (rows, rows),
        (rows[:1].expand_as(rows), values),
        (keys, rows[:1].expand_as(rows)),
    ):
        with pytest.raises(InvalidArgument, match="memory of their own for every row"):
            engine._engine.gather(0, 0, *pair)
    assert not rows.any()


def test_items_of_a_list_may_change_the_list() -> None:
    engine = make()

    class Shrinking:
        def __init__(self, items: list[Any]) -> None:
            self.items = items

        def __index__(self) -> int:
            self.items.clear()
            return 0

    seqs: list[Any] = []
    seqs += [Shrinking(seqs), 0, 0, 0]
    want = call(make(), "step", *given())
    assert torch.equal(step(engine, seqs, *given()), want)
