"""RESULTS.md and its pictures from the records beside this file: python results/make.py"""

from pathlib import Path

from smallvit.reproduction.document import write

if __name__ == "__main__":
    folder = Path(__file__).parent
    write(folder, folder.parent / "RESULTS.md")
