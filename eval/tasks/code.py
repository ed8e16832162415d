"""What HumanEval and MBPP share: programs run in the sandbox against tests, and pass@k.

Two verdicts a completion: "pass@1", of the program that post-processing finds in the text (code_extraction.py), and
"strict", of the completion as it stands (behind a reasoning model's thinking). `pass@k` is the unbiased estimate of
Chen et al. 2021 (Codex), equation 1, for each k of `KS` up to the number of samples; "strict" is the strict pass@1.

Programs see Python's standard library only, no third-party package.
"""

import ast
from collections.abc import Callable, Sequence

from eval.grading.code_extraction import POST_PROCESSING, TooLong
from eval.grading.code_pruning import parse
from eval.grading.thinking import cut_thinking
from eval.sandbox.jobs import TIMEOUT, Job, Limits, Verdict
from eval.sandbox.sandbox import Sandbox
from eval.tasks.base import Grade, Item, Task

KS = (1, 5, 10, 100)
WALL_TO_CPU = 4  # wall seconds allowed for each CPU second: a busy machine must not fail anybody


class CodeTask(Task):
    """Subclasses define `items_from_rows`, `program`, `strict_program` and `tests`."""

    metrics = ("strict", *(f"pass@{k}" for k in KS))
    grading_choices = {"sandbox": ("bubblewrap", "unsafe")}

    def program(self, item: Item, text: str) -> str | None:
        """Return the program that post-processing finds in a completion, None where there is none."""
        raise NotImplementedError

    def strict_program(self, item: Item, completion: str) -> str:
        """Return the program that the completion makes as it stands."""
        raise NotImplementedError

    def tests(self, item: Item) -> tuple[str, tuple[str, ...]]:
        """Return the test statements, and the names that they take from the program."""
        raise NotImplementedError

    def conditions(self, *, timeout_s: float) -> dict:
        """Return the post-processing's version, the choices (None: not known), the sandbox and its limits."""
        known = {key: self.chosen.get(key) for key in self.choices}
        known |= {key: self.choice(key) for key in self.grading_choices if key != "sandbox"}
        sandbox = Sandbox(kind=self.choice("sandbox"), limits=limits_for(timeout_s)).describe()
        return {"post_processing": POST_PROCESSING, "choices": known, "sandbox": sandbox}

    def grade(self, item: Item, completion: str) -> Grade:
        """Grade one completion, in a sandbox of its own; `grade_all` is the way for many."""
        return self.grade_all([(item, completion)], workers=1)[0]

    def grade_all(
        self,
        pairs: Sequence[tuple[Item, str]],
        *,
        workers: int | None = None,
        timeout_s: float = 5.0,
        progress: Callable[[int], object] | None = None,
    ) -> list[Grade]:
        """Grade many completions, in order. The same program for the same item runs once.

        Raises UserError where the sandbox cannot be made.
        """
        places: dict[Job, int] = {}
        asked: list[tuple[str | None, int | None, int]] = []  # program, its job, the strict job
        too_long: set[int] = set()  # of `asked`
        for item, completion in pairs:
            tests, names = self.tests(item)
            modules = imported_modules(tests)

            def place(program: str, fixed: tuple = (tests, modules, names)) -> int:
                return places.setdefault(Job(program.rstrip() + "\n", *fixed), len(places))

            try:
                program = self.program(item, self.answer(completion))
            except TooLong:
                program = None
                too_long.add(len(asked))
            strict = place(self.strict_program(item, cut_thinking(completion, self.thinking)))
            asked.append((program, None if program is None else place(program), strict))
        done = [0]

        def advance(count: int) -> None:
            before = done[0] * len(pairs) // len(places)
            done[0] += count
            progress(done[0] * len(pairs) // len(places) - before)

        with Sandbox(kind=self.choice("sandbox"), limits=limits_for(timeout_s)) as sandbox:
            verdicts = sandbox.run(list(places), workers=workers, progress=advance if progress else None)
        return [
            make_grade(
                program, None if place is None else verdicts[place], verdicts[strict], too_long=index in too_long
            )
            for index, (program, place, strict) in enumerate(asked)
        ]

    def per_item(self, grades: Sequence[Sequence[Grade]]) -> list[dict[str, float]]:
        """Return for each item "strict", and pass@k for each k that every item has samples enough for."""
        smallest = min(len(samples) for samples in grades)
        rows = []
        for samples in grades:
            passed = round(sum(grade.metrics["pass@1"] for grade in samples))
            row = {"strict": sum(grade.metrics["strict"] for grade in samples) / len(samples)}
            row |= {f"pass@{k}": pass_at_k(len(samples), passed, k) for k in KS if k <= smallest}
            rows.append(row)
        return rows


def make_grade(program: str | None, verdict: Verdict | None, strict: Verdict, *, too_long: bool = False) -> Grade:
    """Return the grade; verdict is None where no program was found. too_long: the search for it took too long."""
    return Grade(
        metrics={"strict": float(strict.passed), "pass@1": float(verdict is not None and verdict.passed)},
        extracted={
            "program": program,
            "outcome": None if verdict is None else str(verdict),
            "strict_outcome": str(strict),
        },
        invalid=program is None,
        timeout=too_long or (verdict is not None and verdict.status == TIMEOUT),
    )


def limits_for(timeout_s: float) -> Limits:
    """Return the limits for eval.score's timeout_s, which counts CPU seconds."""
    return Limits(cpu_s=timeout_s, wall_s=WALL_TO_CPU * timeout_s)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples passes: 1 − C(n−c, k) / C(n, k)."""
    if num_samples - num_passed < k:
        return 1.0
    all_fail = 1.0
    for i in range(num_samples - num_passed + 1, num_samples + 1):
        all_fail *= 1.0 - k / i
    return 1.0 - all_fail


def loaded_names(source: str) -> set[str]:
    """Return the names that a piece of code reads."""
    tree = parse(source)
    nodes = ast.walk(tree) if tree is not None else ()
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def defined_names(source: str) -> set[str]:
    """Return the names of the functions and classes at the top level of a piece of code."""
    tree = parse(source)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in tree.body if isinstance(node, kinds)} if tree is not None else set()


def imported_modules(source: str) -> tuple[str, ...]:
    """Return the modules that a piece of code imports."""
    tree = parse(source)
    found: set[str] = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return tuple(sorted(found))
