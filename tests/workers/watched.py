"""A process of a training on several machines in small: it adds up ones with the others until something happens.

python watched.py FOLDER [fail RANK]: this rank raises an error of its own after a while.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ba_lora.errors import UserError, run_entry_point
from ba_lora.runs.machines import RunMachine, watched


def main() -> None:
    folder, fails = Path(sys.argv[1]), int(sys.argv[3]) if "fail" in sys.argv else None
    process = PartialState(cpu=True, timeout=timedelta(seconds=600))
    hosts = gather_object([os.environ["HOST"]])
    machines = [RunMachine(host, [rank]) for rank, host in enumerate(hosts)]
    with watched(process, machines):
        (folder / f"pid{process.process_index}").write_text(str(os.getpid()))
        for step in range(100_000):
            torch.distributed.all_reduce(torch.ones(1))
            if process.process_index == fails and step == 100:
                raise UserError("its disk is full")
            time.sleep(0.02)


if __name__ == "__main__":
    run_entry_point(main)
