"""The task file for lm-evaluation-harness asks what our own gsm8k task asks."""

from pathlib import Path

import jinja2
import yaml

from ba_lora.prompts import build_prompt
from eval.grading.numbers import parse_number
from eval.tasks import get_task


def test_the_cross_check_asks_as_we_ask(root: Path) -> None:
    spec = yaml.safe_load((root / "eval" / "lm_eval" / "gsm8k_alpaca.yaml").read_text())
    task = get_task("gsm8k")
    row = {"question": " How many are 2 {{and}} 3?\n", "answer": "2 + 3 = 5\n#### 1,005"}
    (item,) = task.items_from_rows([row], source="here")
    asked = jinja2.Template(spec["doc_to_text"], keep_trailing_newline=True).render(**row)
    assert asked == build_prompt(item.instruction, template=task.template)
    assert parse_number(jinja2.Template(spec["doc_to_target"]).render(**row)) == parse_number(item.gold)
    assert tuple(spec["generation_kwargs"]["until"]) == tuple(task.stop)
    assert spec["generation_kwargs"]["max_gen_toks"] == task.max_new_tokens
    assert not spec["generation_kwargs"]["do_sample"] and spec["num_fewshot"] == 0
    assert (spec["dataset_path"], (spec["dataset_name"],)) == (task.hub, task.hub_configs(task.hub))
