"""Background noise reduction of attention maps (BNR): the classifier and its seeds. Equations 1-9 of the paper, Sec. 3.

    python bnr.py train     DATA's photos and image labels -> OUT/classifier.pth
    python bnr.py cams      OUT/classifier.pth             -> OUT/cams/ID.npz, the seeds
    python bnr.py export    OUT/cams                       -> DIR/ID/CLASS.npy, for other people's code

--loss transcam is the baseline (TransCAM), --loss bnr the paper's; --noise 1, 2, none are the columns of Table 5.
"""
import math
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

import data
import engine
import evaluate
import seeds
from commands import Commands, Range, above, add_training_flags, real, whole
from conformer import (ARCHS, HEADS, STRIDE, Conformer, classifier_groups, init_attention, init_identity,
                       rename_resnet50)
from resnet38 import fetch
from stage import InputError

SMALL = {"pretrained": "resnet50", "epochs": 4, "batch_size": 16, "lr": 2e-4, "head_lr": 5.0, "transformer_lr": 0.1,
         "crop": 288, "long_side": (288, 448), "scales": (1.0,), "plain": True, "amp": True}  # some thousand photos
PRESETS = {  # defaults that differ from the published VOC setting, which is that of the flags
    "voc": {},
    "coco": {"epochs": 10, "batch_size": 16},
    "toy": {"arch": "nano", "from_scratch": True, "sharpness": 160.0, "epochs": 36, "batch_size": 16, "lr": 1e-3,
            "crop": 96, "long_side": (96, 144), "scales": (1.0, 1.5, 2.0), "plain": True},
    "small": SMALL,
    "warm": {**SMALL, "loss": "transcam"},  # what `small` starts from
}
RESNET50 = "resnet50"  # the word that stands for torchvision's file
SAMPLE = 64  # photos on which a training is watched


# ---------------------------------------------------------------- equations

def class_activation_map(features, weight, bias):
    """Eq. 1: M = head(f). The paper writes a product with w; TransCAM and we use a 3x3 convolution.

    features: (B, C, h, w), weight: (K, C, 3, 3), bias: (K,)  ->  (B, K, h, w)
    """
    return F.conv2d(features, weight, bias, padding=1)


def attention(q, k):
    """Eq. 2: A^{b,h} = softmax(Q K' / sqrt(D/H)). Eqs. 2-5 as written; the run uses `attend`.

    q, k: (B, H, 1+N, D/H)  ->  (B, H, 1+N, 1+N)
    """
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
    """Eqs. 6, 7: M**_s = noise * (A* / blocks) M*_s, the matrix held constant. As written; the run uses `noisy_logits`.

    attn: (B, N, N), refined: M* (B, K, h, w)  ->  (B, K, h, w)
    """
    return noise * torch.einsum("bij,bkj->bki", attn.detach() / blocks, refined.flatten(2)).view_as(refined)


def attend(qks, maps):
    """Eqs. 2-5 in one, A* `maps`, without any N x N matrix: attention whose values are the maps.

    softmax(Q K') V is linear in V, so maps may stand as V: the class token's value 0 drops its column, [1:] its row.

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
    """GAP(M**), eqs. 6 and 7: Ā* M* = `attend` of M* over the number of blocks, with queries and keys held constant.

    qks: list of (q, k), each (B, H, 1+N, D/H); refined: M* (B, K, h, w)  ->  (B, K)
    """
    constant = [(q.detach(), k.detach()) for q, k in qks]
    return noise / len(qks) * attend(constant, refined).mean((2, 3))


def soft_margin_loss(z, labels):
    """Eq. 8: multi-label soft margin loss over the K foreground classes. z, labels: (B, K)  ->  scalar"""
    return -(labels * F.logsigmoid(z) + (1 - labels) * F.logsigmoid(-z)).mean()


def bnr_loss(loss_cls, loss_noisy):
    """Eq. 9: L = L_cls + L_M**, eq. 8 of GAP(M) + Linear(class token) and of GAP(M**). scalars  ->  scalar"""
    return loss_cls + loss_noisy


def forward(model, images):
    """-> M (B, K, h, w), z = GAP(M) + Linear(class token) (B, K), the blocks' queries and keys"""
    features, token, qks = model(images)
    cam = class_activation_map(features, model.conv_cls_head.weight, model.conv_cls_head.bias)
    return cam, cam.float().mean((2, 3)) + model.trans_cls_head(token), qks


def losses(model, images, labels, loss, noise):
    """L_cls alone ("transcam") or with L_M** ("bnr"). noise: the factor of eq. 6; None puts M* itself into the loss.

    images: (B, 3, H, W), labels: (B, K)  ->  the loss, its terms by name
    """
    cam, z, qks = forward(model, images)
    loss_cls = soft_margin_loss(z, labels)
    if loss == "transcam":
        return loss_cls, {"L_cls": loss_cls}
    refined = attend(qks, cam)
    z_noisy = refined.mean((2, 3)) if noise is None else noisy_logits(qks, refined, noise)
    loss_noisy = soft_margin_loss(z_noisy, labels)
    return bnr_loss(loss_cls, loss_noisy), {"L_cls": loss_cls, "L_M**": loss_noisy}


# ---------------------------------------------------------------- train

def augment(crop, long_side):
    """PIL photo -> float32 (3, crop, crop)"""
    return v2.Compose([
        lambda photo: data.random_long_side(photo, *long_side), v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomCrop(crop, pad_if_needed=True, fill=data.MEAN_COLOUR),
        data.to_tensor()])


def fits(arch):
    """How a message ends that tells which weight file fits."""
    return ": no file is published for nano" if arch == "nano" else f": Conformer_{arch}_patch16.pth fits"


def start_classifier(arch, num_labels, pretrained=None, sharpness=60.0):
    """A Conformer with the weights of a file, but for its heads; transformer blocks that stay fresh start sharp.

    pretrained: Conformer's or torchvision's ResNet-50's file, or "resnet50", which fetches that
    """
    model = Conformer(arch, num_labels)
    fresh = list(model.state_dict())
    if pretrained:
        path = fetch(pretrained) if pretrained == RESNET50 else pretrained
        state = engine.read_weights(path, fits(arch))
        state = state.get("model", state)
        is_resnet50 = "layer1.0.conv1.weight" in state
        state = rename_resnet50(state) if is_resnet50 else state
        fresh = engine.load_weights(model, state, path, HEADS, partial=is_resnet50, hint=fits(arch))
        if is_resnet50:
            init_identity(model, fresh)
    for name, block in model.blocks():
        if sharpness and f"{name}.attn.qkv.weight" in fresh:
            init_attention(block, sharpness)
    return model


def train(args):
    """Train the classifier (Sec. 3.3) -> OUT/classifier.pth"""
    if args.crop % STRIDE:
        raise stage.FlagError(f"--crop {args.crop} is no multiple of {STRIDE}")
    dataset = data.DataSet(args.data)
    if args.from_scratch and isinstance(args.pretrained, Path):
        raise stage.FlagError(f"--from-scratch does not read {args.pretrained}: add --no-from-scratch, or leave it out")
    if not (args.pretrained or args.from_scratch):
        raise InputError("no weights: CONFORMER=FILE (--pretrained) takes a file of github.com/pengzhiliang/Conformer"
                         f"{fits(args.arch)}; resnet50 fetches torchvision's; FROM_SCRATCH=1 starts without")
    ids = dataset.ids("train_aug")
    labels, prepare = dict(zip(ids, dataset.labels(ids))), augment(args.crop, args.long_side)
    batches = data.Batches(data.Images(dataset.image, ids, lambda name, photo: (prepare(photo), labels[name])), args)
    run = stage.Stage(args, "classifier", data=dataset.digest, grows="epochs",
                      fits={"pretrained": fits(args.arch)})
    if run.is_done():
        return
    pretrained = None if args.from_scratch else args.pretrained
    model = start_classifier(args.arch, len(dataset.classes), pretrained, args.sharpness)
    model = model.to(args.device, memory_format=torch.channels_last)
    run.start()
    groups = classifier_groups(model, args.lr, args.head_lr, args.transformer_lr)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    sample = watched(dataset, ids, args)

    def loss_of(part, labels):
        loss, terms = losses(model, *part, args.loss, args.noise)
        share = len(part[0]) / len(labels)
        return loss * share, {name: term * share for name, term in terms.items()}

    def watch(step):
        found = {**map_figures(model, sample, args), "map": average_precision(model, dataset, args, first=200)}
        run.record.setdefault("watched", {})[str(step)] = found
        mean = {name: np.mean(value) for name, value in found.items() if value is not None}
        engine.tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in mean.items()))

    network = {"arch": args.arch, "classes": dataset.classes, "crop": args.crop}
    engine.fit(run, model, optimizer, batches, loss_of, args.epochs * batches.per_epoch, network, watch=watch)
    engine.finish(run, map=average_precision(model, dataset, args) if stage.RANK == 0 else None)


@torch.inference_mode()
def average_precision(model, dataset, args, first=None):
    """Mean average precision of the image labels on (the first photos of) val, at the crop's size; None without val."""
    ids = dataset.ids("val", required=False)[:first]
    if not ids:
        return None
    scores, prepare = [], data.square(args.crop)
    model.eval()
    images = data.Images(dataset.image, ids, lambda name, photo: prepare(photo))
    for photos in data.loader(images, args, batch_size=args.batch_size):
        with engine.autocast(args.device, args.amp):
            scores.append(forward(model, photos.to(args.device))[1].cpu())
    return evaluate.mean_average_precision(torch.cat(scores), dataset.labels(ids))


def watched(dataset, ids, args):
    """A fixed sample of `train`: (photo (1, 3, crop, crop), classes (k,), mask (crop, crop) or None) each."""
    ids = dataset.ids("train", required=False) or ids
    ids, out = ids[::max(1, len(ids) // SAMPLE)][:SAMPLE], []
    prepare, nearest = data.square(args.crop), v2.Resize((args.crop, args.crop), InterpolationMode.NEAREST)
    for name, labels in zip(ids, dataset.labels(ids)):
        photo, mask = prepare(data.read_image(dataset.image(name)))[None], None
        if dataset.mask(name).is_file():
            mask = nearest(torch.from_numpy(data.read_mask(dataset.mask(name), dataset.num_classes))[None])[0].numpy()
        out.append((photo.to(args.device), labels.nonzero()[:, 0].numpy() + 1, mask))
    return out


@torch.inference_mode()
def map_figures(model, sample, args):
    """What tells early whether a training goes well, on a fixed sample of photos. -> name: mean over them

    entropy: of the attention of each block, 1 is uniform; own_rows: |A* - 1 m'|^2 / |A*|^2, m the mean row, 0 where all
    places look at the same ones; object_area: share of the places that lie on objects; object_attention: what share of
    their attention these places pay to each other; plain, refined: best mIoU (%) of M and M* at one scale, and where.
    """
    model.eval()
    found = {"entropy": [], "own_rows": [], "object_area": [], "object_attention": []}
    counts = {"plain": 0, "refined": 0}
    for photo, classes, mask in sample:
        with engine.autocast(args.device, args.amp):
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
            found_seeds = seeds.combine_scales([maps[0, classes - 1].cpu()], mask.shape).numpy()
            counts[name] += evaluate.confusion_over_thresholds(mask, classes, found_seeds, cam.shape[1] + 1)
    found = {name: torch.stack(values).mean(0).tolist() if values else None for name, values in found.items()}
    for name, matrices in counts.items():
        best = evaluate.best_threshold(matrices) if np.ndim(matrices) else {"miou": None, "best": None}
        found[name], found[f"{name}_threshold"] = best["miou"], best["best"]
    return found


# ---------------------------------------------------------------- cams

def load_classifier(path, num_classes, device, arch="small", crop=512, hint=""):
    """OUT/classifier.pth, or a TransCAM classifier of this arch. -> the network, {"arch", "crop"}"""
    state, network = engine.read_trained(path, hint, {"arch": arch, "crop": crop})
    return build_classifier(state, network, num_classes, path, device, hint), network


def build_classifier(state, network, num_classes, path, device, hint=""):
    """The network of `engine.read_trained`, with the tensors of the file at `path`."""
    model = Conformer(network["arch"], num_classes - 1)
    if isinstance(state, dict):  # TransCAM's heads have an unused background class in row 0
        heads = {k: v for k, v in state.items() if str(k).startswith(HEADS) and isinstance(v, torch.Tensor)}
        state = {**state, **{k: v[1:] for k, v in heads.items() if v.shape[:1] == (num_classes,)}}
    engine.load_weights(model, state, path, hint=hint)
    return model.to(device, memory_format=torch.channels_last).eval()


def sides(crop, scales):
    """Of the squares that a photo is seen as, pixels: the crop times each scale, whole places of the transformer."""
    return [max(STRIDE, round(crop * scale / STRIDE) * STRIDE) for scale in scales]


@torch.inference_mode()
def multi_scale(model, images, labels, names, device, amp):
    """M*, M, Eigen-CAM (`names`: refined, plain, eigen) of a batch at several scales, mirror images added (Sec. 4.2).

    images: list of (B, 3, s, s), labels: (B, K)  ->  {name: list of (B, K or 1, s/16, s/16)}
    """
    maps = {name: [] for name in names}
    for photos in images:
        with engine.autocast(device, amp):
            features, _, qks = model(torch.cat([photos, photos.flip(3)]))
            cam = class_activation_map(features, model.conv_cls_head.weight, model.conv_cls_head.bias)
        found = {"refined": attend(qks, cam), "plain": cam.float()}
        if "eigen" in names:
            own = labels.repeat(2, 1).bool()
            found["eigen"] = torch.stack([
                seeds.eigen_cam(f.float(), c.float()[k])[None] for f, c, k in zip(features.cpu(), cam.cpu(), own)])
        for name in names:
            straight, mirrored = found[name].chunk(2)
            maps[name].append((straight + mirrored.flip(3)).cpu())
    return maps


def cams(args):
    """Export the seeds of every photo that a later stage reads -> OUT/cams/ID.npz"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids(args.split) if args.split else dataset.ids_of_seeds()
    of_file = () if args.weights else ("arch", "crop")  # what the classifier of the run knows itself
    hint = f": a TransCAM classifier on Conformer-{args.arch} fits" if args.weights else ""
    run = stage.Stage(args, "cams", reads=() if args.weights else ("classifier",), data=dataset.digest,
                      ignore=("batch_size", "seed", *of_file), fits={"weights": hint})
    todo = run.todo(ids, ".npz")
    if run.is_done(todo):
        return
    model, network = load_classifier(args.weights or args.out / "classifier.pth", dataset.num_classes, args.device,
                                     args.arch, args.crop, hint)
    known = network.get("classes", dataset.classes)  # TransCAM's file names none
    if known != dataset.classes:
        raise InputError(f"the classifier knows {' '.join(known)}, {dataset.root} has {' '.join(dataset.classes)}")
    todo = engine.share(run, todo)
    sizes = sides(network["crop"], args.scales)
    labels = dict(zip(ids, dataset.labels(ids)))
    names = ["refined"] + ["plain"] * (args.plain or args.eigen) + ["eigen"] * args.eigen

    def item(name, photo):
        return name, photo.size[::-1], [data.square(side)(photo) for side in sizes]

    with engine.bar(len(todo), "seeds") as progress:
        for found, heights_widths, images in data.loader(data.Images(dataset.image, todo, item), args,
                                                         batch_size=args.batch_size):
            full = [n % len(found) for n in range(args.batch_size)]  # a short batch is filled up, for the same bytes
            of_batch = torch.stack([labels[found[n]] for n in full])
            maps = multi_scale(model, [x[full].to(args.device) for x in images], of_batch, names, args.device, args.amp)
            for n, name in enumerate(found):
                own = labels[name].nonzero()[:, 0]
                size = [int(side[n]) for side in heights_widths]
                chosen = {kind: [(scale[n] if kind == "eigen" else scale[n, own]).numpy() for scale in scales]
                          for kind, scales in maps.items()}
                seeds.write_seeds(run.folder / f"{name}.npz", own.numpy() + 1, size, **chosen)
            progress.update(len(found))
    engine.finish(run)


def noise_factor(text):
    """ "none" -> None, "2" -> 2.0 """
    return None if text == "none" else above(0)(text)


def main():
    commands = Commands(__doc__, PRESETS)
    both = commands.add(train, "train the classifier"), commands.add(cams, "export the seeds")
    for parser, of in zip(both, ("", "of --weights: ")):  # a classifier of ours knows its own
        parser.add_argument("--arch", choices=ARCHS, default="small", help=f"{of}Conformer; small is the paper's")
        parser.add_argument("--crop", type=whole(STRIDE, 4096), default=512, help=f"{of}side of square crops, pixels")
        parser.add_argument("--batch-size", type=whole(1, 4096), default=8, help="photos a step")
    parser = both[0]
    parser.add_argument("--loss", choices=("bnr", "transcam"), default="bnr", help="eq. 9, or L_cls alone: TransCAM")
    parser.add_argument("--noise", type=noise_factor, default=1.0, help="factor of eq. 6; none: M* itself in the loss")
    parser.add_argument("--pretrained", type=lambda text: text if text == RESNET50 else Path(text),
                        help="ImageNet weights: Conformer_ARCH_patch16.pth, or torchvision's ResNet-50, for the "
                             "convolution branch of small; the word resnet50 fetches that")
    add_training_flags(parser)
    parser.add_argument("--sharpness", type=real(0), default=60.0,
                        help="logit a token gives itself in fresh blocks; 0: uniform start")
    parser.add_argument("--epochs", type=whole(0), default=22, help="passes over train_aug")
    parser.add_argument("--lr", type=above(0), default=5e-5, help="of AdamW, constant")
    parser.add_argument("--head-lr", type=above(0), default=1.0, help="factor on --lr for the two heads")
    parser.add_argument("--transformer-lr", type=real(0), default=1.0, help="factor on --lr for the transformer branch")
    parser.add_argument("--weight-decay", type=real(0), default=5e-4, help="on every parameter")
    parser.add_argument("--long-side", type=whole(1, 8192), nargs=2, action=Range, default=(320, 640),
                        help="range of the longer side, pixels")
    parser = both[1]
    parser.add_argument("--weights", type=Path, help="a TransCAM classifier instead of OUT/classifier.pth")
    parser.add_argument("--split", help="list to export (default: all photos that later stages read)")
    parser.add_argument("--scales", type=above(0, 8), nargs="+", default=(0.5, 1.0, 1.5), help="of the crop")
    parser.switch("--plain", "plain CAMs (M) too")
    parser.switch("--eigen", "Eigen-CAM too")
    parser = commands.add(seeds.export, "our seeds for other people's code", card=False)
    parser.add_argument("--to", type=Path, required=True, help="folder to write ID/CLASS.npy into")
    commands.run()


if __name__ == "__main__":
    main()
