"""The fast forms of equations 2-7 against the plain ones, and the network that hands out queries and keys."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import bnr
from conformer import ConvBlock, Conformer, init_attention, init_identity


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


def test_the_noise_is_a_constant():
    qks, refined = random_qks(), torch.randn(2, 5, 3, 3)
    assert not bnr.noisy_logits(qks, refined, 1).requires_grad
    assert not bnr.noisy_cam(plain_attention(qks), refined, 3, 1).requires_grad


def test_bnr_gradient_reaches_queries_of_every_block():
    torch.manual_seed(0)
    model, labels = Conformer("nano", 4), torch.tensor([[1.0, 0, 1, 0]])
    cam, _, qks = bnr.forward(model, torch.randn(1, 3, 64, 64))
    for q, k in qks:
        q.retain_grad()
    bnr.soft_margin_loss(bnr.noisy_logits(qks, bnr.attend(qks, cam), 1), labels).backward()
    assert all(q.grad.abs().max() > 0 for q, _ in qks)


def test_soft_margin_loss_is_torchs():
    z, labels = torch.randn(4, 6), (torch.rand(4, 6) > 0.5).float()
    assert_close(bnr.soft_margin_loss(z, labels), F.multilabel_soft_margin_loss(z, labels))


def test_entropy_of_uniform_attention_is_one_and_of_a_choice_zero():
    same, apart = torch.ones(1, 2, 5, 8), 100 * F.pad(torch.eye(5), (0, 3)).expand(1, 2, 5, 8)
    assert bnr.attention_entropy([(same, same), (apart, apart)]).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_seeds_of_each_scale_add_the_mirror_image():
    torch.manual_seed(0)
    model, images = Conformer("nano", 3).eval(), [torch.randn(2, 3, side, side) for side in (32, 64)]
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    maps = bnr.multi_scale(model, images, labels, ("refined", "plain", "eigen"), torch.device("cpu"), amp=False)
    for n, photos in enumerate(images):
        with torch.no_grad():
            (cam, _, qks), (mirrored, _, mirrored_qks) = (bnr.forward(model, x) for x in (photos, photos.flip(3)))
            refined = [bnr.refined_cam(plain_attention(x), m) for x, m in ((qks, cam), (mirrored_qks, mirrored))]
        assert_close(maps["plain"][n], cam + mirrored.flip(3), rtol=1e-4, atol=1e-4)
        assert_close(maps["refined"][n], refined[0] + refined[1].flip(3), rtol=1e-4, atol=1e-4)
        assert maps["eigen"][n].shape == (2, 1, *cam.shape[2:])


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
    own = (q * k).sum(-1).mean().item() / 32 ** 0.5
    assert own == pytest.approx(60, rel=0.2)


@torch.no_grad()
def test_a_fresh_bottleneck_beside_given_convolutions_passes_its_input_on():
    blocks, x = torch.nn.ModuleDict({"plain": ConvBlock(8, 8), "given": ConvBlock(8, 8)}).eval(), torch.rand(1, 8, 4, 4)
    blocks["wide"] = ConvBlock(8, 16, project=True).eval()
    given = blocks["given"](x)[0]
    init_identity(blocks, ["plain.bn3.weight", "wide.bn3.weight", "wide.residual_conv.weight"])
    torch.testing.assert_close(blocks["plain"](x)[0], x)
    torch.testing.assert_close(blocks["wide"](x)[0][:, :8], x)
    torch.testing.assert_close(blocks["given"](x)[0], given)
