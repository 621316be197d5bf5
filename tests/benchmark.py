"""Plain forms against ours: that both give the same result, and how much less time, memory or disk ours takes.

    python tests/benchmark.py                      every row but cards and bf16, a quarter of an hour on a CPU
    python tests/benchmark.py --only walk crf      these rows alone
    python tests/benchmark.py --quick              smaller sizes, for which no goal is set
    python tests/benchmark.py --only bf16 --out out/toy   what mixed precision changes in the seeds of a run

The plain form of a row is its equation as the published code (TransCAM's, PSA's) computes it. Both forms take turns
in one process, and the median counts; peak memory is what a form adds in a fresh process. Exit status 1 where they
disagree.
"""
import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conftest import largest_difference, plain_crf, run_process  # also puts the repository on the path

import bnr
import conformer
import crf as dense
import data
import engine
import evaluate
import psa
import resnet38
import seeds
import segment
import toy
from stage import read_record

LINE = "{:<11}{:<41}{:>12}{:>12}{:>9}{:>13} {:<8}{:>10}"
FOREGROUND = 20  # classes of PASCAL VOC
SCALES = 16, 32, 48  # sides of M* for photos of 256, 512 and 768 pixels
DISAGREE = []


def note(args, name, sizes, plain, ours, unit, goal=None, limit=None, difference=None, tolerance=0.0):
    """Print a row. goal: the least plain / ours, limit: the most that ours may be, both for the full sizes only."""
    ratio = plain / ours if plain is not None else None
    wanted = "" if args.quick else f">= {goal:g}x" if goal else f"<= {limit:g} {unit}" if limit else ""
    missed = wanted and ((goal and ratio < goal) or (limit and ours > limit))
    if difference is not None and not difference <= tolerance:  # nan disagrees too
        DISAGREE.append(f"{name}, {sizes}: difference {difference:.1e} over {tolerance:.0e}")
    values = ["" if x is None else f"{x:.0f} {unit}" if x >= 100 else f"{x:.3g} {unit}" for x in (plain, ours)]
    print(LINE.format(name, sizes, *values, f"{ratio:.2f}x" if ratio else "", wanted, "missed" if missed else "",
                      f"{difference:.1e}" if difference is not None else ""), flush=True)


def on_cpu(args, goal):
    """A goal that is set for the CPU alone."""
    return goal if args.device.type == "cpu" else None


def seconds(form, device):
    """Run it once. -> seconds, what it returns"""
    start, result = time.perf_counter(), form()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def race(args, name, sizes, plain, ours, goal=None, tolerance=0.0, repeats=None):
    """Time both forms in turns, compare what they return (an array or a tuple of them), print the row."""
    repeats, times = repeats or args.repeats, ([], [])
    for _ in range(repeats + (repeats > 1)):  # one more, to warm up, unless it is so slow that one must do
        taken, results = zip(*(seconds(form, args.device) for form in (plain, ours)))
        for both, one in zip(times, taken):
            both.append(one)
    arrays = ([np.float64(torch.as_tensor(x).cpu()) for x in (r if isinstance(r, tuple) else (r,))] for r in results)
    difference = max(largest_difference(found, expected) for expected, found in zip(*arrays, strict=True))
    medians = [1000 * statistics.median(both[-repeats:]) for both in times]
    note(args, name, sizes, *medians, "ms", goal, difference=difference, tolerance=tolerance)


def peak(which, forms, *sizes):
    """MiB that form 0 (plain) or 1 (ours) of `forms(*sizes)` adds to this process's peak."""
    form, device = forms(*sizes)[which], sizes[-1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    before = engine.peak_memory()
    form()
    return (engine.peak_memory() - before) * 1e9 / 2 ** 20


def memory(*job):
    """`peak` in a fresh process."""
    gc.collect()
    torch.cuda.empty_cache()
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, job)


def plain_attention(attns):
    """Eqs. 3, 4 of every block's A, all kept. list of (B, H, 1+N, 1+N) -> (B, N, N)"""
    return bnr.sum_over_blocks([bnr.mean_over_heads(attn) for attn in attns])


def attention_forms(backward, side, device):
    """M* of Conformer-S's shapes, or GAP(M**) with the gradients of L_M**; N = side * side. -> plain, ours"""
    torch.manual_seed(0)
    qks = [torch.randn(2, 1, 6, 1 + side * side, 64, device=device, requires_grad=backward) for _ in range(12)]
    cam = torch.randn(1, FOREGROUND, side, side, device=device, requires_grad=backward)
    labels = torch.eye(FOREGROUND, device=device)[:1]

    def with_gradients(z):
        return z.detach(), *torch.autograd.grad(bnr.soft_margin_loss(z, labels), [cam, *qks])

    def plain():
        attn = plain_attention([bnr.attention(q, k) for q, k in qks])
        refined = bnr.refined_cam(attn, cam)
        return with_gradients(bnr.noisy_cam(attn, refined, len(qks), 1).mean((2, 3))) if backward else refined

    def ours():
        refined = bnr.attend(qks, cam)
        return with_gradients(bnr.noisy_logits(qks, refined, 1)) if backward else refined
    return plain, ours


def attention(args):
    """M* forward and its peak memory, M** forward and backward."""
    sides = ((12, None), (24, None)) if args.quick else ((32, on_cpu(args, 1)), (48, on_cpu(args, 1.7)))
    for backward, what, tolerance in ((False, "M* forward", 1e-5), (True, "M** forward, backward", 1e-4)):
        for side, goal in sides:
            forms = attention_forms(backward, side, args.device)
            race(args, "attention", f"{what}, N={side ** 2}", *forms, goal, tolerance)
    job = attention_forms, False, sides[-1][0], args.device
    note(args, "attention", f"M* peak memory, N={sides[-1][0] ** 2}", memory(0, *job), memory(1, *job), "MiB", goal=10)


def pair_places(height, width, radius):
    """Index of every "from" place (n,), and of the "to" places (34, n), in the flattened map."""
    edge, place = radius - 1, torch.arange(height * width).view(height, width)
    h, w = height - edge, width - 2 * edge
    ends = [place[y:y + h, edge + x:edge + x + w].flatten() for y, x in psa.offsets(radius)]
    return place[:h, edge:edge + w].flatten(), torch.stack(ends)


def plain_walk(maps, affinities, radius, beta, doublings):
    """A dense N x N transition matrix, its columns divided by their sums, squared again and again. (L, h, w) -> same"""
    L, h, w = maps.shape
    start, ends = (x.to(maps.device) for x in pair_places(h, w, radius))
    i, j, own = start.expand(len(ends), -1).flatten(), ends.flatten(), torch.arange(h * w, device=maps.device)
    values = torch.cat([affinities.flatten(), affinities.flatten(), torch.ones(h * w, device=maps.device)])
    index = torch.stack([torch.cat([i, j, own]), torch.cat([j, i, own])])
    matrix = torch.sparse_coo_tensor(index, values, (h * w, h * w), check_invariants=False).to_dense() ** beta
    matrix = matrix / matrix.sum(0, keepdim=True)
    for _ in range(doublings):
        matrix = matrix @ matrix
    return (maps.view(L, -1) @ matrix).view(L, h, w)


def walk_forms(height, width, device):
    """The random walk of background and two classes, 2^7 steps. -> plain, ours"""
    torch.manual_seed(0)
    maps = torch.rand(3, height, width, device=device)
    affinities = psa.affinities(0.1 * torch.randn(1, 8, height, width, device=device), psa.RADIUS)[0]
    job = maps, affinities, psa.RADIUS, 14
    return (lambda: plain_walk(*job, 7)), (lambda: psa.sparse_walk(*job, 2 ** 7))


def walk(args):
    """Random walk of a VOC photo against dense powers; of a 2000x1500 photo alone."""
    small, large = ((20, 30), (47, 63)) if args.quick else ((47, 63), (188, 250))
    names = [f"grid {h}x{w}, 3 maps" for h, w in (small, large)]
    race(args, "walk", names[0], *walk_forms(*small, args.device), on_cpu(args, 50), 1e-4, repeats=min(2, args.repeats))
    note(args, "walk", names[1], None, seconds(walk_forms(*large, args.device)[1], args.device)[0], "s")
    note(args, "walk", f"{names[1]}, memory", None, memory(1, walk_forms, *large, args.device), "MiB", limit=2048)


def crf(args):
    """Dense CRF from a label map with three of the S labels present."""
    height, width = (90, 130) if args.quick else (300, 451)
    photo = np.array(toy.toy_picture(np.random.RandomState(1))[0].resize((width, height)))
    labels = draw_mask(np.random.RandomState(0), height, width, (0, 8, 15))
    for num_classes, goal, repeats in ((21, 1.7, args.repeats), (81, 4, min(2, args.repeats))):
        def plain():
            return plain_crf(photo, labels, num_classes).argmax(0)

        def ours():
            return dense.crf_from_labels(photo, labels, num_classes, **dense.CRF_LABELS)

        race(args, "crf", f"{height}x{width}, 3 of {num_classes} labels", plain, ours, goal, repeats=repeats)


def draw_mask(rng, height, width, values):
    """A map of these values in blocks of 30 pixels. -> uint8 (height, width)"""
    coarse = np.array(values, np.uint8)[rng.randint(0, len(values), (-(-height // 30), -(-width // 30)))]
    return coarse.repeat(30, 0).repeat(30, 1)[:height, :width]


def plain_pair_labels(label, radius):
    """Pairs that are background, of one foreground class, unlike. uint8 (h, w) -> three float32 (34, n)"""
    edge = radius - 1
    h, w = label.shape[0] - edge, label.shape[1] - 2 * edge
    start = label[:h, edge:edge + w].reshape(1, -1)
    ends = np.stack([label[y:y + h, edge + x:edge + x + w].reshape(-1) for y, x in psa.offsets(radius)])
    valid, same = (start != data.VOID) & (ends != data.VOID), start == ends
    kinds = same & (start == 0), same & (start != 0) & valid, ~same & valid
    return [torch.from_numpy(kind.astype(np.float32)) for kind in kinds]


def plain_affinity_loss(features, labels, start, ends):
    """Gathers the features of all pairs. features: (B, C, h, w), labels: uint8 (B, h, w) -> scalar"""
    flat = features.flatten(2)
    first = torch.index_select(flat, 2, start)[:, :, None]  # (B, C, 1, n)
    second = torch.index_select(flat, 2, ends.flatten()).unflatten(2, ends.shape)  # (B, C, 34, n)
    affinities = torch.exp(-(second - first).abs().mean(1))
    kinds = zip(*(plain_pair_labels(label, psa.RADIUS) for label in labels))
    background, same, unlike = (torch.stack(kind).to(features.device) for kind in kinds)
    positive, negative = -torch.log(affinities + 1e-5), -torch.log(1 + 1e-5 - affinities)
    terms = ((1 / 4, background, positive), (1 / 4, same, positive), (1 / 2, unlike, negative))
    return sum(weight * (chosen * loss).sum() / (chosen.sum() + 1e-5) for weight, chosen, loss in terms)


def our_affinity_loss(features, labels):
    """What psa.py's training computes. features: (B, C, h, w), labels: uint8 (B, h, w) -> scalar"""
    kinds = psa.kinds_of(labels, psa.RADIUS)
    return psa.affinity_loss(psa.affinities(features, psa.RADIUS), kinds, [kind.sum() for kind in kinds])


def affinity(args):
    """AffinityNet's pair labels and loss, forward and backward to the features."""
    torch.manual_seed(0)
    batch, side = (2, 28) if args.quick else (8, 56)
    features = (0.3 * torch.randn(batch, 448, side, side)).to(args.device).requires_grad_()
    masks = [draw_mask(np.random.RandomState(n), 8 * side, 8 * side, (0, 3, 7, data.VOID)) for n in range(batch)]
    labels = np.stack([mask[::8, ::8] for mask in masks])
    start, ends = (x.to(args.device) for x in pair_places(side, side, psa.RADIUS))

    def with_gradient(loss):
        return loss.detach(), torch.autograd.grad(loss, features)[0]

    def ours():
        on_device = torch.from_numpy(labels).to(args.device)
        return with_gradient(our_affinity_loss(features, on_device))

    race(args, "affinity", f"{batch}x448x{side}x{side}, with backward",
         lambda: with_gradient(plain_affinity_loss(features, labels, start, ends)), ours, on_cpu(args, 3), 1e-4)


def draw_seeds(folder, name, size):
    """M* of two classes and three scales, written as ours and as published: full size, float32. -> path, path"""
    rng, classes = np.random.RandomState(len(name)), np.array([3, 7])
    maps = [rng.rand(2, side, side).astype(np.float32) for side in SCALES]
    resized = [F.interpolate(torch.from_numpy(m)[None], size, mode="bilinear", align_corners=False)[0] for m in maps]
    full = sum(resized).numpy()
    low, high = full.min((1, 2), keepdims=True), full.max((1, 2), keepdims=True)
    full[full < low + 1e-5] = 0
    full = ((full - low - 1e-5) / (high - low + 1e-5)).clip(0)
    seeds.write_seeds(folder / f"{name}.npz", classes, size, refined=maps)
    np.save(folder / f"{name}.npy", dict(zip(classes.tolist(), full)))
    return folder / f"{name}.npz", folder / f"{name}.npy"


def read_plain_seeds(path):
    """-> classes (k,), maps (k, H, W)"""
    maps = np.load(path, allow_pickle=True).item()
    return np.array(list(maps)), np.stack(list(maps.values()))


def plain_threshold(path, threshold, num_classes):
    """Reads the seed file and puts the threshold beside its maps and those of the absent classes. -> uint8 (H, W)"""
    classes, maps = read_plain_seeds(path)
    scores = np.zeros((num_classes, *maps.shape[1:]), np.float32)
    scores[classes - 1], scores[-1] = maps, threshold  # last: at equality the class wins, as in the paper
    return ((scores.argmax(0) + 1) % num_classes).astype(np.uint8)


def files(args):
    """Bytes of a seed file, and what is read from it."""
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = draw_seeds(Path(folder), "seed", (375, 500))
        difference = largest_difference(seeds.read_seeds(ours)[1], read_plain_seeds(plain)[1])
        sizes = [path.stat().st_size / 1000 for path in (plain, ours)]
        note(args, "files", "375x500, 2 classes, 3 scales", *sizes, "KB", limit=60, difference=difference,
             tolerance=1e-5)


def sweep(args):
    """Confusion matrices of seeds at 60 thresholds, files read included."""
    size, S = (375, 500), 1 + FOREGROUND
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / f"{'x' * n}.png" for n in range(1, 2 if args.quick else 4)]
        files = [draw_seeds(Path(folder), name.stem, size) for name in names]
        for n, name in enumerate(names):
            data.write_mask(name, draw_mask(np.random.RandomState(n), *size, (0, 3, 7, data.VOID)))

        def plain():
            return np.stack([sum(evaluate.confusion(data.read_mask(name), plain_threshold(path, threshold, S), S)
                                 for name, (_, path) in zip(names, files)) for threshold in evaluate.THRESHOLDS])

        def ours():
            return sum(evaluate.confusion_over_thresholds(data.read_mask(name), *seeds.read_seeds(path), S)
                       for name, (path, _) in zip(names, files))

        # A value that rounds to the other side of a threshold moves a pixel, of half a million.
        race(args, "sweep", f"{len(names)} seeds, 60 thresholds", plain, ours, 30, 1e-4)


def plain_iou(mask, prediction, num_classes):
    """Pixels of the mask, of the prediction, and of both, a class at a time. -> (S,)"""
    seen, out = mask < data.VOID, np.full(num_classes, np.nan)
    hit = (mask == prediction) * seen
    for c in range(num_classes):
        of_prediction, of_mask = ((prediction == c) * seen).sum(), ((mask == c) * seen).sum()
        of_both = ((mask == c) * hit).sum()
        if of_mask + of_prediction:
            out[c] = of_both / (of_mask + of_prediction - of_both)
    return out


def confusion(args):
    """IoU of each class of one mask."""
    values = tuple(range(1 + FOREGROUND)) + (data.VOID,)
    mask, prediction = (draw_mask(np.random.RandomState(n), 375, 500, values[:len(values) - n]) for n in (0, 1))
    race(args, "confusion", "375x500, 21 classes", lambda: np.nan_to_num(plain_iou(mask, prediction, 21), nan=-1),
         lambda: np.nan_to_num(evaluate.iou(evaluate.confusion(mask, prediction, 21)), nan=-1), 5, 1e-12)


class PlainAttention(conformer.Attention):
    """Attention that makes its matrix, uses it, and hands it out: A^b for all of eqs. 2-5."""

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attn = bnr.attention(q, k)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, L, D)), attn


def conformers(device):
    """Conformer-S twice with the same weights: as published, and as bnr.py has it. -> plain, ours"""
    torch.manual_seed(0)
    model = conformer.Conformer("small", FOREGROUND).to(device)
    model.conv_cls_head.weight.data.abs_()  # or a random class map may be negative all over, and the seed 0
    for _, block in model.blocks():
        conformer.init_attention(block, 60)  # or attention is uniform, and the seed the rounding errors of a constant
    published = copy.deepcopy(model)
    for _, block in published.blocks():
        block.attn.__class__ = PlainAttention
    return published, model.to(memory_format=torch.channels_last)


def mixed(device, amp=None):
    """Autocast as a run has it; amp None: on a GPU"""
    return engine.autocast(device, device.type == "cuda" if amp is None else amp)


def export_forms(batch, sides, device, amp=None):
    """Seeds of photos from six passes each; amp: ours in half precision (None: on a GPU). -> plain, ours"""
    published, model = (net.eval() for net in conformers(device))
    photos, own, size = [torch.randn(batch, 3, side, side, device=device) for side in sides], [2, 6], (375, 500)

    @torch.inference_mode()
    def plain():
        out = []
        for n in range(batch):
            total = 0
            for photo in photos:
                for mirrored in (False, True):
                    cam, _, attns = bnr.forward(published, photo[n:n + 1].flip(3) if mirrored else photo[n:n + 1])
                    maps = bnr.refined_cam(plain_attention(attns), cam)
                    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
                    total = total + (maps.flip(3) if mirrored else maps)[0].cpu()
            out.append(seeds.normalise(total[own].clamp(min=0)))
        return torch.stack(out)

    def ours():
        on = device.type == "cuda" if amp is None else amp
        maps = bnr.multi_scale(model, photos, None, ["refined"], device, on)["refined"]
        return torch.stack([seeds.combine_scales([scale[n, own] for scale in maps], size) for n in range(batch)])
    return plain, ours


def export(args):
    """Seeds from six passes, Conformer-S; on a GPU ours in half precision, eight photos at a time."""
    cuda = args.device.type == "cuda"
    batch, sides = 8 if cuda else 1, [side * conformer.STRIDE // (2 if args.quick else 1) for side in SCALES]
    what = f"{batch} photos, six passes, {sides[0]} to {sides[-1]}"
    race(args, "export", what, *export_forms(batch, sides, args.device), 8 if cuda else 2, 0.1 if cuda else 1e-3,
         repeats=min(2, args.repeats))
    if not cuda:
        forms = export_forms(batch, sides, args.device, amp=True)
        race(args, "export", "the same, ours with --amp (bf16)", *forms, None, 0.1, repeats=1)
    for side in () if args.quick else (256, 512, 768, 1024):
        form = export_forms(batch, [side], args.device)[1]
        note(args, "export", f"{batch} photos at {side} and mirrored", None, 1000 * median_of(form, args.device), "ms")


def train_forms(batch, side, device):
    """Gradients of eq. 9, Conformer-S, of random images or those given. -> plain, ours"""
    published, model = (net.train() for net in conformers(device))
    noise, labels = torch.randn(batch, 3, side, side, device=device), torch.eye(FOREGROUND, device=device)[[0] * batch]

    def step(net, loss, images):
        torch.manual_seed(1)  # of the drop path
        net.zero_grad()
        value = loss(net, images)
        value.backward()
        # Gradients further back differ by 5 % between two memory formats of one form.
        return value.detach(), net.conv_cls_head.weight.grad

    def plain_loss(net, images):
        cam, z, attns = bnr.forward(net, images)
        attn = plain_attention(attns)
        noisy = bnr.noisy_cam(attn, bnr.refined_cam(attn, cam), len(attns), 1).mean((2, 3))
        return bnr.bnr_loss(bnr.soft_margin_loss(z, labels), bnr.soft_margin_loss(noisy, labels))

    def our_loss(net, images):
        with mixed(device):
            return bnr.losses(net, images, labels, "bnr", 1)[0]
    return (lambda: step(published, plain_loss, noise)), (lambda images=noise: step(model, our_loss, images))


def train(args):
    """A training step of the classifier, and its memory; ours in smaller batches and at other sizes."""
    cuda = args.device.type == "cuda"
    batch, side = (8, 512) if cuda else (1, 128 if args.quick else 512)
    job, goals = (batch, side, args.device), (2 if cuda else None)
    forms = train_forms(*job)
    race(args, "train", f"batch {batch} at {side}, with gradients", *forms, goals, 0.1 if cuda else 1e-3,
         repeats=min(2, args.repeats))
    used = [memory(which, train_forms, *job) for which in (0, 1)]
    note(args, "train", f"batch {batch}, peak memory", *used, "MiB", goal=goals)
    for part in (4, 2, 1):
        if part < batch:
            used = memory(1, train_forms, part, side, args.device)
            note(args, "train", f"micro-batch {part}, peak memory", None, used, "MiB")
    for other in () if args.quick else (256, 768, 1024):
        form = train_forms(batch, other, args.device)[1]
        note(args, "train", f"batch {batch} at {other}", None, 1000 * median_of(form, args.device), "ms")


def loader(args):
    """Training steps whose tensors are ready, and fed by the real loader; a photo's loading in one process."""
    cuda = args.device.type == "cuda"
    batch, side, count = (8, 512, 100) if cuda else (1, 128 if args.quick else 512, 4)
    step = train_forms(batch, side, args.device)[1]
    flags = argparse.Namespace(device=args.device, workers=8, seed=0, batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        for n in range(8):
            picture = toy.toy_picture(np.random.RandomState(n))[0].resize((500, 375))
            picture.save(f"{folder}/{n}.jpg", quality=95)
        prepare = bnr.augment(side, (320, 640))
        images = data.Images(lambda name: f"{folder}/{name}.jpg", [n % 8 for n in range(batch * count)],
                             lambda name, photo: prepare(photo))
        alone = statistics.median(seconds(lambda: images[n % len(images)], torch.device("cpu"))[0] for n in range(24))

        def ready():
            for _ in range(count):
                step()

        def loaded():
            for photos in data.Batches(images, flags).load(0, count):
                step(photos.to(args.device, non_blocking=True))

        ready()
        times = [1000 * seconds(form, args.device)[0] / count for form in (ready, loaded)]
    note(args, "loader", f"batch {batch} at {side}: ready, loaded", *times, "ms", goal=0.9)
    note(args, "loader", "one photo, one process", None, 1000 * alone, "ms")


def bf16(args):
    """What mixed precision changes in the seeds of the run in --out: values scaled to [0, 1], and their best mIoU."""
    record = read_record(args.out, "classifier")
    dataset = data.DataSet(record["data"])
    model, network = bnr.load_classifier(args.out / "classifier.pth", dataset.num_classes, args.device)
    scales = read_record(args.out, "cams")["settings"]["scales"]
    ids = dataset.ids("train")[:8 if args.quick else None]
    largest, means, counts = 0, [], {False: 0, True: 0}
    for name, labels in zip(ids, dataset.labels(ids)):
        photo, own = data.read_image(dataset.image(name)), labels.nonzero()[:, 0]
        sides = bnr.sides(network["crop"], scales)
        photos, found = [data.square(side)(photo)[None].to(args.device) for side in sides], {}
        for amp in (False, True):
            maps = bnr.multi_scale(model, photos, labels[None], ["refined"], args.device, amp)["refined"]
            found[amp] = seeds.combine_scales([scale[0, own] for scale in maps], photo.size[::-1]).numpy()
            if dataset.mask(name).is_file():
                counts[amp] += evaluate.confusion_over_thresholds(
                    data.read_mask(dataset.mask(name)), own.numpy() + 1, found[amp], dataset.num_classes)
        gap = np.abs(found[True] - found[False])
        largest, means = max(largest, gap.max()), [*means, gap.mean()]
    scores = [evaluate.best_threshold(counts[amp])["miou"] for amp in (False, True)]
    note(args, "bf16", f"{len(ids)} seeds, mIoU: float32, bf16", *scores, "%", difference=largest, tolerance=1)
    print(f"mIoU {scores[0]:.2f} and {scores[1]:.2f}; largest difference {largest:.4f}, mean {np.mean(means):.5f}")


def cards(args):
    """Peak memory of the trainings at their published sizes, mixed precision: two steps of the real commands."""
    with tempfile.TemporaryDirectory() as folder:
        root, out, weights = Path(folder, "toy"), Path(folder, "out"), Path(folder, "resnet38.pth")
        torch.save(resnet38.ResNet38().state_dict(), weights)  # with --from-scratch more layers would train
        at = "--data", root, "--out", out, "--device", args.device
        run_process("prepare.py", "toy", "--root", root, "--train", 20, "--val", 0)
        for script, *rest in (("bnr.py", "train", "--epochs", 0), ("bnr.py", "cams"), ("psa.py", "labels")):
            run_process(script, *rest, *at, "--preset", "toy")
        train_aug = root / "ImageSets" / "Segmentation" / "train_aug.txt"
        ids = train_aug.read_text().split()
        at = *at, "--preset", "voc", "--amp", *(("--crop", 64) if args.quick else ())
        resnet = "--resnet38", weights
        for name, batch, script, *rest in (
                ("classifier", 8, "bnr.py", "--from-scratch", "--epochs", 1),
                ("affinitynet", 8, "psa.py", *resnet, "--epochs", 1),
                ("segmenter", 10, "segment.py", *resnet, "--iterations", 2, "--labels", root / "SegmentationClass")):
            for part in (batch, 4, 2, 1):
                train_aug.write_text("\n".join(ids[:2 * part]))
                record = out / f"{name}.json"
                # As with --micro-batch, which keeps the whole batch's photos besides (3 MB each) and takes longer.
                run_process(script, "train", *at, *rest, "--batch-size", part, "--fresh")
                used = json.loads(record.read_text())["peak_gb"]
                note(args, "cards", f"{name}, {part} photos at a time", None, used, "GB")


def optimizer(args):
    """AdamW on Conformer-S's tensors: torch's default loop, and fused."""
    published, model = conformers(args.device)
    steps = []
    for net, fused in ((published, False), (model, True)):
        for p in net.parameters():
            p.grad = 1e-3 * torch.ones_like(p)
        steps.append(torch.optim.AdamW(net.parameters(), 5e-5, weight_decay=5e-4, fused=fused).step)

    def form(net, step):
        step()
        return net.conv1.weight.detach()

    race(args, "optimizer", "AdamW step, 37 M parameters", lambda: form(published, steps[0]),
         lambda: form(model, steps[1]), None, 1e-5)


def median_of(form, device, repeats=2):
    """Seconds of one call, the first left out."""
    return statistics.median([seconds(form, device)[0] for _ in range(1 + repeats)][1:])


def stage_forms(args, batch):
    """Each stage's network at the published sizes. -> stage: (function that makes the form, its photos)"""
    small = 4 if args.quick else 1
    crop, width = 448 // (7 if args.quick else 1), 64 // (16 if args.quick else 1)
    photo = torch.randn(3, 47 * 8 // small, 63 * 8 // small, device=args.device)

    def training(make, count, loss):
        net, photos = resnet38.place(make(), args.device), torch.randn(count, 3, crop, crop, device=args.device)

        def step():
            with mixed(args.device):
                value = loss(net(photos))
            value.backward()
        return step

    def inference(make, run):
        net = resnet38.place(make(), args.device).eval()

        def call():
            with mixed(args.device):
                run(net)
        return call

    def affinity_net():
        return psa.AffinityNet(resnet38.ResNet38(width))

    def deeplab():
        return segment.DeepLab(resnet38.ResNet38(width), 1 + FOREGROUND)

    def affinity_loss(features):
        labels = torch.randint(0, 3, (len(features), *features.shape[2:]), device=args.device)
        return our_affinity_loss(features, labels)

    def segmentation_loss(logits):
        labels = torch.zeros(len(logits), crop, crop, dtype=torch.long, device=args.device)
        return segment.segmentation_loss(logits, labels, labels.numel())

    def walk(net):
        psa.walk_scores(net, photo, torch.rand(2, *photo.shape[1:], device=args.device), 0.42, 14, 128)

    def predict(net):
        scaled = [F.interpolate(photo[None], scale_factor=s)[0] for s in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
        segment.probabilities(net, scaled, photo.shape[1:])

    more = 10 if batch > 1 else 1
    return {
        "train": (lambda: train_forms(batch, 512 // (8 if args.quick else 1), args.device)[1], batch),
        "cams": (lambda: export_forms(batch, [16 * s // small for s in SCALES], args.device)[1], batch),
        "affinity": (lambda: training(affinity_net, batch, affinity_loss), batch),
        "walk": (lambda: inference(affinity_net, walk), 1),
        "segmenter": (lambda: training(deeplab, more, segmentation_loss), more),
        "predict": (lambda: inference(deeplab, predict), 1)}


def stages(args):
    """Time of each stage's network a photo at the published sizes, and what the whole of VOC and COCO would take."""
    cuda, each = args.device.type == "cuda", {}
    for name, (make, photos) in stage_forms(args, 8 if cuda else 1).items():
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        each[name] = median_of(make(), args.device) / photos
        used = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        note(args, "stages", f"{name}, {photos} at a time{used}, a photo", None, 1000 * each[name], "ms")
    for name, images, epochs, val in (("VOC", 10582, 22, 1449), ("COCO", 82081, 10, 40137)):
        counts = {"train": epochs * images, "cams": images, "affinity": 8 * images, "walk": images,
                  "segmenter": 200_000, "predict": val}
        note(args, "stages", f"{name}, all of them", None, sum(each[k] * n for k, n in counts.items()) / 3600, "h")


def main():
    functions = (attention, walk, crf, affinity, sweep, files, confusion, export, optimizer, train, loader, stages,
                 cards, bf16)
    rows = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=rows, default=list(rows)[:-2],
                        help="rows to run (default: all but cards and bf16)")
    parser.add_argument("--out", type=Path, default=Path("out/toy"), help="run of which `bf16` takes the classifier")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each form, less where it takes many seconds")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, no goals")
    parser.add_argument("--device", type=torch.device, default="cpu", help="of the rows of networks")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    print(LINE.format("row", "what", "plain", "ours", "ratio", "goal", "", "difference"))
    for name in args.only:
        try:
            rows[name](args)
        except torch.cuda.OutOfMemoryError:
            note(args, name, "more: out of memory", None, torch.cuda.max_memory_reserved() / 1e9, "GB")
    if DISAGREE:
        sys.exit("plain and ours disagree: " + "; ".join(DISAGREE))


if __name__ == "__main__":
    main()
