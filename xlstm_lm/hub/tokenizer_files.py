"""A tokenizer as stock `AutoTokenizer` reads it, with the beginnings of documents where training had them."""

from __future__ import annotations

import json
from pathlib import Path

from xlstm_lm.data import Tokenizer

PADDING_SIDE = "left"


def save_tokenizer_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer: `AutoTokenizer` makes of a text what training made of a document.

    In training an end of document precedes every document, so a text is given one in front. It also ends a text and
    fills up shorter rows of a batch: a model that leaves padding out by the attention mask does not look at which token
    it is.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    backend = Backend.from_file(str(path))
    end = backend.id_to_token(tokenizer.end_of_document)
    backend.post_processor = TemplateProcessing(
        single=[end, "$A"], pair=[end, "$A", f"{end}:1", "$B:1"], special_tokens=[(end, tokenizer.end_of_document)]
    )
    backend.save(str(path))
    path = folder / "tokenizer_config.json"
    layout = json.loads(path.read_text(encoding="utf-8"))
    # A tokenizer's own beginning of text and padding stay what they are called; neither is put into a text.
    layout = {"bos_token": end, "pad_token": end} | layout | {"eos_token": end, "padding_side": PADDING_SIDE}
    layout["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")
