"""`lowbit train`: the same recipe after training and without it, side by side."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import lowbit
from lowbit import cli_inputs, distributed
from lowbit.cli_accuracy import accuracy_on, check_labels
from lowbit.cli_options import DATA_HELP, MODEL_HELP, Json, OptionalData, Weights
from lowbit.cli_output import Answer, answering
from lowbit.errors import LowbitError
from lowbit.model import QuantizedModel
from lowbit.qat import Run
from lowbit.tables import text_table
from lowbit.training.batches import check_data, split

__all__ = ["train"]

RECIPES = ["w4a4", "w2a2"]
# of the network that ships with lowbit: a few minutes on two cores
DEMO_EPOCHS = 3
DEMO_BATCH = 128
# training batches on which PTQ and QAT are calibrated, and batches on which an exported file is verified
CALIBRATION = 8
VERIFIED = 4
# packages that would be missed only after hours of training
ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A float model, and the labelled data that it is trained and judged on."""

    model: nn.Module
    train: Any
    # evaluated after each epoch; None when there is no such data
    val: Any
    # where accuracies are measured, and what that is
    test: Any
    test_name: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One recipe without training and with it."""

    recipe: str
    ptq_accuracy: float
    qat_accuracy: float
    file: Path
    bytes: int
    # of every epoch what the Trainer recorded
    epochs: list[dict[str, Any]]
    onnx: Path | None = None
    # whether the exported file is the model, code for code; None where there is no file
    exact: bool | None = None
    ok: bool = True


def train(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{MODEL_HELP}; without it the network that ships with lowbit"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="TRAIN", help=f"{DATA_HELP}; arrays are shuffled in each epoch")
    ] = None,
    val: OptionalData = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="preset or YAML file; may be given again [w4a4 and w2a2]")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for all files")] = Path("out/train"),
    epochs: Annotated[int | None, typer.Option(min=1, help=f"[1; without MODEL {DEMO_EPOCHS}]")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate [that of the Trainer]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"samples in a batch [64; without MODEL {DEMO_BATCH}]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of shuffling and augmentation")] = 0,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="learn from this model [the float model itself]")
    ] = None,
    no_distill: Annotated[bool, typer.Option("--no-distill", help="learn from the labels alone")] = False,
    bits: Annotated[
        str | None, typer.Option(metavar="32,4,3,2", help="widths to pass through, 32 without quantization")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="forward passes of training in bfloat16")] = False,
    weights: Weights = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="also write and verify DIR/<recipe>.onnx")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="also write events")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="begin anew where a run can go on")] = False,
    as_json: Json = False,
) -> None:
    """Quantize with training and without, side by side; stopped, the same command goes on where it was.

    For each recipe DIR gets <recipe>.safetensors, the quantized network, and a folder <recipe> with
    checkpoints and metrics. Without MODEL it trains the network that ships with lowbit on its images.
    """
    distributed.join()
    if no_distill and teacher is not None:
        raise LowbitError("--no-distill leaves no use for --teacher; give one of the two")
    for package in (*(ONNX if onnx else ()), *(("tensorboardX",) if tensorboard else ())):
        importlib.import_module(package)
    with answering(as_json, silent=distributed.rank() > 0) as answer:
        recipes = _recipes(recipe or RECIPES)
        task = _demo(val, data, weights, batch_size) if model is None else None
        task = task or _task(str(model), weights, data, val, batch_size)
        settings: dict[str, Any] = {"seed": seed, "bf16": bf16, "tensorboard": tensorboard}
        settings |= {"resume": False if restart else "auto", "bits": () if bits is None else _widths(bits)}
        chosen = {"epochs": epochs or (DEMO_EPOCHS if model is None else None), "lr": lr}
        settings |= {name: value for name, value in chosen.items() if value is not None}
        taught_by = task.model if teacher is None else cli_inputs.load_model(teacher)
        study = _Study(task, None if no_distill else taught_by, settings, out, onnx)
        outcomes = study.run(recipes, answer)
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def _recipes(names: list[str]) -> dict[str, lowbit.Recipe]:
    """Each recipe under the name that its files get."""
    found = {name: lowbit.Recipe.get(name) for name in names}
    stems = {name: Path(name).stem if Path(name).suffix else name for name in found}
    twice = next((stem for stem, count in Counter(stems.values()).items() if count > 1), None)
    if twice is not None:
        raise LowbitError(f"--recipe: two are called '{twice}', and so would their files; rename one")
    return {stems[name]: value for name, value in found.items()}


def _widths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise LowbitError(f"--bits '{text}' is not a list of numbers such as 32,4,3,2")
    return tuple(int(part) for part in parts)


def _demo(val: str | None, data: str | None, weights: str | None, batch_size: int | None) -> Task:
    """The network and the images that ship with lowbit."""
    from lowbit.demo.data import TrainingImages, load_images
    from lowbit.demo.network import load_network

    for name, value in (("--data", data), ("--val", val), ("--weights", weights)):
        if value is not None:
            raise LowbitError(f"{name} '{value}' goes with a MODEL, and none is given; name one")
    images, labels = load_images("test")
    test = cli_inputs.ArrayData(images, labels, 500)
    train_images = TrainingImages(batch_size or DEMO_BATCH)
    return Task(
        model=load_network(), train=train_images, val=test, test=test, test_name="shipped test images"
    )


def _task(model: str, weights: str | None, data: str | None, val: str | None, batch_size: int | None) -> Task:
    if data is None:
        raise LowbitError("training takes labelled data; give --data TRAIN")
    network = cli_inputs.load_model(model, weights)
    held = None if val is None else cli_inputs.load_data(val, _size(val, batch_size), option="--val")
    found = cli_inputs.load_data(data, batch_size, shuffled=True)
    test = cli_inputs.load_data(data, batch_size) if held is None else held
    for option, batches in (("--data", found), ("--val", test)):
        check_data(batches, option)
        check_labels(batches, option)
    name = "training data, for there is no --val" if held is None else "validation data"
    return Task(model=network, train=found, val=held, test=test, test_name=name)


def _size(name: str, batch_size: int | None) -> int | None:
    """Batches that a callable makes are taken as they are, also where the training data is an array."""
    return batch_size if Path(name).suffix in cli_inputs.ARRAYS else None


@dataclass(frozen=True)
class _Study:
    """What all recipes of one command share."""

    task: Task
    teacher: nn.Module | None
    settings: dict[str, Any]
    out: Path
    onnx: bool

    def run(self, recipes: dict[str, lowbit.Recipe], answer: Answer) -> list[Outcome]:
        """Train with each recipe; the record of the answer has everything that was found."""
        torch.manual_seed(self.settings["seed"])
        calibration = [split(batch).inputs for batch in islice(self.task.train, CALIBRATION)]
        # everything that can be wrong is found before the first is trained
        trainers = {
            n: self.trainer(n, lowbit.prepare(self.task.model, r, calibration[0])) for n, r in recipes.items()
        }
        float_accuracy, samples = accuracy_on(self.task.model, self.task.test, "float")
        self.out.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for name, trainer in trainers.items():
            outcomes.append(self.compare(name, recipes[name], trainer, calibration, answer))
        answer.say(self.table(float_accuracy, samples, outcomes))
        answer.record |= {
            "float_accuracy": float_accuracy,
            "samples": samples,
            "measured_on": self.task.test_name,
            "float_bytes": _float_bytes(self.task.model),
            "settings": self.settings,
            "distilled": self.teacher is not None,
            "recipes": [asdict(outcome) for outcome in outcomes],
        }
        return outcomes

    def trainer(self, name: str, q: QuantizedModel) -> lowbit.Trainer:
        """The Trainer of one recipe."""
        task, folder = self.task, self.out / name
        return lowbit.Trainer(q, task.train, task.val, teacher=self.teacher, out=folder, **self.settings)

    def compare(
        self,
        name: str,
        recipe: lowbit.Recipe,
        trainer: lowbit.Trainer,
        calibration: list[Any],
        answer: Answer,
    ) -> Outcome:
        """One recipe without training, and with it."""
        ptq = lowbit.quantize(self.task.model, recipe, calibration)
        before, _ = accuracy_on(ptq, self.task.test, f"{name}, PTQ")
        answer.say(f"{name}: {100 * before:.2f} % without training")
        lowbit.calibrate(trainer.q, calibration)
        run = _fit(trainer)
        answer.say(f"{run}\n")
        q = lowbit.freeze(trainer.q)
        after, _ = accuracy_on(q, self.task.test, f"{name}, QAT")
        file = self.out / f"{name}.safetensors"
        path, parity = self.out / f"{name}.onnx", None
        if distributed.rank() == 0:
            lowbit.save(q, file)
        if distributed.rank() == 0 and self.onnx:
            lowbit.export.onnx(q, path)
            parity = lowbit.verify(q, path, self.task.test, VERIFIED)
            answer.say(f"{str(parity).splitlines()[-1]}\n")
        return Outcome(
            recipe=name,
            ptq_accuracy=before,
            qat_accuracy=after,
            file=file,
            bytes=file.stat().st_size if distributed.rank() == 0 else 0,
            epochs=[asdict(epoch) for epoch in run.epochs],
            onnx=path if parity else None,
            exact=parity.exact if parity else None,
            ok=parity.ok if parity else True,
        )

    def table(self, float_accuracy: float, samples: int, outcomes: list[Outcome]) -> str:
        """The answer: what the bits cost, and what training brings back."""
        header = ("recipe", "float", "PTQ", "QAT", "bytes")
        rows = [
            (
                o.recipe,
                *(f"{100 * a:.2f} %" for a in (float_accuracy, o.ptq_accuracy, o.qat_accuracy)),
                f"{o.bytes:,}",
            )
            for o in outcomes
        ]
        whole = _float_bytes(self.task.model)
        return (
            f"Top-1 accuracy on {samples:,} samples ({self.task.test_name}), quantized without training\n"
            f"(PTQ) and with it (QAT); bytes of the checkpoint, {whole:,} in float32:\n\n"
            f"{text_table(header, rows)}\n\n"
            f"In {self.out}/: <recipe>.safetensors, and a folder <recipe> with checkpoints and metrics.jsonl."
        )


def _fit(trainer: lowbit.Trainer) -> Run:
    """Train; errors name options of the command line."""
    try:
        return trainer.fit()
    except LowbitError as error:
        text = str(error).replace("another out or with resume=False", "another --out, or with --restart")
        raise LowbitError(text) from error


def _float_bytes(model: nn.Module) -> int:
    return 4 * sum(p.numel() for p in model.parameters())
