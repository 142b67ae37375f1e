"""What training minimizes: the task, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.training.settings import Settings

__all__ = ["Objective", "accuracy", "logits_of", "symmetric_kl"]


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returns: a tensor, the entry or attribute "logits", or the first tensor.

    Raises:
        LowbitError: there is none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list, Mapping)):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise LowbitError(
        f"the model returns a {type(output).__name__}, in which there are no logits; "
        "pass loss=function(output, labels), metric=function(output, labels), and no teacher"
    )


def symmetric_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, axis: int = 1) -> Tensor:
    """T^2 / 2 (KL(p || q) + KL(q || p)) with p, q = softmax(logits / T): a mean over everything but classes.

    The factor T^2 keeps the size of the gradient (Hinton, Vinyals, Dean 2015, section 2). The symmetric sum
    is sum (p - q) (log p - log q); it is 0 where both agree, and penalizes a student both for what it misses
    and for what it makes up.

    Args:
        student, teacher: logits of one shape, classes along `axis`.
    """
    log_q = F.log_softmax(student.float() / temperature, dim=axis)
    log_p = F.log_softmax(teacher.float() / temperature, dim=axis)
    distance = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=axis)
    return distance.mean() * (temperature**2 / 2)


def accuracy(output: Any, labels: Any, axis: int = 1) -> float:
    """Share of the labels whose class has the largest logit.

    Raises:
        LowbitError: the labels are no class numbers for those logits.
    """
    guess = logits_of(output).argmax(dim=axis)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != guess.shape:
        shown = (
            f"{list(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise LowbitError(
            f"accuracy needs class numbers of shape {list(guess.shape)}, and the labels are {shown}; "
            "pass metric=function(output, labels)"
        )
    return (guess == labels).float().mean().item()


class Objective:
    """(1 - a) loss(output, labels) + a symmetric_kl(output, teacher's output), with a = `distill`.

    Without a teacher a is 0; without a loss it is 1.
    """

    def __init__(self, settings: Settings, has_teacher: bool) -> None:
        """Check that there is something to minimize.

        Raises:
            LowbitError: no loss and nobody to learn from.
        """
        self.settings = settings
        self.share = settings.distill if has_teacher else 0.0
        if settings.loss is None:
            if not self.share:
                raise LowbitError(
                    "loss=None leaves nothing to train on without a teacher; pass teacher=model with distill "
                    "above 0, or loss='cross_entropy'"
                )
            self.share = 1.0

    @property
    def needs_labels(self) -> bool:
        """Whether the loss is part of the sum."""
        return self.share < 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the distance to the teacher is part of the sum."""
        return self.share > 0.0

    def __call__(self, output: Any, labels: Any, taught: Any) -> Tensor:
        """Mean over the batch; `taught` is the output of the teacher."""
        settings, terms = self.settings, []
        if self.needs_labels:
            terms.append((1.0 - self.share) * self.task(output, labels))
        if self.needs_teacher:
            pair = logits_of(output), logits_of(taught)
            terms.append(self.share * symmetric_kl(*pair, settings.temperature, settings.class_axis))
        return sum(terms[1:], terms[0])

    def in_training(self, output: Any, labels: Any, taught: Any) -> Tensor:
        """The same with the penalty, which evaluation leaves out."""
        loss = self(output, labels, taught)
        if self.settings.penalty is None:
            return loss
        cost = self.settings.penalty()
        if not isinstance(cost, Tensor) or cost.numel() != 1:
            raise LowbitError(f"penalty() returned {cost!r}; return a tensor of one number")
        return loss + cost.reshape(())

    def task(self, output: Any, labels: Any) -> Tensor:
        """The loss alone.

        Raises:
            LowbitError: it is no tensor of one number.
        """
        if not callable(self.settings.loss):
            logits = logits_of(output).float()
            if logits.ndim > 2:
                logits = logits.movedim(self.settings.class_axis, 1)
            return F.cross_entropy(logits, labels)
        loss = self.settings.loss(output, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise LowbitError(
                f"loss(output, labels) returned {shown}; return the mean over the batch, one number"
            )
        return loss.reshape(())
