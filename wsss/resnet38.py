"""ResNet-38 (Wu et al. 2019), backbone of AffinityNet and segmenter, and torchvision's ResNet-50 as a stand-in.

The networks, their weight files (MXNet's .params, PSA's or SEAM's .pth, torchvision's), and PSA's optimizer.
"""
import math
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from wsss.stage import FlagError, InputError
from wsss.weights import fetch, load_weights, read_trained, read_weights

FITS = {  # {flag: the end of its error, which file fits}
    "resnet38": ": ilsvrc-cls_rna-a1_cls1000_ep-0001.params, or PSA's or SEAM's .pth, fits",
    "backbone_weights": ": torchvision's resnet50 on ImageNet fits"}
MXNET_NAMES = {"gamma": "weight", "beta": "bias"}


class ResBlock(nn.Module):
    """Two 3x3 convolutions, pre-activated."""

    def __init__(self, inputs, middle, outputs, stride=1, first_dilation=1, dilation=1):
        super().__init__()
        self.project = inputs != outputs or stride > 1
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, middle, 3, stride, first_dilation, first_dilation, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, outputs, 3, 1, dilation, dilation, bias=False)
        if self.project:
            self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        """-> the block's output, and its activated input"""
        active = F.relu(self.bn_branch2a(x))
        shortcut = self.conv_branch1(active) if self.project else x
        return shortcut + self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(active)))), active


class ResBlockBottleneck(nn.Module):
    """1x1, 3x3 dilated, 1x1, pre-activated, dropout of whole channels before the second and third."""

    def __init__(self, inputs, outputs, dilation, dropout):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, outputs // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(outputs // 4)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(outputs // 4, outputs // 2, 3, 1, dilation, dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(outputs // 2)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(outputs // 2, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        active = F.relu(self.bn_branch2a(x))
        inner = self.dropout_2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(active))))
        inner = self.dropout_2b2(F.relu(self.bn_branch2b2(self.conv_branch2b1(inner))))
        return self.conv_branch1(active) + self.conv_branch2b2(inner), active


class ResNet38(nn.Module):
    """ResNet-38 of stride 8. (B, 3, H, W) -> conv4, conv5, conv6 of 512, 1024, 4096 channels times width/64."""

    FROZEN = ("conv1a", "b2", "b2_1", "b2_2")

    def __init__(self, width=64, dropout=1.0):
        super().__init__()
        c = [width * n for n in (1, 2, 4, 8, 16, 32, 64)]
        self.channels = c[3], c[4], c[6]
        self.conv1a = nn.Conv2d(3, c[0], 3, 1, 1, bias=False)
        inputs = c[0]
        for name, outputs, count in (("b2", c[1], 3), ("b3", c[2], 3), ("b4", c[3], 6)):
            for n in range(count):
                block = ResBlock(inputs, outputs, outputs, stride=2 if n == 0 else 1)
                self.add_module(name if n == 0 else f"{name}_{n}", block)
                inputs = outputs
        self.b5 = ResBlock(c[3], c[3], c[4], first_dilation=1, dilation=2)
        self.b5_1 = ResBlock(c[4], c[3], c[4], first_dilation=2, dilation=2)
        self.b5_2 = ResBlock(c[4], c[3], c[4], first_dilation=2, dilation=2)
        self.b6 = ResBlockBottleneck(c[4], c[5], dilation=4, dropout=0.3 * dropout)
        self.b7 = ResBlockBottleneck(c[5], c[6], dilation=4, dropout=0.5 * dropout)
        self.bn7 = nn.BatchNorm2d(c[6])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x, active = self.conv1a(x), {}
        for name, block in self.named_children():
            if name.startswith("b") and name != "bn7":
                x, active[name] = block(x)
        return active["b5"], active["b6"], F.relu(self.bn7(x))


class ResNet50(ResNet):
    """torchvision's, dilated to stride 8; its layer2, 3, 4 stand in for conv4, conv5, conv6."""

    FROZEN = ("conv1", "bn1", "layer1")

    def __init__(self):
        super().__init__(Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=[False, True, True])
        del self.avgpool, self.fc
        self.channels = 512, 1024, 2048

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        conv4 = self.layer2(x)
        conv5 = self.layer3(conv4)
        return conv4, conv5, self.layer4(conv5)


def make_backbone(backbone, width=64, dropout=1.0):
    """The network of this name, without weights."""
    return ResNet38(width, dropout) if backbone == "resnet38" else ResNet50()


def read_mxnet(path, hint=""):
    """Arrays of an MXNet .params file in any of its three on-disk forms, numpy only. -> name: float32 array"""
    raw, at = path.read_bytes(), 0

    def take(kind, *shape):
        nonlocal at
        out = np.frombuffer(raw, kind, math.prod(shape), at).reshape(shape)  # ValueError where the file is shorter
        at += out.nbytes
        return out

    def array():
        magic = int(take("<u4"))
        if magic == 0xF993FAC9:
            take("<i4")  # storage type
        is_new = magic in (0xF993FAC8, 0xF993FAC9)
        shape = take("<i8", int(take("<u4"))) if is_new else take("<u4", magic)
        *_, kind = take("<i4", 3).tolist()  # after the device's type and id
        return take(("<f4", "<f8", "<f2")[kind], *shape.tolist()).astype(np.float32)

    try:
        if take("<u8", 2).tolist() != [0x112, 0]:
            raise ValueError("no MXNet list")
        arrays = [array() for _ in range(take("<u8"))]
        names = [take("u1", int(take("<u8"))).tobytes().decode("latin1") for _ in range(take("<u8"))]
    except (ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as MXNet weights: {error}{hint}") from None
    return dict(zip(names, arrays))


def read_resnet38(path, hint=""):
    """ResNet-38's weights, from the MXNet file or a .pth of PSA or SEAM, less their heads. -> name: tensor"""
    if path.suffix != ".params" or not path.is_file():
        known = ResNet38(1).state_dict()
        return {k: v for k, v in read_weights(path, hint)[0].items() if k in known}
    out = {}
    for name, array in read_mxnet(path, hint).items():
        layer, _, what = re.sub("^(arg|aux):", "", name).replace("_moving_", "_running.").rpartition("_")
        if layer == "linear1000":
            continue
        what = MXNET_NAMES.get(what, what.replace(".", "_"))
        inner = re.fullmatch(r"(res|bn)(\d)([a-z]?)(\d*)_(branch.+)", layer)
        if inner:  # res4b2_branch2a -> b4_2.conv_branch2a
            part, level, letter, number, branch = inner.groups()
            index = int(number) if number else (ord(letter) - ord("a") if letter else 0)
            layer = f"b{level}{f'_{index}' if index else ''}.{'conv' if part == 'res' else 'bn'}_{branch}"
        out[f"{layer}.{what}"] = torch.from_numpy(array)
    return out


def freeze_batch_norm(model, statistics=True):
    """Stop the training of every BatchNorm's scale and shift, and of its running statistics."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.requires_grad_(False)
            if statistics:
                module.eval()


def to_device(model, device):
    """On the device; channels_last on cuda only: on the CPU torch 2.15's kernels crash on some narrow ResNet-38s."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return model.to(device, memory_format=layout)


def start_network(make, args):
    """`make(backbone)` with the backbone and weights that the flags ask for. -> network, what rebuilds its backbone"""
    flag = "resnet38" if args.backbone == "resnet38" else "backbone_weights"
    path = getattr(args, flag)
    if args.from_scratch and path:
        raise FlagError(f"--from-scratch does not read {path}: FROM_SCRATCH=0 (--no-from-scratch) does")
    if flag == "resnet38" and not (path or args.from_scratch):
        raise InputError(f"no weights: RESNET38=FILE, BACKBONE=resnet50 or FROM_SCRATCH=1{FITS[flag]}")
    network = {"backbone": args.backbone, "width": args.width}
    backbone = make_backbone(**network, dropout=args.dropout)
    if not args.from_scratch:
        state = read_resnet38(path, FITS[flag]) if flag == "resnet38" else (
            read_weights(path, FITS[flag])[0] if path else fetch(args.backbone))
        load_weights(backbone, state, path or args.backbone, heads=("fc.",), hint=FITS[flag])
    return to_device(make(backbone), args.device), network


def load_network(out, name, make, device):
    """OUT/NAME/model.pth -> the network, `make(backbone, tensors by name)`"""
    state, network = read_trained(out, name)
    net = make(make_backbone(**network), state)
    load_weights(net, state, out / name / "model.pth")
    return to_device(net, device).eval()


def make_psa_optimizer(model, new, lr, weight_decay, momentum, kind="sgd"):
    """SGD with PSA's groups: lr x1, x2 for biases, ten times that for new layers, no decay of biases; or AdamW."""
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (10 if name.startswith(new) else 1) * (2 if name.endswith("bias") else 1)
            groups.setdefault((factor, name.endswith("bias")), []).append(parameter)
    return torch.optim.SGD([{"params": parameters, "lr": lr * factor, "weight_decay": 0 if is_bias else weight_decay}
                            for (factor, is_bias), parameters in groups.items()], lr, momentum)
