"""The part of a run that makes a step's trajectories: in turn with training, or one step ahead of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spear_megatron.data.index import IndexRow
from spear_megatron.rollout.acceptance import acceptance_metrics
from spear_megatron.rollout.collect import Collected, Tasks, merge
from spear_megatron.trainer.ahead import Generated, decode_generated, decode_held, encode_generated, encode_held
from spear_megatron.trainer.frame import RunFrame
from spear_megatron.trainer.metrics import staleness_metrics
from spear_megatron.trainer.scoring import GroupId


@dataclass
class RunRollouts(RunFrame):
    """Collecting trajectories. With ``trainer.async=1`` those of the next step are rolled out while a step trains:

    publish theta_t, begin the rollouts of step t + 2 in the background, train step t + 1 (rolled out with theta_t-1),
    wait for the rollouts, publish theta_t+1. Between them nothing is under way: that is when evaluation and checkpoints
    have their turn, and a checkpoint holds the whole step that waits to be trained on.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ahead: Generated | None = None
        self._begun: int | None = None

    @abstractmethod
    def _informative(self, step: int, index: Sequence[IndexRow]) -> set[GroupId]:
        """Groups whose rewards differ."""

    def collect(self, step: int) -> Collected:
        """This step's task groups: rolled out now by the current policy, or ahead by the one before.

        With ``algorithm.filter_groups`` (dynamic sampling) prompts are drawn until enough groups have rewards that
        differ, or the allowed number of batches is spent. The others are kept for figures and statistics.
        """
        generated, self._ahead = self._ahead, None
        if generated is None:
            generated = self._fill_up(step, self._collect_batch(step, self.settings.prompts_per_step, batch=0))
        if self.trainer.async_ and not self._is_last(step):
            self.parts.collector.begin(self._tasks(step + 1, self.settings.prompts_per_step, batch=0))
            self._begun = step + 1
        self._metrics.update(generated.metrics)
        self._metrics.update(staleness_metrics(generated.collected.index, step))
        self._metrics["training/policy_version"] = float(generated.version)
        return generated.collected

    def finish_rollouts(self) -> None:
        """Wait for the rollouts that were begun for the next step, if any, so that the weights may be published."""
        if self._begun is None:
            return
        step, self._begun = self._begun, None
        collected = self.parts.collector.end()
        self._give_back(collected)
        generated = self._fill_up(step, collected)
        sampled = sum(sum(row.sampled_lengths) for row in generated.collected.index)
        seconds = generated.collected.seconds
        figures = {"timing_s/gen_ahead": seconds, "perf/gen_throughput": sampled / max(seconds, 1e-9)}
        self._ahead = Generated(step, generated.version, generated.collected, {**generated.metrics, **figures})

    def _fill_up(self, step: int, collected: Collected) -> Generated:
        """A step's first batch and, with dynamic sampling, as many more as it takes."""
        wanted, rule = self.settings.prompts_per_step, self.algorithm.filter_groups
        batches, metrics = 1, {}
        if rule.enable:
            while batches < rule.max_num_gen_batches:
                missing = wanted - len(self._informative(step, collected.index))
                if missing <= 0:
                    break
                collected = merge(collected, self._collect_batch(step, missing, batch=batches))
                batches += 1
            metrics["filter/gen_batches"] = float(batches)
        longest, partial = self.settings.sampling.max_new_tokens, self.settings.partial_rollout
        metrics.update(acceptance_metrics(collected.acceptances, longest, partial=partial))
        return Generated(step, self._published, collected, metrics)

    def _collect_batch(self, step: int, count: int, batch: int) -> Collected:
        collected = self.parts.collector.collect(self._tasks(step, count, batch))
        self._give_back(collected)
        return collected

    def _tasks(self, step: int, count: int, batch: int) -> Tasks:
        """The next prompts of the stream: as many as groups are wanted, or more with over-sampling."""
        more = self.settings.over_sampling > 1
        candidates = math.ceil(count * self.settings.over_sampling) if more else count
        return Tasks(
            purpose="train",
            step=step,
            prompts=tuple(self.parts.prompts.draw(candidates)),
            num_samples=self.settings.samples_per_prompt,
            sampling=self.settings.sampling,
            wanted=count if more else None,
            batch=batch,
        )

    def _give_back(self, collected: Collected) -> None:
        for acceptance in collected.acceptances:
            self.parts.prompts.give_back(acceptance.dropped)

    def _rollout_states(self) -> dict[str, Any]:
        """What a checkpoint holds of the step that waits and of groups that go on; collective."""
        states, parallel, timeout_s = {}, self.parts.parallel, self.trainer.collective_timeout_s
        temperature = self.settings.sampling.temperature
        if self._ahead is not None:
            states["ahead"] = encode_generated(self._ahead, parallel, temperature=temperature, timeout_s=timeout_s)
        if self.settings.partial_rollout:
            held = self.parts.collector.held
            states["held"] = encode_held(held, parallel, temperature=temperature, timeout_s=timeout_s)
        return states

    def _restore_rollouts(self, states: Mapping[str, Any]) -> None:
        """Take up the step that waited; collective. Without ``trainer.async`` its prompts are rolled out anew.

        So are groups that were to go on, without ``partial_rollout``: their prompts are in the queue as it is. The same
        happens to what was sampled at another temperature, whose log-probs are of another policy, and to what is longer
        than conversations may be now.
        """
        if "held" in states and self.settings.partial_rollout:
            self._restore_held(states["held"])
        if "ahead" not in states:
            return
        ahead = decode_generated(states["ahead"], self.parts.parallel, self.parts.prompts.at)
        lengths = [length for row in ahead.collected.index for length in row.segment_lengths]
        reason = self._misfit(states["ahead"], max(lengths, default=0)) if self.trainer.async_ else "trainer.async=0"
        if reason is None:
            self._ahead = ahead
            return
        tasks = sorted({row.id.task for row in ahead.collected.index})
        self.parts.prompts.give_back(tasks)
        self._notes.append(
            f"{reason}: {len(tasks)} groups that were rolled out ahead for step {ahead.step} are dropped, "
            "their prompts come first"
        )

    def _restore_held(self, state: Mapping[str, Any]) -> None:
        held = decode_held(state, self.parts.parallel)
        reason = self._misfit(state, max((group.longest for _, group in held), default=0))
        if reason is None:
            self.parts.collector.hold(held)
        elif held:
            self._notes.append(f"{reason}: {len(held)} groups that were to go on are dropped, their prompts start anew")

    def _misfit(self, state: Mapping[str, Any], longest: int) -> str | None:
        """Why trajectories of a checkpoint, of segments up to ``longest`` tokens, cannot be trained on now."""
        then, now = state.get("temperature"), self.settings.sampling.temperature
        if then != now:
            return f"actor_rollout_ref.rollout.temperature was {then} and is {now}"
        limit = self.settings.max_segment_length
        if limit is not None and longest > limit:
            return f"{longest} tokens of one segment exceed data.max_prompt_length + data.max_response_length = {limit}"
        return None
