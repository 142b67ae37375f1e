"""What rounding should cost by the curvature of the loss: cheap, for nothing is probed.

With d the change of a tensor by rounding and the loss at a minimum, a second-order expansion gives
L(w + d) - L(w) = 1/2 d^T H d. Two diagonals stand in for H:

- Fisher: E[g^2], g the gradient of the loss of one sample (LeCun, Denker, Solla 1990, for labels drawn from
  the model; here, as is usual, the labels of the data).
- Hessian: tr(H) / n, the mean of the diagonal (Dong et al. 2020, "HAWQ-V2"), by Hutchinson's estimator
  tr(H) = E[v^T H v] with v of random signs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.core.spec import QuantSpec
from lowbit.search.prober import Prober
from lowbit.search.sites import Place
from lowbit.training.batches import Batch

__all__ = ["Found", "fisher_of", "hessian_of"]

# samples that the expansion is taken on, and random vectors of Hutchinson's estimator
SAMPLES = 256
VECTORS = 8

Found = dict[tuple[str, QuantSpec], float]


def fisher_of(prober: Prober, wanted: Sequence[Sequence[QuantSpec]]) -> Found:
    """1/2 sum E[g^2] d^2 for every place and spec.

    For a weight E[g^2] comes from gradients of whole batches: N times the square of their mean, which at a
    minimum has the same expectation. For activations each sample has its gradient.
    """
    pairs = list(zip(prober.places.values(), wanted, strict=True))
    weights = {p.path: p.layer.weight for p, _ in pairs if p.layer is not None}
    squares = {path: torch.zeros_like(w) for path, w in weights.items()}
    found: Found = {(p.path, spec): 0.0 for p, specs in pairs for spec in specs}
    seen = 0
    with prober.in_float(), _differentiable(weights.values()), _watching(prober) as activations:
        for batch in _some(prober):
            loss = prober.objective.task(batch.inputs.call(prober.gm), batch.labels)
            live = list(activations.values())
            grads = torch.autograd.grad(loss, [*weights.values(), *live], allow_unused=True)
            for path, g in zip(weights, grads, strict=False):
                if g is not None:
                    squares[path] += batch.samples**2 * g.square()
            for (path, x), g in zip(activations.items(), grads[len(weights) :], strict=True):
                if g is not None:
                    _add_activation(found, prober, path, x.detach(), batch.samples * g)
            seen += batch.samples
    for place, specs in pairs:
        for spec in specs:
            if place.path in weights:
                d = _change(prober, place, weights[place.path].detach(), spec)
                found[place.path, spec] = 0.5 * (squares[place.path] * d.square()).sum().item()
            found[place.path, spec] /= seen
    return found


def _add_activation(found: Found, prober: Prober, path: str, x: Tensor, g: Tensor) -> None:
    place = prober.places[path]
    for spec in [spec for p, spec in found if p == path]:
        found[path, spec] += 0.5 * (g * _change(prober, place, x, spec)).square().sum().item()


def hessian_of(prober: Prober, wanted: Sequence[Sequence[QuantSpec]], seed: int) -> Found:
    """1/2 tr(H) / n |d|^2 for every weight and spec; nothing, with a warning, where some operation of the
    network has no second derivative in PyTorch.
    """
    pairs = [(p, s) for p, s in zip(prober.places.values(), wanted, strict=True) if p.layer is not None]
    weights = [p.layer.weight for p, _ in pairs if p.layer is not None]
    try:
        traces = _traces(prober, weights, seed)
    except (RuntimeError, NotImplementedError) as error:
        warnings.warn(f"no Hessian trace, for the loss cannot be differentiated twice: {error}", stacklevel=2)
        return {}
    found: Found = {}
    for (place, specs), weight, trace in zip(pairs, weights, traces, strict=True):
        for spec in specs:
            d = _change(prober, place, weight.detach(), spec)
            found[place.path, spec] = 0.5 * max(0.0, trace) / weight.numel() * d.square().sum().item()
    return found


def _traces(prober: Prober, weights: Sequence[nn.Parameter], seed: int) -> list[float]:
    """tr(H) of the mean loss by each weight."""
    generator = torch.Generator().manual_seed(seed)
    traces, seen = [0.0] * len(weights), 0
    with prober.in_float(), _differentiable(weights), sdpa_kernel(SDPBackend.MATH):
        for batch in _some(prober):
            loss = prober.objective.task(batch.inputs.call(prober.gm), batch.labels)
            grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
            for k in range(VECTORS):
                signs = [
                    torch.randint(0, 2, w.shape, generator=generator).to(w).mul_(2).sub_(1) for w in weights
                ]
                products = torch.autograd.grad(
                    [grads[i] for i in live],
                    [weights[i] for i in live],
                    [signs[i] for i in live],
                    retain_graph=k + 1 < VECTORS,
                    allow_unused=True,
                )
                for i, hv in zip(live, products, strict=True):
                    if hv is not None:
                        traces[i] += batch.samples * (signs[i] * hv).sum().item() / VECTORS
            seen += batch.samples
    return [trace / seen for trace in traces]


@contextmanager
def _differentiable(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """While open, gradients are recorded, those of frozen weights too."""
    frozen = [w for w in weights if not w.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _some(prober: Prober) -> Iterator[Batch]:
    """Batches up to SAMPLES samples, at least one."""
    left = SAMPLES
    for batch in prober.batches:
        if left <= 0:
            return
        yield batch
        left -= batch.samples


def _change(prober: Prober, place: Place, x: Tensor, spec: QuantSpec) -> Tensor:
    return prober.rounded(place, x, spec) - place.quantizer.reshaped(x)


@contextmanager
def _watching(prober: Prober) -> Iterator[dict[str, Tensor]]:
    """While open, keep what each activation place is given, with its gradient to come."""
    kept: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor) -> Tensor:
        # a tensor of its own, whose gradient is that of what is read behind the quantizer
        kept[path] = output.clone() if output.requires_grad else output.clone().requires_grad_()
        return kept[path]

    handles = [
        prober.stand_ins[path].register_forward_hook(lambda _m, _a, output, path=path: keep(path, output))
        for path, place in prober.places.items()
        if place.kind == "activation"
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
