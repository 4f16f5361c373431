"""Self-distillation: a host with a memory learns to say what it says when it sees everything (AHN, 2510.07318)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InputError


def self_distillation_loss(student: Tensor, teacher: Tensor, window: int, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the next token, mean over the tokens beyond the window.

    The first `window` tokens see all that the teacher sees; they have nothing to learn and do not count.

    Args:
        student, teacher: logits (B, T, vocabulary) of the same tokens, with the memory and with full attention. No
            gradient reaches the teacher's.
        window: tokens in sight of the student.
        mask: (B, T), 0 for padding, which stands behind the text; None where all tokens are real.

    Returns: a float32 scalar (float64 for such logits); 0 where no token is beyond the window.

    Raises: InputError for shapes that differ.
    """
    if student.shape != teacher.shape or (mask is not None and mask.shape != student.shape[:2]):
        shape = None if mask is None else tuple(mask.shape)
        raise InputError(
            f"Logits of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape (batch, "
            f"tokens, vocabulary), and a mask its first two sizes; it has {shape}."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    said, wanted = (F.log_softmax(x[:, window:].to(dtype), -1) for x in (student, teacher.detach()))
    divergence = F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)
    real = torch.ones_like(divergence) if mask is None else (mask[:, window:] != 0).to(dtype)
    return (divergence * real).sum() / real.sum().clamp_min(1)
