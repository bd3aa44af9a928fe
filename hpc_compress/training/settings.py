"""How a model is trained, as parameters that are checked without torch."""

from pydantic import Field

from hpc_compress.types import Record


class Training(Record):
    """How a model is trained: AdamW, linear warm-up, then linear decay to 0."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the examples; 0.5 stops in the middle of the first")
    learning_rate: float = Field(default=5e-5, gt=0, description="at the end of the warm-up")
    batch_size: int = Field(default=32, ge=1, description="examples in one update")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the updates in which the learning rate rises")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled, on matrices only: not on biases and norms")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients with a larger 2-norm are scaled down to it")
