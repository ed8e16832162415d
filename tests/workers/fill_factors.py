"""Decompose some matrices with a shared cache, print how: CACHE OUT [die_after N | slow].

`die_after N`: SIGKILL in the middle of the N-th file. `slow`: take a while over every SVD.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ba_lora.methods import factors_cache as pissa_cache
from ba_lora.methods import pissa
from tests.support.pissa_helpers import random_matrices

cache_path, output, *mode = sys.argv[1:]
torch.set_num_threads(1)
svds, writes = 0, 0
leading_components, save_file = pissa.leading_components, pissa_cache.save_file


def counting(*arguments, **settings):
    global svds
    svds += 1
    if mode == ["slow"]:
        time.sleep(0.3)
    return leading_components(*arguments, **settings)


def dying(tensors, path, **settings):
    global writes
    writes += 1
    save_file(tensors, path, **settings)
    if mode[:1] == ["die_after"] and writes == int(mode[1]):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


pissa.leading_components, pissa_cache.save_file = counting, dying
cache = pissa_cache.FactorsCache(Path(cache_path))
found = pissa.decompose(random_matrices(), pissa_cache.SVD(4), cache=cache, batch_bytes=1)
save_file({f"{name}.{part}": value for name, parts in found.items() for part, value in parts._asdict().items()}, output)
print(json.dumps({"svds": svds, "matrices": len(found)}))
