"""The reader of run scripts against bash itself, and what it refuses."""

from __future__ import annotations

import random
import shutil
import subprocess

import pytest

from spear_megatron.config.shell import read_script

ENVIRONMENT = {"HOME": "/h", "PWD": "/p", "EMPTY": ""}
TEXTS = [
    "run plain 'single $x' \"double\" a'b'\"c\"d \\$y \\\n  continued",
    "x=3\nrun $x ${x} \"$x\" '$x' ${x}y pre$x \"a ${x} b\"",
    "a='two words'\nrun $a \"$a\" x$a\"$a\"y",
    "lead=' a b '\nrun x${lead}y",
    "run ${1:-$PWD}/data ${EMPTY:-none} ${EMPTY-kept}end ${x:-\"q r\"} $HOME",
    "ROOT=${1:-$PWD}\nfiles=\"['$ROOT/a','$ROOT/b']\"\nrun k=\"$files\" k=['a','b'] k='[\"a\",\"b\"]'",
    "n=5\nm=$(( (n + 3) * 2 ))\nrun $m $((m/-3)) $(( -7 / 2 )) $((-7 % 3)) $(( $n - m )) $((n))",
    "export A=1 B=two\nexport C\nA=$A$B\nrun $A",
    "x=1 # comment\n# run no\nrun a#b '#c' # d",
    "x=\nrun [$x] \"$x\"e",
    "set -x\nmkdir -p a b; run one && run two\nrun three | cat",
    "run a 2>&1 b > /dev/null c",
    "run +k=1 ++k=2 k=3e-6 k=a=b k='error' k=\"a\\\"b\\$c\\d\"",
    "x=a\nx+=b\nrun $x",
    "run --opt $@ end \"$@\"",
    "lr=1e-6\nif_not=3\nrun lr=$lr done=$if_not",
    "run a${x:-'q  r'}b ${y:-\" p \"}",
    "run it\\'s \"it's\" $",
]


def by_bash(text: str, arguments: list[str]) -> list[list[str]]:
    """Words of every ``run`` command as bash sees them."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash to compare with")
    each = "for word in \"$@\"; do [ -n \"$word\" ] && printf '%s\\0' \"$word\" >&3; done"
    prelude = f"run() {{ {each}; printf '\\n' >&3; }}\n"
    script = f"exec 3>&1 >/dev/null 2>/dev/null\nset -f\nmkdir() {{ :; }}\n{prelude}{text}\n"
    done = subprocess.run(
        [bash, "--noprofile", "--norc", "-c", script, "script", *arguments],
        capture_output=True, text=True, timeout=30, env=ENVIRONMENT | {"PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    return [line.split("\0")[:-1] for line in done.stdout.split("\n")[:-1]]


def by_reader(text: str, arguments: list[str]) -> list[list[str]]:
    commands = read_script(text, ENVIRONMENT, arguments).commands
    return [list(command.words[1:]) for command in commands if command.words[0] == "run"]


@pytest.mark.parametrize("arguments", [[], ["/one", "two words"]], ids=["alone", "arguments"])
@pytest.mark.parametrize("text", TEXTS)
def test_words_are_those_of_bash(text: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    expected = by_bash(text.replace("$PWD", "/p"), arguments)
    assert expected and by_reader(text.replace("$PWD", "/p"), arguments) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x=1\nif true; then", ["line 2", "'if'"]),
        ("for i in 1 2; do", ["line 1", "'for'"]),
        ("x=$(date)", ["line 1", "command substitution"]),
        ('run "a `date`"', ["command substitution"]),
        ("run `date`", ["line 1"]),
        ("\n\nrun $missing", ["line 3", "$missing", "set it"]),
        ("run $2", ["$2", "${2:-value}"]),
        ("run a{1,2}", ["brace"]),
        ("run ${x%y}", ["${x%y}"]),
        ("run ${x", ["line 1"]),
        ("run 'open", ["unclosed quote"]),
        ('run "open', ["unclosed quote"]),
        ("run $((1 << 3))", ["integer arithmetic"]),
        ("run $((1/0))", ["integer arithmetic"]),
        ("x=x\nrun $((x))", ["integer arithmetic"]),
        ("x=1.5\nrun $((x * 2))", ["integer arithmetic"]),
        ("run $((1", ["$(("]),
        ("x=(a b)", ["line 1", "'('"]),
        ("f() { run; }", ["line 1"]),
        ("cat << END\nEND", ["here-document"]),
        ("run $'a'", ["$'...'"]),
    ],
)
def test_what_needs_a_shell_is_refused_in_one_sentence(text: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read_script(text, {})
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), caught.value


def test_variables_used_and_exported() -> None:
    script = read_script("a=1\nb=$a\nexport c=2\nd=3\nexport d\nrun $((b + 1)) \"${e:-$c}\"", {})
    assert script.variables == {"a": "1", "b": "1", "c": "2", "d": "3"}
    assert script.used == {"a", "b", "c", "e"} and script.exported == {"c", "d"}
    assert script.commands[-1].line == 6


def test_damaged_scripts_are_read_or_refused() -> None:
    rng, refused = random.Random(0), 0
    whole = "\n".join(TEXTS)
    for _ in range(2000):
        start = rng.randrange(len(whole))
        text = list(whole[start : start + rng.randrange(1, 120)])
        for _ in range(rng.randrange(4)):
            text[rng.randrange(len(text))] = rng.choice("$(){}'\"\\`;|&<>#=\n 1a\x00é")
        try:
            read_script("".join(text), ENVIRONMENT, ["one"])
        except ValueError as error:
            refused += 1
            assert "line " in str(error)
    assert 300 < refused < 1900
