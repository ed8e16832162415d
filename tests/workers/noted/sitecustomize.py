"""Notes which process puts which file in its place: with this folder in PYTHONPATH and NOTED=FILE, a line
"RANK FOLDER/NAME" for each file that a process with a RANK renames, which is how whole files are written."""

import os
import sys
from pathlib import Path

if "NOTED" in os.environ and "RANK" in os.environ:

    def note(event: str, arguments: tuple) -> None:
        if event == "os.rename":  # os.replace, too
            path = Path(os.fsdecode(arguments[1]))
            with open(os.environ["NOTED"], "a") as file:
                file.write(f"{os.environ['RANK']} {path.parent.name}/{path.name}\n")

    sys.addaudithook(note)
