"""What a layer's softmax takes beside products of queries and keys; attention over given tokens.

Layers that keep transformers' own cache, and first chunks of a prompt, have all their tokens at
hand: they are attended here, in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_ROWS = 256  # tokens whose scores are held at once


@dataclass(frozen=True)
class Softmax:
    """`scale` multiplies q.k; `softcap` c, unless 0, makes c tanh(logit / c) of a logit; `sinks`
    [Hq] are one more logit for each query head, of a token with value 0 (gpt-oss)."""

    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def asks(self, query: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of an engine's call with queries [..., Hq, T, D], for with_sinks()."""
        if self.sinks is None:
            return {}
        return {"lse": query.new_empty(query.shape[:-1], dtype=torch.float32)}

    def with_sinks(self, output: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        """Output [..., Hq, T, D] of a softmax without sinks, whose weights have log sums `lse`."""
        if self.sinks is None or lse is None:
            return output
        share = torch.sigmoid(lse - self.sinks.float()[:, None])
        return (output * share[..., None]).to(output.dtype)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """Attention over all given tokens: query `[B, Hq, T, D]`, key and value `[B, Hkv, L, D]`.

        The mask, `[B, 1, T, L]`, is bool or added to the logits; None: causal attention of the last
        T tokens if `is_causal`, which is the module's by default. `[B, Hq, T, D]`.
        """
        new, length = query.shape[2], key.shape[2]
        is_plain = self.sinks is None and not self.softcap
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        is_causal = is_causal and new > 1 and mask is None
        if is_causal and (new < length or not is_plain):
            mask = torch.ones(new, length, dtype=torch.bool, device=query.device)
            mask = mask.tril(length - new)[None, None]
        if is_plain:
            output: torch.Tensor = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                mask,
                scaling=self.scale,
                is_causal=is_causal and mask is None,
                **arguments,
            )[0]
            return output.transpose(1, 2)
        keys, values = key.float(), value.float()
        parts = []
        for start in range(0, new, _ROWS):
            rows = slice(start, start + _ROWS)
            visible = None if mask is None else mask[:, :, rows, :length]
            parts.append(self._rows(query[:, :, rows].float(), keys, values, visible))
        return torch.cat(parts, 2).to(query.dtype)

    def _rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, heads, rows, head_dim = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, head_dim)
        scores = (self.scale * grouped @ key.mT).view(batch, heads, rows, -1)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        lse = scores.logsumexp(-1)
        # A row that sees nothing has the weights 0.
        weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None])
        output = weights.view(batch, key.shape[1], -1, scores.shape[-1]) @ value
        return self.with_sinks(output.view(query.shape), lse)
