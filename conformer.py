"""Conformer: a CNN and a transformer that exchange features at every stage (Peng et al. 2021; Sec. 3.1 of the paper).

`Conformer(arch, num_classes)` is the network, `start_classifier` gives it the published weights or torchvision's
ResNet-50. Parameter names are those of the authors' checkpoints.

    from conformer import Conformer
    features, token, qks = Conformer("small", num_classes)(images)
"""
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

from wsss.weights import fetch, load_weights, read_weights

# channel ratio, token width D, heads H, stem channels, stages at stride 4, 8, 16; all are published but `nano`
ARCHS = {
    "nano": (1, 96, 3, 32, (1, 1, 2)),
    "tiny": (1, 384, 6, 64, (4, 4, 4)),
    "small": (4, 384, 6, 64, (4, 4, 4)),
    "base": (6, 576, 9, 64, (4, 4, 4)),
}
RESNET50 = "resnet50"  # the word that stands for torchvision's file
STRIDE = 16  # pixels of the photo a patch token stands for
LN_EPS, BN_EPS = 1e-6, 1e-6  # the stem's bn1 and trans_norm keep torch's 1e-5, as published
DROP_PATH = 0.1  # of the last stage; grows linearly from 0
HEADS = ("conv_cls_head", "trans_cls_head")
TRANSFORMER = ("trans_1.", "trans_patch_conv.", "trans_norm.", "cls_token", ".trans_block.", ".squeeze_block.")
HEAD_STD = 0.01  # of the CAM head's weights beside ResNet-50's features; with Kaiming's its maps are noise


class Attention(nn.Module):
    """Multi-head self-attention that also hands out its queries and keys, from which eqs. 2-7 are computed."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape  # images, 1+N tokens, width
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, 1+N, D/H)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        return self.proj(x), (q, k)


class Block(nn.Module):
    """Pre-norm transformer block. (B, 1+N, D) -> (B, 1+N, D), (queries, keys) of shape (B, H, 1+N, D/H)."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        attended, qk = self.attn(self.norm1(x))
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), qk


class ConvBlock(nn.Module):
    """Bottleneck; `added` joins before its 3x3 convolution. -> output, features after the second activation"""

    def __init__(self, inputs, outputs, stride=1, project=False):
        super().__init__()
        middle = outputs // 4
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle, eps=BN_EPS)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle, eps=BN_EPS)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=BN_EPS)
        self.project = project
        if project:
            self.residual_conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.residual_bn = nn.BatchNorm2d(outputs, eps=BN_EPS)

    def forward(self, x, added=0):
        residual = self.residual_bn(self.residual_conv(x)) if self.project else x
        x = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(x + added)))
        return F.relu(self.bn3(self.conv3(inner)) + residual), inner


class FCUDown(nn.Module):
    """Feature map -> patch tokens, with the running class token put in front."""

    def __init__(self, inputs, dim, stride):
        super().__init__()
        self.stride = stride
        self.conv_project = nn.Conv2d(inputs, dim, 1)
        self.ln = nn.LayerNorm(dim, eps=LN_EPS)

    def forward(self, x, tokens):
        x = F.avg_pool2d(self.conv_project(x), self.stride).flatten(2).transpose(1, 2)  # (B, N, D)
        return torch.cat([tokens[:, :1], F.gelu(self.ln(x))], dim=1)  # (B, 1+N, D)


class FCUUp(nn.Module):
    """Patch tokens -> feature map, enlarged to the CNN branch's resolution."""

    def __init__(self, dim, outputs, stride):
        super().__init__()
        self.stride = stride
        self.conv_project = nn.Conv2d(dim, outputs, 1)
        self.bn = nn.BatchNorm2d(outputs, eps=BN_EPS)

    def forward(self, tokens, height, width):
        B, L, D = tokens.shape
        x = tokens[:, 1:].transpose(1, 2).reshape(B, D, height, width)
        return F.interpolate(F.relu(self.bn(self.conv_project(x))), scale_factor=self.stride, mode="nearest")


class ConvTransBlock(nn.Module):
    """One stage: CNN block, down to tokens, transformer block, back up into a second CNN block."""

    def __init__(self, inputs, outputs, dim, heads, token_stride, stride, drop_path, last):
        super().__init__()
        self.cnn_block = ConvBlock(inputs, outputs, stride, project=inputs != outputs)
        self.squeeze_block = FCUDown(outputs // 4, dim, token_stride)
        self.trans_block = Block(dim, heads, drop_path)
        self.expand_block = FCUUp(dim, outputs // 4, token_stride)
        self.fusion_block = ConvBlock(outputs, outputs, project=last)
        self.token_stride = token_stride

    def forward(self, x, tokens):
        x, inner = self.cnn_block(x)
        height, width = (side // self.token_stride for side in x.shape[2:])
        # The class token is part of both summands, so it counts twice: as published.
        tokens, qk = self.trans_block(self.squeeze_block(inner, tokens) + tokens)
        x, _ = self.fusion_block(x, self.expand_block(tokens, height, width))
        return x, tokens, qk


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Conformer(nn.Module):
    """The two-branch network with TransCAM's heads for `num_classes` = K foreground classes.

    images: (B, 3, H, W), sides multiples of 16  ->
    features: (B, C, H/16, W/16) of the CNN branch, the f of eq. 1 (`conv_cls_head` makes M of them)
    token: (B, D) class token after `trans_norm` (`trans_cls_head` makes logits of it)
    qks: one (queries, keys) a block, each (B, heads, 1+N, D/heads), N = H/16 * W/16
    """

    def __init__(self, arch, num_classes):
        super().__init__()
        ratio, dim, heads, stem, depths = ARCHS[arch]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.trans_norm = nn.LayerNorm(dim)
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        width = 64 * ratio
        self.conv_1 = ConvBlock(stem, width, project=True)
        self.trans_patch_conv = nn.Conv2d(stem, dim, 4, 4)
        self.trans_1 = Block(dim, heads, 0.0)

        self.depth = sum(depths)
        drop = torch.linspace(0, DROP_PATH, self.depth).tolist()
        levels = [0] * depths[0] + [1] * depths[1] + [2] * depths[2]  # of each stage: stride 4, 8 or 16
        for stage, (before, level) in enumerate(zip(levels, levels[1:]), start=2):  # stage 1 is conv_1 beside trans_1
            block = ConvTransBlock(
                width * 2 ** before, width * 2 ** level, dim, heads, token_stride=4 // 2 ** level,
                stride=2 if level > before else 1, drop_path=drop[stage - 1], last=stage == self.depth)
            self.add_module(f"conv_trans_{stage}", block)
        self.trans_cls_head = nn.Linear(dim, num_classes)
        self.conv_cls_head = nn.Conv2d(width * 2 ** levels[-1], num_classes, 3, padding=1)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init)

    def forward(self, images):
        if images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise ValueError(f"image sides {tuple(images.shape[2:])} are not multiples of {STRIDE}")
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)  # stride 4
        x, _ = self.conv_1(stem)
        tokens = self.trans_patch_conv(stem).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens, qk = self.trans_1(torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1))
        qks = [qk]
        for stage in range(2, self.depth + 1):
            x, tokens, qk = self.get_submodule(f"conv_trans_{stage}")(x, tokens)
            qks.append(qk)
        return x, self.trans_norm(tokens[:, 0]), qks


def init_attention(block, sharpness):
    """Start a fresh block with W_K = W_Q, so that like tokens attend to each other (Trockman & Kolter 2023).

    A fresh block's attention is almost uniform and M* = A* M then a flat average. `sharpness` is the logit that a
    layer-normed token gives itself, sqrt(D/H) * D * std^2: one number for all widths, from which std follows.
    """
    D = block.attn.proj.in_features
    std = math.sqrt(sharpness / (D * math.sqrt(D / block.attn.heads)))
    with torch.no_grad():
        query = torch.randn(D, D) * std
        block.attn.qkv.weight[:D] = query
        block.attn.qkv.weight[D:2 * D] = query


def rename_resnet50(state):
    """torchvision's ResNet-50 under the names of Conformer-small's convolution branch; layer4 and fc are left out.

    Its blocks go, in order, into the first bottlenecks of the same width. name: tensor  ->  name: tensor
    """
    blocks = [f"layer{layer}.{n}" for layer, count in ((1, 3), (2, 4), (3, 6)) for n in range(count)]
    stages = [f"conv_trans_{n}.{part}" for n in (2, 5, 6, 9, 10, 11) for part in ("cnn_block", "fusion_block")]
    places, out = dict(zip(blocks, ["conv_1", *stages])), {}
    for name, tensor in state.items():
        block, inner = name[:len("layer1.0")], name[len("layer1.0"):]
        if block in places:
            inner = inner.replace("downsample.0", "residual_conv").replace("downsample.1", "residual_bn")
            out[places[block] + inner] = tensor
        elif name.startswith(("conv1.", "bn1.")):  # the stem
            out[name] = tensor
    return out


def init_identity(model, fresh, coupling=0.1):
    """With ResNet-50's weights in the convolution branch, the network starts (almost) as ResNet-50.

    Tokens join it with BatchNorm scale `coupling` (at 0 the ReLU behind would stay dead); a fresh bottleneck passes its
    input on. fresh: names of the tensors that the file did not give
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, FCUUp) and f"{name}.bn.weight" in fresh:
                module.bn.weight.fill_(coupling)
            if name == "conv_cls_head" and f"{name}.weight" in fresh:
                nn.init.normal_(module.weight, std=HEAD_STD)
            if isinstance(module, ConvBlock) and f"{name}.bn3.weight" in fresh:
                module.bn3.weight.zero_()
                if module.project and f"{name}.residual_conv.weight" in fresh:
                    nn.init.dirac_(module.residual_conv.weight)


def file_that_fits(arch):
    """How a message ends that tells which weight file fits."""
    return ": no file is published for nano" if arch == "nano" else f": Conformer_{arch}_patch16.pth fits"


def start_classifier(arch, num_labels, pretrained=None, sharpness=60.0):
    """A Conformer with a file's weights, but for its heads; blocks that the file lacks start with sharp attention.

    pretrained: Conformer's or torchvision's ResNet-50's file, or "resnet50", which fetches that
    """
    model = Conformer(arch, num_labels)
    for module in model.modules():
        if sharpness and isinstance(module, Block):
            init_attention(module, sharpness)
    if pretrained:
        hint = file_that_fits(arch)
        state = fetch(RESNET50) if pretrained == RESNET50 else read_weights(pretrained, hint)[0]
        is_resnet50 = "layer1.0.conv1.weight" in state
        state = rename_resnet50(state) if is_resnet50 else state
        fresh = load_weights(model, state, pretrained, HEADS, partial=is_resnet50, hint=hint)
        if is_resnet50:
            init_identity(model, fresh)
    return model
