"""Training: fine-tuning, distillation, and the loop that they share."""
