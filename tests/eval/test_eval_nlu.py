"""python -m eval.nlu: predictions are the model's own; one command gives both domains and the drop; errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import eval.nlu
from ba_lora.errors import UserError
from ba_lora.experiments.stages import evaluation_stages
from ba_lora.glue import find_task
from ba_lora.io import read_json, read_jsonl, sha256_file, write_jsonl_atomic
from ba_lora.models.classifier import load_classifier
from ba_lora.models.tokenizer import load_tokenizer
from eval.classify import classify, open_classifier
from eval.nlu import main
from eval.nlu_scores import score_predictions
from eval.report import features
from eval.report.features import read_steps
from tests.support.pages import words_of
from tests.support.tiny import only_result
from tests.support.tiny_nlu import nlu_config, save_tiny_encoder, scored_run, write_sst2

WORDS = ["the", "film", "is", "good", "bad", "##ly", "very", "a", "dog", "runs", "sleeps", "fast", ".", "not"]
SENTIMENT = ("negative", "positive")
NLI = ("entailment", "neutral", "contradiction")


def save_classifier(folder: Path, names: tuple[str, ...], *, max_length: int = 64, seed: int = 0) -> Path:
    """Write a random BERT of two layers with a WordPiece vocabulary of its own, its classes called `names`."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    backend = BertWordPieceTokenizer(vocab=vocabulary)
    BertTokenizerFast(tokenizer_object=backend._tokenizer, model_max_length=max_length).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        num_labels=len(names),
        initializer_range=0.5,  # so that logits differ between texts
    )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def sentences(num_rows: int, *, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 20))) for _ in range(num_rows)]


def sentiment_rows(path: Path, num_rows: int = 30, *, seed: int = 0, column: str = "sentence") -> Path:
    texts = sentences(num_rows, seed=seed)
    write_jsonl_atomic(path, ({column: text, "label": index % 2} for index, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "sentiment", SENTIMENT)


def one_by_one(folder: Path, texts: list[tuple[str, ...]], *, max_length: int = 64) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        columns = [[[column] for column in text] for text in texts]
        options = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
        encoded = [tokenizer(*column, **options) for column in columns]
        return torch.cat([model(**inputs).logits for inputs in encoded]).numpy()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_logits_do_not_depend_on_batch_or_padding(classifier: Path, batch_size: int) -> None:
    texts = [(text,) for text in sentences(40)]
    logits, num_cut = classify(open_classifier(classifier, find_task("sst2")), texts, batch_size=batch_size)
    np.testing.assert_allclose(logits, one_by_one(classifier, texts), atol=1e-4)
    assert num_cut == 0 and logits[:, 0].max() - logits[:, 0].min() > 0.1


def test_pairs_and_what_is_cut(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "nli", NLI)
    long = " ".join(["dog"] * 100)
    texts = [("a dog runs", "a dog sleeps"), (long, "a dog runs ."), ("the film", long), ("", "")]
    logits, num_cut = classify(open_classifier(folder, find_task("mnli"), max_length=24), texts)
    assert num_cut == 2
    np.testing.assert_allclose(logits, one_by_one(folder, texts, max_length=24), atol=1e-4)
    exact = " ".join(["dog"] * 22)  # 24 tokens with [CLS] and [SEP]
    sst2 = open_classifier(save_classifier(tmp_path / "s", SENTIMENT), find_task("sst2"), max_length=24)
    assert classify(sst2, [(exact,)])[1] == 0 and classify(sst2, [(exact + " dog",)])[1] == 1


@pytest.mark.parametrize("base", ["gpt2-xl", "t5-base", "deberta-v3-base"])
def test_other_architectures_and_empty_texts(tmp_path: Path, base: str) -> None:
    """GPT-2 has no token for an empty text, and pads with EOS."""
    encoder = save_tiny_encoder(tmp_path / "encoder", base)
    config = nlu_config(encoder, "model.attention=eager")  # DeBERTa has no other
    folder = tmp_path / "model"
    load_classifier(config).save_pretrained(folder)
    load_tokenizer(config.model, generates=False).save_pretrained(folder)
    model = open_classifier(folder, find_task("mnli"))
    pairs = [("a dog runs", "a dog sleeps"), ("", ""), ("the film is good", "")]
    together, _ = classify(model, pairs)
    alone = torch.cat([classify(model, [pair])[0] for pair in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.isfinite().all() and together.shape == (3, 3)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """A model whose classes stand in another order gives the logits in the task's."""
    folder = save_classifier(tmp_path / "model", ("contradiction", "entailment", "neutral"))
    texts = [("a dog runs", "a dog sleeps"), ("the film", "is good")]
    found, _ = classify(open_classifier(folder, find_task("mnli")), texts)
    np.testing.assert_allclose(found, one_by_one(folder, texts)[:, [1, 2, 0]], atol=1e-4)
    unnamed = save_classifier(tmp_path / "unnamed", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert open_classifier(unnamed, find_task("mnli")).order == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "task", "message"),
    [
        (SENTIMENT, "mnli", "has 2 outputs .* the task needs 3: was it trained on another task"),
        (SENTIMENT, "rte", "predicts negative, positive; the task's classes are entailment, not_entailment"),
        (SENTIMENT, "stsb", "has 2 outputs .* the task needs 1"),
    ],
)
def test_a_model_of_another_task(tmp_path: Path, names: tuple[str, ...], task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_classifier(save_classifier(tmp_path / "model", names), find_task(task))


def test_a_model_without_a_trained_head(tmp_path: Path, classifier: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(classifier)
    model.bert.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="has no trained head: classifier.bias, classifier.weight"):
        open_classifier(tmp_path / "encoder", find_task("sst2"))
    with pytest.raises(UserError, match="holds no model"):
        open_classifier(tmp_path, find_task("sst2"))


def test_one_command_for_a_model_folder(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dev = sentiment_rows(tmp_path / "dev.jsonl")
    imdb = sentiment_rows(tmp_path / "imdb.jsonl", 50, seed=1, column="text")
    output = tmp_path / "out"
    words = ["--model", str(classifier), "--task", "sst2", "imdb", "--data", f"sst2={dev}", f"imdb={imdb}"]
    assert main([*words, "--output", str(output)]) == 0
    (summary,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]

    rows, lines = read_jsonl(imdb), read_jsonl(output / "predictions" / "imdb.jsonl")
    assert [line["task_id"] for line in lines] == [f"imdb/{index}" for index in range(50)]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    expected = one_by_one(classifier, [(row["text"],) for row in rows])
    np.testing.assert_allclose([line["logits"] for line in lines], expected, atol=1e-4)
    assert [line["prediction"] for line in lines] == expected.argmax(1).tolist()

    score = read_json(output / "scores" / "imdb.json")
    accuracy = float(np.mean([line["label"] == line["prediction"] for line in lines]))
    assert score["metrics"] == {"accuracy": pytest.approx(accuracy)}
    low, high = score["interval_95"]["accuracy"]
    assert low < accuracy < high
    assert (score["task"], score["of_task"], score["n"], score["invalid"]) == ("imdb", "sst2", 50, 0)
    assert score["data_sha256"] == sha256_file(imdb) and score["classes"] == list(SENTIMENT)
    assert score["predictions_sha256"] == sha256_file(output / "predictions" / "imdb.jsonl")
    assert score["per_class"]["n"] == {"negative": 25, "positive": 25}

    in_domain = read_json(output / "scores" / "sst2.json")["metrics"]["accuracy"]
    assert summary["in_domain"] == in_domain and summary["out_of_domain"] == {"imdb": pytest.approx(accuracy)}
    assert summary["drop"]["imdb"] == score["drop"] == pytest.approx(in_domain - accuracy, abs=1e-6)
    assert score["in_domain"] == in_domain


def test_sets_without_data_are_named_and_left_out(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from eval.nlu import Sets, evaluate_classifier, find_run, plan_run

    run = find_run(classifier, task="sst2", output=tmp_path / "out")
    files = {name: str(sentiment_rows(tmp_path / f"{name}.jsonl")) for name in ("sst2", "yelp")}
    summary = evaluate_classifier(plan_run(run, Sets(files, max_rows=None), None))
    assert list(summary["out_of_domain"]) == ["yelp"]
    assert list(summary["skipped"]) == ["imdb", "amazon", "flipkart"]  # the hub is out of reach in tests
    assert "imdb is left out: cannot load stanfordnlp/imdb" in capsys.readouterr().err


def test_three_classes_and_scores(tmp_path: Path) -> None:
    nli = save_classifier(tmp_path / "nli", NLI)
    texts = sentences(24)
    pairs = [{"sentence_A": a, "sentence_B": b} for a, b in zip(texts[:12], texts[12:], strict=True)]
    sick = [{**pair, "label": i % 3, "relatedness_score": 1 + i / 4} for i, pair in enumerate(pairs)]
    write_jsonl_atomic(tmp_path / "sick.jsonl", sick)
    own = [
        {"premise": p["sentence_A"], "hypothesis": p["sentence_B"], "label": -(i == 0) or 1}
        for i, p in enumerate(pairs)
    ]
    write_jsonl_atomic(tmp_path / "mnli.jsonl", own)
    data = ["--data", f"mnli={tmp_path / 'mnli.jsonl'}", f"sick={tmp_path / 'sick.jsonl'}"]
    main(["--model", str(nli), "--task", "mnli", "sick", *data])
    score = read_json(nli / "scores" / "sick.json")
    assert set(score["per_class"]["recall"]) == set(NLI) and score["n"] == 12
    own_score = read_json(nli / "scores" / "mnli.json")
    assert own_score["num_unlabelled"] == 1 and own_score["n"] == 11 and own_score["num_rows"] == 12
    assert own_score["per_class"]["recall"]["contradiction"] is None

    stsb = save_classifier(tmp_path / "stsb", ("score",))
    dev = [{"sentence1": p["sentence_A"], "sentence2": p["sentence_B"], "label": i / 3} for i, p in enumerate(pairs)]
    write_jsonl_atomic(tmp_path / "stsb.jsonl", dev)
    data = ["--data", f"stsb={tmp_path / 'stsb.jsonl'}", f"sick={tmp_path / 'sick.jsonl'}"]
    main(["--model", str(stsb), "--task", "stsb", "sick", *data])
    lines = read_jsonl(stsb / "predictions" / "sick.jsonl")
    assert [line["label"] for line in lines] == pytest.approx([i / 4 for i in range(12)])
    found = read_json(stsb / "scores" / "sick.json")
    assert found["metrics"]["pearson"] == pytest.approx(
        np.corrcoef([line["label"] for line in lines], [line["prediction"] for line in lines])[0, 1], abs=1e-5
    )
    assert set(found["interval_95"]) == {"pearson", "spearman"}


def test_only_the_sets_asked_for_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """MNLI's mismatched set, which training has scored, too, keeps its score and drop, and is told when asked for."""
    run = scored_run(tmp_path / "run", task="mnli").run_path
    save_classifier(run / "merged", NLI)
    rows = [{"premise": "a dog runs", "hypothesis": "a dog sleeps", "label": label} for label in (0, 1, 2)]
    write_jsonl_atomic(tmp_path / "snli.jsonl", rows)
    words = ["--model", str(run), "--data", f"snli={tmp_path / 'snli.jsonl'}", "--task", "mnli"]
    for asked in (["snli"], ["mnli_mm", "snli"], []):
        main([*words, *asked])
        *lines, last = capsys.readouterr().out.splitlines()
        (summary,) = json.loads(last)["runs"]
        assert list(summary["out_of_domain"]) == list(summary["drop"]) == asked
        assert [line.split()[1] for line in lines if line.startswith("run ") and " n=" in line] == sorted(
            ["mnli:", *(f"{name}:" for name in asked)]
        )
        assert read_json(run / "scores" / "mnli_mm.json")["drop"] == 0.0


def test_max_rows_is_a_seeded_sample(classifier: Path, tmp_path: Path) -> None:
    """A file sorted by class still gives rows of both."""
    rows = [{"text": text, "label": int(index >= 50)} for index, text in enumerate(sentences(100))]
    write_jsonl_atomic(tmp_path / "imdb.jsonl", rows)
    dev = sentiment_rows(tmp_path / "dev.jsonl")
    words = ["--model", str(classifier), "--task", "sst2", "imdb", "--max-rows", "20", "--output", str(tmp_path / "o")]
    words += ["--data", f"imdb={tmp_path / 'imdb.jsonl'}", f"sst2={dev}"]
    main(words)
    first = read_jsonl(tmp_path / "o" / "predictions" / "imdb.jsonl")
    main(words)
    assert first == read_jsonl(tmp_path / "o" / "predictions" / "imdb.jsonl")
    assert len(first) == 20 and {line["label"] for line in first} == {0, 1}
    score = read_json(tmp_path / "o" / "scores" / "imdb.json")
    assert score["n"] == 20 and score["num_rows"] == 100
    assert (score["partial"], score["num_missing"], score["generation"]) == (True, 80, {"limit": 20})
    main([*words[:5], *words[7:]])
    assert not {"partial", "num_missing", "generation"} & read_json(tmp_path / "o" / "scores" / "imdb.json").keys()


def test_predictions_that_are_nan_leave_the_metrics_undefined(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Counted and said, never scored; other runs of the same call are still evaluated."""
    broken = tmp_path / "broken"
    model = BertForSequenceClassification.from_pretrained(classifier)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(broken)
    data = [f"{name}={sentiment_rows(tmp_path / f'{name}.jsonl')}" for name in ("sst2", "imdb")]
    words = ["--model", str(broken), str(classifier), "--task", "sst2", "imdb", "--data", *data]
    main([*words, "--output", str(tmp_path / "out")])
    score = read_json(tmp_path / "out" / "broken" / "scores" / "imdb.json")
    assert score["invalid"] == 30 and score["metrics"] == {"accuracy": None} and score["drop"] is None
    assert "30 of 30 predictions are NaN or infinite, the first for imdb/0" in score["notes"]["accuracy"]
    assert {line["prediction"] for line in read_jsonl(tmp_path / "out" / "broken" / "predictions" / "imdb.jsonl")} == {
        None
    }
    out = capsys.readouterr().out
    assert "broken imdb: accuracy=undefined n=30 invalid=30 (accuracy undefined: 30 of 30" in out
    healthy = json.loads(out.splitlines()[-1])["runs"][1]
    assert healthy["run"] == classifier.name and healthy["drop"]["imdb"] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "{none}", "--task", "sst2"], "no such folder"),
        (["--model", "{model}"], "has no config.yaml, so its task is not known: add --task"),
        (["--model", "{model}", "--task", "sst3"], "unknown task 'sst3'"),
        (["--model", "{model}", "--task", "sst2", "sick", "--data", "sst2={dev}"], "no label map from sick"),
        (
            ["--model", "{model}", "--task", "sst2", "--data", "sick=x.jsonl"],
            "sick is unknown.*: give NAME=FILE, NAME being one of sst2, ",
        ),
        (["--model", "{model}", "--task", "sst2", "--data", "x.jsonl"], "--data x.jsonl: give NAME=FILE"),
        (["--model", "{model}", "--task", "sst2", "--data", "sst2=gone.jsonl"], "no such file: .*/gone.jsonl"),
        (["--model", "{model}", "--task", "sst2", "imdb", "--data", "sst2={dev}"], "cannot load stanfordnlp/imdb"),
        (
            ["--model", "{model}", "--task", "sst2", "flipkart", "--data", "sst2={dev}", "flipkart={dev}"],
            "no label of f",
        ),
        (["--model", "{model}", "--task", "cola", "--data", "cola={dev}"], "predicts negative, positive"),
        (["--model", "{model}", "--task", "sst2", "--max-rows", "0"], "--max-rows 0"),
        (["--task", "sst2"], "--model"),
    ],
)
def test_errors_in_one_line(classifier: Path, tmp_path: Path, words: list[str], message: str) -> None:
    dev = sentiment_rows(tmp_path / "dev.jsonl")
    filled = [word.format(model=classifier, dev=dev, none=tmp_path / "none") for word in words]
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=message) as error:
        main([*filled, *output])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_check_without_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^--task is needed to check the command without its runs"):
        eval.nlu.check(["--model", str(tmp_path)])


@pytest.fixture
def run(train_nlu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished SST-2 run on made-up files; few of its training rows are positive."""
    train, dev = write_sst2(tmp_path / "data", num_rows=60)
    shares = "data.class_shares={positive: 0.2}"
    config = [f"data.source={train}", f"data.dev.sst2={dev}", shares, "data.num_rows=24", "features.steps=[0,6]"]
    results = f"results_dir={tmp_path / 'results'}"  # no part of a run's config.yaml
    load = eval.nlu.load_config
    monkeypatch.setattr(
        eval.nlu, "load_config", lambda *a, overrides=(), **k: load(*a, overrides=[*overrides, results], **k)
    )
    return train_nlu(*config, task="sst2")


def test_features_of_a_run_to_the_figure(run: Path, tmp_path: Path) -> None:
    """Saved before and after training with the dev set's labels; as docs/nlu.md draws them."""
    dev = read_jsonl(tmp_path / "data" / "dev.jsonl")
    saved = {step.step: step for step in read_steps(run)}
    assert sorted(saved) == [0, 6]
    for step in saved.values():
        assert step.features.shape == (60, 32) and step.labels.tolist() == [row["label"] for row in dev]
    assert np.abs(saved[6].features - saved[0].features).max() > 1e-3
    places = {
        "outputs/RUN_ID": run,
        "outputs/OTHER_RUN_ID": run,
        "--output figures": f"--output {tmp_path / 'figures'}",
    }
    features.main(words_of("eval.report.features", places))
    assert (tmp_path / "figures" / "features.png").read_bytes().startswith(b"\x89PNG")
    lines = read_json(tmp_path / "figures" / "features.json")["lines"]
    assert [line["step"] for line in lines] == [0, 6] * 2 and all(line["effective_rank"] > 1 for line in lines)


def test_a_run(run: Path, tmp_path: Path) -> None:
    """In domain is what training scored; evaluating that file again gives the same; the result takes up the scores."""
    dev, yelp = tmp_path / "data" / "dev.jsonl", sentiment_rows(tmp_path / "yelp.jsonl", 24, seed=4, column="text")
    trained = read_json(run / "scores" / "sst2.json")
    assert trained["n"] == 60
    words = [f"output_dir={run}", "eval.tasks=[yelp]", f"eval.data.yelp={yelp}", "eval.limit=16"]
    (stage,) = evaluation_stages([eval.nlu.load_config(run / "config.yaml", kind="nlu", overrides=words)])
    assert stage.call.module == "eval.nlu"
    main(stage.call.words)  # as sh scripts/nlu.sh calls it
    assert read_json(run / "scores" / "yelp.json")["n"] == 16

    imdb = sentiment_rows(tmp_path / "imdb.jsonl", 20, seed=5)
    main(words_of("eval.nlu", {"outputs/RUN_ID": run, "imdb.jsonl": imdb, "yelp.jsonl": yelp}))
    assert read_json(run / "scores" / "sst2.json") == trained
    assert not (run / "predictions" / "sst2.jsonl").exists()
    yelp_score = read_json(run / "scores" / "yelp.json")
    assert yelp_score["in_domain"] == trained["metrics"]["accuracy"]
    assert yelp_score["max_length"] == OmegaConf.load(run / "config.yaml").data.max_length
    result = only_result(tmp_path / "results")
    assert result["evaluation"]["yelp"]["drop"] == yelp_score["drop"]
    assert result["evaluation"]["sst2"]["metrics"] == trained["metrics"]
    chosen = result["training"]["selection"]["best"]["metrics"]["sst2"]
    assert trained["metrics"] | chosen == trained["metrics"]

    main(["--model", str(run), "--task", "sst2", "--data", f"sst2={dev}"])
    again = read_json(run / "scores" / "sst2.json")
    assert again["data_sha256"] == sha256_file(dev)
    assert all(again[key] == trained[key] for key in ("metrics", "interval_95", "per_class", "notes", "n"))
    mine, theirs = (read_jsonl(run / "predictions" / f"{name}.jsonl") for name in ("sst2", "best"))
    assert [(a["task_id"], a["label"], a["prediction"]) for a in mine] == [
        (b["task_id"], b["label"], b["prediction"]) for b in theirs
    ]
    np.testing.assert_allclose([a["logits"] for a in mine], [b["logits"] for b in theirs], atol=1e-4)
    with pytest.raises(UserError, match="was trained on sst2: put that first after --task, not cola"):
        main(["--model", str(run), "--task", "cola"])

    # Imbalance: the evaluated sets have as many rows of either class, the training set had not.
    counts = read_json(run / "train.json")["data"]["classes"]
    assert counts["positive"] < counts["negative"] and sum(counts.values()) == 24
    for name in ("sst2", "yelp"):
        score = read_json(run / "scores" / f"{name}.json")
        assert score["per_class"]["minority"] == "positive"
        assert set(score["metrics"]) == set(score["interval_95"]) == {"accuracy", "macro_f1", "minority_recall"}
        assert score["metrics"]["minority_recall"] == score["per_class"]["recall"]["positive"]


def lines_of(labels: list[float], predictions: list[float | None], name: str = "set") -> list[dict]:
    return [
        {"task_id": f"{name}/{index}", "label": label, "prediction": guess, "logits": [0.0, 0.0, math.log(2)]}
        for index, (label, guess) in enumerate(zip(labels, predictions, strict=True))
    ]


def test_scores_by_hand() -> None:
    """4 of 6 right; neutral is rarest in training, entailment in the set."""
    lines = lines_of([0, 1, 1, 2, 2, 2], [0, 1, 0, 2, 2, 1])
    counts = {"entailment": 50, "neutral": 3, "contradiction": 40}
    score = score_predictions(lines, name="sick", of_task="mnli", training_counts=counts, imbalanced=True)
    assert (score["n"], score["invalid"], score["notes"]) == (6, 0, {})
    assert score["metrics"]["accuracy"] == pytest.approx(4 / 6)
    assert score["nll"] == pytest.approx((3 * math.log(4) + 3 * math.log(2)) / 6)  # p = 1/4, 1/4, 1/2
    assert score["metrics"]["minority_recall"] == pytest.approx(1 / 2)
    assert score["metrics"]["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    assert score["per_class"]["recall"] == {
        "entailment": 1.0,
        "neutral": 0.5,
        "contradiction": pytest.approx(2 / 3),
    }
    unknown = score_predictions(lines, name="sick", of_task="mnli")
    assert unknown["per_class"]["minority"] == "entailment" and set(unknown["metrics"]) == {"accuracy"}


def test_what_is_undefined_is_said() -> None:
    one_class = score_predictions(lines_of([1, 1, 1], [1, 0, 1]), name="cola", of_task="cola")
    assert (
        one_class["metrics"] == {"matthews": None} and "all 3 labels are of class 1" in one_class["notes"]["matthews"]
    )
    assert one_class["interval_95"] == {"matthews": None}
    assert one_class["per_class"]["minority_recall"] is None
    assert one_class["notes"]["minority_recall"] == "no row is of class unacceptable"
    flat = score_predictions(lines_of([1.0, 2.5, 4.0], [2.0, 2.0, 2.0]), name="sick", of_task="stsb")
    assert flat["metrics"] == {"pearson": None, "spearman": None} and "per_class" not in flat
    broken = score_predictions(lines_of([0, 1], [0, None]), name="sst2", of_task="sst2")
    assert broken["invalid"] == 1 and broken["metrics"] == {"accuracy": None}
    assert "1 of 2 predictions are NaN or infinite, the first for set/1" in broken["notes"]["accuracy"]
    rare = score_predictions(lines_of([0, 1], [0, None]), name="sst2", of_task="sst2", imbalanced=True)
    assert set(rare["metrics"]) == set(rare["notes"]) == {"accuracy", "macro_f1", "minority_recall"}


def test_several_runs_read_each_set_once(classifier: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import eval.tasks.glue

    other = save_classifier(tmp_path / "other", SENTIMENT, seed=1)
    dev = sentiment_rows(tmp_path / "dev.jsonl")
    read, load_rows = [], eval.tasks.glue.load_rows
    monkeypatch.setattr(eval.tasks.glue, "load_rows", lambda *a, **k: read.append(a) or load_rows(*a, **k))
    words = ["--model", str(classifier), str(other), "--task", "sst2", "--data", f"sst2={dev}"]
    main([*words, "--output", str(tmp_path / "out")])
    assert len(read) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sentiment", "other"}
    assert [run["run"] for run in json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]] == [
        "sentiment",
        "other",
    ]
