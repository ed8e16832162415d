"""What a task is: where its items come from, how a completion is graded, how grades become metrics.

A task is an object with the attributes and methods of `Task`; most tasks subclass it and define `items_from_rows` and
`grade`. `eval.generate` uses `load`, `template`, `max_new_tokens` and `stop`; `eval.score` uses the rest.

Legend: an item is one row of the task's data; a completion is a model's text for one item; a grade is the verdict on
one completion.
"""

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ba_lora.errors import UserError
from ba_lora.rows import Source, load_rows
from eval.grading.limits import TimeLimit, cpu_limit
from eval.grading.thinking import THINKING, cut_thinking

if TYPE_CHECKING:
    import numpy as np

# What an Alpaca-tuned model may run on with after its response. Generation stops there and grading cuts there, so
# that completions made without stop strings get the same grade.
ALPACA_STOPS = ("### Instruction", "### Response", "Below is an instruction that describes a task")


@dataclass(frozen=True)
class Item:
    """One problem.

    task_id: "<task>/<row of the data file from 0>", unique in a task.
    instruction: the text that goes into the prompt template.
    gold: what the grader compares with (JSON-serialisable, it is copied into the grades file).
    meta: whatever groups the items (family, subject, level) or helps the grader.
    follows: task_id of the turn before, in a conversation: that item comes earlier, and its completion goes into this
    one's prompt.
    """

    task_id: str
    instruction: str
    gold: object
    meta: dict[str, object] = field(default_factory=dict)
    follows: str | None = None


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    metrics: name -> value in [0, 1], the same names for every grade of a task ("strict", "flexible", "pass@1", …).
    extracted: name -> the text taken as the answer, or None.
    invalid: no answer could be read at all (such a completion is also wrong).
    timeout: the grader's time limit was hit; counted, and the completion is wrong by that metric.
    error: why the grader failed on this completion; counted, and the completion is wrong.
    """

    metrics: dict[str, float]
    extracted: dict[str, str | None] = field(default_factory=dict)
    invalid: bool = False
    timeout: bool = False
    error: str | None = None


class Task:
    """Base of all tasks. Subclasses set the class attributes and define `items_from_rows` and `grade`."""

    name: str  # "gsm8k"; also the prefix of its task ids
    version: str  # bumped whenever the grade of some completion changes
    template: str = "alpaca"  # key of ba_lora.prompts.TEMPLATES
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ALPACA_STOPS
    metrics: tuple[str, ...] = ("strict", "flexible")  # the names that its scores can have
    groups: tuple[str, ...] = ()  # keys of Item.meta by which the scores are also given
    columns: tuple[str, ...] = ()  # columns that the data must have
    packages: tuple[str, ...] = ()  # distributions whose version may change a grade; their versions are recorded
    judged: bool = False  # a judge model grades: `eval.score` calls `judge_answers` (see mt_bench.py), not `grade_all`
    hub: str | None = None  # default data set on the hub
    hub_revision: str | None = None  # and its commit (the one data/manifest.yaml pins)
    hub_split: str = "test"
    top_p: float = 1.0  # how completions are drawn where the command line does not say; see also `temperature`
    num_samples: int = 1
    # What can be chosen by key=value: key -> the allowed values, the default first. `choices` shape prompts or sampling
    # and are recorded beside the completions; `grading_choices` belong to eval.score only.
    choices: Mapping[str, tuple[str, ...]] = {}
    grading_choices: Mapping[str, tuple[str, ...]] = {}
    thinking: str = THINKING  # the marks around what a reasoning model writes before its answer; set by eval.score
    chosen: Mapping[str, str] = {}  # set by `configured`; what is absent has its default

    def configured(self, values: Mapping[str, str]) -> "Task":
        """Return this task with these choices made. Raises UserError for a key or value that it does not have."""
        known = {**self.choices, **self.grading_choices}
        for key, value in values.items():
            if key not in known:
                raise UserError(f"{self.name} has no choice {key}: its choices are {', '.join(known) or 'none'}")
            if value not in known[key]:
                raise UserError(f"{key}={value}: choose one of {', '.join(known[key])}")
        task = copy.copy(self)
        task.chosen = {**self.chosen, **values}
        return task

    def choice(self, key: str) -> str:
        """Return the value chosen for `key`, or its default."""
        return self.chosen.get(key) or {**self.choices, **self.grading_choices}[key][0]

    def select(self, items: list[Item], task_ids: Iterable[str] | None = None) -> list[Item]:
        """Return the items to generate for (`task_ids` None), or those that completions with these ids must cover."""
        return items

    def conditions(self, *, timeout_s: float) -> dict:
        """Return further keys of the result: what else the scores depend on (limits, choices, …)."""
        return {}

    def hub_configs(self, hub_name: str) -> tuple[str | None, ...]:
        """Return the hub configurations to concatenate, in this order (None: the only one)."""
        return (None,)

    def default_data(self) -> str:
        """Return the data used where no `data` is given: a hub name or a path. Raises UserError where there is none."""
        if self.hub is None:
            raise UserError(f"{self.name} has no data of its own: give --data FILE or eval.data.{self.name}=FILE")
        return f"{self.hub}@{self.hub_revision}" if self.hub_revision else self.hub

    def load(self, data: str | None = None) -> tuple[list[Item], Source]:
        """Return the items of `data` (a hub name, `name@revision`, a local file, None: the default) and the source.

        Raises UserError in one line for an absent file or data set, wrong columns, empty or damaged data.
        """
        rows, source = load_rows(
            str(data) if data is not None else self.default_data(),
            split=self.hub_split,
            configs=self.hub_configs,
        )
        require_columns(rows, self.columns, source=source.name, task=self.name)
        return self.items_from_rows(rows, source=source.name), source

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        """Turn data rows into items, in order. Raises UserError naming `source` and the row that does not fit."""
        raise NotImplementedError

    def answer(self, completion: str) -> str:
        """Return the part of a completion that is graded: behind the model's thinking, before a stop string."""
        return cut_at_stops(cut_thinking(completion, self.thinking), self.stop)

    def temperature(self, item: Item) -> float:
        """Return the temperature to generate with where none is asked for; 0 is greedy."""
        return 0.0

    def grade(self, item: Item, completion: str) -> Grade:
        """Grade one completion."""
        raise NotImplementedError

    def grade_all(
        self,
        pairs: Sequence[tuple[Item, str]],
        *,
        workers: int | None = None,
        timeout_s: float = 5.0,
        progress: Callable[[int], object] | None = None,
    ) -> list[Grade]:
        """Grade many completions, in order. A task whose grader needs processes of its own overrides this.

        A completion on which the grader fails or takes too long is graded as an empty one, and says so: a bad item is
        counted and never ends the scoring.
        workers: processes to use at most (None: as many as cores); timeout_s: limit for one completion;
        progress: called with the number of completions newly done.
        """
        grades = []
        for item, completion in pairs:
            try:
                with cpu_limit(timeout_s):
                    grade = self.grade(item, completion)
            except TimeLimit:
                grade = dataclasses.replace(self.grade(item, ""), timeout=True)
            except (UserError, NotImplementedError):
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:200]
                grade = dataclasses.replace(self.grade(item, ""), error=reason)
            grades.append(grade)
            if progress:
                progress(1)
        return grades

    def aggregate(self, items: Sequence[Item], grades: Sequence[Sequence[Grade]]) -> dict:
        """Turn the grades into the result's "metrics" and "groups".

        grades[i] are the grades of the samples of items[i], as many for each item. A metric is the mean over items
        of the mean over samples, never the best sample. A task may override this, e.g. for an unbiased pass@k, and
        may add further keys, which are copied into the result. "interval_95": metric -> [low, high], the bootstrap
        interval over items.
        """
        return summarise(items, self.per_item(grades), groups=self.groups)

    def per_item(self, grades: Sequence[Sequence[Grade]]) -> list[dict[str, float]]:
        """Return for each item name -> its metric: the mean over its samples. Every grade must carry the same names."""
        names = list(grades[0][0].metrics)
        return [
            {name: sum(grade.metrics[name] for grade in samples) / len(samples) for name in names} for samples in grades
        ]


def summarise(
    items: Sequence[Item],
    rows: Sequence[Mapping[str, float]],
    *,
    groups: Sequence[str],
    clusters: Sequence[Hashable] | None = None,
) -> dict:
    """Return "metrics", "interval_95" and, where an item has one of the keys `groups`, "groups".

    rows[i]: the metrics of items[i]; one that an item lacks is averaged over the others, and absent without any.
    clusters: see `bootstrap_intervals`.
    """
    result = {"metrics": column_means(rows), "interval_95": bootstrap_intervals(rows, clusters)}
    for key in groups:
        members: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            if item.meta.get(key) is not None:
                members.setdefault(str(item.meta[key]), []).append(index)
        if members:
            result.setdefault("groups", {})[key] = {
                value: {"n": len(indices), "metrics": column_means([rows[i] for i in indices])}
                for value, indices in sorted(members.items())
            }
    return result


def metric_names(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the metrics that some row has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def column_means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return name -> mean over the rows that have it."""
    columns = {name: [row[name] for row in rows if name in row] for name in metric_names(rows)}
    return {name: sum(column) / len(column) for name, column in columns.items()}


NUM_RESAMPLES = 5000


def bootstrap_intervals(
    rows: Sequence[Mapping[str, float]], clusters: Sequence[Hashable] | None = None
) -> dict[str, list[float]]:
    """Return name -> [low, high]: the percentile bootstrap 95 % interval of the mean over the rows that have it.

    rows: items. clusters[i] says what rows[i] belongs to, where rows are not independent: clusters are drawn then, each
    with all of its rows.
    """
    import numpy as np

    names = metric_names(rows)
    if not names:
        return {}
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters or range(len(rows))))}
    sums_NM, sizes_NM = np.zeros((2, len(places), len(names)))
    for row, cluster in zip(rows, clusters or range(len(rows)), strict=True):
        for name, value in row.items():
            sums_NM[places[cluster], names.index(name)] += value
            sizes_NM[places[cluster], names.index(name)] += 1
    found = bootstrap(len(places), lambda counts_RN: counts_RN @ sums_NM / (counts_RN @ sizes_NM))
    return dict(zip(names, found, strict=True))


def bootstrap(num_items: int, statistic: Callable[["np.ndarray"], "np.ndarray"]) -> list[list[float] | None]:
    """Return [low, high] of each metric: its percentile bootstrap 95 % interval over items.

    statistic: how often each item was drawn [R, N] -> the metrics of each resample [R, M]. NaN: a resample leaves
    a metric undefined and is left out; None: all of them do. Items are drawn with replacement, the same draws for all
    metrics, from a fixed seed: the same grades give the same interval. It tells how far the score would move with
    another sample of items; the noise of training, and of sampling completions, comes on top.
    """
    import numpy as np

    random = np.random.default_rng(0)
    found, at_once = [], max(1, 2_000_000 // num_items)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, NUM_RESAMPLES, at_once):
            size = (min(at_once, NUM_RESAMPLES - start), num_items)
            drawn_RN = random.integers(0, num_items, size, dtype=np.int32) + num_items * np.arange(size[0])[:, None]
            counts_RN = np.bincount(drawn_RN.ravel(), minlength=drawn_RN.size).reshape(size)
            found.append(statistic(counts_RN.astype(np.float64)))
    intervals: list[list[float] | None] = []
    for values in np.concatenate(found).T:
        defined = values[~np.isnan(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) if defined.size else (None, None)
        intervals.append(None if low is None else [round(float(low), 6), round(float(high), 6)])
    return intervals


def cut_at_stops(completion: str, stops: Iterable[str]) -> str:
    """Return the text before the first of `stops`."""
    ends = [position for stop in stops if (position := completion.find(stop)) >= 0]
    return completion[: min(ends)] if ends else completion


def require_columns(rows: Sequence[dict], columns: Sequence[str], *, source: str, task: str) -> None:
    """Raise UserError, saying which columns were found, unless every row has all `columns`."""
    for index, row in enumerate(rows):
        missing = [column for column in columns if column not in row]
        if missing:
            raise UserError(
                f"{source}, row {index}: {task} needs the columns {', '.join(columns)}, "
                f"but {', '.join(missing)} is missing; found: {', '.join(map(str, row)) or 'none'}"
            )


def require_text(row: dict, column: str, *, source: str, index: int) -> str:
    """Return row[column] as a non-empty string, or raise UserError naming the row."""
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{source}, row {index}: column {column} must be non-empty text, found {value!r:.60}")
    return value
