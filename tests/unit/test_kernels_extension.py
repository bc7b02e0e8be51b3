"""Which implementation is taken, and what is said when the compiled kernels are missing or do not fit."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from spear_megatron import _C
from spear_megatron.kernels import available, backends, extension, logprobs_compiled, logprobs_eager, token_logprobs
from spear_megatron.kernels.policy_loss import policy_loss
from spear_megatron.kernels.softmax_stats import VocabShard

CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "kl_cov_coef": 1.0}


CACHES = (extension._load, extension.load_autograd, extension.warn_slow_path)


@pytest.fixture
def _missing_extension(monkeypatch: pytest.MonkeyPatch, name: str):
    """A compiled module as if it had never been built."""
    monkeypatch.setitem(sys.modules, f"spear_megatron.{name}", None)
    for function in CACHES:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in CACHES:
        function.cache_clear()


def test_auto_takes_the_compiled_kernel_where_it_fits() -> None:
    report = available()
    assert report["compiled"] and report["reason"] == "" and report["isa"] == _C.isa()
    assert report["token_logprobs"]["cpu"] == "compiled"
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.choose_backend(dtype, torch.device("cpu"), "auto") is logprobs_compiled
    assert backends.choose_backend(torch.float32, torch.device("cpu"), "eager") is logprobs_eager
    assert backends.choose_backend(torch.float32, torch.device("meta"), "auto") is logprobs_eager


def test_other_dtypes_warn_once_and_compiled_refuses_them() -> None:
    extension.warn_slow_path.cache_clear()
    logits, targets = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="no compiled token_logprobs for torch.float64 on cpu"):
        token_logprobs(logits, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_logprobs(logits, targets)
        token_logprobs(logits, targets, implementation="eager")
    with pytest.raises(RuntimeError, match="float64"):
        token_logprobs(logits, targets, implementation="compiled")


@pytest.mark.parametrize("name", ["_C"])
@pytest.mark.usefixtures("_missing_extension")
def test_a_missing_extension_names_the_build_command() -> None:
    report = available()
    assert report["autograd_reason"] == report["reason"]  # its functions are those of the kernels
    assert not report["compiled"] and report["isa"] is None and report["token_logprobs"]["cpu"] == "eager"
    assert extension.BUILD_COMMAND in report["reason"]
    logits, targets = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="pip install .*slower eager implementation"):
        token_logprobs(logits, targets)
    with pytest.raises(RuntimeError, match="pip install"):
        token_logprobs(logits, targets, implementation="compiled")


@pytest.mark.parametrize("name", ["_autograd"])
@pytest.mark.usefixtures("_missing_extension")
def test_without_compiled_autograd_functions_those_in_python_serve() -> None:
    report = available()
    assert report["compiled"] and extension.BUILD_COMMAND in report["autograd_reason"]
    columns = [torch.ones(4, requires_grad=True), *[torch.ones(4)] * 3]
    loss, _ = policy_loss(*columns, mode="gpg", **CLIPS, implementation="compiled")
    assert loss == -4 and loss.grad_fn.name() == "_KnownGradientBackward"


def test_compiled_autograd_functions_are_taken() -> None:
    assert available()["autograd_reason"] == ""
    columns = [torch.ones(4, requires_grad=True), *[torch.ones(4)] * 3]
    loss, _ = policy_loss(*columns, mode="gpg", **CLIPS, implementation="compiled")
    assert loss == -4 and "CppNode<spear::KnownGradient>" in loss.grad_fn.name()


def test_extensions_of_different_builds_do_not_meet() -> None:
    code = (
        "import torch\nfrom spear_megatron import _C\n_C.headers = 'other'\n"
        "from spear_megatron.kernels import available\nprint(available()['autograd_reason'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "different builds" in done.stdout and extension.BUILD_COMMAND in done.stdout, done.stderr


def test_autograd_functions_of_another_torch_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = extension.load_autograd()
    assert module is not None and module.torch_version == torch.__version__.split("+")[0]
    monkeypatch.setattr(torch, "__version__", "9.1.0+cpu")
    extension.load_autograd.cache_clear()
    try:
        assert "compiled for torch 2" in available()["autograd_reason"] and "9.1.0" in available()["autograd_reason"]
    finally:
        extension.load_autograd.cache_clear()


def test_unknown_instruction_sets_are_refused() -> None:
    logits, targets = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        logprobs_compiled.row_stats(logits, targets, VocabShard(0, 4), 1.0, True, isa="sse9")


def test_one_openmp_runtime_and_cheap_import() -> None:
    code = (
        "import sys, spear_megatron; assert 'torch' not in sys.modules\n"
        "import torch, spear_megatron._C\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
        "assert len(names) == 1, names\n"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/maps")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
