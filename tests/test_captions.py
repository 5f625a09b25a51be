"""Captions are tokenized and scored as by pycocoevalcap.

The oracle is its recorded answers and, if it is installed, the package itself.
"""

import json
import random
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from eval.captions import caption_errors, caption_scores, cider
from eval.ptb_tokenizer import tokenize
from utils.errors import UsageError, UserError

FIXTURES = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "coco_captions"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no captions of COCO at {FIXTURES}")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on this machine")


@needs_fixtures
def test_tokens_of_coco():
    rows = [json.loads(line) for line in (FIXTURES / "ptb_tokens.jsonl").read_text().splitlines()]
    wrong = [row["caption"] for row in rows if tokenize(row["caption"]) != row["tokens"]]
    assert len(rows) > 3000 and len(wrong) <= len(rows) / 1000, wrong


# Answers of pycocoevalcap 1.2's PTBTokenizer, white space made single spaces before.
RECORDED = [
    ('A man, a plan... and "two" cats!', "a man a plan and two cats"),
    ("The bear (left) is [sic] {odd}.", "the bear -lrb- left -rrb- is -lsb- sic -rsb- -lcb- odd -rcb-"),
    (
        "I can't see it; you cannot, and they're gonna go.",
        "i ca n't see it you can not and they 're gon na go",
    ),
    (
        "The dogs' bowls aren't James's, y'all: 'tis the '80s.",
        "the dogs bowls are n't james 's y' all 't is the '80s",
    ),
    (
        "Rock 'n' roll at six o'clock with O'Brien's s'mores.",
        "rock 'n' roll at six o'clock with o'brien 's s'mores",
    ),
    (
        "It costs $5 or £3.50, 99¢, 5% off of €10 at #23.",
        "it costs $ 5 or # 3.50 99 cents 5 % off of $ 10 at # 23",
    ),
    ("At 10:30am or 4pm, 5 p.m. in the U.S. in 1990's.", "at 10:30 am or 4pm 5 p.m. in the u.s. in 1990 's"),
    (
        "Mr. Smith, Jr. of St. Louis, Calif. met e.g. Ph.D. students etc.",
        "mr. smith jr. of st. louis calif. met e.g. ph.d. students etc.",
    ),
    (
        "He took No. 5, no. 7 and said no. Then plan B. The end is vitamin C.",
        "he took no. 5 no. 7 and said no then plan b the end is vitamin c.",
    ),
    (
        "A red-and-white T-shirt and/or 1/2 of 2 1/2 pies, ½ eaten -- or a man-made one — not -here.",
        "a red-and-white t-shirt and/or 1/2 of 2\xa01/2 pies 1/2 eaten or a man-made one not here",
    ),
    (
        "See http://a.org/b?c=d. Mail me@b.co.uk, @cat_1 #dog or www.cat.com!",
        "see http://a.org/b?c=d mail me@b.co.uk, @cat_1 #dog or www.cat.com",
    ),
    (
        "“Don’t walk,” says the ‘sign’ … it’s 5′2″ • naïve ☕ 😀.",
        "do n't walk says the sign it 's 5 ′ 2 ″ • naïve ☕",
    ),
    (
        "R&amp;B or R&B &quot;bar&quot; at a b&b, <b>AT&T</b>, C++ and C#.",
        "r&b or r&b bar at a b & b <b> at&t </b> c++ and c#",
    ),
    (
        "cats,dogs cats,2 dogs street.and one;two 3x4 5°C x² =) :-( <3 ^_^",
        "cats dogs cats ,2 dogs street.and one two 3x4 5 ° c x ² =-rrb- :--lrb- < 3 ^_^",
    ),
    ("ÉTÉ Ελλάς 日本語 한국 “‘quoted’”", "été ελλάς 日本語 한국 ``` quoted '''"),
    ("One\r\ntwo\x0cthree\u2028four\tfive\xa0six\x07seven", "one two three four five six seven"),
    (
        "C'mon, ol' pal: nothin' or somethin' from Dunkin' — li'l nat'l nor'easter cap'n ev'ry e'er.",
        "c'mon ol' pal nothin or somethin' from dunkin' li'l nat'l nor'easter cap'n ev'ry e'er",
    ),
    ("", ""),
    ("...", ""),
    ("(555) 123-4567 or 555-1234 or 12/25/2014", "-lrb-555-rrb-\xa0123-4567 or 555-1234 or 12/25/2014"),
    ('5\'10" tall, 8"x10" and 6-foot; 1,000.50 -5 +7 .5', "5 10 tall 8 x10 and 6-foot 1,000.50 -5 +7 .5"),
]


@pytest.mark.parametrize("caption, tokens", RECORDED)
def test_tokens(caption, tokens):
    assert tokenize(caption) == tokens


NOUNS = [
    "man",
    "woman",
    "dog",
    "cat",
    "giraffe",
    "bus",
    "train",
    "pizza",
    "clock",
    "umbrella",
    "sign",
    "bench",
    "café",
    "zebra",
    "T-shirt",
    "fire hydrant",
    "teddy bear",
]
VERBS = [
    "is standing",
    "sits",
    "reads",
    "isn't looking",
    "cannot see",
    "rides",
    "is holding",
    "can't reach",
    "is gonna eat",
    "DOESN'T like",
    "waits for",
    "looks at",
]
PLACES = [
    "on the street",
    "at the U.S. Open",
    "in the men's room",
    "near St. Paul's",
    "by the sea",
    "on Elm St.",
    "in Washington, D.C.",
    "on a double-decker bus",
]
PIECES = (
    r"""
don't  Don't  DON'T  won't  I'm  it's  they've  he'd  you're  she'll  could've  shouldn't've  ain't  """
    r"""y'all  'tis  'twas  gonna  wanna
gimme  lemme  gotta  cannot  Cannot  o'clock  O'Brien's  rock 'n' roll  rock'n'roll  the '80s  1980's  """
    r"""the dogs' bowls  James's  ma'am  s'mores
goin'  'em  'til  more'n  d'oeuvres  don’t  it’s  dogs’  O’Neill  cafe's  each other's  nothin'  c'mon  """
    r"""jack-o'-lantern  do's and don'ts
"STOP"  'stop'  “stop”  ‘stop’  "one way".  'go,'  “Don’t walk.”  «pain»  ``quoted''  "  '  ”  5'10"  6'  """
    r"""12"  8"x10"  5′2″
(left)  [sic]  {a}  (the red one.)  ((deep))  (a  b)  (1)  2)  :)  :-)  ;-)  :(  :D  <3  ^_^  xD  :P  =)
$5  $1,000.50  $.99  US$20  £5  €10  10€  ¥500  99¢  5 cents  $5-$10  50%  3.5%  100%-pure  #23  # 5  """
    r"""#1's  No. 5  no. 7  No.
10:30am  10:30 a.m.  4pm  4 p.m.  7:15  12:00:05  5 o'clock  12/25/2014  2014-12-25  Dec. 25, 2014  """
    r"""25.12.2014  Sept. 3rd  9/11  24/7  Mon.  1990s
3.5  1,000  1,000,000  -5  +7  .5  5,  1/2  2 1/2  ½  1½  ¼ cup  ⅓  3/4-inch  5-year-old  1st  22nd  10k  """
    r"""5kg  6ft  6-ft.  20mph  747-400
5°C  x2  3x4  3×4  4x4  100m²  H2O  B-52  F250  0.5mm  1,5  10-20  2-3  '99  70's  90°  2.5ft  iPhone4  """
    r"""555-1234  1-800-555-1234
Mr. Smith  Mrs. Jones  Dr. Who  St. Louis  Inc.  Ltd.  Co.  e.g.  i.e.  etc.  etc.,  vs.  approx.  Jr.  """
    r"""Ph.D.  U.S.  U.K  a.m.  J.R.R. Tolkien  N.Y.C.
plan B. Then  U.S.A.-made  Ave.  ft.  in.  lbs.  Calif.  L.A.  T.V.  R.V.  A. The end  A.B.C  Capt. Kirk  """
    r"""Fig. 2  pp. 3-4  vol. 2  Oct.  Gov. X
...  ....  …  . . .  wait...what  wait…what  ..  --  ---  -  —  –  man—dog  man–dog  man--dog  man -dog  """
    r"""man- dog  5–10  one - two  semi-  -pro
red-and-white  in-n-out  multi- colored  black/white  and/or  he/she/they  w/  w/o  c/o  /  //  A/C  """
    r"""1/2in  either / or  t-shirt's  half‐time  X-ray's
me@example.com  a.b-c@d.co.uk  @handle  @cat_lover99  #dog  #nofilter!  #cat2  #dog-lover  """
    r"""http://example.com/a?b=c&d=e  https://www.flickr.com/photos/1_2/  www.cat.org
example.com  http://t.co/x.  (www.cat.com)  cat.jpg  IMG_1234.JPG  snake_case  __init__  """
    r"""flickr.com/photos  C++  C#  AT&T  R&B  B&B's  M&M's  salt & pepper  a&b
&amp;  R&amp;B  &quot;hi&quot;  &lt;b&gt;  &nbsp;  &#39;  caf&eacute;  <b>  <br />  </a>  a < b  a > b  """
    r"""->  =>  =  +  1+1=2  a+b  *  **  *bold*  ~  ~5  ^
\  |  _  %  @  &  $  #  !  !!  ?  ?!  !?!  wow!Look  really?yes  Yahoo!  ¿qué?  ¡hola!  naïve  café  """
    r"""Señor  ÉTÉ  Zürich  crème brûlée
日本  日本語の看板  한국  Привет  Ελλάς  مرحبا  😀  👍🏽  🇺🇸  ☕  ❤️  ♥  ★★★  →  ©  ®  ™  •  ·  §  № 5  °F  µm
STOP AHEAD  NaN  i  I  A  a  ;  one;two  :  one:two  ,  cats,dogs  cats,2 dogs
hangar,a plane  street.and  street.A  street .  street ,  street.,  (street).  's  n't  '  ''  `  ’  """
    r"""‚low’  „low“  0-0  it 's  do n't  x'y  a'b'c  5's
"""
)
# What two spaces do not keep apart, or an eye.
UNSEEN = [
    "e\u0301te",
    "👩\u200d👩\u200d👧",
    "\u200b",
    "\ufeff",
    "\xad",
    "co\xadop",
    "\x00",
    "\x07",
    "\x7f",
    "\x1b[0m",
    "\t",
    "\n",
    "\r\n",
    "\f",
    "\u2028",
    "\xa0",
    "\u3000",
    "",
    "  ",
]
ENDS = [
    ".",
    ".",
    ".",
    "",
    "",
    "!",
    "?",
    "...",
    ' ."',
    '."',
    ".)",
    "..",
    " .",
    "!!",
    ",",
    ";",
    "…",
    "?!",
    "\n",
    "’s.",
    " etc.",
]


def nasty(count: int, seed: int) -> list[str]:
    """Random captions, with text that is hard to tokenize inserted and joined in many ways."""
    rng = random.Random(seed)
    token_logprobs = [piece for line in PIECES.split("\n") for piece in line.split("  ")] + UNSEEN
    captions = []
    for _ in range(count):
        article = rng.choice(["A", "The", "Two", "a", "There's a", "An old", "THIS", "“A", '"The', "(The"])
        words = [
            article,
            rng.choice(NOUNS),
            rng.choice(VERBS),
            rng.choice(["a", "the", "his", "one's"]),
            rng.choice(NOUNS),
            *rng.choice(PLACES).split(),
        ]
        for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
            piece = rng.choice(token_logprobs)
            around = rng.choice(
                ["{}"] * 10
                + [
                    "{},",
                    "{}.",
                    "({})",
                    '"{}"',
                    "“{}”",
                    "'{}'",
                    "{};",
                    "{}:",
                    "{}!",
                    "{}-like",
                    "{}'s",
                    "non-{}",
                    "{}…",
                    "[{}]",
                    "{}/{}",
                ]
            )
            words.insert(rng.randint(0, len(words)), around.format(piece, rng.choice(token_logprobs)))
        caption = " ".join(words) + rng.choice(ENDS)
        change = rng.random()
        captions.append(
            caption.upper()
            if change < 0.05
            else caption.lower()
            if change < 0.1
            else ""
            if change < 0.105
            else caption
        )
    return captions


@needs_java
def test_tokens_are_those_of_java():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from eval.ptb_tokenizer import tokenize_java

    captions = nasty(5000, 0)
    # The line after a caption can change its tokens there ("plan B." before "The"); "end" does not.
    expected = tokenize_java([line for caption in captions for line in (caption, "end")])[::2]
    wrong = [
        (caption, tokens, tokenize(caption))
        for caption, tokens in zip(captions, expected, strict=True)
        if tokenize(caption) != tokens
    ]
    assert len(wrong) <= 5, wrong[:20]


@needs_java
def test_java_can_be_chosen():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    shifting = ["One\r\ncat.", "Two\fdogs", "Three\u2028cows", "", "A (red) bus \ud83d", ""]
    references = [["A cat."], ["Dogs, two"], ["Three cows.", ""], ["An ox"], ["a red bus"], ["The end"]]
    assert cider(shifting, references, tokenizer="java") == cider(shifting, references)
    assert cider(shifting, references).score > 1


@needs_fixtures
def test_cider_of_the_fixture():
    stored = json.loads((FIXTURES / "cider.json").read_text())
    result = cider(
        [image["candidate"] for image in stored["images"]],
        [image["references"] for image in stored["images"]],
    )
    assert result.score == pytest.approx(stored["cider"], abs=1e-4)
    assert result.each == pytest.approx([image["cider"] for image in stored["images"]], abs=1e-4)
    assert result.warning is None


REFERENCES = [
    ["A cat is sitting on the mat.", "The cat sat on a mat"],
    ["A dog is running in a park.", "Dogs run", "A brown dog runs through the green park."],
    ["Two red buses on a street."],
]
CANDIDATES = [
    "A cat sits on the mat",
    "A dog is running in the park.",
    "Two buses are on the street near a red car.",
]
POOR = ["", "Dog", "two two buses"]
SHORT = ["cat sat on a", "a dog is running", "red buses on a street"]


@pytest.mark.parametrize(
    "candidates, each, bleu, rouge",  # from pycocoevalcap 1.2, on the tokens
    [
        (
            CANDIDATES,
            [2.657652660890086, 2.6350452592563034, 1.5097043872771105],
            0.30976435098368943,
            0.713151491673047,
        ),
        (SHORT, [3.7884288747474, 2.065654191948176, 8.442064654729759], 0.92596107843919, 0.786587289802888),
        (POOR, [0.0, 0.4188612220150606, 0.97027926901575], 6.423498275663901e-11, 0.2131535309174968),
    ],
)
def test_scores(candidates, each, bleu, rouge):
    result = cider(candidates, REFERENCES)
    assert result.each == pytest.approx(each, abs=1e-9) and result.score == pytest.approx(
        sum(each) / 3, abs=1e-9
    )
    scores = caption_scores(candidates, REFERENCES, ["ROUGE-L", "CIDEr", "BLEU-4"])
    assert list(scores) == ["ROUGE-L", "CIDEr", "BLEU-4"]
    assert scores == pytest.approx({"CIDEr": result.score, "BLEU-4": bleu, "ROUGE-L": rouge}, abs=1e-9)


def test_scores_are_those_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = random.Random(0)
    whole = nasty(300, 1)
    first = [" ".join(caption.split()[: rng.randint(0, 12)]) for caption in whole]
    references = [
        [
            " ".join(word for word in caption.split() for _ in range(rng.choice([0, 1, 1, 1, 2])))
            for _ in range(rng.randint(1, 5))
        ]
        for caption in whole
    ]
    truths = {i: [tokenize(text) for text in texts] for i, texts in enumerate(references)}
    results = {i: [tokenize(text)] for i, text in enumerate(first)}
    score, each = Cider().compute_score(truths, results)
    result = cider(first, references)
    assert result.score == pytest.approx(score, abs=1e-9) and result.each == pytest.approx(
        list(each), abs=1e-9
    )
    expected = dict(
        zip(
            ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
            Bleu(4).compute_score(truths, results, verbose=0)[0],
            strict=True,
        )
    )
    expected["ROUGE-L"] = Rouge().compute_score(truths, results)[0]
    assert caption_scores(first, references, list(expected)) == pytest.approx(expected, abs=1e-9)


def test_standard_errors_are_the_spread_over_samples_of_images():
    """Standard errors equal the spread of scores over corpora resampled with replacement.

    CIDEr's is compared with its definition, for its weights change with the corpus.
    """
    rng = random.Random(0)
    words = [
        "a",
        "red",
        "blue",
        "cat",
        "dog",
        "bus",
        "street",
        "on",
        "the",
        "in",
        "park",
        "runs",
        "sits",
        "two",
    ]
    references = [[" ".join(rng.choices(words, k=rng.randint(4, 9))) for _ in range(3)] for _ in range(80)]
    candidates = [
        " ".join(word if rng.random() < 0.7 else rng.choice(words) for word in texts[0].split())
        for texts in references
    ]
    names = ["CIDEr", "BLEU-1", "BLEU-4", "ROUGE-L", "METEOR"]
    errors = caption_errors(candidates, references, names)
    each = cider(candidates, references).each
    assert list(errors) == names[:-1] and errors["CIDEr"] == pytest.approx(statistics.stdev(each) / 80**0.5)
    drawn = {name: [] for name in names[1:-1]}
    for _ in range(150):
        images = rng.choices(range(80), k=80)
        for name, score in caption_scores(
            [candidates[i] for i in images], [references[i] for i in images], list(drawn)
        ).items():
            drawn[name].append(score)
    for name, scores in drawn.items():
        assert errors[name] == pytest.approx(statistics.stdev(scores), rel=0.2), name
    assert (
        caption_errors(["a"], [["a"]], names) == caption_errors(["a cat"] * 3, [["a cat"]] * 3, names) == {}
    )


def test_rouge_by_hand():
    # Two of three words of the caption, all of the reference: 2.44 · ⅔ · 1 / (1 + 1.44 · ⅔).
    assert caption_scores(["red cat here"], [["red here"]], ["ROUGE-L"]) == {
        "ROUGE-L": pytest.approx(0.829931972789, abs=1e-9)
    }


@needs_java
def test_meteor():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    scores = caption_scores(CANDIDATES, REFERENCES, ["METEOR", "CIDEr"])
    assert (
        scores["METEOR"] == pytest.approx(0.4452462513283359, abs=1e-6)
        and scores["CIDEr"] == cider(CANDIDATES, REFERENCES).score
    )


OTHERS = [[f"word{i} and another{i} in image{i}"] for i in range(200)]


@pytest.mark.parametrize(
    "text, maximum",
    [
        ("cat", 2.5),
        ("red cat", 5.0),
        ("a red cat", 7.5),
        ("a red cat sits", 10.0),
        ("a red cat sits here", 10.0),
    ],
)
def test_a_perfect_caption_of_few_words_is_capped(text, maximum):
    result = cider([text, *(texts[0] for texts in OTHERS)], [[text], *OTHERS])
    assert result.each[0] == pytest.approx(maximum) and result.warning is None


@pytest.mark.parametrize("count, words, maximum", [(150, 1, "2.5"), (150, 2, "5"), (3, 3, "7.5")])
def test_references_of_few_words_are_reported(count, words, maximum):
    references = [[" ".join(f"word{i}{j}" for j in range(words))] for i in range(count)]
    result = cider([texts[0] for texts in references], references)
    assert (
        result.score == pytest.approx(float(maximum))
        and f"cannot exceed {maximum}:" in result.warning
        and "\n" not in result.warning
    )


def test_one_image_scores_nothing():
    result = cider(["A red cat sits."], [["A red cat sits.", "A cat."]])
    assert result.each == [0.0] and "1 image is 0 whatever its caption" in result.warning


@pytest.mark.parametrize("count", [2, 3, 7, 150])
def test_same_references_score_nothing(count):
    result = cider(
        ["a red cat sits here"] * count, [["A red cat sits here.", "A red cat sits, here"]] * count
    )
    assert result.each == [0.0] * count and f"all {count} images have the same references" in result.warning


def test_few_images_are_reported():
    texts = [texts[0] for texts in OTHERS]
    assert "CIDEr of 99 images means little" in cider(texts[:99], OTHERS[:99]).warning
    assert cider(texts[:100], OTHERS[:100]).warning is None


def test_captions_without_words():
    result = cider(["", "..."], [["", "."], [""]])
    assert result.each == [0.0, 0.0] and "0 whatever the captions" in result.warning
    assert caption_scores(["", "..."], [["a cat"], ["two"]], ["CIDEr", "BLEU-4", "ROUGE-L"]) == {
        "CIDEr": 0.0,
        "BLEU-4": 0.0,
        "ROUGE-L": 0.0,
    }


def test_counts_must_match():
    with pytest.raises(ValueError, match="2 captions, 1 images"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 captions, 0 images"):
        caption_scores([], [], ["CIDEr"])
    with pytest.raises(ValueError, match=r"image 1 of 2: .* not \[\]"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="image 0 of 1: .* not 'a cat'"):
        cider(["a"], ["a cat"])


def test_unknown_names():
    with pytest.raises(UsageError, match="no caption metric 'Cider' .did you mean 'CIDEr'"):
        caption_scores(["a"], [["a"]], ["BLEU-4", "Cider"])
    with pytest.raises(UsageError, match="no tokenizer 'jave' .did you mean 'java'"):
        cider(["a"], [["a"]], tokenizer="jave")


@pytest.mark.parametrize(
    "use",
    [lambda: cider(["a"], [["a"]], tokenizer="java"), lambda: caption_scores(["a"], [["a"]], ["SPICE"])],
)
def test_missing_requirements_of_java_are_reported(use, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match="needs the package pycocoevalcap: pip install pycocoevalcap"):
        use()
    monkeypatch.setitem(sys.modules, "pycocoevalcap", sys)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs Java, .* install a runtime"):
        use()
