"""The thought grid: which token stands in which slot, at which position, and what it is scored on.

Every text position owns ``C = 1 + r*T`` slots. Slot 0 holds the text token; rationale ``p`` owns the ``T`` slots from
``1 + p*T`` on: the start token, ``K`` sampled tokens, the end token, and the next ``m - 1`` text tokens. Laid out
position by position the grid is one sequence of ``N*C`` tokens, which any decoder can read in one pass. Where only some
positions are chosen, the others own their text token alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class ThoughtGrid:
    """``N`` text positions with ``r`` rationales of ``T = K + m + 1`` tokens at each, or at each of some.

    Attributes:
        positions: N.
        rationales: r.
        thought_tokens: K.
        ahead_tokens: m.
        chosen: the text positions that have rationales, ``[B, n]`` int64, ascending in each row; None where all have.
            Everywhere else n is then N.
    """

    positions: int
    rationales: int
    thought_tokens: int
    ahead_tokens: int
    chosen: Tensor | None = field(default=None, compare=False)

    @property
    def rationale_length(self) -> int:
        """T: start, K sampled tokens, end, m - 1 text tokens."""
        return self.thought_tokens + self.ahead_tokens + 1

    @property
    def slots(self) -> int:
        """C: the slots at one position."""
        return 1 + self.rationales * self.rationale_length

    @property
    def thought_positions(self) -> int:
        """n: the positions in a row that have rationales."""
        return self.positions if self.chosen is None else self.chosen.shape[1]

    def row_tokens(self, thought_positions: int | None = None) -> int:
        """Tokens of text and thoughts in a row where at most so many of its positions have rationales, or all."""
        n = self.positions if thought_positions is None else min(thought_positions, self.positions)
        return self.positions + n * (self.slots - 1)

    def position_ids(self, text_positions: Tensor) -> Tensor:
        """Position ids of the grid, ``[B, N*C]``: ``i`` for a text token, ``i + 1 + t`` for token ``t`` of a rationale.

        ``text_positions`` ``[B, N]`` int64 holds each text token's position in its document.
        """
        return self._packed(text_positions, self.rationale_position_ids(text_positions))

    def rationale_position_ids(self, text_positions: Tensor) -> Tensor:
        """Those of the rationales alone, ``[B, n, r*T]``."""
        offsets = torch.arange(1, 1 + self.rationale_length, device=text_positions.device).repeat(self.rationales)
        return self.at_chosen(text_positions)[..., None] + offsets

    def tokens(self, text: Tensor, thoughts: Tensor, start: int, end: int) -> Tensor:
        """Token ids of the grid, ``[B, N*C]`` int64; the arguments are those of :meth:`rationale_tokens`."""
        return self._packed(text, self.rationale_tokens(text, thoughts, start, end))

    def rationale_tokens(self, text: Tensor, thoughts: Tensor, start: int, end: int) -> Tensor:
        """Token ids of the rationales, ``[B, n, r*T]`` int64.

        ``text`` is ``[B, N]``, ``thoughts`` the sampled tokens ``[B, n, r, K]``, ``start`` and ``end`` the ids that
        open and close a thought. Teacher-forced tokens past the end of the text repeat its last one: nothing that
        counts is predicted from them.
        """
        following = self.ahead(text)[..., 1:]
        rationale = torch.cat(
            [
                torch.full_like(thoughts[..., :1], start),
                thoughts,
                torch.full_like(thoughts[..., :1], end),
                repeat(following, "b n k -> b n r k", r=self.rationales),
            ],
            dim=-1,
        )
        return rationale.flatten(2)

    def _packed(self, text: Tensor, rationales: Tensor) -> Tensor:
        """``[B, N*C]`` of what stands in the slots of the text, ``[B, N]``, and of the rationales, ``[B, N, r*T]``."""
        return rearrange(torch.cat([text[..., None], rationales], dim=-1), "b n c -> b (n c)")

    def at_chosen(self, values: Tensor) -> Tensor:
        """Of values ``[B, N]`` those at the positions that have rationales, ``[B, n]``."""
        return values if self.chosen is None else values.gather(1, self.chosen)

    def states_at_chosen(self, states: Tensor) -> Tensor:
        """The same of states ``[B, N, E]``, ``[B, n, E]``."""
        if self.chosen is None:
            return states
        return states.gather(1, self.chosen[..., None].expand(-1, -1, states.shape[-1]))

    def ahead_positions(self, device: torch.device) -> Tensor:
        """The text position ``i + k`` that talk step ``k`` stands at, ``[N, m]`` int64, held below ``N``.

        Of chosen positions, which differ from row to row, ``[B, n, m]``.
        """
        first = torch.arange(self.positions, device=device) if self.chosen is None else self.chosen
        ahead = first[..., None] + torch.arange(self.ahead_tokens, device=device)
        return ahead.clamp(max=max(self.positions - 1, 0))

    def ahead(self, values: Tensor) -> Tensor:
        """Of values ``[B, N]`` those at :meth:`ahead_positions`, ``[B, n, m]``."""
        index = self.ahead_positions(values.device)
        return values[:, index] if self.chosen is None else values.gather(1, index.flatten(1)).view_as(index)

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states ``[B, N*C, E]`` as views by role: text, policy, talk.

        Returns:
            text ``[B, N, E]``: predicts the next text token without a thought.
            policy ``[B, N, r, K, E]``: predicts each sampled token.
            talk ``[B, N, r, m, E]``: predicts text token ``i + k + 1`` after the thought.
        """
        grid = rearrange(hidden, "b (n c) e -> b n c e", c=self.slots)
        return grid[:, :, 0], *self.split_rationales(grid[:, :, 1:])

    def split_rationales(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the rationales ``[B, n, r*T, E]`` as ``policy`` and ``talk`` of :meth:`split`."""
        rationales = rearrange(hidden, "b n (r t) e -> b n r t e", r=self.rationales)
        return rationales[:, :, :, : self.thought_tokens], rationales[:, :, :, self.thought_tokens + 1 :]


@dataclass(frozen=True)
class Counts:
    """What the means of a loss are taken over; of several batches, the sums.

    Attributes:
        text: tokens that are predicted without a thought, ``[]``.
        ahead: tokens that are predicted after a thought, for each talk step, ``[m]``.
        whole: positions all of whose ``m`` tokens ahead are predicted, ``[]``.
    """

    text: Tensor
    ahead: Tensor
    whole: Tensor

    def stacked(self) -> Tensor:
        """All in one tensor, ``[m + 2]``, to be added to those of other batches."""
        return torch.cat([self.text[None], self.ahead, self.whole[None]])

    @classmethod
    def from_stacked(cls, values: Tensor) -> Counts:
        """The counts that :meth:`stacked` gave."""
        return cls(values[0], values[1:-1], values[-1])


@dataclass(frozen=True)
class Text:
    """A batch of text as the grid needs it.

    Attributes:
        tokens: ``[B, N]`` int64.
        positions: position of each token in its document, ``[B, N]`` int64.
        start: the first text position each token may see, ``[B, N]`` int64; None where that is 0 for all.
        targets: what each position must predict, ``[B, N]`` int64, ``IGNORED`` where nothing.
    """

    tokens: Tensor
    positions: Tensor
    start: Tensor | None
    targets: Tensor

    @classmethod
    def from_inputs(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Text:
        """Read a batch as transformers' collators make it.

        Args:
            input_ids: ``[B, N]`` int64.
            attention_mask: ``[B, N]``, 1 for text and 0 for padding, which may stand left or right of it.
            labels: ``[B, N]`` int64, ``-100`` where a token is not to be learned; ``input_ids`` by default.
            position_ids: ``[B, N]`` int64, starting again at 0 with each document of a packed row.

        Raises:
            ValueError: a shape differs from that of ``input_ids``; the mask has a hole; ``position_ids`` reach into the
                padding on its left.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}, but it must be [B, N]")
        for name, value in (("attention_mask", attention_mask), ("labels", labels), ("position_ids", position_ids)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}, but it must be {list(input_ids.shape)} like input_ids"
                )
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        blocks = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, :1].sum(1)
        first = valid.long().argmax(dim=1, keepdim=True) if valid.shape[1] else valid.new_zeros(len(valid), 1).long()
        positions = (index - first).clamp(min=0) if position_ids is None else position_ids
        start = torch.where(valid, index - positions, first)
        # One question for all of it: the host waits for the device once.
        has_hole, reaches_back, starts_later = torch.stack(
            [(blocks > 1).any(), (start < first).any(), (start > 0).any()]
        ).tolist()
        if has_hole:
            row = int((blocks > 1).nonzero()[0])
            raise ValueError(
                f"attention_mask has a hole in row {row}, but padding must stand left or right of the text"
            )
        if reaches_back:
            raise ValueError("position_ids reach back into the padding on the left of attention_mask")
        targets = torch.full_like(input_ids, IGNORED)
        follows = valid[:, :-1] & valid[:, 1:] & (positions[:, 1:] == positions[:, :-1] + 1)
        source = input_ids if labels is None else labels
        targets[:, :-1] = torch.where(follows, source[:, 1:], IGNORED)
        return cls(input_ids, positions, start if starts_later else None, targets)

    def talk_targets(self, grid: ThoughtGrid) -> Tensor:
        """What talk step ``k`` at position ``i`` must predict, ``x_{i+k+1}`` or ``IGNORED``, ``[B, n, m]`` int64.

        Ignored are targets past the end of the text or of the document, padding, and labels of -100.
        """
        steps = torch.arange(grid.ahead_tokens, device=self.tokens.device)
        same_document = grid.ahead(self.positions) == grid.at_chosen(self.positions)[..., None] + steps
        return torch.where(same_document, grid.ahead(self.targets), IGNORED)

    def counts(self, grid: ThoughtGrid) -> Counts:
        """What the means over this batch are taken over."""
        counted = self.talk_targets(grid) != IGNORED
        return Counts((self.targets != IGNORED).sum(), counted.sum((0, 1)), counted.all(-1).sum())
