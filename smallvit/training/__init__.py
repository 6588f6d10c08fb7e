"""Train models: the loop, setup, losses, optimizers, teachers, checkpoints and resume."""
