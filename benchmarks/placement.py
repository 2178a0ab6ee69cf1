"""Which ranks stand on which node, and the bytes that leave a node for it, beside what the planner's equations say.

    python -m benchmarks.placement      # needs root and iproute2; writes benchmarks/placement.md

Two nodes of two ranks each (benchmarks/nodes.py) reduce the gradients of one module: a flat ring, as DDP over gloo
makes it in the order of the ranks, with the ranks of a node next to each other or not; and the hierarchy of FSDP2's
hybrid sharding, which adds up inside a node first. The interface of each node counts what leaves it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.links import FLOAT32_BYTES, ROOT, payload_bytes_per_second, repeated
from benchmarks.nodes import machines, results_of, why_not
from stages.files.artifacts import write_atomically
from stages.planning.collectives import (
    flat_ring_bandwidth,
    hierarchical_all_reduce_parts,
    ring_all_reduce_seconds,
    ring_wire_bytes,
)

NODES, RANKS_OF_NODE = 2, 2
LAYERS, WIDTH = 4, 512  # linear layers of this width, which cost next to nothing to compute
STEPS = 5
MEGABITS = 100
PORT = 29_513
PLACEMENTS = {  # the node of each rank
    "flat ring, packed": (0, 0, 1, 1),
    "flat ring, interleaved": (0, 1, 0, 1),
    "hierarchical": (0, 0, 1, 1),
}


@dataclass(frozen=True)
class Placed:
    """Of one run: what a node sent in a step, the mean over nodes, and the seconds of a step, the median."""

    placement: str
    gradient_bytes: int
    node_bytes: float
    seconds: float


def crossings(placement: str) -> int:
    """How many links of the ring leave a node."""
    at = PLACEMENTS[placement]
    return sum(at[rank] == 0 and at[(rank + 1) % len(at)] != 0 for rank in range(len(at)))


def predicted_bytes(placement: str, gradient_bytes: float) -> float:
    """Of a node in a step: each crossing carries what a rank sends; in the hierarchy, each rank its part."""
    if placement == "hierarchical":
        return RANKS_OF_NODE * ring_wire_bytes(gradient_bytes / RANKS_OF_NODE, NODES)
    return crossings(placement) * ring_wire_bytes(gradient_bytes, NODES * RANKS_OF_NODE)


def predicted_seconds(placement: str, gradient_bytes: float, megabits: float) -> float:
    """On the links between nodes alone: those inside have no limit."""
    bandwidth = payload_bytes_per_second(megabits)
    if placement == "hierarchical":
        each = bandwidth / RANKS_OF_NODE
        return hierarchical_all_reduce_parts(gradient_bytes, NODES, RANKS_OF_NODE, float("inf"), each, 0.0, 0.0)[1]
    shared = flat_ring_bandwidth(bandwidth, crossings(placement))
    return ring_all_reduce_seconds(gradient_bytes, NODES * RANKS_OF_NODE, shared, 0.0)


# ---- a rank


def work(rank: int, placement: str, steps: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranks = NODES * RANKS_OF_NODE
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=ranks)
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    size = sum(weight.numel() for weight in module.parameters()) * FLOAT32_BYTES
    if placement == "hierarchical":
        mesh = init_device_mesh("cpu", (NODES, RANKS_OF_NODE), mesh_dim_names=("node", "rank"))
        model: torch.nn.Module = fully_shard(module, mesh=mesh)
    else:
        model = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    x_BD = torch.ones(1, WIDTH)

    def step() -> None:
        model(x_BD).sum().backward()

    found = repeated(step, steps, ranks) | {"gradient_bytes": size}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- runs


def measure(placement: str, megabits: float = MEGABITS, steps: int = STEPS) -> Placed:
    at = PLACEMENTS[placement]
    with tempfile.TemporaryDirectory() as folder, machines(NODES, megabits) as nodes:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        running = []
        for rank, node in enumerate(at):
            code = f"from benchmarks.placement import work; work({rank}, {placement!r}, {steps}, {folder!r})"
            command = nodes[node].command(sys.executable, "-W", "ignore", "-c", code)
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        found = results_of(running, Path(folder))
    first_ranks = [at.index(node) for node in range(NODES)]  # the ranks of a node read one counter
    slowest = [max(of_ranks) for of_ranks in zip(*(each["seconds"] for each in found), strict=True)]
    sent = mean(found[rank]["bytes"] for rank in first_ranks)
    return Placed(placement, found[0]["gradient_bytes"], sent, median(slowest))


def as_markdown(runs: Sequence[Placed], megabits: float, load: float) -> str:
    size = runs[0].gradient_bytes
    lines = [
        "# Where ranks stand",
        "",
        f"`python -m benchmarks.placement`, load {load:.1f} when it began: {NODES} nodes of {RANKS_OF_NODE} ranks,",
        f"gloo, {size:,} bytes of gradients, {megabits:g} Mbit/s out of each node. Bytes are those of a node's",
        "interface in a step, all headers included; seconds are those of the step, which computes next to nothing.",
        "",
        "| placement | bytes, predicted | measured | error | seconds, predicted | measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        expected = predicted_bytes(run.placement, size)
        seconds = predicted_seconds(run.placement, size, megabits)
        error = 100 * (expected / run.node_bytes - 1)
        told = f"{expected:,.0f} | {run.node_bytes:,.0f} | {error:+.1f}% | {seconds:.3f} | {run.seconds:.3f}"
        lines.append(f"| {run.placement} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if reason := why_not():
        sys.exit(f"benchmarks.placement: {reason}")
    load = os.getloadavg()[0]
    text = as_markdown([measure(placement) for placement in PLACEMENTS], MEGABITS, load)
    print(text)
    write_atomically(ROOT / "benchmarks/placement.md", text)


if __name__ == "__main__":
    main()
