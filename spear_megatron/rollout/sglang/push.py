"""Full Hugging Face tensors to servers over HTTP: the simple way, for small models and for evaluations."""

from __future__ import annotations

import base64
import contextlib
import pickle
from collections.abc import Iterable, Iterator, Sequence

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient, flush_paused

Named = tuple[str, torch.Tensor]


def push_weights(
    servers: Sequence[ControlClient],
    named_tensors: Iterable[Named],
    shape: ModelShape,
    version: int,
    *,
    max_bucket_bytes: int,
    idle_timeout_s: float,
) -> None:
    """Replace the weights of every server; running requests wait meanwhile and go on with the new weights.

    The cache is emptied while requests are retracted, never by an update itself: an update that is asked to empty the
    cache under running requests kills the server.

    Raises:
        ValueError: a name is missing, unknown or double, or a shape does not fit.
        EngineError: a server failed. Either way the servers stay paused, because what they hold may be of two versions.
    """
    for server in servers:
        server.pause("retract")
        flush_paused(server, idle_timeout_s)
    with _sessions(servers):
        _send(servers, _buckets(checked(named_tensors, shape), max_bucket_bytes), version)
    for server in servers:
        flush_paused(server, idle_timeout_s)
        server.resume()


def _send(servers: Sequence[ControlClient], buckets: Iterator[list[Named]], version: int) -> None:
    sizes = [server.server_info().tp_size for server in servers]
    for bucket, is_last in _with_last(buckets):
        text = serialize(bucket)
        for server, size in zip(servers, sizes, strict=True):
            label = str(version) if is_last else None
            server.update_from_tensors([text] * size, version=label, flush=False)


@contextlib.contextmanager
def _sessions(servers: Sequence[ControlClient]) -> Iterator[None]:
    """A session of updates on every server. None is left open after an error: the next update would be refused."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            server.begin_update()
            stack.callback(server.end_update)
        yield


def checked(named_tensors: Iterable[Named], shape: ModelShape) -> Iterator[Named]:
    """The tensors as they are, every name of the model once and in its shape.

    A server ignores unknown names without a word and dies of a wrong shape.

    Raises:
        ValueError: names the first tensor that is unknown, double or misshapen, or those that are missing.
    """
    missing = shape.parameter_shapes()
    known = set(missing)
    for name, tensor in named_tensors:
        expected = missing.pop(name, None)
        if expected is None:
            raise ValueError(f"weight {name!r} was given twice" if name in known else f"weight {name!r} is unknown")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, expected {expected}")
        yield name, tensor
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first {next(iter(missing))!r}")


def serialize(named_tensors: Sequence[Named]) -> str:
    """A base64 pickle of [(name, tensor), ...] with the bytes inline, which a server on any machine can read."""
    plain = [(name, tensor.detach().cpu().contiguous().clone()) for name, tensor in named_tensors]
    return base64.b64encode(pickle.dumps(plain, protocol=4)).decode("ascii")


def _buckets(named_tensors: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """Groups of tensors of at most ``max_bytes`` together; a larger tensor goes alone."""
    bucket: list[Named] = []
    size = 0
    for name, tensor in named_tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + num_bytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket


def _with_last(buckets: Iterator[list[Named]]) -> Iterator[tuple[list[Named], bool]]:
    """Each bucket and whether none follows."""
    held = next(buckets, None)
    while held is not None:
        following = next(buckets, None)
        yield held, following is None
        held = following
