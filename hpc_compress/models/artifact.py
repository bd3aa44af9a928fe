"""Artifacts: saving and loading models of any shape and precision as safetensors and JSON. Knows no search."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hpc_compress.models import modeling_hpc_compress as modeling
from hpc_compress.models import packing, surgery

WEIGHTS = "model.safetensors"


def load_base(folder: Path, labels: tuple[str, ...], problem: str, new_head: bool, seed: int) -> PreTrainedModel:
    """The base checkpoint as a stock classifier (regression: one output).

    A new head is drawn from `seed`, whatever the caller's generator state.
    """
    config = AutoConfig.from_pretrained(folder)
    modeling.family_of(config.model_type)
    config.num_labels = len(labels) or 1
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "regression" if problem == "regression" else "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=new_head
        )
    if report["missing_keys"] and not new_head:
        raise ValueError(f"{folder} lacks {sorted(report['missing_keys'])[:4]}; set model.head=new to train a new head")
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and config. Everything that `load` needs is in the folder.

    Raises: ValueError for a layer that the format can't hold.
    """
    family = surgery.family(model)
    stock = model.config.to_dict()
    config = modeling.HpcCompressConfig(
        stock=stock,
        layers=modeling.origins(model, family),
        heads=surgery.head_counts(model),
        ffn=surgery.ffn_widths(model),
        hidden=surgery.hidden_size(model),
        quantized=_quantized(model),
        thresholds=modeling.thresholds(model, family),
        architectures=["HpcCompressForSequenceClassification"],
        num_labels=model.config.num_labels,
        id2label=model.config.id2label,
        label2id=model.config.label2id,
        problem_type=model.config.problem_type,
        auto_map={
            "AutoConfig": "modeling_hpc_compress.HpcCompressConfig",
            "AutoModelForSequenceClassification": "modeling_hpc_compress.HpcCompressForSequenceClassification",
        },
    )
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    sparse = [f"model.{name}" for name, scheme in config.quantized.items() if scheme in modeling.SPARSE]
    tensors = packing.packed(tensors, sparse)
    config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _quantized(model: PreTrainedModel) -> dict[str, str]:
    schemes = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear8bitLt":
            schemes[name] = "int8"
        elif kind == "Linear4bit":
            schemes[name] = module.weight.quant_type
        elif kind == "DynamicInt8Linear":
            schemes[name] = "dynamic_int8"
        elif kind == "QuantizedEmbedding":
            schemes[name] = module.scheme
        elif kind == "Linear" and (scheme := packing.sparse_scheme(module)):
            schemes[name] = scheme
    return schemes


def load(folder: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The saved model on a device, in eval mode: a stock class with layers of its own shape and precision."""
    return modeling.HpcCompressForSequenceClassification.from_pretrained(folder, device_map=device).model
