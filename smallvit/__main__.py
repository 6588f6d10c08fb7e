"""`python -m smallvit`, for torchrun and for machines without the console script on their path."""

from smallvit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
