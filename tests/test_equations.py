"""Equations 1-9: cases worked by hand, and each fast form against the plain form of the same equation."""
import argparse

import pytest
import torch
import torch.nn.functional as F

import bnr
from conformer import Conformer, init_attention


def random_qks(blocks=3, images=2, heads=2, tokens=10, width=8):
    torch.manual_seed(0)
    return [tuple(2 * torch.randn(images, heads, tokens, width) for _ in "qk") for _ in range(blocks)]


def plain_attention(qks):
    """Eqs. 2-4 as they are written. -> (B, N, N)"""
    return bnr.sum_over_blocks([bnr.mean_over_heads(bnr.attention(q, k)) for q, k in qks])


def test_cam_of_a_head_that_reads_one_channel_is_that_channel():
    features, weight = torch.randn(1, 4, 5, 5), torch.zeros(2, 4, 3, 3)
    weight[0, 3, 1, 1], weight[1, 0, 1, 1] = 1, -2
    cam = bnr.class_activation_map(features, weight, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(cam[0, 0], features[0, 3])
    torch.testing.assert_close(cam[0, 1], 0.5 - 2 * features[0, 0])


def test_attention_rows_sum_to_one():
    q, k = random_qks(1)[0]
    torch.testing.assert_close(bnr.attention(q, k).sum(-1), torch.ones(2, 2, 10))


def test_attention_of_equal_keys_is_uniform():
    q = torch.randn(1, 1, 5, 4)
    torch.testing.assert_close(bnr.attention(q, torch.ones_like(q)), torch.full((1, 1, 5, 5), 0.2))


def test_attention_divides_by_the_root_of_the_head_width():
    q, k = torch.ones(1, 1, 1, 4), torch.stack([torch.zeros(4), torch.ones(4)])[None, None]
    expected = torch.softmax(torch.tensor([0.0, 4 / 2]), 0)  # 1·1 + ... = 4, over sqrt(4)
    torch.testing.assert_close(bnr.attention(q, k)[0, 0, 0], expected)


def test_class_token_is_left_out_after_heads_are_averaged_and_blocks_summed():
    first, second = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
    found = bnr.sum_over_blocks([bnr.mean_over_heads(first), bnr.mean_over_heads(second)])
    expected = (first[0, 0] + first[0, 1] + second[0, 0] + second[0, 1])[1:, 1:] / 2
    torch.testing.assert_close(found[0], expected)


def test_identity_attention_changes_nothing():
    cam = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(bnr.refined_cam(torch.eye(4)[None], cam), cam)


def test_attention_mixes_rows_not_columns():
    attn = torch.zeros(1, 4, 4)
    attn[0, 0, 3] = 1  # place 0 looks at place 3
    cam = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    torch.testing.assert_close(bnr.refined_cam(attn, cam), torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]]))


def test_noise_scales_the_mean_attention():
    attn, refined = torch.rand(1, 4, 4), torch.randn(1, 2, 2, 2)
    once = bnr.noisy_cam(attn, refined, blocks=5, noise=1)
    torch.testing.assert_close(once, bnr.refined_cam(attn, refined) / 5)
    torch.testing.assert_close(bnr.noisy_cam(attn, refined, blocks=5, noise=2), 2 * once)


def test_soft_margin_loss_is_torchs_and_log_2_at_zero():
    z, labels = torch.randn(4, 6), (torch.rand(4, 6) > 0.5).float()
    torch.testing.assert_close(bnr.soft_margin_loss(z, labels), F.multilabel_soft_margin_loss(z, labels))
    assert bnr.soft_margin_loss(torch.zeros(4, 6), labels).item() == pytest.approx(0.693147, abs=1e-6)


def test_bnr_loss_is_the_sum_of_both():
    z, noisy, labels = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3)
    expected = bnr.soft_margin_loss(z, labels) + bnr.soft_margin_loss(noisy, labels)
    torch.testing.assert_close(bnr.bnr_loss(z, noisy, labels), expected)


@pytest.mark.parametrize("classes", [1, 5, 8, 21])  # fewer, as many as, and more than the 8 channels of a head
def test_attend_equals_the_plain_equations_with_gradients(classes):
    qks = [tuple(x.requires_grad_() for x in qk) for qk in random_qks()]
    maps = torch.randn(2, classes, 3, 3, requires_grad=True)
    leaves = [maps, *(x for qk in qks for x in qk)]
    attn = plain_attention(qks)
    plain = bnr.refined_cam(attn, maps)
    fast = bnr.attend(qks, maps)
    torch.testing.assert_close(fast, plain)
    for ours, theirs in zip(torch.autograd.grad(fast.sin().sum(), leaves), torch.autograd.grad(plain.sin().sum(), leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_entropy_of_uniform_attention_is_one_and_of_a_choice_zero():
    same, apart = torch.ones(1, 2, 5, 8), 100 * F.pad(torch.eye(5), (0, 3)).expand(1, 2, 5, 8)
    assert bnr.attention_entropy([(same, same), (apart, apart)]).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_noisy_logits_equal_the_plain_equations_with_gradients():
    qks = [tuple(x.requires_grad_() for x in qk) for qk in random_qks()]
    maps = torch.randn(2, 5, 3, 3, requires_grad=True)
    leaves = [maps, *(x for qk in qks for x in qk)]
    attn = plain_attention(qks)
    plain = bnr.noisy_cam(attn, bnr.refined_cam(attn, maps), len(qks), 2).mean((2, 3))
    fast = bnr.noisy_logits(qks, bnr.attend(qks, maps), 2)
    torch.testing.assert_close(fast, plain)
    for ours, theirs in zip(torch.autograd.grad(fast.sin().sum(), leaves), torch.autograd.grad(plain.sin().sum(), leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_noise_is_a_constant():
    attn = torch.rand(1, 4, 4, requires_grad=True)
    refined = torch.randn(1, 2, 2, 2)
    assert not bnr.noisy_cam(attn, refined, blocks=5, noise=1).requires_grad


def test_bnr_gradient_reaches_queries_of_every_block():
    torch.manual_seed(0)
    model, labels = Conformer("nano", 4), torch.tensor([[1.0, 0, 1, 0]])
    image = torch.randn(1, 3, 64, 64)
    cam, _, qks = bnr.forward(model, image)
    for q, k in qks:
        q.retain_grad()
    bnr.soft_margin_loss(bnr.noisy_logits(qks, bnr.attend(qks, cam), 1), labels).backward()
    assert all(q.grad.abs().max() > 0 for q, _ in qks)


def test_seeds_add_the_mirror_image_however_many_photos_a_pass_takes(monkeypatch):
    torch.manual_seed(0)
    model, images = Conformer("nano", 3).eval(), [torch.randn(2, 3, side, side) for side in (32, 64)]
    flags = argparse.Namespace(plain=True, device=torch.device("cpu"), amp=False)
    both = []
    for elements in (bnr.CPU_MAPS, 1):
        monkeypatch.setattr(bnr, "CPU_MAPS", elements)
        both.append(bnr.export(model, images, flags))
    for n, photos in enumerate(images):
        with torch.no_grad():
            (cam, _, qks), (mirrored, _, mirrored_qks) = (bnr.forward(model, x) for x in (photos, photos.flip(3)))
        refined = bnr.refined_cam(plain_attention(qks), cam) + bnr.refined_cam(plain_attention(mirrored_qks), mirrored).flip(3)
        for maps in both:
            torch.testing.assert_close(maps["plain"][n], cam + mirrored.flip(3), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(maps["refined"][n], refined, rtol=1e-4, atol=1e-4)


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
