"""Scores: metrics, and one table of every stage found in OUT against the masks.

    python evaluate.py --data DIR --out OUT           -> OUT/results.json
    python evaluate.py --data DIR --masks FOLDER      anybody's index PNGs; --seeds FOLDER class maps
"""
import math
import zlib
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
import torch

import data
import engine
import seeds
from commands import Commands
from data import VOID
from stage import STAGES, InputError

THRESHOLDS = np.arange(60, dtype=np.float32) / 100  # of the seeds: 0.00 ... 0.59 (TransCAM)
RESULTS = {"data": str, "classes": list, "rows": list, "devices": list, "precision": dict, "seconds": dict,
           "settings": dict}
POOL_FROM = 1000  # photos: below that a pool of processes takes longer to start than to score


# ---------------------------------------------------------------- metrics

def confusion(mask, prediction, num_classes):
    """Pixel counts; void (255) of either side is left out.

    mask, prediction: uint8 (H, W)  ->  int64 (S, S), S = num_classes, rows the mask's, columns the prediction's
    """
    seen = (mask != 255) & (prediction != 255)
    pairs = mask[seen].astype(np.int64) * num_classes + prediction[seen]
    return np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def iou(matrix):
    """Intersection over union of each class, nan where it is in neither mask nor prediction. (..., S, S) -> (..., S)"""
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    union = matrix.sum(-1) + matrix.sum(-2) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def mean_average_precision(scores, labels):
    """Of the image labels, mean over the classes that occur. scores, labels: (n, K)  ->  float in [0, 1]"""
    found = []
    for score, label in zip(scores.T, labels.T):
        hits = label[score.argsort(descending=True, stable=True)]
        if hits.sum():
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            found.append((precision * hits).sum() / hits.sum())
    return float(torch.stack(found).mean()) if found else math.nan


def confusion_over_thresholds(mask, classes, cams, num_classes):
    """`confusion` of the mask and `seeds.hard_threshold` at all THRESHOLDS, from one joint histogram (60 times faster).

    mask: uint8 (H, W), classes: (k,), cams: float32 (k, H, W) in [0, 1]  ->  int64 (60, S, S)
    """
    seen = mask != VOID
    if len(classes):
        value, winner = torch.from_numpy(cams).max(0)  # numpy's takes ten times as long
        value, label = value.numpy()[seen], classes[winner.numpy()[seen]]
    else:
        value, label = np.full(seen.sum(), -1, np.float32), 0
    reached = np.searchsorted(THRESHOLDS, value, side="right")  # at how many thresholds the pixel is foreground
    bins = (reached * num_classes + mask[seen]) * num_classes + label
    counts = np.bincount(bins, minlength=(len(THRESHOLDS) + 1) * num_classes ** 2)
    counts = counts.reshape(len(THRESHOLDS) + 1, num_classes, num_classes)
    below = counts.cumsum(0)[:-1]  # pixels that are background at each threshold
    out = counts.sum(0) - below
    out[:, :, 0] += below.sum(2)
    return out


def best_threshold(matrices):
    """The threshold of the best mIoU, chosen by looking at the masks, and the whole curve.

    matrices: (60, S, S) at THRESHOLDS  ->  {"best": threshold, "miou": %, "iou": S values, "curve": 60 mIoUs, %}
    """
    each = iou(matrices)  # (60, S)
    curve = 100 * np.nanmean(each, 1)
    best = int(curve.argmax())
    return {"best": round(float(THRESHOLDS[best]), 2), "miou": float(curve[best]), "iou": each[best].tolist(),
            "curve": curve.tolist()}


# ---------------------------------------------------------------- one photo

def _score_seeds(mask_path, folder, name, class_names, kind):
    mask = data.read_mask(mask_path, 1 + len(class_names))
    classes, cams = read_any_seeds(folder, name, class_names, kind)
    if len(classes) and cams.shape[1:] != mask.shape:
        raise InputError(f"the class maps of {name} in {folder} are {cams.shape[1:]}, its mask {mask.shape}")
    return confusion_over_thresholds(mask, classes, cams, 1 + len(class_names))


def read_any_seeds(folder, name, class_names, kind):
    """Our FOLDER/ID.npz, or FOLDER/ID/CLASS.npy of anybody, each (H, W). -> as `seeds.read_seeds`"""
    if (folder / f"{name}.npz").is_file():
        classes, maps = seeds.read_seeds(folder / f"{name}.npz", kind)
        if classes.max(initial=0) > len(class_names):
            raise InputError(f"{folder / name}.npz has class {classes.max()}, but there are {len(class_names)}")
        return classes, maps
    if (folder / f"{name}.npy").is_file():
        raise InputError(f"{folder / name}.npy is not read: a folder {name} with CLASS.npy is wanted. A pickle, which "
                         "can run any code when read, is converted as docs/formats.md says, if you trust it")
    if not (folder / name).is_dir():
        raise InputError(f"no class maps of {name} in {folder}: neither {name}.npz nor {name}/CLASS.npy")
    paths = [folder / name / f"{label}.npy" for label in class_names]
    have = [n for n, path in enumerate(paths) if path.is_file()]
    if stray := sorted(set((folder / name).glob("*.npy")) - set(paths)):  # perhaps a class misspelt
        raise InputError(f"{stray[0]} is of none of the classes {' '.join(class_names)}: rename it, or move it away")
    try:
        maps = [np.load(paths[n], allow_pickle=False).astype(np.float32) for n in have]
        if len({found.shape for found in maps}) > 1:
            raise InputError(f"{folder / name} has class maps of different sizes")
        maps = np.stack(maps) if maps else np.zeros((0, 1, 1), np.float32)
    except seeds.UNREADABLE as error:
        raise InputError(f"cannot read {folder / name}: {error}") from None
    if maps.ndim != 3 or not np.isfinite(maps).all():
        raise InputError(f"{folder / name} has class maps that are not (H, W), or not finite")
    if maps.min(initial=0) < 0 or maps.max(initial=0) > 1:
        raise InputError(f"{folder / name} has class maps from {maps.min():.3g} to {maps.max():.3g}: scale them to "
                         "[0, 1]")
    return np.array(have, np.int64) + 1, maps


def _score_floor(mask_path, name, classes, num_classes):
    """Random maps of the photo's own labels, at THRESHOLDS; last background everywhere. -> (61, S, S)"""
    mask = data.read_mask(mask_path, num_classes)
    maps = np.random.RandomState(zlib.crc32(name.encode())).rand(len(classes), 16, 16)
    cams = seeds.combine_scales([torch.from_numpy(maps).float()], mask.shape).numpy()
    at_random = confusion_over_thresholds(mask, classes, cams, num_classes)
    return np.concatenate([at_random, confusion(mask, np.zeros_like(mask), num_classes)[None]])


def _score_mask(mask_path, path, num_classes):
    """-> (S+1, S+1), the last column what the prediction leaves void"""
    mask = data.read_mask(mask_path, num_classes)
    prediction = data.read_mask(path, num_classes, mask.shape)
    return confusion(mask, np.where(prediction == VOID, num_classes, prediction), num_classes + 1)


# ---------------------------------------------------------------- all photos

def _score(work, jobs, workers, what):
    """Sum of the pixel counts that `work` makes of each job, (mask path, ...)."""
    data.require([path for path, *_ in jobs], "masks")
    return sum(engine.in_processes(work, jobs, workers if len(jobs) >= POOL_FROM else 0, len(jobs), what))


def score_seeds(dataset, ids, folder, workers, kind):
    """-> the values of a row of the table"""
    jobs = [(dataset.mask(name), folder, name, dataset.classes, kind) for name in ids]
    found = best_threshold(_score(_score_seeds, jobs, workers, f"{kind} seeds"))
    return {"threshold": f"{found['best']:.2f} (best)", "crf": "no", **found}


def say_strays(folder, ids):
    """Name what lies beside the class maps of these photos, and that it is not looked at."""
    known, strays = set(ids), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        of = {".npz": name.with_suffix(""), ".npy": name.parent}.get(path.suffix)
        if of is None or of.as_posix() not in known:
            strays.append(path)
    if strays:
        print(f"{len(strays)} files in {folder} are no class maps of these {len(ids)} photos and are left out, "
              f"first {strays[0]}")


def score_floor(dataset, ids, workers):
    """-> the rows of random maps and of background everywhere"""
    own = [labels.nonzero()[:, 0].numpy() + 1 for labels in dataset.labels(ids)]
    jobs = [(dataset.mask(name), name, classes, dataset.num_classes) for name, classes in zip(ids, own)]
    matrices = _score(_score_floor, jobs, workers, "floor")
    random, background = best_threshold(matrices[:-1]), iou(matrices[-1])
    return ({"threshold": f"{random['best']:.2f} (best)", "crf": "no", **random},
            {"iou": background.tolist(), "miou": 100 * float(np.nanmean(background))})


def score_masks(dataset, ids, folder, workers, what, threshold="-", crf="-"):
    jobs = [(dataset.mask(name), folder / f"{name}.png", dataset.num_classes) for name in ids]
    matrix = _score(_score_mask, jobs, workers, what)
    each, coverage = iou(matrix[:-1, :-1]), float(matrix[:, :-1].sum() / max(1, matrix.sum()))
    return {"threshold": threshold, "crf": crf, "iou": each.tolist(), "miou": 100 * float(np.nanmean(each)),
            "coverage": coverage}


def stage_rows(dataset, out, workers, records):
    """A row a stage: scored on the photos that have a file, with a note of what is missing or older than its inputs."""
    splits = {split: dataset.ids(split, required=False) for split in ("train", "val")}
    masks, rows = (dataset.root / "SegmentationClass").is_dir(), []

    def add(row, split, needs, ending, score):
        ids, (what, target) = splits[split], STAGES[needs]
        have = [name for name in ids if stage.is_whole(out / needs / f"{name}{ending}")] if needs in records else []
        row = {"stage": row, "split": split, "n": len(have)}
        if needs in records:
            row.update(of=needs, id=records[needs]["id"])
        if not masks or not ids or not have:
            why = "no masks" if not masks else f"no {split}.txt" if not ids else f"not run: make {target}"
            rows.append({**row, "n": len(ids), "note": why})
            return
        if len(have) < len(ids):
            missing = next(name for name in ids if name not in set(have))
            row["missing"] = f"{len(ids) - len(have)} of {len(ids)} {what} are missing, first {missing}: make {target}"
        if older := stage.is_stale(out, needs):
            row["stale"] = f"older than the {STAGES[older][0]}: make {target}"
        rows.append({**row, **score(have)})

    if classifier := records.get("classifier"):
        entropy = [found["entropy"] for found in (classifier.get("watched") or {}).values() if found["entropy"]]
        rows.append({"stage": "classifier", "of": "classifier", "id": classifier["id"],
                     "split": "val", "n": len(splits["val"]),
                     "note": "mAP" if splits["val"] else "no val.txt", "map": classifier.get("map"),
                     "entropy": float(np.mean(entropy[-1])) if entropy else None})
    if masks and splits["train"]:
        for name, values in zip(("random maps", "background"), score_floor(dataset, splits["train"], workers)):
            rows.append({"stage": name, "split": "train", "n": len(splits["train"]), **values})
    settings = {name: record["settings"] for name, record in records.items()}
    for row, kind in (("plain CAM", "plain"), ("Eigen-CAM", "eigen"), ("refined seeds", "refined")):
        if kind == "refined" or settings.get("cams", {}).get(kind):
            add(row, "train", "cams", ".npz",
                lambda ids, kind=kind: score_seeds(dataset, ids, out / "cams", workers, kind))

    def add_masks(row, split, needs, how):
        add(row, split, needs, ".png",
            lambda ids: score_masks(dataset, ids, out / needs, workers, row, *how(settings[needs])))

    def shown(flags, flag):  # older records may lack it
        return f"{flags[flag]:.2f}" if isinstance(flags.get(flag), float) else "?"

    add_masks("affinity labels", "train", "affinity_labels",
              lambda flags: (f"{shown(flags, 'foreground')}/{shown(flags, 'background')}", "yes"))
    add_masks("pseudo labels", "train", "pseudo_labels",
              lambda flags: (f"bg {shown(flags, 'background_score')}", "yes"))
    add_masks("segmenter", "val", "segmentation", lambda flags: ("-", "yes" if flags.get("crf", True) else "no"))
    return rows


def read_results(out):
    """OUT/results.json, or None where there is none; a row whose stage or what it hangs on was made anew says so."""
    path = out / "results.json"
    if not path.is_file():
        return None
    results = stage.read_json(path, RESULTS)
    for row in results["rows"]:
        if not isinstance(row, dict) or not {"stage", "split"} <= row.keys():
            raise stage.damaged(path)
        name = row.get("of")  # floors, and rows of older files, are of none
        if name not in STAGES or not (record := stage.find_record(out, name)):
            continue
        if record["id"] != row.get("id"):
            row["stale"] = f"scored before the {STAGES[name][0]} was made anew: make eval"
        elif older := stage.is_stale(out, name):
            row["stale"] = f"older than the {STAGES[older][0]}: make {STAGES[name][1]}"
    return results


def evaluate(args):
    """Score every stage found in OUT against the masks, print one table, write OUT/results.json."""
    dataset = data.DataSet(args.data)
    if args.masks or args.seeds:
        ids, rows = dataset.ids(args.split), []
        if args.seeds:
            say_strays(args.seeds, ids)
            found = score_seeds(dataset, ids, args.seeds, args.workers, "refined")
            rows.append({"stage": args.seeds.name, "split": args.split, "n": len(ids), **found})
        if args.masks:
            data.require([args.masks / f"{name}.png" for name in ids], "masks")
            found = score_masks(dataset, ids, args.masks, args.workers, "masks")
            rows.append({"stage": args.masks.name, "split": args.split, "n": len(ids), **found})
        print_table(rows, ["background", *dataset.classes])
        return
    names = [name for name in STAGES if stage.find_record(args.out, name)]
    records = {name: stage.read_json(args.out / f"{name}.json", stage.FINISHED) for name in names}
    if not records:
        raise InputError(f'nothing to score in {args.out}: run "make train"')
    rows = stage_rows(dataset, args.out, args.workers, records)
    if not (dataset.root / "SegmentationClass").is_dir():
        print(f'{dataset.root} has no SegmentationClass: nothing can be scored; "make show" draws the stages')
    each = {}
    for key in ("seconds", "settings", "precision"):
        each[key] = {name: record[key] for name, record in records.items()}
    stage.write_json(args.out / "results.json", {
        "data": dataset.root.resolve().name, "classes": ["background", *dataset.classes], "rows": rows,
        "devices": sorted({record["device"] for record in records.values()}), **each})
    print_table(rows, ["background", *dataset.classes])
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in each["seconds"].items())
    used = ", ".join(sorted(set(each["precision"].values())))
    print(f"precision: {used}; seconds: {seconds} -> {args.out / 'results.json'}")


def _outcome(row):
    """The last column of the table."""
    if row.get("map") is not None:
        return f"{100 * row['map']:7.2f} mAP"
    if "miou" not in row:
        return f"      - ({row['note']})"
    notes = [row[key] for key in ("missing", "stale") if key in row]
    if row.get("coverage", 1) < 1:
        notes.insert(0, f"on the {100 * row['coverage']:.1f} % of pixels that are labelled")
    return f"{row['miou']:7.2f}" + "".join(f" {note};" for note in notes).rstrip(";")


def print_table(rows, classes):
    """The rows of results.json as text, the IoU of each class below."""
    print(f"\n{'stage':16} {'split':6} {'N':>6}  {'threshold':12} {'CRF':4} {'mIoU %':>7}")
    for row in rows:
        how = f"{row.get('threshold', '-'):12} {row.get('crf', '-'):4}"
        print(f"{row['stage']:16} {row['split']:6} {row['n']:6}  {how} {_outcome(row)}")
    if any("best" in row.get("threshold", "") for row in rows):
        print("Thresholds of seeds marked (best) were chosen by looking at the masks, out of 0.00 ... 0.59.")
    print()
    scored = [row for row in rows if "iou" in row]
    if scored:
        print(f"{'IoU %':16}" + "".join(f"{row['stage']:>17}" for row in scored))
        for n, name in enumerate(classes):
            values = [row["iou"][n] for row in scored]
            cells = ["absent" if math.isnan(value) else f"{100 * value:.2f}" for value in values]
            print(f"{name:16}" + "".join(f"{cell:>17}" for cell in cells))
        if any(math.isnan(value) for row in scored for value in row["iou"]):
            print("absent: in neither masks nor predictions, so not part of the mean.")
        print()


def main():
    commands = Commands(__doc__, {"voc": {}, "coco": {}, "toy": {}, "small": {}})
    parser = commands.only(evaluate, card=False)
    parser.add_argument("--masks", type=Path, help="score this folder of index PNGs instead")
    parser.add_argument("--seeds", type=Path, help="score these class maps instead: ID.npz of ours or ID/CLASS.npy")
    parser.add_argument("--split", default="train", help="list that --masks or --seeds is scored on")
    commands.run()


if __name__ == "__main__":
    main()
