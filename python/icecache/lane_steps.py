"""Steps of sequences in lanes of a device: tokens behind prompts, and prompts.

Dimension letters as in device_engine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from icecache.device import DeviceCache
from icecache.engine import Phase
from icecache.lanes import Lanes
from icecache.prompt_attention import AttendPrompt

# Of a packed step: a lane, the row of its first token, how many tokens it has, what they are.
Row: TypeAlias = tuple[int, int, int, Phase]
Place: TypeAlias = tuple[int, int, int]  # without the phase


def decoding(rows: Sequence[Row]) -> tuple[Place, ...]:
    """Lanes that take tokens behind their prompt: each with its first row, and how many."""
    return tuple((lane, first, count) for lane, first, count, phase in rows if phase == Phase.AUTO)


def decode(
    cache: DeviceCache, places: Sequence[int], layer: int, given: Sequence[torch.Tensor]
) -> torch.Tensor:
    """A step of up to STEP_TOKENS tokens of each of `places`: [A, Hq, T, D].

    `given`: queries [A, Hq, T, D], keys and values [A, Hkv, T, D].
    """
    count = given[0].shape[2]
    if count == 1 and places == list(range(cache.batch)):
        return cache.step(layer, *given)
    rows = tuple((lane, row * count, count) for row, lane in enumerate(places))
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in given)
    out = cache.step(layer, queries, keys, values, cache.rows_of(rows, count))
    return out.view(len(places), count, *out.shape[1::2]).transpose(1, 2)


def attend_suffix(
    lanes: Lanes,
    lane: int,
    layer: int,
    given: Sequence[torch.Tensor],
    attend: AttendPrompt,
    outputs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention of T tokens behind those of a lane, which DeviceCache.extend() appends next.

    `given`: queries [Hq, T, D], keys and values [Hkv, T, D]. Returns `outputs` [T, Hq, D].
    """
    queries, keys, values = given
    rows = queries.transpose(0, 1)
    if outputs is None:
        outputs = torch.empty_like(rows, memory_format=torch.contiguous_format)
    attend(rows, *lanes.with_held(layer, lane, keys, values), outputs)
    return outputs


def packed(
    lanes: Lanes,
    layer: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    rows: Sequence[Row],
    attend: AttendPrompt,
    step_tokens: int,
) -> None:
    """A packed step, as DeviceEngine.step_packed() says. `tensors`: queries, keys, values, outputs
    [N, H, D]; `step_tokens`: of a step without rows.

    What may fail comes first: what is appended would come again with the next try.
    """
    queries, keys, values, outputs = tensors
    prompts: dict[int, tuple[torch.Tensor, torch.Tensor, Phase]] = {}
    for lane, first, count, phase in rows:
        if phase == Phase.AUTO or lane in lanes.extending:
            continue
        of_lane = slice(first, first + count)
        # Copies: index work reads them when the model is at later layers.
        chunk = (x[of_lane].transpose(0, 1).contiguous() for x in (keys, values))
        all_keys, all_values = lanes.with_earlier_chunks(layer, lane, *chunk)
        attend(queries[of_lane], all_keys, all_values, outputs[of_lane])
        if phase != Phase.PREFILL:
            lanes.building.add(lane)
            of_heads = queries[of_lane].transpose(0, 1)
            lanes.cache.prefill(layer, of_heads, all_keys, all_values, sequence=lane)
        prompts[lane] = all_keys, all_values, phase
    suffixes = [row for row in rows if row[3] != Phase.AUTO and row[0] in lanes.extending]
    if suffixes:
        lanes.wait(layer)
    behind = []
    for lane, first, count, _ in suffixes:
        of_lane = slice(first, first + count)
        given = [x[of_lane].transpose(0, 1) for x in (queries, keys, values)]
        attend_suffix(lanes, lane, layer, given, attend, outputs[of_lane])
        behind.append((lane, given))
    for lane, (query, key, value) in behind:  # there is room for them
        lanes.cache.extend(layer, query, key, value, lane)
    later = decoding(rows)
    if later or not rows:
        lanes.wait(layer)
        most = max((count for _, _, count in later), default=step_tokens)
        query, key, value, output = (x.unsqueeze(2) for x in tensors)
        lanes.cache.step(layer, query, key, value, lanes.cache.rows_of(later, most), output)
    for lane, (all_keys, all_values, phase) in prompts.items():
        if phase == Phase.PREFILL:
            lanes.prompts[layer, lane] = all_keys, all_values
        else:
            lanes.prompts.pop((layer, lane), None)
