"""Class-uniform sampling: distribution, labels, negatives, and independence of how it is used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avzero.errors import UserError
from avzero.protocol.sampling import ClassUniformSampler


def sampler(counts: list[int]) -> tuple[ClassUniformSampler, torch.Tensor]:
    """Return a sampler over classes 10, 13, 16, … and the class of every row number."""
    ids = torch.cat([torch.full((n,), 10 + 3 * i) for i, n in enumerate(counts)])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    rows = torch.arange(len(ids)) * 2 + 100
    class_of = torch.full((int(rows.max()) + 1,), -1)
    class_of[rows] = ids[order]
    return ClassUniformSampler(ids[order], rows), class_of


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 2**40))
def test_rows_belong_to_their_labels_and_negatives_differ(counts: list[int], seed: int) -> None:
    draw, class_of = sampler(counts)
    epoch = draw.epoch(seed, 1, 0, 3, 17)
    assert epoch.row.shape == epoch.label.shape == (3, 17, 2)
    torch.testing.assert_close(class_of[epoch.row], draw.classes[epoch.label])
    assert (epoch.label[..., 0] != epoch.label[..., 1]).all()


def test_uniform_over_classes_then_within() -> None:
    counts = [1, 5, 40, 100]
    draw, class_of = sampler(counts)
    epoch = draw.epoch(0, 1, 0, 500, 256)
    total = 500 * 256
    for member in (0, 1):
        share = torch.bincount(epoch.label[..., member].flatten(), minlength=4) / total
        assert (share - 0.25).abs().max() < 0.006
    rows = epoch.row[..., 0].flatten()
    within = torch.bincount(rows[class_of[rows] == 19], minlength=len(class_of))
    within = within[class_of == 19].double()
    expected = total / 4 / 100
    assert ((within - expected) ** 2 / expected).sum() < 149  # 99.9 % with 99 degrees of freedom


def test_negatives_are_uniform_over_the_other_classes() -> None:
    draw, _ = sampler([3] * 6)
    label = draw.epoch(0, 1, 0, 200, 256).label.view(-1, 2)
    joint = torch.zeros(6, 6).index_put((label[:, 0], label[:, 1]), torch.tensor(1.0), True)
    off_diagonal = joint[~torch.eye(6, dtype=torch.bool)]
    assert joint.diagonal().sum() == 0
    assert (off_diagonal / off_diagonal.mean() - 1).abs().max() < 0.12


def test_same_arguments_same_draws_other_arguments_other_draws() -> None:
    draw, _ = sampler([5, 6, 7, 8])
    base = draw.epoch(1, 1, 4, 5, 64)
    torch.testing.assert_close(draw.epoch(1, 1, 4, 5, 64).row, base.row)
    for other in ((2, 1, 4), (1, 2, 4), (1, 1, 5)):
        assert not torch.equal(draw.epoch(*other, 5, 64).row, base.row)
    # A longer epoch begins like a shorter one: a step's draws depend on the step only.
    torch.testing.assert_close(draw.epoch(1, 1, 4, 9, 64).row[:5], base.row)


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 classes"):
        ClassUniformSampler(torch.zeros(4, dtype=torch.int64), torch.arange(4))
