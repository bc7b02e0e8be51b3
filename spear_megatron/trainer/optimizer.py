"""Megatron's AdamW and learning-rate schedule, taken apart into "how large is the gradient" and "apply it"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spear_megatron.trainer.config import OptimConfig


class PolicyOptimizer:
    """Optimizer and scheduler of all model chunks of this rank.

    ``megatron`` (a ChainedOptimizer) and ``scheduler`` (an OptimizerParamScheduler) are what a checkpoint stores.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        config: OptimConfig,
        *,
        dtype: torch.dtype,
        use_distributed_optimizer: bool,
        total_steps: int,
        overlap_param_gather: bool = False,
    ) -> None:
        """Build for ``chunks`` wrapped in Megatron's DistributedDataParallel.

        Args:
            dtype: float32 or bfloat16, of the weights; masters and states are float32.
            use_distributed_optimizer: shard masters and states over the data-parallel ranks.
            total_steps: optimizer steps of the whole run, where the decay ends.
            overlap_param_gather: the wrapped chunks gather updated weights in their next forward pass.
        """
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self._chunks = list(chunks)
        self._clip_grad = config.clip_grad
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_param_gather=overlap_param_gather,
        )
        self.megatron: Any = get_megatron_optimizer(settings, self._chunks)
        self.scheduler: Any = OptimizerParamScheduler(
            self.megatron,
            # The first update already moves: Megatron's own ramp starts from init_lr at step 0.
            init_lr=config.lr / max(config.lr_warmup_steps, 1),
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.lr_warmup_steps,
            lr_decay_steps=max(total_steps, config.lr_warmup_steps + 1),
            lr_decay_style=config.lr_decay_style,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
            # A resumed run follows the configuration it was started with now; the checkpoint gives the step count.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._bounds = (config.lr, config.min_lr)

    @property
    def chunks(self) -> list[torch.nn.Module]:
        return self._chunks

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.megatron.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Forget all gradients, the reduced ones in the communication buffers included."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def gradient_norm(self) -> float:
        """Global L2 norm of the finalized gradients, the same on all ranks; may be non-finite. Collective."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def apply(self, gradient_norm: float, *, advance_schedule: bool = True) -> None:
        """Clip by a norm from :meth:`gradient_norm`, update the weights everywhere and advance the schedule."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        if self._clip_grad > 0:
            for optimizer in self.megatron.chained_optimizers:
                parameters = optimizer.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self._clip_grad, total_norm=gradient_norm)
        self.megatron.step_with_ready_grads()
        if advance_schedule:
            self.scheduler.step(1)

    def settle(self) -> None:
        """Complete the weights on every rank, if they are to be gathered in the next forward pass only. Collective.

        Belongs before anything but a forward pass that reads weights: publishing, saving, exporting, swapping.
        """
        for chunk in self._chunks:
            if getattr(chunk, "use_forward_hook", False):
                for group in chunk.bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def follow_configuration(self) -> None:
        """After a checkpoint was loaded: learning rates of today's configuration at the checkpoint's step count."""
        for group in self.megatron.param_groups:
            group["max_lr"], group["min_lr"] = self._bounds
        self.scheduler.step(0)
