"""FAISS as a user would take it for one head's keys: exact, inverted lists, and a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import faiss

# Called with float32 rows [N, D]; inner product is what attention asks for.
Builder = Callable[[Any], Any]


def build_flat(rows: Any) -> Any:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index


def build_ivf(rows: Any) -> Any:
    """FAISS's own rule of thumb for the number of lists: 4 sqrt(N)."""
    lists = max(1, round(4 * math.sqrt(rows.shape[0])))
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    index = faiss.IndexIVFFlat(quantizer, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # it warns below 39, and trains all the same
    index.train(rows)
    index.add(rows)
    return index


def build_hnsw(rows: Any) -> Any:
    """32 neighbours, efConstruction 40: FAISS's defaults."""
    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(rows)
    return index


BUILDERS: dict[str, Builder] = {"flat": build_flat, "ivf": build_ivf, "hnsw": build_hnsw}
