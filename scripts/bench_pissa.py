"""What PiSSA's initialisation costs, on a Llama of random weights: from the loaded model to the one ready to train.

    python scripts/bench_pissa.py --device cuda --shape llama2-7b --init pissa_niter_16
    python scripts/bench_pissa.py --device cpu --shape llama2-7b --init pissa_niter_16 --layers 1 --modules q_proj

SVDs, the file of factors and the residual, as a run does them (ba_lora/methods/pissa.py), once, after a warm-up on a
small matrix. Prints one JSON object; the peak memory contains the model's own weights. A randomised SVD costs the same
for any weights; an exact one need not.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ba_lora.config.schema import AdapterConfig  # noqa: E402
from ba_lora.errors import CommandParser, run_entry_point  # noqa: E402
from ba_lora.runs.environment import environment, peak_memory_mb, reset_peak_memory  # noqa: E402

SHAPES = {  # hidden and intermediate size, layers; the vocabulary has no part in it
    "llama2-7b": (4096, 11008, 32),
    "toy": (64, 96, 2),
}


def main() -> None:
    parser = CommandParser(
        prog="python scripts/bench_pissa.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--init", default="pissa_niter_16", help="pissa or pissa_niter_N")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--modules", nargs="+", help="such as q_proj; all linear ones where left out")
    options = parser.parse_args()

    import torch
    from accelerate import PartialState
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ba_lora.methods import pissa

    device = PartialState(cpu=options.device == "cpu").device
    svd = pissa.requested_svd(AdapterConfig(init=options.init, rank=options.rank))
    hidden, intermediate, layers = SHAPES[options.shape]
    settings = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=hidden // 32,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(settings)
    adapter = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=options.modules or "all-linear",
        init_lora_weights=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    pissa.leading_components(torch.randn(1, 64, 64, device=device), svd)  # loads the device's libraries
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        factors = Path(folder) / "initial" / pissa.FACTORS_FILE
        started = time.perf_counter()
        pissa.write_factors(model, factors, svd)
        decomposed = time.perf_counter()
        pissa.load_factors(model, factors, subtract=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        finished = time.perf_counter()
    matrices = sum(hasattr(module, "lora_A") for module in model.modules())
    row = {
        "init": options.init,
        "device": options.device,
        "shape": options.shape,
        "layers": settings.num_hidden_layers,
        "modules": options.modules or "all-linear",
        "rank": options.rank,
        "matrices": matrices,
        "seconds": round(finished - started, 2),
        "factors_s": round(decomposed - started, 2),
        "residual_s": round(finished - decomposed, 2),
        "seconds_per_matrix": round((finished - started) / matrices, 3),
        "peak_mb": round(peak_memory_mb(), 1),
        "environment": environment(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    run_entry_point(main)
