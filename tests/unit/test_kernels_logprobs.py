"""token_logprobs against float64 references: values, gradients, padding, extremes, repeatability, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spear_megatron.kernels import available, logprobs_compiled, logprobs_eager, token_logprobs
from spear_megatron.kernels.softmax_stats import VocabShard, merge_stats, row_gradients, saved_for_backward

ISAS = ("generic", "avx2", "avx512")
usable_isas = ISAS[: ISAS.index(available()["isa"] or "generic") + 1]


def reference(logits: Tensor, targets: Tensor, temperature: float, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 leaf of the real columns, log-probs and entropy by torch's log_softmax."""
    x = logits.detach().double().clamp(min=-1e30).requires_grad_()  # 0 * -inf would poison its gradient
    log_p = torch.log_softmax(x[:, :valid] / temperature, dim=-1)
    return x, log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def assert_close(log_probs: Tensor, entropy: Tensor, expected_lp: Tensor, expected_h: Tensor) -> None:
    error = (log_probs - expected_lp).abs() / expected_lp.abs().clamp(min=1)
    assert error.max() <= 2e-6, f"log-prob error {error.max():.2e}"
    assert (entropy - expected_h).abs().max() <= 1e-5


def random_case(seed: int, rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 13, 16, 63, 64, 65, 1000, 2048, 2049, 4099])
def test_values_and_gradients_match_float64(implementation: str, dtype: torch.dtype, vocab: int) -> None:
    for seed, (rows, temperature) in enumerate([(1, 1.0), (7, 0.6), (4, 1.7)]):
        logits, targets = random_case(seed, rows, vocab, dtype)
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = token_logprobs(leaf, targets, temperature=temperature, implementation=implementation)
        assert log_probs.dtype == entropy.dtype == torch.float32
        x, expected_lp, expected_h = reference(logits, targets, temperature, vocab)
        assert_close(log_probs, entropy, expected_lp, expected_h)
        weights = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed))
        (grad,) = torch.autograd.grad((weights[0] * log_probs + weights[1] * entropy).sum(), leaf)
        (expected,) = torch.autograd.grad((weights[0] * expected_lp + weights[1] * expected_h).sum(), x)
        assert grad.dtype == dtype
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
        assert ((grad - expected).abs() <= 2e-6 + rounding * expected.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", usable_isas)
def test_every_instruction_set_agrees_with_the_eager_implementation(isa: str, dtype: torch.dtype) -> None:
    shard = VocabShard(first_column=100, columns=2177)
    logits, targets = random_case(3, 5, 2200, dtype)
    targets = targets + 50  # some belong to another shard
    stats = logprobs_compiled.row_stats(logits, targets, shard, 0.8, True, isa)
    expected = logprobs_eager.row_stats(logits.double(), targets, shard, 0.8, True)
    assert torch.equal(stats[:, [0, 3]].double(), expected[:, [0, 3]])
    torch.testing.assert_close(stats.double(), expected, rtol=1e-6, atol=1e-5)
    plain = logprobs_compiled.row_stats(logits, targets, shard, 0.8, False, isa)
    assert torch.equal(plain[:, [0, 1, 3]], stats[:, [0, 1, 3]]) and plain[:, 2].eq(0).all()
    result = merge_stats(expected[None], 0.8)
    grads = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    row_grads = torch.cat((torch.stack((result.maximum, result.total, result.entropy), 1), grads), 1)
    out, expected_out = torch.full_like(logits, 7.0), torch.full_like(logits, 7.0).double()
    logprobs_compiled.logits_grad(logits, targets, shard, 0.8, row_grads.float(), out, isa)
    logprobs_eager.logits_grad(logits.double(), targets, shard, 0.8, row_grads, expected_out)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(out.double(), expected_out, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_columns_take_no_part(implementation: str, dtype: torch.dtype) -> None:
    valid, vocab = 1003, 1024
    logits, targets = random_case(5, 6, vocab, dtype)
    targets %= valid
    logits[:, valid:] = 1e4  # would dominate every softmax
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, targets, valid_vocab=valid, implementation=implementation)
    _, expected_lp, expected_h = reference(logits, targets, 1.0, valid)
    assert_close(log_probs, entropy, expected_lp, expected_h)
    (log_probs + entropy).sum().backward()
    assert torch.all(leaf.grad[:, valid:] == 0) and torch.all(leaf.grad[:, :valid] != 0)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_extreme_logits(implementation: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(6, 3001, generator=generator) * 2 - 1) * 1e4
    logits[1] = 1e4  # uniform at a large offset
    logits[2, 5:] = -torch.inf
    logits[3, :2900] = -torch.inf  # the first blocks hold nothing finite
    logits[4] = -1e4
    logits[4, 17] = 1e4
    targets = torch.tensor([int(logits[0].argmax()), 3000, 4, 2950, 17, 9])
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, targets, temperature=temperature, implementation=implementation)
    x, expected_lp, expected_h = reference(logits, targets, temperature, 3001)
    assert_close(log_probs, entropy, expected_lp, expected_h)
    (log_probs + 0.5 * entropy).sum().backward()
    (expected,) = torch.autograd.grad((expected_lp + 0.5 * expected_h).sum(), x)
    finite = logits > -torch.inf
    assert torch.all(leaf.grad[~finite] == 0)
    torch.testing.assert_close(leaf.grad[finite].double(), expected[finite], rtol=1e-5, atol=1e-6 / temperature)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_unusable_rows_give_nan_and_leave_the_others_alone(implementation: str, bad: float | None) -> None:
    logits, targets = random_case(1, 3, 5000, torch.float32)
    expected, expected_h = token_logprobs(logits, targets, implementation=implementation)
    logits[1, 4321 if bad is not None else slice(None)] = -torch.inf if bad is None else bad
    log_probs, entropy = token_logprobs(logits, targets, implementation=implementation)
    assert log_probs[1].isnan() and entropy[1].isnan()
    assert torch.equal(log_probs[::2], expected[::2]) and torch.equal(entropy[::2], expected_h[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [151936, 152064])
def test_full_size_vocabulary(dtype: torch.dtype, vocab: int) -> None:
    logits, targets = random_case(2, 3, vocab, dtype, scale=2.0)
    logits[1] = 0  # uniform: the longest sum
    logits[2, 77] = 40.0  # peaked: small terms beside a large one
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, targets, valid_vocab=vocab, implementation="compiled")
    x, expected_lp, expected_h = reference(logits, targets, 1.0, vocab)
    assert_close(log_probs, entropy, expected_lp, expected_h)
    (log_probs + entropy).sum().backward()
    (expected,) = torch.autograd.grad((expected_lp + expected_h).sum(), x)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=rounding, atol=1e-9)


def test_eager_gradients_pass_finite_differences() -> None:
    logits, targets = random_case(4, 3, 11, torch.float64)
    leaf = logits.requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(x, targets % 9, temperature=1.3, valid_vocab=9, implementation="eager")

    assert torch.autograd.gradcheck(function, leaf)


def test_compiled_gradient_is_the_slope_of_its_own_values() -> None:
    logits, targets = random_case(5, 4, 300, torch.float32)
    leaf, step = logits.clone().requires_grad_(), 2.0**-6
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))

    def value(x: Tensor) -> Tensor:
        log_probs, entropy = token_logprobs(x, targets, temperature=1.3, implementation="compiled")
        return (log_probs - 0.5 * entropy).double()

    (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
    slope = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).double().sum(1), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_for_any_thread_count(dtype: torch.dtype) -> None:
    logits, targets = random_case(6, 37, 3001, dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            log_probs, entropy = token_logprobs(leaf, targets, temperature=0.9, implementation="compiled")
            (log_probs.square() + entropy).sum().backward()
            results.append((log_probs.detach(), entropy.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_row_strides_views_and_empty_input(implementation: str) -> None:
    logits, targets = random_case(7, 12, 1200, torch.float32)
    strided = logits[::3, 5:1005]
    dense = strided.contiguous()
    picked = targets[::3] % 1000
    a = token_logprobs(strided, picked, implementation=implementation)
    b = token_logprobs(dense, picked, implementation=implementation)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    base = logits.clone().requires_grad_()
    token_logprobs(base[::3, 5:1005], picked, implementation=implementation)[0].sum().backward()
    leaf = dense.clone().requires_grad_()
    token_logprobs(leaf, picked, implementation=implementation)[0].sum().backward()
    assert torch.equal(base.grad[::3, 5:1005], leaf.grad) and base.grad[1::3].eq(0).all()
    none = torch.empty(0, 9, requires_grad=True)
    log_probs, entropy = token_logprobs(none, targets[:0], implementation=implementation)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,) and none.grad.shape == (0, 9)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_without_entropy_and_with_unused_outputs(implementation: str) -> None:
    logits, targets = random_case(8, 5, 700, torch.float32)
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, targets, with_entropy=False, implementation=implementation)
    both, both_entropy = token_logprobs(leaf, targets, implementation=implementation)
    assert entropy is None and torch.equal(log_probs, both)
    (alone,) = torch.autograd.grad(log_probs.sum(), leaf)
    (unused,) = torch.autograd.grad(both.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(alone, unused, rtol=0, atol=0)
    (of_entropy,) = torch.autograd.grad(both_entropy.sum(), leaf)
    torch.testing.assert_close(of_entropy.sum(-1), torch.zeros(5), rtol=0, atol=1e-5)
    assert of_entropy.abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_rows_without_gradient_are_exactly_zero(implementation: str) -> None:
    logits, targets = random_case(9, 4, 900, torch.bfloat16)
    logits[2] = torch.nan
    leaf = logits.requires_grad_()
    log_probs, _ = token_logprobs(leaf, targets, implementation=implementation)
    log_probs[:2].sum().backward()
    assert leaf.grad[2:].eq(0).all() and leaf.grad[:2].ne(0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", usable_isas)
def test_sums_of_equal_terms_do_not_drift(isa: str, dtype: torch.dtype) -> None:
    # Every addition of equal terms is rounded the same way, so that the error grows with their number.
    depth = -12 * torch.rand(60, generator=torch.Generator().manual_seed(12))
    logits = depth[:, None].repeat(1, 4096).to(dtype)
    logits[:, 0] = 0
    targets = torch.arange(60) % 2
    stats = logprobs_compiled.row_stats(logits, targets, VocabShard(0, 4096), 1.0, True, isa)
    log_probs, entropy, _ = logprobs_compiled.merge_rows(stats[None], 1.0, True)
    _, expected_lp, expected_h = reference(logits, targets, 1.0, 4096)
    assert_close(log_probs, entropy, expected_lp, expected_h)


@pytest.mark.parametrize("temperature", [1e-9, 1e9])
def test_the_outermost_temperatures_have_gradients(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -torch.inf], [5.0, 5.0, 5.0, 5.0]])
    for implementation in ("compiled", "eager"):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = token_logprobs(
            leaf, torch.tensor([2, 1]), temperature=temperature, implementation=implementation
        )
        x, expected_lp, expected_h = reference(logits, torch.tensor([2, 1]), temperature, 4)
        assert_close(log_probs, entropy, expected_lp, expected_h)
        (grad,) = torch.autograd.grad((log_probs + entropy).sum() * temperature, leaf)
        (expected,) = torch.autograd.grad((expected_lp + expected_h).sum() * temperature, x)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_a_second_derivative_is_refused(implementation: str) -> None:
    leaf = random_case(13, 3, 20, torch.float32)[0].requires_grad_()
    targets = torch.tensor([0, 1, 2])
    by_operator = torch.ops.spear.token_logprobs(leaf * 1, targets, 20, 1.0, True, implementation, True)
    for log_probs in (token_logprobs(leaf, targets, implementation=implementation)[0], by_operator[0]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(log_probs.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_gives_the_same_gradient_in_the_logits(implementation: str, dtype: torch.dtype) -> None:
    source, targets = random_case(10, 6, 1031, dtype)
    grads = []
    for inplace in (False, True):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1.0
        log_probs, entropy = token_logprobs(
            logits, targets % 1030, valid_vocab=1030, implementation=implementation, inplace_backward=inplace
        )
        loss = (log_probs * 0.5 - entropy).sum()
        loss.backward(retain_graph=True)
        grads.append(leaf.grad.clone())
        if inplace:
            assert torch.equal(logits.detach(), leaf.grad)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    assert torch.equal(grads[0], grads[1])


def test_inputs_that_cannot_be_right_are_refused() -> None:
    logits, targets = random_case(11, 3, 20, torch.float32)
    cases = [
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1e-30), "temperature=1e-30 must be from 1e-09 to 1e\\+09"),
        (dict(temperature=5e36), "temperature=5e\\+36"),
        (dict(valid_vocab=21), "valid_vocab=21"),
        (dict(valid_vocab=0), "valid_vocab=0"),
        (dict(implementation="fast"), "implementation='fast'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            token_logprobs(logits, targets, **arguments)
    with pytest.raises(ValueError, match=r"token ids in \[0, 15\), found 15"):
        token_logprobs(logits, torch.tensor([0, 15, 1]), valid_vocab=15)
    with pytest.raises(ValueError, match="found -100"):
        token_logprobs(logits, torch.tensor([0, -100, 1]))
    with pytest.raises(ValueError, match="targets must be int64"):
        token_logprobs(logits, targets.int())
    with pytest.raises(ValueError, match="stride 1"):
        token_logprobs(logits.t().contiguous().t(), targets)
    with pytest.raises(ValueError, match="do not overlap"):
        token_logprobs(logits[:1].expand(3, 20).as_strided((3, 20), (5, 1)), targets, inplace_backward=True)
    with pytest.raises(ValueError, match="do not overlap"):
        token_logprobs(logits[:1].expand(3, 20), targets, inplace_backward=True)


@pytest.mark.parametrize("isa", usable_isas)
@pytest.mark.parametrize(("vocab", "offset"), [(65536, 16), (65537, 1), (80, 1)])  # aligned; not; too short a row
def test_a_gradient_beyond_the_caches_is_the_one_in_place(isa: str, vocab: int, offset: int) -> None:
    rows = (33 << 20) // (4 * vocab) + 1
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    shard = VocabShard(0, vocab - 3)  # the last columns are padding
    targets.clamp_(max=vocab - 4)
    stats = logprobs_compiled.row_stats(logits, targets, shard, 0.8, True, isa)
    saved = saved_for_backward(merge_stats(stats[None], 0.8), True, torch.float32)
    row_grads = row_gradients(saved, torch.randn(rows, generator=generator), torch.randn(rows, generator=generator))
    memory = torch.full((logits.numel() + 64,), 7.0)
    end = offset + logits.numel()
    out = memory[offset:end].view_as(logits)
    logprobs_compiled.logits_grad(logits, targets, shard, 0.8, row_grads, out, isa)
    assert memory[:offset].eq(7).all() and memory[end:].eq(7).all()
    logprobs_compiled.logits_grad(logits, targets, shard, 0.8, row_grads, logits, isa)
    assert torch.equal(out, logits)
