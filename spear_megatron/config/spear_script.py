"""A released SPEAR or verl run script as overrides of this configuration, key by key and without dropping any.

Two forks exist: math with tools (one row per trajectory) and agents in environments (one row per environment step). A
script that names ``env.env_name`` belongs to the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from spear_megatron.config.shell import Command, read_script

PROGRAM = "verl.trainer.main_ppo"
Kind = Literal["same", "renamed", "translated", "default", "inert", "elsewhere"]
KINDS: Mapping[Kind, str] = {
    "same": "used as they are",
    "renamed": "renamed",
    "translated": "translated",
    "default": "not in the script: defaults of the released configuration",
    "inert": "inert in the released code: not taken over, your configuration decides",
    "elsewhere": "not applicable here: decided by other keys",
}


@dataclass(frozen=True)
class KeyRow:
    """What became of one key.

    Attributes:
        key, value: as in the script; a key ``$name`` is a shell variable that the script sets and never passes on.
        overrides: ``key=value`` of this configuration, none for what has no place in it.
        reason: why it is not simply the same key; '' if it is.
    """

    key: str
    value: str
    kind: Kind
    overrides: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class RunScript:
    """The settings that a script hands to the trainer.

    Attributes:
        settings: texts by key, without the ``+`` of keys that the released configuration lacks.
        repeated: earlier values of keys that are given again, which do not count.
        unused: variables that are set but neither passed on nor exported.
        exported: variables for other programs.
        others: commands that were not read, such as the preparation of data.
    """

    settings: Mapping[str, str]
    repeated: tuple[tuple[str, str], ...]
    unused: Mapping[str, str]
    exported: Mapping[str, str]
    others: tuple[str, ...]

    @cached_property
    def agents(self) -> bool:
        """Whether this is a script of the agent fork."""
        return "env.env_name" in self.settings

    def flag(self, key: str, default: bool = False) -> bool:
        """A setting that is true or false."""
        return self.settings.get(key, str(default)).lower() == "true"

    def number(self, key: str, default: float) -> float:
        """A setting that is a number. Raises ValueError naming the key if it is not."""
        text = self.settings.get(key, str(default))
        try:
            return float(text)
        except ValueError as error:
            raise ValueError(f"{key} must be a number, the script has {text!r}") from error


def parse_run_script(text: str, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> RunScript:
    """The settings that a bash run script passes to the trainer; nothing is run.

    Args:
        environment: variables from outside, such as HOME and PWD.
        arguments: of the script itself.

    Raises:
        ValueError: no single trainer command, an argument that is no setting, or something that needs a shell.
    """
    script = read_script(text, environment, arguments)
    runs = [command for command in script.commands if _program_end(command)]
    if len(runs) != 1:
        found = f"{len(runs)} commands run it" if runs else "no command runs it"
        raise ValueError(f"a run script must start {PROGRAM} once: {found}")
    settings: dict[str, str] = {}
    repeated = []
    for word in runs[0].words[_program_end(runs[0]) :]:
        key, equals, value = word.partition("=")
        if word.startswith(("-", "~")) or not equals or not key.lstrip("+"):
            what = f"line {runs[0].line}: {word!r} is not a setting key=value"
            raise ValueError(f"{what}: replace it by the settings that it stands for")
        key = key.lstrip("+")
        if key in settings:
            repeated.append((key, settings[key]))
        settings[key] = value
    unused = {
        name: value
        for name, value in script.variables.items()
        if name not in script.used and name not in script.exported
    }
    return RunScript(
        settings=settings,
        repeated=tuple(repeated),
        unused=unused,
        exported={name: script.variables[name] for name in sorted(script.exported) if name in script.variables},
        others=tuple(" ".join(command.words) for command in script.commands if command is not runs[0]),
    )


def _program_end(command: Command) -> int:
    """Index of the first argument of the trainer in the words of ``command``, 0 if it does not start the trainer."""
    for position, word in enumerate(command.words):
        if word == PROGRAM or word.endswith("/trainer/main_ppo.py"):
            return position + 1
    return 0
