"""Random and absurd inputs of models, configurations and data.

They give the right answer, or an error that names what is wrong.

The right answer of a padded row is that of its tokens alone. Everything that was found on the way
is an `@example`.
"""

from dataclasses import fields

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.fuzzing import ABSURD, INF, NAN, fuzz, refused
from support.models import IMAGE_HEADS, TEXT_HEADS, image_config, inputs_of, model, text_config
from transformers import BertTokenizer

import lion_hf
from lion_hf import LionConfig, LionModel, explain, snake_orders
from lion_hf.auto import image_processor
from lion_hf.data.packing import pack
from lion_hf.modeling.configuration_lion import CHOICES

# Models


@pytest.fixture(scope="module")
def networks():
    """One small model a head and family, built on first use."""
    made = {}

    def get(head: str, family: str):
        if (head, family) not in made:
            image = head in IMAGE_HEADS
            made[head, family] = model(
                head, image_config(family, "snake") if image else text_config(family)
            )
        return made[head, family]

    return get


def numbers(low: int = -3, high: int = 130):
    """Tensors of many shapes for ids, masks, positions and labels of 2 rows of 7 tokens."""
    shapes = st.sampled_from(
        (
            (2, 7),
            (2, 7),
            (2, 7),
            (1, 7),
            (7,),
            (2, 7, 1),
            (2, 1),
            (2, 6),
            (2, 0),
            (0, 7),
            (3, 7),
            (14,),
            (),
        )
    )
    types = st.sampled_from(
        (
            torch.int64,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.bool,
            torch.float32,
            torch.complex64,
        )
    )

    def make(shape, dtype, seed, low, span):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(low, low + span + 1, shape, generator=generator).to(dtype)

    return st.builds(
        make,
        shapes,
        types,
        st.integers(0, 99),
        st.integers(low, 40),
        st.sampled_from((0, 1, 2, 50, high, 10**9)),
    )


TEXT = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "positions",
    "pixel_values",
)
EMBEDDINGS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.sampled_from(((2, 7, 24), (2, 7, 24), (2, 7, 1), (2, 7, 23), (7, 24), (2, 0, 24))),
    st.sampled_from((torch.float32, torch.float64, torch.float16, torch.int64, torch.complex64)),
    st.sampled_from((0.5, -3.0, 1e4, NAN, INF)),
)
IDS = torch.arange(14).view(2, 7) + 5
ADDED = torch.tensor([[0.0] * 4 + [-1e9] * 3] * 2)


def mostly(fitting, other):
    """Three of four draws fit."""
    return st.integers(0, 3).flatmap(lambda n: other if n == 0 else fitting)


def integers(
    low: int, high: int, shape: tuple[int, ...] = (2, 7), dtype: torch.dtype = torch.int64
):
    """Tensors that fit, of integers from `low` to `high`."""

    def make(seed):
        return torch.randint(
            low, high + 1, shape, generator=torch.Generator().manual_seed(seed)
        ).to(dtype)

    return st.builds(make, st.integers(0, 999))


MASKS = integers(0, 1) | integers(0, 1, dtype=torch.bool) | integers(0, 1, dtype=torch.float32)


@fuzz("texts")
@given(
    st.sampled_from(TEXT_HEADS + ("Model",)),
    st.sampled_from(("lit", "selective")),
    st.fixed_dictionaries(
        {},
        optional={
            "input_ids": mostly(integers(0, 98), numbers() | st.none() | ABSURD),
            "attention_mask": mostly(
                MASKS, numbers(high=1) | st.just(ADDED) | st.just(ADDED.long()) | ABSURD
            ),
            "token_type_ids": mostly(integers(0, 1), numbers(high=2)),
            "position_ids": mostly(st.just(torch.arange(7).expand(2, 7)), numbers()),
        },
    )
    | st.fixed_dictionaries(
        {"input_ids": st.none() | integers(0, 98, (1, 7))},
        optional={
            "inputs_embeds": EMBEDDINGS,
            "seq_idx": numbers(),
            "cu_seq_lens_q": numbers() | st.just(torch.tensor([0, 3, 7])),
        },
    ),
)
@example("Model", "lit", {"input_ids": -IDS})  # an index error without a name
@example("Model", "lit", {"input_ids": IDS + 99})
@example("Model", "lit", {"input_ids": IDS[0]})
@example("Model", "lit", {"input_ids": IDS.short()})
@example("Model", "lit", {"token_type_ids": IDS})
@example("Model", "lit", {"token_type_ids": IDS[:, :1] * 0})  # was broadcast
@example("MaskedLM", "selective", {"attention_mask": ADDED})  # lost the real tokens
@example("MaskedLM", "selective", {"attention_mask": ADDED.long()})
@example("Model", "selective", {"position_ids": IDS.float()})
@example(
    "Model", "selective", {"input_ids": None, "inputs_embeds": torch.ones(2, 7, 1)}
)  # was broadcast
@example("Model", "selective", {"input_ids": None, "inputs_embeds": torch.ones(2, 7, 24).double()})
@example("MultipleChoice", "lit", {"input_ids": IDS[:, :0]})
@example("SequenceClassification", "lit", {"attention_mask": torch.zeros(2, 7)})
@example("SequenceClassification", "lit", {"attention_mask": torch.ones(2, 6), "position_ids": IDS})
def test_texts(networks, head, family, changes):
    network = networks(head, family)
    inputs = {"input_ids": IDS, **changes}
    if head == "MultipleChoice":
        inputs = {
            k: x[None] if torch.is_tensor(x) and not k.startswith("cu") else x
            for k, x in inputs.items()
        }
    outcome = []
    with torch.no_grad():
        if refused(
            lambda: outcome.append(network(**inputs)[0]), "|".join(TEXT) + "|batch of shape"
        ):
            return
        found = outcome[0]
        embeds = changes.get("inputs_embeds")
        assert found.isfinite().all() or not embeds.isfinite().all()
        mask = changes.get("attention_mask")
        if (
            mask is None
            or embeds is not None
            or len(changes) > 1
            or head not in ("MaskedLM", "TokenClassification")
        ):
            return
        for row, keep in enumerate(mask != 0):  # the right answer is that of the tokens alone
            if keep.any():
                alone = network(input_ids=inputs["input_ids"][row : row + 1, keep])[0]
                torch.testing.assert_close(found[row : row + 1, keep], alone, atol=1e-4, rtol=1e-4)


LABELS = mostly(integers(0, 2) | integers(0, 98) | integers(-100, -99), numbers(low=-101) | ABSURD)


@fuzz("labels")
@given(st.sampled_from(TEXT_HEADS), st.booleans(), LABELS, st.booleans())
@example("MaskedLM", False, torch.ones(7, 2, dtype=torch.long), False)  # was taken for (2, 7)
@example("MaskedLM", True, torch.ones(2, 6, dtype=torch.long), False)
@example("MaskedLM", False, torch.full((2, 7), -100), False)  # the loss was NaN
@example("TokenClassification", False, torch.full((2, 7), -100), False)
@example("QuestionAnswering", False, torch.tensor([99, 99]), False)
@example("QuestionAnswering", False, torch.tensor([-1, 3]), False)  # counted as 0
@example("SequenceClassification", False, torch.tensor([0, 3]), False)
@example("SequenceClassification", False, torch.tensor([0.0, 1.0]), False)
@example("SequenceClassification", False, torch.tensor([0, 1]), True)
def test_labels(networks, head, sparse, labels, narrow):
    network = networks(head, "selective")
    network.config.sparse_prediction, network.config.problem_type = sparse, None
    inputs = inputs_of(head, network.config, 2, 7)
    names = ("start_positions", "end_positions") if head == "QuestionAnswering" else ("labels",)
    good = {name: inputs[name] for name in names}
    if narrow and torch.is_tensor(labels) and labels.dim() > 0:
        labels = (
            labels.flatten()[:2].remainder(3).to(labels.dtype)
            if not labels.is_complex()
            else labels
        )
    outcome = []
    with torch.no_grad():
        bad = refused(
            lambda: outcome.append(network(**inputs | dict.fromkeys(names, labels))),
            "|".join(names),
        )
        if not bad and labels is not None:
            loss = outcome[0].loss
            assert loss.isfinite() and labels.dim() > 0
            counted = (labels != -100) & ((labels < 7) | (head != "QuestionAnswering"))
            assert (
                (loss == 0) == (not counted.any())
                or labels.is_floating_point()
                or head == "MultipleChoice"
            )
        if bad:
            assert network.config.problem_type is None  # a mistake decides nothing
            assert network(**inputs | good).loss.isfinite()


PIXELS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.sampled_from(
        (
            (2, 3, 16, 16),
            (2, 3, 8, 20),
            (1, 3, 4, 4),
            (0, 3, 16, 16),
            (2, 1, 16, 16),
            (2, 4, 16, 16),
            (3, 16, 16),
            (2, 3, 15, 16),
            (2, 3, 0, 16),
            (2, 3, 16, 0),
            (1, 2, 3, 16, 16),
            (),
        )
    ),
    st.sampled_from(
        (
            torch.float32,
            torch.float32,
            torch.float64,
            torch.float16,
            torch.uint8,
            torch.int64,
            torch.complex64,
        )
    ),
    st.sampled_from((0.5, -1e4, NAN, INF)),
)
IMAGE_LABELS = (
    numbers(low=-101)
    | ABSURD
    | st.sampled_from((torch.ones(2, 3) / 3, torch.ones(2, 4) / 4, torch.tensor([0, 2])))
)


IMAGES = st.builds(
    lambda n: torch.randn(2, 3, 16, 4 * n, generator=torch.Generator().manual_seed(n)),
    st.integers(1, 9),
)
MASKED = mostly(integers(0, 1, (2, 16)) | integers(0, 1, (2, 16), torch.bool), numbers(high=1))


@fuzz("images")
@given(
    st.sampled_from(IMAGE_HEADS),
    mostly(IMAGES | st.just(torch.ones(2, 3, 16, 16)), PIXELS | ABSURD),
    st.fixed_dictionaries(
        {},
        optional={"labels": mostly(integers(0, 2, (2,)), IMAGE_LABELS), "bool_masked_pos": MASKED},
    ),
)
@example(
    "ImageClassification", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), {}
)  # not normalised, and taken as it was
@example("ImageClassification", torch.ones(2, 3, 16, 16), {"labels": torch.tensor([0, 9])})
@example(
    "ImageClassification", torch.ones(2, 3, 16, 16), {"labels": torch.ones(2, 3, dtype=torch.long)}
)
@example("ImageClassification", torch.full((2, 3, 16, 16), NAN), {})
@example("MaskedImageModeling", torch.ones(2, 3, 16, 16), {"bool_masked_pos": torch.ones(2, 4, 4)})
@example("MaskedImageModeling", torch.ones(2, 3, 16, 16), {"bool_masked_pos": [[1] * 16] * 2})
def test_images(networks, head, pixels, changes):
    network, outcome = networks(head, "selective"), []
    if head == "MaskedImageModeling":
        changes = {name: x for name, x in changes.items() if name != "labels"}
    elif isinstance(
        changes.get("bool_masked_pos"), torch.Tensor
    ):  # the classifier has no mask token
        assert refused(
            lambda: network(pixel_values=pixels, **changes), "bool_masked_pos|pixel|image"
        )
        changes = {name: x for name, x in changes.items() if name != "bool_masked_pos"}
    with torch.no_grad():
        call = lambda: outcome.append(network(pixel_values=pixels, **changes))  # noqa: E731
        if refused(call, "pixel|image|labels|bool_masked_pos"):
            return
        found = outcome[0].get("logits", outcome[0].get("reconstruction"))
        assert (
            found.isfinite().all() == pixels.isfinite().all() and found.shape[0] == pixels.shape[0]
        )
        if pixels.isfinite().all() and len(pixels) and outcome[0].loss is not None:
            assert outcome[0].loss.isfinite()
        if len(pixels) == 2:  # what is wrong with one image stays there
            good = torch.randn(1, *pixels.shape[1:], dtype=pixels.dtype)
            both = network(pixel_values=torch.cat([pixels[:1], good]))[0]
            torch.testing.assert_close(
                both[1:], network(pixel_values=good)[0], atol=1e-4, rtol=1e-4
            )


def test_one_row_that_is_not_finite_does_not_reach_the_others(networks):
    network = networks("MaskedLM", "selective")
    embeds, mask = torch.randn(2, 10, 24), torch.ones(2, 10)
    embeds[0, 0], mask[1, 5:] = NAN, 0
    found = network(inputs_embeds=embeds, attention_mask=mask).logits
    assert found[0].isnan().all()
    torch.testing.assert_close(
        found[1:, :5], network(inputs_embeds=embeds[1:, :5]).logits, atol=1e-4, rtol=1e-4
    )


# Configurations, data and helpers

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 20,
    "max_position_embeddings": 16,
    "image_size": 16,
    "patch_size": 8,
}
NAMES = sorted({field.name for field in fields(LionConfig)} & LionConfig.__annotations__.keys()) + [
    "num_labels",
    "id2label",
]
VALUES = st.sampled_from(
    (
        -1,
        0,
        1,
        2,
        7,
        10**9,
        10**30,
        True,
        "x",
        "3",
        1.5,
        1e-320,
        NAN,
        INF,
        -INF,
        None,
        [],
        [1],
        [16, -8],
        (16, 16),
        [16, 1.5],
        {},
        {"a": 1},
        {0: "no", 1: "yes"},
    )
)
FITTING = {"bool": (True, False), "float": (0.5, 0.1, 1e-6), "int": (1, 2, 4, 8, 16)}


def value_of(name: str):
    """Values of a field, most of them of its type."""
    kind = str(LionConfig.__annotations__.get(name))
    words = CHOICES.get(name) or next((FITTING[word] for word in FITTING if word in kind), None)
    return mostly(st.sampled_from(words), VALUES) if words else VALUES


CHANGES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: value_of(name) for name in names})
)


@fuzz("configurations")
@given(st.sampled_from(("text", "image")), CHANGES)
@example("text", {"num_labels": 10**12})  # filled the memory
@example("text", {"num_labels": -1})
@example("text", {"vocab_size": -1})
@example("text", {"type_vocab_size": 0})
@example("text", {"pad_token_id": -1})
@example("text", {"pad_token_id": 20})
@example("image", {"layer_norm_eps": NAN})
@example("image", {"layer_norm_eps": -1.0})
@example("image", {"initializer_range": INF})
@example("text", {"id2label": [1]})
def test_configurations(modality, changes):
    outcome = []

    def build():
        outcome.append(LionConfig(**{"modality": modality, **SMALL, **changes}))

    if refused(build, "|".join(changes)) or any(
        isinstance(x, int) and abs(x) > 100 for x in changes.values()
    ):
        return
    config = outcome[0]
    network = LionModel(config).eval()
    if config.modality == "text":
        inputs = {
            "input_ids": torch.zeros(1, min(4, config.max_position_embeddings), dtype=torch.long)
        }
    else:
        inputs = {
            "pixel_values": torch.ones(
                1, config.num_channels, config.patch_size, 2 * config.patch_size
            )
        }
    with torch.no_grad():
        assert network(**inputs).last_hidden_state.isfinite().all()


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b")
COLUMN = (
    numbers()
    | ABSURD
    | st.sampled_from(([], [9], [-2, 5], "abc", ["a"], [[1], [2, 3]], [1.5], [10**30]))
)
DOCUMENTS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from((1, 1, 1, 0)), st.integers(0, 1)),
        min_size=1,
        max_size=8,
    ).map(
        lambda rows: dict(
            zip(("input_ids", "attention_mask", "token_type_ids"), map(list, zip(*rows)))
        )
    ),
    min_size=1,
    max_size=5,
)
BROKEN = st.lists(
    st.dictionaries(st.sampled_from(("input_ids", "attention_mask", "token_type_ids")), COLUMN),
    max_size=3,
)


@fuzz("collator")
@given(mostly(DOCUMENTS, BROKEN), mostly(st.integers(8, 12), VALUES))
@example([{"input_ids": [2, 5, 99, 3]}], 8)  # ids that the tokenizer does not have
@example([{"input_ids": [1.5, 2.0]}], 8)  # was cut to 1 and 2
@example([{"input_ids": [2, 5], "attention_mask": [NAN, 0]}], 8)
@example([{"input_ids": [[1, 2], [3, 4]]}], 8)
@example([{"input_ids": None}], 8)
@example([{"input_ids": [2, 5, 3]}], 10**30)
def test_packing(examples, row_length):
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})
    row_length = 8 if isinstance(row_length, int) and row_length == 10**9 else row_length
    outcome = []

    def collate():
        outcome.append(
            lion_hf.DataCollatorForPackedLanguageModeling(tokenizer, row_length=row_length)(
                examples
            )
        )

    if refused(collate, "row_length|document|empty list"):
        return
    batch = outcome[0]
    ids = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])[
        batch["attention_mask"] == 1
    ]
    columns = [
        (torch.as_tensor(row["input_ids"]), torch.as_tensor(row.get("attention_mask", True)))
        for row in examples
    ]
    kept = torch.cat([x[mask.expand_as(x) != 0] for x, mask in columns])
    assert (
        sorted(ids.tolist()) == sorted(kept.tolist()) and batch["input_ids"].shape[1] == row_length
    )


@fuzz("helpers")
@given(ABSURD, ABSURD)
@example("cuda:0", 4)  # was answered as for an unknown device
@example("banana", 4)
@example("cpu", -5)
def test_helpers(value, other):
    config = LionConfig()
    outcome = []
    if not refused(lambda: outcome.append(explain(config, other, value)), "config|length|device"):
        assert outcome[0].startswith(f"{other} tokens on {torch.device(value).type}: ")
    assert refused(lambda: explain(value, 4), "config")
    small = not isinstance(value, int) or value < 100
    if small and not refused(lambda: outcome.append(snake_orders(value, 3)), "rows"):
        assert outcome[-1].sort(-1).values.tolist() == [list(range(3 * value + 1))] * 2
    if not refused(lambda: outcome.append(image_processor(16, value)), "crop"):
        assert 0 < value <= 1
    if not refused(lambda: outcome.append(image_processor(value)), "image_size"):
        assert outcome[-1].crop_size["height"] == value >= 1
    if not refused(lambda: outcome.append(pack([1, 2], value)), "row_length"):
        assert value >= 2 and sorted(sum(outcome[-1], [])) == [0, 1]
