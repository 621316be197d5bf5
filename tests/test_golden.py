"""Equality with the authors' published code, in float32 on the CPU."""
import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import GOLDEN, drawn_image, largest_difference, rebuilt, run
from PIL import Image

import bnr
import data
import engine
import psa
import resnet38
import seeds
import segment
from conformer import Conformer, DropPath
from crf import CRF_LABELS, crf_from_labels
from stage import InputError


@pytest.fixture(scope="module")
def small():
    """Conformer-S with the rebuilt weights; row 0 of the published heads, an unused background class, dropped."""
    model = Conformer("small", 20).eval()
    state = rebuilt("conformer_small").items()
    model.load_state_dict({name: value[1:] if name.startswith(bnr.HEADS) else value for name, value in state})
    return model


@pytest.mark.parametrize("arch", ["tiny", "base"])  # small: the fixture above loads all its names
def test_conformer_has_the_published_names_and_shapes(arch):
    shapes = {k: list(v.shape) for k, v in Conformer(arch, 21).state_dict().items()}
    assert shapes == json.loads((GOLDEN / f"conformer_{arch}_keys.json").read_text())


@pytest.fixture(scope="module")
def imagenet():
    """What the ImageNet file of Conformer-Ti holds: the names of TransCAM's, but two linear heads of 1,000 classes."""
    state = Conformer("tiny", 20).state_dict()
    for head, width in (("trans_cls_head", 384), ("conv_cls_head", 256)):
        state.update({f"{head}.weight": torch.zeros(1000, width), f"{head}.bias": torch.zeros(1000)})
    return state


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}])
def test_an_imagenet_file_loads_but_for_its_heads_which_are_named(imagenet, tmp_path, capsys, wrap):
    torch.save(wrap(imagenet), tmp_path / "Conformer_tiny_patch16.pth")
    own = bnr.start_classifier("tiny", 20, tmp_path / "Conformer_tiny_patch16.pth").state_dict()
    assert all(torch.equal(own[k], v) for k, v in imagenet.items() if not k.startswith(bnr.HEADS))
    assert "fresh: trans_cls_head (2), conv_cls_head (2)" in capsys.readouterr().out


@pytest.mark.parametrize("damage, says", [
    ("patch 32", r"trans_patch_conv.weight \(file \(384, 64, 8, 8\), network \(384, 64, 4, 4\)\): FILE fits"),
    ("foreign", "w.pth is damaged, or holds more than tensors, and is not read: FILE fits"),
    ("list", "w.pth holds a list, not named tensors: FILE fits"),
    ("lacking", "w.pth does not fit: .*: FILE fits")])
def test_a_wrong_file_is_named_with_the_one_that_fits(imagenet, tmp_path, damage, says):
    damaged = {"patch 32": {**imagenet, "trans_patch_conv.weight": torch.zeros(384, 64, 8, 8)}, "list": [1, 2],
               "lacking": {name: value for name, value in imagenet.items() if "trans_block" not in name},
               "foreign": {"model": argparse.ArgumentParser}}
    torch.save(damaged[damage], tmp_path / "w.pth")
    with pytest.raises(InputError, match=says.replace("FILE", "Conformer_tiny_patch16.pth")) as raised:
        bnr.start_classifier("tiny", 20, tmp_path / "w.pth")
    assert "\n" not in str(raised.value)


def test_conformer_has_the_published_constants():
    model = Conformer("small", 20)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name == "trans_norm" else 1e-6), name
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == (1e-5 if name == "bn1" else 1e-6), name
        if isinstance(module, nn.Linear):
            assert module.bias.abs().max() == 0 and abs(module.weight.std() - 0.02) < 0.001, name
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert abs(module.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.05, name
    rates = [module.p for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx(np.linspace(0, 0.1, 12).tolist())


@pytest.mark.parametrize("case, n, side", [(0, 1, 224), (1, 2, 256)])
@torch.no_grad()
def test_maps_and_losses_equal_the_published(small, case, n, side):
    golden = np.load(GOLDEN / "conformer_small.npz")
    labels = torch.zeros(n, 20)
    labels[:, 2] = labels[-1, 14] = 1
    images = drawn_image(case, n, side, side)
    cam, z, qks = bnr.forward(small, images)
    refined = bnr.attend(qks, cam)
    conv = golden[f"{case}_conv_logits"][:, 1:]
    assert largest_difference(cam.mean((2, 3)), conv) < 1e-4
    assert largest_difference(z, conv + golden[f"{case}_trans_logits"][:, 1:]) < 1e-4
    assert largest_difference(cam, golden[f"{case}_cam"][:, 1:]) < 1e-4
    assert largest_difference(refined, golden[f"{case}_refined"][:, 1:]) < 1e-4
    noisy = bnr.attend(qks, refined) / len(qks)
    logits = [z, *(maps.mean((2, 3)) for maps in (refined, noisy, 2 * noisy))]
    losses = [bnr.soft_margin_loss(x, labels).item() for x in logits]
    assert losses == pytest.approx(golden[f"{case}_losses"].tolist(), rel=1e-4)
    expected = {("transcam", 1): 0, ("bnr", None): losses[1], ("bnr", 1): losses[2], ("bnr", 2): losses[3]}
    for (loss, noise), noisy_loss in expected.items():
        found, terms = bnr.losses(small, images, labels, loss, noise)
        assert found.item() == pytest.approx(losses[0] + noisy_loss, rel=1e-6)
        assert sum(terms.values()).item() == pytest.approx(found.item(), rel=1e-6)


@pytest.mark.parametrize("case, n, side", [(0, 1, 224), (1, 2, 256)])
def test_gradients_with_a_constant_noise_equal_the_authors(small, case, n, side):
    golden = np.load(GOLDEN / "bnr_small.npz")
    labels = torch.zeros(n, 20)
    labels[:, 2] = labels[-1, 14] = 1
    small.zero_grad()
    loss, _ = bnr.losses(small, drawn_image(case, n, side, side), labels, "bnr", 1)
    loss.backward()
    assert loss.item() == pytest.approx(golden[f"{case}_loss"].item(), rel=1e-4)
    for name, norm, first in zip(*(golden[f"{case}_grad_{what}"] for what in ("names", "norms", "first"))):
        gradient = small.get_parameter(str(name)).grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
        assert np.abs(gradient.flatten()[:64].numpy() - first).max() < 5e-3 * np.abs(first).max(), name


def test_exported_seeds_equal_the_published(tmp_path):
    golden = np.load(GOLDEN / "export.npz")
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(golden["0_image"]).save(tmp_path / "JPEGImages/x.jpg", format="PNG")  # lossless; read by content
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("x\n")
    (tmp_path / "labels.txt").write_text(" ".join(["x"] + [data.VOC_CLASSES[k] for k in golden["0_keys"]]))
    torch.save(rebuilt("conformer_small"), tmp_path / "transcam.pth")  # with the background row of the published heads
    assert golden["sizes"].tolist() == [128, 256, 384]
    flags = ("--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu", "--crop", 256)
    run("bnr.py", "cams", *flags, "--weights", tmp_path / "transcam.pth")
    classes, cams = seeds.read_seeds(tmp_path / "out/cams/x.npz")
    assert classes.tolist() == (golden["0_keys"] + 1).tolist()
    assert np.abs(cams - golden["0_cam"]).max() < 1e-3


@pytest.fixture(scope="module")
def published():
    golden = np.load(GOLDEN / "psa.npz")
    return golden, golden["0_image"], golden["0_keys"] + 1, golden["0_cam"]


@pytest.mark.parametrize("threshold", [60, 25])
def test_label_map_and_its_crf_equal_the_published(published, threshold):
    golden, photo, classes, cams = published
    label = seeds.hard_threshold(classes, cams, threshold / 100)
    assert (label == golden[f"0_label{threshold}"]).all()
    refined = crf_from_labels(photo, label, 21, **CRF_LABELS)
    assert (refined == golden[f"0_crf{threshold}"]).mean() >= 0.9999


def test_random_walk_equals_the_published(published):
    golden, photo, classes, cams = published
    net = psa.AffinityNet(resnet38.ResNet38()).eval()
    state = {}
    for name, value in rebuilt("affinity").items():
        if name.startswith("f"):
            state[name] = 1.3 * value
        else:
            state[f"backbone.{name}"] = value
    net.load_state_dict(state)
    tensor = data.to_tensor()(Image.fromarray(photo))
    scores = psa.walk_scores(net, tensor, torch.from_numpy(cams), background_score=0.42, beta=14, steps=2 ** 7)
    assert largest_difference(scores, golden["0_walk_low"]) < 1e-3
    height, width = photo.shape[:2]
    full = F.interpolate(scores[None], (152, 208), mode="bilinear", align_corners=False)[0, :, :height, :width]
    assert largest_difference(full, golden["0_walk"]) < 1e-3
    assert (np.append(0, classes)[full.argmax(0).numpy()] == golden["0_walk_label"]).mean() >= 0.999
    assert (psa.pseudo_label(scores, classes, photo, 21) == golden["0_walk_crf"]).mean() >= 0.995


def test_deeplab_logits_equal_the_published():
    net = segment.DeepLab(resnet38.ResNet38(), 21).eval()
    net.load_state_dict(rebuilt("deeplab"))
    with torch.no_grad():
        logits = F.interpolate(net(drawn_image(0, 1, 97, 129)), (97, 129), mode="bilinear", align_corners=True)
    assert largest_difference(logits[:, :, ::4, ::4], np.load(GOLDEN / "deeplab.npz")["logits"]) < 1e-4


@pytest.mark.parametrize("factor", [0.5, 0.63, 0.75, 1.25, 1.5, 1.75])
def test_photos_are_scaled_as_opencv_scales_them(factor):
    golden = np.load(GOLDEN / "scaling.npz")
    photo = torch.from_numpy(golden["photo"]).permute(2, 0, 1).float()
    found = segment.scale(photo, factor).round().clamp(0, 255).permute(1, 2, 0).numpy()
    different = np.abs(found - golden[f"scaled_{factor}"])
    assert found.shape == different.shape and different.max() <= 1 and (different > 0).sum() <= 1


def test_the_segmenters_test_equals_the_published():
    golden = np.load(GOLDEN / "segment_test.npz")
    net = segment.DeepLab(resnet38.ResNet38(), 21).eval()
    state = rebuilt("deeplab")
    net.load_state_dict({**state, "cls_conv.weight": 4 * state["cls_conv.weight"]})
    photo = data.to_tensor()(Image.fromarray(golden["photo"]))
    scores = segment.probabilities(net, [segment.scale(photo, x) for x in (0.5, 0.75, 1, 1.25, 1.5, 1.75)], (97, 129))
    scores = scores.numpy()
    assert np.abs(scores[:, ::4, ::4] - golden["probabilities"]).max() < 1e-5
    assert (scores.argmax(0) == golden["argmax"]).mean() >= 0.9999
    label = segment.dense_crf(golden["photo"], scores.clip(1e-5, 1), **segment.CRF_SCORES).argmax(0)
    assert (label == golden["label"]).mean() >= 0.9999


@pytest.mark.parametrize("form", ["", "_v1", "_legacy"])
def test_mxnet_file_gives_the_published_tensors(form):
    expected = json.loads((GOLDEN / "resnet38_div64.json").read_text())
    found = resnet38.read_resnet38(GOLDEN / f"resnet38_div64{form}.params")
    assert found.keys() == expected.keys()
    for name, (shape, total, absolute) in expected.items():
        assert list(found[name].shape) == shape
        values = found[name].double()
        assert [values.sum().item(), values.abs().sum().item()] == pytest.approx([total, absolute], abs=1e-4)
    net = resnet38.ResNet38(1)
    engine.load_weights(net, found, "golden")
