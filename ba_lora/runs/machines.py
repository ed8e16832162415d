"""Several machines: that all see the same code, settings and data, what they are together, and which one was lost.

`meet` compares every machine with the first and refuses, by name, one that differs. `Watch` notices a process that no
longer answers: a collective operation alone would wait for `trainer.ddp_timeout`, half an hour, and not say for whom.
"""

import contextlib
import hashlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ba_lora.config.schema import RunConfig, setting_differences, training_settings
from ba_lora.errors import UserError
from ba_lora.io import sha256_file
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.runs.environment import code_state

if TYPE_CHECKING:
    from datasets import Dataset

LOST_AFTER_S = 60.0  # without a sign of life; BA_LORA_LOST_AFTER, in seconds, sets another
ENDED = "ended"  # the sign of a process that has ended, well or not: it is not waited for


@dataclass
class RunMachine:
    """What one machine is and sees, as its first process tells. num_gpus: those that its processes use, not all that it
    has; files: source file → hash; data: file → hash."""

    host: str
    ranks: list[int]
    gpu: str | None = None
    num_gpus: int = 0
    commit: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        ranks = f"rank {self.ranks[0]}" + (f" to {self.ranks[-1]}" if len(self.ranks) > 1 else "")
        return f"{self.host} ({ranks})"


def meet(process: PartialState, config: RunConfig) -> list[RunMachine]:
    """Return the machines of a run, the first one first. Every process calls it.

    Raises UserError, on all of them, where one sees another commit, other code, settings or local data than the first.
    """
    # Each machine begins with its process 0. How many it has is said by torchrun only, and not by DeepSpeed's launcher.
    places = gather_object([(process.local_process_index, _gpu_id(process))])
    starts = [rank for rank, (place, _) in enumerate(places) if place == 0]
    gpus = [gpu for _, gpu in places]
    if len(starts) <= 1:
        return [_this_machine([*range(process.num_processes)], gpus)]
    own = [None]
    if process.local_process_index == 0:
        first = process.process_index
        end = next((start for start in starts if start > first), process.num_processes)
        machine = _this_machine([*range(first, end)], gpus)
        machine.commit, machine.files = code_state()["commit"], _source_hashes()
        machine.settings = training_settings(config) | {"run folder": str(config.run_path)}
        machine.data = {name: _file_hash(resolve_path(name)) for name in config.data_files}
        own = [machine]
    machines = [one for one in gather_object(own) if one is not None]
    for other in machines[1:]:
        if fault := _difference(machines[0], other):
            raise UserError(fault)
    return machines


def check_same_rows(process: PartialState, machines: list[RunMachine], dataset: "Dataset") -> None:
    """Raise UserError where a machine has prepared other training rows than the first; every process calls it."""
    if len(machines) == 1:
        return
    found = gather_object([_rows_hash(dataset) if process.local_process_index == 0 else None])
    hashes = [one for one in found if one is not None]
    for machine, rows in zip(machines, hashes, strict=True):
        if rows != hashes[0]:
            raise UserError(
                f"machine {machine} sees other training rows than the first, {machines[0]}: give both the same data "
                "set, tokenizer and package versions"
            )


def _this_machine(ranks: list[int], gpus: list[str | None]) -> RunMachine:
    """gpus: of each rank, the id of its GPU. By gloo two processes may share a GPU, which counts for the first."""
    import torch

    used = {gpus[rank] for rank in ranks} - {None}
    name = torch.cuda.get_device_name() if used else None
    return RunMachine(socket.gethostname(), ranks, name, len(used - set(gpus[: ranks[0]])))


def _gpu_id(process: PartialState) -> str | None:
    import torch

    device = process.device
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _difference(first: RunMachine, other: RunMachine) -> str | None:
    seen = f"machine {other} sees"
    if first.commit != other.commit:
        commits = [(one.commit or "none")[:10] for one in (other, first)]
        return f"{seen} commit {commits[0]}, the first, {first}, {commits[1]}: bring both to one commit"
    if names := sorted(
        name for name in {**first.files, **other.files} if first.files.get(name) != other.files.get(name)
    ):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{seen} other code than the first, {first}, in {', '.join(names[:3])}{more}: bring both to one state"
    if changed := setting_differences(first.settings, other.settings):
        return f"{seen} another config than the first, {first}: {', '.join(changed[:3])}: start both by one command"
    for name, sha256 in first.data.items():
        if other.data.get(name) != sha256:
            return f"{seen} other data than the first, {first}: {name} differs: give both the same file"
    return None


def _source_hashes() -> dict[str, str]:
    files = [
        *PROJECT_ROOT.glob("train_*.py"),
        *(f for top in ("ba_lora", "data", "eval") for f in (PROJECT_ROOT / top).rglob("*.py")),
    ]
    return {file.relative_to(PROJECT_ROOT).as_posix(): sha256_file(file)[:16] for file in files}


def _file_hash(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _rows_hash(dataset: "Dataset") -> str:
    """Return a hash over all values of a data set, whatever its pieces in memory are."""
    import pyarrow

    sha = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=4096):
        for column in table.combine_chunks().columns:
            values = column.combine_chunks()
            if pyarrow.types.is_list(values.type):
                sha.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                values = values.flatten()
            numeric = pyarrow.types.is_primitive(values.type) and values.null_count == 0
            sha.update(values.to_numpy(zero_copy_only=False).tobytes() if numeric else str(values.to_pylist()).encode())
    return sha.hexdigest()


def _lost_after_s() -> float:
    """Return after how many seconds without a sign a process is lost. Raises UserError for what is no such number."""
    text = os.environ.get("BA_LORA_LOST_AFTER") or str(LOST_AFTER_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"BA_LORA_LOST_AFTER={text}: a number of seconds above 0 is needed, such as 60")
    return seconds


class Watch:
    """Signs of life of all processes of a training on several machines, in the launcher's own key-value store.

    A thread of each process writes a new sign every few seconds and reads those of all others; another one looks at the
    clock only, since the first may hang with the network. A process that is lost is named on standard error, and this
    process ends: whatever it writes is whole or not there. `lost_after_s` after the last sign at the latest.
    """

    def __init__(self, process: PartialState, machines: list[RunMachine]) -> None:
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.machines = process.process_index, machines
        self.lost_after_s = _lost_after_s()
        self.beat_s = min(5.0, self.lost_after_s / 12)
        self._changed = dict.fromkeys(range(process.num_processes), time.monotonic())
        self._signs: dict[int, str] = {}
        self._answered = time.monotonic()
        self._ended = threading.Event()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.lost_after_s),
        )
        self._store = PrefixStore(f"ba_lora/alive/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)
        self._store.set(str(self.rank), "0")
        process.wait_for_everyone()  # all signs are there before anybody reads them
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        threading.Thread(target=self._guard, daemon=True).start()

    def _beat(self) -> None:
        ranks = list(self._changed)
        for number in range(1, sys.maxsize):
            with contextlib.suppress(RuntimeError):  # no answer: the guard counts the seconds
                self._store.set(str(self.rank), str(number))
                signs = [sign.decode() for sign in self._store.multi_get([str(rank) for rank in ranks])]
                self._answered = now = time.monotonic()
                for rank, sign in zip(ranks, signs, strict=True):
                    if self._signs.get(rank) != sign or sign.startswith(ENDED):
                        self._signs[rank], self._changed[rank] = sign, now
            if self._ended.wait(self.beat_s):
                return

    def _guard(self) -> None:
        woke = time.monotonic()
        while not self._ended.wait(self.beat_s):
            before, woke = woke, time.monotonic()
            if woke - before > 2 * self.beat_s:  # this process was suspended: the others' silence is its own
                self._answered = woke
                self._changed.update(dict.fromkeys(self._changed, woke))
            elif lost := self.lost(self.lost_after_s):
                print(f"\nerror: {lost}", file=sys.stderr, flush=True)
                os._exit(1)

    def lost(self, silent_s: float) -> str | None:
        """Return which processes have given no sign for so long, and what to do; None where all have."""
        now = time.monotonic()
        if now - self._answered > silent_s:
            told, who = "cannot be reached", [f"{self.machines[0]}, which holds the meeting point,"]
        else:
            silent = [r for r, changed in self._changed.items() if r != self.rank and now - changed > silent_s]
            told, who = "was lost" if len(silent) == 1 else "were lost", [self._name(rank) for rank in silent]
        if not who:
            return None
        return (
            f"{', '.join(who)} {told}: no sign of life for {silent_s:.0f} s, seen from {self._name(self.rank)}; the "
            "same command on every machine goes on from the last checkpoint"
        )

    def _name(self, rank: int) -> str:
        host = next(machine.host for machine in self.machines if rank in machine.ranks)
        return f"rank {rank} on {host}"

    def end(self, why: str = "") -> None:
        """Say that this process ends, so that nobody misses it. No thread of it is left but one that hangs with the
        network: Python's end aborts a process in which a thread comes back from torch's C++ code."""
        self._ended.set()
        self._beating.join(2 * self.beat_s)
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self.rank), f"{ENDED} {why}".strip()[:400])

    def cause(self) -> str | None:
        """Return what has broken a collective operation, after watching the others for some of their signs."""
        deadline = time.monotonic() + max(6 * self.beat_s, 5.0)
        while time.monotonic() < deadline:
            for rank, sign in self._signs.items():
                if rank != self.rank and sign.startswith(f"{ENDED} "):
                    return f"{self._name(rank)} has ended: {sign.removeprefix(ENDED).strip()}"
            time.sleep(0.2)
        return self.lost(max(4 * self.beat_s, 3.5))


@contextlib.contextmanager
def watched(process: PartialState, machines: list[RunMachine]) -> Iterator[None]:
    """Watch the other machines' processes; a collective operation that breaks raises a UserError that names the lost
    ones. On one machine the launcher does that."""
    if len(machines) == 1:
        yield
        return
    watch = Watch(process, machines)
    try:
        yield
    except RuntimeError as error:
        cause = watch.cause()
        watch.end(cause or str(error).partition("\n")[0])
        if cause is None:
            raise
        raise UserError(cause) from error
    except BaseException as error:
        watch.end(str(error).partition("\n")[0] or type(error).__name__)
        raise
    watch.end()
