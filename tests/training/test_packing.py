"""Packed = padded: loss, terms and gradients, for many architectures; what cannot be packed is refused."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.config.layers import load_config
from ba_lora.config.schema import ModelConfig, training_hash
from ba_lora.errors import UserError
from ba_lora.objective.regularizers import response_mask, response_targets
from ba_lora.training.log import TokenMeter
from ba_lora.training.packing import PACKED_SDPA, PackingCollator, faster_attention, prepare_packing
from tests.support.tiny import VOCABULARY, adapter_weights, arguments, collate, tiny_peft, tiny_rows

STRONG = {"lambda_consistency": 0.5, "lambda_diversity": 0.3, "lambda_svd": 0.2}
PAPER2024 = BALoRAConfig(**STRONG)
ICLR2026 = BALoRAConfig(**STRONG, temperature=2.0, diversity_top_k=20, svd_top_k=10, svd_norm="frobenius")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 6},  # rows have 8 to 23 tokens
    "gemma": {},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 6},
    "qwen2": {"attention_dropout": 0.0},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "gpt2": GPT2_SIZES | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "stablelm": {},  # passes no row borders to its attention: the mask serves
}
CANNOT_BE_PACKED = {
    "bloom": {"n_head": 2, "n_layer": 2},  # no position ids
    "mamba": {"state_size": 8},
    "opt": {"attn_implementation": "eager", "ffn_dim": 48, "word_embed_proj_dim": 32},  # its mask knows no positions
    "falcon": {"alibi": True},
    "jamba": {"num_experts": 2},  # attention and a recurrent state
}


def tiny(architecture, **settings):
    torch.manual_seed(0)
    sizes = SIZES | settings
    implementation = {"attn_implementation": sizes.pop("attn_implementation", None)}
    if architecture == "falcon":
        del sizes["head_dim"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes), **implementation)
    with torch.no_grad():  # from the usual 0.02 attention hardly matters
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def adapted(architecture, **settings):
    model = tiny(architecture, **settings)
    torch.manual_seed(1)
    targets = "all-linear" if architecture != "mixtral" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = {"r": 4, "lora_alpha": 4, "task_type": "CAUSAL_LM", "init_lora_weights": "pissa"}
    return get_peft_model(model, LoraConfig(target_modules=targets, **settings))


def rows_of(num_rows, seed=0):
    return list(tiny_rows(num_rows, seed=seed))


def trainer(model, folder, collator, regularizers=PAPER2024, rows=None, **settings):
    return BALoRATrainer(
        model,
        arguments(folder, **settings),
        regularizers=regularizers,
        train_dataset=rows if rows is not None else tiny_rows(16),
        data_collator=collator,
    )


def loss_terms_gradients(model, folder, batch, regularizers):
    """One micro-batch away from step 0, as training sees it: the loss, the logged terms, every gradient."""
    built = trainer(model, folder, collate, regularizers)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    built.current_gradient_accumulation_steps = 1
    built.state.max_steps = 10
    model.train()
    loss = built.compute_loss(model, dict(batch), num_items_in_batch=len(response_targets(batch["labels"])))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(gradient is not None for gradient in gradients.values())
    return loss.detach(), {name: torch.as_tensor(value) for name, value in built._term_meter.sums.items()}, gradients


def assert_same(got, want, tolerance=1e-6):
    """To `tolerance` relative to the loss, to each term, and to the largest gradient of the matrix."""
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    assert set(got[1]) == set(want[1]) and "weighted_svd" in got[1] and "consistency" in got[1]
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=2 * tolerance, atol=tolerance, msg=name)
    largest = max(gradient.abs().max().item() for gradient in want[2].values())
    for name, gradient in want[2].items():
        torch.testing.assert_close(got[2][name], gradient, rtol=0, atol=tolerance * max(1.0, largest), msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("regularizers", [PAPER2024, ICLR2026], ids=["paper2024", "iclr2026"])
def test_packed_equals_padded(tmp_path, architecture, attention, regularizers):
    rows = rows_of(4)
    results = []
    for packed in (False, True):
        model = adapted(architecture, attn_implementation=attention, **ARCHITECTURES[architecture])
        if packed:
            prepare_packing(model, [row["input_ids"] for row in rows])
            batch = PackingCollator()(rows)
            assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
            assert "attention_mask" not in batch
        else:
            batch = collate(rows)
        results.append(loss_terms_gradients(model, tmp_path, batch, regularizers))
    assert_same(*reversed(results))


def test_which_attention_serves():
    for attention, expected in (("sdpa", PACKED_SDPA), ("eager", "eager")):
        model = tiny("llama", attn_implementation=attention)
        prepare_packing(model, [[5, 6, 7], [8, 9]])
        assert model.config._attn_implementation == expected


def test_the_borders_reach_a_flash_attention(tmp_path):
    """flash_attention_2 needs a GPU; a stand-in with its signature and mask rule computes the same on the CPU."""
    seen = []

    def varlen(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **settings):
        assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        lengths = cu_seq_lens_q.diff().tolist()
        seen.append((lengths, max_length_q))
        assert cu_seq_lens_q.dtype == torch.int32 and max(lengths) == max_length_q
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        settings.pop("max_length_k")
        return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], dim=1), None

    AttentionInterface.register("varlen_on_cpu", varlen)
    AttentionMaskInterface.register("varlen_on_cpu", flash_attention_mask)
    rows = rows_of(4)
    want = loss_terms_gradients(adapted("llama"), tmp_path, collate(rows), PAPER2024)
    model = adapted("llama")
    model.get_base_model().set_attn_implementation("varlen_on_cpu")
    prepare_packing(model, [row["input_ids"] for row in rows])
    got = loss_terms_gradients(model, tmp_path, PackingCollator()(rows), PAPER2024)
    assert_same(got, want)
    assert seen[-1] == ([len(row["input_ids"]) for row in rows], max(len(row["input_ids"]) for row in rows))


def test_a_hint_where_flash_attention_could_serve(flash_attention_installed):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    hint = faster_attention(ModelConfig(), cuda)
    assert "model.attention=flash_attention_2 is faster" in hint and "\n" not in hint
    assert faster_attention(ModelConfig(), cpu) is None
    for settings in ({"attention": "flash_attention_2"}, {"attention": "eager"}, {"dtype": "float32"}):
        assert faster_attention(ModelConfig(**settings), cuda) is None


def test_no_hint_without_flash_attention():
    assert faster_attention(ModelConfig(), torch.device("cuda", 0)) is None


@pytest.mark.parametrize("architecture", CANNOT_BE_PACKED)
def test_what_cannot_be_packed_is_refused(architecture):
    model = tiny(architecture, **CANNOT_BE_PACKED[architecture])
    with pytest.raises(UserError, match=f"would mix the rows of this {architecture} model: use data.packing=false"):
        prepare_packing(model, [row["input_ids"] for row in rows_of(2)])


def test_chunked_attention_is_refused():
    model = tiny("llama")
    model.config.attention_chunk_size = 4
    with pytest.raises(UserError, match="chunks ignore where a row starts"):
        prepare_packing(model, [[5, 6, 7], [8, 9]])


def test_half_precision_passes_the_check():
    for architecture in ("llama", "mixtral"):
        prepare_packing(tiny(architecture).to(torch.bfloat16), [row["input_ids"] for row in rows_of(3)])


# ---- what a packed micro-batch holds


def test_no_label_crosses_a_border():
    """Rows whose very first token is labelled: M and its targets are those of the rows one by one."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8], [9, 10])]
    batch = PackingCollator()(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 10]]
    assert response_mask(batch["labels"]).tolist() == [[True, True, False, False, True, False]]
    assert response_targets(batch["labels"]).tolist() == [6, 7, 10]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]


def test_changing_one_row_changes_no_other():
    model = adapted("mistral", sliding_window=6)
    rows = rows_of(3)
    prepare_packing(model, [row["input_ids"] for row in rows])
    other = [dict(rows[0]), {**rows[1], "input_ids": rows[1]["input_ids"][::-1]}, dict(rows[2])]
    before, after = (model(**PackingCollator()(some), use_cache=False).logits[0] for some in (rows, other))
    lengths = [len(row["input_ids"]) for row in rows]
    same = [torch.equal(a, b) for a, b in zip(before.split(lengths), after.split(lengths), strict=True)]
    assert same == [True, False, True]


def test_columns_of_one_number_a_row_are_kept():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], "row": 3}, {"input_ids": [7], "labels": [-100], "row": 1}]
    assert PackingCollator()(rows)["row"].tolist() == [3, 1]


# ---- training


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["plain", "accumulation", "one_row", "checkpointing", "grouped"],
)
def test_training_packed_is_training_padded(tmp_path, settings):
    logs, weights = [], []
    for packed in (False, True):
        model = tiny_peft("pissa")
        if packed:
            prepare_packing(model, tiny_rows(2)["input_ids"])
        model.enable_input_require_grads()
        trained = trainer(
            model,
            tmp_path,
            PackingCollator() if packed else collate,
            max_steps=8,
            learning_rate=3e-3,
            **settings,
        )
        trained.train()
        logs.append([entry for entry in trained.state.log_history if "loss" in entry])
        weights.append(adapter_weights(model))
        share = trained.throughput()["padding_share"]
        assert (share > 0) == (not packed and settings.get("per_device_train_batch_size") != 1)
    assert len(logs[0]) == 8
    for padded, packed in zip(*logs, strict=True):
        for name in ("loss", "task", "consistency", "diversity", "svd", "weighted_svd", "grad_norm"):
            assert packed[name] == pytest.approx(padded[name], rel=2e-4, abs=2e-6), name
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_two_packed_processes_equal_padded_accumulation(tmp_path, root, processes):
    regularizers = json.dumps(dataclasses.asdict(PAPER2024))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    worker = str(root / "tests" / "workers" / "train_tiny.py")
    padded, packed = tmp_path / "padded.pt", tmp_path / "packed.pt"
    subprocess.run([sys.executable, worker, regularizers, "2", str(padded)], env=environment, check=True, timeout=3600)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, worker, regularizers, "1", str(packed), "packed"]
    subprocess.run(command, env=environment, check=True, timeout=3600)
    one, two = torch.load(padded), torch.load(packed)
    assert two["processes"] == processes
    for name in ("loss", "task", "consistency", "diversity", "svd", "weighted_consistency"):
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=2e-4, abs=2e-6), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-4)
    assert one["throughput"]["padding_share"] > 0 and two["throughput"]["padding_share"] == 0


@pytest.mark.parametrize("method", ["ba_lora", "full_ft"])
def test_the_command_packs_and_reports(train, method, monkeypatch, capsys):
    monkeypatch.setattr("train_nlg.faster_attention", lambda config, device: f"hint: {config.attention} on {device}")
    facts, weights = {}, {}
    for packing in (False, True):
        run = train(f"data.packing={packing}", method=method, name=f"{method}-{packing}")
        assert capsys.readouterr().out.splitlines().count("hint: sdpa on cpu") == packing
        facts[packing] = json.loads((run / "train.json").read_text())["training"]
        weights[packing] = AutoModelForCausalLM.from_pretrained(run / "merged").state_dict()
        assert PACKED_SDPA not in (run / "merged" / "config.json").read_text()
    assert facts[True]["padding_share"] == 0 < facts[False]["padding_share"] < 0.5
    assert facts[True]["tokens_per_second"] > 0 and facts[False]["tokens_per_second"] > 0
    last = facts[True]["last_log"]
    assert last["tokens_per_second"] > 0 and last["padding_share"] == 0
    assert last["loss"] == pytest.approx(facts[False]["last_log"]["loss"], rel=1e-4)
    for name, weight in weights[False].items():
        torch.testing.assert_close(weights[True][name], weight, rtol=1e-2, atol=1e-3)


def test_packing_is_part_of_the_hash_only_where_it_is_on(root):
    base = root / "configs" / "nlg" / "toy.yaml"
    off, explicit, on = (load_config(base, overrides=o) for o in ([], ["data.packing=false"], ["data.packing=true"]))
    assert training_hash(off) == training_hash(explicit) != training_hash(on)


# ---- tokens per second


def test_the_meter_counts_real_tokens(monkeypatch):
    clock = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("ba_lora.training.log.time.perf_counter", lambda: next(clock))
    meter = TokenMeter()
    assert meter.overall(lambda counts: counts) == {}
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    meter.add({"input_ids": torch.zeros(2, 4), "attention_mask": mask})
    meter.add({"input_ids": torch.zeros(1, 6)})
    assert meter.read(lambda counts: 2 * counts) == {"tokens_per_second": 26 / 2, "padding_share": 1 / 14}
    meter.add({"input_ids": torch.zeros(1, 14)})
    assert meter.overall(lambda counts: 2 * counts) == {"tokens_per_second": 54 / 5, "padding_share": 2 / 56}


def test_models_do_not_say_packed(tmp_path):
    model = tiny("llama")
    prepare_packing(model, [[5, 6, 7], [8, 9]])
    model.save_pretrained(tmp_path)
    assert PACKED_SDPA not in (tmp_path / "config.json").read_text()
    assert transformers.AutoConfig.from_pretrained(tmp_path)._attn_implementation != PACKED_SDPA
