"""Which model an OpenAI-compatible server serves, asked before anything is generated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from spear_megatron.model.fingerprint import same_model
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.openai.engine import base_url


def served_model(
    server: str, folder: str | Path, wanted: str | None, *, api_key: str | None, max_model_len: int, timeout_s: float
) -> str:
    """Name of the model to ask for.

    Args:
        folder: the model's folder here, compared with the server's where that can be read from here.
        wanted: the name; None takes the only one that is served.
        max_model_len: tokens that a request may have; refused where the server says that it takes fewer.

    Raises:
        ValueError: it is not served, several are, or what is served is another model; names the remedy.
        EngineError: the server did not answer.
    """
    url = f"{base_url(server)}/v1/models"
    rows = _models(url, api_key, timeout_s)
    names = [str(row["id"]) for row in rows]
    if wanted is None and len(names) != 1:
        raise ValueError(f"{url} serves {', '.join(names[:8]) or 'nothing'}: name the model by --served-model")
    if wanted is not None and rows and wanted not in names:
        raise ValueError(f"--served-model={wanted} is not served by {url}, which has {', '.join(names[:8])}")
    name = names[0] if wanted is None else wanted
    row = next((row for row in rows if row["id"] == name), {})
    root = str(row.get("root") or name)
    if os.path.isdir(root) and not same_model(root, folder):
        raise ValueError(f"{url} serves {root}, which is another model than --model={folder}: start it with that one")
    length = row.get("max_model_len")
    if isinstance(length, int) and length < max_model_len:
        raise ValueError(
            f"{url}: requests may have {length} tokens there and {max_model_len} here: start the server with a longer "
            "context, or lower data.max_response_length"
        )
    return name


def _models(url: str, api_key: str | None, timeout_s: float) -> list[Mapping[str, Any]]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(url, headers=headers, timeout=timeout_s, trust_env=False)
    except httpx.HTTPError as error:
        raise EngineError(f"{url} did not answer ({type(error).__name__}: {error}): check --server") from error
    if answer.status_code in (401, 403):
        raise ValueError(f"{url}: HTTP {answer.status_code}: the API key is missing or wrong: check --api-key-env")
    if answer.status_code != 200:
        raise EngineError(f"{url}: HTTP {answer.status_code}: {answer.text[:300]}: check --server")
    try:
        rows = answer.json()["data"]
        return [row for row in rows if isinstance(row, Mapping) and "id" in row]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{url} is not OpenAI's list of models: {answer.text[:300]}") from error
