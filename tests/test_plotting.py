"""Figures: what is drawn lies where it is in space, and looks as it did."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images

import gpuroi
from gpuroi import plotting
from gpuroi.errors import DimensionError
from gpuroi.image import threshold_img
from gpuroi.plotting import Cut, _backgrounds
from gpuroi.plotting._colors import N_COLORS, ValueColors, region_color, region_colors
from gpuroi.plotting._cuts import cut_through_signal, cuts_along
from gpuroi.plotting._planes import Volume
from tests.conftest import image

BASELINES = Path(__file__).parent / "baselines"

# Text and lines move by a fraction of a pixel between versions of matplotlib and FreeType; anatomy,
# colours and places do not.
TOLERANCE = 10

MM = np.diag([3.0, 3.0, 3.0, 1.0])
TURNED = MM.copy()
TURNED[:3, :3] = 3 * np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
TURNED[:3, 3] = -20, 10, 5
AFFINES = {
    "straight": MM,
    "flipped": np.diag([-3.0, 3.0, -3.0, 1.0]),
    "permuted": np.array([[0, -2.0, 0, 40], [0, 0, 3.0, -9], [4.0, 0, 0, -30], [0, 0, 0, 1]]),
    "oblique": TURNED,
}

WHITE = (255, 255, 255)

# Nothing but what is in the image.
BARE = {"annotate": False, "draw_cross": False, "colorbar": False}


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    with mpl.rc_context({"backend": "agg"}):
        yield
    pyplot.close("all")


@pytest.fixture
def no_template(monkeypatch):
    monkeypatch.setattr("gpuroi.plotting._scene.mni_template", lambda: None)


def head(shape=(22, 26, 24), affine=MM, seed=0):
    """Return a map with a head, a positive and a negative region."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    data = np.where((grid**2).sum(axis=0) < 0.9, rng.normal(0, 0.5, shape), 0)
    data[5:10, 8:14, 6:12] = 5
    data[13:18, 15:20, 12:18] = -6
    return image(data.astype(np.float32), affine)


def rendered(display):
    """Return the pixels (rows from the top) of a figure, and its height."""
    display.figure.canvas.draw()
    return np.asarray(display.figure.canvas.buffer_rgba())[..., :3].astype(int)


def places_of(display, cut, is_drawn):
    """Return the mm of the pixels of a panel for which `is_drawn` holds."""
    pixels = rendered(display)
    panel = display.panels[cut]
    rows, columns = np.nonzero(is_drawn(pixels))
    from_bottom = pixels.shape[0] - 1 - rows
    places = panel.transData.inverted().transform(
        np.stack([columns + 0.5, from_bottom + 0.5], axis=1)
    )
    (left, right), (low, high) = sorted(panel.get_xlim()), panel.get_ylim()
    inside = (places[:, 0] > left) & (places[:, 0] < right)
    return places[inside & (places[:, 1] > low) & (places[:, 1] < high)]


def colors_in(display, cut):
    """Return the colours (RGB) of a panel, but of its border."""
    pixels, box = rendered(display), display.panels[cut].get_window_extent()
    top, bottom = pixels.shape[0] - int(box.y1), pixels.shape[0] - int(box.y0)
    inside = pixels[top + 3 : bottom - 3, int(box.x0) + 3 : int(box.x1) - 3]
    assert inside.size > 1000
    return set(map(tuple, inside.reshape(-1, 3).tolist()))


def is_red(pixels):
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return (red - green > 60) & (red - blue > 60)


class TestGeometry:
    @pytest.mark.parametrize("radiological", [False, True])
    @pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
    def test_a_voxel_is_drawn_at_its_place(self, affine, radiological):
        data = np.zeros((14, 15, 16), np.float32)
        voxel = np.array([4, 9, 5])
        data[3:6, 8:11, 4:7] = 5
        place = affine[:3, :3] @ voxel + affine[:3, 3]
        bg = image(np.ones(data.shape, np.float32), affine)
        display = plotting.plot_stat_map(
            image(data, affine),
            bg_img=bg,
            cut_coords=place,
            annotate=False,
            draw_cross=False,
            colorbar=False,
            radiological=radiological,
        )
        side = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).max()
        for cut in display.panels:
            normal = "xyz".index(cut.direction)
            drawn = places_of(display, cut, is_red)
            expected = np.delete(place, normal)
            assert len(drawn) > 20
            # A pixel or two of the picture, far less than a voxel.
            np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.25 * side)
            reach = np.abs(drawn - expected).max(axis=0)
            assert (reach < 2.6 * side).all()
            left, right = display.panels[cut].get_xlim()
            assert (left > right) == (radiological and cut.direction != "x")

    def test_contours_surround_their_region(self):
        regions = np.zeros((14, 15, 16), np.float32)
        regions[3:8, 8:12, 4:9] = 2
        display = plotting.plot_prob_atlas(
            image(regions[..., np.newaxis], MM),
            bg_img=None,
            cut_coords=(15, 28, 18),
            annotate=False,
            draw_cross=False,
            colorbar=False,
            cmap="Reds_r",
            linewidths=1,
            view_type="contours",
        )
        drawn = places_of(display, Cut("z", 18.0), is_red)
        # Edges of the region's voxels in mm, on which the line runs, give or take its corners.
        np.testing.assert_allclose(drawn.min(axis=0), [7.5, 22.5], atol=1)
        np.testing.assert_allclose(drawn.max(axis=0), [22.5, 34.5], atol=1)
        inside = (np.abs(drawn - [15, 28.5]) < [5, 4]).all(axis=1)
        assert not inside.any()

    def test_a_region_at_the_border_has_a_closed_line(self):
        labels = np.ones((6, 7, 8), np.uint8)
        display = plotting.plot_regions(
            image(labels, MM),
            bg_img=None,
            display_mode="z",
            cut_coords=[9],
            alpha=0,
            numbers=False,
            colorbar=False,
            annotate=False,
            cmap="Reds_r",
        )
        (panel,) = display.panels.values()
        ((path,),) = [collection.get_paths() for collection in panel.collections]
        assert np.array_equal(path.vertices[0], path.vertices[-1])


class TestCuts:
    def test_ortho_goes_through_the_peak(self):
        display = plotting.plot_stat_map(head(), bg_img=None)
        assert [cut.direction for cut in display.panels] == ["x", "y", "z"]
        x, y, z = (cut.at_mm / 3 for cut in display.panels)
        assert head().dataobj[int(x), int(y), int(z)] == -6

    def test_of_many_peaks_the_one_amid_the_most_signal(self):
        data = np.zeros((30, 30, 30), np.float32)
        data[2:4, 2:4, 2:4] = 8  # first in C order, and small
        data[12:22, 14:22, 10:20] = 5
        data[14:20, 16:20, 12:18] = 8
        cut = cut_through_signal(Volume(data, MM))
        assert np.abs(np.array(cut) / 3 - [16.5, 17.5, 14.5]).max() <= 0.5

    @pytest.mark.parametrize("direction", ["x", "y", "z"])
    def test_cuts_lie_where_the_signal_is(self, direction):
        img = head()
        volume = Volume(np.where(np.abs(img.dataobj) > 3, img.dataobj, 0), MM)
        cuts = cuts_along(volume, direction, 5)
        assert len(set(cuts)) == 5
        assert cuts == sorted(cuts)
        for mm in cuts:
            assert np.abs(volume.plane(direction, mm).pixels).max() > 3

    def test_there_are_no_more_cuts_than_planes_with_signal(self):
        volume = np.zeros((10, 11, 12))
        volume[3, 4, 5:8] = 1
        assert cuts_along(Volume(volume, MM), "z", 7) == [15, 18, 21]
        assert cuts_along(Volume(volume, MM), "x", 7) == [9]
        assert len(cuts_along(Volume(volume * 0, MM), "x", 7)) == 7
        assert cut_through_signal(Volume(volume * 0, MM)) == (12, 15, 15)

    def test_labels_have_no_size(self):
        labels = np.zeros((4, 4, 40), np.int32)
        labels[:2, :2, 0:40], labels[3, 3, 30:40] = 1, 2
        cuts = [
            cuts_along(Volume(np.where(labels == 2, second, labels), MM, is_labels=True), "z", 4)
            for second in (2, 1000)
        ]
        assert cuts[0] == cuts[1]

    def test_a_cut_moves_to_a_region_that_is_in_none(self):
        """The nearest cut that no other region needs, to a quarter of the region or more."""
        labels = np.zeros((16, 16, 42), np.int32)
        labels[0:12, 0:12] = 1
        assert cuts_along(Volume(labels, MM, is_labels=True), "z", 4) == [15, 45, 78, 108]
        labels[14, 14, 5:7] = 2  # in the first of these
        labels[12:15, 13:15, 19:23] = labels[12:14, 13, 23] = labels[12, 13, 24] = 3
        labels[14, 14, 39:42] = 4
        cuts = cuts_along(Volume(labels, MM, is_labels=True), "z", 4)
        assert cuts == [15, 45, 69, 117]

    def test_of_too_many_regions_as_many_as_there_are_cuts_are_seen(self):
        labels = np.zeros((4, 4, 36), np.int32)
        for k in range(12):
            labels[1:3, 1:3, 3 * k] = k + 1
        cuts = cuts_along(Volume(labels, MM, is_labels=True), "z", 7)
        assert len({int(labels[1, 1, round(mm / 3)]) for mm in cuts} - {0}) == 7

    def test_many_specks_do_not_hide_what_is_large(self):
        labels = np.zeros((40, 40, 9), np.int32)
        labels[4:36, 4:36, 0] = 1
        labels[::2, ::2, 8] = np.arange(2, 402).reshape(20, 20)
        assert cuts_along(Volume(labels, MM, is_labels=True), "z", 1) == [0]

    def test_every_kind_of_cut_coords(self):
        def cuts(**options):
            display = plotting.plot_stat_map(head(), bg_img=None, colorbar=False, **options)
            found = [str(cut) for cut in display.panels]
            display.close()
            return found

        assert cuts(cut_coords=(12, 30, -1.25)) == ["x=12", "y=30", "z=\N{MINUS SIGN}1.25"]
        assert cuts(display_mode="y", cut_coords=[30, 33]) == ["y=30", "y=33"]
        assert len(cuts(display_mode="x", cut_coords=3)) == 3
        assert len(cuts(display_mode="z")) == 7
        assert len(cuts(display_mode="mosaic", cut_coords=2)) == 6
        mosaic = {"x": [12], "y": 2, "z": [3, 6, 9]}
        assert len(cuts(display_mode="mosaic", cut_coords=mosaic)) == 6
        assert len(cuts(display_mode="mosaic", cut_coords=[[12], 2, 3])) == 6

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"display_mode": "glass"},
                "display_mode='glass' is not one of 'ortho', 'x', 'y', 'z'",
            ),
            ({"cut_coords": 5}, r"cut_coords=5 does not fit .*'ortho'; pass \(x, y, z\) in mm"),
            ({"cut_coords": (1, 2)}, "does not fit display_mode='ortho'"),
            ({"display_mode": "x", "cut_coords": 0}, "cut_coords=0 along x is neither a number of"),
            ({"display_mode": "x", "cut_coords": "a"}, "cut_coords='a' along x is neither"),
            ({"display_mode": "mosaic", "cut_coords": [1, 2]}, "has 2 entries; for a mosaic pass"),
            ({"threshold": "97"}, "threshold='97' has no percent sign"),
            ({"threshold": -1}, "threshold=-1 is below zero; a threshold is a magnitude"),
        ],
    )
    def test_wrong_ones_are_told(self, options, match):
        with pytest.raises(ValueError, match=match):
            plotting.plot_stat_map(head(), bg_img=None, **options)


class TestPlanes:
    @pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
    @pytest.mark.parametrize("direction", ["x", "y", "z"])
    def test_every_pixel_shows_its_place(self, affine, direction):
        """A map of its own coordinates: inside, interpolation gives each back."""
        shape = (14, 15, 16)
        voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        mm = voxels @ affine[:3, :3].T + affine[:3, 3]
        middle = affine[:3, :3] @ [7, 7, 8] + affine[:3, 3]
        normal = "xyz".index(direction)
        for axis in (axis for axis in range(3) if axis != normal):
            # Far from zero, so that what lies outside is told from what lies inside.
            plane = Volume(mm[..., axis] + 1e4, affine).plane(direction, middle[normal])
            places = np.stack(np.meshgrid(*plane.centers()))[
                0 if axis == min({0, 1, 2} - {normal}) else 1
            ]
            inside = plane.pixels > 9000
            assert inside.sum() > 50
            wrong = np.abs(plane.pixels - 1e4 - places)[inside]
            # At its border an oblique plane fades into the zeros outside.
            assert np.median(wrong) < 1e-2
            if "0.6" not in str(affine):
                assert wrong.max() < 1e-2

    def test_between_two_planes_the_nearer_is_shown(self):
        data = np.arange(5.0)[:, np.newaxis, np.newaxis] * np.ones((5, 4, 3))
        volume = Volume(data, MM)
        for mm, plane in ((2.9, 1), (4.4, 1), (4.6, 2), (1.6, 1), (1.4, 0)):
            assert (volume.plane("x", mm).pixels == plane).all()


class TestImages:
    def test_the_smallest_integer_has_a_magnitude(self):
        data = np.zeros((8, 8, 8), np.int16)
        data[2, 2, 2], data[5, 5, 5] = 100, -32768
        display = plotting.plot_stat_map(image(data, MM), bg_img=None)
        assert [cut.at_mm for cut in display.panels] == [15, 15, 15]

    def test_labels_may_be_huge(self):
        data = np.zeros((8, 8, 8), np.int32)
        data[1:4, 1:4, 1:4], data[5:7, 1:4, 1:4] = 5, 614_454_277
        display = plotting.plot_regions(
            image(data, MM), bg_img=None, display_mode="z", cut_coords=1
        )
        (panel,) = display.panels.values()
        assert "614454277" in {text.get_text() for text in panel.texts} | {
            label.get_text() for label in display.figure.axes[-1].get_yticklabels()
        }

    def test_a_thousand_regions_take_no_longer_than_one_waits(self):
        labels = np.zeros((60, 60, 20), np.int32)
        labels[1::2, 1::2, 1::2] = np.arange(1, 30 * 30 * 10 + 1).reshape(30, 30, 10)
        display = plotting.plot_regions(image(labels, MM), bg_img=None, numbers=True)
        assert sum(len(panel.collections) for panel in display.panels.values()) > 900

    def test_one_volume_may_have_four_axes(self):
        img = head()
        four = image(np.asarray(img.dataobj)[..., np.newaxis], MM)
        assert plotting.plot_stat_map(four, bg_img=None) is not None

    def test_several_volumes_are_told(self):
        many = image(np.zeros((4, 4, 4, 2), np.float32))
        with pytest.raises(DimensionError, match=r"stat_map_img has shape .*; pass one volume"):
            plotting.plot_stat_map(many)
        with pytest.raises(DimensionError, match=r"labels have shape .*; pass one volume, or plot"):
            plotting.plot_regions(many)
        with pytest.raises(DimensionError, match="there is no volume to draw"):
            plotting.plot_prob_atlas(image(np.zeros((4, 4, 4, 0), np.float32)))

    @pytest.mark.parametrize("values", [[0.5], [-1]])
    def test_labels_are_whole_numbers(self, values):
        img = image(np.full((3, 3, 3), values[0], np.float32))
        with pytest.raises(ValueError, match="labels are whole numbers from 0 on"):
            plotting.plot_regions(img)

    @pytest.mark.parametrize("dtype", [">f4", "f8", "i2", "u1"])
    def test_every_dtype_layout_and_what_is_not_finite(self, dtype):
        data = np.asfortranarray(np.abs(np.asarray(head().dataobj)).astype(dtype))
        if np.dtype(dtype).kind == "f":
            data[0, 0, :3] = np.nan, np.inf, -np.inf
        assert len(plotting.plot_stat_map(image(data), bg_img=None, display_mode="z").panels) > 0

    @pytest.mark.parametrize(
        ("value", "shade"), [(0.0, WHITE), (2.0, (103, 0, 31)), (-2.0, (5, 48, 97))]
    )
    def test_a_constant_map_has_one_colour(self, value, shade):
        """The last of its sign, everywhere; a map of zeros is empty."""
        img = image(np.full((5, 6, 7), value, np.float32), MM)
        display = plotting.plot_stat_map(img, bg_img=None, **BARE)
        assert [cut.at_mm for cut in display.panels] == [6, 6, 9]
        assert [colors_in(display, cut) for cut in display.panels] == [{shade}] * 3

    @pytest.mark.parametrize("value", [0.0, 2.0, -2.0])
    def test_a_constant_atlas_has_the_full_colour_of_its_last_volume(self, value):
        img = image(np.full((5, 6, 7, 2), value, np.float32), MM)
        display = plotting.plot_prob_atlas(img, bg_img=None, **BARE)
        of_second = tuple(np.rint(255 * np.array(region_colors(2)[1][:3])).astype(int).tolist())
        expected = {of_second if value else WHITE}
        assert [colors_in(display, cut) for cut in display.panels] == [expected] * 3

    def test_no_labels_draw_nothing(self):
        none = image(np.zeros((5, 6, 7), np.uint8), MM)
        display = plotting.plot_regions(none, bg_img=None, **BARE)
        assert [colors_in(display, cut) for cut in display.panels] == [{WHITE}] * 3

    def test_lazy_regions_and_their_array_look_the_same(self):
        regions = gpuroi.extract_regions(head(), 4.0)
        lazy = regions.to_4d_img()
        dense = nib.Nifti1Image(np.asarray(lazy.dataobj), lazy.affine)
        pictures = [
            rendered(plotting.plot_prob_atlas(img, bg_img=None, cut_coords=(21, 33, 27)))
            for img in (lazy, dense)
        ]
        np.testing.assert_array_equal(*pictures)


class TestColors:
    def test_neighbouring_regions_are_told_apart_by_everybody(self):
        """As seen with deuteranopia and protanopia (Vienot, Brettel and Mollon, 1999)."""
        linear = np.array(region_colors(N_COLORS + 1))[:, :3] ** 2.2
        for seen in (
            [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
            [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        ):
            colors = np.clip(linear @ np.array(seen).T, 0, 1) ** (1 / 2.2)
            distance = np.linalg.norm(colors[:-1] - colors[1:], axis=1)
            assert distance.min() > 0.15

    def test_a_line_of_every_colour_is_seen_on_white_and_on_black(self):
        """Contrast (WCAG 2.2): the quotient of the luminances, each plus 0.05."""
        colors = np.array(region_colors(N_COLORS))[:, :3]
        linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert (1.05 / (luminance + 0.05)).min() >= 1.6
        assert ((luminance + 0.05) / 0.05).min() >= 1.6

    def test_no_region_is_grey_as_the_anatomy_is(self):
        colors = np.array(region_colors(N_COLORS))[:, :3]
        assert np.ptp(colors, axis=1).min() > 0.15

    def test_as_many_regions_as_atlases_have_differ_in_colour(self):
        assert len(set(region_colors(N_COLORS))) == N_COLORS == 49
        assert region_color(N_COLORS + 1) == region_color(1)
        assert region_colors(3, "viridis")[0] == mpl.colormaps["viridis"](0.0)

    @pytest.mark.parametrize(
        ("values", "options", "expected"),
        [
            ((-2, 6), {}, (-6, 6)),
            ((1, 6), {}, (0, 6)),
            ((-6, -1), {}, (-6, 0)),
            ((-2, 6), {"vmax": 4}, (-4, 4)),
            ((-2, 6), {"vmin": -1}, (-1, 1)),
            ((-2, 6), {"vmin": -3, "vmax": 8}, (-3, 8)),
            ((-2, 6), {"vmin": 1}, (1, 6)),
            ((-8, 6), {"vmax": -2}, (-8, -2)),
            ((-2, 6), {"symmetric": False}, (-2, 6)),
            ((1, 6), {"symmetric": True}, (-6, 6)),
            ((0, 0), {}, (-1, 1)),
        ],
    )
    def test_ranges(self, values, options, expected):
        options = {"vmin": None, "vmax": None, "symmetric": "auto", **options}
        colors = ValueColors.of(*values, threshold=0, cmap="RdBu_r", **options)
        assert (colors.norm.vmin, colors.norm.vmax) == expected

    @pytest.mark.parametrize(("vmin", "vmax"), [(0, None), (2, 6), (None, None)])
    def test_a_sign_without_colours_is_not_drawn(self, vmin, vmax):
        options = {"vmin": vmin, "vmax": vmax, "symmetric": "auto"}
        colors = ValueColors.of(-7, 7, threshold=3, cmap="RdBu_r", **options)
        drawn = colors.are_drawn(np.array([-7, -3, -2, 0, 2, 3, 7]))
        negative = vmin is None
        assert drawn.tolist() == [negative, negative, False, False, False, True, True]

    def test_the_bar_shows_ends_threshold_and_gap(self):
        colors = ValueColors.of(
            -7, 7, threshold=3, cmap="RdBu_r", vmin=None, vmax=None, symmetric="auto"
        )
        assert colors.ticks() == [-7, 7, 3, -3, 0]
        at = colors.with_gap()(colors.norm([-6, -2, 0, 2, 6]))
        assert (np.ptp(at[:, :3], axis=1) < 0.01).tolist() == [False, True, True, True, False]
        with plotting.plot_stat_map(head(), None, threshold=2.0) as display:
            labels = [one.get_text() for one in display.figure.axes[-1].get_yticklabels()]
        assert labels == ["\N{MINUS SIGN}6", "\N{MINUS SIGN}2", "0", "2", "6"]

    @pytest.mark.parametrize(
        ("highest", "threshold"), [(15, 2), (20, 2.3), (12, 1.7), (6, 0.5), (8, 1e-6)]
    )
    def test_the_threshold_is_read_off_the_bar(self, highest, threshold):
        data = np.asarray(head().dataobj) / 6 * highest
        with plotting.plot_stat_map(image(data, MM), None, threshold=threshold) as display:
            labels = [one.get_text() for one in display.figure.axes[-1].get_yticklabels()]
        minus = "\N{MINUS SIGN}"
        assert {f"{minus}{highest}", str(highest)} <= set(labels)
        if threshold > 1e-3:
            assert {f"{minus}{threshold}", str(threshold)} <= set(labels)
        else:
            assert "0" in labels

    @pytest.mark.parametrize("plot", ["map", "regions"])
    def test_long_labels_of_bars_are_not_cut_off(self, plot):
        if plot == "map":
            data = np.asarray(head().dataobj) * 1e3
            options = {"threshold": 3000, "cbar_tick_format": "%.3f"}
            display = plotting.plot_stat_map(image(data, MM), None, **options)
        else:
            data = np.zeros((8, 8, 8), np.int32)
            data[2:5, 2:5, 2:5] = 2_000_000_000
            display = plotting.plot_regions(image(data, MM), bg_img=None)
        display.figure.canvas.draw()
        for label in display.figure.axes[-1].get_yticklabels():
            assert label.get_window_extent().x1 <= display.figure.bbox.width

    def test_nilearns_colour_maps_are_known_by_name(self):
        code = "from gpuroi.plotting._colors import color_map; print(color_map('cold_hot').name)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout == "cold_hot\n"

    def test_a_map_of_one_sign_takes_its_half(self):
        for values, is_of_sign in (((1, 6), lambda r, b: r > b), ((-6, -1), lambda r, b: b > r)):
            options = {"vmin": None, "vmax": None, "symmetric": "auto"}
            colors = ValueColors.of(*values, threshold=0, cmap="RdBu_r", **options)
            red, _, blue, _ = colors.cmap(colors.norm(np.sum(values)))
            assert is_of_sign(red, blue)


class TestDisplays:
    def test_a_file_is_written_and_nothing_returned(self, tmp_path):
        for name in ("map.png", "map.pdf", "map.svg"):
            assert plotting.plot_stat_map(head(), output_file=tmp_path / name) is None
            assert (tmp_path / name).stat().st_size > 2000
        assert pyplot.get_fignums() == []

    def test_it_is_a_context_manager(self, tmp_path):
        with plotting.plot_stat_map(head()) as display:
            assert isinstance(display.figure, Figure)
            display.savefig(tmp_path / "map.png", dpi=50)
        assert pyplot.get_fignums() == []
        assert matplotlib.image.imread(tmp_path / "map.png").shape[0] > 50

    def test_figures_and_axes_of_others(self):
        figure = Figure(figsize=(8, 3))
        display = plotting.plot_stat_map(head(), figure=figure, bg_img=None)
        assert display.figure is figure
        own, (_, right) = pyplot.subplots(1, 2, figsize=(8, 3))
        display = plotting.plot_stat_map(head(), axes=right, bg_img=None, title="right")
        assert display.figure is own
        for panel in display.panels.values():
            box, area = panel.get_position(), right.get_position()
            assert box.x0 >= area.x0
            assert box.x1 <= area.x1
        display = plotting.plot_stat_map(head(), figure=figure, axes=(0.5, 0, 0.5, 1), bg_img=None)
        assert all(panel.get_position().x0 >= 0.5 for panel in display.panels.values())

    @pytest.mark.parametrize("mode", ["ortho", "x", "y", "z", "mosaic"])
    def test_nothing_is_cut_off(self, mode):
        with plotting.plot_stat_map(head(), display_mode=mode, title="A title") as display:
            display.figure.canvas.draw()
            width, height = display.figure.canvas.get_width_height()
            drawn = display.figure.get_tightbbox().transformed(
                mpl.transforms.Affine2D().scale(display.figure.dpi)
            )
            assert drawn.x0 >= -1
            assert drawn.y0 >= -1
            assert drawn.x1 <= width + 1
            assert drawn.y1 <= height + 1

    def test_panels_share_a_scale(self):
        display = plotting.plot_stat_map(head(affine=np.diag([2.0, 3, 4, 1])), bg_img=None)
        scales = []
        for panel in display.panels.values():
            box = panel.get_window_extent()
            scales += [box.width / np.ptp(panel.get_xlim()), box.height / np.ptp(panel.get_ylim())]
        np.testing.assert_allclose(scales, scales[0], rtol=1e-6)

    def test_colour_of_the_figure_follows_the_background(self):
        dark = image(np.pad(np.ones((10, 10, 10), np.float32), 4) * 100, MM)
        for options, color in (
            ({"bg_img": dark}, (0, 0, 0)),
            ({"bg_img": dark, "black_bg": False}, (255, 255, 255)),
            ({"bg_img": None}, (255, 255, 255)),
            ({"bg_img": None, "black_bg": True}, (0, 0, 0)),
        ):
            with plotting.plot_stat_map(head(), **options) as display:
                assert tuple(rendered(display)[0, 0]) == color

    def test_a_background_of_both_signs_tells_low_from_nothing(self):
        affine = MM
        regions = gpuroi.extract_regions(head(), 4.0).to_4d_img()
        options = {"display_mode": "z", "cut_coords": [45], "annotate": False, "colorbar": False}
        display = plotting.plot_prob_atlas(regions, head(affine=affine), "contours", **options)
        (cut,) = display.panels
        pixels, panel = rendered(display), display.panels[cut]

        def grey_at(x_mm, y_mm):
            x, y = panel.transData.transform((x_mm, y_mm))
            return int(pixels[pixels.shape[0] - 1 - int(y), int(x), 0])

        low, nothing, ground = grey_at(45, 51), grey_at(1, 1), int(pixels[0, 0, 0])
        assert low < nothing - 60
        assert ground == 255

    def test_nothing_behind_has_two_names(self):
        for nothing in (None, False):
            assert (rendered(plotting.plot_stat_map(head(), nothing))[0, 0] == 255).all()

    @pytest.mark.parametrize(
        ("options", "beyond"),
        [({}, "neither"), ({"vmax": 1}, "both"), ({"vmin": -8, "vmax": 4}, "max")],
    )
    def test_values_beyond_the_bar_are_told(self, options, beyond):
        options = {"vmin": None, "vmax": None, "symmetric": "auto", **options}
        colors = ValueColors.of(-6, 5, threshold=3, cmap="RdBu_r", **options)
        assert colors.beyond(np.array([-6.0, -2, 0, 2, 5])) == beyond
        assert colors.with_gap()(np.array([-1.0, 2.0])).tolist() == [
            list(colors.cmap(0.0)),
            list(colors.cmap(1.0)),
        ]

    def test_regions_carry_the_numbers_of_the_table(self):
        regions = gpuroi.extract_regions(head(), 4.0)
        display = plotting.plot_regions(regions, bg_img=None, display_mode="z", annotate=False)
        written = {text.get_text() for panel in display.panels.values() for text in panel.texts}
        assert written == set(regions.table["label"].astype(str))

    @pytest.mark.parametrize("radiological", [False, True])
    def test_sides_are_marked(self, radiological):
        display = plotting.plot_stat_map(head(), bg_img=None, radiological=radiological)
        for cut, panel in display.panels.items():
            sides = {
                text.get_text(): text.get_position()[0]
                for text in panel.texts
                if text.get_text() in "LR"
            }
            if cut.direction == "x":
                assert not sides
            else:
                assert (sides["L"] < sides["R"]) != radiological

    @pytest.mark.parametrize("given", ["axes", "part", "figure"])
    def test_what_is_written_in_a_dark_figure_of_others_is_seen(self, given):
        figure, own = pyplot.subplots(figsize=(8, 3))
        options = {
            "axes": {"axes": own},
            "part": {"figure": figure, "axes": (0, 0, 1, 1)},
            "figure": {"figure": figure},
        }[given]
        display = plotting.plot_stat_map(head(), bg_img=None, black_bg=True, title="T", **options)
        pixels = rendered(display)
        for panel in display.panels.values():
            box = panel.get_window_extent()
            corner = pixels[pixels.shape[0] - int(box.y0) - 20 :, int(box.x0) : int(box.x0) + 40]
            assert (corner == 0).all(axis=-1).any()  # black ground
        (title,) = figure.texts
        assert title.get_color() == "white"

    def test_no_regions_have_no_colour_bar(self):
        none = image(np.zeros((8, 8, 8), np.uint8), MM)
        display = plotting.plot_regions(none, bg_img=None)
        assert len(display.figure.axes) == len(display.panels)

    def test_numbers_neither_touch_nor_leave_their_panel(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 400, (20, 22, 24)).astype(np.int32)
        display = plotting.plot_regions(image(labels, MM), bg_img=None, annotate=False)
        display.figure.canvas.draw()
        for panel in display.panels.values():
            boxes = [text.get_window_extent() for text in panel.texts]
            assert len(boxes) > 5
            for place, box in enumerate(boxes):
                assert not box.padded(-1).count_overlaps([b.padded(-1) for b in boxes[:place]])

    @pytest.mark.parametrize("letters", [20, 150, 600])
    def test_titles_fit(self, letters):
        display = plotting.plot_stat_map(head(), bg_img=None, title="title " * (letters // 6))
        display.figure.canvas.draw()
        (title,) = display.figure.texts
        assert title.get_window_extent().x1 <= display.figure.bbox.width

    def test_without_nilearn_the_head_is_outlined(self, no_template):
        display = plotting.plot_stat_map(head(), threshold=3, annotate=False, draw_cross=False)
        greys = (np.ptp(rendered(display), axis=2) == 0) & (rendered(display)[..., 0] == 217)
        assert greys.sum() > 1000

    def test_without_nilearn_there_is_no_template(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
        assert _backgrounds.mni_template.__wrapped__() is None

    def test_it_works_without_a_screen(self, tmp_path):
        code = (
            "import numpy as np, nibabel as nib; from gpuroi import plotting;"
            "img = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4));"
            "plotting.plot_stat_map(img, bg_img=None).savefig('map.png'); plotting.show()"
        )
        environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
        assert (tmp_path / "map.png").exists()


class TestThresholdsOfMaps:
    def test_percentiles_are_those_of_threshold_img(self):
        tied = image(np.clip(head().get_fdata(dtype=np.float32), -2, 2), MM)
        kept = threshold_img(tied, "80%").get_fdata()
        as_value = plotting.plot_stat_map(tied, threshold=np.abs(kept[kept != 0]).min())
        as_percentile = plotting.plot_stat_map(tied, threshold="80%")
        assert (rendered(as_percentile) == rendered(as_value)).all()
        with pytest.warns(UserWarning, match="threshold=99%: nothing is drawn"):  # all tie
            plotting.plot_stat_map(tied, threshold="99%")

    def test_that_leave_nothing_are_warned_of(self):
        match = r"threshold=97: nothing is drawn, the largest magnitude is 6; a percentile is text"
        with pytest.warns(UserWarning, match=match):
            plotting.plot_stat_map(head(), threshold=97)
        with pytest.warns(UserWarning, match="nothing is drawn"):
            plotting.plot_prob_atlas(head(), threshold=[1e9], view_type="contours")
        plotting.plot_stat_map(image(np.zeros((5, 6, 7)), MM))  # there is nothing to draw


class TestThresholdsOfAtlases:
    def test_one_level_or_one_each(self):
        data = np.zeros((6, 6, 6, 2), np.float32)
        data[1:5, 1:5, 1:5, 0], data[2:4, 2:4, 2:4, 1] = 1, 5
        img = image(data, MM)
        for threshold in (0.5, "50%", [0.5, 2], np.array([0.5, 2]), ["90%", 1.0], None, "auto"):
            plotting.plot_prob_atlas(img, bg_img=None, threshold=threshold).close()
        with pytest.raises(ValueError, match="threshold has 3 entries, and maps_img 2 volumes"):
            plotting.plot_prob_atlas(img, bg_img=None, threshold=[1, 2, 3])
        with pytest.raises(ValueError, match="view_type='lines' is not one of"):
            plotting.plot_prob_atlas(img, bg_img=None, view_type="lines")

    def test_volumes_below_zero_are_drawn_too(self):
        data = np.zeros((8, 8, 8, 1), np.float32)
        data[2:6, 2:6, 2:6] = -3
        for view_type in ("contours", "continuous"):
            display = plotting.plot_prob_atlas(
                image(data, MM), None, view_type, cut_coords=(12, 12, 12)
            )
            for panel in display.panels.values():
                assert panel.collections or panel.images


def figures():
    """Return each figure that has a picture to be compared with, by its name."""
    regions = gpuroi.extract_regions(head(), 4.0)
    stack = regions.to_4d_img()
    oblique = head(affine=TURNED)
    return {
        "stat_map": lambda: plotting.plot_stat_map(head(), threshold=2.0, title="A map"),
        "stat_map_oblique": lambda: plotting.plot_stat_map(
            oblique, threshold=2.0, display_mode="z", cut_coords=4
        ),
        "stat_map_black": lambda: plotting.plot_stat_map(
            head(), bg_img=None, black_bg=True, display_mode="mosaic", cut_coords=3
        ),
        "contours": lambda: plotting.plot_prob_atlas(stack, view_type="contours"),
        "filled_contours": lambda: plotting.plot_prob_atlas(stack, view_type="filled_contours"),
        "continuous": lambda: plotting.plot_prob_atlas(stack, view_type="continuous"),
        "regions": lambda: plotting.plot_regions(regions),
        "regions_over_map": lambda: plotting.plot_regions(
            regions, stat_map=head(), display_mode="y", cut_coords=3
        ),
    }


@pytest.mark.usefixtures("no_template")
@pytest.mark.parametrize("name", figures())
def test_it_looks_as_it_did(name, tmp_path):
    """After a change that was meant: GPUROI_NEW_BASELINES=1 pytest, and look at them."""
    with figures()[name]() as display:
        display.savefig(tmp_path / f"{name}.png", dpi=60)
    if os.environ.get("GPUROI_NEW_BASELINES"):
        BASELINES.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").replace(BASELINES / f"{name}.png")
        return
    assert compare_images(BASELINES / f"{name}.png", tmp_path / f"{name}.png", TOLERANCE) is None
