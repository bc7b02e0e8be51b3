"""Runs one program inside its jail and reports what went wrong in the program's own lines."""

from __future__ import annotations

import atexit
import builtins
import io
import linecache
import os
import random
import signal
import sys
import threading
import traceback
import types

from .runtime import ENVIRONMENT
from .settings import EXIT_ERROR, EXIT_MEMORY, PROGRAM

_MAX_MESSAGE_CHARS = 4000
_SEED = 0


def _replace_streams() -> None:
    """New text streams on descriptors 0 to 2, so that nothing is shared with the server or another program."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        raw = io.FileIO(fd, mode)
        buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        stream = io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _seed() -> None:
    """Give every source of random numbers that has a global state the same start in every run."""
    random.seed(_SEED)
    for name in ("numpy.random", "sympy.core.random"):
        if name in sys.modules:
            sys.modules[name].seed(_SEED)


def _report(error: BaseException) -> None:
    """Print the traceback of ``error`` with the frames of the program alone."""
    summary = traceback.TracebackException.from_exception(error)
    pending: list[traceback.TracebackException | None] = [summary]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        frames = [frame for frame in part.stack if frame.filename == PROGRAM]
        part.stack = traceback.StackSummary.from_list(frames) if frames else None  # type: ignore[assignment]
        pending += [part.__cause__, part.__context__, *(part.exceptions or ())]
    text = "".join(summary.format())
    if len(text) > _MAX_MESSAGE_CHARS:
        half = _MAX_MESSAGE_CHARS // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    sys.stderr.write(text)


def _exit_code(code: object) -> int:
    """Exit code for the argument of ``SystemExit``, as the interpreter computes it."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return EXIT_ERROR


def _execute(source: str) -> int:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    try:
        linecache.cache[PROGRAM] = (len(source), None, source.splitlines(keepends=True), PROGRAM)
        exec(compile(source, PROGRAM, "exec", dont_inherit=True), module.__dict__)
        return 0
    except SystemExit as error:
        return _exit_code(error.code)
    except MemoryError as error:
        _report(error)
        return EXIT_MEMORY
    except BaseException as error:
        _report(error)
        return EXIT_ERROR


def run(source: str, scratch: str) -> None:
    """Run ``source`` as ``__main__`` in this process, which ends with it. Never returns."""
    code = EXIT_ERROR
    try:
        for name in [name for name in sys.modules if name.partition(".")[0] == __package__.partition(".")[0]]:
            del sys.modules[name]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _replace_streams()
        _seed()
        os.environ.clear()
        os.environ.update(ENVIRONMENT, HOME=scratch, TMPDIR=scratch)
        sys.argv = ["program.py"]
        code = _execute(source)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except MemoryError:
        code = EXIT_MEMORY
    finally:
        os._exit(code)
