"""``python -m spear_megatron <command>``: only the chosen command's module is imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train an agent with reinforcement learning",
    "sft": "fine-tune on conversations",
    "evaluate": "measure success rates on held-out tasks",
    "convert": "convert between Hugging Face and Megatron checkpoints",
    "view": "show the trajectories that a run kept",
    "chat": "talk to a trained agent",
    "doctor": "check this machine, or look for failure patterns in a run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program name; those of the process if None.

    Returns:
        The exit code: the command's own, 2 for a user error (printed as one ``error:`` line), 130 when interrupted.
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
            module = importlib.import_module(f"spear_megatron.cli.{name}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        code = int(module.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.debug or not is_user_error(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def is_user_error(error: Exception) -> bool:
    """Whether the user can mend it: bad input or files that are missing or not accessible."""
    files = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
    return isinstance(error, (ValueError, *files))


if __name__ == "__main__":
    sys.exit(main())
