"Edge cases of the drawings: shapes, kinds of input, styles in grey, and that nothing is drawn when something is refused."
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from matplotlib.colors import to_rgb
from subspace_nb import plots
from subspace_nb.plots import (as_array, as_names, bars, contact_sheet, heatmap, legend_beside, line_styles, lines, log_axis, method_style,
                               method_styles, new_axes, rank_accuracy, spectrum)


@pytest.fixture(autouse=True)
def closed():
    plt.close('all'); yield; plt.close('all')


@pytest.mark.parametrize('x', [[1, 2, 3], (1., 2., 3.), np.arange(1, 4), torch.arange(1, 4), torch.tensor([1., 2., 3.], dtype=torch.bfloat16),
                               torch.tensor([1., 2., 3.], requires_grad=True), pd.Series([1, 2, 3], index=[7, 8, 9])])
def test_as_array_takes_anything_array_like(x):
    got = as_array(x, 'x', (None,))
    assert got.dtype==float and got.tolist()==[1., 2., 3.]


@pytest.mark.parametrize('x, shape', [([1., 2.], (3,)), ([[1.]], (None,)), (1., (None,)), ([], (None,)), (np.zeros((0, 3)), (None, 3)), (np.zeros((2, 3)), (2, 2))])
def test_as_array_names_what_it_refuses(x, shape):
    with pytest.raises(ValueError, match='widgets'): as_array(x, 'widgets', shape)


def test_as_names_counts():
    assert as_names(range(3), 'rows', 3)==['0', '1', '2']
    assert as_names(pd.Index(['a', 'b']), 'rows', 2)==['a', 'b']
    with pytest.raises(ValueError, match='rows'): as_names('ab', 'rows', 2)     # one name, not two letters


refused = [
    (lambda: spectrum([[1., 2.]]), 's'), (lambda: spectrum([2., 1.], [1.]), 'after'), (lambda: spectrum([2., 1.], cutoff=2), 'cutoff'),
    (lambda: spectrum([2., 1.], cutoff=-1), 'cutoff'), (lambda: lines([[1.]], {}), 'x'), (lambda: lines([1, 2], {'a': [1, 2], 'b': [1]}), r"ys\['b'\]"),
    (lambda: bars([1., 2.], ['a'], ['b']), 'values'), (lambda: bars([[1., 2.]], ['a'], ['b']), 'series'), (lambda: bars([[1.]], ['a', 'b'], ['c']), 'groups'),
    (lambda: bars([[1.]], ['a'], ['b'], errors=[[1., 2.]]), 'errors'), (lambda: heatmap([[1.]], ['a'], ['b', 'c']), 'cols'), (lambda: heatmap([1.], ['a'], ['b']), 'values'),
    (lambda: rank_accuracy([[1., 2.]], [[1., 2.]], ['TA', 'TIES']), 'ranks'), (lambda: rank_accuracy([[1., 2.]], [[1.]], ['TA']), 'accuracies'),
    (lambda: rank_accuracy([[1., 2.]], [[1., 2.]], ['nobody']), 'method'), (lambda: contact_sheet(np.zeros((1, 2, 3, 3, 4)), ['a']), 'images'),
    (lambda: contact_sheet(np.zeros((2, 2, 3, 3)), ['a']), 'rows'), (lambda: contact_sheet(np.zeros((1, 2, 3, 3)), ['a'], cols=['b']), 'cols')]

@pytest.mark.parametrize('call, name', refused)
def test_refusals_name_the_parameter_and_draw_nothing(call, name):
    with pytest.raises(ValueError, match=name): call()
    assert not plt.get_fignums()


drawn = [lambda ax: spectrum([3., 2., 1.], [3., 2., 2.], 1, ax), lambda ax: lines([1, 2], {'a': [1, 2]}, ax), lambda ax: bars([[1., 2.]], ['a'], ['b', 'c'], ax=ax),
         lambda ax: heatmap([[1., 2.]], ['a'], ['b', 'c'], ax), lambda ax: rank_accuracy([[1., 2.]], [[1., 2.]], ['TA'], ax), lambda ax: contact_sheet(np.zeros((1, 2, 3, 3)), ['a'], ax)]

@pytest.mark.parametrize('draw', drawn)
def test_draws_where_it_is_told(draw):
    ax = new_axes()[1]
    assert draw(ax) is ax and len(plt.get_fignums())==1
    assert draw(None) is not ax and len(plt.get_fignums())==2
    ax.figure.canvas.draw()


def test_drawing_leaves_global_settings_alone():
    before = dict(matplotlib.rcParams)
    for draw in drawn: draw(None)
    new_axes(2, 2, title='t')
    assert dict(matplotlib.rcParams)==before


def test_every_method_has_a_look_of_its_own():
    looks = [tuple(sorted(method_style(m).items())) for m in method_styles]
    assert len(set(looks))==len(looks)
    grey = {m: np.dot(to_rgb(method_style(m)['color']), (.299, .587, .114)) for m in method_styles}
    for a in method_styles:
        for b in method_styles:                     # whatever prints in nearly the same grey differs in its marker
            if a!=b and abs(grey[a]-grey[b])<.15: assert method_style(a)['marker']!=method_style(b)['marker']


# Colour vision, simulated in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1)
VISION = {'normal': np.eye(3),
          'protanopia': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
          'deuteranopia': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
          'tritanopia': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}

def lab(color, vision='normal'): # CIELAB, D65; 'grey' keeps the luminance alone
    c = np.array(to_rgb(color)); c = np.where(c<=.04045, c/12.92, ((c+.055)/1.055)**2.4)
    c = np.full(3, c@[.2126, .7152, .0722]) if vision=='grey' else (np.array(VISION[vision])@c).clip(0, 1)
    x, y, z = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]])@c/[.9505, 1, 1.089]
    f = lambda t: np.cbrt(t) if t>.008856 else 7.787*t+16/116
    return np.array([116*f(y)-16, 500*(f(x)-f(y)), 200*(f(y)-f(z))])

def apart(a, b, vision='normal'): return np.linalg.norm(lab(a, vision)-lab(b, vision)) # 2.3 is just noticeable

def test_simulated_vision_is_what_it_says():
    assert apart('#ff0000', '#008000', 'deuteranopia') < .5*apart('#ff0000', '#008000')     # the pair that this palette avoids
    for v in VISION: assert np.allclose(lab('white', v), [100, 0, 0], atol=.5) and apart('black', 'white', v)>99
    assert np.allclose(lab('#0072B2', 'grey')[1:], 0, atol=.1)


@pytest.mark.parametrize('vision', VISION)
def test_palette_stays_apart_for_every_kind_of_colour_vision(vision):
    from itertools import combinations
    close = {(a, b): apart(plots.okabe_ito[a], plots.okabe_ito[b], vision) for a, b in combinations(plots.okabe_ito, 2)}
    assert min(close.values())>9, min(close, key=close.get)


def test_methods_that_look_alike_in_some_vision_differ_in_shape():
    from itertools import combinations
    for a, b in combinations(method_styles, 2):
        s, t = method_style(a), method_style(b)
        if any(apart(s['color'], t['color'], v)<25 for v in (*VISION, 'grey')): assert s['marker']!=t['marker'], (a, b)
        for extra in (' + boosting', ' + LiNeS'): assert method_style(a+extra)['marker']==s['marker']


def test_lines_without_names_differ_in_grey_by_lightness_or_by_shape():
    from itertools import combinations
    for n in range(2, 8):
        for s, t in combinations(line_styles(n), 2): assert s['marker']!=t['marker'] and (s['linestyle']!=t['linestyle'] or apart(s['color'], t['color'], 'grey')>5)
        shades = [lab(s['color'][:3], 'grey')[0] for s in line_styles(n, True)]
        assert (np.diff(shades)<-8).all()            # light to dark, each step to be seen


def test_heat_maps_keep_their_order_in_grey():
    for name in ('cividis', 'viridis_r'):
        light = [lab(c[:3], 'grey')[0] for c in plt.get_cmap(name)(np.linspace(0, 1, 32))]
        assert (np.diff(light)>0).all() or (np.diff(light)<0).all()


def test_bars_of_one_group_differ_in_hatch():
    ax = bars([[1.]*7], ['a'], list('bcdefgh'))
    assert len({p.get_hatch() for p in ax.patches})==7


@given(st.sampled_from(sorted(method_styles)), st.booleans(), st.booleans())
def test_extras_keep_colour_and_marker(method, lines_, boosted):
    name = method+(' + LiNeS' if lines_ else '')+(' + boosting' if boosted else '')
    plain, style = method_style(method), method_style(name)
    assert all(plain[k]==style[k] for k in ('color', 'marker', 'linestyle'))
    assert (style['markerfacecolor']!='white')==boosted


@given(st.integers(1, 20), st.booleans())
def test_line_styles(n, ordered):
    styles = line_styles(n, ordered)
    assert len(styles)==n
    if ordered and n>1:
        light = [np.dot(s['color'][:3], (.299, .587, .114)) for s in styles]
        assert all(a>b for a, b in zip(light, light[1:]))      # light to dark
    elif not ordered and n<=7: assert len({tuple(s.values()) for s in styles})==n


def test_bars_heights_errors_and_hatches():
    ax = bars([[1., 2.], [3., 4.]], ['a', 'b'], ['x', 'y'], errors=[[.1, .2], [.3, .4]])
    assert sorted(p.get_height() for p in ax.patches)==[1., 2., 3., 4.]
    assert len({p.get_hatch() for p in ax.patches})==2
    styles = {m: method_style(m) for m in ('TA', 'TA + boosting')}
    ax = bars([[1., 2.]], ['a'], list(styles), styles=styles)
    assert [t.get_text() for t in ax.get_legend().get_texts()]==list(styles)


def test_legend_can_be_left_out_or_set_beside():
    ax = lines([1, 2], {'a': [1, 2]}, legend=False)
    assert ax.get_legend() is None and legend_beside(ax).get_legend() is not None


def test_lines_takes_data_frames():
    ax = lines([1, 2], pd.DataFrame({'a': [1, 2], 'b': [3, 4]}))
    assert [l.get_ydata().tolist() for l in ax.lines]==[[1, 2], [3, 4]]


def test_log_axis_labels_are_plain():
    ax = log_axis(lines([1, 2, 3], {'a': [1, 20, 300]}))
    ax.figure.canvas.draw()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert '10' in labels and not any('mathdefault' in t for t in labels)
    for bad in ('', 'z', 'xz'):
        with pytest.raises(ValueError, match='which'): log_axis(ax, bad)


def test_contact_sheet_places_pixels():
    im = torch.zeros(2, 3, 4, 5, 3, dtype=torch.uint8); im[1, 2] = torch.tensor([255, 0, 0])
    sheet = contact_sheet(im, ['a', 'b'], gap=1).images[0].get_array()
    assert sheet.shape==(10, 18, 3) and (sheet[5:9, 12:17]==[1, 0, 0]).all() and (sheet[:4, :5]==0).all() and (sheet[4]==1).all()


def test_public_functions_have_docstrings():
    for name in plots.__all__:
        if callable(getattr(plots, name)): assert getattr(plots, name).__doc__
