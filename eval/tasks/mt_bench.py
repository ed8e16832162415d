"""MT-Bench: 80 questions of two turns, rated by a judge model (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench").

Questions, GPT-4's reference answers and the judge's prompts are FastChat's files. `data` is FastChat's repository at a
commit (the default; fetched once into .cache/fastchat, contents checked), a folder that holds the files, or the
question file with the others beside it. Task ids: "mt_bench/81/turn1", "mt_bench/81/turn2".

As published: the temperatures of the categories, single-answer grading, reference answers shown to the judge for maths,
reasoning and coding, the second turn judged with the whole conversation, and the overall score as the mean over all
rated answers of both turns. Ours: several judgements of an answer are averaged first; the result tells their spread. A
judgement without a rating is counted and left out (see eval/judge/judge.py); an answer of which no judgement has a
rating is `invalid`.

Metrics are fractions as everywhere: "rating", "rating_turn1", "rating_turn2" are a tenth of the usual score, which
stands in the result under "ratings" (1 to 10). A metric that nothing supports (no rating at all) is absent.
"""

import dataclasses
import hashlib
import json
import os
import statistics
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.io import read_jsonl, sha256_file, write_text_atomic
from ba_lora.paths import PROJECT_ROOT
from ba_lora.rows import Source, load_rows
from eval.grading.thinking import cut_thinking
from eval.judge.client import NO_RATING, SCALE, JudgeOptions
from eval.judge.judge import Judged, judge
from eval.judge.store import Request, short_sha256
from eval.tasks.base import Grade, Item, Task, require_columns, summarise

REPOSITORY, REVISION = "lm-sys/FastChat", "587d5cfa1609a43d192cedb8441cac3c17db105d"
# role -> (path in FastChat's repository below fastchat/llm_judge/data, sha256 at REVISION, other names on disk)
FILES = {
    "questions": (
        "mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        ("question.jsonl", "mt_bench_question.jsonl"),
    ),
    "references": (
        "mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
        ("reference_answer/gpt-4.jsonl", "reference_answer_gpt-4.jsonl", "mt_bench_reference_answer_gpt-4.jsonl"),
    ),
    "judge_prompts": (
        "judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
        ("judge_prompts.jsonl", "../judge_prompts.jsonl"),
    ),
}
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7  # of a category that FastChat does not name
WITH_REFERENCE = ("math", "reasoning", "coding")
JUDGE_PROMPTS = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
DOWNLOAD_TIMEOUT_S = 60


class MTBench(Task):
    name = "mt_bench"
    version = "2"  # 2: thinking is cut from answers and judgements; \[\[8\]\] is a rating
    template = "alpaca"
    max_new_tokens = 1024
    # with the colon: answers may well have a heading "### Response time"
    stop = ("### Instruction:", "### Response:", "Below is an instruction that describes a task")
    metrics = ("rating",)
    groups = ("category", "turn")
    columns = ("question_id", "category", "turns")
    packages = ("openai",)
    judged = True

    def default_data(self) -> str:
        return f"{REPOSITORY}@{REVISION}"

    def load(self, data: str | None = None) -> tuple[list[Item], Source]:
        data = str(data) if data is not None else self.default_data()
        published = data.partition("@")[0] == REPOSITORY and not Path(data).exists()
        files = fetch(data) if published else locate(Path(data))
        rows, source = load_rows(str(files["questions"]))
        require_columns(rows, self.columns, source=source.name, task=self.name)
        items = self.items_from_rows(rows, source=source.name)
        for item in items:
            item.meta["files"] = files
        return items, dataclasses.replace(source, name=data) if published else source

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        """Return two items a question; the second follows the first. `gold` is None: there is no right answer."""
        items, seen = [], set()
        for index, row in enumerate(rows):
            number, category, turns = row["question_id"], row["category"], row["turns"]
            if isinstance(number, bool) or not isinstance(number, int) or number in seen:
                raise UserError(
                    f"{source}, row {index}: question_id must be a whole number of its own, found {number!r:.40}"
                )
            if not isinstance(category, str):
                raise UserError(f"{source}, row {index}: category must be text, found {category!r:.40}")
            if (
                not isinstance(turns, list)
                or len(turns) != 2
                or not all(isinstance(t, str) and t.strip() for t in turns)
            ):
                raise UserError(f"{source}, row {index}: turns must be two texts, found {turns!r:.60}")
            seen.add(number)
            for turn in (1, 2):
                items.append(
                    Item(
                        task_id=f"{self.name}/{number}/turn{turn}",
                        instruction=turns[turn - 1],
                        gold=None,
                        meta={"question_id": number, "category": category, "turn": turn, "turns": turns},
                        follows=f"{self.name}/{number}/turn1" if turn == 2 else None,
                    )
                )
        return items

    def temperature(self, item: Item) -> float:
        return TEMPERATURES.get(str(item.meta["category"]), OTHER_TEMPERATURE)

    def judge_answers(
        self,
        answers: Sequence[tuple[Item, Sequence[tuple[int, str]]]],
        *,
        store: Path,
        options: JudgeOptions,
        progress: Callable[[int], object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> tuple[list[list[Grade]], dict]:
        """Have every answer judged; return the grades (items → samples) and the result's "judge" and "ratings".

        answers: items with their (sample, text)s. Raises UserError; see eval/judge/judge.py.
        """
        files = answers[0][0].meta["files"]
        prompts, references = read_judge_prompts(files["judge_prompts"]), read_references(files["references"])
        texts = {
            (item.task_id, sample): cut_thinking(text, self.thinking).strip()
            for item, samples in answers
            for sample, text in samples
        }
        requests = [
            make_request(item, sample, texts, prompts=prompts, references=references)
            for item, samples in answers
            for sample, _ in samples
        ]
        judged = judge(requests, store=store, options=options, progress=progress, environ=environ)
        ratings = iter(judged.ratings)
        per_item = [[next(ratings) for _ in samples] for _, samples in answers]
        items = [item for item, _ in answers]
        grades = [[to_grade(item, sample) for sample in samples] for item, samples in zip(items, per_item, strict=True)]
        return grades, {
            "ratings": describe_ratings(items, per_item),
            "judge": judge_record(judged, prompts, references),
        }

    def aggregate(self, items: Sequence[Item], grades: Sequence[Sequence[Grade]]) -> dict:
        """Return metrics, their intervals and groups over the rated answers; see the head of this file.

        A question's turns are not independent: intervals draw questions, each with both turns.
        """
        rows = []
        for item, samples in zip(items, grades, strict=True):
            rated = [grade.metrics["rating"] for grade in samples if "rating" in grade.metrics]
            names = ("rating", f"rating_turn{item.meta['turn']}") if rated else ()
            rows.append(dict.fromkeys(names, statistics.fmean(rated) if rated else None))
        return summarise(items, rows, groups=self.groups, clusters=[item.meta["question_id"] for item in items])


def to_grade(item: Item, ratings: Sequence[float]) -> Grade:
    """Turn the ratings (1 to 10) of one answer into its grade; without a rating it has no metric and is invalid."""
    valid = [rating for rating in ratings if rating != NO_RATING]
    metrics = {"rating": statistics.fmean(valid) / SCALE[1]} if valid else {}
    return Grade(metrics, {"ratings": " ".join(f"{rating:g}" for rating in ratings)}, invalid=not valid)


def describe_ratings(items: Sequence[Item], ratings: Sequence[Sequence[Sequence[float]]]) -> dict:
    """Return the result's "ratings", on the scale of 1 to 10.

    ratings: items → samples → judgements. turn1, turn2, overall: means over rated answers. judgements: the overall
    score by each judgement number only, and std: their spread (sample standard deviation), None for fewer than two.
    answer_std: the mean over answers of the standard deviation between an answer's own judgements.
    """
    answers = [(item.meta["turn"], sample) for item, samples in zip(items, ratings, strict=True) for sample in samples]

    def mean(values: Sequence[Sequence[float]]) -> float | None:
        means = [statistics.fmean(valid) for ratings in values if (valid := [r for r in ratings if r != NO_RATING])]
        return statistics.fmean(means) if means else None

    each = [mean([[sample[index]] for _, sample in answers]) for index in range(len(answers[0][1]))]
    known = [value for value in each if value is not None]
    spreads = [
        statistics.stdev(valid) for _, sample in answers if len(valid := [r for r in sample if r != NO_RATING]) > 1
    ]
    return {
        "overall": mean([sample for _, sample in answers]),
        "turn1": mean([sample for turn, sample in answers if turn == 1]),
        "turn2": mean([sample for turn, sample in answers if turn == 2]),
        "judgements": each,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "answer_std": statistics.fmean(spreads) if spreads else None,
        "num_rated": sum(any(r != NO_RATING for r in sample) for _, sample in answers),
        "num_answers": len(answers),
    }


def judge_record(
    judged: Judged, prompts: Mapping[str, tuple[str, str]], references: Mapping[int, Sequence[str]]
) -> dict:
    """Return the result's "judge"; `id` is what must be equal wherever scores stand side by side."""
    record = {
        **judged.record,
        "prompt_hash": short_sha256(json.dumps([[name, *prompts[name]] for name in JUDGE_PROMPTS])),
        "references_hash": short_sha256(json.dumps(sorted(references.items()))),
    }
    names = ("model", "version", "prompt_hash", "references_hash", "temperature", "max_tokens", "thinking")
    return {"id": " ".join(f"{name}={record[name]}" for name in names), **record}


def make_request(
    item: Item,
    sample: int,
    texts: Mapping[tuple[str, int], str],
    *,
    prompts: Mapping[str, tuple[str, str]],
    references: Mapping[int, Sequence[str]],
) -> Request:
    """Return what the judge is asked about one answer.

    texts: (task_id, sample) → the model's text. Raises UserError where the first turn's answer, the question's
    reference or a field of the judge's prompt is missing.
    """
    number, turn, turns = item.meta["question_id"], item.meta["turn"], item.meta["turns"]
    first = (item.follows or item.task_id, sample)
    if first not in texts:
        raise UserError(f"{item.task_id} sample {sample} cannot be judged without {first[0]}: generate that, too")
    with_reference = item.meta["category"] in WITH_REFERENCE
    name = ("single-math-v1" if with_reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    fields = {"question": turns[0]} if turn == 1 else {"question_1": turns[0], "question_2": turns[1]}
    if with_reference:
        if number not in references:
            raise UserError(f"question {number} ({item.meta['category']}) has no reference answer: add it to the file")
        fields |= {f"ref_answer_{n}": references[number][n - 1] for n in range(1, turn + 1)}
    answers = {"answer": texts[first]} if turn == 1 else {"answer_1": texts[first]}
    if turn == 2:
        answers["answer_2"] = texts[item.task_id, sample]
    system, template = prompts[name]
    try:
        user = template.format(**fields, **answers)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"the judge prompt {name} has a field that MT-Bench does not fill: {error}") from error
    frame = json.dumps([name, system, template, fields])
    return Request(number, turn, "\0".join(answers.values()), system, user, frame)


def read_judge_prompts(path: Path | None) -> dict[str, tuple[str, str]]:
    """Return name → (system prompt, template) of the four prompts for single answers. Raises UserError."""
    path = require_file(path, "judge_prompts")
    found = {}
    for row in read_jsonl(path):
        if row.get("name") in JUDGE_PROMPTS:
            texts = (row.get("system_prompt"), row.get("prompt_template"))
            if not all(isinstance(text, str) for text in texts) or row.get("output_format") != "[[rating]]":
                raise UserError(f"{path}: {row['name']} is no judge prompt for a [[rating]]")
            found[row["name"]] = texts
    missing = [name for name in JUDGE_PROMPTS if name not in found]
    if missing:
        raise UserError(f"{path}: the judge prompts {', '.join(missing)} are missing; is it FastChat's file?")
    return found


def read_references(path: Path | None) -> dict[int, tuple[str, str]]:
    """Return question id → the reference answers to both turns. Raises UserError."""
    path = require_file(path, "references")
    references = {}
    for index, row in enumerate(read_jsonl(path)):
        try:
            first, second = row["choices"][0]["turns"]
            if not (isinstance(first, str) and isinstance(second, str) and isinstance(row["question_id"], int)):
                raise TypeError
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path}, row {index}: no reference answer with question_id and two turns") from error
        references[row["question_id"]] = (first, second)
    return references


def locate(path: Path) -> dict[str, Path | None]:
    """Return role → file for a folder with FastChat's files, or for a question file with the others beside it.

    Generating needs only the questions, so that the others may be None. Raises UserError where there are no questions.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; give FastChat's question.jsonl or the folder that holds it")
    folder = path if path.is_dir() else path.parent
    found: dict[str, Path | None] = {}
    for role, (published, _, names) in FILES.items():
        candidates = [folder / name for name in (published, *names)]
        found[role] = next((file for file in candidates if file.is_file()), None)
    if not path.is_dir():
        found["questions"] = path
    require_file(found["questions"], "questions", folder=path)
    return found


def require_file(path: Path | None, role: str, *, folder: Path | None = None) -> Path:
    """Return `path`, or raise UserError that says which of FastChat's files is missing."""
    if path is None:
        where = f"in {folder}" if folder else "beside MT-Bench's questions"
        raise UserError(f"no {role.replace('_', ' ')} {where}: put FastChat's {FILES[role][0]} there")
    return path


def fetch(data: str) -> dict[str, Path | None]:
    """Return role → file of FastChat at our commit, fetched from GitHub where .cache/fastchat does not hold them yet.

    Raises UserError for another commit, out of reach, or contents that are not the ones we know.
    """
    if data.partition("@")[2] not in ("", REVISION):
        raise UserError(f"MT-Bench's files are known at {REPOSITORY}@{REVISION} only: for others give a local folder")
    folder = PROJECT_ROOT / ".cache" / "fastchat" / REVISION
    files: dict[str, Path | None] = {}
    for role, (published, sha256, _) in FILES.items():
        path = folder / published
        if not path.is_file() or sha256_file(path) != sha256:
            write_text_atomic(path, _download(published, sha256))
        files[role] = path
    return files


def _download(published: str, sha256: str) -> str:
    url = f"https://raw.githubusercontent.com/{REPOSITORY}/{REVISION}/fastchat/llm_judge/data/{published}"
    fix = "give a folder with FastChat's files (--data DIR)"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise UserError(f"MT-Bench's {published} is not on this machine, and HF_HUB_OFFLINE is set; {fix}")
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content = response.read()
    except OSError as error:  # URLError is one
        raise UserError(f"cannot fetch {url}: {getattr(error, 'reason', error)}; {fix}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{url} is not the file we know (sha256 {sha256[:12]}…); {fix}")
    return content.decode("utf-8")
