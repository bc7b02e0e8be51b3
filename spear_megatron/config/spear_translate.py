"""The table of a run script: every key, what became of it and why, and the overrides that follow."""

from __future__ import annotations

import dataclasses

from spear_megatron.config.loader import nearest_key, valid_keys
from spear_megatron.config.schema import Config
from spear_megatron.config.spear_rules import (
    ACTOR,
    ELSEWHERE,
    NOTES,
    ONLY,
    RENAMED,
    inert_reason,
    reference_unused,
    released_defaults,
    translation,
)
from spear_megatron.config.spear_script import KINDS, PROGRAM, KeyRow, Kind, RunScript


def translate(script: RunScript) -> list[KeyRow]:
    """One row per key of the script, then repeated keys, unused and exported variables, and the released defaults.

    Raises:
        ValueError: a key that is neither known here nor listed as replaced, or a value without a counterpart.
    """
    keys = set(valid_keys(Config))
    rows = [_row(key, value, script, keys) for key, value in script.settings.items()]
    for key, value in script.repeated:
        rows.append(KeyRow(key, value, "inert", reason="given again later in the script"))
    for name, value in script.unused.items():
        rows.append(KeyRow(f"${name}", value, "inert", reason=_unused_reason(name)))
    for name, value in script.exported.items():
        rows.append(KeyRow(f"${name}", value, "elsewhere", reason="environment variable of another program"))
    for key, value in released_defaults(script).items():
        row = _row(key, value, script, keys)
        if row.overrides:
            rows.append(dataclasses.replace(row, kind="default"))
    return rows


def overrides_of(rows: list[KeyRow]) -> list[str]:
    """``key=value`` of all rows: the released defaults first, so that a key of the script wins over one."""
    ordered = sorted(rows, key=lambda row: row.kind != "default")
    return [text for row in ordered for text in row.overrides]


def describe_rows(rows: list[KeyRow], name: str, script: RunScript) -> str:
    """The table as text: kinds with their number, one line per key, then the commands that were not read."""
    lines = [f"{name}: {len(script.settings)} keys of {PROGRAM}"]
    for kind, heading in KINDS.items():
        chosen = [row for row in rows if row.kind == kind]
        if not chosen:
            continue
        lines.append(f"  {heading} ({len(chosen)})")
        for row in chosen:
            shown = f"    {row.key}={row.value}"
            if row.kind not in ("same", "inert", "elsewhere") and row.overrides != (f"{row.key}={row.value}",):
                shown += f" -> {', '.join(row.overrides)}"
            lines.append(f"{shown}  # {row.reason}" if row.reason else shown)
    if script.others:
        lines.append(f"  commands not read ({len(script.others)})")
        lines += [f"    {command}" for command in script.others]
    lines.append(
        "  Only keys are taken over. How replay, covariance clipping and normalisation work is a preset: start your "
        "--config with base: spear-paper.yaml (the paper, as by default) or spear-official.yaml (what the released "
        "code does), both in configs/presets."
    )
    return "\n".join(lines)


def _row(key: str, value: str, script: RunScript, keys: set[str]) -> KeyRow:
    reason = inert_reason(key, script)
    if reason:
        return KeyRow(key, value, "inert", reason=reason)
    if key.startswith("actor_rollout_ref.ref.") and reference_unused(script):
        return KeyRow(key, value, "inert", reason="no KL term, so no reference model")
    translated = translation(key, value, script)
    if translated is not None:
        overrides, reason = translated
        if overrides == (f"{key}={value}",):
            return KeyRow(key, value, "same", overrides, reason)
        renamed = len(overrides) == 1 and overrides[0].partition("=")[2] == value
        kind: Kind = ("renamed" if renamed else "translated") if overrides else "elsewhere"
        return KeyRow(key, value, kind, overrides, reason)
    if key in RENAMED:
        name, reason = RENAMED[key]
        return KeyRow(key, value, "renamed", (f"{name}={value}",), reason)
    elsewhere = ELSEWHERE.get(key) or next(
        (reason for start, reason in ELSEWHERE.items() if start.endswith(".") and key.startswith(start)), None
    )
    if elsewhere is not None:
        if key in ONLY and value.lower() not in [allowed.lower() for allowed in ONLY[key]]:
            raise ValueError(
                f"{key}={value} has no counterpart here ({elsewhere}): the script must have {' or '.join(ONLY[key])}"
            )
        return KeyRow(key, value, "elsewhere", reason=elsewhere)
    if key in keys or key.startswith(("env.kwargs.", "reward.kwargs.")):
        note = NOTES.get(key, "")
        if script.agents and key == "algorithm.filter_incomplete_responses":
            note = ""
        return KeyRow(key, value, "same", (f"{key}={value}",), note)
    near = nearest_key(key, [*keys, *RENAMED, *ELSEWHERE])
    raise ValueError(f"the script has the unknown key {key!r}; did you mean {near!r}?")


def _unused_reason(name: str) -> str:
    if name == "max_replay_loss_ascending_steps":
        return f"set but never passed on: the run takes the default of {ACTOR}.max_replay_loss_steps"
    return "set but never passed on"
