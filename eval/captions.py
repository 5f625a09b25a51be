"""Scores of captions against people's: CIDEr-D, BLEU-4 and ROUGE-L in plain Python; METEOR and SPICE by `pycocoevalcap` and Java.

CIDEr (arXiv 1411.5726) weighs words by how few images' references have them. So it depends on the images scored: a figure over
1,000 of them does not compare with one over 5,000, and over one image it is 0 whatever the caption.
"""

import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.ptb_tokenizer import require_java, tokenize, tokenize_java
from utils.errors import UsageError, UserError, nearest

ORDERS = 4  # 1 to 4 words in a row


def _cider_each(candidates: list[str], references: list[list[str]]) -> tuple[np.ndarray, float]:
    """CIDEr-D of each image (images,), 0 to 10, and the greatest weight of an n-gram, log(images / images whose references have it)."""
    images = len(candidates)
    split = [text.split() for text in (*candidates, *(text for texts in references for text in texts))]
    image = np.concatenate(
        [np.arange(images), np.repeat(np.arange(images), [len(texts) for texts in references])]
    )  # (captions,), candidates first
    vocabulary: dict[str, int] = {}
    words = np.array(
        [vocabulary.setdefault(word, len(vocabulary)) for tokens in split for word in tokens], np.int64
    )
    length = np.array([len(tokens) for tokens in split])
    owner = np.repeat(np.arange(len(split)), length)  # the caption of each word
    cosine, heaviest, grams = np.zeros(len(split)), 0.0, words
    for n in range(1, ORDERS + 1):
        if n > 1:  # a number for each run of n words; runs across the end of a caption are left out below
            grams = np.unique(grams[:-1] * len(vocabulary) + words[n - 1 :], return_inverse=True)[1]
        starts = owner[: len(grams)]
        inside = starts == owner[n - 1 :]
        kinds = int(grams.max(initial=0)) + 1
        seen, times = np.unique(
            starts[inside] * kinds + grams[inside], return_counts=True
        )  # (entries,), sorted: the candidates' come first
        caption, gram = seen // kinds, seen % kinds
        ours = int(np.searchsorted(caption, images))
        keys = (
            image[caption[ours:]] * kinds + gram[ours:]
        )  # what a candidate's entry would be that a reference's meets
        document_frequency = np.bincount(np.unique(keys) % kinds, minlength=kinds)
        weight = np.log(images / np.maximum(document_frequency, 1))  # exactly 0 for what all images have
        heaviest = max(heaviest, weight[document_frequency > 0].max(initial=0.0))
        value = times * weight[gram]
        norm = np.sqrt(np.bincount(caption, value**2, minlength=len(split)))
        place = np.searchsorted(seen[:ours], keys)
        met = np.append(seen[:ours], -1)[place] == keys
        theirs = value[ours:]
        shared = np.where(met, np.minimum(np.append(value[:ours], 0.0)[place], theirs) * theirs, 0.0)
        norms = norm * norm[image]
        cosine += np.divide(
            np.bincount(caption[ours:], shared, minlength=len(split)),
            norms,
            out=np.zeros(len(split)),
            where=norms > 0,
        )
    similar = (10 / ORDERS * cosine * np.exp(-((length - length[image]) ** 2) / (2 * 6.0**2)))[
        images:
    ]  # sigma 6 words
    return np.bincount(image[images:], similar) / np.bincount(image[images:]), float(heaviest)


def _ngrams(tokens: list[str]) -> list[Counter[tuple[str, ...]]]:
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def _bleu_counts(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """What BLEU is made of, of each image (images, 2 · ORDERS + 2): right n-grams, n-grams, words, words of the reference of the nearest length."""
    out = []
    for candidate, texts in zip(map(str.split, candidates), references, strict=True):
        split = [text.split() for text in texts]
        counted = [_ngrams(tokens) for tokens in split]
        ours = _ngrams(candidate)
        right = [
            sum(min(times, max(reference[i][gram] for reference in counted)) for gram, times in grams.items())
            for i, grams in enumerate(ours)
        ]
        nearest_length = min((abs(len(tokens) - len(candidate)), len(tokens)) for tokens in split)[1]
        out.append([*right, *(grams.total() for grams in ours), len(candidate), nearest_length])
    return np.array(out, np.float64)


def _bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 (…, ORDERS) over corpora whose `_bleu_counts` sum to `counts` (aclanthology.org/P02-1040). 0 to 1."""
    right, made, length, nearest_length = (
        counts[..., :ORDERS],
        counts[..., ORDERS:-2],
        counts[..., -2:-1],
        counts[..., -1:],
    )
    precision = np.cumprod((right + 1e-15) / (made + 1e-9), -1) ** (1 / np.arange(1, ORDERS + 1))
    return precision * np.exp(np.minimum(0.0, 1 - (nearest_length + 1e-9) / (length + 1e-15)))


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0  # row[j - 1] of the row above
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _rouge_l_each(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """Of each image (images,), recall weighing 1.2² (aclanthology.org/W04-1013); the best precision and the best recall may be of two references. 0 to 1."""
    out = []
    for candidate, texts in zip(candidates, references, strict=True):
        tokens = candidate.split(" ")  # of no words: one empty word, as in the published code
        common = [(_common(text.split(" "), tokens), len(text.split(" "))) for text in texts]
        precision, recall = max(n for n, _ in common) / len(tokens), max(n / length for n, length in common)
        out.append((1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0)
    return np.array(out)


# --- what other modules call ---

LEAST_IMAGES = 100


class Cider(NamedTuple):
    """`score`: mean of `each`, 1.0 where papers write 100. `warning`: a line that says why the figure means little, or None."""

    score: float
    each: list[float]
    warning: str | None


def _prepare(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[list[str], list[list[str]]]:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"expected as many captions as images with references, one at least: {len(candidates)} captions, {len(references)} images"
        )
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(
                f"image {i} of {len(references)}: expected a list of references, one at least, not {texts!r}"
            )
    if tokenizer not in ("python", "java"):
        raise UsageError(f"no tokenizer '{tokenizer}'{nearest(tokenizer, ['python', 'java'])}")
    captions = [*candidates, *(text for texts in references for text in texts)]
    found = iter(tokenize_java(captions) if tokenizer == "java" else map(tokenize, captions))
    return [next(found) for _ in candidates], [[next(found) for _ in texts] for texts in references]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "python") -> Cider:
    """CIDEr-D of a caption for each image and the references of each, as pycocoevalcap gives it. `tokenizer`: "python" or "java".

    Errors: `ValueError` with both counts where they differ, and where an image has no reference; `UserError` where Java is missing.
    """
    written, truths = _prepare(candidates, references, tokenizer)
    each, heaviest = _cider_each(written, truths)
    longest = max(len(text.split()) for texts in truths for text in texts)
    return Cider(float(each.mean()), each.tolist(), _warning(len(each), heaviest, longest))


def _warning(images: int, heaviest: float, longest: int) -> str | None:
    if images == 1:
        return "CIDEr of 1 image is 0 whatever its caption: words are weighed by how few images' references have them"
    if heaviest == 0:
        return f"CIDEr is 0 whatever the captions: all {images} images have the same references, so that no word tells one from another"
    if longest < ORDERS:
        return f"CIDEr cannot exceed {2.5 * longest:g} here: no reference has more than {longest} {'word' if longest == 1 else 'words'}, and each of 1 to 4 words in a row counts for 2.5"
    if images < LEAST_IMAGES:
        return f"CIDEr of {images} images means little: words are weighed by how few of these images' references have them, which {LEAST_IMAGES} or more would tell better"
    return None


BLEU = tuple(f"BLEU-{n}" for n in range(1, ORDERS + 1))
JAVA_METRICS = ("METEOR", "SPICE")
METRICS = ("CIDEr", *BLEU, "ROUGE-L", *JAVA_METRICS)


def check_metrics(metrics: Sequence[str]) -> None:
    """`UsageError` for a name that is not of `METRICS`; `UserError` where one needs Java and it is missing."""
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"no caption metric '{name}'{nearest(name.upper(), list(METRICS))}")
        if name in JAVA_METRICS:
            require_java(name)


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    tokenizer: str = "python",
) -> dict[str, float]:
    """Each of `metrics` over the corpus. Errors: those of `cider` and `check_metrics`."""
    check_metrics(metrics)
    written, truths = _prepare(candidates, references, tokenizer)
    return {name: _score(name, written, truths) for name in metrics}


def _score(name: str, candidates: list[str], references: list[list[str]]) -> float:
    if name in BLEU:
        return float(_bleu(_bleu_counts(candidates, references).sum(0))[BLEU.index(name)])
    if name in JAVA_METRICS:
        return _java_score(name, candidates, references)
    return float(_each(name, candidates, references).mean())


def _each(name: str, candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """CIDEr or ROUGE-L of each image (images,): the score is their mean."""
    return (
        _rouge_l_each(candidates, references) if name == "ROUGE-L" else _cider_each(candidates, references)[0]
    )


def caption_errors(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    tokenizer: str = "python",
) -> dict[str, float]:
    """Standard errors: of means over images by their spread (CIDEr's words weighed as they are), BLEU's by leaving out each image in turn (jackknife).

    METEOR's and SPICE's are not known here, nor is one of fewer than two images, or of images that all score the same.
    """
    written, truths = _prepare(candidates, references, tokenizer)
    out, images = {}, len(written)
    for name in metrics if images > 1 else ():
        if name in BLEU:
            counts = _bleu_counts(written, truths)
            without = _bleu(counts.sum(0) - counts)[:, BLEU.index(name)]  # (images,)
            out[name] = (images - 1) ** 0.5 * float(without.std())
        elif name not in JAVA_METRICS:
            out[name] = float(_each(name, written, truths).std(ddof=1)) / images**0.5
    return {name: error for name, error in out.items() if error > 1e-12}


def _java_score(name: str, candidates: list[str], references: list[list[str]]) -> float:
    """METEOR (aclanthology.org/W14-3348) or SPICE (arXiv 1607.08822; its first use loads 400 MB of parser models from nlp.stanford.edu)."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice

    try:
        scorer = {"METEOR": Meteor, "SPICE": Spice}[name]()
        return float(
            scorer.compute_score(
                dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
            )[0]
        )
    except (OSError, ValueError, subprocess.CalledProcessError) as problem:
        raise UserError(f"{name}: pycocoevalcap's program failed: {problem}") from problem
