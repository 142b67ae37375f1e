"""Tucker and CP: the definition by einsum, and errors as promised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit import LowbitError
from lowbit.decompose.ranks import Budget, Energy, Error, Fixed, Vbmf
from lowbit.decompose.tucker import cp, cp_to_tensor, tucker, tucker_to_tensor

pytest.importorskip("tensorly")


def weight(noise: float = 0.01) -> Tensor:
    """[24, 16, 3, 3] of multilinear rank (6, 5)."""
    core, left, right = torch.randn(6, 5, 3, 3), torch.randn(24, 6), torch.randn(16, 5)
    w = torch.einsum("abhx,oa,ib->oihx", core, left, right)
    return w + noise * w.std() * torch.randn_like(w)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / x.norm())


def test_it_is_its_definition() -> None:
    found = tucker(weight(), Fixed((6, 5)))
    left, right = found.factors[0], found.factors[1]
    assert torch.allclose(
        tucker_to_tensor(found), torch.einsum("abhx,oa,ib->oihx", found.core, left, right), atol=1e-4
    )
    assert found.parameters == 6 * 5 * 9 + 24 * 6 + 16 * 5


@pytest.mark.parametrize("axes", [(0, 1), (0, 1, 2, 3), (1,)], ids=str)
def test_full_ranks_are_exact(axes: tuple[int, ...]) -> None:
    w = torch.randn(8, 6, 3, 3)
    found = tucker(w, Fixed(99), axes)
    assert relative(w, tucker_to_tensor(found)) < 1e-5
    assert found.ranks == tuple(w.shape[a] for a in axes)


@pytest.mark.parametrize("rule", [Energy(0.99), Error(0.05), Vbmf()], ids=str)
def test_the_true_ranks_are_found(rule: Energy | Error | Vbmf) -> None:
    w = weight()
    found = tucker(w, rule)
    assert found.ranks == (6, 5)
    assert found.error == pytest.approx(relative(w, tucker_to_tensor(found)), rel=1e-3)


def test_a_budget_holds() -> None:
    w = weight(0.2)
    errors = []
    for share in (0.1, 0.2, 0.5):
        found = tucker(w, Budget(share))
        assert found.parameters <= share * w.numel()
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)


def test_cp_fits_a_sum_of_products() -> None:
    factors = [torch.randn(n, 4) for n in (8, 6, 3, 3)]
    w = cp_to_tensor(factors)
    found, error = cp(w, 6)
    assert error < 0.05
    assert error == pytest.approx(relative(w, cp_to_tensor(found)), abs=1e-3)
    assert torch.equal(cp(w, 6)[0][0], found[0]), "a seed gives the same result twice"


def test_bad_input() -> None:
    w = torch.randn(8, 6, 3, 3)
    with pytest.raises(LowbitError, match=r"axes \(0, 4\) are not different axes"):
        tucker(w, Fixed(2), (0, 4))
    with pytest.raises(LowbitError, match=r"3 ranks for the axes \(0, 1\)"):
        tucker(w, Fixed((1, 2, 3)))
    with pytest.raises(LowbitError, match="ranks of 1 take 23 parameters, and 4 are allowed"):
        tucker(w, Budget(0.01))
    with pytest.raises(LowbitError, match="rank=0 is not a whole number"):
        cp(w, 0)
