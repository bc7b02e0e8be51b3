"""A run as the planner sees it: the model, the sizes of a step, the engines beside the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.plan.activations import Spec
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.workload import OptimizerKind, Workload

EngineKind = Literal["embedded", "colocated", "separate", "none"]
PACKING = 0.9  # share of a micro-batch's tokens that belong to rows


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Where tokens are generated.

    Attributes:
        kind: ``embedded`` in the trainer's process on the host, ``colocated`` on the trainer's GPUs, ``separate`` on
            nodes of their own, ``none`` where nothing is generated (supervised training).
        tp: GPUs of one engine. nodes: of separate engines.
        sleeps: colocated engines give their memory back while the trainer computes.
        max_num_seqs: requests that one engine computes together.
    """

    kind: EngineKind = "colocated"
    tp: int = 4
    nodes: int = 0
    sleeps: bool = True
    max_num_seqs: int = 64

    def __post_init__(self) -> None:
        if self.kind not in ("embedded", "colocated", "separate", "none"):
            raise ValueError(f"engine must be embedded, colocated, separate or none, got {self.kind!r}")
        if self.tp < 1 or self.max_num_seqs < 1:
            raise ValueError(f"engine_tp={self.tp} and max_num_seqs={self.max_num_seqs} must be at least 1")
        if (self.kind == "separate") != (self.nodes > 0):
            raise ValueError(
                f"engine_nodes={self.nodes} with engine={self.kind}: separate engines need nodes, others have none"
            )

    @property
    def on_gpus(self) -> bool:
        """Whether engines hold weights and a cache on GPUs."""
        return self.kind in ("colocated", "separate")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """Attributes are totals over all ranks unless they say otherwise.

    Attributes:
        prompts, samples: of a training step. mini_batch_prompts: of an optimizer step. epochs: passes over a step.
        mean_tokens: of a trajectory, prompt included (an assumption); max_tokens: of the longest row.
        sampled_share: of a trajectory's tokens, those that the policy sampled (an assumption).
        micro_batch_tokens: budget of a packed micro-batch on one rank.
        replayed: trajectories replayed per training step. replay_bytes: bound of the buffer.
        save_freq: training steps per checkpoint, 0 for none.
    """

    shape: ModelShape
    engine: EnginePlan
    prompts: int
    samples: int
    mini_batch_prompts: int
    epochs: int
    mean_tokens: int
    max_tokens: int
    sampled_share: float
    micro_batch_tokens: int
    max_logits_bytes: int
    dtype: torch.dtype = torch.bfloat16
    spec: Spec = "plain"
    optimizer: OptimizerKind = "foreach"
    eager_head: bool = False
    on_host: bool = False
    old_log_prob: bool = True
    reference: bool = False
    replayed: int = 0
    replay_bytes: int = 0
    save_freq: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sampled_share <= 1:
            raise ValueError(f"sampled_share is a share in (0, 1], got {self.sampled_share}")
        if not 1 <= self.mean_tokens <= self.max_tokens:
            raise ValueError(f"mean_tokens={self.mean_tokens} must lie between 1 and max_tokens={self.max_tokens}")
        if self.micro_batch_tokens < self.max_tokens:
            raise ValueError(
                f"a micro-batch of {self.micro_batch_tokens} tokens cannot hold a row of {self.max_tokens}: raise "
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu to at least {self.max_tokens}"
            )

    @property
    def trajectories(self) -> int:
        """Sampled in a training step."""
        return self.prompts * self.samples

    @property
    def optimizer_steps(self) -> int:
        """Per training step."""
        return ceil(self.prompts / self.mini_batch_prompts) * self.epochs

    @property
    def tokens(self) -> int:
        """Of a training step's trajectories."""
        return self.trajectories * self.mean_tokens

    @property
    def update_tokens(self) -> int:
        """That a training step's updates go over, replayed ones included."""
        return (self.trajectories * self.epochs + self.replayed) * self.mean_tokens

    def micro_batches(self, layout: Layout, tokens: float) -> int:
        """Micro-batches of one data-parallel rank for ``tokens`` tokens over all ranks."""
        count = max(1, ceil(tokens / (layout.dp * PACKING * self.micro_batch_tokens)))
        return count + (-count % layout.pp if layout.vpp is not None else 0)

    def workload(self, layout: Layout) -> Workload:
        """The step of one rank; every token of a micro-batch may be a sampled one, which is the worst case."""
        return Workload(
            tokens=self.micro_batch_tokens,
            micro_batches=self.micro_batches(layout, self.update_tokens / self.optimizer_steps),
            forward_micro_batches=self.micro_batches(layout, self.tokens),
            head_rows=-(-self.micro_batch_tokens // layout.cp),
            max_logits_bytes=self.max_logits_bytes,
            dtype=self.dtype,
            spec=self.spec,
            optimizer=self.optimizer,
            eager_head=self.eager_head,
            packed=self.micro_batch_tokens > self.mean_tokens,
            on_host=self.on_host,
            old_log_prob=self.old_log_prob,
            reference=self.reference,
            sequence_tokens=min(self.max_tokens, self.micro_batch_tokens),
        )
