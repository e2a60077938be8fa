"""Rows of tokens as one batch of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qstar.grid import IGNORED


@dataclass
class PadRight:
    """Collate rows of ``input_ids``, and ``position_ids`` or ``labels`` where they have them, padded on the right.

    Attributes:
        pad_token_id: what stands in the padding.
        length: tokens that every batch is padded to; those of its longest row by default, and where that is longer.
    """

    pad_token_id: int = 0
    length: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "position_ids": 0, "labels": IGNORED, "attention_mask": 0}
        length = max(self.length, *(len(row["input_ids"]) for row in rows))
        batch = {}
        for name in dict.fromkeys([*rows[0], "attention_mask"]):
            if name not in fills:
                raise ValueError(f"rows hold {name!r}, but they must hold {', '.join(map(repr, fills))} only")
            batch[name] = torch.full((len(rows), length), fills[name])
            for i, row in enumerate(rows):
                values = row.get(name, [1] * len(row["input_ids"]) if name == "attention_mask" else None)
                if values is None:
                    raise ValueError(f"row {i} of the batch lacks {name!r}, which others have")
                batch[name][i, : len(values)] = torch.as_tensor(values)
        return batch
