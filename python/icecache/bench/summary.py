"""Numbers of bench_quality from the statistics of single runs, and the bounds they must hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from icecache.bench.quality import DecodeStats
from icecache.bench.report import Result

# name -> largest value; what IceCache promises on the default prompts.
BOUNDS = {
    "kl_64": 0.020,
    "kl_128": 0.007,
    "kl_256": 0.003,
    **{f"kl_ratio_to_topk_{budget}": 0.4 for budget in (64, 128, 256)},
    **{f"kl_ratio_to_paper_{budget}": 0.2 for budget in (64, 128, 256)},
    **{f"needles_missed_{budget}": 0.0 for budget in (64, 128, 256)},
}


@dataclass(frozen=True)
class Line:
    """One method at one budget over n prompts."""

    method: str
    label: str
    budget: int
    kl: float
    median: float
    worst: float  # mean of a prompt
    worst_prompt: str
    worst_step: float
    agreement: float
    mass: float
    needles: int
    needles_of: int
    n: int


def lines(stats: Sequence[DecodeStats]) -> list[Line]:
    """In the order in which methods and budgets were first seen."""
    groups: dict[tuple[str, int], list[DecodeStats]] = defaultdict(list)
    for one in stats:
        groups[one.method.label, one.budget].append(one)
    result = []
    for (label, budget), group in groups.items():
        kls = [float(one.kl.mean()) for one in group]
        worst = max(range(len(group)), key=kls.__getitem__)
        found = [one.found for one in group if one.found is not None]
        result.append(
            Line(
                method=group[0].method.name,
                label=label,
                budget=budget,
                kl=fmean(kls),
                median=median(kls),
                worst=kls[worst],
                worst_prompt=group[worst].prompt,
                worst_step=max(float(one.kl.max()) for one in group),
                agreement=fmean(float(one.agrees.float().mean()) for one in group),
                mass=fmean(one.mass for one in group),
                needles=sum(found),
                needles_of=len(found),
                n=len(group),
            )
        )
    return result


def needles_missed(stats: Sequence[DecodeStats], budget: int) -> int:
    """Needles that full attention finds and IceCache does not."""
    found = {(one.method.name, one.prompt): one.found for one in stats if one.budget == budget}
    return sum(
        1
        for (method, prompt), hit in found.items()
        if method == "icecache" and hit is False and found.get(("full", prompt))
    )


def results(stats: Sequence[DecodeStats]) -> list[Result]:
    """All numbers of a run. Names of IceCache's own are short, others carry the method."""
    made: list[Result] = []
    table = lines(stats)
    for line in table:
        middle = "" if line.method == "icecache" else f"{_name(line.label)}_"
        params = {"method": line.label, "token_budget": line.budget, "n": line.n}
        kl = f"kl_{middle}{line.budget}"
        made += [
            Result(kl, line.kl, "nats", {**params, "statistic": "mean"}),
            Result(f"{kl}_median", line.median, "nats", {**params, "statistic": "median"}),
            Result(f"{kl}_worst", line.worst, "nats", {**params, "prompt": line.worst_prompt}),
            Result(f"{kl}_worst_step", line.worst_step, "nats", params),
            Result(f"agreement_{middle}{line.budget}", line.agreement, "share", params),
            Result(f"mass_{middle}{line.budget}", line.mass, "share", params),
        ]
        if line.needles_of:
            of = {**params, "of": line.needles_of}
            made.append(Result(f"needles_{middle}{line.budget}", line.needles, "needles", of))
    for budget in dict.fromkeys(line.budget for line in table):
        at_budget = [line for line in table if line.budget == budget]
        ours = [line for line in at_budget if line.method == "icecache"]
        if not ours:
            continue
        for other in ("topk", "paper"):
            rivals = [line for line in at_budget if line.method == other]
            if rivals:
                best = min(rivals, key=lambda line: line.kl)
                params = {"token_budget": budget, "against": best.label, "n": best.n}
                ratio = ours[0].kl / best.kl if best.kl else float("inf")
                made.append(Result(f"kl_ratio_to_{other}_{budget}", ratio, "ratio", params))
        if any(line.method == "full" for line in at_budget):
            missed, params = needles_missed(stats, budget), {"token_budget": budget}
            made.append(Result(f"needles_missed_{budget}", missed, "needles", params))
    return made


def broken_bounds(made: Sequence[Result], bounds: Mapping[str, float] = BOUNDS) -> list[str]:
    """One line for each bound that does not hold, or whose number is missing."""
    values = {result.name: result.value for result in made}
    broken = []
    for name, bound in bounds.items():
        if name not in values:
            broken.append(f"{name}: not measured, must be at most {bound:g}")
        elif not values[name] <= bound:
            broken.append(f"{name}: {values[name]:.4g}, must be at most {bound:g}")
    return broken


def _name(label: str) -> str:
    """ "paper p=.03" -> "paper_p03" """
    kept = [c if c.isalnum() else "_" for c in label.lower().replace("=.", "").replace("-", "")]
    return "".join(kept).replace("exact_topb", "topk")
