"""Names the tensors that a server holds wrongly: true values are sent again while something is watched.

Sending a true value repairs what is looked for, so halves cannot be bisected: the tensors go a few at a time, and those
whose arrival changes the server's log-probs were wrong. Where the server has checksums, those before and after say the
same without a probe in between. The values come one by one from ``model.hf_io.iter_hf_tensors``, not from the buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.weights.payload import named_payload
from spear_megatron.weights.probe import Probe, difference

MAX_PROBES = 256
"""Most probes of one diagnosis; a model of more tensors is watched in groups of several."""
Named = tuple[str, torch.Tensor]


def wrong_tensors(
    client: ControlClient, tensors: Iterator[tuple[str, torch.Tensor | None]], probe: Probe, *, num_tensors: int
) -> list[str]:
    """Names of the tensors that were wrong on a server, which has the true ones afterwards.

    Args:
        tensors: true values, Hugging Face names; consumed to the end whatever happens, for the sake of its peers.
        num_tensors: how many there are.

    Returns:
        With checksums the server's own names, else those sent together when its log-probs changed. Empty: what it had
        was what is sent.

    Raises:
        EngineError: the server stopped answering.
    """
    try:
        before = client.checksums()
        group_size = max(1, -(-num_tensors // MAX_PROBES))
        if before is not None:
            for group in _groups(tensors, group_size):
                _send(client, group)
            return changed_checksums(before, client.checksums() or {})
        wrong: list[str] = []
        scores = probe.score(client)
        for group in _groups(tensors, group_size):
            _send(client, group)
            now = probe.score(client)
            if difference(scores, now) > 0:
                wrong += [name for name, _ in group]
            scores = now
        return wrong
    finally:
        for _ in tensors:
            pass


def changed_checksums(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Tensors whose checksum differs between two answers of the server's checker, on any of its tensor ranks."""
    old, new = _by_name(before), _by_name(after)
    return sorted({name for rank, name in old.keys() | new.keys() if old.get((rank, name)) != new.get((rank, name))})


def _by_name(answer: Mapping[str, Any]) -> dict[tuple[int, str], str]:
    ranks = answer.get("ranks")
    if not isinstance(ranks, Sequence):
        raise EngineError(f"the server's checksums cannot be read: {str(answer)[:200]}")
    return {(i, name): str(digest) for i, rank in enumerate(ranks) for name, digest in rank["checksums"].items()}


def _groups(tensors: Iterator[tuple[str, torch.Tensor | None]], size: int) -> Iterator[list[Named]]:
    group: list[Named] = []
    for name, tensor in tensors:
        if tensor is not None:
            group.append((name, tensor))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _send(client: ControlClient, group: Sequence[Named]) -> None:
    payload = named_payload(group)
    size = client.server_info().tp_size
    client.begin_update()
    try:
        client.update_from_tensors([payload] * size, flush=False)
    finally:
        client.end_update()
