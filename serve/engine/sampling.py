"""From a row of logits to a token: penalties, bias, truncation, draw.

Pure functions over one sequence's logits [V]; no state but what is passed in. A draw is the inverse
of the cumulative distribution at a number that depends on (seed, position) alone, so what else is
in the batch, streaming and restarts cannot change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch

from serve.engine.base import SamplingParams, TokenLogprob

SHORTLIST = 256  # a full sort of a large vocabulary costs more than the rest of sampling


def adjust(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt_ids: Collection[int],
    counts: Mapping[int, int],
    banned: Collection[int],
) -> torch.Tensor:
    """Return the logits after penalties and bias, with `banned` tokens impossible.

    Args:
        prompt_ids: Tokens of the prompt, which only the repetition penalty sees.
        counts: How often each token was generated so far.
    """
    if not adjusts(params) and not banned:
        return logits
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = _index({*prompt_ids, *counts}, logits)
        picked = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(picked > 0, picked / factor, picked * factor)
    if counts and (params.presence_penalty or params.frequency_penalty):
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        penalty = times * params.frequency_penalty + params.presence_penalty
        logits[_index(counts, logits)] -= penalty
    if params.logit_bias:
        bias = list(params.logit_bias.values())
        logits[_index(params.logit_bias, logits)] += torch.tensor(
            bias, dtype=logits.dtype, device=logits.device
        )
    if banned:
        logits[_index(banned, logits)] = float("-inf")
    return logits


def adjusts(params: SamplingParams) -> bool:
    """Tell whether any penalty or bias is set."""
    neutral = params.repetition_penalty == 1.0 and not params.logit_bias
    return not neutral or bool(params.presence_penalty or params.frequency_penalty)


def choose(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """Return a token id: the most likely one at temperature 0, else a draw."""
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / params.temperature, dim=-1)
    ids, kept = truncate(probabilities, params.top_k, params.top_p, params.min_p)
    cumulative = kept.double().cumsum(0)
    target = uniform(seed, position) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, target, right=True))
    place = min(place, len(kept) - 1)
    while place and kept[place] == 0:  # rounding at the very end of the distribution
        place -= 1
    return place if ids is None else int(ids[place])


def truncate(
    probabilities: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the kept token ids (None: all, in order) and their probabilities, not renormalised.

    Top-p keeps the smallest set of most likely tokens that reaches `top_p` of what top-k left
    (Holtzman et al. 2020, arXiv 1904.09751); min-p keeps tokens of at least `min_p` times the
    largest probability (Nguyen et al. 2024, arXiv 2407.01082).
    """
    size = len(probabilities)
    limit = min(top_k, size) if top_k else size
    if limit == size and top_p >= 1 and min_p == 0:
        return None, probabilities
    count = limit if top_k else min(SHORTLIST, size)
    values, ids = probabilities.topk(count)
    if not top_k and count < size and not _decides(values, top_p, min_p):
        values, ids = probabilities.sort(descending=True)
    if top_p < 1:
        total = values.double().sum() if top_k else 1.0
        before = values.double().cumsum(0) - values.double()
        values = values[: max(1, int((before < top_p * total).sum()))]
    if min_p > 0:
        values = values[: int((values >= min_p * values[0]).sum())]
    return ids[: len(values)], values


def _decides(shortlist: torch.Tensor, top_p: float, min_p: float) -> bool:
    """Tell whether everything that top-p or min-p keeps is on the list of most likely tokens."""
    enough = top_p < 1 and float(shortlist.double().sum()) >= top_p
    return enough or (min_p > 0 and bool(shortlist[-1] < min_p * shortlist[0]))


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that (seed, position) determines."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def logprobs_of(
    logits_KV: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprob]:
    """Return the log-probability of one token a row, and of the most likely ones."""
    rows = torch.log_softmax(logits_KV.float(), dim=-1)
    chosen = rows.gather(1, torch.tensor(token_ids, device=rows.device)[:, None]).flatten().tolist()
    if not num_top:
        return [TokenLogprob(*pair, ()) for pair in zip(token_ids, chosen, strict=True)]
    values, ids = rows.topk(min(num_top, rows.shape[1]))
    tops = [
        tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [TokenLogprob(*row) for row in zip(token_ids, chosen, tops, strict=True)]


def _index(ids: Collection[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=like.device)
