"""NOMAD, mesh adaptive direct search (arXiv 2104.11627), by PyNomadBBO, in a child process.

NOMAD calls its black box, and keeps no record until it ends. So here the child's black box sends the point to this
process and waits for the value. After kill -9 the child starts again with the same seed: it asks for the same points,
and those that the journal knows are answered from there.

Every coordinate is a whole number: a choice by its place, a float by STEPS even steps between its ends (of the
logarithm, where it is `log`). NOMAD has no order-free categories: the choices are taken in the file's order.

    python -m ba_lora.experiments.search.nomad      the child: JSON lines in, JSON lines out
"""

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from typing import Any, NoReturn

from ba_lora.errors import UserError
from ba_lora.experiments.search.journal import INSTALL, Journal, Trial
from ba_lora.experiments.search.proposers import Exhausted
from ba_lora.experiments.search.space import Parameter, SearchSpace
from ba_lora.paths import PROJECT_ROOT

STEPS = 1000


class NomadProposer:
    """Proposes NOMAD's points, in blocks of at most `trials_at_once`."""

    def __init__(self, space: SearchSpace) -> None:
        if importlib.util.find_spec("PyNomad") is None:
            raise UserError(f"engine nomad needs PyNomadBBO, which is not installed: run {INSTALL}")
        self._space = space
        self._block: list[list[int]] = []  # asked for, and not all answered
        self._proposed = 0  # of the block
        self._answers: list[float | None] = []
        self._child: subprocess.Popen | None = None

    def propose(self, journal: Journal) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if self._child is None:
            self._start()
            for trial in journal.trials:
                self._expect(trial)
                if trial.outcome is not None:
                    self.tell(trial)
        if not self._block:
            self._read_block()
        if self._proposed == len(self._block):
            return None
        point = self._block[self._proposed]
        self._proposed += 1
        return decoded(point, self._space), {"point": point}

    def _expect(self, trial: Trial) -> None:
        """Take a trial of the journal as proposed again."""
        if not self._block:
            self._read_block()
        point = self._block[self._proposed] if self._proposed < len(self._block) else None
        if point is None or point != trial.proposal.get("point"):
            raise UserError(
                f"NOMAD proposes {point} where the journal's trial {trial.number} is {trial.proposal.get('point')}: "
                "another version of PyNomadBBO? Install that one, or give another output=DIR"
            )
        self._proposed += 1

    def tell(self, trial: Trial) -> None:
        """Answer NOMAD once the whole block is known. A failed trial is a failed evaluation to it."""
        if self._child is None:
            return  # `propose` starts it, and tells it all
        outcome = trial.outcome
        assert outcome is not None
        if trial.number == 0 and outcome.loss is None:
            raise UserError(
                f"NOMAD cannot start from a trial that fails ({outcome.facts.get('error', outcome.status)}): give "
                "another start"
            )
        failed = outcome.loss is None or not math.isfinite(outcome.loss)
        self._answers.append(None if failed else outcome.loss)
        if len(self._answers) == len(self._block):
            self._send(self._answers)
            self._block, self._answers, self._proposed = [], [], 0

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._child.stdout.close()

    def _start(self) -> None:
        space = self._space
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ba_lora.experiments.search.nomad"],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(
            {
                "start": start_point(space),
                "high": [_steps(parameter) for parameter in space.parameters],
                "seed": space.search_seed,
                "trials": space.budget,
                "block": space.trials_at_once,
            }
        )

    def _send(self, value: Any) -> None:
        assert self._child is not None
        with contextlib.suppress(BrokenPipeError):  # the next read says why
            self._child.stdin.write(json.dumps(value) + "\n")
            self._child.stdin.flush()

    def _read_block(self) -> None:
        assert self._child is not None
        line = self._child.stdout.readline()
        if not line:
            self._ended()
        message = json.loads(line)
        if "ended" in message:
            raise Exhausted(message["ended"])
        self._block = message["points"]

    def _ended(self) -> NoReturn:
        """Tell how the child has ended. In small spaces NOMAD crashes once it has tried every point: what was tried
        counts, as where it says that it has no further point."""
        status = self._child.wait()
        if status in (-signal.SIGSEGV, -signal.SIGABRT):
            raise Exhausted(f"NOMAD crashed ({signal.Signals(-status).name})")
        raise UserError(f"NOMAD's process ended with status {status}; its error stands above")


def _steps(parameter: Parameter) -> int:
    if parameter.kind == "choice":
        return len(parameter.choices) - 1
    return int(parameter.high - parameter.low) if parameter.kind == "int" and not parameter.log else STEPS


def start_point(space: SearchSpace) -> list[int]:
    """Return the point that NOMAD starts from: the one nearest to the space's start, else the middle."""
    start = space.start
    return [round((0.5 if start is None else p.share_of(start[p.key])) * _steps(p)) for p in space.parameters]


def decoded(point: list[int], space: SearchSpace) -> dict[str, Any]:
    """Return the values of the parameters at a point of whole numbers; floats with six digits, within their bounds. The
    starting point is the space's start itself."""
    if space.start is not None and point == start_point(space):
        return space.start
    return {p.key: _rounded(p, p.at(place / _steps(p))) for p, place in zip(space.parameters, point, strict=True)}


def _rounded(parameter: Parameter, value: Any) -> Any:
    if parameter.kind != "float":
        return value
    return min(max(float(f"{value:.6g}"), parameter.low), parameter.high)


def child() -> None:
    """Run NOMAD for the process at the other end of the pipes."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # NOMAD prints there; its errors come on standard error
    import PyNomad

    def say(message: dict[str, Any]) -> None:
        answer.write(json.dumps(message) + "\n")
        answer.flush()

    def evaluate(asked: Any) -> Any:
        points = [asked.get_x(index) for index in range(asked.size())] if hasattr(asked, "get_x") else [asked]
        say({"points": [[round(x.get_coord(i)) for i in range(x.size())] for x in points]})
        line = sys.stdin.readline()
        if not line:  # the search has ended: an exception would be printed by NOMAD, and no more
            os._exit(0)
        values = json.loads(line)
        for x, value in zip(points, values, strict=True):
            if value is not None:
                x.setBBO(repr(value).encode())
        good = [int(value is not None) for value in values]
        return good if hasattr(asked, "get_x") else good[0]

    settings = json.loads(sys.stdin.readline())
    kinds = " ".join("I" for _ in settings["start"])
    options = [
        f"BB_INPUT_TYPE ({kinds})", "BB_OUTPUT_TYPE OBJ", f"MAX_BB_EVAL {settings['trials']}",
        "DISPLAY_DEGREE 0", f"SEED {settings['seed']}", f"BB_MAX_BLOCK_SIZE {settings['block']}",
    ]  # fmt: skip
    low = [0] * len(settings["start"])
    result = PyNomad.optimize(evaluate, settings["start"], low, settings["high"], options)
    say({"ended": str(result.get("stop_reason", "no reason given")).strip()})


if __name__ == "__main__":
    child()
