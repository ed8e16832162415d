"""The one exception for what a user can mend: its message is a single line that names the cause and the mend."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something in the user's hands is wrong: a file, a key, a missing package. Entry points print it and exit 2."""


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Call `main()` and leave the process: its status, or 2 with one line on stderr after a `UserError`."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
