"""Plain forms against ours: that both give the same result, and how much less time or memory ours takes.

    python tests/scripts/benchmark.py                                 every row but bf16, a quarter of an hour on a CPU
    python tests/scripts/benchmark.py --only walk crf                 these rows alone
    python tests/scripts/benchmark.py --quick                         smaller sizes, for which no goal is set
    python tests/scripts/benchmark.py --only bf16 --out out/toy       what mixed precision changes in the seeds of a run

The plain form of a row is its equation as the published code (TransCAM's, PSA's) computes it. Both forms take turns
in one process, and the median counts; peak memory is what a form adds in a fresh process. Exit status 1 where they
disagree.
"""
import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import largest_difference, plain_crf  # also puts the repository on the path

import bnr
import conformer
import psa
import segment
from wsss import pool, resnet38, seeds, training
from wsss.crf import CRF_LABELS, crf_from_labels
from wsss.data import DataSet, Images, read_image, square
from wsss.pool import autocast, peak_memory
from wsss.stage import read_record
from wsss.toy import toy_picture

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
    before = peak_memory()
    form()
    return (peak_memory() - before) * 1e9 / 2 ** 20


def memory(*job):
    """`peak` in a fresh process."""
    gc.collect()
    torch.cuda.empty_cache()
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, job)


def plain_attention(attns):
    """Eqs. 3, 4 of every block's A, all kept. list of (B, H, 1+N, 1+N) -> (B, N, N)"""
    return bnr.sum_over_blocks([bnr.mean_over_heads(attn) for attn in attns])


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
    photo = np.array(toy_picture(np.random.RandomState(1))[0].resize((width, height)))
    labels = draw_mask(np.random.RandomState(0), height, width, (0, 8, 15))
    for num_classes, goal, repeats in ((21, 1.7, args.repeats), (81, 4, min(2, args.repeats))):
        def plain():
            return plain_crf(photo, labels, num_classes).argmax(0)

        def ours():
            return crf_from_labels(photo, labels, num_classes, **CRF_LABELS)

        race(args, "crf", f"{height}x{width}, 3 of {num_classes} labels", plain, ours, goal, repeats=repeats)


def draw_mask(rng, height, width, values):
    """A map of these values in blocks of 30 pixels. -> uint8 (height, width)"""
    coarse = np.array(values, np.uint8)[rng.randint(0, len(values), (-(-height // 30), -(-width // 30)))]
    return coarse.repeat(30, 0).repeat(30, 1)[:height, :width]


def our_affinity_loss(features, labels):
    """What psa.py's training computes. features: (B, C, h, w), labels: uint8 (B, h, w) -> scalar"""
    kinds = psa.kinds_of(labels, psa.RADIUS)
    return psa.affinity_loss(psa.affinities(features, psa.RADIUS), kinds, [kind.sum() for kind in kinds])


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
    for block in (module for module in model.modules() if isinstance(module, conformer.Block)):
        conformer.init_attention(block, 60)  # or attention is uniform, and the seed the rounding errors of a constant
    published = copy.deepcopy(model)
    for block in (module for module in published.modules() if isinstance(module, conformer.Block)):
        block.attn.__class__ = PlainAttention
    return published, model.to(memory_format=torch.channels_last)


def mixed(device, amp=None):
    """Autocast as a run has it; amp None: on a GPU"""
    return autocast(device, device.type == "cuda" if amp is None else amp)


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
    with tempfile.TemporaryDirectory() as folder:
        for n in range(8):
            picture = toy_picture(np.random.RandomState(n))[0].resize((500, 375))
            picture.save(f"{folder}/{n}.jpg", quality=95)
        prepare = bnr.augment(side, (320, 640))
        images = Images(lambda name: f"{folder}/{name}.jpg", [n % 8 for n in range(batch * count)],
                        lambda name, photo: prepare(photo))
        alone = statistics.median(seconds(lambda: images[n % len(images)], torch.device("cpu"))[0] for n in range(24))

        def ready():
            for _ in range(count):
                step()

        def loaded():
            shares = training.Batches(images, batch, 0, 8).shares(0, count)
            for photos in pool.loader(images, args.device, 8, batch_sampler=shares):
                step(photos.to(args.device, non_blocking=True))

        ready()
        times = [1000 * seconds(form, args.device)[0] / count for form in (ready, loaded)]
    note(args, "loader", f"batch {batch} at {side}: ready, loaded", *times, "ms", goal=0.9)
    note(args, "loader", "one photo, one process", None, 1000 * alone, "ms")


def bf16(args):
    """What mixed precision changes in the seeds of the run in --out: values scaled to [0, 1]."""
    record = read_record(args.out, "cams")
    dataset, scales = DataSet(record["data"]), record["settings"]["scales"]
    model, network = bnr.load_classifier(args.out, args.device)
    ids, gaps = dataset.ids("train")[:8 if args.quick else None], []
    for name, labels in zip(ids, dataset.labels(ids)):
        photo, own, found = read_image(dataset.image(name)), labels.nonzero()[:, 0], []
        photos = [square(side)(photo)[None].to(args.device) for side in bnr.sides(network["crop"], scales)]
        for amp in (False, True):
            maps = bnr.multi_scale(model, photos, labels[None], ["refined"], args.device, amp)["refined"]
            found.append(seeds.combine_scales([scale[0, own] for scale in maps], photo.size[::-1]))
        gaps.append((found[1] - found[0]).abs())
    largest, mean = max(float(gap.max()) for gap in gaps), statistics.mean(float(gap.mean()) for gap in gaps)
    what = f"{len(ids)} seeds, mean difference"
    note(args, "bf16", what, None, mean, "", difference=largest, tolerance=1)


def median_of(form, device, repeats=2):
    """Seconds of one call, the first left out."""
    return statistics.median([seconds(form, device)[0] for _ in range(1 + repeats)][1:])


def stage_forms(args, batch):
    """Each stage's network at the published sizes. -> stage: (function that makes the form, its photos)"""
    small = 4 if args.quick else 1
    crop, width = 448 // (7 if args.quick else 1), 64 // (16 if args.quick else 1)
    photo = torch.randn(3, 47 * 8 // small, 63 * 8 // small, device=args.device)

    def training(make, count, loss):
        net, photos = resnet38.to_device(make(), args.device), torch.randn(count, 3, crop, crop, device=args.device)

        def step():
            with mixed(args.device):
                value = loss(net(photos))
            value.backward()
        return step

    def inference(make, run):
        net = resnet38.to_device(make(), args.device).eval()

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
    functions = (walk, crf, export, train, loader, stages, bf16)
    rows = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=rows, default=list(rows)[:-1],
                        help="rows to run (default: all but bf16)")
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
