"""RESULTS.md and its pictures from the records beside this file: python results/make.py"""

import sys
from pathlib import Path

from smallvit import InputError
from smallvit.reproduction.document import write

if __name__ == "__main__":
    folder = Path(__file__).parent
    try:
        write(folder, folder.parent / "RESULTS.md")
    except InputError as error:
        sys.exit(f"results/make.py: {error}")
