"""Documents of any length in bounded memory: `LionModel.encode_long`.

The document is cut into pieces. A layer goes through them twice: right to left for the states that
reach each piece from behind it, then left to right for the outputs, while the state from the pieces
before it is carried along (see lion_borders.py). In memory are the activations of one piece and the
states at the borders; the hidden states stay where lion_long_files.py puts them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .lion_borders import (
    BorderState,
    Operands,
    PieceStates,
    mix_piece,
    operands_of,
    state_to_the_left,
    state_to_the_right,
)
from .lion_layers import LionLayer
from .lion_long_files import Cache, LongStates, Progress
from .lion_long_inputs import (
    check_call,
    in_ranks,
    read_ids,
    read_piece,
    read_spans,
    trains,
    watched,
)
from .lion_long_marks import fingerprints, precision
from .lion_numerics import has_values, sum_type

# Longer rows go through the model in pieces by themselves, on a CPU without gradients.
LONGEST_WHOLE = 65_536
PIECE = 8192
SAMPLED = 16  # tokens by whose hidden states a cache knows a model again


@dataclass
class LionLongOutput(BaseModelOutputWithPooling):
    """What `encode_long` returns.

    Args:
        last_hidden_state: (1, L, hidden) if `pooling` is None. Of a long document it is mapped
            from a file, on the CPU.
        pooler_output: (1, hidden), what the model's pooler makes of `pooled`. None without pooler.
        pooled: (1, hidden), the mean of the last hidden states, or the first one.
        span_embeddings: (1, spans, hidden), the mean of the last hidden states of each span.
    """

    pooled: torch.Tensor | None = None
    span_embeddings: torch.Tensor | None = None


class Piece(NamedTuple):
    """Some tokens of the document, and what a layer has to know of their neighbours.

    A convolution before the MLP sees what the attention gave for neighbours, and one before the
    attention what the layer got for neighbours, theirs included.
    """

    tokens: slice  # their places in the document
    seen: slice  # places of what the layer reads
    attended: slice  # what the attention is computed for, within `seen`
    inside: slice  # the piece's tokens, within `attended`
    to_the_right: slice  # the tokens of the state that goes to the next piece, within `attended`
    to_the_left: slice  # and of the one that goes to the piece before


def cut(length: int, piece: int, around_attention: int, around_mlp: int) -> list[Piece]:
    """A document of so many tokens in pieces.

    Args:
        length: L.
        piece: tokens per piece.
        around_attention: neighbours on one side that the attention's convolutions see.
        around_mlp: neighbours on one side that the MLP's convolution sees.
    """

    def place(token: int) -> int:
        return min(max(token, 0), length)

    pieces = []
    for start in range(0, length, piece):
        end = place(start + piece)
        first, last = place(start - around_mlp), place(end + around_mlp)
        seen = slice(place(first - around_attention), place(last + around_attention))
        pieces.append(
            Piece(
                tokens=slice(start, end),
                seen=seen,
                attended=slice(first - seen.start, last - seen.start),
                inside=slice(start - first, end - first),
                to_the_right=slice(0, place(end - around_mlp) - first),
                to_the_left=slice(place(start + around_mlp) - first, last - first),
            )
        )
    return pieces


@torch.no_grad()
def encode_long(
    model: Any,
    input_ids: torch.Tensor | Iterable,
    *,
    piece: int,
    pooling: str | None,
    cache: Any,
    spans: Any,
    progress: bool | None,
    memory_if_full: bool = False,
) -> LionLongOutput:
    """See `LionModel.encode_long`.

    With `memory_if_full` the hidden states stay in memory where the disk has no room for them.
    """
    check_call(model, pooling)
    piece = read_piece(piece)
    ids = read_ids(model, input_ids)
    ranges = read_spans(spans, len(ids))
    document = LongDocument(model, ids, piece)
    with document.states(cache, memory_if_full) as states:
        hidden_states = document.encode(states, progress)
        return _output(document, hidden_states, pooling, ranges)


def encode_row(model: Any, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
    """What the model's forward pass returns for one row, (1, L), computed in pieces."""
    options: dict[str, Any] = dict.fromkeys(("pooling", "cache", "spans"))
    options |= {"progress": False, "memory_if_full": True}
    output = encode_long(model, input_ids, piece=PIECE, **options)
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state, pooler_output=output.pooler_output
    )


def goes_in_pieces(model: Any, may_unpad: bool, **inputs: torch.Tensor | None) -> bool:
    """Whether a text model's forward pass computes its row in pieces.

    It does for one row of more than `LONGEST_WHOLE` tokens on a CPU, in evaluation, without
    gradients, if it is one document without padding and nobody looks into the layers. The inputs
    have passed `check_rows`.
    """
    ids = inputs.pop("input_ids")
    if not may_unpad or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if ids is None or ids.shape[0] != 1 or ids.shape[1] <= LONGEST_WHOLE:
        return False
    if ids.device.type != "cpu" or not has_values(ids):
        return False
    mask, types = inputs.pop("attention_mask"), inputs.pop("token_type_ids")
    if any(x is not None for x in inputs.values()):
        return False
    if (mask is not None and not bool(mask.all())) or (types is not None and bool(types.any())):
        return False
    if trains(model) or in_ranks(model) or watched(model) is not None:
        return False
    return all(x.device.type == "cpu" for x in model.parameters())


class LongDocument:
    """One document, its pieces, and the model that encodes it.

    Args:
        model: a `LionModel` for text.
        ids: (L,).
        piece: tokens per piece.
    """

    def __init__(self, model: Any, ids: torch.Tensor, piece: int):
        self.model, self.ids, self.piece = model, ids, piece
        self.config, self.device = model.config, next(model.parameters()).device
        reach = self.config.conv_reach
        around_mlp = reach if self.config.conv_placement == "inputs" else 0
        self.pieces = cut(len(ids), piece, reach, around_mlp)

    @contextlib.contextmanager
    def states(self, cache: Any, memory_if_full: bool = False) -> Iterator[LongStates]:
        """The place for the hidden states."""
        first = self.embed(slice(0, 1))
        shape = len(self.ids), self.config.hidden_size
        where = first.dtype, self.device, len(self.model.layers)
        with contextlib.ExitStack() as stack:
            folder = None
            if cache is not None:
                marks = fingerprints(self.model, self.config, self.ids, self.piece)
                marks["precision"] = precision(first)
                folder = stack.enter_context(Cache(cache, marks, self._sample(*where)).held())
            yield LongStates(shape, *where, folder, memory_if_full)

    def _sample(self, dtype: torch.dtype, device: torch.device, last_stage: int) -> torch.Tensor:
        """The last hidden states of the first tokens alone, by which a model is known again."""
        few = LongDocument(self.model, self.ids[:SAMPLED], SAMPLED)
        shape = len(few.ids), self.config.hidden_size
        return few.encode(LongStates(shape, dtype, device, last_stage, None), False).cpu()

    def encode(self, states: LongStates, progress: bool | None) -> torch.Tensor:
        """Computes what is missing, and returns the last hidden states, (L, hidden)."""
        layers, length = self.model.layers, len(self.ids)
        begun = states.progress
        done = min(begun.pieces * self.piece, length) if begun.stage else 0
        bar = tqdm(
            total=len(layers) * length,
            initial=max(begun.stage - 1, 0) * length + done,
            desc="tokens x layers",
            unit="tok",
            unit_scale=True,
            disable=None if progress is None else not progress,
        )
        with bar:
            for stage in range(begun.stage, len(layers) + 1):
                if stage == 0:
                    self._embed_all(states)
                else:
                    self._encode_layer(layers[stage - 1], stage, states, bar.update)
                states.advance(Progress(stage + 1))
        states.finish()
        return states.of_stage(len(layers))

    def embed(self, tokens: slice) -> torch.Tensor:
        """The embeddings of some tokens, (1, tokens, hidden)."""
        ids = self.ids[tokens][None].to(self.device)
        positions = torch.arange(tokens.start, tokens.stop, device=self.device)[None]
        return self.model.embeddings(ids, None, positions, None, None, None)

    def _embed_all(self, states: LongStates) -> None:
        target = states.of_stage(0)
        for piece in self.pieces:
            target[piece.tokens] = self._last(0, self.embed(piece.tokens))[0]

    def _encode_layer(
        self, layer: LionLayer, stage: int, states: LongStates, report: Callable[[int], Any]
    ) -> None:
        """Writes the output of a layer, from the first piece that is not finished on."""
        source, target = states.of_stage(stage - 1), states.of_stage(stage)
        begun = states.progress
        behind = self._states_from_behind(layer, source, begun.pieces)
        before = None if begun.state is None else _on(self.device, begun.state)
        for n, piece in enumerate(self.pieces[begun.pieces :], begun.pieces):
            hidden_states = self._read(source, piece)
            operands = self._operands(layer, hidden_states, piece, "qkv")
            mixed = mix_piece(self.config, operands, PieceStates(before, behind.pop(n, None)))
            output = layer.finish(hidden_states[:, piece.attended], layer.attention.merge(mixed))
            target[piece.tokens] = self._last(stage, output[:, piece.inside])[0]
            own = state_to_the_right(*operands.sent(piece.to_the_right))
            before = own if before is None else before.then(own)
            states.advance(Progress(stage, n + 1, before))
            report(piece.tokens.stop - piece.tokens.start)

    def _states_from_behind(
        self, layer: LionLayer, source: torch.Tensor, first: int
    ) -> dict[int, BorderState]:
        """What reaches each piece from behind it, by the piece's number, from `first` on."""
        found: dict[int, BorderState] = {}
        state: BorderState | None = None
        for n in range(len(self.pieces) - 1, first, -1):
            piece = self.pieces[n]
            hidden_states = self._read(source, piece)
            operands = self._operands(layer, hidden_states, piece, "kv")
            own = state_to_the_left(*operands.sent(piece.to_the_left))
            state = own if state is None else state.then(own)
            found[n - 1] = state
        return found

    def _read(self, source: torch.Tensor, piece: Piece) -> torch.Tensor:
        return source[None, piece.seen].to(self.device)

    def _operands(
        self, layer: LionLayer, hidden_states: torch.Tensor, piece: Piece, parts: str
    ) -> Operands:
        inputs = layer.attention_input(hidden_states)
        return operands_of(layer.attention, inputs, piece.attended, parts)

    def _last(self, stage: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states of a stage; after the last one the model's last norm."""
        norm = self.model.last_norm
        if norm is None or stage < len(self.model.layers):
            return hidden_states
        return norm(hidden_states)


def _on(device: torch.device, state: BorderState) -> BorderState:
    log_decay = None if state.log_decay is None else state.log_decay.to(device)
    return BorderState(state.key_value.to(device), log_decay)


def _output(
    document: LongDocument,
    hidden_states: torch.Tensor,
    pooling: str | None,
    spans: list[tuple[int, int]] | None,
) -> LionLongOutput:
    model = document.model
    if (pooling or model.config.classifier_pooling) == "cls":
        pooled = hidden_states[0].clone()
    else:
        pooled = _mean(hidden_states, 0, len(hidden_states), document.piece)
    pooled = pooled[None].to(document.device)
    windows = None
    if spans is not None:
        # in one tensor: small ones between the large ones of `_mean` would keep malloc from using
        # the large ones' room again
        means = hidden_states.new_empty(len(spans), hidden_states.shape[1])
        for n, (start, end) in enumerate(spans):
            means[n] = _mean(hidden_states, start, end, document.piece)
        windows = means[None].to(document.device)
    # in one call: what is set later comes last in the order
    return LionLongOutput(
        last_hidden_state=hidden_states[None] if pooling is None else None,
        pooler_output=None if model.pooler is None else model.pooler.project(pooled),
        pooled=pooled,
        span_embeddings=windows,
    )


def _mean(hidden_states: torch.Tensor, start: int, end: int, at_once: int) -> torch.Tensor:
    """The mean of some tokens' hidden states, (hidden,), of which a few are read at a time."""
    total = hidden_states.new_zeros(hidden_states.shape[1], dtype=sum_type(hidden_states))
    for part in hidden_states[start:end].split(at_once):
        total += part.to(total.dtype).sum(0)
    return (total / (end - start)).to(hidden_states.dtype)
