"""The loss of distillation against loops over tokens and symbols."""

from __future__ import annotations

import math

import pytest
import torch

from switchkit import distillation_loss
from switchkit.distill import TopK
from switchkit.distill.loss import divergence, hidden_loss, relation_loss, top_k_divergence

B, S, V, R = 2, 5, 7, 2


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [power / sum(powers) for power in powers]


def naive(student, teacher, targets, counted, alpha, temperature) -> tuple[float, float, float]:
    """Token by token, symbol by symbol, in Python's floats."""
    entropy = kl = tokens = 0.0
    for b in range(B):
        for s in range(S):
            if not counted[b][s]:
                continue
            ours = softmax(student[b, s].tolist())
            entropy -= math.log(ours[targets[b, s]])
            p = softmax([x / temperature for x in teacher[b, s].tolist()])
            q = softmax([x / temperature for x in student[b, s].tolist()])
            kl += sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in range(V))
            tokens += 1
    entropy, kl = entropy / tokens, kl / tokens
    return (1 - alpha) * entropy + alpha * temperature**2 * kl, entropy, kl


@pytest.fixture
def given():
    draw = torch.Generator().manual_seed(3)
    student = torch.randn(B, S, V, generator=draw).requires_grad_()
    teacher = 2 * torch.randn(B, S, V, generator=draw)
    targets = torch.randint(V, (B, S), generator=draw)
    valid = torch.tensor([[True, True, True, False, False], [True, True, False, True, True]])
    return student, teacher, targets, valid


@pytest.mark.parametrize(("alpha", "temperature"), [(0.25, 1.0), (0.0, 1.0), (1.0, 3.0), (0.6, 0.5)])
def test_against_a_loop(given, alpha, temperature):
    student, teacher, targets, valid = given
    targets = targets.clone()
    targets[0, 0] = -100  # ignored in both parts, as padding is
    counted = (valid & (targets != -100)).tolist()
    found = distillation_loss(student, teacher, targets, valid, alpha=alpha, temperature=temperature)
    wanted = naive(student, teacher, targets, counted, alpha, temperature)
    assert [x.item() for x in (found.loss, found.cross_entropy, found.divergence)] == pytest.approx(wanted, rel=1e-5)


def test_no_divergence_and_no_gradient_when_the_student_is_the_teacher(given):
    student, _, targets, valid = given
    found = distillation_loss(student, student.detach().clone(), targets, valid, alpha=1.0, temperature=2.0)
    assert found.divergence.item() == 0
    found.loss.backward()
    assert student.grad.abs().max() < 1e-7


def test_the_gradient_is_the_difference_of_the_distributions(given):
    """d KL / d logit = (q - p) / T for every real token, of which T^2 makes T (q - p)."""
    student, teacher, targets, valid = given
    t = 2.0
    distillation_loss(student, teacher, targets, valid, alpha=1.0, temperature=t).loss.backward()
    wanted = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1)) * valid.unsqueeze(-1) / valid.sum()
    assert torch.allclose(student.grad, wanted, atol=1e-7)


def test_alpha_1_ignores_labels(given):
    student, teacher, targets, valid = given
    first = distillation_loss(student, teacher, targets, valid, alpha=1.0).loss
    second = distillation_loss(student, teacher, (targets + 1) % V, valid, alpha=1.0).loss
    assert torch.equal(first, second)


def test_padding_changes_nothing(given):
    student, teacher, targets, valid = given
    first = distillation_loss(student, teacher, targets, valid)
    other = student.detach().masked_fill(~valid.unsqueeze(-1), 50.0), teacher.masked_fill(~valid.unsqueeze(-1), -9.0)
    second = distillation_loss(*other, targets.masked_fill(~valid, 1), valid)
    assert torch.equal(first.loss, second.loss)


def test_half_precision_is_computed_in_single(given):
    student, teacher, targets, valid = given
    found = distillation_loss(student.bfloat16(), teacher.bfloat16(), targets, valid)
    assert found.loss.dtype == torch.float32
    exact = distillation_loss(student.bfloat16().float(), teacher.bfloat16().float(), targets, valid)
    assert torch.equal(found.loss, exact.loss)


def kept(teacher: torch.Tensor, k: int, temperature: float) -> TopK:
    logs = (teacher / temperature).log_softmax(-1)
    values, ids = logs.topk(k, -1)
    rest = logs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopK(values, ids, rest)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_symbols_kept_is_the_whole_divergence(given, temperature):
    student, teacher, *_ = given
    whole = divergence(student, teacher, temperature)
    assert torch.allclose(top_k_divergence(student, kept(teacher, V, temperature), temperature), whole, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_the_rest_is_one_outcome(given, k):
    """A sum over the k symbols and one for all others, whose masses are added up in Python."""
    student, teacher, *_ = given
    t = 1.7
    found = top_k_divergence(student, kept(teacher, k, t), t)
    for b in range(B):
        for s in range(S):
            p, q = (softmax([x / t for x in row[b, s].tolist()]) for row in (teacher, student))
            top = sorted(range(V), key=lambda v: -p[v])[:k]
            rest = [1 - sum(x[v] for v in top) for x in (p, q)]
            wanted = sum(p[v] * math.log(p[v] / q[v]) for v in top) + rest[0] * math.log(rest[0] / rest[1])
            assert found[b, s].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert (found <= divergence(student, teacher, t) + 1e-6).all()


@pytest.mark.parametrize("k", [3, V])
def test_kept_masses_need_not_add_up_to_one(given, k):
    """As they do not once they were rounded: what counts is their share."""
    student, teacher, *_ = given
    whole = kept(teacher, k, 1.0)
    more = TopK(whole.log_probs + 0.1, whole.ids, whole.log_rest + 0.1)
    assert torch.allclose(top_k_divergence(student, more), top_k_divergence(student, whole), atol=1e-6)


def test_top_k_has_finite_gradients_where_the_teacher_is_certain(given):
    """A rest of nothing at all, as float16 may round it, and one symbol with all the mass."""
    student = given[0]
    certain = TopK(torch.zeros(B, S, 1), torch.zeros(B, S, 1, dtype=torch.long), torch.full((B, S), -torch.inf))
    top_k_divergence(student, certain).sum().backward()
    wanted = student.softmax(-1) - torch.nn.functional.one_hot(torch.zeros(B, S, dtype=torch.long), V)
    assert torch.allclose(student.grad, wanted, atol=1e-6)


def test_a_symbol_that_the_teacher_rules_out_adds_nothing(given):
    student, teacher, *_ = given
    teacher = teacher.index_fill(-1, torch.tensor([0]), -torch.inf)
    found = divergence(student, teacher)
    assert torch.allclose(found, top_k_divergence(student, kept(teacher, V, 1.0)), atol=1e-6)
    found.sum().backward()
    assert student.grad.isfinite().all()


def test_hidden_states_against_a_loop():
    ours, theirs = torch.randn(B, S, 3), torch.randn(B, S, 3)
    valid = torch.arange(S) < torch.tensor([[2], [5]])
    squares = [
        sum((ours[b, s, d] - theirs[b, s, d]).item() ** 2 for d in range(3)) / 3
        for b in range(B)
        for s in range(S)
        if valid[b, s]
    ]
    assert hidden_loss(ours, theirs, valid).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_relations_against_a_loop(causal):
    """Widths 6 and 4 cut into two heads each; padding neither looks nor is looked at, and others may not count."""
    ours, theirs = torch.randn(B, S, 6), torch.randn(B, S, 4)
    valid = torch.arange(S) < torch.tensor([[3], [5]])
    counted = valid & (torch.arange(S) > 0)
    total = count = 0.0
    for b in range(B):
        for i in range(S):
            if not counted[b, i]:
                continue
            count += 1
            for head in range(R):
                logs = []
                for x in (theirs, ours):
                    w = x.shape[-1] // R
                    rows = x[b, :, head * w : (head + 1) * w]
                    seen = [j for j in range(S) if valid[b, j] and (j <= i or not causal)]
                    scores = {j: (rows[i] @ rows[j]).item() / math.sqrt(w) for j in seen}
                    norm = math.log(sum(math.exp(v) for v in scores.values()))
                    logs.append({j: v - norm for j, v in scores.items()})
                p, q = logs
                total += sum(math.exp(p[j]) * (p[j] - q[j]) for j in p) / R
    found = relation_loss(ours, theirs, R, valid, causal=causal, counted=counted)
    assert found.item() == pytest.approx(total / count, rel=1e-4)
    assert relation_loss(theirs, theirs, R, valid, causal=causal).item() == 0
