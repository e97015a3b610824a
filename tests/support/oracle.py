"""The operation once more, straight from its definition, one document at a time.

Also random problems to compare on.

It shares no code with the library: gates are multiplied, never logarithms subtracted, and padding
and packing are what they mean, tokens taken out and documents run alone.
"""

from dataclasses import dataclass, field

import torch

MASK_TYPES = ("lit", "decay", "selective")
PADDINGS = ("none", "left", "right", "interior")


def _of_unit_length(x: torch.Tensor) -> torch.Tensor:
    features = x / (1 + (-x).exp()) + 0.5
    return features / (features * features).sum(-1, keepdim=True).sqrt()


def _roots_of_shares(x: torch.Tensor) -> torch.Tensor:
    return (x.exp() / x.exp().sum(-1, keepdim=True)).sqrt()


FEATURES = {
    "identity": lambda x: x,
    "elu_plus_one": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "normalized_silu": _of_unit_length,
    "sqrt_softmax": _roots_of_shares,
    "exponential": lambda x: torch.cat([x.exp(), 1 / x.exp()], -1) / 16,
}


def mask_of(gates: torch.Tensor) -> torch.Tensor:
    """M of one sequence from its gates a, (H, n) to (H, n, n).

    It multiplies the gates along the way.
    """
    heads, n = gates.shape
    lower, upper = [], []
    row = gates.new_zeros(heads, n)
    for i in range(n):  # M_ij = M_(i-1)j a_(i-1) for j < i
        if i:
            row = row * gates[:, i - 1, None]
        row = row + torch.nn.functional.one_hot(torch.tensor(i), n).to(row)
        lower.append(row)
    row = gates.new_zeros(heads, n)
    for i in reversed(range(n)):  # M_ij = M_(i+1)j a_(i+1) ... for j > i; the source's gate acts
        if i + 1 < n:
            row = (row + torch.nn.functional.one_hot(torch.tensor(i + 1), n).to(row)) * gates[
                :, i + 1, None
            ]
        upper.append(row)
    return torch.stack(lower, 1) + torch.stack(upper[::-1], 1)


def definition(
    query, key, value, log_decay, mask, seq_idx, order, scale, normalize, eps=1e-6
) -> torch.Tensor:
    """(B, H, L, Dv), zeros at padding.

    `log_decay` is None, or (K, B or 1, H, L or 1) for K orders.
    """
    batch, heads, length, _ = query.shape
    orders = [torch.arange(length)] if order is None else [o.cpu() for o in order]
    output = []
    for b in range(batch):
        keep = torch.ones(length, dtype=torch.bool) if mask is None else mask[b].cpu() != 0
        documents = torch.zeros(length) if seq_idx is None else seq_idx.expand(batch, -1)[b].cpu()
        row = value.new_zeros(heads, length, value.shape[-1])
        for document in documents[keep].unique():
            inside = (documents == document) & keep
            tokens = inside.nonzero().flatten()
            mean = 0
            for k, permutation in enumerate(orders):
                steps = permutation[inside[permutation]]  # the document's tokens in this order
                gates = query.new_ones(heads, len(steps))
                if log_decay is not None:
                    gates = log_decay[k].expand(batch, heads, length)[b][:, steps].exp()
                back = torch.argsort(steps)  # sorted positions among the document's tokens
                mean = mean + mask_of(gates)[:, back][:, :, back] / len(orders)
            weights = mean * (query[b][:, tokens] @ key[b][:, tokens].transpose(-1, -2)) * scale
            if normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + eps)
            row = row.index_copy(1, tokens.to(row.device), weights @ value[b][:, tokens])
        output.append(row)
    return torch.stack(output)


@dataclass
class Problem:
    """Random inputs of one case and what the definition makes of them."""

    inputs: dict[str, torch.Tensor]  # leaves by name: query, key, value and log_decay, in float64
    options: dict  # keyword arguments of lion_attention
    weight: torch.Tensor  # gradient of the loss with respect to the output, zero at padding
    expected: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # output, and every gradient by name


def make_problem(
    mask_type: str,
    length: int,
    padding: str = "none",
    packed: bool = False,
    ordered: bool = False,
    normalize: bool = False,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 4,
    value_dim: int = 5,
    feature_map: str = "identity",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Problem:
    """Draws a problem.

    Its inputs are exact in `dtype`, so that half precision is judged on what it was given.
    """

    def draw(*shape):
        return (
            torch.randn(*shape, dtype=torch.float64).to(dtype).double().to(device).requires_grad_()
        )

    inputs = {
        "query": draw(batch, heads, length, head_dim),
        "key": draw(batch, heads, length, head_dim),
    }
    inputs["value"] = draw(batch, heads, length, value_dim)
    if normalize and feature_map == "identity":  # the divisor must not vanish: positive features
        inputs |= {
            n: (inputs[n].detach().abs() + 0.1).to(dtype).double().requires_grad_()
            for n in ("query", "key")
        }
    orders = 2 if ordered else 1
    if mask_type != "lit":
        shape = (orders, 1, heads, 1) if mask_type == "decay" else (orders, batch, heads, length)
        gates = torch.nn.functional.logsigmoid(torch.randn(*shape) * 2 + 1).to(dtype).double()
        inputs["log_decay"] = (gates if ordered else gates[0]).to(device).requires_grad_()
    options = {"normalize": normalize, "scale": 0.5}
    if feature_map != "identity":
        options["feature_map"] = feature_map
    if padding != "none":
        options["attention_mask"] = make_mask(padding, batch, length).to(device)
    # Documents of every row; with orders the same for all, since an order keeps each in one piece.
    if packed:
        options["seq_idx"] = (
            (torch.rand(1 if ordered else batch, length) < min(0.2, 4 / length))
            .long()
            .cumsum(-1)
            .to(device)
        )
    if ordered:
        documents = options["seq_idx"][0].cpu() if packed else torch.zeros(length)
        options["order"] = torch.stack(
            [(documents + torch.rand(length) * 0.9).argsort() for _ in range(2)]
        ).to(device)
    mask = options.get("attention_mask")
    keep = torch.ones(batch, length, device=device) if mask is None else mask
    weight = (
        torch.randn(batch, heads, length, value_dim, dtype=torch.float64).to(device)
        * keep[:, None, :, None]
    )
    problem = Problem(inputs, options, weight.to(dtype).double())
    gates = inputs.get("log_decay")
    output = definition(
        FEATURES[feature_map](inputs["query"]),
        FEATURES[feature_map](inputs["key"]),
        inputs["value"],
        gates if gates is None or ordered else gates[None],
        mask,
        options.get("seq_idx"),
        options.get("order"),
        0.5,
        normalize,
    )
    problem.expected = gradients(output, problem, inputs)
    return problem


def make_mask(padding: str, batch: int, length: int) -> torch.Tensor:
    """(B, L) int64: a different amount of padding in every row.

    There is always at least one token in the first.
    """
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(batch):
        cut = (b + 1) * length // (batch + 2)
        if padding == "left":
            mask[b, :cut] = 0
        elif padding == "right":
            mask[b, length - cut :] = 0
        else:
            mask[b] = (torch.rand(length) < 0.7).long()
    mask[0, length // 2] = 1
    return mask


def gradients(
    output: torch.Tensor, problem: Problem, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The output and the gradient of `(output * weight).sum()` for every input, by name."""
    loss = (output.double() * problem.weight.to(output.device)).sum()
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs.values())]
    real = (problem.weight != 0).any(-1, keepdim=True).any(1, keepdim=True)
    return {"output": (output * real).detach(), **dict(zip((f"d{name}" for name in inputs), found))}


def check(problem: Problem, function, dtype: torch.dtype, tolerance: float, **kwargs) -> None:
    """Runs `function` on the problem's inputs in `dtype` and compares output and gradients by name.

    The tolerance is relative to the largest entry of what is compared, or to 1, the size of the
    inputs, if that is larger.
    """
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in problem.inputs.items()}
    found = gradients(function(**inputs, **problem.options, **kwargs), problem, inputs)
    for name, expected in problem.expected.items():
        assert torch.isfinite(found[name]).all(), f"{name} is not finite"
        error = (found[name].double() - expected).abs().max()
        bound = tolerance * max(expected.abs().max().item(), 1.0)
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"
