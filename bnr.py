"""Background noise reduction of attention maps (BNR): the classifier and its seeds. Equations 1-9 of the paper, Sec. 3.

    python bnr.py train     DATA's photos and image labels     -> OUT/classifier/model.pth
    python bnr.py cams      OUT/classifier/model.pth           -> OUT/cams/ID.npz, the seeds
    python bnr.py export    OUT/cams                           -> DIR/ID/CLASS.npy, for other people's code

--loss transcam is the baseline (TransCAM), --loss bnr the paper's; --noise 1, 2, none are the columns of Table 5.
"""
import wsss  # noqa: F401, first, so that a package that is missing is named
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from conformer import HEADS, STRIDE, TRANSFORMER, Conformer, file_that_fits, start_classifier
from wsss.cli import Commands, run_stage
from wsss.data import JITTER, MEAN_COLOUR, DataSet, Images, random_long_side, square, to_tensor
from wsss.evaluate import mean_average_precision
from wsss.pool import autocast, for_each_photo
from wsss.seeds import eigen_cam, read_seeds, write_seeds
from wsss.stage import EARLIER, FlagError, InputError, note_if_older, require_same, write
from wsss.training import Batches, fit
from wsss.weights import load_weights, read_trained, read_weights

TRANSCAM_FITS = ": a TransCAM classifier on Conformer-{} fits"  # how a message ends on a weight file


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


def soft_margin_loss(z, labels):
    """Eq. 8: multi-label soft margin loss over the K foreground classes. z, labels: (B, K)  ->  scalar"""
    return -(labels * F.logsigmoid(z) + (1 - labels) * F.logsigmoid(-z)).mean()


def bnr_loss(loss_cls, loss_noisy):
    """Eq. 9: L = L_cls + L_M**, eq. 8 of GAP(M) + Linear(class token) and of GAP(M**). scalars  ->  scalar"""
    return loss_cls + loss_noisy


# ---------------------------------------------------------------- the same, fast: what a run computes

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


def noisy_logits(qks, refined, noise):
    """GAP(M**), eqs. 6 and 7: Ā* M* = `attend` of M* / number of blocks, with queries and keys held constant.

    qks: list of (q, k), each (B, H, 1+N, D/H); refined: M* (B, K, h, w)  ->  (B, K)
    """
    constant = [(q.detach(), k.detach()) for q, k in qks]
    return noise / len(qks) * attend(constant, refined).mean((2, 3))


def forward(model, images):
    """-> M (B, K, h, w), z = GAP(M) + Linear(class token) (B, K), the blocks' queries and keys"""
    features, token, qks = model(images)
    cam = class_activation_map(features, model.conv_cls_head.weight, model.conv_cls_head.bias)
    return cam, cam.float().mean((2, 3)) + model.trans_cls_head(token), qks


def logits(model, images):
    """z, of the image labels. (B, 3, H, W)  ->  (B, K)"""
    return forward(model, images)[1]


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


def augment(crop, long_side):
    """PIL photo -> float32 (3, crop, crop)"""
    return v2.Compose([
        lambda photo: random_long_side(photo, *long_side), v2.RandomHorizontalFlip(),
        v2.ColorJitter(*JITTER), v2.RandomCrop(crop, pad_if_needed=True, fill=MEAN_COLOUR),
        to_tensor()])


def loss_of_images(model, part, labels, loss, noise):
    """`losses` as `fit` wants it: a micro-batch's share of the loss of the whole batch, whose labels are given."""
    total, terms = losses(model, *part, loss, noise)
    weight = len(part[0]) / len(labels)
    return total * weight, {name: term * weight for name, term in terms.items()}


def make_optimizer(model, lr, weight_decay, head_lr=1.0, transformer_lr=1.0):
    """AdamW at one rate (the paper); `head_lr`, `transformer_lr` are factors on it, for parts that start fresh."""
    groups = {1.0: []}
    for name, parameter in model.named_parameters():
        in_transformer = any(part in name for part in TRANSFORMER)
        factor = head_lr if name.startswith(HEADS) else transformer_lr if in_transformer else 1.0
        groups.setdefault(factor, []).append(parameter)
    groups = [{"params": parameters, "lr": lr * factor} for factor, parameters in groups.items() if parameters]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def train(args):
    """Train the classifier (Sec. 3.3) -> OUT/classifier/model.pth"""
    hint = file_that_fits(args.arch)
    if args.crop % STRIDE:
        raise FlagError(f"--crop {args.crop} is not a multiple of {STRIDE}")
    if args.from_scratch and isinstance(args.pretrained, Path):
        raise FlagError(f"--from-scratch does not read {args.pretrained}: FROM_SCRATCH=0 (--no-from-scratch) does")
    if not (args.pretrained or args.from_scratch):
        raise InputError(f"no weights: CONFORMER=FILE, resnet50 (--pretrained), FROM_SCRATCH=1 (--from-scratch){hint}")
    prepare, resize = augment(args.crop, args.long_side), square(args.crop)
    dataset = DataSet(args.data)
    ids, val = dataset.ids("train_aug"), dataset.ids("val", required=False)
    labels, labels_of_val = dict(zip(ids, dataset.labels(ids))), dataset.labels(val)
    images = Images(dataset.image, ids, lambda name, photo: (prepare(photo), labels[name]))
    images_of_val = Images(dataset.image, val, lambda name, photo: resize(photo))
    measured_on = {"map_n": len(val), "map_of": dataset.digest_of("val")}
    batches = Batches(images, args.batch_size, args.seed, args.workers)

    def score(z):
        return {"map": mean_average_precision(z, labels_of_val), **measured_on}

    def work(run):
        pretrained = None if args.from_scratch else args.pretrained
        if pretrained != args.pretrained:
            print(f"note: --from-scratch does not read {args.pretrained}")
        model = start_classifier(args.arch, len(dataset.classes), pretrained, args.sharpness)
        model = model.to(args.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(model, args.lr, args.weight_decay, args.head_lr, args.transformer_lr)
        network = {"arch": args.arch, "classes": dataset.classes, "crop": args.crop}
        fit(run, model, optimizer, batches, partial(loss_of_images, loss=args.loss, noise=args.noise),
            args.epochs * batches.per_epoch, network, amp=args.amp, micro_batch=args.micro_batch,
            validation=(images_of_val, logits, score) if val else None)

    run_stage(args, "classifier", work, dataset, hints={"pretrained": hint})


def load_classifier(out, device, weights=None, **told):
    """The classifier of OUT, or of TransCAM's file `weights`, with arch, crop, classes as `told`. -> network, these"""
    hint = TRANSCAM_FITS.format(told["arch"]) if weights else ""
    state, network = read_weights(weights, hint) if weights else read_trained(out, "classifier")
    network = {**told, **network}
    model = Conformer(network["arch"], len(network["classes"]))
    for name, tensor in state.items():  # TransCAM's heads have an unused background class in row 0
        if name.startswith(HEADS) and len(tensor) == 1 + len(network["classes"]):
            state = {**state, name: tensor[1:]}
    load_weights(model, state, weights or out / "classifier" / "model.pth", hint=hint)
    return model.to(device, memory_format=torch.channels_last).eval(), network


def sides(crop, scales):
    """Sides of the squares that a photo is resized to, pixels: the crop times each scale, whole transformer places."""
    return [max(STRIDE, round(crop * scale / STRIDE) * STRIDE) for scale in scales]


@torch.inference_mode()
def multi_scale(model, images, labels, names, device, amp):
    """M*, M, Eigen-CAM (`names`: refined, plain, eigen) of a batch at several scales (Sec. 4.2), mirror images added.

    images: list of (B, 3, s, s), labels: (B, K)  ->  {name: list of (B, K or 1, s/16, s/16)}
    """
    maps = {name: [] for name in names}
    for photos in images:
        with autocast(device, amp):
            features, _, qks = model(torch.cat([photos, photos.flip(3)]))
            cam = class_activation_map(features, model.conv_cls_head.weight, model.conv_cls_head.bias)
        summands = {"refined": attend(qks, cam), "plain": cam.float()}
        if "eigen" in names:
            with_mirrors = labels.repeat(2, 1).bool()
            summands["eigen"] = torch.stack([
                eigen_cam(f.float(), c.float()[k])[None] for f, c, k in zip(features.cpu(), cam.cpu(), with_mirrors)])
        for name in names:
            straight, mirrored = summands[name].chunk(2)
            maps[name].append((straight + mirrored.flip(3)).cpu())
    return maps


def cams(args):
    """Export the seeds of every photo that a later stage reads -> OUT/cams/ID.npz"""
    dataset = DataSet(args.data)
    ids = dataset.ids(args.split) if args.split else dataset.ids_of_seeds()
    labels = dict(zip(ids, dataset.labels(ids)))
    names = ["refined"] + ["plain"] * (args.plain or args.eigen) + ["eigen"] * args.eigen

    def work(run, todo):
        model, network = load_classifier(args.out, args.device, args.weights, arch=args.arch, crop=args.crop,
                                         classes=dataset.classes)
        if network["classes"] != dataset.classes:
            raise InputError(f"{args.weights} was trained on other classes: {' '.join(network['classes'])}")
        resize = [square(side) for side in sides(network["crop"], args.scales)]

        def item(name, photo):
            return name, *photo.size[::-1], [shrink(photo) for shrink in resize]

        def compute(ids_here, heights, widths, images):
            filled = [n % len(ids_here) for n in range(args.batch_size)]  # seeds must not depend on the batch
            rows = torch.stack([labels[ids_here[n]] for n in filled])
            maps = multi_scale(model, [x[filled].to(args.device) for x in images], rows, names, args.device, args.amp)
            for n, name in enumerate(ids_here):
                classes = labels[name].nonzero()[:, 0]
                chosen = {kind: [(scale[n] if kind == "eigen" else scale[n, classes]).numpy() for scale in scales]
                          for kind, scales in maps.items()}
                yield run.folder / f"{name}.npz", classes.numpy() + 1, (int(heights[n]), int(widths[n])), chosen

        for_each_photo(run, dataset.image, todo, item, compute, write_seeds, args.device, 0, args.batch_size)

    of_weights = () if args.weights else ("arch", "crop")  # our own classifier holds its own
    run_stage(args, "cams", work, dataset, reads=() if args.weights else ("classifier",), ids=ids, ending=".npz",
              ignore=("batch_size", "seed", *of_weights), hints={"weights": TRANSCAM_FITS.format(args.arch)},
              is_part=bool(args.split))


def export(args):
    """Write the seeds of every photo as DIR/ID/CLASS.npy, float32 (H, W) in [0, 1], for other people's code."""
    dataset, folder = DataSet(args.data), args.out / "cams"
    require_same(args.out, "cams", args.preset, dataset)
    if args.to.is_dir() and any(args.to.iterdir()):
        raise InputError(f"{args.to} is not empty: remove it, or take another --to")  # maps of other classes would stay
    note_if_older(args.out, "cams")
    for path in sorted(folder.rglob("[!.]*.npz")):
        if EARLIER in path.parts:  # of a result that is being replaced
            continue
        maps = args.to / path.relative_to(folder).with_suffix("")
        maps.mkdir(parents=True, exist_ok=True)  # also of a photo without classes
        for c, cam in zip(*read_seeds(path)):
            write(maps / f"{dataset.classes[c - 1]}.npy", lambda file, cam=cam: np.save(file, cam))
    print(args.to)


def main():
    commands = Commands(__doc__, "bnr")
    commands.add(train, "train the classifier")
    parser = commands.add(cams, "export the seeds")
    parser.add_argument("--split", help="list to export (default: all photos that later stages read)")
    parser = commands.add(export, "our seeds for other people's code", computes=False)
    parser.add_argument("--to", type=Path, required=True, help="folder to write ID/CLASS.npy into")
    commands.run()


if __name__ == "__main__":
    main()
