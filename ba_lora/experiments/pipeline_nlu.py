"""NLU methods side by side: train_nlu.py for each, its out-of-domain evaluation where asked for, one table.

    python -m ba_lora.experiments.pipeline_nlu [CONFIG] [key=value …]

`sh scripts/nlu.sh` calls this. LoRA, PiSSA and BA-LoRA are compared unless `method=NAME[,NAME…]` names others;
`task=NAME` chooses the task, `seed=1,2` several seeds; CONFIG is a file, or the name of one in configs/nlu. A finished
run is printed again, a killed one goes on. Several GPUs or machines: as in ba_lora/experiments/pipeline.py.
"""

import argparse

from ba_lora.errors import CommandParser, run_entry_point
from ba_lora.experiments.pipeline import asked_specs, run_specs, split_words
from ba_lora.runs.results_nlu import run_table

DEFAULT_CONFIG = "configs/nlu/toy.yaml"
DEFAULT_METHODS = ("lora", "pissa", "ba_lora")


def main() -> int:
    parser = CommandParser(
        prog="python -m ba_lora.experiments.pipeline_nlu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="check the configs and print the commands, run nothing")
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help=f"default config {DEFAULT_CONFIG}")
    options = parser.parse_intermixed_args()
    config_path, overrides = split_words(options.words, default=DEFAULT_CONFIG)
    specs = asked_specs(config_path, overrides, kind="nlu", default=DEFAULT_METHODS)
    run_specs(specs, table=run_table, dry_run=options.dry_run)
    return 0


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
