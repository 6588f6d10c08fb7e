"""Published experiments done again: their rows, their records, and the tables made of these."""
