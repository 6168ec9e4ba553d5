"""Names of the files that make a tokenizer, and of those that go along with it."""

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
# sha256 of the tokenizer whose ids the weights beside it learned.
TOKENIZER_DIGEST = "tokenizer_digest.json"
# What whoever opens it after training looks for.
BESIDE = (TOKENIZER_CONFIG, SPECIAL_MAP, "chat_template.jinja", GENERATION, "added_tokens.json")
