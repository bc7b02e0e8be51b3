"""The process behind MathVerifier: reads JSON lines of [answer, truth], answers ``equal`` or ``different``.

Started as a file with the deadline in seconds as its argument. math-verify bounds itself with SIGALRM, which needs the
main thread; a watchdog ends the process when even that does not help, so that it never outlives a dead parent.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys

_MEMORY_BYTES = 4 << 30


def main(deadline_s: float) -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(error, file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    timeout_s = max(1, int(deadline_s) - 1)
    for line in sys.stdin:
        answer, truth = json.loads(line)
        faulthandler.dump_traceback_later(deadline_s + 1, exit=True)
        try:
            gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=timeout_s)
            guess = parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout_s)
            same = bool(gold) and bool(guess) and verify(gold, guess, timeout_seconds=timeout_s)
        except Exception:  # noqa: BLE001 - whatever sympy makes of a model's text, it is not the right answer
            same = False
        faulthandler.cancel_dump_traceback_later()
        print("equal" if same else "different", file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
