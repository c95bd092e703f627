"""What IceCache looked at while it answered, for the report."""

from __future__ import annotations

import base64
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.runs import Branch
from icecache.demo.run import Question

_DARKEST = 1e-6  # share of attention below which the report draws nothing
_STEPS = 16  # steps recorded of each answer


@dataclass
class HeadMap:
    """Pages and far field of one layer and KV head at one step."""

    layer: int
    head: int
    mass: float  # share attended exactly
    pages: list[list[int]]  # far-field node, then positions in slot order
    picked: list[int]  # positions attended exactly beside sink and window
    attention: str  # base64 of uint8 [L]: log10 of full attention's share, 0 for 1e-6 or less
    summarised: list[float]  # by node: share that the far field gave it
    exact: list[float]  # by node: share that its tokens have in full attention


@dataclass
class QuestionTrace:
    """One answer: picks of every layer and head at each step, maps of some heads at one step."""

    key: str
    answer: str
    needle: tuple[int, int]  # tokens begin..end
    question: list[str]  # tokens after the document
    steps: list[str]  # the token that each step was fed with
    selected: str  # base64 of uint16: for each step, layer, head a count and that many positions
    focus: int  # the step of the maps
    maps: list[HeadMap]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def trace_question(
    decoder: Decoder, tokenizer: Any, question: Question, budget: int
) -> QuestionTrace:
    """Decodes along full attention's answer once more, recording. Attention is IceCache's."""
    prefill, needle = question.prefill, question.needle
    session = EngineSession(decoder, prefill, budget, {"telemetry": "trace"})
    replay = session.fork()
    first, again = prefill.branch(decoder, 1), prefill.branch(decoder, 1)
    steps = min(_STEPS, prefill.steps)
    heads = list(itertools.product(range(decoder.num_layers), range(decoder.num_kv_heads)))
    picks: list[list[list[int]]] = []  # [step][head] -> positions
    for step in range(steps):
        _step(first, session, prefill.continuation[step])
        picks.append(
            [session.engine.trace(session.sequence, layer, head).selected for layer, head in heads]
        )
    hits = torch.tensor(
        [[sum(needle.begin <= p < needle.end for p in row) for row in step] for step in picks]
    )
    focus = int(hits.sum(1).argmax())
    chosen = _choose_heads(heads, hits[focus])
    queries: dict[int, torch.Tensor] = {}
    for step in range(focus + 1):
        _step(again, replay, prefill.continuation[step], queries)
    maps = [_map_head(decoder, replay, layer, head, queries[layer]) for layer, head in chosen]
    replay.close()
    session.close()

    def pieces(ids: torch.Tensor) -> list[str]:
        return [tokenizer.decode([int(token)]) for token in ids]

    flat = [n for step in picks for row in step for n in (len(row), *row)]
    return QuestionTrace(
        key=needle.key,
        answer=needle.answer,
        needle=(needle.begin, needle.end),
        question=pieces(needle.question),
        steps=pieces(prefill.continuation[:steps]),
        selected=_base64(torch.tensor(flat, dtype=torch.int32).to(torch.uint16)),
        focus=focus,
        maps=maps,
    )


def _step(
    branch: Branch,
    session: EngineSession,
    token: torch.Tensor,
    queries: dict[int, torch.Tensor] | None = None,
) -> None:
    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if queries is not None:
            queries[layer] = query[0, :, 0]
        return session.attend(layer, query[0], key[0], value[0])[None]

    branch.run(token.reshape(1, 1), attend)


def _choose_heads(heads: list[tuple[int, int]], hits: torch.Tensor) -> list[tuple[int, int]]:
    """The four heads that picked most of the needle, an early one and one in the middle."""
    ranked = [heads[int(i)] for i in hits.argsort(descending=True, stable=True)[:4]]
    for extra in (heads[0], heads[len(heads) // 2]):
        if extra not in ranked:
            ranked.append(extra)
    return sorted(ranked)


def _map_head(
    decoder: Decoder, session: EngineSession, layer: int, head: int, queries: torch.Tensor
) -> HeadMap:
    """`queries` [Hq, D] of the step that the session has just made in this layer."""
    trace = session.engine.trace(session.sequence, layer, head)
    keys, _ = session.engine.gather(session.sequence, layer)
    group = decoder.num_q_heads // decoder.num_kv_heads
    rows = decoder.scale * queries[head * group : (head + 1) * group].float()
    attention = torch.softmax(rows @ keys[head].float().T, -1).mean(0)  # [L]
    picked = trace.selected
    taken = set(picked)
    pages = [[page.node, *page.positions] for page in trace.pages]
    nodes = trace.far_nodes
    total = torch.tensor(trace.total_lse)
    summarised = [
        float((torch.tensor(node.weight) - total).exp().mean()) if node.tokens else 0.0
        for node in nodes
    ]
    exact = [0.0] * len(nodes)
    for node, *positions in pages:
        left = [position for position in positions if position not in taken]
        exact[node] += float(attention[left].sum()) if left else 0.0
    share = (attention.clamp(min=_DARKEST).log10() / -math.log10(_DARKEST) + 1) * 255
    near = [*trace.sink, *trace.window, *picked]
    return HeadMap(
        layer=layer,
        head=head,
        mass=float(attention[near].sum()),
        pages=pages,
        picked=picked,
        attention=_base64(share.round().to(torch.uint8)),
        summarised=[round(share, 7) for share in summarised],
        exact=[round(share, 7) for share in exact],
    )


def _base64(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode("ascii")
