"""The terms of the loss, a file each: the equation, its settings, and its gradient in the fused walk."""

import importlib

from ba_lora.config.schema import EXTRA_TERMS, PUBLISHED_TERMS
from ba_lora.errors import UserError
from ba_lora.objective.terms.base import Term


def term_class(name: str) -> type[Term]:
    """Return the term of the file called `name` in this folder. Raises UserError where it calls itself otherwise."""
    module = importlib.import_module(f"{__name__}.{name}")
    if module.TERM.name != name:
        raise UserError(
            f"{module.__file__}: name = {module.TERM.name!r}: the file must be called {module.TERM.name}.py"
        )
    return module.TERM


def term_names() -> tuple[str, ...]:
    """Return every term that has a weight λ: the published ones, then each further file's."""
    return (*PUBLISHED_TERMS, *EXTRA_TERMS)
