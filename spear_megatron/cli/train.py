"""``train``: reinforcement learning of an agent. Under ``torchrun`` every rank runs this same program."""

from __future__ import annotations

import argparse

from spear_megatron.cli.common import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train`` to ``parser``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--from-spear-script",
        metavar="FILE",
        help="take the settings of a released SPEAR or verl run script, unmodified; --config lies below them, "
        "key=value above; a table on standard error tells what became of every key",
    )


def run(args: argparse.Namespace) -> int:
    """Train until the last step; a run directory that was used before is continued."""
    config = load_config(args)
    from spear_megatron.cli.preflight import (
        check_agents,
        check_before_start,
        check_machine,
        check_places,
        machine_notes,
        print_plan,
        print_warnings,
    )

    folder, key = config.trainer.default_local_dir, "trainer.default_local_dir"
    check_before_start(config)
    check_agents(config)
    print_warnings(config)
    if args.dry_run:
        from spear_megatron.cli.planning import dry_run_lines

        print_plan(config)
        for line in (*dry_run_lines(config), *machine_notes(config, folder, key)):
            print(f"# {line}")
        return 0
    check_machine(config)
    check_places(config, folder, key)
    from spear_megatron.cli.build import open_run
    from spear_megatron.cli.session import StopFlag
    from spear_megatron.trainer.loop import train

    stop = StopFlag()
    stop.install()
    with open_run(config, stop) as run:
        if run.progress.step:
            run.parts.recorder.message(f"continuing after step {run.progress.step}")
        train(run)
    stop.retire()
    return 0
