"""Scores: metrics, and one table of every stage found in OUT against the masks.

    python -m wsss.evaluate --data DIR                     -> OUT/results.json
    python -m wsss.evaluate --data DIR --masks FOLDER      anybody's index PNGs; or --class-maps FOLDER
"""
import math
from pathlib import Path

import numpy as np
import torch

from wsss.cli import Commands
from wsss.data import DataSet
from wsss.masks import VOID, contradictions, read_mask
from wsss.pool import in_processes
from wsss.seeds import read_seeds
from wsss.stage import STAGES, InputError, find_record, is_whole, older_than, read_json, require, write_json

THRESHOLDS = np.arange(60, dtype=np.float32) / 100  # of the seeds: 0.00 ... 0.59 (TransCAM)


def confusion(mask, prediction, num_classes):
    """Pixel counts; void (255) of either side is left out.

    mask, prediction: uint8 (H, W)  ->  int64 (S, S), S = num_classes, rows the mask's, columns the prediction's
    """
    valid = (mask != 255) & (prediction != 255)
    pairs = mask[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def iou(matrix):
    """Intersection over union of each class, nan where it is in neither mask nor prediction. (..., S, S) -> (..., S)"""
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    union = matrix.sum(-1) + matrix.sum(-2) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def mean_average_precision(scores, labels):
    """Of the image labels, mean over the classes that occur. scores, labels: (n, K)  ->  float in [0, 1]"""
    averages = []
    for score, label in zip(scores.T, labels.T):
        hits = label[score.argsort(descending=True, stable=True)]
        if hits.sum():
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            averages.append((precision * hits).sum() / hits.sum())
    return float(torch.stack(averages).mean()) if averages else float("nan")


def confusion_over_thresholds(mask, classes, cams, num_classes):
    """`confusion` of the mask and `seeds.hard_threshold` at all THRESHOLDS, from one joint histogram (60 times faster).

    mask: uint8 (H, W), classes: (k,), cams: float32 (k, H, W) in [0, 1]  ->  int64 (60, S, S)
    """
    valid = mask != VOID
    if len(classes):
        value, winner = torch.from_numpy(cams).max(0)  # numpy's takes ten times as long
        value, label = value.numpy()[valid], classes[winner.numpy()[valid]]
    else:
        value, label = np.full(valid.sum(), -1, np.float32), 0
    reached = np.searchsorted(THRESHOLDS, value, side="right")  # at how many thresholds the pixel is foreground
    bins = (reached * num_classes + mask[valid]) * num_classes + label
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


def read_any_seeds(folder, name, class_names, kind):
    """Our FOLDER/ID.npz, or FOLDER/ID/CLASS.npy of anybody, each (H, W). -> as `read_seeds`"""
    if (folder / f"{name}.npz").is_file():
        classes, maps = read_seeds(folder / f"{name}.npz", kind)
        if classes.max(initial=0) > len(class_names):
            raise InputError(f"{folder / name}.npz has class {classes.max()}, but there are {len(class_names)}")
        return classes, maps
    if not (folder / name).is_dir():
        raise InputError(f"no class maps of {name} in {folder}: neither {name}.npz nor {name}/CLASS.npy")
    paths = [folder / name / f"{label}.npy" for label in class_names]
    have = [n for n, path in enumerate(paths) if path.is_file()]
    if stray := sorted(path for path in (folder / name).glob("[!.]*.npy") if path not in paths):  # a class misspelt?
        raise InputError(f"{stray[0]} is not of one of the classes {' '.join(class_names)}: rename it, or move it away")
    try:
        maps = [np.load(paths[n], allow_pickle=False).astype(np.float32) for n in have]
        maps = np.stack(maps) if maps else np.zeros((0, 1, 1), np.float32)
    except Exception as error:  # numpy raises many kinds
        raise InputError(f"cannot read {folder / name}: {error}") from None
    if maps.ndim != 3 or not (maps.min(initial=0) >= 0 and maps.max(initial=0) <= 1):  # of nan neither is
        raise InputError(f"{folder / name} has class maps that are not (H, W) in [0, 1]")
    return np.array(have, np.int64) + 1, maps


def score_class_maps(mask_path, folder, name, class_names, kind):
    mask = read_mask(mask_path, 1 + len(class_names))
    classes, cams = read_any_seeds(folder, name, class_names, kind)
    if len(classes) and cams.shape[1:] != mask.shape:
        raise InputError(f"the class maps of {name} in {folder} are {cams.shape[1:]}, its mask {mask.shape}")
    return confusion_over_thresholds(mask, classes, cams, 1 + len(class_names))


def score_mask(mask_path, path, num_classes):
    """-> (1, S+1, S+1), the last column what the prediction leaves void"""
    mask = read_mask(mask_path, num_classes)
    prediction = read_mask(path, num_classes, mask.shape)
    return confusion(mask, np.where(prediction == VOID, num_classes, prediction), num_classes + 1)[None]


class Scorer:
    """Scores photos of a data set, a row of the table each time; remembers what their masks show.

    presence: {photo: bool (S,), the classes in its mask}
    """

    def __init__(self, dataset, workers):
        self.dataset, self.workers, self.presence = dataset, workers, {}

    def total(self, work, ids, jobs, what):
        """Sum of the pixel counts (..., S, S) that `work` makes of each photo's mask and job."""
        masks = [self.dataset.mask(name) for name in ids]
        require(masks, "masks")
        jobs, total = ((mask, *job) for mask, job in zip(masks, jobs)), 0
        for counts, name in zip(in_processes(work, jobs, self.workers, len(ids), what, pool_from=1000), ids):
            self.presence[name] = counts[0].sum(1)[:self.dataset.num_classes] > 0
            total = total + counts
        return total

    def class_maps(self, ids, folder, kind="refined"):
        jobs = [(folder, name, self.dataset.classes, kind) for name in ids]
        best = best_threshold(self.total(score_class_maps, ids, jobs, f"{kind} seeds"))
        return {"threshold": f"{best['best']:.2f} (best)", "crf": "no", **best}

    def masks(self, ids, folder, threshold="-", crf="-"):
        jobs = [(folder / f"{name}.png", self.dataset.num_classes) for name in ids]
        require([path for path, _ in jobs], "masks")
        matrix = self.total(score_mask, ids, jobs, folder.name)[0]
        each, coverage = iou(matrix[:-1, :-1]), float(matrix[:, :-1].sum() / max(1, matrix.sum()))
        return {"threshold": threshold, "crf": crf, "iou": each.tolist(), "miou": 100 * float(np.nanmean(each)),
                "coverage": coverage}


def out_of_date(out, name, record, dataset=None):
    """{"stale": why} where a stage is older than what it was made from, else {}."""
    if older := older_than(out, name):
        return {"stale": older}
    if dataset and not dataset.is_that_of(record):
        return {"stale": f"made from other lists, labels or classes: make {STAGES[name][1]} FRESH=1"}
    return {}


def stage_rows(scorer, out, records):
    """A row a stage: scored on the photos that have a file, with a note of what is missing or out of date."""
    dataset = scorer.dataset
    splits = {split: dataset.ids(split, required=False) for split in ("train_aug", "train", "val")}
    lists = sorted({record["settings"].get("train_list", "train_aug") for record in records.values()} | {"train"})
    trained_on, rows = len(dataset.trained_on(splits["val"], lists)), []

    def add(title, split, name, ending, score):
        ids, (what, target) = splits[split], STAGES[name]
        if name == "affinity_labels":  # made of train_aug alone
            ids = sorted({*ids} & {*splits["train_aug"]})
        has_masks = any(dataset.mask(one).is_file() for one in ids)
        have = [one for one in ids if is_whole(out / name / f"{one}{ending}")] if name in records else []
        row = {"stage": title, "of": name, "id": records.get(name, {}).get("id"), "split": split,
               "n": len(have) or len(ids)}
        if not has_masks or not have:
            row["note"] = f"not run: make {target}" if has_masks else "no masks" if ids else "no photos to score"
            return rows.append(row)
        if len(have) < len(ids):
            missing = min({*ids} - {*have})
            row["missing"] = f"{len(ids) - len(have)} of {len(ids)} {what} are missing, first {missing}: make {target}"
        if split == "val" and trained_on:
            row["trained_on"] = f"{trained_on} of these photos stand in {' or '.join(lists)} too, and were trained on"
        rows.append({**row, **score(have), **out_of_date(out, name, records[name], dataset)})

    if classifier := records.get("classifier"):
        row = {"stage": "classifier", "of": "classifier", "id": classifier["id"], "split": "val",
               "n": classifier.get("map_n", 0), "note": "not measured", "map": classifier.get("map"),
               **out_of_date(out, "classifier", classifier, dataset)}
        if row["map"] is not None and classifier["map_of"] != dataset.digest_of("val"):
            row.setdefault("stale", "measured on another list val: make train FRESH=1")
        rows.append(row)
    for kind, title in (("plain", "plain CAM"), ("eigen", "Eigen-CAM"), ("refined", "refined seeds")):
        if kind == "refined" or "cams" in records and records["cams"]["settings"][kind]:
            add(title, "train", "cams", ".npz", lambda ids: scorer.class_maps(ids, out / "cams", kind))
    for title, split, name, threshold in (
            ("affinity labels", "train", "affinity_labels", "{foreground:.2f}/{background:.2f}"),
            ("pseudo labels", "train", "pseudo_labels", "bg {background_score:.2f}"),
            ("segmenter", "val", "segmentation", "-")):
        def score(ids):
            settings = records[name]["settings"]
            crf = "yes" if settings.get("crf", True) else "no"
            return scorer.masks(ids, out / name, threshold.format(**settings), crf)
        add(title, split, name, ".png", score)
    return rows


def read_results(out):
    """OUT/results.json, or None where there is none; a row whose stage or what it hangs on was made again says so."""
    path = out / "results.json"
    if not path.is_file():
        return None
    results = read_json(path, ("data", "classes", "rows", "doubts", "devices", "precision", "seconds", "settings"))
    for row in results["rows"]:
        if not (record := find_record(out, name := row.get("of", ""))):
            continue
        if record["id"] != row.get("id"):
            row["stale"] = f"scored before the {STAGES[name][0]} was made again: make eval"
        else:
            row.update(out_of_date(out, name, record))
    return results


def outcome(row):
    """The last column of the table."""
    if "miou" not in row and row.get("map") is None:
        return f"      - ({row['note']})"
    value = f"{row['miou']:7.2f}" if "miou" in row else f"{100 * row['map']:7.2f} mAP"
    if row.get("coverage", 1) < 1:
        value += f" on the {100 * row['coverage']:.1f} % of pixels that are labelled;"
    return (value + "".join(f" {row[key]};" for key in ("missing", "trained_on", "stale") if key in row)).rstrip(";")


def print_table(rows, classes, doubts):
    """The rows of results.json as text, the IoU of each class below."""
    print(f"\n{'stage':16} {'split':6} {'N':>6}  {'threshold':12} {'CRF':4} {'mIoU %':>7}")
    for row in rows:
        how = f"{row.get('threshold', '-'):12} {row.get('crf', '-'):4}"
        print(f"{row['stage']:16} {row['split']:6} {row['n']:6}  {how} {outcome(row)}")
    if any("best" in row.get("threshold", "") for row in rows):
        print("Thresholds of seeds marked (best) were chosen by looking at the masks, out of 0.00 ... 0.59.")
    for line in doubts:
        print(f"doubtful: {line}")
    print()
    scored = [row for row in rows if "iou" in row]
    if scored:
        print(f"{'IoU %':16}" + "".join(f"{row['stage']:>17}" for row in scored))
        for n, name in enumerate(classes):
            values = [row["iou"][n] for row in scored]
            cells = ["absent" if math.isnan(value) else f"{100 * value:.2f}" for value in values]
            print(f"{name:16}" + "".join(f"{cell:>17}" for cell in cells))
        print()


def evaluate(args):
    """Score every stage found in OUT against the masks, print one table, write OUT/results.json."""
    dataset = DataSet(args.data)
    scorer, classes, records = Scorer(dataset, args.workers), ["background", *dataset.classes], {}
    if args.masks or args.class_maps:
        ids, rows = dataset.ids(args.split), []
        if args.class_maps:
            rows.append({"stage": args.class_maps.name, **scorer.class_maps(ids, args.class_maps)})
        if args.masks:
            rows.append({"stage": args.masks.name, **scorer.masks(ids, args.masks)})
        rows = [{"split": args.split, "n": len(ids), **row} for row in rows]
    else:
        records = {name: record for name in STAGES if (record := find_record(args.out, name))}
        if not records:
            raise InputError(f'nothing to score in {args.out}: run "make train"')
        rows = stage_rows(scorer, args.out, records)
    doubts = contradictions(dataset, list(scorer.presence), list(scorer.presence.values()))
    print_table(rows, classes, doubts)
    if records:
        each = {key: {n: record[key] for n, record in records.items()} for key in ("seconds", "settings", "precision")}
        write_json(args.out / "results.json", {
            "data": dataset.root.resolve().name, "classes": classes, "rows": rows, "doubts": doubts,
            "devices": sorted({record["device"] for record in records.values()}), **each})
        seconds = ", ".join(f"{name} {value:.0f}" for name, value in each["seconds"].items())
        used = ", ".join(sorted(set(each["precision"].values())))
        print(f"precision: {used}; seconds: {seconds} -> {args.out / 'results.json'}")


def main():
    commands = Commands(__doc__, "evaluate")
    parser = commands.add(evaluate, computes=False)
    parser.add_argument("--masks", type=Path, help="score this folder of index PNGs instead")
    parser.add_argument("--class-maps", type=Path, help="score these instead: ID.npz of ours or ID/CLASS.npy")
    parser.add_argument("--split", default="train", help="list that --masks or --class-maps is scored on")
    commands.run()


if __name__ == "__main__":
    main()
