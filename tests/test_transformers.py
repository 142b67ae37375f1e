"""Encoders as people write them: traced, placed, smoothed, exported, and held against the float model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, quantizers, sqnr, traced
from torch import Tensor, nn

import lowbit
from lowbit import Recipe, Rule, preset
from lowbit.graph.inputs import Inputs
from lowbit.graph.match import quantizer_of
from lowbit.graph.ops import kind_of
from lowbit.nn.scale import Scale
from lowbit.passes.smooth import factors_in, smooth, smoothing_factors

WIDTH, HEADS, WORDS = 16, 4, 7
X = torch.randn(6, WORDS, WIDTH, generator=torch.Generator().manual_seed(0))
PADDED = torch.arange(WORDS) >= torch.tensor([[7], [5], [7], [3], [6], [7]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(WORDS)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **{"batch_first": True, **options})


def encoder(**options: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**options), 2, enable_nested_tensor=False)


def attention(causal: bool, masked: bool, **options: Any) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        mask = ~PADDED[: x.shape[0], None, None] if masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **options)
        return m.out(y.transpose(1, 2).flatten(2))

    return Fn(forward, qkv=nn.Linear(WIDTH, 3 * WIDTH), out=nn.Linear(WIDTH, WIDTH))


def alone(weights: bool, per_head: bool, **options: Any) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        mask = CAUSAL + torch.zeros(x.shape[0] * HEADS, 1, 1) if per_head else None
        found = m.mha(x, x, x, attn_mask=mask, need_weights=weights)
        return found if weights else found[0]

    return Fn(forward, mha=nn.MultiheadAttention(WIDTH, HEADS, **options))


ENCODERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "layer": (layer, {}),
    "norm first, GELU": (lambda: layer(norm_first=True, activation="gelu"), {}),
    "sequence first": (lambda: layer(batch_first=False), {}),
    "no bias": (lambda: layer(bias=False), {}),
    "encoder": (encoder, {}),
    "encoder and padding": (encoder, {"src_key_padding_mask": PADDED}),
    "encoder and a causal mask": (encoder, {"mask": CAUSAL}),
    "nested tensors": (lambda: nn.TransformerEncoder(layer(), 1), {"src_key_padding_mask": PADDED}),
    "attention": (lambda: alone(False, False, batch_first=True), {}),
    "attention and its weights": (lambda: alone(True, False), {}),
    "a mask for each head": (lambda: alone(False, True, batch_first=True), {}),
    "products": (lambda: attention(False, False), {}),
    "products, scaled": (lambda: attention(False, False, scale=0.3), {}),
    "causal products": (lambda: attention(True, False), {}),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ENCODERS)
def test_a_graph_of_products_computes_the_same(name: str) -> None:
    build, more = ENCODERS[name]
    torch.manual_seed(0)
    model = build().eval()
    gm = traced(model, X, **more)
    assert not gm.meta["whole"]
    assert not gm.meta["leaves"]
    assert sum(kind_of(n) == "matmul" for n in gm.graph.nodes) == 2 * (2 if "encoder" in name else 1)
    with torch.no_grad():
        want, got = model(X, **more), gm(X, **more)
        kept = slice(None) if name != "nested tensors" else ~PADDED  # its fast path writes zeros there
        pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want[kept], got[kept])]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_attention_between_different_tensors_stays_as_it_is() -> None:
    model = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    gm = traced(model, X, X[:, :3])
    assert not gm.meta["leaves"]
    assert [str(n.target) for n in gm.graph.nodes if kind_of(n) == "float" and n.op == "call_module"][1] == (
        "multihead_attn"
    )
    assert torch.allclose(gm(X, X[:, :3]), model(X, X[:, :3]), atol=1e-5)


# --- where quantizers stand


def test_the_residual_stream_stays_in_float() -> None:
    """LayerNorm is rounded for the layers that read it, and the addition reads what was not rounded."""
    q = lowbit.prepare(encoder(), "w8a8", X)
    nodes = {str(n.meta["name"]): n for n in q.graph.graph.nodes if n.op != "output"}
    adds = [n for n in q.graph.graph.nodes if kind_of(n) == "add"]
    assert len(adds) == 4
    assert all(quantizer_of(operand) is None for add in adds for operand in add.args)
    coverage = q.coverage()
    assert {coverage[str(n.meta["name"])].status for n in adds} == {"float"}
    assert "only operations in float read it" in coverage[str(adds[0].meta["name"])].why
    for name in ("layers.0.linear2", "layers.1.self_attn.out_proj"):
        assert quantizer_of(nodes[name].args[0]) is not None
        assert coverage[name].output == "float", "the addition reads its accumulators"
    assert coverage["layers.0.self_attn.matmul"].status == "integer"
    assert coverage["layers.0.self_attn.softmax"].status == "float"


def test_masks_are_in_no_range() -> None:
    q = lowbit.prepare(encoder(), "w8a8", {"src": X, "src_key_padding_mask": PADDED})
    lowbit.calibrate(q, [{"src": X, "src_key_padding_mask": PADDED}])
    reach = [m.scale.max() for n, m in q.graph.named_modules() if n.startswith("activation_quantizers.")]
    assert max(reach) < 1.0


def test_fixed_point_has_a_type_for_every_tensor() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    wide, fixed = (quantizers(lowbit.prepare(model, name, X[0, :, :4]).graph) for name in ("w8a8", "fixed8"))
    assert set(fixed) - set(wide) == {"0"}


# --- smoothing


def outliers(model: nn.Module) -> nn.Module:
    """Channels of very different size behind every LayerNorm, as language models have them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.logspace(-1.5, 1.5, WIDTH)[torch.randperm(WIDTH)])
    return model.eval()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothing_does_not_change_the_output(strength: float) -> None:
    torch.manual_seed(0)
    model = outliers(encoder(activation="gelu"))
    gm = traced(model, X)
    names = {str(n.meta["name"]) for n in gm.graph.nodes if kind_of(n) == "layer"}
    factors = smoothing_factors(gm, names, [Inputs.of(X)], strength=strength)
    assert smooth(gm, names, factors) == 5, "of eight, the input and the products of attention read three"
    assert sqnr(model(X), gm(X)) > 100
    assert {k: v.tolist() for k, v in factors_in(gm).items()} == {k: v.tolist() for k, v in factors.items()}


def test_full_strength_leaves_even_activations() -> None:
    """The oracle: at strength 1 each channel of what a layer reads reaches as far."""
    torch.manual_seed(0)
    gm = traced(outliers(encoder()), X)
    names = {"layers.0.linear1"}
    smooth(gm, names, smoothing_factors(gm, names, [Inputs.of(X)], strength=1.0))
    seen: list[Tensor] = []
    scale = next(module for module in gm.modules() if isinstance(module, Scale))
    scale.register_forward_hook(lambda module, args, output: seen.append(output))
    gm(X)
    reach = seen[0].abs().flatten(0, -2).amax(0)
    assert torch.allclose(reach, reach[:1], rtol=1e-4)


def test_smoothing_is_kept_where_it_helps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm, second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), outliers(norm), second).eval()
    with torch.no_grad():
        second.weight.div_(norm.weight)
    recipe = Recipe(rules=preset("w8a8").rules)
    plain = lowbit.quantize(model, recipe, [X])
    q = lowbit.quantize(model, Recipe(rules=recipe.rules, smooth=True), [X])
    (step,) = q.steps
    assert (step.name, step.kept, q.recipe.smooth) == ("smooth", True, True)
    assert sqnr(model(X), q(X)) > sqnr(model(X), plain(X)) + 10
    lowbit.save(q, tmp_path / "m.safetensors")
    assert torch.equal(lowbit.load(tmp_path / "m.safetensors", model)(X), q(X))
    assert lowbit.compare(model, q, [X]).sqnr_db > 20


def test_nothing_to_smooth_says_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert not any(
        step.name == "smooth" for step in lowbit.quantize(model, "w8a8", [torch.randn(8, 3, 8, 8)]).steps
    )


# --- files


@pytest.mark.parametrize("recipe", ["w8a8", "w4"])
def test_an_encoder_in_a_file(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = outliers(layer(activation="gelu"))
    data = [{"src": X, "src_key_padding_mask": PADDED}]
    q = lowbit.quantize(model, recipe, data)
    parity = lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), data)
    assert parity.ok, str(parity)
    # behind the first softmax, which is computed in floats, a code may round the other way
    assert all(layer.equal > 0.99 for layer in parity.layers), str(parity)


class Pooled(nn.Module):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask.unsqueeze(-1).float()
        return (hidden * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_bert_of_hugging_face(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=100, attn_implementation=form, **sizes)
    model = Pooled(transformers.BertModel(config, add_pooling_layer=False)).eval()
    data = [{"input_ids": torch.randint(0, 100, (6, WORDS)), "attention_mask": (~PADDED).long()}]
    q = lowbit.quantize(model, preset("w8a8").with_rule(Rule(match="type:matmul")), data)
    coverage = q.coverage()
    assert not q.graph.meta["leaves"]
    assert {r.op for r in coverage.rows if r.status == "integer"} == {"Linear"}
    assert {r.op for r in coverage.rows if r.status == "weight"} == {"Embedding"}
    assert sqnr(model(**data[0]), q(**data[0])) > 25
    longer = {k: v.repeat(1, 2) for k, v in data[0].items()}
    assert sqnr(model(**longer), q(**longer)) > 20, "at another length"
    if form == "eager":  # the graph is the other's
        return
    pytest.importorskip("onnxruntime")
    path = lowbit.export.onnx(q, tmp_path / "m.onnx", dynamic={"input_ids": (1,), "attention_mask": (1,)})
    assert lowbit.verify(q, path, [data[0], longer]).ok
    with pytest.raises(lowbit.LowbitError, match="no input 'input_id'; did you mean 'input_ids'"):
        lowbit.export.onnx(q, tmp_path / "m.onnx", dynamic={"input_id": (1,)})
