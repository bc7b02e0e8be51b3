"""Whether a server can serve this model at these lengths, asked before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spear_megatron.model.fingerprint import same_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.sglang.client import ServerClient
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.control import FIRST_VERSION, ControlClient, parse_version

RESERVED_TOKENS = 6  # a server refuses prompts and ends requests up to this close to the end of its context or cache


async def check_server(client: ServerClient, shape: ModelShape, max_model_len: int) -> None:
    """Check version, model and lengths of a running server.

    The model is compared where its folder can be read from here: with other sizes the first update would kill the
    server.

    Raises:
        ValueError: it is too old, has another model, or too short a context or cache; names the remedy.
        EngineError: it did not answer.
    """
    server, model = _mapping(await client.get("/get_server_info")), _mapping(await client.get("/get_model_info"))
    version = parse_version(str(server.get("version", "")))
    if version < FIRST_VERSION:
        text = ".".join(map(str, version))
        raise ValueError(f"{client.url} runs SGLang {text}: start one of 0.5.15 or newer")
    check_model(client.url, str(model.get("model_path", "")), shape)
    lengths = {"--context-length": await _context_length(client, server), "--max-total-tokens": _cache_size(server)}
    for option, length in lengths.items():
        if length is not None and length < max_model_len + RESERVED_TOKENS:
            raise ValueError(
                f"{client.url} holds {length} tokens of a request ({option}), but max_model_len={max_model_len} needs "
                f"{max_model_len + RESERVED_TOKENS}: start it with a larger {option}, or lower "
                "actor_rollout_ref.rollout.max_model_len or data.max_response_length"
            )


def check_model(url: str, folder: str, shape: ModelShape) -> None:
    """Compare the model that a server was started with, where its folder can be read from here.

    Raises:
        ValueError: it has other sizes: an update would kill the server.
    """
    if (Path(folder) / "config.json").is_file() and (other := ModelShape.from_folder(folder)) != shape:
        raise ValueError(f"{url} has the model {folder}, which differs from this one: {_difference(other, shape)}")


_UNCHANGED = "default"


def serve_already(
    urls: Sequence[str], folder: str | Path, settings: SGLangConfig, served_model: str | None = None
) -> bool:
    """Whether every server holds the weights of ``folder`` as it was started, so that none need be sent.

    A server does if nobody updated it (its weights carry the label "default") and it says that it was started with the
    folder: the same one, one with the same files, or, where it cannot be read here, one of the same path. A router
    passes these questions on to one of its servers.

    Args:
        served_model: what the servers are said to have been started with, in place of ``folder``.

    Raises:
        ValueError: a server has another model than ``served_model``, or was updated since.
        EngineError: a server did not answer.
    """
    answers = []
    for url in urls:
        control = ControlClient(url, timeout_s=settings.control_timeout_s)
        try:
            info = control.server_info()
        finally:
            control.close()
        unchanged = info.weight_version == _UNCHANGED
        if served_model is not None and (info.model_path != served_model or not unchanged):
            raise ValueError(
                f"{url} has the model {info.model_path} with weights {info.weight_version!r}, not {served_model} as it "
                "was started: check --server and --served-model"
            )
        known = served_model is not None or info.model_path == str(folder) or same_model(info.model_path, folder)
        answers.append(unchanged and known)
    return all(answers)


async def _context_length(client: ServerClient, server: Mapping[str, Any]) -> int | None:
    """The context of the server; without --context-length it is the model's, which /v1/models tells."""
    if isinstance(server.get("context_length"), int):
        return int(server["context_length"])
    models = _mapping(await client.get("/v1/models")).get("data") or [{}]
    length = _mapping(models[0]).get("max_model_len")
    return int(length) if isinstance(length, int) else None


def _cache_size(server: Mapping[str, Any]) -> int | None:
    size = server.get("max_total_num_tokens")
    return int(size) if isinstance(size, int) else None


def _difference(one: ModelShape, other: ModelShape) -> str:
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in vars(one))
    return ", ".join(f"{name} {here} instead of {there}" for name, here, there in pairs if here != there)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
