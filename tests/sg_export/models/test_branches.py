"""Packing of branches along the token axis, and operations on each branch."""

import pytest
import torch

from sg_export.models.branches import Branches, join


def packed(*counts: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return tokens (2, R, 3) in which every value differs, and the tokens of each branch."""
    tokens = torch.arange(2.0 * sum(counts) * 3).reshape(2, sum(counts), 3)
    return tokens, list(torch.split(tokens, list(counts), dim=1))


def modulations(branches: int) -> tuple[torch.Tensor, ...]:
    """Return the modulations (2, 14) of two images for each branch; every value differs."""
    return tuple(torch.arange(28.0).reshape(2, 14) + 100 * branch for branch in range(branches))


@pytest.mark.parametrize("counts", [(5,), (4, 2), (3, 3), (1, 5)], ids=str)
def test_split_then_join_is_the_same(counts: tuple[int, ...]) -> None:
    tokens, parts = packed(*counts)
    branches = Branches(counts, modulations(1))
    found = branches.split(tokens)
    assert all(torch.equal(part, wanted) for part, wanted in zip(found, parts, strict=True))
    assert torch.equal(join(found), tokens)


@pytest.mark.parametrize("owners", [1, 2])
def test_vectors_of_a_layer_are_those_of_its_places(owners: int) -> None:
    given = modulations(owners)
    first, second, third = Branches((4, 2), given).of(slice(2, 14)).vectors(3)
    for vector, start in ((first, 2), (second, 6), (third, 10)):
        assert len(vector) == owners
        for own, whole in zip(vector, given, strict=True):
            assert torch.equal(own, whole[:, None, start : start + 4])


def test_each_of_shared_vectors_is_over_all_rows_at_once() -> None:
    tokens, _ = packed(4, 2)
    seen = []

    def add(part: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[1])
        return part + vector

    found = Branches((4, 2), modulations(1)).each(add, tokens, (torch.ones(2, 1, 3),))
    assert seen == [6]
    assert torch.equal(found, tokens + 1)


def test_each_of_own_vectors_is_branch_by_branch() -> None:
    tokens, (strong, weak) = packed(4, 2)
    ones = torch.ones(2, 1, 3)
    found = Branches((4, 2), modulations(2)).each(torch.mul, tokens, (2 * ones, 3 * ones))
    assert torch.equal(found, torch.cat([2 * strong, 3 * weak], dim=1))
