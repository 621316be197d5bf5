"""What needs a card: every stage on it, in mixed precision and with workers, and its values against the CPU's.

Skipped by name where there is none. BNR_TEST_DEVICE=cpu runs the same tests on the CPU, to try the tests themselves.
"""
import os

import pytest
import torch
from conftest import run

import bnr
import data
import engine
import psa
import resnet38
import segment
from conformer import Conformer

DEVICE = os.environ.get("BNR_TEST_DEVICE", "cuda")
NO_CARD = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(NO_CARD, reason="no card")]
CLASSIFIER = ("--epochs", 2, "--crop", 64, "--long-side", 64, 96, "--batch-size", 8)
AFFINITY = ("--epochs", 1, "--width", 2, "--crop", 64, "--batch-size", 8)
SEGMENTER = ("--iterations", 4, "--width", 2, "--crop", 64, "--batch-size", 8)
STAGES = (("bnr.py", "train", *CLASSIFIER), ("bnr.py", "cams"), ("psa.py", "labels"), ("psa.py", "train", *AFFINITY),
          ("psa.py", "walk"), ("segment.py", "train", *SEGMENTER), ("segment.py", "predict"), ("evaluate.py",))


def line(toy, out, *flags, stages=STAGES):
    return [run(script, *rest, "--data", toy, "--out", out, "--preset", "toy", "--device", DEVICE, *flags)
            for script, *rest in stages]


@pytest.fixture(scope="module")
def mixed(toy, tmp_path_factory):
    """All stages in mixed precision, the loader with workers. -> out, what was printed"""
    out = tmp_path_factory.mktemp("cuda")
    return out, line(toy, out, "--amp", "--workers", 2)


def test_every_stage_runs_in_mixed_precision_with_workers(mixed):
    out, said = mixed
    assert "segmenter" in said[-1] and "precision: " in said[-1]
    record = engine.read_json(out / "classifier.json")
    assert record["precision"] in ("bf16", "fp16") and record["peak_gb"] > 0


def test_a_finished_line_is_done_already(toy, mixed):
    said = line(toy, mixed[0], "--amp", "--workers", 2, stages=STAGES[:-1])
    assert all("done already" in text for text in said)


def test_fp16_scales_its_loss(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "amp_dtype", lambda device: torch.float16)
    line(toy, tmp_path, "--amp", stages=STAGES[:1])
    scaler = torch.load(tmp_path / "classifier.pth", weights_only=True)["scaler"]
    assert scaler.get("scale", 0) > 1


def test_a_stopped_training_goes_on(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_SECONDS", 0)
    monkeypatch.setattr(engine, "LOG_STEPS", 1)
    log, seen = engine._log, []

    def stop(*given):
        seen.append(given[4])
        if len(seen) == 4:
            raise KeyboardInterrupt
        log(*given)

    monkeypatch.setattr(engine, "_log", stop)
    with pytest.raises(KeyboardInterrupt):
        line(toy, tmp_path, stages=STAGES[:1])
    assert torch.load(tmp_path / "classifier.part.pth", weights_only=True)["step"] == 3
    line(toy, tmp_path, stages=STAGES[:1])
    assert seen[-1] == 6 and (tmp_path / "classifier.pth").is_file()


def test_deterministic_gives_the_same_weights_twice(toy, tmp_path):
    for name in "ab":
        line(toy, tmp_path / name, "--deterministic", stages=STAGES[:6])
    torch.use_deterministic_algorithms(False)
    for file in ("classifier", "affinitynet", "segmenter"):
        states = [torch.load(tmp_path / name / f"{file}.pth", weights_only=True)["model"] for name in "ab"]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), file


def test_a_full_card_is_told_in_one_line(toy, tmp_path, monkeypatch):
    def full(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(bnr, "losses", full)
    said = run("bnr.py", "train", *CLASSIFIER, "--data", toy, "--out", tmp_path, "--preset", "toy", "--device", DEVICE,
               status=1)
    assert "--micro-batch" in said and "Traceback" not in said


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
    affinitynet = psa.AffinityNet(resnet38.ResNet38(4)).eval()
    deeplab = segment.DeepLab(resnet38.ResNet38(4), 5).eval()
    photo, cams = torch.randn(3, 96, 120), torch.rand(2, 96, 120)

    def compute(device):
        if value == "segmenter":
            return deeplab.to(device)(photo.to(device)[None])
        if value == "walk":
            return psa.walk_scores(affinitynet.to(device), photo.to(device), cams.to(device), 0.42, 14, 128)
        return psa.affinities(affinitynet.to(device)(photo.to(device)[None]), psa.RADIUS)
    agree(compute)


def test_the_loader_works_after_the_card_was_used(toy):
    torch.ones(1, device=DEVICE)
    dataset = data.DataSet(toy)
    images = data.Images(dataset.image, dataset.ids("train"), lambda name, photo: data.to_tensor()(photo).mean())
    args = type("args", (), {"device": torch.device(DEVICE), "workers": 2})
    assert len(torch.cat(list(data.loader(images, args, batch_size=8)))) == 24
