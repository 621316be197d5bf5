"""Background noise reduction of attention maps (BNR): the classifier and its seeds. Equations 1-9 of the paper, Sec. 3.

    python bnr.py train     DATA's photos and image labels -> OUT/classifier.pth
    python bnr.py cams      OUT/classifier.pth             -> OUT/cams/ID.npz, the seeds
    python bnr.py show      all stages' files              -> OUT/show.png

--loss transcam is the baseline (TransCAM), --loss bnr the paper's; --noise 1, 2, none are the columns of Table 5: `make results`.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

import data
from conformer import ARCHS, STRIDE, Conformer, init_attention

PRESETS = {  # defaults that differ from the published VOC setting, which is that of the flags
    "voc": {},
    "coco": {"epochs": 10, "batch_size": 16},
    "toy": {"arch": "nano", "from_scratch": True, "sharpness": 160.0, "epochs": 36, "batch_size": 16, "lr": 1e-3, "crop": 96,
            "long_side": (96, 144), "scales": (1.0, 1.5, 2.0), "plain": True},
    "small": {"epochs": 1, "batch_size": 16, "lr": 2e-4, "crop": 128, "long_side": (112, 192), "scales": (1.0,), "plain": True},
}
HEADS = ("conv_cls_head", "trans_cls_head")
CPU_MAPS = 1 << 24  # elements of the largest feature maps of one pass on the CPU: with more of them each photo takes up to a third longer


# ---------------------------------------------------------------- equations

def class_activation_map(features, weight, bias):
    """Eq. 1: M = head(f). The paper writes a product with w; TransCAM and we use a 3x3 convolution.

    features: (B, C, h, w), weight: (K, C, 3, 3), bias: (K,)  ->  (B, K, h, w)
    """
    return F.conv2d(features, weight, bias, padding=1)


def attention(q, k):
    """Eq. 2: A^{b,h} = softmax(Q K' / sqrt(D/H)). q, k: (B, H, 1+N, D/H)  ->  (B, H, 1+N, 1+N)"""
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)


def mean_over_heads(attn):
    """Eq. 3: (B, H, 1+N, 1+N)  ->  (B, 1+N, 1+N)"""
    return attn.mean(1)


def sum_over_blocks(attns):
    """Eq. 4: A* = sum over blocks, without the class token's row and column. list of (B, 1+N, 1+N)  ->  (B, N, N)"""
    return torch.stack(attns).sum(0)[:, 1:, 1:]


def refined_cam(attn, cam):
    """Eq. 5: M*_s = A* M_s. attn: (B, N, N), cam: (B, K, h, w)  ->  (B, K, h, w)"""
    return torch.einsum("bij,bkj->bki", attn, cam.flatten(2)).view_as(cam)


def noisy_cam(attn, refined, blocks, noise):
    """Eqs. 6, 7: M**_s = noise * (A* / blocks) M*_s, the matrix held constant. (B, N, N), (B, K, h, w)  ->  (B, K, h, w)"""
    return noise * refined_cam(attn.detach() / blocks, refined)


def attend(qks, maps):
    """Eqs. 2-5 in one, A* `maps`, without any N x N matrix: attention whose values are the maps, 0 for the class token.

    qks: list of (q, k), each (B, H, 1+N, D/H); maps: (B, K, h, w)  ->  float32 (B, K, h, w)
    """
    B, K, h, w = maps.shape
    width = qks[0][0].shape[-1]
    out = []
    for part in maps.flatten(2).split(width, dim=1):  # torch's fused kernels want values as wide as the queries
        values = F.pad(part.transpose(1, 2), (0, width - part.shape[1], 1, 0)).to(qks[0][0].dtype)  # (B, 1+N, D/H)
        values = values[:, None].repeat(1, qks[0][0].shape[1], 1, 1)  # (B, H, 1+N, D/H)
        total = 0
        for q, k in qks:
            total = total + F.scaled_dot_product_attention(q, k, values)[:, :, 1:, :part.shape[1]].float().mean(1)
        out.append(total.transpose(1, 2))  # (B, up to D/H classes, N)
    return torch.cat(out, dim=1).view(B, K, h, w)


def attention_entropy(qks):
    """Mean entropy of the rows of eq. 2 over that of a uniform row, log(1+N): at 1, M* is a flat average.

    qks: list of (q, k), each (B, H, 1+N, D/H)  ->  (blocks,)
    """
    rows = [torch.special.entr(attention(q.float(), k.float())).sum(-1) for q, k in qks]
    return torch.stack([r.mean() / math.log(r.shape[-1]) for r in rows])


def noisy_logits(qks, refined, noise):
    """GAP(M**), eqs. 6 and 7: `attend` again, this time on M* and with the noise, the mean attention, held constant.

    qks: list of (q, k), each (B, H, 1+N, D/H); refined: M* (B, K, h, w)  ->  (B, K)
    """
    constant = [(q.detach(), k.detach()) for q, k in qks]
    return noise / len(qks) * attend(constant, refined).mean((2, 3))


def soft_margin_loss(z, labels):
    """Eq. 8: multi-label soft margin loss over the K foreground classes. z, labels: (B, K)  ->  scalar"""
    return -(labels * F.logsigmoid(z) + (1 - labels) * F.logsigmoid(-z)).mean()


def bnr_loss(z, z_noisy, labels):
    """Eq. 9: L = L_cls + L_M**. z: GAP(M) + Linear(class token), z_noisy: GAP(M**), labels: (B, K)  ->  scalar"""
    return soft_margin_loss(z, labels) + soft_margin_loss(z_noisy, labels)


def forward(model, images):
    """-> M (B, K, h, w), z = GAP(M) + Linear(class token) (B, K), the blocks' queries and keys"""
    features, token, qks = model(images)
    cam = class_activation_map(features, model.conv_cls_head.weight, model.conv_cls_head.bias)
    return cam, cam.float().mean((2, 3)) + model.trans_cls_head(token), qks


def loss_of(model, images, labels, loss, noise):
    """Eq. 8 alone ("transcam") or eq. 9 ("bnr"). noise: the factor of eq. 6; None puts M* itself into the loss  ->  scalar"""
    cam, z, qks = forward(model, images)
    if loss == "transcam":
        return soft_margin_loss(z, labels)
    refined = attend(qks, cam)
    z_noisy = refined.mean((2, 3)) if noise is None else noisy_logits(qks, refined, noise)
    return bnr_loss(z, z_noisy, labels)


# ---------------------------------------------------------------- train

def augment(args):
    """PIL photo -> float32 (3, crop, crop)"""
    return v2.Compose([
        lambda photo: data.random_long_side(photo, *args.long_side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
        v2.RandomCrop(args.crop, pad_if_needed=True, fill=data.MEAN_COLOUR), data.to_tensor()])


def build(args, num_labels):
    """The classifier with the weights that the flags ask for."""
    if not (args.pretrained or args.from_scratch):
        raise data.InputError(
            f"no weights: CONFORMER=FILE (--pretrained) takes Conformer_{args.arch}_patch16.pth of "
            f"github.com/pengzhiliang/Conformer, FROM_SCRATCH=1 (--from-scratch) starts without")
    model = Conformer(args.arch, num_labels)
    fresh = list(model.state_dict())
    if args.pretrained:
        hint = f": Conformer_{args.arch}_patch16.pth fits" if args.arch != "nano" else ": no file is published for nano"
        state = data.read_weights(args.pretrained, hint)
        hint += "" if args.partial else "; --partial takes a file that lacks tensors"
        fresh = data.load_weights(model, state.get("model", state), args.pretrained, HEADS, args.partial, hint)
    for name, block in model.blocks():
        if args.sharpness and f"{name}.attn.qkv.weight" in fresh:
            init_attention(block, args.sharpness)
    return model.to(args.device, memory_format=torch.channels_last)


def train(args):
    """Train the classifier (Sec. 3.3) -> OUT/classifier.pth"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids("train_aug")
    labels = dict(zip(ids, dataset.labels(ids)))
    if args.crop % STRIDE:
        raise data.InputError(f"--crop {args.crop} is no multiple of {STRIDE}")
    prepare = augment(args)
    images = data.Images(dataset.image, ids, lambda id, image: (prepare(image), labels[id]))
    steps = args.epochs * data.steps_of(images, args)
    stage = data.Stage(args, "classifier")
    if stage.is_done():
        return
    model = build(args, len(dataset.classes))
    if args.recompute:
        data.recompute(model.stages())
    stage.start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    sample = watched(dataset, ids, args)

    def watch(step):
        found = {**figures(model, sample, args), "map": evaluate(model, dataset, args, first=200)}
        stage.record.setdefault("watched", {})[str(step)] = found
        mean = {name: sum(value) / len(value) if isinstance(value, list) else value for name, value in found.items()}
        return ", ".join(f"{name} {value:.3f}" for name, value in mean.items() if value is not None)

    data.fit(stage, model, optimizer, images,
             lambda part, batch: loss_of(model, *part, args.loss, args.noise) * len(part[0]) / len(batch[0]), steps, watch=watch)
    result = evaluate(model, dataset, args)
    if result is not None:
        print(f"mAP on val: {100 * result:.2f} %")
    stage.finish(map=result)


def watched(dataset, ids, args, count=64):
    """A fixed sample of `train`: (photo (1, 3, crop, crop), classes (k,), mask (crop, crop) or None) each."""
    ids = dataset.ids("train", required=False) or ids
    ids, out = ids[::max(1, len(ids) // count)][:count], []
    for id, labels in zip(ids, dataset.labels(ids)):
        mask = dataset.mask(id)
        if mask.is_file():
            mask = torch.from_numpy(data.read_mask_within(mask, dataset.num_classes))[None]
            mask = v2.functional.resize(mask, [args.crop, args.crop], v2.InterpolationMode.NEAREST)[0].numpy()
        else:
            mask = None
        out.append((square(args)(data.read_image(dataset.image(id)))[None].to(args.device), labels.nonzero()[:, 0].numpy() + 1, mask))
    return out


@torch.inference_mode()
def figures(model, sample, args):
    """What tells early whether a training goes well, on a fixed sample of photos. -> name: mean over them

    entropy: of the attention of each block, 1 is uniform; own_rows: |A* - 1 m'|^2 / |A*|^2, m the mean row, 0 where all places
    look at the same ones; object_area: share of the places that lie on objects; object_attention: what share of their attention
    these places give each other; plain, refined: best mIoU (%) of M and M* at one scale, plain_threshold, refined_threshold: where.
    """
    model.eval()
    found, counts = {"entropy": [], "own_rows": [], "object_area": [], "object_attention": []}, {"plain": 0, "refined": 0}
    for photo, classes, mask in sample:
        with data.autocast(args):
            cam, _, qks = forward(model, photo)
        qks, cam = [(q.float(), k.float()) for q, k in qks], cam.float()
        attn = sum_over_blocks([mean_over_heads(attention(q, k)) for q, k in qks])[0]
        found["entropy"].append(attention_entropy(qks))
        found["own_rows"].append((attn - attn.mean(0)).square().sum() / attn.square().sum())
        if mask is None:
            continue
        objects = torch.from_numpy((mask > 0) & (mask != data.VOID)).to(attn.device)
        objects = F.avg_pool2d(objects.float()[None], STRIDE)[0].flatten() >= 0.5
        if objects.any():
            found["object_area"].append(objects.float().mean())
            found["object_attention"].append((attn[objects][:, objects].sum(1) / attn[objects].sum(1)).mean())
        for name, maps in (("plain", cam), ("refined", refined_cam(attn[None], cam))):
            seeds = data.combine_scales([maps[0, classes - 1].cpu()], mask.shape).numpy()
            counts[name] = counts[name] + data.confusion_over_thresholds(mask, classes, seeds, cam.shape[1] + 1)
    found = {name: torch.stack(values).mean(0).tolist() if values else None for name, values in found.items()}
    for name, matrices in counts.items():
        best = data.best_of(matrices) if np.ndim(matrices) else {"miou": None, "threshold": None}
        found[name] = best["miou"]
        found[f"{name}_threshold"] = float(best["threshold"].split()[0]) if best["threshold"] else None
    return found


def square(args):
    """PIL photo -> float32 (3, crop, crop), resized"""
    return v2.Compose([v2.Resize((args.crop, args.crop), v2.InterpolationMode.BICUBIC), data.to_tensor()])


@torch.inference_mode()
def evaluate(model, dataset, args, first=None):
    """Mean average precision of the image labels on (the first photos of) val, resized to the crop; None without a val list."""
    ids = dataset.ids("val", required=False)[:first]
    if not ids:
        return None
    labels, scores = dataset.labels(ids), []
    prepare = square(args)
    model.eval()
    for images in data.loader(data.Images(dataset.image, ids, lambda id, image: prepare(image)), args.batch_size, args):
        with data.autocast(args):
            scores.append(forward(model, images.to(args.device))[1].cpu())
    return data.mean_average_precision(torch.cat(scores), labels)


# ---------------------------------------------------------------- seeds

@torch.inference_mode()
def export(model, images, args):
    """Multi-scale M* (and M) of a batch of equally many photos a scale, mirror images included (Sec. 4.2).

    images: list of (B, 3, s, s)  ->  {"refined": list of (B, K, s/16, s/16), "plain": the same, if asked for}
    """
    maps = {"refined": []} | ({"plain": []} if args.plain else {})
    for photos in images:
        both = torch.cat([photos, photos.flip(3)])
        largest = model.conv_1.conv3.out_channels * both[0, 0].numel() // 16  # of one image, at stride 4
        found = []
        for part in both.split(len(both) if both.is_cuda else max(1, CPU_MAPS // largest)):
            with data.autocast(args):
                cam, _, qks = forward(model, part)
            found.append((attend(qks, cam), cam.float()))
        for name, parts in zip(("refined", "plain"), zip(*found)):
            if name in maps:
                straight, mirrored = torch.cat(parts).chunk(2)
                maps[name].append((straight + mirrored.flip(3)).cpu())
    return maps


def cams(args):
    """Export the seeds of every photo that a later stage reads -> OUT/cams/ID.npz"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids(args.split) if args.split else list(dict.fromkeys(dataset.ids("train_aug") + dataset.ids("train", required=False)))
    stage = data.Stage(args, "cams", reads=() if args.weights else ("classifier",), without=("batch_size", "arch", "crop", "split"))
    todo = stage.todo({id: args.out / "cams" / f"{id}.npz" for id in ids})
    if stage.is_done(todo):
        return
    path = args.weights or args.out / "classifier.pth"
    hint = f": a TransCAM classifier on Conformer-{args.arch} fits" if args.weights else ""
    saved = data.read_weights(path, hint)
    settings = vars(args) if args.weights else saved["settings"]
    model, state = Conformer(settings["arch"], len(dataset.classes)), saved.get("model", saved)
    # TransCAM's heads have an unused background class in row 0.
    state = {k: v[1:] if k.startswith(HEADS) and len(v) == dataset.num_classes else v for k, v in state.items()}
    data.load_weights(model, state, path, hint=hint)
    model = model.to(args.device, memory_format=torch.channels_last).eval()
    if args.compile:
        model.forward = torch.compile(model.forward, dynamic=False)
    labels = dict(zip(ids, dataset.labels(ids)))
    stage.start()
    sizes = [max(STRIDE, round(settings["crop"] * s / STRIDE) * STRIDE) for s in args.scales]
    print(f"photos resized to {', '.join(f'{s}x{s}' for s in sizes)}, each with its mirror image")

    def item(id, image):
        scaled = [v2.functional.resize(image, [s, s], v2.InterpolationMode.BICUBIC) for s in sizes]
        return id, image.size[::-1], [data.to_tensor()(s) for s in scaled]

    with data.Bar(total=len(ids), initial=len(ids) - len(todo), desc="cams", unit="img", writes=args.out / "cams") as bar:
        for names, shapes, images in data.loader(data.Images(dataset.image, todo, item), args.batch_size, args):
            maps = export(model, [x.to(args.device) for x in images], args)
            for n, id in enumerate(names):
                own = labels[id].nonzero()[:, 0]
                data.write_seeds(args.out / "cams" / f"{id}.npz", own.numpy() + 1, [int(side[n]) for side in shapes],
                                 **{name: [scale[n, own].numpy() for scale in scales] for name, scales in maps.items()})
            bar.update(len(names))
    stage.finish()


# ---------------------------------------------------------------- pictures

def heat(photo, classes, maps, colours):
    """The photo, darkened, with each class map in its class's colour. photo: uint8 (3, H, W), maps: (k, H, W) -> the same"""
    grey = 0.35 * photo.float().mean(0, keepdim=True).expand(3, -1, -1)
    if not len(classes):
        return grey.byte()
    value, winner = torch.from_numpy(maps).max(0)
    colour = colours[torch.from_numpy(classes)[winner]].permute(2, 0, 1).float()
    return (grey * (1 - value) + colour * value).clamp(0, 255).byte()


def show(args):
    """Draw photo, ground truth, plain CAM, seed, pseudo label and segmentation in a row for some ids -> OUT/show.png"""
    dataset, out = data.DataSet(args.data), args.out
    data.read_record(out, "cams")
    colours, rows, side = torch.from_numpy(data.palette()), [], args.height
    for id in (args.ids or dataset.ids("train", required=False) or dataset.ids("train_aug"))[:args.first]:
        photo = v2.functional.pil_to_tensor(data.read_image(dataset.image(id)))
        panels = [photo]

        def labelled(path):
            if not path.is_file():
                return torch.full_like(photo, 255)  # a stage that has not run, or not on this photo, stays white
            return data.overlay(photo, data.read_mask(path))

        panels.append(labelled(dataset.mask(id)))
        for name in ("plain", "refined"):
            path = out / "cams" / f"{id}.npz"
            try:
                panels.append(heat(photo, *data.read_seeds(path, name), colours))
            except data.InputError:
                panels.append(torch.full_like(photo, 255))
        panels += [labelled(out / folder / f"{id}.png") for folder in ("pseudo_labels", "segmentation")]
        width = round(side * photo.shape[2] / photo.shape[1])
        rows.append([v2.functional.resize(p, [side, width], antialias=True) for p in panels])
    widest = max(row[0].shape[2] for row in rows)
    panels = [v2.functional.pad(p, [0, 0, widest - p.shape[2], 0], fill=255) for row in rows for p in row]
    grid = make_grid(torch.stack(panels).float() / 255, nrow=6, padding=4, pad_value=1)
    data.write(out / "show.png", lambda file: save_image(grid, file, format="png"))
    print(f"photo | ground truth | plain CAM | seed | pseudo label | segmentation -> {out / 'show.png'}")


def noise_factor(text):
    """"none" -> None, "2" -> 2.0"""
    return None if text == "none" else float(text)


def main():
    commands = data.Commands(__doc__, PRESETS)
    both = commands.add(train, "train the classifier"), commands.add(cams, "export the seeds")
    for parser in both:
        parser.add_argument("--arch", choices=ARCHS, default="small", help="Conformer; small is the paper's")
        parser.add_argument("--crop", type=int, default=512, help="side of the square training crops, pixels")
        parser.add_argument("--batch-size", type=int, default=8, help="photos a step")
    parser = both[0]
    parser.add_argument("--loss", choices=("bnr", "transcam"), default="bnr", help="eq. 9, or the baseline's L_cls alone")
    parser.add_argument("--noise", type=noise_factor, default=1.0, help="factor of eq. 6; none: M* itself in the loss")
    parser.add_argument("--pretrained", type=Path, help="ImageNet weights, Conformer_ARCH_patch16.pth")
    parser.add_argument("--partial", action=argparse.BooleanOptionalAction, default=False, help="--pretrained may lack tensors")
    parser.add_argument("--from-scratch", action=argparse.BooleanOptionalAction, default=False, help="start without weights")
    parser.add_argument("--sharpness", type=float, default=60.0, help="logit a token gives itself in fresh blocks; 0: uniform start")
    parser.add_argument("--epochs", type=int, default=22, help="passes over train_aug")
    parser.add_argument("--lr", type=float, default=5e-5, help="of AdamW, constant")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="on every parameter")
    parser.add_argument("--long-side", type=int, nargs=2, default=(320, 640), help="range of the longer side, pixels")
    data.add_memory_flags(parser)
    parser = both[1]
    parser.add_argument("--weights", type=Path, help="a TransCAM classifier instead of OUT/classifier.pth")
    parser.add_argument("--split", help="list to export, to be scored alone (default: all photos that later stages read)")
    parser.add_argument("--scales", type=float, nargs="+", default=(0.5, 1.0, 1.5), help="of the crop")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=False, help="export plain CAMs (M) too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="torch.compile the network: slower to start, then faster; needs a C++ compiler")
    parser = commands.add(show, "draw all stages of some photos in rows")
    parser.add_argument("--ids", nargs="+", help="photos to draw (default: train, or train_aug without it)")
    parser.add_argument("--first", type=int, default=4, help="only so many of them")
    parser.add_argument("--height", type=int, default=120, help="of a row, pixels")
    commands.run()


if __name__ == "__main__":
    main()
