"""Every setting of the Trainer, checked when it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, near_miss
from lowbit.training.stages import OFF

__all__ = ["Settings"]

# what may differ when a run is taken up again: none of them changes the weights
_FREE = {"out", "on_epoch", "resume", "restore", "checkpoint_every", "log_every", "tensorboard"}
_CHOICES = {
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("cosine", "constant", "plateau"),
    "batch_norm": ("train", "freeze"),
    "restore": ("last", "best"),
}
# name: (smallest, largest, whole numbers only, may be None)
_NUMBERS = {
    "epochs": (1, None, True, False),
    "lr": (0, None, False, True),
    "scale_lr": (0, None, False, True),
    "weight_decay": (0, None, False, False),
    "warmup": (0, None, False, False),
    "plateau_patience": (0, None, True, False),
    "clip_norm": (0, None, False, True),
    "distill": (0, 1, False, False),
    "temperature": (1e-3, None, False, False),
    "class_axis": (None, None, True, False),
    "freeze_bn_after": (0, None, True, True),
    "reestimate_bn": (0, None, True, False),
    "patience": (1, None, True, True),
    "calibration_batches": (1, None, True, False),
    "steps_per_epoch": (1, None, True, True),
    "checkpoint_every": (1, None, True, True),
    "log_every": (1, None, True, False),
    "seed": (0, None, True, False),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. The defaults are those that `benchmarks/qat.py` measures."""

    # passes over the training data
    epochs: int = 1
    # "cross_entropy", a function (output, labels) -> mean over the batch, or None: the teacher alone
    loss: str | Callable[[Any, Any], Any] | None = "cross_entropy"
    # a function () -> one number that is added to the loss in training, such as what the bits cost
    penalty: Callable[[], Any] | None = None
    # weight of the distance to the teacher, where there is one; the loss has the rest
    distill: float = 1.0
    # the logits of both are divided by it before they are compared
    temperature: float = 4.0
    # axis of the logits that runs over classes
    class_axis: int = 1
    # "sgd" (momentum 0.9), "adam", "adamw", or a function (parameter groups) -> Optimizer
    optimizer: str | Callable[[list[dict[str, Any]]], Any] = "adam"
    # None: 0.01 for "sgd"; else 1e-3 where the recipe has 3 bits or fewer, and 3e-4 where it has not
    lr: float | None = None
    # of learned scales, relative to each, and of zero points, in codes; None takes `lr`
    scale_lr: float | None = None
    # of weights; never of scales, biases and norms
    weight_decay: float = 0.0
    # "cosine" to zero at the end; "constant"; "plateau": ten times less when the metric stops rising
    schedule: str = "cosine"
    # steps in which the rate rises in a line: a whole number, or a fraction of all steps below 1
    warmup: float = 0.02
    # epochs without a better metric that "plateau" waits
    plateau_patience: int = 3
    # largest norm of the whole gradient; None does not clip
    clip_norm: float | None = None
    # widths to pass through, such as (32, 4, 3, 2), 32 without quantization; the epochs are split evenly, and
    # the schedule starts over with each. Empty: at the bits of the recipe from the start
    bits: tuple[int, ...] = ()
    # "train": statistics and affine map of BatchNorm train; "freeze": both stay
    batch_norm: str = "train"
    # freeze it after that many epochs
    freeze_bn_after: int | None = None
    # batches of training data on which its statistics are measured anew at the end; 0 keeps the running ones
    reestimate_bn: int = 0
    # forward passes of training in bfloat16 where that is safe; evaluation stays in float32
    bf16: bool = False
    # images in memory with channels last: faster on many machines
    channels_last: bool = False
    # compile the training step
    compile: bool = False
    # "accuracy", or a function (output, labels) -> mean over the batch; larger is better
    metric: str | Callable[[Any, Any], Any] = "accuracy"
    # stop after that many epochs without a better metric; None never stops early
    patience: int | None = None
    # what the model holds at the end: the "last" weights, or those of the "best" epoch
    restore: str = "last"
    # batches of training data to calibrate on, where nobody did
    calibration_batches: int = 8
    # where the data has no length; otherwise every epoch takes all of it
    steps_per_epoch: int | None = None
    # of shuffling, augmentation and dropout
    seed: int = 0
    # folder of checkpoints and metrics; None writes nothing
    out: str | Path | None = None
    # "auto" goes on where a checkpoint in `out` stands; True demands one; False starts anew
    resume: bool | str = "auto"
    # a function (Epoch) that is called after each epoch, when it is evaluated
    on_epoch: Callable[[Any], None] | None = None
    # steps between checkpoints, beside that of each epoch
    checkpoint_every: int | None = None
    # steps between lines of metrics.jsonl, beside that of each epoch
    log_every: int = 50
    # write events that TensorBoard shows
    tensorboard: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> Settings:
        """Settings from keywords.

        Raises:
            LowbitError: an unknown name, or a value that is not one of its kind.
        """
        names = [f.name for f in fields(cls)]
        for name in values:
            if name not in names:
                raise LowbitError(f"the Trainer has no setting '{name}'{near_miss(name, names)}")
        return cls(**values)

    def __post_init__(self) -> None:
        """Check every field."""
        for name, rule in _NUMBERS.items():
            _check_number(name, getattr(self, name), *rule)
        for name, options in _CHOICES.items():
            value = getattr(self, name)
            if value not in options and not (name == "optimizer" and callable(value)):
                raise LowbitError(f"{name}={value!r} is unknown{near_miss(str(value), options)}")
        for name, word in (("loss", "cross_entropy"), ("metric", "accuracy")):
            value = getattr(self, name)
            if value != word and not callable(value) and (name, value) != ("loss", None):
                raise LowbitError(f"{name}={value!r} is unknown; use '{word}' or a function (output, labels)")
        for name in ("penalty", "on_epoch"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise LowbitError(f"{name}={getattr(self, name)!r} is no function; pass one, or None")
        for name in ("bf16", "channels_last", "compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise LowbitError(f"{name}={getattr(self, name)!r} is neither True nor False")
        if self.warmup >= 1 and not isinstance(self.warmup, int):
            raise LowbitError(
                f"warmup={self.warmup} is neither steps, a whole number, nor a fraction below 1"
            )
        self._check_bits()
        self._check_files()

    def _check_bits(self) -> None:
        if not isinstance(self.bits, (tuple, list)):
            raise LowbitError(f"bits={self.bits!r} is not a tuple; write bits=(4, 3, 2), say")
        object.__setattr__(self, "bits", tuple(self.bits))
        for value in self.bits:
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not (1 <= value <= 16 or value == OFF)
            ):
                raise LowbitError(f"bits={self.bits!r}: {value!r} is neither 1 to 16 nor {OFF}, which is off")
        if list(self.bits) != sorted(set(self.bits), reverse=True):
            raise LowbitError(
                f"bits={self.bits!r} does not fall from stage to stage; write bits=(4, 3, 2), say"
            )
        if len(self.bits) > self.epochs:
            raise LowbitError(
                f"bits={self.bits!r} has {len(self.bits)} stages for epochs={self.epochs}; "
                "each needs an epoch: raise epochs, or leave out widths"
            )

    def _check_files(self) -> None:
        if self.out is not None and not isinstance(self.out, (str, Path)):
            raise LowbitError(f"out={self.out!r} is no path; name a folder, or None to write nothing")
        if self.resume != "auto" and not isinstance(self.resume, bool):
            raise LowbitError(f"resume={self.resume!r} is unknown; use 'auto', True or False")
        if self.out is None:
            for name in ("checkpoint_every", "tensorboard"):
                if getattr(self, name):
                    raise LowbitError(
                        f"{name}={getattr(self, name)!r} writes files; say where with out='folder'"
                    )
            if self.resume is True:
                raise LowbitError("resume=True needs the folder of the run to go on with; pass out='folder'")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the final weights, as plain data; a function stands there by its name."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}
        return {
            name: list(value) if isinstance(value, tuple) else _name_of(value) for name, value in kept.items()
        }


def _check_number(
    name: str, value: Any, low: float | None, high: float | None, whole: bool, optional: bool
) -> None:
    if value is None and optional:
        return
    kinds = (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and not math.isnan(value)
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        what = "a whole number" if whole else "a number"
        ends = f" from {low:g}" if low is not None else ""
        ends += f" to {high:g}" if high is not None else (" up" if ends else "")
        raise LowbitError(f"{name}={value!r} is not {what}{ends}{'; None leaves it out' if optional else ''}")


def _name_of(value: Any) -> Any:
    if not callable(value):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
