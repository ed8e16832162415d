"""For tests of PiSSA's initialisation, in a file that loads quickly: worker processes import it too."""

import hashlib

import torch

from ba_lora.methods.pissa import Matrix
from ba_lora.models.layers import gathered


def random_matrices() -> dict[str, Matrix]:
    """Return eight matrices of two shapes; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return {str(i): Matrix(torch.randn(24, 16 + 8 * (i % 2), generator=generator)) for i in range(8)}


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the hash of all weights; every process of ZeRO-3 calls it."""
    sha = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        with gathered([parameter], modify=False):
            sha.update(parameter.detach().contiguous().numpy())
    return sha.hexdigest()
