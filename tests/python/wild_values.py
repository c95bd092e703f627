"""Wild values for the parameters of `_core`, and valid ones in forms that are rare.

`run_method` calls one method of `_core.Engine` with one of them, and checks all that must hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy
import torch
from icecache import InvalidArgument, OutOfPages, _core

LAYERS, Q_HEADS, KV_HEADS, DIM, LENGTH, NEW = 2, 4, 2, 16, 24, 3
GUARD = 64  # elements ahead of and behind each tensor
CANARY = 12345.0

Errors = tuple[type[BaseException], ...]
INVALID: Errors = (InvalidArgument,)
TYPE: Errors = (TypeError,)


@dataclass
class Wild:
    """A value for one parameter, and what it must raise: nothing where it means a valid one."""

    name: str
    make: Callable[[Any], Any]  # from the valid value
    errors: Errors = ()


class World:
    """Two engines with the same two sequences, and tensors between guards."""

    def __init__(self) -> None:
        self.guarded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.engine, self.twin = (self._engine() for _ in range(2))

    def _engine(self) -> _core.Engine:
        config = _core.Config()
        for name, value in (("num_threads", "1"), ("index_threads", "1"), ("host_memory", "8M")):
            config.set(name, value)
        engine = _core.Engine(LAYERS, Q_HEADS, KV_HEADS, DIM, "float32", 0.0, 0.0, config)
        gone = [engine.new_sequence() for _ in range(3)][2]
        for layer in range(LAYERS):
            rows = self.tensor(2, KV_HEADS, LENGTH, DIM, seed=layer)
            engine.append([0, 1], layer, rows, rows)
        engine.release(gone)
        return engine

    def tensor(self, *shape: int, seed: int = 0) -> torch.Tensor:
        count = int(numpy.prod(shape))
        generator = torch.Generator().manual_seed(100 * seed + count)
        whole = torch.full((count + 2 * GUARD,), CANARY)
        whole[GUARD:-GUARD] = torch.randn(count, generator=generator)
        self.guarded.append((whole, whole.clone()))
        return whole[GUARD:-GUARD].view(shape)

    def arguments(self, method: str) -> dict[str, Any]:
        """Valid ones of a method of _core.Engine, by name."""
        queries = self.tensor(2, Q_HEADS, NEW, DIM, seed=7)
        keys, values = (self.tensor(2, KV_HEADS, NEW, DIM, seed=s) for s in (8, 9))
        tensors = {"queries": queries, "keys": keys, "values": values}
        step = {"seqs": [0, 1], "layer": 1, **tensors}
        lse = self.tensor(2, Q_HEADS, NEW, seed=10)
        if method == "step":
            return {**step, "phase": 0, "lse": lse}
        if method == "append":
            del step["queries"]
            return step
        if method == "attend":
            return {"seqs": [0, 1], "layer": 1, "queries": queries, "phase": 3, "lse": lse}
        if method == "observe":
            return {"seqs": [0, 1], "layer": 1, "queries": queries, "phase": 0}
        if method == "step_packed":
            packed = {
                name: self.tensor(8, tensor.shape[1], DIM, seed=seed)
                for seed, (name, tensor) in enumerate(tensors.items(), 20)
            }
            lse = self.tensor(8, Q_HEADS, seed=33)
            rows = {"firsts": [1, 4], "counts": [2, 3], "phases": [0, 2], "lse": lse}
            outputs = self.tensor(8, Q_HEADS, DIM, seed=30)
            return {"seqs": [0, 1], "layer": 1, **packed, "outputs": outputs, **rows}
        if method == "gather":
            out = [self.tensor(KV_HEADS, LENGTH, DIM, seed=s) for s in (31, 32)]
            return {"seq": 0, "layer": 1, "keys": out[0], "values": out[1]}
        return {name: GOOD_NUMBERS[name] for name in METHODS[method]}

    def check_guards(self, written: torch.Tensor | None = None) -> None:
        """Raises where memory changed that no call may change; `written`: rows that one may."""
        for whole, before in self.guarded:
            same = whole == before
            assert same[:GUARD].all() and same[-GUARD:].all(), "memory beside a tensor changed"
            mine = written is not None and (
                whole.untyped_storage().data_ptr() == written.untyped_storage().data_ptr()
            )
            assert mine or same.all(), "a tensor that is only read changed"

    def state(self, engine: _core.Engine) -> list[Any]:
        engine.check_integrity()
        state: list[Any] = [engine.memory().sequences]
        for seq, layer in itertools.product((0, 1), range(LAYERS)):
            length = engine.length(seq, layer)
            rows = [torch.empty(KV_HEADS, length, DIM) for _ in range(2)]
            engine.gather(seq, layer, *rows)
            state += rows
        return state


@cache
def the_world() -> World:
    """Made once, ahead of all cases: each has a copy of its own, in its process."""
    return World()


GOOD_NUMBERS = {"seq": 0, "layer": 1, "length": 5, "kv_head": 1, "phase": 0}
METHODS: dict[str, list[str]] = {
    "new_sequence": [],
    "fork": ["seq", "length"],
    "retain": ["seq"],
    "truncate": ["seq", "length"],
    "release": ["seq"],
    "length": ["seq", "layer"],
    "append": ["seqs", "layer", "keys", "values"],
    "attend": ["seqs", "layer", "queries", "phase", "lse"],
    "step": ["seqs", "layer", "queries", "keys", "values", "phase", "lse"],
    "step_packed": [
        "seqs",
        "layer",
        "queries",
        "keys",
        "values",
        "outputs",
        "firsts",
        "counts",
        "phases",
        "lse",
    ],
    "observe": ["seqs", "layer", "queries", "phase"],
    "gather": ["seq", "layer", "keys", "values"],
    "synchronize": [],
    "stats": ["layer", "kv_head"],
    "reset_stats": [],
    "memory": [],
    "pool_bytes": [],
    "trace": ["seq", "layer", "kv_head"],
    "check_integrity": [],
    "config": [],
    "scale": [],
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# --- wild values


class Index:
    """An integer that is no int."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> int:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value  # type: ignore[no-any-return]


EXTREMES = [-1, -2, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**30]
EXTREMES += [-(2**31), -(2**31) - 1, -(2**32), -(2**63), -(2**63) - 1]
NO_NUMBERS: list[Any] = [None, "0", b"0", 0.0, 1.5, float("nan"), [], [0], {}, object, 1j]
NO_NUMBERS += [torch.tensor(1.0), torch.tensor([1, 1]), numpy.float32(0), Index("x")]


def constant(value: Any, errors: Errors, name: str = "") -> Wild:
    return Wild(name or f"{value!r:.40}", lambda good: value, errors)


def numbers(name: str) -> Iterator[Wild]:
    for value in EXTREMES:
        yield constant(value, INVALID)
    for value in NO_NUMBERS:
        yield constant(value, TYPE)
    yield constant(Index(ArithmeticError()), (ArithmeticError,), "__index__ that raises")
    if name == "seq":
        yield constant(2, INVALID, "released")
        yield constant(99, INVALID)
    good = GOOD_NUMBERS[name]
    for valid in (Index(good), numpy.int64(good), torch.tensor(good)):
        yield constant(valid, (), f"valid {type(valid).__name__}")


def with_first(value: Any, good: list[int]) -> list[Any]:
    return [value, good[1]]


def with_second(value: Any, good: list[int]) -> list[Any]:
    return [good[0], value]


def shrinking(good: list[int]) -> list[Any]:
    items: list[Any] = []

    class Evil(Index):
        def __index__(self) -> int:
            items.clear()
            return 0

    items += [Evil(0), *[Evil(1)] * 30]
    return items


def lists(name: str) -> Iterator[Wild]:
    """For seqs, firsts, counts and phases."""
    for value in EXTREMES:
        yield Wild(f"[{value}, good]", partial(with_first, value), INVALID)
        yield Wild(f"[good, {value}]", partial(with_second, value), INVALID)
    for value in NO_NUMBERS:
        yield Wild(f"[{value!r:.30}, good]", partial(with_first, value), TYPE)
    wrong: list[Any] = [None, 1, 1.5, object(), int, torch.tensor(1), "ab", ["a"], {"a": 1}]
    for value in wrong:
        yield constant(value, TYPE)
    yield constant(torch.tensor([0.5, 1.5]), TYPE)
    yield constant([], INVALID, "none")
    yield Wild("one", lambda good: good[:1], INVALID)
    yield Wild("three", lambda good: [*good, good[0]], INVALID)
    yield Wild("10,000", lambda good: good * 5000, INVALID)
    yield Wild("list that shrinks", shrinking, INVALID)
    if name == "seqs":
        yield constant([0, 0], INVALID, "twice the same")
        yield constant([0, 2], INVALID, "a released one")
    if name == "phases":
        yield constant([0, 4], INVALID)
        yield constant([0, 256], INVALID)
    for kind in (tuple, iter, numpy.array, torch.tensor):
        yield Wild(f"valid {kind.__name__}", kind)


class Plain(torch.Tensor):
    pass


class Dispatched(torch.Tensor):
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def resized(x: torch.Tensor, size: int) -> torch.Tensor:
    whole = x.clone()
    whole.untyped_storage().resize_(size)
    return whole


def resized_slice(x: torch.Tensor) -> torch.Tensor:
    whole = torch.stack([x, x])
    part = whole[1]
    whole.untyped_storage().resize_(16)
    return part


def with_tokens(count: int, x: torch.Tensor) -> torch.Tensor:
    return x[:, :, :1].expand(-1, -1, count, -1)


def with_value(value: float, x: torch.Tensor) -> torch.Tensor:
    changed = x.clone()
    changed.view(-1)[changed.numel() // 2] = value
    return changed


def converted(dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return x.abs().to(dtype)


Form = Callable[[torch.Tensor], Any]
# What no function takes in place of a tensor.
NO_MEMORY: dict[str, Form] = {
    **{
        str(dtype): partial(converted, dtype)
        for dtype in (torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    },
    **{
        str(dtype): partial(converted, dtype)
        for dtype in (torch.bool, torch.complex64, torch.float8_e5m2, torch.bfloat16, torch.half)
    },
    "meta": lambda x: x.to("meta"),
    "sparse coo": lambda x: x.to_sparse(),
    "sparse csr": lambda x: x.reshape(-1, DIM).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "functional": torch._to_functional_tensor,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "zeros without memory, sliced": lambda x: torch._efficientzerotensor((9, *x.shape))[3],
    "own dispatch": lambda x: x.as_subclass(Dispatched),
    "storage of 0": lambda x: resized(x, 0),
    "storage of half": lambda x: resized(x, x.nbytes // 2),
    "storage of one less": lambda x: resized(x, x.nbytes - 1),
    "slice of a short storage": resized_slice,
    "scalar": lambda x: torch.tensor(1.0),
    "no elements": lambda x: torch.empty(0),
    "vector": lambda x: x.flatten(),
    "7 dimensions": lambda x: x[None, None, None],
    "64 dimensions": lambda x: x[(None,) * (64 - x.ndim)],
    "half of D": lambda x: x[..., : DIM // 2],
    "twice D": lambda x: torch.cat([x, x], -1),
    "no D": lambda x: x[..., :0],
    "D of 0 in 2^40 rows": lambda x: torch.empty(*[2**40 if i == 0 else 0 for i in range(x.ndim)]),
    "None": lambda x: None,
    "number": lambda x: 5,
    "address": lambda x: x.data_ptr(),
    "text": lambda x: "x",
    "numpy": lambda x: x.numpy(),
    "type": lambda x: torch.Tensor,
    "lists": lambda x: x.tolist(),
    "device": lambda x: x.device,
    "storage": lambda x: x.untyped_storage(),
}
# Another form of the same values.
SAME_VALUE: dict[str, Form] = {
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every third, negative view": lambda x: torch._neg_view(-x.repeat_interleave(3, -1)[..., ::3]),
    "negative view": lambda x: torch._neg_view(-x),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "reversed strides": lambda x: (
        x.permute(*range(x.ndim - 1, -1, -1)).contiguous().permute(*range(x.ndim - 1, -1, -1))
    ),
    "imaginary part": lambda x: torch.complex(x, -x).conj().imag,
    "requires a gradient": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "subclass": lambda x: x.clone().as_subclass(Plain),
    "copy on write": torch._lazy_clone,
    "shared": lambda x: x.clone().share_memory_(),
    "rows apart": lambda x: torch.cat([x, x], -1)[..., :DIM],
    "odd address": lambda x: torch.cat([torch.ones(1), x.flatten()])[1:].view(x.shape),
    "conjugate": lambda x: x.conj(),
    "inference": lambda x: inference(x),
}


def inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def read_tensors(name: str, batch_is_first: bool) -> Iterator[Wild]:
    for form, change in NO_MEMORY.items():
        yield Wild(form, change, (*INVALID, *TYPE))
    for form, change in SAME_VALUE.items():
        yield Wild(form, change)
    yield Wild("fewer rows", lambda good: good[:1], INVALID)
    yield Wild("no rows", lambda good: good[:0], INVALID)
    yield Wild("fewer heads", lambda good: good[:, :1], INVALID)
    yield Wild("no heads", lambda good: good[:, :0], INVALID)
    yield Wild("more heads", lambda good: torch.cat([good, good], 1), INVALID)
    if name != "queries":
        for value in (float("nan"), float("inf"), -float("inf")):
            yield Wild(str(value), partial(with_value, value), INVALID)
    if batch_is_first:
        yield Wild("one token less", lambda good: good[:, :, 1:], INVALID)
        yield Wild("one token more", lambda good: torch.cat([good, good[:, :, :1]], 2), INVALID)
        for count in (2**31 - 1, 2**31, 2**32 + NEW, 2**40, 2**55):
            yield Wild(
                f"{count} tokens",
                partial(with_tokens, count),
                (InvalidArgument, OutOfPages),
            )


def lse_tensors() -> Iterator[Wild]:
    """For a number in place of each row of D: any strides will do."""
    for form, change in NO_MEMORY.items():
        if form not in ("None", "half of D", "sparse csr"):
            yield Wild(form, change, (*INVALID, *TYPE))
    yield constant(None, ())
    refused = ("negative view", "imaginary part", "requires a gradient", "parameter", "inference")
    for form in refused:
        yield Wild(form, SAME_VALUE[form], INVALID)
    for form in ("every second", "transposed", "reversed strides", "subclass", "odd address"):
        yield Wild(form, SAME_VALUE[form])
    yield Wild("expanded rows", lambda good: good[:1].expand(good.shape), INVALID)
    yield Wild("expanded heads", lambda good: good[:, :1].expand(good.shape), INVALID)
    yield Wild("fewer heads", lambda good: good[:, :1], INVALID)
    yield Wild("more heads", lambda good: torch.cat([good, good], 1), INVALID)


def written_tensors(name: str) -> Iterator[Wild]:
    for form, change in NO_MEMORY.items():
        yield Wild(form, change, (*INVALID, *TYPE))
    for form in (
        "every second",
        "negative view",
        "imaginary part",
        "requires a gradient",
        "parameter",
        "inference",
        "transposed",
    ):
        yield Wild(form, SAME_VALUE[form], INVALID)
    yield Wild("expanded rows", lambda good: good[:1].expand(good.shape), INVALID)
    yield Wild("expanded heads", lambda good: good[:, :1].expand(good.shape), INVALID)
    yield Wild(
        "sliding",
        lambda good: good.view(-1).as_strided(good.shape, (8, DIM, 1)),
        INVALID,
    )
    yield Wild("fewer heads", lambda good: good[:, :1], INVALID)
    yield Wild("more heads", lambda good: torch.cat([good, good], 1), INVALID)


# --- one call


def run_method(method: str, parameter: str, wild: Wild) -> None:
    world = the_world()
    arguments = world.arguments(method)
    clean = world.arguments(method)
    good = arguments[parameter]
    arguments[parameter] = wild.make(good)
    before = world.state(world.twin)
    call = getattr(world.engine, method)
    if wild.errors:
        try:
            call(*arguments.values())
        except wild.errors:
            pass
        else:
            raise AssertionError("accepted what is invalid")
        assert same(world.state(world.engine), before), "a refused call changed the engine"
        world.check_guards()
        return
    got, want = call(*arguments.values()), getattr(world.twin, method)(*clean.values())
    for name in ("outputs", "lse", *(("keys", "values") if method == "gather" else ())):
        if name in clean and arguments[name] is not None:
            assert same(arguments[name], clean[name]), f"{name} differ"
    if got is not None and not repr(got).startswith(("HeadStats", "StepTrace")):
        assert same(got, want), "the result differs"
    if method != "release" and not (method == "truncate" and parameter == "seq"):
        assert same(world.state(world.engine), world.state(world.twin)), "the engines differ"
