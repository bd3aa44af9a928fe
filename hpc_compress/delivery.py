"""What an export does with a model besides copying it: writes it as a program for ONNX Runtime, and proves what was written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from hpc_compress.config import ConfigError
from hpc_compress.deployment import onnx_int8
from hpc_compress.models import artifact
from hpc_compress.models import modeling_hpc_compress as modeling
from hpc_compress.problems import Problem
from hpc_compress.types import SearchError

SAME = 1e-4  # most that answers may differ by, over the largest of them: a program adds in another order
TEXTS = ["a text", "a second and longer text, with numbers such as 42"]


def answers(folder: Path) -> list[torch.Tensor]:
    """What the model of an export says to two texts of random tokens, of which one is padded."""
    return _answers(artifact.load(folder))


def as_program(folder: Path) -> list[torch.Tensor]:
    """Turn an export into one of a program: model.onnx takes the place of its weights, and config.json says so.

    Returns: as `answers`, in fp32, as a program computes.
    Raises: ConfigError for a model in a precision that no program can have.
    """
    model = artifact.load(folder)
    if artifact.is_program(model):
        return _answers(model)
    schemes = sorted({scheme for module in model.modules() if (scheme := modeling.scheme_of(module))})
    if schemes:
        raise ConfigError(
            f"this model is in {', '.join(schemes)}, which can not be exported to ONNX; export a candidate in fp32, bf16, fp16 "
            "or onnx_int8 (column `deploy` of candidates.csv), or leave --to=onnx out"
        )
    said = _answers(model.float())
    try:
        onnx_int8.program(model).save_pretrained(folder)
    except ImportError as error:
        raise ConfigError(f"--to=onnx needs the extra onnx ({error}); pip install 'hpc-compress[onnx]'") from error
    (folder / artifact.WEIGHTS).unlink()
    return said


def check(folder: Path, problem: Problem, wanted: Sequence[torch.Tensor]) -> None:
    """Load an export as its users do, and compare its answers with what the model said before.

    Raises: SearchError when they differ.
    """
    auto_class: Any = getattr(transformers, problem.auto_class)
    got = _answers(auto_class.from_pretrained(folder, trust_remote_code=True))
    scale = max(1.0, *(float(one.abs().max()) for one in wanted))
    apart = max(float((one.float() - other.float()).abs().max()) for one, other in zip(wanted, got, strict=True)) / scale
    if not apart <= SAME:
        raise SearchError(f"the exported model's answers differ by {apart:.2g} from those before; nothing was written")


@torch.inference_mode()
def check_sentences(folder: Path) -> None:
    """Load an export by sentence-transformers, and compare its embeddings of texts with those of the model itself.

    Raises: ConfigError where the library is not installed, SearchError when the embeddings differ.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"--to=sentence-transformers loads what it wrote ({error}); pip install sentence-transformers"
        ) from error
    library = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    theirs = library.encode(TEXTS, convert_to_tensor=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=library.max_seq_length, return_tensors="pt")
    ours = artifact.load(folder)(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).sentence_embedding
    apart = float((F.normalize(theirs.float(), dim=-1) - F.normalize(ours.float(), dim=-1)).abs().max())
    if not apart <= SAME:
        raise SearchError(f"sentence-transformers gives embeddings that differ by {apart:.2g}; nothing was written")


@torch.inference_mode()
def _answers(model: PreTrainedModel) -> list[torch.Tensor]:
    config = model.config
    stock = config.stock if isinstance(config.to_dict().get("stock"), dict) else config.to_dict()
    ids = 5 + torch.arange(16).view(2, 8) % (int(stock["vocab_size"]) - 5)
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    answer = model.eval()(input_ids=ids, attention_mask=mask)
    # A program has no pooler's output beside the embedding.
    return [value for name, value in answer.items() if name != "pooler_output" and isinstance(value, torch.Tensor)]
