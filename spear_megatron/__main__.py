"""``python -m spear_megatron <command>``: only the chosen command's module is imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

COMMANDS = {
    "train": "train an agent with reinforcement learning",
    "prepare": "turn a published data set into files for the other commands",
    "corpus": "write tokenised conversations or stored trajectories as files that sft reads",
    "sft": "fine-tune on conversations",
    "evaluate": "measure success rates on held-out tasks",
    "convert": "convert between Hugging Face and Megatron checkpoints",
    "plan": "estimate memory and step time, and propose a layout",
    "view": "show the trajectories that a run kept",
    "plot": "draw the curves of one or several runs",
    "chat": "talk to a trained agent",
    "replay-dump": "compute a saved batch again and compare its log-probs",
    "doctor": "check this machine, or look for failure patterns in a run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program name; those of the process if None.

    Returns:
        The exit code: the command's own; 2 for bad input and 1 for a run that could not go on, both told in one
        ``error:`` line; 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m spear_megatron",
        description="Train LLM agents with SPEAR on megatron-core.",
        epilog="'python -m spear_megatron COMMAND --help' shows the options of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((name for name in arguments if not name.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            module = importlib.import_module(f"spear_megatron.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of libraries")
    args = parser.parse_args(arguments)
    if not args.debug and not sys.warnoptions:
        # Notices of megatron-core and torch to their own developers; --debug shows them.
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")
    try:
        code = int(module.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        return explain(error)


def explain(error: Exception) -> int:
    """Print a failure that the user can understand as one line, once for all ranks, and return the exit code.

    Raises:
        Exception: ``error`` itself, when only a traceback can tell more.
    """
    from spear_megatron.parallel.errors import RunError, lost_a_peer
    from spear_megatron.parallel.paths import NO_ROOM, os_error_text
    from spear_megatron.rollout.engine import EngineError

    files = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
    if isinstance(error, OSError) and (told := os_error_text(error)) is not None:
        return complain(f"error: {' '.join(told.split())}", 1 if error.errno in NO_ROOM else 2)
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, *files)):
        return complain(f"error: {text}", 2)
    if isinstance(error, (RunError, EngineError)):
        return complain(f"error: {text}", 1, topic=getattr(error, "topic", None))
    if lost_a_peer(error):
        return complain("error: the connection to another rank broke; the message of that rank says why", 1)
    raise error


def complain(text: str, code: int, topic: str | None = None) -> int:
    """Print ``text`` on standard error unless another rank did, or said something on ``topic``; return ``code``."""
    from spear_megatron.parallel.once import is_first_to_say

    if is_first_to_say(topic or text):
        print(text, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
