"""Around a stage's work: files written whole, text read with a clear error, and the record of a stage.

A stage (classifier, cams, ...) leaves OUT/NAME.pth or the folder OUT/NAME/, and its record OUT/NAME.json: settings,
inputs, seconds. Until it is complete all of it stands under NAME.part, and an earlier result stays until then.
Knows nobody; imported before torch, so that Ctrl-C is one line from the first second on.
"""
import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
import zipfile
from multiprocessing import current_process
from pathlib import Path

STAGES = {  # record in OUT: (what it holds, the make target that makes it)
    "classifier": ("classifier", "train"), "cams": ("seeds", "cams"), "affinity_labels": ("affinity labels", "psa"),
    "affinitynet": ("AffinityNet", "psa"), "pseudo_labels": ("pseudo labels", "psa"),
    "segmenter": ("segmenter", "seg"), "segmentation": ("segmentation", "seg")}
# Flags on which no result depends: they say where, how fast, and which of the photos.
NO_SETTING = {"command", "function", "parser", "out", "data", "device", "workers", "preset", "ids", "first", "split",
              "paths", "amp", "fresh", "deterministic", "card"}
RECORD = {"id": str, "done": bool, "seconds": (int, float), "settings": dict, "inputs": dict,
          "data": (str, type(None)), "preset": (str, type(None))}  # older ones lack the last two
FINISHED = {"device": str, "precision": str, "map": (int, float, type(None)), "watched": (dict, type(None))}
NETWORKS = ("classifier", "affinitynet", "segmenter")  # stages whose result is a .pth
RANK = int(os.environ.get("RANK", 0))  # of this process under torchrun: the first one writes the records
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR}
DISK_REMEDY = "make room there, or take another folder"
PNG_END = b"IEND\xaeB`\x82"


class InputError(Exception):
    """Something the user can mend. Shown as one line, exit status 1."""


class NoDataSet(InputError):
    """The folder of --data is none."""


class FlagError(InputError):
    """Flags that do not go together. Exit status 2."""


def _stop(number, frame):
    if os.getpid() != MAIN_PROCESS:
        os._exit(1)  # a worker of the loader: its parent says it
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    if RANK == 0:
        os.write(2, b"\nstopped: the same command goes on from here\n")  # print() could be what was interrupted
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # torch's handler makes an error of a stopped worker
    raise SystemExit(128 + number)


def end_with(parent):
    """End this process when its parent has ended, however that one did."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


MAIN_PROCESS = os.getpid()
if current_process().name != "MainProcess":  # a worker of a pool: its parent says it, and it ends with its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
elif Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # a script of ours, not somebody's import
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)


# ---------------------------------------------------------------- files

def write(path, save, sync=False):
    """`save(file)` into a temporary name, then rename: a file is there whole or not at all. sync: on the disk first."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save makes the one of the other
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}: {DISK_REMEDY}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_lines(path, lines):
    text = "".join(f"{line}\n" for line in lines)
    write(path, lambda file: file.write(text.encode()), sync=True)


def write_json(path, value):
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode()), sync=True)


def read_text(path):
    """A UTF-8 file, with or without a byte order mark."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeError  # UTF-16 without a byte order mark
        return text
    except UnicodeError:
        raise InputError(f"{path} is no UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_lines(path):
    """Its lines that are not empty, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path, kinds={}):
    """A JSON object, with values of these kinds. kinds: key: type"""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        raise damaged(path)
    return value


def damaged(path):
    return InputError(f"{path} is damaged or none of ours: move it away")


def is_whole(path):
    """Whether a file is there and not cut short, by its size and its end."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".png":
                file.seek(-len(PNG_END), os.SEEK_END)
                return file.read() == PNG_END
            return zipfile.is_zipfile(file) if path.suffix in (".npz", ".pth") else file.read(1) != b""
    except OSError:
        return False


@functools.lru_cache
def digest(path):
    """Of a file's bytes; of a folder the names and sizes in it. -> 16 hexadecimal digits"""
    found = hashlib.sha256()
    if path.is_dir():
        found.update(repr([(p.name, p.stat().st_size) for p in sorted(path.rglob("*")) if p.is_file()]).encode())
    elif not path.is_file():
        raise InputError(f"no file {path}")
    else:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]


def sweep(folder):
    """Remove the temporary files of processes that are gone."""
    for path in folder.rglob(".*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


# ---------------------------------------------------------------- records

def _settings(args, ignore, fits):
    """What a result depends on: flags, weight files by their bytes, precision."""
    shown = {key: value for key, value in sorted(vars(args).items()) if key not in NO_SETTING | set(ignore)}
    for key, value in shown.items():
        if isinstance(value, Path) and not value.exists():
            raise InputError(f"no file {value}, named by --{key.replace('_', '-')}{fits.get(key, '')}")
    shown = {key: digest(value) if isinstance(value, Path) else value for key, value in shown.items()}
    return json.loads(json.dumps(shown))  # as it comes back from the file


def _settle(out, name):
    """A complete NAME.part becomes NAME, also where the renaming was interrupted before."""
    part = out / f"{name}.part"
    record = read_record_file(out / f"{name}.part.json")
    if not record or not record["done"]:
        return
    if (out / f"{name}.part.pth").is_file():
        os.replace(out / f"{name}.part.pth", out / f"{name}.pth")
    if part.is_dir():
        old = out / f"{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (out / name).exists():
            os.replace(out / name, old)
        os.replace(part, out / name)
    shutil.rmtree(out / f"{name}.old", ignore_errors=True)
    os.replace(out / f"{name}.part.json", out / f"{name}.json")


def find_record(out, name):
    """The record of a complete stage, or None."""
    if RANK == 0:
        _settle(out, name)
    record = read_record_file(out / f"{name}.json")
    return record if record and record["done"] else None


def read_record(out, name):
    """The record of a complete stage; InputError naming the command that makes it."""
    what, target = STAGES[name]
    record = find_record(out, name)
    if record is None:
        unfinished = (out / f"{name}.part.json").is_file()
        raise InputError(f'{"unfinished" if unfinished else "no"} {what} in {out / name}: run "make {target}"')
    return record


def read_record_file(path):
    """A record, or None where there is none."""
    if not path.is_file():
        return None
    record, name = read_json(path, RECORD), path.name.split(".")[0]
    earlier = list(STAGES)[:list(STAGES).index(name)] if name in STAGES else STAGES
    if not set(record["inputs"]) <= set(earlier):
        raise damaged(path)
    return record


def is_stale(out, name):
    """Name of an earlier stage that was made anew since this one was made from it, or None."""
    for source, source_id in read_record(out, name)["inputs"].items():
        found = find_record(out, source)
        if found is None or found["id"] != source_id:
            return source
        if older := is_stale(out, source):
            return older
    return None


def note_stale(out):
    """Print what is older than its inputs, where it is drawn all the same."""
    for name in STAGES:
        if find_record(out, name) and (older := is_stale(out, name)):
            print(f"note: {STAGES[name][0]} in {out}: older than the {STAGES[older][0]}: make {STAGES[name][1]}")


class Stage:
    """One stage of a run: its settings and inputs, what of it is done, and where it works until it is complete.

    reads: stages whose results it takes; data: digest of the data set's lists and labels; ignore: flags that do not
    change this result; grows: a flag of which more may be asked for later; fits: flag: how a message ends that tells
    which file fits. It writes `pth`, or into `folder`.
    """

    def __init__(self, args, name, reads=(), data=None, ignore=(), grows=None, fits={}):
        self.args, self.name, self.out = args, name, args.out
        self.what = STAGES.get(name, (name, name))[0]
        self.resumed = self.complete = False
        self.grown_from = None  # checkpoint of the finished result that this one goes on from
        for source in reads:
            read_record(args.out, source)
            if older := is_stale(args.out, source):
                (what, target), earlier = STAGES[source], STAGES[older][0]
                raise InputError(f'{what} in {args.out}: older than the {earlier}: run "make {target}" first')
        self.record = {
            "id": uuid.uuid4().hex, "done": False, "seconds": 0,
            "data": str(args.data.resolve()), "preset": args.preset,
            "settings": {**_settings(args, ignore, fits), "data_set": data},
            "inputs": {source: read_record(args.out, source)["id"] for source in reads}}
        self._choose(grows)
        place = name if self.complete else f"{name}.part"
        self.json, self.pth, self.folder = (args.out / f"{place}{ending}" for ending in (".json", ".pth", ""))

    def _choose(self, grows):
        """Take up the finished or unfinished result, or begin anew; InputError where that would lose one."""
        fresh, part = self.args.fresh, self.out / f"{self.name}.part.json"
        settled = find_record(self.out, self.name)  # with --fresh too: no complete part may be taken for a begun one
        finished = None if fresh else settled
        changed = self._changes(finished) if finished else {}
        inputs = self.record["inputs"].items()
        stale = [name for name, new in inputs if finished and finished["inputs"].get(name) != new]
        there = self.name not in NETWORKS or is_whole(self.out / f"{self.name}.pth")
        if finished and there and not changed and not stale:
            self.record, self.complete = finished, True
            return
        if unfinished := read_record_file(part):
            since = self._changes(unfinished)
            if list(since) == [grows] and since[grows][1] > since[grows][0]:
                unfinished["settings"], since = self.record["settings"], {}
            if not since and unfinished["inputs"] == self.record["inputs"]:
                self.record, self.resumed = unfinished, True
                self.grown_from = self.out / f"{self.name}.pth" if unfinished.get("grown_from") else None
                return
            if since and not fresh:
                raise self._refusal("unfinished", since)
            stale = stale or [name for name, new in inputs if unfinished["inputs"].get(name) != new]
        if not finished:
            return self._say_stale(stale)
        old, new = changed.get(grows, (0, 0))
        if there and not stale and list(changed) == [grows] and new > old:
            self.grown_from = self.out / f"{self.name}.pth"
            self.record.update(grown_from=finished["id"], seconds=finished["seconds"],
                               watched=finished.get("watched", {}))
        elif changed:
            raise self._refusal("finished", changed)
        elif stale:
            self._say_stale(stale)
        else:
            print(f"{self.out / self.name}.pth is missing or damaged: made again")

    def _say_stale(self, stale):
        if stale and not self.args.fresh:
            print(f"{self.what}: made anew, as the {' and the '.join(STAGES[name][0] for name in stale)} changed")

    def _changes(self, record):
        """Settings in which a record differs from what is asked for; a flag that it lacks counts as its default."""
        old, new = record["settings"], self.record["settings"]
        lacking = {key: self.args.parser.get_default(key) for key in new}
        lacking.update(data_set=new["data_set"], precision=record.get("precision", new.get("precision")))
        lacking = json.loads(json.dumps(lacking, default=str))
        both = {key: (old.get(key, lacking[key]), value) for key, value in new.items()}
        return {key: pair for key, pair in both.items() if pair[0] != pair[1]}

    def _refusal(self, state, changed):
        shown = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items() if key != "data_set")
        shown = ", ".join(filter(None, [shown, "data_set" in changed and "the data set has other lists or labels"]))
        return InputError(f"{self.what} in {self.out} ({state}): made with other settings: {shown}: "
                          "take another OUT= (--out), or make it anew with FRESH=1 (--fresh)")

    def todo(self, names, ending):
        """Those of the photos whose file is missing or cut short; all where nothing is taken up."""
        chosen = any(vars(self.args).get(flag) for flag in ("first", "ids", "split"))
        settled, folder = find_record(self.out, self.name), self.out / self.name
        if self.args.fresh and chosen and settled and settled["inputs"] == self.record["inputs"]:
            there = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"[!.]*{ending}")}
            if lost := there - set(names):
                raise InputError(f"--fresh with --first, --ids or --split would lose {len(lost)} other files of "
                                 f"{folder}: leave them out, or take another OUT= (--out)")
        if not (self.complete or self.resumed):
            return list(names)
        return [name for name in names if not is_whole(self.folder / f"{name}{ending}")]

    def is_done(self, todo=()):
        if self.complete and not todo:
            print(f"{self.out / self.name}: done already")
        return self.complete and not todo

    def start(self):
        """Print the settings, once; from here on the record is on disk."""
        self.clock = time.time()
        if RANK > 0:
            return
        if self.complete:
            print(f"{self.out / self.name}: what is missing or damaged is made again")
        elif not self.resumed:
            print(f"{self.name}: " + " ".join(f"{k}={v}" for k, v in self.record["settings"].items()), flush=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.pth.unlink(missing_ok=True)
        self.save()

    def save(self):
        now = time.time()
        self.record["seconds"] += now - self.clock
        self.clock = now
        if RANK == 0:
            write_json(self.json, self.record)

    def finish(self, **results):
        """Complete: from here on this is the result, and an earlier one is gone."""
        self.record.update(results, done=True)
        self.save()
        if RANK == 0:
            _settle(self.out, self.name)
