"""How a decode engine chooses tokens on a CPU: what the kernel of choosing_iflame.py computes, in numpy."""

from __future__ import annotations

import numpy as np
import torch

from .choosing_iflame import (
    COLUMNS,
    DIGITS,
    ENDED,
    EXPECTED,
    FACES,
    FIRST,
    HIGHEST,
    LOWEST,
    MIDDLE,
    SECOND,
    Choice,
    RowsBegin,
    Settings,
)
from .closing_iflame import NO_EDGE, edge_keys, expected_token, expected_vertices, follow_face
from .grammar_iflame import NO_FACE, row_interval

# B rows, V token ids, L coordinates of the grid


class HostChooser:
    """
    Chooses the tokens of all rows on a CPU. Random numbers are float64, as those of `SeededSampling`.

    Args:
        rows: B.
        numbers: tokens that a row may choose.
        vocabulary: V.
        face: tokens of a face.
        positions: (B,) of the tokens that went in, kept up.
    """

    def __init__(self, rows: int, numbers: int, vocabulary: int, face: int, positions: torch.Tensor):
        self.positions = positions
        self.uniforms = np.zeros((rows, numbers))
        self.state = np.zeros((rows, COLUMNS), dtype=np.int64)
        self.limits = np.zeros((rows, 2), dtype=np.int64)
        self.seen = np.zeros((rows, vocabulary), dtype=bool)
        self.edges = np.full((rows, 3 * (numbers // face)), NO_EDGE)
        self.counts = np.zeros(rows, dtype=np.int64)
        # The choices of a face by their place in it, and whether logits were no numbers.
        self.face = np.zeros((rows, face + 1), dtype=np.int64)
        self.forbidden = np.ones((rows, vocabulary), dtype=bool)
        self.rows, self.vocabulary = np.arange(rows), vocabulary

    def set(self, settings: Settings) -> None:
        self.settings = settings

    def begin(self, rows: torch.Tensor, begin: RowsBegin, chosen: int = 0) -> None:
        """`rows` (R,) begin, of which so many tokens have been chosen."""
        rows = rows.numpy()
        self.state[rows], self.limits[rows] = begin.state, begin.limits
        self.uniforms[rows, : begin.uniforms.shape[1]] = begin.uniforms
        self.seen[rows] = begin.seen
        self.edges[rows] = NO_EDGE
        self.edges[rows, : begin.edges.shape[1]] = begin.edges
        self.counts[rows] = chosen
        self.face[rows] = 0

    def choose(self, choice: Choice, logits: torch.Tensor, tokens: torch.Tensor, place: int, advance: bool) -> None:
        """The token at `place` of a face for each row, from `logits` (B, V) into `tokens` (B,); `advance`: after a
        step, whose position is then over."""
        scores = logits.numpy().astype(np.float64)
        if choice.guided:
            scores -= scores.max(axis=1, keepdims=True)
            scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
            scores = scores[1::2] + self.settings.guidance_scale * (scores[::2] - scores[1::2])
            scores = scores.repeat(2, axis=0)
        if choice.penalty:
            penalty = self.settings.repetition_penalty
            worse = np.where(scores < 0, scores * penalty, scores / penalty)
            scores = np.where(self.seen, worse, scores)
        best = scores.max(axis=1)
        if not (best < np.inf).all():
            wrong = ~(best < np.inf)
            self.face[wrong, -1] = 1
            scores[wrong] = best[wrong] = 0.0
        if choice.grammar:
            self._forbid(choice, scores, place)
            np.copyto(scores, -np.inf, where=self.forbidden)
            best = scores.max(axis=1)
        if best.min() == -np.inf:
            nothing = best == -np.inf
            if choice.grammar:  # of what may follow all is as likely
                scores[nothing] = np.where(self.forbidden[nothing], -np.inf, 0.0)
            else:
                self.face[nothing, -1] = 1
                scores[nothing] = 0.0
            best[nothing] = 0.0
        chosen = self._sampled(choice, scores, best) if choice.sample else scores.argmax(axis=1)
        if choice.end >= 0:
            chosen = np.where(self.state[:, ENDED] != 0, choice.end, chosen)
            self.state[:, ENDED] |= chosen == choice.end
        self.face[:, place] = chosen
        self.counts += 1
        if advance:
            self.positions.add_(1)
        if choice.penalty:
            self.seen[self.rows, chosen] = True
        if choice.grammar:
            self._follow(choice, chosen, place)
        tokens.numpy()[...] = chosen

    def _forbid(self, choice: Choice, scores: np.ndarray, place: int) -> None:
        """Which tokens must not follow, and lower `scores` (B, V) of what leaves an edge open: as `grammar_iflame`, in
        whole numbers row by row, of which there are few."""
        levels, digit = choice.coordinates, place % 3
        step, period, last = levels**digit, levels ** (digit + 1), levels**3 - 1
        self.forbidden[:, :levels] = False
        self.forbidden[:, levels:] = True
        rows = zip(self.forbidden, scores, self.state.tolist(), self.limits.tolist(), strict=True)
        for forbidden, of_row, state, (fewest, most) in rows:
            faces, digits = state[FACES], state[DIGITS] if digit else 0
            previous = state[LOWEST : HIGHEST + 1] if choice.ordered else NO_FACE
            needed = max(fewest - faces - 1, 0)
            interval = row_interval(previous, state[FIRST], state[SECOND], place // 3, last, needed)
            low, high, excluded = interval
            if digit == 2:
                # Each last digit makes one rank: those within the interval lie side by side.
                forbidden[: max(0, -((digits - low) // step))] = True
                forbidden[max(0, (high - digits) // step + 1) : levels] = True
                place_of, rest = divmod(excluded - digits, step)
                if rest == 0 and 0 <= place_of < levels:
                    forbidden[place_of] = True
            elif high - low < 2 * period:  # else every digit is that of some rank in the interval
                candidate = low + (digits + np.arange(levels) * step - low) % period
                candidate += np.where(candidate == excluded, period, 0)
                forbidden[:levels] = candidate > high
            if choice.closing:
                token = expected_token(state[EXPECTED:], state[FIRST], digits, place, interval, levels)
                if token is not None:
                    kept = of_row[token]
                    of_row -= self.settings.closing_strength
                    of_row[token] = kept
            if place == 0:
                may_end = faces >= min(fewest, most) or forbidden[:levels].all()
                if faces >= most:
                    forbidden[:levels] = True
                forbidden[choice.end] = not may_end

    def _sampled(self, choice: Choice, scores: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Tokens (B,) by `scores` (B, V), of which `best` (B,) are the highest. What the filters take away is zero in
        the weights, the likeliest of which are 1."""
        settings = self.settings
        scores -= best[:, None]
        scores /= settings.temperature
        weight = np.exp(scores, out=scores)
        if choice.filters:
            ordered = np.sort(weight, axis=1)[:, ::-1]
            if 0 < settings.top_k < self.vocabulary:
                least = ordered[:, settings.top_k - 1, None]
                weight *= weight >= least
                ordered = ordered * (ordered >= least)
            if settings.top_p < 1:
                reached = ordered.cumsum(axis=1)
                # What stands before each, of all; the likeliest is kept in any case.
                kept = (reached - ordered < settings.top_p * reached[:, -1:]).sum(axis=1)
                weight *= weight >= ordered[self.rows, np.maximum(kept, 1) - 1, None]
            if settings.min_p > 0:
                weight *= weight >= settings.min_p
        reached = weight.cumsum(axis=1)
        numbers = self.uniforms[self.rows, np.minimum(self.counts, self.uniforms.shape[1] - 1), None]
        token = (reached <= numbers * reached[:, -1:]).sum(axis=1)
        if token.max() == self.vocabulary:
            # Rounding must not choose what has no share.
            token = np.minimum(token, np.where(weight > 0, np.arange(self.vocabulary), 0).max(axis=1))
        return token

    def _follow(self, choice: Choice, chosen: np.ndarray, place: int) -> None:
        state = self.state
        going = state[:, ENDED] == 0
        digits = state[:, DIGITS] * (place % 3 > 0) + np.where(going, chosen * choice.coordinates ** (place % 3), 0)
        state[:, DIGITS] = digits
        if place == 2:
            state[:, FIRST] = digits
        elif place == 5:
            state[:, SECOND] = digits
        elif place == 8:
            pair = np.sort(state[:, [SECOND, DIGITS]], axis=1)
            state[:, LOWEST] = np.where(going, state[:, FIRST], state[:, LOWEST])
            state[:, MIDDLE] = np.where(going, pair[:, 0], state[:, MIDDLE])
            state[:, HIGHEST] = np.where(going, pair[:, 1], state[:, HIGHEST])
            if choice.closing:
                self._follow_edges(choice, np.flatnonzero(going))
            state[:, FACES] += going

    def _follow_edges(self, choice: Choice, rows: np.ndarray) -> None:
        state, ranks = self.state[rows], choice.coordinates**3
        width = 3 * (int(state[:, FACES].max(initial=0)) + 1)
        edges = self.edges[rows, :width]
        follow_face(edges, state[:, FACES], edge_keys(state[:, [FIRST, SECOND, DIGITS]], ranks))
        self.edges[rows, :width] = edges
        self.state[rows, EXPECTED:] = expected_vertices(edges, state[:, LOWEST : HIGHEST + 1], ranks)
