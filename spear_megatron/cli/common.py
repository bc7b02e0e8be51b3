"""What the commands that read a configuration share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config


def add_config_arguments(parser: argparse.ArgumentParser, *, dry_run: bool = True) -> None:
    """Options ``--config``, ``--dry-run`` (for commands that do something) and ``key=value``."""
    parser.add_argument("--config", help="YAML file that overrides the defaults")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="check everything, print the resolved configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one key, e.g. trainer.seed=1")


def load_config(args: argparse.Namespace) -> Config:
    """The resolved configuration, each field checked by its dataclass: file, then run script, then command line."""
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config

    overrides = list(args.overrides)
    if getattr(args, "from_spear_script", None) is not None:
        from spear_megatron.cli.run_script import script_overrides

        overrides = [*script_overrides(args.from_spear_script), *overrides]
    return load(Config, args.config, overrides)
