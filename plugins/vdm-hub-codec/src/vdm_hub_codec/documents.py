"""Several texts, which are one sequence of tokens in a file, and where each of them ends.

The token that ends a document is coded like any other, so that the model says where that is likely. Where the
tokenizer has none, or a text has that token itself, the description in front holds the number of tokens of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_hub import DataError, TokenWindows
from vdm_hub_codec.decisions import Integers


def checked(windows: TokenWindows) -> TokenWindows:
    """The windows of whole texts, as they are measured.

    Raises:
        DataError: They are a part of the text, or follow a context, or the tokens do not say all of it.
    """
    if not windows.facts.whole:
        raise DataError(
            f"the tokens do not say all of the text ({'; '.join(windows.facts.notes)}), so it could not come back: "
            f"give a text that the tokenizer knows, or a model of bytes."
        )
    if windows.most is not None or windows.known:
        part = f"the first {windows.most} windows" if windows.known == 0 else "what follows a context"
        raise DataError(f"the windows are {part} of a text, and a file keeps whole ones: give all of them.")
    return replace(windows, shifted=False)


def lengths_of(windows: TokenWindows) -> Integers | None:
    """How many tokens each document has, for the checksum; nothing, where there is one that no token ends."""
    lengths = [len(one) for one in windows.documents]
    return np.array(lengths) if windows.ended or len(lengths) > 1 else None


def description_of(windows: TokenWindows) -> dict[str, Any]:
    """What a file says of its documents; nothing, where there is one that no token ends."""
    if (found := lengths_of(windows)) is None:
        return {}
    lengths: list[int] = found.tolist()
    end = windows.tokenization.end
    ends = windows.tokens.eq(end) if windows.ended and end is not None else torch.zeros(0, dtype=torch.bool)
    told = {"ended": True} if windows.ended else {}
    return told if int(ends.sum()) == len(lengths) else told | {"documents": lengths}


def are_several(how: Mapping[str, Any]) -> bool:
    """Whether a file may keep more than one document, by what `description_of` said."""
    return "ended" in how or len(how.get("documents", ())) > 1


def apart(tokens: Tensor, how: Mapping[str, Any], end: int | None) -> list[Tensor]:
    """The tokens of each document.

    Args:
        tokens: Of all, (N,).
        how: What `description_of` said.
        end: The value that ends a document.

    Raises:
        ValueError: They are not as many as is said.

    >>> [one.tolist() for one in apart(torch.tensor([5, 6, 9, 7, 9]), {"ended": True}, 9)]
    [[5, 6], [7]]
    >>> [one.tolist() for one in apart(torch.tensor([5, 6, 7]), {"documents": [1, 2]}, None)]
    [[5], [6, 7]]
    """
    ended = int(how.get("ended", False))
    lengths = how.get("documents")
    if lengths is None:
        if not ended:
            return [tokens]
        stops = torch.as_tensor(tokens == end).nonzero().flatten() + 1
        lengths = (stops.diff(prepend=stops.new_zeros(1)) - 1).tolist()
    if sum(lengths) + ended * len(lengths) != len(tokens) or min(lengths, default=-1) < 0:
        raise ValueError(f"{len(tokens)} tokens, of {len(lengths)} documents that have others")
    parts = tokens.split([length + ended for length in lengths])
    return [part[: len(part) - ended] for part in parts]
