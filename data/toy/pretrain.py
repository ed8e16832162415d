"""Pre-train one of the two tiny bases of the embedded default, on one CPU thread in a few minutes.

    python data/toy/pretrain.py --variant clean      (or noisy; each writes data/toy/<variant>/)
    python data/toy/pretrain.py --variant clean --sample      (data/toy/clean/sample.jsonl only, the same as before)

The variants differ only in their corpus: `clean` is right everywhere and uniform over the families; `noisy` has half
of the answers wrong in two families and three families rare. Architecture, tokenizer, initialisation and number of
steps are the same, so what differs between the two after fine-tuning was inherited from the data. The corpus is
pre-training-like: whole texts in a plain "Question: … Answer: …" frame, several packed into one sequence.

`pretraining.json` beside the weights keeps settings, versions, loss curve and held-out accuracy.
"""

import json
import platform
import random
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere, without an installed package

from ba_lora.errors import CommandParser, UserError, run_entry_point  # noqa: E402
from ba_lora.io import folder_atomic, write_json_atomic, write_jsonl_atomic  # noqa: E402
from ba_lora.paths import written_path  # noqa: E402
from ba_lora.prompts import build_prompt  # noqa: E402
from ba_lora.words import check_choice  # noqa: E402
from data.tiny_llama import ARCHITECTURE, OPTIMIZER, VOCAB_SIZE, train, untrained_llama  # noqa: E402
from data.toy import FAMILIES, generate_problems, pretraining_prompt  # noqa: E402

VARIANTS = {
    "clean": {},
    "noisy": {"label_noise": 0.5, "noisy_families": ("multiply", "sharing"), "imbalance": 0.3},
}
SAMPLE_SEED = 20_000  # training reads seeds from 0, held-out accuracy 10,000
TRAINING = {
    "seed": 0,
    "threads": 1,
    "tokens_per_step": 2048,
    # Short sequences are cheap and hold a whole problem; every sixth step has long ones, so that positions to 512 work
    # too. (All long ones at the end instead: the loss jumped from 0.35 to 0.49 when they began.)
    "short_length": 128,
    "long_length": 512,
    "long_every": 6,
    **OPTIMIZER,
}


def train_tokenizer(seed: int):
    """Return a byte-level BPE of `VOCAB_SIZE` tokens: digits one by one, <s> before each text, no </s> after it.

    Any UTF-8 text encodes, since all 256 bytes are tokens. It is trained on all three splits' wording and on the Alpaca
    frame, so that prompts stay short; numbers teach it nothing, as each digit is a piece of its own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A digit; an operator with both its spaces; a word or mark with the space before it; line ends; anything else. No
    # piece runs over the end of "### Response:", so that prompt and response encode alike apart and together.
    pieces = Regex(r"\d| [-+*/=] (?=\d)| ?[^\W\d]+| ?[^\s\w]+|\n+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [
        row
        for split in ("pretrain", "finetune", "test")
        for row in generate_problems(num_rows=1500, seed=seed, split=split)
    ]
    texts = [text(row) for row in rows] + [build_prompt("") for _ in range(len(rows) // 4)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def text(row: dict[str, str]) -> str:
    """Return the pre-training text of one problem."""
    return f"{pretraining_prompt(row['query'])} {row['response']}"


class PackedCorpus:
    """An endless stream of token ids, <s> text </s> <s> text </s> …, cut into sequences of any length."""

    def __init__(self, tokenizer, *, seed: int, settings: dict):
        self.tokenizer, self.seed, self.settings = tokenizer, seed, settings
        self.part, self.num_problems, self.buffer = 0, 0, []

    def batch(self, num_sequences: int, length: int):
        import torch

        while len(self.buffer) < num_sequences * length:
            rows = generate_problems(num_rows=2000, seed=self.seed + self.part, split="pretrain", **self.settings)
            self.part += 1
            self.num_problems += len(rows)
            for ids in self.tokenizer([text(row) for row in rows])["input_ids"]:
                self.buffer.extend([*ids, self.tokenizer.eos_token_id])
        taken, self.buffer = self.buffer[: num_sequences * length], self.buffer[num_sequences * length :]
        return torch.tensor(taken).view(num_sequences, length)


def held_out_accuracy(model, tokenizer, *, num_rows: int, wording: str) -> dict:
    """Return {"overall", "per_family", "n"}: exact "#### N" answers, greedy, in the pre-training frame.

    The operands are those of the test split, never pre-trained on; `wording` is the split whose templates are used.
    """
    import torch

    rows = generate_problems(num_rows=num_rows, seed=10_000, split=wording, numbers="test")
    tokenizer.padding_side = "left"
    right, seen = Counter(), Counter()
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        inputs = tokenizer([pretraining_prompt(row["query"]) for row in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        completions = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, completion in zip(part, completions, strict=True):
            found = re.search(r"#### (\d+)", completion)
            seen[row["family"]] += 1
            right[row["family"]] += bool(found) and found[1] == row["answer"]
    tokenizer.padding_side = "right"
    return {
        "overall": round(sum(right.values()) / len(rows), 4),
        "per_family": {name: round(right[name] / seen[name], 4) for name in FAMILIES if seen[name]},
        "n": len(rows),
    }


def pretrain(variant: str, *, output: Path, num_steps: int, num_held_out: int) -> None:
    """Train one variant and write the complete model folder `output`, in the place of what is there."""
    import torch
    import transformers

    torch.set_num_threads(TRAINING["threads"])
    seed = TRAINING["seed"]
    random.seed(seed)
    tokenizer = train_tokenizer(seed)
    model = untrained_llama(seed)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    corpus = PackedCorpus(tokenizer, seed=seed, settings=VARIANTS[variant])
    print(
        f"{variant}: {num_parameters} parameters, {num_steps} steps of {TRAINING['tokens_per_step']} tokens", flush=True
    )

    def batch(step: int):
        is_long = (step + 1) % TRAINING["long_every"] == 0
        length = TRAINING["long_length" if is_long else "short_length"]
        return corpus.batch(TRAINING["tokens_per_step"] // length, length)

    trained = train(model, batch, num_steps=num_steps, settings=TRAINING, say=lambda line: print(line, flush=True))
    accuracy = {
        "pretrain_wording": held_out_accuracy(model, tokenizer, num_rows=num_held_out, wording="pretrain"),
        "test_wording": held_out_accuracy(model, tokenizer, num_rows=num_held_out, wording="test"),
    }
    print(json.dumps(accuracy, indent=1), flush=True)

    model.generation_config.update(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with folder_atomic(output) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        log = {
            "variant": variant,
            "corpus": {"split": "pretrain", "num_problems": corpus.num_problems, **VARIANTS[variant]},
            "num_parameters": num_parameters,
            "num_steps": num_steps,
            "training": TRAINING,
            "seconds": trained["seconds"],
            "cpu_seconds": trained["cpu_seconds"],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "held_out_accuracy": accuracy,
            "loss_curve": trained["loss_curve"],
        }
        write_json_atomic(folder / "pretraining.json", log)
        write_sample(variant, folder / "sample.jsonl")
    print(f"wrote {output}", flush=True)


def write_sample(variant: str, output: Path, *, num_rows: int = 200) -> None:
    """Write fresh texts of the variant's own distribution, wrong answers included: {"text"} a line."""
    rows = generate_problems(num_rows=num_rows, seed=SAMPLE_SEED, split="pretrain", **VARIANTS[variant])
    write_jsonl_atomic(output, ({"text": text(row)} for row in rows))


def main() -> None:
    parser = CommandParser(
        prog="python data/toy/pretrain.py", description="Pre-train a tiny base of the embedded default."
    )
    parser.add_argument("--variant", required=True, help=", ".join(VARIANTS))
    parser.add_argument("--output", help="a new folder; default: data/toy/<variant>")
    parser.add_argument("--sample", action="store_true", help="only write sample.jsonl, for measures of drift")
    parser.add_argument("--num-steps", type=int, default=1400)
    parser.add_argument("--num-held-out", type=int, default=400)
    args = parser.parse_args()
    check_choice("--variant", args.variant, VARIANTS)
    output = written_path(args.output) if args.output else Path(__file__).parent / args.variant
    if args.sample:
        write_sample(args.variant, output / "sample.jsonl")
        return
    if args.output and output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty, and would be replaced as a whole: name a new folder")
    pretrain(args.variant, output=output, num_steps=args.num_steps, num_held_out=args.num_held_out)


if __name__ == "__main__":
    run_entry_point(main)
