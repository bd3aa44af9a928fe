"""Fine-tuning, distillation, and the training loop that all operators share."""
