"""Reading an answer out of a model turn and comparing it with the truth where no algebra is needed."""

from __future__ import annotations

import re

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DECORATION = re.compile(r"\\[,!]|\^?\s*\{?\\circ(?![a-zA-Z])\}?|°|\$")
_INTEGER = re.compile(r"([+-]?)\s*0*(\d+)(?:\.0*)?")
_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?[\d.,{}]+")
_NAMED = re.compile(r"[A-Za-z\s+_()]+=\s*")
_SPACES = re.compile(r"\\[ ;:]|~")
_OFFICIAL_TAIL = 100
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:\{?,\}?\d{3})+(?:\.0*)?")


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces balance, stripped; None if there is none.

    The last one is that which opens last. Escaped braces do not count. One pass over the text.
    """
    opened: list[int] = []  # where the content of each open brace starts; negative for braces that are not boxes
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else -1
            if start >= 0 and (best is None or start > best[0]):
                best = (start, token.start())
        elif token[0] == "{":
            opened.append(-1)
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(token.end())
    return None if best is None else text[best[0] : best[1]].strip()


def canonical_integer(text: str) -> str | None:
    """``text`` as a plain decimal integer, or None if it is not one.

    Dollar signs, degree signs, thousands separators, a plus sign, leading zeros and a decimal part of zeros are
    dropped.
    """
    plain = _DECORATION.sub("", text).strip()
    if _THOUSANDS.fullmatch(plain):
        plain = plain.replace("{,}", "").replace(",", "")
    found = _INTEGER.fullmatch(plain)
    if found is None or not plain.isascii():
        return None
    return ("-" if found[1] == "-" and found[2] != "0" else "") + found[2]


def canonical_answer(text: str) -> str | None:
    """The last boxed answer in a turn's ``text`` in a form for voting: equal integers and equal texts are equal.

    None where the text gives no answer.
    """
    answer = last_boxed(text)
    if not answer:
        return None
    return _integer(answer) or "".join(answer.split())


def official_answer(text: str) -> str | None:
    r"""The answer that SPEAR's released code reads from a response for AIME: None where it finds none.

    The last ``\boxed{`` within the last 100 characters, up to the brace that closes it, as it stands: nothing is
    stripped, escaped braces count, and a box that does not close gives no answer even after one that does. It is
    right only if it equals the truth character by character.
    """
    tail = text[-_OFFICIAL_TAIL:]
    start = tail.rfind("\\boxed{")
    depth = 0
    for position in range(start, len(tail)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(tail[position], 0)
        if depth == 0 and tail[position] == "}":
            return tail[start + len("\\boxed{") : position]
    return None


def quick_verdict(answer: str, truth: str) -> bool | None:
    """Whether the two are equal, by text or as integers; None where that does not decide."""
    if not answer:
        return False
    if answer.strip() == truth.strip():
        return True
    left, right = _integer(answer), _integer(truth)
    return left == right if left is not None and right is not None else None


def _integer(text: str) -> str | None:
    """``canonical_integer`` that also reads ``\\text{}`` around numbers, units after them and ``m + n =`` before."""

    def plain(found: re.Match[str]) -> str:
        inside = found[1].strip()
        return inside if _NUMBER.fullmatch(inside) or found.start() == 0 else ""

    bare = _WORDS.sub(plain, _SPACES.sub(" ", text).strip()).strip()
    return canonical_integer(_NAMED.sub("", bare, count=1) if _NAMED.match(bare) else bare)
