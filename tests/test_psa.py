"""Affinities, random walk and CRF, fast forms against plain ones; ResNet-38 and its files; the segmenter."""
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import GOLDEN, plain_crf
from PIL import Image
from torch.testing import assert_close
from torchvision import tv_tensors

import data
import psa
import resnet38
import segment
from crf import CRF_LABELS, crf_from_labels
from resnet38 import ResNet38
from stage import InputError
from toy import toy_picture


@pytest.mark.parametrize("present, num_classes", [((0,), 21), ((0, 8, 15), 21), ((0, 1, 2), 3), ((0, 1), 3)])
def test_merged_absent_labels_give_the_same_crf(present, num_classes):
    photo = np.array(toy_picture(np.random.RandomState(1))[0])[:90, :120]
    r = np.random.RandomState(0)
    labels = np.array(present, np.uint8)[r.randint(0, len(present), (9, 12)).repeat(10, 0).repeat(10, 1)]
    expected = plain_crf(photo, labels, num_classes).argmax(0)
    assert (crf_from_labels(photo, labels, num_classes, **CRF_LABELS) == expected).all()


def test_affinity_label_is_void_where_thresholds_disagree():
    cams = np.full((1, 40, 60), 0.1, np.float32)
    cams[:, :, 20:40], cams[:, :, 40:] = 0.4, 0.9
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:, 20:40], photo[:, 40:] = (0, 255, 0), (255, 0, 0)  # colours keep the CRF from moving the edges
    label = psa.affinity_label(np.array([2]), cams, photo, 4, foreground=0.60, background=0.25, crf=CRF_LABELS)
    assert (label[:, :20] == 0).all() and (label[:, 20:40] == data.VOID).all() and (label[:, 40:] == 2).all()


def test_there_are_34_offsets_within_radius_5():
    found = psa.offsets(5)
    assert len(found) == len(set(found)) == 34 and found[:4] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert all(y >= 0 and x * x + y * y < 25 for y, x in found)
    assert len({tuple(sorted([(0, 0), place])) for place in found} | {(0, 0)}) == 35


@pytest.mark.parametrize("edge, radius", [(40, 5), (11, 5), (10, 4), (7, 3), (5, 2), (3, 2), (1, 2)])
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


def test_affinities_and_their_gradient_equal_those_of_the_pairs():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 6, 9, requires_grad=True)
    start, end = zip(*places(6, 9, radius=3))
    plain = torch.stack([psa.affinity(at(image, start), at(image, end)) for image in features])
    fast = psa.affinities(features, 3).flatten(1)
    assert_close(fast, plain)
    weight = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), features)[0] for x in (fast, plain))
    assert_close(ours, theirs)


def test_kinds_of_all_places_equal_those_of_the_pairs():
    labels = torch.tensor([0, 1, 2, data.VOID])[torch.randint(0, 4, (2, 6, 9))]
    start, end = zip(*places(6, 9, radius=3))
    for fast, plain in zip(psa.kinds_of(labels, 3), psa.pair_kinds(at(labels, start), at(labels, end))):
        assert torch.equal(fast.flatten(1), plain) and plain.any()


def test_losses_of_the_parts_of_a_batch_add_up_to_its_loss():
    torch.manual_seed(0)
    features, logits = torch.randn(4, 3, 6, 9), torch.randn(4, 5, 2, 3)
    labels = torch.tensor([0, 1, 2, data.VOID])[torch.randint(0, 4, (4, 6, 9))]
    labels[0] = data.VOID  # an image without a pair or a pixel that counts
    counts = [kind.sum() for kind in psa.kinds_of(labels, 3)]

    def affinity_loss(part, y):
        return psa.affinity_loss(psa.affinities(part, 3), psa.kinds_of(y, 3), counts)

    def segmentation_loss(part, y):
        return segment.segmentation_loss(part, y, (labels != data.VOID).sum())

    for loss, x in ((affinity_loss, features), (segmentation_loss, logits)):
        parts = sum(loss(part, y) for part, y in zip(x.split(3), labels.split(3)))
        assert_close(parts, loss(x, labels))


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


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 3), (12, 15)])
def test_walk_keeps_a_constant_map_and_stays_within_the_maps_range(size):
    maps, features, radius = torch.rand(2, *size), torch.randn(1, 4, *size), psa.radius_for(*size)
    maps[0] = 0.42
    out = psa.sparse_walk(maps, psa.affinities(features, radius)[0], radius, beta=14, steps=128)
    assert_close(out[0], maps[0], atol=1e-4, rtol=0)
    assert out.shape == maps.shape and maps.min() - 1e-4 <= out.min() and out.max() <= maps.max() + 1e-4


def test_walk_in_mixed_precision_keeps_a_constant_map():
    net = psa.AffinityNet(ResNet38(1)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        scores = psa.walk_scores(net, torch.randn(3, 96, 96), torch.rand(1, 96, 96), 0.42, 14, 128)
    assert_close(scores[0], torch.full((12, 12), 0.42), atol=1e-4, rtol=0)


def test_walk_scores_pad_the_photo_to_multiples_of_eight():
    net = psa.AffinityNet(ResNet38(1)).eval()
    scores = psa.walk_scores(net, torch.randn(3, 41, 60), torch.rand(2, 41, 60), 0.42, 14, 4)
    assert scores.shape == (3, 6, 8)
    none = psa.walk_scores(net, torch.randn(3, 16, 16), torch.zeros(0, 16, 16), 0.42, 14, 4)
    assert_close(none, torch.full((1, 2, 2), 0.42))


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
    assert (net.backbone.bn7.running_mean != before).any() and net.backbone.bn7.momentum == 3e-4
    assert net.backbone.bn7.weight.grad is None and net.cls_conv.weight.grad is not None
    frozen = segment.DeepLab(ResNet38(1), 4, "frozen").train()
    assert not frozen.backbone.bn7.training and not frozen.backbone.bn7.weight.requires_grad
    assert frozen.bn_fov.training and frozen.bn_fov.weight.requires_grad and frozen.bn_fov.momentum == 0.1


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_torchvision_backbones_have_stride_8(backbone):
    found = resnet38.ResNetStages(backbone).eval()(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape) for f in found] == [(1, c, 8, 8) for c in (512, 1024, 2048)]


@pytest.mark.parametrize("name, damage", [
    ("resnet38_div64.params", "cut"), ("resnet38_div64_legacy.params", "negative")])
def test_damaged_mxnet_files_end_in_a_clear_error(tmp_path, name, damage):
    raw = bytearray((GOLDEN / name).read_bytes())
    if damage == "cut":
        raw = raw[:len(raw) // 2]
    else:
        struct.pack_into("<i", raw, 24 + 4, -3)  # the first side of the first array
    (tmp_path / "w.params").write_bytes(raw)
    with pytest.raises(InputError, match="w.params cannot be read as MXNet weights: .*: that fits"):
        resnet38.read_resnet38(tmp_path / "w.params", ": that fits")


def test_psas_pth_of_resnet38_loads_without_its_heads(tmp_path):
    state, backbone = ResNet38(1).state_dict(), ResNet38(1)
    heads = {"fc8.weight": torch.ones(20, 64, 1, 1), "f9.weight": torch.ones(7, 7, 1, 1)}
    torch.save({**state, **heads}, tmp_path / "res38.pth")
    resnet38.load_backbone(backbone, "resnet38", tmp_path / "res38.pth")
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_torchvisions_weights_come_from_a_file_or_the_network(tmp_path, monkeypatch):
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(state, tmp_path / "r50.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: torch.save(state, path))
    for path in (tmp_path / "r50.pth", None):
        backbone = resnet38.make_backbone("resnet50")
        resnet38.load_backbone(backbone, "resnet50", path)
        assert torch.equal(backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])

    def offline(url, path, hash_prefix):
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match="cannot fetch https://.*resnet101.*no route.*--backbone-weights"):
        resnet38.fetch("resnet101")


@pytest.mark.parametrize("name, file, says", [
    ("resnet38", "wide.pth", r"wide.pth does not fit: .*conv1a.weight \(file \(2, 3, 3, 3\), .*: ilsvrc.*fits"),
    ("resnet38", "absent.pth", "no weight file .*absent.pth: ilsvrc.*fits"),
    ("resnet50", "wide.pth", "wide.pth does not fit: .*torchvision's resnet50 .*fits")])
def test_a_wrong_backbone_file_is_named_with_the_one_that_fits(tmp_path, name, file, says):
    torch.save(ResNet38(2).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(InputError, match=says):
        resnet38.load_backbone(resnet38.make_backbone(name, width=1), name, tmp_path / file)


def test_segmentation_loss_ignores_void():
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = 50
    labels = torch.full((1, 8, 8), data.VOID)
    labels[:, :4] = 1
    assert segment.segmentation_loss(logits, labels, 32).item() == pytest.approx(0, abs=1e-6)
    labels[:, 0] = 2
    assert segment.segmentation_loss(logits, labels, 32).item() == pytest.approx(50 / 4)


def test_probabilities_average_logits_over_scales_and_mirror_images():
    class Net(torch.nn.Module):  # logits that depend on the place: the column of the photo
        def forward(self, x):
            return torch.stack([x[:, 0], 2 * x[:, 1]], dim=1)

    photo = torch.randn(3, 6, 8)
    larger = torch.randn(3, 9, 12)
    resized = F.interpolate(larger[None], (6, 8), mode="bilinear", align_corners=True)[0]
    expected = torch.softmax(torch.stack([photo[0] + resized[0], 2 * photo[1] + 2 * resized[1]]) / 2, dim=0)
    assert_close(segment.probabilities(Net(), [photo, larger], (6, 8)), expected)


def test_hsv_jitter_shifts_a_colour_by_little_and_keeps_the_size():
    photo = Image.new("RGB", (5, 4), (200, 100, 50))
    torch.manual_seed(0)
    colours = {tuple(np.array(segment.jitter_hsv(photo))[0, 0].tolist()) for _ in range(30)}
    assert len(colours) > 20 and segment.jitter_hsv(photo).size == (5, 4)
    assert all(abs(c[0] - 200) <= 12 for c in colours)  # the largest channel is the value


def test_photo_and_label_are_scaled_alike():
    label = torch.tensor([[0, 3], [255, 7]], dtype=torch.uint8).repeat_interleave(20, 0).repeat_interleave(30, 1)
    for factor in (0.5, 0.63, 1.0, 1.37, 1.5):
        photo = segment.scale(torch.zeros(3, 40, 60), factor)
        scaled = segment.scale(label[None].float(), factor, "nearest")[0]
        assert photo.shape[1:] == scaled.shape == (round(40 * factor), round(60 * factor))
        assert set(scaled.unique().tolist()) == {0, 3, 7, 255}


def test_the_padding_of_a_crop_is_black_and_background():
    photo = Image.new("RGB", (40, 50), (200, 10, 10))
    label = tv_tensors.Mask(torch.full((50, 40), 3, dtype=torch.uint8))
    black = -torch.tensor(data.MEAN) / torch.tensor(data.STD)
    for seed in range(5):
        torch.manual_seed(seed)
        image, crop = psa.augment_pair(64)(photo, label)
        assert image.shape == (3, 64, 64) and (crop == 0).sum() == 64 * 64 - 50 * 40
        assert_close(image[:, crop == 0], black[:, None].expand(3, 2096))
