"""Steps that turn a master into its deployed model. Their parameters are checked here without torch."""

import importlib.util
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from hpc_compress.config import ConfigError
from hpc_compress.context import Context
from hpc_compress.deployment.schemes import EMBEDDINGS, LOW_BIT, OF_MODELS, PLAIN, SCHEMES, Plain, Program
from hpc_compress.types import Record

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    AnyScheme = str
    PlainScheme = str
    LayerScheme = str
    EmbeddingScheme = str
else:  # pydantic reads the names from the table
    AnyScheme = Literal[OF_MODELS]
    PlainScheme = Literal[PLAIN]
    LayerScheme = Literal[(*LOW_BIT, "rest")]
    EmbeddingScheme = Literal[("rest", *EMBEDDINGS)]


class Quantize(Record):
    """Deploy in a lower precision. int8, nf4 and fp4 hold the encoder's linears in bitsandbytes layers, which save memory and
    no time; a linear of a width that its scheme can't take stays in the rest's precision. dynamic_int8 and onnx_int8 are the
    fast ones on CPUs, and run nowhere else. onnx_int8 makes a program for ONNX Runtime, with the word embedding in int8 too,
    unless `embeddings` says otherwise, and the rest in fp32: no step can follow it."""

    scheme: AnyScheme = Field(description="of the encoder's linears; fp16 and bf16: of the whole model")
    rest: PlainScheme = Field(
        default="fp32", description="of all that is in no scheme of 8 or 4 bits: head, norms, other embeddings"
    )
    layers: dict[LayerScheme, tuple[Annotated[int, Field(ge=0)], ...]] = Field(
        default={}, description="encoder layers, counted from 0, that have another scheme, such as {nf4: [0, 1], rest: [5]}"
    )
    embeddings: EmbeddingScheme = Field(
        default="rest", description="of the word embedding; rest: the precision of the rest of the model, with onnx_int8 int8"
    )
    method: Literal["round", "gptq"] = Field(
        default="round", description="round to nearest, or let the weights still to be rounded make up for each error"
    )
    sentences: int = Field(default=256, ge=1, description="training sentences that gptq sees")

    @model_validator(mode="after")
    def _consistent(self) -> "Quantize":
        weights = SCHEMES[self.scheme].weights
        plain = isinstance(weights, Plain)
        if isinstance(weights, Program) and (self.rest, self.layers, self.method) != ("fp32", {}, "round"):
            raise ValueError(f"scheme={self.scheme} is one for the whole model; leave rest, layers and method out")
        if plain and self.rest != "fp32":
            raise ValueError(f"rest={self.rest} has no effect with scheme={self.scheme}; leave it out")
        named = [index for indices in self.layers.values() for index in indices]
        if len(set(named)) < len(named):
            raise ValueError(f"layers={self.layers} names a layer twice; name it once")
        for name in sorted(self._few):
            rests = SCHEMES[name].rests
            if (self.scheme if plain else self.rest) not in rests:
                raise ValueError(
                    f"{name} reads {' or '.join(rests)} only, not scheme={self.scheme} with rest={self.rest}; leave rest out"
                )
        if self.scheme == "fp32" and not self._few and self.embeddings == "rest":
            raise ValueError("scheme=fp32 alone changes nothing; set layers or embeddings too, or choose another scheme")
        if self.method == "gptq" and not self._few:
            raise ValueError(f"method=gptq has no effect with scheme={self.scheme}; leave it out")
        return self

    @property
    def _few(self) -> set[str]:
        """Schemes of 8 and 4 bits that linears are to have."""
        named: set[str] = {self.scheme, *(name for name, indices in self.layers.items() if indices)}
        return named - {"rest", *PLAIN}

    def check(self, device: str, depth: int, inputs: tuple[int, ...]) -> None:
        """As in `Particular`: neither every device nor every width takes every scheme."""
        for name in sorted(self._few):
            scheme = SCHEMES[name]
            if len(scheme.devices) == 1 and device != scheme.devices[0]:
                raise ConfigError(
                    f"{name} runs on {scheme.devices[0]} only, and protocol.device={device}; set "
                    f"protocol.device={scheme.devices[0]}, or choose another scheme"
                )
            if missing := [package for package in scheme.packages if importlib.util.find_spec(package) is None]:
                raise ConfigError(
                    f"{name} needs {' and '.join(missing)}; pip install 'hpc-compress[{scheme.extra}]', "
                    "or choose another scheme"
                )
            if odd := [width for width in inputs if width % scheme.multiple]:
                raise ConfigError(
                    f"{name} takes linears with multiples of {scheme.multiple} inputs, and the base model has some with "
                    f"{odd[0]}; choose another scheme"
                )
        if beyond := [index for indices in self.layers.values() for index in indices if index >= depth]:
            raise ConfigError(f"layers={self.layers}: the base model has no layer {beyond[0]}; its last one is {depth - 1}")

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.deployment import quantization

        batches = None
        if self.method == "gptq":
            model.to(context.device)
            batches = context.batches(self.sentences)
        return quantization.quantize(model, self.scheme, self.rest, self.layers, self.embeddings, batches)


class Sparsify(Record):
    """Deploy with zeros in the encoder's linears. They are saved without the zeros, where that is smaller. Every training that
    follows leaves the zeros 0; it needs precision=fp32.

    Nothing is faster by it, with one exception: 2:4 in fp16 or bf16 on a GPU of compute capability 8.0 or more, where linears
    of (multiple of 32, multiple of 64) run on its sparse tensor cores. Everywhere else the loaded linears are dense.
    """

    pattern: Literal["unstructured", "2:4"] = Field(
        default="unstructured", description="2:4: two zeros in each four inputs; none where inputs are no multiple of 4"
    )
    share: float = Field(default=0.5, gt=0, lt=1, description="of the weights of each linear that become 0")
    criterion: Literal["magnitude", "obs"] = Field(
        default="obs", description="which weights go: the smallest, or those that Optimal Brain Surgeon can make up for"
    )
    permute: bool = Field(
        default=False, description="first put FFN neurons and the features of heads in an order in which 2:4 keeps more"
    )
    precision: PlainScheme = Field(default="fp32", description="of all that is left")
    sentences: int = Field(default=256, ge=1, description="training sentences that obs sees")

    @model_validator(mode="after")
    def _consistent(self) -> "Sparsify":
        if self.pattern == "2:4" and self.share != 0.5:
            raise ValueError(f"share={self.share} does not go with pattern=2:4, which is a half; leave share out")
        if self.pattern != "2:4" and self.permute:
            raise ValueError("permute=true changes nothing without pattern=2:4; leave it out, or set pattern=2:4")
        return self

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.deployment import quantization, sparsity

        model.to(context.device)
        sparsity.sparsify(
            model,
            self.pattern,
            self.share,
            context.batches(self.sentences) if self.criterion == "obs" else None,
            context.seed if self.permute else None,
        )
        quantization.cast(model.cpu(), self.precision)
        return model


class Threshold(Record):
    """Set small values of the activated gates in gated FFNs to 0 (CATS). What they would multiply need not be computed, but no
    linear here skips it: nothing is faster or smaller. May stand before a training, which then adapts the model to it."""

    share: float = Field(default=0.5, gt=0, lt=1, description="of each layer's gate values that become 0, over real tokens")
    sentences: int = Field(default=256, ge=1, description="training sentences from which the thresholds are read")

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.deployment import thresholding

        model.to(context.device)
        thresholding.threshold(model, self.share, context.batches(self.sentences))
        return model


NAME_IT = "name it in strategy.vocabularies or strategy.space.vocabularies"


class _OfCorpus(Record):
    """Parameters that say which tokens keep an embedding of their own."""

    corpus: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="train", description="train, or the full path of a text file, one text a line, or several: [train, FILE, ...]"
    )
    min_count: int = Field(default=1, ge=1, description="keep tokens that stand in the corpus so often at least")
    common: int = Field(
        default=0,
        ge=0,
        description="keep so many tokens with the lowest ids too: most tokenizers number their tokens by how common they are",
    )

    def counts(self, tokenizer: "PreTrainedTokenizerBase", context: Context) -> "np.ndarray":
        """(ids,) how often each token stands in the corpus; of the common ones at least `min_count`."""
        import numpy as np

        from hpc_compress.config import resource
        from hpc_compress.data import vocabulary

        counts = np.zeros(self.common, dtype=np.int64)
        for name in (self.corpus,) if isinstance(self.corpus, str) else self.corpus:
            of_train = name == "train"
            more = np.bincount(context.train.input_ids) if of_train else vocabulary.count(tokenizer, resource(name))
            counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
            counts[: len(more)] += more
        counts[: self.common] = np.maximum(counts[: self.common], self.min_count)
        return counts

    def bytes_besides(self, tokens: int, kept: int) -> int:
        """What is saved besides the kept rows of the word embedding, for a vocabulary of so many tokens."""
        return 0


class TrimVocabulary(_OfCorpus):
    """Deploy with the tokens of a corpus only: fewer rows of the word embedding, and a tokenizer of its own beside the weights.

    Texts of the corpus come out as before. Other words fall back to smaller pieces, which is what quality is measured with.
    """

    def kept(self, tokenizer: "PreTrainedTokenizerBase", context: Context) -> "np.ndarray":
        """(kept,) ids, rising."""
        from hpc_compress.data import vocabulary

        return vocabulary.used(tokenizer, self.counts(tokenizer, context), self.min_count)

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.data import vocabulary
        from hpc_compress.models import surgery

        if context.tokenizer is None or context.folder is None:
            raise ValueError(f"trim_vocabulary changes the tokenizer, so it can only deploy; {NAME_IT}")
        tokenizer = context.tokenizer()
        kept = self.kept(tokenizer, context)
        surgery.trim_vocabulary(model, kept.tolist())
        vocabulary.trim(tokenizer, kept).save_pretrained(context.folder)
        return model


class ShareEmbeddings(_OfCorpus):
    """Deploy with the embeddings of a corpus's tokens only: every other token has that of the kept one most like it.

    Every text keeps its tokens, and texts of the corpus come out as before. The tokenizer does not change.
    """

    def kept(self, tokenizer: "PreTrainedTokenizerBase", context: Context) -> "np.ndarray":
        """(kept,) ids, rising: of the corpus, and all special ones."""
        import numpy as np

        special = set(tokenizer.all_special_ids)
        of_corpus = set(np.flatnonzero(self.counts(tokenizer, context) >= self.min_count).tolist())
        ids = [index for index in tokenizer.get_vocab().values() if index in special or index in of_corpus]
        return np.array(sorted(set(ids)), dtype=np.int64)

    def bytes_besides(self, tokens: int, kept: int) -> int:
        """The row of each token."""
        from hpc_compress.models.modeling_hpc_compress import row_type

        return tokens * row_type(kept).itemsize

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        import torch

        from hpc_compress.deployment import sharing
        from hpc_compress.models import surgery

        if context.tokenizer is None or context.folder is None:
            raise ValueError(f"share_embeddings can only deploy; {NAME_IT}")
        if any(context.folder.glob("tokenizer*")):
            raise ValueError("the vocabulary is trimmed already; choose trim_vocabulary or share_embeddings, not both")
        tokenizer, on = context.tokenizer(), context.device
        kept, special = torch.from_numpy(self.kept(tokenizer, context)), torch.tensor(tokenizer.all_special_ids)
        surgery.share_embeddings(model, kept, lambda weight: sharing.nearest(weight.to(on), kept.to(on), special.to(on)))
        return model
