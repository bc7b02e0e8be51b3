"""From the trainer's shards to every server: gathered, sent, checked, and told to whoever routes requests.

All ranks call :meth:`Publisher.publish` together. Each data-parallel leader sends its share of the buckets; global rank
0 alone asks the servers about themselves, and its findings count for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from spear_megatron.model.hf_io import iter_hf_tensors
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.agreement import agree_ok, gather_objects
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient, PauseMode
from spear_megatron.types import Row
from spear_megatron.weights.diagnose import wrong_tensors
from spear_megatron.weights.gather import BucketGatherer
from spear_megatron.weights.memory import BufferPool, Ledger
from spear_megatron.weights.plan import Bucket, SyncPlan
from spear_megatron.weights.probe import Probe, probe_gaps
from spear_megatron.weights.servers import (
    COLLATERAL,
    ServerGroup,
    Target,
    check_versions,
    close_update,
    failure_text,
    find_targets,
    open_update,
)
from spear_megatron.weights.stream import stream_buckets
from spear_megatron.weights.ways.way import Way

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

T = TypeVar("T")
ScoreRows = Callable[[Sequence[Row]], list[Row]]


@dataclass(frozen=True, slots=True)
class Published:
    """Outcome of a publish, the same on every rank.

    Attributes:
        version: policy version.
        fresh: URLs of the servers that hold it, checked.
        stale: why others do not, by URL; nothing may be sampled from them until a later publish makes them fresh.
        resends: full transfers after the first one.
        num_bytes: bytes of the model.
        peak_bytes: most bytes of gathered weights that were alive on one rank, in the run so far.
        probe_difference: largest difference of a log-prob between the trainer and a fresh server; 0 without probes.
        folder: where the weights are as a Hugging Face folder that servers can read; None but with way disk.
        notes: what a person should know.
    """

    version: int
    fresh: tuple[str, ...]
    stale: Mapping[str, str]
    resends: int
    num_bytes: int
    peak_bytes: int
    probe_difference: float = 0.0
    folder: str | None = None
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Figures of the record."""
        return {
            "weights/servers": float(len(self.fresh)),
            "weights/stale_servers": float(len(self.stale)),
            "weights/resends": float(self.resends),
            "weights/peak_gathered_mb": self.peak_bytes / 2**20,
            "weights/probe_difference": self.probe_difference,
        }


@dataclass
class Publisher:
    """Sends the weights of a model to servers, by one of the ways.

    Attributes:
        urls: the servers of the moment, asked on rank 0 at every publish.
        way: this leader's side of the way, None on ranks that only take part in gathering.
        probe: what servers are checked with; None checks nothing but the version that they name.
        score: rows with log-probs of the trainer's current weights at temperature 1 (``old_log_probs``). Collective.
        pause: what happens to requests during an update.
        resend: whether a failed probe is answered by one full resend before the run stops.
        published: told the outcome on every rank.
        current: the last outcome.
    """

    chunks: Sequence[MegatronModule]
    shape: ModelShape
    parallel: ParallelState
    plan: SyncPlan
    servers: ServerGroup
    urls: Callable[[], Sequence[str]]
    way: Way | None
    score: ScoreRows
    probe: Probe | None
    pause: PauseMode = "retract"
    resend: bool = True
    published: Callable[[Published], None] = lambda outcome: None
    ledger: Ledger = field(default_factory=Ledger)
    current: Published | None = None

    def __post_init__(self) -> None:
        device = self.parallel.platform.device

        def on_device(num_bytes: int) -> torch.Tensor:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)

        # buckets are gathered where the parameters are; without a GPU that may be the memory that servers open
        allocate = self.way.allocate if self.way is not None and device.type == "cpu" else on_device
        self._pool = BufferPool(self.plan.limit_bytes, self.ledger, allocate)
        self._gatherer = BucketGatherer(self.chunks, self.shape, self.parallel, self.plan, self._pool, self.ledger)

    def publish(self, version: int) -> Published:
        """Give every reachable server the current weights under ``version``. Collective.

        Servers that fail are stale: they stay paused, and the others go on without them.

        Raises:
            RunError: on every rank: no server took the weights, or one scores prompts otherwise than the trainer does
                after them; names the tensors where they can be found out.
        """
        urls = self._of_rank_0(lambda: list(self.urls()))
        self.servers.failures.clear()
        resends, notes = 0, self._first_notes()
        gaps = self._checked(self._transfer_twice(urls, version))
        if wrong := self._beyond(gaps):
            notes.append(self._diagnosis(wrong, version))
            if self.resend:
                resends += 1
                self._transfer(list(wrong), version)
                gaps |= self._checked(self.servers.healthy(wrong))
            if self._beyond(gaps):
                raise RunError(f"weights of version {version} arrived wrong. {' '.join(notes)}")
        fresh, stale = tuple(self.servers.healthy(urls)), dict(self.servers.failures)
        if not fresh:
            raise RunError(f"no server took weights of version {version}: {failure_text(stale)}")
        if stale:
            notes.append(f"without version {version}: {failure_text(stale)}")
        self.current = Published(
            version,
            fresh,
            stale,
            resends,
            self.plan.num_bytes,
            peak_bytes=max(gather_objects(self.parallel, self.ledger.peak)),
            probe_difference=max((gaps[url] for url in fresh if url in gaps), default=0.0),
            folder=self._of_rank_0(lambda: self.way.published_folder if self.way is not None else None),
            notes=tuple(notes),
        )
        self.published(self.current)
        return self.current

    def send_current(self, url: str) -> None:
        """Bring one more server, which answers and is idle, to the published weights. Not collective; any thread.

        Raises:
            EngineError: it failed, or the weights are nowhere but in the trainer: it gets them with the next publish.
        """
        current = self.current
        if current is None or current.folder is None:
            raise EngineError(f"{url} gets weights with the next publish: only way=disk keeps them in a folder")
        group = ServerGroup(timeout_s=self.servers.timeout_s, connect=self.servers.connect)
        folder, label = current.folder, str(current.version)

        def load(client: ControlClient) -> None:
            client.update_from_disk(folder, label, flush=False)
            client.flush_cache(group.timeout_s)

        group.each([url], load)
        check_versions(group, [url], current.version)
        group.close()
        if group.failures:
            raise EngineError(failure_text(group.failures))

    def close(self) -> None:
        """Leave groups and close connections."""
        if self.way is not None:
            self.way.close()
        self.servers.close()

    def _first_notes(self) -> list[str]:
        large = self.plan.oversized
        if self.current is not None or not large:
            return []
        return [
            f"larger than a bucket of {self.plan.limit_bytes / 2**20:.3g} MiB, sent alone: {', '.join(large)}; a "
            "leader holds such a tensor and one bucket, or raise actor_rollout_ref.rollout.sglang.weights.max_gather_mb"
        ]

    def _transfer_twice(self, urls: Sequence[str], version: int) -> list[str]:
        """One transfer, and another to the servers that failed in it through no fault of theirs."""
        self._transfer(urls, version)
        innocent = [url for url, reason in self.servers.failures.items() if reason == COLLATERAL]
        if innocent:
            self._transfer(innocent, version)
        return self.servers.healthy(urls)

    def _transfer(self, urls: Sequence[str], version: int) -> None:
        """Send everything to ``urls``; the server group knows who failed, the same on every rank."""
        self.servers.forget_failures(urls)
        targets = self._of_rank_0(lambda: self._open(urls))
        chosen = [target.url for target in targets]
        self._share_failures()
        for leader in range(self.parallel.dp_size):  # one after the other: servers join one group at a time
            if self.way is not None and leader == self.parallel.dp_rank:
                self.way.begin([target for target in targets if target.url not in self.servers.failures], version)
            self._share_failures()
        problem = self._stream(self.plan.owned_by(self.parallel.dp_rank), closing=False)
        self._share_failures()
        agree_ok(self.parallel, f"sending weights of version {version}", problem)
        if self.parallel.dp_rank == 0:
            problem = self._stream((self.plan.closing,), closing=True)
        self._share_failures()
        agree_ok(self.parallel, f"sending weights of version {version}", problem)
        if self.parallel.rank == 0 and self.way is not None:
            close_update(self.servers, chosen, session=self.way.needs_session)
            check_versions(self.servers, chosen, version)
        self._share_failures()

    def _open(self, urls: Sequence[str]) -> list[Target]:
        assert self.way is not None
        targets = find_targets(self.servers, urls, self.shape)
        open_update(
            self.servers, [target.url for target in targets], mode=self.pause, session=self.way.needs_session
        )
        return [target for target in targets if target.url not in self.servers.failures]

    def _stream(self, buckets: Sequence[Bucket], *, closing: bool) -> str | None:
        """Gather and send this copy's buckets; what went wrong on this rank, for all to hear."""
        send = (lambda bucket, flat: None) if self.way is None else (
            self.way.send_closing if closing else self.way.send
        )
        try:
            stream_buckets(self._gatherer, buckets, self._pool, send)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _expected(self) -> list[list[float]]:
        assert self.probe is not None
        rows = self.score(self.probe.rows())
        scored = [row.old_log_probs for row in rows if row.old_log_probs is not None]
        return [values[1:].tolist() for values in scored]

    def _checked(self, urls: Sequence[str]) -> dict[str, float]:
        """Largest difference of a log-prob to the trainer's by URL; servers that do not answer have failed."""
        probe = self.probe
        if probe is None:
            return {}
        expected = self._expected()
        gaps = self._of_rank_0(lambda: probe_gaps(self.servers, urls, probe, expected))
        self._share_failures()
        return gaps

    def _beyond(self, gaps: Mapping[str, float]) -> dict[str, float]:
        return {url: gap for url, gap in gaps.items() if self.probe is not None and not gap <= self.probe.tolerance}

    def _diagnosis(self, wrong: Mapping[str, float], version: int) -> str:
        """Find out on one server which tensors are wrong. Collective over the first model copy."""
        assert self.probe is not None
        url, names, problem = next(iter(wrong)), list[str](), None
        if self.parallel.dp_rank == 0:
            tensors = iter_hf_tensors(self.chunks, self.shape, self.parallel)
            if self.parallel.rank == 0:
                count = len(self.shape.parameter_shapes())
                try:
                    names = wrong_tensors(self.servers.client(url), tensors, self.probe, num_tensors=count)
                except EngineError as error:
                    problem = str(error)
            for _ in tensors:
                pass
        names, problem = gather_objects(self.parallel, (names, problem))[0]
        gaps = ", ".join(f"{url}: {gap:.3g}" for url, gap in wrong.items())
        found = f"wrong on {url}: {', '.join(names)}" if names else (
            f"sending every tensor again did not change what {url} answers: the trainer's forward pass and the "
            "server's model differ, not the weights"
        )
        return (
            f"log-probs of the probe differ by more than {self.probe.tolerance:g} after version {version} ({gaps}); "
            f"{problem or found}."
        )

    def _of_rank_0(self, ask: Callable[[], T]) -> T:
        """What rank 0 found, on every rank."""
        found = gather_objects(self.parallel, ask() if self.parallel.rank == 0 else None)[0]
        return found  # type: ignore[return-value]

    def _share_failures(self) -> None:
        for failures in gather_objects(self.parallel, dict(self.servers.failures)):
            for url, reason in failures.items():
                self.servers.fail(url, reason)
