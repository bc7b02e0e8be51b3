"""What all contract checks share: one kind of failure, and calls with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class ContractError(AssertionError):
    """A checked object breaks its contract; the message says which rule, where, and what was seen."""


def require(condition: object, message: str) -> None:
    """ContractError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ContractError(message)


def require_int(value: Any, what: str) -> None:
    """ContractError unless ``value`` is an integer of at least 0."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= 0, f"{what} must be an integer >= 0, got {value!r}")


async def served(what: str, call: Awaitable[T], deadline_s: float) -> T:
    """Await ``call``; ContractError when it raises or does not finish within ``deadline_s`` seconds."""
    try:
        return await asyncio.wait_for(call, deadline_s)
    except TimeoutError as error:
        raise ContractError(f"{what} did not finish within {deadline_s:g} s") from error
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{what} raised {type(error).__name__}: {error}") from error
