"""The configuration loader, on small example dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from spear_megatron.config.describe import field_table, flatten, to_yaml
from spear_megatron.config.loader import load, nearest_key, valid_keys
from spear_megatron.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    """Step size of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two
    moments."""
    clip_grad: float | None = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Actor:
    optim: Optim = field(default_factory=Optim)
    mode: Literal["auto", "eager", "on"] = "auto"
    """Which kernels run."""
    steps: int = 3
    use_kl: bool = False
    name: str = "actor"
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Root:
    actor: Actor = field(default_factory=Actor)
    files: tuple[str, ...] = ("a.jsonl",)
    train: str | tuple[str, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    teacher: Optim | None = None
    length: int = 16


@dataclass(frozen=True, kw_only=True)
class Needs:
    path: str
    """Folder of the model."""
    size: int = 1


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(*overrides: str, root: type = Root, path: Path | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load(root, path, overrides)
    text = str(caught.value)
    assert "\n" not in text and "omegaconf" not in text.lower()
    return text


def test_defaults_alone() -> None:
    assert load(Root) == Root()


def test_yaml_only_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "actor:\n  optim: {lr: 1e-6}\nfiles: [x, y]\n")
    config = load(Root, path, ["actor.steps=7"])
    assert config == Root(actor=Actor(optim=Optim(lr=1e-6), steps=7), files=("x", "y"))


def test_of_several_bases_the_later_wins(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", "actor: {steps: 2, use_kl: true}\n")
    write(tmp_path, "two.yaml", "actor: {steps: 3}\n")
    leaf = write(tmp_path, "leaf.yaml", "base: [one.yaml, two.yaml]\n")
    actor = load(Root, leaf).actor
    assert actor.steps == 3 and actor.use_kl


def test_another_name_drops_the_arguments_of_the_one_before(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "reward: {name: math, kwargs: {correct: 1.0, wrong: -1.0}}\n")
    leaf = write(tmp_path, "leaf.yaml", "base: base.yaml\nreward: {name: 'mine:Reward'}\n")
    assert load(Config, leaf).reward.kwargs == {}
    assert load(Config, base, ["reward.kwargs.wrong=0.0"]).reward.kwargs == {"correct": 1.0, "wrong": 0.0}
    both = ["reward.kwargs.high=3", "reward.name=mine:Reward"]
    for order in (both, both[::-1]):
        assert load(Config, base, order).reward.kwargs == {"high": 3}
    assert load(Config, base, ["reward.name=math"]).reward.kwargs == {"correct": 1.0, "wrong": -1.0}


def test_base_is_relative_to_the_file_and_child_wins(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "root.yaml", "actor: {steps: 1, name: root}\nlength: 5\n")
    write(tmp_path, "sub/mid.yaml", "base: ../root.yaml\nactor: {steps: 2}\n")
    leaf = write(tmp_path, "leaf.yaml", "base: sub/mid.yaml\nactor: {use_kl: true}\n")
    config = load(Root, leaf)
    assert (config.actor.steps, config.actor.name, config.length, config.actor.use_kl) == (2, "root", 5, True)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("actor.optim.lr=1e-6", "actor.optim.lr", 1e-6),
        ("actor.optim.lr=1", "actor.optim.lr", 1.0),
        ("actor.optim.betas=[0.8, 0.9]", "actor.optim.betas", (0.8, 0.9)),
        ("actor.optim.clip_grad=null", "actor.optim.clip_grad", None),
        ("files=[]", "files", ()),
        ("files=['a b', c]", "files", ("a b", "c")),
        ("train=x.jsonl", "train", "x.jsonl"),
        ("train=[x, y]", "train", ("x", "y")),
        ("actor.name='quoted = text'", "actor.name", "quoted = text"),
        ("actor.name=001", "actor.name", "001"),
        ("actor.name=", "actor.name", ""),
        ("actor.name=\\boxed{}", "actor.name", "\\boxed{}"),
        ("actor.note=2024", "actor.note", "2024"),
        ("actor.note=null", "actor.note", None),
        ("actor.mode=on", "actor.mode", "on"),
        ("actor.use_kl=True", "actor.use_kl", True),
        ("kwargs.depth.max=3", "kwargs", {"depth": {"max": 3}}),
        ("kwargs={a: [1, x]}", "kwargs", {"a": [1, "x"]}),
        ("length=${actor.steps}", "length", 3),
        ("actor.name=run-${length}", "actor.name", "run-16"),
    ],
)
def test_override_values(override: str, key: str, expected: object) -> None:
    value = flatten(load(Root, None, [override]))[key]
    assert value == expected and type(value) is type(expected)


def test_later_override_wins_and_optional_section_opens() -> None:
    config = load(Root, None, ["length=1", "length=2", "teacher.lr=0.5"])
    assert config.length == 2 and config.teacher == Optim(lr=0.5)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("actor.optim.lrr=1", ["'actor.optim.lrr'", "did you mean 'actor.optim.lr'", "override"]),
        ("lr=1", ["'lr'", "did you mean 'teacher.lr'"]),
        ("acter.steps=1", ["'acter'", "did you mean 'actor'"]),
        ("trainer.nnodes=2", ["'trainer'", "a key of verl, here: torchrun --nnodes"]),
        ("critic.optim.lr=1", ["'critic'", "a key of verl", "there is no critic"]),
        ("actor_rollout_ref.actor.grad_clip=1", ["a key of verl, here: actor_rollout_ref.actor.optim.clip_grad"]),
        ("actor..steps=1", ["'actor.'"]),
        ("actor.steps=two", ["actor.steps must be an int", "'two'", "'actor.steps=two'"]),
        ("actor.steps=1.5", ["actor.steps must be an int", "1.5"]),
        ("actor.steps=true", ["actor.steps must be an int", "true"]),
        ("actor.steps=null", ["actor.steps", "null"]),
        ("actor.use_kl=1", ["actor.use_kl must be true or false"]),
        ("actor.mode=fast", ["actor.mode must be one of 'auto', 'eager', 'on'", "'fast'"]),
        ("actor.optim.betas=[1]", ["actor.optim.betas", "2 values"]),
        ("actor.optim.betas=[1, x]", ["actor.optim.betas[1] must be a float", "'x'"]),
        ("actor.optim.lr=.nan", ["actor.optim.lr must be a float"]),
        ("actor.optim.lr=-1", ["actor.optim: lr must be positive, got -1.0", "'actor.optim.lr=-1'"]),
        ("actor=3", ["actor must be a mapping", "3"]),
        ("actor=null", ["actor must be a mapping", "null"]),
        ("files=abc", ["files must be a list of string"]),
        ("kwargs=3", ["kwargs must be a mapping"]),
        ("kwargs={1: 2}", ["kwargs has the key 1"]),
        ("length=${no.such}", ["length", "no.such"]),
        ("length=${length}", ["length", "ecursive"]),
        ("length=${", ["length", "${"]),
        ("length=[1", ["length", "not valid YAML"]),
        ("length", ["'length'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
    ],
)
def test_bad_overrides_are_one_sentence(override: str, parts: list[str]) -> None:
    text = message(override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: [1\nb: 2\n", ["not valid YAML", "line 2", "'b: 2'"]),
        ("- 1\n- 2\n", ["mapping", "not a list"]),
        ("42\n", ["mapping"]),
        ("just text\n", ["unknown key 'just text'", "run.yaml"]),
        ("length: 1\nlength: 2\n", ["duplicate key length", "line 2"]),
        ("length: x\n", ["length must be an int", "run.yaml"]),
        ("actor: {step: 1}\n", ["unknown key 'actor.step' in", "run.yaml", "'actor.steps'"]),
        ("base: 3\n", ["base", "run.yaml"]),
        ("base: run.yaml\n", ["circle"]),
        ("null: 1\n", ["run.yaml"]),
        ("length: !!python/object:os.system x\n", ["run.yaml"]),
        ("actor: {optim: {lr: -1}}\n", ["actor.optim: lr must be positive", "run.yaml"]),
        ("actor: {name: 3}\n", ["actor.name must be a string", "3"]),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, content: str, parts: list[str]) -> None:
    text = message(path=write(tmp_path, "run.yaml", content))
    assert all(part in text for part in parts), text


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        load(Root, tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="parent.yaml does not exist.*run.yaml"):
        load(Root, write(tmp_path, "run.yaml", "base: parent.yaml\n"))
    with pytest.raises(ValueError, match="is a folder"):
        load(Root, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="UTF-8"):
        load(Root, tmp_path / "binary.yaml")


def test_the_origin_named_is_the_one_that_set_the_value(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "actor: {steps: 4}\nlength: bad\n")
    assert "run.yaml" in message("actor.steps=5", path=path)
    assert "run.yaml" not in message("length=worse", path=path)


def test_required_field() -> None:
    assert "path is required" in message(root=Needs)
    assert load(Needs, None, ["path=x"]) == Needs(path="x")
    assert field_table(Needs)[0] == ("path", "string", "required", "Folder of the model.")


def test_empty_file_gives_defaults(tmp_path: Path) -> None:
    assert load(Root, write(tmp_path, "run.yaml", "# nothing\n")) == Root()


NAMES = ["1e-6", "yes", "a: b", "${length}", "\\boxed{}", "", " x ", "null", "???x", "line\nbreak", "'q\"", "\u00e9"]


@pytest.mark.parametrize("name", NAMES)
def test_yaml_round_trip(tmp_path: Path, name: str) -> None:
    actor = Actor(name=name, optim=Optim(lr=1e-7, clip_grad=None))
    config = replace(Root(), actor=actor, kwargs={"k": [1, {"z": name}]}, teacher=Optim(lr=2.0))
    assert load(Root, write(tmp_path, "resolved.yaml", to_yaml(config))) == config


def test_flatten_and_valid_keys_agree() -> None:
    flat = flatten(Root())
    assert flat["actor.optim.lr"] == 1e-3 and flat["teacher"] is None and flat["kwargs"] == {}
    assert set(flat) <= set(valid_keys(Root))


def test_field_table_reads_docs_types_and_defaults() -> None:
    rows = {row.key: row for row in field_table(Root)}
    assert rows["actor.optim.lr"] == ("actor.optim.lr", "float", "0.001", "Step size of AdamW.")
    assert rows["actor.optim.betas"].doc == "Decay rates of the two moments."
    assert rows["actor.optim.clip_grad"].type == "float or null"
    assert rows["actor.mode"].type == "one of 'auto', 'eager', 'on'"
    assert rows["teacher"].default == "null" and rows["teacher.lr"].default == "0.001"


def test_nearest_key_prefers_the_same_last_part() -> None:
    assert nearest_key("x.y.lr", ["x.y.lx", "deep.er.lr"]) == "deep.er.lr"
    assert nearest_key("z", []) is None


@dataclass(frozen=True, kw_only=True)
class Sections:
    """One line.

    Attributes:
        a: first, with: a colon
            and a second line.
        b, c: shared. d: on the same line, like
            so.

    More text: not an entry.
    """

    a: int = 1
    b: int = 2
    c: int = 3
    d: int = 4


def test_docs_from_an_attributes_section() -> None:
    docs = {row.key: row.doc for row in field_table(Sections)}
    assert docs["a"] == "first, with: a colon and a second line."
    assert (docs["b"], docs["c"], docs["d"]) == ("shared.", "shared.", "on the same line, like so.")


@dataclass(frozen=True, kw_only=True)
class Reserved:
    async_: int = 0
    """How many steps ahead."""
    class_: str
    plain_: int = 1

    def __post_init__(self) -> None:
        if self.async_ < 0:
            raise ValueError(f"async must not be negative, got {self.async_}")


def test_a_key_that_python_reserves_has_a_field_with_an_underscore(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "async: 2\nclass: x\n")
    given = load(Reserved, path, ["plain_=5"])
    assert given == Reserved(async_=2, class_="x", plain_=5)
    assert load(Reserved, write(tmp_path, "b.yaml", to_yaml(given))) == given and "async: 2" in to_yaml(given)
    assert list(flatten(given)) == valid_keys(Reserved) == ["async", "class", "plain_"]
    assert [(row.key, row.doc) for row in field_table(Reserved)][0] == ("async", "How many steps ahead.")
    for overrides, text in (
        (["class=x", "async_=1"], "unknown key 'async_'.* did you mean 'async'"),
        ([], "class is required"),
        (["class=x", "async=-1"], "async must not be negative.*async=-1"),
        (["class=x", "async=true"], "async must be an int"),
    ):
        with pytest.raises(ValueError, match=text):
            load(Reserved, None, overrides)
