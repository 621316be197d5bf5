"""Dense CRF, affinities, random walk, ResNet-38, and the segmenter built on it."""
import argparse
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import GOLDEN, plain_crf
from PIL import Image
from torchvision import tv_tensors

import data
import psa
import segment


@pytest.mark.parametrize("present, num_classes", [((0,), 21), ((0, 8, 15), 21), ((0, 1, 2), 3), ((0, 1), 3)])
def test_merged_absent_labels_give_the_same_crf(present, num_classes):
    photo, _ = data.toy_picture(np.random.RandomState(1))
    photo = np.array(photo)[:90, :120]
    r = np.random.RandomState(0)
    labels = np.array(present, np.uint8)[r.randint(0, len(present), (9, 12)).repeat(10, 0).repeat(10, 1)]
    expected = plain_crf(photo, labels, num_classes).argmax(0)
    assert (psa.crf_from_labels(photo, labels, num_classes, **psa.CRF_LABELS) == expected).all()


def test_affinity_label_is_void_where_thresholds_disagree():
    cams = np.full((1, 40, 60), 0.1, np.float32)
    cams[:, :, 20:40], cams[:, :, 40:] = 0.4, 0.9
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:, 20:40], photo[:, 40:] = (0, 255, 0), (255, 0, 0)  # colours keep the CRF from moving the edges
    label = psa.affinity_label(np.array([2]), cams, photo, 4, foreground=0.60, background=0.25, crf=psa.CRF_LABELS)
    assert (label[:, :20] == 0).all() and (label[:, 20:40] == data.VOID).all() and (label[:, 40:] == 2).all()


def test_there_are_34_offsets_within_radius_5():
    found = psa.offsets(5)
    assert len(found) == len(set(found)) == 34 and found[:4] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert all(y >= 0 and x * x + y * y < 25 for y, x in found)
    assert len({tuple(sorted([(0, 0), o])) for o in found} | {(0, 0)}) == 35


@pytest.mark.parametrize("edge, radius", [(40, 5), (11, 5), (10, 4), (7, 3), (5, 2), (3, 2), (1, 2)])
def test_radius_shrinks_on_small_maps(edge, radius):
    assert psa.radius_for(edge, 40) == psa.radius_for(40, edge) == radius


def plain_affinities(features, radius):
    """By index, a pair at a time. -> {(from, to): affinity} with places (y, x)"""
    _, h, w = features.shape
    out = {}
    for y in range(h - radius + 1):
        for x in range(radius - 1, w - radius + 1):
            for dy, dx in psa.offsets(radius):
                gap = (features[:, y, x] - features[:, y + dy, x + dx]).abs().mean()
                out[(y, x), (y + dy, x + dx)] = torch.exp(-gap).item()
    return out


def test_affinity_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    features, radius = torch.randn(3, 6, 9), 3
    found = psa.affinity(features[None], radius)[0]
    for ((y, x), (y2, x2)), value in plain_affinities(features, radius).items():
        assert found[psa.offsets(radius).index((y2 - y, x2 - x)), y, x - radius + 1].item() == pytest.approx(value, rel=1e-5)
    assert found.numel() == len(plain_affinities(features, radius))


def test_affinity_loss_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    features, radius = torch.randn(2, 3, 6, 9), 3
    labels = torch.tensor([0, 1, 2, data.VOID])[torch.randint(0, 4, (2, 6, 9))]
    sums = {"background": [0, 1e-5], "same": [0, 1e-5], "unlike": [0, 1e-5]}
    for image, label in zip(features, labels):
        for (a, b), value in plain_affinities(image, radius).items():
            if data.VOID in (label[a], label[b]):
                continue
            kind = "unlike" if label[a] != label[b] else "background" if label[a] == 0 else "same"
            sums[kind][0] -= np.log(value + 1e-5) if kind != "unlike" else np.log(1 + 1e-5 - value)
            sums[kind][1] += 1
    expected = sum(weight * total / count for weight, (total, count) in zip((0.25, 0.25, 0.5), sums.values()))
    found = psa.affinity_loss(psa.affinity(features, radius), labels, radius)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_losses_of_the_parts_of_a_batch_add_up_to_its_loss():
    torch.manual_seed(0)
    features, logits = torch.randn(4, 3, 6, 9), torch.randn(4, 5, 2, 3)
    labels = torch.tensor([0, 1, 2, data.VOID])[torch.randint(0, 4, (4, 6, 9))]
    labels[0] = data.VOID  # an image without a pair or a pixel that counts
    for loss, x in ((lambda x, y, batch=None: psa.affinity_loss(psa.affinity(x, 3), y, 3, batch), features),
                    (segment.segmentation_loss, logits)):
        parts = sum(loss(part, y, labels) for part, y in zip(x.split(3), labels.split(3)))
        torch.testing.assert_close(parts, loss(x, labels))


def test_gradient_of_the_affinities_equals_that_of_the_plain_form():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 6, 9, requires_grad=True)
    start, ends = psa.pairs(features, 3)
    plain = torch.stack([torch.exp(-(start - end).abs().mean(1)) for end in ends], dim=1)
    found = psa.affinity(features, 3)
    weight = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), features)[0] for x in (found, plain))
    torch.testing.assert_close(ours, theirs)


def plain_walk(maps, features, radius, beta, doublings):
    """The published form: a dense N x N matrix, columns divided by their sums, squared again and again."""
    L, h, w = maps.shape
    matrix = torch.eye(h * w)
    for (a, b), value in plain_affinities(features, radius).items():
        i, j = a[0] * w + a[1], b[0] * w + b[1]
        matrix[i, j] = matrix[j, i] = value ** beta
    matrix = matrix / matrix.sum(0, keepdim=True)
    for _ in range(doublings):
        matrix = matrix @ matrix
    return (maps.reshape(L, -1) @ matrix).view(L, h, w)


def test_sparse_walk_equals_dense_powers():
    torch.manual_seed(0)
    features, maps = 0.1 * torch.randn(4, 9, 12), torch.rand(3, 9, 12)
    found = psa.random_walk(maps, psa.affinity(features[None], 4)[0], 4, beta=14, steps=2 ** 5)
    torch.testing.assert_close(found, plain_walk(maps, features, 4, 14, 5), atol=1e-5, rtol=0)


def test_walk_keeps_a_constant_map():
    features = torch.randn(1, 4, 12, 15)
    maps = torch.full((1, 12, 15), 0.42)
    torch.testing.assert_close(psa.random_walk(maps, psa.affinity(features, 5)[0], 5, 14, 128), maps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 3)])
def test_walk_on_a_map_too_small_for_pairs_changes_nothing_or_mixes(size):
    maps = torch.rand(2, *size)
    radius = psa.radius_for(*size)
    out = psa.random_walk(maps, psa.affinity(torch.zeros(1, 2, *size), radius)[0], radius, 14, 4)
    assert out.shape == maps.shape and out.min() >= maps.min() and out.max() <= maps.max() + 1e-6


def test_walk_in_mixed_precision_keeps_a_constant_map():
    net = psa.AffinityNet(psa.ResNet38(1)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        scores = psa.walk_scores(net, torch.randn(3, 96, 96), torch.rand(1, 96, 96), 0.42, 14, 128)
    torch.testing.assert_close(scores[0], torch.full((12, 12), 0.42), atol=1e-4, rtol=0)


def test_walk_scores_pad_the_photo_to_multiples_of_eight():
    net = psa.AffinityNet(psa.ResNet38(1)).eval()
    scores = psa.walk_scores(net, torch.randn(3, 41, 60), torch.rand(2, 41, 60), 0.42, 14, 4)
    assert scores.shape == (3, 6, 8)
    none = psa.walk_scores(net, torch.randn(3, 16, 16), torch.zeros(0, 16, 16), 0.42, 14, 4)
    torch.testing.assert_close(none, torch.full((1, 2, 2), 0.42))


def test_affinitynet_freezes_the_first_layers_and_every_batch_norm():
    net = psa.AffinityNet(psa.ResNet38(1)).train()
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((v == net.state_dict()[k]).all() for k, v in before.items())
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert not any("bn" in n for n in trained)
    assert not any(n.startswith(("backbone.conv1a", "backbone.b2.", "backbone.b2_")) for n in trained)
    assert {"backbone.b3.conv_branch2a.weight", "f9.weight"} <= trained
    assert net.backbone.b7.dropout_2b1.training and not net.eval().backbone.b7.dropout_2b1.training


def test_deeplab_fixes_scale_and_shift_but_follows_the_statistics():
    net = segment.DeepLab(psa.ResNet38(1), 4).train()
    before = net.backbone.bn7.running_mean.clone()
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert (net.backbone.bn7.running_mean != before).any() and net.backbone.bn7.momentum == 3e-4
    assert net.backbone.bn7.weight.grad is None and net.cls_conv.weight.grad is not None
    frozen = segment.DeepLab(psa.ResNet38(1), 4, "frozen").train()
    assert not frozen.backbone.bn7.training and not frozen.backbone.bn7.weight.requires_grad
    assert frozen.bn_fov.training and frozen.bn_fov.weight.requires_grad and frozen.bn_fov.momentum == 0.1


def test_learning_rates_follow_the_published_groups():
    net = segment.DeepLab(psa.ResNet38(1), 4)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in psa.parameter_groups(net, segment.NEW, 0.001, 5e-4) for p in g["params"]}
    assert rate[id(net.backbone.conv1a.weight)] == (0.001, 5e-4)
    assert rate[id(net.conv_fov.weight)] == rate[id(net.conv_fov2.weight)] == (0.01, 5e-4)
    assert rate[id(net.cls_conv.bias)] == (0.02, 0)
    assert len(rate) == sum(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_torchvision_backbones_have_stride_8(backbone):
    found = psa.ResNetStages(backbone).eval()(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape) for f in found] == [(1, c, 8, 8) for c in (512, 1024, 2048)]


@pytest.mark.parametrize("name", ["resnet38_div64.params", "resnet38_div64_legacy.params"])
@pytest.mark.parametrize("damage", ["cut", "foreign", "huge", "negative"])
def test_damaged_mxnet_files_end_in_a_clear_error(tmp_path, name, damage):
    raw = bytearray((GOLDEN / name).read_bytes())
    if damage == "cut":
        raw = raw[:len(raw) // 2]
    elif damage == "foreign":
        raw = bytearray(b"PK\x03\x04" + bytes(100))
    else:  # the first side of the first array
        at, form = (24 + 12, "<q") if "legacy" not in name else (24 + 4, "<i")
        struct.pack_into(form, raw, at, 2 ** 30 if damage == "huge" else -3)
    (tmp_path / "w.params").write_bytes(raw)
    with pytest.raises(data.InputError, match="w.params cannot be read as MXNet weights"):
        psa.read_resnet38(tmp_path / "w.params")


def flags(**given):
    return argparse.Namespace(**{"backbone": "resnet38", "width": 1, "dropout": 1.0, "from_scratch": False, "resnet38": None,
                                 "backbone_weights": None, **given})


def test_psas_pth_of_resnet38_loads_without_its_heads(tmp_path):
    state = psa.ResNet38(1).state_dict()
    torch.save({**state, "fc8.weight": torch.ones(20, 64, 1, 1), "f9.weight": torch.ones(7, 7, 1, 1)}, tmp_path / "res38.pth")
    loaded = psa.make_backbone(flags(resnet38=tmp_path / "res38.pth")).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


def test_torchvisions_weights_come_from_a_file_or_the_network(tmp_path, monkeypatch):
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(state, tmp_path / "r50.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: torch.save(state, path))
    for given in ({"backbone_weights": tmp_path / "r50.pth"}, {}):
        backbone = psa.make_backbone(flags(backbone="resnet50", **given))
        assert torch.equal(backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])

    def offline(url, path, hash_prefix):
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(data.InputError, match="cannot fetch https://.*resnet101.*no route.*--backbone-weights"):
        psa.make_backbone(flags(backbone="resnet101"))


@pytest.mark.parametrize("given, says", [
    ({"resnet38": "cut.params"}, "cut.params cannot be read as MXNet weights: .*: ilsvrc.*fits"),
    ({"resnet38": "wide.pth"}, "wide.pth does not fit: .*conv1a.weight .file .2, 3, 3, 3., network .1, 3, 3, 3..: ilsvrc.*fits"),
    ({"resnet38": "absent.pth"}, "no weight file .*absent.pth: ilsvrc.*fits"),
    ({"backbone": "resnet50", "backbone_weights": "wide.pth"}, "wide.pth does not fit: .*torchvision's resnet50 .*fits"),
    ({"backbone": "resnet50", "backbone_weights": "cut.params"}, "cut.params is no weight file that loads safely: .*resnet50 .*fits")])
def test_a_wrong_backbone_file_is_named_with_the_one_that_fits(tmp_path, given, says):
    (tmp_path / "cut.params").write_bytes((GOLDEN / "resnet38_div64.params").read_bytes()[:5000])
    torch.save(psa.ResNet38(2).state_dict(), tmp_path / "wide.pth")
    given = {k: tmp_path / v if "." in v else v for k, v in given.items()}
    with pytest.raises(data.InputError, match=says):
        psa.make_backbone(flags(**given))


def test_segmentation_loss_ignores_void():
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = 50
    labels = torch.full((1, 8, 8), data.VOID)
    labels[:, :4] = 1
    assert segment.segmentation_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)
    labels[:, 0] = 2
    assert segment.segmentation_loss(logits, labels).item() == pytest.approx(50 / 4)


def test_probabilities_average_logits_over_scales_and_mirror_images():
    class Net(torch.nn.Module):  # logits that depend on the place: the column of the photo
        def forward(self, x):
            return torch.stack([x[:, 0], 2 * x[:, 1]], dim=1)

    photo = torch.randn(3, 6, 8)
    larger = torch.randn(3, 9, 12)
    resized = F.interpolate(larger[None], (6, 8), mode="bilinear", align_corners=True)[0]
    expected = torch.softmax(torch.stack([photo[0] + resized[0], 2 * photo[1] + 2 * resized[1]]) / 2, dim=0)
    torch.testing.assert_close(segment.probabilities(Net(), [photo, larger], (6, 8)), expected)


def test_hsv_jitter_shifts_a_colour_by_little_and_keeps_the_size():
    photo = Image.new("RGB", (5, 4), (200, 100, 50))
    torch.manual_seed(0)
    colours = {tuple(np.array(segment.jitter_hsv(photo))[0, 0].tolist()) for _ in range(30)}
    assert len(colours) > 20 and segment.jitter_hsv(photo).size == (5, 4)
    assert all(abs(c[0] - 200) <= 12 for c in colours)  # the largest channel is the value


def test_random_scale_resizes_photo_and_label_alike():
    label = tv_tensors.Mask(torch.tensor([[0, 3], [255, 7]], dtype=torch.uint8).repeat_interleave(20, 0).repeat_interleave(20, 1))
    for _ in range(10):
        photo, scaled = segment.random_scale(Image.new("RGB", (60, 40)), label, 0.5, 1.5)  # a label of another size follows the photo
        assert photo.size == tuple(scaled.shape[::-1]) and 30 <= photo.size[0] <= 90
        assert set(scaled.unique().tolist()) == {0, 3, 7, 255}


def test_the_padding_of_a_crop_is_black_and_background():
    photo, label = Image.new("RGB", (40, 50), (200, 10, 10)), tv_tensors.Mask(torch.full((50, 40), 3, dtype=torch.uint8))
    black = -torch.tensor(data.MEAN) / torch.tensor(data.STD)
    for seed in range(5):
        torch.manual_seed(seed)
        image, crop = psa.augment(64)(photo, label)
        assert image.shape == (3, 64, 64) and (crop == 0).sum() == 64 * 64 - 50 * 40
        torch.testing.assert_close(image[:, crop == 0], black[:, None].expand(3, 2096))
