"""The page of `training.report`: its drawings are read back, by the ticks that stand beside them, and compared with the numbers that went in."""

import base64
import io
import json
import math
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import run_program

import configs.files
from configs.errors import UsageError, UserError
from training import report

ROOT = Path(__file__).parent.parent
HOSTILE = '<script>alert(1)<\\script> "it\'s" &amp; <b><!-- -->'  # a folder's name holds no /
UNITS = {"k": 1e3, "M": 1e6}
VOID = {"meta", "img", "br"}


class Chart:
    """One chart as its reader sees it: curves in the units of the ticks."""

    def __init__(self) -> None:
        self.title, self.small = "", ""
        self.labels: list[tuple[str, float, float, str]] = []  # class, x, y, text
        self.shapes: list[dict] = []
        self.legend: list[str] = []
        self.notes = ""

    def scale(self, axis: str):
        """Place → value, from the ticks; by powers of ten where the chart says so."""
        texts = [(x if axis == "x" else y, text) for _, x, y, text in self.labels if text != "step" and (y > report.HEIGHT - 20) == (axis == "x")]
        values = [float(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else float(text.replace(",", "")) for _, text in texts]
        log = axis == "y" and "powers" in self.small
        if axis == "x":  # the last text may stand a little to the left of its tick
            texts, values = texts[:2], values[:2]
        else:
            texts = [(place - 4, text) for place, text in texts]
        marks = np.log10(values) if log else np.array(values)
        slope, start = np.polyfit([place for place, _ in texts], marks, 1)
        return lambda place: 10 ** (slope * np.array(place) + start) if log else slope * np.array(place) + start

    def curves(self, raw: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Name → steps, values of each line; the strong ones, or of a noisy curve the faint ones (raw)."""
        out = {}
        for shape in self.shapes:
            if "line" in shape["class"] and ("raw" in shape["class"]) == raw:
                points = np.array([[float(n) for n in pair.split(",")] for pair in shape["d"][1:].split("L")])
                out[shape["title"]] = self.scale("x")(points[:, 0]), self.scale("y")(points[:, 1])
        return out


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags: list[tuple[str, dict]] = []
        self.charts: dict[str, Chart] = {}
        self.groups: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict] = []
        self.warnings: list[str] = []
        self.heads: list[str] = []
        self.title = self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def inside(self, tag: str, kind: str = "") -> bool:
        return any(name == tag and kind in [*attrs.get("class", "").split(), ""] for name, attrs in self.open)

    def handle_starttag(self, tag, attrs):
        attrs = {key: value or "" for key, value in attrs}
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append((tag, attrs))
        if tag == "h2":
            self.heads.append("")
        elif tag == "figure":
            self.chart = Chart()
        elif tag == "text":
            self.chart.labels.append((attrs["class"], float(attrs["x"]), float(attrs["y"]), ""))
        elif tag in ("path", "circle") and self.inside("svg", "chart"):
            self.chart.shapes.append(attrs | {"title": "", "tag": tag})
        elif tag == "li":
            self.chart.legend.append("")
        elif tag == "table":
            self.rows = self.tables.setdefault(attrs["class"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img":
            self.images.append(attrs)
        elif tag == "p" and attrs.get("class") == "warn":
            self.warnings.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag
        if tag == "figure" and self.chart.shapes:
            assert self.chart.title not in self.charts
            self.charts[self.chart.title] = self.chart
            self.groups.setdefault(self.heads[-1], []).append(self.chart.title)

    def handle_data(self, data):
        if self.inside("style"):
            return
        if self.inside("title") and not self.inside("svg"):
            self.title += data
            return
        self.text += data
        if self.inside("h2"):
            self.heads[-1] += data
        elif self.inside("title"):
            self.chart.shapes[-1]["title"] += data
        elif self.inside("text"):
            self.chart.labels[-1] = (*self.chart.labels[-1][:3], self.chart.labels[-1][3] + data)
        elif self.inside("figure") and self.inside("h3"):
            name = "small" if self.inside("small") else "title"
            setattr(self.chart, name, (getattr(self.chart, name) + data).strip())
        elif self.inside("li"):
            self.chart.legend[-1] += data
        elif self.inside("figcaption"):
            self.chart.notes += data
        elif self.inside("td") or self.inside("th"):
            self.rows[-1][-1] += data
        elif self.warnings and self.inside("p", "warn"):
            self.warnings[-1] += data


def write(folder: Path, lines: list[dict] | str, config: dict | None = None, **files: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(*folders: Path) -> Reader:
    report.main([*map(str, folders)])
    text = (folders[0] / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    return Reader(text)


def column(lines: list[dict], *path) -> tuple[list[float], list[float]]:
    """Steps and finite numbers at `path` of each line: the oracle of what is drawn."""
    steps, values = [], []
    for line in lines:
        at = line
        for name in path:
            at = at[name] if isinstance(at, list) or name in at else None
            if at is None:
                break
        if isinstance(at, int | float) and math.isfinite(at):
            steps.append(line["step"])
            values.append(at)
    return steps, values


def same(chart: Chart, name: str, steps: list[float], values: list[float]) -> None:
    """Drawn and given, within a quarter of a unit of the drawing."""
    xs, ys = chart.curves()[name]
    assert len(xs) == len(steps)
    assert np.abs(xs - steps).max() <= abs(np.diff(chart.scale("x")([100, 100.25]))[0])
    scaled = np.log10 if chart.small else np.asarray
    assert np.abs(scaled(ys) - scaled(values)).max() <= abs(np.diff(scaled(chart.scale("y")([100, 100.25])))[0])


def trained(count: int, **more) -> list[dict]:
    """Lines as training writes them: calm, so that nothing is smoothed."""
    rates = [{"projector": 0.005 * min(1, n / 10), "left": 0.001 * min(1, n / 10), "right": 0.001 * min(1, n / 10)} for n in range(1, count + 1)]
    return [
        {"step": n, "loss": 6 * 0.99**n + 1, "grad_norm": 900 * 0.9**n, "lr": rates[n - 1], "supervised_tokens": 300 + n, "tokens_per_s": 20_000.5 + 100 * n, "seconds": n / 4}
        | {key: value(n) for key, value in more.items()}
        for n in range(1, count + 1)
    ]


def test_every_number_is_drawn_where_it_belongs(tmp_path):
    more = {
        "head_losses": lambda n: [2 + n / 10, 3.0, 4 - n / 100],
        "update_ratio": lambda n: {"left": 1e-3 * n, "right": 2e-3},
        "mfu": lambda n: 0.3 + n / 1000,
        "data_wait": lambda n: -n / 7,
        "loss_of_source": lambda n: {"easy_vqa": 3 / n},
        "odd": lambda n: n,
    }
    lines = trained(90, **more)
    for n in (30, 60, 90):
        lines.append({"step": n, "validation_loss": 5 - n / 30, "validation_accuracy": n / 100, "vqav2_exact_match": n / 200, "seconds": n / 4})
    page = read(write(tmp_path / "run", lines, {"max_steps": 200}))
    assert page.groups == {
        "Loss and validation": ["loss", "validation_loss", "validation_accuracy", "vqav2_exact_match"],
        "Losses in detail": ["head_losses", "loss_of_source: easy_vqa"],
        "Learning rate, gradient and update": ["grad_norm", "lr", "update_ratio"],
        "Speed, memory and data": ["supervised_tokens", "tokens_per_s", "seconds", "mfu", "data_wait"],
        "Other": ["odd"],
    }
    for name in ("loss", "validation_loss", "validation_accuracy", "vqav2_exact_match", "supervised_tokens", "tokens_per_s", "mfu", "data_wait", "odd", "seconds"):
        same(page.charts[name], "run", *column(sorted(lines, key=lambda line: line["step"]), name))
    same(page.charts["grad_norm"], "run", *column(lines, "grad_norm"))
    assert page.charts["grad_norm"].small == "by powers of ten" and {c.small for n, c in page.charts.items() if n != "grad_norm"} == {""}
    for number, name in enumerate("123"):
        same(page.charts["head_losses"], name, *column(lines, "head_losses", number))
    same(page.charts["lr"], "projector", *column(lines, "lr", "projector"))
    assert page.charts["lr"].legend == ["projector 0.005", "left = right 0.001"] and len(page.charts["lr"].curves()) == 2  # drawn once, named twice
    dots = [shape for shape in page.charts["validation_accuracy"].shapes if shape["tag"] == "circle"]
    assert [dot["title"] for dot in dots] == ["run, step 30: 0.3", "run, step 60: 0.6", "run, step 90: 0.9"]
    assert "step 90 of 200" in page.text and not page.warnings


def test_a_spike_of_one_step_survives(tmp_path):
    """60,000 noisy values, thinned: of each part of the axis the least and the greatest value are there, and the first and the last of all."""
    rng = np.random.default_rng(0)
    values = rng.normal(5, 0.1, 60_000)
    values[31_234], values[777] = 9.0, 1.0
    page = read(write(tmp_path, [{"step": n, "fill": value} for n, value in enumerate(values.tolist(), 1)], {}))
    chart = page.charts["fill"]
    xs, ys = chart.curves(raw=True)[tmp_path.name]
    assert len(xs) < 1100 and (np.diff(xs) >= -1).all()
    for n in (31_234, 777):
        assert abs(ys[np.abs(xs - (n + 1)).argmin()] - values[n]) < 0.02
    parts = np.array_split(values, 100)  # each of some five buckets: their least and greatest are told apart from the page alone
    places = np.clip(((xs - 1) / 600).astype(int), 0, 99)
    for number, part in enumerate(parts[1:-1], 1):
        around = ys[(places >= number - 1) & (places <= number + 1)]
        assert around.min() <= part.min() + 0.02 and around.max() >= part.max() - 0.02
    assert abs(xs[0] - 1) < 60 and abs(xs[-1] - 60_000) < 60 and abs(ys[0] - values[0]) < 0.02 and abs(ys[-1] - values[-1]) < 0.02


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 400), st.floats(-1e6, 1e6)), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_the_least_and_the_greatest_of_each_bucket(points, buckets):
    points.sort(key=lambda point: point[0])
    steps, values = (np.array(column, float) for column in zip(*points, strict=True))
    kept = report.thinned(steps, values, 0.0, 400.0, buckets)
    assert list(kept) == sorted(set(kept)) and {0, len(steps) - 1} <= set(kept) and len(kept) <= 2 * buckets + 2
    for bucket in range(buckets):
        inside = [i for i in range(len(steps)) if min(int(steps[i] / 400.0 * buckets), buckets - 1) == bucket]
        if inside:
            assert {min(values[inside]), max(values[inside])} <= {values[i] for i in kept if i in inside}


def test_the_strong_line_is_the_mean_of_the_noise(tmp_path):
    rng = np.random.default_rng(1)
    signal = 2 + 3 * np.exp(-np.arange(5000) / 1500)
    page = read(write(tmp_path, [{"step": n, "loss": value} for n, value in enumerate((signal + rng.normal(0, 0.5, 5000)).tolist(), 1)], {}))
    chart = page.charts["loss"]
    (xs, ys), (raw, _) = chart.curves()[tmp_path.name], chart.curves(raw=True)[tmp_path.name]
    inner = (xs > 150) & (xs < 4850)  # a mean of 200 values: its error is 0.5 / √200 = 0.035
    assert np.abs(ys - np.interp(xs, np.arange(1, 5001), signal))[inner].max() < 5 * 0.035 and len(raw) > 900
    assert "faint: as logged; strong: mean over 4 % of the steps" in chart.notes


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.floats(-1e3, 1e3)), min_size=1, max_size=200), st.integers(1, 600))
def test_smoothing_against_sums_written_out(points, buckets):
    points.sort(key=lambda point: point[0])
    steps, values = (np.array(column, float) for column in zip(*points, strict=True))
    held = {}
    for x, y in points:
        held.setdefault(min(int(x / 100 * buckets), buckets - 1), []).append((x, y))
    expected = []
    for bucket in sorted(held):
        most = max(1, buckets // 50)
        reach = min(most, max(most // 4, min(bucket - min(held), max(held) - bucket)))
        near = [y for b in range(bucket - reach, bucket + reach + 1) for _, y in held.get(b, [])]
        expected.append((np.mean([x for x, _ in held[bucket]]), np.mean(near)))
    assert np.allclose(np.transpose(report.smoothed(steps, values, 0.0, 100.0, buckets)), expected, atol=1e-9)
    assert report.smoothed(np.arange(3.0), np.array([1e30, 1.0, 1.0]), 0.0, 2.0, 3)[1][-1] == 1.0  # a spike leaves no trace in what is far away


LINE = st.dictionaries(
    st.sampled_from(["loss", "lr", "fill", "x: 5, y", "heads"]),
    st.one_of(
        st.floats(),
        st.integers(),
        st.none(),
        st.booleans(),
        st.text(max_size=4),
        st.lists(st.one_of(st.floats(), st.none(), st.text(max_size=2)), max_size=3),
        st.dictionaries(st.sampled_from("ab"), st.one_of(st.integers(-5, 5), st.floats(), st.none())),
    ),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE, min_size=1, max_size=4), st.integers(1, 4), st.sampled_from([(", ", ": "), (",", ":"), (" , ", " : ")]))
def test_reading_by_patterns_is_reading_json(tmp_path, kinds, times, separators):
    """Lines alike but for their numbers are read by one pattern: the same comes out as of reading each by itself."""
    lines = [{"step": n, **kind} for n, kind in enumerate(kinds * times)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line, separators=separators) + "\n" for line in lines))
    curves, names = report.read_metrics(path, [])
    expected: dict = {}
    for line in lines:
        for name, value in line.items():
            parts = value.items() if isinstance(value, dict) else [(str(i), v) for i, v in enumerate(value, 1)] if isinstance(value, list) else [("", value)]
            for part, v in parts:
                if v is None or (isinstance(v, int | float) and not isinstance(v, bool)):
                    expected.setdefault((name, part), []).append((line["step"], v if v is not None and abs(v) < 1e300 else None))
    assert set(curves) == set(expected)
    for key, pairs in expected.items():
        curve = curves[report.Key(*key)]
        assert list(zip(curve.steps, curve.values, strict=True)) == [(s, float(v)) for s, v in pairs if v is not None]
        assert list(curve.gaps) == [s for s, v in pairs if v is None]
    assert names == {name for line in lines if "loss" in line for name in line}


def test_a_number_in_a_name_is_no_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}, "x: 5, y": 3 }}\n' for n in range(4)))  # a pattern would see 5, and not 3
    assert list(report.read_metrics(path, [])[0][report.Key("x: 5, y")].values) == [3, 3, 3, 3]


def test_several_runs_share_charts(tmp_path):
    a = write(tmp_path / "x" / "one", trained(50), {"seed": 0, "train": {"lr": 1, "clip": 1.0}, "output_dir": "a", "data": {"old": 3}})
    b = write(tmp_path / "two", [line | {"loss": line["loss"] * 2} for line in trained(80)], {"seed": 0, "train": {"lr": 2, "clip": 1.0}, "output_dir": "b"})
    page = read(a, b)
    assert page.title == "one, two: training" and page.heads[:2] == ["one", "two"]
    for name, folder, length, factor in (("one", a, 50, 1), ("two", b, 80, 2)):
        steps, values = column(trained(length), "loss")
        same(page.charts["loss"], name, steps, [factor * v for v in values])
        same(page.charts["lr: left"], name, *column(trained(length), "lr", "left"))
        assert str(folder) in page.text
    colours = {shape["title"]: set(shape["class"].split()) & {f"c{i}" for i in range(7)} for chart in page.charts.values() for shape in chart.shapes if "line" in shape["class"]}
    assert colours == {"one": {"c0"}, "two": {"c1"}}  # one colour a run, all over the page
    assert page.tables["settings"] == [["setting", "one", "two"], ["train.lr", "1", "2"], ["setting", "one", "two"], ["data.old", "3", "–"]]
    assert "1 that only some of the runs know" in page.text
    values = {(row[0], row[1]): row[2:] for row in page.tables["values"][1:]}
    assert values["loss", "two"] == ["7.37", "7.37", "80", "13.88", "1"]  # 2 · (6 · 0.99⁸⁰ + 1) and 2 · (6 · 0.99 + 1)
    same_names = read(a, write(tmp_path / "y" / "one", trained(5)), a / ".." / "one")  # a run given twice is one
    assert same_names.heads[:3] == [str(a), str(tmp_path / "y" / "one"), "Loss and validation"] and "no config.json: its settings are not known" in same_names.warnings
    assert "settings" not in same_names.tables


def test_many_runs_and_a_limit(tmp_path):
    folders = [write(tmp_path / f"r{i}", [{"step": 1, "loss": i + 1.0}, {"step": 2, "loss": i + 2.0}], {}) for i in range(22)]
    looks = {tuple(shape["class"].split()[1:]) for shape in read(*folders[:21]).charts["loss"].shapes if "line" in shape["class"]}
    assert len(looks) == 21
    with pytest.raises(UsageError, match="22 runs are more than one page can tell apart"):
        report.main([*map(str, folders)])


def test_skipped_steps_are_marked(tmp_path):
    lines = trained(40)
    for n in (10, 20):
        lines[n - 1] = {"step": n, "loss": None, "grad_norm": None, "tokens_per_s": 5.0}
    lines[29] = lines[29] | {"fill": math.nan}
    lines[30] = lines[30] | {"fill": 0.5}
    skipped = [{"skipped": "loss nan, gradient norm <inf>", "samples": ["a"], "step": n} for n in (10, 25, 60)]  # 25 was taken again after a resume; 60 is still to come
    page = read(write(tmp_path, lines, {}, skipped=skipped))
    marks = [shape["d"] for shape in page.charts["loss"].shapes if "mark" in shape["class"]]
    at = [float(n) for n in re.findall(r"M([\d.]+),", marks[0])]
    assert len(marks) == 1 and np.abs(page.charts["loss"].scale("x")(at) - [10, 20]).max() < 0.2
    assert "skipped at steps 10, 20" in page.charts["loss"].notes and "no finite value at steps 10, 20" in page.charts["grad_norm"].notes
    assert "no finite value at step 30" in page.charts["fill"].notes
    assert page.warnings == ["2 steps skipped (step 10: loss nan, gradient norm <inf>; step 20)"]
    same(page.charts["loss"], tmp_path.name, *column(lines, "loss"))
    sparse = read(write(tmp_path, [line for line in lines if line["step"] % 8 == 0], {}, skipped=skipped))  # logged now and then
    assert sparse.warnings[0].startswith("2 steps skipped (step 10: loss nan, gradient norm <inf>; step 25")


def test_a_run_that_never_had_a_finite_loss(tmp_path):
    page = read(write(tmp_path, [{"step": n, "loss": None, "grad_norm": None} for n in (1, 2)], {}))
    assert not page.charts and page.warnings == ["2 steps skipped (step 1; step 2)", "No finite number in any line: nothing to draw."]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([3.0], False),
        ([0.0, 0.0], False),
        ([-7.5, -7.5, -7.5], False),
        ([1e-9, 3e-9, 2e-9], False),
        ([-1e250, 1e250], False),
        ([123456789.0, 123456789.5], False),
        ([5e6, 2.5e7], False),
        ([9.0, 0.08, 0.5], True),
        ([1.0, 0.0, 1e-7], True),
        ([1e-290, 1e290], True),
        ([10.0, 0.01, -0.001], False),
        ([1e400, 1.0], False),
        ([10**400, 1], False),
        ([5, 20, 200], False),
    ],
)
def test_axes(tmp_path, values, log):
    """Losses of any size: values of 0 stand where the least of the others does, infinite ones are left out."""
    page = read(write(tmp_path, [{"step": n, "loss": value} for n, value in enumerate(values, 1)], {}))
    chart = page.charts["loss"]
    assert bool(chart.small) == log
    drawn = [v for v in values if v < 1e300]
    steps = [n for n, v in enumerate(values, 1) if v < 1e300]
    texts = [text for kind, _, y, text in chart.labels if y < report.HEIGHT - 20]
    assert len(set(texts)) == len(texts) >= 2 and all(len(text) < 14 for text in texts)
    circles = [shape for shape in chart.shapes if shape["tag"] == "circle"]
    assert [round(float(chart.scale("x")(float(c["cx"]))), 1) for c in circles] == steps if len(values) > 1 else len(circles) == 1
    least = min([v for v in drawn if v > 0], default=0) if log else -math.inf
    given = [max(v, least) for v in drawn]
    heights = chart.scale("y")([float(c["cy"]) for c in circles])
    scale = np.log10 if log else np.asarray
    spread = max(np.ptp(scale(given)), 0.05 * np.abs(scale(given)).max(), 1e-300)
    if not any(v >= 1e8 and v < 1e9 for v in values):  # whose ticks have more digits than a float's fit gives back
        assert np.abs(scale(heights) - scale(given)).max() <= 0.02 * spread + (0 if any(values) else 1e-12)
    assert ("1 values of 0 at the lower edge" in chart.notes) == (log and 0.0 in values)
    assert all(0 <= float(c["cy"]) <= report.HEIGHT - report.BOTTOM for c in circles)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 10))
def test_ticks_are_round_and_within(low, span, most):
    high = low + span
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # no axis is so narrow
        return
    found = report.ticks(low, high, most)
    assert 1 <= len(found) <= most + 1 and all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    if len(found) > 1:
        step = (found[-1] - found[0]) / (len(found) - 1)
        texts = report.tick_texts(found, step)
        assert len(set(texts)) == len(texts) and min(abs(step / 10 ** math.floor(math.log10(step) + 1e-6) - digit) for digit in (1, 2, 5, 10)) < 1e-3


def test_texts_of_numbers():
    assert report.tick_texts([0.1, 0.15, 0.2], 0.05) == ["0.10", "0.15", "0.20"] and report.tick_texts([0.0, 20000.0], 20000.0) == ["0", "20k"]
    assert report.tick_texts([5e-9, 1e-8], 5e-9) == ["5e-9", "1e-8"] and report.tick_texts([500000.0, 1000000.0], 500000.0) == ["0.5M", "1.0M"]
    assert (
        report.tick_texts([1000.0, 1500.0], 500.0) == ["1,000", "1,500"] and report.tick_texts([10000.0, 10500.0], 500.0) == ["10.0k", "10.5k"] and report.tick_texts([], 1.0) == []
    )
    assert [report.number(v) for v in (0.0, 3, 1204.0, 1204.6, 0.31478, 1.3071e-7, -2.5, 1e20)] == ["0", "3", "1,204", "1,205", "0.3148", "1.307e-7", "-2.5", "1e20"]


def test_values_and_best(tmp_path):
    lines = [{"step": n, "validation_loss": loss, "validation_accuracy": right} for n, loss, right in ((10, 0.5, 0.2), (20, 0.25, 0.75), (30, 0.375, 0.5))]
    folder = write(tmp_path, lines, {})
    (folder / "best.json").write_text('{"step": 20, "metric": "validation_loss", "value": 0.25}\n')
    page, name = read(folder), tmp_path.name
    assert page.tables["values"][1:] == [["validation_loss", name, "0.375", "0.25", "20", "0.5", "10"], ["validation_accuracy", name, "0.5", "0.2", "10", "0.75", "20"]]
    strong = re.findall(r"<td><b>([\d.]+)</b></td>", (folder / "report.html").read_text())
    assert strong == ["0.25", "0.75"] and "best validation_loss 0.25 at step 20" in page.text


def png(colour: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(colour).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "png")
    return file.getvalue()


def test_the_latest_predictions_are_embedded(tmp_path):
    folder = write(tmp_path / "a", trained(3), {})
    (folder / "samples").mkdir()
    for step, number in (("000900", 1), ("1000000", 2), ("000200", 3)):  # the latest has more digits, and comes first by name
        (folder / "samples" / f"step_{step}.png").write_bytes(png(number))
    (folder / "samples" / "image_0.png").write_bytes(png(4))
    (image,) = read(folder).images
    assert image["src"] == "data:image/png;base64," + base64.b64encode(png(2)).decode() and image["alt"] == "a: predictions at step 1,000,000"
    (folder / "samples" / "step_1000000.png").write_bytes(png(5, 700))  # 1.5 MB of noise
    (image,) = read(folder).images
    small = base64.b64decode(image["src"].removeprefix("data:image/webp;base64,"))
    assert len(small) <= report.PICTURES and Image.open(io.BytesIO(small)).size == (700, 700)
    (folder / "samples" / "step_000700_tokens.png").write_bytes(png(6))
    assert [image["alt"] for image in read(folder).images] == ["a: predictions at step 1,000,000", "a: predicted tokens, and the true ones at step 700"]
    (folder / "samples" / "step_000700_tokens.png").unlink()
    for damaged in (b"", b"not an image", b"<svg onload=alert(1)>"):
        (folder / "samples" / "step_1000000.png").write_bytes(damaged)
        page = read(folder)
        assert not page.images and page.warnings == ["a: predictions at step 1,000,000: samples/step_1000000.png is not an image"]


def test_hostile_text_is_no_markup(tmp_path):
    odd = HOSTILE + "\u202e\x1b"
    lines = [line | {HOSTILE: 1.0, "lr": {odd: 1.0, "b": 2.0}, "words": HOSTILE} for line in trained(3)]
    folder = write(tmp_path / HOSTILE, lines, {"name": HOSTILE, HOSTILE: 1}, skipped=[{"step": 0, "skipped": HOSTILE}])
    (folder / "best.json").write_text(json.dumps({"step": HOSTILE, "metric": HOSTILE, "value": 1.5}))
    (folder / "samples").mkdir()
    (folder / "samples" / "step_000001.png").write_bytes(png(1))
    for page in (read(folder), read(folder, write(tmp_path / "b", trained(2), {"name": "x", HOSTILE: 2}))):
        ours = "html head meta title style body header section h1 h2 h3 p div details summary small b table thead tr th td figure figcaption ul li svg path text circle img"
        assert {tag for tag, _ in page.tags} <= set(ours.split())
        assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a == "href"]
        assert page.heads[0] == HOSTILE and HOSTILE in page.title and HOSTILE in page.charts and page.images[0]["alt"].startswith(HOSTILE[:50])
        assert any(HOSTILE + "\\u202e\\u001b" in text for chart in page.charts.values() for text in (*chart.legend, chart.title)) and "\u202e" not in page.text
        policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        assert page.warnings == [f"1 step skipped (step 0: {HOSTILE})"]
    assert [HOSTILE, "1", "2"] in page.tables["settings"]


def test_needs_nothing_else_and_is_read_in_the_dark(tmp_path):
    read(write(tmp_path, trained(5), {}))
    text = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "<script" not in text and "http:" not in text and "https:" not in text and "url(" not in text
    dark, light = (set(re.findall(r"--\w+(?=:)", part)) for part in (text.split("dark)")[1].split("}")[0], text.split("light dark;")[1].split("}")[0]))
    assert dark == light == {f"--{name}" for name in ("page", "ink", "quiet", "line", "warn", *(f"c{i}" for i in range(report.COLOURS)))}


def test_half_a_last_line_is_passed_over(tmp_path):
    whole = "".join(json.dumps(line) + "\n" for line in trained(9))
    for half in ('{"step": 10, "loss": 1.', "{", '{"step"', '{"step": 10, "loss": 1.5, "lr": {"left": 2}', "12", '"é'):
        page = read(write(tmp_path, whole + half, {}))
        assert page.warnings == ["half a last line of metrics.jsonl was passed over: the run may be writing it"] and "step 9" in page.text
    page = read(write(tmp_path, whole + '{"step": 10, "loss": 1.5}', {}))  # whole, but for its end of line
    assert page.warnings == [] and column([*trained(9), {"step": 10, "loss": 1.5}], "loss")[0][-1] == 10 and "step 10" in page.text
    page = read(write(tmp_path, whole.replace("\n", "\r\n") + "\n \n", {}))
    assert page.warnings == [] and len(page.charts["loss"].curves()[tmp_path.name][0]) == 9


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"step": 4, "loss": 1.', "is damaged"),
        ("\0\0\0", "is damaged"),
        ("[1, 2]", "it is no object with a step"),
        ("null", "it is no object with a step"),
        ('{"loss": 1.0}', "it is no object with a step"),
        ('{"step": null}', "its step is None"),
        ('{"step": "4"}', "its step is 4"),
        ('{"step": -4}', "its step is -4"),
        ('{"step": NaN}', "its step is nan"),
        ('{"step": true}', "its step is True"),
        ('{"step": 4, "loss": 1.0}{"step": 5, "loss": 1.0}', "Extra data"),
        ("[" * 100_000, "is damaged"),
        ("\xff", "is damaged"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_damage_is_told_with_its_line(tmp_path, line, why, last):
    rows = [json.dumps(row) + "\n" for row in trained(9)]
    text = "".join([*rows[:3], line + "\n", *([] if last else rows[3:])])
    folder = write(tmp_path / "run", "")
    (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="metrics.jsonl, line 4 is damaged") as caught:
        report.main([str(folder)])
    assert why in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300 and not (folder / "report.html").exists()


def test_damaged_files_beside(tmp_path):
    folder = write(tmp_path, trained(3), {})
    for name, text, told in (
        ("skipped.jsonl", '{"step": 1}\nxx\n{"step": 2}\n', "skipped.jsonl, line 2 is damaged"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("best.json", "", "best.json is not valid JSON"),
    ):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=told):
            report.main([str(folder)])
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    for strange in ("[]", '{"value": null}', '{"value": NaN, "step": {}}'):
        (folder / "best.json").write_text(strange)
        assert "best" not in read(folder).text
    (folder / "config.json").write_text('{"max_steps": 1' + "0" * 400 + "}")
    assert "step 3 · " in read(folder).text


@pytest.mark.parametrize(("text", "told"), [("", "holds no whole line"), ("\n\n", "holds no whole line"), ('{"step": 1, "lo', "holds no whole line")])
def test_an_empty_file(tmp_path, text, told):
    with pytest.raises(UserError, match=f"metrics.jsonl {told}"):
        report.main([str(write(tmp_path, text, {}))])


def test_what_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, told in (("empty", "holds no metrics.jsonl: give the folder of a run"), ("file", "is no folder: give"), ("none", "is no folder: give")):
        with pytest.raises(UsageError, match=told):
            report.main([str(tmp_path / name)])
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no metrics.jsonl yet: its first step is not done"):
        report.main([str(tmp_path / "empty")])


def test_where_it_is_written(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "run", trained(3), {})
    report.main([str(folder), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'page.html'}: runs 1, charts 6, 0.0 MB") and not (folder / "report.html").exists()
    for wrong in (tmp_path / "run" / "metrics.jsonl", tmp_path / "none" / "page.html", tmp_path / "page"):
        with pytest.raises(UsageError, match="--output"):
            report.main([str(folder), "--output", str(wrong)])
    before = (tmp_path / "page.html").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(configs.files.os, "fsync", full)
    with pytest.raises(UserError, match="page.html could not be written: No space left on device"):
        report.main([str(folder), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]
    monkeypatch.undo()
    (folder / "report.html").mkdir()
    with pytest.raises(UserError, match="report.html could not be written"):
        report.main([str(folder)])


def test_as_a_program(tmp_path):
    folder = write(tmp_path / "run", trained(3), {})
    done = run_program([sys.executable, "-m", "training.report", str(folder)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{folder / 'report.html'}: runs 1, charts 6,")
    assert "loss" in Reader((folder / "report.html").read_text()).charts
    for command, code, told in (
        ([str(tmp_path / "none")], 2, "is no folder"),
        ([str(folder), "--ouput", "x.html"], 2, "did you mean '--output'?"),
        ([], 2, "RUN"),
        ([str(write(tmp_path / "empty", ""))], 1, "holds no whole line"),
    ):
        done = run_program([sys.executable, "-m", "training.report", *command], tmp_path)
        assert done.returncode == code and done.stderr.startswith("error: ") and told in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_real_run_still_fits(tmp_path):
    """What RunLog writes is what is read."""
    from training.logging import RunLog

    log = RunLog(tmp_path / "run", tmp_path / "logs")
    log.start(0, 3)
    for line in trained(3):
        log.metrics({key: value for key, value in line.items() if key != "seconds"})
    log.stop()
    page = read(tmp_path / "run")
    assert len(page.charts) == 6 and len(page.charts["loss"].curves()["run"][0]) == 3


@pytest.mark.parametrize("steps", [1500, report.FEW])
def test_a_page_stays_small(tmp_path, steps):
    """More curves than a page has room for, of four noisy runs with noisy pictures: fewer points each, and what is left out is named."""
    rng = np.random.default_rng(0)
    folders = []
    for run in range(4):
        table = rng.normal(5, 1, (steps, 120)).round(4).tolist()
        lines = [{"step": n, "loss": row[0], **{f"fill_{i}": value if (n + i) % 50 else None for i, value in enumerate(row[1:])}} for n, row in enumerate(table, 1)]
        folders.append(write(tmp_path / f"run_{run}", lines, {}))
        (folders[-1] / "samples").mkdir()
        (folders[-1] / "samples" / "step_000001.png").write_bytes(png(run, 250))
    page = read(*folders)  # which looks at the size
    assert len(page.charts) == report.CURVES // 4 == 100 and len(page.images) == 4
    assert any("20 more are not drawn: fill_99, fill_100" in warning for warning in page.warnings)


def test_a_long_file_takes_seconds(tmp_path):
    """100,000 lines of 22 MB; the time allowed is many times what it takes."""
    path = write(tmp_path, "", {}) / "metrics.jsonl"
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for n, (loss, norm, speed) in enumerate(rng.normal(5, 0.1, (100_000, 3)).tolist(), 1):
            file.write(json.dumps({"step": n, "loss": loss, "grad_norm": norm, "lr": {"left": n / 7, "right": n / 9}, "tokens_per_s": speed, "seconds": n / 4}) + "\n")
            if n % 1000 == 0:
                file.write(json.dumps({"step": n, "validation_loss": loss, "seconds": n / 4}) + "\n")
    started = time.process_time()
    page = read(tmp_path)
    assert time.process_time() - started < 15 and len(page.charts["validation_loss"].curves()[tmp_path.name][0]) == 100
    assert len((tmp_path / "report.html").read_bytes()) < 300_000
