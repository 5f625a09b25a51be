"""Penn Treebank tokens of captions, equal to those of the Java tokenizer that pycocoevalcap runs.

The rules were derived from that program's output.
"""

import re
import shutil

from utils.errors import UserError

# Character classes
L = (  # letters
    "A-Za-zªµºÀ-ÖØ-öø-\u02ffͰ-ͽͿ-Ά\u0388-\u1fff"
    "\u2c00-\u2fff\u3005-\ud7ff\uf900-\ufdff\ufe70-\ufefe０-９Ａ-Ｚａ-ｚｦ-ￜ"
)
A = L + "0-9\xad"  # letters, digits and the soft hyphen, which `tokenize` removes
# A combining accent ends a hyphenated word.
WORD = f"(?:[{L}0-9][{A}]*(?:[-_\u2010\u2011][{A}]+)*(?![{A}\u0300-\u036f])|[{A}\u0300-\u036f]+)"
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
INNER = f"{QUOTE}(?!{CLITIC}{END})"  # the apostrophe of O'Brien, not of it's
CONTRACTION = (  # the first part of cannot, gonna, wanna, gotta, gimme, lemme
    "(?i:can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:gim|lem)(?=me))"
    f"(?=(?i:not|[nt]a|me)(?![-_]?[{A}]|['’]{CLITIC}{END}))"
)
# Words that start a sentence: "B." before one of them is the end of the last sentence, not an initial.
STARTERS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More"
    "|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When"
    "|While|Yet|You"
)
# Abbreviations that are ordinary words in lower case.
STATES = "Ark|ARK|Az|AZ|Del|DEL|Ill|ILL|La|LA|Mass|MASS|Miss|MISS|Ore|ORE|Pa|PA|Tex|TEX|Wash|WASH"
CLOSING = (  # abbreviations that may end a sentence
    "al|ala|apr|ariz|assn|aug|bhd|bldg|blvd|bros|calif|cos?|colo|conn|corp|ct|dak|dec|esq|est|etc|ext|feb"
    "|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kans?|ky|ltd|mar|md|mich|minn|mo|mon|mont|neb|nev"
    "|nov|oct|okla|penn|plc|pptes?|pptys?|ptes?|ptys?"
    "|rd|rt|sep|sept|seq|sq|sr|sys|tel|tenn|thu|thurs|tues?|univ|va|vt|wed|wis|wisc|wyo"
)
CLOSING = f"(?:(?i:{CLOSING})|{STATES})\\."
TITLES = (
    "adj|adm|adv|alex|assoc|asst|attys?|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|drs?|elec|ens|ft"
    "|gen|govs?|hon|insp|invt|jos|lieut|lt|maj|mfg|mlle|mme|mrs?|ms|msgr|mt|mtg|natl|pfc|ph|pres|profs?|pvt"
    "|reps?|rev|sens?|sfc|sgt|spc|st|ste|supts?|treas|vs|wm"
)
NUMBERED = "art|ca|figs?|nos?|op|pp|prop"
NAME = r"[A-Za-z_][A-Za-z0-9_.:-]*"

# The first alternative that matches is taken. Unmatched text, and the matches of the last line, are dropped.
TOKEN = re.compile(
    rf"""(?:,?[ ])*(?:(
    (?!{CONTRACTION})[A-Za-z]+(?=,?(?:[ ]|$))  # most words
  | <(?:/{NAME}|!--.*?--|[!?]?{NAME}
      (?:[ ][A-Za-z_.:-][A-Za-z0-9_.:-]*(?:[ ]?=[ ]?(?:"[^"]*"|'[^']*'))?)*[ ]?[/?]?)>  # <b>
  | (?i:https?)://[^\s<>"|()]+[^\s<>"|.!?(){{}},-]
  | <?[A-Za-z0-9][^\s<>"|(){{}}]*@(?:[^\s<>"|(){{}}.]+\.)*[^\s<>"|(){{}}.]+>?  # a@b.org
  | (?:www\.(?:[^\s<>"|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}
      |(?:[^\s<>"|!?(){{}},-_$'`]+\.)+(?i:com|net|org|edu))(?![.!?-]?[{A}])
      (?:/[^\s<>"|()]+[^\s<>"|.!?(){{}},-])?
  | @[A-Za-z_][A-Za-z0-9_]* | [#][{L}]+ | &(?:[#][0-9]+|QUOT);  # @handle, #tag, &#39;
  | [{A}]*(?:&(?i:[aeiou](?:acute|grave|uml));[{A}]*)+  # caf&eacute;
  | (?:\([0-9]{{2,3}}\)[ ]?|(?:\+\+?)?(?:[0-9]{{2,4}}[- ])?[0-9]{{2,4}}[- ])
      [0-9]{{3,4}}[- ]?[0-9]{{3,5}}  # (555) 123-4567
  | [0-9]{{1,2}}[-/][0-9]{{1,2}}[-/][0-9]{{2,4}}(?!-?[{A}])  # 12/25-2014
  | [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}  # and/or
  | (?:[0-9]{{1,4}}[- ])?[0-9]{{1,4}}[/⁄][0-9]{{1,4}}  # 2 1/2
  | (?:[{A}]+[-_])*[dolDOL]{INNER}[{A}]{{2,}}(?:[-_][{A}]+)*  # o'clock
  | [A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{ACRONYM}|[A-Za-z0-9]+(?![{A}])))+
      (?![-_‐‑][{A}]|\.[,;:])  # U.S.-made, 5,000-seat
  | (?:{WORD}|{DOTTED})\.(?=[,;:])
  | (?:[{A}]+-)+{ACRONYM} | {ACRONYM}(?![{L}])
  | (?:{CLOSING}(?=[{L}])|(?i:ed|ph)\.[dD]\.)(?![{L}](?:[{A}]|[.!?][{L}])) | {DOTTED}
  | {CLOSING} | (?i:{TITLES})\. | (?i:{NUMBERED})\.(?=[ ]?[0-9])
  | [A-Za-z]\.(?![ ](?:{STARTERS}|{STARTERS.upper()})(?:[ ]|$))
  | [A-Z]+(?:[&+][A-Z]+)+ | [A-Z]*\$ | [Cc]\+\+ | [CcFf][#]  # R&B, US$, C++, F#
  | [A-HJ-XZn]{INNER}[{L}]{{2,}} | [{L}]+[aeiouyAEIOUY]{INNER}[aeiouA-Z][{L}]*  # S'mores, ma'am
  | (?i:'n'|’n’|['’](?:em|till?|cause)|[ldj]['’](?!{CLITIC}{END})
      |y['’](?![sdm]|ll|re|ve)(?=[{L}])|ol{QUOTE}|o{QUOTE}o
      |(?:c'mon|c'est|cap'n|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores){END}|dunkin'|somethin')
  | (?i:'t(?=is|was)) | {CONTRACTION}  # 't is, can not
  | (?i:[a-z]*?[a-mo-z](?=n{QUOTE}t)|n{QUOTE}t{END}|'{CLITIC}{END}|[’\x92]{CLITIC})  # do n't, it 's
  | ['’][0-9][0-9](?=[ ]|$) | ['’][2-9]0[sS] | ['’]n(?=[ ]|$) | ’[nN]  # '99, '80s
  | {NUMBER}(?:[.,:][0-9]+)+ | {WORD} | {NUMBER}
  | [<>]?[:;=][-o'*]?[()\[\]{{DdPpO|@\\](?![A-Za-z0-9])  # :-)
  | [-^x=~<>']_[-^x=~<>'] | \([-^x=~<>'][_.]?[-^x=~<>']\)  # ^_^
  | [!?]{{2,}} | [#]+ | [*]+ | _+ | @+ | << | >> | \\[*] | -{{5,}}
  | [²³¹⁰⁴-⁹₀-₉]+ | [`‘’“”«»‹›‛‚„‟\x91-\x94]{{1,2}}
  | [%&+=\\^|~<>/()\[\]{{}}¡-¬®-±´¶-¸¼-¿×÷‖‗†-•‰-‸※-⁂⁄⁺-⁾₊-₎₠₤€℀-⅏⅓-⅞←-⯿、。〒・！-／：-＠［-｀｛-･￠￡￥￦\x80]
  ) | '' | -{{2,4}} | \.{{3,}})""",
    re.VERBOSE,
)
REPLACEMENTS = {
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
REPLACEMENTS |= (
    dict.fromkeys("€¤₠\x80", "$")
    | {f"’{c}": f"'{c}" for c in ("s", "d", "m", "ll", "re", "ve")}
    | {"n’t": "n't", "n‘t": "n`t", "n‛t": "n`t"}
)
# Quotes are dropped; two different ones side by side are not.
REPLACEMENTS |= dict.fromkeys(["''", "``", "'", "`"], "")
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
    """Split a caption into lower-case tokens without punctuation, joined by spaces.

    `"A cat's toy (red)."` → `"a cat 's toy -lrb- red -rrb-"`, as pycocoevalcap's Java tokenizer does with
    this caption alone. In a file of captions the Java program looks past the end of a line: a final "plan B."
    loses its full stop where the next caption starts with one of `STARTERS`.
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
    written = [REPLACEMENTS.get(token, token).replace(" ", "\xa0") for token in tokens]
    return " ".join(token for token in written if token).replace("(", "-lrb-").replace(")", "-rrb-")


def tokenize_java(captions: list[str]) -> list[str]:
    """Tokenize with pycocoevalcap's Java program. Errors: `UserError` where it or Java is missing."""
    require_java("the Java tokenizer")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # \r, \f or U+2028 in a caption would shift all later lines; a lone surrogate cannot be encoded.
    lines = [" ".join(caption.split()).encode(errors="ignore").decode() for caption in captions] + ["end"]
    tokenized = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    if tokenized.get(len(captions)) != ["end"]:
        raise UserError(
            f"the Java tokenizer failed: {len(tokenized)} lines came back of {len(lines)}; "
            "`java -version` must work, and pycocoevalcap's folder be writable"
        )
    return [tokenized[i][0] for i in range(len(captions))]


def require_java(feature: str) -> None:
    """Raise `UserError` where pycocoevalcap or Java is missing; `feature` needs them."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        raise UserError(f"{feature} needs the package pycocoevalcap: pip install pycocoevalcap") from None
    if shutil.which("java") is None:
        raise UserError(
            f"{feature} needs Java, and there is no `java` on the PATH: "
            "install a runtime (Debian: apt install default-jre-headless)"
        )
