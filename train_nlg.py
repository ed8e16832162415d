"""Train one NLG run, from a config to an exported model.

    python train_nlg.py --config configs/nlg/toy.yaml --method ba_lora trainer.learning_rate=5e-4
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train_nlg.py --config configs/nlg/llama-2-7b.yaml

config → data → model → trainer → export. The same command again goes on where a killed run stopped, and does nothing
when it is done. `sh scripts/ba-lora.sh` adds generation, scoring and the table.
"""
# ruff: noqa: E402

import gc
import signal
import time
from pathlib import Path

from ba_lora.config.command_line import read_run
from ba_lora.errors import check_first, run_entry_point

if __name__ == "__main__":  # what is wrong in the command line is told before the imports below, which take seconds
    check_first(lambda: read_run("nlg", __doc__))

from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from ba_lora.config.schema import RunConfig
from ba_lora.io import finite, write_jsonl_atomic
from ba_lora.methods.build import build_model, left_out_experts, parameter_counts, probe_logits
from ba_lora.models.sizes import check_sizes
from ba_lora.models.source import hub_commit
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.objective.objective import TokenObjective
from ba_lora.objective.reference_cache.fill import cached_reference
from ba_lora.processes import on_main_process, start_processes
from ba_lora.runs.card import write_model_card
from ba_lora.runs.environment import environment, peak_memory_mb, reset_peak_memory, total_peak_memory_mb
from ba_lora.runs.export import export_run, push_to_hub, save_trained
from ba_lora.runs.folder import claim_folder, complete_result, finish_run, is_trained, keep_base, keep_factors, recorded
from ba_lora.runs.parity import probe_batch, report
from ba_lora.training.arguments import build_arguments, count_steps
from ba_lora.training.log import mean_gradient_shares
from ba_lora.training.packing import build_collator, faster_attention, prepare_packing
from ba_lora.training.trainer import BALoRATrainer
from data.nlg import check_source, load_training_data


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled job is recorded as cancelled
    config = read_run("nlg", __doc__)
    check_source(config.data)

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


def train(config: RunConfig, run_path: Path, process: PartialState, arguments: TrainingArguments) -> None:
    """Train and export one run; every process of a distributed run calls it."""
    # Data: rows → prompt + response, labels on the response only.
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    data = load_training_data(config.data, tokenizer)
    process.print(
        "data: {rows_used} of {rows_chosen} chosen rows, {rows_cut} cut to {max_length} tokens, {rows_dropped} dropped "
        "(nothing of the response left), {rows_empty} empty, {rows_heldout} held out".format(
            **data.report, max_length=config.data.max_length
        )
    )

    check_sizes(config, tokenizer, data.dataset, data.heldout)

    # Reference: the pre-trained model's own distributions. Without a cache on disk the trainer makes them in every
    # step, by a pass of the model as it is at step 0.
    cache = None
    if config.uses_reference_cache:
        cache = cached_reference(config, data.dataset, data.report, tokenizer)

    # Model: the pre-trained one, with the method's adapter. The logits of two rows, the probe, tell how far step 0 is
    # from the pre-trained model, and later each export from the trained one.
    probe = probe_batch(data.dataset.select(range(min(2, len(data.dataset)))).to_list(), tokenizer.pad_token_id)
    num_steps = count_steps(arguments, len(data.dataset))
    model_commit = hub_commit(config.model)  # a branch may move while the run trains
    on_main_process(process, keep_base, config, commit=model_commit)
    model, step0 = build_model(config, run_path=run_path, num_steps=num_steps, probe=probe, rows=data.dataset)
    on_main_process(process, keep_factors, config)
    trainable, everything = parameter_counts(model)
    if config.data.packing:
        prepare_packing(model, data.dataset["input_ids"][:2])
        if hint := faster_attention(config.model, process.device):
            process.print(hint)
    if note := left_out_experts(model):
        process.print(note)
    process.print(f"model: {config.model.name}, {trainable:,} of {everything:,} parameters trained; {step0}")

    # Objective and trainer: L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd.
    objective = TokenObjective(model, config.regularizers, loss=config.loss, reference=cache)
    trainer = BALoRATrainer(
        model,
        arguments,
        objective=objective,
        train_dataset=data.dataset,
        eval_dataset=data.heldout,
        data_collator=build_collator(tokenizer, packing=config.data.packing),
        processing_class=tokenizer,
    )
    if config.early_stopping.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.threshold))
    effective = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    process.print(f"training: {num_steps} steps of {effective} rows, {arguments.world_size} process(es)")
    reset_peak_memory()  # the SVDs of the initialisation are no part of training
    started = time.perf_counter()
    checkpoint = trainer.train_or_resume(run_path / "checkpoints", num_steps=num_steps)
    seconds = time.perf_counter() - started
    if process.is_main_process:
        write_jsonl_atomic(run_path / "log.jsonl", finite(trainer.state.log_history))
    training = {
        "seconds": None if checkpoint else round(seconds, 2),  # of an uninterrupted run only
        "resumed_from": checkpoint.name if checkpoint else None,
        **{"tokens_per_second": None, "padding_share": None, **trainer.throughput()},
        "steps": trainer.state.global_step,
        "best_step": trainer.best_step(),  # by trainer.metric_for_best_model; None without an evaluation
        "best_metric": trainer.state.best_metric,
        "micro_batch": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "num_processes": arguments.world_size,
        "loss": objective.report(),
        "trainable_parameters": trainable,
        "total_parameters": everything,
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "total_peak_memory_mb": round(total_peak_memory_mb(), 1),
        "step0_max_logit_difference": step0.difference,
        "gradient_shares": mean_gradient_shares(trainer.state.log_history),
        "last_log": next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), None),
    }

    # Export: adapter, plain LoRA, merged model, each compared with the trained one.
    trained_logits = probe_logits(trainer.plain_model(), probe)
    if cache is not None:
        cache.measure(trainer.plain_model(), name="trained")
        training["reference_cache"] = cache.report
    save_trained(trainer, config, run_path)
    trainer.model = trainer.model_wrapped = model = None  # room for the exports, which are loaded again
    del trainer
    gc.collect()
    if process.is_main_process:
        parities = export_run(config, run_path, probe, trained_logits, initial_logits=step0.initial_logits)
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
