"""Train one NLG run, from a config to an exported model.

    python train_nlg.py --config configs/nlg/toy.yaml --method ba_lora trainer.learning_rate=5e-4
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train_nlg.py --config configs/nlg/llama-2-7b.yaml

config → data → model → trainer → export. The same command again goes on where a killed run stopped, and does nothing
when it is done. `sh scripts/ba-lora.sh` adds generation, scoring and the table.
"""
# ruff: noqa: E402

from ba_lora.config.command_line import read_run
from ba_lora.errors import check_first, run_entry_point

if __name__ == "__main__":  # what is wrong in the command line is told before the imports below, which take seconds
    check_first(lambda: read_run("nlg", __doc__))

from ba_lora.methods.build import left_out_experts
from ba_lora.models.sizes import check_sizes
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.objective.objective import TokenObjective
from ba_lora.objective.reference_cache.fill import cached_reference
from ba_lora.runs.shell import Trained, TrainingRun, run_training
from ba_lora.training.arguments import early_stopping
from ba_lora.training.packing import build_collator, faster_attention, prepare_packing
from ba_lora.training.trainer import BALoRATrainer
from data.nlg import load_training_data
from data.sets import check_source


def main() -> None:
    run_training("nlg", __doc__, train, check=lambda config: check_source(config.data))


def train(run: TrainingRun) -> Trained:
    """Train one run; every process of a distributed run calls it. What stands around it: ba_lora/runs/shell.py."""
    config = run.config

    # Data: rows → prompt + response in the template, labels on the response only.
    tokenizer = load_tokenizer(config.model, template=config.data.template)
    data = load_training_data(config.data, tokenizer)
    run.print(
        "data: {rows_used} of {rows_chosen} chosen rows, {rows_cut} cut to {max_length} tokens, {rows_dropped} dropped "
        "(nothing of the response left), {rows_empty} empty, {rows_shortened} shortened (turns left out), "
        "{rows_duplicate} repeated, {rows_heldout} held out".format(**data.report, max_length=config.data.max_length)
    )
    check_sizes(config, tokenizer, data.dataset, data.heldout)  # vocabulary and positions have room for the rows

    # Reference: the pre-trained model's own distributions. Without a cache on disk the trainer makes them in every
    # step, by a pass of the model as it is at step 0.
    cache = None
    if config.uses_reference_cache:
        cache = cached_reference(config, data.dataset, data.report, tokenizer)

    # Model: the pre-trained one, with the method's adapter.
    model = run.build_model(data.dataset, tokenizer)
    if config.data.packing:
        prepare_packing(model, data.dataset["input_ids"][:2])  # two rows in one must be as two: the attention is tried
        if hint := faster_attention(config.model, run.process.device):
            run.print(hint)
    if note := left_out_experts(model):  # of a mixture of experts, which the adapter is not on
        run.print(note)

    # Objective and trainer: L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd.
    objective = TokenObjective(model, config.regularizers, loss=config.loss, reference=cache)
    trainer = BALoRATrainer(
        model,
        run.arguments,
        objective=objective,
        train_dataset=data.dataset,
        eval_dataset=data.heldout,
        data_collator=build_collator(tokenizer, packing=config.data.packing),
        processing_class=tokenizer,
        callbacks=early_stopping(config),
    )
    run.fit(trainer)

    training = run.facts(trainer) | {
        "best_step": trainer.best_step(),  # by trainer.metric_for_best_model; None without an evaluation
        "best_metric": trainer.state.best_metric,
        "loss": objective.report(),
    }
    if cache is not None:
        cache.measure(trainer.plain_model(), name="trained")  # how far the K likeliest tokens now miss the full KL
        training["reference_cache"] = cache.report
    return Trained(trainer, data.report, training)  # run_training exports it: adapter, plain LoRA, merged model


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
