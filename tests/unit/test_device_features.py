"""Optional accelerators, with stand-in packages where the real ones are not: probes, refusals, protection."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.device import optional
from spear_megatron.device.features import probe_features
from spear_megatron.device.platform import Platform
from spear_megatron.model.acceleration import Acceleration, check_acceleration, choose_acceleration
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or optional.found("transformer_engine") or optional.found("apex"),
    reason="real devices or packages are here; tests/gpu looks at them",
)
CUDA = Platform(device=torch.device("cuda", 0), backend="nccl")
CPU = Platform(device=torch.device("cpu"), backend="gloo")
WEB_TOOLKIT = "raise SyntaxError('Missing parentheses in call to print')"
RECIPE_CLASSES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
QWEN = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "attention_bias": False, "head_dim": 16, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160,
    "vocab_size": 128, "max_position_embeddings": 128,
}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def engine_files(
    version: str = "2.9.0", pytorch: str = "", checks: str = "", recipes: tuple[str, ...] = RECIPE_CLASSES
) -> dict[str, str]:
    """A package with the modules that megatron-core imports from Transformer Engine."""
    package = "transformer_engine"
    return {
        f"{package}/__init__.py": f"__version__ = {version!r}",
        f"{package}/pytorch/__init__.py": pytorch,
        f"{package}/pytorch/fp8.py": checks,
        f"{package}/pytorch/tensor/__init__.py": "",
        f"{package}/pytorch/optimizers/__init__.py": "",
        f"{package}/common/__init__.py": "",
        f"{package}/common/recipe.py": "\n".join(f"class {name}: pass" for name in recipes),
    }


APEX_FILES = {"apex/__init__.py": "__version__ = '0.1'", "apex/multi_tensor_apply/__init__.py": ""}


@pytest.fixture()
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Puts packages on the import path; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def put(files: dict[str, str]) -> None:
        write(tmp_path, files)
        importlib.invalidate_caches()

    yield put
    optional._hidden.clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", "transformer_engine", "fused_weight_gradient_mlp_cuda"):
            del sys.modules[name]


@pytest.fixture()
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is a device of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)


def test_nothing_is_installed() -> None:
    engine, apex, features = optional.transformer_engine(), optional.apex(), probe_features()
    assert not engine.installed and not apex.installed and "2.9" in engine.remedy
    assert "another package" in apex.remedy
    assert [name for name, item in features.items() if item.available] == [
        "overlap_grad_reduce", "overlap_param_gather", "overlap_p2p_comm",
    ]  # fmt: skip
    assert all(item.reason and item.turns_on for item in features.values())


def test_everything_is_there(stand_in: Any, hopper: None) -> None:
    checks = "\n".join(
        f"def {name}(): return {answer}"
        for name, answer in (
            ("check_fp8_support", "True, ''"),
            ("check_fp8_block_scaling_support", "False, 'needs CUDA >= 12.9'"),
            ("check_mxfp8_support", "False, 'needs compute capability 10.0'"),
        )
    )
    stand_in(engine_files(checks=checks) | APEX_FILES | {"fused_weight_gradient_mlp_cuda.py": ""})
    found = probe_features()
    on = {name for name, item in found.items() if item.available}
    assert {"layers", "fused", "delayed", "tensorwise", "fused_adam", "gradient_accumulation_fusion"} <= on
    assert found["fused"].reason == "cuDNN 9.10"
    assert found["blockwise"].reason == "needs CUDA >= 12.9" and "10.0" in found["mxfp8"].reason
    assert not found["flash"].available and "flash-attn" in found["flash"].reason
    chosen = choose_acceleration(MegatronConfig(fp8="hybrid"), "auto", CUDA, torch.bfloat16)
    assert chosen == Acceleration(transformer_engine=True, weight_gradient_fusion=True)
    assert choose_acceleration(MegatronConfig(), "eager", CUDA, torch.bfloat16) == Acceleration(False, True)
    assert choose_acceleration(MegatronConfig(), "auto", CUDA, torch.float32) == Acceleration(False, True)
    off = MegatronConfig(gradient_accumulation_fusion=False)
    assert choose_acceleration(off, "auto", CUDA, torch.bfloat16) == Acceleration(True, False)


def test_fp8_is_judged_by_the_device_where_the_engine_does_not_tell(stand_in: Any, hopper: None) -> None:
    stand_in(engine_files(recipes=RECIPE_CLASSES[:3]))
    found = probe_features()
    assert found["delayed"].available and found["tensorwise"].available and found["blockwise"].available
    assert "has no MXFP8BlockScaling" in found["mxfp8"].reason


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (engine_files(pytorch="raise RuntimeError('cudnn shared object not found')"), "RuntimeError: cudnn shared"),
        (engine_files(pytorch="raise ImportError('undefined symbol: _ZN3c10')"), "ImportError: undefined symbol"),
        (engine_files(version="1.13.0"), "1.13.0 is too old"),
        ({k: v for k, v in engine_files().items() if "fp8" not in k}, "transformer_engine.pytorch.fp8"),
    ],
)
def test_a_transformer_engine_that_does_not_serve(stand_in: Any, hopper: None, files: Any, text: str) -> None:
    stand_in(files)
    for _ in range(2):  # the second import must not find half of the first
        part = optional.transformer_engine()
        assert part.installed and not part.usable and text in part.reason and part.remedy
    assert choose_acceleration(MegatronConfig(), "auto", CUDA, torch.bfloat16) == Acceleration()
    with pytest.raises(ValueError, match=r"megatron\.fp8=hybrid cannot be had on this machine.*Remedy: "):
        choose_acceleration(MegatronConfig(fp8="hybrid"), "auto", CUDA, torch.bfloat16)


def test_a_newer_transformer_engine_serves_with_a_note(stand_in: Any, hopper: None) -> None:
    stand_in(engine_files(version="2.20.2"))
    part = optional.transformer_engine()
    assert part.usable and "newer" in part.reason


def test_the_namesake_of_apex_is_recognised_without_running_it(stand_in: Any, hopper: None) -> None:
    stand_in({"apex/__init__.py": WEB_TOOLKIT})
    part = optional.apex()
    assert part.installed and not part.usable and "web toolkit" in part.reason
    assert part.remedy == "pip uninstall apex"
    fused = MegatronConfig(gradient_accumulation_fusion=True)
    with pytest.raises(ValueError, match=r"gradient_accumulation_fusion=true.*web toolkit.*pip uninstall apex"):
        choose_acceleration(fused, "auto", CUDA, torch.bfloat16)


def test_apex_without_its_cuda_extension(stand_in: Any, hopper: None) -> None:
    stand_in(APEX_FILES)
    found = probe_features()["gradient_accumulation_fusion"]
    assert not found.available and "no such extension" in found.reason
    assert choose_acceleration(MegatronConfig(), "auto", CUDA, torch.bfloat16) == Acceleration()


@pytest.mark.parametrize("setting", ["fp8=hybrid", "attention_backend=flash", "gradient_accumulation_fusion=true"])
def test_what_a_cpu_host_lacks_is_refused_by_name(setting: str) -> None:
    config = load(Config, None, [f"actor_rollout_ref.actor.megatron.{setting}"]).actor_rollout_ref.actor.megatron
    with pytest.raises(ValueError, match=f"megatron.{setting}.* cannot be had on this machine"):
        choose_acceleration(config, "auto", CPU, torch.bfloat16)
    assert choose_acceleration(MegatronConfig(), "auto", CPU, torch.bfloat16) == Acceleration()


def test_settings_that_no_machine_can_join() -> None:
    shape, fp8 = ModelShape.from_hf_config(QWEN), MegatronConfig(fp8="hybrid")
    check_acceleration(shape, fp8, "auto", "bf16")
    for kernels, dtype in (("eager", "bf16"), ("auto", "fp32")):
        with pytest.raises(ValueError, match=f"kernels=auto and .*dtype=bf16, not {kernels} and {dtype}"):
            check_acceleration(shape, fp8, kernels, dtype)
    with pytest.raises(ValueError, match="multiples of 16, but intermediate_size / tensor size is 40"):
        check_acceleration(shape, MegatronConfig(fp8="hybrid", tensor_model_parallel_size=4), "auto", "bf16")
    for fields, text in (
        ({"overlap_param_gather": True}, "overlap_grad_reduce"),
        ({"ddp_bucket_size": 8}, "overlap_grad_reduce"),
        ({"overlap_p2p_comm": True}, "virtual_pipeline"),
        ({"fp8_recipe": "mxfp8"}, "fp8"),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": False}, "distribut"),
    ):
        with pytest.raises(ValueError, match=text):
            MegatronConfig(**fields)  # type: ignore[arg-type]


def test_micro_batches_are_padded_to_what_fp8_products_need() -> None:
    sizes: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert MegatronConfig(**sizes).token_multiple == 2
    assert MegatronConfig(**sizes, fp8="e4m3").token_multiple == 32
    assert MegatronConfig(**sizes, fp8="e4m3", fp8_recipe="mxfp8").token_multiple == 64
    assert MegatronConfig(**sizes, fp8="hybrid", context_parallel_size=2).token_multiple == 64
    assert MegatronConfig(fp8="hybrid").token_multiple == 16


PROGRAM = """
import sys
from spear_megatron.device.cpu_shim import megatron_on_cpu
if sys.argv[1] == "protected":
    with megatron_on_cpu():
        import megatron.core.fp8_utils, megatron.core.optimizer as optimizer
    print("torch" if optimizer.USING_PYTORCH_OPTIMIZER else "other")
else:
    import megatron.core.fp8_utils
"""


def test_megatron_survives_a_broken_transformer_engine_and_the_namesake_of_apex(tmp_path: Path) -> None:
    broken = "raise RuntimeError('cudnn shared object not found')"
    write(tmp_path, {"transformer_engine/__init__.py": broken, "apex/__init__.py": WEB_TOOLKIT})
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(root)))}
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, mode],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for mode in ("protected", "bare")
    ]  # fmt: skip
    (protected, errors), (_, bare) = (run.communicate(timeout=300) for run in runs)
    assert protected.strip() == "torch", errors
    assert runs[1].returncode != 0 and "cudnn shared object not found" in bare
