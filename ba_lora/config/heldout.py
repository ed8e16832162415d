"""Evaluation inside an NLG training: `data.heldout_share`, `trainer.eval_strategy`, early stopping, best checkpoint.

Every `trainer.eval_steps` steps, or each epoch, the loss on the held-out rows is logged as transformers does it.
`trainer.load_best_model_at_end=true` exports the checkpoint with the least `trainer.metric_for_best_model` (eval_loss):
each evaluation needs one.
"""

from ba_lora.config.schema import RunConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from ba_lora.words import check_choice

_OF_EVALUATION = ("eval_on_start", "eval_steps", "eval_delay", "load_best_model_at_end")
_METRICS = ("loss", "task", "eval_loss", "eval_task")  # what an evaluation gives; all of them are losses


def check_heldout(config: RunConfig) -> None:
    """Raise UserError for settings of the evaluation that do not fit each other."""
    trainer = config.trainer
    strategy = str(trainer.get("eval_strategy") or "no")
    if (metric := trainer.get("metric_for_best_model")) is not None:
        check_choice("trainer.metric_for_best_model", metric, _METRICS)
    if trainer.get("greater_is_better"):
        raise UserError("trainer.greater_is_better=true is refused: the least loss is the best; leave it out")
    typed = [f"trainer.{name}" for name in _OF_EVALUATION if trainer.get(name)]
    if not isinstance(config, NLGConfig):
        typed += ["trainer.eval_strategy"] if strategy != "no" else []
        if typed:
            raise UserError(f"{typed[0]}: an NLU run is evaluated after every epoch; nlu.selection says which is kept")
        return
    typed += ["early_stopping.patience"] if config.early_stopping.patience is not None else []
    share = config.data.heldout_share
    if strategy == "no":
        if typed:
            raise UserError(f"{typed[0]} needs trainer.eval_strategy=steps or epoch, and data.heldout_share")
        if share is not None:
            raise UserError("data.heldout_share needs trainer.eval_strategy=steps or epoch: else nothing is evaluated")
        return
    if share is None:
        raise UserError(f"trainer.eval_strategy={strategy} needs rows: set data.heldout_share, such as 0.05")
    if config.uses_reference_cache:
        raise UserError("reference.cache holds the training rows only: with trainer.eval_strategy leave it out (null)")
    every = trainer.get("eval_steps") or trainer.get("logging_steps", 10)
    by_steps = strategy == trainer.get("save_strategy", "steps") == "steps"
    if trainer.get("load_best_model_at_end") and by_steps and trainer.get("save_steps", every) != every:
        raise UserError(
            "trainer.load_best_model_at_end=true needs a checkpoint of every evaluation: set "
            f"trainer.save_steps={every}, or trainer.save_strategy=best"
        )
