"""The answers of runs as logs for Inspect (inspect.aisi.org.uk), for those who know its viewer: `inspect view DIR`.

One log a run and task. A sample's epoch is its sample number from 1; its target the gold; its scores the metrics of its
grade, each with what was extracted; its metadata the groups, the verdicts and a code task's sandbox outcome. The log's
results are the run's scores as they stand, its metadata the run's settings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.runs.environment import now
from eval.page.items import Answers, has_answers, read_answers
from eval.page.loose import read_shown
from eval.page.runs import ShownRun

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

INSTALL = "logs for Inspect need inspect_ai: pip install -e '.[inspect]', in an environment of its own"
_STOPS = {"length": "max_tokens", "stop": "stop"}


def write_logs(paths: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """Write RUN_TASK.eval into `folder` for each run and task with answers at hand; return them, and what is missing.

    Raises UserError where inspect_ai is not installed, or no run has an answer.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise UserError(INSTALL) from error
    runs, missing = read_shown(paths)
    written = []
    for run in runs:
        missing += [f"{run.run_id}: {fault}" for fault in run.damaged]
        for task, entry in run.evaluation.items():
            if not has_answers(task):
                continue
            answers = read_answers(run.run_path, task, entry)
            missing += [f"{run.run_id}, {task}: {fault}" for fault in answers.missing]
            if not answers.rows:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{run.run_id}_{task}.eval")
            write_eval_log(to_log(run, answers, entry), str(written[-1]))
    if not written:
        raise UserError(f"no answers to write: {'; '.join(missing[:3]) or 'no task of the runs has any'}")
    return written, missing


def to_log(run: ShownRun, answers: Answers, entry: Mapping[str, Any]) -> "EvalLog":
    """Return one run's answers to one task as an Inspect log."""
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalMetric,
        EvalPlan,
        EvalResults,
        EvalScore,
        EvalSpec,
        EvalStats,
    )

    result = run.result or {}
    generation = entry.get("generation") or {}
    finished = str(result.get("finished_at") or now())
    samples = [_sample(row) for row in answers.rows]
    graded = sum(row["is_graded"] for row in answers.rows)
    scores = [
        EvalScore(
            name=name, scorer="ba_lora", scored_samples=graded, metrics={"mean": EvalMetric(name="mean", value=value)}
        )
        for name, value in (entry.get("metrics") or {}).items()
        if isinstance(value, int | float)
    ]
    return EvalLog(
        status="success",
        eval=EvalSpec(
            eval_id=f"{run.run_id}-{answers.task}",
            run_id=run.run_id,
            task_id=answers.task,
            created=finished,
            task=answers.task,
            task_version=str(entry.get("version") or "0"),
            model=f"ba_lora/{run.run_id}",
            dataset=EvalDataset(name=answers.task, location=_text(entry.get("data")), samples=len(samples)),
            config=EvalConfig(epochs=max(sample.epoch for sample in samples)),
            packages={"inspect_ai": _version()},
            metadata={"run": result.get("config") or {}, "generation": generation},
        ),
        plan=EvalPlan(),
        results=EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=scores),
        stats=EvalStats(started_at=finished, completed_at=finished),
        samples=samples,
    )


def _sample(row: Mapping[str, Any]) -> "EvalSample":
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    extracted = row["extracted"]
    scores = {
        name: Score(value=value, answer=extracted.get(name) or extracted.get("outcome") or extracted.get("ratings"))
        for name, value in row["metrics"].items()
    }
    asked, answered = row["prompt"] or row["question"] or "", row["completion"] or ""
    kept = ("groups", "extracted", "invalid", "timeout", "error", "finish", "judgements", "probabilities", "question")
    stop = _STOPS.get(row["finish"] or "stop", "unknown")
    return EvalSample(
        id=_safe(row["id"]),
        epoch=row["sample"] + 1,
        input=_safe(asked),
        target=_safe(row["gold"] or ""),
        messages=[ChatMessageUser(content=_safe(asked)), ChatMessageAssistant(content=_safe(answered))],
        output=ModelOutput.from_content("ba_lora", _safe(answered), stop_reason=stop),
        scores=scores or None,
        metadata={key: row[key] for key in kept if row.get(key) not in (None, {}, [], False)},
    )


def _safe(text: str) -> str:
    """Lone surrogates cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("inspect_ai")
