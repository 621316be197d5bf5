"""Where a command computes: the device, its precision, the loader, work in processes, and the loop over photos."""
import collections
import os
import platform
import re
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from wsss.data import Images
from wsss.stage import FlagError, InputError

IS_TORCHRUN = dist.is_available() and dist.is_torchelastic_launched()
RANK, WORLD, LOCAL_RANK = (int(os.environ[name]) if IS_TORCHRUN else default
                           for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def device_name(device):
    """-> the card's name, or the processor's kind and how many threads of it torch uses"""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def pick_device(name, computes=True):
    """The device, printed; a warning where a GPU is there but cannot be used. computes: False: the CPU is enough."""
    if name and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise FlagError(f"--device {name} is neither cuda (or cuda:N) nor cpu")
    device = torch.device("cpu")
    if computes and name != "cpu":
        card = torch.device(name if name and ":" in name and WORLD == 1 else f"cuda:{LOCAL_RANK}")
        try:
            torch.ones(1, device=card).add(1)
            torch.cuda.set_device(card)
            # cuDNN's backward pass reads past the end where 1 + N is not a multiple of 128 (pytorch/pytorch#169849).
            torch.backends.cuda.enable_cudnn_sdp(False)
            device = card
        except (RuntimeError, AssertionError) as error:  # no GPU, driver or kernels that fit, or no memory left
            is_there = Path("/proc/driver/nvidia/version").exists()
            why = f"torch {torch.__version__} cannot use it ({str(error).splitlines()[0]}); --device cpu runs without"
            if name or is_there and WORLD > 1:
                raise InputError(f"--device {card}: {why}") from None
            if is_there:
                print(f"warning: a GPU is there, but {why}")
    if RANK == 0:
        print(f"device: {device} ({device_name(device)})", flush=True)
    return device


def amp_dtype(device):
    """bf16 where the device has it natively, else fp16."""
    native = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16


def precision(device, amp):
    """-> "float32", or "bf16" or "fp16" for mixed precision"""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype(device)] if amp else "float32"


def autocast(device, amp):
    return torch.autocast(device.type, amp_dtype(device), enabled=amp)


def peak_memory():
    """GB of the card where it is in use, else of this process without its workers."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def bar(total, what, initial=0):
    """A progress bar; in a log, which is not a terminal, a line now and then."""
    return tqdm(total=total, desc=what, unit="img", initial=initial, disable=RANK > 0,
                mininterval=0.1 if sys.stderr.isatty() else 60)


def loader(images, device, workers, **how):
    """torch's DataLoader, with workers where a GPU waits; on the CPU the network takes all cores."""
    on_gpu = device.type == "cuda"
    workers = workers if on_gpu and "fork" in get_all_start_methods() else 0  # only a fork passes closures on
    return torch.utils.data.DataLoader(images, num_workers=workers, pin_memory=on_gpu,
                                       multiprocessing_context="fork" if workers else None, **how)


def _start_worker(parent):
    """One thread; Ctrl-C is the parent's to handle, and the worker ends with it, however that ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _pooled(work, jobs, workers):
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (os.getpid(),)) as pool:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(work, *job))
            if len(waiting) >= 2 * workers:  # bounds the memory of what waits
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_processes(work, jobs, workers, total, what, pool_from=2):
    """Yield work(*job) of each job, in order; in processes where there are enough jobs to make these worthwhile."""
    with bar(total, what) as progress:
        results = _pooled(work, jobs, workers) if workers and total >= pool_from else (work(*job) for job in jobs)
        for result in results:
            yield result
            progress.update()


def for_each_photo(run, path_of, names, item, compute, write, device, workers, batch_size=None):
    """Make one file of each photo: `write(*job)` for each job in `compute(item(name, PIL photo))`.

    `item` runs in the loader's workers, `compute` here, on the device, `write` in a pool of processes. With a
    batch_size `compute` gets so many items at once, collated. run: the stage to start, or None
    """
    if run:
        run.start()
    keep = {} if batch_size else {"collate_fn": tuple}  # arrays stay arrays
    items = loader(Images(path_of, names, item), device, workers, batch_size=batch_size, **keep)
    jobs = (job for inputs in items for job in compute(*inputs))
    collections.deque(in_processes(write, jobs, workers, len(names), run.what if run else "photos"), maxlen=0)
