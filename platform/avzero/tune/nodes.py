"""What a cluster holds, node by node, and how runs are packed on it.

The rule: a worker has all its CPUs and GPUs on one node; a fraction of a GPU is a share of one
device. The workers of one run go to as few nodes as possible and may spread over several (Ray's
PACK); runs fill what is left in the order they are started.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from avzero.spec import Resources

Node = Mapping[str, float]
"""Resource -> amount, in Ray's names (``CPU``, ``GPU``)."""


def cluster_nodes() -> list[Node]:
    """Return the living nodes of the connected cluster that hold anything; none without one."""
    import ray

    if not ray.is_initialized():
        return []
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    return [node for node in nodes if node.get("CPU") or node.get("GPU")]


def total(nodes: Sequence[Node]) -> dict[str, float]:
    """Return the sum over nodes."""
    found: Counter[str] = Counter()
    for node in nodes:
        found.update(node)
    return dict(found)


def workers_on(node: Node, need: Resources) -> int:
    """Return how many workers a node holds at once."""
    shares = []
    if need.cpus:
        shares.append(math.floor(node.get("CPU", 0) / need.cpus + 1e-9))
    if need.gpus >= 1:
        shares.append(math.floor(node.get("GPU", 0) / need.gpus + 1e-9))
    elif need.gpus:
        shares.append(math.floor(node.get("GPU", 0)) * math.floor(1 / need.gpus + 1e-9))
    return min(shares, default=1)


def room(nodes: Sequence[Node], need: Resources) -> int:
    """Return how many runs the nodes hold at once."""
    if not need.cpus and not need.gpus:
        return 1 if nodes else 0
    held = sum(workers_on(node, need) for node in nodes)
    return held // need.workers or int(held >= (need.min_workers or need.workers))


def misfit(nodes: Sequence[Node], need: Resources) -> str:
    """Return why not even one run fits, with the numbers; nothing where one does."""
    if room(nodes, need):
        return ""
    least = need.min_workers or need.workers
    together, several = total(nodes), least > 1
    for name, each in (("CPU", need.cpus), ("GPU", need.gpus)):
        if each and together.get(name, 0) < each * least:
            return (
                f"a run needs {each * least:g} {name} (on {least} "
                f"worker{'s' * several}), the cluster has {together.get(name, 0):g}"
            )
    asked = " and ".join(f"{n:g} {k}" for k, n in (("CPU", need.cpus), ("GPU", need.gpus)) if n)
    shapes = Counter(
        " + ".join(f"{node[k]:g} {k}" for k in ("CPU", "GPU") if node.get(k)) for node in nodes
    )
    described = ", ".join(f"{count} of {shape}" for shape, count in shapes.most_common(5))
    held = sum(workers_on(node, need) for node in nodes)
    return (
        f"a worker needs {asked} on one node and a run {least} "
        f"worker{'s' * several}; the cluster's nodes ({described or 'none'}) hold {held}"
    )
