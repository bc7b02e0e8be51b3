"""Buckets to the servers by HTTP: the bytes themselves, or handles to memory that the server opens on the same host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.weights.memory import host_bytes, shared_bytes
from spear_megatron.weights.payload import FLATTENED, Transport, flat_payload
from spear_megatron.weights.plan import Bucket
from spear_megatron.weights.servers import ServerGroup, Target


class TensorWay:
    """``update_weights_from_tensor``. Leaders may send at the same time: a server takes one request after the other.

    Args:
        transport: ``cuda_ipc`` needs the servers on this leader's GPU, or on GPUs of the host that can reach it.
    """

    needs_session = True
    published_folder = None

    def __init__(self, group: ServerGroup, dtype: torch.dtype, transport: Transport) -> None:
        self._group = group
        self._dtype = dtype
        self._transport = transport
        self._staging: torch.Tensor | None = None
        self._targets: dict[str, Target] = {}
        self._version = 0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory for a bucket, uint8 [num_bytes], that servers can open if the transport is shared memory."""
        return shared_bytes(num_bytes) if self._transport == "shared_memory" else host_bytes(num_bytes)

    def begin(self, targets: Sequence[Target], version: int) -> None:
        """Remember the targets."""
        self._targets = {target.url: target for target in targets}
        self._version = version

    def send(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Send one bucket to every target that has not failed."""
        self._post(bucket, flat, None)

    def send_closing(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Send the bucket that completes the update, with the version."""
        self._post(bucket, flat, str(self._version))

    def abandon(self) -> None:
        """No server waits for anything."""

    def close(self) -> None:
        """There is nothing to release."""

    def _post(self, bucket: Bucket, flat: torch.Tensor, label: str | None) -> None:
        flat = self._placed(flat)
        once = flat_payload(bucket, flat, self._dtype, "http") if self._transport == "http" else None

        def post(client: ControlClient) -> None:
            # one entry per tensor rank; a handle is counted, so each reader needs its own
            readers = range(self._targets[client.url].tp_size)
            payloads = [once or flat_payload(bucket, flat, self._dtype, self._transport) for _ in readers]
            client.update_from_tensors(payloads, load_format=FLATTENED, version=label, flush=False)

        self._group.each(list(self._targets), post)

    def _placed(self, flat: torch.Tensor) -> torch.Tensor:
        """The bucket in memory that the transport can hand over."""
        if not flat.is_cuda:
            return flat
        if self._transport == "cuda_ipc":
            torch.cuda.synchronize(flat.device)  # another process reads it, outside of our streams
            return flat
        if self._transport == "http":
            return flat.cpu()
        if self._staging is None or self._staging.numel() < flat.numel():
            self._staging = shared_bytes(flat.numel())
        return self._staging[: flat.numel()].copy_(flat)
