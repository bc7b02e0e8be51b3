"""A parallel layout that need not exist: Megatron's sizes on so many ranks."""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.parallel.config import MegatronConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a run's parallelism.

    Ranks vary fastest in tensor, then data, then pipeline parallelism, as Megatron numbers them.

    Attributes:
        megatron: tensor, pipeline and virtual pipeline sizes and their options.
        world_size: ranks of the whole run.

    Raises:
        ValueError: the sizes do not divide the world, or there is context parallelism, which is not planned.
    """

    megatron: MegatronConfig
    world_size: int

    def __post_init__(self) -> None:
        if self.megatron.context_parallel_size > 1:
            raise ValueError(
                f"context_parallel_size={self.megatron.context_parallel_size} is not planned: plan with 1 and read the "
                "activations as divided by it"
            )
        if self.world_size < 1 or self.world_size % self.megatron.model_parallel_size:
            raise ValueError(
                f"world_size={self.world_size} cannot hold models of {self.megatron.model_parallel_size} ranks "
                f"(tensor_model_parallel_size={self.tp} x pipeline_model_parallel_size={self.pp}): use a multiple"
            )

    @property
    def tp(self) -> int:
        return self.megatron.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.megatron.pipeline_model_parallel_size

    @property
    def vpp(self) -> int | None:
        return self.megatron.virtual_pipeline_model_parallel_size

    @property
    def dp(self) -> int:
        return self.world_size // self.megatron.model_parallel_size

    def rank_of(self, *, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Global rank at these coordinates."""
        return tp_rank + self.tp * (dp_rank + self.dp * pp_rank)

    def describe(self) -> str:
        """Short name, for example ``TP8 PP4 VPP2 DP4 SP``."""
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        if self.vpp is not None:
            parts.append(f"VPP{self.vpp}")
        parts.append(f"DP{self.dp}")
        if self.megatron.sequence_parallel:
            parts.append("SP")
        return " ".join(parts)
