"""Whether a server is alive, and whether its scheduler still works."""

from __future__ import annotations

import httpx

ANSWER_S = 5.0
GENERATE_S = 25.0  # the server itself gives up after 20 s


def answers(url: str, timeout_s: float = ANSWER_S) -> bool:
    """Whether the HTTP side of the server answers; also while it is paused. False while it starts."""
    return _is_ok(f"{url}/health", timeout_s)


def generates(url: str, timeout_s: float = GENERATE_S) -> bool:
    """Whether its scheduler made a token (for others, or one for this question) in time.

    False while it is paused. Must not be asked of a server whose memory is released.
    """
    return _is_ok(f"{url}/health_generate", timeout_s)


def _is_ok(url: str, timeout_s: float) -> bool:
    try:
        # The environment's proxies are not for the machines of a cluster.
        return httpx.get(url, timeout=timeout_s, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
