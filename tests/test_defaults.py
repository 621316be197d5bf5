"""Every published default, as the command line parses it in the presets voc and coco (VOC's unless COCO differs).

Sources: the paper; TransCAM (classifier, seeds, thresholds, CRF, walk), PSA (AffinityNet) and the DeepLab that TransCAM
trains where the paper is silent.
"""
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_set, run
from torchvision.transforms import v2

import bnr
import crf
import data
import engine
import evaluate
import psa
import segment
import stage
from resnet38 import ResNet38, parameter_groups

NETWORK = {"backbone": "resnet38", "width": 64, "dropout": 1.0, "optimizer": "sgd", "from_scratch": False,
           "crop": 448, "weight_decay": 5e-4}
PUBLISHED = {
    "bnr train": {
        "arch": "small", "loss": "bnr", "noise": 1.0, "from_scratch": False, "epochs": 22,
        "batch_size": 8, "lr": 5e-5, "weight_decay": 5e-4, "crop": 512, "long_side": (320, 640)},
    "bnr cams": {"arch": "small", "crop": 512, "scales": (0.5, 1.0, 1.5)},
    "psa labels": {"foreground": 0.60, "background": 0.25},
    "psa train": {**NETWORK, "epochs": 8, "batch_size": 8, "lr": 0.01, "momentum": 5e-4},  # as PSA's code has it
    "psa walk": {"background_score": 0.42, "beta": 14, "log_steps": 7},
    "segment train": {**NETWORK, "iterations": 20000, "batch_size": 10, "lr": 1e-3, "scale_range": (0.5, 1.5),
                      "freeze_bn": False},
    "segment predict": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "crf": True},
    "segment submit": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "crf": True, "split": "test"}}
OF_COCO = {"bnr train": {"epochs": 10, "batch_size": 16}}


def parse(monkeypatch, command, *flags):
    """What the function of a command, "script command", would be called with."""
    script, name = command.split()
    found = []

    def function(args):
        found.append(args)

    function.__name__ = name
    monkeypatch.setattr(importlib.import_module(script), name, function)
    run(f"{script}.py", name, "--device", "cpu", *flags)
    return found[0]


@pytest.mark.parametrize("preset", ["voc", "coco"])
@pytest.mark.parametrize("command", PUBLISHED)
def test_flags_of_voc_and_coco_have_the_published_defaults(monkeypatch, command, preset):
    args = parse(monkeypatch, command, "--data", "data/set", *(("--preset", preset) if preset == "coco" else ()))
    expected = {**PUBLISHED[command], **(OF_COCO.get(command, {}) if preset == "coco" else {})}
    assert args.preset == preset and args.seed == 0
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("script, commands", [
    ("bnr", "train cams export"), ("psa", "labels train walk"), ("segment", "train predict submit"), ("evaluate", ""),
    ("prepare", "toy voc coco check"), ("report", "show sheets figures tables page"), ("results", "")])
def test_help_names_each_default_once_and_no_none(script, commands):
    for command in commands.split() or [None]:
        flags = run(f"{script}.py", *filter(None, [command]), "--help").split("\n  --")
        assert len(flags) > 1 and not [flag for flag in flags if "None" in flag or flag.count("(default") > 1]
        assert script == "prepare" or any(flag.startswith("preset") and "(default: toy)" in flag for flag in flags)


@pytest.mark.parametrize("flags, crop", [
    ((), 96), (("--preset", "voc"), 512), (("--preset=small",), 288), (("--data", "x"), 512), (("--out", "out"), 288),
    (("--data", "x", "--out", "out"), 288), (("--data", "photos"), 288)])
def test_help_shows_the_defaults_of_the_preset_that_would_be_taken(monkeypatch, tmp_path, flags, crop):
    monkeypatch.chdir(tmp_path)
    record = {"id": "", "done": True, "seconds": 0, "settings": {}, "inputs": {}, "data": "x", "preset": "small"}
    stage.write_json(tmp_path / "out" / "classifier.json", record)
    stage.write_json(tmp_path / "out" / "photos" / "rows" / "start-seed0" / "classifier.json", record)
    said = " ".join(run("bnr.py", "train", *flags, "--help").split())
    assert f"side of square crops, pixels (default: {crop})" in said


def test_a_preset_gives_defaults_to_the_flags_of_a_command_and_no_others(monkeypatch):
    monkeypatch.setitem(bnr.PRESETS, "coco", {"amp": True, "epochs": 3})
    args = parse(monkeypatch, "bnr cams", "--preset", "coco")
    assert args.amp is True and "epochs" not in args
    assert "mixed precision (default: True)" in run("bnr.py", "cams", "--preset", "coco", "--help")


def capture(monkeypatch, tmp_path, command, *flags):
    """What a training of 40 photos, with these flags, gives `engine.fit`."""
    found = []

    def fit(run, model, optimizer, batches, loss_of, steps, network, schedule=lambda done: 1.0, watch=None):
        found.append(SimpleNamespace(model=model, optimizer=optimizer, steps=steps, schedule=schedule))

    record = SimpleNamespace(is_done=lambda: False, start=lambda: None)
    monkeypatch.setattr(stage, "Stage", lambda *args, **how: record)
    monkeypatch.setattr(engine, "fit", fit)
    monkeypatch.setattr(engine, "finish", lambda run, **results: None)
    monkeypatch.setattr(data, "require_labels", lambda *args: None)
    root = make_set(tmp_path, [f"{n:02d}" for n in range(43)])
    script, name = command.split()
    run(f"{script}.py", name, "--data", root, "--out", tmp_path / "out", "--device", "cpu", *flags)
    return found[0]


def factors(found, *steps):
    """On the learning rate of each of these steps."""
    return [found.schedule(step / found.steps) for step in steps]


@pytest.mark.parametrize("preset, steps", [("voc", 43 // 8 * 22), ("coco", 43 // 16 * 10)])
def test_classifier_trains_all_by_adamw_at_one_rate(monkeypatch, tmp_path, preset, steps):
    monkeypatch.setattr(bnr, "watched", lambda *args: [])
    monkeypatch.setattr(bnr, "start_classifier", lambda *args: torch.nn.Linear(2, 3))
    found = capture(monkeypatch, tmp_path, "bnr train", "--preset", preset, "--from-scratch")
    assert isinstance(found.optimizer, torch.optim.AdamW) and found.steps == steps
    group, = found.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (5e-5, 5e-4, 2)
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    assert factors(found, 0, steps // 2, steps - 1) == [1, 1, 1]


@pytest.mark.parametrize("preset", ["voc", "coco"])
@pytest.mark.parametrize("command, steps, rate, momentum, end", [
    ("psa train", 43 // 8 * 8, 0.01, 5e-4, 40), ("segment train", 20000, 1e-3, 0.9, 20001)])
def test_sgd_falls_as_published(monkeypatch, tmp_path, preset, command, steps, rate, momentum, end):
    weights = tmp_path / "res38.pth"
    torch.save(ResNet38(1).state_dict(), weights)
    found = capture(monkeypatch, tmp_path / "set", command, "--preset", preset, "--width", 1, "--resnet38", weights)
    assert isinstance(found.optimizer, torch.optim.SGD) and found.steps == steps
    for group in found.optimizer.param_groups:
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (momentum, 0, False)
    rates = {parameter: (group["lr"], group["weight_decay"])
             for group in found.optimizer.param_groups for parameter in group["params"]}
    named = dict(found.model.named_parameters())
    assert set(rates) == {parameter for parameter in named.values() if parameter.requires_grad}
    new = {"psa train": ("f8_3", "f8_4", "f8_5", "f9"), "segment train": segment.NEW}[command]
    assert rates[named["backbone.b7.conv_branch1.weight"]] == (rate, 5e-4)
    assert [rates[named[f"{name}.weight"]] for name in new] == [(10 * rate, 5e-4)] * len(new)
    if command == "segment train":
        assert rates[named["cls_conv.bias"]] == (20 * rate, 0)
    expected = [(1 - step / end) ** 0.9 for step in (0, steps // 2, steps - 1)]
    assert factors(found, 0, steps // 2, steps - 1) == pytest.approx(expected)


def test_learning_rates_are_1_2_10_and_20_fold_and_biases_do_not_decay():
    net = torch.nn.ModuleDict({"old": torch.nn.Linear(2, 3), "new": torch.nn.Linear(3, 4)})
    net["frozen"] = torch.nn.Linear(1, 1).requires_grad_(False)
    groups = parameter_groups(net, ("new",), 0.001, 5e-4)
    rates = [(group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert rates == [(0.001, 5e-4, [(3, 2)]), (0.002, 0, [(3,)]), (0.01, 5e-4, [(4, 3)]), (0.02, 0, [(4,)])]


def test_facts_that_are_no_flags_are_the_published_ones():
    assert crf.CRF_LABELS == {"gauss": (3, 3), "bilateral": (50, 5, 10), "steps": 10, "sure": 0.7}
    assert crf.CRF_SCORES == {"gauss": (3, 3), "bilateral": (32, 13, 10), "steps": 1}
    assert (data.MEAN, data.STD, data.VOID) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255)
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
