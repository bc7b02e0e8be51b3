"""A worker process: ``python -m spear_megatron.environments.workers.serve FD`` serves on a connected socket."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from typing import Any

from spear_megatron.environments.workers.host import EpisodeHost, described
from spear_megatron.environments.workers.wire import read_message, write_message


def _leave_with_parent() -> None:
    """End this process when its parent is gone, even while an environment blocks the event loop."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


async def serve(connection: socket.socket) -> None:
    """Answer calls until the other end is gone. The first message is the environment's configuration."""
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        host = EpisodeHost(await read_message(reader))
    except Exception as error:  # of a user's code: the trainer is told
        write_message(writer, (False, described(error)))
        await writer.drain()
        return
    write_message(writer, (True, None))
    tasks: set[asyncio.Task[None]] = set()

    async def answer(number: int, episode: int, method: Any, argument: Any) -> None:
        good, result = await host.call(episode, method, argument)
        try:
            write_message(writer, (number, good, result))
        except Exception as error:  # a result that cannot be pickled
            write_message(writer, (number, False, f"the result of {method} cannot be sent: {described(error)}"))
        await writer.drain()

    try:
        while True:
            task = asyncio.ensure_future(answer(*await read_message(reader)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except (EOFError, ConnectionError):
        for task in tasks:
            task.cancel()
        await host.close()


def main(descriptor: int) -> None:
    """Serve on an inherited socket."""
    _leave_with_parent()
    asyncio.run(serve(socket.socket(fileno=descriptor)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
