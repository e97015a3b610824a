"""What the operation and the models refuse.

Each error names the argument, the value it got, and the legal values. Values of tensors are looked
at only where that is free and possible: on a GPU it would wait for the device, and a traced tensor
has none.
"""

import torch

from .configuration_lion import SMALLEST_EPS
from .lion_numerics import has_values, values_known

IGNORED = -100  # the label of what does not count
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_TYPES = (torch.int32, torch.int64)  # those that embeddings and gathers take
LARGEST = torch.finfo(torch.float32).max

LogDecay = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


def check_tensors(device: torch.device | None = None, /, **tensors: object) -> None:
    """Raises ValueError for anything but None and tensors on one device."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is {type(x).__name__}: expected a tensor")
        device = x.device if device is None else device
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}: expected {device}, where the others are")


def check_integers(name: str, x: torch.Tensor) -> None:
    """Raises ValueError for a tensor of another type than integers or booleans."""
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} is {x.dtype}: expected integers")


def check_ids(name: str, ids: torch.Tensor, table: torch.nn.Module, of: str) -> None:
    """Raises ValueError if an index into a table of embeddings is out of range.

    Args:
        name: the argument's name.
        ids: the indices.
        table: the embeddings. Adapters may put a module in their place that does not tell its rows.
        of: the field of the configuration that sets the number of rows.
    """
    count = getattr(table, "num_embeddings", None)
    if count is not None and values_known(ids) and ids.numel() > 0:
        least, most = (x.item() for x in ids.aminmax())
        if not 0 <= least <= most < count:
            raise ValueError(
                f"{name} from {least} to {most}: expected 0 to {count - 1}, because {of}={count}"
            )


def check_mask(mask: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError for a padding mask not of shape (B, L), or one to be added to scores."""
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)}: expected (batch, length) = {tuple(shape)}"
        )
    if mask.is_complex():
        raise ValueError(f"attention_mask is {mask.dtype}: expected integers or booleans")
    # Masks to be added are real numbers: those are looked at on a GPU too.
    looked_at = has_values(mask) if mask.is_floating_point() else values_known(mask)
    if mask.dtype != torch.bool and looked_at and not (mask >= 0).all():
        kind = "negative entries" if (mask < 0).any() else "entries that are not numbers"
        raise ValueError(
            f"attention_mask has {kind}: expected 1 for tokens and 0 for padding, not numbers to"
            " add to scores"
        )


def check_labels(
    name: str, labels: torch.Tensor, shape: tuple[int, ...], num_labels: int
) -> torch.Tensor:
    """The class indices as int64.

    Args:
        name: the argument's name.
        labels: integers, 0 to `num_labels` - 1 or -100.
        shape: the shape they must have.
        num_labels: number of classes.

    Raises:
        ValueError: for anything else.
    """
    check_tensors(**{name: labels})
    check_integers(name, labels)
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name} {tuple(labels.shape)}: expected {tuple(shape)}")
    labels = labels.long()
    if values_known(labels):
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != IGNORED)]
        if wrong.numel() > 0:
            raise ValueError(
                f"{name} holds {wrong[0]}: expected 0 to {num_labels - 1}, or {IGNORED} where there"
                " is no label"
            )
    return labels


def check_numbers(
    scale: float | None, normalize: bool, eps: float, dropout_p: float, chunk_size: int | None
) -> None:
    """Raises ValueError for numbers that `lion_attention` cannot compute with."""
    for name, x in (("scale", scale), ("eps", eps), ("dropout_p", dropout_p)):
        if isinstance(x, (torch.SymInt, torch.SymFloat)) or (name == "scale" and x is None):
            continue
        if not (isinstance(x, (int, float)) and -LARGEST <= x <= LARGEST):
            raise ValueError(f"{name}={x!r}: expected a finite number")
    if not isinstance(normalize, (bool, int)):
        raise ValueError(f"normalize={normalize!r}: expected True or False")
    if normalize and eps < SMALLEST_EPS:
        raise ValueError(
            f"eps={eps}: expected at least {SMALLEST_EPS:.3g}, by which rows of padding are divided"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}: expected a probability in [0, 1)")
    integer = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (integer and chunk_size >= 1):
        raise ValueError(f"chunk_size={chunk_size}: expected None or an integer of at least 1")


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: LogDecay,
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    order: torch.Tensor | None,
) -> None:
    """Raises ValueError for tensors of `lion_attention` that do not fit together."""
    pair = isinstance(log_decay, tuple)
    decays = gates_of(log_decay)
    if pair and len(decays) != 2:
        raise ValueError(
            f"log_decay is a tuple of {len(decays)}: expected the pair"
            " (left_to_right, right_to_left)"
        )
    if not all(torch.is_tensor(gates) for gates in decays):
        raise ValueError(
            f"log_decay is {type(log_decay).__name__}: expected None, a tensor, or a tuple of two"
            " tensors"
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is None:
            raise ValueError(f"{name} is None: expected a tensor")
    masks = {"attention_mask": attention_mask, "seq_idx": seq_idx, "order": order}
    check_tensors(query=query, key=key, value=value, **masks)
    for gates in decays:
        check_tensors(query.device, log_decay=gates)
    _check_operands(query, key, value)
    batch, heads, length, _ = query.shape
    if attention_mask is not None:
        check_mask(attention_mask, (batch, length))
    if seq_idx is not None:
        rows_fit = seq_idx.dim() == 2 and seq_idx.shape[0] in (1, batch)
        if not rows_fit or seq_idx.shape[1] != length:
            raise ValueError(
                f"seq_idx {tuple(seq_idx.shape)}: expected (batch or 1, length) = {(batch, length)}"
            )
        check_integers("seq_idx", seq_idx)
    if order is not None:
        _check_order(order, length, pair)
    _check_decays(decays, pair, order, (batch, heads, length))


def gates_of(log_decay: LogDecay) -> tuple[torch.Tensor, ...]:
    """The tensors of `log_decay`, of whichever of its three kinds it is."""
    if isinstance(log_decay, tuple):
        return log_decay
    return () if log_decay is None else (log_decay,)


def _check_operands(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dim() != 4 or key.shape != query.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: expected the same shape"
            " (batch, heads, length, head_dim)"
        )
    if value.dim() != 4 or value.shape[:3] != query.shape[:3]:
        expected = (*query.shape[:3], "any head_dim")
        raise ValueError(f"value {tuple(value.shape)}: expected {expected}")
    if query.shape[-1] < 1:
        raise ValueError(f"query {tuple(query.shape)}: expected a head_dim of at least 1")
    if not all(x.dtype in DTYPES and x.layout == torch.strided for x in (query, key, value)):
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype} ({query.layout}):"
            f" expected floating-point tensors, dense, of {types}"
        )


def _check_order(order: torch.Tensor, length: int, pair: bool) -> None:
    if order.dim() != 2 or order.shape[0] < 1 or order.shape[1] != length:
        raise ValueError(
            f"order {tuple(order.shape)}: expected (number of orders, length) = (K, {length})"
        )
    if pair:
        raise ValueError(
            "order with a pair of edge decays: give the tokens' gates instead,"
            " (K, batch, heads, length)"
        )


def _check_decays(
    decays: tuple[torch.Tensor, ...],
    pair: bool,
    order: torch.Tensor | None,
    shape: tuple[int, int, int],
) -> None:
    batch, heads, length = shape
    orders = () if order is None else ((len(order),),)
    legal = (*orders, (1, batch), (1, heads), (length,) if pair else (1, length))
    for gates in decays:
        if gates.dim() != len(legal) or any(n not in s for n, s in zip(gates.shape, legal)):
            raise ValueError(
                f"log_decay {tuple(gates.shape)}: expected"
                f" {'(orders, ' if order is not None else '('}batch or 1, heads or 1,"
                f" length{'' if pair else ' or 1'}) with batch, heads, length = {shape}"
            )
    if order is not None:
        _check_permutations(order)
    for gates in decays:
        _check_gates(gates[..., :-1] if pair else gates)  # a pair's last entry belongs to no edge


def _check_permutations(order: torch.Tensor) -> None:
    if order.dtype not in INDEX_TYPES:
        raise ValueError(f"order is {order.dtype}: expected int64")
    if values_known(order) and not (order.sort(-1).values == torch.arange(order.shape[1])).all():
        raise ValueError(
            f"order is not a permutation: expected every number from 0 to {order.shape[1] - 1} once"
            " per row"
        )


def _check_gates(gates: torch.Tensor) -> None:
    if gates.dtype not in DTYPES:
        raise ValueError(f"log_decay is {gates.dtype}: expected floating-point numbers")
    if values_known(gates) and (gates > 0).any():
        raise ValueError(
            f"log_decay has entries above 0 (up to {gates.max():.3g}): expected logarithms of gates"
            " from 0 to 1"
        )
