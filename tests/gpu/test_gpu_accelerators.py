"""Transformer Engine, Apex and FP8 on a real device, wherever they are installed: a tiny model trains one step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_hf

from spear_megatron.device.features import Feature, probe_features
from spear_megatron.model.acceleration import choose_acceleration
from spear_megatron.types import Row, TrajectoryId

SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 256, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def features() -> dict[str, Feature]:
    return probe_features()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    for module in ("megatron.core", "omegaconf", "transformers"):  # the kernels alone are checked without them
        pytest.importorskip(module)
    return str(make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", std=0.02, **SIZES))


def need(feature: Feature) -> None:
    if not feature.available:
        pytest.skip(f"{feature.name}: {feature.reason}")


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for sample in range(4):
        ids = torch.randint(0, 512, (33 + 8 * sample,), generator=generator, dtype=torch.int32)
        mask = torch.arange(len(ids)) >= 5
        made.append(Row(TrajectoryId(1, 0, sample), 0, ids, mask, -mask.float(), mask.float() * (-1) ** sample))
    return made


def one_step(folder: str, **settings: Any) -> tuple[list[torch.Tensor], float, Any]:
    """Log-probs before the update, its gradient norm, and Megatron's settings."""
    from spear_megatron.cli.build import build_actor
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.parallel.state import initialize

    overrides = [f"actor_rollout_ref.model.path={folder}", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256"]
    kernels = settings.pop("kernels", "auto")
    overrides.append(f"actor_rollout_ref.actor.kernels={kernels}")
    overrides += [f"actor_rollout_ref.actor.megatron.{name}={value}" for name, value in settings.items()]
    config = load(Config, None, overrides)
    parallel = initialize()
    try:
        actor, _ = build_actor(
            config, parallel, ModelShape.from_folder(folder), config.actor_rollout_ref.actor.optim, 10
        )
        filled, _ = actor.log_probs(rows())
        result = actor.update(filled)
        assert result.skipped is None
        return [row.old_log_probs for row in filled], result.metrics["actor/grad_norm"], actor.chunks[0].config
    finally:
        parallel.destroy()


def test_layers_of_transformer_engine_agree_with_the_plain_ones(features: dict[str, Feature], model: str) -> None:
    need(features["layers"])
    found, norm, _ = one_step(model)
    expected, plain_norm, _ = one_step(model, kernels="eager")
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=0.05)
    assert norm == pytest.approx(plain_norm, rel=0.1)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_step_in_fp8(features: dict[str, Feature], model: str, recipe: str) -> None:
    need(features["layers"])
    need(features[recipe])
    found, norm, settings = one_step(model, fp8="hybrid", fp8_recipe=recipe)
    expected, _, _ = one_step(model)
    assert settings.fp8 == "hybrid" and math.isfinite(norm) and norm > 0
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=0.3)


def test_fused_weight_gradients(features: dict[str, Feature], model: str) -> None:
    need(features["gradient_accumulation_fusion"])
    _, fused, settings = one_step(model, gradient_accumulation_fusion="true", kernels="eager")
    _, plain, _ = one_step(model, gradient_accumulation_fusion="false", kernels="eager")
    assert settings.gradient_accumulation_fusion and fused == pytest.approx(plain, rel=1e-2)


def test_fused_adam_is_the_one_that_megatron_takes(features: dict[str, Feature]) -> None:
    need(features["fused_adam"])
    from megatron.core import optimizer

    assert not optimizer.USING_PYTORCH_OPTIMIZER


def test_what_the_device_lacks_is_refused_by_name(features: dict[str, Feature]) -> None:
    from spear_megatron.device.platform import detect_platform
    from spear_megatron.parallel.config import MegatronConfig

    lacking = [name for name in ("delayed", "tensorwise", "blockwise", "mxfp8") if not features[name].available]
    if not lacking:
        pytest.skip("this device has every FP8 recipe")
    megatron = MegatronConfig(fp8="hybrid", fp8_recipe=lacking[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be had on this machine"):
        choose_acceleration(megatron, "auto", detect_platform(), torch.bfloat16)
