"""A vector for each text, by which texts are compared: sentence embeddings."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hpc_compress import door
from hpc_compress.config import ConfigError, DatasetConfig, ModelConfig
from hpc_compress.data import lines, overlap, suites
from hpc_compress.problems.base import Problem
from hpc_compress.types import Dataset, Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from hpc_compress.data.batches import Batch, Encoded

POOLING, NORMALIZE = "sentence_pooling", "sentence_normalize"  # in config.json
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}  # of sentence-transformers, and ours
PAIRS = "pairs"  # the one task where there is no suite
EXAMPLE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer({path!r}, trust_remote_code=True)
embeddings = model.encode(["a text", "a second text"])"""


@dataclass(frozen=True)
class Losses:
    """Weights of the losses."""

    closeness: float = 1.0  # L_task: 1 - cosine of the two texts of a pair
    contrastive: float = 1.0  # L_task: the texts of other pairs in the batch should be farther away
    temperature: float = 0.05  # divides the cosines of the contrastive loss
    cosine: float = 1.0  # L_pred: 1 - cosine with the teacher's embedding
    mse: float = 0.0  # L_pred: the mean squared difference from it


@dataclass(frozen=True)
class Embedding(Problem):
    """The model's outputs are (batch, dimensions) embeddings as they are pooled, before they are normalised. Training rows are
    texts, or pairs of texts that should be close; a target is the number of a text's pair. Quality is the mean score of a suite
    of tasks, or of the retrieval of pairs that are held out."""

    losses: Losses = Losses()

    metrics = (suites.MEAN,)
    auto_class = "AutoModel"
    model_class = "HpcCompressSentenceEncoder"
    program_class = "HpcCompressOnnxSentenceEncoder"
    head = ""
    pipeline_tag = "sentence-similarity"
    formats = (".txt",)
    settings = ("parallel", "suite", "losses")

    def of(self, dataset: Dataset) -> "Embedding":
        return Embedding(Losses(**dataset.losses))

    # --- rows ---

    def check(self, config: DatasetConfig) -> None:
        super().check(config)
        names = [field.name for field in dataclasses.fields(Losses)]
        if odd := [name for name in config.losses if name not in names]:
            raise ConfigError(f"dataset.losses.{odd[0]} is not a known loss; allowed here: {', '.join(names)}")
        if low := [name for name, value in config.losses.items() if value < 0 or (name == "temperature" and value == 0)]:
            raise ConfigError(f"dataset.losses.{low[0]}={config.losses[low[0]]} is too low; a weight is at least 0")
        losses = Losses(**config.losses)
        if losses.cosine == losses.mse == 0:
            raise ConfigError("dataset.losses: cosine and mse are both 0, so nothing says how near a student is; raise one")
        if config.parallel is not None and config.text2 is not None:
            raise ConfigError("dataset.parallel and dataset.text2 both give second texts; leave one of them out")
        if config.parallel is not None and config.validation is not None:
            raise ConfigError(
                "dataset.parallel holds the second texts of dataset.train, so dataset.validation would have none; leave it "
                "out: rows for the report are held out of train"
            )
        if config.suite is not None and config.max_search_rows is not None:
            raise ConfigError("dataset.max_search_rows would cut tasks out of dataset.suite; set `rows` of its tasks instead")
        if config.suite is None and not _pairs(config):
            raise ConfigError(
                "problem=embedding measures quality by a suite of tasks, or by pairs that are held out, and there is neither; "
                "set suite@dataset.suite=english with dataset.suite.folder, or dataset.text2 or dataset.parallel"
            )
        if config.suite is not None and config.validation is not None:
            raise ConfigError("dataset.validation has no effect beside dataset.suite, which has the report split; leave it out")

    def read(self, path: Path, config: DatasetConfig) -> pd.DataFrame | None:
        return lines.read(path, config) if path.suffix.lower() in self.formats or config.parallel is not None else None

    def columns(self, config: DatasetConfig) -> dict[str, str]:
        wanted = {"text": config.text, "text2": "text2" if config.parallel is not None else config.text2}
        return {name: column for name, column in wanted.items() if column is not None}

    def clean(self, table: pd.DataFrame, config: DatasetConfig, split: str) -> pd.DataFrame:
        for name, column in self.columns(config).items():
            if (odd := table[name].map(lambda value: not isinstance(value, str) and pd.notna(value))).any():
                kind = type(table[name][odd].iloc[0]).__name__
                raise ConfigError(f"column {column!r} of {config.name} holds values of kind {kind}; give plain texts")
            table = table.assign(**{name: table[name].astype(object).where(table[name].notna(), "").str.strip()})
        if "text2" in table:
            single = (table["text"] == "") != (table["text2"] == "")
            if single.any():
                raise ConfigError(
                    f"{int(single.sum())} of {len(table)} rows of split {split!r} of {config.name} have one text of a pair "
                    f"only, the first of them row {int(np.argmax(single)) + 1}; delete them, or leave the second texts out"
                )
        table = table[table["text"] != ""]
        return table.assign(text2=table.get("text2", ""), label=np.arange(len(table)))

    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        return ()

    def targets(self, label: pd.Series, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.Series:
        return label

    def judged(
        self, train: pd.DataFrame, config: DatasetConfig, seed: int, read: Callable[[DatasetConfig], pd.DataFrame]
    ) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame] | None:
        """A suite's tasks. A row of train stays unless a text of a tested row stands in it."""
        if config.suite is None:
            return None
        search, report = suites.tables(config.suite, config.encoding, seed, read)
        tested = pd.concat([self.tested(table) for table in (search, report)])
        known = {overlap.normal(text) for text in suites.texts(tested)[0]}
        shares = [train[name].map(lambda text: overlap.normal(text) in known) for name in ("text", "text2")]
        stays = np.flatnonzero(~(shares[0] | shares[1]))
        if not len(stays):
            raise ConfigError(f"every row of {config.name} shares a text with the tasks of dataset.suite; leave such tasks out")
        return stays, search, report

    def tested(self, rows: pd.DataFrame) -> pd.DataFrame:
        return rows[rows["part"] == "test"] if "part" in rows else rows

    # --- scores ---

    def score(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> dict[str, float]:
        return suites.scores(_as_tasks(rows), self.answers(dataset, rows, outputs))

    def answers(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> np.ndarray:
        return suites.answers(_as_tasks(rows), *_places(rows)[1:], outputs)

    def standard_errors(self, dataset: Dataset, rows: pd.DataFrame, answers: np.ndarray) -> dict[str, float]:
        drawn = suites.resampled(_as_tasks(rows), answers)
        return {name: float(np.std(scores, ddof=1)) for name, scores in drawn.items()}

    def difference(self, dataset: Dataset, rows: pd.DataFrame, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        rows = _as_tasks(rows)
        name = dataset.metrics[0]
        found = [suites.scores(rows, answers)[name] for answers in (one, other)]
        drawn = [suites.resampled(rows, answers)[name] for answers in (one, other)]
        return found[0] - found[1], float(np.std(drawn[0] - drawn[1], ddof=1))

    def trivial(self, dataset: Dataset, rows: pd.DataFrame) -> dict[str, float]:
        """Of an encoder that gives every text the same vector."""
        return self.score(dataset, rows, np.ones((len(_places(rows)[0]), 1)))

    # --- tensors ---

    def encode(self, tokenizer: Any, rows: pd.DataFrame, dataset: Dataset) -> "Encoded":
        """Of pairs both texts in turn, with the number of the pair; of a suite's table each text once."""
        from hpc_compress.data.batches import encode

        texts, _, second = _places(rows)
        pairs = bool((second >= 0).all()) and "task" not in rows
        numbers = np.arange(len(texts)) // (2 if pairs else 1)
        encoded = encode(tokenizer, texts, None, numbers, dataset.max_length)
        return dataclasses.replace(encoded, paired=pairs)

    def width(self, model: "PreTrainedModel") -> int:
        return int(model.dimensions)

    def outputs(self, answer: Any, batch: "Batch") -> "torch.Tensor":
        return answer.sentence_embedding

    def task_loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The weighted sum of the closeness of pairs and of the contrastive loss with the other pairs of the batch (Henderson
        et al. 2017, https://arxiv.org/abs/1705.00652, section 4.4), both ways; 0 for a batch without pairs."""
        import torch
        import torch.nn.functional as F

        order = targets.argsort(stable=True)
        begins = (targets[order][1:] == targets[order][:-1]).nonzero().flatten()
        if not len(begins):
            return outputs.float().sum() * 0
        one, other = (F.normalize(outputs.float()[order[at]], dim=-1) for at in (begins, begins + 1))
        total = self.losses.closeness * (1 - (one * other).sum(-1)).mean()
        if self.losses.contrastive:
            logits = one @ other.T / self.losses.temperature
            own = torch.arange(len(logits), device=logits.device)
            total = total + self.losses.contrastive * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return total

    def response_loss(
        self, student: "torch.Tensor", teacher: "torch.Tensor", weight: float | None, temperature: float
    ) -> "torch.Tensor | None":
        """The weighted sum of 1 - cosine and of the mean squared difference; mean over the batch. Embeddings of different
        widths, which nothing projects, are compared by the cosines between the texts of the batch."""
        import torch.nn.functional as F

        if weight == 0:
            return None
        student, teacher = student.float(), teacher.float()
        if student.shape != teacher.shape:
            student, teacher = (F.normalize(each, dim=-1) @ F.normalize(each, dim=-1).T for each in (student, teacher))
        total = self.losses.cosine * (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
        if self.losses.mse:
            total = total + self.losses.mse * F.mse_loss(student, teacher)
        return (1.0 if weight is None else weight) * total

    def differentiated(self, outputs: "torch.Tensor") -> "torch.Tensor":
        """The cosines with the texts of the batch: an embedding is only ever compared with others."""
        import torch.nn.functional as F

        directions = F.normalize(outputs.float(), dim=-1)
        return directions @ directions.detach().T

    # --- models ---

    def head_width(self, labels: Sequence[str]) -> int:
        return 0

    def configure(self, config: "PreTrainedConfig", labels: Sequence[str]) -> None:
        pass

    def stock_class(self) -> Any:
        from hpc_compress.models.modeling_hpc_compress import SentenceEncoder

        return SentenceEncoder

    def described(self, folder: Path, config: ModelConfig) -> dict[str, Any]:
        """How tokens become an embedding, as the settings say, or else the folder's files of sentence-transformers."""
        pooling: str = config.pooling
        normalize = config.normalize
        if (folder / "modules.json").is_file() and (pooling == "auto" or normalize is None):
            kinds = _modules(folder)
            normalize = "Normalize" in kinds if normalize is None else normalize
            if pooling == "auto":
                if odd := [name for name in kinds if name not in ("Transformer", "Pooling", "Normalize")]:
                    raise ConfigError(
                        f"{folder / 'modules.json'} has a module {odd[0]}, which is not supported. If the encoder's own pooler "
                        "does the same, as in LaBSE, set model.pooling=pooler; else choose another encoder"
                    )
                pooling = _pooling(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else "mean"
        return {POOLING: "mean" if pooling == "auto" else pooling, NORMALIZE: bool(normalize)}

    def check_step(self, step: Step, dataset: Dataset) -> None:
        criterion = str(step.params.get("criterion", ""))
        trains = step.operator in ("fine_tune", "movement_prune")
        if not dataset.pair and (trains or criterion in ("taylor", "fisher")):
            raise ConfigError(
                f"{step.operator}{f' with criterion={criterion}' if criterion else ''} needs pairs of texts that should be "
                f"close, and {dataset.name} has single texts; set dataset.text2 or dataset.parallel, or use distill and the "
                "criterion gauss_newton: strategy=evolve, or strategy.fine_tune=null strategy.crossover_probability=1"
            )
        if trains and not self.losses.contrastive:
            raise ConfigError(
                f"{step.operator} with dataset.losses.contrastive=0 would give all texts one embedding; raise it, or use "
                "distill alone (strategy.fine_tune=null)"
            )

    def exported(self, config: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
        """The files of sentence-transformers."""
        stock = config.get("stock", {})
        pooling, normalize = stock.get(POOLING, "mean"), bool(stock.get(NORMALIZE))
        transformer: dict[str, Any] = {"max_seq_length": dataset.max_length}
        modules, files = ["Transformer"], {"sentence_bert_config.json": transformer}
        if pooling == "pooler":  # no module of theirs makes it: the answer of the encoder itself is taken
            text = {"method": "forward", "method_output_name": "sentence_embedding"}
            said = {"modality_config": {"text": text}, "module_output_name": "sentence_embedding"}
            transformer.update({"transformer_task": "feature-extraction", **said})
        else:
            modules.append("Pooling")
            modes = {name: ours == pooling for name, ours in MODES.items()}
            files["1_Pooling/config.json"] = {"word_embedding_dimension": config["hidden"], **modes}
        modules += ["Normalize"] if normalize else []
        listed = [
            {"idx": at, "name": str(at), "path": f"{at}_{name}" if at else "", "type": f"sentence_transformers.models.{name}"}
            for at, name in enumerate(modules)
        ]
        return {**files, "modules.json": listed}

    def example(self, path: str, dataset: Dataset) -> str:
        return EXAMPLE.format(path=path)


def _pairs(config: DatasetConfig) -> bool:
    return config.text2 is not None or config.parallel is not None


def _as_tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Pairs as the rows of one task."""
    return rows if "task" in rows else rows.assign(task=PAIRS, kind="retrieval", part="test")


def _places(rows: pd.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The texts that a table is encoded as, and for each row the positions of its two; -1 where there is no second one."""
    if "task" in rows or (rows["text2"] == "").any():
        return suites.texts(rows)
    first = 2 * np.arange(len(rows))
    return rows[["text", "text2"]].to_numpy().ravel().tolist(), first, first + 1


def _modules(folder: Path) -> dict[str, str]:
    """The folders of the modules of sentence-transformers by their kinds, in order."""
    path = folder / "modules.json"
    try:
        listed = json.loads(door.read_bytes(path))
        return {str(item["type"]).rpartition(".")[2]: str(item["path"]) for item in listed}
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{path} is no list of modules; fetch the model again, or set model.pooling and model.normalize"
        ) from None


def _pooling(path: Path) -> str:
    """Raises: ConfigError for a pooling that is not supported."""
    said = door.json_object(path)
    modes = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    mode = said.get("pooling_mode", [MODES.get(name, name) for name in modes] or ["mean"])
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in MODES.values():
        raise ConfigError(f"{path} pools by {', '.join(map(str, modes))}; supported are {', '.join(MODES.values())}")
    return str(modes[0])
