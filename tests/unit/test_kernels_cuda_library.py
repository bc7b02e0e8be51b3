"""The CUDA library without a device: it compiles, loads, matches its header, and says clearly what is missing."""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spear_megatron.kernels import available, backends, cuda_library, extension, logprobs_cuda, logprobs_eager
from spear_megatron.kernels.softmax_stats import VocabShard
from spear_megatron.parallel.errors import RunError

REPOSITORY = Path(__file__).resolve().parents[2]
HEADERS = sorted((REPOSITORY / "csrc" / "cuda").glob("*.h"))
C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
CUDA = torch.device("cuda")


@pytest.fixture
def missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place for the library where there is none yet."""
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "_cuda.so")
    cuda_library._load.cache_clear()
    extension.warn_slow_path.cache_clear()
    yield tmp_path / "_cuda.so"
    monkeypatch.undo()
    cuda_library._load.cache_clear()
    extension.warn_slow_path.cache_clear()


@pytest.fixture
def library() -> None:
    if cuda_library.missing_reason():
        pytest.skip(cuda_library.missing_reason())


def declared_functions() -> dict[str, tuple[tuple[type, ...], type]]:
    """Name -> parameter types and result of every function in the headers, as ctypes."""
    text = re.sub(r"//[^\n]*", "", "".join(header.read_text() for header in HEADERS))
    found = {}
    for result, name, parameters in re.findall(r"SPEAR_EXPORT ([\w ]+[ *]+)(\w+)\(([^)]*)\)", text):
        types = [ctypes.c_void_p if "*" in item else C_TYPES[item.split()[0]] for item in parameters.split(",")]
        found[name] = (tuple(types), ctypes.c_char_p if "char" in result else C_TYPES[result.strip()])
    return found


def test_signatures_are_those_of_the_headers() -> None:
    assert declared_functions() == cuda_library.SIGNATURES


def test_missing_library_warns_once_and_compiled_refuses(missing_library: Path) -> None:
    report = available()
    assert report["token_logprobs"]["cuda"] == "eager" and "make cuda" in report["cuda_reason"]
    with pytest.warns(RuntimeWarning, match="CUDA kernels are not built.*slower eager implementation"):
        assert backends.choose_backend(torch.bfloat16, CUDA, "auto") is logprobs_eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(torch.bfloat16, CUDA, "auto") is logprobs_eager
        assert backends.choose_backend(torch.bfloat16, CUDA, "eager") is logprobs_eager
    with pytest.raises(RunError, match="make cuda"):
        backends.choose_backend(torch.bfloat16, CUDA, "compiled")
    with pytest.raises(RunError, match="make cuda"):
        cuda_library.call("spear_token_logprobs_forward")


def test_broken_library_is_reported(missing_library: Path) -> None:
    missing_library.write_bytes(b"not a library")
    assert "cannot be loaded" in cuda_library.missing_reason() and "make cuda" in cuda_library.missing_reason()


def test_cuda_tensors_take_the_library_when_it_loads(library: None) -> None:
    assert available()["token_logprobs"]["cuda"] == "compiled" and available()["cuda_reason"] == ""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for implementation in ("auto", "compiled"):
            assert backends.choose_backend(dtype, CUDA, implementation) is logprobs_cuda
    with pytest.raises(RunError, match="no compiled token_logprobs for torch.float64 on cuda"):
        backends.choose_backend(torch.float64, CUDA, "compiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_calls_without_a_device_say_so(library: None) -> None:
    numbers = torch.zeros(16)
    address = numbers.data_ptr()
    first = (0, None, address, 0, 1, 4, 4, address, 0, 1.0)
    calls: dict[str, tuple[int | float | None, ...]] = {
        "spear_token_logprobs_forward": (*first, 1, address),
        "spear_token_logprobs_backward": (*first, address, address, 4, 4),
        "spear_merge_rows": (0, None, address, 1, 1, 1.0, address, address, address),
        "spear_join_rows": (0, None, address, address, 1, address, 1, 1, address),
        "spear_policy_loss": (0, None, *[address] * 6, 1, 2, 0.8, 1.2, 3.0, 1.0, *[address] * 4),
        "spear_cov_pack": (0, None, *[address] * 5, 1, *[address] * 5),
        "spear_cov_means": (0, None, address, address, None, 1, 1, 1, -1.0, 1.0, address, address),
        "spear_cov_select": (0, None, *[address] * 4, None, 1, 1, None, 0.5, -1.0, 1.0, 0, *[address] * 3),
    }
    for name, arguments in calls.items():
        with pytest.raises(RunError, match=f"{name}: CUDA error (35|100): .*(driver|device)"):
            cuda_library.call(name, *arguments)


def test_arguments_that_cannot_be_right_are_refused_before_the_device(library: None) -> None:
    unknown_dtype = (0, None, None, 3, 1, 4, 4, None, 0, 1.0)
    too_wide = (0, None, None, 0, 1, 1 << 31, 1 << 31, None, 0, 1.0)
    for first in (unknown_dtype, too_wide):
        with pytest.raises(RunError, match="CUDA error 1: invalid argument"):
            cuda_library.call("spear_token_logprobs_forward", *first, 1, None)
        with pytest.raises(RunError, match="CUDA error 1: invalid argument"):
            cuda_library.call("spear_token_logprobs_backward", *first, None, None, first[5], first[6])
    with pytest.raises(RunError, match="CUDA error 1"):  # more real columns than the output has
        cuda_library.call("spear_token_logprobs_backward", 0, None, None, 0, 1, 8, 8, None, 0, 1.0, None, None, 4, 4)


def test_other_kernels_refuse_what_cannot_be_right(library: None) -> None:
    columns, rule = [None] * 6, (0.8, 1.2, 3.0, 1.0)
    calls: list[tuple[str, tuple[int | float | None, ...]]] = [
        ("spear_policy_loss", (0, None, *columns, 1, 4, *rule, *[None] * 4)),  # no such mode
        ("spear_policy_loss", (0, None, *columns, 1, 2, *rule, *[None] * 4)),  # nothing selected
        ("spear_policy_loss", (0, None, *columns, 1 << 31, 0, *rule, *[None] * 4)),
        ("spear_merge_rows", (0, None, None, 0, 4, 1.0, None, None, None)),  # no shard
        ("spear_cov_pack", (0, None, *columns[:5], 1 << 31, *columns[:5])),
        ("spear_cov_means", (0, None, None, None, None, 1, 5, 6, -1.0, 1.0, None, None)),  # a row beyond all tokens
        ("spear_cov_select", (0, None, *columns[:4], None, 0, 5, None, 0.5, -1.0, 1.0, 0, None, None, None)),
    ]
    for name, arguments in calls:
        with pytest.raises(RunError, match=f"{name}: CUDA error 1: invalid argument"):
            cuda_library.call(name, *arguments)


def test_scratch_grows_with_the_tokens(library: None) -> None:
    small, large = (
        [cuda_library.measure(f"spear_{name}_scratch", count) for name in ("policy_loss", "cov_select")]
        for count in (1, 100_000)
    )
    assert small[0] == 6 and large[0] == 6 * 98 and large[1] - small[1] == 2 * 99_999 + 24_999
    assert cuda_library.measure("spear_cov_means_scratch", 3, 4097) == 12


def test_no_rows_are_no_work(library: None) -> None:
    cuda_library.call("spear_token_logprobs_forward", 0, None, None, 1, 0, 8, 8, None, 0, 1.0, 1, None)


def test_shards_are_passed_on_as_the_header_orders_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Python side passes, recorded by a stand-in of the library on CPU tensors."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(logprobs_cuda, "call", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 77}))
    logits = torch.zeros(6, 40, dtype=torch.bfloat16)[::2, :32]
    targets, grads, out = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 5), torch.zeros(3, 32)
    shard = VocabShard(first_column=64, columns=30)
    stats = logprobs_cuda.row_stats(logits, targets, shard, 0.5, True)
    logprobs_cuda.logits_grad(logits, targets, shard, 0.5, grads, out)
    first = (-1, 77, logits.data_ptr(), 1, 3, 80, 30, targets.data_ptr(), 64, 0.5)
    assert stats.shape == (3, 4) and stats.dtype == torch.float32
    assert calls[0] == ("spear_token_logprobs_forward", *first, 1, stats.data_ptr())
    assert calls[1] == ("spear_token_logprobs_backward", *first, grads.data_ptr(), out.data_ptr(), 32, 32)
