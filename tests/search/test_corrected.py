"""A recipe that corrects the outputs of layers is measured as it will be corrected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_measure import RECIPE, data, network

import lowbit
from lowbit import INT4, INT8, Recipe, Rule
from lowbit.graph.inputs import Inputs
from lowbit.nn.layers import QLayer
from lowbit.passes.bias_correct import correct_outputs
from lowbit.search import sensitivity
from lowbit.search.measure import prober_of
from lowbit.search.prober import FITTED
from lowbit.search.sites import places_of


@pytest.mark.parametrize("step", ["affine_correct", "bias_correct"])
@pytest.mark.parametrize("batches", [3, 2 * FITTED // 6], ids=["all fitted", "some fitted"])
def test_a_run_is_that_of_the_corrected_network(step: str, batches: int) -> None:
    images = data(batches)
    weights = Recipe(rules=(Rule(weight=INT8),), refine=(step,))
    q = lowbit.prepare(network(), weights, images[0][0])
    prober = prober_of(q, places_of(q, ("weight",)), images)
    which = list(range(batches))
    with prober.quantizing(dict.fromkeys(prober.places, INT4)):
        found = torch.cat(prober.cursor(which).behind())

    # the oracle: the graph itself corrected, on the same samples
    narrow = lowbit.prepare(network(), replace(weights, rules=(Rule(weight=INT4),)), images[0][0])
    lowbit.calibrate(narrow, [images[0][0]])
    for layer in (m for m in narrow.graph.modules() if isinstance(m, QLayer)):
        layer.settle()
    whole = lowbit.prepare(network(), Recipe(rules=(Rule(),)), images[0][0])
    fitted = [Inputs.of(b) for b in images[: -(-FITTED // 6)]]
    correct_outputs(narrow.graph, whole.graph, fitted, scale=step == "affine_correct")
    with torch.no_grad():
        expected = torch.cat([narrow(x) for x, _ in images])
        plain = torch.cat([network()(x) for x, _ in images])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_correction_lessens_what_rounding_costs() -> None:
    tables = [
        sensitivity(
            lowbit.prepare(network(), replace(RECIPE, refine=refine), data()[0][0]),
            data(),
            bits=(3,),
            kinds=("weight",),
            curvature=False,
        )
        for refine in ((), ("affine_correct",))
    ]
    plain, corrected = ([site.probes[0].noise for site in table] for table in tables)
    assert all(b <= a for a, b in zip(plain, corrected, strict=True))
    assert sum(corrected) < 0.9 * sum(plain)
