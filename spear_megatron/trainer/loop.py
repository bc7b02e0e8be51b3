"""The training loop: the front door of the code."""

from __future__ import annotations

from spear_megatron.trainer.run import Run


def train(run: Run) -> None:
    """Train until the last step or a stop signal: one call per phase, in the order of the algorithm.

    Every rank runs this function with the same steps and takes the same branches. A step is: collect groups with the
    current policy, shape their rewards and filter them, choose earlier successes to imitate, bring rows to the ranks
    that train on them, evaluate old log-probs and hold the engine's against them, evaluate reference log-probs,
    compare rewards within groups, take the optimizer steps on J_GRPO + gamma * J_SIL, push this step's successes for
    later, publish the weights, record, save. With ``trainer.async=1`` collecting begins the rollouts of the next step,
    which end before the weights are published.
    """
    run.begin()
    for step in run.remaining_steps():
        with run.phase("gen"):
            collected = run.collect(step)
            run.begin_training()
        with run.phase("filter"):
            scores = run.score(step, collected.index)
        with run.phase("replay"):
            replayed = run.select_replay(step, scores, collected.index)
        with run.phase("pack"):
            rows = run.deal(collected, scores, replayed)
        with run.phase("old_log_prob"):
            rows = run.old_log_probs(rows)
            scores = run.check_rollout(step, scores, rows)
        with run.phase("ref"):
            rows = run.reference_log_probs(rows)
        with run.phase("adv"):
            scores = run.estimate(scores, collected.index, rows)
            rows = run.with_advantages(rows, scores)
        with run.phase("update_actor"):
            for mini_batch in run.mini_batches(rows):
                run.update(step, mini_batch)
        with run.phase("push"):
            run.push(collected, scores, rows)
        with run.phase("gen"):
            run.finish_rollouts()
        with run.phase("publish"):
            run.publish(version=step)
        with run.phase("testing"):
            run.evaluate_if_due(step)
        run.record(step, collected, scores)
        run.save_if_due(step)
        if run.stopping:
            break
    run.finish()
