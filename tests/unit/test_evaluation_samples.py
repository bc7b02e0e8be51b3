"""Samples on disk, what may go on in a folder, and the report and page made of them."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import tiny_renderer

from spear_megatron.evaluation.journal import Journal, claim_identity, claimed, read_samples
from spear_megatron.evaluation.page import MAX_CHARS, render_page
from spear_megatron.evaluation.sampled_report import k_values, report_samples
from spear_megatron.evaluation.samples import Sample, sample_maker
from spear_megatron.model.fingerprint import model_fingerprint, same_model
from spear_megatron.rollout.segments import SegmentBuilder
from spear_megatron.rollout.engine import GenerateResult
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

PROMPTS = [
    Prompt(f"p{task}", ({"role": "user", "content": f"Problem <{task}>"},), "336", "even" if task % 2 == 0 else "odd")
    for task in range(3)
]


def sample(task: int, number: int, text: str | None, *, strict: str | None = "", error: str | None = None) -> Sample:
    """A sample that answered ``text``; ``strict`` is what the strict rule reads, the same unless given."""
    read = text if strict == "" else strict
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": f"</script>\\boxed{{{text}}}"})
    return Sample(
        task=task, sample=number, task_id=f"p{task}", correct=text == "336", answer=text,
        strict_correct=read == "336", strict_answer=read, outcome=1.0,
        stop_reason="infrastructure" if error else "answer", num_turns=1, num_tool_calls=0, num_tool_failures=0,
        num_prompt_tokens=5, num_sampled_tokens=7, num_inserted_tokens=0, error=error, messages=messages,
    )  # fmt: skip


def trajectory(task: int, number: int, text: str, *, error: str | None = None) -> Trajectory:
    renderer = tiny_renderer()
    segment = SegmentBuilder(renderer.prompt_ids([{"role": "user", "content": "q"}]), None)
    ids = tuple(renderer.tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False))
    segment.append_sampled(GenerateResult(ids, (float("nan"),) * len(ids), "stop"))
    stop = StopReason.INFRASTRUCTURE if error else StopReason.ANSWER
    return Trajectory(
        TrajectoryId(0, task, number), (segment.build(),), RewardParts(1.0, success=True), stop, 0, num_turns=1,
        messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": text}), error=error,
    )  # fmt: skip


def maker(whole: set[tuple[int, int]] = set()) -> Any:  # noqa: B006
    renderer = tiny_renderer()
    plain = lambda ids: renderer.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return sample_maker(renderer.decode, plain, whole)


def test_a_sample_is_read_strictly_from_the_tokens_and_leniently_from_the_turn() -> None:
    made = maker({(1, 2)})(PROMPTS[1], trajectory(1, 2, r"It is \boxed{336^\circ}."))
    assert (made.answer, made.correct) == ("336", True)
    assert (made.strict_answer, made.strict_correct) == (r"336^\circ", False)
    assert made.num_sampled_tokens == made.trajectory["segments"][0]["response_mask"].count(1) > 5
    assert maker()(PROMPTS[1], trajectory(1, 3, r"\boxed{336}")).trajectory is None
    lost = maker()(PROMPTS[1], trajectory(1, 3, r"\boxed{336}", error="engine: gone"))
    assert not lost.valid and not lost.correct and lost.answer is None


def test_a_journal_outlives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, maker(), [])
    for number in range(3):
        journal.keep(PROMPTS[0], trajectory(0, number, r"\boxed{5}", error="gone" if number == 1 else None))
    path = tmp_path / "samples" / "samples.0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 5])
    found = read_samples(tmp_path)
    assert path.read_bytes() == whole and [(key, item.valid) for key, item in found.items()] == [
        ((0, 0), True), ((0, 1), False), ((0, 2), True),
    ]  # fmt: skip
    again = Journal(tmp_path, 1, maker(), [key for key, item in found.items() if item.valid])
    assert [again.has(TrajectoryId(0, 0, number)) for number in range(4)] == [True, False, True, False]
    again.keep(PROMPTS[0], trajectory(0, 1, r"\boxed{6}"))
    journal.keep(PROMPTS[0], trajectory(0, 0, r"\boxed{7}", error="gone"))  # a failure replaces no success
    found = read_samples(tmp_path)
    assert {key: item.answer for key, item in found.items()} == {(0, 0): "5", (0, 1): "6", (0, 2): "5"}
    path.write_bytes(whole.replace(b'"task"', b'"tusk"', 1))
    with pytest.raises(ValueError, match=r"samples\.0\.jsonl:1 is damaged"):
        read_samples(tmp_path)


def test_a_folder_goes_on_with_its_own_evaluation_only(tmp_path: Path) -> None:
    known = {"--model": "sha256:1", "--n": 4, "--temperature": 1.0, "env.kwargs": {"a": (1, 2)}}
    claim_identity(tmp_path, known)
    claim_identity(tmp_path, known)
    with pytest.raises(ValueError, match=r"another evaluation: --temperature is 0.5 and was 1.0\. Give another --out"):
        claim_identity(tmp_path, {**known, "--temperature": 0.5})
    with pytest.raises(ValueError, match="--model is 'sha256:2' and was 'sha256:1'; extra is 1 and was None"):
        claim_identity(tmp_path, {**known, "--model": "sha256:2", "extra": 1})
    with pytest.raises(ValueError, match="--n is 3 and was 4"):
        claim_identity(tmp_path, {**known, "--n": 3})
    claim_identity(tmp_path, {**known, "--n": 8})
    with pytest.raises(ValueError, match="--n is 4 and was 8"):
        claim_identity(tmp_path, known)
    with claimed(tmp_path), pytest.raises(ValueError, match="in use by another evaluation"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_a_fingerprint_sees_other_weights_and_not_other_places(tmp_path: Path) -> None:
    size = (32 << 20) + 12345
    for name, byte in (("a", b"\0"), ("b", b"\0"), ("c", b"\1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"\0" * (size - 1) + byte)
    (tmp_path / "b" / "notes.log").write_text("not part of the model")
    assert model_fingerprint(tmp_path / "a") == model_fingerprint(tmp_path / "b") != model_fingerprint(tmp_path / "c")
    assert same_model(tmp_path / "a", tmp_path / "b") and not same_model(tmp_path / "a", tmp_path / "c")
    assert not same_model("Qwen/Qwen3-32B", tmp_path / "a")
    with pytest.raises(ValueError, match="no model folder"):
        model_fingerprint(tmp_path)


def all_samples() -> list[Sample]:
    return [
        sample(0, 0, "336"), sample(0, 1, "336", strict="0336"), sample(0, 2, "5"), sample(0, 3, "5"),
        sample(1, 0, "336"), sample(1, 1, None), sample(1, 2, "5", error="engine: gone"), sample(1, 3, "9"),
        sample(2, 0, "5"), sample(2, 1, "5"), sample(2, 2, "6"), sample(2, 3, "336", strict=None),
    ]  # fmt: skip


def test_the_report_judges_in_two_ways_and_counts_what_was_lost() -> None:
    report = report_samples("m", PROMPTS, reversed(all_samples()), num_samples=4, seed=0)
    form = report.to_json()
    assert form == report_samples("m", PROMPTS, all_samples(), num_samples=4, seed=0).to_json()
    assert (form["num_samples"], form["num_excluded"], form["num_problems"]) == (11, 1, 3)
    assert form["metrics"]["success_rate"]["value"] == pytest.approx(4 / 11)
    assert form["strict"]["metrics"]["success_rate"]["value"] == pytest.approx(2 / 11)
    assert form["metrics"]["pass@4"]["num_problems"] == 2 and form["metrics"]["maj@1"]["num_problems"] == 3
    assert form["metrics"]["maj@4"]["value"] == pytest.approx((0.5 + 0.0) / 2)  # a tie shares the vote
    assert form["by_source"].keys() == form["strict"]["by_source"].keys() == {"even", "odd"}
    assert form["official"]["even"]["official_mean@4"] == pytest.approx((1 / 4 + 0) / 2)
    assert [(row["task_id"], row["sample"], row["strict_answer"]) for row in form["disagreements"]] == [
        ("p0", 1, "0336"), ("p2", 3, None),
    ]  # fmt: skip
    assert form["problems"][1]["answers"] == [["336", 1, True], ["9", 1, False], [None, 1, False]]
    assert form["problems"][1]["num_excluded"] == 1
    table = report.to_table()
    assert table.startswith("m: 3 problems, 11 samples, 1 excluded after infrastructure failures\ndata ")
    assert re.search(r"^all +success_rate +36.4 % +[\d. -]+% +18.2 %", table, re.M)
    assert "p0 sample 1: truth 336, normalised 336 (right), strict 0336" in table
    assert "p2 sample 3: truth 336, normalised 336 (right), strict no answer" in table


def test_without_truths_there_is_one_way_and_without_samples_an_error() -> None:
    plain = [Sample(**{**item.to_json(), "strict_correct": None}) for item in all_samples()]
    report = report_samples("m", PROMPTS, plain, num_samples=4, seed=0)
    assert report.strict is None and report.to_json()["strict"] is None and report.official == {}
    assert report.to_table() == report.normalised.to_table()
    with pytest.raises(ValueError, match="no valid sample of 1; errors: .*gone"):
        report_samples("m", PROMPTS, [sample(0, 0, None, error="gone")], num_samples=1, seed=0)
    assert [k_values(count) for count in (1, 2, 3, 32)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32]]


class Page(HTMLParser):
    """Tags that are open, ids, and everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.outside: list[str] = []
        self._script: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.outside += [value for key, value in attrs if key in ("src", "href") and value]
        self._script = str(named.get("id")) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._script = None


def test_the_page_holds_every_conversation_and_needs_no_network() -> None:
    samples = [*all_samples()[:-1], sample(2, 3, "x" * 3 * MAX_CHARS)]
    report = report_samples("<m>", PROMPTS, samples, num_samples=4, seed=0)
    html = render_page(report, PROMPTS, samples)
    page = Page()
    page.feed(html)
    assert page.outside == [] and "http" not in re.sub(r"data:[^\"]+", "", html) and "<m>" not in html
    data = json.loads(page.scripts["data"])
    assert [len(problem["cells"]) for problem in data["problems"]] == [4, 4, 4] and data["columns"] == 4
    assert data["problems"][1]["cells"][2]["stop"] == "infrastructure"
    assert data["problems"][0]["problem"] == "Problem <0>"
    for task in range(3):
        conversations = json.loads(zlib.decompress(base64.b64decode(page.scripts[f"c{task}"])))
        expected = [item.messages for item in samples if item.task == task]
        for shown, messages in zip(conversations, expected, strict=True):
            assert shown[0] == messages[0]
            assert shown[1] == messages[1] or len(shown[1]["content"]) < MAX_CHARS + 100
    assert html.count('<svg class="chart"') == 3 and html.count("<polyline") == 3 * 4
    assert not re.search(r"<!--[A-Z]+-->", html)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_the_curves_stay_in_their_panel(values: list[float], sizes: int) -> None:
    from spear_megatron.evaluation.chart import curves
    from spear_megatron.evaluation.metrics import Estimate

    part = {
        f"{kind}@{2**power}": Estimate(values[power % len(values)], 0.0, 1.0, 3)
        for power in range(sizes)
        for kind in ("pass", "maj")
    }
    svg = curves("a & b", part, part)
    numbers = [float(text) for text in re.findall(r'(?:cy|y1|y2|y)="([\d.-]+)"', svg)]
    assert min(numbers) >= 0 and max(numbers) <= 230 and "a &amp; b" in svg
