"""The table of calls with one wild argument: functions of `_core`, and torch operators."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import wild_values as wild
from icecache import InvalidArgument, Unavailable, _core, device, ops
from wild_values import EXTREMES, GOOD_NUMBERS, METHODS, NO_NUMBERS, Errors


@dataclass
class Case:
    name: str
    run: Callable[[], None]  # raises where something does not hold
    leaves_all: bool = False  # where it does not raise, everything is as it was before


def refuses(
    name: str, errors: type[BaseException] | Errors, call: Callable[..., Any], *given: Any
) -> Case:
    def run() -> None:
        try:
            call(*given)
        except errors:
            return
        raise AssertionError("accepted what is invalid")

    return Case(name, run, leaves_all=True)


def engine_cases() -> Iterator[Case]:
    for method, parameters in METHODS.items():
        for parameter in parameters:
            if parameter in GOOD_NUMBERS:
                values = wild.numbers(parameter)
            elif parameter in ("seqs", "firsts", "counts", "phases"):
                values = wild.lists(parameter)
            elif parameter == "lse":
                values = wild.lse_tensors()
            elif parameter == "outputs" or method == "gather":
                values = wild.written_tensors(parameter)
            else:
                values = wild.read_tensors(parameter, method in ("append", "step"))
            for value in values:
                yield Case(
                    f"Engine.{method}({parameter}={value.name})",
                    partial(wild.run_method, method, parameter, value),
                    leaves_all=bool(value.errors),
                )


DEVICE_METHODS: dict[str, list[str]] = {
    "prefill": ["layer", "sequence", "keys", "values", "queries"],
    "extend": ["layer", "sequence", "keys", "values", "queries"],
    "limit_tokens": ["tokens"],
    "reserve": ["sequence", "tokens"],
    "built": ["layer"],
    "wait": ["layer"],
    "step": ["layer", "queries", "keys", "values", "out", "rows"],
    "rebuild": ["layer", "sequence"],
    "fork": ["sequence", "source"],
    "truncate": ["sequence", "length"],
    "take_back": ["sequence", "length"],
    "evict": ["sequence"],
    "release": ["sequence"],
    "length": ["layer", "sequence"],
    "gather": ["layer", "sequence", "keys", "values"],
    "stats": ["layer", "kv_head"],
    "memory": [],
    "config": [],
}
CONFIG_METHODS: dict[str, list[str]] = {
    "set": ["name", "value"],
    "get": ["name"],
    "most_slots": ["tokens"],
    "resolved": ["num_layers", "num_q_heads", "num_kv_heads", "head_dim"],
}


PREFIX_TABLE_METHODS: dict[str, list[str]] = {
    "use": ["seq"],
    "pin": ["seq"],
    "unpin": ["seq"],
    "remove": ["seq"],
    "oldest": [],
    "sequences": [],
    "version": [],
}


def self_cases() -> Iterator[Case]:
    """`self` of another class or not initialised, too few and too many arguments."""
    classes = {
        "Engine": METHODS,
        "DeviceCache": DEVICE_METHODS,
        "Config": CONFIG_METHODS,
        "PrefixTable": PREFIX_TABLE_METHODS,
    }
    for owner, methods in classes.items():
        cls = getattr(_core, owner)
        unmade = cls.__new__(cls)
        for method, parameters in methods.items():
            function = getattr(cls, method)
            name = f"{owner}.{method}"
            given = [0] * len(parameters)
            others: list[Any] = [None, 0, "x", _core.build_info(), object(), cls, torch.ones(3)]
            for other in others:
                yield refuses(f"{name} of {other!r:.30}", TypeError, function, other, *given)
            yield refuses(f"{name} of nothing", TypeError, function)
            yield refuses(f"{name} with one more", TypeError, function, unmade, *given, 0)
            yield refuses(f"{name} by name", TypeError, partial(function, x=0), unmade, *given)
            if parameters:
                # A fork may be of all tokens.
                errors = InvalidArgument if name == "Engine.fork" else TypeError
                yield refuses(f"{name} with one less", errors, function, unmade, *given[1:])
            yield refuses(f"{name} of an unmade one", InvalidArgument, function, unmade, *given)
        for verb in (copy.copy, copy.deepcopy, pickle.dumps):
            yield refuses(f"{verb.__name__} of an unmade {owner}", TypeError, verb, unmade)
        yield Case(f"dropping an unmade {owner}", partial(dropped, cls))


def dropped(cls: Any) -> None:
    for _ in range(100):
        cls.__new__(cls)


def record_cases() -> Iterator[Case]:
    """Records come from C++ only."""
    made_by_hand = ("Engine", "DeviceCache", "Config", "PrefixTable")
    for name, cls in vars(_core).items():
        if not isinstance(cls, type) or name in made_by_hand:
            continue
        yield refuses(f"{name}()", TypeError, cls)
        yield refuses(f"{name}.__new__", TypeError, cls.__new__, cls)
        yield refuses(f"object.__new__({name})", TypeError, object.__new__, cls)
        yield refuses(f"subclass of {name}", TypeError, type, "S", (cls,), {})
        for attribute, value in vars(cls).items():
            if isinstance(value, property) and value.fget is not None:
                yield refuses(f"{name}.{attribute} of 0", TypeError, value.fget, 0)
    for record in (_core.build_info(), _core.config_fields()[0]):
        for verb in (copy.copy, copy.deepcopy, pickle.dumps):
            name = f"{verb.__name__} of {type(record).__name__}"
            yield refuses(name, TypeError, verb, record)
    unmade: Any = _core.Config.__new__(_core.Config)
    yield refuses("Config(unmade)", InvalidArgument, _core.Config, unmade)
    others: list[Any] = [None, 0, "x", {}, object()]
    for other in others:
        yield refuses(f"Config({other!r:.20})", TypeError, _core.Config, other)


def function_cases() -> Iterator[Case]:
    for name in ("config_fields", "build_info", "simd_level", "usable_cores", "usable_memory"):
        numbers: list[Any] = [None, 0, 2**64, "x"]
        for value in numbers:
            yield refuses(f"{name}({value!r})", TypeError, getattr(_core, name), value)
    lend = _core.use_parallel_for
    for path in ("", "x", "/", "/nowhere.so", "libc.so.6", "a\0b", ops.LIBRARY + "\0", __file__):
        yield refuses(f"use_parallel_for({path!r:.30})", InvalidArgument, lend, path)
    addresses: list[Any] = [0, 1, -1, 2**63, 2**64, 1.5, b"x", [], object(), ops]
    for value in addresses:
        yield refuses(f"use_parallel_for({value!r:.30})", TypeError, lend, value)
    yield refuses("use_parallel_for(surrogate)", ValueError, lend, "\ud800")


# --- constructors and settings

SHAPE = {"num_layers": 1, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64}


def make(cls: Any, rest: dict[str, int], name: str, value: Any) -> Any:
    """With one argument changed, and so large a pool that no bound of memory hides another."""
    config = _core.Config()
    config.set("host_memory", str(2**60))
    logits = {"scale": 0.0, "logit_softcap": 0.0}
    given: dict[str, Any] = {**SHAPE, "dtype": "float32", **logits, "config": config, **rest}
    return cls(*(given | {name: value}).values())


def prefix_table_cases() -> Iterator[Case]:
    def of(method: str, *values: Any) -> None:
        table = _core.PrefixTable(4)
        table.add(1, nine)
        try:
            getattr(table, method)(*values)
        finally:
            assert table.sequences() == [1] and table.find(table.text(range(20))) == (1, 9)

    nine = _core.PrefixTable(4).text(range(9))

    errors = (InvalidArgument, TypeError, ValueError)
    for value in [*EXTREMES, *NO_NUMBERS]:
        name = f"{value!r:.30}"
        for method in ("use", "pin", "unpin", "remove"):
            yield refuses(f"PrefixTable.{method}({name})", errors, of, method, value)
        if not (isinstance(value, int) and -(2**63) <= value < 2**63):
            yield refuses(f"PrefixTable.add({name})", errors, of, "add", value, nine)
            yield refuses(f"PrefixTable.__contains__({name})", errors, of, "__contains__", value)
            contains = wild.the_world().engine.contains
            yield refuses(f"Engine.contains({name})", errors, contains, value)
        if isinstance(value, int) and -(2**31) <= value < 2**31:
            continue
        yield refuses(f"PrefixTable.text([{name}])", errors, of, "text", [0, value])
    for value in (-(2**63), -1, 0, None, 1.5, "4", 2**64):
        yield refuses(f"PrefixTable({value!r})", errors, _core.PrefixTable, value)
    hashes: list[Any] = [1, "ab", ["a"], [None], [b"a", 1], object()]
    for value in hashes:
        name = f"PrefixTable.text(hashes={value!r:.30})"
        yield refuses(name, errors, of, "text", range(9), value)
    more = _core.PrefixTable(4).text(range(9), [b""] * 3)
    yield refuses("PrefixTable.add(more hashes than blocks)", errors, of, "add", 2, more)
    spaces: list[Any] = [1, b"a", None, [], "\ud800"]
    for value in spaces:
        yield refuses(f"PrefixTable.text(space={value!r})", errors, of, "text", [1], None, value)
    texts: list[Any] = [
        None,
        1,
        "abc",
        [1, 2],
        b"a",
        object(),
        _core.build_info(),
        _core.PrefixText,
    ]
    for value in texts:
        name = f"{value!r:.30}"
        yield refuses(f"PrefixTable.find({name})", TypeError, of, "find", value)
        yield refuses(f"PrefixTable.add(2, {name})", TypeError, of, "add", 2, value)
    yield refuses("PrefixTable.add(again)", errors, of, "add", 1, nine)
    yield refuses("PrefixTable.oldest(1)", errors, of, "oldest", 1)


def constructor_cases() -> Iterator[Case]:
    unmade = _core.Config.__new__(_core.Config)
    device_only = {"batch": 1, "max_tokens": 4096, "device": 0}
    for cls, rest in ((_core.Engine, {}), (_core.DeviceCache, device_only)):
        bad: dict[str, list[tuple[Any, Errors]]] = {}
        # A build or a machine without CUDA says so first.
        invalid = (InvalidArgument, Unavailable) if rest else (InvalidArgument,)
        for field in (*SHAPE, *rest):
            bad[field] = [(value, invalid) for value in (0, *EXTREMES, 2**30, 2**16)]
            bad[field] += [(value, (TypeError,)) for value in NO_NUMBERS]
        numbers = (float("nan"), float("inf"), -1.0, 1e300, 1e-300, -0.5)
        no_numbers: list[Any] = [None, "1", b"1", [], 1j]
        for field in ("scale", "logit_softcap"):
            bad[field] = [(value, invalid) for value in numbers]
            bad[field] += [(value, (TypeError,)) for value in no_numbers]
            bad[field] += [(10**400, (OverflowError,))]
        names = ("", "float64", "float32\0", "FLOAT32", "torch.float32")
        bad["dtype"] = [(value, invalid) for value in names]
        no_names: list[Any] = [None, 0, 7, torch.float32, b"float32"]
        bad["dtype"] += [(value, (TypeError,)) for value in no_names]
        no_configs: list[Any] = [None, 0, {}, "x", _core.build_info()]
        bad["config"] = [(value, (TypeError,)) for value in no_configs]
        bad["config"] += [(unmade, (InvalidArgument,))]
        for field, values in bad.items():
            for value, errors in values:
                name = f"{cls.__name__}({field}={value!r:.30})"
                yield refuses(name, errors, make, cls, rest, field, value)


# What an Engine takes of each int parameter, for a shape of 1 layer, 2 query heads, 1 KV head, 64.
MOST = 2**30
VALID_INTS = {
    "token_budget": (36, MOST),
    "page_size": (8, 32),
    "sink_tokens": (0, 208),
    "window_tokens": (0, 236),
    "sketch_rank": (8, 256),
    "sketch_bits": (4, 8),
    "candidates": (220, MOST),
    "far_node_tokens": (16, 128),
    "dense_tokens": (256, MOST),
    "max_token_budget": (256, MOST),
    "decode_tokens": (1, MOST),
    "host_memory": (155_648, 2**60),  # 19 pages of 8 KiB
    "device_pages": (0, 2**31 - 1),
    "device_tokens": (0, 0),  # on the CPU
    "num_threads": (0, 1024),
    "index_threads": (0, 1024),
    "seed": (-(2**63), 2**63 - 1),
    "dci_beam": (0, MOST),
}
NOT_TRIED_AT_BOUNDS = ("num_threads", "index_threads", "token_budget", "host_memory")
WILD_TEXTS = ["", " ", "x", "1x", "+", "--1", "1e3", "0x10", "1_000", "1,0", "nan", "inf", "5\0"]
WILD_TEXTS += ["\0", "\u0665", str(2**63), str(-(2**63) - 1), "9" * 5000, "1.5.5", "None"]
WILD_NAMES = ("", " ", "x", "token_budget\0", "TOKEN_BUDGET", "token budget", "a" * 5000)


def config_cases() -> Iterator[Case]:
    config = _core.Config()
    for field in _core.config_fields():
        name = field.name
        for value in (None, 0, 1.5, b"1", [], True, object()):
            yield refuses(f"{name}={value!r:.20}", TypeError, config.set, name, value)
        yield refuses(f"{name}=surrogate", ValueError, config.set, name, "\udfff")
        for text in WILD_TEXTS:
            if field.type == "real" and text in ("1e3", str(2**63), str(-(2**63) - 1), "9" * 5000):
                continue
            if name == "dense_layers" and text.strip() == "":
                continue
            yield refuses(f"{name}={text!r:.20}", InvalidArgument, configured, name, text)
    for tokens in EXTREMES:
        if not 0 <= tokens < 2**31:
            name = f"Config.most_slots({tokens})"
            yield refuses(name, InvalidArgument, config.most_slots, tokens)
    for value in NO_NUMBERS:
        yield refuses(f"Config.most_slots({value!r:.30})", TypeError, config.most_slots, value)
    for name in WILD_NAMES:
        yield refuses(f"Config.get({name!r:.20})", InvalidArgument, config.get, name)
        yield refuses(f"Config.set({name!r:.20})", InvalidArgument, config.set, name, "1")
    for name, (low, high) in VALID_INTS.items():
        for number in (low - 1, high + 1, -1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)):
            is_derived = number == 0 or low <= number <= high  # 0: the engine chooses
            if is_derived or not -(2**63) <= number < 2**63:
                continue
            yield refuses(f"{name}={number}", InvalidArgument, configured, name, str(number))
        if name not in NOT_TRIED_AT_BOUNDS:
            for number in (low, high):
                yield Case(f"{name}={number}", partial(configured, name, str(number)))
    yield Case("max_token_budget=2^30 with mass_target", finds_enough)


def configured(name: str, value: str) -> None:
    config = _core.Config()
    for field, text in (("num_threads", "1"), ("index_threads", "1"), (name, value)):
        config.set(field, text)
    engine = _core.Engine(1, 2, 1, 64, "float32", 0.0, 0.0, config)
    rows, queries = torch.ones(1, 1, 3, 64), torch.ones(1, 2, 3, 64)
    out = engine.step([engine.new_sequence()], 0, queries, rows, rows, 0, None)
    torch.testing.assert_close(out, queries)


def finds_enough() -> None:
    """The largest bound picks what a bound of the sequence's length picks."""
    picked = []
    for bound in (2**30, 2000):
        config = _core.Config()
        settings = {"token_budget": "64", "mass_target": "0.9", "num_threads": "1"}
        for name, value in (settings | {"max_token_budget": str(bound)}).items():
            config.set(name, value)
        engine = _core.Engine(1, 1, 1, 64, "float32", 0.0, 0.0, config)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(1, 1, 1000, 64, generator=generator)
        engine.new_sequence()
        engine.step([0], 0, rows, rows, rows, 0, None)
        newest = torch.zeros(1, 1, 1, 64)
        engine.step([0], 0, newest, newest, newest, 0, None)
        picked.append(engine.stats(0, 0).tokens_selected)
    assert picked[0] == picked[1] > 64, picked


# --- torch operators

OPERATOR_ERRORS: Errors = (RuntimeError, TypeError)


def operator_arguments(operator: str) -> dict[str, Any]:
    world = wild.the_world()
    if operator == "merge_states":
        out = [world.tensor(2, wild.Q_HEADS, wild.DIM, seed=s) for s in (1, 2)]
        lse = [world.tensor(2, wild.Q_HEADS, seed=s) for s in (3, 4)]
        return {"out_a": out[0], "lse_a": lse[0], "out_b": out[1], "lse_b": lse[1]}
    return {
        "queries": world.tensor(2, wild.Q_HEADS, wild.DIM, seed=5),
        "pages": world.tensor(5, 2, 8, wild.DIM, seed=6),
        "block_table": torch.tensor([[[0, 1], [2, -1]], [[3, 4], [4, 0]]], dtype=torch.int32),
        "slot_masks": torch.full((2, wild.KV_HEADS, 2), 0xFF, dtype=torch.int32),
        "scale": 0.25,
    }


def run_operator(operator: str, parameter: str, change: wild.Form, is_valid: bool) -> None:
    call = getattr(torch.ops.icecache, operator)
    arguments = operator_arguments(operator)
    want = call(*arguments.values())
    arguments[parameter] = change(arguments[parameter])
    try:
        got = call(*arguments.values())
    except OPERATOR_ERRORS as error:
        assert not is_valid, f"refused what is valid: {error}"
    else:
        assert is_valid, "accepted what is invalid"
        assert all(torch.equal(plain(a), b) for a, b in zip(got, want, strict=True))
    wild.the_world().check_guards()


def plain(x: torch.Tensor) -> torch.Tensor:
    return torch._from_functional_tensor(x) if torch._is_functional_tensor(x) else x.detach()


# Forms that torch makes of floats alone, and those that leave a small int tensor as it is.
NOT_OF_INTS = ("mkldnn", "quantized", "sparse csr", "torch.int32", "half of D")


def with_int(value: int, x: torch.Tensor) -> torch.Tensor:
    changed = x.clone()
    changed.view(-1)[1] = value
    return changed


def constant(value: Any, _: torch.Tensor) -> Any:
    return value


def operator_forms(operator: str, parameter: str, good: Any) -> Iterator[tuple[str, Any, bool]]:
    """Name, change, and whether the operator takes it."""
    if parameter == "scale":
        scales: list[Any] = [float("nan"), float("inf"), None, "x", [], 1j, torch.ones(2), 10**400]
        for scale in scales:
            yield f"{scale!r:.20}", partial(constant, scale), False
        return
    is_int = good.dtype == torch.int32
    for form, change in wild.NO_MEMORY.items():
        if form.startswith("zeros without memory"):
            continue  # torch gives it memory on the way
        if is_int and form in NOT_OF_INTS:
            continue
        if parameter.startswith("lse") and ("D" in form or form == "sparse csr"):
            continue
        yield form, change, form == "functional"  # torch unwraps it on the way
    yield "no heads", lambda x: x[:, :0], False
    yield "no rows", lambda x: x[:0], False
    if not is_int:
        yield "every second", wild.SAME_VALUE["every second"], False
        for form in ("negative view", "requires a gradient", "parameter", "subclass"):
            yield form, wild.SAME_VALUE[form], True
        return
    yield "fewer pages", lambda x: x[..., :1].contiguous(), False
    yield "int64", torch.Tensor.long, False
    yield "float", torch.Tensor.float, False
    for value in (5, 2**31 - 1, -(2**31)) if parameter == "block_table" else (256, -1, -(2**31)):
        yield str(value), partial(with_int, value), False


def operator_cases() -> Iterator[Case]:
    for operator in ("paged_attention", "merge_states"):
        for parameter, good in operator_arguments(operator).items():
            for form, change, is_valid in operator_forms(operator, parameter, good):
                yield Case(
                    f"torch.ops.icecache.{operator}({parameter}={form})",
                    partial(run_operator, operator, parameter, change, is_valid),
                    leaves_all=not is_valid,
                )
    assert device.KIND == "cuda"  # the import registered the operator
    step = torch.ops.icecache.device_step
    tensors = [torch.zeros(1, 2, 1, 64) for _ in range(4)]
    for value in (*EXTREMES, 0, 1, 2, *NO_NUMBERS):
        name = f"torch.ops.icecache.device_step(cache={value!r:.30})"
        yield refuses(name, OPERATOR_ERRORS, step, value, 0, *tensors, None)
    for name in ("step", "step_packed", "nothing"):
        yield refuses(
            f"torch.ops.icecache.{name}", AttributeError, getattr, torch.ops.icecache, name
        )


def all_cases() -> list[Case]:
    groups = (
        engine_cases,
        self_cases,
        prefix_table_cases,
        record_cases,
        function_cases,
        constructor_cases,
        config_cases,
        operator_cases,
    )
    return [case for group in groups for case in group()]
