"""What users get wrong: one LowbitError that names the value and the cure, no error of torch or below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit import INT8, LowbitError, PerChannel, PerGroup, QuantSpec, Recipe, Rule

X = torch.rand(4, 6)
WRONG = torch.rand(4, 5)
FLOAT = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
Q = lowbit.quantize(FLOAT, "w8a8", X)


def fails(output: Any, label: Any) -> float:
    raise KeyError("no such label")


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: lowbit.quantize(nn.Linear, "w8a8", X), "model is the class Linear, not a Module"),
    "a function": (lambda: lowbit.quantize(lambda x: x, "w8a8", X), "model is of type function"),
    "quantized twice": (lambda: lowbit.quantize(Q, "w8a8", X), "quantized already; pass the float model"),
    "prepare a class": (lambda: lowbit.prepare(nn.Linear, "w8a8", X), "the class Linear"),
    "load into a class": (
        lambda: lowbit.load(lowbit.save(Q, "q.safetensors"), nn.Linear),
        "the class Linear",
    ),
    "calibrate frozen": (lambda: lowbit.calibrate(Q, X), "the model is frozen"),
    "calibrate float": (lambda: lowbit.calibrate(FLOAT, X), "q is of type Sequential, not a QuantizedModel"),
    "freeze float": (lambda: lowbit.freeze(FLOAT), "make it with lowbit.prepare"),
    "save float": (lambda: lowbit.save(FLOAT, "m.safetensors"), "make it with lowbit.quantize"),
    "export float": (lambda: lowbit.export.onnx(FLOAT, "m.onnx"), "or use export.float_onnx"),
    "export a class": (lambda: lowbit.export.float_onnx(nn.Linear, "m.onnx", X), "the class Linear"),
    "verify float": (lambda: lowbit.verify(FLOAT, "m.onnx", X), "make it with lowbit.quantize"),
    "compare swapped": (lambda: lowbit.compare(Q, FLOAT, X), "the float model comes first"),
    "compare with itself": (lambda: lowbit.compare(Q, Q, X), "quantized already"),
    "advise swapped": (lambda: lowbit.advise(Q, FLOAT, X), "the float model comes first"),
    "a list, not a tensor": (
        lambda: lowbit.quantization_error([1, 2], INT8),
        "x is of type list, not a Tensor",
    ),
    "a name, not a spec": (lambda: lowbit.quantization_error(X, "int8"), "spec is of type str"),
    "QTensor of a list": (lambda: lowbit.QTensor.quantize([1, 2], INT8), "x is of type list"),
    "batches as text": (lambda: lowbit.quantize(FLOAT, "w8a8", [X], num_batches="3"), "num_batches='3'"),
    "half a batch": (lambda: lowbit.compare(FLOAT, Q, [X], num_batches=2.5), "num_batches=2.5"),
    "a metric by name": (lambda: lowbit.compare(FLOAT, Q, X, metric="acc"), "metric='acc' is not a function"),
    "a metric that fails": (
        lambda: lowbit.compare(FLOAT, Q, X, metric=fails),
        "failed with KeyError.*no label",
    ),
}

RECIPES: dict[str, tuple[Callable[[], Any], str]] = {
    "weight": (lambda: Rule(weight="int9"), "no spec is named 'int9'; did you mean"),
    "weight as bits": (lambda: Rule(weight=8), "no spec is named '8'; choose from"),
    "one rule": (lambda: Recipe(rules=Rule()), "is not a list; write a tuple"),
    "rule of text": (lambda: Recipe(rules=("int8",)), "'int8' is not a rule"),
    "field of a rule": (lambda: Recipe(rules=({"weigth": "int8"},)), "did you mean 'weight'"),
    "refine": (
        lambda: Recipe(rules=(Rule(),), refine="bias_correct"),
        "refine: 'bias_correct'.*write a tuple",
    ),
    "refine by number": (lambda: Recipe(rules=(Rule(),), refine=(3,)), "no refinement is named '3'"),
    "preset by number": (lambda: lowbit.preset(8), "no preset is named '8'"),
    "granularity": (lambda: QuantSpec.from_dict({"bits": 8, "granularity": 5}), "granularity 5 .*channel"),
    "per": (lambda: QuantSpec.from_dict({"bits": 8, "granularity": {"per": []}}), r"granularity \[\]"),
    "spec": (lambda: QuantSpec.from_dict([8]), r"spec \[8\] is of type list"),
    "size": (
        lambda: QuantSpec.from_dict({"bits": 8, "granularity": {"per": "group", "size": "x"}}),
        "group size 'x' is not a whole number",
    ),
    "axis": (lambda: PerChannel(0.5), "axis 0.5 is not a whole number"),
    "axis of groups": (lambda: PerGroup(None, 32), "axis None"),
    "bits": (lambda: QuantSpec(bits=True), "bits=True"),
}


@pytest.mark.parametrize(("call", "message"), OBJECTS.values(), ids=OBJECTS)
def test_the_wrong_object(
    call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowbitError, match=message):
        call()
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize(("call", "message"), RECIPES.values(), ids=RECIPES)
def test_a_field_of_the_wrong_type(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        call()


def test_names_and_plain_data_stand_for_specs_and_rules() -> None:
    rule = Rule(weight="int8", activation={"bits": 8, "signed": False, "symmetric": False})
    assert rule == Rule(weight=INT8, activation=lowbit.UINT8)
    recipe = Recipe(rules=[{"weight": "int8"}], refine=["bias_correct"])
    assert recipe == Recipe(rules=(Rule(weight=INT8),), refine=("bias_correct",))
    assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))


LATER: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "quantize": lambda data: lowbit.quantize(FLOAT, "w8a8", data),
    "calibrate": lambda data: lowbit.calibrate(lowbit.prepare(FLOAT, "w8a8", X), data),
    "compare": lambda data: lowbit.compare(FLOAT, Q, data),
    "advise": lambda data: lowbit.advise(FLOAT, Q, data),
}


@pytest.mark.parametrize("use", LATER.values(), ids=LATER)
def test_a_later_batch_of_another_shape(use: Callable[[list[torch.Tensor]], Any]) -> None:
    with pytest.raises(
        LowbitError, match=r"does not run on a batch of \[4, 5\] float32: .*saw \[\d, 6\] float32"
    ):
        use([X, WRONG])


@pytest.mark.parametrize("x", [WRONG, X.double(), X.long()], ids=["shape", "float64", "int64"])
def test_verify_with_data_that_the_file_does_not_take(x: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = lowbit.export.onnx(Q, tmp_path / "m.onnx")
    with pytest.raises(LowbitError, match=r"does not run on a batch of \[4, ."):
        lowbit.verify(Q, path, [X, x])
