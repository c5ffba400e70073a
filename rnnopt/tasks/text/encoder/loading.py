"""Pretrained encoders: finding and reading them, and making a small one.

Only this module imports `transformers`.

Shapes: B batch, S sequence (tokens), C ways (classes), H hidden size.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError

try:
    import huggingface_hub
    import transformers
    from transformers.modeling_outputs import SequenceClassifierOutput
except ImportError as error:
    raise ImportError('text encoders need transformers: pip install "rnnopt[meta]"') from error

Pooling = Literal["model", "mean"]

# The files that are downloaded from the hub: no pickles and no code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
OTHER_FOLDERS = "[!1]*/*"  # all but 1_Pooling, where sentence-transformers says how it pools
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class MeanPooled(nn.Module):
    """A linear head on the mean of the encoder's last hidden states, without padding.

    Sentence encoders are trained for this mean. Their [CLS] pooler is often untrained.

    Args:
        encoder: a model as `transformers.AutoModel` loads it.
        ways: C, the number of classes of the head.
    """

    def __init__(self, encoder: Any, ways: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.num_labels = ways
        self.encoder = encoder
        rate = getattr(self.config, "hidden_dropout_prob", 0.0)
        self.dropout = nn.Dropout(getattr(self.config, "classifier_dropout", None) or rate)
        self.classifier = nn.Linear(self.config.hidden_size, ways)

    @property
    def base_model(self) -> Any:
        """The encoder, under the name that `transformers` gives it."""
        return self.encoder

    def _init_weights(self, module: nn.Module) -> None:
        self.encoder._init_weights(module)

    def forward(self, **batch: Tensor) -> Any:
        """Logits (B, C) from what `TokenCache.batch` returns, as `.logits` of the output."""
        states = self.encoder(**batch).last_hidden_state.float()  # (B, S, H)
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)  # (B, S, 1)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)  # (B, H)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def read_encoder(
    encoder: str | Path, pooling: Pooling, ways: int, attention: str | None
) -> tuple[Any, Any, set[str]]:
    """Read a text classifier in float32 from safetensors, without running code of the model.

    Args:
        encoder: a folder, or a name on the Hugging Face hub (the local cache comes first).
        pooling: see `rnnopt.tasks.text.classifier.Classifier.load`.
        ways: C, the number of classes of its head.
        attention: the `attn_implementation` of transformers; None takes its default.

    Returns:
        The model, its tokenizer, and the names of the parameters that the files lack.

    Raises:
        InputError: the encoder can't be found, read or used.
    """
    folder = find_folder(encoder)
    with silence():
        model, absent = _read_model(folder, encoder, pooling, ways, attention)
        return model, _read_tokenizer(folder, encoder), absent


def make_sequence_classifier(encoder: Any, labels: Sequence[str], several: bool) -> Any:
    """A classifier of `transformers` on an encoder's weights; its head is not set.

    Args:
        encoder: a model as `transformers.AutoModel` loads it.
        labels: the names of its classes.
        several: whether a text may have several, for which pipelines then take sigmoids.

    Returns:
        A model as `transformers.AutoModelForSequenceClassification` loads it.
    """
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = f"{'multi' if several else 'single'}_label_classification"
    with seeded(0):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    # its encoder may lack the pooler that this one has
    model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    return model.eval()


def find_folder(encoder: str | Path) -> Path:
    """The folder with the encoder's files, checked for what can be told without loading.

    Raises:
        InputError: there is none, or not with the files that are needed.
    """
    folder = Path(encoder).expanduser()
    if folder.is_file():
        raise InputError(f"{encoder} is a file; give the folder that holds config.json")
    if not folder.is_dir():
        folder = _fetch(str(encoder))
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{encoder} holds an adapter, not a model; merge it into its model first")
    if not (folder / "config.json").exists():
        raise InputError(f"{encoder} has no config.json; give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(pickles)}, a pickle, which can run code" if pickles else "none"
        raise InputError(
            f"{encoder}: weights must be in safetensors and there are {found}; load the model "
            "with transformers and save_pretrained it again"
        )
    return folder


def _fetch(name: str) -> Path:
    """The folder of a model of the hub, from the local cache if it is there."""
    remedy = "give a folder that save_pretrained wrote, or a model's name on huggingface.co"
    if not HUB_ID.fullmatch(name):
        raise InputError(f"there is no folder {name}; {remedy}")
    cause: Exception | None = None
    for cached in (True, False):
        try:
            with silence():
                folder = huggingface_hub.snapshot_download(
                    name,
                    allow_patterns=HUB_FILES,
                    ignore_patterns=OTHER_FOLDERS,
                    local_files_only=cached,
                )
        except Exception as error:  # the client raises errors of its own, of requests and of httpx
            cause = error
            continue
        if not cached or any(Path(folder).glob("*.safetensors")):  # the cache may be incomplete
            return Path(folder)
    raise InputError(
        f"{name} is neither a folder nor a model that could be had from huggingface.co "
        f"({first_line(cause)}); {remedy}"
    ) from cause


def _read_model(
    folder: Path, encoder: str | Path, pooling: Pooling, ways: int, attention: str | None
) -> tuple[Any, set[str]]:
    """Read the model; return it, and the names of the parameters that the files lack."""
    options = {
        "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32,
        "attn_implementation": attention, "output_loading_info": True, "local_files_only": True,
        "ignore_mismatched_sizes": True,  # a head for another number of classes
    }  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if pooling == "mean":
            model, info = transformers.AutoModel.from_pretrained(folder, **options)
        elif type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=ways, **options
            )
        else:
            raise InputError(
                f"{encoder} is a {config.model_type} model, and transformers has no text "
                "classifier for such models; choose another encoder, or try --pooling mean"
            )
    except InputError:
        raise
    except Exception as error:  # every reader under transformers raises its own
        raise InputError(
            f"{encoder} can't be loaded: {first_line(error)}; fetch or save the model again"
        ) from error
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    _check_complete(model, absent, encoder, pooling)
    _as_classifier(model.config)
    return MeanPooled(model, ways) if pooling == "mean" else model, absent


def _as_classifier(config: Any) -> None:
    """Set what a model's earlier use has left in its configuration to what is trained here.

    Scores are a softmax over classes: a configuration for several labels a text, or for regression,
    would make `transformers.pipeline` show sigmoids, or bare logits, of a saved classifier.
    """
    config.problem_type = "single_label_classification"
    config.use_cache = False  # a decoder's cache is of no use to a classifier
    config.return_dict = True  # outputs are read by name
    config.output_hidden_states = False


def _check_complete(model: Any, absent: set[str], encoder: str | Path, pooling: Pooling) -> None:
    """Refuse files that lack layers of the encoder, since these layers would be random."""
    prefix = "" if pooling == "mean" else f"{model.base_model_prefix}."
    # files of masked language models have no pooler; a new one is drawn, as is usual
    lost = sorted(key for key in absent if key.startswith(prefix) and "pooler" not in key)
    if lost:
        raise InputError(
            f"{encoder}: {len(lost)} of the encoder's weights are missing or of another shape "
            f"than config.json says, {lost[0]} for one; fetch or save the model again"
        )


def _read_tokenizer(folder: Path, encoder: str | Path) -> Any:
    remedy = "save the encoder's tokenizer into the same folder"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # every reader under transformers raises its own
        raise InputError(
            f"{encoder}: its tokenizer can't be loaded: {first_line(error)}; {remedy}"
        ) from error
    # without files, transformers makes a tokenizer that has special tokens only
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{encoder} has no tokenizer; {remedy}")
    return tokenizer


def position_limit(model: Any) -> int:
    """The longest input that the encoder accepts, in tokens."""
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa numbers positions from the padding's index + 1
            used = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - used
    limit = getattr(model.config, "max_position_embeddings", None)
    # XLNet, which has no limit, says -1
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def encoder_name(encoder: str | Path) -> str:
    """A short name for reports: the name on the hub, or the folder's name without its path."""
    path = Path(encoder)
    if not path.is_dir():
        return str(encoder)
    path = path.resolve()
    if path.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/HASH
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return f"{path.parent.name}/model" if path.name == "model" else path.name


def encoder_fingerprint(encoder: Any, tokenizer: Any) -> str:
    """12 hexadecimal digits that differ between encoders of other weights or vocabularies.

    A name does not identify an encoder, since another model may be in a folder of the same name.
    """
    digest = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for param in encoder.parameters():
        digest.update(param.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def small_bert(
    texts: Sequence[str],
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
    folder: str | Path,
) -> Path:
    """Write a BERT with random weights and a tokenizer trained on `texts`, without a download.

    Args:
        texts: the texts that the vocabulary is learned from.
        hidden_size: the width of the hidden states, a multiple of heads.
        layers: the number of transformer layers.
        heads: the number of attention heads.
        seed: decides the weights. The global random state does not change.
        folder: the folder to write. Files of the same names are overwritten.

    Returns:
        The folder, which `Classifier.load` takes.
    """
    tokenizer = word_piece(texts)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * hidden_size,
        max_position_embeddings=tokenizer.model_max_length, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with seeded(seed), silence():
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(folder)


def word_piece(texts: Sequence[str], vocab_size: int = 2000, max_length: int = 128) -> Any:
    """Train a lowercasing WordPiece tokenizer; the result depends on the arguments only.

    Args:
        texts: the texts that the vocabulary is learned from.
        vocab_size: the largest number of entries, with special tokens.
        max_length: the length in tokens to which the tokenizer truncates a text.

    Returns:
        A `transformers` tokenizer that puts a text between [CLS] and [SEP].
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    text = "".join(map(normalizer.normalize_str, texts))
    # The trainer numbers the pieces of one letter in the order of a hash table, and breaks ties by
    # number. Passing these pieces as special tokens gives the same vocabulary in every run.
    letters = sorted(set(text) - set(string.whitespace))
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=special + letters + [f"##{letter}" for letter in letters],
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(texts, trainer)
    # a new tokenizer, in which single letters aren't special tokens
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, pad_token="[PAD]",
        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random state for a block, and restore the previous state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Hide progress bars, and warnings about head weights, which are missing on purpose."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception | None) -> str:
    """The first line of a library's error, to be quoted in an error of rnnopt."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
