"""Packing of branches along the token axis, and operations on each branch."""

import pytest
import torch

from sg_export.models.branches import Branch, Branches, join
from sg_export.models.subset import Subset

KEEP = torch.tensor([[0, 3, 4], [1, 2, 5]])
"""Kept tokens of two images of six."""


def packed(*counts: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return tokens (2, R, 3) in which every value differs, and the tokens of each branch."""
    tokens = torch.arange(2.0 * sum(counts) * 3).reshape(2, sum(counts), 3)
    return tokens, list(torch.split(tokens, list(counts), dim=1))


def modulations(branches: int) -> list[torch.Tensor]:
    """Return the modulations (2, 14) of two images for each branch; every value differs."""
    return [torch.arange(28.0).reshape(2, 14) + 100 * branch for branch in range(branches)]


def branches_of(counts: tuple[int, ...], owners: int) -> Branches:
    """Return branches of these counts, which share their modulations if there is one owner."""
    given = modulations(owners) * (len(counts) // owners)
    return Branches(Branch(count, None, {"modulations": own}) for count, own in zip(counts, given, strict=True))


@pytest.mark.parametrize("counts", [(5,), (4, 2), (3, 3), (1, 5)], ids=str)
def test_split_then_join_is_the_same(counts: tuple[int, ...]) -> None:
    tokens, parts = packed(*counts)
    found = branches_of(counts, 1).split(tokens)
    assert all(torch.equal(part, wanted) for part, wanted in zip(found, parts, strict=True))
    assert torch.equal(join(found), tokens)


def test_shares_is_decided_by_identity() -> None:
    one, other = torch.ones(2, 3), torch.ones(2, 3)
    branches = Branches(Branch(4, None, {"modulations": one, "text_keys": text}) for text in (one, other))
    assert branches.shares("modulations")
    assert not branches.shares("text_keys")
    assert not branches.alike
    assert Branches([branches[0], branches[0]]).alike


@pytest.mark.parametrize("owners", [1, 2])
def test_vectors_of_a_layer_are_those_of_its_places(owners: int) -> None:
    first, second, third = branches_of((4, 2), owners).of({"modulations": slice(2, 14)}).vectors(3)
    for vector, start in ((first, 2), (second, 6), (third, 10)):
        assert len(vector) == owners
        for own, whole in zip(vector, modulations(owners), strict=True):
            assert torch.equal(own, whole[:, None, start : start + 4])


def test_of_gives_each_layer_its_part_and_keeps_what_is_shared() -> None:
    (shared,), keys = modulations(1), [torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)]
    mask = torch.randn(2, 3)
    given = [{"modulations": shared, "text_keys": own, "mask": mask} for own in keys]
    found = Branches(Branch(4, None, held) for held in given).of({"modulations": slice(2, 6), "text_keys": 3})
    assert found.shares("modulations")
    assert not found.shares("text_keys")
    for branch, own in zip(found, keys, strict=True):
        assert torch.equal(branch.held["modulations"], shared[:, None, 2:6])
        assert torch.equal(branch.held["text_keys"], own[:, 3])
        assert branch.held["mask"] is mask


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("which", ["all", "all twice", "kept", "all and kept", "kept and kept"])
def test_at_returns_the_rows_of_the_tokens_of_each_branch(which: str, axes: int) -> None:
    table = torch.randn(6, 3)
    kept = Subset.of(KEEP, 6, masked=True)
    fewer = Subset.of(KEEP[:, 1:], 6, masked=False)
    cases = {
        "all": [None],
        "all twice": [None, None],
        "kept": [kept],
        "all and kept": [None, kept],
        "kept and kept": [kept, fewer],
    }
    every = torch.arange(6).expand(2, 6)
    places = {id(None): every, id(kept): KEEP, id(fewer): KEEP[:, 1:]}
    branches = Branches(Branch(0, subset, {}) for subset in cases[which])
    found = branches.at(table if axes == 2 else table[None])
    wanted = join([table[places[id(branch.subset)]] for branch in branches])
    assert torch.equal(found.expand(2, -1, -1), wanted)


def test_each_of_shared_vectors_is_over_all_rows_at_once() -> None:
    tokens, _ = packed(4, 2)
    seen = []

    def add(part: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[1])
        return part + vector

    found = branches_of((4, 2), 1).each(add, tokens, (torch.ones(2, 1, 3),))
    assert seen == [6]
    assert torch.equal(found, tokens + 1)


def test_each_of_own_vectors_is_branch_by_branch() -> None:
    tokens, (strong, weak) = packed(4, 2)
    ones = torch.ones(2, 1, 3)
    found = branches_of((4, 2), 2).each(torch.mul, tokens, (2 * ones, 3 * ones))
    assert torch.equal(found, torch.cat([2 * strong, 3 * weak], dim=1))
