"""The nearest rows of a paged bank, as one operation that `torch.compile` can keep whole.

How many pages a search visits depends on what is stored; traced line by line, that breaks the graph.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from . import paged_bank
from .paged_bank import Bank

Found = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def nearest_rows(
    query: Tensor,
    bank: Bank,
    k: int,
    keys: str = "keys",
    values: str = "values",
    index: Literal["exact", "faiss"] = "exact",
) -> Found:
    """The k rows of a bank whose keys have the largest products with each query, best first.

    Args:
        query: (B, H, T, e). keys, values: fields with rows (Hkv, e) and (Hkv, e'); query head a searches key head
            a // (H / Hkv). index: as in `paged_bank.search`.

    Returns: keys (B, H, T, k, e), values (B, H, T, k, e'), slots (B, H, T, k) int64; where there are fewer rows, the
    last slots are -1 and their keys and values zeros. Nothing carries a gradient.
    """
    if torch.compiler.is_compiling():
        pages = paged_bank.view(bank, keys), paged_bank.view(bank, values)
        return _operation(query.detach(), bank["count"], *pages, k, index)
    _, slots = paged_bank.search(query, bank, k, keys, index=index)
    return paged_bank.take(bank, keys, slots), paged_bank.take(bank, values, slots), slots


@torch.library.custom_op("mnemic::nearest_rows", mutates_args=())
def _operation(
    query: Tensor, count: Tensor, keys: list[Tensor], values: list[Tensor], k: int, index: str
) -> tuple[Tensor, Tensor, Tensor]:
    bank = {"count": count}
    for name, pages in (("keys", keys), ("values", values)):
        bank.update({f"{name}/{i:04d}": page for i, page in enumerate(pages)})
    kind: Any = index
    return nearest_rows(query, bank, k, index=kind)


@_operation.register_fake
def _(query: Tensor, count: Tensor, keys: list[Tensor], values: list[Tensor], k: int, index: str) -> Found:
    shape = (*query.shape[:3], k)
    found = (keys[0].new_empty(*shape, keys[0].shape[-1]), values[0].new_empty(*shape, values[0].shape[-1]))
    return *found, count.new_empty(shape)
