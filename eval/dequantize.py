"""The pre-trained model of a quantised row as an ordinary model folder, for the evaluation of what was not trained.

    echo '"RUN"' | python -m eval.dequantize

RUN is the folder of the "run" of a pre-trained model (method untuned) with `model.quantization` in its config. Written
is RUN/merged, its 4-bit weights in `model.dtype`: the function is that of the quantised model, and any engine takes
it. Printed is {"unquantized_logit_difference"}: the largest |Δ logit| to the unquantised model, on the first prompts of
the first task that has completions, else on a question of its own.
"""

import argparse
import json
import sys
from pathlib import Path

from ba_lora.config.layers import load_run
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import CommandParser, run_entry_point
from ba_lora.experiments.evaluation_state import is_generated
from ba_lora.io import folder_atomic
from ba_lora.prompts import build_prompt


def write_dequantized(run_path: Path, config: NLGConfig) -> float:
    """Write merged/ of the pre-trained quantised model; return the largest |Δ logit| to the unquantised one."""
    from ba_lora.methods.build import probe_logits
    from ba_lora.models.pretrained import load_base, load_dequantized
    from ba_lora.models.tokenizer import load_tokenizer
    from ba_lora.runs.parity import probe_batch
    from eval.tasks import get_task

    tokenizer = load_tokenizer(config.model)
    prompts = [build_prompt("What is 2 + 3?")]
    if named := [name for name in config.eval.tasks if is_generated(name)]:
        task = get_task(named[0])
        items, _ = task.load(config.eval.data.get(task.name))
        prompts = [build_prompt(item.instruction, template=task.template) for item in items[:2]]
    probe = probe_batch([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts], tokenizer.pad_token_id)
    logits = probe_logits(load_base(config, quantize=False), probe)
    model = load_dequantized(config)
    model.config.use_cache = True
    with folder_atomic(run_path / "merged") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return (probe_logits(model, probe) - logits).abs().max().item()


def main() -> None:
    parser = CommandParser(
        prog="python -m eval.dequantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    run_path = Path(json.load(sys.stdin))
    print(json.dumps({"unquantized_logit_difference": write_dequantized(run_path, load_run(run_path))}))


if __name__ == "__main__":
    run_entry_point(main)
