"""linear_token_logprobs against float64 references: masks, slices of the vocabulary, main_grad, refusals."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spear_megatron.kernels import linear_token_logprobs

TEMPERATURE = 0.8


class Case:
    """A head with random hidden states; ``weights`` [2, T] make a scalar of both results."""

    def __init__(self, seed: int, rows: int, width: int, vocab: int, density: float, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(vocab, width, generator=generator).mul(0.7).to(dtype).requires_grad_()
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        self.mask = torch.rand(rows, generator=generator) < density
        self.weights = torch.randn(2, rows, generator=generator)

    def loss(self, log_probs: Tensor, entropy: Tensor) -> Tensor:
        return (self.weights[0] * log_probs + self.weights[1] * entropy).sum()

    def expected(self, valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs, entropies, gradients of hidden and weight in float64, from plain torch."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        log_p = torch.log_softmax((hidden @ weight[:valid].T) / TEMPERATURE, dim=-1)
        keep = self.mask.double()
        log_probs = log_p.gather(1, self.targets[:, None]).squeeze(1) * keep
        entropy = -(log_p.exp() * log_p).sum(-1) * keep
        grads = torch.autograd.grad(self.loss(log_probs, entropy), (hidden, weight))
        return log_probs.detach(), entropy.detach(), *grads


def run(case: Case, weight: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    used = case.weight if weight is None else weight
    log_probs, entropy = linear_token_logprobs(
        case.hidden, used, case.targets, mask=case.mask, temperature=TEMPERATURE, **options
    )
    return log_probs, entropy


@pytest.mark.parametrize("max_logits_bytes", [None, 1])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_values_and_gradients_match_float64(
    implementation: str, density: float, max_logits_bytes: int | None
) -> None:
    for seed, (rows, width, vocab, valid) in enumerate([(1, 8, 257, 257), (13, 24, 1111, 1000), (40, 16, 600, 513)]):
        case = Case(seed, rows, width, vocab, density, torch.float32)
        case.targets %= valid
        log_probs, entropy = run(
            case, valid_vocab=valid, max_logits_bytes=max_logits_bytes, implementation=implementation
        )
        grads = torch.autograd.grad(case.loss(log_probs, entropy), (case.hidden, case.weight))
        expected = case.expected(valid)
        assert log_probs.shape == entropy.shape == (rows,) and log_probs[~case.mask].eq(0).all()
        bounds = (1e-5, 1e-5, 1e-4, 1e-4)
        for value, reference, bound in zip((log_probs, entropy, *grads), expected, bounds, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=bound, atol=bound)
        assert grads[1][valid:].eq(0).all() and grads[0][~case.mask].eq(0).all()


def test_finite_differences_in_both_inputs() -> None:
    case = Case(3, 5, 4, 300, 0.6, torch.float64)

    def scalar(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs, entropy = linear_token_logprobs(
            hidden, weight, case.targets, mask=case.mask, max_logits_bytes=1, implementation="eager"
        )
        return case.loss(log_probs, entropy)

    assert torch.autograd.gradcheck(scalar, (case.hidden, case.weight), atol=1e-6)


def test_the_computed_rows_decide_the_memory_and_masked_rows_are_never_touched() -> None:
    case = Case(4, 30, 8, 400, 0.2, torch.float32)
    with torch.no_grad():
        case.hidden[~case.mask] = torch.nan
    log_probs, entropy = run(case)
    assert log_probs.isfinite().all() and entropy.isfinite().all()
    grads = torch.autograd.grad(case.loss(log_probs, entropy), (case.hidden, case.weight))
    assert all(grad.isfinite().all() for grad in grads)


def test_kept_and_recomputed_logits_agree_and_each_repeats_its_bits() -> None:
    case = Case(5, 50, 32, 2000, 0.5, torch.float32)

    def everything(max_logits_bytes: int | None) -> tuple[Tensor, ...]:
        log_probs, entropy = run(case, max_logits_bytes=max_logits_bytes)
        return log_probs, entropy, *torch.autograd.grad(case.loss(log_probs, entropy), (case.hidden, case.weight))

    kept, sliced = everything(None), everything(25 * 300 * 4)
    for one, other in zip(kept, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, everything(None), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sliced, everything(25 * 300 * 4), strict=True))


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    case = Case(6, 9, 8, 300, 0.7, torch.float32)
    loss = case.loss(*run(case))
    first = torch.autograd.grad(loss, (case.hidden, case.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (case.hidden, case.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("max_logits_bytes", [None, 1])
def test_bfloat16_is_near_the_exact_result(max_logits_bytes: int | None) -> None:
    case = Case(7, 20, 16, 700, 0.6, torch.bfloat16)
    log_probs, entropy = run(case, max_logits_bytes=max_logits_bytes)
    assert log_probs.dtype == entropy.dtype == torch.float32
    grads = torch.autograd.grad(case.loss(log_probs, entropy), (case.hidden, case.weight))
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    for value, reference in zip((log_probs, entropy, *grads), case.expected(700), strict=True):
        assert (value.double() - reference).norm() <= 0.02 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_logits_bytes", [None, 1])
def test_the_weight_gradient_is_added_to_main_grad(max_logits_bytes: int | None, dtype: torch.dtype) -> None:
    case = Case(8, 20, 16, 700, 0.6, dtype)
    log_probs, entropy = run(case, max_logits_bytes=max_logits_bytes)
    (plain,) = torch.autograd.grad(case.loss(log_probs, entropy), case.weight)
    case.weight.main_grad = torch.ones(case.weight.shape, dtype=torch.float32)
    case.weight.grad_added_to_main_grad = False
    case.loss(*run(case, max_logits_bytes=max_logits_bytes)).backward()
    assert case.weight.grad_added_to_main_grad and case.weight.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(case.weight.main_grad - 1, plain.float(), rtol=tolerance, atol=tolerance)
    case.weight.grad = None
    case.weight.zero_out_wgrad = True
    case.loss(*run(case, max_logits_bytes=max_logits_bytes)).backward()
    assert case.weight.grad.eq(0).all()  # autograd adds the embedding's share, and Megatron's hook adds the sum


def test_without_entropy_and_without_a_weight_gradient() -> None:
    case = Case(9, 11, 8, 300, 0.5, torch.float32)
    weight = case.weight.detach()
    log_probs, entropy = linear_token_logprobs(case.hidden, weight, case.targets, with_entropy=False)
    assert entropy is None
    (grad,) = torch.autograd.grad(log_probs.sum(), case.hidden)
    hidden = case.hidden.detach().requires_grad_()
    reference = torch.log_softmax(hidden @ weight.T, -1).gather(1, case.targets[:, None]).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(reference, hidden)[0], rtol=1e-4, atol=1e-5)


class LargeTensors(TorchDispatchMode):
    """Counts tensors of at least so many bytes that operations make, and their live memory."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.live, self.peak, self.made = least, dict[int, int](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = not any(value.alias_info for value in func._schema.returns)
        if fresh and isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.least:
            storage = result.untyped_storage()
            self.live[storage._cdata] = storage.nbytes()
            self.made += 1
            weakref.finalize(storage, self.live.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("density", [0.3, 1.1])
def test_one_slice_of_logits_is_held_at_a_time(density: float) -> None:
    case = Case(10, 64, 4, 4096, density, torch.float32)
    budget = int(case.mask.sum()) * 512 * 4
    with LargeTensors(budget) as forward:
        results = run(case, case.weight.detach(), max_logits_bytes=budget)
    assert forward.peak == budget
    with LargeTensors(budget) as backward:
        torch.autograd.grad(case.loss(*results), case.hidden)
    assert backward.peak == budget


def test_a_weight_gradient_of_another_dtype_is_made_in_pieces() -> None:
    case = Case(13, 3, 64, 40_000, 1.1, torch.bfloat16)
    case.weight.main_grad = torch.zeros(case.weight.shape)
    case.weight.grad_added_to_main_grad = False
    loss = case.loss(*run(case))
    with LargeTensors(case.weight.nbytes) as backward:
        loss.backward()
    assert backward.made == 1  # what stands in for the gradient so that the hook fires
    expected = case.expected(40_000)[3]
    assert (case.weight.main_grad - expected).abs().max() <= 0.03 * expected.abs().max()


def test_a_frozen_weight_gets_no_gradient_and_no_memory_for_one() -> None:
    case = Case(11, 6, 64, 4096, 1.1, torch.float32)
    results = run(case, case.weight.detach())
    with LargeTensors(case.weight.nbytes) as backward:
        torch.autograd.grad(case.loss(*results), case.hidden)
    assert backward.peak == 0


def test_a_second_derivative_is_refused() -> None:
    case = Case(12, 5, 8, 300, 0.7, torch.float32)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.loss(*run(case)), case.hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 7)}, "must agree"),
        ({"weight": torch.zeros(9, 8, dtype=torch.float64)}, "must agree"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets must be int64 \[4\]"),
        ({"targets": torch.full((4,), 9)}, r"in \[0, 9\)"),
        ({"mask": torch.ones(4)}, r"mask must be bool \[4\]"),
        ({"max_logits_bytes": 0}, "max_logits_bytes=0"),
        ({"valid_vocab": 10}, "valid_vocab=10"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "hidden": torch.zeros(4, 8), "weight": torch.zeros(9, 8), "targets": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip
    arguments |= change
    inputs = (arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"))
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(*inputs, **arguments)
