"""The segmenter: DeepLab-LargeFOV on ResNet-38, trained on the pseudo labels. Sec. 4.3 of the paper.

    python segment.py train     OUT/pseudo_labels    -> OUT/segmenter.pth
    python segment.py predict   OUT/segmenter.pth    -> OUT/segmentation/ID.png of val
    python segment.py submit    OUT/segmenter.pth    -> OUT/results.tar.gz, VOC's test list for the evaluation server
    python segment.py predict PHOTO_OR_FOLDER ...    -> OUT/predictions/ID.png and ID_overlay.png, of any photos
"""
import argparse
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

import data
from psa import NARROW, add_network_flags, crf_inference, freeze_batch_norm, make_backbone, make_optimizer, place

PRESETS = {
    "voc": {},
    "coco": {},
    "toy": {**NARROW, "iterations": 1000, "batch_size": 8, "crop": 96, "scale_range": (0.4, 0.6), "scales": (0.4, 0.5, 0.6)},
    "small": {**NARROW, "iterations": 1500, "batch_size": 8, "crop": 128, "scale_range": (0.4, 0.8), "scales": (0.4, 0.6, 0.8)},
}
NEW = ("conv_fov", "conv_fov2", "cls_conv")
CRF_SCORES = {"gauss": (3, 3), "bilateral": (32, 13, 10), "steps": 1}  # sxy, compat; sxy, srgb, compat
MIN_PROBABILITY = 1e-5  # keeps the unary of the CRF finite


class DeepLab(nn.Module):
    """DeepLab-LargeFOV. (B, 3, H, W) -> logits (B, S, ceil(H/8), ceil(W/8))

    batch_norm: "published" (batch statistics, running ones with momentum 3e-4, scale and shift fixed), "frozen" (the
    backbone keeps its statistics, the two new ones train as usual) or "trained" (for a backbone without weights).
    """

    def __init__(self, backbone, num_classes, batch_norm="published", dropout=1.0):
        super().__init__()
        self.backbone, self.batch_norm = backbone, batch_norm
        width = backbone.channels[0]  # 512
        self.conv_fov = nn.Conv2d(backbone.channels[2], width, 3, 1, 12, 12, bias=False)
        self.bn_fov = nn.BatchNorm2d(width)
        self.conv_fov2 = nn.Conv2d(width, width, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.5 * dropout)
        self.cls_conv = nn.Conv2d(width, num_classes, 1)
        for conv in (self.conv_fov, self.conv_fov2, self.cls_conv):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.cls_conv.bias)
        if batch_norm == "published":
            freeze_batch_norm(self, statistics=False)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 3e-4
        elif batch_norm == "frozen":
            freeze_batch_norm(backbone)

    def train(self, mode=True):
        super().train(mode)
        if self.batch_norm == "frozen":
            freeze_batch_norm(self.backbone)
        return self

    def forward(self, x):
        x = self.backbone(x)[2]
        x = F.relu(self.bn_fov(self.conv_fov(x)))
        return self.cls_conv(self.dropout(F.relu(self.bn_fov2(self.conv_fov2(x)))))


def segmentation_loss(logits, labels, batch=None):
    """Cross-entropy at full size, void ignored, mean over the batch, of whose labels these may be a part.

    logits: (B, S, h, w), labels: (B, H, W), batch: (B', H, W)  ->  scalar
    """
    full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=True)
    pixels = ((labels if batch is None else batch) != data.VOID).sum().clamp(min=1)
    return F.cross_entropy(full, labels, ignore_index=data.VOID, reduction="sum") / pixels


# ---------------------------------------------------------------- train

def jitter_hsv(photo):
    """Random shift of hue by up to 10 of 180, of saturation and value by up to 10 of 255. PIL RGB -> PIL RGB"""
    shift = torch.empty(3).uniform_(-10, 10).numpy() * (256 / 180, 1, 1)  # Pillow's hue has 256 steps
    hsv = np.array(photo.convert("HSV")) + shift
    hsv[..., 0] %= 256
    return Image.fromarray(hsv.clip(0, 255).astype(np.uint8), mode="HSV").convert("RGB")


def random_scale(photo, label, low, high):
    """Both sides times one random factor: photo bicubic (Pillow, antialiased), label nearest."""
    photo = data.rescale(photo, float(torch.empty(()).uniform_(low, high)))
    return photo, v2.functional.resize(label, photo.size[::-1], InterpolationMode.NEAREST)


def train(args):
    """Train DeepLab on the pseudo labels -> OUT/segmenter.pth"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids("train_aug")
    labels = args.labels or args.out / "pseudo_labels"
    if args.labels:
        data.require([labels / f"{id}.png" for id in ids])
    flip, tensor = v2.RandomHorizontalFlip(), data.to_tensor()
    crop = v2.RandomCrop(args.crop, pad_if_needed=True, fill={tv_tensors.Mask: data.VOID, "others": data.MEAN_COLOUR})

    def item(id, photo):
        label = tv_tensors.Mask(data.read_mask_within(labels / f"{id}.png", dataset.num_classes))
        photo, label = crop(*random_scale(*flip(jitter_hsv(photo), label), *args.scale_range))
        return tensor(photo), label.as_subclass(torch.Tensor).long()

    images = data.Images(dataset.image, ids, item)
    data.steps_of(images, args)
    stage = data.Stage(args, "segmenter", reads=() if args.labels else ("pseudo_labels",))
    if stage.is_done():
        return
    batch_norm = "trained" if args.from_scratch else "frozen" if args.freeze_bn else "published"
    net = place(DeepLab(make_backbone(args), dataset.num_classes, batch_norm, args.dropout), args)
    if args.recompute:
        data.recompute(net.backbone.children())
    stage.start()
    optimizer = make_optimizer(args, net, NEW, momentum=0.9)
    data.fit(stage, net, optimizer, images, lambda part, batch: segmentation_loss(net(part[0]), part[1], batch[1]),
             steps=args.iterations, schedule=lambda done: (1 - done * args.iterations / (args.iterations + 1)) ** 0.9)
    stage.finish()


# ---------------------------------------------------------------- predict

@torch.inference_mode()
def probabilities(net, photos, size):
    """Mean of the logits over scales and mirror images, softmax. photos: list of (3, h, w)  ->  (S, H, W), size = (H, W)"""
    total = 0
    for photo in photos:
        logits = net(torch.stack([photo, photo.flip(2)])).float()
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        total = total + logits[0] + logits[1].flip(2)
    return torch.softmax(total / (2 * len(photos)), dim=0)


def _write_segmentation(scores, photo_path, path, crf, with_overlay):
    photo = np.array(data.read_image(photo_path))
    if crf:
        scores = crf_inference(photo, -np.log(scores.clip(MIN_PROBABILITY, 1)), **CRF_SCORES)
    mask = scores.argmax(0).astype(np.uint8)
    data.write_mask(path, mask)
    if with_overlay:
        picture = v2.functional.to_pil_image(data.overlay(torch.from_numpy(photo).permute(2, 0, 1), mask, 0.6))
        data.write(path.with_name(f"{path.stem}_overlay.png"), lambda file: picture.save(file, format="PNG"))


def segment(args, photos, folder, with_overlay=False):
    """Run OUT/segmenter.pth on photos (id: path) and write their masks, FOLDER/ID.png, each with an overlay if asked for."""
    saved = data.read_weights(args.out / "segmenter.pth")
    trained = argparse.Namespace(**{**saved["settings"], "from_scratch": True})
    net = DeepLab(make_backbone(trained), len(saved["model"]["cls_conv.bias"]))
    data.load_weights(net, saved["model"], args.out / "segmenter.pth")
    net = place(net, args).eval()
    tensor = data.to_tensor()

    def item(id, photo):
        return id, photo.size[::-1], [tensor(data.rescale(photo, s)) for s in args.scales]

    def jobs():
        for id, size, scaled in data.loader(data.Images(photos.get, list(photos), item), None, args):
            with data.autocast(args):
                scores = probabilities(net, [p.to(args.device) for p in scaled], size)
            yield scores.cpu().numpy(), photos[id], folder / f"{id}.png", args.crf, with_overlay

    for _ in data.in_processes(_write_segmentation, jobs(), args.workers, len(photos), "segmentation", folder):
        pass


def predict(args):
    """Segment the photos of a list -> OUT/segmentation/ID.png; or given photos and folders -> OUT/predictions/"""
    if args.paths:
        return predict_paths(args)
    dataset = data.DataSet(args.data)
    ids = args.ids or (dataset.ids(args.split) if args.split else dataset.ids("val", required=False) or dataset.ids("train_aug"))
    stage = data.Stage(args, "segmentation", reads=("segmenter",), without=("split", "paths"))
    paths = {id: args.out / "segmentation" / f"{id}.png" for id in ids[:args.first]}
    todo = stage.todo(paths)
    if stage.is_done(todo):
        return
    stage.start()
    segment(args, {id: dataset.image(id) for id in todo}, args.out / "segmentation")
    stage.finish()


def predict_paths(args):
    """Segment any photos, from no data set -> OUT/predictions/ID.png and ID_overlay.png"""
    photos = {}
    for start in args.paths:
        if not start.exists():
            raise data.InputError(f"no photo and no folder {start}")
        for path in data.find_photos(start) if start.is_dir() else [start]:
            id = data.photo_id(path.relative_to(start).as_posix() if start.is_dir() else path.name)
            if photos.setdefault(id, path) != path:
                raise data.InputError(f"two photos would be written as {id}: {photos[id]} and {path}")
    if not photos:
        raise data.InputError(f"no photos in {', '.join(map(str, args.paths))}: of {' '.join(data.PHOTOS)}")
    data.read_record(args.out, "segmenter")
    segment(args, photos, args.out / "predictions", with_overlay=True)
    print(f"{len(photos)} photos -> {args.out / 'predictions'}")


def submit(args):
    """Segment VOC's test list and pack the masks as its evaluation server wants them -> OUT/results.tar.gz"""
    dataset = data.DataSet(args.data)
    ids, inside = dataset.ids(args.split), Path("results/VOC2012/Segmentation/comp6_test_cls")
    stage = data.Stage(args, "submission", reads=("segmenter",))
    todo, archive = stage.todo({id: args.out / inside / f"{id}.png" for id in ids}), args.out / "results.tar.gz"
    stage.start()
    if todo:
        segment(args, {id: dataset.image(id) for id in todo}, args.out / inside)

    def pack(file):
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for id in ids:
                tar.add(args.out / inside / f"{id}.png", inside / f"{id}.png")

    data.write(archive, pack)
    with tarfile.open(archive) as tar:  # what the server will see
        found = {member.name: Image.open(tar.extractfile(member)) for member in tar}
        for id in ids:
            name = f"{inside}/{id}.png"
            if name not in found or found[name].mode != "P" or found[name].size != data.read_image(dataset.image(id)).size:
                raise data.InputError(f"{archive} lacks a right {name}")
    stage.finish()
    print(f"{len(found)} masks -> {archive}")


def add_test_flags(parser):
    parser.add_argument("--scales", type=float, nargs="+", default=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), help="of the photo")
    parser.add_argument("--crf", action=argparse.BooleanOptionalAction, default=True, help="refine by the dense CRF")


def main():
    commands = data.Commands(__doc__, PRESETS)
    parser = commands.add(train, "train DeepLab on the pseudo labels")
    add_network_flags(parser)
    parser.add_argument("--labels", type=Path, help="train on this folder of index PNGs instead of OUT/pseudo_labels")
    parser.add_argument("--iterations", type=int, default=20000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=10, help="crops a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="of SGD; falls as (1 - i/(max+1))^0.9")
    parser.add_argument("--scale-range", type=float, nargs=2, default=(0.5, 1.5), help="of the photo, in training")
    parser.add_argument("--freeze-bn", action=argparse.BooleanOptionalAction, default=False,
                        help="keep the backbone's BatchNorm as it is, for small batches and short runs")
    parser = commands.add(submit, "masks of VOC's test list, packed for its server")
    parser.add_argument("--split", default="test", help="list in ImageSets/Segmentation")
    add_test_flags(parser)
    parser = commands.add(predict, "segment the photos of a list")
    parser.add_argument("paths", type=Path, nargs="*", help="photos or folders, instead of those of the data set")
    parser.add_argument("--split", help="list in ImageSets/Segmentation (default: val, or train_aug without it)")
    parser.add_argument("--ids", nargs="+", help="these photos instead of a list")
    parser.add_argument("--first", type=int, help="only so many of them")
    add_test_flags(parser)
    commands.run()


if __name__ == "__main__":
    main()
