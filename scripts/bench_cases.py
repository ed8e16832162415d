"""What scripts/bench.py measures of NLG: a Llama of random weights, the cases' trainers, their count of operations.

    pissa        Trainer + PEFT as anyone would write them: the floor of what BA-LoRA adds to
    pissa_fused  PiSSA under our fused loss with every λ 0: no logits are kept, none made where there is no label
    pissa_cce    Trainer + PEFT with the loss of the package cut-cross-entropy (its kernels on CUDA, its torch.compile
                 form on a CPU)
    pissa_liger  Trainer + PEFT with Liger's fused loss, by Trainer's own use_liger_kernel; on CUDA only. Its kernels
                 for norms, rotation and activation stay off: every case has the same model
    lora         pissa without PiSSA's initialisation
    official     the official recipe's arithmetic, rewritten from its description: a second full model, the logits of
                 both at all positions, KL and entropy over all of them, torch.svd_lowrank of the logits
    plain        BALoRATrainer (paper2024), loss by way of the logits of the response positions
    fused        the same loss in chunks of positions: the default
    fused_cache  the same with the reference's top-64 log-probabilities from disk (`reference.cache`)
    fused_no_svd, fused_cache_no_svd    these two without the svd term: the targets of a 7B shape are stated so
    padded       fused, on rows of unequal lengths, padded to the longest of the micro-batch
    packed       the same rows without padding (`data.packing`): its real tokens a second against padded's are
                 padded's step_ratio ÷ its own, or tokens_per_s where both took turns

pissa_cce and pissa_liger need packages of their own (pip install -e '.[bench]'). Where one is missing, its case is
left out of the shape's own cases and named; asked for by --cases, it is refused.

Only padded and packed have rows of unequal lengths, and on a GPU flash-attention where it is installed and the shape
has 16 bits: by sdpa packed rows are walked one by one. Tokens are real ones: prompt and response, no padding.
"""

import dataclasses
import importlib.util
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from ba_lora.objective.reference_cache.store import CachedReference

PISSA = ("pissa", "pissa_fused", "pissa_cce", "pissa_liger")  # the fastest of a group is its best PiSSA
CASES = (
    *PISSA, "lora", "official", "plain", "fused", "fused_cache", "fused_no_svd", "fused_cache_no_svd", "padded",
    "packed",
)  # fmt: skip
WITHOUT_SVD = ("fused_no_svd", "fused_cache_no_svd")
UNEQUAL = ("padded", "packed")
FILLED_BEFORE = ("fused_cache", "fused_cache_no_svd")  # by `fill_cache`, in a process whose memory does not count
PACKAGES = {"pissa_cce": ("cut_cross_entropy", "triton"), "pissa_liger": ("liger_kernel", "triton")}
# of all that Trainer's use_liger_kernel would patch
LIGER = {"fused_linear_cross_entropy": True, "cross_entropy": False, "rope": False, "rms_norm": False, "swiglu": False}
OFFICIAL_SKETCH = 6  # columns of torch.svd_lowrank, its own default


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, and its micro-batch: every row has `length` tokens, the last `response` a label."""

    vocabularies: tuple[int, ...]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    batch: int
    length: int
    response: int
    rank: int
    init: str = "pissa"
    dtype: str = "float32"
    checkpointing: bool = False
    # unless others are asked for
    cases: tuple[str, ...] = tuple(case for case in CASES if case not in WITHOUT_SVD)

    def lengths(self, case: str) -> list[int]:
        """Return the tokens of each row of a micro-batch; every micro-batch has the same ones.

        Unequal lengths are the quantiles of a log-normal distribution that stands in for MetaMathQA's, which was not at
        hand: median 0.45 of the largest length, σ = 0.45.
        """
        if case not in UNEQUAL:
            return [self.length] * self.batch
        normal = statistics.NormalDist()
        quantiles = [normal.inv_cdf((row + 0.5) / self.batch) for row in range(self.batch)]
        return [min(round(0.45 * self.length * math.exp(0.45 * quantile)), self.length) for quantile in quantiles]


SHAPES = {
    "default": Shape((32_000, 128_000), 512, 6, 8, 1376, batch=4, length=256, response=176, rank=64),
    "llama2-7b": Shape(
        (32_000,), 4096, 32, 32, 11008, batch=16, length=512, response=352, rank=128, init="pissa_niter_16",
        dtype="bfloat16", checkpointing=True, cases=CASES,
    ),
    "toy": Shape((512,), 64, 2, 2, 96, batch=2, length=32, response=22, rank=4),
}  # fmt: skip
SHAPES["default-bf16"] = dataclasses.replace(SHAPES["default"], dtype="bfloat16")


def lacks(case: str, device: str, dtype: str = "float32") -> str | None:
    """Return what a case needs and does not have here, None where it can run."""
    missing = [name for name in PACKAGES.get(case, ()) if importlib.util.find_spec(name) is None]
    if case == "pissa_liger" and device != "cuda":
        return "Liger's kernels need CUDA"
    if case == "pissa_cce" and device == "cuda" and dtype == "float32":
        return "cut-cross-entropy's kernels need 16 bits: --shape default-bf16"
    return f"no {', no '.join(missing)} here: pip install -e '.[bench]'" if missing else None


def build_trainer(case: str, shape: Shape, vocabulary: int, device: str, folder: Path) -> "Trainer":
    """Return the case's trainer; its rows are the same micro-batch shapes over and over."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, set_seed

    from ba_lora.config.schema import BALoRAConfig
    from ba_lora.config.schema_nlg import LossConfig
    from ba_lora.training.packing import PackingCollator, prepare_packing
    from ba_lora.training.trainer import BALoRATrainer

    set_seed(0)
    model = random_llama(shape, vocabulary, device, attention=attention(case, shape, device))
    pretrained = random_llama(shape, vocabulary, device).requires_grad_(False) if case == "official" else None
    adapter = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank,
        target_modules="all-linear",
        init_lora_weights=True if case == "lora" else shape.init,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    if shape.checkpointing:
        model.enable_input_require_grads()
    rows = random_rows(case, shape, vocabulary)
    if case == "packed":
        prepare_packing(model, rows["input_ids"][:2])
    arguments = training_arguments(
        folder / case,
        batch=shape.batch,
        device=device,
        bf16=shape.dtype == "bfloat16",
        gradient_checkpointing=shape.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if shape.checkpointing else None,
        use_liger_kernel=case == "pissa_liger",
        liger_kernel_config=LIGER if case == "pissa_liger" else None,
    )
    data = {"train_dataset": rows, "data_collator": PackingCollator() if case == "packed" else _padded}
    if case == "pissa_cce":
        return _cce_trainer(device)(model, arguments, **data)
    if case in ("pissa", "pissa_liger", "lora"):
        return Trainer(model, arguments, **data)
    if case == "official":
        return _official_trainer(pretrained)(model, arguments, **data)
    left_out = {"pissa_fused": ("consistency", "diversity", "svd")} | dict.fromkeys(WITHOUT_SVD, ("svd",))
    weights = {f"lambda_{term}": 0.0 for term in left_out.get(case, ())}
    return BALoRATrainer(
        model,
        arguments,
        regularizers=BALoRAConfig(gradient_every=None, **weights),
        loss=LossConfig(implementation="plain" if case == "plain" else "fused"),
        reference=_cache(folder, shape, vocabulary, rows) if case in FILLED_BEFORE else None,
        **data,
    )


def attention(case: str, shape: Shape, device: str) -> str:
    """Return the case's `attn_implementation`."""
    from ba_lora.models.load import flash_attention_lacks

    flash = case in UNEQUAL and device == "cuda" and flash_attention_lacks(shape.dtype) is None
    return "flash_attention_2" if flash else "sdpa"


def training_arguments(folder: Path, *, batch: int, device: str, **settings: Any) -> "TrainingArguments":
    """Return arguments for steps without end that neither log nor save."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=1_000_000,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        **settings,
    )


def random_rows(case: str, shape: Shape, vocabulary: int) -> "Dataset":
    """Return numbered random rows for 4 micro-batches; the last tokens of each, in the shape's share, have labels."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(4 * shape.lengths(case)):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = length - length * shape.response // shape.length
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row": number})
    return Dataset.from_list(rows)


def _padded(rows: list[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    batch = {
        name: pad_sequence(tensors, batch_first=True, padding_value=-100 if name == "labels" else 0)
        for name, tensors in columns.items()
    }
    return batch | ({"row": torch.tensor([row["row"] for row in rows])} if "row" in rows[0] else {})


def fill_cache(case: str, shape: Shape, vocabulary: int, device: str, folder: Path) -> None:
    """Compute the reference cache of the case's rows."""
    from ba_lora.objective.reference_cache.fill import claim, fill

    cache = _cache(folder, shape, vocabulary, random_rows(case, shape, vocabulary))
    claim(cache)
    fill(cache, lambda: random_llama(shape, vocabulary, device))


def _cache(folder: Path, shape: Shape, vocabulary: int, rows: "Dataset") -> "CachedReference":
    from ba_lora.config.schema import BALoRAConfig
    from ba_lora.config.schema_nlg import NLGReferenceConfig
    from ba_lora.objective.reference_cache.store import Rows, open_cache

    key = {
        "vocabulary": vocabulary,
        "model.dtype": shape.dtype,
        "reference.top_k": NLGReferenceConfig().top_k,
        "reference.dtype": NLGReferenceConfig().dtype,
        "regularizers.temperature": BALoRAConfig().temperature,
    }
    return open_cache(folder / "cache", key, Rows.of(rows))


def random_llama(shape: Shape, vocabulary: int, device: str, *, attention: str = "sdpa") -> "torch.nn.Module":
    """Return a Llama of random weights, the same at every call, made in its dtype on its device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2 * shape.length,
        use_cache=False,
        attn_implementation=attention,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def _official_trainer(pretrained: "torch.nn.Module") -> type["Trainer"]:
    """Return a Trainer with the official recipe's loss: what it computes and holds, not its mistakes in doing so."""
    import torch
    import torch.nn.functional as F
    from transformers import Trainer

    from ba_lora.config.schema import BALoRAConfig

    weights = BALoRAConfig()

    class OfficialTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **settings: Any) -> Any:
            outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
            with torch.no_grad():
                reference_BTV = pretrained(input_ids=inputs["input_ids"]).logits
            log_p_BTV = F.log_softmax(outputs.logits, dim=-1)
            divergence = F.kl_div(log_p_BTV, F.softmax(reference_BTV, dim=-1), reduction="batchmean")
            negative_entropy = (log_p_BTV.exp() * log_p_BTV).sum(-1).mean()
            _, sigma, _ = torch.svd_lowrank(outputs.logits.flatten(0, 1).float(), q=OFFICIAL_SKETCH)
            ratio = -sigma[: weights.svd_top_k].sum() / sigma.sum()
            loss = outputs.loss + weights.lambda_consistency * divergence
            loss = loss + weights.lambda_diversity * negative_entropy + weights.lambda_svd * ratio
            return (loss, outputs) if return_outputs else loss

    return OfficialTrainer


def _cce_trainer(device: str) -> type["Trainer"]:
    """Return a Trainer whose loss is cut-cross-entropy's (Wijmans et al. 2024, arXiv 2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy
    from transformers import Trainer

    class CCETrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            llama = self.accelerator.unwrap_model(model).get_base_model()
            with self.accelerator.autocast():  # Trainer's own stands around the forward that is passed by here
                hidden_BTD = llama.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
            total = linear_cross_entropy(
                hidden_BTD,
                llama.lm_head.weight,
                inputs["labels"],
                shift=True,
                reduction="sum",
                impl="cce" if device == "cuda" else "torch_compile",
            )
            return total / num_items_in_batch

    return CCETrainer


def operations(case: str, shape: Shape, vocabulary: int) -> float:
    """Return the multiply-adds of a step's matrix products: what no implementation of the case can leave out.

    Attention's own products, normalisation, softmax and the optimizer are left out on both sides of the ratio. A frozen
    matrix costs one product forward and one backward, a factor of the adapter two backward; gradient checkpointing one
    forward more. Stock PiSSA has logits at every position, we at those of M.
    """
    lengths = shape.lengths(case)
    positions = sum(length * shape.response // shape.length for length in lengths)
    tokens = sum(lengths) if case == "packed" else len(lengths) * max(lengths)
    width, inner = shape.hidden, shape.intermediate
    linears = [(width, width)] * 4 + [(width, inner)] * 3
    frozen = shape.layers * sum(i * o for i, o in linears)
    factors = shape.layers * sum(shape.rank * (i + o) for i, o in linears)
    head = width * vocabulary
    forward = tokens * (frozen + factors)
    step = forward * (2 if shape.checkpointing else 1) + tokens * (frozen + 2 * factors)
    if case in ("pissa", "lora"):
        return step + 2 * tokens * head
    if case == "official":
        return step + tokens * frozen + 3 * tokens * head
    if case in (*FILLED_BEFORE, *PISSA):
        return step + 2 * positions * head
    return step + forward + 3 * positions * head
