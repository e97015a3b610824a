"""`lion_attention` beyond the grid.

Stability, length, memory, errors, compilation, and use beside torch's own attention.
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.oracle import mask_of
from torch.nn import functional as F

from lion_hf import LionConfig, choose_form, explain, lion_attention
from lion_hf.modeling.configuration_lion import ATTENTION_FORMS, FORMS
from lion_hf.modeling.lion_chunk_parts import Scratch
from lion_hf.modeling.lion_chunkwise import chunkwise_backward, chunkwise_forward
from lion_hf.modeling.lion_naive import decay_mask


def tensors(length=12, batch=2, heads=3, head_dim=4, dtype=torch.float32, **kwargs):
    return [torch.randn(batch, heads, length, head_dim, dtype=dtype, **kwargs) for _ in range(3)]


def test_decay_mask_is_the_product_of_gates():
    gates = torch.rand(3, 9, dtype=torch.float64)
    log = gates.log()
    mask = decay_mask(log, torch.cat([log[:, 1:], log[:, :1]], dim=1), torch.float64)
    torch.testing.assert_close(mask, mask_of(gates))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", (0.0, 1e-30, 1e-7, 1.0))
def test_extreme_gates(gate, form, dtype):
    """Gates at and near both ends, between ordinary ones.

    Values and gradients are finite and equal to the definition.
    """
    query, key, value = tensors(150, 1, 2)
    gates = torch.where(torch.rand(1, 2, 150) < 0.5, gate, 0.9)
    log_decay = gates.log().to(dtype).requires_grad_()
    inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    output = lion_attention(*inputs, log_decay, form=form, chunk_size=64)
    output.float().sum().backward()
    for x in (output, log_decay.grad, *(x.grad for x in inputs)):
        assert torch.isfinite(x).all()
    exact = [x.detach().double().requires_grad_() for x in (*inputs, log_decay)]
    q, k, v, log = exact
    expected = (mask_of(log.exp()[0]) * (q @ k.mT) / 2) @ v
    expected.sum().backward()
    for x, y in zip((*inputs, log_decay), exact):
        assert (x.grad.double() - y.grad).abs().max() <= 2e-2 * y.grad.abs().max()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert (output.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_small_gates_do_not_spoil_the_large_ones_behind_them(form):
    """After a thousand gates of 1e-30 the prefix sum is -69,000.

    float32 alone would round a gate of 0.999 away.
    """
    query, key, value = (torch.ones(1, 1, 1100, 1) for _ in range(3))
    gates = torch.cat([torch.full((1000,), 1e-30), torch.full((100,), 0.999)])
    output = lion_attention(
        query, key, value, gates.log()[None, None], scale=1.0, form=form, chunk_size=1100
    )
    expected = mask_of(gates.double()[None])[0].sum(-1)
    torch.testing.assert_close(output[0, 0, :, 0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", (False, True))
def test_a_hundred_thousand_tokens(normalize):
    """The chunk form at length 100,000 with gates at both ends: finite, and right at a few rows."""
    length = 100_000
    query, key, value = (torch.rand(1, 1, length, 4) for _ in range(3))
    gates = torch.rand(length)
    gates[torch.rand(length) < 0.1] = 0
    gates[torch.rand(length) < 0.1] = 1
    inputs = [x.requires_grad_() for x in (query, key, value, gates.log()[None, None])]
    output = lion_attention(*inputs, form="chunk", normalize=normalize)
    output.sum().backward()
    assert all(torch.isfinite(x).all() for x in (output, *(x.grad for x in inputs)))
    for i in (0, length // 3, length - 1):
        near = slice(
            max(0, i - 2000), min(length, i + 2001)
        )  # beyond, the product of the gates is 0 in float64 too
        q, k, v = (x[0, 0, near].detach().double() for x in (query, key, value))
        row = i - near.start
        products = mask_row(gates[near].double(), row)
        weights = products * (k @ q[row]) / 2
        expected = weights @ v / ((weights.sum() + 1e-6) if normalize else 1)
        torch.testing.assert_close(output[0, 0, i].double(), expected, rtol=1e-4, atol=1e-4)


def mask_row(gates, i):
    left = torch.cat([gates[:i].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=gates.dtype)])
    return torch.cat([left, gates[i + 1 :].cumprod(0)])


@pytest.mark.slow
def test_a_million_tokens():
    query, key, value = (torch.rand(1, 1, 1_000_000, 2) for _ in range(3))
    with torch.no_grad():
        output = lion_attention(
            query,
            key,
            value,
            torch.full((1, 1, 1), -0.1),
            normalize=True,
            form="chunk",
            chunk_size=256,
        )
    assert output.min() >= 0 and output.max() <= 1  # means of values in [0, 1]


PEAK = """
import sys, torch
from lion_hf import lion_attention
torch.set_num_threads(1)
length, form, family = int(sys.argv[1]), sys.argv[2], sys.argv[3]
query, key, value = (torch.randn(1, 12, length, 64) for _ in range(3))
shapes = {"lit": None, "decay": (1, 12, 1), "selective": (1, 12, length)}
log_decay = None if family == "lit" else torch.nn.functional.logsigmoid(torch.randn(shapes[family]))
def status(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
with torch.no_grad():
    short = log_decay if family != "selective" else log_decay[..., :256]
    lion_attention(*(x[:, :, :256] for x in (query, key, value)), short)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    lion_attention(query, key, value, log_decay, form=form)
print(status("VmHWM") - before)
"""


def peak_memory(length: int, form: str, family: str) -> int:
    """Bytes that the forward pass adds to what a fresh process holds.

    That includes inputs and libraries.
    """
    command = [sys.executable, "-c", PEAK, str(length), form, family]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("family", ("lit", "decay", "selective"))
def test_memory_of_the_chunk_form_is_linear(family):
    """12 heads of 64 in fp32: the peak at 8,192 tokens is at most 2.2 times that at 4,096."""
    short, long = (peak_memory(length, "chunk", family) for length in (4096, 8192))
    assert long <= 2.2 * short
    assert long < 8192 * 8192 * 4  # not even one L x L mask of one head


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_the_recurrent_form_is_its_output():
    """Beside query, key and value in float32: the output, the states, and what one step needs."""
    length, row = 4096, 12 * 64 * 4
    assert (
        peak_memory(length, "recurrent", "selective") < 3 * length * row
    )  # the scaled query, the output, and slack


@pytest.mark.parametrize("gate", (1e-30, 0.5), ids=("mask by exponents", "mask by products"))
@pytest.mark.parametrize("scale", (-0.7, 0.0, 3.0))
def test_scale(scale, gate):
    """Any factor of the scores, negative ones too.

    In one chunk and in several, output and gradients.
    """
    inputs = [x.requires_grad_() for x in tensors(20, dtype=torch.float64)]
    inputs.append(
        torch.where(torch.rand(2, 3, 20) < 0.3, gate, 0.9).double().log().requires_grad_()
    )
    weight = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    expected = lion_attention(*inputs, scale=scale, form="attention")
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for chunk_size in (7, 20):
        output = lion_attention(*inputs, scale=scale, form="chunk", chunk_size=chunk_size)
        torch.testing.assert_close(output, expected)
        for found, right in zip(torch.autograd.grad((output * weight).sum(), inputs), gradients):
            torch.testing.assert_close(found, right)
        with torch.no_grad():
            torch.testing.assert_close(
                lion_attention(*inputs, scale=scale, form="chunk", chunk_size=chunk_size), expected
            )


def test_buffers_of_inference_mode_serve_training():
    """What outlives a call in inference mode may be written by calls outside of it.

    And the other way round.
    """
    problem = [*tensors(61, heads=2, head_dim=16), F.logsigmoid(torch.randn(2, 2, 61))]
    expected = lion_attention(*problem, form="attention")
    Scratch.kept.__dict__.clear()
    with torch.inference_mode():
        torch.testing.assert_close(
            lion_attention(*problem, form="chunk", chunk_size=20), expected, rtol=1e-4, atol=1e-4
        )
    leaves = [x.requires_grad_() for x in problem]
    output = lion_attention(*leaves, form="chunk", chunk_size=20)
    output.sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(
            lion_attention(*problem, form="chunk", chunk_size=20), output, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("chunk_size", (10, 40), ids=("several chunks", "one chunk"))
def test_three_orders(chunk_size):
    inputs = [
        x.requires_grad_()
        for x in (
            *tensors(40, dtype=torch.float64),
            F.logsigmoid(torch.randn(3, 2, 3, 40)).double(),
        )
    ]
    order = torch.stack([torch.randperm(40) for _ in range(3)])
    outputs = [
        lion_attention(*inputs, order=order, form=form, chunk_size=chunk_size)
        for form in ("attention", "chunk")
    ]
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for expected, found in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1])):
        torch.testing.assert_close(found, expected)


def test_threads_do_not_share_buffers():
    """Two threads at once give what one gives.

    The buffers that outlive a call are a thread's own.
    """
    problems = [
        (*tensors(90, heads=8, head_dim=16), F.logsigmoid(torch.randn(2, 8, 90))) for _ in range(2)
    ]
    expected = [lion_attention(*problem, form="attention") for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        results = list(
            pool.map(
                lambda n: lion_attention(*problems[n % 2], form="chunk", chunk_size=32), range(60)
            )
        )
    for n, result in enumerate(results):
        torch.testing.assert_close(result, expected[n % 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form):
    """The layout of a projection, (B, L, H, D) transposed, gives what a contiguous copy gives."""
    query, key, value = (torch.randn(2, 20, 3, 8).transpose(1, 2) for _ in range(3))
    log_decay = F.logsigmoid(torch.randn(2, 20, 3)).transpose(1, 2)
    output = lion_attention(query, key, value, log_decay, form=form, chunk_size=7)
    copied = lion_attention(
        *(x.contiguous() for x in (query, key, value, log_decay)), form=form, chunk_size=7
    )
    torch.testing.assert_close(output, copied)


def test_drop_in_beside_torch_attention():
    """The same layout and scale as torch's attention.

    With the softmax of one key, which is 1, only the score in front of the value differs.
    """
    query, key, value = tensors(1)
    scores = (query * key).sum(-1, keepdim=True) / 2
    torch.testing.assert_close(
        lion_attention(query, key, value),
        scores * F.scaled_dot_product_attention(query, key, value),
    )


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    query, key, value = tensors(0)
    assert lion_attention(query, key, value, torch.zeros(1, 3, 0), form=form).shape == (2, 3, 0, 4)
    query.requires_grad_()
    assert lion_attention(query, key, value, torch.zeros(1, 3, 0), form=form).shape == (2, 3, 0, 4)


@pytest.mark.parametrize("form", FORMS)
def test_float16_saturates(form):
    """Sums that are not normalised stay finite where they leave the range of float16."""
    ones = torch.ones(1, 1, 2000, 64, dtype=torch.float16)
    output = lion_attention(ones, ones, ones, torch.zeros(1, 1, 1), scale=1.0, form=form)
    assert (output == torch.finfo(torch.float16).max).all()


@pytest.mark.parametrize("form", ("attention", "recurrent", "chunk"))
def test_weights_are_the_mixing_matrix(form):
    query, key, value = tensors()
    value = value.double()
    log_decay, mask = F.logsigmoid(torch.randn(2, 3, 12)), torch.ones(2, 12)
    mask[1, 3:6] = 0
    kwargs = {"attention_mask": mask, "normalize": True, "form": form, "chunk_size": 5}
    output, weights = lion_attention(
        query.exp(), key.exp(), value, log_decay, need_weights=True, **kwargs
    )
    torch.testing.assert_close(weights @ value, output)
    sums = (
        mask[:, None].expand(-1, 3, -1).double()
    )  # rows of tokens sum to 1, those of padding are 0
    torch.testing.assert_close(weights.sum(-1), sums, atol=1e-4, rtol=0)
    assert (weights[1, :, :, 3:6] == 0).all()


def test_all_padding_gives_zeros():
    query, key, value = tensors()
    for form in FORMS:
        for normalize in (False, True):
            output = lion_attention(
                query, key, value, attention_mask=torch.zeros(2, 12), form=form, normalize=normalize
            )
            assert (output == 0).all()


def test_padding_may_hold_anything():
    """NaN and infinity in masked keys and values stay there."""
    query, key, value = tensors()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 4] = False
    query[:, :, 4], key[:, :, 4], value[:, :, 4] = float("nan"), float("nan"), float("inf")
    for form in FORMS:
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = lion_attention(
            *inputs, torch.full((1, 3, 1), -0.1), attention_mask=mask, form=form
        )
        output.sum().backward()
        assert all(torch.isfinite(x).all() for x in (output, *(x.grad for x in inputs)))
        assert (output[:, :, 4] == 0).all()


def test_dropout():
    query, key, value = tensors(200)
    dropped = lion_attention(query, key, value, dropout_p=0.5)
    assert not torch.allclose(dropped, lion_attention(query, key, value))
    with pytest.raises(
        ValueError, match=r"dropout_p=0.5 with form='chunk'.*attention_probs_dropout_prob"
    ):
        lion_attention(query, key, value, dropout_p=0.5, form="chunk")


def test_autocast_does_not_round_gates_or_states():
    query, key, value = tensors(200, dtype=torch.bfloat16)
    log_decay = F.logsigmoid(torch.randn(2, 3, 200))
    for form in FORMS:
        plain = lion_attention(query, key, value, log_decay, form=form)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(lion_attention(query, key, value, log_decay, form=form), plain)


def test_auto_picks_by_length_and_need():
    assert choose_form(197, 64).form == choose_form(100_000, 64).form == "chunk"
    assert choose_form(100_000, 64, scores=True).form == "attention"
    assert choose_form(32, 64, decays=False).form == "attention"
    assert choose_form(64, 64, decays=False).form == "chunk"
    assert choose_form(16, 64).form == "attention"
    assert choose_form(17, 64).form == choose_form(16, 64, device_type="cuda").form == "chunk"
    assert choose_form(16, 64, gradients=True).form == "chunk"


@pytest.mark.parametrize(
    "length, config, options, expected",
    [
        (
            4096,
            {},
            {},
            "4096 tokens on cpu: chunk form, because it is the fastest of all but short rows;"
            " 32 chunks of 128 tokens",
        ),
        (16, {}, {}, "16 tokens on cpu: attention form, because up to 16 tokens"),
        (197, {}, {}, "1 chunk of 197 tokens, because one chunk needs no states"),
        (1000, {}, {"device": "cuda"}, "4 chunks of 256 tokens"),
        (4096, {"chunk_size": 64}, {}, "64 chunks of 64 tokens, because chunk_size=64 is set"),
        (
            4096,
            {"attention_form": "recurrent"},
            {},
            "recurrent form, because attention_form='recurrent' is set",
        ),
        (
            4096,
            {"attention_form": "recurrent"},
            {"output_attentions": True},
            "attention form, because maps",
        ),
        (
            4096,
            {"attention_probs_dropout_prob": 0.1},
            {"training": True},
            "attention form, because maps and score dropout",
        ),
        (4096, {}, {"training": True}, "32 chunks"),
        (
            4096,
            {"mask_type": "lit"},
            {},
            "chunk form, because without decay one state of size head_dim x head_dim serves",
        ),
    ],
)
def test_explain(length, config, options, expected):
    assert expected in explain(LionConfig(**config), length, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"form": "chnk"}, f"form='chnk': expected one of {ATTENTION_FORMS}"),
        ({"chunk_size": 0}, "chunk_size=0: expected None or an integer of at least 1"),
        ({"chunk_size": 2.5}, "chunk_size=2.5: expected None or an integer of at least 1"),
        (
            {"log_decay": -0.1},
            "log_decay is float: expected None, a tensor, or a tuple of two tensors",
        ),
        ({"attention_mask": torch.full((2, 12), -1e9)}, "attention_mask has negative entries"),
        ({"dropout_p": 1.5}, "dropout_p=1.5: expected a probability in [0, 1)"),
        (
            {"query": torch.ones(2, 3, 12, 5)},
            "query (2, 3, 12, 5) and key (2, 3, 12, 4): expected the same shape",
        ),
        ({"query": torch.ones(3, 12, 4)}, "query (3, 12, 4)"),
        (
            {"value": torch.ones(2, 3, 11, 4)},
            "value (2, 3, 11, 4): expected (2, 3, 12, 'any head_dim')",
        ),
        ({"key": torch.ones(2, 3, 12, 4, dtype=torch.long)}, "expected floating-point tensors"),
        (
            {"attention_mask": torch.ones(2, 11)},
            "attention_mask (2, 11): expected (batch, length) = (2, 12)",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 12, 12)},
            "attention_mask (2, 1, 12, 12): expected (batch, length)",
        ),
        (
            {"seq_idx": torch.ones(3, 12)},
            "seq_idx (3, 12): expected (batch or 1, length) = (2, 12)",
        ),
        (
            {"order": torch.ones(2, 11)},
            "order (2, 11): expected (number of orders, length) = (K, 12)",
        ),
        (
            {"log_decay": torch.ones(3)},
            "log_decay (3,): expected (batch or 1, heads or 1, length or 1)",
        ),
        (
            {"log_decay": torch.ones(2, 4, 12)},
            "log_decay (2, 4, 12): expected (batch or 1, heads or 1, length or 1)",
        ),
        (
            {"log_decay": (torch.ones(2, 3, 12),)},
            "log_decay is a tuple of 1: expected the pair (left_to_right, right_to_left)",
        ),
        (
            {"log_decay": (torch.ones(2, 3, 12), torch.ones(2, 3, 11))},
            "log_decay (2, 3, 11): expected (batch or 1, heads or",
        ),
        (
            {"log_decay": torch.ones(2, 3, 12), "order": torch.ones(2, 12)},
            "log_decay (2, 3, 12): expected (orders, batch or 1",
        ),
        (
            {"log_decay": (torch.ones(2, 3, 12),) * 2, "order": torch.ones(2, 12)},
            "order with a pair of edge decays",
        ),
    ],
)
def test_errors_name_argument_value_and_legal_values(change, message):
    inputs = dict(zip(("query", "key", "value"), tensors())) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        lion_attention(**inputs)


def test_an_order_that_interleaves_documents_is_refused():
    query, key, value = tensors(4)
    options = {"seq_idx": torch.tensor([[0, 0, 1, 1]]), "order": torch.tensor([[0, 2, 1, 3]])}
    with pytest.raises(ValueError, match="interleaves the documents"):
        lion_attention(query, key, value, torch.zeros(1, 1, 3, 1), **options)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compile_without_graph_breaks(form):
    query, key, value = tensors(9, requires_grad=True)
    log_decay = F.logsigmoid(torch.randn(2, 3, 9)).requires_grad_()
    options = {
        "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
        "seq_idx": torch.tensor([[0] * 4 + [1] * 5]),
    }

    def function(*inputs):
        return lion_attention(*inputs, **options, form=form, chunk_size=4)

    inputs = (query, key, value, log_decay)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = (
        torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (function, compiled)
    )
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length, chunk_size", [(9, None), (9, 4), (9, 9)])
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_operators_keep_their_contract(length, chunk_size, batch, dtype):
    """Fake results have the shapes, types and strides of real ones, which compiled programs use.

    Tensors are laid out as in a model: (B, L, H, D), and gates (B, L, H).
    """
    shape = 2, length, 3, 4
    query, key, value, grad = (torch.rand(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
    edges = [-torch.rand(1, batch, length, 3).transpose(2, 3) for _ in range(2)]
    inputs = query, key, value, *edges, None
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for keep in (False, True):
        torch.library.opcheck(chunkwise_forward, (*inputs, 0.5, chunk_size, keep), **checks)
    states = chunkwise_forward(*inputs, 0.5, chunk_size, True)[1]
    backward = grad.to(states.dtype), *inputs, states, 0.5, chunk_size
    torch.library.opcheck(chunkwise_backward, backward, **checks)


class Operation(torch.nn.Module):
    def forward(self, query, key, value, log_decay):
        return lion_attention(query, key, value, log_decay, normalize=True)


def operands(length: int) -> tuple[torch.Tensor, ...]:
    return (*(x.exp() for x in tensors(length)), F.logsigmoid(torch.randn(2, 3, length)))


def test_export_for_any_length():
    length = torch.export.Dim("length", min=3, max=100_000)
    program = torch.export.export(Operation(), operands(40), dynamic_shapes=[{2: length}] * 4)
    for inputs in map(operands, (40, 3, 64, 128, 257, 1000)):
        torch.testing.assert_close(program.module()(*inputs), Operation()(*inputs))


@pytest.mark.slow
def test_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(Operation(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        compiled(*operands(40))
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in (operands(100), operands(257), operands(1000)):
            torch.testing.assert_close(compiled(*inputs), Operation()(*inputs))
