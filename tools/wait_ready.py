"""Wait until every server answers its health check, within a deadline.

    python tools/wait_ready.py --deadline-s 1800 --pid "$SERVERS" http://node-8:30000 http://node-8:30001

Exit code 0: all are ready; 1: the deadline passed, or the process that runs them ended; the message names the missing.
"""

from __future__ import annotations

import argparse
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

POLL_S, ANSWER_S, REPORT_S = 1.0, 5.0, 30.0


def answers(url: str) -> bool:
    """Whether the health check of a server says 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a cluster's proxy knows no compute node
    try:
        with opener.open(f"{url.rstrip('/')}/health", timeout=ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_ready(urls: Sequence[str], deadline_s: float, pid: int | None = None) -> str | None:
    """Wait for all ``urls``; None, or why there is nothing left to wait for."""
    began = reported = time.monotonic()
    missing = list(urls)
    while True:
        missing = [url for url in missing if not answers(url)]
        now = time.monotonic()
        if not missing:
            return None
        if pid is not None and not is_alive(pid):
            return f"the servers' process {pid} ended before {', '.join(missing)} answered: read its log"
        if now - began > deadline_s:
            return f"no answer after {deadline_s:.0f} s from {', '.join(missing)}: read the logs of these servers"
        if now - reported > REPORT_S:
            print(f"waiting for {len(missing)} of {len(urls)} servers, {now - began:.0f} s", flush=True)
            reported = now
        time.sleep(POLL_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Wait, and tell the outcome by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline-s", type=float, default=1800.0, help="seconds until waiting is given up")
    parser.add_argument("--pid", type=int, help="process whose end ends the wait, such as the srun of the servers")
    parser.add_argument("urls", nargs="+", metavar="URL", help="such as http://node-8:30000")
    args = parser.parse_args(argv)
    reason = wait_ready(args.urls, args.deadline_s, args.pid)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    print(f"{len(args.urls)} servers are ready", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
