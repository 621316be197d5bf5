"""The command line: sub-commands, their flags and presets, and what stands around every command and every stage.

Every script's `main()` fills a `Commands`; its functions get `args`. What a user can mend ends in one line.
"""
import argparse
import inspect
import os
import random
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from wsss.pool import RANK, WORLD, device_name, peak_memory, pick_device, precision
from wsss.presets import LIST, PRESETS, RANGE, SETTINGS, SWITCH, defaults, settings_of, whole
from wsss.stage import DENIED, DISK_ERRORS, FlagError, InputError, Stage, digest, disk_remedy

TOY = Path("data/toy")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default; the text of a flag without one may tell what is used."""

    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS):
            return action.help
        return action.help.split(" (default")[0] + " (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag."""

    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def _data_and_preset():
    """What is typed of --data and --preset, before the help shows the defaults that follow from them."""
    where = Parser(add_help=False)
    for flag in ("--data", "--out", "--preset"):
        where.add_argument(flag, nargs="?")  # where a value is missing the whole parser says so
    typed, _ = where.parse_known_args()
    data = Path(typed.data or TOY)
    preset = "toy" if data.resolve() == TOY.resolve() else "voc"
    return data, typed.preset if typed.preset in PRESETS else preset


def _prepare(args):
    """Device, precision and random numbers of a command."""
    is_default = args.out.resolve() == (Path("out") / args.data.resolve().name).resolve()
    if not (is_default or any(word.split("=")[0] == "--data" for word in sys.argv)):
        raise FlagError("--out without --data would read the toy set: add --data")
    if WORLD > 1 and args.function.__name__ != "train":
        raise FlagError(f"{args.name} runs in one process: torchrun is for the trainings")
    for setting, (_, kind, _) in settings_of(args.name).items():
        if isinstance(kind, tuple) and kind[0] == RANGE and np.diff(getattr(args, setting)) < 0:
            raise FlagError(f"argument --{setting.replace('_', '-')}: the first number is more than the second")
    args.device = pick_device(args.device, args.computes)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # scoring
    args.amp = args.computes and (args.device.type == "cuda" if args.amp is None else args.amp)
    args.precision, args.machine = precision(args.device, args.amp), device_name(args.device)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)


class Commands:
    """argparse with presets: `add(function, summary)` gives a sub-command's parser, `run()` calls what was typed."""

    def __init__(self, doc, script):
        self.script, self.parser, self.commands = script, Parser(description=doc, formatter_class=Help), None

    def add(self, function, summary=None, uses_out=True, computes=True):
        """A sub-command, or all of a script, without a summary. uses_out: works in OUT; computes: on --device."""
        parser, name = self.parser, self.script
        if summary:
            if self.commands is None:
                self.commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
            parser = self.commands.add_parser(function.__name__, help=summary, formatter_class=Help,
                                              description=inspect.getdoc(function))
            name = f"{name} {function.__name__}"
        parser.set_defaults(function=function, parser=parser, name=name, computes=computes)
        if uses_out:
            data, preset = _data_and_preset()
            parser.add_argument("--data", type=Path, default=data, help="data set")
            parser.add_argument("--out", type=Path, default=Path("out") / data.resolve().name,
                                help="folder of all results, out/NAME OF DATA if not given")
            parser.add_argument("--preset", choices=PRESETS, default=preset,
                                help="column of wsss/presets.py: table of defaults, as shown here; voc and coco are "
                                     "published, toy is the toy set's, small for some thousand small photos")
            parser.add_argument("--device", help="cuda or cpu (default: cuda where it works)")
            parser.add_argument("--workers", type=whole(0, 256), default=min(8, os.cpu_count() or 1),
                                help="processes that load photos or run the CRF")
            parser.add_argument("--fresh", action="store_true", help="make it again, also where it is done")
            for setting, (_, kind, meaning) in settings_of(name).items():
                how = {"type": kind}
                if kind == SWITCH:
                    how = {"action": argparse.BooleanOptionalAction}
                elif isinstance(kind, tuple) and kind[0] in (LIST, RANGE):
                    how = {"type": kind[1], "nargs": "+" if kind[0] == LIST else 2}
                elif isinstance(kind, tuple):
                    how = {"choices": kind}
                parser.add_argument(f"--{setting.replace('_', '-')}", help=meaning, **how)
            parser.set_defaults(**defaults(name, preset))
        return parser

    def run(self):
        if sys.stderr is None:  # closed: whatever is opened next would become it
            sys.stderr = open(os.devnull, "w")
        try:
            args = self.parser.parse_args()
            if "preset" in args:
                _prepare(args)
            args.function(args)
            print(end="", flush=True)  # here, where a pipe that is closed ends in no traceback
        except KeyboardInterrupt:
            print("\nstopped: the same command, without --fresh (FRESH=1), goes on from here", file=sys.stderr)
            sys.exit(130)
        except FlagError as error:
            args.parser.error(str(error))
        except InputError as error:  # from a loader's worker the message comes with a traceback in front
            sys.exit(f"error: {re.sub('^.*InputError: ', '', str(error).strip().splitlines()[-1])}")
        except BrokenPipeError:  # `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, BrokenProcessPool) or "DataLoader worker" in str(error):
                sys.exit("error: a worker process died, perhaps out of memory: try fewer --workers")
            is_memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            if not is_memory and "DefaultCPUAllocator" not in str(error):
                raise
            sys.exit("error: too little memory: try --micro-batch in training, a smaller --batch-size in cams, smaller "
                     "photos or --scales")
        except OSError as error:
            if error.errno not in DISK_ERRORS | DENIED:
                raise
            sys.exit(f"error: {error.filename or 'the disk'}: {error.strerror}: {disk_remedy(error)}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def run_stage(args, name, work, dataset, reads=(), ids=None, ending=".png", ignore=(), hints={}, is_part=False):
    """What every stage does around its work: is it done, may it begin, how did it go.

    work(run), or work(run, todo) of a stage that makes one file a photo, of `ids`
    ignore: settings that do not change this result; hints: {flag: the end of its error, which file fits}
    """
    settings = {"seed": args.seed, "precision": args.precision,
                "data_set": dataset.digest_of(getattr(args, "train_list", "train_aug"))}
    for key in SETTINGS[args.name]:
        value = getattr(args, key)
        if isinstance(value, Path) and not value.exists():
            raise InputError(f"no file or folder {value}, named by --{key.replace('_', '-')}{hints.get(key, '')}")
        settings[key] = digest(value) if isinstance(value, Path) and value.is_file() else value
    settings = {key: value for key, value in sorted(settings.items()) if key not in ignore}
    run = Stage(args.out, name, settings, dataset, args.preset, reads, args.fresh) if RANK == 0 else None
    if WORLD > 1:  # the others see what the first process sees, and write nothing
        sent = [run]
        dist.broadcast_object_list(sent)
        run = sent[0]
    todo = () if ids is None else run.todo(ids, ending, is_part)
    if run.complete and not todo:
        if RANK == 0:
            print(f"{run.folder}: done already")
        return
    work(run) if ids is None else work(run, todo)
    if dist.is_initialized():
        dist.barrier()
    if RANK == 0:
        peak = max(run.record.get("peak_gb", 0), peak_memory())
        run.finish(device=args.machine, precision=args.precision, peak_gb=peak)
        print(f"{name}: {run.record['seconds']:.0f} s, {peak:.1f} GB -> {run.done}", flush=True)
