"""Which rank starts which servers, on which GPUs: the same answer on every rank, from what all ranks know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a rank tells the others: its machine, whether it is a data-parallel leader, and that machine's GPUs."""

    node: str
    is_leader: bool
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Servers ``numbers`` of the run, started by rank ``owner`` on its machine, each on the GPUs beside it."""

    owner: int
    numbers: tuple[int, ...]
    gpus: tuple[tuple[int, ...], ...]


def place_servers(
    ranks: Sequence[RankFacts], *, num_servers: int, tp_size: int, on_cpu: bool, colocated: bool
) -> tuple[Placement, ...]:
    """``num_servers`` servers on every machine of the job, owned by its first leader (its first rank if it has none).

    Colocated servers take the machine's GPUs from the first one on, which are the trainer's too; others take those
    behind the trainer's, which uses one per rank.

    Raises:
        ValueError: a machine has too few GPUs.
    """
    placements: list[Placement] = []
    for node in dict.fromkeys(rank.node for rank in ranks):
        own = [index for index, rank in enumerate(ranks) if rank.node == node]
        owner = next((index for index in own if ranks[index].is_leader), own[0])
        first_number = len(placements) * num_servers
        first_gpu = 0 if colocated else len(own)
        needed = first_gpu + num_servers * tp_size
        if not on_cpu and needed > ranks[owner].num_gpus:
            beside = "" if colocated else f" beside {len(own)} ranks of the trainer"
            raise ValueError(
                f"{num_servers} SGLang servers of tp_size={tp_size}{beside} need {needed} GPUs and {node} has "
                f"{ranks[owner].num_gpus}: lower rollout.sglang.launch.num_servers or tp_size, set "
                "rollout.sglang.colocated=true, or name servers elsewhere in rollout.sglang.servers"
            )
        starts = [first_gpu + index * tp_size for index in range(num_servers)]
        gpus = tuple(() if on_cpu else tuple(range(start, start + tp_size)) for start in starts)
        placements.append(Placement(owner, tuple(range(first_number, first_number + num_servers)), gpus))
    return tuple(placements)
