"""PiSSA's singular components on disk, shared by the ranks, seeds and methods of a table.

One file a matrix, `<digest>-<SVD>.safetensors`: U, S, Vᵀ in float32, before any scaling or rounding. The digest is the
sha256 of the weight's own bytes, dtype and shape, so a file can only ever answer for the very weights it was made of:
another base, revision or dtype has other files, whatever its name, and other target modules share what they have in
common. What is not there is computed and added.

A smaller rank takes the leading components. Of an exact SVD they are bit for bit those that it would compute itself, so
one file serves every rank up to its own, and a larger one takes its place. Of a randomised SVD they come from a wider
sketch and are other numbers, in general nearer to the exact ones: rank, iterations and seed are part of the name.

Files are written whole and renamed, by one process at a time; a killed one leaves whole files and a lock that is free.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ba_lora.errors import UserError
from ba_lora.io import file_atomic
from ba_lora.locks import locked

SKETCH_SEED = 0  # of the randomised SVD: the components belong to the base, not to a run's seed


class SVD(NamedTuple):
    """The `rank` leading components, all of a smaller matrix: exact, or by `niter` subspace iterations."""

    rank: int
    niter: int | None = None

    @property
    def label(self) -> str:
        return "exact" if self.niter is None else f"niter_{self.niter}-rank_{self.rank}-seed_{SKETCH_SEED}"


class Components(NamedTuple):
    """U [out, r], S [r] and Vᵀ [r, in] of one matrix, float32 on the CPU."""

    left: Tensor
    values: Tensor
    right: Tensor

    def leading(self, rank: int) -> "Components":
        return Components(self.left[:, :rank].contiguous(), self.values[:rank], self.right[:rank])


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes, dtype and shape."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    sha.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
    return sha.hexdigest()


class FactorsCache:
    """The folder `path`; matrices are named by their `digest`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one process that reads and fills the folder; wait while another one is."""
        with locked(self._path / ".lock", doing=f"fills {self._path}", wait=True):
            for stale in self._path.glob(".*.tmp"):  # of a killed process: there is no other writer now
                stale.unlink()
            yield

    def file(self, matrix: str, svd: SVD) -> Path:
        """Return the matrix's file for this kind of SVD."""
        return self._path / f"{matrix}-{svd.label}.safetensors"

    def read(self, matrix: str, svd: SVD, shape: tuple[int, int]) -> Components | None:
        """Return the leading components of the matrix [out, in], or None where they are not here yet.

        Raises UserError for a file that is damaged or of another matrix.
        """
        path = self.file(matrix, svd)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                found = Components(*(file.get_tensor(name) for name in Components._fields))
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged ({reason}): delete it, it will be made anew") from error
        stored = found.values.numel()
        fits = found.left.shape == (shape[0], stored) and found.right.shape == (stored, shape[1])
        if metadata.get("matrix") != matrix or metadata.get("svd") != svd.label or not fits:
            raise UserError(
                f"{path} belongs to another matrix or SVD: delete it, or choose another adapter.factors_cache"
            )
        if metadata.get("content") != _content(found):
            raise UserError(f"{path} is damaged (other contents than were written): delete it, it will be made anew")
        rank = min(svd.rank, *shape)
        return found.leading(rank) if stored >= rank else None

    def write(self, matrix: str, svd: SVD, components: Components) -> None:
        """Keep the components, in place of fewer ones."""
        metadata = {"format": "pt", "matrix": matrix, "svd": svd.label, "content": _content(components)}
        with file_atomic(self.file(matrix, svd)) as temporary:
            save_file(components._asdict(), temporary, metadata=metadata)


def _content(components: Components) -> str:
    return hashlib.sha256("".join(map(tensor_sha256, components)).encode()).hexdigest()
