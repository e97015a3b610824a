"""What the operation and the models refuse: each error names the argument, what it got, and what is legal.

Values are looked at only where that is free and possible: on a GPU it would wait for the device, and a traced tensor has none.
"""

import torch
from torch import nn

IGNORED = -100  # the label of what does not count
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALLEST_EPS, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def has_values(x: torch.Tensor) -> bool:
    """Whether Python may branch on a tensor's values: it is neither traced, nor pretended, nor inside a torch.func transform.

    Per-sample gradients, vmap of grad, hide a batch in a tensor that calls itself one of grad: any wrapped one counts.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, nn.Parameter) or x.device.type == "meta":
        return False
    return not (torch.jit.is_tracing() or in_transform(x))


def in_transform(x: torch.Tensor) -> bool:
    """Whether a tensor is inside a transform of torch.func, such as vmap or grad."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def values_known(x: torch.Tensor) -> bool:
    """Whether a tensor's values may be looked at for nothing: it has some, on the CPU."""
    return x.device.type == "cpu" and has_values(x)


def check_tensors(device: torch.device | None = None, **tensors) -> None:
    """Raises ValueError for anything but None and tensors on one device."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not torch.is_tensor(x):
            raise ValueError(f"{name} is {type(x).__name__}: expected a tensor")
        device = x.device if device is None else device
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}: expected {device}, where the others are")


def check_integers(name: str, x: torch.Tensor) -> None:
    """Raises ValueError for a tensor of another type than integers or booleans."""
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} is {x.dtype}: expected integers")


def check_ids(name: str, ids: torch.Tensor, count: int, of: str) -> None:
    """Raises ValueError if an index into a table of `count` rows, `of` the configuration, is out of range (see the top)."""
    if values_known(ids) and ids.numel() > 0:
        least, most = (x.item() for x in ids.aminmax())
        if not 0 <= least <= most < count:
            raise ValueError(f"{name} from {least} to {most}: expected 0 to {count - 1}, because {of}={count}")


def check_mask(mask: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError for a padding mask of another shape than (B, L), or one that is to be added to scores."""
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask {tuple(mask.shape)}: expected (batch, length) = {tuple(shape)}")
    if mask.is_complex():
        raise ValueError(f"attention_mask is {mask.dtype}: expected integers or booleans")
    # Masks to be added are real numbers: those are looked at on a GPU too.
    looked_at = has_values(mask) if mask.is_floating_point() else values_known(mask)
    if mask.dtype != torch.bool and looked_at and not (mask >= 0).all():
        kind = "negative entries" if (mask < 0).any() else "entries that are no numbers"
        raise ValueError(f"attention_mask has {kind}: expected 1 for tokens and 0 for padding, nothing to be added")


def check_labels(name: str, labels: torch.Tensor, shape: tuple[int, ...], num_labels: int) -> torch.Tensor:
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
            raise ValueError(f"{name} holds {wrong[0]}: expected 0 to {num_labels - 1}, or {IGNORED} where there is none")
    return labels


def check_operation(
    query, key, value, log_decay, attention_mask, seq_idx, order, scale, normalize, eps, dropout_p, chunk_size
) -> None:
    """Raises ValueError for arguments of `lion_attention` that do not fit together."""
    for name, x in (("scale", scale), ("eps", eps), ("dropout_p", dropout_p)):
        traced = isinstance(x, (torch.SymInt, torch.SymFloat)) or (name == "scale" and x is None)
        if not traced and not (isinstance(x, (int, float)) and -LARGEST <= x <= LARGEST):
            raise ValueError(f"{name}={x!r}: expected a finite number")
    if not isinstance(normalize, (bool, int)):
        raise ValueError(f"normalize={normalize!r}: expected True or False")
    if normalize and eps < SMALLEST_EPS:
        raise ValueError(f"eps={eps}: expected at least {SMALLEST_EPS:.3g}, by which rows of padding are divided")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}: expected a probability in [0, 1)")
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size}: expected None or an integer of at least 1")
    pair = isinstance(log_decay, tuple)
    if pair and len(log_decay) != 2:
        raise ValueError(f"log_decay is a tuple of {len(log_decay)}: expected the pair (forward, backward)")
    decays = log_decay if pair else () if log_decay is None else (log_decay,)
    if not all(torch.is_tensor(gates) for gates in decays):
        raise ValueError(f"log_decay is {type(log_decay).__name__}: expected None, a tensor, or a tuple of two tensors")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is None:
            raise ValueError(f"{name} is None: expected a tensor")
    check_tensors(query=query, key=key, value=value, attention_mask=attention_mask, seq_idx=seq_idx, order=order)
    for gates in decays:
        check_tensors(query.device, log_decay=gates)

    if query.dim() != 4 or key.shape != query.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: expected the same shape (batch, heads, length, head_dim)"
        )
    if value.dim() != 4 or value.shape[:3] != query.shape[:3]:
        raise ValueError(f"value {tuple(value.shape)}: expected {(*query.shape[:3], 'any head_dim')}")
    if query.shape[-1] < 1:
        raise ValueError(f"query {tuple(query.shape)}: expected a head_dim of at least 1")
    if not all(x.dtype in DTYPES and x.layout == torch.strided for x in (query, key, value)):
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype} ({query.layout}): expected floating-point"
            f" tensors, dense, of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
        )
    batch, heads, length, _ = query.shape
    if attention_mask is not None:
        check_mask(attention_mask, (batch, length))
    if seq_idx is not None and (seq_idx.dim() != 2 or seq_idx.shape[0] not in (1, batch) or seq_idx.shape[1] != length):
        raise ValueError(f"seq_idx {tuple(seq_idx.shape)}: expected (batch or 1, length) = {(batch, length)}")
    if seq_idx is not None:
        check_integers("seq_idx", seq_idx)
    if order is not None and (order.dim() != 2 or order.shape[0] < 1 or order.shape[1] != length):
        raise ValueError(f"order {tuple(order.shape)}: expected (number of orders, length) = (K, {length})")
    if order is not None and pair:
        raise ValueError("order with a pair of edge decays: give the tokens' gates instead, (K, batch, heads, length)")
    legal = (() if order is None else ((len(order),),)) + ((1, batch), (1, heads), (length,) if pair else (1, length))
    for gates in decays:
        if gates.dim() != len(legal) or any(n not in s for n, s in zip(gates.shape, legal)):
            raise ValueError(
                f"log_decay {tuple(gates.shape)}: expected {'(orders, ' if order is not None else '('}batch or 1, heads or 1,"
                f" length{'' if pair else ' or 1'}) with batch, heads, length = {(batch, heads, length)}"
            )
    if order is not None:
        _check_order(order)
    for gates in decays:
        _check_gates(gates[..., :-1] if pair else gates)  # the last entry of a pair belongs to no edge


def _check_gates(gates: torch.Tensor) -> None:
    if gates.dtype not in DTYPES:
        raise ValueError(f"log_decay is {gates.dtype}: expected floating-point numbers")
    if values_known(gates) and (gates > 0).any():
        raise ValueError(f"log_decay has entries above 0 (up to {gates.max():.3g}): expected logarithms of gates from 0 to 1")


def _check_order(order: torch.Tensor) -> None:
    if order.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"order is {order.dtype}: expected int64")
    if values_known(order) and not (order.sort(-1).values == torch.arange(order.shape[1])).all():
        raise ValueError(f"order is no permutation: expected every number from 0 to {order.shape[1] - 1} once a row")
