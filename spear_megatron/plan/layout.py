"""A parallel layout that need not exist: Megatron's sizes on so many ranks."""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.parallel.config import MegatronConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a run's parallelism.

    Ranks vary fastest in tensor, then context, data, and pipeline parallelism, as Megatron numbers them.

    Attributes:
        megatron: tensor, context, pipeline and virtual pipeline sizes and their options.
        world_size: ranks of the whole run.

    Raises:
        ValueError: the sizes do not divide the world.
    """

    megatron: MegatronConfig
    world_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.world_size % self.megatron.model_parallel_size:
            raise ValueError(
                f"world_size={self.world_size} cannot hold models of {self.megatron.model_parallel_size} ranks "
                f"(tensor_model_parallel_size={self.tp} x context_parallel_size={self.cp} x "
                f"pipeline_model_parallel_size={self.pp}): use a multiple"
            )

    @property
    def tp(self) -> int:
        return self.megatron.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.megatron.context_parallel_size

    @property
    def pp(self) -> int:
        return self.megatron.pipeline_model_parallel_size

    @property
    def vpp(self) -> int | None:
        return self.megatron.virtual_pipeline_model_parallel_size

    @property
    def dp(self) -> int:
        return self.world_size // self.megatron.model_parallel_size

    @property
    def shards(self) -> int:
        """Ranks that hold the same weights, over which gradients are reduced and optimizer states are cut."""
        return self.dp * self.cp

    def rank_of(self, *, tp_rank: int, dp_rank: int, pp_rank: int, cp_rank: int = 0) -> int:
        """Global rank at these coordinates."""
        return tp_rank + self.tp * (cp_rank + self.cp * (dp_rank + self.dp * pp_rank))

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tp_rank, cp_rank, dp_rank, pp_rank) of a global rank."""
        rest, tp_rank = divmod(rank, self.tp)
        rest, cp_rank = divmod(rest, self.cp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return tp_rank, cp_rank, dp_rank, pp_rank

    def describe(self) -> str:
        """Short name, for example ``TP8 PP4 VPP2 DP4 SP``."""
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        if self.vpp is not None:
            parts.append(f"VPP{self.vpp}")
        if self.cp > 1:
            parts.append(f"CP{self.cp}")
        parts.append(f"DP{self.dp}")
        if self.megatron.sequence_parallel:
            parts.append("SP")
        return " ".join(parts)
