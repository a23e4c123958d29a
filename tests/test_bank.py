"""The composition of factors from the bank, against the paper's formula written out."""

from __future__ import annotations

import pytest
import torch

from vblora.bank import Layout, compose, compose_dense, select
from vblora.shapes import LayerShape

SETTINGS = [(1, 8, 4, 5), (2, 8, 4, 30), (3, 300, 16, 7), (6, 6, 1, 9), (2, 2048, 32, 50), (1, 1, 3, 2)]


def random_bank(h, b, n, dtype=torch.float64):
    bank = torch.randn(h, b, dtype=dtype, requires_grad=True)
    logits = torch.randn(n, h, dtype=dtype, requires_grad=True)
    return bank, logits


@pytest.mark.parametrize(("topk", "h", "b", "n"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_forms_give_the_same_table(topk, h, b, n, dtype):
    bank, logits = random_bank(h, b, n, dtype)
    values, indices = select(logits, topk)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    table = compose(bank, indices, values)
    assert table.dtype == torch.promote_types(dtype, torch.float32) and table.shape == (n, b)
    torch.testing.assert_close(table.to(dtype), compose_dense(bank, logits, topk), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("topk", "h", "b", "n"), SETTINGS)
def test_both_forms_give_the_same_gradients_and_no_other_logit_has_one(topk, h, b, n):
    bank, logits = random_bank(h, b, n)
    weight = torch.randn(n, b, dtype=bank.dtype)
    dense = torch.autograd.grad((compose_dense(bank, logits, topk) * weight).sum(), [bank, logits])
    values, indices = select(logits.detach(), topk)
    values.requires_grad_()
    fast = torch.autograd.grad((compose(bank, indices, values) * weight).sum(), [bank, values])
    torch.testing.assert_close(fast[0], dense[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(fast[1], dense[1].gather(1, indices), rtol=0, atol=1e-12)
    assert dense[1].scatter(1, indices, 0.0).abs().max() == 0


def test_gradients_agree_with_finite_differences():
    bank, logits = random_bank(5, 3, 4)
    values, indices = select(logits.detach(), 3)
    assert torch.autograd.gradcheck(lambda b, v: compose(b, indices, v), (bank, values.requires_grad_()))


def test_select_takes_the_largest_first():
    values, indices = select(torch.tensor([[0.0, 3.0, -1.0, 2.0]]), 2)
    assert values.tolist() == [[3.0, 2.0]] and indices.tolist() == [[1, 3]]


@pytest.mark.parametrize("b", [1, 3, 4, 5, 6, 8, 12, 64])
def test_factors_are_the_sub_vectors_side_by_side_cut_to_fit(b):
    shapes = [LayerShape("one", 6, 12), LayerShape("two", 5, 3)]
    r = 2
    layout = Layout(shapes, r, b)
    table = torch.randn(layout.rows, b)
    row = 0
    expected = []
    for shape in shapes:
        for features in (shape.in_features, shape.out_features):
            factor = torch.empty(r, features)
            for i in range(r):
                pieces = []
                while sum(map(len, pieces)) < features:
                    pieces.append(table[row])
                    row += 1
                factor[i] = torch.cat(pieces)[:features]
            expected.append(factor)
    assert row == layout.rows
    flat = [factor for pair in layout.factors(table) for factor in pair]
    assert all(torch.equal(a, e) for a, e in zip(flat, expected, strict=True))


@pytest.mark.parametrize(("b", "rows"), [(4, 2 * (2 + 3)), (5, 2 * (2 + 3)), (12, 2 * 2), (1, 2 * 20), (100, 2 * 2)])
def test_layout_counts_the_sub_vectors(b, rows):
    assert Layout([LayerShape("one", 8, 12)], r=2, vector_length=b).rows == rows


def test_factors_are_views_of_the_table():
    layout = Layout([LayerShape("one", 8, 12), LayerShape("two", 8, 10)], r=2, vector_length=4)
    table = torch.randn(layout.rows, 4)
    pointers = {factor.untyped_storage().data_ptr() for pair in layout.factors(table) for factor in pair}
    assert pointers == {table.untyped_storage().data_ptr()}


def test_a_gradient_of_a_gradient_is_the_plain_formulas():
    bank, logits = random_bank(12, 5, 9)
    values, indices = select(logits, 3)
    weight = torch.randn(9, 5, dtype=bank.dtype)

    def twice(table):
        first = torch.autograd.grad((table.pow(3) * weight).sum(), [bank, logits], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [bank, logits])

    for ours, plain in zip(twice(compose(bank, indices, values)), twice(compose_dense(bank, logits, 3)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["bank", "logits"])
def test_the_part_that_is_frozen_gets_no_gradient(frozen):
    bank, logits = random_bank(12, 5, 9)
    {"bank": bank, "logits": logits}[frozen].requires_grad_(False)
    values, indices = select(logits, 2)
    compose(bank, indices, values).square().sum().backward()
    assert (bank.grad is None, logits.grad is None) == (frozen == "bank", frozen == "logits")
