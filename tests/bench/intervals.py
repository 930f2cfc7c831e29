"""Do the intervals hold what they promise, and how often is the parity rule wrong?

    make bench B=intervals            (2 minutes of CPU)

Simulated worlds whose truth is known. Classes: recalls are drawn from a Beta distribution, those of
unseen classes mostly near 0, as in real runs; the truth is the score over infinitely many classes.
Seeds: normal. Coverage is the share of intervals that hold the truth; 95 % is promised.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from avzero.report import statistics as ours
from avzero.report.parity import Ours, compare
from avzero.report.published import references
from avzero.report.statistics import Recalls, Score, harmonic, over_classes, over_seeds
from avzero.spec import Protocol

WORLDS = 1000
SPLITS = {"UCF-cls": (42, 6), "UCF-main": (42, 9), "VGGSound-cls": (207, 64)}
"""Seen and unseen TEST classes."""


def recalls(rng: np.random.Generator, size: tuple[int, ...], unseen: bool) -> np.ndarray:
    """Draw recalls of classes."""
    a, b = (0.35, 1.2) if unseen else (1.2, 1.6)
    return rng.beta(a, b, size)


def classes() -> None:
    """Coverage over classes, expanded percentiles beside plain ones."""
    rng = np.random.default_rng(0)
    many = 1_000_000
    seen, unseen = recalls(rng, (many,), False).mean(), recalls(rng, (many,), True).mean()
    truth = {"S": seen, "U": unseen, "HM": harmonic(seen, unseen)}
    print("over classes: coverage, %, ours (plain percentiles)")
    for split, (n, m) in SPLITS.items():
        hits: Counter[str] = Counter()
        for _ in range(WORLDS):
            s, u = recalls(rng, (n,), False), recalls(rng, (m,), True)
            # Other ids in every world, so that other draws are made.
            ids = np.sort(rng.choice(100_000, n + m, replace=False)).tolist()
            zsl = [*[None] * n, *u.tolist()]
            table = {"class_id": ids, "recall": [*s, *u], "zsl": zsl}
            held = Recalls.of({0: table})
            for score in ("S", "U", "HM"):
                value = 100 * truth[score]
                interval = over_classes(held, score)
                low, high = np.quantile(held.drawn(score), [0.025, 0.975])
                hits[score] += interval.low <= value <= interval.high
                hits[f"{score} plain"] += low <= value <= high
            ours._draws.cache_clear()
        share = {name: 100 * count / WORLDS for name, count in hits.items()}
        shown = [f"{s} {share[s]:.1f} ({share[f'{s} plain']:.1f})" for s in ("S", "U", "HM")]
        print(f"  {split:13} {n:3} seen, {m:2} unseen: {', '.join(shown)}", flush=True)


def seeds() -> None:
    """Coverage over seeds: Student's t beside a bootstrap of the values."""
    rng = np.random.default_rng(1)
    print("over seeds: coverage, %, Student's t (bootstrap percentiles)")
    for n in (2, 3, 5, 10):
        values = rng.normal(0, 1, (WORLDS, n))
        t = [over_seeds(row) for row in values]
        held = np.mean([i.low <= 0 <= i.high for i in t])
        draws = values[:, rng.integers(0, n, (2000, n))].mean(axis=2)
        low, high = np.quantile(draws, [0.025, 0.975], axis=1)
        plain = np.mean((low <= 0) & (high >= 0))
        print(f"  {n:2} seeds: {100 * held:.1f} ({100 * plain:.1f})")


def parity() -> None:
    """What the parity rule says where the truth is known: HM 27.15 published, std 1.5 or 3."""
    rng = np.random.default_rng(3)
    (published,) = [
        ref
        for ref in references()
        if ref.row.system == "AVCA" and ref.row.benchmark == "ucf-main" and not ref.row.variant
    ]
    protocol = Protocol.model_validate({"preset": "compat"}).model_dump(mode="json")
    value = published.row.scores["HM"] or 0.0
    print(f"parity: verdicts, % (published HM {value})")
    for std in (1.5, 3.0):
        for gap in (0.0, -5.0, -10.0):
            for n in (3, 5, 10):
                said: Counter[str] = Counter()
                for _ in range(WORLDS):
                    # The published run is one draw, ours are n; their means are gap apart.
                    hm = value + gap + std * (rng.normal(size=n) - rng.normal())
                    mine = Ours(
                        "avca", "ucf-main", "UCF", "main", False, protocol, "retrained",
                        tuple(range(n)), {"HM": tuple(np.clip(hm, 0, 100).tolist())},
                    )  # fmt: skip
                    said[compare(published, mine).verdict] += 1
                shares = ", ".join(
                    f"{verdict} {100 * said[verdict] / WORLDS:.0f}"
                    for verdict in ("reproduced", "undecided", "not reproduced")
                )
                print(f"  std {std}, truly {gap:+.0f}, {n:2} seeds: {shares}", flush=True)


def cost() -> None:
    """Time of everything a leaderboard of 15 systems and three seeds needs."""
    import time

    from avzero.report.standing import standing

    rng = np.random.default_rng(4)
    n, m = SPLITS["VGGSound-cls"]
    tables = [
        {
            seed: {
                "class_id": list(range(n + m)),
                "recall": recalls(rng, (n + m,), False).tolist(),
                "zsl": [*[None] * n, *recalls(rng, (m,), True).tolist()],
            }
            for seed in range(3)
        }
        for _ in range(15)
    ]
    started = time.perf_counter()
    scores: tuple[Score, ...] = ("S", "U", "HM", "ZSL")
    for table in tables:
        held = Recalls.of(table)
        for score in scores:
            over_classes(held, score)
            ours.over_both(held, score)
    standing({str(i): Recalls.of(t).per_seed("HM") for i, t in enumerate(tables)})
    print(f"15 systems, 4 scores, 271 classes: {1000 * (time.perf_counter() - started):.0f} ms")


if __name__ == "__main__":
    for part in (classes, seeds, parity, cost):
        part()
