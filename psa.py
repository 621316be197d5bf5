"""PSA (Ahn & Kwak 2018): seeds -> affinity labels -> AffinityNet -> random walk -> pseudo labels. Sec. 3.4 of the paper.

    python psa.py labels   OUT/cams                             -> OUT/affinity_labels/ID.png (255: not sure)
    python psa.py train    OUT/affinity_labels                  -> OUT/affinitynet.pth
    python psa.py walk     OUT/affinitynet.pth, OUT/cams        -> OUT/pseudo_labels/ID.png

The dense CRF (Kraehenbuehl & Koltun 2011) is pydensecrf's; ResNet-38 (Wu et al. 2019) is also the segmenter's backbone.
"""
import argparse
import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2

import data

NARROW = {"from_scratch": True, "width": 4, "dropout": 0.0, "optimizer": "adamw", "lr": 3e-3}  # for short trainings
PRESETS = {
    "voc": {},
    "coco": {},
    "toy": {**NARROW, "epochs": 8, "crop": 96, "log_steps": 5, "foreground": 0.5, "background": 0.15, "background_score": 0.3},
    "small": {**NARROW, "epochs": 1, "crop": 128},
}
STRIDE = 8  # pixels of the photo one affinity feature stands for
RADIUS = 5  # places within it are compared
RESNET38 = "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"  # its ImageNet weights
CRF_LABELS = {"gauss": (3, 3), "bilateral": (50, 5, 10), "steps": 10, "sure": 0.7}  # sxy, compat; sxy, srgb, compat


# ---------------------------------------------------------------- dense CRF

def crf_inference(photo, unary, gauss, bilateral, steps, share=1):
    """Mean-field inference of the dense CRF, Potts compatibility. Returns Q.

    photo: uint8 (H, W, 3), unary: -log p, float32 (L, H, W), share: how many labels the last one stands for
    ->  float32 (L, H, W)

    m labels that share one unary also share one message. One label can stand for all m exactly: its unary lowered by
    log m (done by the caller), its compatibility divided by m.
    """
    from pydensecrf.densecrf import DenseCRF2D

    labels, height, width = unary.shape
    weights = np.ones(labels, np.float32)
    weights[-1] /= share
    crf = DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1), np.float32))
    crf.addPairwiseGaussian(sxy=gauss[0], compat=-gauss[1] * weights)
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=np.ascontiguousarray(photo), compat=-bilateral[2] * weights)
    return np.array(crf.inference(steps), np.float32).reshape(labels, height, width)


def crf_from_labels(photo, labels, num_classes, gauss, bilateral, steps, sure):
    """CRF on a label map: its own label has probability `sure`, the other S-1 share the rest, background like any other.

    photo: uint8 (H, W, 3), labels: uint8 (H, W) in 0..S-1  ->  uint8 (H, W)
    """
    present = np.unique(labels)
    absent = np.setdiff1d(np.arange(num_classes), present)
    other = -np.log((1 - sure) / (num_classes - 1))
    unary = np.full((len(present) + (len(absent) > 0), *labels.shape), other, np.float32)
    unary[:len(present)][labels == present[:, None, None]] = -np.log(sure)
    if len(absent):
        unary[-1] -= np.log(len(absent))
    q = crf_inference(photo, unary, gauss, bilateral, steps, share=max(1, len(absent)))
    if len(absent):
        q[-1] /= len(absent)  # of one of them: the first stands for all in the argmax
    return np.append(present, absent[:1]).astype(np.uint8)[q.argmax(0)]


def affinity_label(classes, cams, photo, num_classes, foreground, background, crf):
    """Sure foreground, sure background, the rest VOID, each from a thresholded seed through the CRF.

    classes: (k,), cams: (k, H, W) in [0, 1], photo: uint8 (H, W, 3)  ->  uint8 (H, W)
    """
    high, low = (crf_from_labels(photo, data.hard_threshold(classes, cams, t), num_classes, **crf) for t in (foreground, background))
    label = np.full(high.shape, data.VOID, np.uint8)
    label[(high == 0) & (low == 0)] = 0
    label[high > 0] = high[high > 0]
    return label


def _write_affinity_label(photo_path, seed_path, path, num_classes, foreground, background):
    classes, cams = data.read_seeds(seed_path)
    photo = np.array(data.read_image(photo_path))
    data.write_mask(path, affinity_label(classes, cams, photo, num_classes, foreground, background, CRF_LABELS))


def labels(args):
    """Affinity labels of train_aug from the seeds at two thresholds -> OUT/affinity_labels/ID.png"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids("train_aug")
    stage = data.Stage(args, "affinity_labels", reads=("cams",))
    paths = {id: args.out / "affinity_labels" / f"{id}.png" for id in ids}
    todo = stage.todo(paths)
    if stage.is_done(todo):
        return
    stage.start()
    jobs = ((dataset.image(id), args.out / "cams" / f"{id}.npz", paths[id], dataset.num_classes, args.foreground, args.background)
            for id in todo)
    for _ in data.in_processes(_write_affinity_label, jobs, args.workers, len(todo), "affinity labels", args.out / "affinity_labels"):
        pass
    stage.finish()


# ---------------------------------------------------------------- ResNet-38

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
                self.add_module(name if n == 0 else f"{name}_{n}", ResBlock(inputs, outputs, outputs, stride=2 if n == 0 else 1))
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


class ResNetStages(nn.Module):
    """torchvision's resnet50 or resnet101 dilated to stride 8; layer2, layer3, layer4 stand in for conv4, conv5, conv6."""

    FROZEN = ("conv1", "bn1", "layer1")

    def __init__(self, name):
        super().__init__()
        full = getattr(torchvision.models, name)(weights=None, replace_stride_with_dilation=[False, True, True])
        for part, module in full.named_children():
            if part not in ("avgpool", "fc"):
                self.add_module(part, module)
        self.channels = 512, 1024, 2048

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        conv4 = self.layer2(x)
        conv5 = self.layer3(conv4)
        return conv4, conv5, self.layer4(conv5)


def make_backbone(args):
    """-> the backbone, with the weights that the flags ask for"""
    backbone = ResNet38(args.width, args.dropout) if args.backbone == "resnet38" else ResNetStages(args.backbone)
    if args.from_scratch:
        return backbone
    hint = f": torchvision's {args.backbone} on ImageNet fits"
    if args.backbone == "resnet38":
        hint = f": {RESNET38}, or PSA's or SEAM's .pth, fits"
        if not args.resnet38:
            raise data.InputError(
                f"no weights: RESNET38=FILE (--resnet38) takes {RESNET38}, the ResNet-38 of "
                "github.com/itijyou/ademxapp, or PSA's .pth of it; --backbone resnet50 uses torchvision's; "
                "FROM_SCRATCH=1 (--from-scratch) starts without")
        state, path = read_resnet38(args.resnet38, hint), args.resnet38
    else:
        path = args.backbone_weights or fetch(args.backbone)
        state = data.read_weights(path, hint)
        state = state.get("model", state)
    data.load_weights(backbone, {k: v for k, v in state.items() if not k.startswith("fc.")}, path, hint=hint)
    return backbone


def fetch(name):
    """torchvision's ImageNet weights of a backbone -> the file in torch's cache, downloaded where it is not there"""
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:  # no network, or not the file that its name promises
            raise data.InputError(f"cannot fetch {url} ({error}): give a file, --backbone-weights") from None
    return path


def read_resnet38(path, hint=""):
    """ResNet-38's weights, from the MXNet file or a .pth of PSA or SEAM, less their heads. -> name: tensor"""
    if path.suffix != ".params":
        known = ResNet38(1).state_dict()
        return {k: v for k, v in data.read_weights(path, hint).items() if k in known}
    out = {}
    for name, array in read_mxnet(path, hint).items():
        known = re.fullmatch(r"(?:arg|aux):(.+?)_(weight|bias|gamma|beta|moving_mean|moving_var)", name)
        layer, what = known.groups() if known else (name, "unknown")  # then loading names it
        if layer == "linear1000":
            continue
        what = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}.get(what, what)
        inner = re.fullmatch(r"(res|bn)(\d)([a-z]?)(\d*)_(branch.+)", layer)
        if inner:  # res4b2_branch2a -> b4_2.conv_branch2a
            part, level, letter, number, branch = inner.groups()
            index = int(number) if number else (ord(letter) - ord("a") if letter else 0)
            layer = f"b{level}{f'_{index}' if index else ''}.{'conv' if part == 'res' else 'bn'}_{branch}"
        out[f"{layer}.{what}"] = torch.from_numpy(array)
    return out


def read_mxnet(path, hint=""):
    """Arrays of an MXNet .params file in any of its three on-disk forms, numpy only. -> name: float32 array"""
    if not path.is_file():
        raise data.InputError(f"no weight file {path}{hint}")
    data.print_sha256(path)
    raw, at = path.read_bytes(), 0

    def take(kind, *shape):
        nonlocal at
        size = math.prod(shape) * np.dtype(kind).itemsize
        if min(shape, default=0) < 0 or at + size > len(raw):
            raise ValueError(f"at byte {at} it lacks {kind} of shape {shape}")
        out = np.frombuffer(raw[at:at + size], kind).reshape(shape)
        at += size
        return out

    def array():
        magic = take("<u4")
        if magic == 0xF993FAC9 and take("<i4") != 0:
            raise ValueError("it holds a sparse array")
        new = magic in (0xF993FAC8, 0xF993FAC9)
        rank = int(take("<u4") if new else magic)
        if not 1 <= rank <= 8:
            raise ValueError(f"an array of rank {rank}")
        shape = take("<i8" if new else "<u4", rank).tolist()
        *_, kind = take("<i4", 3).tolist()  # after the device's type and id
        if kind not in (0, 1, 2):
            raise ValueError(f"an array of type {kind}")
        return take(("<f4", "<f8", "<f2")[kind], *shape).astype(np.float32)

    try:
        if take("<u8", 2).tolist() != [0x112, 0]:
            raise ValueError("no MXNet list")
        arrays = [array() for _ in range(take("<u8"))]
        names = [take("u1", int(take("<u8"))).tobytes().decode("latin1") for _ in range(take("<u8"))]
        if len(names) != len(arrays):
            raise ValueError(f"{len(arrays)} arrays, {len(names)} names")
    except ValueError as error:
        raise data.InputError(f"{path} cannot be read as MXNet weights: {error}{hint}") from None
    return dict(zip(names, arrays))


# ---------------------------------------------------------------- AffinityNet

def offsets(radius):
    """The places (dy, dx) with y >= 0 within `radius` of a place, each pair once: 34 for radius 5."""
    return [(0, x) for x in range(1, radius)] + [
        (y, x) for y in range(1, radius) for x in range(1 - radius, radius) if y * y + x * x < radius * radius]


def radius_for(height, width):
    """RADIUS, less on a map whose shorter edge is under 2 * RADIUS + 1, at least 2."""
    return max(2, min(RADIUS, (min(height, width) - 1) // 2))


def pairs(maps, radius):
    """Views of the "from" places and, for each offset, of the "to" places: (..., h, w) -> (..., h', w'), 34 of them.

    "From" is at least radius-1 columns from the left and right edge and as many rows from the bottom (PSA).
    """
    edge = radius - 1
    h, w = max(0, maps.shape[-2] - edge), max(0, maps.shape[-1] - 2 * edge)
    return maps[..., :h, edge:edge + w], [maps[..., y:y + h, edge + x:edge + x + w] for y, x in offsets(radius)]


class _MeanDifference(torch.autograd.Function):
    """mean |f_i - f_j| over the channels. (B, C, h, w) -> (B, 34, h', w'); for the gradient only the features are kept."""

    @staticmethod
    def forward(ctx, features, radius):
        ctx.save_for_backward(features)
        ctx.radius = radius
        start, ends = pairs(features, radius)
        return torch.stack([(start - end).abs_().mean(1) for end in ends], dim=1)

    @staticmethod
    def backward(ctx, gradient):
        features, = ctx.saved_tensors
        out = torch.zeros_like(features)
        (start, ends), (d_start, d_ends) = pairs(features, ctx.radius), pairs(out, ctx.radius)
        for end, d_end, g in zip(ends, d_ends, gradient.split(1, dim=1)):
            d = (start - end).sign_().mul_(g / features.shape[1])
            d_start += d
            d_end -= d
        return out, None


def affinity(features, radius):
    """exp(-mean |f_i - f_j|) of each place with those around it (PSA). (B, C, h, w) -> (B, 34, h', w')"""
    return torch.exp(-_MeanDifference.apply(features.float(), radius))


def pair_kinds(labels, radius):
    """Which pairs are background, of one foreground class, and unlike; void in none. (B, h, w) -> three bool (B, 34, h', w')"""
    start, ends = pairs(labels, radius)
    start, ends = start[:, None], torch.stack(ends, dim=1)
    valid = (start != data.VOID) & (ends != data.VOID)
    alike = (start == ends) & valid
    return alike & (start == 0), alike & (start != 0), valid & (start != ends)


def affinity_loss(affinities, labels, radius, batch=None, eps=1e-5):
    """1/4 background pairs + 1/4 pairs of one class + 1/2 unlike pairs, each a mean over the batch; void left out (PSA).

    affinities: (B, 34, h', w'), labels: (B, h, w) at stride 8, batch: (B', h, w), of which these may be a part  ->  scalar
    """
    kinds = pair_kinds(labels, radius)
    counts = [chosen.sum() + eps for chosen in (kinds if batch is None else pair_kinds(batch, radius))]
    positive, negative = -(affinities + eps).log(), -(1 + eps - affinities).log()
    background, same, unlike = ((loss * chosen).sum() / count for loss, chosen, count in zip((positive, positive, negative), kinds, counts))
    return background / 4 + same / 4 + unlike / 2


class AffinityNet(nn.Module):
    """Features whose differences are affinities (PSA). (B, 3, H, W) -> (B, 448, H/8, W/8)"""

    def __init__(self, backbone, frozen=True):
        super().__init__()
        self.backbone = backbone
        self.frozen = frozen
        scale = backbone.channels[0] / 512
        widths = [round(n * scale) for n in (64, 128, 256)]
        for name, inputs, outputs in zip(("f8_3", "f8_4", "f8_5"), backbone.channels, widths):
            self.add_module(name, nn.Conv2d(inputs, outputs, 1, bias=False))
            nn.init.kaiming_normal_(self.get_submodule(name).weight)
        self.f9 = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)
        if frozen:
            for name in backbone.FROZEN:
                backbone.get_submodule(name).requires_grad_(False)
            freeze_batch_norm(self)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            freeze_batch_norm(self)
        return self

    def forward(self, x):
        conv4, conv5, conv6 = self.backbone(x)
        features = [F.elu(self.f8_3(conv4)), F.elu(self.f8_4(conv5)), F.elu(self.f8_5(conv6))]
        return F.elu(self.f9(torch.cat(features, dim=1)))


def freeze_batch_norm(model, statistics=True):
    """Stop the training of every BatchNorm's scale and shift, and of its running statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
            if statistics:
                module.eval()


def parameter_groups(model, new, lr, weight_decay):
    """Published groups: lr x1 pretrained weights, x2 their biases, x10 new weights, x20 new biases; no decay on biases."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (10 if name.startswith(new) else 1) * (2 if name.endswith("bias") else 1)
            groups.setdefault((factor, name.endswith("bias")), []).append(parameter)
    return [{"params": p, "lr": lr * factor, "weight_decay": 0 if bias else weight_decay} for (factor, bias), p in groups.items()]


def place(model, args):
    """On the device; channels_last on cuda only: on the CPU torch 2.15's kernels crash on some narrow ResNet-38s."""
    return model.to(args.device, memory_format=torch.channels_last if args.device.type == "cuda" else torch.preserve_format)


def make_optimizer(args, model, new, momentum):
    """SGD with the published groups, or AdamW for short trainings from scratch, where SGD learns next to nothing (ours)."""
    if args.optimizer == "adamw" and args.from_scratch:
        return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    groups = parameter_groups(model, new, args.lr, args.weight_decay)
    return torch.optim.AdamW(groups) if args.optimizer == "adamw" else torch.optim.SGD(groups, args.lr, momentum)


def augment(crop):
    """Jitter of the whole photo, crop with black padding, flip, in TransCAM's order. The padding counts as background, as there.

    PIL photo, tv_tensors.Mask (H, W)  ->  float32 (3, crop, crop), Mask (crop, crop)
    """
    return v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomCrop(crop, pad_if_needed=True, fill=0),
                       v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN, data.STD)])


def train(args):
    """Train AffinityNet on the affinity labels -> OUT/affinitynet.pth"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids("train_aug")
    if args.crop % STRIDE:
        raise data.InputError(f"--crop {args.crop} is no multiple of {STRIDE}")
    prepare = augment(args.crop)

    def item(id, photo):
        photo, label = prepare(photo, tv_tensors.Mask(data.read_mask(args.out / "affinity_labels" / f"{id}.png")))
        return photo, label.as_subclass(torch.Tensor)[::STRIDE, ::STRIDE]

    images = data.Images(dataset.image, ids, item)
    steps = args.epochs * data.steps_of(images, args)
    stage = data.Stage(args, "affinitynet", reads=("affinity_labels",))
    if stage.is_done():
        return
    net = place(AffinityNet(make_backbone(args), frozen=not args.from_scratch), args)
    if args.recompute:
        data.recompute(net.backbone.children())
    stage.start()
    optimizer = make_optimizer(args, net, ("f8", "f9"), args.momentum)
    radius = radius_for(args.crop // STRIDE, args.crop // STRIDE)
    data.fit(stage, net, optimizer, images,
             lambda part, batch: affinity_loss(affinity(net(part[0]), radius), part[1], radius, batch[1]),
             steps, schedule=lambda done: (1 - done) ** 0.9)
    stage.finish()


# ---------------------------------------------------------------- random walk

def transition_matrix(affinities, height, width, radius, beta):
    """T' of the walk: affinities to the power beta, both directions, 1 to itself, rows divided by their sums.

    affinities: (34, h', w')  ->  sparse CSR (N, N); before the division it is symmetric, so the columns of T sum to 1
    """
    place = torch.arange(height * width, device=affinities.device).view(height, width)
    start, ends = pairs(place, radius)
    i, j, own = start.expand(len(ends), *start.shape).flatten(), torch.stack(ends).flatten(), place.flatten()
    value = affinities.flatten().float() ** beta
    index = torch.stack([torch.cat([i, j, own]), torch.cat([j, i, own])])
    matrix = torch.sparse_coo_tensor(index, torch.cat([value, value, torch.ones_like(own, dtype=torch.float32)]),
                                     (height * width,) * 2, check_invariants=False).coalesce()
    rows, columns = matrix.indices()
    sums = torch.zeros(height * width, device=value.device).index_add_(0, rows, matrix.values())
    starts = F.pad(rows.bincount(minlength=height * width).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse CSR a beta; the tests hold it to the dense product
        return torch.sparse_csr_tensor(starts.int(), columns.int(), matrix.values() / sums[rows], matrix.shape)  # int: half the bytes


def random_walk(maps, affinities, radius, beta, steps):
    """maps T^steps by `steps` sparse products, O(N) memory (PSA computes the dense power). (L, h, w) -> (L, h, w)"""
    L, h, w = maps.shape
    matrix = transition_matrix(affinities, h, w, radius, beta)
    x = maps.reshape(L, -1).t().contiguous().float()  # (N, L)
    for _ in range(steps):
        x = matrix @ x
    return x.t().reshape(L, h, w)


@torch.inference_mode()
def walk_scores(net, photo, cams, background_score, beta, steps):
    """Scores of background and the photo's classes after the walk, at stride 8 of the padded photo.

    photo: normalised (3, H, W), cams: (k, H, W) in [0, 1]  ->  float32 (1 + k, H'/8, W'/8), H' and W' multiples of 8
    """
    pad = (0, -photo.shape[2] % STRIDE, 0, -photo.shape[1] % STRIDE)
    maps = F.pad(torch.cat([torch.full_like(photo[:1], background_score), cams]), pad)
    features = net(F.pad(photo, pad)[None])
    radius = radius_for(*features.shape[2:])
    with torch.autocast(photo.device.type, enabled=False):  # rounded 2^7 times to half precision a constant map would not stay one
        return random_walk(F.avg_pool2d(maps, STRIDE), affinity(features, radius)[0], radius, beta, steps)


def pseudo_label(scores, classes, photo, num_classes):
    """Scores -> label of each pixel -> CRF on the padded photo, cropped.

    scores: (1 + k, h, w) at stride 8, classes: (k,), photo: uint8 (H, W, 3)  ->  uint8 (H, W)
    """
    H, W = photo.shape[:2]
    padded = np.pad(photo, ((0, -H % STRIDE), (0, -W % STRIDE), (0, 0)))
    full = F.interpolate(scores[None], padded.shape[:2], mode="bilinear", align_corners=False)[0]
    label = np.append(0, classes)[full.argmax(0).numpy()].astype(np.uint8)
    return crf_from_labels(padded, label, num_classes, **CRF_LABELS)[:H, :W]


def _write_pseudo_label(scores, classes, photo_path, path, num_classes):
    photo = np.array(data.read_image(photo_path))
    data.write_mask(path, pseudo_label(torch.from_numpy(scores), classes, photo, num_classes))


def walk(args):
    """Random walk of the seeds, CRF -> OUT/pseudo_labels/ID.png"""
    dataset = data.DataSet(args.data)
    ids = list(dict.fromkeys(dataset.ids("train_aug") + dataset.ids("train", required=False)))
    stage = data.Stage(args, "pseudo_labels", reads=("cams", "affinitynet"))
    paths = {id: args.out / "pseudo_labels" / f"{id}.png" for id in ids}
    todo = stage.todo(paths)
    if stage.is_done(todo):
        return
    saved = data.read_weights(args.out / "affinitynet.pth")
    trained = argparse.Namespace(**{**saved["settings"], "from_scratch": True})
    net = AffinityNet(make_backbone(trained))
    data.load_weights(net, saved["model"], args.out / "affinitynet.pth")
    net = place(net, args).eval()
    tensor = data.to_tensor()
    stage.start()

    def item(id, photo):
        classes, cams = data.read_seeds(args.out / "cams" / f"{id}.npz")
        return id, tensor(photo), classes, cams

    def jobs():
        photos = data.loader(data.Images(dataset.image, todo, item), None, args)
        for id, photo, classes, cams in photos:
            with data.autocast(args):
                scores = walk_scores(net, photo.to(args.device), torch.as_tensor(cams).to(args.device),
                                     args.background_score, args.beta, 2 ** args.log_steps)
            yield scores.cpu().numpy(), np.asarray(classes), dataset.image(id), paths[id], dataset.num_classes

    for _ in data.in_processes(_write_pseudo_label, jobs(), args.workers, len(todo), "pseudo labels", args.out / "pseudo_labels"):
        pass
    stage.finish()


def add_network_flags(parser):
    """Flags of the two trainings that start from ResNet-38 or a stand-in."""
    parser.add_argument("--backbone", choices=("resnet38", "resnet50", "resnet101"), default="resnet38", help="resnet38 is the published one")
    parser.add_argument("--width", type=int, default=64, help="channels of ResNet-38's stem; 64 is published")
    parser.add_argument("--resnet38", type=Path, help="its ImageNet weights: MXNet's .params, or PSA's .pth")
    parser.add_argument("--backbone-weights", type=Path, help="file for resnet50 or resnet101 (default: torchvision's)")
    parser.add_argument("--from-scratch", action=argparse.BooleanOptionalAction, default=False, help="start without weights")
    parser.add_argument("--dropout", type=float, default=1.0, help="factor on the published dropout rates")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="adamw is ours, for trainings from scratch")
    parser.add_argument("--crop", type=int, default=448, help="side of the square crops, pixels")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="on weights, not on biases")
    data.add_memory_flags(parser)


def main():
    commands = data.Commands(__doc__, PRESETS)
    parser = commands.add(labels, "affinity labels from seeds")
    parser.add_argument("--foreground", type=float, default=0.60, help="seed threshold of sure foreground")
    parser.add_argument("--background", type=float, default=0.25, help="seed threshold of sure background")
    parser = commands.add(train, "train AffinityNet")
    add_network_flags(parser)
    parser.add_argument("--epochs", type=int, default=8, help="passes over train_aug")
    parser.add_argument("--batch-size", type=int, default=8, help="crops a step")
    parser.add_argument("--lr", type=float, default=0.01, help="of SGD; falls as (1 - i/max)^0.9")
    parser.add_argument("--momentum", type=float, default=0.0, help="0: what the published optimizer really did")
    parser = commands.add(walk, "random walk: seeds to pseudo labels")
    parser.add_argument("--background-score", type=float, default=0.42, help="constant map of background")
    parser.add_argument("--beta", type=float, default=14, help="power of the affinities (PSA: 8)")
    parser.add_argument("--log-steps", type=int, default=7, help="the walk has 2^n steps (PSA: 8)")
    commands.run()


if __name__ == "__main__":
    main()
