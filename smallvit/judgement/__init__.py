"""How good a trained model is: its answers, their figures, what chance does to these, and the files."""
