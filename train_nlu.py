"""Train one NLU run, a task of GLUE or your own, from a config to an exported model.

    python train_nlu.py --config configs/nlu/bert-large.yaml --task sst2 --method ba_lora trainer.learning_rate=3e-5
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train_nlu.py --config configs/nlu/gpt2-xl.yaml …

config → data → model → trainer, evaluated each epoch → export of the best epoch. The same command again goes on where a
killed run stopped, and does nothing when it is done. `sh scripts/nlu.sh` compares methods; `python -m eval.nlu`
evaluates a finished run out of its domain.
"""
# ruff: noqa: E402

from ba_lora.config.command_line import read_run
from ba_lora.errors import check_first, run_entry_point

if __name__ == "__main__":  # what is wrong in the command line is told before the imports below, which take seconds
    check_first(lambda: read_run("nlu", __doc__))

from transformers import DataCollatorWithPadding

from ba_lora.glue import find_task
from ba_lora.io import write_json_atomic, write_jsonl_atomic
from ba_lora.models.sizes import check_sizes
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.objective.objective_nlu import ClassifierObjective
from ba_lora.objective.reference_cache.features import cached_features
from ba_lora.runs.folder import DEV_TEXTS
from ba_lora.runs.results_nlu import selection_report
from ba_lora.runs.shell import Trained, TrainingRun, run_training
from ba_lora.training.arguments import autocast_precision
from ba_lora.training.epochs import EpochEvaluation
from ba_lora.training.trainer import BALoRATrainer
from data.nlu import load_nlu_data
from eval.metrics import glue_scores
from eval.nlu_scores import dev_scores


def main() -> None:
    run_training("nlu", __doc__, train)


def train(run: TrainingRun) -> Trained:
    """Train one run; every process of a distributed run calls it. What stands around it: ba_lora/runs/shell.py."""
    config = run.config

    # Data: sentences or pairs with their labels.
    task = find_task(config.nlu.task)
    tokenizer = load_tokenizer(config.model, generates=False)
    data = load_nlu_data(config, tokenizer)
    run.print(
        "data: {name}, {rows_used} of {rows_read} rows, {rows_cut} cut to {max_length} tokens, {rows_empty} empty, "
        "{rows_heldout} held out, classes {classes}".format(**data.report, max_length=config.data.max_length)
    )
    check_sizes(config, tokenizer, data.train, data.heldout, *data.dev.values())

    # Model: the pre-trained one, with a new head and the method's adapter.
    model = run.build_model(data.train, tokenizer)

    # Objective and trainer: L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd.
    objective = ClassifierObjective(
        model,
        config.regularizers,
        micro_batch=run.arguments.per_device_train_batch_size,
        cache=cached_features(config, data.train, autocast=autocast_precision(run.arguments)),
    )
    trainer = BALoRATrainer(
        model,
        run.arguments,
        objective=objective,
        train_dataset=data.train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    for term, reason in objective.off.items():
        run.print(f"{term} is off: {reason}")
    epochs = EpochEvaluation(
        trainer,
        config,
        run.run_path,
        dev=data.dev,
        heldout=data.heldout,
        scorer=lambda labels, predictions: glue_scores(task.metrics, labels, predictions).metrics,
    )
    trainer.add_callback(epochs)
    run.fit(trainer)

    best, last = epochs.finish()  # the model now has the best epoch's weights
    if run.process.is_main_process:
        for name, score in dev_scores(run.run_path, config, data.report).items():
            write_json_atomic(run.run_path / "scores" / f"{name}.json", score)
        if data.generated:
            write_jsonl_atomic(run.run_path / DEV_TEXTS, data.generated)
    selection = selection_report(config, epochs.history(), best, last)
    training = run.facts(trainer) | {"terms_off": objective.off, "selection": selection}
    return Trained(trainer, data.report, training, clean_up=epochs.remove_files)


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
