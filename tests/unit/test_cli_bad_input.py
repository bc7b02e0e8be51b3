"""Bad input to the commands: one line that names the key or file and the remedy, before a model is built."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spear_megatron.__main__ import main
from spear_megatron.data.jsonl import read_jsonl
from spear_megatron.data.tiny import main as tiny_main
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.files import write_atomically
from spear_megatron.parallel.launch import check_launch
from spear_megatron.parallel.paths import check_input_folder, check_output_folder, os_error_text

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CONFIG = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
MODEL = "actor_rollout_ref.model.path"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("input") / "model", seed=0)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and nothing that a command could start: what comes that far fails."""
    import spear_megatron.cli.session as session

    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)

    def started(*args: object, **named: object) -> None:
        raise AssertionError("process groups were opened")

    monkeypatch.setattr(session, "initialize", started)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses ``arguments``."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and "[Errno" not in text, text
    return text


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    below, long = tmp_path / "file" / "x", tmp_path / ("x" * 300)
    names = {name: tmp_path / name for name in ("missing", "file", "dangling", "loop")}
    return {**names, "below": below, "long": long}


PLACES = ("missing", "file", "dangling", "loop", "below", "long")


@pytest.mark.parametrize("place", PLACES)
def test_no_folder_where_one_is_read(
    place: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = places[place], tmp_path / "out"
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    commands: list[list[object]] = [
        *([command, *CONFIG, f"{MODEL}={path}"] for command in ("train", "sft", "plan")),
        ["evaluate", *CONFIG, "--model", path, "--out", out], ["chat", path, "--message", "x"],
        ["convert", "hf-to-mcore", "--hf", path, "--out", out], ["view", path], ["plot", path, "--text"],
        ["doctor", path], ["corpus", "--source", tmp_path / "chats.jsonl", "--out", out, "--model", path],
        ["train", "--config", path], ["train", "--from-spear-script", path],
    ]  # fmt: skip
    for command in commands:
        if place == "file" and command[1] in ("--config", "--from-spear-script"):
            continue
        text = refused(capsys, *command)
        assert str(path)[:100] in text and re.search("give|check|name|shorten|not the directory|does not exist", text)
    assert not out.exists()


@pytest.mark.parametrize("place", ["file", "dangling", "loop", "below", "long", "readonly"])
def test_no_folder_where_one_is_written(
    place: str,
    places: dict[str, Path],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "locked").mkdir()
    path = {**places, "readonly": tmp_path / "locked" / "run"}[place]
    real = os.access  # a root user may write everywhere: the answer of the file system is taken from it here
    monkeypatch.setattr(os, "access", lambda name, mode: "locked" not in str(name) and real(name, mode))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n')
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    chats.write_text(json.dumps({"messages": turns}))
    given = f"{MODEL}={model}"
    commands: list[list[object]] = [
        ["train", *CONFIG, given, f"trainer.default_local_dir={path}"],
        ["sft", *CONFIG, given, f"sft.default_local_dir={path}"],
        ["evaluate", *CONFIG, given, "--out", path],
        ["corpus", "--source", chats, "--model", model, "--out", path],
        ["prepare", "--dataset", "aime-2024", "--source", tasks, "--out", path],
        ["convert", "hf-to-mcore", "--hf", model, "--out", path],
    ]
    for command in commands:
        assert str(path)[:100] in refused(capsys, *command)


Damage = Callable[[Path], None]


def rewrite(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def other_config(**fields: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "other architecture": (other_config(model_type="llama"), "model_type 'llama' is not supported: use"),
    "layers without types": (other_config(num_hidden_layers=3), "layer_types names 2 layers"),
    "no such size": (other_config(num_hidden_layers=10**9, layer_types=None), "no size of a model"),
    "config is a folder": (
        lambda folder: (folder / "config.json").unlink() or (folder / "config.json").mkdir(), "config.json is a folder"
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "save the model as safetensors"),
    "cut weights": (cut, "model.safetensors is damaged"),
    "pointer": (rewrite("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "lost tensor": (drop_tensor, "lacks tensor model.norm.weight"),
    "no shard": (
        rewrite("model.safetensors.index.json", b'{"weight_map": {"x": "a.safetensors"}}'), "names the file a.safetens"
    ),
}  # fmt: skip
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "empty": (rewrite("tokenizer.json", b""), "no usable tokenizer (JSONDecodeError"),
    "a list": (rewrite("tokenizer_config.json", b"[]"), "no usable tokenizer (AttributeError"),
    "binary template": (rewrite("chat_template.jinja", bytes(range(256))), "no usable tokenizer (UnicodeDecodeError"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "add chat_template.jinja"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models_are_told_before_the_start(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, part = DAMAGES[name]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    out = tmp_path / "out"
    for command in (
        ["train", *CONFIG, f"{MODEL}={folder}", f"trainer.default_local_dir={out}"],
        ["sft", *CONFIG, f"{MODEL}={folder}", f"sft.default_local_dir={out}"],
        ["evaluate", *CONFIG, f"{MODEL}={folder}", "--out", out],
    ):
        text = refused(capsys, *command)
        assert part in text and str(folder) in text
    assert not out.exists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_damaged_tokenizers_name_their_folder(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, part = TOKENIZERS[name]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    text = refused(capsys, "train", *CONFIG, f"{MODEL}={folder}", f"trainer.default_local_dir={tmp_path / 'out'}")
    assert part in text and str(folder) in text


def test_a_tokenizer_of_a_larger_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = make_tiny_model(tmp_path / "small", seed=0, max_vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, small / name)
    text = refused(capsys, "train", *CONFIG, f"{MODEL}={small}", f"trainer.default_local_dir={tmp_path / 'out'}")
    assert "token ids up to 452" in text and "vocab_size of" in text and str(small) in text


def test_a_dry_run_tells_what_this_machine_lacks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (tmp_path / "file").write_text("x")
    given = [f"{MODEL}={folder}", f"trainer.default_local_dir={tmp_path / 'file'}"]
    assert main(["train", *CONFIG, "--dry-run", *given]) == 0
    assert "# on this machine: trainer.default_local_dir=" in capsys.readouterr().out


VALUES = {
    "data.train_files=": "data.train_files is given no value",
    "sft.train_files=''": "sft.train_files names no file",
    f"trainer.seed={10**30}": "trainer.seed must be an integer of 64 bits",
    "trainer.collective_timeout_s=1e30": "trainer.collective_timeout_s must be a positive number of seconds, at most",
    "trainer.num_threads=100000": "trainer.num_threads must be at most",
    "sft.lr_warmup_steps=800": "sft.lr_warmup_steps=800 leaves nothing of sft.total_training_steps=800",
    "sft.default_local_dir=''": "sft.default_local_dir is empty",
}


@pytest.mark.parametrize("value", VALUES)
def test_values_are_refused_by_their_key(value: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert VALUES[value] in refused(capsys, "sft", *CONFIG, f"{MODEL}={model}", value)


def test_a_cold_start_does_not_replace_a_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    given = [f"{MODEL}={model}", f"sft.default_local_dir={tmp_path / 'run'}"]
    assert "holds the checkpoints of a run" in refused(capsys, "sft", *CONFIG, *given)


@pytest.mark.parametrize("name, text, part", [
    ("junk.yaml", bytes(range(256)), "not a text file"),
    ("long.yaml", b"trainer: {seed: " + b"9" * 5000 + b"}", "cannot be read"),
])  # fmt: skip
def test_configuration_files(
    name: str, text: bytes, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(text)
    said = refused(capsys, "train", "--config", tmp_path / name)
    assert part in said and name in said


@pytest.mark.parametrize("content, part", [
    (b"PAR1\0\0", "prepare"), ('{"a": "é"}'.encode("utf-16"), "UTF-8"), (None, "check the path"),
])  # fmt: skip
def test_data_files(content: bytes | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=part) as caught:
        list(read_jsonl(path))
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row["a"] for _, row in read_jsonl(tmp_path / "bom.jsonl")] == [1, 2]


@pytest.mark.parametrize("variables, part", [
    ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be an integer of at least 1, got 'x'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "need the variable RANK"),
    ({"RANK": "1"}, "RANK=1 is set"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"), ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"), ({"MASTER_ADDR": "a"}, "need the variable RANK"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "need the variable MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "the largest is 65535"),
])  # fmt: skip
def test_half_a_launch_names_the_variable(
    variables: dict[str, str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        check_launch()
    assert "start all ranks with torchrun" in str(caught.value)


@pytest.mark.parametrize("variables", [
    {}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
])  # fmt: skip
def test_whole_launches_pass(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_launch()


def test_a_taken_port_and_absent_ranks_are_one_line() -> None:
    code = (
        "import os, socket, sys\nfrom spear_megatron.__main__ import explain\n"
        "from spear_megatron.parallel.state import initialize\n"
        "taken = socket.socket(); taken.bind(('127.0.0.1', 0)); taken.listen()\n"
        "os.environ.update(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')\n"
        "os.environ['MASTER_PORT'] = str(taken.getsockname()[1])\n"
        "for port in (os.environ['MASTER_PORT'], '0'):\n"
        "    os.environ['MASTER_PORT'] = port\n"
        "    try: initialize(timeout_s=1)\n"
        "    except Exception as error: print(explain(error), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 0 and len(said) == 2, done.stderr
    assert all("rank 0 cannot meet the others at MASTER_ADDR:MASTER_PORT=127.0.0.1:" in line for line in said)


def test_errors_of_the_operating_system_have_a_remedy() -> None:
    for number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS):
        text = os_error_text(OSError(number, os.strerror(number), "some/file"))
        assert text is not None and text.startswith("some/file ") and ":" in text
    renamed = os_error_text(OSError(errno.EISDIR, "x", "a.tmp", None, "b"))
    assert renamed is not None and renamed.startswith("b is a folder")
    full = os_error_text(OSError(errno.ENOSPC, "x"))
    assert full is not None and "the disk is full: free some space" in full
    assert os_error_text(OSError("no number")) is None and os_error_text(OSError(errno.EIO, "x", "file")) is None


def test_folders_that_are_there_pass(tmp_path: Path) -> None:
    assert check_input_folder(tmp_path, "give one") == tmp_path
    check_output_folder(tmp_path, "--out")
    check_output_folder(tmp_path / "a" / "b", "--out", new=True)
    with pytest.raises(ValueError, match="--out.* exists"):
        check_output_folder(tmp_path, "--out", new=True)


def test_devices_are_not_replaced() -> None:
    with pytest.raises(ValueError, match="no ordinary file"):
        write_atomically(Path("/dev/zero"), b"x")
    assert Path("/dev/zero").is_char_device()


def test_making_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        tiny_main([str(tmp_path / "file")])
    assert stop.value.code == 2 and "cannot be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    ["quickstart", "--config", "no.yaml", "--out", "OUT"], ["quickstart", "--ranks", "0", "--out", "OUT"],
    ["quickstart", "--out", "HELD"], ["study", "--report-only", "--out", "OUT"],
    ["study", "--budget-only", "--study", "OUT"], ["kill_test", "--kills", "0"], ["kill_test", "--work", "HELD"],
    ["launch", "--"],
    ["ray_fleet", "--address", "x", "--nodes", "1", "--servers-per-node", "1", "--tp", "1"],
])  # fmt: skip
def test_tools(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "mine").write_text("x")
    places = {"OUT": str(tmp_path / "out"), "HELD": str(tmp_path / "held")}
    module = importlib.import_module(command[0])
    try:
        code = module.main([places.get(word, word) for word in command[1:]])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and "[Errno" not in said, said
    assert not (tmp_path / "out").exists() and (tmp_path / "held" / "mine").exists()
