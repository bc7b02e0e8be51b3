"""The CUDA kernels inside larger operations: the LM head, CUDA graphs, streams, no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spear_megatron.kernels import available, linear_token_logprobs, token_logprobs


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def head_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 64, generator=generator).to(device, dtype)
    weight = torch.randn(1111, 64, generator=generator).mul(0.5).to(device, dtype)
    targets = torch.randint(0, 1000, (33,), generator=generator).to(device)
    mask = (torch.rand(33, generator=generator) < 0.6).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, mask


def head_results(inputs: tuple[Tensor, ...], max_logits_bytes: int | None, implementation: str) -> list[Tensor]:
    hidden, weight, targets, mask = inputs
    log_probs, entropy = linear_token_logprobs(
        hidden, weight, targets, mask=mask, temperature=0.8, valid_vocab=1000, max_logits_bytes=max_logits_bytes,
        implementation=implementation,
    )  # fmt: skip
    grads = torch.autograd.grad((log_probs - 0.3 * entropy).sum(), (hidden, weight))
    return [log_probs.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize("max_logits_bytes", [None, 1])
def test_lm_head_agrees_with_the_cpu(device: torch.device, max_logits_bytes: int | None) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = head_results(head_inputs(device, torch.float32), max_logits_bytes, "compiled")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    expected = head_results(head_inputs(torch.device("cpu"), torch.float64), max_logits_bytes, "eager")
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value.cpu().double(), reference, rtol=1e-4, atol=1e-4)


def test_lm_head_in_bf16_agrees_with_the_eager_implementation(device: torch.device) -> None:
    inputs = head_inputs(device, torch.bfloat16)
    found, expected = (head_results(inputs, None, name) for name in ("compiled", "eager"))
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value.float(), reference.float(), rtol=2e-2, atol=2e-2)


def test_auto_takes_the_kernels(device: torch.device) -> None:
    assert available()["token_logprobs"]["cuda"] == "compiled"
    logits = torch.randn(5, 300, device=device, dtype=torch.bfloat16)
    targets = torch.arange(5, device=device)
    both = [token_logprobs(logits, targets, implementation=name) for name in ("auto", "compiled")]
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])


def test_forward_and_backward_never_wait(device: torch.device, no_waiting: None) -> None:
    logits = torch.randn(64, 5001, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(64, dtype=torch.int64, device=device)
    log_probs, entropy = token_logprobs(logits * 1, targets, implementation="compiled", inplace_backward=True)
    (log_probs.sum() + entropy.sum()).backward()


def test_head_without_mask_never_waits(device: torch.device, no_waiting: None) -> None:
    hidden = torch.randn(16, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(1000, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(16, dtype=torch.int64, device=device)
    log_probs, entropy = linear_token_logprobs(hidden, weight, targets, implementation="compiled")
    (log_probs.sum() + entropy.sum()).backward()


def test_capture_into_a_graph_and_replay_on_new_logits(device: torch.device) -> None:
    logits = torch.randn(40, 3001, device=device, dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    targets = torch.arange(40, device=device)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        log_probs, entropy = token_logprobs(leaf, targets, temperature=0.7, implementation="compiled")
        (grad,) = torch.autograd.grad((log_probs + entropy).sum(), leaf)
        return log_probs.detach(), entropy.detach(), grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(logits.flip(0) * 2)
    graph.replay()
    replayed = [value.clone() for value in captured]
    for value, reference in zip(replayed, step(), strict=True):
        assert torch.equal(value, reference)


def test_work_is_ordered_on_the_current_stream(device: torch.device) -> None:
    source = torch.randn(64, 38016, device=device, dtype=torch.bfloat16)
    targets = torch.zeros(64, dtype=torch.int64, device=device)
    expected, _ = token_logprobs(source, targets, implementation="compiled")
    logits = torch.zeros_like(source)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the copy comes late: a kernel on another stream would read zeros
        logits.copy_(source)
        found, _ = token_logprobs(logits, targets, implementation="compiled")
    stream.synchronize()
    assert torch.equal(found, expected)
