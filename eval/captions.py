"""Scores of captions against people's: CIDEr-D, BLEU-4 and ROUGE-L in plain Python; METEOR and SPICE by `pycocoevalcap` and Java.

CIDEr (arXiv 1411.5726) weighs words by how few images' references have them. So it depends on the images scored: a figure over
1,000 of them does not compare with one over 5,000, and over one image it is 0 whatever the caption.

`tokenize` answers as the Java tokenizer that pycocoevalcap runs. Its rules were read off that program's answers.
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.errors import UsageError, UserError, nearest

# --- Penn Treebank tokens ---

L = "A-Za-zªµºÀ-ÖØ-öø-\u02ffͰ-ͽͿ-Ά\u0388-\u1fff\u2c00-\u2fff\u3005-\ud7ff\uf900-\ufdff\ufe70-\ufefe０-９Ａ-Ｚａ-ｚｦ-ￜ"  # letters
A = L + "0-9\xad"  # and the soft hyphen, which is taken out later
WORD = f"(?:[{L}0-9][{A}]*(?:[-_\u2010\u2011][{A}]+)*(?![{A}\u0300-\u036f])|[{A}\u0300-\u036f]+)"  # an accent of its own ends a hyphenated word
DOTTED = rf"[{L}][{A}]*(?:[.!?][{L}][{A}]*)+"  # fence.and, U.S.A, wow!look
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+\."  # U.S., p.m.
NUMBER = r"[-+]?[.,:]?[0-9]+"
END = "(?![A-Za-z])"
CLITIC = "(?i:[sdm]|ll|re|ve)"
QUOTES = dict(
    zip(
        "‘‛‹’›“«”»\x91\x92\x93\x94",
        ["`", "`", "`", "'", "'", "``", "``", "''", "''", "`", "'", "``", "''"],
        strict=True,
    )
) | {c: c for c in "`‚„‟"}
QUOTE = "['’‘‛`\x91\x92]"
INNER = f"{QUOTE}(?!{CLITIC}{END})"  # the apostrophe of O'Brien, not that of it's
SPLIT = f"(?i:can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:gim|lem)(?=me))(?=(?i:not|[nt]a|me)(?![-_]?[{A}]|['’]{CLITIC}{END}))"
# A sentence that starts with one of these shows that "B." before it was the end of another, not an initial.
STARTERS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One|Other|Our"
    "|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
STATES = "Ark|ARK|Az|AZ|Del|DEL|Ill|ILL|La|LA|Mass|MASS|Miss|MISS|Ore|ORE|Pa|PA|Tex|TEX|Wash|WASH"  # words, in lower case
CLOSING = (  # abbreviations that may end a sentence
    "al|ala|apr|ariz|assn|aug|bhd|bldg|blvd|bros|calif|cos?|colo|conn|corp|ct|dak|dec|esq|est|etc|ext|feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kans?|ky"
    "|ltd|mar|md|mich|minn|mo|mon|mont|neb|nev|nov|oct|okla|penn|plc|pptes?|pptys?|ptes?|ptys?|rd|rt|sep|sept|seq|sq|sr|sys|tel|tenn|thu|thurs|tues?|univ"
    "|va|vt|wed|wis|wisc|wyo"
)
CLOSING = f"(?:(?i:{CLOSING})|{STATES})\\."
TITLES = (
    "adj|adm|adv|alex|assoc|asst|attys?|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|drs?|elec|ens|ft|gen|govs?|hon|insp|invt|jos|lieut|lt|maj|mfg|mlle"
    "|mme|mrs?|ms|msgr|mt|mtg|natl|pfc|ph|pres|profs?|pvt|reps?|rev|sens?|sfc|sgt|spc|st|ste|supts?|treas|vs|wm"
)
NUMBERED = "art|ca|figs?|nos?|op|pp|prop"
NAME = r"[A-Za-z_][A-Za-z0-9_.:-]*"

# The first that fits is taken; what fits none is left out, and so is what the last line names.
TOKEN = re.compile(
    rf"""(?:,?[ ])*(?:(
    (?!{SPLIT})[A-Za-z]+(?=,?(?:[ ]|$))  # most words
  | <(?:/{NAME}|!--.*?--|[!?]?{NAME}(?:[ ][A-Za-z_.:-][A-Za-z0-9_.:-]*(?:[ ]?=[ ]?(?:"[^"]*"|'[^']*'))?)*[ ]?[/?]?)>  # <b>
  | (?i:https?)://[^\s<>"|()]+[^\s<>"|.!?(){{}},-]
  | <?[A-Za-z0-9][^\s<>"|(){{}}]*@(?:[^\s<>"|(){{}}.]+\.)*[^\s<>"|(){{}}.]+>?  # a@b.org
  | (?:www\.(?:[^\s<>"|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}|(?:[^\s<>"|!?(){{}},-_$'`]+\.)+(?i:com|net|org|edu))(?![.!?-]?[{A}])(?:/[^\s<>"|()]+[^\s<>"|.!?(){{}},-])?
  | @[A-Za-z_][A-Za-z0-9_]* | [#][{L}]+ | &(?:[#][0-9]+|QUOT);  # @handle, #tag, &#39;
  | [{A}]*(?:&(?i:[aeiou](?:acute|grave|uml));[{A}]*)+  # caf&eacute;
  | (?:\([0-9]{{2,3}}\)[ ]?|(?:\+\+?)?(?:[0-9]{{2,4}}[- ])?[0-9]{{2,4}}[- ])[0-9]{{3,4}}[- ]?[0-9]{{3,5}}  # (555) 123-4567
  | [0-9]{{1,2}}[-/][0-9]{{1,2}}[-/][0-9]{{2,4}}(?!-?[{A}])  # 12/25-2014
  | [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}  # and/or
  | (?:[0-9]{{1,4}}[- ])?[0-9]{{1,4}}[/⁄][0-9]{{1,4}}  # 2 1/2
  | (?:[{A}]+[-_])*[dolDOL]{INNER}[{A}]{{2,}}(?:[-_][{A}]+)*  # o'clock
  | [A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{ACRONYM}|[A-Za-z0-9]+(?![{A}])))+(?![-_‐‑][{A}]|\.[,;:])  # U.S.-made, 5,000-seat
  | (?:{WORD}|{DOTTED})\.(?=[,;:])
  | (?:[{A}]+-)+{ACRONYM} | {ACRONYM}(?![{L}]) | (?:{CLOSING}(?=[{L}])|(?i:ed|ph)\.[dD]\.)(?![{L}](?:[{A}]|[.!?][{L}])) | {DOTTED}
  | {CLOSING} | (?i:{TITLES})\. | (?i:{NUMBERED})\.(?=[ ]?[0-9]) | [A-Za-z]\.(?![ ](?:{STARTERS}|{STARTERS.upper()})(?:[ ]|$))
  | [A-Z]+(?:[&+][A-Z]+)+ | [A-Z]*\$ | [Cc]\+\+ | [CcFf][#]  # R&B, US$, C++, F#
  | [A-HJ-XZn]{INNER}[{L}]{{2,}} | [{L}]+[aeiouyAEIOUY]{INNER}[aeiouA-Z][{L}]*  # S'mores, ma'am
  | (?i:'n'|’n’|['’](?:em|till?|cause)|[ldj]['’](?!{CLITIC}{END})|y['’](?![sdm]|ll|re|ve)(?=[{L}])|ol{QUOTE}|o{QUOTE}o
      |(?:c'mon|c'est|cap'n|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores){END}|dunkin'|somethin')
  | (?i:'t(?=is|was)) | {SPLIT}  # 't is, can not
  | (?i:[a-z]*?[a-mo-z](?=n{QUOTE}t)|n{QUOTE}t{END}|'{CLITIC}{END}|[’\x92]{CLITIC})  # do n't, it 's
  | ['’][0-9][0-9](?=[ ]|$) | ['’][2-9]0[sS] | ['’]n(?=[ ]|$) | ’[nN]  # '99, '80s
  | {NUMBER}(?:[.,:][0-9]+)+ | {WORD} | {NUMBER}
  | [<>]?[:;=][-o'*]?[()\[\]{{DdPpO|@\\](?![A-Za-z0-9]) | [-^x=~<>']_[-^x=~<>'] | \([-^x=~<>'][_.]?[-^x=~<>']\)  # :-) ^_^
  | [!?]{{2,}} | [#]+ | [*]+ | _+ | @+ | << | >> | \\[*] | -{{5,}} | [²³¹⁰⁴-⁹₀-₉]+ | [`‘’“”«»‹›‛‚„‟\x91-\x94]{{1,2}}
  | [%&+=\\^|~<>/()\[\]{{}}¡-¬®-±´¶-¸¼-¿×÷‖‗†-•‰-‸※-⁂⁄⁺-⁾₊-₎₠₤€℀-⅏⅓-⅞←-⯿、。〒・！-／：-＠［-｀｛-･￠￡￥￦\x80]
  ) | '' | -{{2,4}} | \.{{3,}})""",
    re.VERBOSE,
)
WRITTEN = {
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "¢": "cents",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
}
WRITTEN |= (
    dict.fromkeys("€¤₠\x80", "$")
    | {f"’{c}": f"'{c}" for c in ("s", "d", "m", "ll", "re", "ve")}
    | {"n’t": "n't", "n‘t": "n`t", "n‛t": "n`t"}
)
WRITTEN |= dict.fromkeys(
    ["''", "``", "'", "`"], ""
)  # quotes are left out; two of unlike kinds side by side are not
ENTITIES = {
    "amp": "&",
    "lt": " < ",
    "gt": " > ",
    "quot": ' " ',
    "apos": "’",
    "nbsp": " ",
    "ndash": " -- ",
    "mdash": " -- ",
}
ENTITY = re.compile(f"&({'|'.join(ENTITIES)}|(?<![A-Z]&)(?:LT|GT|NBSP|NDASH|MDASH)|(?i:amp));")


def tokenize(caption: str) -> str:
    """Tokens in lower case with spaces between, punctuation left out: `"A cat's toy (red)."` → `"a cat 's toy -lrb- red -rrb-"`.

    As pycocoevalcap's Java tokenizer does with this caption alone. In a file of captions that one looks across the line's end: a last
    "plan B." loses its full stop where the next caption starts with one of `STARTERS`.
    """
    text = " ".join(caption.split())
    if "&" in text:
        text = ENTITY.sub(lambda match: ENTITIES[match[1].lower()], text)
    tokens = [token.lower() for token in TOKEN.findall(text) if token]
    if not text.isascii():
        tokens = [
            "".join(QUOTES[c] for c in token) if QUOTES.keys() >= set(token) else token.replace("\xad", "")
            for token in tokens
        ]
    written = [WRITTEN.get(token, token).replace(" ", "\xa0") for token in tokens]
    return " ".join(token for token in written if token).replace("(", "-lrb-").replace(")", "-rrb-")


def _tokenize_java(captions: list[str]) -> list[str]:
    """The same by pycocoevalcap's program, all captions at once. Errors: `UserError` where it or Java is missing."""
    _needs_java("the Java tokenizer")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A caption with \r, \f or U+2028 would shift all after it by a line; half a character cannot be written.
    lines = [" ".join(caption.split()).encode(errors="ignore").decode() for caption in captions] + ["end"]
    found = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    if found.get(len(captions)) != ["end"]:
        raise UserError(
            f"the Java tokenizer failed: {len(found)} lines came back of {len(lines)}; `java -version` must work, and pycocoevalcap's folder be writable"
        )
    return [found[i][0] for i in range(len(captions))]


def _needs_java(what: str) -> None:
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs the package pycocoevalcap: pip install pycocoevalcap") from None
    if shutil.which("java") is None:
        raise UserError(
            f"{what} needs Java, and there is no `java` on the PATH: install a runtime (Debian: apt install default-jre-headless)"
        )


# --- scores, of captions as `tokenize` writes them ---

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
    found = iter(_tokenize_java(captions) if tokenizer == "java" else map(tokenize, captions))
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
            _needs_java(name)


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
