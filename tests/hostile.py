"""What a model, a file or a name may say to steer a terminal or to run in a browser, and a model that says it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ESCAPES = [
    "\x1b]0;owned\x07", "\x1b]52;c;aGVsbG8=\x07", "\x1b]8;;http://x/\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]1337;File=:AA==\x07",
    "\x1bP$q\"p\x1b\\", "\x1b_Gf=24;AAAA\x1b\\", "\x1b^pm\x1b\\", "\x1bXsos\x1b\\",
    "\x1b[31;45;5m", "\x1b[2J\x1b[H", "\x1b[?1049h", "\x1b[?25l", "\x1b[6n", "\x1b[5i", "\x1b[21t",
    "\x1bc", "\x1b(0", "\x1b#8",
    "\x9b2J", "\x9b31m", "\x9d52;c;YQ==\x9c", "\x90q\x9c", "\x9fx\x9c", "\x84", "\x85", "\x8d",
    "\x00", "\x05", "\x07", "\x08\x08\x08", "\x0b", "\x0c", "\x0e", "\x0f", "\x18", "\x1a", "\x7f", "\rover",
    # Fragments, which make sequences only together: a stream shows each on its own.
    "\x1b", "\x1b]", "]52;c;", "\x1b[", "31m", "\x9b", "\x9d", "\x1b\\", "\x9c",
]  # fmt: skip
REORDERED = ["\u202egnp.exe", "\u2066\u2069", "\u200e\u200f", "\u061c", "\u202a\u202b\u202c\u202d", "\u2067\u2068"]
MARKUP = ["[/foo]", "[bold red]", "[link=http://x/]y[/link]", ":smile:", "[", "\\[x]", "\u200b", "\ufeff", "\u2028"]
HTML = [
    "<script>document.title='hacked';window.hacked=1</script>", "<img src=x onerror=\"document.title='hacked'\">",
    "<svg onload=\"document.title='hacked'\">", "<svg><script href=\"data:,document.title='hacked'\"/></svg>",
    "</title></style></textarea></template>", "<style>*{display:none}@import url(http://127.0.0.1:9/x.css)</style>",
    "<a href=\"javascript:document.title='hacked'\">x</a>", "\"><iframe srcdoc=\"<script>top.hacked=1</script>\">",
    "' onmouseover='document.title=`hacked`' style='background:url(http://127.0.0.1:9/)", "<base href=http://x/>",
    "<meta http-equiv=refresh content=\"0;url=http://127.0.0.1:9/\">", "<!--", "--><body onload=hacked=1>", "]]>",
    "{{ 7 * 7 }}", "{% raw %}", "&lt;script&gt;", "<form action=http://x/><button autofocus onfocus=hacked=1>",
]  # fmt: skip
CORPUS = [*ESCAPES, *REORDERED, *MARKUP, *HTML]
SAFE_FOR_FILES = [piece for piece in CORPUS if not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", piece)]


def speaker(folder: Path) -> Path:
    """A random GPT-2 whose every token is a piece of the corpus, as a folder that loads by path; context 96."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for piece in CORPUS:
        vocabulary.setdefault(piece, len(vocabulary))
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = "|".join(re.escape(piece) for piece in sorted(CORPUS, key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    core.decoder = decoders.Fuse()
    words: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(vocabulary), n_positions=96, n_embd=32, n_layer=1, n_head=2, bos_token_id=1,
                        eos_token_id=1, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
