"""What to quantize, how: rules and recipes. All plain data."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lowbit.core.estimators import estimators
from lowbit.core.observers import observers
from lowbit.core.reshapes import reshapes
from lowbit.core.spec import (
    BINARY,
    DYNAMIC8,
    FP16,
    INT4,
    INT8,
    TERNARY,
    UINT8,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
)
from lowbit.core.weight_observers import check_weight_observer
from lowbit.errors import LowbitError, near_miss
from lowbit.files import atomic_path

__all__ = ["SPECS", "Recipe", "Rule", "Target", "exactly"]

REFINEMENTS = (
    "equalize",
    "bond_correct",
    "bias_correct",
    "affine_correct",
    "gptq",
    "adaround",
    "brecq",
    "reestimate_bn",
)


class Target(Protocol):
    """What a rule can match: a named operation of a model."""

    @property
    def name(self) -> str:
        """Dotted path."""
        ...

    @property
    def op(self) -> str:
        """Class of the layer, or name of the function."""
        ...

    @property
    def roles(self) -> frozenset[str]:
        """Those of ROLES that it has."""
        ...


# what an operation can be to the network; `graph.match.operations` finds it
ROLES = ("first", "last", "layer", "shortcut")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How to quantize the operations whose name matches."""

    # glob on the dotted name; "re:..." a regular expression; "type:Conv2d" a class; "role:first", "role:last"
    # the layers nearest the input and the output; "role:layer" whatever has a weight; "role:shortcut" 1x1
    # convolutions that are one side of a residual sum by themselves, of which there may be none
    match: str = "*"
    # spec of the weight, or its name: int8, int4, fp16, binary, ternary; None leaves it in float
    weight: QuantSpec | None = None
    # spec of the tensors the operation reads, and of what it writes where no reader says otherwise, or its
    # name: uint8, fp16, sign (-1, 1), bit (0, 1); None leaves them in float. With ranges found at run time,
    # such as dynamic8, what linear layers read, and nothing else
    activation: QuantSpec | None = None
    # how the range of activations is chosen, unless it is found at run time
    observer: str = "mse"
    # how the scale of the weight is chosen: "mse", or "minmax"; of binary and ternary ones also "absmean",
    # "twn" and "ttq"; see `lowbit.core.weight_observers`
    weight_observer: str = "mse"
    # what is done to the weight before it is rounded: "standardize", "clip", "recu" ...; empty leaves that to
    # the estimator; see `lowbit.core.reshapes`
    reshape: str = ""
    # what training takes for the gradient of rounding; one that is for one bit leaves wider codes to "lsq";
    # see `lowbit.core.estimators`
    estimator: str = "lsq"
    # shown in the table of what became of each layer
    reason: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        for field in ("match", "observer", "weight_observer", "estimator", "reshape", "reason"):
            if not isinstance(getattr(self, field), str):
                raise LowbitError(
                    f"{field}={getattr(self, field)!r} is not text; a rule is plain data, so write a name"
                )
        for field in ("weight", "activation"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, _spec(getattr(self, field)))
        observers.get(self.observer)
        reshapes.get(self.reshape or "none")
        if self.weight is not None and self.weight.dynamic:
            raise LowbitError(
                "weight has dynamic=True, and the range of a weight is known before; use it for activation"
            )
        if self.weight is not None:
            check_weight_observer(self.weight_observer, self.weight)
        estimators.get(self.estimator)
        if self.activation is not None and isinstance(self.activation.granularity, PerGroup):
            raise LowbitError(
                "activations have no fixed groups; use PerTensor or PerChannel for rule.activation"
            )
        if self.activation is not None and self.activation.granularity == PerChannel(0):
            cure = "'sign'" if self.activation.is_binary else "UINT8 or granularity=PerTensor()"
            raise LowbitError(
                f"axis 0 of an activation is the batch, whose length changes; use {cure} for rule.activation"
            )
        if self.activation is not None and self.activation.mid_rise and not self.activation.is_binary:
            raise LowbitError(
                "activation has mid_rise=True, whose codes have no zero for padding to be; use it for "
                "weights, or with one bit"
            )
        if self.activation is not None and self.activation.split:
            raise LowbitError("activation has split=True; scales for each sign are those of weights")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise LowbitError(f"match='{self.match}' is not a regular expression: {error}") from None

    def matches(self, target: Target) -> bool:
        """Whether the rule is about that operation."""
        kind, _, pattern = self.match.partition(":")
        if kind == "re":
            return re.fullmatch(pattern, target.name) is not None
        if kind == "type":
            return target.op == pattern
        if kind == "role":
            return pattern in target.roles
        return fnmatch.fnmatchcase(target.name, self.match)


def exactly(name: str) -> str:
    """The `match` of a rule that is about one name and no other."""
    special = any(c in name for c in "*?[") or name.partition(":")[0] in ("re", "type", "role")
    return f"re:{re.escape(name)}" if special else name


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is quantized; the first rule that matches wins."""

    rules: tuple[Rule, ...]
    # BatchNorm goes into the weight "before" quantization; or "after" it, at freeze, into the scale of each
    # output channel, so that it can be trained; or "never", and stays in float
    fold_bn: Literal["before", "after", "never"] = "before"
    # cross-layer equalization; kept only when it helps on the calibration data
    equalize: bool = False
    # moves what is uneven among the channels of an activation, behind LayerNorm or GELU, into the weights
    # that read it; kept only when it helps on the calibration data
    smooth: bool = False
    # corrections after calibration, in order; each kept only when it helps. "gptq" rounds each layer for what
    # it does to the data, and is the one to take: within a dB of learned rounding, and far cheaper.
    # "adaround" learns the rounding of each layer, "brecq" that of each block of layers together with the
    # scales of its activations; behind "gptq" they start from its codes, and add tenths of a dB where
    # activations have 4 bits. "equalize", at the head, is `equalize=True`
    refine: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        for key in ("equalize", "smooth"):
            if not isinstance(getattr(self, key), bool):
                raise LowbitError(f"{key}={getattr(self, key)!r} is neither True nor False")
        if self.fold_bn not in ("before", "after", "never"):
            raise LowbitError(f"fold_bn={self.fold_bn!r} is unknown; use 'before', 'after' or 'never'")
        for key in ("rules", "refine"):
            object.__setattr__(self, key, _tuple(key, getattr(self, key)))
        object.__setattr__(self, "rules", tuple(_rule(entry) for entry in self.rules))
        if not self.rules:
            raise LowbitError("a recipe without rules quantizes nothing; add Rule(match='*', ...)")
        if any(estimators.get(rule.estimator).one_bit for rule in self.rules):
            self._check_one_bit()
        self._check_refine()

    def _check_refine(self) -> None:
        """Names, and "equalize" said as the switch that it is."""
        for step in self.refine:
            if step not in REFINEMENTS:
                raise LowbitError(f"no refinement is named '{step}'{near_miss(step, REFINEMENTS)}")
        if "equalize" in self.refine[1:]:
            raise LowbitError(
                f"refine={self.refine} has 'equalize' behind '{self.refine[0]}', and it changes weights "
                "before their scales are chosen; write it first, and once"
            )
        if self.refine[:1] == ("equalize",):
            object.__setattr__(self, "equalize", True)
            object.__setattr__(self, "refine", self.refine[1:])

    def _check_one_bit(self) -> None:
        """An estimator of one bit may stand in rules of wider edges too, but somewhere it must have one."""
        rules = [rule for rule in self.rules if estimators.get(rule.estimator).one_bit]
        specs = [spec for rule in rules for spec in (rule.weight, rule.activation) if spec is not None]
        if all(spec.bits > 1 for spec in specs):
            raise LowbitError(
                f"estimator='{rules[0].estimator}' is for codes of one bit, and its rules have none; use "
                "'lsq', or the spec 'binary' for weights, 'sign' or 'bit' for activations"
            )

    def resolve(self, targets: Sequence[Target]) -> dict[str, Rule | None]:
        """First matching rule of each target, by name.

        Raises:
            LowbitError: a rule that matches none of the targets.
        """
        for rule in self.rules:
            if targets and rule.match != "role:shortcut" and not any(rule.matches(t) for t in targets):
                names = [t.name for t in targets] + [f"type:{t.op}" for t in targets]
                near = near_miss(rule.match, [*names, *(f"role:{role}" for role in ROLES)])
                raise LowbitError(f"rule '{rule.match}' matches nothing in this model{near}")
        return {t.name: next((r for r in self.rules if r.matches(t)), None) for t in targets}

    @property
    def quantizes_activations(self) -> bool:
        """Whether any rule asks for it."""
        return any(rule.activation is not None for rule in self.rules)

    @property
    def calibrates(self) -> bool:
        """Whether there are ranges of activations that come from data."""
        return any(rule.activation is not None and not rule.activation.dynamic for rule in self.rules)

    def with_rule(self, rule: Rule) -> Recipe:
        """The same recipe with one rule in front of the others."""
        return replace(self, rules=(rule, *self.rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal after `from_dict`; what YAML and checkpoints hold."""
        rules = []
        for rule in self.rules:
            data = {f.name: getattr(rule, f.name) for f in fields(rule) if getattr(rule, f.name) != f.default}
            rules.append({k: v.to_dict() if isinstance(v, QuantSpec) else v for k, v in data.items()})
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rules"}
        return {"rules": rules, **rest, "refine": list(self.refine)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`; a spec may also be written as its name; see `SPECS`.

        Raises:
            LowbitError: an unknown key or a value that is not one of its kind.
        """
        _check_keys(data, cls)
        return cls(**{"rules": (), **data})

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise LowbitError(f"recipe '{path}' cannot be read: {str(error).splitlines()[0]}") from None
        try:
            return cls.from_dict(data)
        except LowbitError as error:
            raise LowbitError(f"recipe '{path}': {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads.

        Raises:
            LowbitError: the path cannot be written; what was there stays.
        """
        import yaml

        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def get(cls, recipe: str | Path | Recipe | dict[str, Any]) -> Recipe:
        """A recipe, its plain data, the name of a preset, or the path of a YAML file.

        Raises:
            LowbitError: none of these, or not a valid one.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, dict):
            return cls.from_dict(recipe)
        if not isinstance(recipe, (str, Path)):
            raise LowbitError(
                f"a {type(recipe).__name__} is no recipe; pass a Recipe, a dict, a name or a path"
            )
        if isinstance(recipe, Path) or Path(recipe).suffix in (".yaml", ".yml", ".json"):
            return cls.load(recipe)
        from lowbit.presets import preset

        return preset(recipe)


SPECS = {
    "int8": INT8,
    "int4": INT4,
    "uint8": UINT8,
    "fp16": FP16,
    "binary": BINARY,
    "ternary": TERNARY,
    "sign": replace(BINARY, granularity=PerTensor()),
    "dynamic8": DYNAMIC8,
    "bit": QuantSpec(bits=1, signed=False),
}


def _rule(entry: Any) -> Rule:
    if isinstance(entry, Rule):
        return entry
    _check_keys(entry, Rule)
    return Rule(**entry)


def _spec(value: Any) -> QuantSpec:
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, dict):
        return QuantSpec.from_dict(value)
    if not isinstance(value, str) or value not in SPECS:
        raise LowbitError(f"no spec is named '{value}'{near_miss(str(value), SPECS)}")
    return SPECS[value]


def _tuple(key: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise LowbitError(
            f"{key}: {value!r} is not a list; write a tuple, {key}=(..., ), "
            "or in YAML each entry on a line that starts with '- '"
        )
    return tuple(value)


def _check_keys(data: Any, cls: type[Rule | Recipe]) -> None:
    what, names = cls.__name__.lower(), [f.name for f in fields(cls)]
    if not isinstance(data, dict):
        raise LowbitError(f"{data!r} is not a {what}; write it as a mapping of {', '.join(names)}")
    for key in data:
        if key not in names:
            raise LowbitError(f"a {what} has no field '{key}'{near_miss(str(key), names)}")
