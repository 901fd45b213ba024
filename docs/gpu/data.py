"""Make the token ids that train.py reads: text to train on, text held back, and prompts for the model to answer.

usage: data.py BASE OUT.npz [--train-data FOLDER] [--stdlib FILE] [--qa FILE] [--long N] [--short N]

BASE is the base model's folder (its tokenizer is read). For a Qwen, where the folder's name begins with "qwen", the
vocabulary is cut to about 49,000 tokens, and all ids are places in the cut one. Written:
  ids               (V,) int32, the tokenizer's ids of the vocabulary that is kept
  train, val        uint16, texts in random order, each with its end token; one text in forty goes to val
  long, short       (--long, 768), (--short, 256) uint16, prompts of one length each
  vlong             (16, 768) uint16, prompts to validate with, of the texts in train like the others
  stops             the two ids that end a reply
Needs transformers, and kvp_mlx for the words of its HumanEval prompt.
"""

import collections
import functools
import random
import re

import numpy as np
from texts import parser_of, records, texts
from transformers import AutoTokenizer

from kvp_mlx.evaluate.tasks.humaneval import BLOCK, REQUEST

ASK = [
    "What is this text about? Answer in two or three sentences.",
    "Ask four questions about this text and answer each of them in a few words of the text.",
    "Summarise the text above.",
    "Which names, places and figures occur in this text? List them, and say what each of them is.",
    "Explain the main point of this text to somebody who has not read it.",
    "Quote the most important sentence of the text, then say why it matters.",
    "Who or what is the text about, and what happens?",
    "Write three facts from this text, one a line.",
    "Continue this text in the same style.",
]
ASK_CODE = [
    "Explain what this code does.",
    "Write a docstring for the last function above.",
    "Find possible mistakes in this code and fix them.",
    "Write unit tests for this code.",
    "Rewrite the last function of this code so that it is easier to read.",
    "Complete the code above.",
    "Which functions and classes are defined here, and what does each of them do?",
]
PROSE = ["wiki", "wiki", "web", "web", "openstax", "openstax", "books", "peps"]
IMPORTS = ["from typing import List, Optional, Tuple\n", "import math\n", "import re\nimport os\n", ""]
CUT = 49152 - 64  # tokens that a Qwen keeps of its vocabulary, besides those that must be in it


def functions(stdlib):
    """Return the heads, with docstring, of the standard library's functions, without their indentation."""
    found = []
    for record in records(stdlib):
        for match in re.finditer(r'(?m)^( *)def \w+\(.*\):\n +"""[\s\S]{40,700}?"""\n', record["text"]):
            indent = len(match.group(1))
            found.append("\n".join(line[indent:] for line in match.group(0).split("\n")))
    return found


class Prompts:
    """Writes prompts of exactly so many tokens, filled up with passages of the text that is trained on."""

    def __init__(self, tokenizer, encode, passages, sums, heads, rng):
        """Take the texts' ids by source, GSM8K's records and functions' heads."""
        self.encode, self.passages, self.sums, self.heads, self.rng = encode, passages, sums, heads, rng
        turn = [{"role": "user", "content": "@@@HOLD@@@"}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        self.before, self.after = (self.encode(part) for part in chat.split("@@@HOLD@@@"))
        self.gap, self.block = self.encode("\n\n"), self.encode(BLOCK)
        self.squad_question = self.encode("\n\nAnswer with a few words of the text above.\nQuestion:")

    def passage(self, sources, tokens):
        """Return so many tokens of a text of one of the sources."""
        while True:
            ids = self.rng.choice(self.passages[self.rng.choice(sources)])
            if len(ids) >= tokens:
                at = self.rng.randrange(len(ids) - tokens + 1)
                return ids[at : at + tokens]

    def chat(self, tokens):
        """Return a passage of prose or code and a request about it, as a turn of the user's."""
        code = self.rng.random() < 0.35
        ask = self.encode(self.rng.choice(ASK_CODE if code else ASK))
        room = tokens - len(self.before) - len(self.after) - len(self.gap) - len(ask)
        return self.before + self.passage(["stdlib"] if code else PROSE, room) + self.gap + ask + self.after

    def squad(self, tokens):
        """Return a passage after which the model is to write a question itself, and the answer."""
        return self.passage(PROSE, tokens - len(self.squad_question)) + self.squad_question

    def raw(self, tokens):
        """Return a passage alone."""
        return self.passage(["stdlib", "stdlib", "wiki", "books", "openstax"], tokens)

    def gsm(self, tokens):
        """Return sums that are solved and one that is not."""
        ids, question = [], self.encode(f"Question: {self.rng.choice(self.sums)['question']}\nAnswer:")
        room = tokens - len(question)
        while len(ids) < room:
            solved = self.rng.choice(self.sums)
            ids = self.encode(f"Question: {solved['question']}\nAnswer: {solved['answer']}\n\n") + ids
        return ids[len(ids) - room :] + question

    def human(self, tokens):
        """Return a function to complete, in the words of kvp_mlx's HumanEval, with other code before it."""
        head, tail = REQUEST.split("{prompt}")
        while True:
            function = self.rng.choice(self.heads)
            body = self.encode(head + self.rng.choice(IMPORTS) + "\n\n" + function + tail)
            room = tokens - len(self.before) - len(self.after) - len(body) - len(self.block)
            if room > len(self.gap) + 8:  # for what stands before it, so that all are of one length
                code = self.passage(["stdlib"], room - len(self.gap))
                return self.before + code + self.gap + body + self.after + self.block


def vocabulary(tokenizer, counts, cut):
    """Return the ids that are kept, in order: all, or the most frequent, the special ones and some to make n * 64."""
    if not cut:
        return list(range(len(tokenizer)))
    kept = {token for token, _ in counts.most_common(CUT)}
    kept |= {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    return sorted([*kept, *[i for i in range(3000) if i not in kept][: -len(kept) % 64]])


def main():
    """Write the file."""
    parser = parser_of(__doc__)
    parser.add_argument("out", help="name of the .npz")
    parser.add_argument("--long", type=int, default=640, help="prompts of 768 tokens, at least 640 (%(default)s)")
    parser.add_argument("--short", type=int, default=512, help="prompts of 256 tokens, at least 512 (%(default)s)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rng = random.Random(7)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    docs = [(source, encode(text)) for source, text in texts(args) if len(text) > 200]
    rng.shuffle(docs)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    kept = [doc for i, doc in enumerate(docs) if i % 40]
    train = [token for _, ids in kept for token in [*ids, end]]
    val = [token for _, ids in docs[::40] for token in [*ids, end]][:120000]
    passages = collections.defaultdict(list)
    for source, ids in kept:
        passages[source].append(ids)
    heads, sums = functions(args.stdlib), list(records(args.train_data / "gsm8k_train.jsonl.gz"))
    print(len(heads), "functions")
    p = Prompts(tokenizer, encode, passages, sums, heads, rng)
    of_long, of_short = [p.chat, p.chat, p.chat, p.squad, p.squad, p.raw, p.gsm], [p.human, p.human, p.chat, p.squad]
    long, short = [of_long[i % 7](768) for i in range(640)], [of_short[i % 4](256) for i in range(512)]
    vlong = [[p.chat, p.squad, p.raw, p.gsm][i % 4](768) for i in range(16)]
    long += [of_long[i % 7](768) for i in range(640, args.long)]
    short += [of_short[i % 4](256) for i in range(512, args.short)]
    counts = collections.Counter(train)
    for prompt in long + short + vlong:
        counts.update(prompt)
    ids = vocabulary(tokenizer, counts, cut=args.base.name.startswith("qwen"))
    place = {token: i for i, token in enumerate(ids)}
    filler = place[encode(" the")[0]]  # for a rare token in a prompt, which has to keep its length
    stops = [place[tokenizer.convert_tokens_to_ids(token)] for token in ("<|im_end|>", "<|endoftext|>")]
    arrays = {"ids": np.array(ids, np.int32), "stops": np.array(stops)}
    for name, stream in ("train", train), ("val", val):
        arrays[name] = np.array([place[token] for token in stream if token in place], np.uint16)
    for name, rows in ("long", long), ("short", short), ("vlong", vlong):
        arrays[name] = np.array([[place.get(token, filler) for token in row] for row in rows], np.uint16)
    np.savez(args.out, **arrays)
    print(len(ids), len(train), len(val), stops)
    for prompt in (long[0], long[3], long[6], short[0]):
        print("=====", tokenizer.decode(prompt)[-700:])


if __name__ == "__main__":
    main()
