"""The page of `tools.training_report`: charts (matplotlib objects) and tables, against the input numbers."""

import base64
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import utils.files
from tools import training_report as report
from tools.run_curves import Key
from utils.errors import UsageError, UserError

pytest.importorskip("matplotlib", reason="the group report is not installed")

HOSTILE = '<script>alert(1)<\\script> "it\'s" &amp; <b>$x_1$<!-- -->'  # a folder's name holds no /
ROOT = Path(__file__).parent.parent


class Reader:
    """A page, which is XML too: every element is closed."""

    def __init__(self, text: str) -> None:
        self.root = ElementTree.fromstring(text)
        self.text = "".join(self.root.itertext())
        self.rows = [[cell.text or "" for cell in row] for row in self.root.iter("tr")]
        self.heads = [head.text for head in self.root.iter("h2")]
        self.warnings = [p.text for p in self.root.iter("p") if p.get("class") == "warn"]
        sources = [(image.get("alt"), *image.get("src").split(";base64,")) for image in self.root.iter("img")]
        self.charts = {
            alt: base64.b64decode(data).decode()
            for alt, kind, data in sources
            if kind == "data:image/svg+xml"
        }
        self.images = {alt: base64.b64decode(data) for alt, kind, data in sources if kind == "data:image/png"}
        assert all(
            ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
            for svg in self.charts.values()
        )
        assert len(self.charts) + len(self.images) == len(sources)


def write(
    folder: Path, lines: list[dict] | str, config: dict | None = None, skipped: list[dict] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if skipped is not None:
        (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skipped))
    return folder


def read(*folders: Path) -> Reader:
    report.main([*map(str, folders)])
    return Reader((folders[0] / "report.html").read_text(encoding="utf-8"))


def drawn(*folders: Path) -> dict:
    """Title → axes of each chart."""
    runs = [report.read_run(folder, folder.name) for folder in folders]
    return {title: report.draw(title, lines, 100).axes[0] for title, lines in report.charts(runs).items()}


def lines_of(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of a line, as in the legend → its steps and values."""
    return {line.get_label().strip(): line.get_data() for line in axes.lines}


def trained(count: int, **more) -> list[dict]:
    """Lines as training writes them: calm, so that nothing is smoothed."""
    rate = [0.001 * min(1, n / 10) for n in range(count + 1)]
    return [
        {
            "step": n,
            "loss": 6 * 0.99**n + 1,
            "grad_norm": 900 * 0.9**n,
            "lr": {"projector": 5 * rate[n], "left": rate[n], "right": rate[n]},
            "seconds": n / 4,
        }
        | {key: value(n) for key, value in more.items()}
        for n in range(1, count + 1)
    ]


def test_every_number_is_drawn_and_listed(tmp_path):
    lines = trained(
        90,
        head_losses=lambda n: [2 + n / 10, 3.0],
        wait=lambda n: -n / 7,
        word=lambda n: "no number",
        yes=lambda n: True,
    )
    lines += [{"step": n, "validation_loss": 5 - n / 30, "seconds": n / 4} for n in (30, 60, 90)]
    expected: dict = {}  # title, name → step, value of each
    for line in sorted(lines, key=lambda line: line["step"]):
        for name, value in line.items():
            parts = (
                value
                if isinstance(value, dict)
                else dict(enumerate(value, 1))
                if isinstance(value, list)
                else {name: value}
            )
            for part, number in parts.items():
                if name not in ("step", "word", "yes"):
                    expected.setdefault((name, str(part)), []).append((line["step"], number))
    folder = write(tmp_path / "run", lines, {"max_steps": 200})
    charts, page = drawn(folder), read(folder)
    assert (
        list(charts)
        == list(page.charts)
        == ["loss", "validation_loss", "grad_norm", "lr", "seconds", "head_losses", "wait"]
    )
    assert {title for title, axes in charts.items() if axes.get_yscale() == "log"} == {"grad_norm"}
    rows = {(row[0], row[1] or row[0]): row[2:] for row in page.rows[1:]}
    assert set(rows) == set(expected)
    for (title, name), points in expected.items():
        actual = lines_of(charts[title])["left = right" if name in ("left", "right") else name]
        assert np.array_equal(np.transpose(actual), points)
        minimum, maximum = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
        steps, values = (list(column) for column in zip(points[-1], minimum, maximum, strict=True))
        assert [float(cell.replace(",", "")) for cell in rows[title, name][::2]] == pytest.approx(
            values, rel=1e-5
        )
        assert rows[title, name][1::2] == [f"{step:,}" for step in steps]
    assert list(lines_of(charts["lr"])) == ["projector", "left = right"]  # drawn once, named twice
    assert page.warnings == [] and page.heads[0] == "run" and "step 90 of 200, written 20" in page.text
    assert all(
        text in page.charts["grad_norm"] for text in (">grad_norm<", ">100<", ">0.1<")
    )  # text stays text


@pytest.mark.parametrize(
    ("name", "values", "log"),
    [
        ("loss", [3.0], False),
        ("loss", [0.0, 0.0], False),
        ("loss", [-1e99, 1e99], False),
        ("loss", [9.0, 0.08, 0.5], True),
        ("grad_norms", [1.0, 0.0, 1e-7, None], True),
        ("loss", [1e-99, 1e99], True),
        ("loss", [10.0, 0.01, -0.001], False),
        ("loss", [10**400, 1], False),
        ("tokens", [5, 20, 2000], False),
    ],
)
def test_losses_and_norms_over_decades_are_drawn_by_powers_of_ten(tmp_path, name, values, log):
    folder = write(tmp_path, [{"step": n, name: value} for n, value in enumerate(values, 1)], {})
    axes = drawn(folder)[name]
    assert axes.get_yscale() == ("log" if log else "linear") and list(read(folder).charts) == [name]
    finite = [math.nan if value is None or value > 1e300 else value for value in values]
    assert np.array_equal(axes.lines[0].get_ydata(), finite, equal_nan=True)


def test_the_mean_of_noise_is_drawn_over_it(tmp_path):
    rng = np.random.default_rng(1)
    signal = 2 + 3 * np.exp(-np.arange(5000) / 1500)
    values = (signal + rng.normal(0, 0.5, 5000)).tolist()
    values[2000] = None
    folder = write(tmp_path, [{"step": n, "loss": value, "lr": n} for n, value in enumerate(values, 1)], {})
    charts = drawn(folder)
    raw, mean, gaps = charts["loss"].lines
    assert (
        np.array_equal(raw.get_ydata(), [math.nan if v is None else v for v in values], equal_nan=True)
        and raw.get_alpha() < 0.5
        and gaps.get_xdata() == [2001]
    )
    steps, means = mean.get_data()
    assert len(means) > 100 and steps[0] < 150 and steps[-1] > 4850
    assert (
        np.abs(means - np.interp(steps, np.arange(1, 5001), signal)).max() < 5 * 0.035
    )  # of 200 values: 0.5 / √200
    assert len(charts["lr"].lines) == 1  # which is long, and calm
    assert len(read(folder).charts["loss"]) < 300_000


def test_skipped_steps_are_gaps_with_a_mark(tmp_path):
    lines = trained(40)
    for n in (10, 20):
        lines[n - 1] = {"step": n, "loss": None, "grad_norm": None}
    lines[29]["fill"], lines[30]["fill"] = math.nan, 0.5
    skipped = [
        {"skipped": "loss nan, gradient norm <inf>", "step": n} for n in (10, 25, 60)
    ]  # 25 was taken again after a resume; 60 is still to come
    folder = write(tmp_path, lines, {}, skipped)
    charts = drawn(folder)
    assert (
        list(lines_of(charts["loss"])["skipped"][0])
        == list(lines_of(charts["grad_norm"])["no finite value"][0])
        == [10, 20]
    )
    steps, values = lines_of(charts["loss"])["loss"]
    assert list(steps[np.isnan(values)]) == [10, 20] and list(
        lines_of(charts["fill"])["no finite value"][0]
    ) == [30]
    page = read(folder)
    assert page.warnings == [
        "2 skipped: step 10: loss nan, gradient norm <inf>; step 20"
    ] and ">skipped<" in page.charts["loss"].replace("> ", ">")
    folder = write(
        tmp_path, [line for line in lines if line["step"] % 8 == 0], {}, skipped
    )  # logged now and then
    assert list(lines_of(drawn(folder)["loss"])["skipped"][0]) == [10, 25] and read(folder).warnings[
        0
    ].startswith("2 skipped: step 10: loss nan, gradient norm <inf>; step 25")
    page = read(write(tmp_path / "never", [{"step": n, "loss": None} for n in (1, 2)], {}))
    assert page.charts == {} and page.warnings == [
        "2 skipped: step 1; step 2",
        "No finite number in any line: nothing to draw.",
    ]


def test_several_runs_share_charts(tmp_path):
    a = write(
        tmp_path / "x" / "one",
        trained(50),
        {"seed": 0, "train": {"lr": 1, "clip": 1.0}, "output_dir": "a", "data": {"old": 3}},
    )
    b = write(
        tmp_path / "_two",
        [line | {"loss": line["loss"] * 2} for line in trained(80)],
        {"seed": 0, "train": {"lr": 2, "clip": 1.0}, "output_dir": "b"},
    )
    charts, page = drawn(a, b), read(a, b)
    assert (
        list(charts)
        == list(page.charts)
        == ["loss", "grad_norm", "lr: projector", "lr: left", "lr: right", "seconds"]
    )
    for axes in charts.values():
        assert [text.get_text().strip() for text in axes.figure.legends[0].get_texts()] == ["one", "_two"]
        assert [line.get_color() for line in axes.lines] == [
            "C0",
            "C1",
        ]  # one colour a run, all over the page
    assert np.allclose(
        lines_of(charts["loss"])["_two"], [range(1, 81), [2 * (6 * 0.99**n + 1) for n in range(1, 81)]]
    )
    assert page.heads[:3] == ["one", "_two", "Settings that differ"] and page.rows[:3] == [
        ["setting", "one", "_two"],
        ["train.lr", "1", "2"],
        ["data.old", "3", "–"],
    ]
    assert [
        "loss",
        "_two",
        end := f"{2 * (6 * 0.99**80 + 1):.6g}",
        "80",
        end,
        "80",
        "13.88",
        "1",
    ] in page.rows
    same_names = read(
        a, write(tmp_path / "y" / "one", trained(5)), a / ".." / "one"
    )  # a run given twice is one
    assert same_names.heads == [str(a), str(tmp_path / "y" / "one"), "Values"]
    assert same_names.warnings == ["no config.json: its settings are not known"]


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, "png")
    return file.getvalue()


def test_hostile_text_is_no_markup_and_the_latest_predictions_are_visible(tmp_path):
    odd = HOSTILE + "\u202e\x1b漢"
    folder = write(
        tmp_path / HOSTILE,
        [{"step": n, HOSTILE: 1.0, "lr": {odd: n, "b": 2.0}} for n in range(3)],
        {HOSTILE: 1},
        [{"step": 0, "skipped": HOSTILE}],
    )
    (folder / "samples").mkdir()
    for step, colour in (
        ("000900", 1),
        ("1000000", 2),
        ("000200", 3),
    ):  # the latest has more digits, and comes first by name
        (folder / "samples" / f"step_{step}.png").write_bytes(png(colour))
    (folder / "samples" / "step_000700_tokens.png").write_bytes(png(4))
    for page in (
        read(folder),
        read(folder, write(tmp_path / "b", [{"step": 1, "lr": 1}], {"name": "x", HOSTILE: 2})),
    ):
        assert {element.tag for element in page.root.iter()} <= {
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h2",
            "p",
            "div",
            "table",
            "tr",
            "th",
            "td",
            "img",
        }
        assert not [
            name
            for element in page.root.iter()
            for name in element.attrib
            if name.startswith("on") or name == "href"
        ]
        assert (
            page.heads[0] == HOSTILE
            and HOSTILE in page.charts
            and page.warnings == [f"1 skipped: step 0: {HOSTILE}"]
        )
        assert "\u202e" not in page.text + "".join(page.charts.values()) and any(
            f"{HOSTILE}\\u202e\\u001b漢" in cell for row in page.rows for cell in row
        )
        assert not [svg for svg in page.charts.values() if "<script" in svg]
        assert page.images == {
            f"{HOSTILE}: predictions at step 1,000,000": png(2),
            f"{HOSTILE}: predicted tokens, and the true ones at step 700": png(4),
        }
        assert "$x_1$" in "".join(ElementTree.fromstring(page.charts[HOSTILE]).itertext())  # no formula
        assert (
            next(meta.get("content") for meta in page.root.iter("meta") if meta.get("http-equiv"))
            == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        )
    assert [HOSTILE, "1", "2"] in page.rows and "\n" not in "".join(page.heads)


def test_half_a_last_line_is_passed_over(tmp_path):
    whole = "".join(f'{{"step": {n}, "loss": {n}}}\n' for n in range(1, 10))
    for half in ('{"step": 10, "loss": 1.', "{", "12", '"é'):
        page = read(write(tmp_path, whole + half, {}))
        assert (
            page.warnings == ["the last line of metrics.jsonl is incomplete: the run may be writing it"]
            and "step 9 of –" in page.text
        )
    page = read(
        write(tmp_path, whole.replace("\n", "\r\n") + '\n \n{"step": 10, "loss": 1.5}', {})
    )  # whole, but for its end of line
    assert page.warnings == [] and "step 10 of" in page.text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"step": 4, "loss": 1.', "is damaged"),
        ("\0\0\0", "is damaged"),
        ("[1, 2]", "it is no object with a step"),
        ('{"loss": 1.0}', "it is no object with a step"),
        ('{"step": null}', "its step is None"),
        ('{"step": -4}', "its step is -4"),
        ('{"step": NaN}', "its step is nan"),
        ('{"step": true}', "its step is True"),
        ('{"step": 4, "loss": 1.0}{"step": 5, "loss": 1.0}', "Extra data"),
        ("[" * 100_000, "is damaged"),
        ("\xff", "is damaged"),
    ],
)
def test_damage_is_reported_with_its_line(tmp_path, line, why):
    rows = [json.dumps(row) + "\n" for row in trained(9)]
    folder = write(tmp_path / "run", "")
    for rest in (rows[3:], []):
        (folder / "metrics.jsonl").write_bytes("".join([*rows[:3], line + "\n", *rest]).encode("latin-1"))
        with pytest.raises(UserError, match="metrics.jsonl, line 4 is damaged") as caught:
            report.main([str(folder)])
        assert (
            why in str(caught.value)
            and "\n" not in str(caught.value)
            and len(str(caught.value)) < 300
            and not (folder / "report.html").exists()
        )


def test_what_cannot_be_read_or_written(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text("{}")
    folder = write(tmp_path / "run", trained(3), {})
    wrong = [write(tmp_path / name, trained(3), {}) for name in ("a", "b")]
    (wrong[0] / "skipped.jsonl").write_text('{"step": 1}\nxx\n{"step": 2}\n')
    (wrong[1] / "config.json").write_text("{")
    cases = [
        (UsageError, "holds no metrics.jsonl: give the folder of a run", [tmp_path / "none"]),
        (UsageError, "is no folder: give the folder of a run", [tmp_path / "nowhere"]),
        (UserError, "has no metrics.jsonl yet: its first step is not done", [tmp_path / "young"]),
        (UserError, "skipped.jsonl, line 2 is damaged", [wrong[0]]),
        (UserError, "config.json is not valid JSON", [wrong[1]]),
        *(
            (UserError, "metrics.jsonl holds no whole line", [write(tmp_path / f"empty{i}", text, {})])
            for i, text in enumerate(("", "\n\n", '{"step": 1, "lo'))
        ),
        (UsageError, "does not end in .html", [folder, "--output", folder / "metrics.jsonl"]),
        (
            UserError,
            "page.html could not be written",
            [folder, "--output", tmp_path / "nowhere" / "page.html"],
        ),
    ]
    for kind, message, argv in cases:
        with pytest.raises(kind, match=message):
            report.main([*map(str, argv)])
    report.main([str(folder), "--output", str(tmp_path / "page.html")])
    before = (tmp_path / "page.html").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.files.os, "fsync", full)
    with pytest.raises(UserError, match="page.html could not be written: No space left on device"):
        report.main([str(folder), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_bytes() == before and not (folder / "report.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(
        UserError,
        match=r"matplotlib.* is not installed: reports need the group report "
        r"\(pip install -e '.\[report\]'\)",
    ):
        report.main([str(folder)])


def test_as_a_program(tmp_path):
    """Of what RunLog writes."""
    from training.logging import RunLog

    log = RunLog(tmp_path / "run")
    log.start(0, 3)
    for line in trained(3):
        log.metrics({key: value for key, value in line.items() if key != "seconds"})
    log.stop()
    for flags, code, out, err in (
        ([], 0, "run/report.html: runs 1, charts 4, ", ""),
        (["--ouput", "x.html"], 2, "", "did you mean '--output'?"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tools.training_report", str(tmp_path / "run"), *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (
            done.returncode == code
            and out in done.stdout
            and err in done.stderr
            and (done.stderr if code else done.stdout).count("\n") == 1
        )


def test_curves_of_long_paths_are_distinguished():
    curve, other = (report.Curve(np.arange(3.0), np.full(3, value)) for value in (1.0, 2.0))
    figure = report.draw(
        "loss",
        [report.Line("long/" * 20 + "a/run", 0, curve), report.Line("long/" * 20 + "b/run", 1, other)],
        2.0,
    )
    labels = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert [label[-6:] for label in labels] == ["/a/run", "/b/run"] and all(
        len(label) <= 60 for label in labels
    )


def test_a_step_that_overflowed_is_a_skipped_one(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0, "overflow": 65536.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = report.read_run(tmp_path, "run")
    assert (
        list(run.skipped) == [1.0]
        and run.curves[Key("loss")].values[1:].tolist() == [2.0, 1.5]
        and np.isnan(run.curves[Key("loss")].values[0])
    )
