"""vim2/command/figures.py: what all pictures share."""

import warnings
from types import SimpleNamespace

import pytest

from vim2.command.figures import figure, from_zero, save, shorten, whole_numbers

pytest.importorskip("matplotlib")


def test_markers_at_the_top_are_drawn_whole():
    fig = figure()
    axes = fig.subplots()
    for values in ([240.0, 289.4, 260.0], [231.0, 242.0, 239.0]):  # far from zero, and near to one another
        axes.plot(values, marker="o")
    from_zero(axes)
    fig.draw_without_rendering()
    room = axes.bbox.y1 - axes.transData.transform((0, 289.4))[1]
    radius = axes.lines[0].get_markersize() / 2 * fig.dpi / 72
    assert room > radius
    assert axes.get_ylim()[0] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["$5 or $6", "k\udce4se", "x" * 30])
def test_any_text_is_drawn_as_it_stands(text):
    fig = figure()
    title = fig.subplots().set_title(shorten(text))
    fig.draw_without_rendering()
    assert len(title.get_text().replace("\\", "")) == min(len(text), 24)


@pytest.mark.filterwarnings("error")
def test_zeros_have_an_axis():
    axes = figure().subplots()
    axes.plot([0.0, 0.0])
    from_zero(axes)
    bottom, top = axes.get_ylim()
    assert bottom == 0 < top


@pytest.mark.parametrize("epochs", [1, 2, 3, 45])
def test_epochs_are_whole_numbers(epochs):
    fig = figure(figsize=(5, 4))
    axes = fig.subplots()
    axes.plot(range(1, epochs + 1), [0.5] * epochs, marker="o")
    whole_numbers(axes.xaxis)
    fig.draw_without_rendering()
    low, high = axes.get_xlim()
    seen = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert seen and all(tick == round(tick) for tick in seen)
    assert epochs > 3 or seen == list(range(1, epochs + 1))


@pytest.mark.filterwarnings("error")
def test_characters_that_the_font_lacks_are_told_once(tmp_path, capsys):
    fig = figure()
    fig.subplots().set_title("\u58f2\u4e0a, \u58f2\u4e0a")
    save(fig, tmp_path / "sales.png")
    out = capsys.readouterr().out
    assert "sales.png has boxes in place of 2 characters (" in out and out.count("\u58f2") == out.count("\u4e0a") == 1
    assert (tmp_path / "sales.png").stat().st_size > 1000
    of_old = SimpleNamespace(
        savefig=lambda *_, **__: warnings.warn(r"Glyph 8364 (\N{EURO SIGN}) missing from current font.", stacklevel=2)
    )
    save(of_old, tmp_path / "old.png")  # of Matplotlib before 3.9
    assert "old.png has boxes in place of 1 character (" in capsys.readouterr().out
    save(figure(), tmp_path / "plain.png")
    assert not capsys.readouterr().out
