"""Trained layers become factors: which, how, and what is said."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import INT8, UINT8, LowbitError, Recipe, Rule
from lowbit.nn.tensorized import TTLinear
from lowbit.nn.tensorized_conv import CPConv2d, TTConv2d, TuckerConv2d
from lowbit.tensor_networks import Budget, Energy, Error, TensorRule, Vbmf, tensorize


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=4, padding=1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ).eval()


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 12, 12)


def test_each_layer_becomes_what_the_first_rule_says() -> None:
    model = network()
    found = tensorize(
        model,
        [
            TensorRule(match="0", kind="keep"),
            TensorRule(match="9", kind="svd", rank=4),
            TensorRule(match="type:Conv2d", kind="tucker", rank=(6, 10)),
            TensorRule(rank=8, cores=3),
        ],
        images(),
    )
    kinds = [type(found.model[k]) for k in (0, 2, 4, 7, 9)]
    assert kinds == [nn.Conv2d, TuckerConv2d, nn.Conv2d, TTLinear, TTLinear]
    assert found.model[9].ranks == (1, 4, 1)
    assert found.model[2].blueprint.ranks == (6, 10)
    rows = {row.name: row for row in found.rows}
    assert rows["0"].why == "a rule keeps it"
    assert "4 groups" in rows["4"].why
    assert rows["9"].weights_after == 4 * (256 + 10)
    assert rows["9"].macs_before == 2560
    assert rows["9"].macs_after == 4 * (256 + 10)
    assert rows["2"].macs_after == 144 * 16 * 6 + 36 * (54 * 10 + 10 * 32)
    assert "2,560" in str(found)
    assert type(model[2]) is nn.Conv2d  # the model stays as it was


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (TensorRule(match="type:Conv2d", rank=16), TuckerConv2d),
        (TensorRule(match="2", kind="tt", rank=20), TTConv2d),
        (TensorRule(match="2", kind="cp", rank=30), CPConv2d),
    ],
)
def test_the_error_is_that_of_the_weight(rule: TensorRule, kind: type) -> None:
    model = network()
    found = tensorize(model, [rule, TensorRule(kind="keep")])
    layer, weight = found.model[2], model[2].weight
    row = next(row for row in found.rows if row.name == "2")
    assert isinstance(layer, kind)
    with torch.no_grad():
        error = (layer.dense_weight() - weight).norm() / weight.norm()
    assert row.error == pytest.approx(float(error), rel=1e-3)
    assert len(row.bond_errors) == (0 if kind is CPConv2d else len(row.ranks))
    if row.bond_errors:  # one bond cannot lose more than all, all no more than together
        assert max(row.bond_errors) <= row.error * 1.001
        assert row.error <= math.hypot(*row.bond_errors) * 1.001


@pytest.mark.parametrize("rank", [Energy(0.5), Error(0.6), Budget(0.3), Vbmf()])
def test_every_rule_for_ranks_gives_a_smaller_layer(rank: Any) -> None:
    low = nn.Linear(256, 256)
    with torch.no_grad():
        low.weight.copy_(torch.randn(256, 4) @ torch.randn(4, 256) + 0.1 * torch.randn(256, 256))
    found = tensorize(low, TensorRule(kind="svd", rank=rank))
    assert isinstance(found.model, TTLinear)
    assert found.rows[0].weights_after < found.rows[0].weights_before
    assert found.rows[0].error < 0.75


def test_what_would_grow_is_left_alone_and_clipping_is_said() -> None:
    found = tensorize(nn.Sequential(nn.Linear(16, 16), nn.Linear(64, 64)), TensorRule(rank=40, cores=2))
    assert "it would grow" in found.rows[0].why
    assert type(found.model[0]) is nn.Linear
    found = tensorize(nn.Sequential(nn.Conv2d(4, 64, 3)), TensorRule(rank=(8, 16)))
    assert found.rows[0].why == "of the ranks 8 16 no more fit"
    assert found.rows[0].ranks == (4, 16)


def test_shared_weights_and_hooks_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    model[2].register_forward_hook(lambda *_: None)
    found = tensorize(model, TensorRule(rank=2))
    assert [row.why for row in found.rows] == [
        "its weight is shared with another layer",
        "its weight is shared with another layer",
        "a hook runs with it",
    ]


def test_a_weight_tied_to_a_table_stays() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(128, 64), nn.Linear(64, 128, bias=False)
            self.out.weight = self.table.weight

    assert "shared" in tensorize(Words(), TensorRule(rank=2)).rows[0].why


def test_layers_whose_weight_others_read_stay() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval()
    found = tensorize(model, TensorRule(rank=8))
    assert all("reads the weight itself" in row.why for row in found.rows)
    with torch.no_grad():
        x = torch.randn(2, 5, 64)
        torch.testing.assert_close(found.model(x), model(x))


def test_factors_are_left_alone_and_so_is_what_they_are() -> None:
    first = tensorize(network(), [TensorRule(match="2", rank=(8, 12)), TensorRule(kind="keep")]).model
    again = tensorize(first, TensorRule(rank=4))
    assert "2" not in [row.name for row in again.rows]
    assert again.model[2].blueprint == first[2].blueprint
    wide = nn.Sequential(nn.Linear(64, 64)).double().requires_grad_(False)
    made = tensorize(wide, TensorRule(rank=4)).model
    assert made(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
    assert not any(p.requires_grad for p in made.parameters())


def test_a_layer_too_small_for_its_share_is_left_alone() -> None:
    found = tensorize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), TensorRule(rank=Budget(0.1)))
    assert found.rows[0].kind == "TTLinear"
    assert "ranks of 1 take" in found.rows[1].why


def test_large_outputs_are_traced_all_the_same() -> None:
    model = nn.Sequential(TTLinear((8, 8, 16), (16, 8, 8), 32)).eval()
    with torch.no_grad():
        model[0].cores[2].weight.mul_(100)
    graph, notes = lowbit.graph.trace.trace(model, lowbit.graph.inputs.Inputs.of(torch.randn(16, 1024)))
    assert not graph.meta["whole"]
    assert not notes


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    found = tensorize(nn.Sequential(shared, nn.ReLU(), shared), TensorRule(rank=2)).model
    assert found[0] is found[2]
    assert isinstance(found[0], TTLinear)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tensorize(network(), TensorRule(match="x")), "rule 'x' matches no layer"),
        (lambda: tensorize(network(), TensorRule(kind="svd")), "'0': kind='svd' is for nn.Linear"),
        (lambda: tensorize(network()[7], TensorRule(kind="cp")), "kind='cp' is for nn.Conv2d"),
        (
            lambda: tensorize(network()[7], TensorRule(out_modes=(4, 8, 4), in_modes=(8, 8, 8))),
            r"multiply to 128, and there are 256 outputs; use \(8, 8, 4\)",
        ),
        (lambda: TensorRule(kind="ttt"), "did you mean 'tt'"),
        (lambda: TensorRule(cores=1), "cores=1 is not a whole number from 2 up"),
        (lambda: TensorRule(out_modes=(2, 2)), "go together"),
        (lambda: TensorRule(rank=0), "rank=0 is not a whole number"),
        (lambda: tensorize(nn.ReLU(), TensorRule()), "no nn.Linear and no nn.Conv2d"),
        (lambda: tensorize(network, TensorRule()), "pass the network itself"),
    ],
)
def test_bad_input_is_one_clear_error(make: Any, says: str) -> None:
    with pytest.raises(LowbitError, match=says):
        make()


def test_weights_of_functions_are_layers_of_the_graph() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 16, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.w)

    x = torch.randn(2, 16, 8, 8)
    graph, _ = lowbit.graph.trace.trace(Functional(), lowbit.graph.inputs.Inputs.of(x))
    found = tensorize(graph, TensorRule(rank=(8, 16)))
    assert [row.kind for row in found.rows] == ["TuckerConv2d"]
    assert found.model(x).shape == (2, 32, 6, 6)


class TestQuantized:
    """Factors are weights like any other: recipes, files and training take them as they are."""

    def tensorized(self) -> nn.Module:
        rules = [
            TensorRule(match="0", kind="tt", rank=9),
            TensorRule(match="2", rank=(8, 12)),
            TensorRule(match="4", kind="keep"),
            TensorRule(match="7", rank=8),
            TensorRule(match="9", kind="svd", rank=6),
        ]
        return tensorize(network(), rules).model

    def test_the_file_is_the_model(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        x = images(32)
        q = lowbit.quantize(self.tensorized(), "w4a8", [x])
        *rows, bias = q.coverage().rows
        assert all(row.status == "integer" for row in rows)
        assert (bias.op, bias.status) == ("add", "float"), "the output of the model is not rounded"
        lowbit.export.onnx(q, tmp_path / "m.onnx")
        parity = lowbit.verify(q, tmp_path / "m.onnx", x)
        assert parity.exact, str(parity)

    def test_a_checkpoint_loads_into_the_dense_model_and_into_the_factors(self, tmp_path: Path) -> None:
        x, model = images(), self.tensorized()
        q = lowbit.quantize(model, "w4a8", [x])
        lowbit.save(q, tmp_path / "m.safetensors")
        for like in (network(), model):
            assert torch.equal(lowbit.load(tmp_path / "m.safetensors", like)(x), q(x))
        with pytest.raises(LowbitError, match="another architecture"):
            lowbit.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(4, 4)))

    def test_a_fresh_process_loads_it_with_the_dense_model(self, tmp_path: Path) -> None:
        shared = nn.Linear(64, 64)
        dense = nn.Sequential(shared, nn.ReLU(), shared).eval()
        x, small = torch.randn(8, 64), tensorize(dense, TensorRule(rank=4)).model
        q = lowbit.quantize(small, "w8", [x])
        lowbit.save(q, tmp_path / "m.safetensors")
        torch.save((x, q(x).detach()), tmp_path / "x.pt")
        script = f"""
import torch, lowbit
from torch import nn
shared = nn.Linear(64, 64)
q = lowbit.load({str(tmp_path / "m.safetensors")!r}, nn.Sequential(shared, nn.ReLU(), shared))
x, y = torch.load({str(tmp_path / "x.pt")!r})
assert torch.equal(q(x), y)
"""
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_each_factor_may_have_its_own_bits_and_is_counted(self) -> None:
        rules = (
            Rule(match="2.core", weight=INT8.at(2), activation=UINT8),
            Rule(match="7.cores.1", weight=INT8.at(4), activation=UINT8),
            Rule(weight=INT8, activation=UINT8),
        )
        q = lowbit.quantize(self.tensorized(), Recipe(rules=rules), [images()])
        bits = {layer.name: layer.weight_bits for layer in q.cost().layers}
        assert bits["2.core"] == 2
        assert bits["7.cores.1"] == 4
        assert bits["2.output"] == bits["7.cores.0"] == 8
        assert q.cost().macs < lowbit.quantize(network(), "w8a8", [images()]).cost().macs

    def test_they_are_trained(self) -> None:
        x = torch.randn(256, 64)
        y = (x[:, :2].sum(1) > 0).long()
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
        small = tensorize(model, [TensorRule(match="0", rank=8), TensorRule(kind="keep")]).model
        q = lowbit.prepare(small, "w4a4", x)
        lowbit.calibrate(q, [x])
        lowbit.Trainer(q, list(zip(x.split(64), y.split(64), strict=True)), epochs=10, lr=1e-2).fit()
        with torch.no_grad():
            right = (lowbit.freeze(q)(x).argmax(1) == y).float().mean()
        assert right > 0.9
