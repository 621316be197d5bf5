"""Affinities, random walk and CRF, fast forms against plain ones; AffinityNet; the segmenter."""
from functools import partial

import numpy as np
import pytest
import torch
from conftest import plain_crf
from torch.testing import assert_close

import psa
import segment
from wsss.crf import CRF_LABELS, crf_from_labels
from wsss.evaluate import THRESHOLDS, confusion, confusion_over_thresholds
from wsss.masks import VOID
from wsss.resnet38 import ResNet38
from wsss.seeds import hard_threshold


@pytest.mark.parametrize("present, num_classes", [((0,), 21), ((0, 8, 15), 21), ((0, 1, 2), 3), ((0, 1), 3)])
def test_merged_absent_labels_give_the_same_crf(present, num_classes):
    r = np.random.RandomState(0)
    photo = r.randint(0, 256, (9, 12, 3)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
    labels = np.array(present, np.uint8)[r.randint(0, len(present), (18, 24)).repeat(5, 0).repeat(5, 1)]
    expected = plain_crf(photo, labels, num_classes).argmax(0)
    assert (crf_from_labels(photo, labels, num_classes, **CRF_LABELS) == expected).all()


def test_confusion_over_thresholds_equals_that_of_each_thresholded_map():
    r = np.random.RandomState(0)
    mask, cams = r.choice([0, 1, 2, 3, VOID], (12, 16)).astype(np.uint8), r.rand(2, 12, 16).astype(np.float32)
    cams[0, 0, :4], classes = THRESHOLDS[[0, 30, 58, 59]], np.array([1, 3])  # the value itself counts
    for maps, present in ((cams, classes), (cams[:0], classes[:0])):
        matrices = confusion_over_thresholds(mask, present, maps, 4)
        assert len(matrices) == len(THRESHOLDS) == 60
        for matrix, threshold in zip(matrices, THRESHOLDS):
            assert (matrix == confusion(mask, hard_threshold(present, maps, threshold), 4)).all()


def test_affinity_label_is_void_where_thresholds_disagree():
    cams = np.full((1, 40, 60), 0.1, np.float32)
    cams[:, :, 20:40], cams[:, :, 40:] = 0.4, 0.9
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:, 20:40], photo[:, 40:] = (0, 255, 0), (255, 0, 0)  # colours keep the CRF from moving the edges
    label = psa.affinity_label(photo, np.array([2]), cams, 4, foreground=0.60, background=0.25, crf=CRF_LABELS)
    assert (label[:, :20] == 0).all() and (label[:, 20:40] == VOID).all() and (label[:, 40:] == 2).all()


@pytest.mark.parametrize("edge, radius", [(40, 5), (11, 5), (10, 4), (7, 3), (5, 2), (1, 2)])
def test_radius_shrinks_on_small_maps(edge, radius):
    assert psa.radius_for(edge, 40) == psa.radius_for(40, edge) == radius


def places(height, width, radius):
    """Every pair that PSA compares, one at a time. -> list of ((y, x), (y, x)), offset by offset"""
    return [((y, x), (y + dy, x + dx)) for dy, dx in psa.offsets(radius)
            for y in range(height - radius + 1) for x in range(radius - 1, width - radius + 1)]


def at(maps, chosen):
    """maps: (..., h, w), chosen: list of n (y, x)  ->  (..., n)"""
    y, x = torch.tensor(chosen).T
    return maps[..., y, x]


def test_affinities_their_gradient_and_kinds_equal_those_of_the_pairs():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 6, 9, requires_grad=True)
    labels = torch.tensor([0, 1, 2, VOID])[torch.randint(0, 4, (2, 6, 9))]
    start, end = zip(*places(6, 9, radius=3))
    plain = torch.stack([psa.affinity(at(image, start), at(image, end)) for image in features])
    fast = psa.affinities(features, 3).flatten(1)
    assert_close(fast, plain)
    weight = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), features)[0] for x in (fast, plain))
    assert_close(ours, theirs)
    for kind, expected in zip(psa.kinds_of(labels, 3), psa.pair_kinds(at(labels, start), at(labels, end))):
        assert torch.equal(kind.flatten(1), expected) and expected.any()


def test_losses_of_the_parts_of_a_batch_add_up_to_its_loss():
    torch.manual_seed(0)
    features, logits = torch.randn(4, 3, 6, 9), torch.randn(4, 5, 2, 3)
    labels = torch.tensor([0, 1, 2, VOID])[torch.randint(0, 4, (4, 6, 9))]
    labels[0] = VOID  # an image without a pair or a pixel that counts
    for loss_of, x in ((partial(psa.loss_of_pairs, radius=3), features), (segment.loss_of_pixels, logits)):
        parts = sum(loss_of(torch.nn.Identity(), part, labels)[0] for part in zip(x.split(3), labels.split(3)))
        assert_close(parts, loss_of(torch.nn.Identity(), (x, labels), labels)[0])


def test_sparse_walk_equals_the_walk_on_a_dense_matrix():
    torch.manual_seed(0)
    features, maps, radius = 0.1 * torch.randn(4, 9, 12), torch.rand(3, 9, 12), 4
    matrix = torch.eye(9 * 12)
    start, end = zip(*places(9, 12, radius))
    i, j = (12 * y + x for y, x in (torch.tensor(side).T for side in (start, end)))
    matrix[i, j] = matrix[j, i] = psa.affinity(at(features, start), at(features, end))
    plain = psa.random_walk(maps.flatten(1), psa.transition(matrix, beta=14), steps=2 ** 5)
    fast = psa.sparse_walk(maps, psa.affinities(features[None], radius)[0], radius, beta=14, steps=2 ** 5)
    assert_close(fast.flatten(1), plain, atol=1e-5, rtol=0)


def test_walk_scores_pad_the_photo_and_keep_a_constant_background_in_mixed_precision():
    net = psa.AffinityNet(ResNet38(1)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        scores = psa.walk_scores(net, torch.randn(3, 41, 60), torch.rand(2, 41, 60), 0.42, 14, 4)
        none = psa.walk_scores(net, torch.randn(3, 96, 96), torch.zeros(0, 96, 96), 0.42, 14, 128)
    assert scores.shape == (3, 6, 8)
    assert_close(none, torch.full((1, 12, 12), 0.42), atol=1e-4, rtol=0)


def test_affinitynet_freezes_the_first_layers_and_every_batch_norm():
    net = psa.AffinityNet(ResNet38(1)).train()
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((v == net.state_dict()[k]).all() for k, v in before.items())
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert not any("bn" in name for name in trained)
    assert not any(name.startswith(("backbone.conv1a", "backbone.b2.", "backbone.b2_")) for name in trained)
    assert {"backbone.b3.conv_branch2a.weight", "f9.weight"} <= trained
    assert net.backbone.b7.dropout_2b1.training and not net.eval().backbone.b7.dropout_2b1.training


def test_deeplab_fixes_scale_and_shift_but_follows_the_statistics():
    net = segment.DeepLab(ResNet38(1), 4).train()
    before = net.backbone.bn7.running_mean.clone()
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert (net.backbone.bn7.running_mean != before).any()
    assert net.backbone.bn7.weight.grad is None and net.cls_conv.weight.grad is not None
    frozen = segment.DeepLab(ResNet38(1), 4, "frozen").train()
    assert not frozen.backbone.bn7.training and not frozen.backbone.bn7.weight.requires_grad
    assert frozen.bn_fov.training and frozen.bn_fov.weight.requires_grad and frozen.bn_fov.momentum == 0.1
