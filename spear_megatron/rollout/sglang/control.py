"""What a trainer asks of one SGLang server besides generating: state, cache, memory, weights. Synchronous.

Written for SGLang 0.5.15 and newer; where versions differ (update sessions began with 0.5.21) the server's own version
decides.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from spear_megatron.rollout.engine import EngineError

PauseMode = Literal["abort", "in_place", "retract"]
FIRST_VERSION = (0, 5, 15)
FIRST_VERSION_WITH_SESSIONS = (0, 5, 21)
_POLL_S = 0.25
_FLUSH_POLL_S = 0.05
_QUICK_S = 10.0
_LEAVE_S = 30.0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself.

    Attributes:
        version: of SGLang, e.g. (0, 5, 21).
        model_path: folder or hub name that it was started with, or last updated from.
        weight_version: label of its weights ("default" until somebody sets one).
        context_length: tokens of prompt and completion together, None if it does not say.
        max_total_tokens: tokens that its key/value cache holds, None if it does not say.
        tp_size: tensor-parallel size.
    """

    version: tuple[int, ...]
    model_path: str
    weight_version: str
    context_length: int | None
    max_total_tokens: int | None
    tp_size: int


class ControlClient:
    """Control requests to the server at ``url``; every request has a deadline.

    Args:
        url: such as ``http://10.0.0.7:30000``.
        timeout_s: deadline of requests that may have to wait for the server (updates, flushes).
        api_key: sent as a bearer token where the server was started with one.

    Raises (every method):
        EngineError: the server cannot be reached in time, refuses, or answers with an error; names URL, endpoint and
            what the server said.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # The environment's proxies are not for the machines of a cluster.
        self._http = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=timeout_s)
        self._version: tuple[int, ...] | None = None

    def close(self) -> None:
        """Close the connections; nothing happens on the server."""
        self._http.close()

    def is_ready(self, timeout_s: float = _QUICK_S) -> bool:
        """Whether the server answers its health check within ``timeout_s``; raises nothing."""
        try:
            return self._http.get("/health", timeout=timeout_s).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self, deadline_s: float) -> None:
        """Wait until the server answers its health check, at most ``deadline_s`` seconds."""
        end = time.monotonic() + deadline_s
        while not self.is_ready(timeout_s=min(_QUICK_S, max(end - time.monotonic(), _POLL_S))):
            if time.monotonic() >= end:
                raise EngineError(f"{self.url} was not ready within {deadline_s:g} s")
            time.sleep(_POLL_S)

    def server_info(self) -> ServerInfo:
        """State of the server, asked anew every time."""
        server, model = self._get("/get_server_info"), self._get("/get_model_info")
        self._version = parse_version(str(server.get("version", "")))
        return ServerInfo(
            version=self._version,
            model_path=str(model.get("model_path", "")),
            weight_version=str(model.get("weight_version", server.get("weight_version", "default"))),
            context_length=_maybe_int(server.get("context_length")),
            max_total_tokens=_maybe_int(server.get("max_total_num_tokens")),
            tp_size=int(server.get("tp_size") or 1),
        )

    @property
    def version(self) -> tuple[int, ...]:
        """Version of SGLang, asked once."""
        if self._version is None:
            self.server_info()
        assert self._version is not None
        return self._version

    def pause(self, mode: PauseMode = "abort") -> None:
        """Stop generating: ``abort`` ends running requests with what they have, the others keep them waiting."""
        self._post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Generate again after :meth:`pause`."""
        self._post("/continue_generation", {})

    def flush_cache(self, timeout_s: float = 30.0) -> None:
        """Empty the prefix cache once the server is idle; an error if it is not within ``timeout_s``."""
        self._post(f"/flush_cache?timeout={timeout_s:g}", None, timeout_s=timeout_s + _QUICK_S)

    def abort_all(self) -> None:
        """End every request, running or queued."""
        self._post("/abort_request", {"abort_all": True})

    def release_memory(self, tags: Sequence[str] = ("kv_cache", "weights")) -> None:
        """Give GPU memory back. The server must be idle: flush the cache first, or it may die."""
        self._post("/release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str] = ("kv_cache", "weights")) -> None:
        """Take GPU memory again after :meth:`release_memory`; weights are not what they were."""
        self._post("/resume_memory_occupation", {"tags": list(tags)})

    def begin_update(self) -> None:
        """Open a session of weight updates, where the version knows them."""
        if self.version >= FIRST_VERSION_WITH_SESSIONS:
            self._post("/begin_weight_update", {})

    def end_update(self) -> None:
        """Close the session of weight updates, where the version knows them."""
        if self.version >= FIRST_VERSION_WITH_SESSIONS:
            self._post("/end_weight_update", {})

    def update_from_disk(self, folder: str, version: str, *, flush: bool = True) -> None:
        """Load the weights of a Hugging Face folder that the server can read. Needs no session."""
        body = {"model_path": folder, "weight_version": version, "flush_cache": flush}
        self._update("/update_weights_from_disk", body)

    def update_from_tensors(
        self, serialized: Sequence[str], *, load_format: str | None = None, version: str | None = None, flush: bool
    ) -> None:
        """Hand over tensors: ``serialized`` has one base64 pickle per tensor-parallel rank. Names must be known.

        An unknown name is ignored by the server without a word, and a wrong shape kills it: check both before.
        """
        body = {"serialized_named_tensors": list(serialized), "load_format": load_format, "flush_cache": flush}
        self._update("/update_weights_from_tensor", body | _label(version))

    def init_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str, timeout_s: float
    ) -> None:
        """Join a process group for weights. Blocks the server's scheduler until everybody has joined."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        self._update("/init_weights_update_group", body, timeout_s=timeout_s)

    def update_from_group(
        self,
        tensors: Sequence[tuple[str, str, Sequence[int]]],
        *,
        name: str,
        load_format: str | None = None,
        version: str | None = None,
        flush: bool,
    ) -> None:
        """Receive broadcasts of rank 0 of a group: ``tensors`` are (name, dtype such as "float32", shape) in order."""
        body = {
            "names": [tensor[0] for tensor in tensors],
            "dtypes": [tensor[1] for tensor in tensors],
            "shapes": [list(tensor[2]) for tensor in tensors],
            "group_name": name,
            "load_format": load_format,
            "flush_cache": flush,
        }
        self._update("/update_weights_from_distributed", body | _label(version))

    def destroy_group(self, name: str) -> None:
        """Leave a process group for weights."""
        timeout_s = min(self._timeout_s, _LEAVE_S)  # a hung server must not hold up the ranks that wait
        self._update("/destroy_weights_update_group", {"group_name": name}, timeout_s=timeout_s)

    def prompt_log_probs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log_softmax(logits) of every token of every prompt but its first, at temperature 1, without generating."""
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answers = self._post("/generate", body)
        try:
            scored = [[float(entry[0]) for entry in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(f"{self.url}/generate scored no prompts: {str(answers)[:200]}") from error
        if [len(values) + 1 for values in scored] != [len(prompt) for prompt in prompts]:
            raise EngineError(f"{self.url}/generate scored {[len(values) + 1 for values in scored]} tokens")
        return scored

    def checksums(self) -> Mapping[str, Any] | None:
        """The server's checksums by tensor, None where this version has none (before 0.5.23, or without CUDA)."""
        try:
            answer = self._post("/weights_checker", {"action": "checksum"})
        except EngineError:
            return None
        return answer if isinstance(answer, Mapping) else None

    def _update(self, endpoint: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        answer = self._post(endpoint, body, timeout_s=timeout_s)
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise EngineError(f"{self.url}{endpoint}: {answer.get('message', answer)}")

    def _get(self, endpoint: str) -> Mapping[str, Any]:
        answer = self._send("GET", endpoint, None, self._timeout_s)
        if not isinstance(answer, Mapping):
            raise EngineError(f"{self.url}{endpoint} answered {str(answer)[:200]!r} instead of an object")
        return answer

    def _post(self, endpoint: str, body: Mapping[str, Any] | None, *, timeout_s: float | None = None) -> Any:
        return self._send("POST", endpoint, body, self._timeout_s if timeout_s is None else timeout_s)

    def _send(self, method: str, endpoint: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        try:
            answer = self._http.request(method, endpoint, json=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise EngineError(f"{self.url}{endpoint} did not answer within {timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}{endpoint}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise EngineError(f"{self.url}{endpoint}: HTTP {answer.status_code}: {_message(answer)}")
        try:
            return answer.json()
        except ValueError:
            return answer.text


def flush_paused(client: ControlClient, timeout_s: float) -> None:
    """Empty the cache of a paused server, whose retracted requests may wait meanwhile.

    Asked with a timeout the server would wait until these have ended too, which they cannot; asked without, it refuses
    while a batch is being put away, so it is asked again.

    Raises:
        EngineError: it refuses for ``timeout_s``, or does not answer.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            return client.flush_cache(0.0)
        except EngineError as error:
            if "HTTP 400" not in str(error):
                raise
            if time.monotonic() > end:
                raise EngineError(
                    f"{error}; the paused server was not idle within {timeout_s:g} s (SGLang before 0.5.21 must have "
                    "no requests, running or waiting, when weights change)"
                ) from error
        time.sleep(_FLUSH_POLL_S)


def parse_version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version, e.g. "0.5.21.post1" -> (0, 5, 21).

    Raises:
        EngineError: it begins with no number.
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    if found is None:
        raise EngineError(f"the server's version {text!r} cannot be read; SGLang 0.5.15 or newer is needed")
    return tuple(int(part) for part in found.group().split("."))


def _label(version: str | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": version}


def _maybe_int(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float, str)) and str(value).isdigit() else None


def _message(answer: httpx.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return answer.text[:500]
    error = body.get("error", body) if isinstance(body, Mapping) else body
    return str(error.get("message", error) if isinstance(error, Mapping) else error)[:500]
