"""Rows of the word embedding that several tokens share. Knows one matrix; nothing of tokenizers and of how it is saved."""

import torch
import torch.nn.functional as F

CHUNK = 2048  # tokens that are compared with the kept ones at once


@torch.no_grad()
def nearest(weight: torch.Tensor, kept: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """For each token the position in `kept` of the token that stands for it: itself, or the one whose embedding points most
    nearly into the same direction, as seen from the mean embedding.

    The mean is taken away because all embeddings have much in common, which says nothing of their words (Mu & Viswanath 2018,
    All-but-the-Top, arXiv 1702.01417, section 2).

    weight: (tokens, features). kept: (n,) ids, rising. exact: ids in `kept` that stand for themselves only, such as [PAD].

    Returns: (tokens,) int64.

    Raises: ValueError when no kept token may stand for another.
    """
    able = torch.isin(kept, exact, invert=True).nonzero().flatten()
    if not len(able):
        raise ValueError("no token of the corpus can stand for others; give a corpus with more than special tokens")
    weight = weight.float()
    directions = F.normalize(weight - weight.mean(0), dim=1)
    found = torch.cat([able[(chunk @ directions[kept[able]].T).argmax(1)] for chunk in directions.split(CHUNK)])
    found[kept] = torch.arange(len(kept), device=found.device)
    return found
