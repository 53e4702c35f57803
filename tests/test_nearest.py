"""The nearest sharers: the same as sorting every fp64 cosine, whatever the blocks."""

import math

import pytest
import torch

from prime.errors import InputError
from prime.merging import nearest
from prime.merging.nearest import rounding, top_similar


def naive(test: torch.Tensor, anchors: torch.Tensor, n_sim: int) -> list[list[int]]:
    """Every pair by itself, in Python's own arithmetic: `math.fsum` rounds once."""

    def unit(row: list[float]) -> list[float]:
        norm = max(math.sqrt(math.fsum(x * x for x in row)), 1e-12)
        return [x / norm for x in row]

    others = [unit(row) for row in anchors.double().tolist()]
    found = []
    for row in map(unit, test.double().tolist()):
        scores = [math.fsum(x * y for x, y in zip(row, other, strict=True)) for other in others]
        found.append(sorted(range(len(others)), key=lambda j: (-scores[j], j))[: n_sim or len(others)])
    return found


def test_cosine_and_stable() -> None:
    near = torch.tensor([[0.0, 2.0], [3.0, 0.0], [9.0, 0.0], [1.0, 1.0]])
    test = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert top_similar(test, near, 3) == [[1, 2, 3], [0, 1, 2]]
    assert top_similar(test[:1], near, 0) == [[1, 2, 3, 0]]
    with pytest.raises(InputError, match="--n_sim 5.* to 4"):
        top_similar(test, near, 5)


@pytest.fixture(params=[(5, 3), (64, 7), (1024, 4096)], ids=str)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    users, block = request.param
    monkeypatch.setattr(nearest, "USERS", users)
    monkeypatch.setattr(nearest, "BLOCK", block)
    monkeypatch.setattr(nearest, "NUMBERS", 40 if block < 8 else nearest.NUMBERS)


def random_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(13, 24, generator=stream), torch.randn(90, 24, generator=stream)


def narrow_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines within a few times the rounding of fp32, as mean token states have them: fp32 alone gets it wrong."""
    stream = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, 24, generator=stream) + 3e-4 * torch.randn(103, 24, generator=stream)
    return rows[:13], rows[13:]


def tied_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Few different embeddings, many times each and scaled by powers of two; users without history among them."""
    stream = torch.Generator().manual_seed(seed)
    kinds = torch.randint(-1, 2, (6, 24), generator=stream).float()
    kinds[0] = 0
    rows = kinds[torch.randint(0, 6, (103,), generator=stream)]
    return rows[:13], rows[13:] * 2.0 ** torch.randint(-3, 4, (90, 1), generator=stream)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("data", [random_data, narrow_data, tied_data])
@pytest.mark.parametrize("n_sim", [1, 3, 20, 0])
def test_as_sorting_every_pair(data, n_sim: int) -> None:
    for seed in range(3):
        test, anchors = data(seed)
        assert top_similar(test, anchors, n_sim) == naive(test, anchors, n_sim)


def test_fp32_alone_would_not_do() -> None:
    """The narrow data is a test of the second, fp64 step only if the first one errs there."""
    test, anchors = narrow_data(0)
    single = torch.nn.functional.normalize(test) @ torch.nn.functional.normalize(anchors).T
    assert single.argsort(dim=1, descending=True, stable=True)[:, :3].tolist() != naive(test, anchors, 3)


@pytest.mark.usefixtures("blocks")
def test_anchors_may_stand_anywhere_in_the_file() -> None:
    test, rows = tied_data(5)
    places = torch.randperm(90, generator=torch.Generator().manual_seed(1))[:40].tolist()
    assert top_similar(test, rows, 4, places) == naive(test, rows[places], 4)
    assert top_similar(test, rows, 4, range(10, 50)) == naive(test, rows[10:50], 4)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e16])
def test_fp32_stays_within_its_margin(size: float) -> None:
    stream = torch.Generator().manual_seed(0)
    rows = torch.rand(300, 1024, generator=stream) * size
    exact = nearest._unit(rows) @ nearest._unit(rows).T
    assert (nearest._low_cosines(nearest._unit(rows).float(), rows).double() - exact).abs().max() < rounding(1024) / 2


def test_rows_behind_the_first_anchors_are_not_anchors() -> None:
    """Anchors 0 to 2 of a file whose fourth row would be nearest."""
    emb = torch.eye(4)
    assert top_similar(torch.tensor([[0.1, 0.2, 0.3, 9.0]]), emb, 2, [0, 1, 2]) == [[2, 1]]
