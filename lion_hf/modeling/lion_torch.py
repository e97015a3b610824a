"""The torch backend: the three forms as functions of a request.

The forms themselves are in lion_naive.py and lion_chunkwise.py. Here they get padding, feature
maps, the divisor and orders of reading.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from .lion_choice import default_chunk_size
from .lion_chunkwise import chunkwise
from .lion_documents import document_rows, run_documents
from .lion_naive import attention_weights, decay_mask, map_features, recurrent
from .lion_numerics import compute_type, saturated
from .lion_portable import needs_plain_operations
from .lion_request import (
    AttentionRequest,
    Result,
    divide,
    each_order,
    edges_of,
    hide_padding,
)
from .lion_short import is_short, short_rows


def torch_attention(request: AttentionRequest) -> Result:
    """The attention form: it multiplies by the weights, which it can drop and return."""
    request = with_features(request)
    weights = _weights(request)
    output = F.dropout(weights, request.dropout_p) @ request.value.to(compute_type(request.value))
    return _finish(request, output, weights)


def torch_recurrent(request: AttentionRequest) -> Result:
    """The recurrent form, for each order on its own."""
    return _by_states(partial(each_order, recurrent), request)


def torch_chunk(request: AttentionRequest) -> Result:
    """The chunk form: one chunk serves several orders with one matrix of scores."""
    if is_short(request):
        return _finish(request, short_rows(request), None)
    rows = document_rows(request)
    if rows is not None:
        return _finish(request, run_documents(_of_documents, request, rows), None)
    return _by_states(_chunks, request)


def _of_documents(request: AttentionRequest) -> torch.Tensor:
    if is_short(request):
        return short_rows(request)
    return divide(_chunks, with_features(request))


def _by_states(
    form: Callable[[AttentionRequest], torch.Tensor], request: AttentionRequest
) -> Result:
    request = with_features(request)
    weights = _weights(request) if request.need_weights else None
    return _finish(request, divide(form, request), weights)


def _chunks(request: AttentionRequest) -> torch.Tensor:
    query, key, value = request.query, request.key, request.value
    orders, *edges = zip(*request.directions)
    length, chunk_size = query.shape[2], request.chunk_size
    if (
        orders[0] is None
        or needs_plain_operations(query, key, value, *edges_of(request.directions), *orders)
        or length > (chunk_size or default_chunk_size(length, query.device.type)[0])
    ):
        return each_order(chunkwise, request)
    left_to_right, right_to_left, order = map(torch.stack, (*edges, orders))
    inputs = query, key, value, left_to_right, right_to_left
    return chunkwise(*inputs, request.scale, chunk_size, order)


def with_features(request: AttentionRequest) -> AttentionRequest:
    """The request with zeros at padding, and with features for queries and keys."""
    query, key, value = hide_padding(request.mask, request.query, request.key, request.value)
    if request.feature_map != "identity":
        features = (map_features(request.feature_map, x, value) for x in (query, key))
        query, key = hide_padding(request.mask, *features)
    return request._replace(query=query, key=key, value=value, feature_map="identity")


def _weights(request: AttentionRequest) -> torch.Tensor:
    """The mixing matrix, (B, H, L, L), with each order's mask in the order of the tokens."""
    dtype = compute_type(request.value)
    query, key = request.query.to(dtype), request.key.to(dtype)
    masks: list[torch.Tensor | None] = []
    length = query.shape[2]
    for order, left_to_right, right_to_left in request.directions:
        if left_to_right is None or right_to_left is None:
            masks.append(None)
            continue
        edges = [x.expand(*x.shape[:-1], length) for x in (left_to_right, right_to_left)]
        mask = decay_mask(edges[0], edges[1], dtype)
        if order is not None:
            inverse = order.argsort()
            mask = mask[..., inverse[:, None], inverse[None, :]]
        masks.append(mask)
    weights = attention_weights(query * request.scale, key, masks)
    if request.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + request.eps)
    return weights


def _finish(
    request: AttentionRequest, output: torch.Tensor, weights: torch.Tensor | None
) -> Result:
    dtype = request.value.dtype
    if not request.need_weights or weights is None:
        return saturated(output, dtype), None
    return saturated(output, dtype), saturated(weights, dtype)
