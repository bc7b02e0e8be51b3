"""Messages between a trainer and its worker processes: a length in 8 bytes, then a pickle. Both ends are ours."""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The next message; EOFError or ConnectionError when the other end is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return pickle.loads(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise EOFError("the other end is gone") from error


def write_message(writer: asyncio.StreamWriter, message: Any) -> None:
    """Queue one message; whole, so that concurrent senders do not mix."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(data)) + data)
