"""What is sent to an SGLang server's /generate and what comes back, as plain data. Pure: nothing here does I/O.

Forms of SGLang 0.5.15 to 0.5.23. Every number of a response that is stated twice must agree, so that a token without
its own log-prob or policy version can never reach the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spear_megatron.rollout.engine import EngineError, GenerateRequest

# Sent with every request: a server may have other defaults, and each of these would change the distribution.
_NEUTRAL = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "n": 1,
}
_SHOWN = 300


class ProtocolError(EngineError):
    """A response that contradicts itself or the request; nothing of it may be used."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A parsed response.

    Attributes:
        output_ids: sampled tokens, a matched stop token included.
        log_probs: log_softmax(logits / temperature) of each, over the whole vocabulary.
        finish: why it ended.
        policy_versions: version of the weights that sampled each token; empty if the server has no numbered weights.
        num_prompt_tokens, num_cached_tokens: tokens of the prompt, and those found in the prefix cache.
        message: what the server says of an abort.
    """

    output_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Literal["stop", "length", "abort"]
    policy_versions: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    message: str = ""


def session_of(request_id: str) -> str:
    """What the turns of one trajectory share: the id up to the first slash, of "trajectory/segment/turn"."""
    return request_id.partition("/")[0]


def make_rid(client: str, session: str, number: int) -> str:
    """Id of one attempt, never used again: ``number`` counts the attempts of ``client``, a text unique to its engine.

    A server aborts every request whose id begins with the given one, so no id may be the beginning of another: the
    number has a fixed width and comes last. Routers that keep a conversation at one server know its turns by the ending
    ``_t`` and digits.
    """
    return f"{client}-{session}_t{number:010d}"


def generate_payload(request: GenerateRequest, rid: str) -> dict[str, Any]:
    """Body of /generate for a checked request.

    ``noise_key`` is sent as the seed, 63 bits of it. Only servers in deterministic mode use it, together with the
    position of the token; without one they would give all samples of a prompt the same tokens.
    """
    sampling = request.sampling
    params: dict[str, Any] = {
        **_NEUTRAL,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k,
        "sampling_seed": request.noise_key % 2**63,
    }
    # ignore_eos switches stop_token_ids off too, hence only where there are none.
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        params["ignore_eos"] = True
    return {
        "rid": rid,
        "input_ids": list(request.input_ids),
        "sampling_params": params,
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "return_text_in_logprobs": False,
        "stream": False,
    }


def parse_completion(body: Any, *, rid: str, request: GenerateRequest, vocab_size: int) -> Completion:
    """Read the 200 answer to ``generate_payload(request, rid)``.

    A request that was aborted before its tokens were reported gives none.

    Raises:
        ProtocolError: the answer belongs to another request, lacks something, or counts tokens in two ways.
    """
    where = f"request {rid!r}"
    meta = body.get("meta_info") if isinstance(body, Mapping) else None
    if not isinstance(meta, Mapping):
        raise ProtocolError(f"{where}: the answer has no meta_info: {_shown(body)}")
    if meta.get("id", rid) != rid:
        raise ProtocolError(f"{where}: the answer is that of request {meta['id']!r}")
    finish, message = _finish(where, meta.get("finish_reason"))
    ids, log_probs = _tokens(where, body, meta)
    if finish == "abort" and (len(ids) != len(log_probs) or _says_otherwise(meta, len(ids))):
        ids, log_probs = (), ()  # what an aborted request had is whole or it is nothing
    _check_tokens(where, ids, log_probs, meta, vocab_size)
    _check_end(where, finish, ids, request, meta["finish_reason"])
    prompt_tokens = _count(where, meta, "prompt_tokens")
    if prompt_tokens not in (0, len(request.input_ids)):
        raise ProtocolError(
            f"{where}: the server read {prompt_tokens} of {len(request.input_ids)} prompt tokens: start it without "
            "--allow-auto-truncate"
        )
    return Completion(
        output_ids=ids,
        log_probs=log_probs,
        finish=finish,
        policy_versions=policy_versions(meta, len(ids), where=where),
        num_prompt_tokens=prompt_tokens,
        num_cached_tokens=_count(where, meta, "cached_tokens"),
        message=message,
    )


def policy_versions(meta: Mapping[str, Any], num_tokens: int, *, where: str = "response") -> tuple[int, ...]:
    """Version of the weights behind each of ``num_tokens`` tokens; () if a label is not a decimal number.

    ``weight_versions`` are spans [start, end) of tokens, given since 0.5.20; older servers have one ``weight_version``,
    the one at the end: there the caller must not change weights under running requests.

    Raises:
        ProtocolError: the spans are malformed, overlap, or leave tokens out.
    """
    spans = meta.get("weight_versions")
    if spans is None:
        label = _version(meta.get("weight_version"))
        return () if label is None else (label,) * num_tokens
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise ProtocolError(f"{where}: weight_versions is not a list: {_shown(spans)}")
    versions: list[int | None] = []
    for span in spans:
        start, end, label = _span(where, span)
        if start != len(versions) or end < start:
            raise ProtocolError(f"{where}: the spans of weight_versions do not follow one another: {_shown(spans)}")
        versions += [_version(label)] * (end - start)
    if len(versions) != num_tokens and num_tokens:
        raise ProtocolError(f"{where}: weight_versions covers {len(versions)} of {num_tokens} tokens: {_shown(spans)}")
    known = [version for version in versions[:num_tokens] if version is not None]
    return tuple(known) if len(known) == num_tokens else ()


def error_message(text: str, content: Any) -> str:
    """What an error answer says, from its decoded JSON ``content`` (None if it is none) or its ``text``."""
    for _ in range(2):
        if isinstance(content, Mapping):
            content = next((content[key] for key in ("error", "message", "detail") if key in content), content)
    return str(text if content is None else content).strip()[:_SHOWN] or "(no text)"


def _span(where: str, span: Any) -> tuple[int, int, Any]:
    if not isinstance(span, Mapping):
        raise ProtocolError(f"{where}: a span of weight_versions is malformed: {_shown(span)}")
    start, end = span.get("start"), span.get("end")
    if not (_is_count(start) and _is_count(end)):
        raise ProtocolError(f"{where}: a span of weight_versions has no start and end: {_shown(span)}")
    assert isinstance(start, int) and isinstance(end, int)
    return start, end, span.get("version")


def _version(label: Any) -> int | None:
    text = str(label)
    return int(text) if text.isascii() and text.isdigit() else None


def _finish(where: str, reason: Any) -> tuple[Literal["stop", "length", "abort"], str]:
    kind = reason.get("type") if isinstance(reason, Mapping) else None
    if kind == "stop":
        return "stop", ""
    if kind == "length":
        return "length", ""
    if kind == "abort":
        return "abort", str(reason.get("message") or "aborted")
    raise ProtocolError(f"{where}: finish_reason {_shown(reason)} is unknown")


def _tokens(
    where: str, body: Mapping[str, Any], meta: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(ids, log-probs); log-prob entries are [log-prob, token id, text or null]."""
    ids, entries = body.get("output_ids") or [], meta.get("output_token_logprobs") or []
    try:
        pairs = [(float(entry[0]), int(entry[1])) for entry in entries]
        ids = [int(token) for token in ids]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ProtocolError(f"{where}: output_ids or output_token_logprobs are malformed ({error})") from error
    differing = [position for position, (token, pair) in enumerate(zip(ids, pairs)) if token != pair[1]]
    if differing:
        raise ProtocolError(f"{where}: output_ids and output_token_logprobs differ at position {differing[0]}")
    return tuple(ids), tuple(value for value, _ in pairs)


def _says_otherwise(meta: Mapping[str, Any], num_tokens: int) -> bool:
    """Whether a count in ``meta`` contradicts ``num_tokens``."""
    return any(meta.get(key, num_tokens) != num_tokens for key in ("completion_tokens", "output_token_logprobs_length"))


def _check_tokens(
    where: str, ids: Sequence[int], log_probs: Sequence[float], meta: Mapping[str, Any], vocab_size: int
) -> None:
    if len(ids) != len(log_probs):
        raise ProtocolError(f"{where}: {len(ids)} tokens but {len(log_probs)} log-probs")
    for key in ("completion_tokens", "output_token_logprobs_length"):
        if meta.get(key, len(ids)) != len(ids) and (ids or meta["finish_reason"]["type"] != "abort"):
            raise ProtocolError(f"{where}: {len(ids)} tokens but {key}={meta[key]!r}")
    for position, (token, value) in enumerate(zip(ids, log_probs, strict=True)):
        if not 0 <= token < vocab_size:
            raise ProtocolError(f"{where}: token {token} at {position} is outside the vocabulary of {vocab_size}")
        if not math.isfinite(value):
            raise ProtocolError(f"{where}: log-prob {value} of token {position} is not finite")


def _check_end(
    where: str, finish: str, ids: Sequence[int], request: GenerateRequest, reason: Mapping[str, Any]
) -> None:
    limit = request.sampling.max_new_tokens
    if len(ids) > limit:
        raise ProtocolError(f"{where}: {len(ids)} tokens for max_new_tokens={limit}")
    if finish == "length" and len(ids) != limit:
        raise ProtocolError(
            f"{where}: it ended by length after {len(ids)} of max_new_tokens={limit}: the server's context is too "
            "short, start it with a larger --context-length (at least actor_rollout_ref.rollout.max_model_len + 6)"
        )
    if finish == "stop" and (not ids or reason.get("matched") != ids[-1]):
        raise ProtocolError(f"{where}: it stopped at {reason.get('matched')!r}, which is not its last token")
    stops = set(request.sampling.stop_token_ids)
    if any(token in stops for token in ids[:-1]):
        raise ProtocolError(f"{where}: it went on after a stop token")


def _count(where: str, meta: Mapping[str, Any], key: str) -> int:
    value = meta.get(key) or 0  # an abort from the waiting queue has no such counts
    if not _is_count(value):
        raise ProtocolError(f"{where}: {key}={value!r} is not a count")
    return int(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
