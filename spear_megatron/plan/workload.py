"""What a run asks of its ranks, in the planner's words: sizes of a step and which implementations serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from spear_megatron.plan.activations import Spec

OptimizerKind = Literal["single", "foreach", "fused"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step as a rank sees it.

    Attributes:
        tokens: T, token length of a packed micro-batch over all context-parallel ranks. sequence_tokens: of one of its
            sequences, 0 for a micro-batch of one. micro_batches: of one optimizer step on one data-parallel rank;
            forward_micro_batches: of a pass over the whole step's rows.
        head_rows: sampled tokens of a micro-batch on this rank.
        max_logits_bytes: ``actor.max_logits_mb`` in bytes.
        dtype: of weights and activations.
        spec: which layers; optimizer: which Adam; eager_head: plain torch log-probs.
        packed: micro-batches hold several sequences.
        on_host: the rank computes on the CPU, so that what is staged on the host for a checkpoint counts too.
        old_log_prob: the trainer computes the old log-probs in a pass of its own. reference: there is a KL term.
    """

    tokens: int
    micro_batches: int
    forward_micro_batches: int
    head_rows: int
    max_logits_bytes: int
    dtype: torch.dtype = torch.bfloat16
    spec: Spec = "plain"
    optimizer: OptimizerKind = "foreach"
    eager_head: bool = False
    packed: bool = True
    on_host: bool = False
    old_log_prob: bool = True
    reference: bool = False
    sequence_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "micro_batches", "forward_micro_batches", "max_logits_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"workload.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.head_rows <= self.tokens:
            raise ValueError(f"workload.head_rows={self.head_rows} must lie between 0 and tokens={self.tokens}")
