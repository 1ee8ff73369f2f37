"""One function in two processes of a process group on this machine."""

import datetime
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank: int, target, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both processes are on this machine
    group = {"init_method": f"file://{folder}/store", "timeout": datetime.timedelta(minutes=2)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **group)
    (folder / str(rank)).write_bytes(pickle.dumps(target(rank, *args)))
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(target, folder: Path, *args) -> list:
    """What ``target(rank, *args)`` returns on each of two ranks, which meet in the empty ``folder``."""
    mp.spawn(work, (target, folder, args), nprocs=2)
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]
