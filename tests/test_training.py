"""The training loop in parts, its batches, weight files."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import GOLDEN, make_set, run

import bnr
from conformer import Conformer, ConvBlock, rename_resnet50, start_classifier
from wsss import resnet38, training
from wsss.stage import FlagError, InputError, Stage
from wsss.training import Batches
from wsss.weights import load_weights

CPU = torch.device("cpu")


class Rows(torch.utils.data.TensorDataset):
    """Takes the loader's (index, seed) as `data.Images` does; `seed` adds noise, as a random crop would."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        super().__init__(torch.randn(15, 4, generator=generator), torch.rand(15, 3, generator=generator).round())

    def __getitem__(self, index):
        torch.manual_seed(index[1])
        photo, label = super().__getitem__(index[0])
        return photo + 0.1 * torch.randn_like(photo), label


def train(out, micro_batch):
    """A small network on 15 rows, 2 epochs of 3 steps, as a stage does. -> its weights and losses"""
    stage = Stage(out, "classifier", {"seed": 0}, SimpleNamespace(root=Path("data")), "toy")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))

    def loss_of(model, part, labels):
        return bnr.soft_margin_loss(model(part[0]), part[1]) * len(part[0]) / len(labels), {}

    training.fit(stage, net, torch.optim.AdamW(net.parameters(), 0.05), Batches(Rows(), 5, 0, 0), loss_of, 6, {},
                 schedule=lambda done: 1 - done / 2, micro_batch=micro_batch)
    lines = (stage.folder / "log.jsonl").read_text().splitlines()
    return net.state_dict(), [json.loads(line)["loss"] for line in lines]


def test_micro_batches_have_the_gradient_of_the_batch(tmp_path):
    whole, losses = train(tmp_path / "0", 0)
    for micro_batch in (2, 4, 7):
        parts, logged = train(tmp_path / str(micro_batch), micro_batch)
        torch.testing.assert_close(parts, whole)
        assert len(logged) == 2 and logged == pytest.approx(losses, rel=1e-5)


def test_batches_hold_each_image_once_an_epoch_in_an_order_of_the_seed(monkeypatch):
    batches = Batches(Rows(), 4, 0, 0)
    epochs = [sum((batches.indices(step) for step in range(3 * epoch, 3 * epoch + 3)), []) for epoch in range(2)]
    assert batches.per_epoch == 3 and [len(set(epoch)) for epoch in epochs] == [12, 12] and epochs[0] != epochs[1]
    assert Batches(Rows(), 4, 1, 0).indices(0) != batches.indices(0)
    whole = list(batches.shares(0, 6))
    assert list(batches.shares(4, 6)) == whole[4:]
    monkeypatch.setattr(training, "WORLD", 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(training, "RANK", rank)
        shares += next(batches.shares(5, 6))
    assert shares == whole[5]


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(training, "WORLD", 2)
    with pytest.raises(FlagError, match="--batch-size 5 is not a multiple of 2 processes"):
        Batches(Rows(), 5, 0, 0)


@pytest.fixture(scope="module")
def imagenet():
    """What the ImageNet file of Conformer-Ti holds: the names of TransCAM's, but two linear heads of 1,000 classes."""
    state = Conformer("tiny", 20).state_dict()
    for head, width in (("trans_cls_head", 384), ("conv_cls_head", 256)):
        state.update({f"{head}.weight": torch.zeros(1000, width), f"{head}.bias": torch.zeros(1000)})
    return state


def test_an_imagenet_file_loads_but_for_its_heads_which_are_named(imagenet, tmp_path, capsys):
    torch.save(imagenet, tmp_path / "Conformer_tiny_patch16.pth")
    ours = start_classifier("tiny", 20, tmp_path / "Conformer_tiny_patch16.pth").state_dict()
    assert all(torch.equal(ours[k], v) for k, v in imagenet.items() if "_cls_head" not in k)
    assert "fresh: trans_cls_head (2), conv_cls_head (2)" in capsys.readouterr().out


@pytest.mark.parametrize("damage, says", [
    ("patch 32", r"does not fit: .*trans_patch_conv.weight \(file \(384, 64, 8, 8\), network \(384, 64, 4, 4\)\)"),
    ("lacking", "does not fit: .* missing, first "), ("infinite", "conv1.weight has values that are not finite")])
def test_a_wrong_file_is_named_with_the_one_that_fits(imagenet, tmp_path, damage, says):
    damaged = {"patch 32": {**imagenet, "trans_patch_conv.weight": torch.zeros(384, 64, 8, 8)},
               "lacking": {name: value for name, value in imagenet.items() if "trans_block" not in name},
               "infinite": {**imagenet, "conv1.weight": imagenet["conv1.weight"] / 0}}
    torch.save(damaged[damage], tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"w.pth:? {says}.*: Conformer_tiny_patch16.pth fits") as raised:
        start_classifier("tiny", 20, tmp_path / "w.pth")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["", "_v1", "_legacy"])
def test_mxnet_file_gives_the_published_tensors(tmp_path, form):
    expected = json.loads((GOLDEN / "resnet38_div64.json").read_text())
    ours = resnet38.read_resnet38(GOLDEN / f"resnet38_div64{form}.params")
    assert ours.keys() == expected.keys()
    for name, (shape, total, absolute) in expected.items():
        assert list(ours[name].shape) == shape
        values = ours[name].double()
        assert [values.sum().item(), values.abs().sum().item()] == pytest.approx([total, absolute], abs=1e-4)
    load_weights(resnet38.ResNet38(1), ours, "golden")
    too_long = b"\x12\x01" + bytes(22) + b"\x01" + bytes(14) + b"\x80"  # no arrays, one name of 2^63 bytes
    for damaged in ((GOLDEN / f"resnet38_div64{form}.params").read_bytes()[:-999], too_long):
        (tmp_path / "bad.params").write_bytes(damaged)
        with pytest.raises(InputError, match="bad.params cannot be read as MXNet weights: .*: that fits"):
            resnet38.read_resnet38(tmp_path / "bad.params", ": that fits")


def test_psas_pth_of_resnet38_loads_without_its_heads(tmp_path):
    state = resnet38.ResNet38(1).state_dict()
    torch.save({**state, "fc8.weight": torch.ones(20, 64, 1, 1)}, tmp_path / "res38.pth")
    ours = resnet38.read_resnet38(tmp_path / "res38.pth")
    assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


@pytest.fixture(scope="module")
def resnet50():
    return torchvision.models.resnet50(weights=None).state_dict()


def test_resnet50_fills_the_first_bottlenecks_of_each_width_in_order(resnet50):
    needed, renamed = Conformer("small", 3).state_dict(), rename_resnet50(resnet50)
    assert all(needed[name].shape == tensor.shape for name, tensor in renamed.items())
    parts = "cnn_block", "fusion_block"
    order = ["conv_1", *(f"conv_trans_{n}.{part}" for n in (2, 5, 6, 9, 10, 11) for part in parts)]
    blocks = [f"layer{layer}.{n}" for layer, count in ((1, 3), (2, 4), (3, 6)) for n in range(count)]
    for place, block in zip(order, blocks, strict=True):
        assert renamed[f"{place}.conv2.weight"] is resnet50[f"{block}.conv2.weight"]
    for place, block in (("conv_1", "layer1.0"), ("conv_trans_5.cnn_block", "layer2.0")):
        assert renamed[f"{place}.residual_conv.weight"] is resnet50[f"{block}.downsample.0.weight"]
        assert renamed[f"{place}.residual_bn.bias"] is resnet50[f"{block}.downsample.1.bias"]
    assert len(renamed) == sum(not name.startswith(("layer4", "fc")) for name in resnet50)


@torch.no_grad()
def test_a_classifier_that_starts_from_resnet50_says_so_and_passes_on_what_it_lacks(resnet50, tmp_path, capsys):
    torch.save(resnet50, tmp_path / "r50.pth")
    model = start_classifier("small", 3, tmp_path / "r50.pth").eval()
    said, state = capsys.readouterr().out, model.state_dict()
    count = sum(not name.startswith(("layer4", "fc")) and "num_batches" not in name for name in resnet50)
    assert f"{count} tensors loaded; fresh: " in said and "trans_1" in said and "conv_cls_head (2)" in said
    assert torch.equal(state["conv_trans_11.cnn_block.conv3.weight"], resnet50["layer3.4.conv3.weight"])
    x = {64: torch.rand(1, 256, 4, 4), 128: torch.rand(1, 512, 4, 4), 256: torch.rand(1, 1024, 4, 4)}
    left_over = [f"conv_trans_{n}.{part}" for n in (3, 4, 7, 8, 12) for part in ("cnn_block", "fusion_block")]
    for name, module in model.named_modules():
        if isinstance(module, ConvBlock):
            photo = x.get(module.conv2.out_channels)
            passes = module.conv1.in_channels == photo.shape[1] and torch.allclose(module(photo)[0], photo)
            assert passes == (name in left_over), name


def test_without_a_network_resnet50_is_one_clear_line(tmp_path, monkeypatch):
    def offline(*given, **named):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    flags = ("--data", make_set(tmp_path / "set"), "--out", tmp_path / "o", "--device", "cpu", "--batch-size", 2)
    said = run("bnr", "train", *flags, "--preset", "small", "--pretrained", "resnet50", status=1)
    assert said.splitlines()[-1].startswith("error: cannot fetch https://download.pytorch.org/models/resnet50")
    assert "(no route): name a file instead of resnet50" in said and "Traceback" not in said
