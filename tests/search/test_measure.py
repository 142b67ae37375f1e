"""The table of sensitivities against setting one quantizer by hand and running the whole network."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, conv
from torch import Tensor, nn

import lowbit
from lowbit import INT4, INT8, UINT8, LowbitError, QuantSpec, Recipe, Rule
from lowbit.core.affine import choose_qparams
from lowbit.core.observers import MSE
from lowbit.core.ranges import least_error_range_of
from lowbit.core.spec import BINARY, TERNARY
from lowbit.model import QuantizedModel
from lowbit.nn.quantizer import Quantizer
from lowbit.search import Budget, Sensitivity, allocate, sensitivity
from lowbit.search.measure import prober_of
from lowbit.search.prober import Prober
from lowbit.search.sites import narrowed, places_of

RECIPE = Recipe(rules=(Rule(weight=INT8, activation=UINT8),))
BITS = (8, 4, 2)


def network() -> nn.Module:
    """A shortcut, a layer called twice, and a pooled head."""
    torch.manual_seed(0)
    return Fn(
        lambda m, x: m.fc(F.relu(m.b(F.relu(m.b(y := F.relu(m.a(x))))) + y).mean((2, 3))),
        a=conv(3, 8),
        b=conv(8, 8),
        fc=nn.Linear(8, 5),
    ).eval()


def data(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator),
            torch.randint(0, 5, (6,), generator=generator),
        )
        for _ in range(n)
    ]


def prepared(calibrated: bool = False) -> QuantizedModel:
    q = lowbit.prepare(network(), RECIPE, data()[0][0])
    return lowbit.calibrate(q, [x for x, _ in data()]) if calibrated else q


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    return sensitivity(prepared(), data(), bits=BITS)


def by_hand(q: QuantizedModel, path: str, spec: QuantSpec) -> tuple[float, float, float, float]:
    """(KL, noise over signal, loss gained, accuracy lost) from whole runs of a copy with one quantizer on."""
    gm = copy.deepcopy(q.graph).eval()
    quantizers = {n: m for n, m in gm.named_modules() if isinstance(m, Quantizer)}
    for m in quantizers.values():
        m.mode = "off"
    x, y = torch.cat([x for x, _ in data()]), torch.cat([y for _, y in data()])
    with torch.no_grad():
        reference = gm(x)
        one = quantizers[path]
        if path.endswith("weight_quantizer"):
            weight = gm.get_submodule(path.removesuffix(".weight_quantizer")).weight
            ends = least_error_range_of(weight, spec)
        else:
            observer, seen = MSE(spec), []
            handle = one.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            gm(x)
            handle.remove()
            for t in seen:
                observer.update(t)
            ends = observer.range()
        one.spec = spec
        one.scale, one.zero_point = choose_qparams(*ends, spec)
        one.mode = "quantize"
        output = gm(x)
    p, q_ = reference.double().log_softmax(1), output.double().log_softmax(1)
    kl = (p.exp() * (p - q_)).sum(1).mean().item()
    noise = ((reference - output).double().square().sum() / reference.double().square().sum()).item()
    loss = (F.cross_entropy(output, y) - F.cross_entropy(reference, y)).item()
    right = [(t.argmax(1) == y).float().mean().item() for t in (reference, output)]
    return kl, noise, loss, right[0] - right[1]


def test_every_probe_is_what_a_whole_run_gives(table: Sensitivity) -> None:
    q = prepared()
    assert [s.name for s in table if s.kind == "weight"] == ["a", "b", "fc"]
    assert len([s for s in table if s.kind == "activation"]) >= 4
    for site in table:
        assert len(site.probes) == len(BITS)
        for probe in site.probes:
            kl, noise, loss, drop = by_hand(q, site.path, probe.spec)
            assert probe.kl == pytest.approx(kl, rel=1e-2, abs=1e-9)
            assert probe.noise == pytest.approx(noise, rel=1e-2, abs=1e-12)
            assert probe.loss == pytest.approx(loss, rel=1e-3, abs=1e-6)
            assert probe.drop == pytest.approx(drop, abs=1e-6)


def test_fewer_bits_cost_more(table: Sensitivity) -> None:
    for site in table:
        assert site.probes[0].kl < site.probes[-1].kl
        assert site.probes[0].fisher < site.probes[-1].fisher  # type: ignore[operator]


def test_the_model_is_left_as_it_was() -> None:
    q = prepared(calibrated=True).train()
    modules, state = dict(q.named_modules()), copy.deepcopy(q.state_dict())
    modes = {n: m.mode for n, m in q.named_modules() if isinstance(m, Quantizer)}
    sensitivity(q, data(), bits=BITS)
    assert q.training
    assert all(q.get_submodule(n) is m for n, m in modules.items() if n)
    assert q.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in q.state_dict().items())
    assert modes == {n: m.mode for n, m in q.named_modules() if isinstance(m, Quantizer)}


def test_what_is_not_asked_for_stays_quantized() -> None:
    """Activations calibrated before are part of the reference."""
    alone = sensitivity(prepared(), data(), bits=BITS, kinds=("weight",), curvature=False)
    among = sensitivity(prepared(calibrated=True), data(), bits=BITS, kinds=("weight",), curvature=False)
    assert {s.kind for s in among} == {"weight"}
    assert alone.loss != among.loss


def test_memory_changes_nothing_but_the_parts(table: Sensitivity) -> None:
    small = sensitivity(prepared(), data(), bits=BITS, memory=1)
    for one, other in zip(table, small, strict=True):
        for a, b in zip(one.probes, other.probes, strict=True):
            assert a.kl == pytest.approx(b.kl, rel=1e-6, abs=1e-12)
            assert a.noise == pytest.approx(b.noise, rel=1e-6)


class KilledError(Exception):
    pass


def counted(monkeypatch: pytest.MonkeyPatch, stop: int = 10**9) -> list[int]:
    """Counts runs of the network in `calls[0]`; the one of number `stop` fails."""
    calls, measure = [0], Prober.measure

    def watched(self: Prober, which: Sequence[int], outputs: Sequence[Any]) -> Any:
        calls[0] += 1
        if calls[0] == stop:
            raise KilledError
        return measure(self, which, outputs)

    monkeypatch.setattr(Prober, "measure", watched)
    return calls


@pytest.mark.parametrize("torn", [False, True], ids=["between lines", "inside a line"])
def test_interrupted_it_goes_on(
    torn: bool, table: Sensitivity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, stop=8)
    with pytest.raises(KilledError):
        sensitivity(prepared(), data(), bits=BITS, out=tmp_path)
    journal = tmp_path / "probes.jsonl"
    if torn:
        journal.write_text(journal.read_text()[:-7])
    done = len(journal.read_text().splitlines()) - 1 - torn
    assert done == 6 - torn, "the reference is run first"
    monkeypatch.undo()
    calls = counted(monkeypatch)
    again = sensitivity(prepared(), data(), bits=BITS, out=tmp_path)
    total = sum(len(site.probes) for site in table)
    assert calls[0] == 1 + total - done
    assert again == table
    assert sensitivity(prepared(), data(), bits=BITS, out=tmp_path) == table


def test_more_candidates_cost_only_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensitivity(prepared(), data(), bits=(8, 4), out=tmp_path)
    calls = counted(monkeypatch)
    table = sensitivity(prepared(), data(), bits=(8, 4, 2), out=tmp_path)
    assert calls[0] == 1 + len(table.sites)
    assert table == sensitivity(prepared(), data(), bits=(8, 4, 2))


def test_probes_of_something_else_are_refused(tmp_path: Path) -> None:
    sensitivity(prepared(), data(), bits=(8,), out=tmp_path)
    other = [(x + 1, y) for x, y in data()]
    with pytest.raises(LowbitError, match=r"measured with data = '\w+', and now it is '\w+'.*another folder"):
        sensitivity(prepared(), other, bits=(8,), out=tmp_path)
    q = prepared()
    q.graph.a.weight.data.mul_(2)
    with pytest.raises(LowbitError, match="measured with model = "):
        sensitivity(q, data(), bits=(8,), out=tmp_path)
    (tmp_path / "probes.jsonl").write_text('{"format": 1}\n[]\n')
    with pytest.raises(LowbitError, match="was measured with model = None"):
        sensitivity(q, data(), bits=(8,), out=tmp_path)


def test_what_must_go_together(table: Sensitivity) -> None:
    """Both operands of the addition have one rule, and so have both calls of the layer."""
    add = [s for s in table if s.kind == "activation" and "add" in s.operations]
    assert len(add) == 2
    assert any({s.path for s in add} <= set(group) for group in table.groups)


def test_candidates_may_be_specs() -> None:
    """Binary and ternary weights stand beside widths, and end up in the recipe."""
    split = replace(TERNARY, split=True)
    table = sensitivity(prepared(), data(), bits=(4, TERNARY, split, BINARY), kinds=("weight",))
    assert [p.spec for p in table.site("b").probes] == [INT4, TERNARY, split, BINARY]
    four, ternary, _, binary = (p.noise for p in table.site("b").probes)
    assert four < ternary < binary
    found = allocate(table, Budget(average_bits=1.0))
    assert set(found.specs.values()) == {BINARY}
    q = lowbit.quantize(network(), found.recipe, [x for x, _ in data()])
    assert q.cost().average_bits == 1.0


def test_a_recipe_keeps_what_was_measured() -> None:
    """A weight observer that is for ternary codes stands only where these were chosen."""
    rule = Rule(weight=replace(TERNARY, split=True), weight_observer="ttq", activation=UINT8)
    q = lowbit.prepare(network(), Recipe(rules=(rule,)), data()[0][0])
    table = sensitivity(q, data(), bits=(8, rule.weight), kinds=("weight",))  # type: ignore[arg-type]
    for bits, observer in ((8.0, "mse"), (2.0, "ttq")):
        rules = allocate(table, Budget(average_bits=bits)).recipe.rules
        assert {r.weight_observer for r in rules if r.match in ("a", "b", "fc")} == {observer}


def test_narrow_weights_have_odd_codes_as_in_presets() -> None:
    assert narrowed(INT8, 2, "weight") == replace(INT8, bits=2, mid_rise=True)
    assert narrowed(INT8, 4, "weight") == INT4
    assert narrowed(UINT8, 2, "activation") == replace(UINT8, bits=2)


def test_without_labels_there_is_still_a_table() -> None:
    table = sensitivity(prepared(), [x for x, _ in data()], bits=BITS)
    probe = table.site("a").probes[-1]
    assert (probe.loss, probe.drop, probe.fisher, table.metric) == (None, None, None, None)
    assert probe.kl > 0


def test_a_table_comes_back_from_its_file(table: Sensitivity, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert Sensitivity.load(tmp_path / "table.json") == table
    assert "b" in str(table)
    (tmp_path / "bad.json").write_text(json.dumps({"sites": 3}))
    with pytest.raises(LowbitError, match="not a table of sensitivities"):
        Sensitivity.load(tmp_path / "bad.json")
    with pytest.raises(LowbitError, match="cannot be read"):
        Sensitivity.load(tmp_path / "none.json")


def test_the_curvature_of_a_quadratic_is_exact() -> None:
    """One linear layer under a squared error: H is known, and so is what rounding costs."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False)
    x = torch.randn(64, 4)
    q = lowbit.prepare(net, Recipe(rules=(Rule(weight=INT8),)), x)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return (output - labels).square().sum(1).mean()

    batch = [(x, net(x).detach() + torch.randn(64, 3))]
    table = sensitivity(q, batch, bits=(3,), kinds=("weight",), loss=loss, metric=lambda o, _: -o.sum())
    (probe,) = table.sites[0].probes
    spec = probe.spec
    d = q.graph.get_submodule(table.sites[0].path.removesuffix(".weight_quantizer")).weight.detach()
    scale, _ = choose_qparams(*least_error_range_of(d, spec), spec)
    change = lowbit.core.affine.fake_quantize(d, scale, None, spec) - d
    trace = 3 * 2 * x.square().mean(0).sum().item()
    assert probe.hessian == pytest.approx(0.5 * trace / 12 * change.square().sum().item(), rel=0.2)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no candidates": ({"bits": ()}, r"bits=\(\) leaves nothing to choose from"),
    "no width": ({"bits": (0,)}, "bits=0 is not a whole number from 1 to 16"),
    "half a bit": ({"bits": (2.5,)}, "bits entry 2.5"),
    "a float spec": ({"bits": (lowbit.FP16,), "kinds": ("weight",)}, "no integer"),
    "no width for activations": ({"bits": (INT4,)}, "no candidate is a width, so the inputs of 'a'"),
    "one number": ({"bits": 8}, "bits=8 leaves nothing to choose from"),
    "an axis of its own": (
        {"bits": (replace(INT4, granularity=lowbit.PerChannel(1)),), "kinds": ("weight",)},
        r"another axis than PerChannel\(0\)|has an axis of its own",
    ),
    "unknown kind": ({"kinds": ("bias",)}, "'bias' is unknown; use weight and activation"),
    "no data": ({"data": []}, "holds no batch with a sample"),
    "nan": ({"metric": lambda *_: float("nan")}, "returned nan, which ranks nothing"),
    "group that does not divide": (
        {"bits": (QuantSpec(bits=4, granularity=lowbit.PerGroup(1, 5)),), "kinds": ("weight",)},
        "'a' cannot have the candidate .*group size 5 does not divide",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, message = BAD[name]
    arguments = {"data": data(), "bits": (8,), "curvature": False, **changes}
    with pytest.raises(LowbitError, match=message):
        sensitivity(prepared(), arguments.pop("data"), **arguments)


def test_models_without_a_choice() -> None:
    q = lowbit.quantize(network(), RECIPE, [x for x, _ in data()])
    with pytest.raises(LowbitError, match="frozen"):
        sensitivity(q, data())
    q = lowbit.prepare(network(), "fp16", data()[0][0])
    with pytest.raises(LowbitError, match="no bits to choose"):
        sensitivity(q, data())


def test_the_folder_knows_what_was_measured(tmp_path: Path) -> None:
    """Other kinds, another function, other labels in a dict: none may be mixed in."""

    def loss(factor: float) -> Any:
        return lambda output, labels: factor * F.cross_entropy(output, labels)

    calls: dict[str, Any] = {"bits": (8,), "curvature": False, "out": tmp_path, "kinds": ("weight",)}
    sensitivity(prepared(), data(), **calls, loss=loss(1.0))
    sensitivity(prepared(), data(), **calls, loss=loss(1.0))
    for change in ({"kinds": ("weight", "activation"), "loss": loss(1.0)}, {"loss": loss(10.0)}):
        with pytest.raises(LowbitError, match="was measured with"):
            sensitivity(prepared(), data(), **calls | change)
    model = Fn(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))
    q = lowbit.prepare(model, RECIPE, {"x": torch.randn(4, 4)})
    batch = {"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    here: dict[str, Any] = {"bits": (8,), "curvature": False, "out": tmp_path / "b"}
    sensitivity(q, [batch], **here)
    with pytest.raises(LowbitError, match="was measured with data"):
        sensitivity(q, [batch | {"labels": torch.tensor([1, 1, 1, 1])}], **here)


def test_the_observer_of_the_rule_finds_the_ranges_also_after_calibration() -> None:
    rule = replace(RECIPE.rules[0], observer="minmax")
    tables = []
    for recipe in (RECIPE, replace(RECIPE, rules=(rule,))):
        q = lowbit.prepare(network(), recipe, data()[0][0])
        lowbit.calibrate(q, [x for x, _ in data()])
        tables.append(sensitivity(q, data(), bits=(4,), kinds=("activation",), curvature=False))
    mse, minmax = ([s.probes[0].noise for s in t] for t in tables)
    assert mse != minmax


def test_frozen_weights_have_a_curvature_too() -> None:
    q = prepared()
    plain = sensitivity(q, data(), bits=(4,), kinds=("weight",))
    for p in q.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        frozen = sensitivity(q, data(), bits=(4,), kinds=("weight",))
    assert [s.probes[0].hessian for s in plain] == [s.probes[0].hessian for s in frozen]
    assert not any(p.requires_grad for p in q.parameters())


def test_attention_has_a_curvature() -> None:
    torch.manual_seed(0)
    model = Fn(
        lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), x).mean(1)),
        q=nn.Linear(8, 8),
        k=nn.Linear(8, 8),
        o=nn.Linear(8, 3),
    ).eval()
    x = torch.randn(4, 5, 8)
    q = lowbit.prepare(model, Recipe(rules=(Rule(weight=INT8),)), x)
    table = sensitivity(q, [(x, torch.tensor([0, 1, 2, 0]))], bits=(4,), kinds=("weight",))
    assert all(s.probes[0].hessian is not None for s in table)


def test_one_logit_and_impossible_classes() -> None:
    """KL has nothing to say about one number; of a class that cannot be there is nothing to compare."""
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    one = lowbit.prepare(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), Recipe(rules=(Rule(weight=INT8),)), x)
    table = sensitivity(one, [x], bits=(8, 2), kinds=("weight",), curvature=False)
    assert [p.kl for p in table.sites[0].probes] == [0, 0]
    assert table.sites[0].probes[1].noise > 0

    mask = torch.tensor([0.0, float("-inf"), 0.0])
    masked = Fn(lambda m, x: m.fc(x) + m.mask, fc=nn.Linear(4, 3))
    masked.register_buffer("mask", mask)
    q = lowbit.prepare(masked, Recipe(rules=(Rule(weight=INT8),)), x)
    (probe,) = sensitivity(q, [x], bits=(2,), kinds=("weight",), curvature=False).sites[0].probes
    assert 0 < probe.kl < 10
    assert 0 < probe.noise < 1


def test_a_spec_that_fails_leaves_the_model_whole() -> None:
    q = prepared()
    modules = dict(q.named_modules())
    prober = prober_of(q, places_of(q, ("weight",)), data())
    with (
        pytest.raises(LowbitError),
        prober.quantizing(dict.fromkeys(prober.places, QuantSpec(bits=4, granularity=lowbit.PerGroup(1, 5)))),
    ):
        pass
    assert all(q.get_submodule(n) is m for n, m in modules.items() if n)
