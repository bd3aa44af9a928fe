"""Artifacts: saving and loading models of any shape and precision as safetensors or ONNX, and JSON. Knows no search.

Which kind of model one is (a sequence classifier, ...) is read from the stock model when it is saved, and from
`architectures` in its config.json when it is loaded. A kind is a class of `modeling_hpc_compress`, and has its place here.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hpc_compress.models import modeling_hpc_compress as modeling
from hpc_compress.models import surgery, zeros
from hpc_compress.types import Structure

STOCK: tuple[type[modeling.HpcCompressStockModel], ...] = (
    modeling.HpcCompressForSequenceClassification,
    modeling.HpcCompressForTokenClassification,
    modeling.HpcCompressSentenceEncoder,
)
PROGRAMS: tuple[type[modeling.HpcCompressOnnxModel], ...] = (
    modeling.HpcCompressOnnxForSequenceClassification,
    modeling.HpcCompressOnnxForTokenClassification,
    modeling.HpcCompressOnnxSentenceEncoder,
)
Kind = TypeVar("Kind", bound=type[modeling.HpcCompressStockModel] | type[modeling.HpcCompressOnnxModel])
WEIGHTS = modeling.WEIGHTS
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)


def load_base(
    folder: Path, stock: Any, configure: Callable[[PreTrainedConfig], None], new_head: bool, seed: int
) -> PreTrainedModel:
    """The base model as a stock model of transformers, with a task head. Layers that share weights get weights of their own.

    stock: the class, an Auto class or its own, that loads it. configure: writes into its config what the head is to be.

    A new head is drawn from `seed`, whatever the caller's generator state.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    modeling.family_of(config.model_type)
    config._attn_implementation = None  # transformers chooses; a config may name a kernel, which is code of the hub
    configure(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = stock.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=new_head,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if report["missing_keys"] and not new_head:
        raise ValueError(f"{folder} lacks {sorted(report['missing_keys'])[:4]}; set model.head=new to train a new head")
    return modeling.unshared(model).eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and config. Everything that `load` needs is in the folder.

    Raises: ValueError for a layer that the format can't hold; OSError where the disk is full, or fails.
    """
    if is_program(model):
        model.save_pretrained(folder)
        return
    config = describe(model, kind_of(model, STOCK), _quantized(model))
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    sparse = [f"model.{name}" for name, scheme in config.quantized.items() if scheme in modeling.SPARSE]
    tensors = zeros.without_zeros(tensors, sparse)
    config.save_pretrained(folder)
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        # It says in words what the system told it in numbers.
        said = [number for number in DISK_ERRORS if os.strerror(number) in str(error)]
        if not said:
            raise
        raise OSError(said[0], os.strerror(said[0]), str(folder / WEIGHTS)) from error


def kind_of(model: PreTrainedModel, kinds: Sequence[Kind]) -> Kind:
    """The one of `kinds` that a stock model is saved as.

    Raises: ValueError when there is none.
    """
    for kind in kinds:
        if isinstance(model, kind.stock_class or kind.auto_class._model_mapping.get(type(model.config), ())):
            return kind
    able = ", ".join(kind.auto_class.__name__ for kind in kinds)
    raise ValueError(f"a {type(model).__name__} can't be saved in this form; give a stock model of {able}")


def describe(
    model: PreTrainedModel, kind: Kind, quantized: dict[str, str], parameters: list[int] | None = None
) -> modeling.HpcCompressConfig:
    """The config of a stock model that is saved as a `kind`; the others are as in the config."""
    family, words = surgery.family(model), model.get_input_embeddings()
    return kind.config_class(
        stock=model.config.to_dict(),
        layers=modeling.origins(model, family),
        heads=surgery.head_counts(model),
        ffn=surgery.ffn_widths(model),
        hidden=surgery.hidden_size(model),
        quantized=quantized,
        thresholds=modeling.thresholds(model, family),
        parameters=parameters,
        shared=len(words.embedding.weight) if isinstance(words, modeling.SharedEmbedding) else None,
        architectures=[kind.__name__],
        num_labels=model.config.num_labels,
        id2label=model.config.id2label,
        label2id=model.config.label2id,
        problem_type=model.config.problem_type,
        auto_map={
            "AutoConfig": f"modeling_hpc_compress.{kind.config_class.__name__}",
            kind.auto_class.__name__: f"modeling_hpc_compress.{kind.__name__}",
        },
    )


def _quantized(model: PreTrainedModel) -> dict[str, str]:
    """The scheme of each linear and embedding that is not saved as it is, by its dotted path."""
    schemes = {name: modeling.scheme_of(module) or zeros.scheme(module) for name, module in model.named_modules()}
    return {name: scheme for name, scheme in schemes.items() if scheme}


def load(folder: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The saved model on a device, in eval mode: a stock class with layers of its own shape and precision, or a program.

    Raises: ValueError for a kind of model that is not known here.
    """
    config = modeling.HpcCompressConfig.from_pretrained(folder)
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (*STOCK, *PROGRAMS)}
    named = str(next(iter(config.architectures or ()), ""))
    if named not in kinds:
        raise ValueError(f"{folder}: config.json names the architecture {named!r}; this version loads {', '.join(kinds)}")
    model = kinds[named].from_pretrained(folder, config=config, device_map=device)
    return model if is_program(model) else model.model


def is_program(model: PreTrainedModel) -> bool:
    """Whether a model is past all further steps: it can be run, saved and loaded, and nothing else."""
    return isinstance(model, modeling.HpcCompressOnnxModel)


def weights(folder: Path) -> Path:
    """The file that holds a saved model, whatever its kind."""
    program = folder / modeling.PROGRAM
    return program if program.is_file() else folder / WEIGHTS


def structure(folder: Path, whole: PreTrainedModel) -> Structure:
    """What is left of the encoder in a saved model; of a program, in the model that it was made from. whole: the base model."""
    config = modeling.HpcCompressConfig.from_pretrained(folder)
    return Structure(
        heads=tuple(config.heads),
        ffn=tuple(config.ffn),
        layers=None if config.layers == list(range(len(surgery.layers(whole)))) else tuple(config.layers),
        hidden=None if config.hidden in (None, surgery.hidden_size(whole)) else config.hidden,
    )


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All, and those in the encoder's layers; of a program, those of the model that it was made from."""
    if is_program(model):
        every, encoder = model.config.parameters
        return every, encoder
    return surgery.all_parameters(model), surgery.encoder_parameters(model)
