"""Every setting that changes a result, in one table: its value in each preset, its type, its meaning.

`voc` and `coco` are the published values (Sec. 4 of the paper; TransCAM, PSA and its DeepLab where that is silent),
`toy` those of the toy set, `small` for some thousand small photos. A result depends on these settings alone.
"""
import argparse
import contextlib
import functools
import math
from pathlib import Path

PRESETS = ("voc", "coco", "toy", "small")


def number(kind, low, high=math.inf, is_open=False):
    """A type of flags: an int or float from `low`, or above it where that is open, to `high`, finite."""
    says = f"{'whole ' if kind is int else ''}number {'above' if is_open else 'of at least'} {low}"
    says += f" and at most {high}" if high < math.inf else ""

    def read(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and value < math.inf and not (is_open and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a {says}")
    return read


whole, real = functools.partial(number, int), functools.partial(number, float)
above = functools.partial(number, float, is_open=True)


def noise_factor(text):
    """ "none" -> None, "2" -> 2.0 """
    return None if text == "none" else above(0)(text)


def word_or_file(text):
    """ "resnet50", which stands for torchvision's file, or a path """
    return text if text == "resnet50" else Path(text)


SWITCH, LIST, RANGE = "--flag or --no-flag", "one or more numbers", "two numbers, the first no greater"
_EVERYWHERE = {
    "seed": ((0,), whole(0, 2 ** 32 - 1), "seed of all random numbers"),
    "amp": ((None, ..., ..., True), SWITCH, "mixed precision (default: on cuda)")}
_TRAINING = {
    "from_scratch": ((False, ..., True), SWITCH, "start without weights"),
    "micro_batch": ((0,), whole(0), "images at a time through the network; 0: the batch")}
_BACKBONE = {  # of AffinityNet and of the segmenter
    "backbone": (("resnet38", ..., ..., "resnet50"), ("resnet38", "resnet50"), "resnet38 is the published one"),
    "resnet38": ((None,), Path, "ResNet-38's ImageNet weights: MXNet's .params, or PSA's .pth"),
    "backbone_weights": ((None,), Path, "file for resnet50 (default: torchvision's)"),
    "width": ((64, ..., 4), whole(1, 256), "channels of ResNet-38's stem"),
    "dropout": ((1.0, ..., 0.0), real(0, 1), "factor on the published dropout rates"),
    "optimizer": (("sgd", ..., "adamw"), ("sgd", "adamw"), "adamw is ours, for short trainings from scratch"),
    "weight_decay": ((5e-4,), real(0), "sgd: not on biases; adamw: on every parameter"),
    **_TRAINING}
_ARCHS = ("nano", "tiny", "small", "base")
_TEST = {
    "scales": (((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), ..., (0.4, 0.5, 0.6), (0.7, 0.9, 1.1)), (LIST, above(0, 8)),
               "of the photo"),
    "crf": ((True,), SWITCH, "refine by the dense CRF")}
SETTINGS = {  # command: {setting: ((voc, coco, toy, small), type, meaning)}; `...` and what is lacking: as voc
    "bnr train": {
        "arch": (("small", ..., "nano"), _ARCHS, "Conformer; small is the paper's"),
        "loss": (("bnr",), ("bnr", "transcam"), "eq. 9, or L_cls alone: TransCAM"),
        "noise": ((1.0,), noise_factor, "factor of eq. 6; none: M* itself in the loss"),
        "pretrained": ((None, ..., ..., "resnet50"), word_or_file,
                       "ImageNet weights: Conformer_ARCH_patch16.pth, or torchvision's ResNet-50 for the convolution "
                       "branch of small; the word resnet50 fetches that"),
        "sharpness": ((60.0, ..., 160.0), real(0), "logit of a token with itself in fresh blocks; 0: uniform"),
        "epochs": ((22, 10, 36, 4), whole(0), "passes over train_aug"),
        "batch_size": ((8, 16, 16, 16), whole(1, 4096), "photos a step"),
        "lr": ((5e-5, ..., 1e-3, 2e-4), above(0), "learning rate of AdamW, constant"),
        "head_lr": ((1.0, ..., ..., 5.0), above(0), "factor on --lr for the two heads"),
        "transformer_lr": ((1.0, ..., ..., 0.1), real(0), "factor on --lr for the transformer branch"),
        "weight_decay": ((5e-4,), real(0), "on every parameter"),
        "crop": ((512, ..., 96, 288), whole(16, 4096), "side of square crops, pixels"),
        "long_side": (((320, 640), ..., (96, 144), (288, 448)), (RANGE, whole(1, 8192)),
                      "range of the longer side, pixels"),
        **_TRAINING},
    "bnr cams": {
        "scales": (((0.5, 1.0, 1.5), ..., (1.0, 1.5, 2.0), (1.0,)), (LIST, above(0, 8)), "of the crop"),
        "batch_size": ((8, ..., ..., 16), whole(1, 4096), "photos at a time"),
        "plain": ((False, ..., True, True), SWITCH, "plain CAMs (M) too"),
        "eigen": ((False,), SWITCH, "Eigen-CAM too"),
        "weights": ((None,), Path, "a TransCAM classifier instead of OUT/classifier/model.pth"),
        "arch": (("small", ..., "nano"), _ARCHS, "of --weights: Conformer"),
        "crop": ((512, ..., 96, 288), whole(16, 4096), "of --weights: side of square crops, pixels")},
    "psa labels": {
        "foreground": ((0.60,), real(0, 1), "seed threshold of sure foreground"),
        "background": ((0.25,), real(0, 1), "seed threshold of sure background")},
    "psa train": {
        "epochs": ((8, ..., ..., 3), whole(0), "passes over train_aug"),
        "batch_size": ((8,), whole(1, 4096), "crops a step"),
        "crop": ((448, ..., 96, 160), whole(16, 4096), "side of square crops, pixels"),
        "lr": ((0.01, ..., 3e-3), above(0), "learning rate; falls as (1 - i/max)^0.9"),
        "momentum": ((5e-4,), real(0, 1), "momentum of SGD; the published code passes the weight decay here"),
        **_BACKBONE},
    "psa walk": {
        "background_score": ((0.42,), real(0, 1), "constant map of background"),
        "beta": ((14.0,), above(0), "power of the affinities (PSA: 8)"),
        "log_steps": ((7, ..., 5), whole(0, 10), "the walk has 2^n steps (PSA: 8); at 10 it has long converged")},
    "segment train": {
        "iterations": ((20000, ..., 1000, 1500), whole(0), "optimizer steps"),
        "batch_size": ((10, ..., 8, 8), whole(1, 4096), "crops a step"),
        "crop": ((448, ..., 96, 224), whole(16, 4096), "side of square crops, pixels"),
        "lr": ((1e-3, ..., 3e-3), above(0), "learning rate; falls as (1 - i/(max+1))^0.9"),
        "scale_range": (((0.5, 1.5), ..., (0.4, 0.6), (0.7, 1.1)), (RANGE, above(0, 8)), "of the photo, in training"),
        "freeze_bn": ((False, ..., ..., True), SWITCH, "keep the backbone's BatchNorm: for small batches, short runs"),
        "head_std": ((0.0, ..., ..., 0.01), real(0),
                     "deviation of new convolutions' weights; 0: Kaiming, published; 0.01 suits short runs"),
        "train_list": (("train_aug",), str, "list of the photos to train on"),
        "labels": ((None,), Path, "train on this folder of index PNGs instead of OUT/pseudo_labels"),
        **_BACKBONE},
    "segment predict": _TEST, "segment submit": _TEST}


def settings_of(command):
    """-> {setting: (values, type, meaning)} of "script command" """
    return {**_EVERYWHERE, **SETTINGS.get(command, {})}


def defaults(command, preset):
    """-> {setting: value} of "script command" """
    column, settings = PRESETS.index(preset), {}
    for name, (values, *_) in settings_of(command).items():
        settings[name] = values[0] if column >= len(values) or values[column] is ... else values[column]
    return settings
