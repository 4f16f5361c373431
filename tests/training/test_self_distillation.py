"""The loss of self-distillation, against its definition."""

import pytest
import torch

from mnemic import InputError
from mnemic.training.self_distillation import self_distillation_loss


def test_it_is_the_mean_divergence_beyond_the_window():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    parts = []
    for b, length in ((0, 7), (1, 5)):
        for t in range(3, length):
            p, q = teacher[b, t].softmax(0), student[b, t].softmax(0)
            parts.append(sum(p[i] * (p[i] / q[i]).log() for i in range(5)))
    loss = self_distillation_loss(student, teacher, 3, mask)
    torch.testing.assert_close(loss, sum(parts) / len(parts), atol=1e-12, rtol=0)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    felt = student.grad.abs().sum(-1) > 0
    assert felt.tolist() == [[False] * 3 + [True] * 4, [False] * 3 + [True] * 2 + [False] * 2]


def test_equal_models_and_short_texts_have_nothing_to_learn():
    logits = torch.randn(1, 6, 5, requires_grad=True)
    assert self_distillation_loss(logits, logits, 2).item() == pytest.approx(0, abs=1e-6)
    nothing = self_distillation_loss(logits, torch.randn(1, 6, 5), 6)
    assert nothing == 0
    nothing.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert self_distillation_loss(logits.bfloat16(), logits, 2).dtype == torch.float32


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="one shape"):
        self_distillation_loss(torch.randn(1, 6, 5), torch.randn(1, 5, 5), 2)
    with pytest.raises(InputError, match="mask"):
        self_distillation_loss(torch.randn(1, 6, 5), torch.randn(1, 6, 5), 2, torch.ones(1, 5))
