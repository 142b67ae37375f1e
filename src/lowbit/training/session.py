"""One run of training, from its start or its last checkpoint to its end."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowbit import distributed
from lowbit.errors import LowbitError
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.progress import track
from lowbit.scales import calibrate_for_training
from lowbit.training import stages
from lowbit.training.batches import Batch
from lowbit.training.batchnorm import batchnorms, reestimate, set_frozen
from lowbit.training.evaluate import Score, evaluate
from lowbit.training.feed import Feed
from lowbit.training.folder import Folder
from lowbit.training.groups import make_optimizer
from lowbit.training.losses import Objective
from lowbit.training.record import Epoch, Run
from lowbit.training.schedule import Pace, set_progress
from lowbit.training.settings import Settings
from lowbit.training.state import (
    copy_of_weights,
    flatten_optimizer,
    load_optimizer,
    load_weights,
    named,
    read_checkpoint,
    section,
)
from lowbit.training.watch import Watch

__all__ = ["Session"]

# Every look at a loss waits for the device: on a GPU that is done now and then.
LOOK_EVERY = 16


class Session:
    """What a run knows while it goes on; most of it is in each checkpoint.

    Attributes:
        epoch, done: finished epochs, and finished steps of the one after them.
        bits: width of the stage that the quantizers are in; None at the bits of the recipe.
    """

    def __init__(
        self,
        q: QuantizedModel,
        train: Any,
        val: Any,
        teacher: nn.Module | None,
        settings: Settings,
        objective: Objective,
    ) -> None:
        """Nothing runs yet.

        Raises:
            LowbitError: the training data has no length and none was given.
        """
        self.q, self.val, self.teacher = q, val, teacher
        self.settings, self.objective = settings, objective
        self.feed = Feed(q, train, val, settings)
        self.device = self.feed.device
        self.record = Run(metric=settings.metric if isinstance(settings.metric, str) else "metric")
        self.epoch = self.done = self.samples = 0
        self.loss_sum = 0.0
        self.bits: int | None = None
        # (step, samples, learning rate, this rank's part of the loss) of steps whose loss nobody looked at
        self.pending: list[tuple[int, int, float, Tensor]] = []
        self.folder = None if settings.out is None else Folder(settings, self._identity())
        # weights to go back to, and the best ones, where there is no folder
        self.good: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        # random numbers of the checkpoint that is gone on with
        self.random: dict[str, Tensor] = {}

    def run(self) -> Run:
        """Everything that `Trainer.fit` promises."""
        self.feed.check(labels=self.objective.needs_labels)
        found = self.folder.found() if self.folder else None
        self.watch = Watch(self.q)
        if found:
            load_weights(self.q, section(found[1], "model."), str(self.folder and self.folder.last))
        else:
            self._calibrate()
        self._lay_out(torch.channels_last)
        self.targets = stages.targets_of(self.q)
        stages.check(self.settings.bits, self.targets)
        self.trainable = {p for p in self.q.parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.q, self.settings)
        self.pace = Pace(self.settings, self.optimizer, self.feed.steps)
        self.model: nn.Module = self.q
        self.phase: tuple[int | None, bool] | None = None
        modes = [(m, m.training) for m in self.teacher.modules()] if self.teacher is not None else []
        try:
            finished = self._load(*found) if found else False
            self._open(found[0]["metrics"] if found else None)
            del found  # a checkpoint takes as much memory as the model and its optimizer
            if not finished:
                self._train()
            self._take_best()
        finally:
            self._leave(modes)
        return self.record

    # --- before the first step

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run for the run to go on with it."""
        data = {
            "steps_per_epoch": self.feed.steps,
            "ranks": distributed.world(),
            "teacher": self.teacher is not None,
            "val": self.val is not None,
        }
        return {"recipe": self.q.recipe.to_dict(), "settings": self.settings.deciding(), "data": data}

    def _calibrate(self) -> None:
        """Where nobody did."""
        layers = [m for m in self.q.modules() if isinstance(m, QLayer)]
        if all(layer.weight_quantizer.mode == "quantize" for layer in layers):
            return
        data = [b.inputs for b in self.feed.first(self.settings.calibration_batches, -1)]
        self.q.eval()
        calibrate_for_training(self.q, data)
        self.record.notes.append(f"calibrated on the first {len(data)} batches of the training data")

    def _open(self, position: int | None) -> None:
        """Ready the folder; its metrics go on at `position`, or at None start anew."""
        if self.folder:
            self.folder.start(position, self._step())
            self.record.last, self.record.metrics = self.folder.last, self.folder.path / "metrics.jsonl"
            self.record.best_path = self.folder.best if self.val is not None else None
        if position is None:
            self._baseline()
            self._save()

    def _baseline(self) -> None:
        score = None if self.teacher is None else self._score(self.teacher)
        if score is None:
            return
        self.record.baseline = score.metric
        self._note(kind="baseline", metric=score.metric, val_loss=score.loss)

    # --- training

    def _train(self) -> None:
        if self.teacher is not None:
            self.teacher.eval()
        while self.epoch < self.settings.epochs and not self.record.stopped:
            self._enter()
            if not self.folder:
                self.good = copy_of_weights(self.q)
            began = time.perf_counter()
            self._train_epoch()
            self._end_epoch(time.perf_counter() - began)
        self._reestimate()
        self._save(finished=True)

    def _enter(self) -> None:
        """Bits and BatchNorm as the next epoch has them."""
        settings, q = self.settings, self.q
        frozen = settings.batch_norm == "freeze" or (
            settings.freeze_bn_after is not None and self.epoch >= settings.freeze_bn_after
        )
        bits = settings.bits[self.pace.stage(self.epoch)[0]] if settings.bits else None
        if bits is not None and bits != self.bits:
            changed = stages.enter(q, self.targets, bits)
            for path in changed:  # momentum of a scale that meant something else
                for parameter in q.get_submodule(path).parameters(recurse=False):
                    self.optimizer.state.pop(parameter, None)
            self.pace.new_stage()
            self.bits = bits
        q.train()
        set_frozen(q, self.trainable, frozen)
        if self.phase == (bits, frozen):
            return
        self.phase = bits, frozen
        self.watch.begin()
        self.model = q
        if distributed.world() > 1:
            # the parameters that get a gradient are the same in every step of a phase, not over phases
            self.model = DistributedDataParallel(q, static_graph=True)
        if settings.compile:
            self.model = torch.compile(self.model)  # type: ignore[assignment]

    def _train_epoch(self) -> None:
        settings, every = self.settings, self.settings.checkpoint_every
        if not self.done:
            self.loss_sum, self.samples = 0.0, 0
        batches = self.feed.epoch(self.epoch, self.done, self.random)
        what = f"epoch {self.epoch + 1} of {settings.epochs}"
        for batch in track(batches, what, total=self.feed.steps - self.done):
            self._train_step(batch)
            self.done += 1
            if every and self._step() % every == 0:
                self._save()
        self._look()
        if not self.samples:
            raise LowbitError("train holds no batch with a sample; pass at least one")

    def _train_step(self, batch: Batch) -> None:
        part, total = self.feed.weight(batch)
        set_progress(self.q, self.pace.set(self.epoch, self.done))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            with batch.inputs.explaining(self.q):
                output = self.model(*batch.inputs.args, **batch.inputs.kwargs)
            taught = None
            if self.teacher is not None and self.objective.needs_teacher:
                with torch.no_grad():
                    taught = batch.inputs.call(self.teacher)
            loss = self.objective.in_training(output, batch.labels, taught)
        self.pending.append((self._step() + 1, total, self.pace.lr, loss.detach() * part))
        if self.device.type == "cpu" or len(self.pending) >= LOOK_EVERY:
            self._look()
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel takes the mean of the ranks' gradients
        torch.autograd.backward(loss * (part * distributed.world()))
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.q.parameters(), self.settings.clip_norm)
        self.optimizer.step()

    def _look(self) -> None:
        """Take in the losses of the last steps, the same on every rank."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        losses = distributed.add_over_ranks(torch.stack([p[3].float() for p in pending]).tolist())
        for (step, samples, rate, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                self._diverge(f"the loss is {loss} at step {step}")
            self.loss_sum += loss * samples
            self.samples += samples
            if step % self.settings.log_every == 0:
                self._note(step, kind="step", epoch=self.epoch + 1, loss=loss, lr=rate)
        if self.device.type != "cpu" or self.done % LOOK_EVERY == 0:
            self.watch.look()

    def _end_epoch(self, seconds: float) -> None:
        self._check_weights()
        epoch, loss = self.epoch + 1, self.loss_sum / self.samples
        distributed.same_everywhere(self.q.buffers())
        score = self._score(self.q)
        found = {"loss": loss, "lr": self.pace.lr, "seconds": seconds, **_fields(score)}
        self._add(Epoch(epoch=epoch, step=epoch * self.feed.steps, bits=self.bits, **found))
        if self.settings.on_epoch is not None:
            self.settings.on_epoch(self.record.epochs[-1])
        if self.settings.schedule == "plateau":
            self.pace.plateau.step(score.metric if score else -loss)
        self.epoch, self.done = epoch, 0
        best, waits = self.record.best, self.settings.patience
        final = not self.settings.bits or self.bits == self.settings.bits[-1]
        waited = self.epoch - best.epoch if best and final else 0
        if waits and waited >= waits and self.epoch < self.settings.epochs:
            self.record.stopped = (
                f"stopped after epoch {self.epoch}: no better {self.record.metric} for {waits} epochs"
            )
        self._save()

    def _reestimate(self) -> None:
        """Statistics of BatchNorm with the final weights, and what they change."""
        wanted, epochs = self.settings.reestimate_bn, self.record.epochs
        if not wanted or not batchnorms(self.q):
            return
        data = self.feed.first(wanted, self.settings.epochs)
        count = reestimate(self.q, (batch.inputs for batch in data))
        distributed.same_everywhere(self.q.buffers())
        note = f"BatchNorm measured anew on {count} batches"
        self._add(replace(epochs[-1], seconds=0.0, note=note, **_fields(self._score(self.q))))

    def _score(self, model: nn.Module) -> Score | None:
        if self.val is None:
            return None
        return evaluate(model, self.feed.batches(self.val), self.settings, self.objective)

    def _add(self, epoch: Epoch) -> None:
        """Record an epoch, and keep its weights when they are the best."""
        self.record.epochs.append(epoch)
        shown = {k: v for k, v in vars(epoch).items() if v not in (None, "") and k != "step"}
        self._note(epoch.step, kind="epoch", **shown)
        if self.record.best is not epoch:
            return
        if self.folder:
            self.folder.write(named("model", self.q.state_dict()), self._metadata(), best=True)
        elif self.settings.restore == "best":
            self.best = copy_of_weights(self.q)

    # --- checkpoints

    def _save(self, *, finished: bool = False) -> None:
        """Write the last checkpoint, if everything in it is finite."""
        self._look()
        self._check_weights()
        if not self.folder:
            return
        moments, rest = flatten_optimizer(self.optimizer)
        tensors = named("model", self.q.state_dict()) | named("optimizer", moments)
        for rank, state in enumerate(distributed.together(self.feed.streams.state())):
            tensors |= named(f"random.{rank}", state)
        self.folder.write(tensors, {**self._metadata(), "optimizer": rest, "finished": finished})

    def _check_weights(self) -> None:
        """Go back to the last good state where a weight, a statistic or a scale is no longer finite."""
        broken = self.watch.broken()
        if distributed.add_over_ranks([float(broken is not None)])[0]:
            self._diverge(f"'{broken or 'a weight'}' holds NaN or infinity after step {self._step()}")

    def _metadata(self) -> dict[str, Any]:
        return {
            "position": {"epoch": self.epoch, "step": self.done},
            "bits": self.bits,
            "loss": [self.loss_sum, self.samples],
            "plateau": self.pace.plateau.state(),
            "history": self.record.to_dict(),
        }

    def _load(self, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Stand where the checkpoint stood, whose weights the model has already.

        Returns:
            Whether nothing is left to do.
        """
        self.record.take(metadata["history"])
        self.epoch, self.done = metadata["position"]["epoch"], metadata["position"]["step"]
        self.loss_sum, self.samples = metadata["loss"]
        self.pace.plateau.load(metadata["plateau"])
        self.bits = metadata["bits"]
        if self.bits is not None:
            stages.enter(self.q, self.targets, self.bits, search=False)
        load_optimizer(self.optimizer, section(tensors, "optimizer."), metadata["optimizer"])
        self.random = section(tensors, f"random.{distributed.rank()}.")
        return bool(metadata["finished"])

    def _diverge(self, what: str) -> NoReturn:
        """Go back to the last good state and say what happened."""
        whose = self.watch.blame()
        if self.folder and self.folder.last.exists():
            metadata, tensors = read_checkpoint(self.folder.last)
            if self.settings.bits:
                bits = metadata["bits"] or self.settings.bits[-1]
                stages.enter(self.q, self.targets, bits, search=False)
            good, place = section(tensors, "model."), f"the last good checkpoint, '{self.folder.last}'"
        else:
            good, place = self.good, "the start of the epoch" if self.good else "its start"
        if good:
            load_weights(self.q, good, place)
        self.pending = []
        raise LowbitError(
            f"{what}; {whose}. The model is back at {place}. Lower lr (it was {self.pace.lr:g}) or scale_lr, "
            "set clip_norm, or look for NaN in the data"
        )

    # --- the end

    def _take_best(self) -> None:
        if self.settings.restore != "best" or self.record.best is None:
            return
        good = section(read_checkpoint(self.folder.best)[1], "model.") if self.folder else self.best
        load_weights(self.q, good, "best")

    def _leave(self, modes: list[tuple[nn.Module, bool]]) -> None:
        """Everything but weights and scales as it was."""
        if self.settings.bits:
            stages.enter(self.q, self.targets, self.settings.bits[-1])
        set_frozen(self.q, self.trainable, False)
        self.q.eval()
        self.q.zero_grad(set_to_none=True)
        self._lay_out(torch.contiguous_format)
        for module, mode in modes:
            module.training = mode
        if self.folder:
            self.folder.close()

    def _lay_out(self, memory_format: torch.memory_format) -> None:
        if self.settings.channels_last:
            for parameter in self.q.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=memory_format)

    def _step(self) -> int:
        """Steps since the start of the run."""
        return self.epoch * self.feed.steps + self.done

    def _note(self, step: int | None = None, **values: Any) -> None:
        if self.folder:
            self.folder.note(self._step() if step is None else step, **values)


def _fields(score: Score | None) -> dict[str, Any]:
    return {} if score is None else {"val_loss": score.loss, "metric": score.metric}
