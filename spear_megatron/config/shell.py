"""Reading a run script without running it: assignments, quotes, variables and arithmetic of bash, nothing else.

A script that needs more (tests, loops, command substitution) is refused with its line, never half understood.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9]|[@*#?!$-]")
_ESCAPED = tuple('$`"\\\n')  # what a backslash protects inside double quotes
_DECLARATIONS = {"export", "readonly", "declare", "typeset", "local"}
_NEEDS_A_SHELL = {
    "if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "case", "esac", "function", "eval",
    "source", ".", "[", "[[", "{", "}", "!", "unset", "shift", "read", "exit", "return", "trap",
}  # fmt: skip
_ARITHMETIC: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    # bash truncates towards zero
    ast.Div: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    ast.Mod: lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
}


@dataclass(frozen=True)
class Command:
    """One simple command after expansion: its words without quotes, and the line where it starts."""

    words: tuple[str, ...]
    line: int


@dataclass
class Script:
    """What a script would do: commands in order, the variables it sets, which of them it uses and exports."""

    commands: list[Command] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    exported: set[str] = field(default_factory=set)


def read_script(text: str, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> Script:
    """Evaluate the assignments of a bash script and collect its commands, running nothing.

    Args:
        environment: variables from outside, such as HOME and PWD.
        arguments: the script's own, ``$1`` and so on; ``$@`` is all of them.

    Raises:
        ValueError: a construct that only a shell can evaluate, or a variable without a value; names the line.
    """
    return _Reader(text.replace("\r\n", "\n"), environment, arguments).read()


class _Whole(str):
    """An expansion that was quoted inside its braces: it is not split at white space."""


class _Reader:
    """One pass over the text. A word is a list of fields, because an unquoted expansion may split into several."""

    def __init__(
        self,
        text: str,
        environment: Mapping[str, str],
        arguments: Sequence[str],
        script: Script | None = None,
        line: int = 1,
    ) -> None:
        self._text, self._at, self._first_line = text, 0, line
        self._environment, self._arguments = environment, tuple(arguments)
        self._script = script or Script()

    def read(self) -> Script:
        words: list[str] = []
        start, plain, skip = 1, False, False
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in " \t" or self._text.startswith("\\\n", self._at):
                self._at += 2 if char == "\\" else 1
            elif char == "#":
                self._at = self._end_of_line()
            elif char in "\n;&|":
                self._at += 1
                self._finish(words, start)
                words, plain, skip = [], False, False
            elif char in "<>":
                self._redirection()
                skip = True
            elif char in "()`":
                raise self._refusal(f"{char!r}")
            else:
                start = start if words else self._line()
                assignment = None if plain else _ASSIGNMENT.match(self._text, self._at)
                if assignment and not skip:
                    self._assign(assignment)
                    continue
                found = self._word()
                # a number straight before a redirection is its descriptor
                descriptor = self._peek() in "<>" and found in (["1"], ["2"])
                if not skip and not descriptor:
                    words += [word for word in found if word]
                    plain = words[:1] != [] and words[0] not in _DECLARATIONS
                    if words and words[0] in _DECLARATIONS and len(words) > 1:
                        self._script.exported.add(words.pop())
                skip = False
        self._finish(words, start)
        return self._script

    def _finish(self, words: list[str], line: int) -> None:
        if not words or words[0] in _DECLARATIONS:
            return
        if words[0] in _NEEDS_A_SHELL:
            raise ValueError(f"line {line}: {words[0]!r} needs a shell: write the script out without it")
        self._script.commands.append(Command(tuple(words), line))

    def _assign(self, match: re.Match[str]) -> None:
        """``name=value``, also after export: the value is not split into fields."""
        name, appends = match[1], bool(match[2])
        self._at = match.end()
        value = "" if self._peek() in " \t\n;&|" else " ".join(self._word(split=False))
        before = self._script.variables.get(name, self._environment.get(name, "")) if appends else ""
        line = self._text[self._text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if line.split()[:1] == ["export"]:
            self._script.exported.add(name)
        self._script.variables[name] = before + value

    def _word(self, *, split: bool = True) -> list[str]:
        """The fields of the word that starts here; empty when it expands to nothing."""
        fields, quoted = [""], False
        while self._at < len(self._text) and self._text[self._at] not in " \t\n;&|<>()`":
            char = self._text[self._at]
            if char == "'":
                fields[-1] += self._until("'")
                quoted = True
            elif char == '"':
                self._double_quoted(fields)
                quoted = True
            elif char == "\\":
                fields[-1] += self._text[self._at + 1 : self._at + 2].strip("\n")
                self._at += 2
            elif char == "$":
                _append(fields, self._expansion(), split=split)
            elif char == "{" and re.match(r"\{[^{}\s]*(,|\.\.)[^{}\s]*\}", self._text[self._at :]):
                raise self._refusal("a brace expansion")
            else:
                fields[-1] += char
                self._at += 1
        return [part for part in fields if part] if not quoted else fields

    def _double_quoted(self, fields: list[str]) -> None:
        self._at += 1
        while True:
            if self._at >= len(self._text):
                raise self._refusal("an unclosed quote")
            char = self._text[self._at]
            if char == '"':
                break
            if char == "\\" and self._text[self._at + 1 : self._at + 2] in _ESCAPED:
                fields[-1] += self._text[self._at + 1].strip("\n")
                self._at += 2
            elif char == "`":
                raise self._refusal("a command substitution")
            elif char == "$":
                values = self._expansion()
                fields[-1] += values[0] if values else ""
                fields += values[1:]
            else:
                fields[-1] += char
                self._at += 1
        self._at += 1

    def _expansion(self) -> list[str]:
        """Values of the ``$...`` that starts here: one, or for ``$@`` as many as there are arguments."""
        text, at = self._text, self._at + 1
        if text.startswith("((", at):
            end = text.find("))", at)
            if end < 0:
                raise self._refusal("an unclosed $((")
            expression = self._inside(text[at + 2 : end])
            self._at = end + 2
            return [str(self._arithmetic(expression))]
        if text.startswith("(", at) or text.startswith("'", at):
            raise self._refusal("a command substitution" if text[at] == "(" else "$'...'")
        if text.startswith("{", at):
            return self._braced(at + 1)
        name = _NAME.match(text, at)
        if name is None:
            self._at = at
            return ["$"]
        self._at = name.end()
        return self._value(name[0])

    def _braced(self, at: int) -> list[str]:
        name, depth, end = _NAME.match(self._text, at), 1, at
        while depth and end < len(self._text):
            depth += {"{": 1, "}": -1}.get(self._text[end], 0)
            end += 1
        if name is None or depth:
            raise self._refusal("'${'")
        rest = self._text[name.end() : end - 1]
        self._at = end
        if not rest:
            return self._value(name[0])
        kind = re.match(r":?[-=]", rest)
        if kind is None:
            raise self._refusal(f"'${{{name[0]}{rest}}}'")
        value = self._lookup(name[0])
        if value is not None and (value or not kind[0].startswith(":")):
            return [value]
        default = rest[kind.end() :]
        if default[:1] == "'" == default[-1:]:
            return [_Whole(default[1:-1])]
        quoted = default[:1] == '"' == default[-1:] and len(default) > 1
        return [_Whole(self._inside(default[1:-1]))] if quoted else [self._inside(default)]

    def _inside(self, text: str) -> str:
        """``text`` with its own variables expanded."""
        inner = _Reader(f'"{text}"', self._environment, self._arguments, self._script, self._line())
        return " ".join(inner._word())

    def _value(self, name: str) -> list[str]:
        if name in "@*":
            return list(self._arguments)
        value = self._lookup(name)
        if value is None:
            remedy = f"write ${{{name}:-value}}" if name.isdigit() else "set it in the script or in the environment"
            raise ValueError(f"line {self._line()}: ${name} has no value: {remedy}")
        return [value]

    def _lookup(self, name: str) -> str | None:
        if name.isdigit():
            position = int(name)
            return self._arguments[position - 1] if 0 < position <= len(self._arguments) else None
        self._script.used.add(name)
        return self._script.variables.get(name, self._environment.get(name))

    def _arithmetic(self, expression: str) -> int:
        def value(node: ast.AST) -> int:
            match node:
                case ast.Constant(value=int(number)):
                    return number
                case ast.Name(id=name):
                    return value(ast.parse(self._value(name)[0], mode="eval").body)
                case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                    return _ARITHMETIC[type(op)](value(left), value(right))
                case ast.UnaryOp(op=ast.USub(), operand=operand):
                    return -value(operand)
            raise SyntaxError

        try:
            return value(ast.parse(expression.strip(), mode="eval").body)
        except (SyntaxError, ZeroDivisionError, RecursionError) as error:
            raise ValueError(f"line {self._line()}: $(({expression})) is not integer arithmetic") from error

    def _redirection(self) -> None:
        if self._text.startswith("<<", self._at):
            raise self._refusal("a here-document")
        while self._peek() in "<>&":
            self._at += 1

    def _until(self, quote: str) -> str:
        end = self._text.find(quote, self._at + 1)
        if end < 0:
            raise self._refusal("an unclosed quote")
        start, self._at = self._at + 1, end + 1
        return self._text[start:end]

    def _peek(self) -> str:
        if self._at >= len(self._text):
            return "\n"
        return self._text[self._at]

    def _end_of_line(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + self._first_line

    def _refusal(self, what: str) -> ValueError:
        return ValueError(f"line {self._line()}: {what} needs a shell: write the value out")


def _append(fields: list[str], values: Sequence[str], *, split: bool) -> None:
    """Put an unquoted expansion at the end of ``fields``, split at white space as a shell would."""
    if not split:
        fields[-1] += " ".join(values)
        return
    for position, value in enumerate(values):
        parts = [value] if isinstance(value, _Whole) else value.split()
        if position or (parts != [value] and value[:1].isspace()):
            fields.append("")
        if parts:
            fields[-1] += parts[0]
            fields += parts[1:]
        if parts and parts != [value] and value[-1:].isspace():
            fields.append("")
