"""The fast forms of equations 2-7 against the plain ones, and the network that hands out queries and keys."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import bnr
from conformer import Conformer, init_attention


def random_qks(blocks=3, images=2, heads=2, tokens=10, width=8):
    torch.manual_seed(0)
    shape = images, heads, tokens, width
    return [tuple(2 * torch.randn(shape, requires_grad=True) for _ in "qk") for _ in range(blocks)]


def plain_attention(qks):
    """Eqs. 2-4 as they are written. -> (B, N, N)"""
    return bnr.sum_over_blocks([bnr.mean_over_heads(bnr.attention(q, k)) for q, k in qks])


def assert_equal_with_gradients(fast, plain, maps, qks):
    leaves = [maps, *(x for qk in qks for x in qk)]
    assert_close(fast, plain)
    ours, theirs = (torch.autograd.grad(out.sin().sum(), leaves) for out in (fast, plain))
    for a, b in zip(ours, theirs):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("classes", [1, 5, 8, 21])  # fewer, as many as, and more than the 8 channels of a head
def test_attend_equals_the_plain_equations_with_gradients(classes):
    qks, maps = random_qks(), torch.randn(2, classes, 3, 3, requires_grad=True)
    plain = bnr.refined_cam(plain_attention(qks), maps)
    assert_equal_with_gradients(bnr.attend(qks, maps), plain, maps, qks)


def test_noisy_logits_equal_the_plain_equations_with_gradients():
    qks, maps = random_qks(), torch.randn(2, 5, 3, 3, requires_grad=True)
    attn = plain_attention(qks)
    plain = bnr.noisy_cam(attn, bnr.refined_cam(attn, maps), len(qks), 2).mean((2, 3))
    assert_equal_with_gradients(bnr.noisy_logits(qks, bnr.attend(qks, maps), 2), plain, maps, qks)


def test_stage_sizes_follow_the_stride_and_other_sizes_are_refused():
    model = Conformer("nano", 4).eval()
    features, token, qks = model(torch.randn(2, 3, 48, 80))
    assert features.shape == (2, 256, 3, 5) and token.shape == (2, 96)
    assert [tuple(q.shape) for q, _ in qks] == [(2, 3, 1 + 15, 32)] * 4
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.randn(1, 3, 50, 64))


def test_sharp_start_makes_a_token_attend_to_its_like():
    torch.manual_seed(0)
    block = Conformer("nano", 4).trans_1
    init_attention(block, 60)
    kinds = F.layer_norm(torch.randn(2, 96), (96,))[[0, 1, 0, 1, 0]][None]  # two kinds of token
    _, (q, k) = block.attn(kinds)
    attn = bnr.mean_over_heads(bnr.attention(q, k))[0]
    assert attn[0, [0, 2, 4]].sum() > 0.99 and attn[1, [1, 3]].sum() > 0.99
    logit = (q * k).sum(-1).mean().item() / 32 ** 0.5
    assert logit == pytest.approx(60, rel=0.2)
