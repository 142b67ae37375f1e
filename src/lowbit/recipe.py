"""What to quantize, how: rules, recipes and presets. All plain data."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lowbit.core.observers import observers
from lowbit.core.spec import FP16, INT4, INT8, UINT8, PerChannel, PerGroup, PerTensor, QuantSpec
from lowbit.errors import LowbitError, near_miss

__all__ = ["Recipe", "Rule", "Target", "preset", "presets"]

REFINEMENTS = ("bias_correct", "affine_correct")


class Target(Protocol):
    """What a rule can match: a named operation of a model."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def roles(self) -> frozenset[str]: ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How to quantize the operations whose name matches."""

    # glob on the dotted name; "re:..." a regular expression; "type:Conv2d" a class; "role:first", "role:last" the layers
    # nearest the input and the output
    match: str = "*"
    # spec of the weight; None leaves it in float
    weight: QuantSpec | None = None
    # spec of the tensors the operation reads, and of what it writes where no reader says otherwise; None is float
    activation: QuantSpec | None = None
    # how the range of activations is chosen
    observer: str = "mse"
    # how the range of the weight is chosen: "mse", or "minmax"
    weight_observer: str = "mse"
    # shown in the table of what became of each layer
    reason: str = ""

    def __post_init__(self) -> None:
        observers.get(self.observer)
        if self.weight_observer not in ("mse", "minmax"):
            raise LowbitError(f"weight_observer='{self.weight_observer}' is unknown; use 'mse' or 'minmax'")
        if self.activation is not None and isinstance(self.activation.granularity, PerGroup):
            raise LowbitError("activations have no fixed groups; use PerTensor or PerChannel for rule.activation")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise LowbitError(f"match='{self.match}' is not a regular expression: {error}") from None

    def matches(self, target: Target) -> bool:
        kind, _, pattern = self.match.partition(":")
        if kind == "re":
            return re.fullmatch(pattern, target.name) is not None
        if kind == "type":
            return target.op == pattern
        if kind == "role":
            return pattern in target.roles
        return fnmatch.fnmatchcase(target.name, self.match)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is quantized; the first rule that matches wins."""

    rules: tuple[Rule, ...]
    # BatchNorm goes into the weight before it
    fold_bn: bool = True
    # cross-layer equalization; kept only when it helps on the calibration data
    equalize: bool = False
    # corrections after calibration, in order; each kept only when it helps
    refine: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rules:
            raise LowbitError("a recipe without rules quantizes nothing; add Rule(match='*', ...)")
        for step in self.refine:
            if step not in REFINEMENTS:
                raise LowbitError(f"no refinement is named '{step}'{near_miss(step, REFINEMENTS)}")

    def resolve(self, targets: Sequence[Target]) -> dict[str, Rule | None]:
        """First matching rule of each target, by name.

        Raises:
            LowbitError: a rule that matches none of the targets.
        """
        for rule in self.rules:
            if targets and not any(rule.matches(t) for t in targets):
                names = [t.name for t in targets] + [f"type:{t.op}" for t in targets]
                raise LowbitError(f"rule '{rule.match}' matches nothing in this model{near_miss(rule.match, names)}")
        return {t.name: next((r for r in self.rules if r.matches(t)), None) for t in targets}

    @property
    def quantizes_activations(self) -> bool:
        return any(rule.activation is not None for rule in self.rules)

    def with_rule(self, rule: Rule) -> Recipe:
        """The same recipe with one rule in front of the others."""
        return replace(self, rules=(rule, *self.rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal after `from_dict`; what YAML and checkpoints hold."""
        rules = []
        for rule in self.rules:
            data = {f.name: getattr(rule, f.name) for f in fields(rule) if getattr(rule, f.name) != f.default}
            rules.append({k: v.to_dict() if isinstance(v, QuantSpec) else v for k, v in data.items()})
        return {"rules": rules, "fold_bn": self.fold_bn, "equalize": self.equalize, "refine": list(self.refine)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Unknown keys are an error, with the nearest known one."""
        _known(data, [f.name for f in fields(cls)], "recipe")
        rules = []
        for entry in data.get("rules") or ():
            _known(entry, [f.name for f in fields(Rule)], "rule")
            specs = {k: _spec(entry[k]) for k in ("weight", "activation") if entry.get(k) is not None}
            rules.append(Rule(**{**entry, **specs}))
        rest = {k: v for k, v in data.items() if k != "rules"}
        return cls(rules=tuple(rules), **rest | {"refine": tuple(rest.get("refine", ()))})

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise LowbitError(f"recipe '{path}' cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(data, dict):
            raise LowbitError(f"recipe '{path}' is not a mapping; start it with 'rules:'")
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def get(cls, recipe: str | Path | Recipe | dict[str, Any]) -> Recipe:
        """A recipe, its plain data, the name of a preset, or the path of a YAML file."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, dict):
            return cls.from_dict(recipe)
        if isinstance(recipe, Path) or Path(recipe).suffix in (".yaml", ".yml", ".json"):
            return cls.load(recipe)
        return preset(recipe)


_SPECS = {"int8": INT8, "int4": INT4, "uint8": UINT8, "fp16": FP16}


def _spec(value: Any) -> QuantSpec:
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, str):
        if value not in _SPECS:
            raise LowbitError(f"no spec is named '{value}'{near_miss(value, _SPECS)}")
        return _SPECS[value]
    return QuantSpec.from_dict(value)


def _known(data: dict[str, Any], names: Sequence[str], what: str) -> None:
    for key in data:
        if key not in names:
            raise LowbitError(f"a {what} has no field '{key}'{near_miss(key, names)}")


_EDGES = "the first and the last layer keep 8 bits"


def presets() -> tuple[str, ...]:
    """Names that `preset` takes."""
    return ("w8a8", "w8", "w4a8", "w4", "fp16")


def preset(
    name: str, *, observer: str = "mse", weight_granularity: Literal["channel", "tensor"] | int = "channel"
) -> Recipe:
    """A recipe by name: `w8a8`, `w8`, `w4a8`, `w4` or `fp16`.

    Args:
        observer: how ranges of activations are chosen; see `lowbit.observers`.
        weight_granularity: one scale per output channel, per tensor, or per group of that many inputs.
    """
    if name not in presets():
        raise LowbitError(f"no preset is named '{name}'{near_miss(name, presets())}")
    if name == "fp16":
        return Recipe(rules=(Rule(weight=FP16),))
    where = PerGroup(1, weight_granularity) if isinstance(weight_granularity, int) else None
    where = where or (PerTensor() if weight_granularity == "tensor" else PerChannel(0))
    activation = UINT8 if name.endswith("a8") else None
    wide = Rule(weight=replace(INT8, granularity=where), activation=activation, observer=observer)
    if name.startswith("w8"):
        return Recipe(rules=(wide,), equalize=where == PerTensor(), refine=("affine_correct",))
    edge = replace(wide, weight=INT8, reason=_EDGES)
    edges = tuple(replace(edge, match=f"role:{role}") for role in ("first", "last"))
    return Recipe(
        rules=(*edges, replace(wide, weight=replace(INT4, granularity=where))), equalize=True, refine=("affine_correct",)
    )
