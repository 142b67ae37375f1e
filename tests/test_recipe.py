"""Recipes: which rule wins, what is refused, and that a recipe survives as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit import (
    DYNAMIC8,
    FP16,
    INT4,
    INT8,
    UINT8,
    LowbitError,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    Recipe,
    Rule,
    preset,
)
from lowbit.core.estimators import estimators
from lowbit.core.spec import BINARY, TERNARY
from lowbit.presets import presets
from lowbit.recipe import SPECS


@dataclass(frozen=True)
class Layer:
    """The least a rule can match."""

    name: str
    op: str
    roles: frozenset[str] = frozenset()


LAYERS = [
    Layer("stem.conv", "Conv2d", frozenset({"first"})),
    Layer("blocks.0.conv1", "Conv2d"),
    Layer("blocks.0.conv2", "Conv2d"),
    Layer("blocks.1.conv1", "Conv2d"),
    Layer("head.fc", "Linear", frozenset({"last"})),
]
every_preset = pytest.mark.parametrize("name", presets())


def matched(*matches: str) -> dict[str, str | None]:
    """Which rule each layer gets, by the rule's pattern."""
    resolved = Recipe(rules=tuple(Rule(match=m, weight=INT8) for m in matches)).resolve(LAYERS)
    return {name: rule.match if rule else None for name, rule in resolved.items()}


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ("*", {layer.name for layer in LAYERS}),
        ("head.fc", {"head.fc"}),
        ("blocks.*", {"blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"}),
        ("*.conv[12]", {"blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"}),
        ("blocks.?.conv1", {"blocks.0.conv1", "blocks.1.conv1"}),
        (r"re:blocks\.\d\.conv1", {"blocks.0.conv1", "blocks.1.conv1"}),
        (r"re:.*conv", {"stem.conv"}),
        ("type:Linear", {"head.fc"}),
        ("role:first", {"stem.conv"}),
        ("role:last", {"head.fc"}),
    ],
)
def test_patterns(match: str, names: set[str]) -> None:
    assert {name for name, rule in matched(match).items() if rule} == names


def test_first_match_wins() -> None:
    assert matched("type:Linear", "blocks.0.*", "*") == {
        "stem.conv": "*",
        "blocks.0.conv1": "blocks.0.*",
        "blocks.0.conv2": "blocks.0.*",
        "blocks.1.conv1": "*",
        "head.fc": "type:Linear",
    }


def test_a_layer_without_a_rule_has_none() -> None:
    assert matched("blocks.*")["head.fc"] is None


def test_a_rule_put_in_front_wins() -> None:
    recipe = preset("w8a8").with_rule(Rule(match="head.fc", reason="it hurts"))
    resolved = recipe.resolve(LAYERS)
    assert resolved["head.fc"] == Rule(match="head.fc", reason="it hurts")
    assert resolved["stem.conv"] == preset("w8a8").rules[0]
    assert len(preset("w8a8").rules) == 1


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("head.cf", r"rule 'head\.cf' matches nothing in this model; did you mean 'head\.fc'\?"),
        ("type:Conv3d", "did you mean 'type:Conv2d'"),
        ("role:frist", "did you mean 'role:first'"),
        ("re:xyz+", r"matches nothing in this model; choose from: .*stem\.conv"),
    ],
)
def test_a_rule_that_matches_nothing(match: str, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        matched(match, "*")


def test_a_model_without_layers_is_no_error() -> None:
    assert preset("w4a8").resolve([]) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observer": "msee"}, "no observer is named 'msee'; did you mean 'mse'"),
        ({"observer": 5}, "observer=5 is not text"),
        ({"match": None}, "match=None is not text"),
        ({"weight": INT8, "weight_observer": "kl"}, "no weight observer is named 'kl'"),
        ({"weight": INT8, "weight_observer": "twn"}, "weight_observer='twn' is for ternary codes"),
        (
            {"weight": BINARY, "weight_observer": "ttq"},
            "ternary codes, and the weight is binary",
        ),
        ({"weight": INT8, "reshape": "recuu"}, "no reshape is named 'recuu'; did you mean 'recu'"),
        ({"activation": replace(BINARY, bits=2, granularity=PerTensor())}, "mid_rise=True.*or with one bit"),
        ({"match": "re:("}, r"match='re:\(' is not a regular expression"),
        ({"activation": QuantSpec(bits=8, granularity=PerGroup(1, 4))}, "activations have no fixed groups"),
        ({"activation": INT8}, "is the batch.*use UINT8 or granularity=PerTensor"),
    ],
    ids=str,
)
def test_rules_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Rule(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": ()}, "a recipe without rules quantizes nothing"),
        ({"rules": (Rule(),), "refine": ("bias_corect",)}, "did you mean 'bias_correct'"),
        (
            {"rules": (Rule(),), "refine": ("gptq", "equalize")},
            "has 'equalize' behind 'gptq'.*write it first",
        ),
        ({"rules": (Rule(),), "refine": ("equalize", "equalize")}, "write it first, and once"),
        ({"rules": (Rule(),), "equalize": "no"}, "equalize='no' is neither True nor False"),
        ({"rules": (Rule(),), "equalize": 1}, "equalize=1 is neither True nor False"),
    ],
    ids=str,
)
def test_recipes_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Recipe(**fields)


# -- presets


@pytest.mark.parametrize(
    ("name", "first", "middle", "activation"),
    [
        ("w8a8", INT8, INT8, UINT8),
        ("w8", INT8, INT8, None),
        ("w4a8", INT8, INT4, UINT8),
        ("w8a8-dynamic", INT8, INT8, DYNAMIC8),
        ("w4a8-dynamic", INT8, INT4, DYNAMIC8),
        ("w4", INT8, INT4, None),
        ("fp16", FP16, FP16, None),
    ],
)
def test_presets(name: str, first: QuantSpec, middle: QuantSpec, activation: QuantSpec | None) -> None:
    recipe = preset(name)
    resolved = recipe.resolve(LAYERS)
    assert [resolved[n].weight for n in ("stem.conv", "head.fc")] == [first, first]  # type: ignore[union-attr]
    assert resolved["blocks.0.conv1"].weight == middle  # type: ignore[union-attr]
    assert {rule.activation for rule in recipe.rules} == {activation}
    assert recipe.quantizes_activations == (activation is not None)


def test_the_presets_are_those() -> None:
    assert presets() == (
        *("w8a8", "w8", "w4a8", "w8a8-dynamic", "w4a8-dynamic", "w4", "w4a4", "w3a3", "w2a2"),
        *("ternary", "b1.58", "w1", "w1a1", "fixed8", "fixed6", "fp16"),
    )


@pytest.mark.parametrize(
    ("where", "granularity"), [("channel", PerChannel(0)), ("tensor", PerTensor()), (32, PerGroup(1, 32))]
)
def test_granularity_of_a_preset(where: Any, granularity: Any) -> None:
    for name in ("w8a8", "w4a8"):
        assert preset(name, weight_granularity=where).rules[-1].weight.granularity == granularity  # type: ignore[union-attr]


def test_observer_of_a_preset() -> None:
    assert {rule.observer for rule in preset("w4a8", observer="kl").rules} == {"kl"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("w8a9", {}, "no preset is named 'w8a9'; did you mean 'w8a8'"),
        ("w8a8", {"observer": "entropy"}, "no observer is named 'entropy'; choose from: .*kl"),
        (
            "w8a8",
            {"weight_granularity": "row"},
            "weight_granularity='row' is unknown; use 'channel', 'tensor'",
        ),
        ("w8a8", {"weight_granularity": 0}, "group size 0 is not positive"),
    ],
)
def test_presets_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        preset(name, **options)


# -- plain data


RICH = Recipe(
    rules=(
        Rule(match="head.*", reason="sensitive"),
        Rule(
            match="re:blocks.*",
            weight=QuantSpec(
                bits=3, granularity=PerGroup(1, 16), scale="pow2", narrow=True, rounding="half_up"
            ),
            activation=QuantSpec(bits=6, symmetric=False, granularity=PerChannel(-1)),
            observer="percentile",
            weight_observer="minmax",
        ),
        Rule(weight=FP16),
    ),
    fold_bn="never",
    equalize=True,
    refine=("affine_correct", "bias_correct"),
)


@pytest.mark.parametrize("recipe", [*map(preset, presets()), RICH], ids=[*presets(), "rich"])
def test_round_trips(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    recipe.save(tmp_path / "r.yaml")
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    assert Recipe.load(tmp_path / "r.yaml") == Recipe.load(tmp_path / "r.json") == recipe


def test_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(
        """
        rules:
          - match: head.fc
            reason: keep in float
          - weight: int4
            activation: {bits: 8, signed: false, symmetric: false}
            observer: kl
        equalize: true
        refine: [bias_correct]
        """,
        encoding="utf-8",
    )
    assert Recipe.get(str(path)) == Recipe(
        rules=(
            Rule(match="head.fc", reason="keep in float"),
            Rule(weight=INT4, activation=UINT8, observer="kl"),
        ),
        equalize=True,
        refine=("bias_correct",),
    )


def test_equalize_among_the_refinements_is_the_switch(tmp_path: Path) -> None:
    named = Recipe(rules=(Rule(),), refine=("equalize", "gptq", "brecq", "adaround"))
    assert named == Recipe(rules=(Rule(),), equalize=True, refine=("gptq", "brecq", "adaround"))
    named.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == named
    (tmp_path / "mine.yaml").write_text(
        "{rules: [{}], refine: [equalize, gptq, brecq, adaround]}", encoding="utf-8"
    )
    assert Recipe.load(tmp_path / "mine.yaml") == named
    assert not replace(named, equalize=False).equalize


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "a recipe without rules"),
        ({"rule": []}, "a recipe has no field 'rule'; did you mean 'rules'"),
        ({"rules": {"match": "*"}}, "rules: .* is not a list"),
        ({"rules": None}, "rules: None is not a list"),
        ({"rules": ["w8a8"]}, "'w8a8' is not a rule; write it as a mapping of match, weight"),
        ({"rules": [{"weigth": "int8"}]}, "a rule has no field 'weigth'; did you mean 'weight'"),
        ({"rules": [{3: "int8"}]}, "a rule has no field '3'"),
        ({"rules": [{"weight": "int9"}]}, "no spec is named 'int9'; did you mean 'int"),
        ({"rules": [{"weight": 8}]}, "no spec is named '8'"),
        ({"rules": [{"weight": ["int8"]}]}, "no spec is named"),
        ({"rules": [{"weight": {"bits": 99}}]}, "bits=99"),
        ({"rules": [{}], "refine": "bias_correct"}, "refine: 'bias_correct' is not a list"),
        ([], r"\[\] is not a recipe"),
    ],
    ids=str,
)
def test_plain_data_that_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    """Wherever it comes from; a file is named."""
    with pytest.raises(LowbitError, match=message):
        Recipe.from_dict(data)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(LowbitError, match=rf"recipe '.*r\.yaml': .*{message}"):
        Recipe.load(path)


@pytest.mark.parametrize("content", [b"rules: [", b"\xff\xfe\xfa", b""], ids=["syntax", "encoding", "empty"])
def test_files_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=r"recipe '.*r\.yaml'") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"cannot be read: .*No such file"):
        Recipe.get(tmp_path / "none.yaml")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="folder"):
        preset("w8").save(tmp_path / "none" / "r.yaml")
    assert not list(tmp_path.iterdir())


@every_preset
def test_get_takes_every_form(name: str, tmp_path: Path) -> None:
    recipe = preset(name)
    recipe.save(tmp_path / "r.yaml")
    forms: list[Any] = [name, recipe, recipe.to_dict(), tmp_path / "r.yaml", str(tmp_path / "r.yaml")]
    assert all(Recipe.get(form) == recipe for form in forms)


@pytest.mark.parametrize("form", [None, 8, ["w8a8"]], ids=str)
def test_get_refuses_the_rest(form: Any) -> None:
    with pytest.raises(LowbitError, match="is no recipe; pass a Recipe, a dict, a name or a path"):
        Recipe.get(form)


# -- presets for training


@pytest.mark.parametrize("weight", range(1, 9))
@pytest.mark.parametrize("inputs", [None, *range(1, 9)])
def test_presets_of_every_width(weight: int, inputs: int | None) -> None:
    """First and last layer keep 8 bits; inputs narrower than 8 are those of layers, and sums keep 8."""
    name = f"w{weight}" if inputs is None else f"w{weight}a{inputs}"
    recipe = preset(name)
    operations = [*LAYERS, Layer("add", "add")]
    operations = [replace(o, roles=o.roles | {"layer"}) if o.op != "add" else o for o in operations]
    resolved = recipe.resolve(operations)
    for operation in operations:
        rule = resolved[operation.name]
        assert rule is not None
        edge, addition = bool(operation.roles & {"first", "last"}), operation.op == "add"
        if not addition:
            assert rule.weight == (INT8 if edge else replace(INT4, bits=weight, mid_rise=weight <= 3))
        if inputs is None:
            assert rule.activation is None
        elif inputs == 1 and not edge and not addition:
            assert rule.activation == SPECS["sign"]
        else:
            assert rule.activation == replace(UINT8, bits=8 if edge or addition else inputs)
        assert rule.estimator == "lsq"
    assert recipe.fold_bn == "after", "BatchNorm is trained along"
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.get(name) == recipe


@pytest.mark.parametrize(
    "name", ["w0a8", "w9a4", "w4a0", "ternary8", "b1.5", "w4a", "w04a4", "W4A4", "w4a4 ", "", "w4a16"]
)
def test_widths_that_no_preset_has(name: str) -> None:
    with pytest.raises(LowbitError, match="no preset is named"):
        preset(name)


@pytest.mark.parametrize("estimator", estimators.names())
def test_estimator_of_a_preset(estimator: str) -> None:
    recipe = preset("w1a1" if estimators.get(estimator).one_bit else "w4a4", estimator=estimator)
    assert {rule.estimator for rule in recipe.rules} == {estimator}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_an_estimator_of_one_bit_needs_one() -> None:
    message = (
        "estimator='ede' is for codes of one bit, and its rules have none; use 'lsq', or the spec 'binary'"
    )
    with pytest.raises(LowbitError, match=message):
        preset("w4a4", estimator="ede")


@pytest.mark.parametrize(
    ("name", "spec", "observer", "activation"),
    [
        ("ternary", TERNARY, "mse", None),
        ("ternarya4", TERNARY, "mse", replace(UINT8, bits=4)),
        ("b1.58", replace(TERNARY, granularity=PerTensor()), "absmean", UINT8),
        ("w1", BINARY, "mse", None),
        ("w1a8", BINARY, "mse", UINT8),
    ],
)
def test_presets_of_binary_and_ternary_weights(
    name: str, spec: QuantSpec, observer: str, activation: QuantSpec | None
) -> None:
    layers = [replace(layer, roles=layer.roles | {"layer"}) for layer in LAYERS]
    recipe = preset(name)
    rules = recipe.resolve([*layers, Layer("add", "add")])
    inner = [rules[layer.name] for layer in LAYERS if not layer.roles & {"first", "last"}]
    for rule in inner:
        assert rule is not None
        assert (rule.weight, rule.weight_observer, rule.activation) == (spec, observer, activation)
    edges = [rules[layer.name] for layer in LAYERS if layer.roles & {"first", "last"}]
    assert all(rule is not None and rule.weight is not None and rule.weight.bits == 8 for rule in edges)


def test_an_estimator_that_does_not_exist() -> None:
    with pytest.raises(LowbitError, match="no estimator is named 'lsqq'; did you mean 'lsq'"):
        preset("w4a4", estimator="lsqq")
    with pytest.raises(LowbitError, match="estimator=7 is not text"):
        Rule(estimator=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, False, None, "After", "always"])
def test_when_batchnorm_is_folded(value: Any) -> None:
    with pytest.raises(LowbitError, match=r"fold_bn=.* is unknown; use 'before', 'after' or 'never'"):
        Recipe(rules=(Rule(),), fold_bn=value)


def test_granularity_of_a_preset_for_training() -> None:
    """A group size that suits the inner layers rarely divides the inputs of the first."""
    groups, whole = preset("w4a4", weight_granularity=16), preset("w4a4", weight_granularity="tensor")
    assert [r.weight and r.weight.granularity for r in groups.rules] == [
        PerChannel(0),
        PerChannel(0),
        PerGroup(1, 16),
        None,
    ]
    assert [r.weight and r.weight.granularity for r in whole.rules] == [*[PerTensor()] * 3, None]
