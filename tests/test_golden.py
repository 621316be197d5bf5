"""Equality with the published code on the CPU: forward passes, gradients, whole training loops."""
import copy
import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import GOLDEN, drawn_image, largest_difference, make_set, rebuilt, run
from PIL import Image
from torchvision.ops import StochasticDepth

import bnr
import psa
import segment
from conformer import HEADS, Conformer
from wsss import data, resnet38, seeds, training
from wsss.crf import CRF_LABELS, CRF_SCORES, crf_from_labels, dense_crf
from wsss.presets import defaults


def published_conformer(arch):
    """With the rebuilt weights; row 0 of the published heads, an unused background class, dropped."""
    model = Conformer(arch, 20)
    state = rebuilt(f"conformer_{arch}").items()
    model.load_state_dict({name: value[1:] if name.startswith(HEADS) else value for name, value in state})
    return model


def published_affinitynet(dropout=1.0):
    net, state = psa.AffinityNet(resnet38.ResNet38(dropout=dropout)), {}
    for name, value in rebuilt("affinity").items():
        state[name if name.startswith("f") else f"backbone.{name}"] = 1.3 * value if name.startswith("f") else value
    net.load_state_dict(state)
    return net


def published_deeplab(dropout=1.0, scale=1):
    net, state = segment.DeepLab(resnet38.ResNet38(dropout=dropout), 21, dropout=dropout), rebuilt("deeplab")
    net.load_state_dict({**state, "cls_conv.weight": scale * state["cls_conv.weight"]})
    return net


@pytest.fixture(scope="module")
def small():
    return published_conformer("small").eval()


def test_conformer_has_the_published_names_and_shapes():
    """Of base; small and tiny load all of theirs in other tests."""
    shapes = {k: list(v.shape) for k, v in Conformer("base", 21).state_dict().items()}
    assert shapes == json.loads((GOLDEN / "conformer_base_keys.json").read_text())


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
    rates = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx(np.linspace(0, 0.1, 12).tolist())


@pytest.mark.parametrize("case, n, side", [(0, 1, 224), (1, 2, 256)])
def test_maps_losses_and_gradients_equal_the_published(small, case, n, side):
    golden, of_gradients = np.load(GOLDEN / "conformer_small.npz"), np.load(GOLDEN / "bnr_small.npz")
    labels, photos = torch.zeros(n, 20), drawn_image(case, n, side, side)
    labels[:, 2] = labels[-1, 14] = 1
    with torch.no_grad():
        cam, z, qks = bnr.forward(small, photos)
        refined = bnr.attend(qks, cam)
    conv = golden[f"{case}_conv_logits"][:, 1:]
    assert largest_difference(cam.mean((2, 3)), conv) < 1e-4
    assert largest_difference(z, conv + golden[f"{case}_trans_logits"][:, 1:]) < 1e-4
    assert largest_difference(cam, golden[f"{case}_cam"][:, 1:]) < 1e-4
    assert largest_difference(refined, golden[f"{case}_refined"][:, 1:]) < 1e-4
    of_cls, *of_noise = golden[f"{case}_losses"].tolist()
    expected = {("transcam", 1): of_cls}
    expected.update({("bnr", noise): of_cls + part for noise, part in zip((None, 1, 2), of_noise)})
    for (loss, noise), value in expected.items():
        with torch.set_grad_enabled(noise == 1):
            total, terms = bnr.losses(small, photos, labels, loss, noise)
        assert total.item() == pytest.approx(value, rel=1e-4) == sum(terms.values()).item()
        if (loss, noise) == ("bnr", 1):
            small.zero_grad()
            total.backward()
    for name, norm, first in zip(*(of_gradients[f"{case}_grad_{what}"] for what in ("names", "norms", "first"))):
        gradient = small.get_parameter(str(name)).grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
        assert np.abs(gradient.flatten()[:64].numpy() - first).max() < 5e-3 * np.abs(first).max(), name


def test_exported_seeds_equal_the_published(tmp_path):
    golden = np.load(GOLDEN / "export.npz")
    make_set(tmp_path, ["x"])
    (tmp_path / "classes.txt").unlink()  # VOC's 20
    Image.fromarray(golden["0_image"]).save(tmp_path / "JPEGImages/x.jpg", format="PNG")  # lossless; read by content
    (tmp_path / "labels.txt").write_text(" ".join(["x"] + [data.VOC_CLASSES[k] for k in golden["0_keys"]]))
    torch.save(rebuilt("conformer_small"), tmp_path / "transcam.pth")  # with the background row of the published heads
    assert golden["sizes"].tolist() == [128, 256, 384]
    flags = ("--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu", "--crop", 256, "--batch-size", 1)
    run("bnr", "cams", *flags, "--weights", tmp_path / "transcam.pth")
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


@pytest.mark.parametrize("factor", [0.5, 0.63, 0.75, 1.25, 1.5, 1.75])
def test_photos_and_masks_are_scaled_as_opencv_scales_them(factor):
    golden = np.load(GOLDEN / "scaling.npz")
    photo = torch.from_numpy(golden["photo"]).permute(2, 0, 1).float()
    ours = data.scale_like_opencv(photo, factor).round().clamp(0, 255).permute(1, 2, 0).numpy()
    different = np.abs(ours - golden[f"scaled_{factor}"])
    assert ours.shape == different.shape and different.max() <= 1 and (different > 0).sum() <= 1
    rows, columns = (np.floor(np.arange(length) / factor).astype(int) for length in ours.shape[:2])
    mask = torch.arange(61 * 83).view(61, 83)  # each pixel a value of its own
    expected = mask[rows.clip(max=60)][:, columns.clip(max=82)]
    assert torch.equal(data.scale_like_opencv(mask[None].float(), factor, "nearest")[0].long(), expected)


def drawn_masks(step, values):
    values = np.random.RandomState(2100 + step).choice(values, (2, 12, 12))
    return torch.from_numpy(np.kron(values, np.ones((1, 8, 8), np.int64)))


def assert_trains_alike(monkeypatch, folder, loop, net, optimizer, batches, loss_of, loss, update, unsure=(), **how):
    """Losses within `loss`, one number or one a step; what three steps add to the weights in norm within `update`.

    unsure: tensors whose single entries, not their norm, hang on how the published run was rounded
    """
    golden = np.load(GOLDEN / "training.npz")
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    run = SimpleNamespace(folder=folder, record={"id": "x"}, name=loop, what=loop, start=list, save=lambda *_: None)
    given = SimpleNamespace(batch_size=len(batches[0][0]), per_epoch=3, seed=0, images=None, workers=0, shares=range)
    monkeypatch.setattr(training, "loader", lambda *_, **how: batches)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training.fit(run, net, optimizer, given, loss_of, 3, {}, **how)
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    for ours, expected, rel in zip(losses, golden[f"{loop}_losses"].tolist(), np.broadcast_to(loss, 3), strict=True):
        assert ours == pytest.approx(expected, rel=rel)
    for name, norm, first in zip(*(golden[f"{loop}_{what}"] for what in ("names", "update_norms", "update_first"))):
        key = str(name) if name in before else f"backbone.{name}"
        change = net.state_dict()[key] - before[key]
        assert change.norm().item() == pytest.approx(norm, rel=update), name
        entries = np.resize(change.flatten()[:32], 32)  # repeated where they are fewer
        assert name in unsure or largest_difference(entries, first) < 2 * update, name


@pytest.mark.parametrize("loss", ["transcam", "bnr"])
def test_the_classifier_trains_as_published(monkeypatch, tmp_path, loss):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # float64 throughout
    voc, model = defaults("bnr train", "voc"), published_conformer("tiny").double()
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0
    labels = [np.random.RandomState(1100 + step).rand(4, 20) < 0.15 for step in range(3)]
    batches = [[drawn_image(100 + n, 4, 96, 96).double(), torch.from_numpy(labels[n]).double()] for n in range(3)]
    optimizer = bnr.make_optimizer(model, voc["lr"], voc["weight_decay"], voc["head_lr"], voc["transformer_lr"])
    loss_of = partial(bnr.loss_of_images, loss=loss, noise=voc["noise"])
    assert_trains_alike(monkeypatch, tmp_path, loss, model, optimizer, batches, loss_of, loss=1e-6, update=1e-3)


def test_random_walk_equals_the_published(published):
    golden, photo, classes, cams = published
    net, tensor = published_affinitynet().eval(), data.to_tensor()(Image.fromarray(photo))
    scores = psa.walk_scores(net, tensor, torch.from_numpy(cams), background_score=0.42, beta=14, steps=2 ** 7)
    assert largest_difference(scores, golden["0_walk_low"]) < 1e-3
    height, width = photo.shape[:2]
    full = F.interpolate(scores[None], (152, 208), mode="bilinear", align_corners=False)[0, :, :height, :width]
    assert largest_difference(full, golden["0_walk"]) < 1e-3
    assert (np.append(0, classes)[full.argmax(0).numpy()] == golden["0_walk_label"]).mean() >= 0.999
    assert (psa.pseudo_label(scores, classes, photo, 21) == golden["0_walk_crf"]).mean() >= 0.995


def test_affinitynet_trains_as_published(monkeypatch, tmp_path):
    voc, net = defaults("psa train", "voc"), published_affinitynet(dropout=0)
    masks = [drawn_masks(step, [0, 0, 8, 15, 255])[:, ::psa.STRIDE, ::psa.STRIDE] for step in range(3)]
    batches = [[drawn_image(100 + step, 2, 96, 96), masks[step]] for step in range(3)]
    optimizer = resnet38.make_psa_optimizer(net, psa.NEW, voc["lr"], voc["weight_decay"], voc["momentum"])
    loss_of = partial(psa.loss_of_pairs, radius=psa.RADIUS)
    assert_trains_alike(monkeypatch, tmp_path, "affinity", net, optimizer, batches, loss_of, loss=1e-4, update=1e-2,
                        schedule=training.falling_rate)


def test_the_segmenters_test_equals_the_published():
    golden, net = np.load(GOLDEN / "segment_test.npz"), published_deeplab(scale=4).eval()
    photo = data.to_tensor()(Image.fromarray(golden["photo"]))
    scaled = [data.scale_like_opencv(photo, factor) for factor in defaults("segment predict", "voc")["scales"]]
    scores = segment.probabilities(net, scaled, (97, 129)).numpy()
    assert np.abs(scores[:, ::4, ::4] - golden["probabilities"]).max() < 1e-5
    assert (scores.argmax(0) == golden["argmax"]).mean() >= 0.9999
    label = dense_crf(golden["photo"], scores.clip(1e-5, 1), **CRF_SCORES).argmax(0)
    assert (label == golden["label"]).mean() >= 0.9999


def test_the_segmenter_trains_as_published(monkeypatch, tmp_path):
    """What is stored was rounded: in float32 the third loss moves by up to 2e-3 with processor and threads."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    voc, net = defaults("segment train", "voc"), published_deeplab(dropout=0).double()
    batches = [[drawn_image(100 + n, 2, 96, 96).double(), drawn_masks(n, [0, 3, 8, 255])] for n in range(3)]
    optimizer = resnet38.make_psa_optimizer(net, segment.NEW, voc["lr"], voc["weight_decay"], segment.MOMENTUM)
    assert_trains_alike(monkeypatch, tmp_path, "segmenter", net, optimizer, batches, segment.loss_of_pixels,
                        loss=(1e-4, 1e-4, 2e-3), update=1e-2, schedule=segment.rate_over(3),
                        unsure=("backbone.conv1a.weight", "backbone.b4.conv_branch2a.weight", "conv_fov.weight"))


def test_the_segmenters_steps_are_the_published_ones_written_out(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    voc, net = defaults("segment train", "voc"), segment.DeepLab(resnet38.ResNet38(1, 0), 21, dropout=0).double()
    plain, velocity, scaler = copy.deepcopy(net), {}, torch.amp.GradScaler("cpu", enabled=False)
    optimizer = resnet38.make_psa_optimizer(net, segment.NEW, voc["lr"], voc["weight_decay"], segment.MOMENTUM)
    rates = [group["lr"] for group in optimizer.param_groups]
    for n in range(3):
        photos, labels = drawn_image(n, 2, 96, 96).double(), drawn_masks(n, [0, 3, 8, 255])
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * segment.rate_over(3)(n / 3)
        training.train_step(net, optimizer, [photos, labels], segment.loss_of_pixels, scaler, (n,), nullcontext())
        full = F.interpolate(plain(photos), labels.shape[1:], mode="bilinear", align_corners=True)
        F.cross_entropy(full, labels, ignore_index=255).backward()
        for name, weight in plain.named_parameters():
            if weight.grad is not None:
                is_bias, factor = name.endswith("bias"), 10 if name.startswith(segment.NEW) else 1
                step = weight.grad + (0 if is_bias else voc["weight_decay"]) * weight.data
                velocity[name] = 0.9 * velocity.get(name, 0) + step
                weight.data -= voc["lr"] * (1 - n / 4) ** 0.9 * factor * (1 + is_bias) * velocity[name]
                weight.grad = None
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-12)
