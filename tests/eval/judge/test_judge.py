"""eval/judge/judge.py against a server of the test's own: ratings, retries, refusals, resuming, and never two
judges."""

import dataclasses
import json
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.io import read_jsonl
from ba_lora.judge_endpoint import Endpoint, endpoint_from_environment
from eval.completions import PROMPT_TOO_LONG
from eval.judge import store as judge_store
from eval.judge.client import _RATINGS, NO_RATING, JudgeOptions, read_rating
from eval.judge.judge import estimate, judge, one_judge
from eval.judge.store import Request
from tests.support.judge_server import JudgeServer, completion, failure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    for name in ("JUDGE_MODEL", "JUDGE_BASE_URL", "JUDGE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def requests(number: int = 3, answer: str = "answer") -> list[Request]:
    return [Request(81 + n, 1, f"{answer} {n}", "system", f"rate {answer} {n}", f"frame {n}") for n in range(number)]


ONE = JudgeOptions(judgements=1, parallel=2, timeout_s=5, attempts=4)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("Rating: [[8.5]]", 8.5),
        ("[[10]] out of ten", 10),
        ("first [[3]], then [[9]]", 3),
        ("[5] is a footnote, but [[6]] is the rating", 6),
        ("Rating: [4]", 4),
        ("Rating: [[rating]]", NO_RATING),
        ("Rating: 7", NO_RATING),
        ("Rating: [[ 7 ]]", NO_RATING),
        ("Rating: [[-7]]", NO_RATING),
        ("[[7/10]]", NO_RATING),
        ("", NO_RATING),
        ("[[0]]", NO_RATING),
        ("[[11]]", NO_RATING),
        ("as shown in [2023]", NO_RATING),
        ("[[" + "9" * 5000 + "]]", NO_RATING),
        ("[[7.]]", 7),
        (r"Rating: \[\[8\]\]", 8),
        (r"As in [3], the rating is \[\[8.5\]\]", 8.5),
        (r"\[\[2\]\] but [[9]]", 9),
        ("<think>[[3]] or [[4]]</think> Rating: [[9]]", 9),
        ("Hm, [[3]]?</think>Rating: [[9]]", 9),
        ("<think>[[3]] perhaps", NO_RATING),
        ("[[" + "9" * 200_000, NO_RATING),
        ("[[" * 100_000 + "7", NO_RATING),
    ],
)
def test_ratings_are_read_as_published_and_within_the_scale(text: str, rating: float) -> None:
    assert read_rating(text) == rating


def test_several_ratings_are_counted_and_listed(tmp_path: Path) -> None:
    texts = ["The rubric: [[1]] is bad. Rating: [[9]]", "[[7]], so: Rating: [[7]]", "as [1] and [2] say"]
    with JudgeServer(lambda number, body: completion(texts[int(body["messages"][1]["content"][-1])])) as server:
        judged = judge(requests(), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert judged.ratings == [[1], [7], [1]]  # FastChat's rule: the first
    assert judged.record["num_several_ratings"] == 2 and judged.record["num_invalid_judgements"] == 0
    assert judged.record["several_ratings"] == [
        {"question_id": 81, "turn": 1, "index": 0, "ratings": [1, 9]},
        {"question_id": 83, "turn": 1, "index": 0, "ratings": [1, 2]},
    ]


def test_the_judges_marks_of_thinking_can_be_named(tmp_path: Path) -> None:
    text = "<reason>[[3]]</reason>[[8]]"
    with JudgeServer(lambda number, body: completion(text)) as server:
        judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
        own = dataclasses.replace(ONE, thinking="<reason> </reason>")
        judged = judge(requests(1), store=tmp_path / "j", options=own, environ=server.environ)
    assert judged.ratings == [[8]] and len(server.requests) == 1  # the text on file is read again
    assert judged.record["thinking"] == "<reason> </reason>"


def test_reading_agrees_with_the_published_patterns() -> None:
    """FastChat's own patterns, taken from its installed source (importing that module needs packages long gone)."""
    import importlib.util
    import re

    source = Path(importlib.util.find_spec("fastchat").origin).parent / "llm_judge" / "common.py"
    published = dict(re.findall(r'^(one_score_pattern\w*) = re\.compile\("(.*)"\)$', source.read_text(), re.MULTILINE))
    ours = [pattern.pattern.replace("++", "+").replace("?+", "?").replace("*+", "*") for pattern in _RATINGS]
    assert [ours[0], ours[2]] == [published["one_score_pattern"], published["one_score_pattern_backup"]]


def test_exact_ratings_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ratings = {"rate answer 0": "[[2]]", "rate answer 1": "[[9.5]]", "rate answer 2": "I cannot say"}
    done = []
    with JudgeServer(lambda number, body: completion(ratings[body["messages"][1]["content"]])) as server:
        judged = judge(
            requests(), store=tmp_path / "new" / "j.jsonl", options=ONE, environ=server.environ, progress=done.append
        )
    assert judged.ratings == [[2], [9.5], [NO_RATING]] and done == [1, 1, 1]
    for body in server.requests:
        assert body["path"] == "/v1/chat/completions" and body["model"] == "judge-1"
        assert (body["temperature"], body["max_tokens"]) == (0, 2048)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    record = judged.record
    assert (record["model"], record["version"]) == ("judge-1", "judge-1-0101")
    assert (record["num_judgements"], record["num_invalid_judgements"]) == (3, 1)
    assert (record["prompt_tokens"], record["completion_tokens"]) == (300, 21)
    assert record["endpoints"] == [server.url]
    told = capsys.readouterr().err
    assert told.startswith("judge judge-1: 3 calls (0 of 3 judgements are on file), about 14 tokens of prompts")
    assert "at most 6,144" in told
    assert all(header["authorization"] == "Bearer secret-key" for header in server.headers)
    assert "secret-key" not in (tmp_path / "new" / "j.jsonl").read_text()


def test_several_judgements_and_a_limit_on_parallel_calls(tmp_path: Path) -> None:
    options = JudgeOptions(judgements=3, parallel=3, timeout_s=60)

    def answer(number: int, body: dict) -> tuple:
        while number and server.most_at_once < 3:  # the first call is made alone
            time.sleep(0.01)
        return completion(f"[[{number % 10 + 1}]]", delay_s=0.03)

    with JudgeServer(answer) as server:
        judged = judge(requests(6), store=tmp_path / "j.jsonl", options=options, environ=server.environ)
    assert [len(ratings) for ratings in judged.ratings] == [3] * 6 and len(server.requests) == 18
    assert server.most_at_once == 3


def test_nothing_is_paid_for_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = tmp_path / "j.jsonl"
    with JudgeServer(lambda number, body: completion(f"[[{number + 1}]]")) as server:
        first = judge(requests(3), store=store, options=ONE, environ=server.environ)
        again = judge(requests(3), store=store, options=ONE, environ=server.environ)
        assert again.ratings == first.ratings and len(server.requests) == 3
        # without any endpoint: what is on file is enough
        assert judge(requests(3), store=store, options=ONE, environ={}).ratings == first.ratings
        capsys.readouterr()
        # one more judgement each, one other answer
        more = judge(requests(4), store=store, options=JudgeOptions(judgements=2), environ=server.environ)
        assert len(server.requests) == 3 + 3 + 2
        assert [ratings[0] for ratings in more.ratings[:3]] == [ratings[0] for ratings in first.ratings]
        assert "5 calls (3 of 8 judgements are on file)" in capsys.readouterr().err
        # other settings are another judge
        judge(requests(1), store=store, options=JudgeOptions(judgements=1, temperature=None), environ=server.environ)
        assert len(server.requests) == 9 and "temperature" not in server.requests[-1]
    with pytest.raises(UserError, match="not all of the 5 judgements are in .*JUDGE_MODEL"):
        judge(requests(5), store=store, options=ONE, environ={})


def test_equal_answers_to_one_question_share_their_judgement(tmp_path: Path) -> None:
    twins = [requests(1)[0], requests(1)[0]]
    with JudgeServer(lambda number, body: completion("[[5]]")) as server:
        assert judge(twins, store=tmp_path / "j", options=ONE, environ=server.environ).ratings == [[5], [5]]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        failure(429, "slow down", Retry_After="0.02"),
        failure(429, "slow down"),
        failure(500),
        failure(503, "overloaded", Retry_After="soon"),
        failure(408),
        (200, {}, b'{"choices": [{"message": {"content": "[[3'),
        (200, {}, b"[]"),
        (200, {}, b"{}"),
        (200, {}, json.dumps({"model": "m", "choices": []}).encode()),
        (200, {"Content-Type": "text/html"}, b"<html>gateway</html>"),
        (502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>"),
    ],
)
def test_passing_troubles_are_tried_again(tmp_path: Path, trouble: tuple) -> None:
    with JudgeServer(lambda number, body: trouble if number in (0, 2) else completion("[[4]]")) as server:
        judged = judge(requests(2), store=tmp_path / "j.jsonl", options=ONE, environ=server.environ)
    assert judged.ratings == [[4], [4]] and len(server.requests) == 4
    assert len(read_jsonl(tmp_path / "j.jsonl")) == 2


def test_time_outs_are_tried_again(tmp_path: Path) -> None:
    def answer(number: int, body: dict) -> tuple:
        return completion("[[4]]", delay_s=3.0 if number == 0 else 0.0)

    options = JudgeOptions(judgements=1, timeout_s=1.0, attempts=2)
    with JudgeServer(answer) as server:
        assert judge(requests(1), store=tmp_path / "j", options=options, environ=server.environ).ratings == [[4]]
    assert len(server.requests) == 2


def test_retry_after_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 60.0)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 60.0)
    times = []

    def answer(number: int, body: dict) -> tuple:
        times.append(time.monotonic())
        return completion("[[4]]") if number else failure(429, Retry_After="0.4")

    with JudgeServer(answer) as server:
        judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert 0.4 <= times[1] - times[0] < 30


@pytest.mark.parametrize(
    ("trouble", "said", "calls"),
    [
        (failure(401, "wrong key secret-key"), "refused the key (401): check JUDGE_API_KEY", 1),
        (failure(404, "no such model"), "does not know judge-1 (404", 1),
        (failure(400, "'max_tokens' is not supported"), "judge_max_tokens=none", 1),
        (failure(429, "pay first", code="insufficient_quota"), "answered 429", 1),
        (failure(429, "come tomorrow", Retry_After="86400"), "answered 429", 1),
        (failure(500, "broken for secret-key"), "failed 4 times, at last: answered 500 (", 4),
        ((200, {}, b"{"), "failed 4 times, at last: sent a broken reply", 4),
    ],
)
def test_lasting_troubles_are_one_line_without_the_key(tmp_path: Path, trouble: tuple, said: str, calls: int) -> None:
    with JudgeServer(lambda number, body: trouble) as server:
        with pytest.raises(UserError) as caught:
            judge(requests(3), store=tmp_path / "j.jsonl", options=ONE, environ=server.environ)
    message = str(caught.value)
    assert said in message and "\n" not in message and "secret-key" not in message
    assert "(0 new judgements are on file, 3 are missing" in message
    assert len(server.requests) == calls and not (tmp_path / "j.jsonl").exists()


def test_nobody_there(tmp_path: Path) -> None:
    with JudgeServer(lambda number, body: completion("")) as server:
        environ = server.environ
    with pytest.raises(UserError, match="failed 4 times, at last: cannot be reached .*check JUDGE_BASE_URL"):
        judge(requests(1), store=tmp_path / "j", options=ONE, environ=environ)


def test_what_was_paid_before_a_failure_is_kept(tmp_path: Path) -> None:
    store = tmp_path / "j.jsonl"
    with JudgeServer(lambda number, body: completion("[[6]]") if number < 4 else failure(403)) as server:
        with pytest.raises(UserError, match=r"\(4 new judgements are on file, 6 are missing"):
            judge(requests(10), store=store, options=ONE, environ=server.environ)
        server.answer = lambda number, body: completion("[[7]]")
        before = len(server.requests)
        judged = judge(requests(10), store=store, options=ONE, environ=server.environ)
        assert len(server.requests) - before == 6
    assert sorted(rating for ratings in judged.ratings for rating in ratings) == [6] * 4 + [7] * 6


def test_a_killed_write_is_mended_and_a_foreign_line_refused(tmp_path: Path) -> None:
    store = tmp_path / "j.jsonl"
    with JudgeServer(lambda number, body: completion("[[6]]")) as server:
        judge(requests(3), store=store, options=ONE, environ=server.environ)
        whole = store.read_bytes()
        store.write_bytes(whole[:-20])
        judge(requests(3), store=store, options=ONE, environ=server.environ)
        assert len(server.requests) == 4 and len(read_jsonl(store)) == 3
        for line in (b'{"question_id": 1}\n', b"7\n", b"not json\n"):
            store.write_bytes(whole + line)
            with pytest.raises(UserError, match="line 4: no judgement"):
                judge(requests(3), store=store, options=ONE, environ=server.environ)


def test_a_prompt_beyond_the_judges_context_is_no_rating(tmp_path: Path) -> None:
    said = "This model's maximum context length is 2048 tokens. However, your prompt has 9000."

    def answer(number: int, body: dict) -> tuple:
        return failure(400, said) if body["messages"][1]["content"] == "rate answer 0" else completion("[[6]]")

    with JudgeServer(answer) as server:
        judged = judge(requests(2), store=tmp_path / "j", options=ONE, environ=server.environ)
        assert judge(requests(2), store=tmp_path / "j", options=ONE, environ=server.environ) == judged
    assert judged.ratings == [[NO_RATING], [6]] and len(server.requests) == 2
    assert judged.record["num_prompt_too_long"] == 1 and judged.record["version"] == "judge-1-0101"


def test_only_a_refusal_makes_a_prompt_too_long(tmp_path: Path) -> None:
    """An endpoint that gives our own word as its finish_reason does not get around the check of its version."""

    def answer(number: int, body: dict) -> tuple:
        choice = {"index": 0, "message": {"role": "assistant", "content": "[[6]]"}, "finish_reason": PROMPT_TOO_LONG}
        return completion("", model="a" if number == 0 else "b", choices=[choice])

    with JudgeServer(answer) as server:
        with pytest.raises(UserError, match="answers as b now, but judged as a before"):
            judge(requests(2), store=tmp_path / "j", options=ONE, environ=server.environ)
        judged = judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert judged.ratings == [[6]] and judged.record["num_prompt_too_long"] == 0
    assert [row["finish_reason"] for row in read_jsonl(tmp_path / "j")] == [None]


@pytest.mark.parametrize("content", [None, ""])
def test_a_refusal_is_no_rating(tmp_path: Path, content: str | None) -> None:
    with JudgeServer(lambda number, body: completion(content)) as server:
        judged = judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert judged.ratings == [[NO_RATING]]


def test_a_judge_that_changes_its_version_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "j.jsonl"
    with JudgeServer(lambda number, body: completion("[[6]]", model="a" if number < 2 else "b")) as server:
        with pytest.raises(UserError, match="answers as b now, but judged as a before"):
            judge(requests(4), store=store, options=ONE, environ=server.environ)
        assert {row["judge_version"] for row in read_jsonl(store)} == {"a"}
        with pytest.raises(UserError, match="answers as b now, but judged as a before"):
            judge(requests(4), store=store, options=ONE, environ=server.environ)
    rows = read_jsonl(store)
    other = rows[0] | {"question_id": 83, "judge_version": "b"}
    key = requests(3)[2].key("judge-1", 0, ONE)
    other |= dict(zip(judge_store.KEY, key, strict=True))
    rows = [row for row in rows if row["question_id"] in (81, 82)]
    store.write_text("".join(json.dumps(row) + "\n" for row in [*rows, other]))
    with pytest.raises(UserError, match="mixes judges: judge-1 answered as a and b"):
        judge(requests(3), store=store, options=ONE, environ={"JUDGE_MODEL": "judge-1"})


def test_two_judges_on_file_need_a_choice(tmp_path: Path) -> None:
    store = tmp_path / "j.jsonl"
    with JudgeServer(lambda number, body: completion(f"[[{number + 1}]]", model=body["model"])) as server:
        judge(requests(1), store=store, options=ONE, environ=server.environ)
        judge(requests(1), store=store, options=ONE, environ=server.environ | {"JUDGE_MODEL": "judge-2"})
    with pytest.raises(UserError, match="holds judgements of judge-1 and judge-2: choose with JUDGE_MODEL"):
        judge(requests(1), store=store, options=ONE, environ={})
    chosen = judge(requests(1), store=store, options=ONE, environ={"JUDGE_MODEL": "judge-2"})
    assert chosen.ratings == [[2]] and chosen.record["version"] == "judge-2"


def test_scores_side_by_side_have_one_judge() -> None:
    a, b = {"judge": {"id": "model=a"}}, {"judge": {"id": "model=b"}}
    assert one_judge([]) is None and one_judge([a, a]) == "model=a"
    with pytest.raises(UserError, match="different judges, which are never compared: model=a; model=b"):
        one_judge([a, b])


def _hold(path: Path, ready: object, release: object) -> None:
    with judge_store.Store(path):
        ready.set()
        release.wait(20)


def test_two_processes_do_not_pay_for_the_same_judgements(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "j.jsonl", ready, release))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(UserError, match=r"another process \(pid .*\) is judging into"):
            judge(requests(1), store=tmp_path / "j.jsonl", options=ONE, environ={"JUDGE_MODEL": "x"})
    finally:
        release.set()
        process.join(20)


def test_a_refused_key_ends_the_waiting_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 60.0)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 60.0)
    waiting = threading.Event()

    def answer(number: int, body: dict) -> tuple:
        if number == 0:
            return completion("[[6]]")
        if number == 1:
            waiting.set()
            return failure(500)
        waiting.wait(20)
        time.sleep(0.1)
        return failure(403)

    started = time.monotonic()
    with JudgeServer(answer) as server:
        with pytest.raises(UserError, match="refused the key"):
            judge(requests(8), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert time.monotonic() - started < 30  # the wait before another attempt is 60 s


def test_the_environment_names_the_endpoint() -> None:
    own = {"JUDGE_MODEL": "m", "JUDGE_BASE_URL": "http://u:p@h:1/v1/?k=1", "JUDGE_API_KEY": "key"}
    endpoint = endpoint_from_environment(own)
    assert endpoint.public_url == "http://h:1/v1/" and "key" not in repr(endpoint)
    openai = {"JUDGE_MODEL": "m", "OPENAI_API_KEY": "theirs"}
    assert endpoint_from_environment(openai) == Endpoint("m", "https://api.openai.com/v1", "theirs")
    assert endpoint_from_environment(openai | {"OPENAI_BASE_URL": "https://a.b/v1"}).base_url == "https://a.b/v1"
    for environ, said in [
        ({}, "JUDGE_MODEL is not set"),
        ({"JUDGE_MODEL": "m"}, "JUDGE_API_KEY is not set: .*or OPENAI_API_KEY"),
        # a key for OpenAI is never sent elsewhere
        (openai | {"JUDGE_BASE_URL": "http://h/v1"}, "JUDGE_API_KEY is not set: .*any text where it needs none"),
        (own | {"JUDGE_BASE_URL": "h:1/v1"}, "JUDGE_BASE_URL is no http address"),
        (own | {"JUDGE_BASE_URL": "http://h:99999/v1"}, "JUDGE_BASE_URL is no http address"),
    ]:
        with pytest.raises(UserError, match=said):
            endpoint_from_environment(environ)


def test_other_openai_settings_of_the_environment_stay_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "private")
    with JudgeServer(lambda number, body: completion("[[5]]")) as server:
        judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert "private" not in json.dumps(server.headers)


def test_estimate_without_a_bound() -> None:
    line = estimate(requests(2), "j", JudgeOptions(max_tokens=None), num_wanted=2)
    assert line.endswith("no bound of judgements") and "2 calls" in line
