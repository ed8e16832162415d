"""What docs/findings.md says of PEFT and of released codes, shown by running PEFT's, or what a code does, line by line.

Values that are worked out by hand are in test_equations.py.
"""

import itertools
import math
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ba_lora.config.layers import load_config
from ba_lora.config.schema import AdapterConfig, BALoRAConfig
from ba_lora.io import read_jsonl
from ba_lora.methods.base import Tuner, find_part
from ba_lora.methods.build import build_model
from ba_lora.methods.dylora import DyLora
from ba_lora.methods.lora_fa import factor_pairs
from ba_lora.models.layers import adapter_layers
from ba_lora.runs.export import export_lora
from ba_lora.training.trainer import BALoRATrainer
from tests.conftest import ROOT
from tests.support.pages import PAGES, blocks
from tests.support.tiers import mostly_slow
from tests.support.tiny import arguments, collate, tiny_llama, tiny_rows

BLOCKS = blocks(PAGES["docs/findings.md"], "python")
IDS = torch.arange(3, 35).view(2, 16)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_what_the_page_gives_to_maintainers_prints_what_it_says(number, capsys):
    """`print(…)  # A, B: why`: the lines that are printed begin with A and B."""
    if "bitsandbytes" in BLOCKS[number]:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    exec(BLOCKS[number], {"__name__": "reproduction"})
    said = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("skipping SVD")]
    promised = [told.split(":")[0].split(", ") for told in re.findall(r"print\(.*\)  # (.*)", BLOCKS[number])]
    for line, told in zip(said, itertools.chain.from_iterable(promised), strict=True):
        assert line.startswith(told)


def monteclora(buffer_size, **settings):
    """The tiny Llama with MonteCLoRA by PEFT, in training mode."""
    from peft.tuners.lora.config import MontecloraConfig

    base = tiny_llama()
    torch.manual_seed(1)
    config = MontecloraConfig(num_samples=4, use_entropy=False, buffer_size=buffer_size, **settings)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", monteclora_config=config))
    for layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model.train()


def gradients(model, *, checkpointing, prepare):
    """The gradients of one pass, from the same draws, whether the layers' passes are run again or kept."""
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    torch.manual_seed(2)
    prepare(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_monteclora_of_peft_with_a_buffer_has_other_gradients_under_checkpointing():
    """The recomputed pass takes the buffer's next draw. Ours draws from the random state, which is restored."""
    from peft.tuners.lora.monteclora import BufferedMontecloraSampler

    def rewind(model):
        for module in model.modules():
            if isinstance(found := getattr(module, "sampler", None), BufferedMontecloraSampler):
                found.index = 0

    def compare(buffer_size, prepare):
        model = monteclora(buffer_size, sample_scaler=0.1)
        kept, again = (gradients(model, checkpointing=on, prepare=prepare) for on in (False, True))
        return (again - kept).abs().max().item(), kept.abs().max().item()

    theirs, largest = compare(2, rewind)
    ours, _ = compare(1, find_part("tuner", "monteclora")().prepare)
    print(f"buffer of 2: gradients differ by {theirs:.3f}, the largest is {largest:.3f}; ours by {ours}")
    assert theirs > 0.05 * largest and ours == 0


def released_monteclora(layer, x, *, epsilon=1e-4, num_samples=4):
    """A layer's training pass in LCS2-IIITD/MonteCLoRA, commit 0cd4a77: `Linear.forward` of
    peft/src/peft/tuners/lora/layer.py, where the sampler's draws have ε in them already."""
    first, second = layer.lora_A["default"], layer.lora_B["default"]
    draws = epsilon * torch.randn(num_samples, *first.weight.T.shape)
    weights = torch.randn(num_samples).softmax(0)
    updated = torch.einsum("i,ijk->jk", weights, first.weight.T + epsilon * draws)
    first.weight = nn.Parameter(updated.T)
    return layer.base_layer(x) + layer.scaling["default"] * second(first(x))


def test_monteclora_as_released_trains_b_only():
    """Re-enacted. The optimizer holds the first A, which gets no gradient; PEFT's version trains A."""
    from peft.tuners.lora.config import MontecloraConfig

    def trained(released):
        torch.manual_seed(0)
        x, y = torch.randn(64, 16), torch.randn(64, 8)
        config = MontecloraConfig(num_samples=4, buffer_size=1, sample_scaler=1e-4)
        settings = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], monteclora_config=config)
        model = get_peft_model(nn.Sequential(nn.Linear(16, 8, bias=False)), settings)
        layer = model.base_model.model[0]
        held, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        first, losses = held.detach().clone(), []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
        for _ in range(50):
            optimizer.zero_grad()
            loss = ((released_monteclora(layer, x) if released else model(x)) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        moved = (layer.lora_A["default"].weight - first).norm() / first.norm()
        return moved.item(), second.norm().item(), held.grad, losses

    moved, second, gradient, losses = trained(released=True)
    moved_by_peft, _, gradient_of_peft, losses_of_peft = trained(released=False)
    print(f"‖A − A₀‖/‖A₀‖ {moved:.1e}, PEFT {moved_by_peft:.2f}; loss {losses[-1]:.3f}, PEFT {losses_of_peft[-1]:.3f}")
    assert gradient is None and moved < 1e-5 and second > 0.1 and losses[-1] < losses[0]
    assert gradient_of_peft is not None and moved_by_peft > 0.1


def toy():
    """The toy's pre-trained model, and a function that gives its logits and perplexity on 20 texts of its
    pre-training."""
    folder = ROOT / "data/toy/clean"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in itertools.islice(read_jsonl(folder / "sample.jsonl"), 20)]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]

    @torch.no_grad()
    def measured():
        logits = [model(ids).logits[0, :-1] for ids in rows]
        losses = [
            nn.functional.cross_entropy(z, ids[0, 1:], reduction="sum") for z, ids in zip(logits, rows, strict=True)
        ]
        return torch.cat(logits), math.exp(sum(losses) / sum(len(z) for z in logits))

    return model, measured


def test_ssf_as_released_does_not_begin_at_the_pretrained_model():
    """Re-enacted on the linear layers: dongzelian/SSF, `init_ssf_scale_shift` of models/vision_transformer.py draws the
    scales from N(1, 0.02²) and the shifts from N(0, 0.02²)."""
    model, measured = toy()
    logits, before = measured()
    torch.manual_seed(0)
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            drawn = [mean + 0.02 * torch.randn(layer.out_features) for mean in (1, 0)]
            layer.register_forward_hook(lambda layer, inputs, output, drawn=drawn: output * drawn[0] + drawn[1])
    at_start, after = measured()
    print(f"SSF: logits by up to {(at_start - logits).abs().max():.3f}, perplexity {before:.4f} → {after:.4f}")
    assert (at_start - logits).abs().max().item() == pytest.approx(1.946, rel=0.02)


def test_sara_as_released_does_not_begin_at_the_pretrained_model():
    """Re-enacted: sjtuplayer/SaRA, commit 5cb8c67: `AdamW.__init__` of optim/adamw.py writes |w| where |w| < θ, into
    every parameter, before the first step."""
    model, measured = toy()
    logits, before = measured()
    for threshold in (2e-3, 2e-2):  # theirs, and ten times as much
        turned = 0
        for parameter in model.parameters():
            small = parameter.data.abs() < threshold
            turned += int((small & (parameter.data < 0)).sum())
            parameter.data[small] = parameter.data[small].abs()
        at_start, after = measured()
        share = turned / sum(p.numel() for p in model.parameters())
        print(
            f"θ {threshold}: {100 * share:.1f} % of the weights turned round, logits by up to "
            f"{(at_start - logits).abs().max():.3f}, perplexity {before:.4f} → {after:.4f}"
        )
        assert 0.001 < share < 0.2 and (at_start - logits).abs().max() > 0.02
    assert after > 1.002 * before


def dylora_steps(form, *, lr, constant):
    """108 steps of AdamW on a layer with LoRA of rank 8, α 16, in a form of DyLoRA or none: how far an entry of A moved
    in units of the learning rate under a gradient of 1, or the loss that is left of a regression on ΔW of rank 8."""
    torch.manual_seed(0)
    x, change = torch.randn(256, 32), torch.randn(32, 8) @ torch.randn(8, 32) / 16
    layers = nn.Sequential(nn.Linear(32, 32, bias=False))
    target = layers(x).detach() + x @ change.T
    model = get_peft_model(layers, LoraConfig(r=8, lora_alpha=16, target_modules=["0"])).train()
    tuner = Tuner()
    if form != "lora":
        tuner = DyLora(AdapterConfig(tuner="dylora", rank=8, options={"restore": form == "restored"}))
    tuner.prepare(model)
    ((first, second, _),) = factor_pairs(model)
    start = first.detach().clone()
    optimizer = torch.optim.AdamW([first, second], lr=lr, weight_decay=0)
    for step in range(108):
        tuner.begin_step(model, step)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        if constant:
            first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        else:
            loss.backward()
        tuner.before_step(model, step)
        optimizer.step()
        tuner.after_step(model, step, optimizer)
    if constant:
        return (first - start).abs().mean().item() / lr
    return ((model.eval()(x) - target).square().mean() / (x @ change.T).square().mean()).item()


def test_dylora_learns_less_where_rows_are_restored():
    """Putting rows back takes their momentum from them: a gradient counts with 1 − β₁ of its weight."""
    forms = ("lora", "theirs", "restored")
    moved = {form: dylora_steps(form, lr=1e-3, constant=True) for form in forms}
    print("moved, in learning rates:", {form: round(far, 1) for form, far in moved.items()})
    assert moved == pytest.approx({"lora": 108.0, "theirs": 35.9, "restored": 8.0}, rel=0.02)
    told = {
        6e-3: {"lora": 0.001, "theirs": 0.334, "restored": 0.78},
        1.8e-2: {"lora": 0.0, "theirs": 0.378, "restored": 0.419},
    }
    for lr, shares in told.items():
        left = {form: dylora_steps(form, lr=lr, constant=False) for form in forms}
        print(f"loss that is left at {lr}:", {form: round(loss, 3) for form, loss in left.items()})
        assert left == pytest.approx(shares, abs=0.005)


@pytest.fixture
def by_peft(tmp_path):
    """(folder, logits) of the tiny Llama with PEFT's LoRA-GA, trained a little and saved."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    base = tiny_llama()
    config = LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()(IDS).logits.detach()


def test_an_adapter_of_pefts_lora_ga_is_another_model_on_the_base(by_peft):
    """The saved A and B are for W − s B₀A₀. The base is W, and PEFT loads them on it without an error."""
    folder, trained = by_peft
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    difference = (loaded(IDS).logits - trained).abs().max().item()
    change = (tiny_llama().eval()(IDS).logits - trained).abs().max().item()
    print(f"reloaded: {difference:.2f} from the trained model; the training itself moved the logits by {change:.2f}")
    assert difference > 0.1


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


@pytest.mark.parametrize("init", mostly_slow(["olora", "milora", "lora_ga"], ["olora"]))
def test_inits_of_our_own_work_on_conv1d(init, tmp_path):
    """On GPT-2, where PEFT's OLoRA fails: they begin at the pre-trained model, train, and leave a plain LoRA."""
    gpt2().save_pretrained(tmp_path / "base")
    words = [f"model.name={tmp_path / 'base'}", "adapter.rank=4", "model.dtype=float32"]
    config = load_config("toy", method=init, overrides=words)
    probe = {name: collate(list(tiny_rows(3)))[name] for name in ("input_ids", "attention_mask")}
    model, step_zero = build_model(config, run_path=tmp_path / "run", num_steps=2, probe=probe, rows=tiny_rows(16))
    assert step_zero.difference < 2e-5
    trainer = BALoRATrainer(
        model,
        arguments(tmp_path, max_steps=2, learning_rate=1e-2),
        regularizers=BALoRAConfig(lambda_consistency=0.1, lambda_diversity=0, lambda_svd=0),
        train_dataset=tiny_rows(8),
        data_collator=collate,
    )
    trainer.train()
    trained = trainer.plain_model().eval()(IDS).logits
    loaded = PeftModel.from_pretrained(gpt2(), export_lora(trainer, tmp_path / "lora")).eval()
    change = (gpt2().eval()(IDS).logits - trained).abs().max()
    assert (loaded(IDS).logits - trained).abs().max() < 1e-3 * change
