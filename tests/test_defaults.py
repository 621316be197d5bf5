"""Every published default, as the command line parses it in the presets voc and coco (VOC's unless COCO differs).

Sources: the paper; TransCAM (classifier, seeds, thresholds, CRF, walk), PSA (AffinityNet) and the DeepLab that TransCAM
trains where the paper is silent.
"""
import importlib

import numpy as np
import pytest
import torch
from conftest import run
from torchvision.transforms import v2

import bnr
import psa
import segment
from wsss import crf, data, evaluate, masks
from wsss.resnet38 import ResNet38, make_psa_optimizer

NETWORK = {"backbone": "resnet38", "width": 64, "dropout": 1.0, "optimizer": "sgd", "from_scratch": False,
           "crop": 448, "weight_decay": 5e-4}
PUBLISHED = {
    "bnr train": {
        "arch": "small", "loss": "bnr", "noise": 1.0, "from_scratch": False, "epochs": 22, "batch_size": 8, "lr": 5e-5,
        "head_lr": 1.0, "transformer_lr": 1.0, "weight_decay": 5e-4, "crop": 512, "long_side": (320, 640)},
    "bnr cams": {"arch": "small", "crop": 512, "scales": (0.5, 1.0, 1.5)},
    "psa labels": {"foreground": 0.60, "background": 0.25},
    "psa train": {**NETWORK, "epochs": 8, "batch_size": 8, "lr": 0.01, "momentum": 5e-4},  # as PSA's code has it
    "psa walk": {"background_score": 0.42, "beta": 14, "log_steps": 7},
    "segment train": {**NETWORK, "iterations": 20000, "batch_size": 10, "lr": 1e-3, "scale_range": (0.5, 1.5),
                      "freeze_bn": False, "head_std": 0.0},
    "segment predict": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "crf": True},
    "segment submit": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "crf": True, "split": "test"}}
OF_COCO = {"bnr train": {"epochs": 10, "batch_size": 16}}


@pytest.mark.parametrize("preset", ["voc", "coco"])
@pytest.mark.parametrize("command", PUBLISHED)
def test_flags_of_voc_and_coco_have_the_published_defaults(monkeypatch, command, preset):
    script, name = command.split()
    calls = []

    def function(args):
        calls.append(args)

    function.__name__ = name
    monkeypatch.setattr(importlib.import_module(script), name, function)
    run(script, name, "--device", "cpu", "--data", "data/set", *(("--preset", preset) if preset == "coco" else ()))
    expected = {**PUBLISHED[command], **(OF_COCO.get(command, {}) if preset == "coco" else {})}
    assert calls[0].preset == preset and calls[0].seed == 0
    assert {setting: getattr(calls[0], setting) for setting in expected} == expected


@pytest.mark.parametrize("module, commands", [
    ("bnr", "train cams export"), ("psa", "labels train walk"), ("segment", "train predict submit"),
    ("wsss.evaluate", ""), ("wsss.prepare", "toy voc coco check"), ("wsss.report", "show gallery figures tables")])
def test_help_names_each_default_once_and_no_none(module, commands):
    for command in commands.split() or [None]:
        flags = run(module, *filter(None, [command]), "--help").split("\n  --")
        assert len(flags) > 1 and not [flag for flag in flags if "None" in flag or flag.count("(default") > 1]


@pytest.mark.parametrize("flags, crop", [
    ((), 96), (("--preset", "voc"), 512), (("--preset=small",), 288), (("--data", "x"), 512),
    (("--data", "x", "--preset", "toy"), 96)])
def test_help_shows_the_defaults_of_the_preset_that_would_be_taken(flags, crop):
    said = " ".join(run("bnr", "train", *flags, "--help").split())
    assert f"side of square crops, pixels (default: {crop})" in said


def test_learning_rates_are_1_2_10_and_20_fold_and_biases_do_not_decay():
    net = torch.nn.ModuleDict({"old": torch.nn.Linear(2, 3), "new": torch.nn.Linear(3, 4)})
    net["frozen"] = torch.nn.Linear(1, 1).requires_grad_(False)
    groups = make_psa_optimizer(net, ("new",), 0.001, 5e-4, 0.9).param_groups
    rates = [(group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert rates == [(0.001, 5e-4, [(3, 2)]), (0.002, 0, [(3,)]), (0.01, 5e-4, [(4, 3)]), (0.02, 0, [(4,)])]


def test_facts_that_are_no_flags_are_the_published_ones():
    assert crf.CRF_LABELS == {"gauss": (3, 3), "bilateral": (50, 5, 10), "steps": 10, "sure": 0.7}
    assert crf.CRF_SCORES == {"gauss": (3, 3), "bilateral": (32, 13, 10), "steps": 1}
    assert (data.MEAN, data.STD, masks.VOID) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255)
    assert data.MEAN_COLOUR == (124, 116, 104)
    assert evaluate.THRESHOLDS.tolist() == pytest.approx(np.linspace(0, 0.59, 60).tolist())
    assert (psa.STRIDE, psa.RADIUS, ResNet38.FROZEN) == (8, 5, ("conv1a", "b2", "b2_1", "b2_2"))
    net = segment.DeepLab(ResNet38(1), 4)
    assert {module.momentum for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {3e-4}
    assert (net.backbone.b6.dropout_2b1.p, net.backbone.b7.dropout_2b2.p, net.dropout.p) == (0.3, 0.5, 0.5)
    assert (net.conv_fov.dilation, net.conv_fov.kernel_size, net.conv_fov.bias) == ((12, 12), (3, 3), None)


@pytest.mark.parametrize("augment, order, padding", [
    (bnr.augment(512, (320, 640)), (v2.RandomHorizontalFlip, v2.ColorJitter, v2.RandomCrop), data.MEAN_COLOUR),
    (psa.augment_pair(448), (v2.ColorJitter, v2.RandomCrop, v2.RandomHorizontalFlip), 0)])
def test_photos_are_changed_by_the_published_amounts_in_the_published_order(augment, order, padding):
    steps = [step for step in augment.transforms if isinstance(step, order)]
    assert tuple(map(type, steps)) == order
    for step in steps:
        if isinstance(step, v2.ColorJitter):
            assert (step.brightness, step.contrast, step.saturation, step.hue) == (*[(0.7, 1.3)] * 3, (-0.1, 0.1))
        elif isinstance(step, v2.RandomCrop):
            assert step.pad_if_needed and step.fill == padding
        else:
            assert step.p == 0.5
