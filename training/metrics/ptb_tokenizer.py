"""Penn Treebank tokenisation of captions, which the MS-COCO caption metrics are defined on."""

import re
from collections.abc import Sequence

from .java import Java, run_java, toolkit_path


# How the tokeniser writes brackets and contractions; it leaves out other punctuation.
WRITTEN_AS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
}
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": "`", "”": "`", "–": " - ", "—": " - "})
TOKEN = re.compile(
    r"""
    \d+(?:[.,:/]\d+)+                       # 10:30, 1/2, 1,000
    | (?:[a-z]\.){2,}                       # a.m.
    | '(?:s|m|d|re|ve|ll)\b                 # woman 's
    | n't\b
    | \w+?(?=n't\b)                         # does n't
    | \w+(?:[-/&_.]\w+)*                    # high-pitched
    | \S
    """,
    re.VERBOSE,
)


def tokenize(captions: Sequence[str], java: Java) -> list[str]:
    """Tokenises with the Stanford tokeniser of `pycocoevalcap`, as the MS-COCO toolkit does: lower case, no punctuation.

    Args:
        captions (`Sequence[str]`): Whatever they hold; a line separator inside one counts as a space.
        java ([`Java`]): The runtime.

    Returns:
        `list[str]`: For each caption its tokens, separated by spaces.

    Raises:
        RuntimeError: If the tokeniser is not there, fails, hangs, or returns another number of lines.
    """
    answer = run_java(
        java,
        "-cp",
        toolkit_path("tokenizer/stanford-corenlp-3.4.1.jar"),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "-encoding",
        "UTF-8",
        text="".join(_one_line(caption) + "\n" for caption in captions),
        timeout=120 + len(captions) / 100,
    )
    lines = answer.split("\n")[:-1]
    if len(lines) != len(captions):
        raise RuntimeError(f"the tokeniser made {len(lines)} lines of {len(captions)} captions")
    return [_drop_punctuation(line.split(" ")) for line in lines]


def tokenize_without_java(captions: Sequence[str]) -> list[str]:
    """Tokenises nearly as `tokenize` does, by rules for the commonest cases (ours).

    Args:
        captions (`Sequence[str]`): As for `tokenize`.

    Returns:
        `list[str]`: For each caption its tokens, separated by spaces.
    """
    return [
        _drop_punctuation(
            WRITTEN_AS.get(token, token) for token in TOKEN.findall(_one_line(caption).lower().translate(PLAIN))
        )
        for caption in captions
    ]


def _one_line(caption: str) -> str:
    return " ".join(caption.splitlines())


def _drop_punctuation(tokens) -> str:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    return " ".join(token for token in tokens if token not in PUNCTUATIONS)
