"""Train one NLU run, a GLUE task, from a config to an exported model.

    python train_nlu.py --config configs/nlu/bert-large.yaml --task sst2 --method ba_lora trainer.learning_rate=3e-5
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train_nlu.py --config configs/nlu/gpt2-xl.yaml …

config → data → model → trainer, evaluated each epoch → export of the best epoch. The same command again goes on where a
killed run stopped, and does nothing when it is done. `sh scripts/nlu.sh` compares methods; `python -m eval.nlu`
evaluates a finished run out of its domain.
"""
# ruff: noqa: E402

import gc
import signal
import time
from pathlib import Path

from ba_lora.config.command_line import read_run
from ba_lora.errors import check_first, run_entry_point

if __name__ == "__main__":  # what is wrong in the command line is told before the imports below, which take seconds
    check_first(lambda: read_run("nlu", __doc__))

from accelerate import PartialState
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from ba_lora.config.schema_nlu import NLURunConfig
from ba_lora.glue import find_task
from ba_lora.io import finite, write_json_atomic, write_jsonl_atomic
from ba_lora.methods.build import build_model, parameter_counts, probe_logits
from ba_lora.models.sizes import check_sizes
from ba_lora.models.source import hub_commit
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.objective.objective_nlu import ClassifierObjective
from ba_lora.objective.reference_cache.features import cached_features
from ba_lora.processes import on_main_process, start_processes
from ba_lora.runs.card import write_model_card
from ba_lora.runs.environment import environment, peak_memory_mb, reset_peak_memory, total_peak_memory_mb
from ba_lora.runs.export import export_run, push_to_hub, save_trained
from ba_lora.runs.folder import claim_folder, complete_result, finish_run, is_trained, keep_base, keep_factors, recorded
from ba_lora.runs.parity import probe_batch, report
from ba_lora.runs.results_nlu import selection_report
from ba_lora.training.arguments import autocast_precision, build_arguments, count_steps
from ba_lora.training.epochs import EpochEvaluation
from ba_lora.training.log import mean_gradient_shares
from ba_lora.training.trainer import BALoRATrainer
from data.nlu import load_nlu_data
from eval.metrics import glue_scores
from eval.nlu_scores import dev_scores


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled job is recorded as cancelled
    config = read_run("nlu", __doc__)

    process = start_processes(config.trainer)
    run_path = config.run_path
    arguments = build_arguments(config, run_path)  # first: what they refuse leaves no folder
    # One process makes the run's folder, or refuses it to another config; its error is everybody's.
    on_main_process(process, claim_folder, config, num_processes=process.num_processes)
    if is_trained(run_path, config):
        on_main_process(process, complete_result, config)
        process.print(f"{run_path.name} is trained already (overwrite=true redoes it)")
    else:
        with recorded(run_path, config, main=process.is_main_process):
            train(config, run_path, process, arguments)
    if config.hub.push and process.is_main_process:
        print(f"pushed to {push_to_hub(run_path, config)}")


def train(config: NLURunConfig, run_path: Path, process: PartialState, arguments: TrainingArguments) -> None:
    """Train and export one run; every process of a distributed run calls it."""
    # Data: sentences or pairs with their labels.
    set_seed(config.seed)
    task = find_task(config.nlu.task)
    tokenizer = load_tokenizer(config.model, generates=False)
    data = load_nlu_data(config, tokenizer)
    process.print(
        "data: {name}, {rows_used} of {rows_read} rows, {rows_cut} cut to {max_length} tokens, {rows_empty} empty, "
        "{rows_heldout} held out, classes {classes}".format(**data.report, max_length=config.data.max_length)
    )

    check_sizes(config, tokenizer, data.train, data.heldout, *data.dev.values())

    # Model: the pre-trained one, with a new head and the method's adapter. The logits of two rows, the probe, tell how
    # far step 0 is from the pre-trained model, and later each export from the trained one.
    probe = probe_batch(data.train.select(range(min(2, len(data.train)))).to_list(), tokenizer.pad_token_id)
    num_steps = count_steps(arguments, len(data.train))
    model_commit = hub_commit(config.model)  # a branch may move while the run trains
    on_main_process(process, keep_base, config, commit=model_commit)
    model, step0 = build_model(config, run_path=run_path, num_steps=num_steps, probe=probe)
    on_main_process(process, keep_factors, config)
    trainable, everything = parameter_counts(model)
    process.print(f"model: {config.model.name}, {trainable:,} of {everything:,} parameters trained; {step0}")

    # Objective and trainer: L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd.
    objective = ClassifierObjective(
        model,
        config.regularizers,
        micro_batch=arguments.per_device_train_batch_size,
        cache=cached_features(config, data.train, autocast=autocast_precision(arguments)),
    )
    trainer = BALoRATrainer(
        model,
        arguments,
        objective=objective,
        train_dataset=data.train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    for term, reason in objective.off.items():
        process.print(f"{term} is off: {reason}")
    epochs = EpochEvaluation(
        trainer,
        config,
        run_path,
        dev=data.dev,
        heldout=data.heldout,
        scorer=lambda labels, predictions: glue_scores(task.metrics, labels, predictions).metrics,
    )
    trainer.add_callback(epochs)
    effective = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    process.print(f"training: {num_steps} steps of {effective} rows, {arguments.world_size} process(es)")
    reset_peak_memory()  # the SVDs of the initialisation are no part of training
    started = time.perf_counter()
    checkpoint = trainer.train_or_resume(run_path / "checkpoints", num_steps=num_steps)
    seconds = time.perf_counter() - started
    best, last = epochs.finish()  # the model now has the best epoch's weights
    if process.is_main_process:
        write_jsonl_atomic(run_path / "log.jsonl", finite(trainer.state.log_history))
        for name, score in dev_scores(run_path, config, data.report).items():
            write_json_atomic(run_path / "scores" / f"{name}.json", score)
    training = {
        "seconds": None if checkpoint else round(seconds, 2),  # of an uninterrupted run only, evaluation included
        "resumed_from": checkpoint.name if checkpoint else None,
        **{"tokens_per_second": None, "padding_share": None, **trainer.throughput()},
        "steps": trainer.state.global_step,
        "micro_batch": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "num_processes": arguments.world_size,
        "trainable_parameters": trainable,
        "total_parameters": everything,
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "total_peak_memory_mb": round(total_peak_memory_mb(), 1),
        "step0_max_logit_difference": step0.difference,
        "terms_off": objective.off,
        "gradient_shares": mean_gradient_shares(trainer.state.log_history),
        "last_log": next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), None),
        "selection": selection_report(config, epochs.history(), best, last),
    }

    # Export: adapter, plain LoRA, merged model, each compared with the trained one.
    trained_logits = probe_logits(trainer.plain_model(), probe)
    save_trained(trainer, config, run_path)
    trainer.model = trainer.model_wrapped = model = None  # room for the exports, which are loaded again
    del trainer
    gc.collect()
    if process.is_main_process:
        parities = export_run(config, run_path, probe, trained_logits, initial_logits=step0.initial_logits)
        epochs.remove_files()
        result = finish_run(
            run_path,
            config,
            {
                "model": {"name": config.model.name, "revision": model_commit},
                "data": data.report,
                "training": finite(training),
                "export": report(parities),
                "environment": environment(num_processes=process.num_processes),
            },
        )
        write_model_card(run_path, config, result)
        compared = ", ".join(f"{name} {parity}" for name, parity in parities.items())
        print(f"exported to {run_path}: largest logit difference to the trained model: {compared}")


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
