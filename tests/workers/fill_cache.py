"""Fill a reference cache of the tiny Llama in small shards: FOLDER, printing how many files this process computed.

FOLDER POINT …: for each point (as in killed_runs.py) fill FOLDER/<number> and die there, then fill it to the end;
print the signals that ended the first ones. Each is a fork of this process, which has paid for the imports once.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from ba_lora.objective.reference_cache import fill as reference_build
from ba_lora.objective.reference_cache import store as reference_cache
from tests.support.tiny import tiny_cache, tiny_rows
from tests.workers.killed_runs import arm

torch.set_num_threads(1)
reference_cache.SHARD_BYTES = 1024


def fill(folder: Path) -> int:
    """Return how many files this process computed."""
    computed, compute = [], reference_build._compute

    def counted(cache, file, model):
        computed.append(file)
        return compute(cache, file, model)

    reference_build._compute = counted
    tiny_cache(folder, tiny_rows(40), top_k=8, dtype="float16").verify()
    return len(computed)


def fill_in_fork(folder: Path, point: str | None) -> int:
    """Return the signal that ended it (0: it ended by itself)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if point:
                arm(point)
            fill(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("filling the cache failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


folder, *points = Path(sys.argv[1]), *sys.argv[2:]
if not points:
    print(fill(folder))
else:
    signals = [fill_in_fork(folder / str(number), point) for number, point in enumerate(points)]
    assert [fill_in_fork(folder / str(number), None) for number in range(len(points))] == [0] * len(points)
    print(json.dumps(signals))
