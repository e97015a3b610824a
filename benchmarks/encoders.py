"""The suites of whole encoders for run.py: forward passes, training steps, and peaks of memory."""

import argparse
import multiprocessing
from collections.abc import Iterator
from functools import partial

import torch
from measure import TOLERANCE, Group, Row, assert_close, peak_memory
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lion_hf import LionConfig, LionForImageClassification, LionForMaskedLM, LionModel
from lion_hf.modeling.configuration_lion import FORMS

FAMILIES = {"LION-lit": "lit", "LION-D": "decay", "LION-S": "selective"}
WORDS = 30_522
MODEL_ROWS = {128: 8, 512: 2, 1024: 1, 4096: 1, 16_384: 1}  # length -> rows of the batch
TRAIN_ROWS = {128: 8, 512: 2, 2048: 1}
# A GPU waits for Python where a step has few tokens.
CUDA_MODEL_ROWS = {128: 128, 512: 32, 2048: 8, 8192: 2, 16_384: 1}
CUDA_TRAIN_ROWS = {128: 128, 512: 32, 2048: 8, 8192: 2}
MEMORY_LENGTHS = (8192, 16_384, 32_768, 65_536)
CUDA_MEMORY_LENGTHS = (8192, 16_384, 32_768, 65_536, 262_144, 1_000_000)
TRAINING_MEMORY_LENGTHS = (1024, 4096)
CUDA_TRAINING_MEMORY_LENGTHS = (1024, 4096, 8192, 16_384, 32_768, 65_536)
# Softmax attention is quadratic: beyond these lengths a call takes minutes on a CPU.
LONGEST_PEER = {"cpu": 16_384, "cuda": 65_536}
LONGEST_MODERNBERT = 4096
# Autograd keeps the recurrent form's state of every token: training is checked with it on few and
# short rows.
ROWS_CHECKED, LONGEST_RECURRENT = 8, {"cpu": 128, "cuda": 197}


def model_suite(args: argparse.Namespace) -> Iterator:
    """Whole encoders of base size without gradients: text, images, half-padded text."""
    for length, batch in _rows_of(args, MODEL_ROWS, CUDA_MODEL_ROWS).items():
        yield partial(text_group, args, length, batch)
    yield partial(image_group, args)
    yield partial(padding_group, args)


def text_group(args, length: int, batch: int) -> Group:
    size = sizes(args)
    with torch.device(args.device):
        models = {
            name: LionModel(LionConfig(mask_type=t, max_position_embeddings=length, **size))
            for name, t in FAMILIES.items()
        }
        baseline = "BERT" if length <= LONGEST_PEER[args.device] else None
        if baseline:
            models[baseline] = BertModel(
                BertConfig(max_position_embeddings=length, attn_implementation="sdpa", **size)
            )
        if length <= LONGEST_MODERNBERT:
            # its MLPs have three matrices, so that 2/3 of the width is the same size
            size["intermediate_size"] = size["intermediate_size"] * 2 // 3
            models["ModernBERT"] = ModernBertModel(
                ModernBertConfig(pad_token_id=0, attn_implementation="sdpa", **size)
            )
    inputs = {"input_ids": torch.randint(1000, WORDS, (batch, length), device=args.device)}
    return _model_group(
        args, "text encoder", length, f"forward, {batch} x {length}", models, baseline, inputs
    )


def image_group(args) -> Group:
    with torch.device(args.device):
        models = {name: LionModel(config) for name, config in _image_configs(args).items()}
        models["ViT"] = ViTModel(ViTConfig(attn_implementation="sdpa", **_image_sizes(args)))
    batch = 2 if args.quick else 8 if args.device == "cpu" else 128
    inputs = {
        "pixel_values": torch.randn(
            batch, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype)
        )
    }
    return _model_group(
        args, "image encoder", 197, f"forward, {batch} images of 224 px", models, "ViT", inputs
    )


def _image_configs(args) -> dict[str, LionConfig]:
    """The families in raster order, and those with gates along both S-curves."""
    orders = [*((name, "raster") for name in FAMILIES), ("LION-D", "snake"), ("LION-S", "snake")]
    configs = {}
    for name, order in orders:
        config = LionConfig(
            modality="image", mask_type=FAMILIES[name], patch_order=order, **_image_sizes(args)
        )
        configs[name if order == "raster" else f"{name} snake"] = config
    return configs


def _image_sizes(args) -> dict[str, int]:
    size = sizes(args) | {"image_size": 224, "patch_size": 16}
    del size["vocab_size"]
    return size


def _model_group(args, suite, length, what, models, baseline, inputs) -> Group:
    models = {
        name: model.to(args.device, getattr(torch, args.dtype)).eval()
        for name, model in models.items()
    }
    run = {name: torch.compile(model) if args.compile else model for name, model in models.items()}

    def check() -> None:
        """The forms of every LION model give the same.

        Where rows are long, that is LION-lit token by token, the others in chunks.
        """
        for name, model in models.items():
            if not isinstance(model, LionModel):
                continue
            output = run[name](**inputs).last_hidden_state
            for form in (
                ("recurrent", "chunk")
                if length <= 512
                else ("recurrent" if name == "LION-lit" else "chunk",)
            ):
                model.config.attention_form, model.config.chunk_size = form, 100
                expected = model(**inputs).last_hidden_state.double()
                model.config.attention_form, model.config.chunk_size = "auto", None
                assert_close(
                    output,
                    expected,
                    10 * TOLERANCE[getattr(torch, args.dtype)],
                    f"{name}, {form} form, {what}",
                )

    functions = {name: torch.no_grad()(partial(model, **inputs)) for name, model in run.items()}
    return Group(suite, length, what, functions, baseline, torch.no_grad()(check))


def padding_group(args) -> Group:
    """The same model on a batch without padding, and on a padded one.

    Of the second, half the tokens are padding, at varied lengths.
    """
    batch, length = (8, 512) if not args.quick else (4, 64)
    config = LionConfig(mask_type="selective", max_position_embeddings=length, **sizes(args))
    model = LionModel(config).to(args.device, getattr(torch, args.dtype)).eval()
    input_ids = torch.randint(1000, WORDS, (batch, length), device=args.device)
    real = torch.linspace(
        length // batch, length - length // batch, batch, device=args.device
    ).round()  # half of all
    mask = (torch.arange(length, device=args.device) < real[:, None]).long()
    run = torch.compile(model) if args.compile else model
    full = partial(run, input_ids, torch.ones_like(mask))
    padded = partial(run, input_ids, mask)

    def check() -> None:
        output = padded().last_hidden_state
        for row in range(batch):
            alone = model(input_ids[row : row + 1, mask[row] == 1]).last_hidden_state
            close = 10 * TOLERANCE[getattr(torch, args.dtype)]
            assert_close(
                output[row : row + 1, mask[row] == 1], alone.double(), close, f"padded row {row}"
            )

    functions = {"full": torch.no_grad()(full), "half of it padding": torch.no_grad()(padded)}
    return Group(
        "padding",
        length,
        f"LION-S forward, {batch} x {length}",
        functions,
        "full",
        torch.no_grad()(check),
    )


def train_suite(args: argparse.Namespace) -> Iterator:
    """Training steps of base size with AdamW.

    Text is trained without dropout of scores, which would need the attention form.
    """
    for length, batch in _rows_of(args, TRAIN_ROWS, CUDA_TRAIN_ROWS).items():
        yield partial(train_text_group, args, length, batch)
    if args.device == "cuda" or args.quick:
        yield partial(train_image_group, args)


def train_text_group(args, length: int, batch: int) -> Group:
    size = sizes(args) | {"max_position_embeddings": length, "attention_probs_dropout_prob": 0.0}
    with torch.device(args.device):
        models = {
            name: LionForMaskedLM(LionConfig(mask_type=t, **size)) for name, t in FAMILIES.items()
        }
        models["LION-S, sparse prediction"] = LionForMaskedLM(
            LionConfig(sparse_prediction=True, **size)
        )
        models["LION-S, sparse prediction"].load_state_dict(models["LION-S"].state_dict())
        models["BERT"] = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **size))
    input_ids = torch.randint(1000, WORDS, (batch, length), device=args.device)
    labels = torch.where(torch.rand(batch, length, device=args.device) < 0.3, input_ids, -100)
    inputs = {"input_ids": input_ids, "labels": labels}
    return _train_group(
        args, "masked-LM training", length, f"step, {batch} x {length}", models, "BERT", inputs
    )


def train_image_group(args) -> Group:
    with torch.device(args.device):
        models = {
            name: LionForImageClassification(config)
            for name, config in _image_configs(args).items()
        }
        models["ViT"] = ViTForImageClassification(
            ViTConfig(attn_implementation="sdpa", **_image_sizes(args))
        )
    batch = 2 if args.quick else 128
    labels = torch.randint(2, (batch,), device=args.device)
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224, device=args.device), "labels": labels}
    return _train_group(
        args, "image training", 197, f"step, {batch} images of 224 px", models, "ViT", inputs
    )


def _train_group(args, suite, length, what, models, baseline, inputs) -> Group:
    models = {name: model.to(args.device).train() for name, model in models.items()}
    run = {name: torch.compile(model) if args.compile else model for name, model in models.items()}

    def loss_of(model, inputs) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return model(**inputs).loss

    def check() -> None:
        """The gradient of words or patches is the same in chunk and attention form.

        So it is with sparse prediction; all without dropout.
        """
        some, expected = {name: x[:ROWS_CHECKED] for name, x in inputs.items()}, {}
        for name, model in models.items():
            if name != baseline:
                for form in (
                    FORMS if length <= LONGEST_RECURRENT[args.device] else ("attention", "chunk")
                ):
                    model.eval().config.attention_form = form
                    weight = model.lion.get_input_embeddings().weight
                    gradient = torch.autograd.grad(loss_of(run[name], some), weight)[0]
                    first = expected.setdefault(name.split(",")[0], gradient.double())
                    assert_close(
                        gradient,
                        first,
                        1e-3 if args.dtype == "float32" else 0.1,
                        f"gradient of {name}, {form} form",
                    )
                model.train().config.attention_form = "auto"

    def step(model, optimizer) -> None:
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    functions = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        functions[name] = partial(step, run[name], optimizer)
    return Group(suite, length, what, functions, baseline, check)


def memory_suite(args: argparse.Namespace) -> Iterator:
    """Peak above the weights of a forward pass of text encoders of base size."""
    lengths = args.lengths or (MEMORY_LENGTHS if args.device == "cpu" else CUDA_MEMORY_LENGTHS)
    for length in lengths[-1 if args.quick else 0 :]:
        names = [*FAMILIES, *(["BERT"] if length <= LONGEST_PEER[args.device] else [])]
        yield partial(memory_row, args, "memory", "forward, one row", peak_of_model, names, length)


def training_memory_suite(args: argparse.Namespace) -> Iterator:
    """Peak memory of a masked-LM forward and backward pass above the weights.

    30 % of the tokens are labelled. The gradients of the weights count.
    """
    names = [
        "LION-S",
        "LION-S, sparse prediction",
        "LION-S, sparse prediction, checkpointing",
        "BERT",
    ]
    lengths = args.lengths or TRAINING_MEMORY_LENGTHS
    if args.device == "cuda":
        names = ["LION-lit", "LION-D", *names]
        lengths = args.lengths or CUDA_TRAINING_MEMORY_LENGTHS
    for length in lengths[-1 if args.quick else 0 :]:
        yield partial(
            memory_row,
            args,
            "memory of training",
            "forward + backward, one row",
            peak_of_training,
            names,
            length,
        )


def memory_row(args, suite: str, what: str, peak, names: list[str], length: int) -> Row:
    """The peak of every model.

    On the CPU each is measured in a process of its own, because a process's memory only grows; on a
    GPU torch itself counts, from nothing each time.
    """
    values = {}
    for name in names[:: len(names) - 1] if args.quick else names:
        if args.device == "cpu":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                values[name] = pool.apply(peak, (args, name, length))
            continue
        try:
            values[name] = peak(args, name, length)
        except torch.OutOfMemoryError:
            print(f"{suite}, {name}, {length} tokens: more than this GPU has")
        torch.cuda.empty_cache()
    return Row(suite, length, what, None, values)


def peak_of_model(args, name: str, length: int) -> float:
    """MiB above the weights and inputs."""
    size = sizes(args) | {"max_position_embeddings": length}
    with torch.device(args.device):
        if name == "BERT":
            model = BertModel(BertConfig(attn_implementation="sdpa", **size))
        else:
            model = LionModel(LionConfig(mask_type=FAMILIES[name], **size))
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    model = torch.compile(model) if args.compile else model
    input_ids = torch.randint(1000, WORDS, (1, length), device=args.device)
    with torch.no_grad():
        model(input_ids[:, :256])  # libraries take what they need once
        return peak_memory(lambda: model(input_ids).last_hidden_state, args.device)


def peak_of_training(args, name: str, length: int) -> float:
    """MiB above the weights and inputs, without dropout of scores."""
    size = sizes(args) | {"max_position_embeddings": length, "attention_probs_dropout_prob": 0.0}
    with torch.device(args.device):
        if name == "BERT":
            model = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **size))
        else:
            family = FAMILIES[name.split(",")[0]]
            model = LionForMaskedLM(
                LionConfig(mask_type=family, sparse_prediction="sparse" in name, **size)
            )
    model = model.to(args.device, getattr(torch, args.dtype)).train()
    if "checkpointing" in name:
        model.gradient_checkpointing_enable()
    input_ids = torch.randint(1000, WORDS, (1, length), device=args.device)
    labels = torch.where(torch.rand(1, length, device=args.device) < 0.3, input_ids, -100)
    model(input_ids=input_ids[:, :64], labels=labels[:, :64])  # libraries take what they need once
    return peak_memory(
        lambda: model(input_ids=input_ids, labels=labels).loss.backward(), args.device
    )


def sizes(args) -> dict[str, int]:
    """Base size, as BERT's and ViT's; with --quick a small one."""
    width, depth, heads = (64, 2, 4) if args.quick else (768, 12, 12)
    return {
        "vocab_size": WORDS,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def _rows_of(args, cpu: dict[int, int], cuda: dict[int, int]) -> dict[int, int]:
    rows = cpu if args.device == "cpu" else cuda
    return {length: rows.get(length, 1) for length in args.lengths or rows}
