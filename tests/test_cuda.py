"""What needs a card: every stage on it, in mixed precision and with workers, and its values against the CPU's.

Skipped by name where there is none. BNR_TEST_DEVICE=cpu runs the same tests on the CPU, to try the tests themselves.
"""
import json
import os

import pytest
import torch
from conftest import run
from small_run import STAGES, record, stopped

import bnr
import psa
import segment
from conformer import Conformer
from wsss import pool, training
from wsss.resnet38 import ResNet38

DEVICE = os.environ.get("BNR_TEST_DEVICE", "cuda")
NO_CARD = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(NO_CARD, reason="no card")]
CARD = ("--data", "data", "--out", "card", "--preset", "toy", "--device", DEVICE)
CLASSIFIER = (*STAGES["classifier"], *CARD)


def test_every_stage_runs_in_mixed_precision_with_workers(here):
    for _ in range(2):
        said = [run(*command, *CARD, "--amp", "--workers", 2) for command in STAGES.values()]
    assert all("done already" in text for text in said)
    assert all(record(name, "card")["precision"] in ("bf16", "fp16", "float32") for name in STAGES)
    assert record("classifier", "card")["precision"] != "float32" and record("classifier", "card")["peak_gb"] > 0
    assert "segmenter" in run("wsss.evaluate", *CARD)


def test_fp16_scales_its_loss(here, monkeypatch):
    monkeypatch.setattr(pool, "amp_dtype", lambda device: torch.float16)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    with stopped(monkeypatch, training, "train_step", 2):
        run(*CLASSIFIER, "--amp", status=130)
    checkpoint = torch.load("card/classifier.part/checkpoint.pth", weights_only=True)
    assert checkpoint["step"] == 1 and checkpoint["scaler"]["scale"] > 1


def test_a_stopped_training_goes_on(here, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    with stopped(monkeypatch, training, "train_step", 4):
        run(*CLASSIFIER, "--epochs", 3, status=130)
    run(*CLASSIFIER, "--epochs", 3)
    steps = [json.loads(line)["step"] for line in open("card/classifier/log.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def agree(compute):
    """compute(device) on both, in float32: within 1e-4 of the largest value."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        on_cpu, on_card = (compute(torch.device(name)).cpu() for name in ("cpu", DEVICE))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    assert (on_cpu - on_card).abs().max() <= 1e-4 * on_cpu.abs().max()


@pytest.mark.parametrize("value", ["logits", "M*", "M**"])
def test_the_classifier_has_the_cpus_values(value):
    torch.manual_seed(0)
    model, images = Conformer("nano", 4).eval(), torch.randn(2, 3, 96, 96)

    def compute(device):
        cam, z, qks = bnr.forward(model.to(device), images.to(device))
        refined = bnr.attend(qks, cam)
        return {"logits": z, "M*": refined, "M**": bnr.noisy_logits(qks, refined, 1)}[value]
    agree(compute)


@pytest.mark.parametrize("value", ["affinities", "walk", "segmenter"])
def test_the_other_networks_have_the_cpus_values(value):
    torch.manual_seed(0)
    affinitynet, deeplab = psa.AffinityNet(ResNet38(4)).eval(), segment.DeepLab(ResNet38(4), 5).eval()
    photo, cams = torch.randn(3, 96, 120), torch.rand(2, 96, 120)

    def compute(device):
        if value == "segmenter":
            return deeplab.to(device)(photo.to(device)[None])
        if value == "walk":
            return psa.walk_scores(affinitynet.to(device), photo.to(device), cams.to(device), 0.42, 14, 128)
        return psa.affinities(affinitynet.to(device)(photo.to(device)[None]), psa.RADIUS)
    agree(compute)
