"""The segmenter: DeepLab-LargeFOV on ResNet-38, trained on the pseudo labels. Sec. 4.3 of the paper.

    python segment.py train     OUT/pseudo_labels    -> OUT/segmenter.pth
    python segment.py predict   OUT/segmenter.pth    -> OUT/segmentation/ID.png of val
    python segment.py submit    OUT/segmenter.pth    -> OUT/results.tar.gz, VOC's test list for the evaluation server
    python segment.py predict PHOTO_OR_FOLDER ...    -> OUT/predictions/ID.png and ID_overlay.png, of any photos
"""
import math
import tarfile
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
import engine
from commands import Commands, Range, above, real, whole
from crf import CRF_SCORES, dense_crf
from resnet38 import (FITS, NARROW, add_network_flags, freeze_batch_norm, make_backbone, make_optimizer, place,
                      start_network)
from stage import InputError

PRESETS = {
    "voc": {},
    "coco": {},
    "toy": {**NARROW, "iterations": 1000, "batch_size": 8, "crop": 96, "scale_range": (0.4, 0.6),
            "scales": (0.4, 0.5, 0.6)},
    "small": {"backbone": "resnet50", "freeze_bn": True, "head_std": 0.01, "iterations": 1500, "batch_size": 8,
              "crop": 224, "scale_range": (0.7, 1.1), "scales": (0.7, 0.9, 1.1), "amp": True},
}
NEW = ("conv_fov", "conv_fov2", "cls_conv")
MIN_PROBABILITY = 1e-5  # keeps the unary of the CRF finite
SUBMISSION = Path("results/VOC2012/Segmentation/comp6_test_cls")  # folder in the archive of VOC's server


class DeepLab(nn.Module):
    """DeepLab-LargeFOV. (B, 3, H, W) -> logits (B, S, ceil(H/8), ceil(W/8))

    batch_norm: "published" (batch statistics, running ones with momentum 3e-4, scale and shift fixed), "frozen" (the
    backbone keeps its statistics, the two new ones train as usual) or "trained" (for a backbone without weights).
    head_std: of the new convolutions' weights; 0 is the published Kaiming start, whose first steps upset a backbone.
    """

    def __init__(self, backbone, num_classes, batch_norm="published", dropout=1.0, head_std=0.0):
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
            if head_std:
                nn.init.normal_(conv.weight, std=head_std)
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


def segmentation_loss(logits, labels, pixels):
    """Cross-entropy at full size, void (255) ignored, divided by how many pixels of the whole batch count.

    logits: (B, S, h, w), labels: (B, H, W), pixels: scalar  ->  scalar
    """
    full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=True)
    if torch.are_deterministic_algorithms_enabled():  # cuda has no deterministic loss of maps; of (n, S) it has
        full, labels = full.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
    return F.cross_entropy(full, labels, ignore_index=255, reduction="sum") / max(pixels, 1)


# ---------------------------------------------------------------- train

def jitter_hsv(photo):
    """Random shift of hue by up to 10 of 180, of saturation and value by up to 10 of 255. PIL RGB -> PIL RGB"""
    shift = torch.empty(3).uniform_(-10, 10).numpy() * (256 / 180, 1, 1)  # Pillow's hue has 256 steps
    hsv = np.array(photo.convert("HSV")) + shift
    hsv[..., 0] %= 256
    return Image.fromarray(hsv.clip(0, 255).astype(np.uint8), mode="HSV").convert("RGB")


def scale(image, factor, mode="bicubic"):
    """Both sides times `factor`, as OpenCV's cubic or nearest does it: not antialiased, on the grid of `factor` itself.

    image: float32 (C, H, W)  ->  float32 (C, round(factor H), round(factor W)), at least one pixel each
    """
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    more = math.ceil(1 / factor)  # of the border's pixels, so that the grid reaches the rounded size
    padded = F.pad(image[None], (0, more, 0, more), mode="replicate")
    scaled = F.interpolate(padded, scale_factor=factor, mode=mode, recompute_scale_factor=False)
    return scaled[0, :, :height, :width]


def augment_labelled(photo, label, scale_range, crop):
    """Colour jitter, flip, scale, crop; the photo is padded with the mean colour, the label with void.

    PIL photo, uint8 (H, W)  ->  float32 (3, crop, crop), int64 (crop, crop)
    """
    photo, label = v2.RandomHorizontalFlip()(jitter_hsv(photo), tv_tensors.Mask(label))
    factor = float(torch.empty(()).uniform_(*scale_range))
    photo = scale(v2.functional.pil_to_tensor(photo).float(), factor).round().clamp(0, 255).byte()
    photo, label = tv_tensors.Image(photo), tv_tensors.Mask(scale(label[None].float(), factor, "nearest")[0].byte())
    fill = {tv_tensors.Mask: data.VOID, "others": data.MEAN_COLOUR}
    photo, label = v2.RandomCrop(crop, pad_if_needed=True, fill=fill)(photo, label)
    return data.to_tensor()(photo), label.as_subclass(torch.Tensor).long()


def train(args):
    """Train DeepLab on the pseudo labels -> OUT/segmenter.pth"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids(args.train_list)
    folder = args.labels or args.out / "pseudo_labels"

    def item(name, photo):
        label = data.read_mask(folder / f"{name}.png", dataset.num_classes, photo.size[::-1])
        return augment_labelled(photo, label, args.scale_range, args.crop)

    batches = data.Batches(data.Images(dataset.image, ids, item), args)
    reads = () if args.labels else ("pseudo_labels",)
    run = stage.Stage(args, "segmenter", reads=reads, data=dataset.digest_of(args.train_list), fits=FITS)
    if run.is_done():
        return
    data.require_labels(dataset, ids, folder, "labels", "" if args.labels else 'run "make psa"')
    batch_norm = "trained" if args.from_scratch else "frozen" if args.freeze_bn else "published"
    net, network = start_network(
        lambda backbone: DeepLab(backbone, dataset.num_classes, batch_norm, args.dropout, args.head_std), args)
    run.start()

    def loss_of(part, labels):
        return segmentation_loss(net(part[0]), part[1], (labels != data.VOID).sum()), {}

    engine.fit(run, net, make_optimizer(net, args, NEW, momentum=0.9), batches, loss_of, args.iterations, network,
               schedule=lambda done: (1 - done * args.iterations / (args.iterations + 1)) ** 0.9)
    engine.finish(run)


# ---------------------------------------------------------------- predict

@torch.inference_mode()
def probabilities(net, photos, size):
    """Mean of the logits over scales and mirror images, softmax.

    photos: list of (3, h, w), size: (H, W)  ->  (S, H, W)
    """
    total = 0
    for photo in photos:
        logits = net(torch.stack([photo, photo.flip(2)])).float()
        for to in (photo.shape[1:], size):  # enlarged in two steps, as published
            logits = F.interpolate(logits, to, mode="bilinear", align_corners=True)
        total = total + logits[0] + logits[1].flip(2)
    return torch.softmax(total / (2 * len(photos)), dim=0)


def _write_segmentation(scores, photo_path, path, crf, with_overlay):
    """scores: probabilities (S, H, W), or without the CRF the mask (H, W)"""
    photo = np.array(data.read_image(photo_path))
    mask = dense_crf(photo, scores.clip(MIN_PROBABILITY, 1), **CRF_SCORES).argmax(0) if crf else scores
    mask = mask.astype(np.uint8)
    data.write_mask(path, mask)
    if with_overlay:
        picture = v2.functional.to_pil_image(data.overlay(torch.from_numpy(photo).permute(2, 0, 1), mask, 0.6))
        stage.write(path.with_name(f"{path.stem}_overlay.png"), lambda file: picture.save(file, format="PNG"))


def load_segmenter(path, device):
    """OUT/segmenter.pth -> the network"""
    state, network = engine.read_trained(path)
    net = DeepLab(make_backbone(**network), len(state["cls_conv.bias"]))
    engine.load_weights(net, state, path)
    return place(net, device).eval()


def segment(args, photos, folder, with_overlay=False):
    """Run OUT/segmenter.pth on photos (id: path) and write their masks, FOLDER/ID.png, with an overlay if asked for."""
    net, tensor = load_segmenter(args.out / "segmenter.pth", args.device), data.to_tensor()

    def item(name, photo):
        return name, photo.size[::-1], [scale(tensor(photo), factor) for factor in args.scales]

    def jobs():
        images = data.Images(photos.get, list(photos), item)
        for name, size, scaled in data.loader(images, args, batch_size=None):
            with engine.autocast(args.device, args.amp):
                scores = probabilities(net, [x.to(args.device) for x in scaled], size)
            scores = scores if args.crf else scores.argmax(0)
            yield scores.cpu().numpy(), photos[name], folder / f"{name}.png", args.crf, with_overlay

    for _ in engine.in_processes(_write_segmentation, jobs(), args.workers, len(photos), "segmentation"):
        pass


def predict(args):
    """Segment the photos of a list -> OUT/segmentation/ID.png; or given photos and folders -> OUT/predictions/"""
    if args.paths:
        return predict_paths(args)
    dataset = data.DataSet(args.data)
    if args.ids:
        ids = [data.photo_id(name, "--ids") for name in args.ids]
    else:
        or_others = args.split in (None, "train")  # where val or train is missing, train_aug
        ids = dataset.ids(args.split or "val", required=not or_others) or dataset.ids("train_aug")
        ids = ids[:args.first]
    data.require([dataset.image(name) for name in ids], "photos")
    run = stage.Stage(args, "segmentation", reads=("segmenter",), data=dataset.digest, ignore=("seed",))
    todo = run.todo(ids, ".png")
    if run.is_done(todo):
        return
    todo = engine.share(run, todo)
    segment(args, {name: dataset.image(name) for name in todo}, run.folder)
    engine.finish(run)


def predict_paths(args):
    """Segment any photos, from no data set -> OUT/predictions/ID.png and ID_overlay.png"""
    photos = {}
    for start in args.paths:
        if not (start.is_dir() or start.is_file()):
            raise InputError(f"no photo and no folder {start}")
        for path in data.find_photos(start) if start.is_dir() else [start]:
            name = data.photo_id(path.relative_to(start).as_posix() if start.is_dir() else path.name, start)
            if photos.setdefault(name, path) != path:
                raise InputError(f"two photos would be written as {name}: {photos[name]} and {path}")
    if clash := next((name for name in photos if f"{name}_overlay" in photos), None):
        other = photos[f"{clash}_overlay"]
        raise InputError(f"{other} would be written over the overlay of {photos[clash]}: rename it")
    if not photos:
        raise InputError(f"no photos in {', '.join(map(str, args.paths))}: of {' '.join(data.PHOTOS)}")
    stage.read_record(args.out, "segmenter")
    segment(args, photos, args.out / "predictions", with_overlay=True)
    print(f"{len(photos)} photos -> {args.out / 'predictions'}")


def submit(args):
    """Segment VOC's test list and pack the masks as its evaluation server wants them -> OUT/results.tar.gz"""
    dataset = data.DataSet(args.data)
    ids = dataset.ids(args.split)
    run = stage.Stage(args, "submission", reads=("segmenter",), data=dataset.digest, ignore=("seed",))
    todo = run.todo(ids, ".png")
    if not run.is_done(todo):
        todo = engine.share(run, todo)
        segment(args, {name: dataset.image(name) for name in todo}, run.folder)
        engine.finish(run)
    folder, archive = args.out / "submission", args.out / "results.tar.gz"

    def pack(file):
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name in ids:
                tar.add(folder / f"{name}.png", SUBMISSION / f"{name}.png")

    stage.write(archive, pack)
    print(f"{len(ids)} masks -> {archive}")


def add_test_flags(parser):
    parser.add_argument("--scales", type=above(0, 8), nargs="+", default=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
                        help="of the photo")
    parser.switch("--crf", "refine by the dense CRF", default=True)


def main():
    commands = Commands(__doc__, PRESETS)
    parser = commands.add(train, "train DeepLab on the pseudo labels")
    add_network_flags(parser)
    parser.add_argument("--labels", type=Path, help="train on this folder of index PNGs instead of OUT/pseudo_labels")
    parser.add_argument("--train-list", default="train_aug", help="list of the photos to train on")
    parser.add_argument("--iterations", type=whole(0), default=20000, help="optimizer steps")
    parser.add_argument("--batch-size", type=whole(1, 4096), default=10, help="crops a step")
    parser.add_argument("--lr", type=above(0), default=1e-3, help="of SGD; falls as (1 - i/(max+1))^0.9")
    parser.add_argument("--scale-range", type=above(0, 8), nargs=2, action=Range, default=(0.5, 1.5),
                        help="of the photo, in training")
    parser.switch("--freeze-bn", "keep the backbone's BatchNorm as it is, for small batches and short runs")
    parser.add_argument("--head-std", type=real(0), default=0.0,
                        help="deviation of new convolutions' weights; 0: Kaiming, published; 0.01 suits short runs")
    parser = commands.add(submit, "masks of VOC's test list, packed for its server")
    parser.add_argument("--split", default="test", help="list in ImageSets/Segmentation")
    add_test_flags(parser)
    parser = commands.add(predict, "segment the photos of a list")
    parser.add_argument("paths", type=Path, nargs="*", help="photos or folders, instead of those of the data set")
    parser.add_argument("--split",
                        help="list in ImageSets/Segmentation (default: val; train_aug where val or train is missing)")
    parser.add_argument("--ids", nargs="+", help="these photos instead of a list")
    parser.add_argument("--first", type=whole(1), help="only so many of the list")
    add_test_flags(parser)
    commands.run()


if __name__ == "__main__":
    main()
