"""vLLM as an engine of eval/engines/open.py. The only file that imports vllm."""

import functools
import gc
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from ba_lora.errors import UserError, in_one_line
from eval.engines.adapters import adapter_rank, hot_obstacle, read_adapter, vllm_lora_rank
from eval.engines.base import Engine, EngineOptions, Sampling

VLLM_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # others kill it at the first request


class VLLMEngine(Engine):
    """vLLM, on CUDA or (vllm-cpu) on the CPU: continuous batching by itself, adapters by LoRARequest."""

    kind = "vllm"

    def __init__(self, base: str, adapters: Mapping[str, str], options: EngineOptions) -> None:
        super().__init__(base, adapters, options)
        import torch

        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            self._check_cpu()
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self._cpu_cache_gib()))
        elif adapters and self.dtype == "float32":
            raise UserError(
                f"vLLM on a GPU serves adapters in 16 bits only, and {base} is to be in float32: dtype=bfloat16, "
                "serve=merged, or --engine hf"
            )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # fork breaks an initialised CUDA
        import vllm

        self.version = vllm.__version__
        arguments: dict[str, Any] = {
            "model": base,
            "dtype": self.dtype,
            "max_model_len": self.context,
            "seed": options.seed,
            "revision": options.revision,
            "tokenizer_revision": options.revision,
            "trust_remote_code": options.trust_remote_code,
            "tensor_parallel_size": options.tensor_parallel_size,
            "generation_config": "vllm",  # no hidden sampling defaults of the model's
            "load_format": "safetensors",
        }
        if options.batch_size is not None:
            arguments["max_num_seqs"] = options.batch_size
        if on_cpu:
            arguments["enforce_eager"] = True  # compiling costs more than it saves here
        else:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        if adapters:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": len(adapters)}
            arguments["max_lora_rank"] = self._lora_rank()
        try:
            self._llm = vllm.LLM(**arguments)
        except (RuntimeError, ValueError, OSError) as error:
            reason = in_one_line(error)
            raise UserError(
                f"vLLM could not start on {base}: {reason} (VLLM_LOGGING_LEVEL=INFO tells more); --engine hf may serve"
            ) from error

    def _check_cpu(self) -> None:
        if self.adapters and any(getattr(self.config, name, None) for name in ("num_experts", "num_local_experts")):
            raise UserError(
                f"vLLM on a CPU cannot serve adapters on {self.base}: with adapters its experts need kernels of a GPU; "
                "serve=merged, or use --engine hf"
            )
        head_dim = getattr(self.config, "head_dim", None)
        head_dim = head_dim or self.config.hidden_size // self.config.num_attention_heads
        if head_dim not in VLLM_CPU_HEAD_DIMS:
            raise UserError(
                f"vLLM on a CPU cannot serve {self.base}: its head_dim is {head_dim}, "
                f"and only {', '.join(map(str, VLLM_CPU_HEAD_DIMS))} are supported; use --engine hf"
            )

    def _cpu_cache_gib(self) -> int:
        """Room for four full contexts, at least 1 GiB."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim * 4
        return max(1, math.ceil(4 * (self.context or 4096) * bytes_per_token / 2**30))

    def _lora_rank(self) -> int:
        rank = 1
        for folder in self.adapters.values():
            settings = read_adapter(folder)
            if obstacle := hot_obstacle(settings):
                raise UserError(f"{folder} cannot be served hot: {obstacle}; serve the merged model, or --engine hf")
            rank = max(rank, adapter_rank(settings))
        return vllm_lora_rank(rank)

    def _generate_ids(
        self,
        encoded: list[list[int]],
        limits: list[int],
        settings: Sampling,
        *,
        adapter: str | None,
        progress: str | None,
    ) -> list[list[list[int]]]:
        from tqdm import tqdm
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        parameters = [
            SamplingParams(
                n=settings.num_samples,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=limit,
                stop=list(settings.stop) or None,
                stop_token_ids=self.ends,
                # its own seed for each prompt, so that a completion does not depend on what else is in the batch
                seed=None if settings.temperature == 0 else settings.seed * 1_000_003 + index * settings.num_samples,
                detokenize=bool(settings.stop),
            )
            for index, limit in enumerate(limits)
        ]
        request = None
        if adapter is not None:
            number = list(self.adapters).index(adapter) + 1  # vLLM wants ids from 1
            request = LoRARequest(adapter, number, self.adapters[adapter])
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in encoded],
            parameters,
            lora_request=request,
            use_tqdm=functools.partial(tqdm, file=sys.stderr) if progress else False,  # a disabled bar divides by 0
        )
        return [
            [list(sample.token_ids) for sample in sorted(output.outputs, key=lambda s: s.index)] for output in outputs
        ]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()  # ends the worker processes
        del self._llm
        gc.collect()
