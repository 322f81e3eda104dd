"""What the programs share: data, the base model, tasks for lm-eval, training, scores, the folder of a run."""
