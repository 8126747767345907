"""The report: what is in the page, how large it is, and how it works in a real browser."""

import base64
import gzip
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageDraw

import gpuroi
from gpuroi.datasets import make_stat_map
from gpuroi.plotting import _backgrounds
from gpuroi.plotting._colors import region_colors
from gpuroi.plotting._cuts import cuts_along
from gpuroi.plotting._planes import Volume
from gpuroi.report import MOST_EMBEDDED, Report, _report, _scene
from gpuroi.report._charts import histogram_of_counts, histogram_of_volumes
from gpuroi.report._html import MOST_ROWS, json_block
from gpuroi.report._pictures import draw_cuts, hex_color, region_palette
from tests.conftest import AFFINES, image

MNI_3_MM = np.array([[3.0, 0, 0, -78], [0, 3, 0, -112], [0, 0, 3, -50], [0, 0, 0, 1]])
MNI_2_MM = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def _same_date(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("GPUROI_BACKEND", "cpu")


@pytest.fixture
def without_template(monkeypatch):
    """Draw as where nilearn is not installed."""
    monkeypatch.setattr(_scene, "mni_template", lambda: None)
    _scene.template.cache_clear()
    yield
    _scene.template.cache_clear()


def two_regions(shape=(12, 13, 14), affine=MNI_3_MM, scale=1.0):
    """Return a map of a region of fives and a smaller one of minus sixes."""
    data = np.zeros(shape, np.float32)
    data[2:5, 2:5, 2:5] = 5 * scale
    data[7:9, 7:9, 7:9] = -6 * scale
    return image(data, affine)


def found(img, threshold=3.0):
    return gpuroi.extract_regions(img, threshold)


def add(report, regions, name="m", **rest):
    report.add(regions, report.folder / f"{name}_desc-regions_dseg.nii.gz", **rest)


def written(folder, *all_regions, failures=()):
    """Return the text of a report on `all_regions`."""
    report = Report(folder)
    for number, regions in enumerate(all_regions):
        add(report, regions, f"m{number}")
    for name, reason in failures:
        report.fail(name, reason)
    report.write()
    return (folder / "report.html").read_text()


def data_of(page):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])


class Outline(HTMLParser):
    """The elements of a page, and the text of cells by row."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.rows, self.open = [], [], []
        self.feed(page)
        assert self.open == []  # what opens also closes

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "img"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.rows[-1][-1] += data

    def having(self, tag, **attributes):
        return [
            found
            for name, found in self.elements
            if name == tag and attributes.items() <= found.items()
        ]


class TestPage:
    def test_one_map(self, tmp_path):
        regions = found(two_regions())
        page = written(tmp_path, regions)
        outline = Outline(page)
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        assert "<title>Regions of m0</title>" in page
        assert "2 regions of at least 0 mm³ at |value| ≥ 3 (threshold 3)" in page
        rows = [row for row in outline.rows if row]
        assert [row[:5] for row in rows] == [
            ["1", "1", "27", "729", "5"],
            ["2", "-1", "8", "216", "-6"],
        ]
        peaks = regions.table[["peak_x", "peak_y", "peak_z"]].to_numpy()
        assert [[float(cell) for cell in row[5:8]] for row in rows] == peaks.tolist()
        assert [len(row) for row in rows] == [regions.table.shape[1]] * 2
        assert 'id="cohort"' not in page

    def test_edges_are_said(self, tmp_path):
        data = np.zeros((9, 9, 9), np.float32)
        data[0, 1:4, 1:4] = data[4:6, 5:7, 5:7] = 4
        rows = [row for row in Outline(written(tmp_path, found(image(data)))).rows if row]
        assert [row[-1] for row in rows] == ["yes", ""]

    @pytest.mark.parametrize("n_maps", [1, 3])
    def test_it_asks_nothing_of_a_network(self, tmp_path, n_maps):
        page = written(tmp_path, *[found(two_regions())] * n_maps)
        assert re.findall(r"https?:|//[\w-]+\.\w", re.sub(r"[\"(]data:[^\")]*", "", page)) == []
        assert "default-src 'none'" in page
        outline = Outline(page)
        addresses = [
            attributes[key]
            for _, attributes in outline.elements
            for key in ("src", "href")
            if attributes.get(key)
        ]
        assert [a for a in addresses if not re.match(r"data:|#map-\d{4}$|[\w.-]+$", a)] == []

    def test_names_and_reasons_are_never_markup(self, tmp_path):
        report = Report(tmp_path, {"mask": HOSTILE})
        regions = found(two_regions())
        regions.provenance["source"] = f"{HOSTILE}.nii"
        regions.provenance["parameters"]["mask"] = "</script><script>alert(2)</script>"
        add(report, regions, HOSTILE)
        add(report, regions, "{{script}}")
        report.fail(f"{HOSTILE}.nii", f"{HOSTILE}: '</td>\" {{{{data}}}}")
        report.write()
        page = (tmp_path / "report.html").read_text()
        outline = Outline(page)
        assert [a for _, a in outline.elements if "onerror" in a or a.get("src") == "x"] == []
        assert len(outline.having("script")) == 2
        assert [f"{HOSTILE}.nii", f"{HOSTILE}: '</td>\" {{{{data}}}}"] in outline.rows
        assert any(row[:1] == ["{{script}}"] for row in outline.rows)
        assert "%3Cimg%20src%3Dx" in page  # in links to files

    def test_json_cannot_end_its_element(self):
        text = json_block({"name": "</script><!--"})
        assert "<" not in text
        assert json.loads(text) == {"name": "</script><!--"}

    def test_no_regions(self, tmp_path):
        page = written(tmp_path, found(two_regions(), 101.0))
        assert "0 regions of at least 0 mm³" in page
        assert "largest magnitude 6" in page
        assert "No regions were found." in page
        assert Outline(page).having("canvas") == []
        assert data_of(page)["maps"] == {}

    def test_no_finite_cutoff(self, tmp_path):
        empty = gpuroi.extract_regions(image(np.zeros((9, 9, 9), np.float32)), population="nonzero")
        assert empty.cutoff == np.inf
        assert "≥ inf" in written(tmp_path, empty, empty)

    def test_nothing_but_failures(self, tmp_path):
        report = Report(tmp_path, {"threshold": "97%"})
        report.fail("a.nii", "no such file.")
        assert report.write() == tmp_path / "report.html"
        page = (tmp_path / "report.html").read_text()
        assert ["a.nii", "no such file."] in Outline(page).rows
        assert "0 regions in 0 maps; 1 map failed." in page
        assert "<dt>parameters: threshold</dt><dd>97%</dd>" in page

    def test_provenance(self, tmp_path):
        page = written(tmp_path, found(two_regions()))
        for name, value in (
            ("date", "2023-11-14 22:13 UTC"),
            ("backend", "cpu"),
            ("parameters: threshold", "3"),
            ("versions: gpuroi", gpuroi.__version__),
            ("largest_magnitude", "6"),
        ):
            assert f"<dt>{name}</dt><dd>{value}</dd>" in page

    def test_what_is_of_one_map_stands_with_it(self, tmp_path):
        page = written(tmp_path, *[found(two_regions())] * 2)
        *of_maps, of_run = page.split("</section>")
        assert {"source", "source_sha256", "cutoff"} <= names_in(of_maps[-1])
        assert names_in(of_run) == {"backend", "device", "date"} | {
            name for name in names_in(of_run) if name.startswith(("parameters: ", "versions: "))
        }

    def test_the_same_bytes_every_time(self, tmp_path):
        pages = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            pages.append(written(tmp_path / name, *[found(two_regions())] * 2))
        assert pages[0] == pages[1]

    def test_a_long_table_holds_the_largest_regions(self, tmp_path):
        data = np.zeros((30, 20, 20), np.float32)
        data[1::2, 1::2, 1::2] = 4.0
        data[2, 1, 1] = 4.0  # joins the first two
        regions = found(image(data, MNI_3_MM))
        rows = [row for row in Outline(written(tmp_path, regions)).rows if row]
        assert len(rows) == MOST_ROWS < len(regions)
        assert rows[0][:3] == ["1", "1", "3"]
        assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
        text = (tmp_path / "report.html").read_text()
        assert f"{len(regions) - MOST_ROWS} smaller regions are in the table file only." in text


def names_in(part):
    """Return what is defined in a part of a page."""
    return set(re.findall(r"<dt>(.*?)</dt>", part))


def labels_in(payload):
    """Return the labels (X, Y, Z) that a payload holds, as the page reads them."""
    raw = gzip.decompress(base64.b64decode(payload["labels"]))
    return np.frombuffer(raw, f"<u{payload['bits'] // 8}").reshape(payload["shape"])


class TestPayload:
    @pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
    @pytest.mark.parametrize("n_regions", [2, 300])
    def test_labels_come_back(self, tmp_path, affine, n_regions):
        img = two_regions(affine=affine)
        if n_regions > 2:
            data = np.zeros((17, 17, 17), np.float32)
            data[::2, ::2, ::2] = 4.0
            img = image(data, affine)
        regions = found(img)
        payload = data_of(written(tmp_path, regions))["maps"]["0001"]
        assert payload["bits"] == (8 if n_regions == 2 else 16)
        np.testing.assert_array_equal(labels_in(payload), regions.labels)
        inverse = np.array([*payload["inverse"], [0, 0, 0, 1]])
        np.testing.assert_allclose(inverse @ affine, np.eye(4), atol=1e-9)
        peaks = regions.table[["peak_x", "peak_y", "peak_z"]].to_numpy()
        np.testing.assert_allclose(payload["peaks"], peaks, atol=1e-3)  # rounded to micrometres

    def test_values_come_back_in_256_steps(self, tmp_path):
        img = make_stat_map((20, 21, 22), n_regions=3).img
        regions = found(img, 5.0)
        payload = data_of(written(tmp_path, regions))["maps"]["0001"]
        codes = np.frombuffer(gzip.decompress(base64.b64decode(payload["values"])), np.uint8)
        values = (codes.astype(float) - 128) / 127 * payload["reach"]
        half_a_step = payload["reach"] / 254 * (1 + 1e-9)
        np.testing.assert_allclose(values, regions.voxels.values, rtol=0, atol=half_a_step)
        assert payload["reach"] == np.abs(regions.voxels.values).max()

    def test_a_template_is_there_once(self, tmp_path):
        data = data_of(written(tmp_path, *[found(two_regions())] * 3))
        assert data["backdrop"] is not None
        assert [payload["backdrop"] for payload in data["maps"].values()] == [None] * 3

    @pytest.mark.usefixtures("without_template")
    def test_without_it_each_map_has_its_outline(self, tmp_path):
        img = make_stat_map((20, 21, 22), n_regions=3).img
        report = Report(tmp_path)
        values = np.asarray(img.dataobj)
        add(report, found(img, 5.0), values=values)
        report.write()
        data = data_of((tmp_path / "report.html").read_text())
        assert data["backdrop"] is None
        raw = gzip.decompress(base64.b64decode(data["maps"]["0001"]["backdrop"]["grey"]))
        grey = np.frombuffer(raw, np.uint8).reshape(values.shape)
        head = _backgrounds.head_outline(_scene.Volume(values, img.affine)).volume.data
        np.testing.assert_array_equal(grey > 0, head > 0)

    @pytest.mark.usefixtures("without_template")
    def test_or_nothing_behind(self, tmp_path):
        data = data_of(written(tmp_path, found(two_regions())))
        assert data["backdrop"] is data["maps"]["0001"]["backdrop"] is None


class TestPicture:
    @pytest.mark.usefixtures("without_template")
    @pytest.mark.parametrize("flipped", [False, True])
    def test_left_is_left(self, tmp_path, flipped):
        affine = np.diag([-3.0 if flipped else 3.0, 3, 3, 1])
        data = np.zeros((12, 12, 12), np.float32)
        data[1:4, 5:8, 5:8] = 4  # at the start of the first axis
        picture = picture_in(written(tmp_path, found(image(data, affine))))
        orange = np.rint(255 * np.array(region_colors(1)[0][:3]))
        first = picture[:, : picture.shape[1] // 3]  # of three cuts
        _, columns = np.nonzero(np.abs(first[..., :3] - orange).max(axis=-1) < 12)
        assert columns.size > 50
        assert (columns.mean() > first.shape[1] / 2) == flipped

    def test_it_is_small(self, tmp_path):
        page = written(tmp_path, found(make_stat_map(affine=MNI_3_MM).img, 5.0))
        (address,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
        assert len(base64.b64decode(address)) < 30_000

    def test_thousands_of_regions_take_no_longer(self, tmp_path):
        data = np.zeros((60, 60, 60), np.float32)
        data[::2, ::2, ::2] = 4.0
        regions = found(image(data, MNI_2_MM))
        assert len(regions) == 27_000
        assert len(written(tmp_path, regions)) < 2_000_000


def picture_in(page):
    (address,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    picture = Image.open(io.BytesIO(base64.b64decode(address))).convert("RGBA")
    return np.asarray(picture).astype(float)


class TestCohort:
    @pytest.mark.usefixtures("without_template")
    def test_overlap_is_the_sum_of_the_maps(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            _report, "draw_cuts", lambda counts, *_, **__: (drawn.append(counts.copy()) or b"", {1})
        )
        imgs = [make_stat_map(seed=seed, n_regions=6 + seed).img for seed in (0, 1, 2)]
        all_regions = [found(img, 5.0) for img in [*imgs, imgs[1]]]
        all_regions.append(found(imgs[0], 999.0))  # a map of nothing counts as a map
        written(tmp_path, *all_regions)
        total = sum((regions.labels > 0).astype(int) for regions in all_regions)
        np.testing.assert_array_equal(drawn[-1], total)
        assert total.max() >= 2

    def test_where_counts_are_is_said_where_there_is_such_a_file(self, tmp_path):
        report = Report(tmp_path)
        for name in ("a", "b"):
            add(report, found(two_regions()), name)
        assert "overlap.nii.gz" not in report.write().read_text()
        page = report.write("overlap.nii.gz").read_text()
        assert Outline(page).having("a", href="overlap.nii.gz")
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    @pytest.mark.parametrize("folder", [".", "out"])
    def test_maps_in_folders_are_named_and_linked_with_them(self, tmp_path, monkeypatch, folder):
        monkeypatch.chdir(tmp_path)
        (tmp_path / folder).mkdir(exist_ok=True)
        report = Report(folder)
        for subject in ("sub-01", "sub-02"):
            path = tmp_path / folder / subject / "func 1" / "t_desc-regions_dseg.nii.gz"
            report.add(found(two_regions()), path)
        outline = Outline(report.write().read_text())
        assert [row[0] for row in outline.rows if len(row) == 4] == [
            "sub-01/func 1/t",
            "sub-02/func 1/t",
        ]
        assert outline.having("a", href="sub-02/func%201/t_desc-regions_dseg.tsv")

    def test_maps_are_listed_with_links(self, tmp_path):
        page = written(tmp_path, found(two_regions()), found(two_regions(scale=2), 11.0))
        outline = Outline(page)
        assert ["m0", "2", "945", "3"] in outline.rows
        assert ["m1", "1", "216", "11"] in outline.rows
        assert outline.having("a", href="#map-0002")
        assert outline.having("section", id="map-0002")
        assert len(outline.having("svg")) == 3
        assert "In how many of 2 maps each voxel" in page

    def test_grids_that_differ_have_no_overlap(self, tmp_path):
        page = written(tmp_path, found(two_regions()), found(two_regions(affine=MNI_2_MM)))
        assert "The maps are on different grids" in page
        page = written(tmp_path, found(two_regions()), found(two_regions(shape=(12, 13, 15))))
        assert "The maps are on different grids" in page

    def test_no_regions_at_all(self, tmp_path):
        page = written(tmp_path, *[found(two_regions(), 101.0)] * 2)
        assert "No voxel is in a region of any map." in page

    def test_fifty_maps_are_a_page_below_five_megabytes(self, tmp_path):
        maps = [make_stat_map(affine=MNI_3_MM, seed=seed).img for seed in range(5)]
        all_regions = [found(img, 5.0) for img in maps]
        page = written(tmp_path, *all_regions * 10)
        assert len(data_of(page)["maps"]) == 50
        assert len(page.encode()) < 5_000_000 / 2

    def test_a_map_of_2_mm_takes_a_fiftieth_of_that(self, tmp_path):
        shape = (91, 109, 91)
        maps = [make_stat_map(shape, seed, affine=MNI_2_MM, n_regions=6).img for seed in (0, 1)]
        sizes = []
        for n_maps in (1, 2):
            page = written(tmp_path, *[found(img, 5.0) for img in maps[:n_maps]])
            sizes.append(len(page.encode()))
        assert sizes[1] - sizes[0] < 100_000  # with what is there once in every cohort
        real = gpuroi.extract_regions(make_stat_map(shape, affine=MNI_2_MM, fwhm=9).img, "97%")
        assert len(written(tmp_path, real).encode()) - sizes[0] < 100_000

    def test_of_more_the_slices_lie_beside_the_page(self, tmp_path):
        regions, none = found(two_regions()), found(two_regions(), 101.0)
        report = Report(tmp_path)
        for number in range(MOST_EMBEDDED + 2):
            add(report, none if number == 3 else regions, f"m{number}")
            assert (tmp_path / "report_data").exists() == (number >= MOST_EMBEDDED)
        report.write()
        page = (tmp_path / "report.html").read_text()
        assert data_of(page)["maps"] == {}
        assert len(page) < 400_000
        names = sorted(path.name for path in (tmp_path / "report_data").iterdir())
        numbers = [number for number in range(1, MOST_EMBEDDED + 3) if number != 4]
        assert names == [f"{number:04d}.js" for number in numbers]
        text = (tmp_path / "report_data/0052.js").read_text()
        call = re.fullmatch(r'gpuroiReport\.receive\("0052",(.*)\);\n', text)
        payload = json.loads(call[1])
        np.testing.assert_array_equal(labels_in(payload), regions.labels)
        assert payload["picture"].startswith("data:image/png;base64,")


class TestFiles:
    def test_an_old_page_stays_if_the_new_one_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "report.html").write_text("old")

        def full(descriptor):
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            written(tmp_path, found(two_regions()))
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        assert (tmp_path / "report.html").read_text() == "old"

    def test_no_map_is_held_as_a_volume(self, tmp_path):
        regions = found(two_regions())
        add(Report(tmp_path), regions)
        assert "labels" not in vars(regions)


class TestCharts:
    def test_bars_are_as_high_as_counts(self):
        bars = heights(histogram_of_counts([4, 4, 4, 5, 7], "regions"))
        np.testing.assert_allclose(bars / bars.max(), [1, 1 / 3, 1 / 3], atol=1e-3)

    @pytest.mark.parametrize(("counts", "n_bars"), [([7], 1), ([3, 3, 3], 1), ([4, 5], 2)])
    def test_few_bars_are_no_slabs(self, counts, n_bars):
        """Each is at most a sixth as wide as the axis, and above its number."""
        svg = histogram_of_counts(counts, "regions")
        start, end = map(float, re.search(r'<line x1="(\d+)" .* x2="(\d+)"', svg).groups())
        bars = re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"', svg)
        ticks = re.findall(r'<text x="([\d.]+)"[^>]*middle">\d+</text>', svg)
        assert len(bars) == len(ticks) == n_bars
        for (left, width), tick in zip(bars, ticks, strict=True):
            assert 20 < float(width) <= (end - start) / 6
            assert abs(float(left) + float(width) / 2 - float(tick)) < 0.2  # rounded

    @pytest.mark.parametrize("values", [[5], [0, 0], list(range(300)), [1, 10**6]])
    def test_every_count_is_in_a_bar(self, values):
        assert share_of_all(histogram_of_counts(values, "regions"), len(values))

    @pytest.mark.parametrize("values", [[27.0], [1e-6, 1e9], [8.0] * 5, [27.0, 54.0, 1e5]])
    def test_every_volume_is_in_a_bar(self, values):
        assert share_of_all(histogram_of_volumes(values, "mm³"), len(values))


def heights(svg):
    return np.array([float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)])


def share_of_all(svg, n_values):
    """Return whether the bars of `svg`, whose highest has its count written, come to all values."""
    most = int(re.search(r'text-anchor="end">(\d+)</text>', svg)[1])
    bars = heights(svg)
    return np.isclose((bars / bars.max() * most).sum(), n_values, atol=0.05)


# ---- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium that can reach no network, and logs what its console is told."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not on PATH; apt-get install chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--force-device-scale-factor=1",
        "--window-size=1280,1400",
        "--proxy-server=127.0.0.1:9",  # where nobody listens
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(20)
    yield Page(driver)
    driver.quit()


class Page:
    """A report in a browser."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path):
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        return self

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        found = "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.script(f"return {found}", selector)

    def wait(self, condition, *arguments):
        """Wait until a JavaScript expression is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20, 0.02).until(
            lambda driver: driver.execute_script(f"return {condition}", *arguments), condition
        )

    def wait_until_drawn(self, map_number="0001"):
        selector = f"#map-{map_number} .viewer[data-state=ready]"
        self.wait("document.querySelector(arguments[0]) !== null", selector)

    def wait_until_said(self, words):
        self.wait("document.querySelector('.readout').textContent.includes(arguments[0])", words)

    def pixel(self, axis, column, row):
        code = """
            const canvas = document.querySelector(`canvas[data-axis=${arguments[0]}]`);
            return [...canvas.getContext("2d").getImageData(arguments[1], arguments[2], 1, 1).data];
        """
        return self.script(code, axis, column, row)

    def column(self, n, table="section.map table"):
        return self.texts(f"{table} tbody td:nth-child({n})")

    def selected(self):
        return self.texts("tr[aria-selected=true] td:first-child")

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def keys(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)


def place_of(payload, axis, mm):
    """Return the pixel of a place in the slice across `axis`."""
    across, up = (other for other in range(3) if other != axis)
    (left, _), (_, top) = payload["bounds"][across], payload["bounds"][up]
    scale = payload["scale"]
    return int((mm[across] - left) * scale), int((top - mm[up]) * scale)


def color_of(label):
    return [*np.rint(255 * np.array(region_colors(label)[-1][:3])).astype(int).tolist(), 255]


class TestPictures:
    def drawn(self, monkeypatch, affine):
        """Return cuts with a region to the right and in front, and the places of texts."""
        shape = (20, 22, 24)
        voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        mm = voxels @ affine[:3, :3].T + affine[:3, 3]
        offset = (mm - mm.mean(axis=(0, 1, 2))) / np.ptp(mm, axis=(0, 1, 2))
        volume = ((offset[..., :2] > 0.1) & (offset[..., :2] < 0.3)).all(axis=-1).astype(np.int32)
        texts = {}
        write = ImageDraw.ImageDraw.text

        def record(draw, place, text, *arguments, **options):
            texts[text] = place
            write(draw, place, text, *arguments, **options)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
        bounds = Volume(volume, affine).bounds_mm
        scene = _scene.Scene(bounds, None, is_shared=False)
        picture, _ = draw_cuts(volume, affine, scene, region_palette(1), numbered=True)
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA")), texts

    @pytest.mark.parametrize("name", AFFINES)
    def test_left_is_left_and_front_is_up(self, monkeypatch, name):
        pixels, texts = self.drawn(monkeypatch, AFFINES[name])
        assert texts["L"][0] < texts["R"][0]
        red, _, blue, alpha = np.moveaxis(pixels.astype(int), -1, 0)
        rows, columns = np.nonzero((alpha > 0) & (red - blue > 60))  # the orange of region 1
        width, height = texts["R"][0], pixels.shape[0]
        assert len(rows) > 20
        assert columns[columns <= width + 20].mean() > width / 2
        assert rows.mean() < height / 2

    def test_the_letters_of_two_cuts_are_no_pair(self, monkeypatch):
        """Each side's letter is far nearer to its own cut's middle than to the next cut."""
        spans = {"L": [], "R": []}
        write = ImageDraw.ImageDraw.text

        def record(draw, place, text, ink, font, **options):
            if text in spans:
                box = draw.textbbox(place, text, font, anchor=options.get("anchor"))
                spans[text].append(box[::2])
            write(draw, place, text, ink, font, **options)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
        regions = found(make_stat_map(affine=MNI_3_MM, n_regions=12).img, 5.0)
        scene = _scene.scene_of(Volume(regions.labels, regions.affine, is_labels=True), None)
        picture, _ = draw_cuts(
            regions.labels, regions.affine, scene, region_palette(12), numbered=True
        )
        lefts, rights = np.array(spans["L"]), np.array(spans["R"])
        assert len(lefts) == len(rights) == 7
        between_cuts = lefts[1:, 0] - rights[:-1, 1]
        inside_cuts = rights[:, 0] - lefts[:, 1]
        assert between_cuts.min() >= 36  # pixels, three times the height of a letter
        assert inside_cuts.min() > 2 * between_cuts.max()
        assert rights[-1, 1] < Image.open(io.BytesIO(picture)).width

    def test_every_region_there_is_room_for_has_its_number(self, tmp_path):
        """The small one is in none of seven cuts through as many voxels each."""
        data = np.zeros((20, 20, 60), np.float32)
        data[2:18, 2:18, 20:60] = 5
        data[5:9, 5:9, 2:4] = -5
        regions = found(image(data, MNI_3_MM))
        labels = Volume(regions.labels != 0, regions.affine)
        even = cuts_along(labels, "z", 7)
        assert not any((labels.plane("z", mm).pixels.sum()) == 16 for mm in even)
        scene = _scene.scene_of(Volume(regions.labels, regions.affine, is_labels=True), None)
        _, numbered = draw_cuts(
            regions.labels, regions.affine, scene, region_palette(2), numbered=True
        )
        assert numbered == {1, 2}
        assert "Numbers are those of the table.</figcaption>" in written(tmp_path, regions)

    @pytest.mark.parametrize(
        ("n_regions", "said"),
        [(7, "of the table."), (9, "; not numbered in these cuts: "), (40, " and 13 more.")],
    )
    def test_what_has_no_number_is_said(self, tmp_path, n_regions, said):
        data = np.zeros((12, 12, 2 * n_regions), np.float32)
        for k in range(n_regions):
            data[3:8, 3:8, 2 * k] = 5
        page = written(tmp_path, found(image(data, np.diag([3.0, 3, 1, 1]))))
        caption = re.search(r"<figcaption>(.*?)</figcaption>", page)[1]
        assert said in caption
        if n_regions == 9:
            left_out = caption.removesuffix(".").rsplit(": ")[1].split(", ")
            assert len(left_out) == 2
            assert set(left_out) < set(map(str, range(1, 10)))

    def test_a_label_has_the_colour_of_its_region(self, tmp_path):
        page = written(tmp_path, found(make_stat_map(affine=MNI_3_MM, n_regions=7).img, 5.0))
        for label, color in enumerate(region_palette(7), start=1):
            assert f'<i class="c{label - 1}"></i>{label}</td>' in page
            assert f".c{label - 1} {{ background: {hex_color(color)}; }}" in page

    def test_the_largest_region_is_shown_first(self, tmp_path):
        page = written(tmp_path, found(two_regions()))
        assert 'data-first="1"' in page
        data = np.asarray(two_regions().dataobj)[::-1].copy()  # now the smaller one comes first
        assert 'data-first="2"' in written(tmp_path, found(image(data, MNI_3_MM)))


class TestBrowser:
    def test_rows_sort_by_number_both_ways(self, browser, tmp_path):
        regions = found(make_stat_map(affine=MNI_3_MM, n_regions=12).img, 5.0)
        written(tmp_path, regions)
        browser.open(tmp_path / "report.html").wait_until_drawn()
        for n, name in ((1, "label"), (3, "voxels"), (5, "peak_value"), (6, "peak_x")):
            header = browser.find(f"section.map th:nth-child({n})")
            expected = sorted(regions.table[name])
            for way, values in (("ascending", expected), ("descending", expected[::-1])):
                header.find_element("tag name", "button").click()
                assert header.get_attribute("aria-sort") == way
                shown = [float(text) for text in browser.column(n)]
                np.testing.assert_allclose(shown, values, rtol=1e-3)  # four digits
        assert len(browser.texts("th[aria-sort]")) == 1
        assert browser.complaints() == []

    def test_words_sort_with_blanks_last(self, browser, tmp_path):
        data = np.zeros((9, 9, 9), np.float32)
        data[1:3, 1:3, 1:3] = data[4:6, 4:6, 0:2] = data[1:3, 6:8, 6:8] = 4
        written(tmp_path, found(image(data)), failures=[("m10", "b"), ("m9", "a"), ("M1", "c")])
        browser.open(tmp_path / "report.html")
        last = browser.find("section.map th:last-child button")
        for _ in range(2):
            last.click()
            assert browser.column(13) == ["yes", "", ""]
        browser.find("#failures th button").click()
        assert browser.column(1, "#failures table") == ["M1", "m9", "m10"]

    @pytest.mark.parametrize("name", ["3 mm", "flipped", "oblique", "anisotropic"])
    def test_a_row_shows_its_region(self, browser, tmp_path, name):
        flipped = MNI_3_MM * [[-1], [1], [1], [1]]
        affine = {"3 mm": MNI_3_MM, "flipped": flipped}.get(name, AFFINES.get(name))
        regions = found(two_regions(affine=affine))
        payload = data_of(written(tmp_path, regions))["maps"]["0001"]
        browser.open(tmp_path / "report.html").wait_until_drawn()
        for label in (2, 1):
            browser.find(f"tr[data-label='{label}']").click()
            browser.wait("document.querySelector('tr[aria-selected=true]') !== null")
            browser.wait_until_said(f"region {label},")
            assert browser.selected() == [str(label)]
            peak = regions.table.loc[label - 1, ["peak_x", "peak_y", "peak_z"]].to_numpy(float)
            x, y, z = (f"{mm:.1f}".replace("-", "\N{MINUS SIGN}") for mm in peak)
            assert f"x {x} y {y} z {z} mm" in browser.find(".readout").text
            for axis in range(3):
                assert browser.pixel("xyz"[axis], *place_of(payload, axis, peak)) == color_of(label)
        assert browser.complaints() == []

    def test_left_is_left_whatever_the_order_of_voxels(self, browser, tmp_path):
        """The region at x = -66 mm is drawn left of the middle, with the letter L there."""
        flipped = np.array([[-3.0, 0, 0, 60], [0, 3, 0, -40], [0, 0, 3, 0], [0, 0, 0, 1]])
        data = np.zeros((43, 13, 14), np.float32)
        data[40:43, 5:8, 5:8] = 5
        payload = data_of(written(tmp_path, found(image(data, flipped))))["maps"]["0001"]
        browser.open(tmp_path / "report.html").wait_until_drawn()
        browser.find("tr[data-label='1']").click()
        browser.wait_until_said("x \N{MINUS SIGN}60.0")
        column, row = place_of(payload, 2, (-60, -25, 15))
        width = browser.script("return document.querySelector('canvas[data-axis=z]').width")
        assert column < 0.2 * width
        assert browser.pixel("z", column, row) == color_of(1)
        assert browser.pixel("z", width - column, row) != color_of(1)

    def test_values_have_their_colours(self, browser, tmp_path):
        payload = data_of(written(tmp_path, found(two_regions())))["maps"]["0001"]
        browser.open(tmp_path / "report.html").wait_until_drawn()
        browser.find("tr[data-label='2']").click()
        browser.find("[data-values]").click()
        browser.wait("document.querySelector('.scale').hidden === false")
        browser.wait_until_said("region 2,")
        blue = [5, 48, 97, 255]  # the lowest of matplotlib's RdBu_r
        assert browser.pixel("z", *place_of(payload, 2, payload["peaks"][1])) == blue
        assert browser.texts(".scale span") == ["\N{MINUS SIGN}6.00", "6.00"]
        assert browser.find("[data-values]").get_attribute("aria-pressed") == "true"

    def test_a_click_into_a_slice_moves_the_cross(self, browser, tmp_path):
        regions = found(two_regions())
        payload = data_of(written(tmp_path, regions))["maps"]["0001"]
        browser.open(tmp_path / "report.html").wait_until_drawn()
        browser.find("tr[data-label='1']").click()
        browser.wait_until_said("region 1,")
        x, y, z = payload["peaks"][0]
        column, row = place_of(payload, 2, (x + 3, y + 6, z))
        code = """
            const canvas = document.querySelector("canvas[data-axis=z]");
            const box = canvas.getBoundingClientRect();
            const shrunk = box.width / canvas.width;
            canvas.dispatchEvent(new MouseEvent("click", {
                clientX: box.left + arguments[0] * shrunk, clientY: box.top + arguments[1] * shrunk,
            }));
        """
        browser.script(code, column, row)
        browser.wait_until_said(f"z {z:.1f}".replace("-", "\N{MINUS SIGN}"))
        browser.wait(
            "!document.querySelector('.readout').textContent.includes(arguments[0])", f"{y:.1f}"[1:]
        )
        said = browser.find(".readout").text.replace("\N{MINUS SIGN}", "-")
        moved = [float(mm) for mm in re.findall(r"[xyz] (-?[\d.]+)", said)]
        np.testing.assert_allclose(moved, (x + 3, y + 6, z), atol=1.0)  # half a pixel, rounded
        browser.script(code, 2, 2)
        browser.wait_until_said("no region")
        assert browser.selected() == []

    def test_everything_is_reached_by_keys(self, browser, tmp_path):
        from selenium.webdriver.common.keys import Keys

        written(tmp_path, found(two_regions()))
        browser.open(tmp_path / "report.html").wait_until_drawn()
        browser.script("document.querySelector('section.map th:last-child button').focus()")
        browser.keys(Keys.TAB)
        browser.keys(Keys.ARROW_DOWN)
        browser.keys(Keys.ENTER)
        browser.wait_until_said("region 2,")
        assert browser.selected() == ["2"]
        browser.keys(Keys.ARROW_UP)
        browser.keys(Keys.SPACE)
        browser.wait_until_said("region 1,")
        browser.script("document.querySelector('canvas[data-axis=z]').focus()")
        for key, step in (
            (Keys.ARROW_RIGHT, (3, 0, 0)),
            (Keys.ARROW_UP, (0, 3, 0)),
            (Keys.PAGE_UP, (0, 0, 3)),
            (Keys.PAGE_DOWN, (0, 0, -3)),
        ):
            before = browser.find(".readout").text
            browser.keys(key)
            browser.wait("document.querySelector('.readout').textContent !== arguments[0]", before)
            moved = [
                [
                    float(mm)
                    for mm in re.findall(r"[xyz] (-?[\d.]+)", said.replace("\N{MINUS SIGN}", "-"))
                ]
                for said in (before, browser.find(".readout").text)
            ]
            np.testing.assert_allclose(np.subtract(*moved[::-1]), step, atol=1e-9)
        browser.script("document.querySelector('th button').focus()")
        browser.keys(Keys.ENTER)
        assert browser.find("th").get_attribute("aria-sort") == "ascending"
        assert browser.complaints() == []

    def test_maps_of_a_cohort_are_shown_as_they_come_into_view(self, browser, tmp_path):
        imgs = [make_stat_map(affine=MNI_3_MM, seed=seed).img for seed in range(12)]
        written(tmp_path, *[found(img, 5.0) for img in imgs], failures=[(HOSTILE, HOSTILE)])
        browser.open(tmp_path / "report.html")
        assert browser.texts("#map-0012 .readout") == [""]
        for number in ("0012", "0001", "0007"):
            browser.script(
                "document.getElementById(arguments[0]).scrollIntoView()", f"map-{number}"
            )
            browser.wait_until_drawn(number)
        browser.script("document.querySelector('#map-0001 tr[data-label=\"3\"]').click()")
        browser.wait_until_said("region 3,")
        assert browser.complaints() == []

    def test_what_lies_beside_the_page_comes_on_demand(self, browser, tmp_path):
        regions = found(two_regions())
        payload = data_of(written(tmp_path, regions))["maps"]["0001"]
        written(tmp_path, *[regions] * (MOST_EMBEDDED + 1))
        browser.open(tmp_path / "report.html")
        assert browser.script("return document.querySelectorAll('[data-state]').length") == 0
        browser.find("#map-0001 [data-open]").click()
        browser.wait_until_drawn()
        browser.find("#map-0001 tr[data-label='2']").click()
        browser.wait_until_said("region 2,")
        place = place_of(payload, 2, payload["peaks"][1])
        assert browser.pixel("z", *place) == color_of(2)
        assert browser.script("return document.querySelector('#map-0001 img').naturalWidth") > 0
        assert browser.script("return document.querySelectorAll('[data-state]').length") == 1
        assert browser.complaints() == []
        (tmp_path / "report_data/0003.js").unlink()
        browser.find("#map-0003 [data-open]").click()
        said = "document.querySelector('#map-0003 .readout').textContent"
        browser.wait(f"{said}.includes('report_data/0003.js is not beside this page')")

    def test_names_of_files_run_nothing(self, browser, tmp_path):
        report = Report(tmp_path)
        add(report, found(two_regions()), HOSTILE)
        report.fail(f"{HOSTILE}.nii", "<script>document.title = 'run'</script>")
        report.write()
        browser.open(tmp_path / "report.html").wait_until_drawn()
        assert browser.driver.title == f"Regions of {HOSTILE}"
        assert browser.texts("h2")[-1] == HOSTILE
        assert browser.complaints() == []

    @pytest.mark.parametrize("width", [390, 1280])
    def test_nothing_is_wider_than_the_window(self, browser, tmp_path, width):
        written(tmp_path, *[found(make_stat_map(affine=MNI_3_MM).img, 5.0)] * 2)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            browser.open(tmp_path / "report.html")
            page = browser.script("return document.documentElement.scrollWidth")
        finally:
            browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert page <= width

    def test_the_slices_follow_the_colour_scheme(self, browser, tmp_path):
        written(tmp_path, found(two_regions()))
        corners = []
        for scheme in ("light", "dark"):
            browser.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            browser.open(tmp_path / "report.html").wait_until_drawn()
            corners.append(browser.pixel("z", 60, 1))
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        assert corners == [[0xF3, 0xF5, 0xF7, 255], [0x1D, 0x22, 0x28, 255]]
