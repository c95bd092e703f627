"""The paper's index in plain Python: tree of representatives, pages, beam search, insertion.

One KV head, `select="page"`. Written from the paper and from the choices that
csrc/compared/dci_tree.h and dci_index.h state where the paper leaves them open, for reading and not
for speed; all arithmetic is float64. What the engine computes in float32 can only be held against
it where no decision is a near tie, so the smallest relative gap is kept: `margin` of all decisions
on which the structure rests, `select_margin` of the last selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TOP = 32  # no level above one with so few nodes


def random_direction(seed: int, dim: int) -> Array:
    """Normal numbers from splitmix64 by Box and Muller, rounded to float32."""
    mask = (1 << 64) - 1

    def uniform(offset: int) -> float:
        nonlocal seed
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return float(((z ^ (z >> 31)) >> 11) + offset) * 2.0**-53

    numbers: list[float] = []
    while len(numbers) < dim:
        radius = math.sqrt(-2.0 * math.log(uniform(1)))
        angle = 2.0 * math.pi * uniform(0)
        numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(numbers[:dim], dtype=np.float32).astype(np.float64)


@dataclass(eq=False)
class Node:
    """A representative. `children` are nodes of the level below, none for a cell."""

    key: Array
    ordinal: int
    children: list[Node] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)  # of a cell, in order of `start`

    def tokens(self) -> int:
        return sum(len(page.tokens) for page in self.pages) + sum(
            child.tokens() for child in self.children
        )


@dataclass(eq=False)
class Page:
    """At most S tokens of one cell: ordinals; `start` is the lowest projection it takes."""

    start: float
    tokens: list[int]


class DciReference:
    """Index over the tokens of one KV head; token i is the i-th that was given."""

    def __init__(self, dim: int, page_size: int, promotion: float, upper: float, beam: int) -> None:
        self.page_size = page_size
        self.every = round(1 / promotion)
        self.upper_every = round(1 / upper)
        self.beam = beam
        self.direction = random_direction(0, dim)
        self.keys: list[Array] = []
        self.max_square = 0.0
        self.levels: list[list[Node]] = []  # levels[0] are the cells
        self.margin = math.inf
        self.select_margin = math.inf

    def build(self, keys: Array) -> None:
        """The tree and the pages of the first tokens, all at once."""
        self.keys = list(keys)
        self.max_square = max(float(key @ key) for key in keys)
        cells = [Node(keys[i], i) for i in range(0, len(keys), self.every)]
        self.levels = [cells]
        members: list[list[int]] = [[] for _ in cells]
        for i, key in enumerate(keys):
            own = i % self.every == 0
            place = i // self.every if own else cells.index(self._nearest(cells, key))
            members[place].append(i)
        for cell, tokens in zip(cells, members, strict=True):
            tokens.sort(key=self._projection)
            for begin in range(0, len(tokens), self.page_size):
                part = tokens[begin : begin + self.page_size]
                cell.pages.append(Page(self._projection(part[0]), part))
                if begin:
                    self._decide(self._projection(part[0]), self._projection(tokens[begin - 1]))
        while len(self.levels[-1]) > TOP and self._raise():
            pass

    def insert(self, key: Array) -> None:
        """One more token."""
        ordinal = len(self.keys)
        self.keys.append(key)
        self.max_square = max(self.max_square, float(key @ key))
        if ordinal % self.every == 0:
            self._promote(key, ordinal)
            return
        cell = self._nearest(self.levels[0], key)
        page = self._page_for(cell, ordinal)
        if len(page.tokens) == self.page_size:
            page.tokens.sort(key=self._projection)
            half = self.page_size // 2
            upper = Page(self._projection(page.tokens[half]), page.tokens[half:])
            self._decide(upper.start, self._projection(page.tokens[half - 1]))
            del page.tokens[half:]
            cell.pages.insert(cell.pages.index(page) + 1, upper)
            page = self._page_for(cell, ordinal)
        page.tokens.append(ordinal)

    def select(self, queries: Array, budget: int) -> set[int]:
        """Tokens of the pages picked for scaled queries [G, D]: the heads' rankings in turn."""
        self.select_margin = math.inf
        rankings = [self._ranked_pages(query, budget) for query in queries]
        picked: list[Page] = []
        tokens = 0
        for rank in range(max(map(len, rankings))):
            for ranking in rankings:
                if rank >= len(ranking) or tokens >= budget:
                    continue
                score, page = ranking[rank]
                if rank + 1 < len(ranking):
                    self._rank(score, ranking[rank + 1][0])
                if page not in picked and tokens + len(page.tokens) <= budget:
                    picked.append(page)
                    tokens += len(page.tokens)
        return {token for page in picked for token in page.tokens}

    def pages(self) -> set[frozenset[int]]:
        """The tokens of each page."""
        return {frozenset(page.tokens) for cell in self.levels[0] for page in cell.pages}

    def _ranked_pages(self, query: Array, wanted: int) -> list[tuple[float, Page]]:
        """Pages of the cells that a beam search finds, by their best token, with its logit."""
        frontier = list(self.levels[-1])
        for level in range(len(self.levels) - 1, -1, -1):
            scores = [float(node.key @ query) for node in frontier]
            order = sorted(range(len(frontier)), key=lambda i: -scores[i])
            kept: list[Node] = []
            tokens = 0
            for place, i in enumerate(order):
                if len(kept) >= self.beam and tokens >= wanted:
                    self._rank(scores[i], scores[order[place - 1]])
                    break
                kept.append(frontier[i])
                tokens += frontier[i].tokens()
            frontier = kept if level == 0 else [child for node in kept for child in node.children]
        ranked = [
            (max(float(self.keys[i] @ query) for i in page.tokens), page)
            for cell in frontier
            for page in cell.pages
        ]
        return sorted(ranked, key=lambda scored: -scored[0])

    def _nearest(self, nodes: list[Node], key: Array) -> Node:
        """Least M - a.b - sqrt((M - |a|^2)(M - |b|^2))."""
        lift = self._lift(key)
        products = [
            float(node.key @ key) / self.max_square + self._lift(node.key) * lift for node in nodes
        ]
        best = int(np.argmax(products))
        others = products[:best] + products[best + 1 :]
        if others:
            self._decide(products[best], max(others))
        return nodes[best]

    def _lift(self, key: Array) -> float:
        return math.sqrt(max(0.0, 1.0 - float(key @ key) / self.max_square))

    def _projection(self, ordinal: int) -> float:
        return float(self.keys[ordinal] @ self.direction)

    def _page_for(self, cell: Node, ordinal: int) -> Page:
        """The last page that starts at or below the token's projection, or the first."""
        chosen = cell.pages[0]
        for page in cell.pages[1:]:
            self._decide(page.start, self._projection(ordinal))
            if page.start <= self._projection(ordinal):
                chosen = page
        return chosen

    def _promote(self, key: Array, ordinal: int) -> None:
        """The token opens a cell, and represents every level that its ordinal reaches."""
        node = Node(key, ordinal, pages=[Page(self._projection(ordinal), [ordinal])])
        divisor = self.every
        self.levels[0].append(node)
        for level in self.levels[1:]:
            divisor *= self.upper_every
            if ordinal % divisor:
                self._nearest(level, key).children.append(node)
                break
            node = Node(key, ordinal, children=[node])
            level.append(node)
        if len(self.levels[-1]) > TOP:
            self._raise()

    def _raise(self) -> bool:
        """A level above the top; False where it would have no node, or as many."""
        below = self.levels[-1]
        divisor = self.every * self.upper_every ** len(self.levels)
        promoted = [node for node in below if node.ordinal % divisor == 0]
        if not promoted or len(promoted) == len(below):
            return False
        level = [Node(node.key, node.ordinal) for node in promoted]
        for node in below:
            own = node in promoted
            parent = level[promoted.index(node)] if own else self._nearest(level, node.key)
            parent.children.append(node)
        self.levels.append(level)
        return True

    def _decide(self, a: float, b: float) -> None:
        self.margin = min(self.margin, _gap(a, b))

    def _rank(self, a: float, b: float) -> None:
        self.select_margin = min(self.select_margin, _gap(a, b))


def _gap(a: float, b: float) -> float:
    return abs(a - b) / max(1.0, abs(a), abs(b))
