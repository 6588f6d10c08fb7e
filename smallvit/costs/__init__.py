"""What models cost: operations, memory, time."""
