"""What the commands that read a configuration share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Options ``--config``, ``--dry-run`` and ``key=value``."""
    parser.add_argument("--config", help="YAML file that overrides the defaults")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the resolved configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one key, e.g. trainer.seed=1")


def load_config(args: argparse.Namespace) -> Config:
    """The resolved configuration, each field checked by its dataclass."""
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config

    return load(Config, args.config, args.overrides)
