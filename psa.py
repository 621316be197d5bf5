"""PSA (Ahn & Kwak 2018): from seeds affinity labels, AffinityNet, random walk, pseudo labels. Sec. 3.4, 4.2.

    python psa.py labels   photos, OUT/cams                              -> OUT/affinity_labels/ID.png (255: not sure)
    python psa.py train    photos, OUT/affinity_labels                   -> OUT/affinitynet/model.pth
    python psa.py walk     photos, OUT/affinitynet/model.pth, OUT/cams   -> OUT/pseudo_labels/ID.png
"""
import wsss  # noqa: F401, first, so that a package that is missing is named
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from wsss.cli import Commands, run_stage
from wsss.crf import CRF_LABELS, crf_from_labels
from wsss.data import JITTER, DataSet, Images, to_tensor
from wsss.masks import VOID, read_mask, write_made
from wsss.pool import autocast, for_each_photo
from wsss.resnet38 import FITS, freeze_batch_norm, load_network, make_psa_optimizer, start_network
from wsss.seeds import hard_threshold, read_seeds
from wsss.stage import FlagError, require
from wsss.training import Batches, falling_rate, fit

STRIDE = 8  # pixels of the photo one affinity feature stands for
RADIUS = 5  # places within it are compared
NEW = ("f8", "f9")  # beginnings of the names of layers that no file has


def affinity(start, end):
    """Affinity of pairs of places: exp(-mean |f_i - f_j|). As written; the run uses `affinities`, of all pairs at once.

    start, end: features of the two places of each pair, (C, n)  ->  (n,) in (0, 1]
    """
    return torch.exp(-(start - end).abs().mean(0))


def pair_kinds(start, end):
    """Which pairs are background, of one foreground class, and unlike; pairs with a void place (255) are of no kind.

    start, end: labels of the two places, any shapes that broadcast  ->  three bool of that shape
    """
    valid = (start != 255) & (end != 255)
    alike = (start == end) & valid
    return alike & (start == 0), alike & (start != 0), valid & (start != end)


def affinity_loss(values, kinds, counts, eps=1e-5):
    """1/4 background pairs + 1/4 pairs of one class + 1/2 unlike pairs, each a mean over the whole batch's pairs.

    values: affinities (...), kinds: `pair_kinds` of that shape, counts: pairs of each kind in the batch  ->  scalar
    """
    positive, negative = -(values + eps).log(), -(1 + eps - values).log()
    background, same, unlike = ((loss * kind).sum() / (count + eps)
                                for loss, kind, count in zip((positive, positive, negative), kinds, counts))
    return background / 4 + same / 4 + unlike / 2


def transition(matrix, beta):
    """T of the walk: affinities to the power beta, each column divided by its sum. As written; the run: `sparse_walk`.

    matrix: affinities (N, N), symmetric, 1 on the diagonal  ->  (N, N)
    """
    powers = matrix ** beta
    return powers / powers.sum(0, keepdim=True)


def random_walk(maps, T, steps):
    """maps T^steps. As written; the run uses `sparse_walk`. maps: (L, N), T: `transition`, (N, N)  ->  (L, N)"""
    for _ in range(steps):
        maps = maps @ T
    return maps


# ---------------------------------------------------------------- the same, fast, on maps

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
    """mean |f_i - f_j| over the channels, keeping the features alone. (B, C, h, w) -> (B, 34, h', w')"""

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


def affinities(features, radius):
    """`affinity` of each place with those around it, in an eighth of the memory. (B, C, h, w) -> (B, 34, h', w')"""
    return torch.exp(-_MeanDifference.apply(features.float(), radius))


def kinds_of(labels, radius):
    """`pair_kinds` of each place with those around it. (B, h, w)  ->  three bool (B, 34, h', w')"""
    start, ends = pairs(labels, radius)
    return pair_kinds(start[:, None], torch.stack(ends, dim=1))


def sparse_walk(maps, values, radius, beta, steps):
    """`random_walk` by products with the transpose of T, sparse: 100 times faster at 47x63 places, O(N) memory.

    maps: (L, h, w), values: `affinities` (34, h', w')  ->  (L, h, w)
    """
    L, h, w = maps.shape
    place = torch.arange(h * w, device=values.device).view(h, w)
    start, ends = pairs(place, radius)
    i, j, diagonal = start.expand(len(ends), *start.shape).flatten(), torch.stack(ends).flatten(), place.flatten()
    powers = values.flatten().float() ** beta
    index = torch.stack([torch.cat([i, j, diagonal]), torch.cat([j, i, diagonal])])
    powers = torch.cat([powers, powers, torch.ones_like(diagonal, dtype=torch.float32)])
    with warnings.catch_warnings():
        # torch calls its sparse CSR a beta, or says that it checks no indices; tests hold it to the dense product
        warnings.simplefilter("ignore")
        matrix = torch.sparse_coo_tensor(index, powers, (h * w, h * w), check_invariants=False).coalesce()
        rows, columns = matrix.indices()
        sums = torch.zeros(h * w, device=powers.device).index_add_(0, rows, matrix.values())
        starts = F.pad(rows.bincount(minlength=h * w).cumsum(0), (1, 0))
        matrix = torch.sparse_csr_tensor(starts.int(), columns.int(), matrix.values() / sums[rows], (h * w, h * w))
    x = maps.reshape(L, -1).t().contiguous().float()  # (N, L)
    for _ in range(steps):
        x = matrix @ x
    return x.t().reshape(L, h, w)


def affinity_label(photo, classes, cams, num_classes, foreground, background, crf):
    """Sure foreground, sure background, the rest VOID, each from a thresholded seed through the CRF.

    photo: uint8 (H, W, 3), classes: (k,), cams: (k, H, W) in [0, 1]  ->  uint8 (H, W)
    """
    high = crf_from_labels(photo, hard_threshold(classes, cams, foreground), num_classes, **crf)
    low = crf_from_labels(photo, hard_threshold(classes, cams, background), num_classes, **crf)
    return np.where(high > 0, high, np.where(low > 0, VOID, 0)).astype(np.uint8)


def item_with_seeds(out, ids):
    """What `labels` and `walk` read of a photo: its file's name, pixels, classes, and seeds of its size."""
    require([out / "cams" / f"{name}.npz" for name in ids], "seeds", ': run "make cams"')

    def item(name, photo):
        classes, cams = read_seeds(out / "cams" / f"{name}.npz", photo_size=photo.size[::-1])
        return f"{name}.png", np.array(photo), classes, cams
    return item


def labels(args):
    """Affinity labels of train_aug from the seeds at two thresholds -> OUT/affinity_labels/ID.png"""
    if args.foreground < args.background:
        raise FlagError(f"--foreground {args.foreground} is below --background {args.background}")
    dataset = DataSet(args.data)
    ids = dataset.ids("train_aug")

    def work(run, todo):
        def compute(file, *inputs):
            yield (affinity_label, run.folder / file, *inputs, dataset.num_classes, args.foreground, args.background,
                   CRF_LABELS)

        item = item_with_seeds(args.out, ids)
        for_each_photo(run, dataset.image, todo, item, compute, write_made, args.device, args.workers)

    run_stage(args, "affinity_labels", work, dataset, reads=("cams",), ids=ids, ignore=("seed", "precision"))


class AffinityNet(nn.Module):
    """Features whose differences are affinities (PSA). (B, 3, H, W) -> (B, 448, H/8, W/8)"""

    def __init__(self, backbone, frozen=True):
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        widths = [round(n * backbone.channels[0] / 512) for n in (64, 128, 256)]
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


def augment_pair(crop):
    """Jitter of the whole photo, crop with black padding, flip: TransCAM's order. The padding is background, as there.

    PIL photo, tv_tensors.Mask (H, W)  ->  float32 (3, crop, crop), Mask (crop, crop)
    """
    return v2.Compose([v2.ColorJitter(*JITTER), v2.RandomCrop(crop, pad_if_needed=True, fill=0),
                       v2.RandomHorizontalFlip(), to_tensor()])


def loss_of_pairs(net, part, labels, radius):
    """`affinity_loss` as `fit` wants it: of the pairs of a micro-batch, over the counts of the whole batch."""
    kinds = kinds_of(part[1], radius)
    counts = [kind.sum() for kind in (kinds if len(labels) == len(part[1]) else kinds_of(labels, radius))]
    return affinity_loss(affinities(net(part[0]), radius), kinds, counts), {}


def train(args):
    """Train AffinityNet on the affinity labels -> OUT/affinitynet/model.pth"""
    if args.crop % STRIDE or args.crop < 3 * STRIDE:
        raise FlagError(f"--crop {args.crop} is not a multiple of {STRIDE}, or has no two places to compare")
    radius = radius_for(args.crop // STRIDE, args.crop // STRIDE)
    dataset = DataSet(args.data)
    ids, folder, prepare = dataset.ids("train_aug"), args.out / "affinity_labels", augment_pair(args.crop)

    def item(name, photo):
        label = read_mask(folder / f"{name}.png", dataset.num_classes, photo.size[::-1])
        photo, label = prepare(photo, tv_tensors.Mask(label))
        return photo, label.as_subclass(torch.Tensor)[::STRIDE, ::STRIDE]

    batches = Batches(Images(dataset.image, ids, item), args.batch_size, args.seed, args.workers)

    def work(run):
        require([folder / f"{name}.png" for name in ids], "affinity labels", ': run "make psa"')
        net, network = start_network(lambda backbone: AffinityNet(backbone, frozen=not args.from_scratch), args)
        optimizer = make_psa_optimizer(net, NEW, args.lr, args.weight_decay, args.momentum, args.optimizer)
        fit(run, net, optimizer, batches, partial(loss_of_pairs, radius=radius), args.epochs * batches.per_epoch,
            network, schedule=falling_rate, amp=args.amp, micro_batch=args.micro_batch)

    run_stage(args, "affinitynet", work, dataset, reads=("affinity_labels",), hints=FITS)


@torch.inference_mode()
def walk_scores(net, photo, cams, background_score, beta, steps):
    """Scores of background and the photo's classes after the walk, at stride 8 of the padded photo.

    photo: normalised (3, H, W), cams: (k, H, W) in [0, 1]  ->  float32 (1 + k, H'/8, W'/8), H' and W' multiples of 8
    """
    pad = (0, -photo.shape[2] % STRIDE, 0, -photo.shape[1] % STRIDE)
    maps = F.pad(torch.cat([torch.full_like(photo[:1], background_score), cams]), pad)
    features = net(F.pad(photo, pad)[None])
    radius = radius_for(*features.shape[2:])
    with torch.autocast(photo.device.type, enabled=False):  # in half precision a constant map would drift
        return sparse_walk(F.avg_pool2d(maps, STRIDE), affinities(features, radius)[0], radius, beta, steps)


def pseudo_label(scores, classes, photo, num_classes):
    """Scores -> label of each pixel -> CRF on the padded photo, cropped.

    scores: (1 + k, h, w) at stride 8, classes: (k,), photo: uint8 (H, W, 3)  ->  uint8 (H, W)
    """
    H, W = photo.shape[:2]
    padded = np.pad(photo, ((0, -H % STRIDE), (0, -W % STRIDE), (0, 0)))
    full = F.interpolate(torch.as_tensor(scores)[None], padded.shape[:2], mode="bilinear", align_corners=False)[0]
    label = np.append(0, classes)[full.argmax(0).numpy()].astype(np.uint8)
    return crf_from_labels(padded, label, num_classes, **CRF_LABELS)[:H, :W]


def walk(args):
    """Random walk of the seeds, CRF -> OUT/pseudo_labels/ID.png"""
    dataset = DataSet(args.data)
    ids = dataset.ids_of_seeds()

    def work(run, todo):
        net = load_network(args.out, "affinitynet", lambda backbone, state: AffinityNet(backbone), args.device)
        normalised, item = to_tensor(), item_with_seeds(args.out, ids)

        def compute(file, photo, classes, cams):
            with autocast(args.device, args.amp):
                scores = walk_scores(net, normalised(photo).to(args.device), torch.from_numpy(cams).to(args.device),
                                     args.background_score, args.beta, 2 ** args.log_steps)
            yield pseudo_label, run.folder / file, scores.cpu().numpy(), classes, photo, dataset.num_classes

        for_each_photo(run, dataset.image, todo, item, compute, write_made, args.device, args.workers)

    run_stage(args, "pseudo_labels", work, dataset, reads=("cams", "affinitynet"), ids=ids, ignore=("seed",))


def main():
    commands = Commands(__doc__, "psa")
    commands.add(labels, "affinity labels from seeds", computes=False)
    commands.add(train, "train AffinityNet")
    commands.add(walk, "random walk: seeds to pseudo labels")
    commands.run()


if __name__ == "__main__":
    main()
