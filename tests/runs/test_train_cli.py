"""What a user sees when something is wrong: one line that names cause and fix, status 2, nothing half-written."""

import json
import os
import subprocess
import sys

import pytest

from ba_lora.errors import UserError
from tests.support.tiny import only_result, save_tiny_model, tiny_llama


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=/no/such/model"], "/no/such/model"),
        (["model.name=nobody/nothing"], "nobody/nothing: no such folder, and not found on the hub"),
        (["adapter.target_modules=[q_proj,kay_proj]"], "'kay_proj' matches no linear layer .*nearest: k_proj"),
        (["adapter.rank=65"], "adapter.rank=65 is above the size of .*, 64"),
        (["adapter.rank=50", "adapter.init=lora", "adapter.tuner=adalora"], r"\(adalora starts at 75\) is above"),
        (["model.attention=flash_attention_2"], "flash_attention_2 needs a CUDA GPU"),
        (["trainer.fp16=true"], "fp16=true needs a GPU"),
        (["trainer.tf32=true"], "tf32=true needs an NVIDIA GPU"),
        (["adapter.options.loraplus=1"], "unknown key adapter.options.loraplus"),
        (["adapter.options.r=3"], "set by the run itself"),
        (["adapter.init=lora", "adapter.tuner=full", "model.dtype=float16"], "cannot train float16"),
        (["data.name=metamathqa", "data.source=/no/such/file.jsonl"], "no such file: /no/such/file.jsonl"),
        (["data.max_length=20"], "no row of .* is left"),
        (["trainer.lr_scheduler_kwargs={nonsense: 1}"], "trainer: TypeError: .*nonsense"),
        (["trainer.optim_args=nonsense"], "trainer: "),
        (["trainer.torch_compile_backend=nonsense"], "torch_compile_backend=nonsense is unknown"),
        (["trainer.deepspeed=configs/deepspeed/zero2.json"], "deepspeed needs a launcher: set ACCELERATE_CONFIG"),
        (["trainer.output_dir=x"], "set by the run itself: use output_dir"),
        (["trainer.save_total_limit=1"], "use 2"),
        (["trainer.eval_strategy=steps"], "trainer.eval_strategy=steps needs rows: set data.heldout_share"),
        (["data.heldout_share=0.1"], "data.heldout_share needs trainer.eval_strategy"),
        (
            ["data.heldout_share=1", "trainer.eval_strategy=epoch"],
            "heldout_share is 1.0: it must be a number above 0 and below 1",
        ),
        (["data.heldout_share=0.001", "trainer.eval_strategy=epoch"], "of 24 rows are 0: at least one row must be"),
        (["trainer.load_best_model_at_end=true"], "trainer.load_best_model_at_end needs trainer.eval_strategy"),
        (["early_stopping.patience=2"], "early_stopping.patience needs trainer.eval_strategy"),
        (
            ["trainer.eval_strategy=steps", "data.heldout_share=0.5", "early_stopping.patience=0"],
            "early_stopping.patience is 0: it must be a number of at least 1",
        ),
        (
            ["trainer.eval_strategy=steps", "data.heldout_share=0.5", "reference.cache=cache"],
            "reference.cache holds the training rows only",
        ),
        (
            ["trainer.eval_strategy=epoch", "data.heldout_share=0.5", "trainer.load_best_model_at_end=true"],
            "requires the save and eval strategy to match, .* Save strategy: ",
        ),
        (["trainer.lr_scheduler_type=cosin"], "lr_scheduler_type=cosin is unknown.*nearest: cosine"),
        (["adapter.init=pissa", "adapter.dora=true"], "needs adapter.dora=false and an adapter.tuner of .*lora"),
        (["hub.push=true"], "needs hub.repo_id"),
        (["trainer.average_tokens_across_devices=false"], "means over the positions of all processes"),
        (["trainer.average_tokens_across_devices=null"], "means over the positions of all processes"),
        (["trainer.label_smoothing_factor=0.1"], "no label smoothing"),
        (["trainer.auto_find_batch_size=true"], "the micro-batch is part of the method"),
        (["trainer.save_only_model=true"], "optimizer's state"),
        (["trainer.fsdp=full_shard"], "FSDP is not supported"),
        (["trainer.gradient_accumulation_steps=0"], "at least 1"),
        (["regularizers.lambda_svd=nan"], "must be a number of at least 0"),
        (["adapter.alpha=-1"], "must be a number above 0"),
        (["adapter.options.modules_to_save=[lm_head]"], "unknown to reference and export"),
        (["adapter.options.target_modules=[q_proj]"], "set by the run itself"),
        (["adapter.options.monteclora_config={}"], "adapter.tuner=monteclora has its KL term in the loss"),
        (["adapter.options.kasa_config={}"], "it changes the base's weights"),
        (["adapter.options.use_bdlora=true"], "unknown key adapter.options.use_bdlora for adapter.tuner=lora"),
        (["adapter.options.tinit=4"], "unknown key adapter.options.tinit for adapter.tuner=lora"),
        (["data.toy.label_noise=2"], "data.toy.label_noise is 2"),
        (["data.toy.noisy_families=[nope]"], "data.toy.noisy_families=nope is unknown"),
        (["seed=-1"], "seed is -1"),
        (["eval.tasks=[gsmk8]"], "eval.tasks=gsmk8 is unknown .nearest: gsm8k"),
        (["trainer.accelerator_config={split_batches: true}"], "the batch sizes are per process"),
    ],
)
def test_one_line_errors(train, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        train(*overrides, method="ba_lora")
    one_line(caught)
    assert not list(tmp_path.glob("*run*")) and not list(tmp_path.glob("results/*"))


def test_an_unknown_model_type(train, tmp_path, tiny_model):
    folder = save_tiny_model(tmp_path / "odd", model=None)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="unknown model type") as caught:
        train(f"model.name={folder}")
    one_line(caught)


def test_a_model_of_another_kind(train, tmp_path):
    """An encoder folder given as a causal model: named, not a stack of frames."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    folder = save_tiny_model(tmp_path / "t5", model=model)
    with pytest.raises(UserError, match="t5|T5") as caught:
        train(f"model.name={folder}")
    one_line(caught)


def test_weights_that_are_no_safetensors_are_refused(train, tmp_path):
    import torch

    folder = save_tiny_model(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors weights") as caught:
        train(f"model.name={folder}")
    one_line(caught)


def run(root, *words, environment=None):
    return subprocess.run(
        [sys.executable, "train_nlg.py", *words],
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=3600,
    )


def test_the_command_prints_the_line_and_leaves_with_2(root, tmp_path):
    done = run(root, "--config", "configs/nlg/toy.yaml", "adapter.rnk=4", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: unknown key adapter.rnk (nearest: adapter.rank")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(root, tmp_path, tiny_model):
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(mount)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    try:
        done = run(
            root,
            *("--config", "configs/nlg/toy.yaml", f"model.name={tiny_model}", "adapter.rank=16", "data.num_rows=16"),
            *("data.max_length=400", "trainer.max_steps=2", f"output_dir={mount / 'run'}"),
            f"results_dir={tmp_path / 'results'}",
        )
        assert done.returncode == 2, done.stderr[-2000:]
        assert "no disk space left" in done.stderr.splitlines()[-1]
        for name in ("adapter", "lora", "merged"):
            assert (
                not (mount / "run" / name).exists() or (mount / "run" / name / "README.md").exists() or name != "merged"
            )
        assert not list((mount / "run").glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_interrupt_is_recorded_as_cancelled(train, tmp_path, monkeypatch):
    from ba_lora.training.trainer import BALoRATrainer

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(BALoRATrainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert only_result(tmp_path / "results")["status"] == "cancelled"


def test_out_of_memory_is_recorded_as_such(train, tmp_path, monkeypatch):
    import torch

    from ba_lora.training.trainer import BALoRATrainer

    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(BALoRATrainer, "train", exhausted)
    with pytest.raises(UserError, match="lower trainer.per_device_train_batch_size"):
        train()
    assert only_result(tmp_path / "results")["status"] == "oom"


def test_a_gated_model_says_what_to_do(train, monkeypatch):
    import httpx
    import transformers
    from huggingface_hub.errors import GatedRepoError

    def gated(*_args, **_kwargs):
        request = httpx.Request("GET", "https://hub/model")
        cause = GatedRepoError("Access to model is restricted", response=httpx.Response(403, request=request))
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it") from cause

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", gated)
    with pytest.raises(UserError, match="owner/model is a gated repository: accept its licence") as caught:
        train("model.name=owner/model")
    one_line(caught)


@pytest.mark.parametrize("failing", ["both", "the second"])
def test_of_several_processes_one_tells_the_error(root, tmp_path, failing):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal\n"
        "from ba_lora.errors import UserError, run_entry_point\n"
        "def main():\n"
        "    signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"    if {failing == 'both'} or os.environ['RANK'] == '1':\n"
        "        raise UserError('no such file: x; check the path')\n"
        "    signal.pause()\n"
        "run_entry_point(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    told = [line for line in done.stderr.splitlines() if "error: no such file: x" in line]
    assert done.returncode != 0
    assert told == [("" if failing == "both" else "[rank 1] ") + "error: no such file: x; check the path"]


def test_the_console_of_a_run_without_deepspeed_does_not_speak_of_it(root, tmp_path, tiny_model):
    pytest.importorskip("deepspeed")
    words = ["--config", "configs/nlg/toy.yaml", f"model.name={tiny_model}", "data.num_rows=8", "data.max_length=400"]
    words += [
        "adapter.rank=4",
        "trainer.max_steps=1",
        "trainer.logging_steps=1",
        "export.merged=false",
        "trainer.disable_tqdm=true",
    ]
    done = run(root, *words, f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path / 'results'}")
    assert done.returncode == 0 and "step 1/1 | " in done.stdout, done.stderr[-2000:]
    assert "accelerator" not in done.stdout + done.stderr
