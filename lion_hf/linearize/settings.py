"""How a softmax model is copied into LION, and how the copy is taught."""

from dataclasses import dataclass, field, replace

from ..convert.errors import ConversionError
from .budget import IN_WORDS, seconds_of

DEFAULT_BUDGET = "30m"
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"
SHORTEST_WINDOW = 3  # tokens: the two special ones of a text, and one between them
DEFAULT_STEPS = 300  # of a stage, where only steps of others are given
# Peak learning rates of the stages: around these a run looks for its own.
LAYER_LEARNING_RATE, LEARNING_RATE, DOCUMENT_LEARNING_RATE = 1e-3, 1e-3, 1.5e-4

HELD_OUT = 8  # long documents to measure on
STEPS_OPTIONS = ("layer_steps", "steps", "document_steps")
RATE_OPTIONS = {  # by stage
    "layers": "layer_learning_rate",
    "answers": "learning_rate",
    "documents": "document_learning_rate",
}

# Width of the convolutions where none is asked for. This and the defaults of `Copying` came nearest
# to the source in the trials (benchmarks/results/linearize.md).
CONVOLUTIONS = {"text": 3, "image": 0}


@dataclass
class Distillation:
    """How a copy is taught by its source: data, and stages of training.

    In the first stage every layer's attention learns on its own to answer the teacher's hidden
    states as the teacher's attention does; the rest of the network waits. In the second the whole
    network learns the teacher's hidden states and its answers. A copy that takes longer texts than
    its source then learns from long documents, with the teacher's answers to their passages.
    """

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text: a document per line (.txt, .md), CSV, JSON lines or parquet files, also"
            " with .gz after the suffix, or patterns such as data/*.txt. Images: a parquet file."
        },
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "The same to measure on; if not given, a part of the text is held out."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub or a folder of one, in place of files."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration, such as en."}
    )
    train_split: str = field(
        default=TRAIN_SPLIT, metadata={"help": "Text: its split to learn from."}
    )
    validation_split: str = field(
        default=VALIDATION_SPLIT,
        metadata={"help": "Text: its split to measure on; the usual one may be missing."},
    )
    data_path: str | None = field(
        default=None,
        metadata={"help": "Images: folder with train/ and val/, validation/ or test/, by class."},
    )
    text_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "One or two columns of text, if their names do not tell."},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of labels, if its name does not tell."}
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Time for learning, such as 90s, 30m or 2h; 30m if no steps are given. Loading"
            " and writing come on top."
        },
    )
    layer_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the first stage, in place of a budget. Where other steps are given:"
            " 300 for images, none for text."
        },
    )
    layer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Its peak learning rate. A run with a budget finds it by short trials."},
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the second stage, in place of a budget; 300 where others are given."
        },
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Its peak learning rate, found likewise."}
    )
    document_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the budget for long documents, such as 0.2, of a copy that takes"
            " longer texts than its source (--max_position_embeddings)."
        },
    )
    document_steps: int | None = field(
        default=None,
        metadata={"help": "Steps on long documents in place of a budget, 0 by default."},
    )
    document_learning_rate: float | None = field(
        default=None, metadata={"help": "Their peak learning rate, found likewise."}
    )
    alpha: float = field(
        default=1.0,
        metadata={"help": "Weight of the teacher in the second stage; the rest is the labels'."},
    )
    tau: float = field(default=1.0, metadata={"help": "Temperature of the teacher's answers."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples per step. By default 64 images, or text of about 1024 tokens,"
            " of 256 if there is time for few steps."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per text: by default 256, or what the source takes if less."},
    )
    mask_probability: float = field(
        default=0.15, metadata={"help": "Share of masked tokens, for masked language models."}
    )
    validation_samples: int = field(
        default=2000, metadata={"help": "Samples to measure on, evenly spread."}
    )
    bf16: bool = field(
        default=False,
        metadata={"help": "Learn in bfloat16, also where that is not found to be faster."},
    )

    def __post_init__(self):
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):  # Python's users may name a single file
                setattr(self, name, [getattr(self, name)])
        self._check_data()
        if self.budget is not None:
            self.budget = str(self.budget)  # Python's users may give a number of seconds
            seconds_of(self.budget)
        for name in STEPS_OPTIONS:
            given = getattr(self, name)
            if given is not None and self.budget is not None:
                raise ValueError(
                    f"budget={self.budget!r} and {name}={given}: expected a budget, or numbers of"
                    " steps, not both"
                )
            if given is not None and given < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 0")
        for name in ("batch_size", "max_length", "validation_samples"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"{name}={given}: expected an integer of at least 1")
        for name in (*RATE_OPTIONS.values(), "tau"):
            given = getattr(self, name)
            if given is not None and not 0 < given < float("inf"):
                raise ValueError(f"{name}={given}: expected a positive number")
        share = self.document_share
        if isinstance(share, bool | str) or not 0 <= share < 1:
            raise ValueError(f"document_share={share!r}: expected a number from 0 to below 1")
        if self.document_learning_rate is not None and not self.wants_documents:
            raise ValueError(
                f"document_learning_rate={self.document_learning_rate}: expected none without"
                " document_share or document_steps"
            )
        if self.document_share and self.by_steps:
            raise ValueError(
                f"document_share={self.document_share}: expected none in a run by steps, where"
                " document_steps says how many are on long documents"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected a number in [0, 1]")
        if not 0 < self.mask_probability < 1:
            raise ValueError(
                f"mask_probability={self.mask_probability}: expected a number between 0 and 1"
            )
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns={self.text_columns}: expected one or two")

    def _check_data(self) -> None:
        """Raises ValueError for names of data that exclude each other or stand for nothing."""
        if self.train_file and self.dataset:
            raise ValueError(
                f"train_file={self.train_file} and dataset={self.dataset!r}: expected one of them"
            )
        usual = {"train_split": TRAIN_SPLIT, "validation_split": VALIDATION_SPLIT}
        for name, value in {"dataset_config": None, **usual}.items():
            if getattr(self, name) != value and not self.dataset:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected none without dataset")

    @property
    def has_data(self) -> bool:
        """Whether there is anything to learn from."""
        return bool(self.train_file or self.dataset or self.data_path)

    @property
    def wants_documents(self) -> bool:
        """Whether the copy is to learn from long documents."""
        return bool(self.document_share or self.document_steps)

    @property
    def by_steps(self) -> bool:
        """Whether the stages have numbers of steps, and not a time."""
        given = self.layer_steps, self.steps, self.document_steps or None  # 0 is its default
        return any(steps is not None for steps in given)

    @property
    def time(self) -> str:
        """The budget: the one that was given, else the usual one."""
        return self.budget or DEFAULT_BUDGET

    def stage_steps(self, layers: bool) -> dict[str, int]:
        """Steps of each stage, of a run that goes by them.

        Args:
            layers: whether the first stage is part of a run that does not name it.
        """
        given = {
            "layers": (self.layer_steps, DEFAULT_STEPS if layers else 0),
            "answers": (self.steps, DEFAULT_STEPS),
            "documents": (self.document_steps, 0),
        }
        return {stage: usual if own is None else own for stage, (own, usual) in given.items()}

    @property
    def usual_rates(self) -> dict[str, float]:
        """Learning rates of each stage for most models."""
        return {
            "layers": LAYER_LEARNING_RATE,
            "answers": LEARNING_RATE,
            "documents": DOCUMENT_LEARNING_RATE,
        }

    @property
    def given_rates(self) -> dict[str, float | None]:
        """Learning rates of each stage that were given; None for those to be found."""
        return {stage: getattr(self, name) for stage, name in RATE_OPTIONS.items()}

    def in_words(self, layers: bool) -> str:
        """How long a run is, with the argument of `stage_steps`."""
        if self.by_steps:
            steps = self.stage_steps(layers)
            words = [f"{steps[stage]} {IN_WORDS[stage]}" for stage in steps if steps[stage]]
            return f"learning, in steps: {', '.join(words) or 'none'}"
        usual = "" if self.budget else " (the default; --budget sets another)"
        return f"learning for {self.time}{usual}"


@dataclass
class Copying:
    """What the copy is to be: fields of LionConfig, and how its attention starts.

    Softmax attention is positive and its rows sum to one, so a positive feature map and division by
    the row sum are the nearest to it. It is also sharper than most products of features:
    `sharpness` multiplies queries and keys; it helps elu(x) + 1, which is then nearer to relu(x).
    """

    mask_type: str = field(default="selective", metadata={"help": "lit, decay or selective."})
    attention_form: str = field(
        default="auto", metadata={"help": "attention, chunk, recurrent or auto."}
    )
    patch_order: str = field(
        default="raster", metadata={"help": "raster, or snake for both S-curves of an image."}
    )
    feature_map: str = field(
        default="exponential",
        metadata={"help": "exponential, sqrt_softmax, elu_plus_one, normalized_silu or identity."},
    )
    conv_kernel_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of a convolution on queries, keys and values that the source lacks. It"
            " starts as the identity; 0 for none. Default: 3 for text, 0 for images."
        },
    )
    normalize_attention: bool = field(default=True, metadata={"help": "Divide by the row sum."})
    attention_norm: bool = field(
        default=False, metadata={"help": "A LayerNorm over the heads, which the source lacks."}
    )
    max_position_embeddings: int | None = field(
        default=None,
        metadata={
            "help": "Longest text of the copy in tokens, if that is to be above the source's."
            " Behind the source's window its positions are repeated."
        },
    )
    window: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that the source reads at once, whose positions are repeated behind"
            " them, with --max_position_embeddings or for long documents. Default: max_seq_length"
            " of a sentence-transformers folder, model_max_length of the tokenizer, or as many as"
            " the source takes."
        },
    )
    half_life: float = field(
        default=1000.0,
        metadata={
            "help": "Tokens in which gates halve at first; 0 for LION's own, which vary by head."
        },
    )
    sharpness: float = field(
        default=1.0,
        metadata={"help": "Factor of queries and keys, above 0; 2 suits elu_plus_one."},
    )
    seed: int = field(
        default=0, metadata={"help": "Of the gates' weights in LION-S, and of the distillation."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights for the model card; the source's if not given."},
    )

    def __post_init__(self):
        if self.half_life != 0 and not 1e-3 <= self.half_life < float("inf"):
            raise ConversionError(
                f"half_life={self.half_life}: expected 0, or a number of tokens of at least 0.001"
            )
        if self.window is not None and self.window < SHORTEST_WINDOW:
            raise ConversionError(
                f"window={self.window}: expected at least {SHORTEST_WINDOW} tokens"
            )
        if not 0 < self.sharpness < float("inf"):
            raise ConversionError(f"sharpness={self.sharpness}: expected a number above 0")
        if not 0 <= self.seed < 2**32 - 1:
            raise ConversionError(f"seed={self.seed}: expected an integer from 0 to {2**32 - 2}")

    def resolved(self, modality: str) -> "Copying":
        """The same with the default of "text" or "image" in place of None."""
        if self.conv_kernel_size is not None:
            return self
        return replace(self, conv_kernel_size=CONVOLUTIONS[modality])
