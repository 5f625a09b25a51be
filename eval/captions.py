"""Scores of captions against human references.

CIDEr-D, BLEU and ROUGE-L are computed in plain Python; METEOR and SPICE by `pycocoevalcap` and Java.

CIDEr (arXiv 1411.5726) weighs a word by how few images have it in their references. So it depends on the set
of images: a score over 1,000 images does not compare with one over 5,000. Over one image it is always 0.
"""

import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.ptb_tokenizer import require_java, tokenize, tokenize_java
from utils.errors import UsageError, UserError, nearest

ORDERS = 4  # n-grams of 1 to 4 words
MIN_IMAGES = 100  # fewer get a warning with their CIDEr


def _cider_each(candidates: list[str], references: list[list[str]]) -> tuple[np.ndarray, float]:
    """Compute CIDEr-D of each image, (images,), 0 to 10, and the greatest weight of an n-gram.

    The weight is log(images / images that have the n-gram in a reference).
    """
    images = len(candidates)
    captions = [text.split() for text in (*candidates, *(text for texts in references for text in texts))]
    # (captions,): the image of each, candidates first
    image = np.concatenate(
        [np.arange(images), np.repeat(np.arange(images), [len(texts) for texts in references])]
    )
    vocabulary: dict[str, int] = {}
    words = np.array(
        [vocabulary.setdefault(word, len(vocabulary)) for tokens in captions for word in tokens], np.int64
    )
    length = np.array([len(tokens) for tokens in captions])
    owner = np.repeat(np.arange(len(captions)), length)  # the caption of each word
    cosine, max_weight, grams = np.zeros(len(captions)), 0.0, words
    for n in range(1, ORDERS + 1):
        if n > 1:  # ids of the n-grams; those across the end of a caption are dropped in `_cider_cosine`
            grams = np.unique(grams[:-1] * len(vocabulary) + words[n - 1 :], return_inverse=True)[1]
        order_cosine, order_weight = _cider_cosine(grams, owner, image, n, images)
        cosine += order_cosine
        max_weight = max(max_weight, order_weight)
    length_penalty = np.exp(-((length - length[image]) ** 2) / (2 * 6.0**2))  # sigma: 6 words
    similarity = (10 / ORDERS * cosine * length_penalty)[images:]
    return np.bincount(image[images:], similarity) / np.bincount(image[images:]), float(max_weight)


def _cider_cosine(
    grams: np.ndarray, owner: np.ndarray, image: np.ndarray, n: int, images: int
) -> tuple[np.ndarray, float]:
    """Compute the clipped TF-IDF cosine of each caption with its image's candidate, and the greatest weight.

    `grams` (words - n + 1,) ids of n-grams; `owner` (words,) the caption of each word; `image` (captions,).
    """
    starts = owner[: len(grams)]
    inside = starts == owner[n - 1 :]
    kinds = int(grams.max(initial=0)) + 1
    # (entries,): the distinct n-grams of each caption, sorted, so that the candidates' come first
    entries, counts = np.unique(starts[inside] * kinds + grams[inside], return_counts=True)
    caption, gram = entries // kinds, entries % kinds
    candidate_entries = int(np.searchsorted(caption, images))
    # the entry of the candidate with the same n-gram, for each entry of a reference
    keys = image[caption[candidate_entries:]] * kinds + gram[candidate_entries:]
    document_frequency = np.bincount(np.unique(keys) % kinds, minlength=kinds)
    weight = np.log(images / np.maximum(document_frequency, 1))  # exactly 0 for an n-gram of all images
    value = counts * weight[gram]
    norm = np.sqrt(np.bincount(caption, value**2, minlength=len(image)))
    index = np.searchsorted(entries[:candidate_entries], keys)
    matches = np.append(entries[:candidate_entries], -1)[index] == keys
    candidate_value = np.append(value[:candidate_entries], 0.0)[index]
    reference_value = value[candidate_entries:]
    product = np.where(matches, np.minimum(candidate_value, reference_value) * reference_value, 0.0)
    norms = norm * norm[image]
    cosine = np.divide(
        np.bincount(caption[candidate_entries:], product, minlength=len(image)),
        norms,
        out=np.zeros(len(image)),
        where=norms > 0,
    )
    return cosine, weight[document_frequency > 0].max(initial=0.0)


def _ngrams(tokens: list[str]) -> list[Counter[tuple[str, ...]]]:
    """Count the n-grams of each order."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def _bleu_counts(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """Count what BLEU needs of each image, (images, 2 · ORDERS + 2).

    Columns: matching n-grams and all n-grams of each order, words, words of the reference closest in length.
    """
    rows = []
    for candidate, texts in zip(map(str.split, candidates), references, strict=True):
        reference_tokens = [text.split() for text in texts]
        reference_grams = [_ngrams(tokens) for tokens in reference_tokens]
        candidate_grams = _ngrams(candidate)
        matches = [
            sum(min(count, max(grams[i][gram] for grams in reference_grams)) for gram, count in order.items())
            for i, order in enumerate(candidate_grams)
        ]
        closest = min((abs(len(tokens) - len(candidate)), len(tokens)) for tokens in reference_tokens)[1]
        rows.append([*matches, *(order.total() for order in candidate_grams), len(candidate), closest])
    return np.array(rows, np.float64)


def _bleu(counts: np.ndarray) -> np.ndarray:
    """Compute BLEU-1 to BLEU-4, (…, ORDERS), 0 to 1 (aclanthology.org/P02-1040).

    `counts`: sums of `_bleu_counts` over each corpus.
    """
    matches, total = counts[..., :ORDERS], counts[..., ORDERS:-2]
    length, closest = counts[..., -2:-1], counts[..., -1:]
    precision = np.cumprod((matches + 1e-15) / (total + 1e-9), -1) ** (1 / np.arange(1, ORDERS + 1))
    return precision * np.exp(np.minimum(0.0, 1 - (closest + 1e-9) / (length + 1e-15)))


def _common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0  # row[j - 1] of the row above
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _rouge_l_each(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """Compute ROUGE-L of each image, (images,), 0 to 1; recall weighs 1.2² (aclanthology.org/W04-1013).

    The best precision and the best recall may come from two different references.
    """
    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        tokens = candidate.split(" ")  # of no words: one empty word, as in the published code
        common = [(_common_length(text.split(" "), tokens), len(text.split(" "))) for text in texts]
        precision = max(n for n, _ in common) / len(tokens)
        recall = max(n / length for n, length in common)
        scores.append((1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0)
    return np.array(scores)


class Cider(NamedTuple):
    """CIDEr-D of a set of images."""

    score: float  # mean of `each`; 1.0 where papers write 100
    each: list[float]
    warning: str | None  # why the score means little


def _prepare(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[list[str], list[list[str]]]:
    """Check and tokenize candidates and references. Errors: those of `cider`."""
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            "expected as many captions as images with references, one at least: "
            f"{len(candidates)} captions, {len(references)} images"
        )
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(
                f"image {i} of {len(references)}: expected a list of references, one at least, not {texts!r}"
            )
    if tokenizer not in ("python", "java"):
        raise UsageError(f"no tokenizer '{tokenizer}'{nearest(tokenizer, ['python', 'java'])}")
    captions = [*candidates, *(text for texts in references for text in texts)]
    tokens = iter(tokenize_java(captions) if tokenizer == "java" else map(tokenize, captions))
    return [next(tokens) for _ in candidates], [[next(tokens) for _ in texts] for texts in references]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "python") -> Cider:
    """Compute CIDEr-D of one caption per image against the image's references, equal to pycocoevalcap's.

    `tokenizer`: "python" or "java". Errors: `ValueError` where the counts differ or an image has no
    reference; `UserError` where Java is missing.
    """
    candidates, references = _prepare(candidates, references, tokenizer)
    each, max_weight = _cider_each(candidates, references)
    longest = max(len(text.split()) for texts in references for text in texts)
    return Cider(float(each.mean()), each.tolist(), _warning(len(each), max_weight, longest))


def _warning(images: int, max_weight: float, longest: int) -> str | None:
    """Say why a CIDEr score means little, if so. `longest`: words of the longest reference."""
    if images == 1:
        return (
            "CIDEr of 1 image is 0 whatever its caption: "
            "words are weighed by how few images' references have them"
        )
    if max_weight == 0:
        return (
            f"CIDEr is 0 whatever the captions: all {images} images have the same references, "
            "so that no word tells one from another"
        )
    if longest < ORDERS:
        return (
            f"CIDEr cannot exceed {2.5 * longest:g}: no reference has more than {longest} "
            f"{'word' if longest == 1 else 'words'}, and each of 1 to 4 words in a row counts for 2.5"
        )
    if images < MIN_IMAGES:
        return (
            f"CIDEr of {images} images means little: words are weighed by how few of these images' "
            f"references have them; score {MIN_IMAGES} images or more"
        )
    return None


BLEU = tuple(f"BLEU-{n}" for n in range(1, ORDERS + 1))
JAVA_METRICS = ("METEOR", "SPICE")
METRICS = ("CIDEr", *BLEU, "ROUGE-L", *JAVA_METRICS)


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise `UsageError` for a name not in `METRICS`, `UserError` where one needs Java and it is missing."""
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
    """Compute each of `metrics` over the corpus. Errors: those of `cider` and `check_metrics`."""
    check_metrics(metrics)
    candidates, references = _prepare(candidates, references, tokenizer)
    return {name: _score(name, candidates, references) for name in metrics}


def _score(name: str, candidates: list[str], references: list[list[str]]) -> float:
    if name in BLEU:
        return float(_bleu(_bleu_counts(candidates, references).sum(0))[BLEU.index(name)])
    if name in JAVA_METRICS:
        return _java_score(name, candidates, references)
    return float(_each(name, candidates, references).mean())


def _each(name: str, candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """Compute CIDEr or ROUGE-L of each image, (images,); the score is their mean."""
    if name == "ROUGE-L":
        return _rouge_l_each(candidates, references)
    return _cider_each(candidates, references)[0]


def caption_errors(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    tokenizer: str = "python",
) -> dict[str, float]:
    """Estimate standard errors of scores.

    CIDEr and ROUGE-L: of a mean over images, by their spread; CIDEr's word weights stay fixed. BLEU: by
    leaving out each image in turn (jackknife). METEOR and SPICE have none, nor have fewer than two images,
    or images with equal scores.
    """
    candidates, references = _prepare(candidates, references, tokenizer)
    errors, images = {}, len(candidates)
    for name in metrics if images > 1 else ():
        if name in BLEU:
            counts = _bleu_counts(candidates, references)
            without = _bleu(counts.sum(0) - counts)[:, BLEU.index(name)]  # (images,)
            errors[name] = (images - 1) ** 0.5 * float(without.std())
        elif name not in JAVA_METRICS:
            errors[name] = float(_each(name, candidates, references).std(ddof=1)) / images**0.5
    return {name: error for name, error in errors.items() if error > 1e-12}


def _java_score(name: str, candidates: list[str], references: list[list[str]]) -> float:
    """Compute METEOR (aclanthology.org/W14-3348) or SPICE (arXiv 1607.08822).

    The first use of SPICE downloads 400 MB of parser models from nlp.stanford.edu.
    """
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
