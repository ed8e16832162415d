"""Pinned curves: 20 training steps of each method on the embedded defaults, every logged term of every step.

    python -m tests.golden.curves            writes values.json beside this file, about 2 minutes on 2 CPU cores
    python -m tests.golden.curves ba_lora    only this case is written again, the others are kept

test_golden.py trains the same cases and compares. Write the values again only in a commit that changes the numbers on
purpose, and say there which ones and why.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

VALUES = Path(__file__).parent / "values.json"
ROOT = VALUES.parents[2]
STEPS = 20

_NLG = [
    "train_nlg.py",
    "--config=configs/nlg/toy.yaml",
    "data.num_rows=200",
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=2",
]
_NLU = [
    "train_nlu.py",
    "--config=configs/nlu/toy.yaml",
    "data.num_rows=160",
    "data.toy.dev_rows=20",
    "trainer.per_device_train_batch_size=8",
    "trainer.num_train_epochs=1",
]
_STEPS = [f"trainer.max_steps={STEPS}", "trainer.logging_steps=1", "trainer.disable_tqdm=true", "trainer.use_cpu=true"]
_ALL_TERMS = [f"regularizers.lambda_{term}" for term in ("consistency=0.025", "diversity=0.005", "svd=0.005")]

# case → the command's words; `{folder}` is an empty folder of the case
CASES: dict[str, list[str]] = {
    "pissa": [*_NLG, "--method=pissa", *_STEPS],
    "ba_lora": [*_NLG, "--method=ba_lora", *_STEPS],
    "ba_lora_iclr2026": [*_NLG, "--method=ba_lora_iclr2026", *_STEPS],
    "ba_lora_iclr2026_plain": [*_NLG, "--method=ba_lora_iclr2026", "loss.implementation=plain", *_STEPS],
    "lora_ba": [*_NLG, "--method=lora_ba", *_STEPS],
    "full_ft_all_terms": [*_NLG, "--method=full_ft", *_ALL_TERMS, "trainer.learning_rate=2e-4", *_STEPS],
    "adalora": [*_NLG, "--method=adalora", *_STEPS],
    "packing": [*_NLG, "--method=ba_lora_iclr2026", "data.packing=true", *_STEPS],
    "reference_cache": [*_NLG, "--method=ba_lora_iclr2026", "reference.cache={folder}/cache", *_STEPS],
    "nlu_ba_lora": [*_NLU, "--method=ba_lora", *_STEPS],
    "nlu_ba_lora_iclr2026": [*_NLU, "--method=ba_lora_iclr2026", *_STEPS],
    # three classes leave the svd term of the published k = 5 constant, so it is out there
    "nlu_svd": [*_NLU, "--method=ba_lora_iclr2026", "regularizers.svd_top_k=1", *_STEPS],
}
RUN_IDS = {
    "nlg": ("configs/nlg/toy.yaml", "ba_lora"),
    "nlg_7b": ("configs/nlg/llama-2-7b.yaml", "ba_lora_iclr2026"),
    "nlu": ("configs/nlu/toy.yaml", "ba_lora"),
}

_UNPINNED = {"epoch", "step", "tokens_per_second"}  # times, and what only counts


def train(case: str, folder: Path) -> dict:
    """Train one case in `folder` on one thread; return {"steps": [{term: value}], "norm": of the trained weights}."""
    import train_nlg
    import train_nlu

    words = [word.format(folder=folder) for word in CASES[case]]
    words += [f"output_dir={folder / 'run'}", f"results_dir={folder / 'results'}"]
    main = {"train_nlg.py": train_nlg.main, "train_nlu.py": train_nlu.main}[words[0]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(sys, "argv", words), contextlib.chdir(ROOT):
            main()
    finally:
        torch.set_num_threads(threads)
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    steps = [
        {key: value for key, value in entry.items() if key not in _UNPINNED and isinstance(value, int | float)}
        for entry in entries
        if "loss" in entry
    ]
    # the adapter's own file, or the whole model of full fine-tuning
    weights = sorted((folder / "run" / "adapter").glob("*.safetensors")) or sorted(
        (folder / "run" / "merged").glob("*.safetensors")
    )
    squares = sum(float(tensor.double().square().sum()) for file in weights for tensor in load_file(file).values())
    return {"steps": steps, "norm": squares**0.5}


def run_ids() -> dict[str, str]:
    """Return the run id of each config of RUN_IDS with its method."""
    from ba_lora.config.layers import load_config

    with contextlib.chdir(ROOT):
        return {name: load_config(path, method=method).run_id for name, (path, method) in RUN_IDS.items()}


def main() -> None:
    values = json.loads(VALUES.read_text()) if VALUES.is_file() else {"cases": {}}
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            values["cases"][case] = train(case, Path(folder))
    values |= {"run_ids": run_ids(), "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    VALUES.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
