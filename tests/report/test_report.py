"""The report of a synthetic run: whole, self-contained, escaped, and with the numbers of its
table.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from workbench.claims import CLAIMS, Verdict, decide
from workbench.figures import figures_of
from workbench.figures.marks import main_metric
from workbench.figures.style import title
from workbench.report import summary_table, write_report
from workbench.report.report import findings, save_figure
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, typed

Tables = Callable[..., tuple[pd.DataFrame, pd.DataFrame]]
EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "link", "input", "hr"}

CLAIMED = (
    Verdict("cir-robust", "supported", 0.5, 0.25, 0.75, 16, 2, "hand-made"),
    Verdict("sam-resists", "contradicted", -0.5, -0.75, -0.25, 16, 2, "hand-made"),
    Verdict("rna-repairs", "inconclusive", math.nan, math.nan, math.nan, 0, 2, "hand-made"),
)

FIGURES = {
    name: entry
    for name, entry in figures_of("run").items()
    if name not in ("ablation", "shift", "smoothing")
}  # the synthetic run has none of them


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences of a page need none, and drawing all takes seconds."""
    monkeypatch.setattr("workbench.report.report.draw_figures", lambda *args, **kwargs: {})


class Page(HTMLParser):
    """Elements, text and what a page points to; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def results(make_tables: Tables) -> pd.DataFrame:
    return make_tables()[0]


@pytest.fixture(scope="module")
def written(make_tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of the whole synthetic run, for all tests that only read."""
    out = tmp_path_factory.mktemp("report")
    table, items = make_tables()
    assert write_report(out, table, items, CLAIMED) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


def _few(table: pd.DataFrame) -> pd.DataFrame:
    """Only attack and triggers: a table that is quick to draw."""
    return table[table["stage"].isin(["relearn", "triggers"])]


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that no figure draws: for what the page says around the figures."""
    return table[(table["stage"] == "unlearn")]


def _report(
    out: Path, table: pd.DataFrame, claims: tuple[Verdict, ...] = (), **texts: object
) -> str:
    return write_report(out, table, typed(pd.DataFrame(), ITEM_COLUMNS), claims, **texts).read_text(
        encoding="utf-8"
    )  # type: ignore[arg-type]


# --- Files ---


def test_a_report_is_one_page_and_every_figure_as_png_and_svg(written: Path) -> None:
    assert sorted(
        path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()
    ) == sorted(
        ["report.html", *(f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))]
    )
    for name in FIGURES:
        assert (written / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert ElementTree.parse(written / "figures" / f"{name}.svg").getroot().tag.endswith("svg")


def test_pictures_have_the_resolution_that_the_style_asks_for(page: Page, written: Path) -> None:
    # style.look sets savefig.dpi to 150; it has to be in force where a picture is saved, not only
    # where it is drawn.
    embedded = [
        io.BytesIO(base64.b64decode(link.split(",", 1)[1]))
        for link in page.links
        if link.startswith("data:image/png")
    ]
    for source in (*embedded, *(written / "figures" / f"{name}.png" for name in FIGURES)):
        with Image.open(source) as picture:
            assert picture.info["dpi"] == pytest.approx((150, 150), abs=1)


def test_the_same_table_gives_the_same_vector_picture(make_tables: Tables, tmp_path: Path) -> None:
    # style.look salts the names inside an SVG, so that they do not change from run to run; only the
    # date may.
    table = make_tables()[0]
    table = table[table["stage"] == "triggers"]
    texts = []
    for name in ("one", "two"):
        save_figure(FIGURES["triggers"].draw(table), tmp_path / f"{name}.svg")
        texts.append(
            re.sub(
                r"<dc:date>.*?</dc:date>",
                "",
                (tmp_path / f"{name}.svg").read_text(encoding="utf-8"),
            )
        )
    assert texts[0] == texts[1]


def test_no_figure_stays_open_and_a_second_report_replaces_the_first(
    make_tables: Tables, tmp_path: Path
) -> None:
    plt.close("all")
    table = _plain(make_tables()[0])
    first = _report(tmp_path, table, heading="the first")
    second = _report(tmp_path, table, heading="the second")
    assert plt.get_fignums() == []
    assert "the first" in first
    assert "the first" not in second
    assert not [path.name for path in tmp_path.rglob(".*")]


def test_the_page_holds_everything_it_shows(page: Page, written: Path) -> None:
    assert page.links
    for link in page.links:
        assert link.startswith(("data:", "#")), link[:80]
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    raw = (written / "report.html").read_text(encoding="utf-8")
    assert "@import" not in raw
    assert "url(" not in raw
    pictures = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert len(pictures) == len(FIGURES)
    assert all(base64.b64decode(link.split(",", 1)[1]).startswith(b"\x89PNG") for link in pictures)


def test_every_figure_has_its_caption(page: Page) -> None:
    for entry in FIGURES.values():
        assert entry.caption and entry.caption in page.text


# --- Escaping ---


def test_every_text_is_escaped(make_tables: Tables, tmp_path: Path) -> None:
    table = make_tables(methods=(EVIL,), controls=("base",), seeds=(0,))[0]
    evil = tuple(
        Verdict(
            claim.id, claim.verdict, claim.effect, claim.low, claim.high, claim.n, claim.seeds, EVIL
        )
        for claim in CLAIMED
    )
    # Once with the texts of the run itself (findings, legends, models, scale), once with a
    # caller's.
    for texts, rows in (
        ({}, _few(table)),
        ({"heading": EVIL, "done": [EVIL], "notes": [EVIL]}, _plain(table)),
    ):
        raw = _report(tmp_path, rows, evil, **texts)
        assert "<script" not in raw.lower()
        found = Page(raw)
        assert found.text.count(EVIL) >= 3  # all there, all as text
        assert "script" not in found.tags


def test_quotes_and_ampersands_in_a_heading_stay_what_they_are(
    make_tables: Tables, tmp_path: Path
) -> None:
    heading = """R&D's "first" <b>run</b> {{ 7 * 7 }}"""
    found = Page(_report(tmp_path, _plain(make_tables()[0]), heading=heading))
    assert heading in found.text
    assert "b" not in found.tags


# --- Sentences ---


def test_a_run_without_a_never_learned_model_says_so(make_tables: Tables) -> None:
    without = " ".join(findings(make_tables(controls=("base",))[0], ()))
    assert "No never-learned model was given" in without
    assert "null attack is the only control" in without
    with_control = " ".join(findings(make_tables()[0], ()))
    assert "No never-learned model was given" not in with_control


def test_the_missing_control_is_on_the_page(make_tables: Tables, tmp_path: Path) -> None:
    assert (
        "No never-learned model was given"
        in Page(_report(tmp_path, _few(make_tables(controls=("base",))[0]))).text
    )


def test_the_page_of_a_run_with_a_control_does_not_miss_it(page: Page) -> None:
    assert "No never-learned model was given" not in page.text


def test_findings_say_what_the_table_says(results: pd.DataFrame) -> None:
    sentences = findings(results, CLAIMED)
    npo = next(text for text in sentences if text.startswith("NPO:"))
    assert "recall is 0.25 [" in npo
    assert "after 20 steps" in npo
    assert "rises to 0.75 [" in npo
    assert "against 0.38 [" in npo or "against 0.37 [" in npo  # 0.375 to two digits
    cir = next(text for text in sentences if text.startswith("CIR:"))
    assert "stays to" not in cir  # not English
    assert "stays" in cir
    assert any(
        "Before unlearning, recall of the held-out forget facts is 1.00 [" in text
        for text in sentences
    )
    assert any(
        "found no held-out answer in the attack texts, and no held-out subject." in text
        for text in sentences
    )
    assert not any(
        "must not be called benign" in text or "which do name" in text for text in sentences
    )
    assert any(
        "Of 3 claims" in text
        and "supports 1 (cir-robust)" in text
        and "contradicts 1 (sam-resists)" in text
        for text in sentences
    )
    assert not any("stayed below the disruption budget" in text for text in sentences)


def test_recall_that_falls_under_attack_is_said_to_fall(results: pd.DataFrame) -> None:
    # Swap start and end of the attack.
    turned = results.copy()
    attack = turned["stage"] == "relearn"
    turned.loc[attack, "x"] = turned.loc[attack, "x"].map({0.0: 20.0, 5.0: 5.0, 20.0: 0.0})
    assert any(
        "falls to 0.25 [" in text for text in findings(turned, ()) if text.startswith("NPO:")
    )


def test_an_attack_that_leaks_is_not_called_benign(results: pd.DataFrame) -> None:
    leaky = results.copy()
    leaky.loc[(leaky["metric"] == "benign") & (leaky["method"] == "npo"), "value"] = 0.0
    text = " ".join(findings(leaky, ()))
    assert "must not be called benign" in text
    assert "found no held-out answer" not in text


def test_an_attack_that_names_people_and_gives_no_answer_away_is_benign(
    results: pd.DataFrame,
) -> None:
    naming = results.copy()
    naming.loc[(naming["metric"] == "leaked_subjects") & (naming["method"] == "npo"), "value"] = 1.0
    text = " ".join(findings(naming, ()))
    assert "found no held-out answer in the attack texts, which do name held-out subjects" in text


def test_a_method_that_stays_inside_the_budget_is_named(results: pd.DataFrame) -> None:
    short = results.copy()
    short.loc[
        (short["metric"] == "budget_reached") & (short["method"] == "cir") & (short["seed"] == 1),
        "value",
    ] = 0.0
    (sentence,) = [
        text for text in findings(short, ()) if "budget not reached in 1 of 2 seeds" in text
    ]
    assert "CIR" in sentence
    assert "NPO" not in sentence


def test_the_page_names_steps_seeds_and_limits(page: Page) -> None:
    assert "2 unlearning methods (NPO, CIR) were run under 2 seeds each" in page.text
    assert "0.05 nats per token" in page.text
    assert "fine-tuned for 20 steps" in page.text
    assert "Scale: hand-made" in page.text
    assert "2 seed(s)" in page.text


@pytest.mark.usefixtures("no_pictures")
def test_the_budget_is_named_in_its_own_measure_and_on_its_own_sets(
    make_tables: Tables, tmp_path: Path
) -> None:
    table = make_tables()[0]
    rises = table.copy()
    rises.loc[rises["metric"] == "budget", ["value", "arm"]] = [0.001, "loss-rise"]
    ring = rises[rises["metric"] == "budget"].assign(
        metric="budget_set", split="general", value=1.0
    )
    text = Page(_report(tmp_path, pd.concat([rises, ring]))).text
    assert (
        "its loss has risen by 0.100% on retain texts that no method trained on (general)" in text
    )
    assert "drifts from the base" not in text


@pytest.mark.usefixtures("no_pictures")
def test_what_a_run_left_out_is_not_among_its_steps(make_tables: Tables, tmp_path: Path) -> None:
    table = make_tables()[0]
    assert "Hessian's spectrum were computed" in Page(_report(tmp_path / "whole", table)).text
    text = Page(
        _report(tmp_path / "less", table[~table["stage"].isin(["triggers", "sharpness"])])
    ).text
    assert "stray word" not in text
    assert "Hessian's spectrum were computed" not in text


@pytest.mark.usefixtures("no_pictures")
def test_a_pretrained_base_is_not_said_to_come_from_nothing(
    make_tables: Tables, tmp_path: Path
) -> None:
    text = Page(
        _report(
            tmp_path,
            make_tables()[0],
            trained="stories, a pretrained language model, was fine-tuned.",
        )
    ).text
    assert "stories, a pretrained language model, was fine-tuned." in text
    assert "A small language model was trained" not in text


def test_given_steps_and_notes_take_the_place_of_the_default(
    make_tables: Tables, tmp_path: Path
) -> None:
    text = Page(
        _report(tmp_path, _plain(make_tables()[0]), done=["We did this."], notes=["Mind that."])
    ).text
    assert "We did this." in text
    assert "Mind that." in text
    assert "A small language model was trained" not in text


def test_every_claim_is_on_the_page_with_its_verdict_and_its_effect(page: Page) -> None:
    for claim in CLAIMED:
        assert claim.id in page.text
        assert CLAIMS[claim.id].statement in page.text
        assert CLAIMS[claim.id].statistic in page.text
        assert claim.verdict in page.text
    assert "+0.500 [+0.250, +0.750]" in page.text
    assert "-0.500 [-0.750, -0.250]" in page.text
    assert not re.search(r"\bnan\b", page.text)


def test_a_report_without_claims_has_no_table_of_claims(
    make_tables: Tables, tmp_path: Path
) -> None:
    assert "Claims of the literature" not in Page(_report(tmp_path, _plain(make_tables()[0]))).text


def test_the_claims_of_a_run_can_be_written_as_they_are_decided(
    make_tables: Tables, tmp_path: Path
) -> None:
    table, items = make_tables()
    text = Page(_report(tmp_path, _plain(table), decide(table, items, scale="hand-made"))).text
    assert all(name in text for name in CLAIMS)


# --- The table of models ---


def test_the_summary_has_one_row_per_model_in_the_order_of_the_palette(
    results: pd.DataFrame,
) -> None:
    assert summary_table(results)["model"].tolist() == ["base", "never learned", "NPO", "CIR"]


def test_the_summary_holds_the_numbers_of_the_table(results: pd.DataFrame) -> None:
    rows = summary_table(results).set_index("model")
    npo = rows.loc["NPO"]
    assert npo["alpha"] == "0.75"
    assert npo["disruption"] == "0.0450"
    assert npo["held-out forget, before attack"].startswith("0.25 [")
    assert npo["after attack"].startswith("0.75 [")
    assert npo["attack minus null"].startswith("0.50 [")
    assert npo["neighbours"].startswith("0.88 [")
    assert npo["behind a retain-token"].startswith("0.88 [")
    assert npo["behind a forget-token"].startswith("0.25 [")
    assert npo["top eigenvalue"] == "45"  # the median of 40 and 50
    # Base and control were not unlearned: a dash, not a made-up number.
    assert rows.loc["base", "alpha"] == rows.loc["never learned", "disruption"] == "–"
    # Every fact of the base is right: Wilson over eight facts, n / (n + z^2) = 0.68.
    assert rows.loc["base", "after attack"] == "1.00 [0.68, 1.00]"


def test_columns_that_nothing_was_measured_for_are_left_out(results: pd.DataFrame) -> None:
    few = summary_table(_few(results))
    assert "top eigenvalue" not in few.columns
    assert "alpha" not in few.columns
    assert "after attack" in few.columns
    assert len(few) == 4


def test_every_model_of_the_summary_is_on_the_page(page: Page, results: pd.DataFrame) -> None:
    for cell in summary_table(results).to_numpy().ravel():
        assert str(cell) in page.text


def test_where_the_base_recalls_nothing_the_answer_probability_is_shown(
    results: pd.DataFrame,
) -> None:
    assert main_metric(results) == "recall"
    blank = results.copy()
    blank.loc[(blank["metric"] == "recall"), "value"] = 0.0
    assert main_metric(blank) == "answer_probability"
    # 0.1 + 0.8 * recall, by construction.
    assert summary_table(blank).set_index("model").loc["NPO", "after attack"].startswith("0.70 [")
    assert any("answer probability" in text for text in findings(blank, ()))


def test_a_user_model_without_seeds_of_its_own_has_its_row(make_tables: Tables) -> None:
    rows = summary_table(make_tables(methods=("unlearned",), controls=("base",), seeds=(0,))[0])
    assert rows["model"].tolist() == ["base", title("unlearned")]


def test_a_report_of_an_empty_table_says_nothing_false(tmp_path: Path) -> None:
    found = Page(_report(tmp_path, typed(pd.DataFrame(), RESULT_COLUMNS)))
    assert not re.search(r"\bnan\b", found.text)
