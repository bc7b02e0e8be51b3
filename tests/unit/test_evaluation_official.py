"""The released code's figures and answers against plain loops written from their description."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.evaluation.metrics import ProblemSamples, pass_at_k
from spear_megatron.evaluation.official import official_metrics, official_sizes
from spear_megatron.rewards.answers import canonical_answer, official_answer, quick_verdict


def item(answers: list[str | None]) -> ProblemSamples:
    return ProblemSamples("p", tuple(answer == "7" for answer in answers), tuple(answers))


def plain_draws(answers: list[str | None], k: int) -> tuple[float, float, float]:
    """Best, worst and majority with the legacy generator, one draw after the other."""
    generator = np.random.RandomState(42)
    best, worst, majority = [], [], []
    for _ in range(1000):
        drawn = [answers[index] for index in generator.choice(len(answers), size=k, replace=True)]
        right = [answer == "7" for answer in drawn]
        best.append(max(right))
        worst.append(min(right))
        votes: dict[str | None, int] = {}
        for answer in drawn:
            votes[answer] = votes.get(answer, 0) + 1
        majority.append(max(votes, key=lambda answer: votes[answer]) == "7")
    return tuple(sum(column) / 1000 for column in (best, worst, majority))  # type: ignore[return-value]


@given(st.lists(st.sampled_from(["7", "8", None]), min_size=2, max_size=9))
@settings(max_examples=12, deadline=None)
def test_draws_equal_a_plain_loop(answers: list[str | None]) -> None:
    figures = official_metrics([item(answers)])
    assert figures[f"official_mean@{len(answers)}"] == pytest.approx(answers.count("7") / len(answers))
    for k in official_sizes(len(answers)):
        found = tuple(figures[f"official_{kind}@{k}"] for kind in ("best", "worst", "maj"))
        assert found == pytest.approx(plain_draws(answers, k), abs=1e-12)


def test_sizes_means_and_the_difference_to_the_unbiased_estimate() -> None:
    assert [official_sizes(count) for count in (1, 2, 3, 8, 32)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 16, 32]]
    assert official_metrics([item(["7"]), item(["8"])]) == {"official_mean@1": 0.5}
    rare = item(["7"] + ["8"] * 31)
    assert pass_at_k(rare, 32) == 1.0
    assert official_metrics([rare])["official_best@32"] == pytest.approx(1 - (31 / 32) ** 32, abs=0.05)
    both = official_metrics([item(["7", "7"]), item(["8", "7"])])
    assert both["official_mean@2"] == 0.75 and both["official_worst@2"] < 0.75 < both["official_best@2"]


@pytest.mark.parametrize(
    ("text", "strict", "answer"),
    [
        (r"So \boxed{336}.", "336", "336"),
        (r"So \boxed{336^\circ}", r"336^\circ", "336"),
        (r"So \boxed{0336}", "0336", "336"),
        (r"So \boxed{ 336 }", " 336 ", "336"),
        (r"So \boxed{\text{336}}", r"\text{336}", "336"),
        (r"So \boxed{336\text{ cm}}", r"336\text{ cm}", "336"),
        (r"So \boxed{1,234}", "1,234", "1234"),
        (r"So \boxed{m+n = 336}", "m+n = 336", "336"),
        (r"So \boxed{336.0}", "336.0", "336"),
        (r"\boxed{1} or \boxed{2}", "2", "2"),
        (r"\boxed{1} or \boxed{2", None, "1"),
        (r"\boxed{336}" + "." * 92, None, "336"),
        (r"\boxed{336}" + "." * 89, "336", "336"),
        (r"\boxed{\{1\}}", r"\{1\}", r"\{1\}"),
        (r"\boxed{\text{none}}", r"\text{none}", r"\text{none}"),
        (r"\boxed {336}", None, "336"),
        ("336", None, None),
        ("", None, None),
    ],
)
def test_both_ways_to_read_an_answer(text: str, strict: str | None, answer: str | None) -> None:
    assert official_answer(text) == strict
    assert canonical_answer(text) == answer


@pytest.mark.parametrize("answer", [r"\text{336}", r"336\text{ cm}", r"336^\circ", "m+n=336", r"\textbf{336}"])
def test_the_reward_takes_what_is_the_same_integer(answer: str) -> None:
    assert quick_verdict(answer, "336") is True
    assert quick_verdict(answer, "335") is False


@pytest.mark.parametrize("answer", ["x > 336", r"\text{about} 336 \text{ or } 337", r"\frac{672}{2}", "336 = 336"])
def test_what_is_no_plain_integer_is_left_to_math_verify(answer: str) -> None:
    assert quick_verdict(answer, "336") is None
