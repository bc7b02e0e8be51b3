"""The report as one HTML page that needs no network: problems by samples, conversations, answers, curves.

Conversations are compressed, one block per problem, which the browser unpacks when a cell is opened: the page stays
usable with thousands of long ones.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from spear_megatron.evaluation.chart import curves
from spear_megatron.evaluation.metrics import Estimate
from spear_megatron.evaluation.sampled_report import SampledReport
from spear_megatron.evaluation.samples import Sample
from spear_megatron.observability.files import write_atomically
from spear_megatron.types import Prompt

MAX_CHARS = 40_000
_TEMPLATE = "page.html"


def write_page(path: Path, report: SampledReport, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
    """Write the page; a reader never sees half of it. It is a pure function of its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_page(report, prompts, samples).encode())


def render_page(report: SampledReport, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> str:
    """The page as text. Messages above ``MAX_CHARS`` characters are cut in the middle, and say so."""
    template = (files("spear_megatron.evaluation") / _TEMPLATE).read_text(encoding="utf-8")
    by_task: dict[int, list[Sample]] = {task: [] for task in range(len(prompts))}
    for sample in sorted(samples, key=lambda sample: sample.key):
        by_task[sample.task].append(sample)
    columns = 1 + max((sample.sample for sample in samples), default=0)
    data = {
        "columns": columns,
        "strict": report.strict is not None,
        "problems": [
            {**problem, "problem": _text_of(prompts[task]), "cells": [_cell(sample) for sample in by_task[task]]}
            for task, problem in enumerate(report.problems)
        ],
    }
    blocks = "\n".join(
        f'<script type="text/plain" id="c{task}">{_packed([_conversation(sample) for sample in members])}</script>'
        for task, members in by_task.items()
    )
    parts = {
        "TITLE": escape(report.normalised.name),
        "SUBTITLE": escape(report.normalised.title().removeprefix(f"{report.normalised.name}: ")),
        "FIGURES": _figures(report),
        "CHARTS": "".join(_charts(report)),
        "OFFICIAL": _official(report),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "BLOCKS": blocks,
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _cell(sample: Sample) -> dict[str, Any]:
    """What the table shows of a sample."""
    return {
        "s": sample.sample,
        "ok": sample.correct,
        "st": sample.strict_correct,
        "a": sample.answer,
        "sa": sample.strict_answer,
        "stop": sample.stop_reason,
        "turns": sample.num_turns,
        "calls": sample.num_tool_calls,
        "fails": sample.num_tool_failures,
        "tokens": sample.num_sampled_tokens,
        "error": sample.error,
    }


def _conversation(sample: Sample) -> list[Mapping[str, Any]]:
    return [{key: _cut(value) for key, value in message.items()} for message in sample.messages]


def _cut(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= MAX_CHARS:
        return value
    half = MAX_CHARS // 2
    return f"{value[:half]}\n[... {len(value) - 2 * half} characters, see samples/ ...]\n{value[-half:]}"


def _packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def _text_of(prompt: Prompt) -> str:
    return "\n\n".join(str(message.get("content") or "") for message in prompt.messages)


def _scopes(report: SampledReport) -> list[tuple[str, Mapping[str, Estimate], Mapping[str, Estimate] | None]]:
    """(name, normalised, strict) over everything and by data source."""
    strict = report.strict
    parts = [("all problems", report.normalised.metrics, None if strict is None else strict.metrics)]
    for source, part in report.normalised.by_source.items():
        parts.append((source, part, None if strict is None else strict.by_source[source]))
    return parts


def _charts(report: SampledReport) -> list[str]:
    return [f"<figure>{curves(name, part, strict)}</figure>" for name, part, strict in _scopes(report)]


def _figures(report: SampledReport) -> str:
    """The table of the largest k, per scope and answer mode."""
    rows = []
    for name, part, strict in _scopes(report):
        largest = max(int(metric.partition("@")[2]) for metric in part if "@" in metric)
        for mode, metrics in (("normalised", part), ("strict", strict)):
            if metrics is None:
                continue
            names = ("success_rate", f"avg@{largest}", f"pass@{largest}", f"maj@{largest}")
            cells = "".join(_estimate(metrics.get(metric)) for metric in names)
            first = f'<th scope="row" rowspan="{1 if strict is None else 2}">{escape(name)}</th>'
            head = first if mode == "normalised" else ""
            rows.append(f'<tr class="{mode}">{head}<td>{mode}</td><td class="num">@{largest}</td>{cells}</tr>')
    titles = ("data", "answers", "k", "right", "avg@k", "pass@k", "maj@k")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    return f'<table class="figures"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "<td></td>"
    span = f"{estimate.low * 100:.1f} - {estimate.high * 100:.1f}"
    return f'<td class="num"><b>{estimate.value * 100:.1f}</b> <small>{span}</small></td>'


def _official(report: SampledReport) -> str:
    """Figures as the released code computes them."""
    rows = [
        f'<tr><th scope="row">{escape(source)}</th>'
        + "".join(f'<td class="num">{escape(name.removeprefix("official_"))} <b>{value * 100:.1f}</b></td>'
                  for name, value in figures.items())
        + "</tr>"
        for source, figures in report.official.items()
        if figures
    ]  # fmt: skip
    return f'<table class="official">{"".join(rows)}</table>' if rows else ""
