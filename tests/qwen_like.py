"""A tokenizer as Qwen's models have it, at a size for tests."""

import json
from pathlib import Path

TEXTS = [
    "def total(values):\n        return sum(values)\n\n\tIndex = 1234 + naïve's\r\n",
    "Łódź, 東京 and Москва: it's 3.14159; <think>no</think> DON'T https://example.org/a_b?c=d  \n\n\n end ",
] * 20
SIZE = 370


def write_qwen_like(directory: Path) -> Path:
    """A directory with NFC, Qwen's pre-tokenizer, added tokens after the vocabulary, and no bos; gives it.

    <|endoftext|> is SIZE, <|im_end|>, <think> and </think> come after it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

    from data.tokenizer.pre_tokenizers import PATTERNS
    from data.tokenizer.training import train_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    trained = train_tokenizer(TEXTS, SIZE, "byte_level_bpe")
    made = Tokenizer.from_buffer(trained.files["tokenizer.json"])
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERNS["qwen"]), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    made.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|endoftext|>", "<|im_end|>")])
    made.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory
