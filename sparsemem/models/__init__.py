"""Models: a cell looped over time, and an output layer."""
