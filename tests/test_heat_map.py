import numpy as np
from matplotlib.figure import Figure

from hmoe.heat_map import draw_load, load_figure


def test_experts_stand_in_order_of_size_and_layers_with_fewer_end_empty():
    shares = np.ma.filled(
        draw_load(Figure().add_subplot(), [[0.1, 0.9, 0.5], [1.0, 0.0]], [[32, 8, 16], [8, 24]]).get_array(), np.nan
    )
    np.testing.assert_array_equal(shares, [[0.9, 0.5, 0.1], [1.0, 0.0, np.nan]])


def test_colours_run_from_zero_to_the_largest_share():
    image = draw_load(Figure().add_subplot(), [[0.2, 0.8]])
    assert image.get_clim() == (0, 0.8)
    lightness = [sum(image.to_rgba(share)[:3]) for share in (0.0, 0.2, 0.8)]
    assert lightness == sorted(lightness)


def test_a_figure_has_axes_numbers_and_a_colour_bar():
    axes, bar = load_figure([[0.25, 0.75]] * 2, [[16, 8]] * 2).axes
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == (
        "expert size [neurons]",
        "layer",
        "share of tokens",
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16"]
    assert [text.get_text() for text in axes.texts] == ["75", "25"] * 2


def test_many_experts_no_load_at_all_and_one_expert_can_be_drawn():
    for load in ([[0.0] * 64] * 3, [[0.0]], [[1.0]]):
        axes, _ = load_figure(load).axes
        assert axes.get_xlabel() == "expert"
