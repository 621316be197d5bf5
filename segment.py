"""The segmenter: DeepLab-LargeFOV on ResNet-38, trained on the pseudo labels. Sec. 4.2 and 4.3 of the paper.

    python segment.py train     photos, OUT/pseudo_labels  -> OUT/segmenter/model.pth
    python segment.py predict   OUT/segmenter/model.pth    -> OUT/segmentation/ID.png of val
    python segment.py submit    OUT/segmenter/model.pth    -> OUT/results.tar.gz, VOC's test list for its server
    python segment.py predict PHOTO_OR_FOLDER ...          -> OUT/predictions/ID.png and ID_overlay.png, of any photos
"""
import wsss  # noqa: F401, first, so that a package that is missing is named
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from wsss.cli import Commands, run_stage
from wsss.crf import CRF_SCORES, dense_crf
from wsss.data import MEAN_COLOUR, DataSet, Images, jitter_hsv, photos_in, scale_like_opencv, to_tensor
from wsss.masks import VOID, classes_in, contradictions, overlay, read_mask, write_mask
from wsss.pool import autocast, for_each_photo
from wsss.presets import whole
from wsss.resnet38 import FITS, freeze_batch_norm, load_network, make_psa_optimizer, start_network
from wsss.stage import InputError, note_if_older, require, require_same, write
from wsss.training import Batches, falling_rate, fit

MOMENTUM = 0.9
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
    """Cross-entropy at full size, void (255) ignored, divided by the number of labelled pixels in the whole batch.

    logits: (B, S, h, w), labels: (B, H, W), pixels: scalar  ->  scalar
    """
    full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full, labels, ignore_index=VOID, reduction="sum") / max(pixels, 1)


def augment_labelled(photo, label, scale_range, crop):
    """Colour jitter, flip, scale, crop; the photo is padded with the mean colour, the label with void.

    PIL photo, uint8 (H, W)  ->  float32 (3, crop, crop), int64 (crop, crop)
    """
    photo, label = v2.RandomHorizontalFlip()(jitter_hsv(photo), tv_tensors.Mask(label))
    factor = float(torch.empty(()).uniform_(*scale_range))
    photo = scale_like_opencv(v2.functional.pil_to_tensor(photo).float(), factor).round().clamp(0, 255).byte()
    label = tv_tensors.Mask(scale_like_opencv(label[None].float(), factor, "nearest")[0].byte())
    photo = tv_tensors.Image(photo)
    fill = {tv_tensors.Mask: VOID, "others": MEAN_COLOUR}
    photo, label = v2.RandomCrop(crop, pad_if_needed=True, fill=fill)(photo, label)
    return to_tensor()(photo), label.as_subclass(torch.Tensor).long()


def loss_of_pixels(net, part, labels):
    """`segmentation_loss` as `fit` wants it: of a micro-batch, over the labelled pixels of the whole batch."""
    return segmentation_loss(net(part[0]), part[1], (labels != VOID).sum()), {}


def rate_over(iterations):
    """Factor on the learning rate, of the share of steps done: (1 - i / (max + 1))^0.9."""
    return lambda done: falling_rate(done * iterations / (iterations + 1))


def train(args):
    """Train DeepLab on the pseudo labels -> OUT/segmenter/model.pth"""
    dataset = DataSet(args.data)
    ids, folder = dataset.ids(args.train_list), args.labels or args.out / "pseudo_labels"

    def item(name, photo):
        label = read_mask(folder / f"{name}.png", dataset.num_classes, photo.size[::-1])
        return augment_labelled(photo, label, args.scale_range, args.crop)

    batches = Batches(Images(dataset.image, ids, item), args.batch_size, args.seed, args.workers)
    batch_norm = "trained" if args.from_scratch else "frozen" if args.freeze_bn else "published"

    def work(run):
        require([folder / f"{name}.png" for name in ids], "labels", "" if args.labels else ': run "make psa"')
        if args.labels:
            shown = [classes_in(folder / f"{name}.png", dataset.num_classes) for name in ids]
            for line in contradictions(dataset, ids, shown):
                print(f"doubtful: {folder}: {line}")
        net, network = start_network(
            lambda backbone: DeepLab(backbone, dataset.num_classes, batch_norm, args.dropout, args.head_std), args)
        optimizer = make_psa_optimizer(net, NEW, args.lr, args.weight_decay, MOMENTUM, args.optimizer)
        fit(run, net, optimizer, batches, loss_of_pixels, args.iterations, network,
            schedule=rate_over(args.iterations), amp=args.amp, micro_batch=args.micro_batch)

    run_stage(args, "segmenter", work, dataset, reads=() if args.labels else ("pseudo_labels",), hints=FITS)


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


def write_segmentation(path, photo, scores, crf, with_overlay):
    """scores: probabilities (S, H, W), or without the CRF the mask (H, W)"""
    mask = dense_crf(photo, scores.clip(MIN_PROBABILITY, 1), **CRF_SCORES).argmax(0) if crf else scores
    mask = mask.astype(np.uint8)
    write_mask(path, mask)
    if with_overlay:
        picture = v2.functional.to_pil_image(overlay(torch.from_numpy(photo).permute(2, 0, 1), mask, 0.6))
        write(path.with_name(f"{path.stem}_overlay.png"), lambda file: picture.save(file, format="PNG"))


def segment(args, path_of, names, folder, run=None):
    """Run OUT/segmenter/model.pth on photos -> FOLDER/ID.png; outside of a stage with an overlay beside it."""
    normalised = to_tensor()
    net = load_network(args.out, "segmenter", lambda backbone, state: DeepLab(backbone, len(state["cls_conv.bias"])),
                       args.device)

    def item(name, photo):
        return f"{name}.png", np.array(photo), [scale_like_opencv(normalised(photo), factor) for factor in args.scales]

    def compute(file, photo, scaled):
        with autocast(args.device, args.amp):
            scores = probabilities(net, [x.to(args.device) for x in scaled], photo.shape[:2])
        scores = scores if args.crf else scores.argmax(0)
        yield folder / file, photo, scores.cpu().numpy(), args.crf, run is None

    for_each_photo(run, path_of, names, item, compute, write_segmentation, args.device, args.workers)


def segment_list(args, dataset, name, ids, is_part=False):
    def work(run, todo):
        segment(args, dataset.image, todo, run.folder, run)

    run_stage(args, name, work, dataset, reads=("segmenter",), ids=ids, ignore=("seed",), is_part=is_part)


def predict_paths(args):
    """Segment any photos, from no data set -> OUT/predictions/ID.png and ID_overlay.png"""
    folder, is_out = args.out / "predictions", args.out.resolve() in map(Path.resolve, args.paths)
    photos = photos_in(args.paths, leave_out=folder if is_out else args.out)
    if clash := next((name for name in photos if f"{name}_overlay" in photos), None):
        raise InputError(f"{clash}_overlay.png would be a mask and the overlay of {clash}: rename {clash}_overlay")
    require_same(args.out, "segmenter", args.preset)
    note_if_older(args.out, "segmenter")
    if there := [name for name in photos if (folder / f"{name}.png").exists()]:
        print(f"note: {len(there)} masks in {folder} will be overwritten, first {there[0]}.png")
    segment(args, photos.get, list(photos), folder)
    print(f"{len(photos)} photos -> {folder}")


def predict(args):
    """Segment the photos of a list -> OUT/segmentation/ID.png; or given photos and folders -> OUT/predictions/"""
    if args.paths:
        return predict_paths(args)
    dataset = DataSet(args.data)
    ids = [dataset.find_id(name, "--ids") for name in args.ids or ()]
    if not ids:
        or_others = args.split in (None, "train")  # where val or train is missing, train_aug
        ids = dataset.ids(args.split or "val", required=not or_others) or dataset.ids("train_aug")
        ids = ids[:args.first]
    require([dataset.image(name) for name in ids], "photos")
    segment_list(args, dataset, "segmentation", ids, is_part=bool(args.ids or args.first or args.split))


def submit(args):
    """Segment VOC's test list and pack the masks as its evaluation server wants them -> OUT/results.tar.gz"""
    dataset = DataSet(args.data)
    ids = dataset.ids(args.split)
    segment_list(args, dataset, "submission", ids)
    archive = args.out / "results.tar.gz"

    def pack(file):
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name in ids:
                tar.add(args.out / "submission" / f"{name}.png", SUBMISSION / f"{name}.png")

    write(archive, pack)
    print(f"{len(ids)} masks -> {archive}")


def main():
    commands = Commands(__doc__, "segment")
    commands.add(train, "train DeepLab on the pseudo labels")
    parser = commands.add(submit, "masks of VOC's test list, packed for its server")
    parser.add_argument("--split", default="test", help="list in ImageSets/Segmentation")
    parser = commands.add(predict, "segment the photos of a list")
    parser.add_argument("paths", type=Path, nargs="*", help="photos or folders, instead of those of the data set")
    parser.add_argument("--split",
                        help="list in ImageSets/Segmentation (default: val; train_aug where val or train is missing)")
    parser.add_argument("--ids", nargs="+", help="these photos instead of a list")
    parser.add_argument("--first", type=whole(1), help="only so many of the list")
    commands.run()


if __name__ == "__main__":
    main()
