"""The LM head outside of the model: log-probs are computed from hidden states, without logits of unused rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spear_megatron.model.weight_map import unwrap


@dataclass(frozen=True, slots=True)
class HeadInput:
    """What the LM head of the last pipeline stage gets.

    Attributes:
        hidden: [T, H] after the last norm; under sequence parallelism this rank's [T / TP, H].
        weight: [padded_vocab / TP, H], the head's (maybe the embedding's) parameter.
    """

    hidden: torch.Tensor
    weight: torch.Tensor


def head_weight(chunk: torch.nn.Module) -> torch.Tensor:
    """The LM head's weight of a last-stage chunk."""
    model = unwrap(chunk)
    weight: torch.Tensor = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    return weight


def ready_head(chunk: torch.nn.Module) -> torch.Tensor:
    """The LM head's weight, complete on every rank.

    Where updated weights are gathered in the forward pass, Megatron waits for those of a module when it is called. The
    head is not called but read.
    """
    weight = head_weight(chunk)
    if getattr(chunk, "use_forward_hook", False):
        chunk.param_to_bucket_group[weight].finish_param_sync()
    return weight


@contextmanager
def without_head(chunk: torch.nn.Module) -> Iterator[None]:
    """In the context a forward pass of a last-stage chunk answers with hidden states [T, 1, H] instead of logits.

    Megatron's GPTModel reads ``post_process`` when it decides whether to apply its output layer; the last norm belongs
    to the decoder, which keeps its own flag.
    """
    model = unwrap(chunk)
    before, model.post_process = model.post_process, False
    try:
        yield
    finally:
        model.post_process = before
